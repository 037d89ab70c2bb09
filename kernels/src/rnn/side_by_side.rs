//! Layers that do not wait for each other, at the same time: the two directions of one layer.
//!
//! Naively one runs after the other, each on all threads. Where a step is small its threads then meet at a barrier at every step,
//! or one of them has no row to work on. Here each layer gets its share of the threads from its first step to its last,
//! and nobody waits before the end. What is computed is the same, and no bit depends on threads.
//!
//! Each layer's `W_hh` must then find place beside the other's in the shared cache: from [`LARGE`] on, the layers still run one after the other.
//! Time one after the other on two threads / side by side on one each, Zen 3 with 32 MiB of third-level cache, the best of 3 to 60 runs
//! in alternation, batch × steps × hidden:
//!
//! | | 1×128×512 | 8×128×512 | 1×512×256 | 8×64×256 | 1×256×128 | 32×64×128 | 32×64×512 | 8×32×1024 | 1×64×1024 |
//! |---|--:|--:|--:|--:|--:|--:|--:|--:|--:|
//! | LSTM forward | 1.17 | 0.98 | 1.24 | 1.22 | 1.59 | 1.06 | 0.98 | 0.92 | 0.90 |
//! | LSTM forward + backward | 1.21 | 1.01 | 1.11 | 1.14 | 1.39 | 1.00 | 0.99 | 0.98 | 1.09 |
//! | GRU forward | 1.20 | 1.11 | 1.10 | 1.10 | 1.51 | 1.16 | 1.07 | | |
//! | GRU forward + backward | 1.16 | 1.07 | 1.26 | 1.14 | 1.59 | 1.29 | 1.13 | | |

use std::num::NonZeroUsize;

use crate::context::Context;
use crate::error::ShapeError;

use super::sequence::check_forward;
use super::sequence_backward::check_backward;
use super::{InputGrads, Output, OutputGrads, Saved, Sequence, State, Weights, backward, forward, infer};

/// Elements of a `W_hh` from which on two of them crowd each other out of the cache: 8 MiB.
const LARGE: usize = 2 << 20;
/// Floating-point operations of a layer's recurrence below which it is over before another thread is awake (about 50 µs).
const MIN_FLOPS: usize = 2_000_000;

/// What [`forward`] is given.
#[derive(Debug)]
pub struct ForwardPass<'a> {
    /// The weights of the layer.
    pub weights: Weights<'a>,
    /// Its inputs.
    pub sequence: Sequence<'a>,
    /// Its initial state; zeros for `None`.
    pub initial: Option<State<'a>>,
    /// What it writes.
    pub output: Output<'a>,
}

/// What [`backward`] is given.
pub struct BackwardPass<'a> {
    /// The weights of the layer.
    pub weights: Weights<'a>,
    /// Its inputs.
    pub sequence: Sequence<'a>,
    /// What its forward pass has saved.
    pub saved: Saved,
    /// The gradients of its outputs.
    pub upstream: OutputGrads<'a>,
    /// The gradients that it gives.
    pub grads: InputGrads<'a>,
}

/// [`forward`] for each of several layers, at the same time where that is faster.
///
/// # Shapes
/// Each as in [`forward`].
///
/// # Errors
/// [`ShapeError`] when those of any layer do not fit; nothing is written then.
///
/// The bits are those of [`forward`]: `rnn::tests::sequence`.
pub fn forward_all(ctx: &Context, passes: Vec<ForwardPass<'_>>) -> Result<Vec<Saved>, ShapeError> {
    each(ctx, passes, |ctx, ForwardPass { weights, sequence, initial, output }| {
        forward(ctx, &weights, &sequence, initial, output)
    })
}

/// [`infer`] for each of several layers, at the same time where that is faster.
///
/// # Shapes
/// Each as in [`infer`].
///
/// # Errors
/// [`ShapeError`] when those of any layer do not fit; nothing is written then.
///
/// The bits are those of [`forward`]: `rnn::tests::sequence`.
pub fn infer_all(ctx: &Context, passes: Vec<ForwardPass<'_>>) -> Result<(), ShapeError> {
    let done = each(ctx, passes, |ctx, ForwardPass { weights, sequence, initial, output }| {
        infer(ctx, &weights, &sequence, initial, output)
    });
    done.map(|_| ())
}

/// Runs each pass with its share of the threads.
fn each<T: Send>(
    ctx: &Context,
    passes: Vec<ForwardPass<'_>>,
    run: impl Fn(&Context, ForwardPass<'_>) -> Result<T, ShapeError> + Sync,
) -> Result<Vec<T>, ShapeError> {
    for ForwardPass { weights, sequence, initial, output } in &passes {
        check_forward(weights, sequence, *initial, output)?;
    }
    let (together, each) = share(ctx, passes.iter().map(|pass| (&pass.weights, &pass.sequence)));
    let mut results: Vec<Option<Result<T, ShapeError>>> = passes.iter().map(|_| None).collect();
    together.for_each_owned(passes.into_iter().zip(&mut results).collect(), |(pass, result)| {
        *result = Some(run(&each, pass));
    });
    results.into_iter().map(|result| result.expect("each layer has run")).collect()
}

/// [`backward`] for each of several layers, at the same time where that is faster.
///
/// # Shapes
/// Each as in [`backward`].
///
/// # Errors
/// [`ShapeError`] when those of any layer do not fit; nothing is written then.
///
/// The bits are those of [`backward`]: `rnn::tests::sequence`.
pub fn backward_all(ctx: &Context, passes: Vec<BackwardPass<'_>>) -> Result<(), ShapeError> {
    for BackwardPass { weights, sequence, saved, upstream, grads } in &passes {
        check_backward(weights, sequence, saved, upstream, grads)?;
    }
    let (together, each) = share(ctx, passes.iter().map(|pass| (&pass.weights, &pass.sequence)));
    let mut results: Vec<Result<(), ShapeError>> = passes.iter().map(|_| Ok(())).collect();
    together.for_each_owned(passes.into_iter().zip(&mut results).collect(), |(pass, result)| {
        let BackwardPass { weights, sequence, saved, upstream, grads } = pass;
        *result = backward(&each, &weights, &sequence, saved, upstream, grads);
    });
    results.into_iter().collect()
}

/// How the layers are dealt out, and how each of them runs.
fn share<'a>(
    ctx: &Context,
    layers: impl ExactSizeIterator<Item = (&'a Weights<'a>, &'a Sequence<'a>)>,
) -> (Context, Context) {
    let (count, threads) = (layers.len(), ctx.thread_count());
    let mut layers = layers;
    let fits = layers.all(|(weights, sequence)| {
        let steps = sequence.lengths.iter().sum::<usize>();
        let size = weights.w_hh.rows() * weights.w_hh.cols();
        size < LARGE && steps * weights.sizes().flops() >= MIN_FLOPS
    });
    match NonZeroUsize::new(threads / count.max(1)) {
        Some(part) if count > 1 && threads.is_multiple_of(count) && fits => (*ctx, ctx.threads(part)),
        _ => (ctx.single_threaded(), *ctx),
    }
}
