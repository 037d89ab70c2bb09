//! A language model of characters on recurrent cells.
//!
//! ```text
//! x      = embedding(characters)
//! x      = layer(x), state carried on …
//! logits = W·x + b                          of the next character, at every position
//! ```
//! It is trained on windows of a text, each from a state of zeros, and reads on from one character to the next with
//! its state: what it has read is never read again.
//!
//! # Source
//! Mikolov et al. 2010 (the recurrent language model); Graves 2013 (arXiv:1308.0850), section 2, on characters.

use std::path::Path;
use std::sync::Arc;

use kavanam_kernels::Context;
use kavanam_kernels::error::expect_dim;
use kavanam_kernels::rnn::Direction;

use crate::error::ModelError;
use crate::generate::cells::{CellStates, StepCell};
use crate::io::CheckpointError;
use crate::io::char_lm::save_config;
use crate::models::rnn_seq2seq::time_major;
use crate::models::{BOS, CharLmConfig, LossOptions, PAD};
use crate::nn::Linear;
use crate::nn::embedding::Embedding;
use crate::nn::rnn::{CellWeights, cell_weights};
use crate::ops::{self, StateVars, Tokens};
use crate::packed::{PackedParams, PerKernel};
use crate::param::ParamStore;
use crate::pool::Pool;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::train::{Example, Trainable};
use crate::vocab::Vocab;

/// A language model of characters with its weights.
#[derive(Debug)]
pub struct CharLm {
    config: CharLmConfig,
    store: ParamStore,
    embedding: Embedding,
    layers: Vec<CellWeights>,
    output: Linear,
    packed: PerKernel<Packed>,
    pool: Pool,
}

/// The weights, packed for many steps.
#[derive(Debug)]
struct Packed {
    params: PackedParams,
    cells: Vec<StepCell>,
}

/// What the model remembers of what it has read, for several texts at once.
#[derive(Debug, Clone)]
pub struct CharLmState(CellStates);

impl CharLm {
    /// A new model, its weights initialised from `seed`.
    ///
    /// # Errors
    /// [`ModelError::Config`] when no model can be built from `config`.
    pub fn new(config: &CharLmConfig, seed: u64) -> Result<CharLm, ModelError> {
        config.validate()?;
        let mut store = ParamStore::new(seed);
        let embedding = Embedding::new(&mut store, "embedding", config.vocab, config.embedding);
        let cell =
            |l: usize| cell_weights(&mut store, "rnn", &format!("l{l}"), config.cell, config.widths(l));
        let layers = (0..config.layers).map(cell).collect();
        let output = Linear::new(&mut store, "output", config.output(), config.vocab, 1);
        let (packed, pool) = (PerKernel::new(), Pool::new());
        Ok(CharLm { config: config.clone(), store, embedding, layers, output, packed, pool })
    }

    /// What the model was built from.
    pub fn config(&self) -> &CharLmConfig {
        &self.config
    }

    /// The weights.
    pub fn params(&self) -> &ParamStore {
        &self.store
    }

    /// The weights, to load or to step.
    pub fn params_mut(&mut self) -> &mut ParamStore {
        self.packed.clear();
        &mut self.store
    }

    /// The state before the first character of `rows` texts.
    pub fn start(&self, rows: usize) -> CharLmState {
        let CharLmConfig { cell, layers, hidden, .. } = self.config;
        let widths = [self.config.output(), hidden];
        let layer = widths[..cell.states()].iter().map(|width| vec![0.0; rows * width]).collect::<Vec<_>>();
        let states = (0..layers).flat_map(|_| layer.clone()).collect();
        CharLmState(CellStates { states, vectors: cell.states(), rows })
    }

    /// Time-major logits of time-major tokens, and each layer's last state.
    fn run(
        &self,
        tape: &mut Tape<'_>,
        ids: Arc<[u32]>,
        lengths: &Arc<[usize]>,
        initial: &[StateVars],
    ) -> Result<(Var, Vec<StateVars>), ModelError> {
        let tokens = Tokens { seq: ids.len(), ids, first: 0 };
        let mut x = self.embedding.forward(tape, &tokens)?;
        let mut last = Vec::with_capacity(self.layers.len());
        for (l, layer) in self.layers.iter().enumerate() {
            x = ops::dropout(tape, x, self.config.dropout)?;
            let along = (lengths, Direction::Forward);
            let output = layer.forward(tape, x, along, initial.get(l).copied())?;
            (x, _) = (output.y, last.push(output.last));
        }
        let x = ops::dropout(tape, x, self.config.dropout)?;
        Ok((self.output.forward(tape, x)?, last))
    }

    /// Reads on: logits `[rows · seq, vocab]` of the character after each, row `b · seq + t` for token t of text b.
    ///
    /// # Shapes
    /// `tokens` `[rows · seq]`, one text after the other, all equally long.
    ///
    /// # Errors
    /// [`ModelError`] when a token is outside of the vocabulary or the tokens cannot be dealt evenly to the texts.
    ///
    /// The logits have the same bits however a text is cut into calls (`tests/tests/models/char_lm.rs`).
    pub fn read(&self, ctx: &Context, state: &mut CharLmState, tokens: &[u32]) -> Result<Tensor, ModelError> {
        let rows = state.0.rows;
        expect_dim("tokens", "length modulo the rows", 0, tokens.len() % rows.max(1))?;
        let make = || {
            let cells = self.layers.iter().map(|layer| StepCell::pack(ctx, &self.store, layer));
            Ok::<_, ModelError>(Packed {
                params: PackedParams::new(&self.store),
                cells: cells.collect::<Result<_, _>>()?,
            })
        };
        let packed = self.packed.get_or_make(ctx, make)?;
        let mut tape = Tape::inference(ctx, &self.store, &self.pool).with_packed(&packed.params);
        if tokens.len() == rows {
            return self.step(&mut tape, &packed, &mut state.0, tokens);
        }
        let seq = tokens.len() / rows.max(1);
        let lengths: Arc<[usize]> = vec![seq; rows].into();
        let mut initial = Vec::with_capacity(self.layers.len());
        for state in state.0.states.chunks_exact(state.0.vectors) {
            let mut vars = state.iter().map(|s| tape.constant(s, rows, s.len() / rows.max(1)));
            let h = vars.next().expect("a cell has a state")?;
            initial.push(StateVars { h, c: vars.next().transpose()? });
        }
        let (logits, last) = self.run(&mut tape, time_major(tokens, rows), &lengths, &initial)?;
        let last = last.iter().flat_map(StateVars::vars);
        for (state, last) in state.0.states.iter_mut().zip(last) {
            state.copy_from_slice(tape.value(last));
        }
        let order = (0..rows).flat_map(|b| (0..seq).map(move |t| t * rows + b)).collect();
        let logits = ops::permute_rows(&mut tape, logits, &order)?;
        Ok(Tensor::new(&[tokens.len(), self.config.vocab], tape.value(logits).to_vec())?)
    }

    /// One token a row.
    fn step(
        &self,
        tape: &mut Tape<'_>,
        packed: &Packed,
        state: &mut CellStates,
        tokens: &[u32],
    ) -> Result<Tensor, ModelError> {
        let tokens = Tokens { ids: tokens.into(), seq: tokens.len(), first: 0 };
        let embedded = self.embedding.forward(tape, &tokens)?;
        let mut x = tape.value(embedded).to_vec();
        for (l, cell) in packed.cells.iter().enumerate() {
            x = state.advance(tape, cell, l, &x)?;
        }
        let x = tape.constant(&x, state.rows, self.config.output())?;
        let logits = self.output.forward(tape, x)?;
        Ok(Tensor::new(&[state.rows, self.config.vocab], tape.value(logits).to_vec())?)
    }
}

/// `source` is what stands before a window, [`BOS`] before the first; the loss is that of `target` alone.
impl Trainable for CharLm {
    type Config = CharLmConfig;
    type Vocabs = Vocab;

    fn build(config: &CharLmConfig, seed: u64) -> Result<Box<CharLm>, ModelError> {
        Ok(Box::new(CharLm::new(config, seed)?))
    }

    fn made_from(&self) -> CharLmConfig {
        self.config.clone()
    }

    fn weights(&self) -> &ParamStore {
        self.params()
    }

    fn weights_mut(&mut self) -> &mut ParamStore {
        self.params_mut()
    }

    fn loss_tokens(example: &Example) -> usize {
        example.target.len()
    }

    fn examples_loss(
        &self,
        tape: &mut Tape<'_>,
        examples: &[&Example],
        options: &LossOptions,
    ) -> Result<Var, ModelError> {
        let length = |e: &&Example| (e.source.len() + e.target.len()).saturating_sub(1);
        let lengths: Vec<usize> = examples.iter().map(length).collect();
        let seq = lengths.iter().copied().max().ok_or(ModelError::EmptyBatch)?;
        let [mut read, mut said] = [(); 2].map(|()| vec![PAD; examples.len() * seq]);
        for (b, example) in examples.iter().enumerate() {
            let Example { source, target } = example;
            if source.is_empty() {
                return Err(ModelError::Batch { side: "source", index: b, problem: "is empty" });
            }
            let whole = source.iter().chain(target);
            read[b * seq..][..lengths[b]].iter_mut().zip(whole).for_each(|(to, from)| *to = *from);
            let first = b * seq + source.len() - 1;
            said[first..first + target.len()].copy_from_slice(target);
        }
        let (ids, targets) = (time_major(&read, examples.len()), time_major(&said, examples.len()));
        let (logits, _) = self.run(tape, ids, &lengths.into(), &[])?;
        Ok(ops::cross_entropy(tape, logits, &targets, options.label_smoothing)?)
    }

    fn save_config(folder: &Path, config: &CharLmConfig, vocab: &Vocab) -> Result<(), CheckpointError> {
        save_config(folder, config, vocab)
    }
}

/// A text as examples: windows of `window` characters, each after the one that stands before it.
pub fn windows(text: &[u32], window: usize) -> Vec<Example> {
    let before = |start: usize| if start == 0 { BOS } else { text[start - 1] };
    let chunks = text.chunks(window.max(1)).enumerate();
    chunks.map(|(i, target)| Example { source: vec![before(i * window)], target: target.to_vec() }).collect()
}
