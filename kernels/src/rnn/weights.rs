//! The weights of a layer, their gradients, and the widths that follow from them.

use std::ops::Range;

use crate::error::{ShapeError, expect_dim};
use crate::view::{MatMut, MatRef};

use super::Cell;

/// The weights of one layer and direction, as PyTorch stores them.
///
/// # Shapes
/// With G = [`Cell::gates`], and output = hidden where there is no projection: `w_ih` `[G·hidden, input]`, `w_hh`
/// `[G·hidden, output]`, biases `[G·hidden]`, `w_hr` `[output, hidden]`, `peepholes` `[3·hidden]`.
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    /// The kind of cell.
    pub cell: Cell,
    /// Weights of the input; any strides.
    pub w_ih: MatRef<'a>,
    /// Weights of the state; any strides.
    pub w_hh: MatRef<'a>,
    /// Bias that goes with `w_ih`.
    pub b_ih: &'a [f32],
    /// Bias that goes with `w_hh`.
    pub b_hh: &'a [f32],
    /// p_i, p_f and p_o of [`Cell::LstmPeephole`]; empty for the other cells.
    pub peepholes: &'a [f32],
    /// Projection of an LSTM's state, h = W_hr·(o ⊙ tanh c); any strides. PyTorch's `proj_size` (Sak, Senior and
    /// Beaufays 2014).
    pub w_hr: Option<MatRef<'a>>,
}

/// The widths of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) cell: Cell,
    pub(super) input: usize,
    /// Of a gate and of the state c.
    pub(super) hidden: usize,
    /// Of the state h.
    pub(super) output: usize,
    /// Whether h is a projection of what the gates let through.
    pub(super) projected: bool,
}

impl Sizes {
    /// Columns of a gates buffer: the cell's, then those of the projection.
    pub(super) fn gate_columns(&self) -> usize {
        self.projected_gradient().end
    }

    /// Columns of the state c: 0 for a cell that has none.
    pub(super) fn cell_columns(&self) -> usize {
        self.cell.cell_columns(self.hidden)
    }

    /// Where a row of gates holds what `w_hr` is multiplied with.
    pub(super) fn unprojected(&self) -> Range<usize> {
        let first = self.cell.gate_columns(self.hidden);
        first..first + if self.projected { self.hidden } else { 0 }
    }

    /// Where a row of gates holds, after its step backward, the gradient of h.
    pub(super) fn projected_gradient(&self) -> Range<usize> {
        let first = self.unprojected().end;
        first..first + if self.projected { self.output } else { 0 }
    }

    /// Floating-point operations of one row's step, without the input's.
    pub(super) fn flops(&self) -> usize {
        let products = self.cell.gates() + usize::from(self.projected);
        2 * products * self.hidden * self.output
    }
}

impl Weights<'_> {
    /// Width of the gates and of the state c.
    pub fn hidden(&self) -> usize {
        self.w_hr.map_or(self.w_hh.cols(), |w_hr| w_hr.cols())
    }

    /// Width of the state h.
    pub fn output(&self) -> usize {
        self.w_hh.cols()
    }

    /// Width of the input.
    pub fn input(&self) -> usize {
        self.w_ih.cols()
    }

    /// Columns of a gates buffer.
    pub fn gate_columns(&self) -> usize {
        self.sizes().gate_columns()
    }

    pub(super) fn sizes(&self) -> Sizes {
        Sizes {
            cell: self.cell,
            input: self.input(),
            hidden: self.hidden(),
            output: self.output(),
            projected: self.w_hr.is_some(),
        }
    }

    pub(super) fn check(&self) -> Result<(), ShapeError> {
        let (cell, hidden) = (self.cell, self.hidden());
        let rows = cell.gates() * hidden;
        expect_dim("w_hh", "rows", rows, self.w_hh.rows())?;
        expect_dim("w_ih", "rows", rows, self.w_ih.rows())?;
        expect_dim("b_ih", "length", rows, self.b_ih.len())?;
        expect_dim("b_hh", "length", rows, self.b_hh.len())?;
        expect_dim("peepholes", "length", cell.peepholes(hidden), self.peepholes.len())?;
        match self.w_hr {
            Some(w_hr) if cell.has_cell_state() => expect_dim("w_hr", "rows", self.output(), w_hr.rows()),
            Some(w_hr) => expect_dim("w_hr", "rows (this cell has no projection)", 0, w_hr.rows()),
            None => Ok(()),
        }
    }
}

/// Gradients of [`Weights`], which are **added to**; shapes as there.
#[derive(Debug)]
pub struct WeightGrads<'a> {
    /// Gradient of `w_ih`.
    pub d_w_ih: MatMut<'a>,
    /// Gradient of `w_hh`.
    pub d_w_hh: MatMut<'a>,
    /// Gradient of `b_ih`.
    pub d_b_ih: &'a mut [f32],
    /// Gradient of `b_hh`.
    pub d_b_hh: &'a mut [f32],
    /// Gradient of `peepholes`; empty for a cell that has none.
    pub d_peepholes: &'a mut [f32],
    /// Gradient of `w_hr`; there where `w_hr` is.
    pub d_w_hr: Option<MatMut<'a>>,
}

impl WeightGrads<'_> {
    pub(super) fn check(&self, sizes: &Sizes) -> Result<(), ShapeError> {
        let Sizes { cell, input, hidden, output, projected } = *sizes;
        let rows = cell.gates() * hidden;
        expect_dim("d_w_ih", "rows", rows, self.d_w_ih.rows())?;
        expect_dim("d_w_ih", "columns", input, self.d_w_ih.cols())?;
        expect_dim("d_w_hh", "rows", rows, self.d_w_hh.rows())?;
        expect_dim("d_w_hh", "columns", output, self.d_w_hh.cols())?;
        expect_dim("d_b_ih", "length", rows, self.d_b_ih.len())?;
        expect_dim("d_b_hh", "length", rows, self.d_b_hh.len())?;
        expect_dim("d_peepholes", "length", cell.peepholes(hidden), self.d_peepholes.len())?;
        let expected = if projected { [output, hidden] } else { [0, 0] };
        let actual = self.d_w_hr.as_ref().map_or([0, 0], |d| [d.rows(), d.cols()]);
        expect_dim("d_w_hr", "rows", expected[0], actual[0])?;
        expect_dim("d_w_hr", "columns", expected[1], actual[1])
    }
}
