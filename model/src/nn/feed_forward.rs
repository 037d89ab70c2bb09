//! The position-wise feed-forward block of a transformer.

use kavanam_kernels::{Activation, ShapeError};

use crate::models::FeedForwardActivation;
use crate::models::TransformerConfig;
use crate::nn::Linear;
use crate::ops;
use crate::param::ParamStore;
use crate::tape::{Tape, Var};

/// `linear2(dropout(f(linear1(x))))`.
///
/// # Source
/// Vaswani et al. 2017, section 3.3.
#[derive(Debug, Clone, Copy)]
pub struct FeedForward {
    linear1: Linear,
    linear2: Linear,
    f: Activation,
    dropout: f32,
}

impl FeedForward {
    /// Adds `{name}.linear1` and `{name}.linear2`.
    pub fn new(store: &mut ParamStore, name: &str, config: &TransformerConfig) -> FeedForward {
        FeedForward {
            linear1: Linear::new(store, &format!("{name}.linear1"), config.width, config.feed_forward, 1),
            linear2: Linear::new(store, &format!("{name}.linear2"), config.feed_forward, config.width, 1),
            f: match config.activation {
                FeedForwardActivation::Relu => Activation::Relu,
                FeedForwardActivation::Gelu => Activation::GeluErf,
            },
            dropout: config.dropout.feed_forward,
        }
    }

    /// `[rows, width]` to the same.
    ///
    /// # Errors
    /// [`ShapeError`] when x has another width.
    pub fn forward(&self, tape: &mut Tape<'_>, x: Var) -> Result<Var, ShapeError> {
        let inner = self.linear1.activated(tape, x, self.f)?;
        let inner = ops::dropout(tape, inner, self.dropout)?;
        self.linear2.forward(tape, inner)
    }
}
