//! The bottom layer of a decoder with additive attention, over all steps of teacher forcing.
//!
//! ```text
//! for t in 0..steps:
//!     α[t]    = softmax(vᵀ·tanh(W_q·h[t−1] + keys))         # over the source positions
//!     context = Σ_s α[t, s]·annotation[s]
//!     h[t], c[t] = cell([embedded[t], context], h[t−1], c[t−1])
//! ```
//! The state decides where to look, so the steps cannot be one product. What can be is: the embedded tokens'
//! part of the gates is one product before the loop, the keys are projected by the caller once, all weights
//! of the loop are packed once, and after the loop backward every weight's gradient is one product over all
//! steps. The loops themselves only carry the state and the gates' gradients.

mod backward;

use std::sync::Arc;

use kavanam_kernels::error::expect_dim;
use kavanam_kernels::gemm::{self, Accum, Epilogue, PackedWeights};
use kavanam_kernels::rnn::additive_attention as attention;
use kavanam_kernels::rnn::{self, PackedCell, State, StateMut, StepInput, Weights};
use kavanam_kernels::{HeadsLayout, HeadsMut, HeadsRef, MatMut, MatRef, ShapeError};

use crate::ops::recurrent::{RecurrentWeights, StateVars};
use crate::param::{ParamId, ParamStore};
use crate::pool::Buffer;
use crate::tape::{Tape, Var};
use backward::Saved;

/// The weights of the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdditiveDecoder {
    /// The cell; its input is `[embedded token, context]`.
    pub cell: RecurrentWeights,
    /// `[attention, output]`: projects the state h.
    pub query: ParamId,
    /// `[attention]`: turns tanh into a score.
    pub v: ParamId,
}

/// What the layer reads, all time-major.
#[derive(Debug, Clone)]
pub struct AdditiveInputs {
    /// `[steps · batch, embedding]`.
    pub embedded: Var,
    /// The projected annotations, `[source_len · batch, attention]`.
    pub keys: Var,
    /// `[source_len · batch, annotation]`.
    pub annotations: Var,
    /// The length of each source.
    pub lengths: Arc<[usize]>,
    /// The state before the first step.
    pub initial: StateVars,
}

/// Sizes of one call.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    steps: usize,
    source: usize,
    embedding: usize,
    context: usize,
    /// Columns of the state h.
    output: usize,
    /// Columns of the state c, if there is one.
    hidden: usize,
    attention: usize,
    /// Columns of the gates.
    gates: usize,
    with_c: bool,
}

impl Sizes {
    fn input(&self) -> usize {
        self.embedding + self.context
    }

    fn rows(&self) -> usize {
        self.steps * self.batch
    }

    /// The rows of step `t` of a time-major buffer of that width.
    fn at(&self, t: usize, width: usize) -> std::ops::Range<usize> {
        t * self.batch * width..(t + 1) * self.batch * width
    }

    /// `[batch, 1, 1, width]` at step t.
    fn step_layout(&self, width: usize) -> HeadsLayout {
        HeadsLayout::seq_batch(1, self.batch, width)
    }

    /// The context's columns of one step of the inputs.
    fn context_layout(&self) -> HeadsLayout {
        let stride = self.input();
        HeadsLayout {
            batch_stride: stride,
            seq_stride: self.batch * stride,
            ..self.step_layout(self.context)
        }
    }
}

/// Runs the layer over all steps.
///
/// # Shapes
/// See [`AdditiveInputs`]; gives the states `[steps · batch, output]` and the cell's inputs `[embedded, context]`
/// `[steps · batch, embedding + annotation]`, which a deep output reads again.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit.
///
/// # Source
/// Bahdanau, Cho and Bengio 2015, section 3.1 and appendix A.2.2.
pub fn additive_decoder(
    tape: &mut Tape<'_>,
    weights: &AdditiveDecoder,
    inputs: &AdditiveInputs,
) -> Result<[Var; 2], ShapeError> {
    let sizes = sizes(tape, weights, inputs)?;
    let mut memory = Memory::take(&sizes, |len| tape.buffer(len));
    let mut y = tape.buffer(sizes.rows() * sizes.output);
    let mut x = tape.buffer(sizes.rows() * sizes.input());
    run(tape, weights, inputs, &sizes, (&mut memory, &mut y, &mut x))?;
    let op = Saved { weights: *weights, inputs: inputs.clone(), sizes, memory };
    Ok(tape.push_all([(y, sizes.rows(), sizes.output), (x, sizes.rows(), sizes.input())], || op))
}

fn sizes(tape: &Tape<'_>, weights: &AdditiveDecoder, inputs: &AdditiveInputs) -> Result<Sizes, ShapeError> {
    let params = tape.params();
    let batch = inputs.lengths.len();
    let (rows, embedding) = tape.shape(inputs.embedded);
    let (source_rows, context) = tape.shape(inputs.annotations);
    expect_dim("embedded", "rows modulo the batch", 0, rows % batch.max(1))?;
    expect_dim("annotations", "rows modulo the batch", 0, source_rows % batch.max(1))?;
    expect_dim("embedded", "columns", weights.cell.input(params) - context, embedding)?;
    expect_dim("keys", "rows", source_rows, tape.shape(inputs.keys).0)?;
    Ok(Sizes {
        batch,
        steps: rows / batch.max(1),
        source: source_rows / batch.max(1),
        embedding,
        context,
        output: weights.cell.output(params),
        hidden: weights.cell.hidden(params),
        attention: params.shape(weights.query)[0],
        gates: weights.cell.views(params).gate_columns(),
        with_c: weights.cell.cell.has_cell_state(),
    })
}

/// What the way back needs, time-major.
struct Memory {
    /// `[rows, gates]`.
    gates: Buffer,
    /// The state before each step, `[rows, output]`.
    h: Buffer,
    /// As h, `[rows, hidden]`, for a cell that has it.
    c: Buffer,
    /// The projected states, `[rows, attention]`.
    query: Buffer,
    /// `[rows, source]`.
    alpha: Buffer,
}

impl Memory {
    fn take(sizes: &Sizes, buffer: impl Fn(usize) -> Buffer) -> Memory {
        let rows = sizes.rows();
        Memory {
            gates: buffer(rows * sizes.gates),
            h: buffer(rows * sizes.output),
            c: buffer(if sizes.with_c { rows * sizes.hidden } else { 0 }),
            query: buffer(rows * sizes.attention),
            alpha: buffer(rows * sizes.source),
        }
    }
}

/// The columns of W_ih that belong to the embedded token, or those that belong to the context.
fn cell_part<'p>(
    weights: &AdditiveDecoder,
    params: &'p ParamStore,
    columns: std::ops::Range<usize>,
) -> Weights<'p> {
    let whole = weights.cell.views(params);
    Weights { w_ih: whole.w_ih.sub(0..whole.w_ih.rows(), columns), ..whole }
}

fn run(
    tape: &Tape<'_>,
    weights: &AdditiveDecoder,
    inputs: &AdditiveInputs,
    s: &Sizes,
    (memory, y, x): (&mut Memory, &mut Buffer, &mut Buffer),
) -> Result<(), ShapeError> {
    let (ctx, params) = (tape.context(), tape.params());
    let (e, width, output, hidden) = (s.embedding, s.input(), s.output, s.hidden);
    for (x, embedded) in x.chunks_exact_mut(width).zip(tape.value(inputs.embedded).chunks_exact(e)) {
        x[..e].copy_from_slice(embedded);
    }
    let of_tokens = cell_part(weights, params, 0..e);
    let gates = MatMut::new(&mut memory.gates, s.rows(), s.gates)?;
    rnn::project(ctx, &of_tokens, tape.matrix(inputs.embedded), gates)?;
    let cell = PackedCell::pack_for_call(ctx, &cell_part(weights, params, e..width))?;
    let query = PackedWeights::pack(ctx, params.matrix(weights.query).t())?;

    let mut h = tape.buffer(s.batch * output);
    h.copy_from_slice(tape.value(inputs.initial.h));
    let mut c = tape.buffer(if s.with_c { s.batch * hidden } else { 0 });
    if let Some(initial) = inputs.initial.c {
        c.copy_from_slice(tape.value(initial));
    }
    for t in 0..s.steps {
        memory.h[s.at(t, output)].copy_from_slice(&h);
        let x_t = &mut x[s.at(t, width)];
        let q_t = &mut memory.query[s.at(t, s.attention)];
        let h_prev = MatRef::new(&h, s.batch, output)?;
        let q_mat = MatMut::new(q_t, s.batch, s.attention)?;
        gemm::gemm_packed(ctx, h_prev, &query, q_mat, Accum::Overwrite, &Epilogue::default())?;
        let looked_at = attention_inputs(s, q_t, inputs, params.get(weights.v), |var| tape.value(var))?;
        let alpha = HeadsMut::new(&mut memory.alpha[s.at(t, s.source)], s.step_layout(s.source))?;
        attention::forward(ctx, &looked_at, alpha, HeadsMut::new(&mut x_t[e..], s.context_layout())?)?;

        let context = MatRef::new(x_t, s.batch, width)?.sub(0..s.batch, e..width);
        let gates = MatMut::new(&mut memory.gates[s.at(t, s.gates)], s.batch, s.gates)?;
        let h_prev = MatRef::new(&memory.h[s.at(t, output)], s.batch, output)?;
        let mut c_next = None;
        let c_prev = if s.with_c {
            memory.c[s.at(t, hidden)].copy_from_slice(&c);
            c_next = Some(MatMut::new(&mut c, s.batch, hidden)?);
            Some(MatRef::new(&memory.c[s.at(t, hidden)], s.batch, hidden)?)
        } else {
            None
        };
        let next = StateMut { h: MatMut::new(&mut h, s.batch, output)?, c: c_next };
        let input = StepInput { x: context, accum: Accum::Add };
        rnn::step(ctx, &cell, input, State { h: h_prev, c: c_prev }, gates, next)?;
        y[s.at(t, output)].copy_from_slice(&h);
    }
    Ok(())
}

fn attention_inputs<'t>(
    s: &Sizes,
    query: &'t [f32],
    inputs: &'t AdditiveInputs,
    v: &'t [f32],
    value: impl Fn(Var) -> &'t [f32],
) -> Result<attention::Inputs<'t>, ShapeError> {
    Ok(attention::Inputs {
        query: HeadsRef::new(query, s.step_layout(s.attention))?,
        keys: HeadsRef::new(value(inputs.keys), HeadsLayout::seq_batch(s.source, s.batch, s.attention))?,
        v,
        values: HeadsRef::new(
            value(inputs.annotations),
            HeadsLayout::seq_batch(s.source, s.batch, s.context),
        )?,
        lengths: &inputs.lengths,
    })
}

#[cfg(test)]
mod tests {
    use kavanam_kernels::rnn::Cell;

    use super::*;
    use crate::ops::concat_cols;
    use crate::ops::gradient_check::{Case, check};
    use crate::ops::recurrent::tests::projected_weights;
    use crate::param::Init;

    #[test]
    fn gradients_of_every_weight_and_input() {
        let plain = [Cell::Lstm, Cell::LstmPeephole, Cell::Gru, Cell::GruResetBefore, Cell::Tanh];
        let projected = [(Cell::Lstm, 2), (Cell::LstmPeephole, 3)];
        for (cell, output) in plain.map(|cell| (cell, 4)).into_iter().chain(projected) {
            let (batch, steps, source, e, annotation, hidden, attention) = (3, 4, 5, 2, 3, 4, 6);
            let mut case = Case::new(12);
            let weights = AdditiveDecoder {
                cell: projected_weights(&mut case.store, cell, e + annotation, [hidden, output]),
                query: case.store.add("query", &[attention, output], Init::Uniform(0.7)),
                v: case.store.add("v", &[attention], Init::Uniform(0.7)),
            };
            case.input(steps * batch, e);
            case.input(source * batch, attention);
            case.input(source * batch, annotation);
            case.input(batch, output);
            case.input(batch, hidden);
            check(&case, |tape, v| {
                let c = cell.has_cell_state().then_some(v[4]);
                let inputs = AdditiveInputs {
                    embedded: v[0],
                    keys: v[1],
                    annotations: v[2],
                    lengths: [5, 1, 3].into(),
                    initial: StateVars { h: v[3], c },
                };
                let [y, x] = additive_decoder(tape, &weights, &inputs)?;
                concat_cols(tape, &[y, x, v[0]])
            });
        }
    }
}
