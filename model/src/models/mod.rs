//! The model families, and the contract between a model and everything that trains or decodes it.

pub mod batch;
pub mod char_lm;
pub mod classifier;
pub mod config;
pub mod rnn_seq2seq;
pub mod transformer;

use std::any::Any;

use kavanam_kernels::error::expect_dim;
use kavanam_kernels::{Context, ShapeError};

pub use batch::{BOS, Batch, EOS, PAD, UNK};
pub(crate) use config::wrong;
pub use config::{
    AttentionKind, Bridge, CellKind, CharLmConfig, ClassifierConfig, ClassifierEncoder, ContextTo,
    DropoutRates, FeedForwardActivation, Implementation, ModelConfig, NormPlacement, Pooling, Positions,
    RnnSeq2SeqConfig, TransformerConfig,
};

pub use char_lm::{CharLm, CharLmState};
pub use classifier::Classifier;
pub use rnn_seq2seq::RnnSeq2Seq;
pub use transformer::Transformer;

use crate::error::ModelError;
use crate::param::ParamStore;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// How the loss of a batch is formed.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LossOptions {
    /// The share ε of each target's probability that is spread evenly over the vocabulary
    /// (Szegedy et al. 2016, section 7).
    pub label_smoothing: f32,
}

/// A model from token sequences to token sequences.
///
/// `loss` is teacher-forced training; `encode`, `start` and `step` are token-by-token decoding. The
/// logits of both are the same bits within one ISA (`tests/tests/models.rs`).
pub trait Seq2Seq: Send + Sync {
    /// What the model was built from.
    fn config(&self) -> ModelConfig;

    /// The weights.
    fn params(&self) -> &ParamStore;

    /// The weights, to load or to step.
    fn params_mut(&mut self) -> &mut ParamStore;

    /// Teacher-forced logits, `[batch · target_len, target_vocab]` in the batch's own row order
    /// (row `b · target_len + t`). Dropout is active when the tape was made for training.
    ///
    /// # Errors
    /// [`ModelError`] when a token is outside of the vocabulary or a sequence is too long.
    fn logits(&self, tape: &mut Tape<'_>, batch: &Batch) -> Result<Var, ModelError>;

    /// The cross-entropy **summed** over all target tokens that are no padding: the trainer divides.
    ///
    /// # Errors
    /// As [`Seq2Seq::logits`].
    fn loss(&self, tape: &mut Tape<'_>, batch: &Batch, options: &LossOptions) -> Result<Var, ModelError>;

    /// Runs the encoder over padded sources, `[lengths.len() · source_len]` tokens, one sequence after the other.
    ///
    /// # Errors
    /// As [`Seq2Seq::logits`].
    fn encode(&self, ctx: &Context, source: &[u32], lengths: &[usize]) -> Result<Encoded, ModelError>;

    /// A decoder state before the first token, of `beams` rows for each encoded sequence:
    /// row `b · beams + k` is beam `k` of sequence `b`.
    ///
    /// # Errors
    /// [`ModelError`] when `encoded` is another model's.
    fn start(
        &self,
        ctx: &Context,
        encoded: &Encoded,
        beams: usize,
    ) -> Result<Box<dyn DecoderState>, ModelError>;

    /// Feeds each row its next token and gives the distribution of the token after it.
    ///
    /// # Errors
    /// [`ModelError`] when the state is another model's, when `tokens` are not one a row, or when
    /// the model has no position left.
    fn step(
        &self,
        ctx: &Context,
        state: &mut dyn DecoderState,
        tokens: &[u32],
    ) -> Result<StepOutput, ModelError>;
}

/// What the encoder leaves for the decoder.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// The annotation of every source position: `[batch, source_len, width]`, or time-major
    /// `[source_len, batch, width]` from a recurrent model.
    pub memory: Tensor,
    /// Final states of a recurrent encoder, one tensor `[batch, hidden]` for each the decoder starts from.
    pub states: Vec<Tensor>,
    /// The length of each source without its padding.
    pub lengths: Vec<usize>,
    /// The padded length of a source.
    pub source_len: usize,
}

impl Encoded {
    /// The number of sequences.
    pub fn batch(&self) -> usize {
        self.lengths.len()
    }
}

/// What a decoder remembers between two tokens, for several rows at once.
pub trait DecoderState: Send {
    /// The number of rows.
    fn rows(&self) -> usize;

    /// How many tokens each row has been fed.
    fn position(&self) -> usize;

    /// Whether steps also give the weights over the source, which costs time; at first they do not.
    fn want_attention(&mut self, wanted: bool);

    /// Row `i` becomes what row `rows[i]` was: how beams fork, and how finished sequences leave.
    ///
    /// The rows keep their groups: with `beams` rows a sequence, the new rows `s·beams … (s+1)·beams`
    /// must all come from one old group, so that what belongs to the source is not copied.
    ///
    /// # Errors
    /// [`ModelError`] when a row does not exist or a group is mixed.
    fn reorder(&mut self, rows: &[usize]) -> Result<(), ModelError>;

    /// For the model that made it.
    fn as_any_mut(&mut self) -> &mut dyn Any;
}

/// What one decoding step gives.
#[derive(Debug, Clone)]
pub struct StepOutput {
    /// `[rows, target_vocab]`.
    pub logits: Tensor,
    /// The weights over source positions, `[rows, source_len]`, of a model that attends, where they
    /// are wanted: the average over the heads of the last decoder layer for the transformer.
    pub attention: Option<Tensor>,
}

impl ModelConfig {
    /// Builds the model, its weights initialised from `seed`.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the first field that no model can be built from.
    pub fn build(&self, seed: u64) -> Result<Box<dyn Seq2Seq>, ModelError> {
        Ok(match self {
            ModelConfig::Transformer(config) => Box::new(Transformer::new(config, seed)?),
            ModelConfig::RnnSeq2Seq(config) => Box::new(RnnSeq2Seq::new(config, seed)?),
        })
    }
}

/// Which source each group of `beams` new rows comes from.
pub(crate) fn sources_of(rows: &[usize], old_rows: usize, beams: usize) -> Result<Vec<usize>, ModelError> {
    let beams = beams.max(1);
    expect_dim("rows", "length modulo the beams", 0, rows.len() % beams)?;
    if let Some(position) = rows.iter().position(|&row| row >= old_rows) {
        let index = rows[position];
        return Err(ShapeError::Index { argument: "rows", position, index, len: old_rows }.into());
    }
    let groups = rows.chunks_exact(beams);
    if groups.clone().any(|group| group.iter().any(|row| row / beams != group[0] / beams)) {
        let (value, expected) = (format!("{rows:?}"), "each group of beams from one source");
        return Err(ShapeError::Value { argument: "rows", value, expected }.into());
    }
    Ok(groups.map(|group| group[0] / beams).collect())
}
