//! What `kavanam compare` measured: the one record that tables, pictures and the report are drawn from.
//!
//! [`CompareResults`] is written to `results.json`; nothing in a report comes from elsewhere. Times are in
//! seconds or milliseconds as the name says, rates of error are fractions (0.052 is 5.2 %).

use serde::{Deserialize, Serialize};

/// A whole comparison.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CompareResults {
    /// The version of this layout.
    pub format: u32,
    /// The command that makes this file again.
    pub command: String,
    /// `quick` or `full`.
    pub preset: String,
    /// The seed of initialisation, data order and dropout.
    pub seed: u64,
    /// The day of the run, `YYYY-MM-DD`.
    pub date: String,
    /// The commit that was built, with `+dirty` when the tree had changes; `unknown` outside a checkout.
    pub commit: String,
    /// What ran: CPU, ISA, threads, precision, kernel names.
    pub environment: Environment,
    /// The data set and its split.
    pub data: DataSummary,
    /// One entry a model, in the order in which they were trained.
    pub models: Vec<ModelResult>,
    /// Training-step time against sequence length.
    pub sweep: Vec<SweepPoint>,
    /// Where the curves of the sweep cross.
    pub crossings: Vec<Crossing>,
}

/// What a comparison ran on.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Environment {
    /// The CPU's name.
    pub cpu: String,
    /// Threads used.
    pub threads: usize,
    /// The instruction set that was dispatched to.
    pub isa: String,
    /// The precision word of matrix products.
    pub precision: String,
    /// The kernels that ran.
    pub kernels: Vec<String>,
    /// Everything else that a reader may ask for: key and value, as in `environment.txt`.
    pub fingerprint: Vec<(String, String)>,
}

/// The data set, counted.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct DataSummary {
    /// The data set's name.
    pub name: String,
    /// Words in the training split.
    pub train_words: usize,
    /// Pronunciations in the training split: what an epoch shows.
    pub train_pairs: usize,
    /// Words in the validation split.
    pub valid_words: usize,
    /// Words in the test split.
    pub test_words: usize,
}

/// One model: how it was trained and what it reaches on held-out words.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelResult {
    /// The short name: `rnn-fixed`, `rnn-attention` or `transformer`.
    pub name: String,
    /// What it is, in words.
    pub description: String,
    /// All parameters.
    pub params: usize,
    /// Those of them in embedding tables and the output projection.
    pub embedding_params: usize,
    /// The model's and the trainer's configuration, as in the checkpoint.
    pub config: serde_json::Value,
    /// Steps taken.
    pub steps: u64,
    /// Steps that the learning-rate schedule was made for: `--steps` reproduces the run.
    pub planned_steps: u64,
    /// Whether the time guard ended the run before `planned_steps`.
    pub stopped_by_guard: bool,
    /// Seconds spent in training steps.
    pub train_seconds: f64,
    /// Target tokens shown.
    pub tokens_seen: u64,
    /// Passes over the training split.
    pub epochs: f64,
    /// Target tokens a second of training.
    pub train_tokens_per_s: f64,
    /// Error against seconds, on the validation split.
    pub curve: Vec<CurvePoint>,
    /// Beam width of the test decoding.
    pub beam: usize,
    /// Test words decoded.
    pub test_words: usize,
    /// Phone error rate on the test words.
    pub per: f64,
    /// Word error rate on the test words.
    pub wer: f64,
    /// Both by length of the word.
    pub by_length: Vec<LengthScore>,
    /// Median time to encode one word.
    pub encode_ms: f64,
    /// Raw samples of it.
    pub encode_samples_ms: Vec<f64>,
    /// Median time to decode one token of one word, greedily.
    pub decode_ms_per_token: f64,
    /// Raw samples of it.
    pub decode_samples_ms_per_token: Vec<f64>,
    /// What the model looks at while it pronounces a few words (empty without attention).
    pub alignments: Vec<Alignment>,
}

/// A point of a training curve.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Seconds of training so far.
    pub seconds: f64,
    /// Steps so far.
    pub step: u64,
    /// Mean training loss per target token since the last point.
    pub loss: f64,
    /// Phone error rate on a fixed part of the validation split, greedy.
    pub valid_per: f64,
    /// Word error rate on the same.
    pub valid_wer: f64,
}

/// Error on the words of one length.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LengthScore {
    /// Shortest word of the group, in letters.
    pub min_letters: usize,
    /// Longest word of the group.
    pub max_letters: usize,
    /// Words in the group.
    pub words: usize,
    /// Phone error rate.
    pub per: f64,
    /// Word error rate.
    pub wer: f64,
}

/// Attention while one word was pronounced.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Alignment {
    /// The letters, the columns.
    pub source: Vec<String>,
    /// The phones that the model gave (the last is the end of the word), the rows.
    pub target: Vec<String>,
    /// `weights[row][column]`; every row sums to 1.
    pub weights: Vec<Vec<f32>>,
}

/// The time of one training step at one sequence length.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SweepPoint {
    /// The model's short name.
    pub model: String,
    /// Tokens in each source and in each target.
    pub length: usize,
    /// Sequences in the batch: `length * sequences` is held equal over lengths as far as it divides.
    pub sequences: usize,
    /// Parameters of the model that was timed.
    pub params: usize,
    /// Median milliseconds of a step.
    pub step_ms: f64,
    /// Raw samples; the models' samples alternate in time.
    pub samples_ms: Vec<f64>,
}

/// Between two neighbouring lengths the faster of two models changes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Crossing {
    /// Faster below.
    pub faster_below: String,
    /// Faster above.
    pub faster_above: String,
    /// The length at which a straight line in log–log through the neighbouring points gives equal times.
    pub length: f64,
}
