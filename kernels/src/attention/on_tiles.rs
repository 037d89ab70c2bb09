//! What the passes on tiles of words share: operands as sums of bf16 parts in whole tiles, and their product.
//!
//! ```text
//! for i in 0..32 { for j in 0..32 { C[i][j] = Σ_k A[i][k]·B[k][j]      A and B in bf16, or in two parts of bf16 } }
//! ```
//! The tile unit multiplies them or, on AVX512-BF16 in `Medium`, dot products of pairs on vectors, for which a row of a tile is a vector ([`bf16_block`]). Where the CPU converts to
//! bf16 itself, that makes the tiles of one part ([`conversion`]).
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

use pulp::{Simd, WithSimd};

use super::problem::KEY_BLOCK;
use super::{conversion, stage};
use crate::context::{Context, Precision};
use crate::gemm::microkernel::amx::{BLOCK, SIDE, STEP, TILE_WORDS, TileBlock, TileUnit};
use crate::gemm::microkernel::{Storage, bf16_block};
use crate::gemm::split::{self, Magnitudes};
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
    conversion: Option<Bf16Dots>,
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
        means.map(|means| OnTiles { means, conversion: ctx.isa().bf16_conversion(), parts })
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
    /// The CPU's own conversion to bf16.
    conversion: Option<Bf16Dots>,
}

enum Products {
    /// The tile unit.
    Tiles(TileUnit),
    /// Dot products of pairs on vectors; one part only.
    Dots(Bf16Dots),
}

impl Unit {
    /// The CPU's own conversion, which makes one part.
    #[inline(always)]
    pub(super) fn conversion<const P: usize>(&self) -> Option<Bf16Dots> {
        self.conversion.filter(|_| P == 1)
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

/// Words of the left tiles of that many rows.
pub(super) fn left_words(rows: usize, depth: usize, parts: usize) -> usize {
    rows.next_multiple_of(SIDE) * split::column_words(depth, parts)
}

/// Words of the panels of that many columns.
pub(super) fn right_words(depth: usize, cols: usize, parts: usize) -> usize {
    cols.next_multiple_of(BLOCK) * split::column_words(depth, parts)
}

/// Whether parts do not stand for a row of those magnitudes.
#[inline(always)]
pub(super) fn is_odd(magnitudes: Magnitudes) -> bool {
    !magnitudes.fit(Storage::Split2)
}

/// [`split::pack_left`], compiled once for all passes.
struct PackLeft<'a, const P: usize> {
    a: MatRef<'a>,
    tiles: &'a mut [u32],
    magnitudes: &'a mut [Magnitudes],
}

impl<const P: usize> WithSimd for PackLeft<'_, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        split::pack_left::<P>(self.a, self.tiles, self.magnitudes);
    }
}

/// Rows as the left operand: 16 rows after 16 rows, step after step, part after part.
#[inline(always)]
pub(super) fn pack_left<S: Simd, const P: usize>(
    (simd, unit): (S, &Unit),
    a: MatRef<'_>,
    tiles: &mut [u32],
    magnitudes: &mut [Magnitudes],
) {
    match unit.conversion::<P>() {
        Some(proof) => conversion::pack_left(proof, a, tiles, magnitudes),
        None => simd.vectorize(PackLeft::<P> { a, tiles, magnitudes }),
    }
}

/// [`split::pack_right`], panel after panel of 32 columns, compiled once for all passes.
struct PackRight<'a, const P: usize> {
    b: MatRef<'a>,
    tiles: &'a mut [u32],
    /// Columns to be marked where they are odd; may be fewer than there are.
    odd: &'a mut [bool],
}

impl<const P: usize> WithSimd for PackRight<'_, P> {
    type Output = bool;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> bool {
        let (depth, cols) = (self.b.rows(), self.b.cols());
        let panel = right_words(depth, BLOCK, P);
        let mut odd = false;
        for (words, first) in self.tiles.chunks_exact_mut(panel).zip((0..cols).step_by(BLOCK)) {
            let mut magnitudes = [Magnitudes::NONE; BLOCK];
            let b = self.b.sub(0..depth, first..(first + BLOCK).min(cols));
            split::pack_right::<f32, P>(b, words, &mut magnitudes);
            odd |= magnitudes.into_iter().any(is_odd);
            for (odd, magnitudes) in self.odd.iter_mut().skip(first).zip(magnitudes) {
                *odd = is_odd(magnitudes);
            }
        }
        odd
    }
}

/// Panels of a right operand; marks odd columns among the first of `odd`; whether there is any.
#[inline(always)]
fn pack_panels<S: Simd, const P: usize>(
    (simd, unit): (S, &Unit),
    b: MatRef<'_>,
    tiles: &mut [u32],
    odd: &mut [bool],
) -> bool {
    match unit.conversion::<P>() {
        Some(proof) => conversion::pack_right(proof, b, tiles, odd),
        None => simd.vectorize(PackRight::<P> { b, tiles, odd }),
    }
}

/// `b` [depth, cols] as the right operand, panel after panel of 32 columns; its odd rows are marked and are zero.
#[inline(always)]
pub(super) fn pack_right<S: Simd, const P: usize>(
    means: (S, &Unit),
    b: MatRef<'_>,
    tiles: &mut [u32],
    odd: &mut [bool; KEY_BLOCK],
) {
    odd.fill(false);
    if pack_panels::<S, P>(means, b, tiles, &mut []) {
        let mut even = ScratchBuf::zeroed(b.rows() * b.cols());
        for (i, row) in even.chunks_exact_mut(b.cols()).enumerate() {
            let mut magnitudes = Magnitudes::NONE;
            b.row(i).iter().for_each(|x| magnitudes.add(*x));
            odd[i] = is_odd(magnitudes);
            if !odd[i] {
                row.copy_from_slice(b.row(i));
            }
        }
        let even = MatRef::new(&even, b.rows(), b.cols()).expect("a copy of b");
        pack_panels::<S, P>(means, even, tiles, &mut []);
    }
}

/// Some rows of scores, over whole steps of keys, as the left operand.
struct ScoreRows<'a, const P: usize> {
    scores: &'a [f32],
    rows: usize,
    steps: usize,
    tiles: &'a mut [u32],
}

impl<const P: usize> WithSimd for ScoreRows<'_, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (i, row) in self.scores.chunks(KEY_BLOCK).enumerate().take(self.rows) {
            let tiles = &mut self.tiles[i / SIDE * self.steps * P * TILE_WORDS + i % SIDE * SIDE..];
            for (step, row) in row.as_chunks::<STEP>().0.iter().enumerate().take(self.steps) {
                split::split_row::<P>(row, &mut tiles[step * P * TILE_WORDS..], TILE_WORDS);
            }
        }
    }
}

/// Probabilities, or their gradients, of some rows of 128 scores and over some steps of keys, as the left operand, whatever they are. Unlike
/// [`pack_left`] it looks at no magnitude and copies nothing: a quarter of the time (AVX2). What fills the last 16 rows stays what it was.
///
/// # Panics
/// When `scores` or `tiles` is too short.
#[inline(always)]
pub(super) fn pack_score_rows<S: Simd, const P: usize>(
    (simd, unit): (S, &Unit),
    scores: &[f32],
    (rows, seen): (usize, &Range<usize>),
    tiles: &mut [u32],
) {
    let scores = &scores[seen.start * STEP..];
    match unit.conversion::<P>() {
        Some(proof) => conversion::pack_score_rows(proof, scores, (rows, seen.len()), tiles),
        None => simd.vectorize(ScoreRows::<P> { scores, rows, steps: seen.len(), tiles }),
    }
}

/// Probabilities, or their gradients, as the right operand, whatever they are.
#[inline(always)]
pub(super) fn pack_scores<S: Simd, const P: usize>(means: (S, &Unit), scores: MatRef<'_>, tiles: &mut [u32]) {
    match means.1.conversion::<P>() {
        Some(proof) => conversion::pack_scores(proof, scores, tiles),
        None => _ = pack_panels::<S, P>(means, scores, tiles, &mut []),
    }
}

/// One panel of columns `b` [depth, 32 or fewer] as the right operand; odd columns are marked.
#[inline(always)]
pub(super) fn pack_panel<S: Simd, const P: usize>(
    means: (S, &Unit),
    b: MatRef<'_>,
    tiles: &mut [u32],
    odd: &mut [bool; BLOCK],
) {
    pack_panels::<S, P>(means, b, tiles, odd);
}

/// `b` [cols, depth], read across, as the right operand, panel after panel of 32 columns; its odd rows are marked. `rows` is
/// room for the left tiles of `b`: a tile of the right operand is a transposed tile of words of the left one.
#[inline(always)]
pub(super) fn pack_across<S: Simd, const P: usize>(
    means: (S, &Unit),
    b: MatRef<'_>,
    rows: &mut [u32],
    tiles: &mut [u32],
    odd: &mut [bool; KEY_BLOCK],
) {
    let mut magnitudes = [Magnitudes::NONE; KEY_BLOCK];
    pack_left::<S, P>(means, b, rows, &mut magnitudes);
    for (odd, magnitudes) in odd.iter_mut().zip(magnitudes) {
        *odd = is_odd(magnitudes);
    }
    turn_right(rows, tiles, (b.rows(), left_words(SIDE, b.cols(), P) / TILE_WORDS));
}

/// A tile of words with rows and columns exchanged.
#[inline(always)]
fn turn(from: &[u32; TILE_WORDS], to: &mut [u32; TILE_WORDS]) {
    let from = MatRef::new(pulp::bytemuck::cast_slice(from), SIDE, SIDE).expect("16 rows of 16 words");
    stage::transpose(from, pulp::bytemuck::cast_slice_mut(to), SIDE);
}

/// Left tiles of `rows` rows, `deep` tiles for each 16, as panels of the right operand that has these rows as columns.
#[inline(always)]
fn turn_right(left: &[u32], right: &mut [u32], (rows, deep): (usize, usize)) {
    let (left, right) = (left.as_chunks::<TILE_WORDS>().0, right.as_chunks_mut::<TILE_WORDS>().0);
    let sides = rows.div_ceil(SIDE);
    for side in 0..sides.next_multiple_of(2) {
        for at in 0..deep {
            let to = &mut right[(side / 2 * deep + at) * 2 + side % 2];
            if side < sides { turn(&left[side * deep + at], to) } else { to.fill(0) }
        }
    }
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
