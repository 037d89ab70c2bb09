//! The options of a classifier of sequences.

use serde::{Deserialize, Serialize};

use super::rnn::check_projection;
use super::transformer::{DropoutRates, FeedForwardActivation, TransformerConfig};
use super::{CellKind, positive, rate};
use crate::error::ModelError;

/// How a sequence's rows become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The mean over the positions that are no padding.
    Mean,
    /// The last state: of a recurrent encoder each direction's own, of a transformer the last position's.
    Last,
}

/// What reads the embedded tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ClassifierEncoder {
    /// Recurrent layers.
    Recurrent {
        /// The kind of cell.
        cell: CellKind,
        /// The width of a layer's gates and, but for a projection, of its state, for each direction.
        hidden: usize,
        /// The width of a layer's state h where an LSTM projects it (Sak et al. 2014), less than `hidden`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        projection: Option<usize>,
        /// How many layers.
        layers: usize,
        /// Whether every layer also runs from the end to the start.
        bidirectional: bool,
    },
    /// Pre-norm transformer layers as wide as the embedding, with sinusoidal positions and GELU.
    Transformer {
        /// Attention heads; they share the width evenly.
        heads: usize,
        /// The width inside of a feed-forward block.
        feed_forward: usize,
        /// How many layers.
        layers: usize,
        /// The longest sequence.
        max_positions: usize,
    },
}

/// A classifier of sequences: embedding, encoder, pooling, linear.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassifierConfig {
    /// Tokens, the special ones included.
    pub vocab: usize,
    /// What a sequence can be.
    pub classes: usize,
    /// The width of the token embeddings.
    pub embedding: usize,
    /// What reads them.
    pub encoder: ClassifierEncoder,
    /// How its rows become one.
    pub pooling: Pooling,
    /// The share of values that training sets to 0: of embeddings, in or between layers, and before the output.
    pub dropout: f32,
}

impl ClassifierConfig {
    /// The encoder's options where it is a transformer.
    pub(crate) fn transformer(&self) -> Option<TransformerConfig> {
        let ClassifierEncoder::Transformer { heads, feed_forward, layers, max_positions } = self.encoder
        else {
            return None;
        };
        Some(TransformerConfig {
            width: self.embedding,
            heads,
            feed_forward,
            encoder_layers: layers,
            max_positions,
            activation: FeedForwardActivation::Gelu,
            dropout: DropoutRates::uniform(self.dropout),
            ..TransformerConfig::new(self.vocab, self.classes)
        })
    }

    /// The width of what the output layer reads.
    pub fn pooled(&self) -> usize {
        match self.encoder {
            ClassifierEncoder::Recurrent { hidden, projection, bidirectional, .. } => {
                (if bidirectional { 2 } else { 1 }) * projection.unwrap_or(hidden)
            }
            ClassifierEncoder::Transformer { .. } => self.embedding,
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the first field that no model can be built from.
    pub fn validate(&self) -> Result<(), ModelError> {
        positive("vocab", self.vocab)?;
        positive("classes", self.classes)?;
        positive("embedding", self.embedding)?;
        rate("dropout", self.dropout)?;
        if let ClassifierEncoder::Recurrent { cell, hidden, projection, layers, .. } = self.encoder {
            positive("hidden", hidden)?;
            positive("layers", layers)?;
            check_projection(cell, ("projection", projection), ("hidden", hidden))?;
        }
        self.transformer().map_or(Ok(()), |config| config.validate())
    }
}
