//! Additive (Bahdanau) attention over projected queries and keys.
//!
//! Naively the sums `q_t + k_s` are a tensor `[batch, T, S, A]` that is built, sent through tanh, multiplied with
//! v, masked, normalised, and multiplied with the values:
//! ```text
//! score[t, s] = Σ_a v[a]·tanh(q[t, a] + k[s, a])     s < length
//! α[t, ·]     = softmax(score[t, ·])                 0 from length on
//! context[t]  = Σ_s α[t, s]·values[s]
//! ```
//! What is done instead: the sum, tanh and the product with v are one pass over A whose result is a single
//! number, so nothing of size A is ever written; keys beyond a row's length are never touched; backward
//! computes tanh again, which costs less than to store and load `[batch, T, S, A]` values. A decoder calls it
//! with T = 1 once a step and with all steps at once when it can: the bits are the same.
//!
//! A row's results depend on nothing but the row: the same bits for any batch, padding and number of threads.
//!
//! # Source
//! Bahdanau, Cho and Bengio 2015 (arXiv:1409.0473), section 3.1 and appendix A.1.2.

use pulp::{Simd, WithSimd};

use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::gemm::{Accum, Epilogue, gemm};
use crate::lanes;
use crate::math;
use crate::rowwise::reduce;
use crate::scratch::ScratchBuf;
use crate::view::{HeadsLayout, HeadsMut, HeadsRef, MatMut, MatRef};

use super::check_lengths;
use super::plan::{matrix, matrix_mut};

/// What attention is computed from: tensors with one head, in any memory order
/// ([`HeadsLayout::seq_batch`] is time-major).
///
/// # Shapes
/// `query` `[batch, T, 1, A]`, `keys` `[batch, S, 1, A]`, `v` `[A]`, `values` `[batch, S, 1, E]`, `lengths` `[batch]`, each at
/// most S. Keys and values from the length on are never read.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Projected queries.
    pub query: HeadsRef<'a>,
    /// Projected keys.
    pub keys: HeadsRef<'a>,
    /// The vector that turns tanh of their sum into a score.
    pub v: &'a [f32],
    /// What is averaged.
    pub values: HeadsRef<'a>,
    /// How many keys of each batch entry count.
    pub lengths: &'a [usize],
}

/// The gradients that reach [`backward`].
#[derive(Debug, Clone, Copy)]
pub struct OutputGrads<'a> {
    /// Of the context, `[batch, T, 1, E]`.
    pub d_context: HeadsRef<'a>,
    /// Of α where something else uses it, `[batch, T, 1, S]`; what stands in the padding is ignored.
    pub d_alpha: Option<HeadsRef<'a>>,
}

/// The gradients that [`backward`] gives, shaped like [`Inputs`]. The query's is overwritten; the others are **added
/// to**, because a decoder comes back once a step. That of the values is [`values_gradient`], for all steps at once.
#[derive(Debug)]
pub struct InputGrads<'a> {
    /// Of the queries, overwritten.
    pub d_query: HeadsMut<'a>,
    /// Of the keys, added to.
    pub d_keys: HeadsMut<'a>,
    /// Of v, added to.
    pub d_v: &'a mut [f32],
}

impl Inputs<'_> {
    fn queries(&self) -> usize {
        self.query.layout().seq
    }

    fn keys_len(&self) -> usize {
        self.keys.layout().seq
    }

    fn check(&self) -> Result<(), ShapeError> {
        let (batch, width) = (self.lengths.len(), self.v.len());
        let (queries, keys) = (self.queries(), self.keys_len());
        expect_shape("query", self.query.layout(), [batch, queries, width])?;
        expect_shape("keys", self.keys.layout(), [batch, keys, width])?;
        expect_shape("values", self.values.layout(), [batch, keys, self.values.layout().dim])?;
        check_lengths(self.lengths, keys)
    }

    /// The threads that this much work is worth.
    fn context(&self, ctx: &Context) -> Context {
        let width = self.v.len() + self.values.layout().dim;
        let work = self.lengths.iter().sum::<usize>() * self.queries() * width;
        if work < MIN_PARALLEL_WORK { ctx.single_threaded() } else { *ctx }
    }
}

/// Elements of tanh and of context below which threads cost more than they give (about 40 µs of work).
const MIN_PARALLEL_WORK: usize = 1 << 16;

fn expect_shape(
    argument: &'static str,
    layout: &HeadsLayout,
    [batch, seq, dim]: [usize; 3],
) -> Result<(), ShapeError> {
    expect_dim(argument, "heads", 1, layout.heads)?;
    expect_dim(argument, "batch", batch, layout.batch)?;
    expect_dim(argument, "seq", seq, layout.seq)?;
    expect_dim(argument, "dim", dim, layout.dim)
}

/// Attention weights and contexts: see the [module](self) for the formula.
///
/// # Shapes
/// See [`Inputs`]; α `[batch, T, 1, S]`, context `[batch, T, 1, E]`, both overwritten. α is exactly 0 in the padding; for
/// length 0 both are zeros.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit or a length exceeds S; nothing is written then.
///
/// # Accuracy
/// Error against f64 at most twice that of the naive f32 form (`tests::additive_attention`).
pub fn forward(
    ctx: &Context,
    inputs: &Inputs<'_>,
    alpha: HeadsMut<'_>,
    context: HeadsMut<'_>,
) -> Result<(), ShapeError> {
    inputs.check()?;
    let (batch, queries) = (inputs.lengths.len(), inputs.queries());
    expect_shape("alpha", alpha.layout(), [batch, queries, inputs.keys_len()])?;
    expect_shape("context", context.layout(), [batch, queries, inputs.values.layout().dim])?;
    let outputs = alpha.into_heads().into_iter().zip(context.into_heads());
    let entries: Vec<Forward<'_>> = outputs
        .enumerate()
        .map(|(b, (alpha, context))| Forward { entry: Entry::new(inputs, b), alpha, context })
        .collect();
    inputs.context(ctx).for_each_owned(entries, |entry| ctx.isa().dispatch(entry));
    Ok(())
}

/// One batch entry without its padding.
struct Entry<'a> {
    query: MatRef<'a>,
    keys: MatRef<'a>,
    v: &'a [f32],
    values: MatRef<'a>,
    len: usize,
}

impl<'a> Entry<'a> {
    fn new(inputs: &Inputs<'a>, b: usize) -> Entry<'a> {
        let query = inputs.query.head(b, 0);
        let (keys, values) = (inputs.keys.head(b, 0), inputs.values.head(b, 0));
        Entry { query, keys, v: inputs.v, values, len: inputs.lengths[b] }
    }
}

struct Forward<'a> {
    entry: Entry<'a>,
    alpha: MatMut<'a>,
    context: MatMut<'a>,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Forward { entry: Entry { query, keys, v, values, len }, mut alpha, mut context } = self;
        for t in 0..query.rows() {
            let (weights, padding) = alpha.row_mut(t).split_at_mut(len);
            padding.fill(0.0);
            for (s, score) in weights.iter_mut().enumerate() {
                *score = lanes::sum_zip(
                    simd,
                    [query.row(t), keys.row(s), v],
                    #[inline(always)]
                    |[q, k, v]| simd.mul_f32s(v, math::tanh(simd, simd.add_f32s(q, k))),
                );
            }
            softmax(simd, weights);
            let context = context.row_mut(t);
            context.fill(0.0);
            for (s, &weight) in weights.iter().enumerate() {
                add_scaled(simd, weight, values.row(s), context);
            }
        }
    }
}

/// Scores to weights in place.
#[inline(always)]
fn softmax<S: Simd>(simd: S, scores: &mut [f32]) {
    let max = simd.splat_f32s(lanes::max(simd, scores));
    lanes::map_in_place(
        simd,
        scores,
        #[inline(always)]
        |x| math::exp(simd, simd.sub_f32s(x, max)),
    );
    let sum = simd.splat_f32s(lanes::sum(simd, scores));
    lanes::map_in_place(
        simd,
        scores,
        #[inline(always)]
        |x| simd.div_f32s(x, sum),
    );
}

/// `y += a·x`.
#[inline(always)]
fn add_scaled<S: Simd>(simd: S, a: f32, x: &[f32], y: &mut [f32]) {
    let a = simd.splat_f32s(a);
    lanes::update(
        simd,
        x,
        y,
        #[inline(always)]
        |x, y| simd.mul_add_e_f32s(a, x, y),
    );
}

/// The gradients of [`forward`] for all but the values, from the α that it gave.
///
/// ```text
/// d_α[s]     = d_context·values[s] (+ d_alpha)       d_score[s] = α[s]·(d_α[s] − Σ α·d_α)
/// d_k[s] += d_score[s]·v·(1 − tanh²(q + k[s]))       d_q = Σ_s of the same
/// d_v += Σ_s d_score[s]·tanh(q + k[s])
/// ```
/// # Shapes
/// See [`Inputs`], [`OutputGrads`], [`InputGrads`]. A row of length 0 has zero gradients.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit or a length exceeds S; nothing is written then.
///
/// # Accuracy
/// Error against f64 at most three times that of the naive f32 form (`tests::additive_attention`). `d_v` is summed
/// entry by entry in the order of the batch, for any number of threads.
pub fn backward(
    ctx: &Context,
    inputs: &Inputs<'_>,
    alpha: HeadsRef<'_>,
    upstream: OutputGrads<'_>,
    grads: InputGrads<'_>,
) -> Result<(), ShapeError> {
    check_backward(inputs, &alpha, &upstream, &grads)?;
    let (batch, width) = (inputs.lengths.len(), inputs.v.len());
    let InputGrads { d_query, d_keys, d_v } = grads;
    let mut d_v_parts = ScratchBuf::zeroed(batch * width);
    let mut rest = matrix_mut(&mut d_v_parts, batch, width);
    let outputs = d_query.into_heads().into_iter().zip(d_keys.into_heads());
    let mut entries = Vec::with_capacity(batch);
    for (b, (d_query, d_keys)) in outputs.enumerate() {
        let (d_v, below) = rest.split_rows(1);
        rest = below;
        entries.push(Backward {
            entry: Entry::new(inputs, b),
            alpha: alpha.head(b, 0),
            d_context: upstream.d_context.head(b, 0),
            d_alpha: upstream.d_alpha.map(|d| d.head(b, 0)),
            grads: EntryGrads { d_query, d_keys, d_v },
        });
    }
    inputs.context(ctx).for_each_owned(entries, |entry| ctx.isa().dispatch(entry));
    reduce::col_sum(ctx, matrix(&d_v_parts, batch, width), d_v)
}

fn check_backward(
    inputs: &Inputs<'_>,
    alpha: &HeadsRef<'_>,
    upstream: &OutputGrads<'_>,
    grads: &InputGrads<'_>,
) -> Result<(), ShapeError> {
    inputs.check()?;
    let (batch, width, dim) = (inputs.lengths.len(), inputs.v.len(), inputs.values.layout().dim);
    let (queries, keys) = (inputs.queries(), inputs.keys_len());
    expect_shape("alpha", alpha.layout(), [batch, queries, keys])?;
    expect_shape("d_context", upstream.d_context.layout(), [batch, queries, dim])?;
    if let Some(d_alpha) = &upstream.d_alpha {
        expect_shape("d_alpha", d_alpha.layout(), [batch, queries, keys])?;
    }
    expect_shape("d_query", grads.d_query.layout(), [batch, queries, width])?;
    expect_shape("d_keys", grads.d_keys.layout(), [batch, keys, width])?;
    expect_dim("d_v", "length", width, grads.d_v.len())
}

/// The gradients of one batch entry; `d_v` is its own part of the sum.
struct EntryGrads<'a> {
    d_query: MatMut<'a>,
    d_keys: MatMut<'a>,
    d_v: MatMut<'a>,
}

struct Backward<'a> {
    entry: Entry<'a>,
    alpha: MatRef<'a>,
    d_context: MatRef<'a>,
    d_alpha: Option<MatRef<'a>>,
    grads: EntryGrads<'a>,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let Entry { query, keys, v, values, len } = self.entry;
        let EntryGrads { d_query, d_keys, d_v } = &mut self.grads;
        let mut d_scores = ScratchBuf::take(len);
        for t in 0..query.rows() {
            let (alpha, d_context) = (&self.alpha.row(t)[..len], self.d_context.row(t));
            for (s, d_score) in d_scores.iter_mut().enumerate() {
                let direct = self.d_alpha.map_or(0.0, |d| d.row(t)[s]);
                *d_score = lanes::dot(simd, d_context, values.row(s)) + direct;
            }
            let mean = simd.splat_f32s(lanes::dot(simd, alpha, &d_scores));
            lanes::update(
                simd,
                alpha,
                &mut d_scores,
                #[inline(always)]
                |a, d| simd.mul_f32s(a, simd.sub_f32s(d, mean)),
            );
            d_query.row_mut(t).fill(0.0);
            for (s, &d_score) in d_scores.iter().enumerate() {
                let d_score = simd.splat_f32s(d_score);
                let outputs = [d_query.row_mut(t), d_keys.row_mut(s), d_v.row_mut(0)];
                lanes::visit(
                    simd,
                    [query.row(t), keys.row(s), v],
                    outputs,
                    #[inline(always)]
                    |[q, k, v], [d_q, d_k, d_v]| {
                        let tanh = math::tanh(simd, simd.add_f32s(q, k));
                        let d_tanh = simd.mul_f32s(d_score, v);
                        let d_sum = simd.mul_f32s(d_tanh, math::tanh_derivative(simd, tanh));
                        let d_v = simd.mul_add_e_f32s(d_score, tanh, d_v);
                        [simd.add_f32s(d_q, d_sum), simd.add_f32s(d_k, d_sum), d_v]
                    },
                );
            }
        }
    }
}

/// The gradient of the values: `d_values[s] += Σ_t α[t, s]·d_context[t]`.
///
/// A decoder goes back step by step and calls it once, with α and `d_context` of all steps: a product for each batch entry, where a pass
/// for each step would read and write all of `d_values` every time.
///
/// # Shapes
/// α `[batch, T, 1, S]`, d_context `[batch, T, 1, E]`, d_values `[batch, S, 1, E]`, **added to**; lengths `[batch]`, each at most S. What stands from
/// the length on is neither read nor written.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit or a length exceeds S; nothing is written then.
///
/// # Accuracy
/// As [`backward`]. A row's sum over t goes in order; threads and batch change no bit.
pub fn values_gradient(
    ctx: &Context,
    alpha: HeadsRef<'_>,
    d_context: HeadsRef<'_>,
    lengths: &[usize],
    d_values: HeadsMut<'_>,
) -> Result<(), ShapeError> {
    let (batch, steps) = (lengths.len(), d_context.layout().seq);
    let (keys, dim) = (d_values.layout().seq, d_values.layout().dim);
    expect_shape("alpha", alpha.layout(), [batch, steps, keys])?;
    expect_shape("d_context", d_context.layout(), [batch, steps, dim])?;
    expect_shape("d_values", d_values.layout(), [batch, keys, dim])?;
    check_lengths(lengths, keys)?;
    let work = lengths.iter().sum::<usize>() * steps * dim;
    let threads = if work < MIN_PARALLEL_WORK { ctx.single_threaded() } else { *ctx };
    let alone = ctx.single_threaded();
    let entries: Vec<_> = d_values.into_heads().into_iter().enumerate().collect();
    threads.for_each_owned(entries, |(b, d_values)| {
        let alpha = alpha.head(b, 0).sub(0..steps, 0..lengths[b]).t();
        let d_values = d_values.sub(0..lengths[b], 0..dim);
        gemm(&alone, alpha, d_context.head(b, 0), d_values, Accum::Add, &Epilogue::default())
            .expect("shapes were checked above");
    });
    Ok(())
}
