//! `kavanam import` and `score` as a person meets them: exit status, message, files.

mod support;

use std::fs;
use std::io::Write;
use std::path::Path;

use rawzip::{CompressionMethod, ZipArchiveWriter};
use support::{TestFolder, fails, output, stderr};

const EMBEDDING: usize = 3;
const HIDDEN: usize = 4;
/// A recurrent model that trains in milliseconds.
const TINY: &str =
    r#"{"embedding": 6, "hidden": 8, "encoder_hidden": 4, "attention_width": 4, "readout": 8}"#;

/// Runs, expects success, gives what was written to stdout.
fn succeeds(arguments: &[&str]) -> String {
    let output = output(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

type Array = (&'static str, Vec<usize>);

/// The arrays of g2p-en's checkpoint, in small.
fn arrays() -> Vec<Array> {
    let rows = 3 * HIDDEN;
    let side = |names: [&'static str; 5], tokens| {
        let shapes =
            [vec![tokens, EMBEDDING], vec![rows, EMBEDDING], vec![rows, HIDDEN], vec![rows], vec![rows]];
        names.into_iter().zip(shapes)
    };
    let encoder = side(["enc_emb", "enc_w_ih", "enc_w_hh", "enc_b_ih", "enc_b_hh"], 29);
    let decoder = side(["dec_emb", "dec_w_ih", "dec_w_hh", "dec_b_ih", "dec_b_hh"], 74);
    encoder.chain(decoder).chain([("fc_w", vec![74, HIDDEN]), ("fc_b", vec![74])]).collect()
}

/// What `numpy.savez` writes, with values between −1 and 1.
fn npz(path: &str, arrays: &[Array]) {
    let mut file = Vec::new();
    let mut archive = ZipArchiveWriter::new(&mut file);
    for (name, shape) in arrays {
        let sizes: String = shape.iter().map(|n| format!("{n}, ")).collect();
        let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({sizes}), }}\n");
        let length = u16::try_from(header.len()).unwrap().to_le_bytes();
        let count: usize = shape.iter().product();
        let values = (0..count).flat_map(|i| ((i * 7919 % 201) as f32 / 100.0 - 1.0).to_le_bytes());
        let bytes =
            [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), &values.collect::<Vec<u8>>()].concat();
        let member = format!("{name}.npy");
        let builder = archive.new_file(&member).compression_method(CompressionMethod::STORE);
        let (mut entry, config) = builder.start().unwrap();
        let mut writer = config.wrap(&mut entry);
        writer.write_all(&bytes).unwrap();
        let (_, descriptor) = writer.finish().unwrap();
        entry.finish(descriptor).unwrap();
    }
    archive.finish().unwrap();
    fs::write(path, file).unwrap();
}

fn g2p_en<'a>(file: &'a str, out: &'a str) -> [&'a str; 6] {
    ["import", "--format", "g2p-en", file, "--out", out]
}

#[test]
fn help_explains_both_commands() {
    for (command, parts) in [
        ("import", &["g2p-en", "pytorch", "keras", "--config", "--vocab", "--out", "docs/formats.md"][..]),
        ("score", &["--model", "--words", "--beam", "PER", "WER", "tress"]),
    ] {
        let help = succeeds(&[command, "--help"]);
        for part in parts {
            assert!(help.contains(part), "{part}: {help}");
        }
        assert!(help.lines().all(|line| line.chars().count() <= 120), "{help}");
    }
}

#[test]
fn an_imported_checkpoint_pronounces_and_is_scored() {
    let folder = TestFolder::new("g2p-en");
    let (file, out) = (folder.path("checkpoint20.npz"), folder.path("model"));
    npz(&file, &arrays());
    let said = succeeds(&g2p_en(&file, &out));
    assert!(said.contains("30 source and 74 target tokens") && said.contains(&out), "{said}");
    let text = succeeds(&["pronounce", "--model", &out, "--beam", "1", "Cat"]);
    let (word, phones) = text.trim_end().split_once('\t').unwrap();
    assert_eq!(word, "Cat");
    assert!(
        phones.split(' ').all(|p| p.chars().all(|c| c.is_ascii_uppercase() || "012".contains(c))),
        "{text}"
    );
    let score = succeeds(&["score", "--model", &out, "--words", "25", "--beam", "1"]);
    let lines: Vec<&str> = score.lines().collect();
    assert_eq!(lines.len(), 2, "{score}");
    assert!(lines[0].starts_with("test, 25 words, beam 1, without stress: PER "), "{score}");
    assert!(lines[1].starts_with("test, 25 words, beam 1, with stress: PER "), "{score}");
    assert!(fails(1, &["pronounce", "--model", &out, "naïve"]).contains("character 3"));
}

#[test]
fn checkpoints_that_cannot_be_read_are_refused_and_leave_nothing() {
    let folder = TestFolder::new("errors");
    let (file, out) = (folder.path("checkpoint20.npz"), folder.path("model"));
    assert!(fails(1, &g2p_en(&file, &out)).contains("cannot read"));
    npz(&file, &arrays()[1..]);
    let message = fails(1, &g2p_en(&file, &out));
    assert!(message.contains("\"enc_emb\" is missing"), "{message}");
    let mut changed = arrays();
    changed[7].1 = vec![HIDDEN, 3 * HIDDEN];
    npz(&file, &changed);
    let message = fails(1, &g2p_en(&file, &out));
    assert!(message.contains("\"dec_w_hh\" has shape [4, 12], the model needs [12, 4]"), "{message}");
    let mut changed = arrays();
    changed.push(("step", vec![1]));
    npz(&file, &changed);
    assert!(fails(1, &g2p_en(&file, &out)).contains("\"step\" (shape [1]) belongs to no parameter"));
    npz(&file, &arrays());
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() - 1000]).unwrap();
    let message = fails(1, &g2p_en(&file, &out));
    assert!(message.contains("checkpoint20.npz") && message.contains("cut off"), "{message}");
    fs::write(&file, b"not a checkpoint at all, but a text").unwrap();
    assert!(fails(1, &g2p_en(&file, &out)).contains("checkpoint20.npz"));
    assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1, "only the file that was read stays");

    fs::write(&file, &whole).unwrap();
    succeeds(&g2p_en(&file, &out));
    let message = fails(1, &g2p_en(&file, &out));
    assert!(message.contains("model") && message.contains("already exists"), "{message}");
    let message = fails(1, &g2p_en(&file, "/dev/null/model"));
    assert!(message.contains("/dev/null"), "{message}");
}

#[test]
fn wrong_command_lines_are_usage_errors() {
    fails(2, &["import", "x.npz", "--out", "y"]);
    fails(2, &["import", "--format", "g2p-en", "x.npz"]);
    fails(2, &["import", "--format", "theano", "x.npz", "--out", "y"]);
    let message = fails(2, &["import", "--format", "keras", "x.npz", "--out", "y"]);
    assert!(message.contains("--config") && message.contains("--vocab"), "{message}");
    let message = fails(2, &["import", "--format", "g2p-en", "x.npz", "--out", "y", "--config", "c"]);
    assert!(message.contains("no --config"), "{message}");
    fails(2, &["score", "--words", "0"]);
}

#[test]
fn a_model_trained_here_is_scored_and_comes_through_as_a_pytorch_file() {
    let folder = TestFolder::new("pytorch");
    let (model, out) = (folder.path("model"), folder.path("imported"));
    let train = ["train", "--model", "rnn", "--config", TINY, "--steps", "2", "--out", &model];
    let quickly = ["--points", "1", "--valid-words", "5", "--beam", "1", "--batch-tokens", "256"];
    succeeds(&[&train[..], &quickly].concat());
    let score = succeeds(&["score", "--model", &model, "--words", "10", "--beam", "1"]);
    assert!(score.starts_with("test, 10 words, beam 1: PER ") && !score.contains("stress"), "{score}");

    let file = |name: &str| Path::new(&model).join(name).display().to_string();
    let (weights, config, vocab) = (file("model.safetensors"), file("config.json"), file("vocab.json"));
    let import =
        ["import", "--format", "pytorch", &weights, "--config", &config, "--vocab", &vocab, "--out", &out];
    succeeds(&import);
    for name in ["config.json", "vocab.json", "model.safetensors"] {
        assert_eq!(fs::read(file(name)).unwrap(), fs::read(Path::new(&out).join(name)).unwrap(), "{name}");
    }

    let keras = import.map(|argument| if argument == "pytorch" { "keras" } else { argument });
    let message = fails(1, &keras.map(|argument| if argument == out { "nowhere" } else { argument }));
    assert!(message.contains("\"source_embedding.embeddings\" is missing"), "{message}");
    let json = fs::read_to_string(&config).unwrap();
    fs::write(&config, json.replace("rnn_seq2seq", "transformer")).unwrap();
    assert!(fails(1, &import).contains("config.json"));
}
