//! How a matrix of f32 or bf16 becomes whole tiles of bf16 parts ([`super::split`]), by the CPU's own conversion.
//!
//! ```text
//! left   tile[i][q] = part(a[i][2q]) | part(a[i][2q + 1]) << 16        16 rows of A, 32 elements along k
//! right  tile[q][j] = part(b[2q][j]) | part(b[2q + 1][j]) << 16        32 elements along k, 16 columns of B
//! ```
//! Both are a square of 16 lanes (rows of A, columns of B) by 32 elements along k; a left tile has a lane in each row, a right tile is its transpose in words.
//!
//! - One instruction rounds 32 numbers. Where the matrix is contiguous along k, that makes the words of a lane; where it is contiguous across the lanes, a permutation makes
//!   the words of 16 lanes. If that is the order of the tile, words go to their place, else 16 rows of 16 words are transposed in registers.
//! - A right operand that is contiguous across its columns is read along whole rows of several panels, because rows may lie pages apart.
//! - What parts do not stand for is looked for in all of a square together, and lane by lane only where there is something.
//! - Elements that are contiguous in neither direction are gathered first.

use pulp::Simd;
use pulp::bytemuck::{cast, cast_slice};

use super::microkernel::amx::{SIDE, STEP, TILE_WORDS};
use super::microkernel::{Bf16Kernel, Bf16Products, Bf16Visitor, Halves, Storage, with_bf16_kernel};
use super::pair_packing::{Paired, filled, from};
use super::split::{Magnitudes, ROUNDS_TO_INFINITY, TINY};
use crate::isa::Bf16Dots;
use crate::view::MatRef;

/// Columns of a right operand that are packed side by side.
const TOGETHER: usize = 128;

/// What is looked for while packing.
const NOTHING: usize = 0;
/// What rounds to infinity.
const LARGE: usize = 1;
/// That, and what is too small for three parts.
const LARGE_AND_SMALL: usize = 2;

/// Words of a row of a tile.
type Row = [u32; SIDE];

/// Packs rows of A: 16 rows after 16 rows, step after step of k, part after part, a tile with a row of A in each row. Rows that fill the last tile are zero. Marks the rows
/// for which parts of that storage do not stand among those of `odd`, and clears no mark.
///
/// # Panics
/// When `tiles` or `odd` is too short.
pub(crate) fn pack_left<T: Paired, const P: usize>(
    proof: Bf16Dots,
    a: MatRef<'_, T>,
    tiles: &mut [u32],
    storage: Storage,
    odd: &mut [bool],
) {
    let lanes = Lanes { matrix: a, tiles, storage, odd };
    match storage {
        Storage::Bf16 => with_bf16_kernel(proof, Left::<T, P, NOTHING>(lanes)),
        Storage::Split2 => with_bf16_kernel(proof, Left::<T, P, LARGE>(lanes)),
        _ => with_bf16_kernel(proof, Left::<T, P, LARGE_AND_SMALL>(lanes)),
    }
}

/// Packs columns of B, panel after panel of two tiles side by side: step after step of k, part after part. Columns that fill the last panel are zero. Marks as
/// [`pack_left`] does.
///
/// # Panics
/// When `tiles` or `odd` is too short.
pub(crate) fn pack_right<T: Paired, const P: usize>(
    proof: Bf16Dots,
    b: MatRef<'_, T>,
    tiles: &mut [u32],
    storage: Storage,
    odd: &mut [bool],
) {
    let lanes = Lanes { matrix: b.t(), tiles, storage, odd };
    match storage {
        Storage::Bf16 => with_bf16_kernel(proof, Right::<T, P, NOTHING>(lanes)),
        Storage::Split2 => with_bf16_kernel(proof, Right::<T, P, LARGE>(lanes)),
        _ => with_bf16_kernel(proof, Right::<T, P, LARGE_AND_SMALL>(lanes)),
    }
}

/// Lanes, a row of the matrix each, and where they go.
struct Lanes<'a, T> {
    matrix: MatRef<'a, T>,
    tiles: &'a mut [u32],
    storage: Storage,
    odd: &'a mut [bool],
}

struct Left<'a, T, const P: usize, const LOOK: usize>(Lanes<'a, T>);

struct Right<'a, T, const P: usize, const LOOK: usize>(Lanes<'a, T>);

impl<T: Paired, const P: usize, const LOOK: usize> Bf16Visitor for Left<'_, T, P, LOOK> {
    #[inline(always)]
    fn visit<D: Bf16Products, const VECS: usize>(self, kernel: Bf16Kernel<D, VECS>) {
        let (dots, Left(lanes)) = (kernel.products(), self);
        let (rows, depth) = (lanes.matrix.rows(), lanes.matrix.cols());
        let of_side = depth.div_ceil(STEP) * P * TILE_WORDS;
        if of_side == 0 {
            return;
        }
        if lanes.matrix.row_stride() == 1 && lanes.matrix.col_stride() != 1 {
            let together = left_across::<D, T, P, LOOK>(dots, lanes.matrix, lanes.tiles, of_side);
            if LOOK != NOTHING && !together.fit(dots.simd()) {
                mark(lanes.matrix, lanes.storage, lanes.odd);
            }
            return;
        }
        let sides = lanes.tiles[..rows.div_ceil(SIDE) * of_side].chunks_exact_mut(of_side);
        for (first, tiles) in (0..rows).step_by(SIDE).zip(sides) {
            let last = (first + SIDE).min(rows);
            let a = lanes.matrix.sub(first..last, 0..depth);
            let together = left_along::<D, T, P, LOOK>(dots, a, tiles);
            if LOOK != NOTHING && !together.fit(dots.simd()) {
                mark(a, lanes.storage, &mut lanes.odd[first..last]);
            }
        }
    }
}

impl<T: Paired, const P: usize, const LOOK: usize> Bf16Visitor for Right<'_, T, P, LOOK> {
    #[inline(always)]
    fn visit<D: Bf16Products, const VECS: usize>(self, kernel: Bf16Kernel<D, VECS>) {
        let (dots, Right(lanes)) = (kernel.products(), self);
        let (cols, depth) = (lanes.matrix.rows(), lanes.matrix.cols());
        let panel = depth.div_ceil(STEP) * P * 2 * TILE_WORDS;
        if panel == 0 {
            return;
        }
        let groups = lanes.tiles[..cols.div_ceil(2 * SIDE) * panel].chunks_mut(TOGETHER / (2 * SIDE) * panel);
        for (first, tiles) in (0..cols).step_by(TOGETHER).zip(groups) {
            let last = (first + TOGETHER).min(cols);
            let b = lanes.matrix.sub(first..last, 0..depth);
            let together = match b.row_stride() {
                1 => right_across::<D, T, P, LOOK>(dots, b.t(), tiles, panel),
                _ => right_along::<D, T, P, LOOK>(dots, b, tiles, panel),
            };
            if LOOK != NOTHING && !together.fit(dots.simd()) {
                mark(b, lanes.storage, &mut lanes.odd[first..last]);
            }
        }
    }
}

/// Marks the lanes for which parts do not stand.
#[cold]
fn mark<T: Paired>(lanes: MatRef<'_, T>, storage: Storage, odd: &mut [bool]) {
    for (i, odd) in odd.iter_mut().enumerate() {
        let mut magnitudes = Magnitudes::NONE;
        (0..lanes.cols()).for_each(|p| magnitudes.add(lanes.at(i, p).widen()));
        *odd |= !magnitudes.fit(storage);
    }
}

/// Whether parts do not stand for some of many numbers, lane by lane: what tells in few instructions that none of them needs a look.
#[derive(Clone, Copy)]
struct Looked<S: Simd> {
    odd: S::m32s,
}

impl<S: Simd> Looked<S> {
    #[inline(always)]
    fn nothing(simd: S) -> Self {
        Looked { odd: simd.less_than_u32s(simd.splat_u32s(0), simd.splat_u32s(0)) }
    }

    #[inline(always)]
    fn add<const LOOK: usize>(&mut self, simd: S, numbers: &[f32; STEP]) {
        for bits in S::as_simd_u32s(cast_slice(numbers)).0 {
            let magnitude = simd.and_u32s(*bits, simd.splat_u32s(0x7fff_ffff));
            let large = simd.less_than_u32s(simd.splat_u32s(ROUNDS_TO_INFINITY - 1), magnitude);
            self.odd = simd.or_m32s(self.odd, large);
            if const { LOOK == LARGE_AND_SMALL } {
                // Less 1, modulo 2³²: zero is no small number.
                let less_one = simd.add_u32s(magnitude, simd.splat_u32s(u32::MAX));
                self.odd = simd.or_m32s(self.odd, simd.less_than_u32s(less_one, simd.splat_u32s(TINY - 1)));
            }
        }
    }

    /// Whether parts stand for all of them.
    #[inline(always)]
    fn fit(&self, simd: S) -> bool {
        simd.first_true_m32s(self.odd) == S::F32_LANES
    }
}

/// The parts of 32 elements, which are looked at as `LOOK` says.
#[inline(always)]
fn parts<D: Bf16Products, T: Paired, const P: usize, const LOOK: usize>(
    dots: D,
    (first, second): (&[T; SIDE], &[T; SIDE]),
    together: &mut Looked<D::Simd>,
) -> [Halves; P] {
    if const { P == 1 && LOOK == NOTHING } {
        return [T::halves(dots, first, second); P];
    }
    let mut rest = [T::widen_all(*first), T::widen_all(*second)];
    if const { LOOK != NOTHING } {
        together.add::<LOOK>(dots.simd(), &cast(rest));
    }
    let mut parts = [[0; 2 * SIDE]; P];
    for (part, halves) in parts.iter_mut().enumerate() {
        *halves = dots.rounded::<false>(&rest[0], &rest[1]);
        if part + 1 < P {
            rest = dots.rest(*halves, rest);
        }
    }
    parts
}

/// 32 elements of lane `i` from `p` on; zeros beyond its end.
#[inline(always)]
fn two<T: Paired>(lanes: MatRef<'_, T>, i: usize, p: usize) -> [[T; SIDE]; 2] {
    if lanes.col_stride() != 1 {
        return gathered(lanes, i, p);
    }
    let lane = &lanes.row(i)[p..];
    match (lane.first_chunk(), lane.get(SIDE..).and_then(<[T]>::first_chunk)) {
        (Some(first), Some(second)) => [*first, *second],
        _ => [ragged(lane), ragged(from(lane, SIDE))],
    }
}

/// The same where the elements lie apart.
#[cold]
#[inline(never)]
fn gathered<T: Paired>(lanes: MatRef<'_, T>, i: usize, p: usize) -> [[T; SIDE]; 2] {
    let mut two = [[T::default(); SIDE]; 2];
    for (x, p) in two.as_flattened_mut().iter_mut().zip(p..lanes.cols()) {
        *x = lanes.at(i, p);
    }
    two
}

/// Up to 16 elements, and zeros behind them. Not inlined: else all would be copied by a length that is known only here.
#[cold]
#[inline(never)]
fn ragged<T: Paired>(elements: &[T]) -> [T; SIDE] {
    filled(elements)
}

/// Row after row along k: where elements follow each other, hardware foresees what comes.
#[inline(always)]
fn left_along<D: Bf16Products, T: Paired, const P: usize, const LOOK: usize>(
    dots: D,
    a: MatRef<'_, T>,
    tiles: &mut [u32],
) -> Looked<D::Simd> {
    let mut together = Looked::nothing(dots.simd());
    for i in 0..SIDE {
        let rows = tiles[i * SIDE..].chunks_mut(P * TILE_WORDS);
        if i >= a.rows() {
            rows.for_each(|words| (0..P).for_each(|part| words[part * TILE_WORDS..][..SIDE].fill(0)));
            continue;
        }
        if a.col_stride() != 1 {
            for (words, p) in rows.zip((0..).step_by(STEP)) {
                let [first, second] = two(a, i, p);
                put_along::<D, T, P, LOOK>(dots, (&first, &second), words, &mut together);
            }
            continue;
        }
        let (whole, rest) = a.row(i).as_chunks::<STEP>();
        let mut rows = rows;
        for (two, words) in whole.iter().zip(&mut rows) {
            let (first, second) = halves_of(two);
            put_along::<D, T, P, LOOK>(dots, (first, second), words, &mut together);
        }
        if let Some(words) = rows.next() {
            let (first, second) = (ragged(rest), ragged(from(rest, SIDE)));
            put_along::<D, T, P, LOOK>(dots, (&first, &second), words, &mut together);
        }
    }
    together
}

/// 32 neighbours as two times 16.
#[inline(always)]
fn halves_of<T>(two: &[T; STEP]) -> (&[T; SIDE], &[T; SIDE]) {
    let [first, second] = two.as_chunks::<SIDE>().0 else { unreachable!("32 are two times 16") };
    (first, second)
}

/// A row of a left tile, part after part.
#[inline(always)]
fn put_along<D: Bf16Products, T: Paired, const P: usize, const LOOK: usize>(
    dots: D,
    two: (&[T; SIDE], &[T; SIDE]),
    words: &mut [u32],
    together: &mut Looked<D::Simd>,
) {
    let parts: [Halves; P] = parts::<D, T, P, LOOK>(dots, two, together);
    for (part, halves) in parts.into_iter().enumerate() {
        put(words, part * TILE_WORDS, cast(halves));
    }
}

/// A tile at a time, from 32 pieces of 16 neighbours: the tiles of all rows for one step along k after each other, because what is read then follows each other.
#[inline(always)]
fn left_across<D: Bf16Products, T: Paired, const P: usize, const LOOK: usize>(
    dots: D,
    a: MatRef<'_, T>,
    tiles: &mut [u32],
    of_side: usize,
) -> Looked<D::Simd> {
    let (mut together, columns) = (Looked::nothing(dots.simd()), a.t());
    for step in 0..of_side / (P * TILE_WORDS) {
        for side in 0..a.rows().div_ceil(SIDE) {
            let mut squares = [[[0; SIDE]; SIDE]; P];
            for q in 0..SIDE {
                let [low, high] = [2 * q, 2 * q + 1].map(
                    #[inline(always)]
                    |p| match step * STEP + p {
                        p if p < columns.rows() => lanes_of(columns.row(p), side * SIDE),
                        _ => [T::default(); SIDE],
                    },
                );
                let parts: [Halves; P] = parts::<D, T, P, LOOK>(dots, (&low, &high), &mut together);
                for (square, halves) in squares.iter_mut().zip(parts) {
                    square[q] = dots.interleaved(halves);
                }
            }
            put_transposed(dots, &squares, &mut tiles[side * of_side + step * P * TILE_WORDS..], TILE_WORDS);
        }
    }
    together
}

/// Two rows of `b` at a time, through all panels.
#[inline(always)]
fn right_across<D: Bf16Products, T: Paired, const P: usize, const LOOK: usize>(
    dots: D,
    b: MatRef<'_, T>,
    tiles: &mut [u32],
    panel: usize,
) -> Looked<D::Simd> {
    let mut together = Looked::nothing(dots.simd());
    let sides = tiles.len() / panel * 2;
    for q in 0..panel / (2 * P * SIDE) {
        let place = q / SIDE * P * 2 * TILE_WORDS + q % SIDE * SIDE;
        let row = |p: usize| if p < b.rows() { b.row(p) } else { &[] };
        let (low, high) = (row(2 * q), row(2 * q + 1));
        let at = |side: usize| side / 2 * panel + side % 2 * TILE_WORDS + place;
        let whole = low.as_chunks::<SIDE>().0.iter().zip(high.as_chunks::<SIDE>().0);
        for (side, two) in whole.enumerate() {
            put_across::<D, T, P, LOOK>(dots, two, &mut tiles[at(side)..], &mut together);
        }
        for side in low.len().min(high.len()) / SIDE..sides {
            let (low, high) = (ragged(from(low, side * SIDE)), ragged(from(high, side * SIDE)));
            put_across::<D, T, P, LOOK>(dots, (&low, &high), &mut tiles[at(side)..], &mut together);
        }
    }
    together
}

/// A row of a right tile, part after part.
#[inline(always)]
fn put_across<D: Bf16Products, T: Paired, const P: usize, const LOOK: usize>(
    dots: D,
    two: (&[T; SIDE], &[T; SIDE]),
    words: &mut [u32],
    together: &mut Looked<D::Simd>,
) {
    let parts: [Halves; P] = parts::<D, T, P, LOOK>(dots, two, together);
    for (part, halves) in parts.into_iter().enumerate() {
        put(words, part * 2 * TILE_WORDS, dots.interleaved(halves));
    }
}

/// A tile at a time, from 16 pieces of 32 elements along k. `b` has a column in each row.
#[inline(always)]
fn right_along<D: Bf16Products, T: Paired, const P: usize, const LOOK: usize>(
    dots: D,
    b: MatRef<'_, T>,
    tiles: &mut [u32],
    panel: usize,
) -> Looked<D::Simd> {
    let mut together = Looked::nothing(dots.simd());
    for side in 0..tiles.len() / panel * 2 {
        for step in 0..panel / (P * 2 * TILE_WORDS) {
            let mut squares = [[[0; SIDE]; SIDE]; P];
            for j in 0..SIDE.min(b.rows().saturating_sub(side * SIDE)) {
                let [first, second] = two(b, side * SIDE + j, step * STEP);
                let parts: [Halves; P] = parts::<D, T, P, LOOK>(dots, (&first, &second), &mut together);
                for (square, halves) in squares.iter_mut().zip(parts) {
                    square[j] = cast(halves);
                }
            }
            let at = side / 2 * panel + (step * P * 2 + side % 2) * TILE_WORDS;
            put_transposed(dots, &squares, &mut tiles[at..], 2 * TILE_WORDS);
        }
    }
    together
}

/// 16 neighbours of a row from `first` on; zeros beyond its end.
#[inline(always)]
fn lanes_of<T: Paired>(row: &[T], first: usize) -> [T; SIDE] {
    let row = from(row, first);
    match row.first_chunk::<SIDE>() {
        Some(lanes) => *lanes,
        None => ragged(row),
    }
}

/// A row of a tile.
#[inline(always)]
fn put(tiles: &mut [u32], at: usize, row: Row) {
    tiles[at..][..SIDE].copy_from_slice(&row);
}

/// The transposed squares of all parts, `apart` words from each other.
#[inline(always)]
fn put_transposed<D: Bf16Products, const P: usize>(
    dots: D,
    squares: &[[Row; SIDE]; P],
    tiles: &mut [u32],
    apart: usize,
) {
    for (part, square) in squares.iter().enumerate() {
        let tile = tiles[part * apart..].first_chunk_mut::<TILE_WORDS>().expect("a whole tile");
        dots.transpose(square, tile);
    }
}
