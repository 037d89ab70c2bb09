//! Cross entropy of a linear projection, whose logits are never stored whole.
//!
//! ```text
//! forward:   logits = x·Wᵀ + b;   losses = cross_entropy(logits)
//! backward:  d_logits = cross_entropy′(logits);   d_x = d_logits·W;   d_W += d_logitsᵀ·x;   d_b += Σ rows
//! ```
//! That is the naive form. With 32,000 classes the logits of 4,096 tokens take 500 MB, and their gradient as much.
//! Here the rows go by chunks whose logits hold at most 2²³ elements; the
//! next chunk takes their place.
//! - Backward makes the logits again: a product more than three, but forward and backward stay two calls. Who knows
//!   d_loss beforehand, as training with one loss at the end does, takes [`forward_and_backward`], which makes them once.
//! - A chunk is not smaller because each chunk packs all of W, for which 256 rows pay with a tenth of their products.
//! - The number of rows in a chunk depends on the classes alone. It is part of the numerical result of d_W, which adds
//!   chunk by chunk; losses and d_x have the bits of the naive form.

use super::cross_entropy::{self, CrossEntropy};
use super::reduce;
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::gemm::{Accum, Epilogue, gemm};
use crate::scratch::ScratchBuf;
use crate::view::{MatMut, MatRef};

/// Logits that are held at a time: 32 MiB.
const HELD: usize = 1 << 23;

/// The fewest and the most rows of a chunk.
const ROWS: [usize; 2] = [64, 4096];

/// The linear map before the softmax.
#[derive(Debug, Clone, Copy)]
pub struct Projection<'a> {
    /// What is projected, `[rows, dim]`.
    pub x: MatRef<'a>,
    /// `[classes, dim]`.
    pub weight: MatRef<'a>,
    /// `[classes]`.
    pub bias: Option<&'a [f32]>,
}

/// Where the gradients go.
#[derive(Debug)]
pub struct Grads<'a> {
    /// `[rows, dim]`; overwritten.
    pub d_x: MatMut<'a>,
    /// `[classes, dim]`; added to.
    pub d_weight: MatMut<'a>,
    /// `[classes]`; added to.
    pub d_bias: Option<&'a mut [f32]>,
}

impl Projection<'_> {
    fn classes(&self) -> usize {
        self.weight.rows()
    }

    fn check(&self, targets: &[u32], spec: &CrossEntropy) -> Result<(), ShapeError> {
        expect_dim("weight", "columns", self.x.cols(), self.weight.cols())?;
        if let Some(bias) = self.bias {
            expect_dim("bias", "length", self.classes(), bias.len())?;
        }
        spec.check_targets(self.x.rows(), self.classes(), targets)
    }

    fn rows_per_chunk(&self) -> usize {
        (HELD / self.classes().max(1)).clamp(ROWS[0], ROWS[1])
    }

    /// Calls `each` with the rows and the logits of every chunk of `rows_per_chunk` rows.
    fn for_each_chunk(
        &self,
        ctx: &Context,
        rows_per_chunk: usize,
        mut each: impl FnMut(std::ops::Range<usize>, MatRef<'_>) -> Result<(), ShapeError>,
    ) -> Result<(), ShapeError> {
        let (rows, dim, classes) = (self.x.rows(), self.x.cols(), self.classes());
        let mut logits = ScratchBuf::take(rows.min(rows_per_chunk) * classes);
        let epilogue = self.bias.map_or(Epilogue::new(), |bias| Epilogue::new().bias(bias));
        for first in (0..rows).step_by(rows_per_chunk) {
            let chunk = first..(first + rows_per_chunk).min(rows);
            let x = self.x.sub(chunk.clone(), 0..dim);
            let logits = &mut logits[..chunk.len() * classes];
            let to = MatMut::new(logits, chunk.len(), classes)?;
            gemm(ctx, x, self.weight.t(), to, Accum::Overwrite, &epilogue)?;
            let logits = MatRef::new(logits, chunk.len(), classes)?;
            each(chunk, logits)?;
        }
        Ok(())
    }
}

/// `losses[i]` = cross entropy of `x[i]·Wᵀ + b`; see [`cross_entropy::forward`].
///
/// # Shapes
/// x `[rows, dim]`, weight `[classes, dim]`, bias `[classes]`; targets, losses `[rows]`.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit, or as [`cross_entropy::forward`]. Nothing has been written then.
///
/// Accuracy: the bits of the product and the loss apart (`rowwise::tests::projected`).
pub fn forward(
    ctx: &Context,
    projection: &Projection<'_>,
    targets: &[u32],
    spec: &CrossEntropy,
    losses: &mut [f32],
) -> Result<(), ShapeError> {
    projection.check(targets, spec)?;
    expect_dim("losses", "length", projection.x.rows(), losses.len())?;
    projection.for_each_chunk(ctx, projection.rows_per_chunk(), |rows, logits| {
        cross_entropy::forward(ctx, logits, &targets[rows.clone()], spec, &mut losses[rows])
    })
}

/// The gradients of [`forward`], one `d_loss` a row.
///
/// # Shapes
/// d_loss `[rows]`; each gradient as what it is the gradient of.
///
/// # Errors
/// As [`forward`].
///
/// Accuracy: d_x has the bits of the product and the loss apart; d_weight is a sum over chunks of theirs
/// (`rowwise::tests::projected`).
pub fn backward(
    ctx: &Context,
    projection: &Projection<'_>,
    targets: &[u32],
    spec: &CrossEntropy,
    d_loss: &[f32],
    grads: Grads<'_>,
) -> Result<(), ShapeError> {
    let rows_per_chunk = projection.rows_per_chunk();
    backward_in_chunks(ctx, projection, (targets, spec, d_loss), None, grads, rows_per_chunk)
}

/// [`forward`] and [`backward`] in one call, for a `d_loss` that depends on no loss: the logits are made once.
///
/// # Shapes
/// As in both.
///
/// # Errors
/// As both.
///
/// Accuracy: the bits of both (`rowwise::tests::projected`).
pub fn forward_and_backward(
    ctx: &Context,
    projection: &Projection<'_>,
    targets: &[u32],
    (spec, d_loss): (&CrossEntropy, &[f32]),
    losses: &mut [f32],
    grads: Grads<'_>,
) -> Result<(), ShapeError> {
    let rows_per_chunk = projection.rows_per_chunk();
    backward_in_chunks(ctx, projection, (targets, spec, d_loss), Some(losses), grads, rows_per_chunk)
}

/// [`backward`] with chunks of another size, and the losses on the way where they are asked for.
pub(super) fn backward_in_chunks(
    ctx: &Context,
    projection: &Projection<'_>,
    (targets, spec, d_loss): (&[u32], &CrossEntropy, &[f32]),
    mut losses: Option<&mut [f32]>,
    grads: Grads<'_>,
    rows_per_chunk: usize,
) -> Result<(), ShapeError> {
    let Grads { mut d_x, mut d_weight, mut d_bias } = grads;
    let (rows, dim, classes) = (projection.x.rows(), projection.x.cols(), projection.classes());
    projection.check(targets, spec)?;
    expect_dim("d_loss", "length", rows, d_loss.len())?;
    if let Some(losses) = &losses {
        expect_dim("losses", "length", rows, losses.len())?;
    }
    expect_dim("d_x", "rows", rows, d_x.rows())?;
    expect_dim("d_x", "columns", dim, d_x.cols())?;
    expect_dim("d_weight", "rows", classes, d_weight.rows())?;
    expect_dim("d_weight", "columns", dim, d_weight.cols())?;
    if let Some(d_bias) = &d_bias {
        expect_dim("d_bias", "length", classes, d_bias.len())?;
    }
    let plain = Epilogue::new();
    let mut d_logits = ScratchBuf::take(rows.min(rows_per_chunk) * classes);
    projection.for_each_chunk(ctx, rows_per_chunk, |rows, logits| {
        let d_logits = &mut d_logits[..rows.len() * classes];
        let to = MatMut::new(d_logits, rows.len(), classes)?;
        if let Some(losses) = &mut losses {
            cross_entropy::forward(ctx, logits, &targets[rows.clone()], spec, &mut losses[rows.clone()])?;
        }
        cross_entropy::backward(ctx, logits, &targets[rows.clone()], spec, &d_loss[rows.clone()], to)?;
        let d_logits = MatRef::new(d_logits, rows.len(), classes)?;
        let x = projection.x.sub(rows.clone(), 0..dim);
        let d_x = d_x.reborrow().sub(rows, 0..dim);
        gemm(ctx, d_logits, projection.weight, d_x, Accum::Overwrite, &plain)?;
        gemm(ctx, d_logits.t(), x, d_weight.reborrow(), Accum::Add, &plain)?;
        match &mut d_bias {
            Some(d_bias) => reduce::col_sum(ctx, d_logits, d_bias),
            None => Ok(()),
        }
    })
}
