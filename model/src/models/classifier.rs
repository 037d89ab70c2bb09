//! A classifier of sequences.
//!
//! ```text
//! recurrent     x = embedding(tokens)       x = layer(x) …          pooled = mean of x, or the final states
//! transformer   x = embedding + positions   x = layer(x) …, norm    pooled = mean of x, or its last position
//! both          logits = W·pooled + b
//! ```

use std::path::Path;
use std::sync::Arc;

use kavanam_kernels::Context;
use kavanam_kernels::error::expect_dim;

use crate::error::ModelError;
use crate::io::CheckpointError;
use crate::io::classifier::{Labels, save_config};
use crate::models::rnn_seq2seq::time_major;
use crate::models::{ClassifierConfig, ClassifierEncoder, LossOptions, PAD, Pooling};
use crate::nn::attention::Sequences;
use crate::nn::embedding::Embedding;
use crate::nn::encoder_layer::EncoderLayer;
use crate::nn::positional::position_table;
use crate::nn::rnn::{CellWidths, RecurrentLayer};
use crate::nn::{Linear, Norm};
use crate::ops::{self, Tokens};
use crate::param::ParamStore;
use crate::pool::Pool;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::train::{Example, Trainable};

/// A classifier with its weights.
#[derive(Debug)]
pub struct Classifier {
    config: ClassifierConfig,
    store: ParamStore,
    embedding: Embedding,
    encoder: Encoder,
    output: Linear,
    pool: Pool,
}

#[derive(Debug)]
enum Encoder {
    Recurrent(Vec<RecurrentLayer>),
    Transformer { layers: Vec<EncoderLayer>, norm: Norm, max_positions: usize },
}

impl Classifier {
    /// A new model, its weights initialised from `seed`.
    ///
    /// # Errors
    /// [`ModelError::Config`] when no model can be built from `config`.
    pub fn new(config: &ClassifierConfig, seed: u64) -> Result<Classifier, ModelError> {
        config.validate()?;
        let mut store = ParamStore::new(seed);
        let width = config.embedding;
        let mut embedding = Embedding::new(&mut store, "embedding", config.vocab, width);
        let encoder = match (config.encoder, config.transformer()) {
            (ClassifierEncoder::Recurrent { cell, hidden, projection, layers, bidirectional }, _) => {
                let layer = |l| {
                    let input = if l == 0 { width } else { config.pooled() };
                    let widths = CellWidths { input, hidden, projection };
                    RecurrentLayer::new(&mut store, "encoder.rnn", l, cell, widths, bidirectional)
                };
                Encoder::Recurrent((0..layers).map(layer).collect())
            }
            (ClassifierEncoder::Transformer { layers, max_positions, .. }, Some(t)) => {
                embedding.positions =
                    position_table(&mut store, "positions", t.positions, max_positions, width);
                let layer = |l| EncoderLayer::new(&mut store, &format!("encoder.layers.{l}"), &t);
                let layers = (0..layers).map(layer).collect();
                let norm = Norm::new(&mut store, "encoder.norm", width, t.norm_epsilon);
                Encoder::Transformer { layers, norm, max_positions }
            }
            (ClassifierEncoder::Transformer { .. }, None) => unreachable!("it has a transformer's options"),
        };
        let output = Linear::new(&mut store, "output", config.pooled(), config.classes, 1);
        Ok(Classifier { config: config.clone(), store, embedding, encoder, output, pool: Pool::new() })
    }

    /// What the model was built from.
    pub fn config(&self) -> &ClassifierConfig {
        &self.config
    }

    /// The weights.
    pub fn params(&self) -> &ParamStore {
        &self.store
    }

    /// The weights, to load or to step.
    pub fn params_mut(&mut self) -> &mut ParamStore {
        &mut self.store
    }

    /// Logits `[batch, classes]` of padded sequences, `[batch · seq]` tokens, one sequence after the other.
    ///
    /// # Errors
    /// [`ModelError`] when a token is outside of the vocabulary, or the lengths do not fit the tokens.
    ///
    /// A sequence's logits have the same bits for any batch and any padding (`tests/tests/models/classifier.rs`).
    pub fn logits(&self, tape: &mut Tape<'_>, tokens: &[u32], lengths: &[usize]) -> Result<Var, ModelError> {
        expect_dim("tokens", "length modulo the batch", 0, tokens.len() % lengths.len().max(1))?;
        let lengths: Arc<[usize]> = lengths.into();
        let pooled = match &self.encoder {
            Encoder::Recurrent(layers) => self.read_recurrent(tape, layers, tokens, &lengths)?,
            Encoder::Transformer { layers, norm, max_positions } => {
                let length = tokens.len() / lengths.len().max(1);
                if length > *max_positions {
                    let max_positions = *max_positions;
                    return Err(ModelError::TooLong { argument: "tokens", length, max_positions });
                }
                let mut x = self.embed(tape, tokens.into(), length)?;
                let source = Sequences { batch: lengths.len(), lengths: Some(lengths.clone()) };
                for layer in layers {
                    x = layer.forward(tape, x, &source)?;
                }
                let x = norm.forward(tape, x)?;
                ops::pool_sequences(tape, x, (&lengths, false), self.config.pooling)?
            }
        };
        let pooled = ops::dropout(tape, pooled, self.config.dropout)?;
        Ok(self.output.forward(tape, pooled)?)
    }

    fn read_recurrent(
        &self,
        tape: &mut Tape<'_>,
        layers: &[RecurrentLayer],
        tokens: &[u32],
        lengths: &Arc<[usize]>,
    ) -> Result<Var, ModelError> {
        let mut x = self.embed(tape, time_major(tokens, lengths.len()), tokens.len())?;
        let mut last = None;
        for (l, layer) in layers.iter().enumerate() {
            if l > 0 {
                x = ops::dropout(tape, x, self.config.dropout)?;
            }
            let (y, state) = layer.forward(tape, x, lengths, None)?;
            (x, last) = (y, Some(state.h));
        }
        Ok(match (self.config.pooling, last) {
            (Pooling::Last, Some(last)) => last,
            _ => ops::pool_sequences(tape, x, (lengths, true), Pooling::Mean)?,
        })
    }

    /// The embedded tokens; `seq` of them are one run of positions.
    fn embed(&self, tape: &mut Tape<'_>, ids: Arc<[u32]>, seq: usize) -> Result<Var, ModelError> {
        let x = self.embedding.forward(tape, &Tokens { ids, seq, first: 0 })?;
        Ok(ops::dropout(tape, x, self.config.dropout)?)
    }

    /// The cross-entropy **summed** over the batch.
    ///
    /// # Errors
    /// As [`Classifier::logits`], or when a class is outside of the model's.
    pub fn loss(
        &self,
        tape: &mut Tape<'_>,
        (tokens, lengths): (&[u32], &[usize]),
        classes: &[u32],
    ) -> Result<Var, ModelError> {
        let logits = self.logits(tape, tokens, lengths)?;
        Ok(ops::classification_loss(tape, logits, &classes.into(), 0.0)?)
    }

    /// Logits without a way back, `[batch, classes]`.
    ///
    /// # Errors
    /// As [`Classifier::logits`].
    pub fn predict(&self, ctx: &Context, tokens: &[u32], lengths: &[usize]) -> Result<Tensor, ModelError> {
        let mut tape = Tape::inference(ctx, &self.store, &self.pool);
        let logits = self.logits(&mut tape, tokens, lengths)?;
        Ok(Tensor::new(&[lengths.len(), self.config.classes], tape.value(logits).to_vec())?)
    }
}

/// Sequences as [`Classifier::predict`] takes them: padded to the longest, one after the other, and their lengths.
pub fn padded(sequences: &[&[u32]]) -> (Vec<u32>, Vec<usize>) {
    let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.len()).collect();
    let seq = lengths.iter().copied().max().unwrap_or(0);
    let mut tokens = vec![PAD; sequences.len() * seq];
    for (b, sequence) in sequences.iter().enumerate() {
        tokens[b * seq..][..sequence.len()].copy_from_slice(sequence);
    }
    (tokens, lengths)
}

/// `source` is the sequence, `target` its class alone.
impl Trainable for Classifier {
    type Config = ClassifierConfig;
    type Vocabs = Labels;

    fn build(config: &ClassifierConfig, seed: u64) -> Result<Box<Classifier>, ModelError> {
        Ok(Box::new(Classifier::new(config, seed)?))
    }

    fn made_from(&self) -> ClassifierConfig {
        self.config.clone()
    }

    fn weights(&self) -> &ParamStore {
        self.params()
    }

    fn weights_mut(&mut self) -> &mut ParamStore {
        self.params_mut()
    }

    fn loss_tokens(_: &Example) -> usize {
        1
    }

    fn examples_loss(
        &self,
        tape: &mut Tape<'_>,
        examples: &[&Example],
        options: &LossOptions,
    ) -> Result<Var, ModelError> {
        let mut classes = Vec::with_capacity(examples.len());
        for (index, example) in examples.iter().enumerate() {
            let [class] = *example.target else {
                return Err(ModelError::Batch { side: "target", index, problem: "is not one class" });
            };
            classes.push(class);
        }
        let sequences: Vec<&[u32]> = examples.iter().map(|example| &*example.source).collect();
        let (tokens, lengths) = padded(&sequences);
        let logits = self.logits(tape, &tokens, &lengths)?;
        Ok(ops::classification_loss(tape, logits, &classes.into(), options.label_smoothing)?)
    }

    fn save_config(folder: &Path, config: &ClassifierConfig, labels: &Labels) -> Result<(), CheckpointError> {
        save_config(folder, config, labels)
    }
}
