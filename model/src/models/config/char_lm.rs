//! The options of a language model of characters.

use serde::{Deserialize, Serialize};

use super::rnn::check_projection;
use super::{CellKind, positive, rate};
use crate::error::ModelError;
use crate::nn::rnn::CellWidths;

/// A recurrent language model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CharLmConfig {
    /// Characters, the special tokens included.
    pub vocab: usize,
    /// The kind of cell.
    pub cell: CellKind,
    /// The width of the embeddings.
    pub embedding: usize,
    /// The width of a layer's gates and, but for a projection, of its state.
    pub hidden: usize,
    /// The width of a layer's output where an LSTM projects it (Sak et al. 2014), less than `hidden`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub projection: Option<usize>,
    /// How many layers.
    pub layers: usize,
    /// The share of values that training sets to 0: of embeddings, between layers, and before the output.
    pub dropout: f32,
}

impl CharLmConfig {
    /// A small model: one layer, 256 wide. Every field may be changed.
    pub fn new(vocab: usize, cell: CellKind) -> CharLmConfig {
        CharLmConfig { vocab, cell, embedding: 64, hidden: 256, projection: None, layers: 1, dropout: 0.0 }
    }

    /// The width of what layer `layer` reads.
    pub fn input(&self, layer: usize) -> usize {
        if layer == 0 { self.embedding } else { self.output() }
    }

    /// The width of what a layer gives.
    pub fn output(&self) -> usize {
        self.projection.unwrap_or(self.hidden)
    }

    /// The widths of layer `layer`.
    pub(crate) fn widths(&self, layer: usize) -> CellWidths {
        CellWidths { input: self.input(layer), hidden: self.hidden, projection: self.projection }
    }

    /// The number of parameters, exactly: the embedding, the cells, and an output layer with a bias.
    pub fn parameter_count(&self) -> usize {
        let cells = (0..self.layers).map(|l| self.cell.parameter_count(self.widths(l)));
        self.vocab * (self.embedding + self.output() + 1) + cells.sum::<usize>()
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the first field that no model can be built from.
    pub fn validate(&self) -> Result<(), ModelError> {
        positive("vocab", self.vocab)?;
        positive("embedding", self.embedding)?;
        positive("hidden", self.hidden)?;
        positive("layers", self.layers)?;
        check_projection(self.cell, ("projection", self.projection), ("hidden", self.hidden))?;
        rate("dropout", self.dropout)
    }
}
