//! The states of a stack of recurrent cells between two steps, and one step of one of its layers.

use kavanam_kernels::gemm::Accum;
use kavanam_kernels::rnn::min_rnn::{self, Scan};
use kavanam_kernels::rnn::{self, Direction, PackedCell, State, StateMut, StepInput};
use kavanam_kernels::{Activation, Context, MatMut, MatRef, ShapeError};

use crate::nn::rnn::{CellWeights, ScanWeights};
use crate::ops::{self, RecurrentWeights, StateVars};
use crate::param::ParamStore;
use crate::tape::Tape;

/// A layer's cell, ready for single steps.
#[derive(Debug)]
pub(crate) enum StepCell {
    Recurrent(Box<PackedCell>),
    /// Nothing is packed.
    Naive(RecurrentWeights),
    /// Its weights are packed with the linear layers'.
    Scan(ScanWeights),
}

impl StepCell {
    pub(crate) fn pack(
        ctx: &Context,
        params: &ParamStore,
        weights: &CellWeights,
    ) -> Result<StepCell, ShapeError> {
        Ok(match weights {
            CellWeights::Recurrent(weights) => {
                StepCell::Recurrent(Box::new(PackedCell::pack(ctx, &weights.views(params))?))
            }
            CellWeights::Naive(weights) => StepCell::Naive(*weights),
            CellWeights::Scan(weights) => StepCell::Scan(*weights),
        })
    }
}

/// The states of all layers, of several rows at once.
#[derive(Debug, Clone)]
pub(crate) struct CellStates {
    /// `[rows, width]` for each layer and state vector: h of the bottom layer, its c if it has one, and so on.
    pub(crate) states: Vec<Vec<f32>>,
    /// State vectors of one layer.
    pub(crate) vectors: usize,
    pub(crate) rows: usize,
}

impl CellStates {
    /// The width of a state vector of this length.
    fn width(&self, state: &[f32]) -> usize {
        state.len() / self.rows.max(1)
    }

    /// One step of layer `l`; gives its new output.
    pub(crate) fn advance(
        &mut self,
        tape: &mut Tape<'_>,
        cell: &StepCell,
        l: usize,
        input: &[f32],
    ) -> Result<Vec<f32>, ShapeError> {
        match cell {
            StepCell::Scan(weights) => self.scan(tape, weights, l, input),
            StepCell::Naive(weights) => self.naive(tape, weights, l, input),
            StepCell::Recurrent(cell) => {
                let mut gates = tape.buffer(self.rows * cell.gate_columns());
                self.step(tape.context(), cell, (l, Accum::Overwrite), input, &mut gates)
            }
        }
    }

    /// One step of layer `l` by the naive layer; gives its new output.
    fn naive(
        &mut self,
        tape: &mut Tape<'_>,
        weights: &RecurrentWeights,
        l: usize,
        input: &[f32],
    ) -> Result<Vec<f32>, ShapeError> {
        let x = tape.constant(input, self.rows, input.len() / self.rows.max(1))?;
        let old = &self.states[l * self.vectors..(l + 1) * self.vectors];
        let h = tape.constant(&old[0], self.rows, self.width(&old[0]))?;
        let c = old.get(1).map(|c| tape.constant(c, self.rows, self.width(c))).transpose()?;
        let along = (&vec![1; self.rows].into(), Direction::Forward);
        let out = ops::naive_recurrent(tape, x, weights, along, Some(StateVars { h, c }))?;
        for (state, var) in self.states[l * self.vectors..].iter_mut().zip(out.last.vars()) {
            state.copy_from_slice(tape.value(var));
        }
        Ok(tape.value(out.y).to_vec())
    }

    /// One step of layer `l`, `gates` being its scratch; gives its new output.
    pub(crate) fn step(
        &mut self,
        ctx: &Context,
        cell: &PackedCell,
        (l, accum): (usize, Accum),
        input: &[f32],
        gates: &mut [f32],
    ) -> Result<Vec<f32>, ShapeError> {
        let (rows, hidden, output) = (self.rows, cell.hidden(), cell.output());
        let old = &self.states[l * self.vectors..(l + 1) * self.vectors];
        let mut new: Vec<Vec<f32>> = old.iter().map(|state| vec![0.0; state.len()]).collect();
        let state = State {
            h: MatRef::new(&old[0], rows, output)?,
            c: old.get(1).map(|c| MatRef::new(c, rows, hidden)).transpose()?,
        };
        let (h, c) = new.split_at_mut(1);
        let next = StateMut {
            h: MatMut::new(&mut h[0], rows, output)?,
            c: c.first_mut().map(|c| MatMut::new(c, rows, hidden)).transpose()?,
        };
        let input = StepInput { x: MatRef::new(input, rows, input.len() / rows.max(1))?, accum };
        rnn::step(ctx, cell, input, state, MatMut::new(gates, rows, cell.gate_columns())?, next)?;
        let output = new[0].clone();
        for (state, new) in self.states[l * self.vectors..].iter_mut().zip(new) {
            *state = new;
        }
        Ok(output)
    }

    /// One step of layer `l`, a minGRU or minLSTM; gives its new output.
    fn scan(
        &mut self,
        tape: &mut Tape<'_>,
        weights: &ScanWeights,
        l: usize,
        input: &[f32],
    ) -> Result<Vec<f32>, ShapeError> {
        let x = tape.constant(input, self.rows, input.len() / self.rows.max(1))?;
        let sums = ops::linear(tape, x, &weights.gates, Activation::Identity)?;
        let mut gates = tape.value(sums).to_vec();
        let scan = Scan {
            cell: weights.cell,
            candidate: ScanWeights::CANDIDATE,
            hidden: self.width(&self.states[l]),
            seq: 1,
            lengths: &vec![1; self.rows],
            direction: Direction::Forward,
        };
        let mut new = vec![0.0; self.states[l].len()];
        min_rnn::forward(tape.context(), &scan, &mut gates, Some(&self.states[l]), &mut new, None)?;
        self.states[l].copy_from_slice(&new);
        Ok(new)
    }

    /// Row `i` becomes what row `rows[i]` was.
    pub(crate) fn select(&mut self, rows: &[usize]) {
        let old = self.rows.max(1);
        for state in &mut self.states {
            let width = state.len() / old;
            let part = |&row: &usize| &state[row * width..(row + 1) * width];
            *state = rows.iter().flat_map(part).copied().collect();
        }
        self.rows = rows.len();
    }
}
