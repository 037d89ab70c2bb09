//! The way back through [`super::additive_decoder`].

use kavanam_kernels::gemm::{self, Accum, Epilogue, PackedWeights};
use kavanam_kernels::rnn::additive_attention as attention;
use kavanam_kernels::rnn::{self, PackedBackward, State, StateMut};
use kavanam_kernels::rowwise::elementwise;
use kavanam_kernels::{Context, HeadsLayout, HeadsMut, HeadsRef, MatMut, MatRef, ShapeError};

use super::{AdditiveDecoder, AdditiveInputs, Memory, Sizes, attention_inputs, cell_part};
use crate::param::ParamStore;
use crate::pool::{Buffer, Pool};
use crate::tape::{Backward, BackwardPass, Slot, Var};

/// What the op saved.
pub(super) struct Saved {
    pub(super) weights: AdditiveDecoder,
    pub(super) inputs: AdditiveInputs,
    pub(super) sizes: Sizes,
    pub(super) memory: Memory,
}

/// The gradients that the loop back fills.
struct Flow {
    d_h: Buffer,
    d_c: Buffer,
    /// `[rows, input]`.
    d_x: Buffer,
    /// `[rows, attention]`.
    d_query: Buffer,
    d_keys: Buffer,
    d_annotations: Buffer,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let Saved { weights, inputs, sizes: s, mut memory } = *self;
        let upstream = [pass.take_grad(out), pass.take_grad(out.after(1))];
        let pool: &Pool = pass.pool;
        let mut flow = Flow {
            d_h: pool.zeroed(s.batch * s.output),
            d_c: pool.zeroed(if s.with_c { s.batch * s.hidden } else { 0 }),
            d_x: pool.take(s.rows() * s.input()),
            d_query: pool.take(s.rows() * s.attention),
            d_keys: to_add_to(pass, inputs.keys),
            d_annotations: to_add_to(pass, inputs.annotations),
        };
        go_back(pass, &weights, &inputs, &s, (&mut memory, &mut flow, &upstream))?;
        input_gradients(pass, &weights, &inputs, &s, (&memory, &mut flow, upstream[1].as_deref()))?;
        weight_gradients(pass, out, &weights, &s, (&memory, &flow))?;

        let Flow { d_h, d_c, d_x, d_keys, d_annotations, .. } = flow;
        pass.put_grad(inputs.keys, d_keys);
        pass.put_grad(inputs.annotations, d_annotations);
        let (mut d_embedded, slot) = pass.grad_slot(inputs.embedded);
        for (d, d_x) in d_embedded.chunks_exact_mut(s.embedding).zip(d_x.chunks_exact(s.input())) {
            match slot {
                Slot::Fresh => d.copy_from_slice(&d_x[..s.embedding]),
                Slot::Partial => d.iter_mut().zip(d_x).for_each(|(a, b)| *a += b),
            }
        }
        pass.put_grad(inputs.embedded, d_embedded);
        pass.hand_on(inputs.initial.h, d_h)?;
        match inputs.initial.c {
            Some(c) => pass.hand_on(c, d_c),
            None => Ok(()),
        }
    }
}

/// The gradient of an input that is added to step by step: zeros when nothing is there yet.
fn to_add_to(pass: &mut BackwardPass<'_>, x: Var) -> Buffer {
    let (mut d_x, slot) = pass.grad_slot(x);
    if slot == Slot::Fresh {
        d_x.fill(0.0);
    }
    d_x
}

/// The loop over the steps: gates become their gradients, the rest of the gradients gather in `flow`.
fn go_back(
    pass: &mut BackwardPass<'_>,
    weights: &AdditiveDecoder,
    inputs: &AdditiveInputs,
    s: &Sizes,
    (memory, flow, upstream): (&mut Memory, &mut Flow, &[Option<Buffer>; 2]),
) -> Result<(), ShapeError> {
    let (ctx, params): (Context, &ParamStore) = (pass.ctx, pass.params);
    let (e, width, output, hidden) = (s.embedding, s.input(), s.output, s.hidden);
    let cell = PackedBackward::pack(&ctx, &cell_part(weights, params, e..width))?;
    let query = PackedWeights::pack(&ctx, params.matrix(weights.query))?;
    let source_layout = |width| HeadsLayout::seq_batch(s.source, s.batch, width);
    for t in (0..s.steps).rev() {
        if let Some(d_y) = &upstream[0] {
            elementwise::add_assign(&ctx, &d_y[s.at(t, output)], &mut flow.d_h)?;
        }
        let c = if s.with_c { Some(MatRef::new(&memory.c[s.at(t, hidden)], s.batch, hidden)?) } else { None };
        let state = State { h: MatRef::new(&memory.h[s.at(t, output)], s.batch, output)?, c };
        let gates = MatMut::new(&mut memory.gates[s.at(t, s.gates)], s.batch, s.gates)?;
        let d_state = StateMut {
            h: MatMut::new(&mut flow.d_h, s.batch, output)?,
            c: if s.with_c { Some(MatMut::new(&mut flow.d_c, s.batch, hidden)?) } else { None },
        };
        let d_x = &mut flow.d_x[s.at(t, width)];
        let d_context = MatMut::new(d_x, s.batch, width)?.sub(0..s.batch, e..width);
        rnn::step_backward(&ctx, &cell, state, gates, d_state, Some(d_context))?;
        if let Some(d_inputs) = &upstream[1] {
            for (d_x, d_inputs) in
                d_x.chunks_exact_mut(width).zip(d_inputs[s.at(t, width)].chunks_exact(width))
            {
                elementwise::add_assign(&ctx, &d_inputs[e..], &mut d_x[e..])?;
            }
        }

        let q_t = &memory.query[s.at(t, s.attention)];
        let looked_at = attention_inputs(s, q_t, inputs, params.get(weights.v), |var| pass.nodes.value(var))?;
        let d_context = HeadsRef::new(&flow.d_x[s.at(t, width)][e..], s.context_layout())?;
        let alpha = HeadsRef::new(&memory.alpha[s.at(t, s.source)], s.step_layout(s.source))?;
        let d_q = &mut flow.d_query[s.at(t, s.attention)];
        let grads = attention::InputGrads {
            d_query: HeadsMut::new(d_q, s.step_layout(s.attention))?,
            d_keys: HeadsMut::new(&mut flow.d_keys, source_layout(s.attention))?,
            d_v: pass.grads.get_mut(weights.v),
        };
        let upstream = attention::OutputGrads { d_context, d_alpha: None };
        attention::backward(&ctx, &looked_at, alpha, upstream, grads)?;
        let d_q = MatRef::new(&flow.d_query[s.at(t, s.attention)], s.batch, s.attention)?;
        let d_h = MatMut::new(&mut flow.d_h, s.batch, output)?;
        gemm::gemm_packed(&ctx, d_q, &query, d_h, Accum::Add, &Epilogue::default())?;
    }
    Ok(())
}

/// What no step waits for, over all steps at once: the gradients of the annotations that were averaged, and of the embedded tokens.
fn input_gradients(
    pass: &mut BackwardPass<'_>,
    weights: &AdditiveDecoder,
    inputs: &AdditiveInputs,
    s: &Sizes,
    (memory, flow, d_inputs): (&Memory, &mut Flow, Option<&[f32]>),
) -> Result<(), ShapeError> {
    let (ctx, e, width, rows) = (pass.ctx, s.embedding, s.input(), s.rows());
    if rows == 0 {
        return Ok(());
    }
    let over_time = |len, width| HeadsLayout::seq_batch(len, s.batch, width);
    let alpha = HeadsRef::new(&memory.alpha, over_time(s.steps, s.source))?;
    let layout = HeadsLayout { seq: s.steps, ..s.context_layout() };
    let d_context = HeadsRef::new(&flow.d_x[e..], layout)?;
    let d_annotations = HeadsMut::new(&mut flow.d_annotations, over_time(s.source, s.context))?;
    attention::values_gradient(&ctx, alpha, d_context, &inputs.lengths, d_annotations)?;

    let of_tokens = cell_part(weights, pass.params, 0..e);
    let d_gates = MatRef::new(&memory.gates, rows, s.gates)?;
    let mut d_embedded = MatMut::new(&mut flow.d_x, rows, width)?.sub(0..rows, 0..e);
    rnn::input_gradient(&ctx, &of_tokens, d_gates, d_embedded.reborrow())?;
    let Some(d_inputs) = d_inputs else { return Ok(()) };
    for (row, d_inputs) in d_inputs.chunks_exact(width).enumerate() {
        elementwise::add_assign(&ctx, &d_inputs[..e], d_embedded.row_mut(row))?;
    }
    Ok(())
}

/// One product over all steps for each weight.
fn weight_gradients(
    pass: &mut BackwardPass<'_>,
    out: Var,
    weights: &AdditiveDecoder,
    s: &Sizes,
    (memory, flow): (&Memory, &Flow),
) -> Result<(), ShapeError> {
    let rows = s.rows();
    let d_gates = MatRef::new(&memory.gates, rows, s.gates)?;
    let h = MatRef::new(&memory.h, rows, s.output)?;
    let x = pass.nodes.matrix(out.after(1));
    let grads = weights.cell.grads(pass.params, pass.grads)?;
    rnn::weight_gradients(&pass.ctx, weights.cell.cell, d_gates, x, h, grads)?;
    let d_query = MatRef::new(&flow.d_query, rows, s.attention)?;
    let d_weight = MatMut::new(pass.grads.get_mut(weights.query), s.attention, s.output)?;
    gemm::gemm(&pass.ctx, d_query.t(), h, d_weight, Accum::Add, &Epilogue::default())
}
