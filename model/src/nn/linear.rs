//! A linear layer.

use kavanam_kernels::{Activation, ShapeError};

use crate::ops::{self, LinearWeights};
use crate::param::{Init, ParamStore};
use crate::tape::{Tape, Var};

/// `y = x·Wᵀ + b`.
#[derive(Debug, Clone, Copy)]
pub struct Linear {
    /// `weight` `[out, in]` and `bias` `[out]`.
    pub weights: LinearWeights,
}

impl Linear {
    /// Adds `{name}.weight`, initialised as a stack of `stacked` Xavier matrices, and `{name}.bias` of zeros.
    pub fn new(store: &mut ParamStore, name: &str, input: usize, output: usize, stacked: usize) -> Linear {
        let weight = store.add(&format!("{name}.weight"), &[output, input], Init::Xavier { stacked });
        let bias = store.add(&format!("{name}.bias"), &[output], Init::Zeros);
        Linear { weights: LinearWeights { weight, bias: Some(bias) } }
    }

    /// Adds `{name}.weight` alone.
    pub fn without_bias(store: &mut ParamStore, name: &str, input: usize, output: usize) -> Linear {
        let weight = store.add(&format!("{name}.weight"), &[output, input], Init::Xavier { stacked: 1 });
        Linear { weights: LinearWeights { weight, bias: None } }
    }

    /// `x·Wᵀ + b`.
    ///
    /// # Errors
    /// [`ShapeError`] when x has another width.
    pub fn forward(&self, tape: &mut Tape<'_>, x: Var) -> Result<Var, ShapeError> {
        ops::linear(tape, x, &self.weights, Activation::Identity)
    }

    /// `f(x·Wᵀ + b)`: in the product's epilogue where f's value tells its derivative, else as an op of its own.
    ///
    /// # Errors
    /// [`ShapeError`] when x has another width.
    pub fn activated(&self, tape: &mut Tape<'_>, x: Var, f: Activation) -> Result<Var, ShapeError> {
        let fused = matches!(f, Activation::Identity | Activation::Relu | Activation::Tanh);
        if fused || !tape.is_recording() {
            return ops::linear(tape, x, &self.weights, f);
        }
        let y = self.forward(tape, x)?;
        ops::activation(tape, y, f)
    }
}
