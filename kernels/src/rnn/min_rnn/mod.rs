//! minGRU and minLSTM: recurrences whose gates do not see the state, so that only a scan is left of the loop.
//!
//! ```text
//! minGRU    z = σ(a_z)                          minLSTM   f = σ(a_f)    i = σ(a_i)    z = i / (f + i)
//!           ñ = g(a_n)                                    ñ = g(a_n)
//! both      h[t] = h[t−1] + z[t]·(ñ[t] − h[t−1])          y[t] = h[t]
//! ```
//! All sums `a` come from one matrix product over all steps beforehand. What remains reads and writes each value
//! once: it is bound by memory, and every channel of every row is a chain of its own.
//!
//! - Vectors run along the channels, steps are visited in order; the state of a block of channels stays in
//!   the first-level cache.
//! - A task is a block of channels of one row: 256, or fewer where rows and blocks are fewer than threads, so that a single long
//!   sequence has a task for each thread. A channel's bits do not depend on the block that it stands in.
//! - Rejected: the logarithmic form (a cumulative log-sum-exp). It makes the scan parallel along the steps on
//!   a machine with thousands of lanes and needs ten times the work; here the direct form is exact enough
//!   (`h` is a convex combination) and the channels fill the lanes.
//! - Rejected: the direct form in chunks of steps, each scanned from zero on a thread of its own and then corrected by
//!   `h[start]·Π(1 − z)`. The corrected sum is rounded otherwise than the step by step one, so a sequence would have other bits in one
//!   piece than cut in two with the state carried over, unless the state were three vectors that know their place in a chunk; and
//!   it is not faster where it matters (measured beside `PARALLEL` in `scan`).
//!
//! A NaN stays in its row and channel. A minLSTM whose sums a_f and a_i are both so low that their sigmoids are 0 (below
//! about −88) divides 0 by 0, as the naive form in f32 does.
//!
//! # Layout
//! Time-major without gaps: gates `[seq, batch, G·hidden]` with columns `[z n]` (minGRU) or `[f i n]` (minLSTM).
//!
//! # Source
//! Feng, Tung, Ahmed, Bengio and Hajimirsadeghi 2024, *Were RNNs All We Needed?* (arXiv:2410.01201), sections 3.1 and
//! 3.2; the positive candidate is that of its appendix B.

mod scan;

pub use scan::Scan;

use pulp::{Simd, WithSimd};

use crate::context::Context;
use crate::error::ShapeError;
use crate::scratch::ScratchBuf;
use crate::view::{HeadsLayout, HeadsRef, MatMut, MatRef};
use crate::{lanes, math};

use scan::Task;

/// Which recurrence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MinCell {
    /// One gate; columns z, n.
    Gru,
    /// Two gates, normalised; columns f, i, n.
    Lstm,
}

impl MinCell {
    /// Blocks of `hidden` columns: 2 or 3.
    pub const fn gates(self) -> usize {
        match self {
            MinCell::Gru => 2,
            MinCell::Lstm => 3,
        }
    }
}

/// What the candidate is of its sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Candidate {
    /// ñ = a.
    #[default]
    Linear,
    /// ñ = a + ½ where a ≥ 0, else σ(a): positive, so that a logarithm of it exists.
    Positive,
}

impl Candidate {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, a: S::f32s) -> S::f32s {
        match self {
            Candidate::Linear => a,
            Candidate::Positive => {
                let negative = simd.less_than_f32s(a, simd.splat_f32s(0.0));
                let shifted = simd.add_f32s(a, simd.splat_f32s(0.5));
                simd.select_f32s(negative, math::sigmoid(simd, a), shifted)
            }
        }
    }

    /// The derivative, from the value: the positive candidate is below ½ exactly where its sum is below 0.
    #[inline(always)]
    fn derivative<S: Simd>(self, simd: S, n: S::f32s) -> S::f32s {
        let one = simd.splat_f32s(1.0);
        match self {
            Candidate::Linear => one,
            Candidate::Positive => {
                let negative = simd.less_than_f32s(n, simd.splat_f32s(0.5));
                simd.select_f32s(negative, math::sigmoid_derivative(simd, n), one)
            }
        }
    }
}

/// Runs the recurrence. `gates` holds the sums and becomes the activated gates, which [`backward`] wants.
///
/// # Shapes
/// gates `[seq, batch, G·hidden]`; initial (zeros when `None`) and last `[batch, hidden]`; y `[seq, batch, hidden]`.
/// Steps from a row's length on are never read; their y becomes zeros. `last` is the state after each row's last
/// step.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit or a length exceeds `seq`; nothing is written then.
///
/// Accuracy: at most twice the error of the naive f32 form against f64. The bits of a row depend neither on its batch
/// nor on padding nor on threads. Asserted by `rnn::tests::min_rnn`.
pub fn forward(
    ctx: &Context,
    scan: &Scan<'_>,
    gates: &mut [f32],
    initial: Option<&[f32]>,
    y: &mut [f32],
    last: Option<&mut [f32]>,
) -> Result<(), ShapeError> {
    scan.check(gates.len(), &[("y", y.len())])?;
    scan.check_state("initial", initial.map(<[f32]>::len))?;
    scan.check_state("last", last.as_ref().map(|last| last.len()))?;
    let mut own = last.is_none().then(|| ScratchBuf::take(scan.batch() * scan.hidden));
    let state = last.unwrap_or_else(|| own.as_deref_mut().unwrap_or_default());
    match initial {
        Some(initial) => state.copy_from_slice(initial),
        None => state.fill(0.0),
    }
    let y_layout = HeadsLayout::seq_batch(scan.seq, scan.batch(), scan.hidden);
    let (ctx, block) = scan.deal(ctx);
    let tasks = scan.tasks(block, gates, vec![(y, y_layout), (state, scan.state_layout())])?;
    ctx.for_each_owned(tasks, |task| ctx.isa().dispatch(Forward { scan: *scan, task }));
    Ok(())
}

struct Forward<'a> {
    scan: Scan<'a>,
    task: Task<'a>,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Forward { scan, task } = self;
        let length = scan.lengths[task.row];
        let candidate = scan.candidate;
        match scan.cell {
            MinCell::Gru => {
                let [mut z, mut n, mut y, mut h] = task.parts();
                for visit in 0..length {
                    let t = scan.step(visit, length);
                    lanes::visit(
                        simd,
                        [],
                        [z.row_mut(t), n.row_mut(t), h.row_mut(0), y.row_mut(t)],
                        #[inline(always)]
                        |[], [z, n, h, _]| {
                            let (z, n) = (math::sigmoid(simd, z), candidate.apply(simd, n));
                            let h = mix(simd, z, n, h);
                            [z, n, h, h]
                        },
                    );
                }
                clear(&mut y, length);
            }
            MinCell::Lstm => {
                let [mut f, mut i, mut n, mut y, mut h] = task.parts();
                for visit in 0..length {
                    let t = scan.step(visit, length);
                    lanes::visit(
                        simd,
                        [],
                        [f.row_mut(t), i.row_mut(t), n.row_mut(t), h.row_mut(0), y.row_mut(t)],
                        #[inline(always)]
                        |[], [f, i, n, h, _]| {
                            let (f, i) = (math::sigmoid(simd, f), math::sigmoid(simd, i));
                            let n = candidate.apply(simd, n);
                            let h = mix(simd, share(simd, f, i), n, h);
                            [f, i, n, h, h]
                        },
                    );
                }
                clear(&mut y, length);
            }
        }
    }
}

/// h + z·(ñ − h).
#[inline(always)]
fn mix<S: Simd>(simd: S, z: S::f32s, n: S::f32s, h: S::f32s) -> S::f32s {
    simd.mul_add_e_f32s(z, simd.sub_f32s(n, h), h)
}

/// i / (f + i).
#[inline(always)]
fn share<S: Simd>(simd: S, f: S::f32s, i: S::f32s) -> S::f32s {
    simd.div_f32s(i, simd.add_f32s(f, i))
}

/// Zeros in the padding.
#[inline(always)]
fn clear(rows: &mut MatMut<'_>, length: usize) {
    (length..rows.rows()).for_each(|t| rows.row_mut(t).fill(0.0));
}

/// What [`backward`] needs besides the scan.
#[derive(Debug, Clone, Copy)]
pub struct Upstream<'a> {
    /// The initial state that [`forward`] was given.
    pub initial: Option<&'a [f32]>,
    /// What [`forward`] wrote.
    pub y: &'a [f32],
    /// The gradient of y, `[seq, batch, hidden]`; padding is never read.
    pub d_y: &'a [f32],
    /// The gradient of the last state, `[batch, hidden]`; zeros when `None`.
    pub d_last: Option<&'a [f32]>,
}

/// Turns the activated gates that [`forward`] left into the gradients of their sums (zeros in the padding), and gives
/// the gradient of the initial state.
///
/// ```text
/// d = d_h + d_y[t]    d_z = d·(ñ − h[t−1])    d_n = d·z·g'    d_h = d·(1 − z)
/// minGRU: d_a_z = d_z·z(1 − z)        minLSTM: d_a_i = d_z·z(1 − z)·(1 − i)    d_a_f = −d_z·z(1 − z)·(1 − f)
/// ```
///
/// # Shapes
/// As [`forward`]; d_initial `[batch, hidden]`, overwritten.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit; nothing is written then.
pub fn backward(
    ctx: &Context,
    scan: &Scan<'_>,
    upstream: &Upstream<'_>,
    gates: &mut [f32],
    d_initial: Option<&mut [f32]>,
) -> Result<(), ShapeError> {
    scan.check(gates.len(), &[("y", upstream.y.len()), ("d_y", upstream.d_y.len())])?;
    scan.check_state("initial", upstream.initial.map(<[f32]>::len))?;
    scan.check_state("d_last", upstream.d_last.map(<[f32]>::len))?;
    scan.check_state("d_initial", d_initial.as_ref().map(|d| d.len()))?;
    let mut own = d_initial.is_none().then(|| ScratchBuf::take(scan.batch() * scan.hidden));
    let state = d_initial.unwrap_or_else(|| own.as_deref_mut().unwrap_or_default());
    match upstream.d_last {
        Some(d_last) => state.copy_from_slice(d_last),
        None => state.fill(0.0),
    }
    let zeros = upstream.initial.is_none().then(|| ScratchBuf::zeroed(scan.batch() * scan.hidden));
    let initial = upstream.initial.unwrap_or_else(|| zeros.as_deref().unwrap_or_default());
    let layout = HeadsLayout::seq_batch(scan.seq, scan.batch(), scan.hidden);
    let y = HeadsRef::new(upstream.y, layout)?;
    let d_y = HeadsRef::new(upstream.d_y, layout)?;
    let initial = MatRef::new(initial, scan.batch(), scan.hidden)?;
    let (ctx, block) = scan.deal(ctx);
    let tasks = scan.tasks(block, gates, vec![(state, scan.state_layout())])?;
    ctx.for_each_owned(tasks, |task| {
        let columns = task.channels.clone();
        let [y, d_y] = [y, d_y].map(|whole| whole.head(task.row, 0).sub(0..scan.seq, columns.clone()));
        let initial = &initial.row(task.row)[columns];
        ctx.isa().dispatch(Backward { scan: *scan, task, y, d_y, initial });
    });
    Ok(())
}

struct Backward<'a> {
    scan: Scan<'a>,
    task: Task<'a>,
    y: MatRef<'a>,
    d_y: MatRef<'a>,
    initial: &'a [f32],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Backward { scan, task, y, d_y, initial } = self;
        let length = scan.lengths[task.row];
        let candidate = scan.candidate;
        let before = |visit: usize| match visit.checked_sub(1) {
            Some(previous) => y.row(scan.step(previous, length)),
            None => initial,
        };
        match scan.cell {
            MinCell::Gru => {
                let [mut z, mut n, mut d_h] = task.parts();
                for visit in (0..length).rev() {
                    let t = scan.step(visit, length);
                    lanes::visit(
                        simd,
                        [before(visit), d_y.row(t)],
                        [z.row_mut(t), n.row_mut(t), d_h.row_mut(0)],
                        #[inline(always)]
                        |[h, d_y], [z, n, d_h]| {
                            let d = simd.add_f32s(d_h, d_y);
                            pull(simd, candidate, d, [z, n, h])
                        },
                    );
                }
                [z, n].iter_mut().for_each(|part| clear(part, length));
            }
            MinCell::Lstm => {
                let [mut f, mut i, mut n, mut d_h] = task.parts();
                let one = simd.splat_f32s(1.0);
                for visit in (0..length).rev() {
                    let t = scan.step(visit, length);
                    lanes::visit(
                        simd,
                        [before(visit), d_y.row(t)],
                        [f.row_mut(t), i.row_mut(t), n.row_mut(t), d_h.row_mut(0)],
                        #[inline(always)]
                        |[h, d_y], [f, i, n, d_h]| {
                            let d = simd.add_f32s(d_h, d_y);
                            let [d_sum, d_n, d_h] = pull(simd, candidate, d, [share(simd, f, i), n, h]);
                            let d_i = simd.mul_f32s(d_sum, simd.sub_f32s(one, i));
                            let d_f = simd.mul_f32s(d_sum, simd.sub_f32s(f, one));
                            [d_f, d_i, d_n, d_h]
                        },
                    );
                }
                [f, i, n].iter_mut().for_each(|part| clear(part, length));
            }
        }
    }
}

/// From `d`, the gradient of the new state: (∂/∂z)·z(1 − z), the gradient of the candidate's sum, that of the old state.
#[inline(always)]
fn pull<S: Simd>(simd: S, candidate: Candidate, d: S::f32s, [z, n, h]: [S::f32s; 3]) -> [S::f32s; 3] {
    let d_z = simd.mul_f32s(d, simd.sub_f32s(n, h));
    let through_z = simd.mul_f32s(d, z);
    [
        simd.mul_f32s(d_z, math::sigmoid_derivative(simd, z)),
        simd.mul_f32s(through_z, candidate.derivative(simd, n)),
        simd.sub_f32s(d, through_z),
    ]
}
