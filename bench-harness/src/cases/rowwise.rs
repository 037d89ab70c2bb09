//! Operations on rows: softmax, the norms, cross-entropy, GELU, gates, AdamW. Bound by memory, so their rate is in
//! bytes; but for the loss that is fused with its projection, which is a product.

use std::borrow::Cow;

use kavanam_kernels::memory::AlignedVec;
use kavanam_kernels::optim::adamw::AdamW;
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
    /// d_x from x and d_y.
    GeluBackward,
    /// y = RMSNorm(x).
    RmsNorm,
    /// sum = x + d_y, which stands for the stream, and y = LayerNorm(sum).
    ResidualLayerNorm,
    /// y = SiLU(gate)·up, gate being x and up the first weight.
    Swiglu,
    /// d_gate and d_up from these and d_y.
    SwigluBackward,
    /// One step on all elements, in place.
    AdamW,
    /// The loss of x·Wᵀ for each row, x `[rows, dim]` and W `[cols, dim]`, and the gradients of x and W.
    ProjectedCrossEntropy {
        /// Columns of x.
        dim: usize,
    },
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

/// The step of AdamW that is measured, counted from 1, and its hyperparameters.
pub(crate) const ADAMW_T: u64 = 10;
/// As above.
pub(crate) const ADAMW: AdamW = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.01 };

const OPS: [(RowOp, &str, &[[usize; 2]]); 15] = {
    const PROBABILITIES: &[[usize; 2]] = &[[1024, 64], [4096, 1024], [64, 32000]];
    const FEATURES: &[[usize; 2]] = &[[1024, 128], [4096, 768], [4096, 1024]];
    const CLASSES: &[[usize; 2]] = &[[2048, 44], [64, 32000], [512, 32000]];
    const PARAMETERS: &[[usize; 2]] = &[[256, 256], [1024, 1024], [4096, 2048]];
    [
        (RowOp::Softmax, "softmax", PROBABILITIES),
        (RowOp::SoftmaxBackward, "softmax-backward", PROBABILITIES),
        (RowOp::LayerNorm, "layernorm", FEATURES),
        (RowOp::LayerNormBackward, "layernorm-backward", FEATURES),
        (RowOp::CrossEntropy, "cross-entropy", CLASSES),
        (RowOp::CrossEntropyBackward, "cross-entropy-backward", CLASSES),
        (RowOp::Gelu, "gelu", FEATURES),
        (RowOp::GeluBackward, "gelu-backward", FEATURES),
        (RowOp::RmsNorm, "rmsnorm", FEATURES),
        (RowOp::ResidualLayerNorm, "residual-layernorm", FEATURES),
        (RowOp::Swiglu, "swiglu", FEATURES),
        (RowOp::SwigluBackward, "swiglu-backward", FEATURES),
        (RowOp::AdamW, "adamw", PARAMETERS),
        (RowOp::ProjectedCrossEntropy { dim: 256 }, "projected-cross-entropy", &[[128, 8000]]),
        (RowOp::ProjectedCrossEntropy { dim: 512 }, "projected-cross-entropy-512", &[[512, 32000]]),
    ]
};

impl Shape {
    /// Bytes alone, every operand read or written once; four products where there is one to count.
    pub(crate) fn work(&self) -> Work {
        let of_matrix = 4.0 * (self.rows * self.cols) as f64;
        if let RowOp::ProjectedCrossEntropy { dim } = self.op {
            let dim = dim as f64;
            let bytes = 4.0 * dim * (2 * self.rows + 2 * self.cols) as f64;
            return Work { flops: Some(1.5 * of_matrix * dim), bytes };
        }
        let matrices = match self.op {
            RowOp::CrossEntropy => 1.0,
            RowOp::Softmax
            | RowOp::LayerNorm
            | RowOp::Gelu
            | RowOp::RmsNorm
            | RowOp::CrossEntropyBackward => 2.0,
            RowOp::SoftmaxBackward | RowOp::LayerNormBackward | RowOp::GeluBackward | RowOp::Swiglu => 3.0,
            RowOp::ResidualLayerNorm => 4.0,
            RowOp::SwigluBackward => 5.0,
            RowOp::AdamW | RowOp::ProjectedCrossEntropy { .. } => 7.0,
        };
        Work { flops: None, bytes: of_matrix * matrices }
    }

    /// The lengths of the outputs, in the order that the check expects.
    pub(crate) fn output_lengths(&self) -> Vec<usize> {
        let Shape { rows, cols, .. } = *self;
        match self.op {
            RowOp::CrossEntropy => vec![rows],
            RowOp::LayerNormBackward => vec![rows * cols, cols, cols],
            RowOp::ResidualLayerNorm | RowOp::SwigluBackward => vec![rows * cols; 2],
            RowOp::AdamW => vec![rows * cols; 3],
            RowOp::ProjectedCrossEntropy { dim } => vec![rows, rows * dim, cols * dim],
            _ => vec![rows * cols],
        }
    }
}

/// Every case.
pub(crate) fn cases() -> Vec<Case> {
    let of_op = |&(op, name, shapes): &(RowOp, &str, &[[usize; 2]])| {
        let case = |(i, &[rows, cols]): (usize, &[usize; 2])| Case {
            name: format!("{name}/{rows}x{cols}"),
            op: Op::Rowwise(Shape { op, rows, cols }),
            quick: i == 0 && rows * cols < 1 << 22,
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
    pub(crate) x: AlignedVec<f32>,
    /// The gradient that comes in: `[rows, cols]`, or one a row for the cross-entropy.
    pub(crate) d_y: AlignedVec<f32>,
    /// Scale of the normalisation, `[cols]`.
    pub(crate) gamma: AlignedVec<f32>,
    /// Shift of the normalisation, `[cols]`.
    pub(crate) beta: AlignedVec<f32>,
    /// One class a row.
    pub(crate) targets: Vec<u32>,
    /// What the operation has beside x: up of a gate, W of a projection, the second moments of AdamW.
    pub(crate) second: AlignedVec<f32>,
}

/// Positive numbers whose sum is 1.
fn normalise(row: &mut [f32]) {
    let sum: f32 = row.iter().map(|x| x.abs()).sum();
    row.iter_mut().for_each(|x| *x = x.abs() / sum);
}

/// Rows that are compared with the reference.
const CHECKED_ROWS: usize = 16;
/// The largest difference, relative to the largest element of the row.
const TOLERANCE: f64 = 1e-5;

impl Problem {
    /// Random operands.
    pub(crate) fn new(shape: Shape) -> Problem {
        let Shape { rows, cols, .. } = shape;
        let mut random = SplitMix64(((rows as u64) << 32) ^ cols as u64);
        let mut fill = |len: usize, factor: f32, shift: f32| {
            AlignedVec::from_fn(len, |_| factor * random.signed_unit() + shift)
        };
        let mut x = match shape.op {
            RowOp::ProjectedCrossEntropy { dim } => fill(rows * dim, 1.0, 0.0),
            _ => fill(rows * cols, 4.0, 0.0),
        };
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
            second: match shape.op {
                RowOp::ProjectedCrossEntropy { dim } => fill(cols * dim, 0.125, 0.0),
                RowOp::Swiglu | RowOp::SwigluBackward => fill(rows * cols, 1.0, 0.0),
                RowOp::AdamW => fill(rows * cols, 0.25, 0.5),
                _ => AlignedVec::new(),
            },
            targets: (0..rows).map(|i| (i * 7919 % cols) as u32).collect(),
        }
    }

    /// Compares rows with their form in f64.
    ///
    /// # Errors
    /// Names the first row that differs.
    pub(crate) fn check(&self, outputs: &[Cow<'_, [f32]>]) -> Result<(), HarnessError> {
        let Shape { op, rows, cols } = self.shape;
        for i in (0..rows).step_by((rows / CHECKED_ROWS).max(1)) {
            for (output, expected) in outputs.iter().zip(self.expected_rows(i)?) {
                let row = &output[i * expected.len()..][..expected.len()];
                check_close(&format!("row {i}"), row, &expected, TOLERANCE)?;
            }
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

    /// Row `i` of those outputs that have one row for each of x.
    fn expected_rows(&self, i: usize) -> Result<Vec<Vec<f64>>, HarnessError> {
        if let RowOp::ProjectedCrossEntropy { dim } = self.shape.op {
            return self.expected_projection(i, dim);
        }
        let cols = self.shape.cols;
        let range = i * cols..(i + 1) * cols;
        let x = MatRef::new(&self.x[range.clone()], 1, cols)?;
        let d_y = MatRef::new(&self.d_y[range.clone()], 1, cols)?;
        let eps = f64::from(EPS);
        let (gamma, beta) = (&self.gamma, &self.beta);
        let with_second = |j: usize| [x.at(0, j), self.second[range.start + j], d_y.at(0, j)].map(f64::from);
        Ok(match self.shape.op {
            RowOp::Softmax => vec![reference::softmax_forward(x)],
            RowOp::SoftmaxBackward => vec![reference::softmax_backward(x, d_y)],
            RowOp::LayerNorm => vec![reference::layernorm_forward(x, gamma, beta, eps)],
            RowOp::LayerNormBackward => vec![reference::layernorm_backward(x, gamma, eps, d_y).d_x],
            RowOp::RmsNorm => vec![reference::rmsnorm_forward(x, gamma, eps)],
            RowOp::ResidualLayerNorm => {
                let sum: Vec<f64> =
                    (0..cols).map(|j| f64::from(x.at(0, j)) + f64::from(d_y.at(0, j))).collect();
                let y = reference::layernorm_forward(MatRef::new(&sum, 1, cols)?, gamma, beta, eps);
                vec![sum, y]
            }
            RowOp::CrossEntropy => vec![reference::cross_entropy_forward(x, self.labels(i))],
            RowOp::CrossEntropyBackward => {
                vec![reference::cross_entropy_backward(x, self.labels(i), &self.d_y[i..][..1])]
            }
            RowOp::Gelu => vec![(0..cols).map(|j| reference::gelu(f64::from(x.at(0, j)))).collect()],
            RowOp::GeluBackward => {
                let slope = |j| reference::gelu_derivative(f64::from(x.at(0, j))).iter().sum::<f64>();
                vec![(0..cols).map(|j| slope(j) * f64::from(d_y.at(0, j))).collect()]
            }
            RowOp::Swiglu => {
                let y = |[gate, up, _]: [f64; 3]| reference::silu(gate) * up;
                vec![(0..cols).map(|j| y(with_second(j))).collect()]
            }
            RowOp::SwigluBackward => {
                let of_gate = |[gate, up, d_y]: [f64; 3]| {
                    d_y * up * reference::silu_derivative(gate).iter().sum::<f64>()
                };
                let of_up = |[gate, _, d_y]: [f64; 3]| d_y * reference::silu(gate);
                vec![
                    (0..cols).map(|j| of_gate(with_second(j))).collect(),
                    (0..cols).map(|j| of_up(with_second(j))).collect(),
                ]
            }
            RowOp::AdamW => {
                let mut state: Vec<[f64; 3]> =
                    (0..cols).map(with_second).map(|[x, v, _]| [x, 0.0, v]).collect();
                let grad: Vec<f64> = (0..cols).map(|j| f64::from(d_y.at(0, j))).collect();
                reference::adamw_step(&adamw_reference(), ADAMW_T, &grad, &mut state);
                (0..3).map(|k| state.iter().map(|state| state[k]).collect()).collect()
            }
            RowOp::ProjectedCrossEntropy { .. } => unreachable!("returned above"),
        })
    }

    fn labels(&self, i: usize) -> reference::Labels<'_> {
        reference::Labels { targets: &self.targets[i..][..1], smoothing: 0.0, ignore: None }
    }

    /// The loss of row `i`, and its d_x.
    fn expected_projection(&self, i: usize, dim: usize) -> Result<Vec<Vec<f64>>, HarnessError> {
        let x = &self.x[i * dim..][..dim];
        let weights = || self.second.chunks_exact(dim);
        let product = |w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
        let logits: Vec<f64> = weights().map(product).collect();
        let logits = MatRef::new(&logits, 1, self.shape.cols)?;
        let d_logits = reference::cross_entropy_backward(logits, self.labels(i), &self.d_y[i..][..1]);
        let mut d_x = vec![0.0; dim];
        for (w, d) in weights().zip(d_logits) {
            d_x.iter_mut().zip(w).for_each(|(sum, w)| *sum += d * f64::from(*w));
        }
        Ok(vec![reference::cross_entropy_forward(logits, self.labels(i)), d_x])
    }
}

/// [`ADAMW`] for the reference.
fn adamw_reference() -> reference::AdamWSpec {
    reference::AdamWSpec {
        lr: f64::from(ADAMW.lr),
        beta1: f64::from(ADAMW.beta1),
        beta2: f64::from(ADAMW.beta2),
        eps: f64::from(ADAMW.eps),
        weight_decay: f64::from(ADAMW.weight_decay),
    }
}
