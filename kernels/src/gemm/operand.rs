//! What a product reads and writes: matrices of f32 or of bf16.

use half::bf16;

use crate::view::{MatMut, MatRef};

/// A matrix to read. Functions take `impl Into<Operand>`, so a view is passed as it is.
#[derive(Debug, Clone, Copy)]
pub enum Operand<'a> {
    /// Of f32.
    F32(MatRef<'a>),
    /// Of bf16: the numbers are used as they are, without a rounding.
    Bf16(MatRef<'a, bf16>),
}

impl Operand<'_> {
    /// The number of rows.
    pub fn rows(&self) -> usize {
        match self {
            Operand::F32(matrix) => matrix.rows(),
            Operand::Bf16(matrix) => matrix.rows(),
        }
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        match self {
            Operand::F32(matrix) => matrix.cols(),
            Operand::Bf16(matrix) => matrix.cols(),
        }
    }
}

impl<'a> From<MatRef<'a>> for Operand<'a> {
    fn from(matrix: MatRef<'a>) -> Self {
        Operand::F32(matrix)
    }
}

impl<'a> From<MatRef<'a, bf16>> for Operand<'a> {
    fn from(matrix: MatRef<'a, bf16>) -> Self {
        Operand::Bf16(matrix)
    }
}

/// A matrix to write. Functions take `impl Into<Output>`, so a view is passed as it is.
#[derive(Debug)]
pub enum Output<'a> {
    /// In f32.
    F32(MatMut<'a>),
    /// Rounded to bf16 when all is done, to nearest, ties to even.
    Bf16(MatMut<'a, bf16>),
}

impl Output<'_> {
    /// The number of rows.
    pub fn rows(&self) -> usize {
        match self {
            Output::F32(matrix) => matrix.rows(),
            Output::Bf16(matrix) => matrix.rows(),
        }
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        match self {
            Output::F32(matrix) => matrix.cols(),
            Output::Bf16(matrix) => matrix.cols(),
        }
    }
}

impl<'a> From<MatMut<'a>> for Output<'a> {
    fn from(matrix: MatMut<'a>) -> Self {
        Output::F32(matrix)
    }
}

impl<'a> From<MatMut<'a, bf16>> for Output<'a> {
    fn from(matrix: MatMut<'a, bf16>) -> Self {
        Output::Bf16(matrix)
    }
}
