//! Recurrent layers by `kavanam-kernels`.

use std::borrow::Cow;

use kavanam_kernels::memory::AlignedVec;
use kavanam_kernels::rnn::{
    self, Cell, Direction, InputGrads, Output, OutputGrads, Sequence, WeightGrads, Weights,
};
use kavanam_kernels::{Context, MatMut, MatRef, ShapeError};

use crate::cases::rnn::Problem;
use crate::error::HarnessError;
use crate::measure::workload::Workload;

/// Allocates the outputs.
pub(super) fn prepare(
    problem: &Problem,
    cell: Cell,
    context: Context,
) -> Result<Box<dyn Workload + '_>, ShapeError> {
    let shape = problem.shape;
    let (weights, biases) = (shape.gate_rows() * shape.width, shape.gate_rows());
    Ok(Box::new(Layer {
        problem,
        cell,
        context,
        y: AlignedVec::filled(shape.elements(), f32::NAN),
        d_x: AlignedVec::filled(shape.elements(), f32::NAN),
        d_weights: [AlignedVec::zeroed(weights), AlignedVec::zeroed(weights)],
        d_biases: [AlignedVec::zeroed(biases), AlignedVec::zeroed(biases)],
    }))
}

struct Layer<'a> {
    problem: &'a Problem,
    cell: Cell,
    context: Context,
    y: AlignedVec<f32>,
    d_x: AlignedVec<f32>,
    /// Of the input's and the state's weights. Every call adds to them, as accumulated gradients do.
    d_weights: [AlignedVec<f32>; 2],
    d_biases: [AlignedVec<f32>; 2],
}

impl Layer<'_> {
    fn compute(&mut self) -> Result<(), ShapeError> {
        let Problem { shape, x, d_y, w_ih, w_hh, b_ih, b_hh, lengths } = self.problem;
        let (rows, gates, width) = (shape.seq * shape.batch, shape.gate_rows(), shape.width);
        let weights = Weights {
            cell: self.cell,
            w_ih: MatRef::new(w_ih, gates, width)?,
            w_hh: MatRef::new(w_hh, gates, width)?,
            b_ih,
            b_hh,
            peepholes: &[],
            w_hr: None,
        };
        let sequence = Sequence { x: MatRef::new(x, rows, width)?, lengths, direction: Direction::Forward };
        let output = Output { y: MatMut::new(&mut self.y, rows, width)?, last: None };
        if !shape.train {
            return rnn::infer(&self.context, &weights, &sequence, None, output);
        }
        let saved = rnn::forward(&self.context, &weights, &sequence, None, output)?;
        let upstream = OutputGrads { d_y: Some(MatRef::new(d_y, rows, width)?), d_last: None };
        let [d_w_ih, d_w_hh] = &mut self.d_weights;
        let [d_b_ih, d_b_hh] = &mut self.d_biases;
        let grads = InputGrads {
            weights: WeightGrads {
                d_w_ih: MatMut::new(d_w_ih, gates, width)?,
                d_w_hh: MatMut::new(d_w_hh, gates, width)?,
                d_b_ih,
                d_b_hh,
                d_peepholes: &mut [],
                d_w_hr: None,
            },
            d_x: Some(MatMut::new(&mut self.d_x, rows, width)?),
            d_initial: None,
        };
        rnn::backward(&self.context, &weights, &sequence, saved, upstream, grads)
    }
}

impl Workload for Layer<'_> {
    fn run(&mut self) -> Result<(), HarnessError> {
        Ok(self.compute()?)
    }

    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
        Ok(vec![Cow::Borrowed(&self.y), Cow::Borrowed(&self.d_x)])
    }

    fn kernel(&self) -> String {
        kavanam_kernels::gemm::kernel_name(&self.context).to_owned()
    }
}
