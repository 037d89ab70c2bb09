//! What the passes on tiles of words share: operands as sums of bf16 parts in whole tiles, and their product.
//!
//! ```text
//! for i in 0..32 { for j in 0..32 { C[i][j] = Σ_k A[i][k]·B[k][j]      A and B in bf16, or in two parts of bf16 } }
//! ```
//! The tile unit multiplies them or, on AVX512-BF16 in `Medium`, dot products of pairs on vectors, for which a row of a tile is a vector ([`bf16_block`]). Where the CPU converts to
//! bf16 itself, that makes the tiles ([`tile_packing`]).
//!
//! `Medium` multiplies one part of each side, `High` keeps three products of two parts, as the matrix product does ([`crate::gemm::split`]). Sums are f32.
//! `Highest` stays with vectors: probabilities in three parts are as many conversions as the six products save time, and the softmax between the products, which
//! tiles do not touch, already takes longer than three of them. `High` by dot products would take three of them where f32 takes the time of two.
//!
//! - An element of a product depends on its own row of A and column of B alone, whatever fills the rest of the tiles, and steps of
//!   the depth that are all zero change nothing but the sign of a zero. So the bits of a row depend neither on the rows beside it nor on
//!   hidden keys, and one query of a decoding step in a tile of 16 rows has the bits of the full pass.
//! - What has no parts is multiplied in f32: a row that holds infinity, NaN or what rounds to a bf16 infinity is *odd*. The scores of an odd query or
//!   key are chains of f32 multiply-adds. An odd value is zero in its tiles, and p·v of the rows that see its key is added after them. Hidden keys
//!   and values may thus hold anything.
//! - Numbers below 2⁻¹²⁶ count as zero, and so does a second part that is.
//!
//! # Accuracy
//! With ε = 2·2⁻⁸ + 2⁻¹⁶ for `Medium` and 2⁻¹⁵ for `High`, up to terms of higher order and f32's own roundings:
//!
//! | | error, at most |
//! |---|---|
//! | score | `δ = ε·scale·Σ_d \|q_d\|·\|k_d\|` |
//! | log-sum-exp | the largest δ of the row |
//! | output | `(2·δ + ε)·Σ_j P_j·\|v_j\|` |
//!
//! Asserted by `attention::tests::tiles`.

use std::ops::Range;

use super::problem::KEY_BLOCK;
use super::stage;
use crate::context::{Context, Precision};
use crate::gemm::microkernel::amx::{BLOCK, SIDE, STEP, TILE_WORDS, TileBlock, TileUnit};
use crate::gemm::microkernel::{Storage, bf16_block};
use crate::gemm::split::{self, Magnitudes};
use crate::gemm::tile_packing;
use crate::isa::{Bf16Dots, Tiles};
use crate::scratch::ScratchBuf;
use crate::view::MatRef;

/// Elements of Q and O together that the rows of a forward pass hold while keys stream past: 4,096 rows of 64 + 64 are 1.5 MiB in `Medium` and 2 MiB in `High`,
/// about a second-level cache. Rows come back in order, which the hardware foresees, and each part packs all keys once (docs/decisions/003-attention.md).
pub(super) const HELD: usize = 512 * 1024;

/// What multiplies tiles of words.
#[derive(Clone, Copy)]
enum Means {
    Tiles(Tiles),
    Dots(Bf16Dots),
}

/// The proof that products of bf16 parts run, and how many parts an operand has.
#[derive(Clone, Copy)]
pub(super) struct OnTiles {
    means: Means,
    conversion: Bf16Dots,
    /// One for `Medium`, two for `High`.
    pub(super) parts: usize,
}

impl OnTiles {
    /// Whether `ctx` multiplies heads of `dim` elements as tiles of words; without elements there is nothing to multiply. Three dot products on vectors take longer than
    /// f32, so `High` asks for a tile unit.
    pub(super) fn of(ctx: &Context, dim: usize) -> Option<OnTiles> {
        let parts = match ctx.matmul_precision() {
            Precision::Medium => 1,
            Precision::High => 2,
            Precision::Strict | Precision::Highest => return None,
        };
        let dots = || ctx.isa().bf16_dots().filter(|_| parts == 1).map(Means::Dots);
        let means = ctx.isa().tiles().map(Means::Tiles).or_else(dots).filter(|_| dim > 0);
        Some(OnTiles { means: means?, conversion: ctx.isa().bf16_conversion()?, parts })
    }

    /// Multiplications take the time of this fraction of them in f32, the softmax counted in: for dealing work to threads. Of tiles it is not measured.
    pub(super) fn faster(self) -> usize {
        match self.means {
            Means::Tiles(_) => 4,
            Means::Dots(_) => 2,
        }
    }

    /// The proof that dot products on vectors multiply, if they do.
    pub(super) fn dots(self) -> Option<Bf16Dots> {
        match self.means {
            Means::Tiles(_) => None,
            Means::Dots(proof) => Some(proof),
        }
    }

    /// Makes this thread ready for products.
    pub(super) fn unit(self) -> Unit {
        let products = match self.means {
            Means::Tiles(tiles) => Products::Tiles(TileUnit::configure(tiles)),
            Means::Dots(proof) => Products::Dots(proof),
        };
        Unit { products, conversion: self.conversion }
    }
}

/// What packs and multiplies tiles of words on this thread.
pub(super) struct Unit {
    products: Products,
    /// The proof of conversions to bf16.
    conversion: Bf16Dots,
}

enum Products {
    /// The tile unit.
    Tiles(TileUnit),
    /// Dot products of pairs on vectors; one part only.
    Dots(Bf16Dots),
}

impl Unit {
    /// The proof for those who make one part on their way.
    #[inline(always)]
    pub(super) fn conversion<const P: usize>(&self) -> Option<Bf16Dots> {
        (P == 1).then_some(self.conversion)
    }
}

/// How a tile unit reads so many parts.
#[inline(always)]
pub(super) const fn storage(parts: usize) -> Storage {
    if parts == 1 { Storage::Bf16 } else { Storage::Split2 }
}

/// Steps of the tile unit for that depth.
#[inline(always)]
pub(super) const fn steps(depth: usize) -> usize {
    depth.div_ceil(STEP)
}

/// The steps of a block's keys that hold what is seen of it.
#[inline(always)]
pub(super) fn steps_of(seen: &Range<usize>, keys: &Range<usize>) -> Range<usize> {
    if seen.is_empty() {
        0..0
    } else {
        (seen.start - keys.start) / STEP..(seen.end - keys.start).div_ceil(STEP)
    }
}

/// Words of the left tiles of that many rows.
pub(super) fn left_words(rows: usize, depth: usize, parts: usize) -> usize {
    rows.next_multiple_of(SIDE) * split::column_words(depth, parts)
}

/// Words of the panels of that many columns.
pub(super) fn right_words(depth: usize, cols: usize, parts: usize) -> usize {
    cols.next_multiple_of(BLOCK) * split::column_words(depth, parts)
}

/// A row or column is odd when two parts do not stand for it, however many there are.
const ODD: Storage = Storage::Split2;

/// Rows as the left operand: 16 rows after 16 rows, step after step, part after part; odd rows are marked.
#[inline(always)]
pub(super) fn pack_left<const P: usize>(unit: &Unit, a: MatRef<'_>, tiles: &mut [u32], odd: &mut [bool]) {
    odd.fill(false);
    tile_packing::pack_left::<f32, P>(unit.conversion, a, tiles, ODD, odd);
}

/// Panels of a right operand; marks odd columns among the first of `odd`; whether there is any.
fn pack_panels<const P: usize>(unit: &Unit, b: MatRef<'_>, tiles: &mut [u32], odd: &mut [bool]) -> bool {
    let mut all = vec![false; b.cols()];
    tile_packing::pack_right::<f32, P>(unit.conversion, b, tiles, ODD, &mut all);
    odd.iter_mut().zip(&all).for_each(|(odd, of_all)| *odd = *of_all);
    all.contains(&true)
}

/// `b` [depth, cols] as the right operand, panel after panel of 32 columns; its odd rows are marked and are zero.
#[inline(always)]
pub(super) fn pack_right<const P: usize>(
    unit: &Unit,
    b: MatRef<'_>,
    tiles: &mut [u32],
    odd: &mut [bool; KEY_BLOCK],
) {
    odd.fill(false);
    if pack_panels::<P>(unit, b, tiles, &mut []) {
        let mut even = ScratchBuf::zeroed(b.rows() * b.cols());
        for (i, row) in even.chunks_exact_mut(b.cols()).enumerate() {
            odd[i] = !Magnitudes::of(b.row(i)).fit(ODD);
            if !odd[i] {
                row.copy_from_slice(b.row(i));
            }
        }
        let even = MatRef::new(&even, b.rows(), b.cols()).expect("a copy of b");
        pack_panels::<P>(unit, even, tiles, &mut []);
    }
}

/// Probabilities, or their gradients, of some rows of [`KEY_BLOCK`] scores and over some steps of keys, as the left operand, whatever they are: unlike
/// [`pack_left`] it looks at no magnitude.
///
/// # Panics
/// When `scores` or `tiles` is too short.
#[inline(always)]
pub(super) fn pack_score_rows<const P: usize>(
    unit: &Unit,
    scores: &[f32],
    (rows, seen): (usize, &Range<usize>),
    tiles: &mut [u32],
) {
    let scores = MatRef::with_strides(&scores[seen.start * STEP..], rows, seen.len() * STEP, KEY_BLOCK, 1);
    let scores = scores.expect("so many rows of scores");
    tile_packing::pack_left::<f32, P>(unit.conversion, scores, tiles, Storage::Bf16, &mut []);
}

/// Probabilities, or their gradients, as the right operand, whatever they are.
#[inline(always)]
pub(super) fn pack_scores<const P: usize>(unit: &Unit, scores: MatRef<'_>, tiles: &mut [u32]) {
    tile_packing::pack_right::<f32, P>(unit.conversion, scores, tiles, Storage::Bf16, &mut []);
}

/// One panel of columns `b` [depth, 32 or fewer] as the right operand; odd columns are marked.
#[inline(always)]
pub(super) fn pack_panel<const P: usize>(
    unit: &Unit,
    b: MatRef<'_>,
    tiles: &mut [u32],
    odd: &mut [bool; BLOCK],
) {
    pack_panels::<P>(unit, b, tiles, odd);
}

/// `b` [cols, depth], read across, as the right operand, panel after panel of 32 columns; its odd rows are marked.
#[inline(always)]
pub(super) fn pack_across<const P: usize>(
    unit: &Unit,
    b: MatRef<'_>,
    tiles: &mut [u32],
    odd: &mut [bool; KEY_BLOCK],
) {
    odd.fill(false);
    tile_packing::pack_right::<f32, P>(unit.conversion, b.t(), tiles, ODD, odd);
}

/// A tile of words with rows and columns exchanged.
#[inline(always)]
fn turn(from: &[u32; TILE_WORDS], to: &mut [u32; TILE_WORDS]) {
    let from = MatRef::new(pulp::bytemuck::cast_slice(from), SIDE, SIDE).expect("16 rows of 16 words");
    stage::transpose(from, pulp::bytemuck::cast_slice_mut(to), SIDE);
}

/// Panels of a right operand with `cols` columns, `deep` tiles for each 16, as tiles of the left operand that has these columns as rows.
#[inline(always)]
pub(super) fn turn_left(right: &[u32], left: &mut [u32], (cols, deep): (usize, usize)) {
    let (right, left) = (right.as_chunks::<TILE_WORDS>().0, left.as_chunks_mut::<TILE_WORDS>().0);
    for side in 0..cols.div_ceil(SIDE) {
        for at in 0..deep {
            turn(&right[(side / 2 * deep + at) * 2 + side % 2], &mut left[side * deep + at]);
        }
    }
}

/// What is multiplied: some rows of a left operand and one panel of a right one, over some steps of the depth.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    /// Left tiles, from the first of the rows on.
    pub(super) left: &'a [u32],
    /// Right tiles, from the panel on.
    pub(super) right: &'a [u32],
    /// Steps of both operands' depth.
    pub(super) steps: usize,
    /// At most 32.
    pub(super) rows: usize,
}

/// Writes `A·B`, 32 rows of 32 columns, to rows `stride` apart; rows from `rows` on are anything.
///
/// # Panics
/// When an operand or `to` is too short.
#[inline(always)]
pub(super) fn product<const P: usize>(
    unit: &Unit,
    operands: Operands<'_>,
    steps: Range<usize>,
    to: &mut [f32],
    stride: usize,
) {
    let Operands { left, right, steps: all, rows } = operands;
    let two_rows = rows > SIDE;
    let step = P * TILE_WORDS;
    assert!(steps.start < steps.end && steps.end <= all, "some steps of the operands");
    assert!(left.len() >= (1 + usize::from(two_rows)) * all * step && right.len() >= 2 * all * step);
    assert!(stride >= BLOCK && to.len() >= (BLOCK - 1) * stride + BLOCK, "room for 32 rows");
    let block = TileBlock {
        left: left[steps.start * step..].as_ptr(),
        left_stride: all * step,
        right: right[2 * steps.start * step..].as_ptr(),
        steps: steps.len(),
        two_rows,
    };
    let to = to.as_mut_ptr();
    match &unit.products {
        // SAFETY: the operands hold whole tiles for all steps and `to` 32 rows of 32, as asserted.
        Products::Tiles(unit) => unsafe { unit.sums_to(storage(P), &block, to, stride) },
        Products::Dots(_) if const { P > 1 } => unreachable!("dot products take one part"),
        // SAFETY: likewise.
        Products::Dots(proof) => unsafe { bf16_block::sums_to(*proof, &block, rows, to, stride) },
    }
}

/// A product of odd numbers: a chain of f32 multiply-adds.
pub(super) fn chain(a: impl Iterator<Item = f32>, b: impl Iterator<Item = f32>) -> f32 {
    a.zip(b).fold(0.0, |sum: f32, (a, b)| a.mul_add(b, sum))
}

/// `o += p·v` by f32 multiply-adds.
pub(super) fn add_scaled(p: f32, v: &[f32], o: &mut [f32]) {
    for (o, v) in o.iter_mut().zip(v) {
        *o = p.mul_add(*v, *o);
    }
}
