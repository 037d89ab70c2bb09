//! Recurrent layers: weights in PyTorch's names, one or two directions, a stack.

use std::sync::Arc;

use kavanam_kernels::ShapeError;
use kavanam_kernels::rnn::{Cell, Direction};

use crate::models::CellKind;
use crate::ops::{self, RecurrentWeights, StateVars};
use crate::param::{Init, ParamStore};
use crate::tape::{Tape, Var};

impl CellKind {
    /// The kernel's cell.
    pub fn cell(self) -> Cell {
        match self {
            CellKind::Lstm => Cell::Lstm,
            CellKind::Gru => Cell::Gru,
            CellKind::Tanh => Cell::Tanh,
            CellKind::Relu => Cell::Relu,
        }
    }
}

/// Adds `{name}.weight_ih_{suffix}`, `weight_hh_`, `bias_ih_` and `bias_hh_`.
///
/// The input's weights start as a stack of Xavier matrices, the state's uniform within 1/√hidden, the biases as 0
/// but for the LSTM's forget gate, which starts open with 1 (Jozefowicz et al. 2015, section 5).
pub fn cell_weights(
    store: &mut ParamStore,
    name: &str,
    suffix: &str,
    kind: CellKind,
    [input, hidden]: [usize; 2],
) -> RecurrentWeights {
    let rows = kind.gates() * hidden;
    let uniform = Init::Uniform((hidden as f32).sqrt().recip());
    let weights = RecurrentWeights {
        cell: kind.cell(),
        w_ih: store.add(
            &format!("{name}.weight_ih_{suffix}"),
            &[rows, input],
            Init::Xavier { stacked: kind.gates() },
        ),
        w_hh: store.add(&format!("{name}.weight_hh_{suffix}"), &[rows, hidden], uniform),
        b_ih: store.add(&format!("{name}.bias_ih_{suffix}"), &[rows], Init::Zeros),
        b_hh: store.add(&format!("{name}.bias_hh_{suffix}"), &[rows], Init::Zeros),
    };
    if kind == CellKind::Lstm {
        store.get_mut(weights.b_ih)[hidden..2 * hidden].fill(1.0);
    }
    weights
}

/// One layer, from start to end and, when it is bidirectional, also from end to start.
#[derive(Debug, Clone, Copy)]
pub struct RecurrentLayer {
    forward: RecurrentWeights,
    reverse: Option<RecurrentWeights>,
}

impl RecurrentLayer {
    /// Adds the weights of layer `index` of the stack `name`.
    pub fn new(
        store: &mut ParamStore,
        name: &str,
        index: usize,
        kind: CellKind,
        sizes: [usize; 2],
        bidirectional: bool,
    ) -> RecurrentLayer {
        let forward = cell_weights(store, name, &format!("l{index}"), kind, sizes);
        let reverse =
            bidirectional.then(|| cell_weights(store, name, &format!("l{index}_reverse"), kind, sizes));
        RecurrentLayer { forward, reverse }
    }

    /// The weights of the direction from start to end.
    pub fn weights(&self) -> &RecurrentWeights {
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
        let there = ops::recurrent(tape, x, &self.forward, (lengths, Direction::Forward), initial)?;
        let Some(reverse) = &self.reverse else { return Ok((there.y, there.last)) };
        let back = ops::recurrent(tape, x, reverse, (lengths, Direction::Reverse), None)?;
        let y = ops::concat_cols(tape, &[there.y, back.y])?;
        let h = ops::concat_cols(tape, &[there.last.h, back.last.h])?;
        let c = match (there.last.c, back.last.c) {
            (Some(there), Some(back)) => Some(ops::concat_cols(tape, &[there, back])?),
            _ => None,
        };
        Ok((y, StateVars { h, c }))
    }
}
