//! Operations on rows by `kavanam-kernels`.

use std::borrow::Cow;

use kavanam_kernels::rowwise::cross_entropy::{self, CrossEntropy};
use kavanam_kernels::rowwise::layernorm::{self, LayerNorm, RowStats, Saved};
use kavanam_kernels::rowwise::{Activation, activation, softmax};
use kavanam_kernels::{Context, MatMut, MatRef, ShapeError};

use crate::cases::rowwise::{EPS, Problem, RowOp};
use crate::error::HarnessError;
use crate::measure::workload::Workload;

/// Allocates the outputs; for the backward pass of the normalisation runs the forward pass once.
pub(super) fn prepare(problem: &Problem, context: Context) -> Result<Box<dyn Workload + '_>, ShapeError> {
    let (rows, cols) = (problem.shape.rows, problem.shape.cols);
    let len = if problem.shape.op == RowOp::CrossEntropy { rows } else { rows * cols };
    let mut rowwise = Rowwise {
        problem,
        context,
        y: vec![f32::NAN; len],
        stats: vec![RowStats::default(); rows],
        d_gamma: vec![0.0; cols],
        d_beta: vec![0.0; cols],
    };
    if problem.shape.op == RowOp::LayerNormBackward {
        rowwise.layernorm()?;
    }
    Ok(Box::new(rowwise))
}

struct Rowwise<'a> {
    problem: &'a Problem,
    context: Context,
    y: Vec<f32>,
    stats: Vec<RowStats>,
    d_gamma: Vec<f32>,
    d_beta: Vec<f32>,
}

impl Rowwise<'_> {
    fn layernorm(&mut self) -> Result<(), ShapeError> {
        let Problem { shape, x, gamma, beta, .. } = self.problem;
        let x = MatRef::new(x, shape.rows, shape.cols)?;
        let y = MatMut::new(&mut self.y, shape.rows, shape.cols)?;
        layernorm::forward(&self.context, x, &LayerNorm { gamma, beta, eps: EPS }, y, &mut self.stats)
    }

    fn compute(&mut self) -> Result<(), ShapeError> {
        let Problem { shape, x, d_y, gamma, targets, .. } = self.problem;
        let (rows, cols, context) = (shape.rows, shape.cols, &self.context);
        let matrix = MatRef::new(x, rows, cols)?;
        let d_matrix = MatRef::new(d_y, rows, cols)?;
        let spec = CrossEntropy { label_smoothing: 0.0, ignore_index: None };
        match shape.op {
            RowOp::LayerNorm => self.layernorm(),
            RowOp::Softmax => softmax::forward(context, matrix, MatMut::new(&mut self.y, rows, cols)?),
            RowOp::SoftmaxBackward => {
                softmax::backward(context, matrix, d_matrix, MatMut::new(&mut self.y, rows, cols)?)
            }
            RowOp::LayerNormBackward => {
                // These gradients are added to; a sum over thousands of calls is no result to check.
                self.d_gamma.fill(0.0);
                self.d_beta.fill(0.0);
                let saved = Saved { x: matrix, gamma, stats: &self.stats };
                let d_x = MatMut::new(&mut self.y, rows, cols)?;
                layernorm::backward(context, &saved, d_matrix, d_x, &mut self.d_gamma, &mut self.d_beta)
            }
            RowOp::CrossEntropy => cross_entropy::forward(context, matrix, targets, &spec, &mut self.y),
            RowOp::CrossEntropyBackward => {
                let d_logits = MatMut::new(&mut self.y, rows, cols)?;
                cross_entropy::backward(context, matrix, targets, &spec, &d_y[..rows], d_logits)
            }
            RowOp::Gelu => activation::forward(context, Activation::GeluErf, x, &mut self.y),
        }
    }
}

impl Workload for Rowwise<'_> {
    fn run(&mut self) -> Result<(), HarnessError> {
        Ok(self.compute()?)
    }

    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
        Ok(vec![Cow::Borrowed(&self.y), Cow::Borrowed(&self.d_gamma), Cow::Borrowed(&self.d_beta)])
    }

    fn kernel(&self) -> String {
        format!("f32x{}_{}", self.context.isa().f32_lanes(), self.context.isa())
    }
}
