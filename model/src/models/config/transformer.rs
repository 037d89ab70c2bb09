//! The options of a transformer.

use serde::{Deserialize, Serialize};

use super::{positive, rate, wrong};
use crate::error::ModelError;

/// Where layer normalisation stands in a residual block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormPlacement {
    /// `x + f(norm(x))`: trains without warm-up (Xiong et al. 2020).
    Pre,
    /// `norm(x + f(x))`: the paper's.
    Post,
}

/// How a transformer knows where a token stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// A trained table of `max_positions` rows for each stack.
    Learned,
    /// Sine and cosine, interleaved (Vaswani et al. 2017, section 3.5).
    Sinusoidal,
}

/// The function between the two matrices of a feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeedForwardActivation {
    /// max(0, x).
    Relu,
    /// x·Φ(x), by the error function.
    Gelu,
}

/// The share of values that training sets to 0, for each place.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DropoutRates {
    /// Of the sum of token and position embedding.
    pub embedding: f32,
    /// Of an attention block's output, before it joins the residual stream.
    pub attention: f32,
    /// Of a feed-forward block: after its activation, and of its output.
    pub feed_forward: f32,
}

impl DropoutRates {
    /// The same rate everywhere.
    pub fn uniform(rate: f32) -> DropoutRates {
        DropoutRates { embedding: rate, attention: rate, feed_forward: rate }
    }
}

/// A transformer encoder–decoder (Vaswani et al. 2017).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransformerConfig {
    /// Source tokens, the special ones included.
    pub source_vocab: usize,
    /// Target tokens, the special ones included.
    pub target_vocab: usize,
    /// d_model: the width of the residual stream.
    pub width: usize,
    /// Attention heads; they share `width` evenly.
    pub heads: usize,
    /// The width inside of a feed-forward block.
    pub feed_forward: usize,
    /// Layers of the encoder.
    pub encoder_layers: usize,
    /// Layers of the decoder.
    pub decoder_layers: usize,
    /// The longest sequence, source or target.
    pub max_positions: usize,
    /// Where norms stand.
    pub norm: NormPlacement,
    /// Whether each stack ends with one more norm (usual with `pre`).
    pub final_norm: bool,
    /// How positions are told.
    pub positions: Positions,
    /// Whether token embeddings are multiplied by √width.
    pub scale_embeddings: bool,
    /// The feed-forward function.
    pub activation: FeedForwardActivation,
    /// Whether the output projection is the target embedding's table.
    pub tie_output: bool,
    /// Whether source and target share one embedding table (and so one vocabulary).
    pub share_embeddings: bool,
    /// ε inside of the norms' square root.
    pub norm_epsilon: f32,
    /// What training drops.
    pub dropout: DropoutRates,
}

impl TransformerConfig {
    /// A small pre-norm model: width 128, 4 heads, 3 + 3 layers, feed-forward 512, sinusoidal positions,
    /// ReLU, separate embeddings, tied output, dropout 0.1. Every field may be changed.
    pub fn new(source_vocab: usize, target_vocab: usize) -> TransformerConfig {
        TransformerConfig {
            source_vocab,
            target_vocab,
            width: 128,
            heads: 4,
            feed_forward: 512,
            encoder_layers: 3,
            decoder_layers: 3,
            max_positions: 512,
            norm: NormPlacement::Pre,
            final_norm: true,
            positions: Positions::Sinusoidal,
            scale_embeddings: true,
            activation: FeedForwardActivation::Relu,
            tie_output: true,
            share_embeddings: false,
            norm_epsilon: 1e-5,
            dropout: DropoutRates::uniform(0.1),
        }
    }

    /// The number of parameters, exactly.
    ///
    /// With d = width, f = feed_forward: an encoder layer holds 4d² + 4d (attention), 2df + f + d (feed-forward)
    /// and 2 norms of 2d; a decoder layer one attention and one norm more.
    pub fn parameter_count(&self) -> usize {
        let d = self.width;
        let norm = 2 * d;
        let attention = 4 * d * d + 4 * d;
        let feed_forward = 2 * d * self.feed_forward + self.feed_forward + d;
        let layers = self.encoder_layers * (attention + feed_forward + 2 * norm)
            + self.decoder_layers * (2 * attention + feed_forward + 3 * norm);
        let source = if self.share_embeddings { 0 } else { self.source_vocab * d };
        let embeddings = source + self.target_vocab * d;
        let positions = if self.positions == Positions::Learned { 2 * self.max_positions * d } else { 0 };
        let final_norms = if self.final_norm { 2 * norm } else { 0 };
        let output = self.target_vocab + if self.tie_output { 0 } else { self.target_vocab * d };
        embeddings + positions + layers + final_norms + output
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the first field that no model can be built from.
    pub fn validate(&self) -> Result<(), ModelError> {
        positive("source_vocab", self.source_vocab)?;
        positive("target_vocab", self.target_vocab)?;
        positive("width", self.width)?;
        positive("heads", self.heads)?;
        positive("feed_forward", self.feed_forward)?;
        positive("max_positions", self.max_positions)?;
        if !self.width.is_multiple_of(self.heads) {
            return Err(wrong("width", self.width, format!("a multiple of the {} heads", self.heads)));
        }
        if self.positions == Positions::Sinusoidal && !self.width.is_multiple_of(2) {
            return Err(wrong("width", self.width, "even with sinusoidal positions".to_owned()));
        }
        if self.share_embeddings && self.source_vocab != self.target_vocab {
            let expected = format!("{} as the shared source vocabulary", self.source_vocab);
            return Err(wrong("target_vocab", self.target_vocab, expected));
        }
        if !(self.norm_epsilon > 0.0 && self.norm_epsilon.is_finite()) {
            return Err(wrong("norm_epsilon", self.norm_epsilon, "positive".to_owned()));
        }
        rate("dropout.embedding", self.dropout.embedding)?;
        rate("dropout.attention", self.dropout.attention)?;
        rate("dropout.feed_forward", self.dropout.feed_forward)
    }
}
