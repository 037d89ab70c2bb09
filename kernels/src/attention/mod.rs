//! Scaled dot-product attention in the manner of FlashAttention: forward, backward, probabilities.
//!
//! ```text
//! s_ij = scale·q_i·k_j + bias_ij       P = softmax_j(s) over the keys that row i sees       O = (P ∘ z)·V
//! ```
//!
//! z is 1 without dropout of the probabilities ([`ScoreDropout`]), and 0 or 1/(1 − p) with it.
//!
//! # Shapes
//! q [batch, seq_q, heads, dim], k [batch, seq_k, kv_heads, dim], v [batch, seq_k, kv_heads, v_dim], in any
//! memory order that a [`HeadsLayout`](crate::view::HeadsLayout) can name: a slice of a fused projection needs
//! no copy. `heads` is a multiple of `kv_heads`; query head `h` reads key head `h / (heads / kv_heads)`.
//! Any dimension may be 0.
//!
//! # Precision
//! On a CPU with tiles, `Medium` and `High` multiply bf16 parts with f32 sums in the two products of the forward pass and of
//! decoding and in the five of the backward pass, one part or two of each operand; probabilities, maxima and sums stay f32. Where there are no tiles but dot
//! products of bf16 (AVX512-BF16), `Medium` takes those, in the same tiles of words.
//! Everything else, `Strict` and `Highest` among it, [`probabilities()`], and caches of int8, runs on f32 vectors. [`kernel_name`]
//! says which.
//!
//! # Contract
//! - Same bits for any number of threads, for any batch that a sequence stands in, padded to any length
//!   (with `key_lengths`), packed without padding ([`forward_packed`]) or not, and for a row of a causal pass or of a decoding step with the keys so far.
//! - A row that sees no key, or only keys with bias −∞, gives zeros, lse −∞ and zero gradients. Keys beyond
//!   `key_lengths` are never read into a result; other hidden keys, and the rows of Q and dO that do
//!   not see a key, must be finite, but on tiles they may be anything.
//! - A NaN or +∞ among the visible scores of a row makes that row NaN.
//! - Memory beyond inputs and outputs: one block of keys, one tile of scores and some rows of a head (up to 1.5 MiB; of packed rows in the
//!   backward pass of `Medium` and `High` up to 4 MiB) a thread.
//!
//! # Accuracy
//! On vectors: error against f64 at most twice that of the naive form in f32, gradients three times
//! (tests `attention::tests`). On tiles, with ε = 2⁻⁷ (`Medium`) or 2⁻¹⁵ (`High`) and δ = ε·scale·max_j Σ_d |q_d|·|k_d|, up to terms of higher order and f32's
//! roundings: a score δ, the log-sum-exp δ, the output (2·δ + ε)·Σ_j P_j·|v_j| (tests `attention::tests::tiles`); for gradients see `attention::backward_tiles`.

mod backward_held;
mod backward_operands;
mod backward_sums;
mod backward_tile;
mod backward_tiles;
mod backward_weights;
mod blocks;
pub mod cache;
mod chunk;
mod conversion;
mod decode;
mod decode_dots;
mod decode_tasks;
mod decode_tiles;
mod decode_vectors;
mod dropout;
mod flash;
mod flash_backward;
mod flash_tiles;
mod flash_vectors;
mod mask;
mod on_tiles;
mod online;
mod packed;
mod probabilities;
mod problem;
mod regions;
mod stage;
mod stored;
#[cfg(test)]
mod tests;
mod tile;

pub use blocks::{BigBird, BlockList};
pub use decode::{Part, decode};
pub use dropout::ScoreDropout;
pub use mask::{Alibi, Bias, Causal, Mask, Window};
pub use packed::{Packed, backward_packed, forward_packed};

use flash::Forward;
use flash_backward::Backward;
use on_tiles::OnTiles;
use problem::{Shape, Shared};

use crate::context::{Context, Precision};
use crate::error::{ShapeError, expect_dim};
use crate::view::{HeadsMut, HeadsRef, MatMut};

/// What is computed: the scale of the scores and the mask.
#[derive(Debug, Clone, Copy)]
pub struct AttentionSpec<'a> {
    /// Multiplies q·k; 1/√dim in the paper.
    pub scale: f32,
    /// What is hidden, and the bias.
    pub mask: Mask<'a>,
}

impl AttentionSpec<'_> {
    /// Scale 1/√`dim`, nothing hidden.
    pub fn scaled(dim: usize) -> AttentionSpec<'static> {
        AttentionSpec { scale: 1.0 / (dim.max(1) as f32).sqrt(), mask: Mask::none() }
    }

    /// The same with a mask.
    #[must_use]
    pub fn with_mask(self, mask: Mask<'_>) -> AttentionSpec<'_> {
        AttentionSpec { scale: self.scale, mask }
    }
}

/// What attention reads.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries [batch, seq_q, heads, dim].
    pub q: HeadsRef<'a>,
    /// Keys [batch, seq_k, kv_heads, dim].
    pub k: HeadsRef<'a>,
    /// Values [batch, seq_k, kv_heads, v_dim].
    pub v: HeadsRef<'a>,
}

/// What the backward pass needs of the forward pass: its inputs and outputs.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// Queries.
    pub q: HeadsRef<'a>,
    /// Keys.
    pub k: HeadsRef<'a>,
    /// Values.
    pub v: HeadsRef<'a>,
    /// The output of [`forward`].
    pub out: HeadsRef<'a>,
    /// The log-sum-exp of [`forward`], [batch, heads, seq_q].
    pub lse: &'a [f32],
}

/// Where the gradients go, each of the shape of what it is the gradient of.
#[derive(Debug)]
pub struct Grads<'a> {
    /// Of the queries; overwritten.
    pub d_q: HeadsMut<'a>,
    /// Of the keys; overwritten.
    pub d_k: HeadsMut<'a>,
    /// Of the values; overwritten.
    pub d_v: HeadsMut<'a>,
    /// Of the additive bias, [bias heads, seq_q, seq_k]; added to, as a parameter's gradient is.
    pub d_bias: Option<&'a mut [f32]>,
}

/// Attention: `out = softmax(scale·Q·Kᵀ + bias)·V` and the log-sum-exp of each row's scores.
///
/// # Shapes
/// out [batch, seq_q, heads, v_dim]; lse [batch, heads, seq_q]; the rest as in the [module](self).
///
/// # Errors
/// [`ShapeError`] when shapes do not fit; nothing has been written then.
///
/// # Source
/// Dao 2023, *FlashAttention-2*, algorithm 1; Milakov & Gimelshein 2018 for the online softmax.
pub fn forward(
    ctx: &Context,
    inputs: &Inputs<'_>,
    spec: &AttentionSpec<'_>,
    out: HeadsMut<'_>,
    lse: &mut [f32],
) -> Result<(), ShapeError> {
    let Inputs { q, k, v } = *inputs;
    let shape = Shape::of(&q, &k, &v)?;
    shape.expect_out("out", out.layout())?;
    shape.expect_mask(&spec.mask)?;
    expect_dim("lse", "elements", shape.rows()?, lse.len())?;
    flash::run(ctx, &[Forward { shape, q, k, v, spec: *spec, out: &out, lse: Shared::new(lse) }]);
    Ok(())
}

/// The gradients of [`forward`] with respect to q, k, v and, when asked for, the bias.
///
/// # Shapes
/// d_out as `out`; each gradient as its input.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit, or when a bias gradient is asked for without a bias; nothing has been
/// written then.
///
/// # Source
/// Dao 2023, *FlashAttention-2*, algorithm 2.
pub fn backward(
    ctx: &Context,
    saved: &Saved<'_>,
    d_out: HeadsRef<'_>,
    spec: &AttentionSpec<'_>,
    grads: Grads<'_>,
) -> Result<(), ShapeError> {
    let shape = check_backward(saved, &d_out, spec, &grads)?;
    let (d_q, d_k, d_v) = (&grads.d_q, &grads.d_k, &grads.d_v);
    let d_bias = grads.d_bias.map(Shared::new);
    flash_backward::run(ctx, &[Backward { shape, saved, d_out, spec: *spec, d_q, d_k, d_v, d_bias }]);
    Ok(())
}

/// The shape that all arguments of a backward pass agree on.
fn check_backward(
    saved: &Saved<'_>,
    d_out: &HeadsRef<'_>,
    spec: &AttentionSpec<'_>,
    grads: &Grads<'_>,
) -> Result<Shape, ShapeError> {
    let shape = Shape::of(&saved.q, &saved.k, &saved.v)?;
    shape.expect_out("out", saved.out.layout())?;
    shape.expect_out("d_out", d_out.layout())?;
    shape.expect_mask(&spec.mask)?;
    expect_dim("lse", "elements", shape.rows()?, saved.lse.len())?;
    shape.expect("d_q", grads.d_q.layout(), shape.seq_q, shape.heads, shape.dim)?;
    shape.expect("d_k", grads.d_k.layout(), shape.seq_k, shape.kv_heads, shape.dim)?;
    shape.expect("d_v", grads.d_v.layout(), shape.seq_k, shape.kv_heads, shape.v_dim)?;
    if let Some(d_bias) = &grads.d_bias {
        let len = spec.mask.bias.map_or(0, |bias| bias.values.len());
        expect_dim("d_bias", "elements", len, d_bias.len())?;
    }
    Ok(shape)
}

/// The name of the kernel whose products [`forward`], [`backward`] and [`decode()`] compute on heads of `dim` elements, as in [`crate::gemm::kernels`].
pub fn kernel_name(ctx: &Context, dim: usize) -> &'static str {
    let on_tiles = OnTiles::of(ctx, dim).is_some();
    let precision = if on_tiles { ctx.matmul_precision() } else { Precision::Strict };
    crate::gemm::kernel_name(&ctx.precision(precision))
}

/// The probabilities of one query head of one sequence, named by `(batch, head)`: `out[i][j] = P_ij`, 0 where
/// hidden.
///
/// # Shapes
/// out [seq_q, seq_k].
///
/// # Errors
/// [`ShapeError`] when shapes do not fit, there is no such sequence or head, or the rows of `out` are not
/// contiguous.
pub fn probabilities(
    ctx: &Context,
    q: HeadsRef<'_>,
    k: HeadsRef<'_>,
    spec: &AttentionSpec<'_>,
    (batch, head): (usize, usize),
    out: MatMut<'_>,
) -> Result<(), ShapeError> {
    let shape = Shape::of_scores(&q, &k)?;
    shape.expect_mask(&spec.mask)?;
    for (argument, index, len) in [("batch", batch, shape.batch), ("head", head, shape.heads)] {
        if index >= len {
            return Err(ShapeError::Index { argument, position: 0, index, len });
        }
    }
    expect_dim("out", "rows", shape.seq_q, out.rows())?;
    expect_dim("out", "cols", shape.seq_k, out.cols())?;
    out.expect_contiguous_rows("out")?;
    let (q, k) = (q.head(batch, head), k.head(batch, head / shape.group()));
    ctx.isa().dispatch(probabilities::Probabilities { shape, q, k, spec: *spec, batch, head, out });
    Ok(())
}
