//! Operations on rows by `kavanam-kernels`.

use std::borrow::Cow;

use kavanam_kernels::memory::AlignedVec;
use kavanam_kernels::optim::adamw;
use kavanam_kernels::rowwise::cross_entropy::{self, CrossEntropy};
use kavanam_kernels::rowwise::layernorm::{self, LayerNorm, RowStats};
use kavanam_kernels::rowwise::projected_cross_entropy::{self as projected, Projection};
use kavanam_kernels::rowwise::residual_norm::{self, Join};
use kavanam_kernels::rowwise::rmsnorm::{self, RmsNorm};
use kavanam_kernels::rowwise::{Activation, activation, gated, softmax};
use kavanam_kernels::{Context, MatMut, MatRef, Precision, ShapeError};

use crate::cases::rowwise::{ADAMW, ADAMW_T, EPS, Problem, RowOp};
use crate::error::HarnessError;
use crate::measure::workload::Workload;

/// Allocates the outputs; for the backward pass of the normalisation runs the forward pass once.
pub(super) fn prepare(problem: &Problem, context: Context) -> Result<Box<dyn Workload + '_>, ShapeError> {
    let (rows, cols) = (problem.shape.rows, problem.shape.cols);
    let mut rowwise = Rowwise {
        problem,
        context: context.precision(Precision::Strict),
        outputs: problem
            .shape
            .output_lengths()
            .into_iter()
            .map(|len| AlignedVec::filled(len, f32::NAN))
            .collect(),
        stats: vec![RowStats::default(); rows],
        rstd: AlignedVec::zeroed(rows),
    };
    match problem.shape.op {
        RowOp::LayerNormBackward => {
            let norm = LayerNorm { gamma: &problem.gamma, beta: &problem.beta, eps: EPS };
            let x = MatRef::new(&problem.x, rows, cols)?;
            let y = MatMut::new(&mut rowwise.outputs[0], rows, cols)?;
            layernorm::forward(&context, x, &norm, y, &mut rowwise.stats)?;
        }
        RowOp::AdamW => rowwise.reset(),
        _ => {}
    }
    Ok(Box::new(rowwise))
}

struct Rowwise<'a> {
    problem: &'a Problem,
    context: Context,
    outputs: Vec<AlignedVec<f32>>,
    stats: Vec<RowStats>,
    rstd: AlignedVec<f32>,
}

impl Rowwise<'_> {
    /// The state of the case for AdamW, which works in place.
    fn reset(&mut self) {
        self.outputs[0].copy_from_slice(&self.problem.x);
        self.outputs[1].fill(0.0);
        self.outputs[2].copy_from_slice(&self.problem.second);
    }

    fn compute(&mut self) -> Result<(), ShapeError> {
        let Problem { shape, x, d_y, targets, .. } = self.problem;
        let (rows, cols, context) = (shape.rows, shape.cols, &self.context);
        if let RowOp::ProjectedCrossEntropy { dim } = shape.op {
            return self.projected(dim);
        }
        let matrix = MatRef::new(x, rows, cols)?;
        let d_matrix = MatRef::new(d_y, rows, cols)?;
        let spec = CrossEntropy { label_smoothing: 0.0, ignore_index: None };
        let y = &mut self.outputs[0];
        match shape.op {
            RowOp::Softmax => softmax::forward(context, matrix, MatMut::new(y, rows, cols)?),
            RowOp::SoftmaxBackward => {
                softmax::backward(context, matrix, d_matrix, MatMut::new(y, rows, cols)?)
            }
            RowOp::CrossEntropy => cross_entropy::forward(context, matrix, targets, &spec, y),
            RowOp::CrossEntropyBackward => {
                let d_logits = MatMut::new(y, rows, cols)?;
                cross_entropy::backward(context, matrix, targets, &spec, &d_y[..rows], d_logits)
            }
            RowOp::Gelu => activation::forward(context, Activation::GeluErf, x, y),
            RowOp::GeluBackward => activation::backward(context, Activation::GeluErf, x, d_y, y),
            RowOp::Swiglu | RowOp::SwigluBackward => self.gated(matrix, d_matrix),
            RowOp::AdamW => self.adamw(),
            _ => self.norm(matrix, d_matrix),
        }
    }

    /// The operations that normalise.
    fn norm(&mut self, x: MatRef<'_>, d_y: MatRef<'_>) -> Result<(), ShapeError> {
        let Problem { shape, gamma, beta, .. } = self.problem;
        let (rows, cols, context) = (shape.rows, shape.cols, &self.context);
        let norm = LayerNorm { gamma, beta, eps: EPS };
        match (shape.op, &mut self.outputs[..]) {
            (RowOp::LayerNormBackward, [d_x, d_gamma, d_beta]) => {
                // These gradients are added to; a sum over thousands of calls is no result to check.
                d_gamma.fill(0.0);
                d_beta.fill(0.0);
                let saved = layernorm::Saved { x, gamma, stats: &self.stats };
                layernorm::backward(context, &saved, d_y, MatMut::new(d_x, rows, cols)?, d_gamma, d_beta)
            }
            (RowOp::ResidualLayerNorm, [sum, y]) => {
                let join = Join { x, residual: d_y, dropout: None };
                let (sum, y) = (MatMut::new(sum, rows, cols)?, MatMut::new(y, rows, cols)?);
                let outputs = residual_norm::Outputs { sum, y, stats: &mut self.stats };
                residual_norm::forward(context, &norm, &join, outputs)
            }
            (RowOp::RmsNorm, [y]) => {
                let norm = RmsNorm { gamma, eps: EPS };
                rmsnorm::forward(context, x, &norm, MatMut::new(y, rows, cols)?, &mut self.rstd)
            }
            (_, outputs) => {
                let y = MatMut::new(&mut outputs[0], rows, cols)?;
                layernorm::forward(context, x, &norm, y, &mut self.stats)
            }
        }
    }

    fn gated(&mut self, gate: MatRef<'_>, d_y: MatRef<'_>) -> Result<(), ShapeError> {
        let (rows, cols) = (gate.rows(), gate.cols());
        let inputs = (gate, MatRef::new(&self.problem.second, rows, cols)?);
        match &mut self.outputs[..] {
            [d_gate, d_up] => {
                let grads = (MatMut::new(d_gate, rows, cols)?, MatMut::new(d_up, rows, cols)?);
                gated::backward(&self.context, Activation::Silu, inputs, d_y, grads)
            }
            outputs => {
                let y = MatMut::new(&mut outputs[0], rows, cols)?;
                gated::forward(&self.context, Activation::Silu, inputs, y)
            }
        }
    }

    fn adamw(&mut self) -> Result<(), ShapeError> {
        let [param, m, v] = &mut self.outputs[..] else { unreachable!("AdamW has three outputs") };
        let buffers = adamw::Buffers { param, grad: &self.problem.d_y, m, v };
        adamw::step(&self.context, &ADAMW, ADAMW_T, 1.0, buffers)
    }

    fn projected(&mut self, dim: usize) -> Result<(), ShapeError> {
        let Problem { shape, x, d_y, second, targets, .. } = self.problem;
        let (rows, cols) = (shape.rows, shape.cols);
        let [losses, d_x, d_weight] = &mut self.outputs[..] else { unreachable!("three outputs") };
        let (x, weight) = (MatRef::new(x, rows, dim)?, MatRef::new(second, cols, dim)?);
        let projection = Projection { x, weight, bias: None };
        let spec = CrossEntropy { label_smoothing: 0.0, ignore_index: None };
        // As above.
        d_weight.fill(0.0);
        let grads = projected::Grads {
            d_x: MatMut::new(d_x, rows, dim)?,
            d_weight: MatMut::new(d_weight, cols, dim)?,
            d_bias: None,
        };
        let loss = (&spec, &d_y[..rows]);
        projected::forward_and_backward(&self.context, &projection, targets, loss, losses, grads)
    }
}

impl Workload for Rowwise<'_> {
    fn run(&mut self) -> Result<(), HarnessError> {
        Ok(self.compute()?)
    }

    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
        if self.problem.shape.op == RowOp::AdamW {
            self.reset();
            self.compute()?;
        }
        Ok(self.outputs.iter().map(|output| Cow::Borrowed(&output[..])).collect())
    }

    fn kernel(&self) -> String {
        format!("f32x{}_{}", self.context.isa().f32_lanes(), self.context.isa())
    }
}
