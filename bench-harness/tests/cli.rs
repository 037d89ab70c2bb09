//! The program as a person meets it: help, clear errors, exit statuses, files.

use std::path::PathBuf;
use std::process::{Command, Output};

fn kavanam(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kavanam"));
    command.args(arguments).env_remove("KAVANAM_ISA").output().expect("the program runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// A folder of this test alone, empty.
fn folder(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("kavanam-cli-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a folder for temporary files");
    dir
}

fn assert_refused(arguments: &[&str], status: i32, says: &[&str]) {
    let output = kavanam(arguments);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {message}");
    for part in says {
        assert!(message.contains(part), "{arguments:?} does not say {part:?}: {message}");
    }
}

#[test]
fn help_names_every_command_and_shows_examples() {
    let output = kavanam(&["--help"]);
    assert!(output.status.success());
    let help = text(&output.stdout);
    for part in ["bench", "machine", "report", "completions", "Examples:", "KAVANAM_ISA"] {
        assert!(help.contains(part), "{part}: {help}");
    }
    assert!(help.lines().all(|line| line.chars().count() <= 120), "{help}");
}

#[test]
fn help_of_bench_explains_its_flags_and_its_file() {
    let help = text(&kavanam(&["bench", "--help"]).stdout);
    let flags = ["--filter", "--threads", "--precision", "--isa", "--peers", "--python", "--json", "--quick"];
    for part in flags.into_iter().chain([
        "gemm",
        "rowwise",
        "attention",
        "rnn",
        "percent_of_peak",
        "torch",
        "requirements.txt",
    ]) {
        assert!(help.contains(part), "{part}: {help}");
    }
}

#[test]
fn a_wrong_command_line_is_refused_with_status_2() {
    assert_refused(&["bench", "fft"], 2, &["fft", "gemm", "attention"]);
    assert_refused(&["bench", "gemm", "--peers", "ours,mkl"], 2, &["unknown peer \"mkl\"", "gemmkit"]);
    assert_refused(&["bench", "gemm", "--isa", "sse9"], 2, &["sse9", "avx2"]);
    assert_refused(&["bench", "gemm", "--filter", "("], 2, &["--filter", "unclosed group"]);
    assert_refused(&["bench", "gemm", "--filter", "^none$"], 2, &["no case matches", "square/64"]);
    assert_refused(&["bench", "gemm", "--threads", "0"], 2, &["--threads"]);
    assert_refused(&["bench", "gemm", "--precision", "exact"], 2, &["strict, highest, high or medium"]);
}

#[test]
fn a_python_that_cannot_work_is_an_error_with_the_way_out() {
    let with = |python: &str, says: &[&str]| {
        let arguments = ["bench", "gemm", "--quick", "--peers", "ours,torch", "--python", python];
        let environment = ["the peer torch", "python3 -m venv DIR", "requirements.txt"];
        assert_refused(&arguments, 1, &[&environment[..], says].concat());
    };
    with("/no/such/python", &["/no/such/python"]);
    // This program is none: it refuses the arguments and ends.
    with(env!("CARGO_BIN_EXE_kavanam"), &["ended without an answer", "unexpected argument"]);
}

#[test]
fn a_python_without_its_peer_is_refused() {
    assert_refused(&["bench", "gemm", "--python", "python3"], 2, &["--python", "--peers ours,torch"]);
}

/// Needs what `docs/peers.md` describes: `KAVANAM_PYTHON=DIR/bin/python cargo test -- --ignored torch`.
#[test]
#[ignore = "needs a Python with PyTorch, named by KAVANAM_PYTHON"]
fn torch_computes_every_quick_case_of_every_family() {
    let python = std::env::var("KAVANAM_PYTHON").expect("KAVANAM_PYTHON names a Python with PyTorch");
    for family in ["gemm", "rowwise", "attention", "rnn"] {
        for precision in ["strict", "highest", "high", "medium"] {
            let arguments = [
                "bench",
                family,
                "--quick",
                "--precision",
                precision,
                "--threads",
                "1,2",
                "--peers",
                "torch",
            ];
            let output = kavanam(&[&arguments[..], &["--python", python.as_str()][..]].concat());
            assert!(output.status.success(), "{family} {precision}: {}", text(&output.stderr));
            assert!(text(&output.stdout).contains("of peak"));
        }
    }
}

#[test]
fn an_isa_that_this_cpu_lacks_is_refused() {
    let foreign = if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" };
    assert_refused(&["bench", "gemm", "--isa", foreign], 2, &["does not support", "scalar"]);
}

#[test]
fn a_file_that_cannot_be_written_is_named_before_anything_is_measured() {
    let arguments = ["bench", "gemm", "--quick", "--json", "/dev/null/records.json"];
    assert_refused(&arguments, 1, &["cannot create", "/dev/null"]);
}

#[test]
fn a_folder_without_results_is_named() {
    assert_refused(&["report", "/no/such/folder"], 1, &["/no/such/folder/results.json"]);
    let dir = folder("truncated");
    std::fs::write(dir.join("results.json"), "{\"format\": 1, \"comm").expect("written");
    assert_refused(&["report", &dir.to_string_lossy()], 1, &["results.json", "EOF"]);
    std::fs::remove_dir_all(dir).expect("removed");
}

#[test]
fn a_quick_bench_of_one_case_prints_a_table_and_writes_records() {
    let dir = folder("bench");
    let file = dir.join("records.json");
    let path = file.to_string_lossy();
    let output = kavanam(&["bench", "gemm", "--quick", "--filter", "^square/(16|32)$", "--json", &path]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let table = text(&output.stdout);
    for part in ["square/16", "ours", "matrixmultiply", "gemmkit", "geometric mean", "worst"] {
        assert!(table.contains(part), "{part}: {table}");
    }
    let records: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&file).expect("the records")).expect("JSON");
    let records = records.as_array().expect("an array");
    assert_eq!(records.len(), 8, "two cases, four peers");
    for record in records {
        assert_eq!(record["family"], "gemm");
        assert_eq!(record["precision"], "strict");
        assert!(record["median_ns"].as_f64() >= record["min_ns"].as_f64());
        assert!(record["samples_ns"].as_array().is_some_and(|samples| samples.len() >= 3));
        assert!(record["gflops"].as_f64().is_some_and(|rate| rate > 0.0));
    }
    assert!(records.iter().any(|r| r["peer"] == "ours" && r["kernel"].as_str().unwrap().starts_with("f32_")));
    let environment = std::fs::read_to_string(dir.join("records.environment.txt")).expect("the environment");
    assert!(environment.contains("kavanam bench gemm") && environment.contains("compiler"), "{environment}");
    std::fs::remove_dir_all(dir).expect("removed");
}

#[test]
fn every_family_runs() {
    for (family, filter) in
        [("rowwise", "^softmax/1024"), ("attention", "^forward/64"), ("rnn", "^gru-train/1x")]
    {
        let output = kavanam(&["bench", family, "--quick", "--filter", filter, "--peers", "ours"]);
        assert!(output.status.success(), "{family}: {}", text(&output.stderr));
        assert!(text(&output.stdout).contains("of peak"));
    }
}

#[test]
fn completions_are_scripts() {
    for shell in ["bash", "zsh", "fish"] {
        let output = kavanam(&["completions", shell]);
        assert!(output.status.success());
        assert!(text(&output.stdout).contains("kavanam"), "{shell}");
    }
    assert_refused(&["completions", "cmd"], 2, &["bash"]);
}
