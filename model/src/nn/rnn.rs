//! Recurrent layers: weights in PyTorch's names, one or two directions, a stack.
//!
//! The layer of a cell whose gates see the state is one op; that of a minGRU or minLSTM is a linear layer over all
//! steps and a scan, with the candidate as it is (`Candidate::Linear`), and it has no weights of the state.

use std::sync::Arc;

use kavanam_kernels::rnn::min_rnn::{Candidate, MinCell};
use kavanam_kernels::rnn::{Cell, Direction};
use kavanam_kernels::{Activation, ShapeError};

use crate::models::CellKind;
use crate::ops::{self, LinearWeights, RecurrentOutput, RecurrentPass, RecurrentWeights, StateVars};
use crate::param::{Init, ParamStore};
use crate::tape::{Tape, Var};

/// The kernel of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    Recurrent(Cell),
    Scan(MinCell),
}

impl CellKind {
    fn kernel(self) -> Kernel {
        match self {
            CellKind::Lstm => Kernel::Recurrent(Cell::Lstm),
            CellKind::LstmPeephole => Kernel::Recurrent(Cell::LstmPeephole),
            CellKind::Gru => Kernel::Recurrent(Cell::Gru),
            CellKind::GruResetBefore => Kernel::Recurrent(Cell::GruResetBefore),
            CellKind::Tanh => Kernel::Recurrent(Cell::Tanh),
            CellKind::Relu => Kernel::Recurrent(Cell::Relu),
            CellKind::MinGru => Kernel::Scan(MinCell::Gru),
            CellKind::MinLstm => Kernel::Scan(MinCell::Lstm),
        }
    }
}

/// The weights of one layer and direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CellWeights {
    /// The gates see the state.
    Recurrent(RecurrentWeights),
    /// The same weights, computed step by step and gate by gate.
    Naive(RecurrentWeights),
    /// The gates see the input alone.
    Scan(ScanWeights),
}

/// The weights of a minGRU or minLSTM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScanWeights {
    /// Which of the two.
    pub cell: MinCell,
    /// `[gates · hidden, input]` and its bias.
    pub gates: LinearWeights,
}

impl ScanWeights {
    /// What the candidate is of its sum.
    pub const CANDIDATE: Candidate = Candidate::Linear;
}

/// The widths of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CellWidths {
    /// What it reads.
    pub input: usize,
    /// Its gates, and the state c.
    pub hidden: usize,
    /// The state h of an LSTM that projects it.
    pub projection: Option<usize>,
}

impl From<[usize; 2]> for CellWidths {
    /// Input and hidden, without a projection.
    fn from([input, hidden]: [usize; 2]) -> CellWidths {
        CellWidths { input, hidden, projection: None }
    }
}

/// Adds `{name}.weight_ih_{suffix}`, `weight_hh_`, `bias_ih_` and `bias_hh_`; those of a scan without `hh`; also
/// `weight_ch_`, the peepholes p_i, p_f, p_o, and `weight_hr_`, the projection, where there are such.
///
/// The input's weights start as a stack of Xavier matrices, the others uniform within 1/√hidden, the biases as 0
/// but for the LSTM's forget gate, which starts open with 1 (Jozefowicz et al. 2015, section 5).
pub fn cell_weights(
    store: &mut ParamStore,
    name: &str,
    suffix: &str,
    kind: CellKind,
    widths: impl Into<CellWidths>,
) -> CellWeights {
    let CellWidths { input, hidden, projection } = widths.into();
    let rows = kind.gates() * hidden;
    let stacked = Init::Xavier { stacked: kind.gates() };
    let mut add =
        |part: &str, shape: &[usize], init| store.add(&format!("{name}.{part}_{suffix}"), shape, init);
    let w_ih = add("weight_ih", &[rows, input], stacked);
    let cell = match kind.kernel() {
        Kernel::Recurrent(cell) => cell,
        Kernel::Scan(cell) => {
            let bias = Some(add("bias_ih", &[rows], Init::Zeros));
            return CellWeights::Scan(ScanWeights { cell, gates: LinearWeights { weight: w_ih, bias } });
        }
    };
    let uniform = Init::Uniform((hidden as f32).sqrt().recip());
    let w_hh = add("weight_hh", &[rows, projection.unwrap_or(hidden)], uniform);
    let [b_ih, b_hh] = ["bias_ih", "bias_hh"].map(|part| add(part, &[rows], Init::Zeros));
    let peepholes = (cell == Cell::LstmPeephole).then(|| add("weight_ch", &[3 * hidden], uniform));
    let w_hr = projection.map(|output| add("weight_hr", &[output, hidden], uniform));
    if kind.states() == 2 {
        store.get_mut(b_ih)[hidden..2 * hidden].fill(1.0);
    }
    CellWeights::Recurrent(RecurrentWeights { cell, w_ih, w_hh, b_ih, b_hh, peepholes, w_hr })
}

impl CellWeights {
    /// One direction over whole sequences.
    ///
    /// # Errors
    /// [`ShapeError`] when shapes do not fit.
    pub fn forward(
        &self,
        tape: &mut Tape<'_>,
        x: Var,
        along: (&Arc<[usize]>, Direction),
        initial: Option<StateVars>,
    ) -> Result<RecurrentOutput, ShapeError> {
        match self {
            CellWeights::Recurrent(weights) => ops::recurrent(tape, x, weights, along, initial),
            CellWeights::Naive(weights) => ops::naive_recurrent(tape, x, weights, along, initial),
            CellWeights::Scan(ScanWeights { cell, gates }) => {
                let sums = ops::linear(tape, x, gates, Activation::Identity)?;
                let kind = (*cell, ScanWeights::CANDIDATE);
                let [y, h] = ops::min_rnn(tape, sums, kind, along, initial.map(|state| state.h))?;
                Ok(RecurrentOutput { y, last: StateVars { h, c: None } })
            }
        }
    }

    /// The weights of a cell whose gates see the state, in the fast layer.
    pub fn recurrent(&self) -> Option<&RecurrentWeights> {
        match self {
            CellWeights::Recurrent(weights) => Some(weights),
            CellWeights::Naive(_) | CellWeights::Scan(_) => None,
        }
    }

    fn naive(self) -> CellWeights {
        match self {
            CellWeights::Recurrent(weights) => CellWeights::Naive(weights),
            other => other,
        }
    }
}

/// One layer, from start to end and, when it is bidirectional, also from end to start.
#[derive(Debug, Clone, Copy)]
pub struct RecurrentLayer {
    forward: CellWeights,
    reverse: Option<CellWeights>,
}

impl RecurrentLayer {
    /// Adds the weights of layer `index` of the stack `name`.
    pub fn new(
        store: &mut ParamStore,
        name: &str,
        index: usize,
        kind: CellKind,
        widths: CellWidths,
        bidirectional: bool,
    ) -> RecurrentLayer {
        let forward = cell_weights(store, name, &format!("l{index}"), kind, widths);
        let reverse =
            bidirectional.then(|| cell_weights(store, name, &format!("l{index}_reverse"), kind, widths));
        RecurrentLayer { forward, reverse }
    }

    /// The same layer, computed step by step and gate by gate.
    #[must_use]
    pub fn naive(self) -> RecurrentLayer {
        RecurrentLayer { forward: self.forward.naive(), reverse: self.reverse.map(CellWeights::naive) }
    }

    /// The weights of the direction from start to end.
    pub fn weights(&self) -> &CellWeights {
        &self.forward
    }

    /// x `[seq · batch, input]`, time-major; gives the states of all steps, both directions side by side, and each
    /// direction's final state side by side.
    ///
    /// # Errors
    /// [`ShapeError`] when shapes do not fit.
    pub fn forward(
        &self,
        tape: &mut Tape<'_>,
        x: Var,
        lengths: &Arc<[usize]>,
        initial: Option<StateVars>,
    ) -> Result<(Var, StateVars), ShapeError> {
        if let (CellWeights::Recurrent(forward), Some(CellWeights::Recurrent(reverse))) =
            (self.forward, self.reverse)
        {
            let there = RecurrentPass { weights: forward, direction: Direction::Forward, initial };
            let back = RecurrentPass { weights: reverse, direction: Direction::Reverse, initial: None };
            let both = ops::recurrent_layers(tape, x, lengths, vec![there, back])?;
            return Ok((both.y, both.last));
        }
        let there = self.forward.forward(tape, x, (lengths, Direction::Forward), initial)?;
        let Some(reverse) = &self.reverse else { return Ok((there.y, there.last)) };
        let back = reverse.forward(tape, x, (lengths, Direction::Reverse), None)?;
        let y = ops::concat_cols(tape, &[there.y, back.y])?;
        let h = ops::concat_cols(tape, &[there.last.h, back.last.h])?;
        let c = match (there.last.c, back.last.c) {
            (Some(there), Some(back)) => Some(ops::concat_cols(tape, &[there, back])?),
            _ => None,
        };
        Ok((y, StateVars { h, c }))
    }
}
