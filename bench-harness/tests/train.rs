//! `kavanam train`, `pronounce` and `compare` as a person meets them: exit status, message, files.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use support::{TestFolder, fails, kavanam, output, stderr};

/// A model that trains in milliseconds.
const TINY: &str =
    r#"{"width": 16, "heads": 2, "feed_forward": 16, "encoder_layers": 1, "decoder_layers": 1}"#;
const QUICKLY: [&str; 8] = ["--points", "1", "--valid-words", "5", "--beam", "1", "--batch-tokens", "256"];

fn train_args<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["train", "--out", out, "--config", TINY];
    arguments.extend(QUICKLY);
    arguments.extend(more);
    arguments
}

fn trained(folder: &TestFolder, name: &str) -> String {
    let out = folder.path(name);
    let done = output(&train_args(&out, &["--steps", "3"]));
    assert!(done.status.success(), "{}", stderr(&done));
    out
}

#[test]
fn a_run_is_reproduced_by_its_steps_and_seed_and_pronounces() {
    let folder = TestFolder::new("steps");
    let (a, b) = (trained(&folder, "a"), trained(&folder, "b"));
    let weights = |dir: &str| fs::read(Path::new(dir).join("model.safetensors")).unwrap();
    assert!(weights(&a) == weights(&b), "the weights differ");
    let spoken = output(&["pronounce", "--model", &a, "Cat", "dog"]);
    assert!(spoken.status.success(), "{}", stderr(&spoken));
    let text = String::from_utf8(spoken.stdout).unwrap();
    assert!(text.lines().count() == 2 && text.starts_with("Cat\t"), "{text}");
    let again = fails(1, &train_args(&a, &["--steps", "3"]));
    assert!(again.contains("already holds a training run") && again.contains("--resume"), "{again}");
}

#[test]
fn a_run_of_seconds_is_made_again_by_the_steps_that_it_names() {
    let folder = TestFolder::new("seconds");
    let (timed, counted) = (folder.path("timed"), folder.path("counted"));
    let run = output(&train_args(&timed, &["--seconds", "0.3", "--warmup-steps", "5"]));
    let said = stderr(&run);
    assert!(run.status.success(), "{said}");
    let steps = said.split("`--steps ").nth(1).and_then(|rest| rest.split(' ').next()).expect(&said);
    let again = output(&train_args(&counted, &["--steps", steps, "--warmup-steps", "5"]));
    assert!(again.status.success(), "{}", stderr(&again));
    let weights = |dir: &str| fs::read(Path::new(dir).join("model.safetensors")).unwrap();
    assert!(weights(&timed) == weights(&counted), "{said}");
    let message = fails(2, &["train", "--out", &timed, "--resume", "--steps", "9"]);
    assert!(message.contains(steps) && message.contains("without --steps"), "{message}");
    let message = fails(2, &train_args(&folder.path("c"), &["--seconds", "1", "--cooldown", "1"]));
    assert!(message.contains("--cooldown"), "{message}");
}

#[test]
fn words_that_cannot_be_read_are_refused() {
    let folder = TestFolder::new("words");
    let model = trained(&folder, "m");
    let message = fails(1, &["pronounce", "--model", &model, "naïve"]);
    assert!(message.contains("character 3") && message.contains('ï'), "{message}");
    assert!(fails(1, &["pronounce", "--model", &model, ""]).contains("the word is empty"));
    let long = "a".repeat(5000);
    assert!(fails(1, &["pronounce", "--model", &model, &long]).contains("positions"));
    fails(2, &["pronounce", "--model", &model]);
}

#[test]
fn models_that_cannot_be_read_are_refused() {
    let folder = TestFolder::new("models");
    let nowhere = folder.path("nowhere");
    let message = fails(1, &["pronounce", "--model", &nowhere, "cat"]);
    assert!(message.contains("cannot read") && message.contains("config.json"), "{message}");
    let model = trained(&folder, "m");
    let file = Path::new(&model).join("model.safetensors");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() - 10]).unwrap();
    let message = fails(1, &["pronounce", "--model", &model, "cat"]);
    assert!(message.contains("model.safetensors") && message.contains("cut off"), "{message}");
    fs::write(&file, b"not a checkpoint at all, but a text").unwrap();
    let message = fails(1, &["pronounce", "--model", &model, "cat"]);
    assert!(message.contains("not a safetensors file"), "{message}");
    let message = fails(1, &["train", "--out", &nowhere, "--resume"]);
    assert!(message.contains("cannot read") && message.contains("training.safetensors"), "{message}");
}

#[test]
fn without_a_model_pronounce_says_what_to_do() {
    let folder = TestFolder::new("empty");
    let run = kavanam(&["pronounce", "cat"]).current_dir(&folder.0).output().unwrap();
    assert_eq!(run.status.code(), Some(1));
    assert!(stderr(&run).contains("run `kavanam` first"), "{}", stderr(&run));
}

#[test]
fn wrong_command_lines_are_usage_errors() {
    let folder = TestFolder::new("usage");
    let out = folder.path("m");
    fails(2, &["train"]);
    fails(2, &["train", "--out", &out, "--model", "perceptron"]);
    fails(2, &["train", "--out", &out, "--seconds", "-3"]);
    fails(2, &["train", "--out", &out, "--steps", "0"]);
    fails(2, &["train", "--out", &out, "--steps", "5", "--seconds", "5"]);
    fails(2, &["compare", "--preset", "huge"]);
    let message = fails(2, &["train", "--out", &out, "--steps", "1", "--config", r#"{"wdith": 3}"#]);
    assert!(message.contains("wdith"), "{message}");
    let message = fails(2, &["train", "--out", &out, "--steps", "1", "--config", r#"{"heads": 7}"#]);
    assert!(message.contains("heads"), "{message}");
}

#[test]
fn a_rate_that_is_too_high_stops_with_the_step() {
    let folder = TestFolder::new("diverges");
    let out = folder.path("m");
    let message = fails(1, &train_args(&out, &["--steps", "50", "--lr", "1e38"]));
    assert!(message.contains("step ") && message.contains("learning rate"), "{message}");
}

#[test]
fn a_small_comparison_writes_everything() {
    let folder = TestFolder::new("compare");
    let out = folder.path("run");
    let run = output(&["compare", "--seconds", "0.2", "--test-words", "12", "--no-sweep", "--out", &out]);
    assert!(run.status.success(), "{}", stderr(&run));
    let table = String::from_utf8(run.stdout).unwrap();
    for name in ["rnn-fixed", "rnn-attention", "transformer"] {
        assert!(table.contains(name), "{table}");
        let model = Path::new(&out).join("models").join(name);
        assert!(model.join("model.safetensors").is_file() && model.join("config.json").is_file());
    }
    let json = fs::read_to_string(Path::new(&out).join("results.json")).unwrap();
    let results: serde_json::Value = serde_json::from_str(&json).unwrap();
    let models = results["models"].as_array().unwrap();
    assert_eq!(models.len(), 3);
    assert!(results["worth"]["ratio"].as_f64().unwrap() > 0.0 && table.contains("times as many"), "{table}");
    for key in [
        "name",
        "params",
        "train_tokens_per_s",
        "train_seconds",
        "per",
        "wer",
        "encode_ms",
        "decode_ms_per_token",
    ] {
        assert!(models.iter().all(|m| !m[key].is_null()), "{key}");
    }
    assert!(Path::new(&out).join("environment.txt").is_file());
}

/// Lets a run begin, stops it with Ctrl-C, gives its status and what it wrote to stderr.
#[cfg(unix)]
fn interrupted(arguments: &[&str]) -> (Option<i32>, String) {
    let mut child = kavanam(arguments).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut text = String::new();
    // The handler is in place when this line comes.
    while !text.contains("makes this run again") {
        assert_ne!(stderr.read_line(&mut text).unwrap(), 0, "it ended by itself: {text}");
    }
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    stderr.read_to_string(&mut text).unwrap();
    (child.wait().unwrap().code(), text)
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_the_run_resumes() {
    let folder = TestFolder::new("interrupt");
    let (out, whole) = (folder.path("m"), folder.path("whole"));
    let (status, message) = interrupted(&train_args(&out, &["--steps", "1000000"]));
    assert_eq!(status, Some(130), "{message}");
    assert!(message.contains("stopped at step") && message.contains(&out), "{message}");
    assert!(Path::new(&out).join("training.safetensors").is_file());
    assert!(output(&["pronounce", "--model", &out, "cat"]).status.success());
    let short = output(&train_args(&whole, &["--steps", "40"]));
    assert!(short.status.success(), "{}", stderr(&short));
    let over = output(&["train", "--out", &whole, "--resume", "--valid-words", "5", "--beam", "1"]);
    assert!(over.status.success(), "a finished run resumes to its end: {}", stderr(&over));
}

#[cfg(unix)]
#[test]
fn a_full_disk_names_the_file_and_keeps_the_old_checkpoint() {
    let folder = TestFolder::new("full");
    let out = trained(&folder, "m");
    let before = fs::read(Path::new(&out).join("training.safetensors")).unwrap();
    let other = folder.path("other");
    // No file may grow beyond 8 blocks of 512 bytes (or of 1 KiB, as the shell counts): as a full disk, the write fails midway.
    let limited = |arguments: &str| {
        let script = format!("trap '' XFSZ; ulimit -f 8; exec \"$0\" {arguments}");
        Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_kavanam")]).output().unwrap()
    };
    let tuning = format!("--config '{TINY}' {} --steps 3", QUICKLY.join(" "));
    let run = limited(&format!("train --out '{other}' {tuning}"));
    assert_eq!(run.status.code(), Some(1), "{}", stderr(&run));
    assert!(
        stderr(&run).contains("cannot write") && stderr(&run).contains(".safetensors"),
        "{}",
        stderr(&run)
    );
    let left: Vec<_> = fs::read_dir(&other).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().ends_with(".tmp")), "{left:?}");
    let run = limited(&format!("train --out '{out}' --resume --valid-words 5 --beam 1"));
    assert_eq!(run.status.code(), Some(1), "{}", stderr(&run));
    assert_eq!(fs::read(Path::new(&out).join("training.safetensors")).unwrap(), before);
}

/// A language model that trains in milliseconds.
const TINY_CELL: &str = r#"{"cell": "gru", "embedding": 6, "hidden": 12}"#;

fn chars_args<'a>(file: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["train", "--task", "chars", "--data", file, "--out", out];
    arguments.extend(["--config", TINY_CELL, "--points", "1", "--batch-tokens", "1000"]);
    arguments.extend(more);
    arguments
}

/// A text in the folder, and where it is.
fn text(folder: &TestFolder) -> String {
    let file = folder.path("text.txt");
    fs::write(&file, "Der Fuchs springt über den Hund. «Ach!»\n".repeat(150)).unwrap();
    file
}

fn sampled(model: &str, more: &[&str]) -> String {
    let run = output(&[&["sample", "--model", model][..], more].concat());
    assert!(run.status.success(), "{}", stderr(&run));
    String::from_utf8(run.stdout).unwrap()
}

#[test]
fn a_language_model_is_reproduced_and_writes_on_as_its_seed_says() {
    let folder = TestFolder::new("chars");
    let (file, a, b) = (text(&folder), folder.path("a"), folder.path("b"));
    for out in [&a, &b] {
        let run = output(&chars_args(&file, out, &["--steps", "40"]));
        assert!(run.status.success(), "{}", stderr(&run));
        let said = String::from_utf8(run.stdout).unwrap();
        assert!(said.contains("bits a character") && said.contains("40 steps"), "{said}");
    }
    let weights = |dir: &str| fs::read(Path::new(dir).join("model.safetensors")).unwrap();
    assert!(weights(&a) == weights(&b), "the weights differ");
    let more = ["--prompt", "Der ", "--length", "60", "--seed", "7"];
    let said = sampled(&a, &more);
    assert_eq!(said, sampled(&b, &more));
    assert!(said.starts_with("Der ") && said.chars().count() == 65, "{said:?}");
    assert_ne!(said, sampled(&a, &["--prompt", "Der ", "--length", "60", "--seed", "8"]));
    let cold = sampled(&a, &["--length", "30", "--temperature", "0", "--seed", "1"]);
    assert_eq!(cold, sampled(&a, &["--length", "30", "--top-k", "1", "--seed", "2"]));
}

#[test]
fn bad_texts_and_flags_are_refused() {
    let folder = TestFolder::new("bad-texts");
    let (file, out, bad) = (text(&folder), folder.path("m"), folder.path("bad.txt"));
    assert!(fails(1, &chars_args(&bad, &out, &[])).contains("bad.txt"), "no such file");
    fs::write(&bad, "").unwrap();
    assert!(fails(1, &chars_args(&bad, &out, &[])).contains("has 0 characters"));
    fs::write(&bad, [&[b'a'; 3000][..], &[0xff]].concat()).unwrap();
    assert!(fails(1, &chars_args(&bad, &out, &[])).contains("byte 3001"));
    assert!(fails(2, &["train", "--task", "chars", "--out", &out]).contains("--data"));
    assert!(fails(2, &["train", "--data", &file, "--out", &out]).contains("--task chars"));
    assert!(fails(2, &chars_args(&file, &out, &["--model", "transformer"])).contains("--config"));
    let run = output(&chars_args(&file, &out, &["--steps", "1"]));
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(fails(1, &chars_args(&file, &out, &[])).contains("--resume"));
    let message = fails(1, &["sample", "--model", &out, "--prompt", "Der Wolf"]);
    assert!(message.contains("--prompt: token 5") && message.contains('W'), "{message}");
    assert!(fails(1, &["sample", "--model", &out, "--temperature=-1"]).contains("temperature"));
    assert!(fails(1, &["pronounce", "--model", &out, "cat"]).contains("char_lm"));
    fs::write(&file, "another text. ".repeat(200)).unwrap();
    let resumed = ["train", "--task", "chars", "--data", &file, "--out", &out, "--resume"];
    assert!(fails(1, &resumed).contains("other training examples"));
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_a_language_model_and_the_run_resumes() {
    let folder = TestFolder::new("chars-interrupt");
    let (file, out) = (text(&folder), folder.path("m"));
    let (status, message) = interrupted(&chars_args(&file, &out, &["--steps", "1000000"]));
    assert_eq!(status, Some(130), "{message}");
    assert!(message.contains("stopped at step"), "{message}");
    sampled(&out, &["--length", "5"]);
    let resumed = ["train", "--task", "chars", "--data", &file, "--out", &out, "--resume"];
    let (status, message) = interrupted(&resumed);
    assert_eq!(status, Some(130), "it goes on: {message}");
}
