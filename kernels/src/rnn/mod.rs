//! Recurrent layers over whole sequences and step by step, forward and backward, and additive attention.
//!
//! Naively a layer is, for each step, one product of the input and one of the state with each gate's
//! weights, then the gates:
//! ```text
//! for t in 0..seq:                          # or seq-1 down to 0
//!     for b in 0..batch with t < lengths[b]:
//!         a = W_ih · x[t, b] + b_ih + W_hh · h[b] + b_hh
//!         h[b], c[b] = cell(a, h[b], c[b])
//!         y[t, b] = h[b]
//! ```
//! What is done instead, and why it is fast:
//! - **Few input products.** The input's part of `a` is a matrix product over several steps, with the biases in its epilogue; the
//!   recurrence adds to it while it lies in a near cache (`rows`), or, where units are dealt, is over all steps.
//! - **All gates at once.** The gates' weights are one matrix, packed once a call, so a step is one
//!   product accumulated onto the projected gates and one vector pass (`gates`).
//! - **No work for padding.** Rows are ranked by length, longest first, and stored step by step without
//!   gaps (`plan`): the rows that are alive at a step are a prefix of the batch, every product runs on
//!   exactly those, and the state of a finished row is already where it belongs.
//! - **Backward is one product a step.** The recurrence needs only `d_h = d_a · W_hh`; the gradients of
//!   all weights and of the input are products over all steps after the loop. The gates' gradients
//!   overwrite the saved gates.
//! - **Reverse by index.** The reverse direction visits the steps from the last to the first; a row
//!   joins at its own last step, so no sequence is reversed in memory.
//! - **Threads own rows.** Each thread runs the recurrence of its own ranks from the first step to the
//!   last, with no barrier in between.
//! - **Or units, where rows are few.** Then each thread keeps its columns of the weights in its cache, and the
//!   threads meet once a step (`columns`, `team`).
//! - **Or layers.** Both directions of a layer run side by side, each on its share of the threads (`side_by_side`).
//!
//! [`Saved`] takes its memory from the thread's scratch list. Inference keeps no gates ([`infer`]): what is larger than the caches costs
//! a twentieth of the time.
//!
//! # Layout
//! Sequences are time-major: row `t * batch + b`. The columns of a gates buffer are `4 · hidden` for the
//! gated cells, `[i f g o]` for the LSTM and `[n r z q]` for both GRUs, and `hidden` for the plain ones. There `q = W_hn·h + b_hn` is the part of the
//! GRU's candidate that the reset gate scales, or r·h where it resets before the product. Weights have PyTorch's order (i f g o; r z n).
//!
//! What an LSTM may have besides takes columns behind these, so that a row of gates is all that its backward step and the weights'
//! gradients need, and a layer without it has the same memory, the same work and the same bits as if it did not exist: `3 · hidden` for peepholes
//! (`lstm_peephole`), `hidden + output` for a projection of the state (`state_product`).
//!
//! # Numerical contract
//! A row's outputs, final state and input gradient have the same bits for any batch around it, any padding and
//! any number of threads; running step by step or carrying the state over a cut gives the same bits as one
//! whole sequence. Error against f64: at most twice that of the naive f32 form, gradients three times
//! (`rnn::tests`).

use crate::error::{ShapeError, expect_dim};
use crate::view::{MatMut, MatRef};

pub mod additive_attention;
mod columns;
mod columns_backward;
mod elman;
mod gates;
mod gru;
mod gru_reset_before;
mod input_product;
mod lstm;
mod lstm_peephole;
pub mod min_rnn;
mod plan;
mod rows;
mod sequence;
mod sequence_backward;
mod side_by_side;
mod state_product;
mod step;
mod team;
#[cfg(test)]
mod tests;
mod weights;

pub use input_product::{input_gradient, project};
pub use sequence::{Saved, forward, infer};
pub use sequence_backward::backward;
pub use side_by_side::{BackwardPass, ForwardPass, backward_all, forward_all, infer_all};
pub use step::{PackedBackward, PackedCell, StepInput, project_with, step, step_backward, weight_gradients};

pub use weights::{WeightGrads, Weights};

use weights::Sizes;

use std::ops::Range;

/// The kind of a recurrent layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cell {
    /// Long short-term memory; gates in the order i, f, g, o.
    ///
    /// # Source
    /// Hochreiter and Schmidhuber 1997; with the forget gate of Gers, Schmidhuber and Cummins 2000.
    Lstm,
    /// As [`Cell::Lstm`], but i and f see the old c, and o the new c, through one weight for each unit.
    ///
    /// # Source
    /// Gers and Schmidhuber 2000, *Recurrent Nets that Time and Count*.
    LstmPeephole,
    /// Gated recurrent unit; gates in the order r, z, n; the reset gate scales `W_hn·h + b_hn`.
    ///
    /// # Source
    /// Cho et al. 2014 (arXiv:1406.1078), with the reset after the product as in cuDNN and PyTorch.
    Gru,
    /// As [`Cell::Gru`], but the reset gate scales h itself: `W_hn·(r·h) + b_hn`. Two products a step where the other
    /// has one.
    ///
    /// # Source
    /// Cho et al. 2014 (arXiv:1406.1078), equation 8.
    GruResetBefore,
    /// No gate: h' = tanh of the sum.
    ///
    /// # Source
    /// Elman 1990.
    Tanh,
    /// No gate: h' = max(0, sum).
    ///
    /// # Source
    /// Le, Jaitly and Hinton 2015 (arXiv:1504.00941).
    Relu,
}

/// Columns of a gates buffer and the rows of a weight whose product they receive.
struct Window {
    columns: Range<usize>,
    rows: Range<usize>,
}

impl Cell {
    /// Every kind.
    pub const ALL: [Cell; 6] =
        [Cell::Lstm, Cell::LstmPeephole, Cell::Gru, Cell::GruResetBefore, Cell::Tanh, Cell::Relu];

    /// Blocks of `hidden` rows in the weights: 4 for an LSTM, 3 for a GRU, 1 for a plain cell.
    pub const fn gates(self) -> usize {
        match self {
            Cell::Lstm | Cell::LstmPeephole => 4,
            Cell::Gru | Cell::GruResetBefore => 3,
            Cell::Tanh | Cell::Relu => 1,
        }
    }

    /// Columns of a gates buffer of a layer that has no projection.
    pub const fn gate_columns(self, hidden: usize) -> usize {
        match self {
            Cell::LstmPeephole => 7 * hidden,
            Cell::Lstm | Cell::Gru | Cell::GruResetBefore => 4 * hidden,
            Cell::Tanh | Cell::Relu => hidden,
        }
    }

    /// Whether the cell carries a second state `c`.
    pub const fn has_cell_state(self) -> bool {
        matches!(self, Cell::Lstm | Cell::LstmPeephole)
    }

    /// Length of the peephole weights.
    const fn peepholes(self, hidden: usize) -> usize {
        match self {
            Cell::LstmPeephole => 3 * hidden,
            Cell::Lstm | Cell::Gru | Cell::GruResetBefore | Cell::Tanh | Cell::Relu => 0,
        }
    }

    /// Columns of the state `c`: 0 for a cell that has none.
    const fn cell_columns(self, hidden: usize) -> usize {
        if self.has_cell_state() { hidden } else { 0 }
    }

    /// Where the input's product goes.
    fn input_windows(self, hidden: usize) -> impl Iterator<Item = Window> {
        let windows = match self {
            Cell::Lstm | Cell::LstmPeephole => [Some(lstm::input_window(hidden)), None],
            Cell::Gru | Cell::GruResetBefore => gru::input_windows(hidden).map(Some),
            Cell::Tanh | Cell::Relu => [Some(elman::input_window(hidden)), None],
        };
        windows.into_iter().flatten()
    }

    /// Where the state's products go: h times the rows of the first window, r·h times those of a second.
    fn state_windows(self, hidden: usize) -> impl Iterator<Item = Window> {
        let all = 0..self.gates() * hidden;
        let windows = match self {
            Cell::Lstm | Cell::LstmPeephole | Cell::Tanh | Cell::Relu => {
                [Some(Window { columns: all.clone(), rows: all }), None]
            }
            Cell::Gru => [Some(Window { columns: gru::recurrent_columns(hidden), rows: all }), None],
            Cell::GruResetBefore => gru_reset_before::state_windows(hidden).map(Some),
        };
        windows.into_iter().flatten()
    }
}

/// In which order a layer visits the steps of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Direction {
    /// From step 0 to the row's last.
    #[default]
    Forward,
    /// From the row's last step to step 0: reversal within its length.
    Reverse,
}

/// No row is longer than the `steps` of its padded sequence.
fn check_lengths(lengths: &[usize], steps: usize) -> Result<(), ShapeError> {
    match lengths.iter().position(|&length| length > steps) {
        None => Ok(()),
        Some(position) => {
            let index = lengths[position];
            Err(ShapeError::Index { argument: "lengths", position, index, len: steps })
        }
    }
}

/// A padded batch of input sequences.
///
/// # Shapes
/// `x` `[seq·batch, input]`, row `t·batch + b`, rows contiguous; `lengths` `[batch]`, each at most seq, zero
/// allowed. Steps from a row's length on are padding: their `x` is never read.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    /// The inputs of all steps.
    pub x: MatRef<'a>,
    /// Steps of each row. In descending order they cost no reordering.
    pub lengths: &'a [usize],
    /// The order of the steps.
    pub direction: Direction,
}

/// The state of a batch of rows, or its gradient, to read. Rows contiguous.
#[derive(Debug, Clone, Copy)]
pub struct State<'a> {
    /// `[batch, output]`; without a projection output is hidden.
    pub h: MatRef<'a>,
    /// `[batch, hidden]` for a cell that has it, else `None`.
    pub c: Option<MatRef<'a>>,
}

/// The state of a batch of rows, or its gradient, to write. Rows contiguous.
#[derive(Debug)]
pub struct StateMut<'a> {
    /// `[batch, output]`; without a projection output is hidden.
    pub h: MatMut<'a>,
    /// `[batch, hidden]` for a cell that has it, else `None`.
    pub c: Option<MatMut<'a>>,
}

/// Names of a state's arguments, for errors.
type StateNames = [&'static str; 2];

fn check_state_shape(
    names: StateNames,
    sizes: &Sizes,
    batch: usize,
    (h, c): (MatRef<'_>, Option<MatRef<'_>>),
) -> Result<(), ShapeError> {
    let check = |name, part: MatRef<'_>, columns| {
        expect_dim(name, "rows", batch, part.rows())?;
        expect_dim(name, "columns", columns, part.cols())?;
        part.expect_contiguous_rows(name)
    };
    check(names[0], h, sizes.output)?;
    match c {
        Some(c) if sizes.cell.has_cell_state() => check(names[1], c, sizes.hidden),
        Some(c) => expect_dim(names[1], "columns (this cell has no such state)", 0, c.cols()),
        None => expect_dim(names[1], "columns", sizes.cell_columns(), 0),
    }
}

impl State<'_> {
    fn check(&self, names: StateNames, sizes: &Sizes, batch: usize) -> Result<(), ShapeError> {
        check_state_shape(names, sizes, batch, (self.h, self.c))
    }
}

impl StateMut<'_> {
    fn check(&self, names: StateNames, sizes: &Sizes, batch: usize) -> Result<(), ShapeError> {
        check_state_shape(names, sizes, batch, (self.h.as_ref(), self.c.as_ref().map(MatMut::as_ref)))
    }
}

/// What [`forward`] writes.
#[derive(Debug)]
pub struct Output<'a> {
    /// The state h after each step: `[seq·batch, output]`, rows contiguous; padding becomes zeros.
    pub y: MatMut<'a>,
    /// The state after each row's last step (for length 0 the initial state), where it is wanted.
    pub last: Option<StateMut<'a>>,
}

/// The gradients that reach [`backward`]; what is `None` is zero.
#[derive(Debug, Clone, Copy)]
pub struct OutputGrads<'a> {
    /// Of [`Output::y`]: `[seq·batch, output]`, rows contiguous. Rows of padding are never read.
    pub d_y: Option<MatRef<'a>>,
    /// Of [`Output::last`].
    pub d_last: Option<State<'a>>,
}

/// The gradients that [`backward`] gives.
#[derive(Debug)]
pub struct InputGrads<'a> {
    /// Of the weights: **added to**.
    pub weights: WeightGrads<'a>,
    /// Of the inputs: `[seq·batch, input]`, rows contiguous, overwritten; padding becomes zeros.
    pub d_x: Option<MatMut<'a>>,
    /// Of the initial state, overwritten.
    pub d_initial: Option<StateMut<'a>>,
}
