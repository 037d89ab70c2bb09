//! What happens to a product before it is stored: scale, bias, activation, residual, in one pass
//! over registers, never a second pass over C.

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

/// `C = activation(scale·A·B [+ C] + bias) + residual`, all parts optional.
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
    /// Added after the activation; C's shape, any strides.
    pub residual: Option<MatRef<'a>>,
}

impl Default for Epilogue<'_> {
    fn default() -> Self {
        Epilogue { scale: 1.0, bias: None, activation: Activation::Identity, residual: None }
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
        if let Some(residual) = self.residual {
            expect_dim("residual", "rows", rows, residual.rows())?;
            expect_dim("residual", "cols", cols, residual.cols())?;
        }
        Ok(())
    }
}
