//! `kavanam train --task classify` and `kavanam classify` as a person meets them: exit status, message, files.

mod support;

use std::fs;
use std::path::Path;

use support::{TestFolder, fails, output, stderr};

/// A model that trains in milliseconds.
const TINY: &str = r#"{"embedding": 8, "dropout": 0.0, "encoder":
    {"kind": "recurrent", "cell": "gru", "hidden": 8, "layers": 1, "bidirectional": true}}"#;

/// Two classes that one word tells apart, and where the file is.
fn data(folder: &TestFolder) -> String {
    let file = folder.path("data.tsv");
    let line = |i: usize| match i % 3 {
        0 => format!("sport\tThe team {} won, said Müller.\n", ["itself", "then"][i % 2]),
        _ => format!("weather\tThe rain {} stayed (said Müller).\n", ["itself", "then"][i % 2]),
    };
    fs::write(&file, (0..120).map(line).collect::<String>()).unwrap();
    file
}

fn args<'a>(file: &'a str, out: &'a str, config: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["train", "--task", "classify", "--data", file, "--out", out];
    arguments.extend(["--config", config, "--points", "1", "--batch-tokens", "200", "--lr", "0.02"]);
    arguments.extend(more);
    arguments
}

#[test]
fn a_classifier_learns_is_reproduced_and_says_its_classes() {
    let folder = TestFolder::new("classify");
    let (file, a, b) = (data(&folder), folder.path("a"), folder.path("b"));
    for (out, threads) in [(&a, "1"), (&b, "2")] {
        let run = output(&args(&file, out, TINY, &["--steps", "60", "--threads", threads]));
        assert!(run.status.success(), "{}", stderr(&run));
        let said = String::from_utf8(run.stdout).unwrap();
        assert!(said.contains("validation, 12 texts: 0.00 % wrong") && said.contains("60 steps"), "{said}");
    }
    let weights = |dir: &str| fs::read(Path::new(dir).join("model.safetensors")).unwrap();
    assert!(weights(&a) == weights(&b), "the weights differ");
    let run = output(&["classify", "--model", &a, "The TEAM won!", "rain, unheard of"]);
    assert!(run.status.success(), "{}", stderr(&run));
    let said = String::from_utf8(run.stdout).unwrap();
    let lines: Vec<Vec<&str>> = said.lines().map(|line| line.split('\t').collect()).collect();
    assert_eq!([lines[0][0], lines[1][0]], ["sport", "weather"], "{said}");
    assert!(lines.iter().all(|line| (0.5..=1.0).contains(&line[1].parse::<f64>().unwrap())), "{said}");
    assert!(fails(1, &["classify", "--model", &a, " … "]).contains("has no word"));
    assert!(fails(1, &["sample", "--model", &a]).contains("classifier"));
    let resumed = ["train", "--task", "classify", "--data", &file, "--out", &a, "--resume"];
    assert!(output(&resumed).status.success(), "a finished run resumes to its end");
}

#[test]
fn a_transformer_classifies_texts_that_it_has_positions_for() {
    let folder = TestFolder::new("classify-transformer");
    let (file, out) = (data(&folder), folder.path("m"));
    let config = |positions: usize| {
        format!(
            r#"{{"embedding": 8, "pooling": "mean", "encoder": {{"kind": "transformer", "heads": 2,
                "feed_forward": 8, "layers": 1, "max_positions": {positions}}}}}"#
        )
    };
    let message = fails(2, &args(&file, &out, &config(5), &[]));
    assert!(message.contains("a text of 6 words") && message.contains("is 5"), "{message}");
    let run = output(&args(&file, &out, &config(6), &["--steps", "3"]));
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(output(&["classify", "--model", &out, "the rain"]).status.success());
    assert!(fails(1, &["classify", "--model", &out, "a b c d e f g"]).contains("7 positions"));
}

#[test]
fn bad_lines_and_flags_are_refused() {
    let folder = TestFolder::new("bad-lines");
    let (good, out, bad) = (data(&folder), folder.path("m"), folder.path("bad.tsv"));
    let content = fs::read(&good).unwrap();
    let with = |line: &[u8]| {
        fs::write(&bad, [&content[..], line].concat()).unwrap();
        fails(1, &args(&bad, &out, TINY, &[]))
    };
    for (line, says) in [
        ("sport The team won\n", "line 121 has no tab"),
        ("\n", "line 121 has no tab"),
        (" \tThe team won\n", "line 121 has no label"),
        ("sport\t...\n", "line 121 has no word"),
    ] {
        let message = with(line.as_bytes());
        assert!(message.contains("bad.tsv") && message.contains(says), "{message}");
    }
    assert!(with(b"sport\tcaf\xe9\n").contains("line 121 is no text in UTF-8"));
    let held_out = format!("{}art\tThe play\n", "sport\tThe team\n".repeat(9));
    assert!(
        with(held_out.as_bytes()).contains("line 130: no line that is learnt from has the label \"art\"")
    );
    fs::write(&bad, "sport\tThe team won\n".repeat(30)).unwrap();
    assert!(fails(1, &args(&bad, &out, TINY, &[])).contains("30 lines with 1 labels"));
    assert!(fails(2, &["train", "--task", "classify", "--out", &out]).contains("label, tab, text"));
    assert!(fails(2, &args(&good, &out, TINY, &["--model", "transformer"])).contains("pooling"));
    assert!(fails(2, &args(&good, &out, r#"{"classes": 9}"#, &[])).contains("vocab and classes"));
}
