//! Layer normalisation as a layer.

use kavanam_kernels::ShapeError;

use crate::ops::{self, NormWeights};
use crate::param::{Init, ParamStore};
use crate::tape::{Tape, Var};

/// `y = γ·(x − mean)/√(variance + ε) + β`, row by row.
#[derive(Debug, Clone, Copy)]
pub struct Norm {
    weights: NormWeights,
}

impl Norm {
    /// Adds `{name}.weight` of ones and `{name}.bias` of zeros.
    pub fn new(store: &mut ParamStore, name: &str, width: usize, epsilon: f32) -> Norm {
        let weight = store.add(&format!("{name}.weight"), &[width], Init::Ones);
        let bias = store.add(&format!("{name}.bias"), &[width], Init::Zeros);
        Norm { weights: NormWeights { weight, bias, epsilon } }
    }

    /// Normalises every row.
    ///
    /// # Errors
    /// [`ShapeError`] when x has another width.
    pub fn forward(&self, tape: &mut Tape<'_>, x: Var) -> Result<Var, ShapeError> {
        ops::layer_norm(tape, x, &self.weights)
    }
}
