//! A made-up comparison with the shape of a real one, for tests of what is drawn. No figure in it was measured.

use crate::report::results::*;

/// What one of the models is made from.
struct Sketch {
    name: &'static str,
    description: &'static str,
    /// Its phone error rate after long training.
    per: f64,
    /// Seconds in which its error falls to a third.
    slowness: f64,
    tokens_per_s: f64,
    /// A step at each of [`LENGTHS`].
    step_ms: [f64; 7],
}

const MODELS: [Sketch; 3] = [
    Sketch {
        name: "rnn-fixed",
        description: "LSTM encoder–decoder, one vector for the whole word.",
        per: 0.145,
        slowness: 9.0,
        tokens_per_s: 41_000.0,
        step_ms: [5.1, 8.9, 17.2, 33.8, 68.0, 137.0, 275.0],
    },
    Sketch {
        name: "rnn-attention",
        description: "GRU with additive attention.",
        per: 0.083,
        slowness: 5.0,
        tokens_per_s: 33_500.0,
        step_ms: [6.6, 11.4, 22.0, 44.0, 91.0, 195.0, 440.0],
    },
    Sketch {
        name: "transformer",
        description: "Encoder–decoder, 2 + 2 layers, pre-norm.",
        per: 0.091,
        slowness: 7.0,
        tokens_per_s: 29_800.0,
        step_ms: [9.3, 13.4, 22.4, 41.2, 82.0, 171.0, 381.0],
    },
];
const LENGTHS: [usize; 7] = [8, 16, 32, 64, 128, 256, 512];

/// The comparison.
pub(crate) fn results() -> CompareResults {
    CompareResults {
        format: FORMAT,
        command: "kavanam compare --preset quick".into(),
        preset: "quick".into(),
        seed: 1,
        date: "2026-11-23".into(),
        commit: "0123456789ab".into(),
        environment: Environment {
            cpu: "A CPU for Tests".into(),
            threads: 2,
            isa: "avx2".into(),
            precision: "strict".into(),
            kernels: vec!["f32_6x16_avx2".into()],
            fingerprint: vec![
                ("flags".into(), "fma f16c avx2".into()),
                ("caches".into(), "L1d 32 KiB, L2 512 KiB, L3 32 MiB (shared by 2)".into()),
            ],
        },
        data: DataSummary {
            name: "CMUdict".into(),
            train_words: 106_837,
            train_pairs: 115_023,
            valid_words: 2_670,
            test_words: 12_000,
        },
        models: (0..MODELS.len()).map(model).collect(),
        worth: Some(Worth {
            model: "rnn-fixed".into(),
            naive: "rnn-naive".into(),
            ratio: 3.1,
            fast_tokens_per_s: 40_000.0,
            naive_tokens_per_s: 13_000.0,
            fast_samples: vec![39_000.0, 40_000.0, 41_000.0],
            naive_samples: vec![12_900.0, 13_000.0, 13_100.0],
        }),
        sweep: MODELS.iter().flat_map(sweep).collect(),
        crossings: vec![Crossing {
            faster_below: "rnn-attention".into(),
            faster_above: "transformer".into(),
            length: 37.4,
        }],
    }
}

fn model(index: usize) -> ModelResult {
    let Sketch { name, description, per, slowness, tokens_per_s, .. } = MODELS[index];
    let curve = (1..=12).map(|i| {
        let seconds = 4.0 * f64::from(i);
        let valid_per = per + 0.9 * (-seconds / slowness).exp();
        CurvePoint {
            seconds,
            step: 40 * i as u64,
            loss: 3.0 * valid_per,
            valid_per,
            valid_wer: 1.0 - (1.0 - valid_per).powi(5),
        }
    });
    let by_length = (0..6).map(|i| {
        let harder = if index == 0 { 0.5 * f64::from(i) } else { 0.05 * f64::from(i) };
        let per = per * (0.8 + harder);
        LengthScore {
            min_letters: 2 * i as usize + 3,
            max_letters: if i == 5 { 99 } else { 2 * i as usize + 4 },
            words: 2_000 >> i,
            per,
            wer: 1.0 - (1.0 - per).powi(5),
        }
    });
    ModelResult {
        name: name.into(),
        description: description.into(),
        params: 1_204_312 + 1_000 * index,
        embedding_params: 18_944,
        config: serde_json::json!({ "model_type": name, "hidden": 128 }),
        steps: 480,
        planned_steps: 500,
        stopped_by_guard: index == 2,
        train_seconds: 48.0,
        tokens_seen: (48.0 * tokens_per_s) as u64,
        epochs: 2.4,
        train_tokens_per_s: tokens_per_s,
        curve: curve.collect(),
        beam: 4,
        test_words: 12_000,
        per,
        wer: 1.0 - (1.0 - per).powi(5),
        by_length: by_length.collect(),
        encode_ms: 0.4 - 0.1 * index as f64,
        encode_samples_ms: vec![0.4; 3],
        decode_ms_per_token: 0.11 + 0.05 * index as f64,
        decode_samples_ms_per_token: vec![0.11; 3],
        alignments: if index == 0 {
            Vec::new()
        } else {
            vec![
                alignment("attention", &["AH", "T", "EH", "N", "SH", "AH", "N"]),
                alignment("knight", &["N", "AY", "T"]),
                alignment(
                    "extraordinary",
                    &["EH", "K", "S", "T", "R", "AH", "AO", "R", "D", "AH", "N", "EH", "R", "IY"],
                ),
            ]
        },
    }
}

/// Weights around the diagonal.
fn alignment(word: &str, phones: &[&str]) -> Alignment {
    let source: Vec<String> = word.chars().map(String::from).collect();
    let target: Vec<String> = phones.iter().copied().chain(["‹end›"]).map(String::from).collect();
    let row = |i: usize| {
        let centre = (i as f32 + 0.5) * source.len() as f32 / target.len() as f32 - 0.5;
        let raw: Vec<f32> = (0..source.len()).map(|j| (-(j as f32 - centre).powi(2)).exp()).collect();
        let sum: f32 = raw.iter().sum();
        raw.into_iter().map(|weight| weight / sum).collect()
    };
    Alignment { weights: (0..target.len()).map(row).collect(), source, target }
}

fn sweep(model: &Sketch) -> impl Iterator<Item = SweepPoint> {
    LENGTHS.into_iter().zip(model.step_ms).map(|(length, step_ms)| SweepPoint {
        model: model.name.into(),
        length,
        sequences: 4096 / length,
        params: 1_204_312,
        step_ms,
        samples_ms: [0.94, 0.98, 1.0, 1.03, 1.2].map(|f| f * step_ms).into(),
    })
}
