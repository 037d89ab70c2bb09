//! One layer of a transformer encoder.

use kavanam_kernels::ShapeError;

use crate::models::{NormPlacement, TransformerConfig};
use crate::nn::Norm;
use crate::nn::attention::{SelfAttention, Sequences};
use crate::nn::feed_forward::FeedForward;
use crate::ops;
use crate::param::ParamStore;
use crate::tape::{Tape, Var};

/// Self-attention, then feed-forward, each in a residual block.
///
/// # Source
/// Vaswani et al. 2017, figure 1, left.
#[derive(Debug, Clone, Copy)]
pub struct EncoderLayer {
    self_attention: SelfAttention,
    feed_forward: FeedForward,
    norm1: Norm,
    norm2: Norm,
    placement: NormPlacement,
    attention_dropout: f32,
    feed_forward_dropout: f32,
}

impl EncoderLayer {
    /// Adds the weights of the layer `name`.
    pub fn new(store: &mut ParamStore, name: &str, config: &TransformerConfig) -> EncoderLayer {
        let (width, epsilon) = (config.width, config.norm_epsilon);
        EncoderLayer {
            self_attention: SelfAttention::new(
                store,
                &format!("{name}.self_attn"),
                width,
                config.heads,
                false,
            ),
            feed_forward: FeedForward::new(store, name, config),
            norm1: Norm::new(store, &format!("{name}.norm1"), width, epsilon),
            norm2: Norm::new(store, &format!("{name}.norm2"), width, epsilon),
            placement: config.norm,
            attention_dropout: config.dropout.attention,
            feed_forward_dropout: config.dropout.feed_forward,
        }
    }

    /// `[batch · seq, width]` to the same.
    ///
    /// # Errors
    /// [`ShapeError`] when shapes do not fit.
    pub fn forward(&self, tape: &mut Tape<'_>, x: Var, source: &Sequences) -> Result<Var, ShapeError> {
        let mark = tape.mark();
        let out = match self.placement {
            NormPlacement::Pre => {
                let normed = self.norm1.forward(tape, x)?;
                let attended = self.self_attention.forward(tape, normed, source)?;
                let x = ops::residual(tape, x, attended, self.attention_dropout)?;
                let normed = self.norm2.forward(tape, x)?;
                let fed = self.feed_forward.forward(tape, normed)?;
                ops::residual(tape, x, fed, self.feed_forward_dropout)?
            }
            NormPlacement::Post => {
                let attended = self.self_attention.forward(tape, x, source)?;
                let x = ops::residual(tape, x, attended, self.attention_dropout)?;
                let x = self.norm1.forward(tape, x)?;
                let fed = self.feed_forward.forward(tape, x)?;
                let x = ops::residual(tape, x, fed, self.feed_forward_dropout)?;
                self.norm2.forward(tape, x)?
            }
        };
        tape.release(mark, &[out]);
        Ok(out)
    }
}
