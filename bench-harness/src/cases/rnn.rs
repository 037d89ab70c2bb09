//! Recurrent layers over whole sequences: LSTM and GRU, forward alone and as a training step does it.

use std::borrow::Cow;

use kavanam_kernels::Precision;
use kavanam_kernels::reference::{self, Recurrent, RecurrentOutput};
use kavanam_kernels::rnn::Cell;

use crate::cases::{Case, Op, Work, check_close, tolerance};
use crate::error::HarnessError;
use crate::measure::statistics::SplitMix64;

/// The shape of one layer on one batch; input and state have the same width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// The kind of cell.
    pub(crate) cell: Cell,
    /// Sequences.
    pub(crate) batch: usize,
    /// Steps of each.
    pub(crate) seq: usize,
    /// Width of input and state.
    pub(crate) width: usize,
    /// Forward and backward, or forward alone.
    pub(crate) train: bool,
}

/// batch, steps, width; whether `--quick` measures it.
const SHAPES: [([usize; 3], bool); 8] = [
    ([64, 10, 128], true),
    ([1, 10, 128], true),
    ([1, 128, 512], false),
    ([8, 128, 512], false),
    ([32, 128, 512], false),
    ([64, 64, 256], false),
    ([128, 32, 1024], false),
    ([1, 512, 256], false),
];

impl Shape {
    /// Two products a step forward; backward each of them twice, for the inputs and for the weights.
    pub(crate) fn work(&self) -> Work {
        let rows = (self.batch * self.seq) as f64;
        let weights = (2 * self.cell.gates() * self.width * self.width) as f64;
        let times = if self.train { 3.0 } else { 1.0 };
        let bytes = 4.0 * times * (weights + 2.0 * rows * self.width as f64);
        Work { flops: Some(2.0 * times * rows * weights), bytes }
    }

    /// Elements of x, of y and of their gradients.
    pub(crate) fn elements(&self) -> usize {
        self.batch * self.seq * self.width
    }

    /// Rows of a weight matrix and elements of a bias.
    pub(crate) fn gate_rows(&self) -> usize {
        self.cell.gates() * self.width
    }
}

/// Every case.
pub(crate) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (cell, name) in [(Cell::Lstm, "lstm"), (Cell::Gru, "gru")] {
        for (train, what) in [(false, "forward"), (true, "train")] {
            for ([batch, seq, width], quick) in SHAPES {
                all.push(Case {
                    name: format!("{name}-{what}/{batch}x{seq}x{width}"),
                    op: Op::Rnn(Shape { cell, batch, seq, width, train }),
                    quick,
                });
            }
        }
    }
    all
}

/// The operands of one case. Sequences are time-major: row t·batch + b.
#[derive(Debug)]
pub(crate) struct Problem {
    /// The shape.
    pub(crate) shape: Shape,
    /// Inputs `[seq·batch, width]`.
    pub(crate) x: Vec<f32>,
    /// The gradient that comes in, `[seq·batch, width]`.
    pub(crate) d_y: Vec<f32>,
    /// Weights of the input `[gates·width, width]`.
    pub(crate) w_ih: Vec<f32>,
    /// Weights of the state `[gates·width, width]`.
    pub(crate) w_hh: Vec<f32>,
    /// Bias of the input's product `[gates·width]`.
    pub(crate) b_ih: Vec<f32>,
    /// Bias of the state's product `[gates·width]`.
    pub(crate) b_hh: Vec<f32>,
    /// The steps of every sequence.
    pub(crate) lengths: Vec<usize>,
}

/// The largest difference of f32, relative to the largest element.
const TOLERANCE: f64 = 1e-4;

impl Problem {
    /// Random operands; the weights in ±1/√width, as a layer is initialised.
    pub(crate) fn new(shape: Shape) -> Problem {
        let mut random = SplitMix64(((shape.width as u64) << 32) ^ shape.elements() as u64);
        let mut fill = |len: usize, factor: f32| -> Vec<f32> {
            (0..len).map(|_| factor * random.signed_unit()).collect()
        };
        let bound = 1.0 / (shape.width as f32).sqrt();
        Problem {
            shape,
            x: fill(shape.elements(), 1.0),
            d_y: fill(shape.elements(), 1.0),
            w_ih: fill(shape.gate_rows() * shape.width, bound),
            w_hh: fill(shape.gate_rows() * shape.width, bound),
            b_ih: fill(shape.gate_rows(), bound),
            b_hh: fill(shape.gate_rows(), bound),
            lengths: vec![shape.seq; shape.batch],
        }
    }

    /// Compares the last sequence of the batch with the layer in f64. The outputs are y, and d_x when training.
    ///
    /// # Errors
    /// Names the tensor that differs.
    pub(crate) fn check(&self, outputs: &[Cow<'_, [f32]>], precision: Precision) -> Result<(), HarnessError> {
        let bound = tolerance(TOLERANCE, precision);
        let Shape { cell, seq, width, train, .. } = self.shape;
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        let (w_ih, w_hh) = (wide(&self.w_ih), wide(&self.w_hh));
        let (b_ih, b_hh) = (wide(&self.b_ih), wide(&self.b_hh));
        let (x, zeros) = (wide(&self.sequence(&self.x)), vec![0.0; width]);
        let layer = Recurrent {
            seq,
            input: width,
            hidden: width,
            w_ih: &w_ih,
            w_hh: &w_hh,
            b_ih: &b_ih,
            b_hh: &b_hh,
            x: &x,
            lengths: &[seq],
            reverse: false,
            h0: &zeros,
            c0: &zeros,
        };
        let y = match cell {
            Cell::Lstm => reference::lstm_forward(&layer).y,
            Cell::Gru => reference::gru_forward(&layer).y,
            Cell::Tanh | Cell::Relu => reference::elman_forward(&layer, cell == Cell::Relu).y,
        };
        check_close("y", &self.sequence(&outputs[0]), &y, bound)?;
        if train {
            let d_y = wide(&self.sequence(&self.d_y));
            let upstream = RecurrentOutput { y: d_y, h: zeros.clone(), c: zeros.clone() };
            let grads = match cell {
                Cell::Lstm => reference::lstm_backward(&layer, &upstream),
                Cell::Gru => reference::gru_backward(&layer, &upstream),
                Cell::Tanh | Cell::Relu => reference::elman_backward(&layer, cell == Cell::Relu, &upstream),
            };
            check_close("d_x", &self.sequence(&outputs[1]), &grads.d_x, bound)?;
        }
        Ok(())
    }

    /// The rows of the batch's last sequence.
    fn sequence(&self, tensor: &[f32]) -> Vec<f32> {
        let Shape { batch, seq, width, .. } = self.shape;
        let row = |t: usize| &tensor[(t * batch + batch - 1) * width..][..width];
        (0..seq).flat_map(row).copied().collect()
    }
}
