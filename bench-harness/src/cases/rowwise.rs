//! Operations on rows: softmax, LayerNorm, cross-entropy, GELU. Bound by memory, so their rate is in bytes.

use std::borrow::Cow;

use kavanam_kernels::{MatRef, reference};

use crate::cases::{Case, Op, Work, check_close};
use crate::error::HarnessError;
use crate::measure::statistics::SplitMix64;

/// What is computed for each row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowOp {
    /// y = softmax(x).
    Softmax,
    /// d_x from y and d_y.
    SoftmaxBackward,
    /// y = LayerNorm(x).
    LayerNorm,
    /// d_x, d_gamma, d_beta from x and d_y.
    LayerNormBackward,
    /// One loss a row.
    CrossEntropy,
    /// d_logits from one gradient a row.
    CrossEntropyBackward,
    /// y = GELU(x), the erf form.
    Gelu,
}

/// An operation on `[rows, cols]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// The operation.
    pub(crate) op: RowOp,
    /// Rows.
    pub(crate) rows: usize,
    /// Columns.
    pub(crate) cols: usize,
}

/// The normalisations' ε.
pub(crate) const EPS: f32 = 1e-5;

const OPS: [(RowOp, &str, &[[usize; 2]]); 7] = {
    const PROBABILITIES: &[[usize; 2]] = &[[1024, 64], [4096, 1024], [64, 32000]];
    const FEATURES: &[[usize; 2]] = &[[1024, 128], [4096, 768], [4096, 1024]];
    const CLASSES: &[[usize; 2]] = &[[2048, 44], [64, 32000], [512, 32000]];
    [
        (RowOp::Softmax, "softmax", PROBABILITIES),
        (RowOp::SoftmaxBackward, "softmax-backward", PROBABILITIES),
        (RowOp::LayerNorm, "layernorm", FEATURES),
        (RowOp::LayerNormBackward, "layernorm-backward", FEATURES),
        (RowOp::CrossEntropy, "cross-entropy", CLASSES),
        (RowOp::CrossEntropyBackward, "cross-entropy-backward", CLASSES),
        (RowOp::Gelu, "gelu", FEATURES),
    ]
};

impl Shape {
    /// Bytes alone: every operand read or written once.
    pub(crate) fn work(&self) -> Work {
        let matrices = match self.op {
            RowOp::CrossEntropy => 1.0,
            RowOp::Softmax | RowOp::LayerNorm | RowOp::Gelu | RowOp::CrossEntropyBackward => 2.0,
            RowOp::SoftmaxBackward | RowOp::LayerNormBackward => 3.0,
        };
        Work { flops: None, bytes: 4.0 * matrices * (self.rows * self.cols) as f64 }
    }
}

/// Every case.
pub(crate) fn cases() -> Vec<Case> {
    let of_op = |&(op, name, shapes): &(RowOp, &str, &[[usize; 2]])| {
        let case = |(i, &[rows, cols]): (usize, &[usize; 2])| Case {
            name: format!("{name}/{rows}x{cols}"),
            op: Op::Rowwise(Shape { op, rows, cols }),
            quick: i == 0,
        };
        shapes.iter().enumerate().map(case).collect::<Vec<_>>()
    };
    OPS.iter().flat_map(of_op).collect()
}

/// The operands of one case.
#[derive(Debug)]
pub(crate) struct Problem {
    /// The shape.
    pub(crate) shape: Shape,
    /// x, the logits, or the y of a backward pass: `[rows, cols]`.
    pub(crate) x: Vec<f32>,
    /// The gradient that comes in: `[rows, cols]`, or one a row for the cross-entropy.
    pub(crate) d_y: Vec<f32>,
    /// Scale of the normalisation, `[cols]`.
    pub(crate) gamma: Vec<f32>,
    /// Shift of the normalisation, `[cols]`.
    pub(crate) beta: Vec<f32>,
    /// One class a row.
    pub(crate) targets: Vec<u32>,
}

/// Positive numbers whose sum is 1.
fn normalise(row: &mut [f32]) {
    let sum: f32 = row.iter().map(|x| x.abs()).sum();
    row.iter_mut().for_each(|x| *x = x.abs() / sum);
}

/// Rows that are compared with the reference.
const CHECKED_ROWS: usize = 48;
/// The largest difference, relative to the largest element of the row.
const TOLERANCE: f64 = 1e-5;

impl Problem {
    /// Random operands.
    pub(crate) fn new(shape: Shape) -> Problem {
        let Shape { rows, cols, .. } = shape;
        let mut random = SplitMix64(((rows as u64) << 32) ^ cols as u64);
        let mut fill = |len: usize, factor: f32, shift: f32| -> Vec<f32> {
            (0..len).map(|_| factor * random.signed_unit() + shift).collect()
        };
        let mut x = fill(rows * cols, 4.0, 0.0);
        if shape.op == RowOp::SoftmaxBackward {
            // Its x is the y of a forward pass.
            x.chunks_exact_mut(cols).for_each(normalise);
        }
        Problem {
            shape,
            x,
            d_y: fill(rows * cols, 1.0, 0.0),
            gamma: fill(cols, 0.5, 1.0),
            beta: fill(cols, 0.5, 0.0),
            targets: (0..rows).map(|i| (i * 7919 % cols) as u32).collect(),
        }
    }

    /// Compares rows with their form in f64.
    ///
    /// # Errors
    /// Names the first row that differs.
    pub(crate) fn check(&self, outputs: &[Cow<'_, [f32]>]) -> Result<(), HarnessError> {
        let Shape { op, rows, cols } = self.shape;
        let per_row = if op == RowOp::CrossEntropy { 1 } else { cols };
        for i in (0..rows).step_by((rows / CHECKED_ROWS).max(1)) {
            let expected = self.expected_row(i)?;
            check_close(&format!("row {i}"), &outputs[0][i * per_row..][..per_row], &expected, TOLERANCE)?;
        }
        if op == RowOp::LayerNormBackward {
            let x = MatRef::new(&self.x, rows, cols)?;
            let d_y = MatRef::new(&self.d_y, rows, cols)?;
            let grads = reference::layernorm_backward(x, &self.gamma, f64::from(EPS), d_y);
            check_close("d_gamma", &outputs[1], &grads.d_gamma, TOLERANCE)?;
            check_close("d_beta", &outputs[2], &grads.d_beta, TOLERANCE)?;
        }
        Ok(())
    }

    fn expected_row(&self, i: usize) -> Result<Vec<f64>, HarnessError> {
        let cols = self.shape.cols;
        let x = MatRef::new(&self.x[i * cols..][..cols], 1, cols)?;
        let d_y = MatRef::new(&self.d_y[i * cols..][..cols], 1, cols)?;
        let labels = reference::Labels { targets: &self.targets[i..][..1], smoothing: 0.0, ignore: None };
        let eps = f64::from(EPS);
        Ok(match self.shape.op {
            RowOp::Softmax => reference::softmax_forward(x),
            RowOp::SoftmaxBackward => reference::softmax_backward(x, d_y),
            RowOp::LayerNorm => reference::layernorm_forward(x, &self.gamma, &self.beta, eps),
            RowOp::LayerNormBackward => reference::layernorm_backward(x, &self.gamma, eps, d_y).d_x,
            RowOp::CrossEntropy => reference::cross_entropy_forward(x, labels),
            RowOp::CrossEntropyBackward => reference::cross_entropy_backward(x, labels, &self.d_y[i..][..1]),
            RowOp::Gelu => (0..cols).map(|j| reference::gelu(f64::from(x.at(0, j)))).collect(),
        })
    }
}
