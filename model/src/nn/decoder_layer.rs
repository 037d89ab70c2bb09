//! One layer of a transformer decoder.

use kavanam_kernels::ShapeError;

use crate::generate::kv_cache::LayerCache;
use crate::models::{NormPlacement, TransformerConfig};
use crate::nn::Norm;
use crate::nn::attention::{CrossAttention, SelfAttention, Sequences};
use crate::nn::feed_forward::FeedForward;
use crate::ops;
use crate::param::ParamStore;
use crate::tape::{Tape, Var};

/// Causal self-attention, attention over the source, feed-forward, each in a residual block.
///
/// # Source
/// Vaswani et al. 2017, figure 1, right.
#[derive(Debug, Clone, Copy)]
pub struct DecoderLayer {
    self_attention: SelfAttention,
    /// Attention over the source.
    pub cross_attention: CrossAttention,
    feed_forward: FeedForward,
    norm1: Norm,
    norm2: Norm,
    norm3: Norm,
    placement: NormPlacement,
    attention_dropout: f32,
    feed_forward_dropout: f32,
}

impl DecoderLayer {
    /// Adds the weights of the layer `name`.
    pub fn new(store: &mut ParamStore, name: &str, config: &TransformerConfig) -> DecoderLayer {
        let (width, heads, epsilon) = (config.width, config.heads, config.norm_epsilon);
        DecoderLayer {
            self_attention: SelfAttention::new(store, &format!("{name}.self_attn"), width, heads, true),
            cross_attention: CrossAttention::new(store, &format!("{name}.cross_attn"), width, heads),
            feed_forward: FeedForward::new(store, name, config),
            norm1: Norm::new(store, &format!("{name}.norm1"), width, epsilon),
            norm2: Norm::new(store, &format!("{name}.norm2"), width, epsilon),
            norm3: Norm::new(store, &format!("{name}.norm3"), width, epsilon),
            placement: config.norm,
            attention_dropout: config.dropout.attention,
            feed_forward_dropout: config.dropout.feed_forward,
        }
    }

    /// All positions at once: x `[batch · seq, width]`, memory `[batch · source_len, width]`.
    ///
    /// # Errors
    /// [`ShapeError`] when shapes do not fit.
    pub fn forward(
        &self,
        tape: &mut Tape<'_>,
        x: Var,
        target: &Sequences,
        (memory, source): (Var, &Sequences),
    ) -> Result<Var, ShapeError> {
        let (to_self, to_source) = (self.self_attention, self.cross_attention);
        self.blocks(
            tape,
            x,
            |tape, x| to_self.forward(tape, x, target),
            |tape, x| to_source.forward(tape, x, memory, source),
        )
    }

    /// One position more of every row: x `[rows, width]`.
    ///
    /// # Errors
    /// [`ShapeError`] when shapes do not fit.
    pub fn step(&self, tape: &mut Tape<'_>, x: Var, cache: &mut LayerCache) -> Result<Var, ShapeError> {
        let LayerCache { to_self, to_source } = cache;
        self.blocks(
            tape,
            x,
            |tape, x| self.self_attention.step(tape, x, to_self),
            |tape, x| self.cross_attention.step(tape, x, to_source),
        )
    }

    /// The three residual blocks, whichever way their attention is computed.
    fn blocks<'p>(
        &self,
        tape: &mut Tape<'p>,
        x: Var,
        to_self: impl FnOnce(&mut Tape<'p>, Var) -> Result<Var, ShapeError>,
        to_source: impl FnOnce(&mut Tape<'p>, Var) -> Result<Var, ShapeError>,
    ) -> Result<Var, ShapeError> {
        let mark = tape.mark();
        let out = match self.placement {
            NormPlacement::Pre => {
                let normed = self.norm1.forward(tape, x)?;
                let attended = to_self(tape, normed)?;
                let x = ops::residual(tape, x, attended, self.attention_dropout)?;
                let normed = self.norm2.forward(tape, x)?;
                let attended = to_source(tape, normed)?;
                let x = ops::residual(tape, x, attended, self.attention_dropout)?;
                let normed = self.norm3.forward(tape, x)?;
                let fed = self.feed_forward.forward(tape, normed)?;
                ops::residual(tape, x, fed, self.feed_forward_dropout)?
            }
            NormPlacement::Post => {
                let attended = to_self(tape, x)?;
                let x = ops::residual(tape, x, attended, self.attention_dropout)?;
                let x = self.norm1.forward(tape, x)?;
                let attended = to_source(tape, x)?;
                let x = ops::residual(tape, x, attended, self.attention_dropout)?;
                let x = self.norm2.forward(tape, x)?;
                let fed = self.feed_forward.forward(tape, x)?;
                let x = ops::residual(tape, x, fed, self.feed_forward_dropout)?;
                self.norm3.forward(tape, x)?
            }
        };
        tape.release(mark, &[out]);
        Ok(out)
    }
}
