//! What happens to a product before it is stored: scale, bias, activation, gate, residual, in one pass
//! over registers, never a second pass over C.

use std::ops::Range;

use super::microkernel::Finish;
use crate::error::{ShapeError, expect_dim};
use crate::rowwise::Activation;
use crate::view::MatRef;

/// Whether a product replaces C or is added to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Accum {
    /// `C = op(A·B)`. C is never read: it may hold anything, NaN included.
    #[default]
    Overwrite,
    /// `C = op(C + A·B)`.
    Add,
}

/// `C = activation(scale·A·B [+ C] + bias)∘gate + residual`, all parts optional.
///
/// With a gate, a gated feed-forward layer is two products and no pass of its own: `up = X·U`, then `C = silu(X·W)∘up`.
///
/// ```
/// use kavanam_kernels::{Activation, gemm::Epilogue};
/// let bias = [0.5; 8];
/// let linear_relu = Epilogue::new().bias(&bias).activation(Activation::Relu);
/// assert_eq!(linear_relu.scale, 1.0);
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Epilogue<'a> {
    /// The factor of A·B (not of C).
    pub scale: f32,
    /// Added to every row; one element a column.
    pub bias: Option<&'a [f32]>,
    /// Applied after the bias.
    pub activation: Activation,
    /// Multiplied with what the activation gives; C's shape, any strides.
    pub gate: Option<MatRef<'a>>,
    /// Added last; C's shape, any strides.
    pub residual: Option<MatRef<'a>>,
}

impl Default for Epilogue<'_> {
    fn default() -> Self {
        Epilogue { scale: 1.0, bias: None, activation: Activation::Identity, gate: None, residual: None }
    }
}

impl<'a> Epilogue<'a> {
    /// The identity: `C = A·B [+ C]`.
    pub fn new() -> Self {
        Epilogue::default()
    }

    /// The same with the product multiplied by `scale`.
    #[must_use]
    pub fn scale(self, scale: f32) -> Self {
        Epilogue { scale, ..self }
    }

    /// The same with `bias` added to every row.
    #[must_use]
    pub fn bias(self, bias: &'a [f32]) -> Self {
        Epilogue { bias: Some(bias), ..self }
    }

    /// The same with `activation` applied after the bias.
    #[must_use]
    pub fn activation(self, activation: Activation) -> Self {
        Epilogue { activation, ..self }
    }

    /// The same with what the activation gives multiplied by `gate`, element by element.
    #[must_use]
    pub fn gate(self, gate: MatRef<'a>) -> Self {
        Epilogue { gate: Some(gate), ..self }
    }

    /// The same with `residual` added last.
    #[must_use]
    pub fn residual(self, residual: MatRef<'a>) -> Self {
        Epilogue { residual: Some(residual), ..self }
    }

    /// `Ok` when the parts fit a C of `rows × cols`.
    pub(super) fn check(&self, rows: usize, cols: usize) -> Result<(), ShapeError> {
        if let Some(bias) = self.bias {
            expect_dim("bias", "elements", cols, bias.len())?;
        }
        for (argument, matrix) in [("gate", self.gate), ("residual", self.residual)] {
            if let Some(matrix) = matrix {
                expect_dim(argument, "rows", rows, matrix.rows())?;
                expect_dim(argument, "cols", cols, matrix.cols())?;
            }
        }
        Ok(())
    }

    /// Whether it does nothing.
    pub(super) fn is_plain(&self) -> bool {
        let Epilogue { scale, bias, activation, gate, residual } = *self;
        let of_c = bias.is_some() || gate.is_some() || residual.is_some();
        scale == 1.0 && activation == Activation::Identity && !of_c
    }

    /// The same for these rows of C alone.
    pub(super) fn rows(self, rows: Range<usize>) -> Self {
        let part = |matrix: Option<MatRef<'a>>| matrix.map(|m| m.sub(rows.clone(), 0..m.cols()));
        Epilogue { gate: part(self.gate), residual: part(self.residual), ..self }
    }

    /// What is done to the sums of these rows and columns over one block of K: `add` says whether C is read, `last` whether it is the last block.
    #[inline(always)]
    pub(super) fn finish(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        (add, last): (bool, bool),
    ) -> Finish<'a> {
        let part = |matrix: Option<MatRef<'a>>| {
            matrix.filter(|_| last).map(|matrix| matrix.sub(rows.clone(), cols.clone()))
        };
        Finish {
            scale: self.scale,
            add,
            bias: self.bias.filter(|_| last).map(|bias| &bias[cols.clone()]),
            activation: if last { self.activation } else { Activation::Identity },
            gate: part(self.gate),
            residual: part(self.residual),
        }
    }
}
