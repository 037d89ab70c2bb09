//! The kernel of f32 sums: one generic body over [`pulp::Simd`], for every ISA and every [`Stored`] form of rhs.
//!
//! # Naive form
//! ```text
//! for i in 0..MR { for j in 0..NR { for p in 0..depth { acc[i][j] += lhs[i][p] * rhs[p][j] } } }
//! ```
//! # Deviations
//! - `p` is the outer loop, so that one step is the outer product of a column of lhs and a row of
//!   rhs: MR broadcasts and VECS loads feed MR·VECS independent multiply-adds, enough to hide their
//!   latency (4 cycles × 2 units on the cores at hand, so at least 8 accumulators).
//! - All accumulators stay in registers: MR·VECS of them, VECS for the row of rhs and one broadcast
//!   (AVX2 6×16: 12 + 2 + 1 of 16; AVX-512 8×48: 24 + 3 + 1 of 32).
//! - Fewer rows than MR or fewer vectors than VECS run as a smaller tile of the same body: no work is
//!   spent on padding, and the bits are the same because each element has its own chain over `p`.
//! - Seven or eight rows of an operand that lies in place are 4 + 3 or 4 + 4, not 6 + 1 or 6 + 2: the small rest would wait
//!   for its own sums, as four rows do not.
//! - While a strip over far panels runs it asks for the next one, a few lines a turn, and each tile for its rows of C. Left to
//!   the hardware, the first tile of each panel waits for weights that lie in the third-level cache.
//! - One or two rows have too few chains to hide the latency, so they take several panels of rhs at a time (4 or 2):
//!   the chains of more columns, each as it was. With 32 registers up to four rows do: streams of weights that lie far away arrive sooner together.
//! - One or two rows over far panels of int8 or int4 ask for the panels after these (AVX2): they compute too long between two lines for the hardware to
//!   keep ahead of them. f32 and bf16 lose a third and a fifth by it.
//! - A row-major left operand is read in place (depth stride 1): where few panels of rhs follow, packing
//!   it costs more than it saves.
//! - With 32 registers the elements of a word of int8 or int4 are written out one after the other, int4 looked up in a table. One row reads the panels in order and
//!   asks for what lies a page ahead.
//! - A stored form that is narrower than f32 is widened where it is loaded: MR rows share the widening, and memory
//!   is read once in the small form. Such kernels exist for decoding, so they have fewer instances: panels
//!   are always NR wide, the left operand has depth stride 1, and the epilogue is the one of ragged tiles.
//! - With sixteen registers a tile of several rows has none left for the constants of widening. From some rows on such a panel is widened once, into
//!   scratch that stays near ([`widens`]), and every tile reads it as groups of f32. A widened element is exact, so the bits are those of
//!   widening where it is loaded.

use std::marker::PhantomData;

use pulp::{Simd, WithSimd};

use super::finish::Tile;
use super::prefetch::{self, ALL, Ahead, HALF, NOTHING, Share};
use super::stored::Widened;
use super::{F32, Lhs, Microkernel, Out, Rhs, Stored, Strip, kernel_with_lanes};
use crate::scratch::ScratchBuf;

/// Independent multiply-adds that hide their latency on the cores at hand.
const CHAINS: usize = 8;

/// Steps of one turn of the loop over a row-major left operand.
const UNROLL: usize = 4;

/// Cache lines that a turn of the loop reads of a panel of `width` vectors.
const fn lines_a_turn<S: Simd, T: Stored, const U: usize>(width: usize) -> usize {
    (words_a_turn::<T, U>() * width * S::F32_LANES).div_ceil(prefetch::LINE)
}

/// Rows of words of a turn of about U steps.
const fn words_a_turn<T: Stored, const U: usize>() -> usize {
    if T::PER_WORD < U { U / T::PER_WORD } else { 1 }
}

/// The kernel with tiles of MR rows and VECS vectors, rhs stored as T.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OuterProduct<S, T, const MR: usize, const VECS: usize>(
    pub(crate) S,
    pub(crate) PhantomData<T>,
);

impl<S: Simd, T: Stored, const MR: usize, const VECS: usize> Microkernel for OuterProduct<S, T, MR, VECS> {
    type Lhs = f32;
    type Rhs = T;
    type Out = f32;
    type Simd = S;
    const MR: usize = MR;
    const NR: usize = VECS * S::F32_LANES;
    const THIN_ROWS: usize = if T::PER_WORD == 1 && S::F32_LANES == 16 { 4 } else { 2 };
    const NAME: &'static str = kernel_with_lanes(S::F32_LANES, T::STORAGE).name;

    #[inline(always)]
    unsafe fn run(self, strip: &Strip<'_, Self>) {
        debug_assert!(strip.cols >= 1 && VECS <= 4);
        if strip.cols > Self::NR {
            debug_assert!(strip.rows <= Self::THIN_ROWS && strip.cols.is_multiple_of(Self::NR));
            return self.0.vectorize(Thin { kernel: self, strip });
        }
        if const { T::PER_WORD > 1 } {
            return self.0.vectorize(Tiles::<_, T, MR, VECS, VECS> { kernel: self, strip });
        }
        match strip.cols.div_ceil(S::F32_LANES) {
            1 => self.0.vectorize(Tiles::<_, T, MR, VECS, 1> { kernel: self, strip }),
            2 => self.0.vectorize(Tiles::<_, T, MR, VECS, 2> { kernel: self, strip }),
            3 => self.0.vectorize(Tiles::<_, T, MR, VECS, 3> { kernel: self, strip }),
            _ => self.0.vectorize(Tiles::<_, T, MR, VECS, 4> { kernel: self, strip }),
        }
    }
}

/// Whether integers of four bits are looked up in a table: with the sums of eight rows their words would not stay in registers. With six they do, and the multiply-adds
/// still take longer than all of the looking up.
const fn looks_up<S: Simd, T: Stored>() -> bool {
    S::F32_LANES == 16 && T::PER_WORD == 8
}

/// Rows of a full tile then.
const LOOKED_UP_ROWS: usize = 6;

/// Whether one row reads its integers panel after panel, as they lie, and asks for what comes a page later, scales and words: its instructions alone take about as
/// long as memory does, so any wait shows, and the hardware begins anew with each page. (docs/decisions/002-gemm.md)
const fn in_order<S: Simd, T: Stored, const H: usize, const P: usize>() -> bool {
    S::F32_LANES == 16 && T::PER_WORD > 2 && H == 1 && P == 1
}

/// Words from what is read to what is asked for.
const A_PAGE: usize = 24 * 48;

/// All tiles of a strip that is W vectors wide.
struct Tiles<'a, S: Simd, T: Stored, const MR: usize, const VECS: usize, const W: usize> {
    kernel: OuterProduct<S, T, MR, VECS>,
    strip: &'a Strip<'a, OuterProduct<S, T, MR, VECS>>,
}

impl<S: Simd, T: Stored, const MR: usize, const VECS: usize, const W: usize> WithSimd
    for Tiles<'_, S, T, MR, VECS, W>
{
    type Output = ();

    #[inline(always)]
    fn with_simd<U: Simd>(self, _: U) {
        if const { W > VECS } {
            unreachable!("a strip is at most {VECS} vectors wide");
        }
        if const { S::F32_LANES == 8 && T::PER_WORD > 1 } && widens::<T>(self.strip.rows) {
            return if const { T::SCALED } { self.widened::<Widened>() } else { self.widened::<F32>() };
        }
        self.all::<T>(self.strip.rhs);
    }
}

/// Whether a panel is widened before its tiles run: where tiles of so many rows have registers left, they widen what they load. (Seven and eight rows
/// are two tiles of four.)
const fn widens<T: Stored>(rows: usize) -> bool {
    match T::PER_WORD {
        8 => rows >= 4,
        4 => rows > 8,
        _ => rows > 4 && rows != 7 && rows != 8,
    }
}

impl<S: Simd, T: Stored, const MR: usize, const VECS: usize, const W: usize> Tiles<'_, S, T, MR, VECS, W> {
    /// All tiles over the panel in f32.
    #[inline(always)]
    fn widened<R: Stored>(&self) {
        let (Strip { depth, rhs, .. }, width) = (self.strip, W * S::F32_LANES);
        let rows = depth + if const { T::SCALED } { depth.div_ceil(rhs.group) } else { 0 };
        let mut wide = ScratchBuf::take(rows * width);
        // SAFETY: `run`'s contract: the panel reaches `depth` rows of W whole vectors, in groups with their scales where it is scaled.
        unsafe { widen::<S, T, W>(self.kernel.0, *depth, *rhs, &mut wide) };
        self.all::<R>(Rhs { ptr: wide.as_ptr().cast(), depth_stride: width, far: false, ..*rhs });
    }

    /// All tiles, with a panel that is stored as R.
    #[inline(always)]
    fn all<R: Stored>(&self, rhs: Rhs) {
        let rows = self.strip.rows;
        let mut first = 0;
        // One vector a row is too few chains for MR rows. (A packed left operand is cut where it was packed.)
        let Lhs { tile_stride, row_stride, .. } = self.strip.lhs;
        if const { W == 1 && MR == 8 && T::PER_WORD == 1 } && tile_stride == MR * row_stride {
            while first + 16 <= rows {
                self.tile::<R, 16>(first, rhs);
                first += 16;
            }
        }
        let full = const { if looks_up::<S, R>() { LOOKED_UP_ROWS } else { MR } };
        let whole = first + self.whole_tiles(rows - first, full) * full;
        while first < whole {
            if const { looks_up::<S, R>() } {
                self.tile::<R, LOOKED_UP_ROWS>(first, rhs);
            } else {
                self.tile::<R, MR>(first, rhs);
            }
            first += full;
        }
        while first < rows {
            let rest = rows - first;
            let height = if rest > full { rest.div_ceil(2) } else { rest };
            match height {
                1 => self.tile::<R, 1>(first, rhs),
                2 => self.tile::<R, 2>(first, rhs),
                3 => self.tile::<R, 3>(first, rhs),
                4 => self.tile::<R, 4>(first, rhs),
                5 => self.tile::<R, 5>(first, rhs),
                6 => self.tile::<R, 6>(first, rhs),
                _ => self.tile::<R, 7>(first, rhs),
            }
            first += height;
        }
    }

    /// How many tiles have `full` rows: all that can, unless so few rows would follow that they had to wait for their own sums;
    /// then the last of these tiles shares its rows with them. A packed left operand is cut where it was packed.
    #[inline(always)]
    fn whole_tiles(&self, rows: usize, full: usize) -> usize {
        let Lhs { tile_stride, row_stride, .. } = self.strip.lhs;
        let few = 1..const { CHAINS.div_ceil(VECS) };
        let shared = rows > full && few.contains(&(rows % full)) && tile_stride == MR * row_stride;
        rows / full - usize::from(shared)
    }

    /// What the tile at row `first` asks for while it runs: its share of the next panel, if that is far and not all asked for.
    #[inline(always)]
    fn ahead<const H: usize>(&self, first: usize) -> Option<(Share, Ahead)> {
        let Rhs { ptr, panel_stride, far, .. } = self.strip.rhs;
        // Seven to ten rows are two tiles of which one or both are low: half each, where the first alone would ask too fast.
        let two = const { S::F32_LANES == 8 } && self.strip.rows > MR;
        let share = if two { Share::Half } else { Share::of(H, self.strip.rows, MR) };
        let lines = share.lines(const { lines_a_turn::<S, F32, UNROLL>(W) });
        let start = first / H * (self.strip.depth / UNROLL * lines * prefetch::LINE);
        (far && start < panel_stride).then(|| (share, Ahead::from(ptr.wrapping_add(panel_stride + start))))
    }

    /// The tile of H rows that starts at row `first` of the strip.
    #[inline(always)]
    fn tile<R: Stored, const H: usize>(&self, first: usize, rhs: Rhs) {
        if const { H > MR && (H != 16 || W > 1) } {
            unreachable!("a tile is at most {MR} rows high, of one vector 16");
        }
        let (simd, strip) = (self.kernel.0, self.strip);
        let lhs = strip.lhs;
        // SAFETY: row `first` is part of the left operand by `run`'s contract; it begins a tile, or no tile is packed.
        let a = unsafe { lhs.ptr.add(first / MR * lhs.tile_stride + first % MR * lhs.row_stride) };
        let depth = strip.depth;
        if strip.rhs.far {
            prefetch::rows_of(strip.out, first..first + H, strip.cols, W * S::F32_LANES / prefetch::LINE);
        }
        // SAFETY: `run`'s contract: H rows of lhs and W whole vectors of rhs, `depth` deep, or those widened.
        let [acc] = unsafe {
            if const { T::PER_WORD == 1 } && lhs.row_stride == 1 {
                accumulate::<S, R, 1, H, W, 1, NOTHING>(
                    simd,
                    depth,
                    (a, 1, lhs.depth_stride),
                    rhs,
                    Ahead::from(a),
                )
            } else {
                debug_assert!(lhs.depth_stride == 1 || strip.depth <= 1);
                let a_rows = (a, lhs.row_stride, 1);
                match self.ahead::<H>(first) {
                    Some((Share::All, ahead)) if const { T::PER_WORD == 1 } => {
                        chain::<S, R, 1, H, W, UNROLL, ALL>(simd, depth, a_rows, rhs, &mut { ahead })
                    }
                    Some((Share::Half, ahead)) if const { T::PER_WORD == 1 } => {
                        chain::<S, R, 1, H, W, UNROLL, HALF>(simd, depth, a_rows, rhs, &mut { ahead })
                    }
                    _ => {
                        accumulate::<S, R, 1, H, W, UNROLL, NOTHING>(simd, depth, a_rows, rhs, Ahead::from(a))
                    }
                }
            }
        };
        // SAFETY: `run`'s contract on `out`, bias and residual.
        unsafe { Tile { simd, acc }.finish::<T>(first, strip.cols, &strip.finish, strip.out) };
    }
}

/// A strip of one or two rows over whole panels.
struct Thin<'a, S: Simd, T: Stored, const MR: usize, const VECS: usize> {
    kernel: OuterProduct<S, T, MR, VECS>,
    strip: &'a Strip<'a, OuterProduct<S, T, MR, VECS>>,
}

impl<S: Simd, T: Stored, const MR: usize, const VECS: usize> WithSimd for Thin<'_, S, T, MR, VECS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<U: Simd>(self, _: U) {
        // Words of several elements stay in registers while their elements are taken, each beside its sums: with four
        // panels 8 words and 8 sums would leave none for the constants of widening.
        if const { S::F32_LANES == 16 && T::PER_WORD == 1 } {
            return match self.strip.rows {
                1 => self.panels::<1, 4>(),
                2 => self.panels::<2, 4>(),
                3 => self.panels::<3, 2>(),
                _ => self.panels::<4, 2>(),
            };
        }
        if const { S::F32_LANES == 16 } {
            return match (self.strip.rows, T::PER_WORD) {
                (1, 4 | 8) => self.panels::<1, 1>(),
                (1, _) => self.panels::<1, 4>(),
                (_, 8) => self.panels::<2, 1>(),
                _ => self.panels::<2, 2>(),
            };
        }
        match (self.strip.rows, T::PER_WORD) {
            (1, 1) => self.panels::<1, 4>(),
            (1, 2) => self.panels::<1, 3>(),
            (1, _) => self.panels::<1, 2>(),
            (_, 1 | 2) => self.panels::<2, 2>(),
            _ => self.panels::<2, 1>(),
        }
    }
}

impl<S: Simd, T: Stored, const MR: usize, const VECS: usize> Thin<'_, S, T, MR, VECS> {
    /// All panels, P at a time, the rest one by one.
    #[inline(always)]
    fn panels<const H: usize, const P: usize>(&self) {
        let count = self.strip.cols / (VECS * S::F32_LANES);
        let whole = count / P * P;
        for first in (0..whole).step_by(P) {
            self.group::<H, P>(first);
        }
        for panel in whole..count {
            self.group::<H, 1>(panel);
        }
    }

    /// H rows of the P panels from panel `first` on.
    #[inline(always)]
    fn group<const H: usize, const P: usize>(&self, first: usize) {
        let (simd, strip) = (self.kernel.0, self.strip);
        let (lhs, depth, width) = (strip.lhs, strip.depth, VECS * S::F32_LANES);
        let rhs = Rhs { ptr: strip.rhs.ptr.wrapping_add(first * strip.rhs.panel_stride), ..strip.rhs };
        let lhs = (lhs.ptr, lhs.row_stride, lhs.depth_stride);
        // SAFETY: `run`'s contract: H rows of lhs and P whole panels of rhs, `depth` deep.
        let acc = unsafe {
            if const { S::F32_LANES == 8 && T::PER_WORD >= 4 || in_order::<S, T, H, P>() } && rhs.far {
                let distance = if in_order::<S, T, H, P>() { A_PAGE } else { P * rhs.panel_stride };
                let next = Ahead::from(rhs.ptr.wrapping_add(distance));
                accumulate::<S, T, P, H, VECS, UNROLL, ALL>(simd, depth, lhs, rhs, next)
            } else {
                accumulate::<S, T, P, H, VECS, UNROLL, NOTHING>(simd, depth, lhs, rhs, Ahead::from(rhs.ptr))
            }
        };
        for (panel, acc) in (first..).zip(acc) {
            let out = strip.out.ptr.wrapping_add(panel * width * strip.out.col_stride);
            let (out, finish) = (Out { ptr: out, ..strip.out }, strip.finish.after_col(panel * width));
            // SAFETY: `run`'s contract on `out`, bias and residual: this panel's columns of them.
            unsafe { Tile { simd, acc }.finish::<T>(0, width, &finish, out) };
        }
    }
}

/// `acc[q][i][w] = Σ_p a[i][p] · b[q][p][w]` over P panels q, about U steps of `p` a turn of the loop; group by
/// group where groups have scales.
///
/// # Safety
/// `a` (pointer, row stride, depth stride) reaches H × depth, `b` P panels of depth × W vectors.
#[inline(always)]
unsafe fn accumulate<
    S: Simd,
    T: Stored,
    const P: usize,
    const H: usize,
    const W: usize,
    const U: usize,
    const AHEAD: usize,
>(
    simd: S,
    depth: usize,
    (mut a, row_stride, depth_stride): (*const f32, usize, usize),
    mut b: Rhs,
    mut ahead: Ahead,
) -> [[[S::f32s; W]; H]; P] {
    if const { !T::SCALED } {
        // SAFETY: the contract.
        return unsafe {
            chain::<S, T, P, H, W, U, AHEAD>(simd, depth, (a, row_stride, depth_stride), b, &mut ahead)
        };
    }
    let mut sum = [[[simd.splat_f32s(0.0); W]; H]; P];
    for first in (0..depth).step_by(b.group) {
        let depth = b.group.min(depth - first);
        let words = Rhs { ptr: b.ptr.wrapping_add(b.depth_stride), ..b };
        if const { in_order::<S, T, H, P>() } {
            ahead.fetch_share::<AHEAD>(const { (W * S::F32_LANES).div_ceil(prefetch::LINE) });
        }
        // SAFETY: the contract, for one group; its words follow the row of its scales.
        let group = unsafe {
            chain::<S, T, P, H, W, U, AHEAD>(simd, depth, (a, row_stride, depth_stride), words, &mut ahead)
        };
        for (panel, (sum, group)) in sum.iter_mut().zip(group).enumerate() {
            let scales = b.ptr.wrapping_add(panel * b.panel_stride).cast::<S::f32s>();
            for w in 0..W {
                // SAFETY: the contract: a group of a scaled form begins with a row of f32.
                let scale = unsafe { scales.add(w).read_unaligned() };
                for (sum, group) in sum.iter_mut().zip(&group) {
                    sum[w] = simd.mul_add_e_f32s(group[w], scale, sum[w]);
                }
            }
        }
        a = a.wrapping_add(depth * depth_stride);
        b.ptr = words.ptr.wrapping_add(depth.div_ceil(T::PER_WORD) * b.depth_stride);
    }
    sum
}

/// Writes a panel of W vectors as f32, group by group; where T is scaled, each behind its row of scales.
///
/// # Safety
/// `b` reaches `depth` rows of W vectors.
#[inline(always)]
unsafe fn widen<S: Simd, T: Stored, const W: usize>(simd: S, depth: usize, mut b: Rhs, to: &mut [f32]) {
    let mut to = to.chunks_exact_mut(W * S::F32_LANES);
    // SAFETY: the contract, for each row of scales and of words.
    unsafe {
        for first in (0..depth).step_by(b.group) {
            let depth = b.group.min(depth - first);
            if const { T::SCALED } {
                widen_row::<S, F32, W>(simd, b.ptr, 0, to.next());
                b.ptr = b.ptr.wrapping_add(b.depth_stride);
            }
            for _ in 0..depth / T::PER_WORD {
                for at in 0..T::PER_WORD {
                    widen_row::<S, T, W>(simd, b.ptr, at, to.next());
                }
                b.ptr = b.ptr.wrapping_add(b.depth_stride);
            }
            for at in 0..depth % T::PER_WORD {
                widen_row::<S, T, W>(simd, b.ptr, at, to.next());
            }
            if !depth.is_multiple_of(T::PER_WORD) {
                b.ptr = b.ptr.wrapping_add(b.depth_stride);
            }
        }
    }
}

/// Element `at` of each of W vectors of words.
///
/// # Safety
/// They are readable.
#[inline(always)]
unsafe fn widen_row<S: Simd, T: Stored, const W: usize>(
    simd: S,
    from: *const u32,
    at: usize,
    to: Option<&mut [f32]>,
) {
    let to = to.expect("a row for each row of the panel");
    for (w, to) in to.chunks_exact_mut(S::F32_LANES).enumerate().take(W) {
        // SAFETY: the contract.
        let words = unsafe { from.add(w * S::F32_LANES).cast::<S::u32s>().read_unaligned() };
        let row = T::widen_alone(simd, words, at);
        // SAFETY: `to` is one vector long.
        unsafe { to.as_mut_ptr().cast::<S::f32s>().write_unaligned(row) };
    }
}

/// As [`accumulate`], one chain over `p` for each element, no scales.
///
/// # Safety
/// As [`accumulate`].
#[inline(always)]
unsafe fn chain<
    S: Simd,
    T: Stored,
    const P: usize,
    const H: usize,
    const W: usize,
    const U: usize,
    const AHEAD: usize,
>(
    simd: S,
    depth: usize,
    (mut a, row_stride, depth_stride): (*const f32, usize, usize),
    mut b: Rhs,
    ahead: &mut Ahead,
) -> [[[S::f32s; W]; H]; P] {
    let mut acc = [[[simd.splat_f32s(0.0); W]; H]; P];
    let words = const { words_a_turn::<T, U>() };
    let unrolled = words * T::PER_WORD;
    for _ in 0..depth / unrolled {
        ahead.fetch_share::<AHEAD>(const { P * lines_a_turn::<S, T, U>(W) });
        for word in 0..words {
            let a = a.wrapping_add(word * T::PER_WORD * depth_stride);
            let b = Rhs { ptr: b.ptr.wrapping_add(word * b.depth_stride), ..b };
            if const { writes_out::<S, T>(H) } {
                debug_assert!(depth_stride == 1);
                // SAFETY: these steps of the contract.
                unsafe { whole_word::<S, T, P, H, W>(simd, &mut acc, (a, row_stride), b) };
                continue;
            }
            for at in 0..T::PER_WORD {
                let a = a.wrapping_add(at * depth_stride);
                // SAFETY: one step of the contract.
                unsafe { step::<S, T, P, H, W>(simd, &mut acc, (a, row_stride), b, at) };
            }
        }
        (a, b.ptr) = (a.wrapping_add(unrolled * depth_stride), b.ptr.wrapping_add(words * b.depth_stride));
    }
    for p in 0..depth % unrolled {
        // SAFETY: one step of the contract.
        unsafe { step::<S, T, P, H, W>(simd, &mut acc, (a, row_stride), b, p % T::PER_WORD) };
        a = a.wrapping_add(depth_stride);
        if (p + 1).is_multiple_of(T::PER_WORD) {
            b.ptr = b.ptr.wrapping_add(b.depth_stride);
        }
    }
    acc
}

/// Whether the elements of a word are written out: the compiler leaves a loop over so many steps as it is, and makes the constants of each element anew.
/// (Tall tiles have no registers for that.)
const fn writes_out<S: Simd, T: Stored>(height: usize) -> bool {
    S::F32_LANES == 16 && T::PER_WORD > 2 && height < 7
}

/// As many steps of `p` as a word has elements, panel by panel; the depth stride of `a` is 1.
///
/// # Safety
/// As [`step`], for all of them.
#[inline(always)]
unsafe fn whole_word<S: Simd, T: Stored, const P: usize, const H: usize, const W: usize>(
    simd: S,
    acc: &mut [[[S::f32s; W]; H]; P],
    (a, row_stride): (*const f32, usize),
    b: Rhs,
) {
    for (panel, acc) in acc.iter_mut().enumerate() {
        let b = b.ptr.wrapping_add(panel * b.panel_stride);
        let mut words = [simd.splat_u32s(0); W];
        for (w, words) in words.iter_mut().enumerate() {
            // SAFETY: the contract on `b`.
            *words = unsafe { b.add(w * S::F32_LANES).cast::<S::u32s>().read_unaligned() };
        }
        T::for_each(
            simd,
            words,
            #[inline(always)]
            |at, row| {
                for (i, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: the contract on `a`.
                    let x = simd.splat_f32s(unsafe { *a.add(i * row_stride + at) });
                    for w in 0..W {
                        acc[w] = simd.mul_add_e_f32s(x, row[w], acc[w]);
                    }
                }
            },
        );
    }
}

/// One step of `p`: the outer product of H elements of `a` and element `at` of W vectors of words of each panel.
///
/// # Safety
/// They are readable.
#[inline(always)]
unsafe fn step<S: Simd, T: Stored, const P: usize, const H: usize, const W: usize>(
    simd: S,
    acc: &mut [[[S::f32s; W]; H]; P],
    (a, row_stride): (*const f32, usize),
    b: Rhs,
    at: usize,
) {
    for (panel, acc) in acc.iter_mut().enumerate() {
        let b = b.ptr.wrapping_add(panel * b.panel_stride);
        let mut row = [simd.splat_f32s(0.0); W];
        for (w, row) in row.iter_mut().enumerate() {
            // SAFETY: the contract on `b`.
            let words = unsafe { b.add(w * S::F32_LANES).cast::<S::u32s>().read_unaligned() };
            *row = T::widen(simd, words, at);
        }
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the contract on `a`.
            let x = simd.splat_f32s(unsafe { *a.add(i * row_stride) });
            for w in 0..W {
                acc[w] = simd.mul_add_e_f32s(x, row[w], acc[w]);
            }
        }
    }
}
