//! What `kavanam compare` measured: the one record that tables, pictures and the report are drawn from.
//!
//! [`CompareResults`] is written to `results.json`; nothing in a report comes from elsewhere. Times are in
//! seconds or milliseconds as the name says, rates of error are fractions (0.052 is 5.2 %).

use serde::{Deserialize, Serialize};

/// The version of the layout that this program writes and reads.
pub(crate) const FORMAT: u32 = 1;

/// A whole comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct CompareResults {
    /// The version of this layout, [`FORMAT`].
    pub(crate) format: u32,
    /// The command that makes this file again.
    pub(crate) command: String,
    /// `quick` or `full`.
    pub(crate) preset: String,
    /// The seed of initialisation, data order and dropout.
    pub(crate) seed: u64,
    /// The day of the run, `YYYY-MM-DD`.
    pub(crate) date: String,
    /// The commit that was built, with `+dirty` when the tree had changes; `unknown` outside a checkout.
    pub(crate) commit: String,
    /// What ran: CPU, ISA, threads, precision, kernel names.
    pub(crate) environment: Environment,
    /// The data set and its split.
    pub(crate) data: DataSummary,
    /// One entry a model, in the order in which they were trained.
    pub(crate) models: Vec<ModelResult>,
    /// What the fast layers are worth.
    #[serde(default)]
    pub(crate) worth: Option<Worth>,
    /// Training-step time against sequence length.
    pub(crate) sweep: Vec<SweepPoint>,
    /// Where the curves of the sweep cross.
    pub(crate) crossings: Vec<Crossing>,
}

/// What a comparison ran on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Environment {
    /// The CPU's name.
    pub(crate) cpu: String,
    /// Threads used.
    pub(crate) threads: usize,
    /// The instruction set that was dispatched to.
    pub(crate) isa: String,
    /// The precision word of matrix products.
    pub(crate) precision: String,
    /// The kernels that ran.
    pub(crate) kernels: Vec<String>,
    /// Everything else that a reader may ask for: key and value, as in `environment.txt`.
    pub(crate) fingerprint: Vec<(String, String)>,
}

/// The data set, counted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct DataSummary {
    /// The data set's name.
    pub(crate) name: String,
    /// Words in the training split.
    pub(crate) train_words: usize,
    /// Pronunciations in the training split: what an epoch shows.
    pub(crate) train_pairs: usize,
    /// Words in the validation split.
    pub(crate) valid_words: usize,
    /// Words in the test split.
    pub(crate) test_words: usize,
}

/// One model: how it was trained and what it reaches on held-out words.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ModelResult {
    /// The short name: `rnn-fixed`, `rnn-attention` or `transformer`.
    pub(crate) name: String,
    /// What it is, in words.
    pub(crate) description: String,
    /// All parameters.
    pub(crate) params: usize,
    /// Those of them in embedding tables and the output projection.
    pub(crate) embedding_params: usize,
    /// The model's and the trainer's configuration, as in the checkpoint.
    pub(crate) config: serde_json::Value,
    /// Steps taken.
    pub(crate) steps: u64,
    /// Steps that the learning-rate schedule was made for: `--steps` reproduces the run.
    pub(crate) planned_steps: u64,
    /// Whether the time guard ended the run before `planned_steps`.
    pub(crate) stopped_by_guard: bool,
    /// Seconds spent in training steps.
    pub(crate) train_seconds: f64,
    /// Target tokens shown.
    pub(crate) tokens_seen: u64,
    /// Passes over the training split.
    pub(crate) epochs: f64,
    /// Target tokens a second of training.
    pub(crate) train_tokens_per_s: f64,
    /// Error against seconds, on the validation split.
    pub(crate) curve: Vec<CurvePoint>,
    /// Beam width of the test decoding.
    pub(crate) beam: usize,
    /// Test words decoded.
    pub(crate) test_words: usize,
    /// Phone error rate on the test words.
    pub(crate) per: f64,
    /// Word error rate on the test words.
    pub(crate) wer: f64,
    /// Both by length of the word.
    pub(crate) by_length: Vec<LengthScore>,
    /// Median time to encode one word.
    pub(crate) encode_ms: f64,
    /// Raw samples of it.
    pub(crate) encode_samples_ms: Vec<f64>,
    /// Median time to decode one token of one word, greedily.
    pub(crate) decode_ms_per_token: f64,
    /// Raw samples of it.
    pub(crate) decode_samples_ms_per_token: Vec<f64>,
    /// What the model looks at while it pronounces a few words (empty without attention).
    pub(crate) alignments: Vec<Alignment>,
}

/// A point of a training curve.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct CurvePoint {
    /// Seconds of training so far.
    pub(crate) seconds: f64,
    /// Steps so far.
    pub(crate) step: u64,
    /// Mean training loss per target token since the last point.
    pub(crate) loss: f64,
    /// Phone error rate on a fixed part of the validation split, greedy.
    pub(crate) valid_per: f64,
    /// Word error rate on the same.
    pub(crate) valid_wer: f64,
}

/// Error on the words of one length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct LengthScore {
    /// Shortest word of the group, in letters.
    pub(crate) min_letters: usize,
    /// Longest word of the group.
    pub(crate) max_letters: usize,
    /// Words in the group.
    pub(crate) words: usize,
    /// Phone error rate.
    pub(crate) per: f64,
    /// Word error rate.
    pub(crate) wer: f64,
}

/// Attention while one word was pronounced.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Alignment {
    /// The letters, the columns.
    pub(crate) source: Vec<String>,
    /// The phones that the model gave (the last is the end of the word), the rows.
    pub(crate) target: Vec<String>,
    /// `weights[row][column]`; every row sums to 1.
    pub(crate) weights: Vec<Vec<f32>>,
}

/// The time of one training step at one sequence length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct SweepPoint {
    /// The model's short name.
    pub(crate) model: String,
    /// Tokens in each source and in each target.
    pub(crate) length: usize,
    /// Sequences in the batch: `length * sequences` is held equal over lengths as far as it divides.
    pub(crate) sequences: usize,
    /// Parameters of the model that was timed.
    pub(crate) params: usize,
    /// Median milliseconds of a step.
    pub(crate) step_ms: f64,
    /// Raw samples; the models' samples alternate in time.
    pub(crate) samples_ms: Vec<f64>,
}

/// One model by fast and by naive layers: training steps in turn, on the same batches, from the same weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Worth {
    /// The model's short name.
    pub(crate) model: String,
    /// That of the model by naive layers.
    pub(crate) naive: String,
    /// The median of the steps' ratios of speed, above 1 where the fast layers are faster.
    pub(crate) ratio: f64,
    /// Target tokens a second, the median of the steps, by the fast layers.
    pub(crate) fast_tokens_per_s: f64,
    /// The same by the naive ones.
    pub(crate) naive_tokens_per_s: f64,
    /// Every step's.
    pub(crate) fast_samples: Vec<f64>,
    /// Every step's.
    pub(crate) naive_samples: Vec<f64>,
}

/// Between two neighbouring lengths the faster of two models changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Crossing {
    /// Faster below.
    pub(crate) faster_below: String,
    /// Faster above.
    pub(crate) faster_above: String,
    /// The length at which a straight line in log–log through the neighbouring points gives equal times.
    pub(crate) length: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_survive_the_file() {
        let results = crate::report::fixture::results();
        let text = serde_json::to_string(&results).unwrap();
        assert!(serde_json::from_str::<CompareResults>(&text).unwrap() == results);
    }
}
