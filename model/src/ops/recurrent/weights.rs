//! The weights of one recurrent layer and direction.

use kavanam_kernels::rnn::{Cell, WeightGrads, Weights};
use kavanam_kernels::{MatMut, ShapeError};

use crate::param::{Grads, ParamId, ParamStore};

/// Tensors of one layer and direction.
pub(super) const TENSORS: usize = 6;

/// The weights of one layer and direction, named as PyTorch names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecurrentWeights {
    /// The kind of cell.
    pub cell: Cell,
    /// `[gates · hidden, input]`.
    pub w_ih: ParamId,
    /// `[gates · hidden, output]`; without `w_hr` output is hidden.
    pub w_hh: ParamId,
    /// `[gates · hidden]`.
    pub b_ih: ParamId,
    /// `[gates · hidden]`.
    pub b_hh: ParamId,
    /// `[3 · hidden]`, for a cell with peepholes.
    pub peepholes: Option<ParamId>,
    /// `[output, hidden]`, where the state h is a projection.
    pub w_hr: Option<ParamId>,
}

impl RecurrentWeights {
    /// The width of the gates and of the state c.
    pub fn hidden(&self, params: &ParamStore) -> usize {
        params.shape(self.w_ih)[0] / self.cell.gates()
    }

    /// The width of the state h.
    pub fn output(&self, params: &ParamStore) -> usize {
        params.shape(self.w_hh)[1]
    }

    /// The width of the input.
    pub fn input(&self, params: &ParamStore) -> usize {
        params.shape(self.w_ih)[1]
    }

    pub(crate) fn views<'p>(&self, params: &'p ParamStore) -> Weights<'p> {
        Weights {
            cell: self.cell,
            w_ih: params.matrix(self.w_ih),
            w_hh: params.matrix(self.w_hh),
            b_ih: params.get(self.b_ih),
            b_hh: params.get(self.b_hh),
            peepholes: self.peepholes.map_or(&[], |p| params.get(p)),
            w_hr: self.w_hr.map(|w| params.matrix(w)),
        }
    }

    /// All tensors that it may have.
    pub(super) fn ids(&self) -> [Option<ParamId>; TENSORS] {
        let [w_ih, w_hh, b_ih, b_hh] = [self.w_ih, self.w_hh, self.b_ih, self.b_hh].map(Some);
        [w_ih, w_hh, b_ih, b_hh, self.peepholes, self.w_hr]
    }

    pub(crate) fn grads<'g>(
        &self,
        params: &ParamStore,
        grads: &'g mut Grads,
    ) -> Result<WeightGrads<'g>, ShapeError> {
        self.grads_in(params, grads.get_disjoint_mut(self.ids()))
    }

    /// The gradients of [`Self::ids`] as matrices.
    pub(super) fn grads_in<'g>(
        &self,
        params: &ParamStore,
        [d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_peepholes, d_w_hr]: [&'g mut [f32]; TENSORS],
    ) -> Result<WeightGrads<'g>, ShapeError> {
        let (rows, output) = (params.shape(self.w_ih)[0], self.output(params));
        Ok(WeightGrads {
            d_w_ih: MatMut::new(d_w_ih, rows, self.input(params))?,
            d_w_hh: MatMut::new(d_w_hh, rows, output)?,
            d_b_ih,
            d_b_hh,
            d_peepholes,
            d_w_hr: match self.w_hr {
                Some(_) => Some(MatMut::new(d_w_hr, output, self.hidden(params))?),
                None => None,
            },
        })
    }
}
