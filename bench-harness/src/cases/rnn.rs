//! Recurrent layers over whole sequences: LSTM and GRU, forward alone and as a training step does it, and minGRU and
//! minLSTM beside the GRU.

use std::borrow::Cow;

use kavanam_kernels::Precision;
use kavanam_kernels::memory::AlignedVec;
use kavanam_kernels::reference::{self, MinRnn, Recurrent, RecurrentOutput};
use kavanam_kernels::rnn::Cell;
use kavanam_kernels::rnn::min_rnn::MinCell;

use crate::cases::{Case, Op, Work, check_close, tolerance};
use crate::error::HarnessError;
use crate::measure::statistics::SplitMix64;

/// What a layer computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The gates see the state.
    Recurrent(Cell),
    /// The gates see the input alone: one product, then a scan.
    Scan(MinCell),
}

impl Kind {
    fn gates(self) -> usize {
        match self {
            Kind::Recurrent(cell) => cell.gates(),
            Kind::Scan(cell) => cell.gates(),
        }
    }
}

/// The shape of one layer on one batch; input and state have the same width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// The kind of layer.
    pub(crate) kind: Kind,
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

/// Where the GRU that resets before its product stands beside the other.
const RESET_BEFORE_SHAPE: ([usize; 3], bool) = ([32, 128, 512], false);

/// Where minGRU and minLSTM stand beside the GRU: one width, from a few steps to many.
const SCAN_SHAPES: [([usize; 3], bool); 7] = [
    ([64, 10, 128], true),
    ([8, 4, 256], false),
    ([8, 16, 256], false),
    ([8, 64, 256], false),
    ([8, 512, 256], false),
    ([1, 16, 256], false),
    ([1, 512, 256], false),
];

impl Shape {
    /// Two products a step forward (of a scan one); backward each of them twice, for the inputs and for the weights.
    pub(crate) fn work(&self) -> Work {
        let rows = (self.batch * self.seq) as f64;
        let weights = ((self.gate_rows() + self.state_rows()) * self.width) as f64;
        let times = if self.train { 3.0 } else { 1.0 };
        let bytes = 4.0 * times * (weights + 2.0 * rows * self.width as f64);
        Work { flops: Some(2.0 * times * rows * weights), bytes }
    }

    /// Elements of x, of y and of their gradients.
    pub(crate) fn elements(&self) -> usize {
        self.batch * self.seq * self.width
    }

    /// Rows of the input's weight matrix and elements of its bias.
    pub(crate) fn gate_rows(&self) -> usize {
        self.kind.gates() * self.width
    }

    /// Rows of the state's weight matrix and elements of its bias.
    pub(crate) fn state_rows(&self) -> usize {
        match self.kind {
            Kind::Recurrent(_) => self.gate_rows(),
            Kind::Scan(_) => 0,
        }
    }
}

/// Every case.
pub(crate) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    let mut add =
        |(kind, name): (Kind, &str), train: bool, ([batch, seq, width], quick): ([usize; 3], bool)| {
            let what = if train { "train" } else { "forward" };
            all.push(Case {
                name: format!("{name}-{what}/{batch}x{seq}x{width}"),
                op: Op::Rnn(Shape { kind, batch, seq, width, train }),
                quick,
            });
        };
    let gru = (Kind::Recurrent(Cell::Gru), "gru");
    for layer in [(Kind::Recurrent(Cell::Lstm), "lstm"), gru] {
        for train in [false, true] {
            SHAPES.into_iter().for_each(|shape| add(layer, train, shape));
        }
    }
    let reset_before = (Kind::Recurrent(Cell::GruResetBefore), "gru-reset-before");
    [false, true].into_iter().for_each(|train| add(reset_before, train, RESET_BEFORE_SHAPE));
    let scans = [(Kind::Scan(MinCell::Gru), "min-gru"), (Kind::Scan(MinCell::Lstm), "min-lstm")];
    for shape in SCAN_SHAPES {
        if SHAPES.iter().all(|other| other.0 != shape.0) {
            add(gru, true, shape);
        }
        scans.into_iter().for_each(|layer| add(layer, true, shape));
    }
    all
}

/// The operands of one case. Sequences are time-major: row t·batch + b.
#[derive(Debug)]
pub(crate) struct Problem {
    /// The shape.
    pub(crate) shape: Shape,
    /// Inputs `[seq·batch, width]`.
    pub(crate) x: AlignedVec<f32>,
    /// The gradient that comes in, `[seq·batch, width]`.
    pub(crate) d_y: AlignedVec<f32>,
    /// Weights of the input `[gates·width, width]`.
    pub(crate) w_ih: AlignedVec<f32>,
    /// Weights of the state `[gates·width, width]`; none for a scan.
    pub(crate) w_hh: AlignedVec<f32>,
    /// Bias of the input's product `[gates·width]`.
    pub(crate) b_ih: AlignedVec<f32>,
    /// Bias of the state's product `[gates·width]`; none for a scan.
    pub(crate) b_hh: AlignedVec<f32>,
    /// The steps of every sequence.
    pub(crate) lengths: Vec<usize>,
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// The largest difference of f32, relative to the largest element.
const TOLERANCE: f64 = 1e-4;

impl Problem {
    /// Random operands; the weights in ±1/√width, as a layer is initialised.
    pub(crate) fn new(shape: Shape) -> Problem {
        let mut random = SplitMix64(((shape.width as u64) << 32) ^ shape.elements() as u64);
        let mut fill = |len: usize, factor: f32| AlignedVec::from_fn(len, |_| factor * random.signed_unit());
        let bound = 1.0 / (shape.width as f32).sqrt();
        Problem {
            shape,
            x: fill(shape.elements(), 1.0),
            d_y: fill(shape.elements(), 1.0),
            w_ih: fill(shape.gate_rows() * shape.width, bound),
            w_hh: fill(shape.state_rows() * shape.width, bound),
            b_ih: fill(shape.gate_rows(), bound),
            b_hh: fill(shape.state_rows(), bound),
            lengths: vec![shape.seq; shape.batch],
        }
    }

    /// Compares the last sequence of the batch with the layer in f64. The outputs are y, and d_x when training.
    ///
    /// # Errors
    /// Names the tensor that differs.
    pub(crate) fn check(&self, outputs: &[Cow<'_, [f32]>], precision: Precision) -> Result<(), HarnessError> {
        let bound = tolerance(TOLERANCE, precision);
        let (y, d_x) = match self.shape.kind {
            Kind::Recurrent(cell) => self.recurrent(cell),
            Kind::Scan(cell) => self.scan(cell),
        };
        check_close("y", &self.sequence(&outputs[0]), &y, bound)?;
        if self.shape.train {
            check_close("d_x", &self.sequence(&outputs[1]), &d_x, bound)?;
        }
        Ok(())
    }

    /// y and d_x of the last sequence in f64.
    fn recurrent(&self, cell: Cell) -> (Vec<f64>, Vec<f64>) {
        let Shape { seq, width, .. } = self.shape;
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
        let d_y = wide(&self.sequence(&self.d_y));
        let upstream = RecurrentOutput { y: d_y, h: zeros.clone(), c: zeros.clone() };
        match cell {
            Cell::Lstm => {
                (reference::lstm_forward(&layer).y, reference::lstm_backward(&layer, &upstream).d_x)
            }
            Cell::LstmPeephole => unreachable!("no case has peepholes"),
            Cell::Gru => (reference::gru_forward(&layer).y, reference::gru_backward(&layer, &upstream).d_x),
            Cell::GruResetBefore => {
                let y = reference::gru_reset_before_forward(&layer).y;
                (y, reference::gru_reset_before_backward(&layer, &upstream).d_x)
            }
            Cell::Tanh | Cell::Relu => {
                let relu = cell == Cell::Relu;
                let y = reference::elman_forward(&layer, relu).y;
                (y, reference::elman_backward(&layer, relu, &upstream).d_x)
            }
        }
    }

    /// As [`Problem::recurrent`]: the sums of all steps, the scan, and on the way back `d_x = d_sums·W`.
    fn scan(&self, cell: MinCell) -> (Vec<f64>, Vec<f64>) {
        let Shape { seq, width, .. } = self.shape;
        let (x, w, b) = (wide(&self.sequence(&self.x)), wide(&self.w_ih), wide(&self.b_ih));
        let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
        let sums = |x| w.chunks_exact(width).zip(&b).map(move |(w, b)| dot(x, w) + b);
        let gates: Vec<f64> = x.chunks_exact(width).flat_map(sums).collect();
        let zeros = vec![0.0; width];
        let rnn = MinRnn {
            lstm: cell == MinCell::Lstm,
            positive: false,
            hidden: width,
            gates: &gates,
            lengths: &[seq],
            reverse: false,
            h0: &zeros,
        };
        let (y, _) = reference::min_rnn_forward(&rnn);
        let (d_sums, _) = reference::min_rnn_backward(&rnn, &wide(&self.sequence(&self.d_y)), &zeros);
        let mut d_x = vec![0.0; x.len()];
        for (d_x, d_sums) in d_x.chunks_exact_mut(width).zip(d_sums.chunks_exact(self.shape.gate_rows())) {
            for (w, d) in w.chunks_exact(width).zip(d_sums) {
                d_x.iter_mut().zip(w).for_each(|(d_x, w)| *d_x += d * w);
            }
        }
        (y, d_x)
    }

    /// The rows of the batch's last sequence.
    fn sequence(&self, tensor: &[f32]) -> Vec<f32> {
        let Shape { batch, seq, width, .. } = self.shape;
        let row = |t: usize| &tensor[(t * batch + batch - 1) * width..][..width];
        (0..seq).flat_map(row).copied().collect()
    }
}
