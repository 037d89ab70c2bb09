//! The options of a language model of characters.

use serde::{Deserialize, Serialize};

use super::{CellKind, positive, rate};
use crate::error::ModelError;

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
    /// The width of a layer's state.
    pub hidden: usize,
    /// How many layers.
    pub layers: usize,
    /// The share of values that training sets to 0: of embeddings, between layers, and before the output.
    pub dropout: f32,
}

impl CharLmConfig {
    /// A small model: one layer, 256 wide. Every field may be changed.
    pub fn new(vocab: usize, cell: CellKind) -> CharLmConfig {
        CharLmConfig { vocab, cell, embedding: 64, hidden: 256, layers: 1, dropout: 0.0 }
    }

    /// The width of what layer `layer` reads.
    pub fn input(&self, layer: usize) -> usize {
        if layer == 0 { self.embedding } else { self.hidden }
    }

    /// The number of parameters, exactly: the embedding, the cells, and an output layer with a bias.
    pub fn parameter_count(&self) -> usize {
        let cells = (0..self.layers).map(|l| self.cell.parameter_count(self.input(l), self.hidden));
        self.vocab * (self.embedding + self.hidden + 1) + cells.sum::<usize>()
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
        rate("dropout", self.dropout)
    }
}
