//! The way back through [`super::additive_decoder`].

use kavanam_kernels::gemm::{self, Accum, Epilogue, PackedWeights};
use kavanam_kernels::rnn::additive_attention as attention;
use kavanam_kernels::rnn::{self, PackedBackward, State, StateMut};
use kavanam_kernels::rowwise::elementwise;
use kavanam_kernels::{Context, HeadsLayout, HeadsMut, HeadsRef, MatMut, MatRef, ShapeError};

use super::{AdditiveDecoder, AdditiveInputs, Memory, Sizes, attention_inputs};
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
            d_h: pool.zeroed(s.batch * s.hidden),
            d_c: pool.zeroed(if s.with_c { s.batch * s.hidden } else { 0 }),
            d_x: pool.take(s.rows() * s.input()),
            d_query: pool.take(s.rows() * s.attention),
            d_keys: to_add_to(pass, inputs.keys),
            d_annotations: to_add_to(pass, inputs.annotations),
        };
        go_back(pass, &weights, &inputs, &s, (&mut memory, &mut flow, &upstream))?;
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
    let (e, width, hidden) = (s.embedding, s.input(), s.hidden);
    let cell = PackedBackward::pack(&ctx, &weights.cell.views(params))?;
    let query = PackedWeights::pack(&ctx, params.matrix(weights.query))?;
    let source_layout = |width| HeadsLayout::seq_batch(s.source, s.batch, width);
    for t in (0..s.steps).rev() {
        if let Some(d_y) = &upstream[0] {
            elementwise::add_assign(&ctx, &d_y[s.at(t, hidden)], &mut flow.d_h)?;
        }
        let c = if s.with_c { Some(MatRef::new(&memory.c[s.at(t, hidden)], s.batch, hidden)?) } else { None };
        let state = State { h: MatRef::new(&memory.h[s.at(t, hidden)], s.batch, hidden)?, c };
        let gates = MatMut::new(&mut memory.gates[s.at(t, s.gates)], s.batch, s.gates)?;
        let d_state = StateMut {
            h: MatMut::new(&mut flow.d_h, s.batch, hidden)?,
            c: if s.with_c { Some(MatMut::new(&mut flow.d_c, s.batch, hidden)?) } else { None },
        };
        let d_x = &mut flow.d_x[s.at(t, width)];
        rnn::step_backward(&ctx, &cell, state, gates, d_state, Some(MatMut::new(d_x, s.batch, width)?))?;
        if let Some(d_inputs) = &upstream[1] {
            elementwise::add_assign(&ctx, &d_inputs[s.at(t, width)], d_x)?;
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
            d_values: HeadsMut::new(&mut flow.d_annotations, source_layout(s.context))?,
        };
        let upstream = attention::OutputGrads { d_context, d_alpha: None };
        attention::backward(&ctx, &looked_at, alpha, upstream, grads)?;
        let d_q = MatRef::new(&flow.d_query[s.at(t, s.attention)], s.batch, s.attention)?;
        let d_h = MatMut::new(&mut flow.d_h, s.batch, hidden)?;
        gemm::gemm_packed(&ctx, d_q, &query, d_h, Accum::Add, &Epilogue::default())?;
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
    let h = MatRef::new(&memory.h, rows, s.hidden)?;
    let x = pass.nodes.matrix(out.after(1));
    let grads = weights.cell.grads(pass.params, pass.grads)?;
    rnn::weight_gradients(&pass.ctx, weights.cell.cell, d_gates, x, h, grads)?;
    let d_query = MatRef::new(&flow.d_query, rows, s.attention)?;
    let d_weight = MatMut::new(pass.grads.get_mut(weights.query), s.attention, s.hidden)?;
    gemm::gemm(&pass.ctx, d_query.t(), h, d_weight, Accum::Add, &Epilogue::default())
}
