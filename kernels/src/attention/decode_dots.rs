//! The two products of decoding by dot products of bf16 on vectors, straight from the cache.
//!
//! ```text
//! for each pair of rows q:  w = words (row 2q, row 2q + 1) of 32 columns;      for each query:  acc += left[q]·w
//! ```
//! Rows are the elements of K in a panel, or the keys of V in a block. A step reads its cache once, so nothing is packed: two rows become words in registers, by the CPU's conversion
//! or, of a cache in bf16, by putting halves together, and meet the queries there. An element is the chain over words that [`crate::gemm::microkernel::bf16_block`]
//! has, so the bits are those of the full pass.
//! Where a number is odd (see [`super::on_tiles`]), the form of tiles, which looks after such numbers, does the task again ([`super::decode_tasks`]).

use std::ops::Range;

use pulp::Simd;

use super::cache::{CacheFormat, PANEL, Rows};
use super::decode::Places;
use super::decode_tasks::Tasks;
use super::online;
use super::problem::KEY_BLOCK;
use crate::gemm::microkernel::{Bf16Kernel, Bf16Products, Bf16Visitor, with_bf16_kernel};
use crate::gemm::pair_packing::{filled, from};
use crate::isa::Bf16Dots;
use crate::math::{shift_left, shift_right};
use crate::scratch::ScratchBuf;
use crate::view::MatRef;

/// Columns of two vectors of words, and the words of a group of a stored row.
const GROUP: usize = 32;
/// Words of a vector of 512 bits, which is what the products make at once.
const WORDS: usize = GROUP / 2;
/// Queries that meet the words together.
const QUERIES: usize = 4;

/// What multiplies in a task: the proof of dot products.
pub(super) struct Dots(pub(super) Bf16Dots);

/// Words of a left operand's row of that many elements.
const fn left_words(depth: usize) -> usize {
    depth.div_ceil(GROUP) * WORDS
}

impl Dots {
    /// The scores of a unit's rows, see [`Tasks`]; `false` when a number is odd, and they are another's to make.
    #[inline(always)]
    pub(super) fn scores<S: Simd>(
        &self,
        simd: S,
        tasks: &Tasks<'_>,
        unit: usize,
        columns: &Range<usize>,
    ) -> bool {
        let (b, kv) = tasks.problem.place(unit);
        let (rows, dim) = (tasks.problem.rows(), tasks.problem.dim);
        let scaled = tasks.scaled_queries(simd, unit);
        let scaled = MatRef::new(&scaled, rows, dim).expect("[rows, dim]");
        let mut left = ScratchBuf::take(rows.next_multiple_of(QUERIES) * left_words(dim));
        let mut odd = self.pack(scaled, left.words_mut());
        let mut sums = ScratchBuf::take(rows.next_multiple_of(QUERIES) * PANEL);
        for run in tasks.runs_in(unit, columns) {
            for (part, position, keys) in tasks.held(b, &run.keys) {
                let mut at = keys.start;
                while at < keys.end {
                    let position = position + at - keys.start;
                    let first = position % PANEL;
                    let cols = first..PANEL.min(first + keys.end - at);
                    // Whole groups from the left, and no column beyond the last key: anything may stand there.
                    let begin = cols.start / GROUP * GROUP;
                    let some = cols.end - begin;
                    let k = match part.cache.panel(part.sequences[b], kv, position / PANEL) {
                        Rows::F32(k) => {
                            let k = MatRef::with_strides(&k[begin..], dim, some, PANEL, 1);
                            Pairs::F32(k.expect("a panel is [dim, PANEL]"))
                        }
                        Rows::Stored(_, words, _) => {
                            let words = &words[begin / 2..];
                            Pairs::Bf16(Stored { words, stride: PANEL / 2, rows: dim, cols: some })
                        }
                    };
                    self.multiply(left.words_mut(), (rows, dim), k, &mut sums, &mut odd);
                    let place = unit * tasks.places.len + run.place() + at - run.keys.start;
                    let width = some.next_multiple_of(GROUP);
                    for (r, sums) in sums.chunks_exact(width).enumerate().take(rows) {
                        // SAFETY: these columns of the unit's row of scores belong to this task alone.
                        let scores =
                            unsafe { tasks.memory.part(place + r * tasks.places.stride, cols.len()) };
                        scores.copy_from_slice(&sums[cols.start - begin..some]);
                    }
                    at += cols.len();
                }
            }
        }
        !odd
    }

    /// Columns of a unit's output; `false` when a value is odd, and nothing is written.
    #[inline(always)]
    pub(super) fn output<S: Simd>(
        &self,
        simd: S,
        tasks: &Tasks<'_>,
        unit: usize,
        cols: Range<usize>,
    ) -> bool {
        if cols.is_empty() {
            return true;
        }
        let (rows, v_dim) = (tasks.problem.rows(), tasks.problem.v_dim);
        let (b, kv) = tasks.problem.place(unit);
        let Places { stride, alpha, len, .. } = tasks.places;
        let width = cols.len().next_multiple_of(GROUP);
        let mut acc = ScratchBuf::zeroed(rows * width);
        let mut sums = ScratchBuf::take(rows.next_multiple_of(QUERIES) * width);
        let mut left = ScratchBuf::take(rows.next_multiple_of(QUERIES) * left_words(KEY_BLOCK));
        let mut copied = ScratchBuf::take(KEY_BLOCK.min(tasks.problem.keys) * cols.len());
        let mut odd = false;
        for block in tasks.problem.blocks(unit) {
            let keys = &block.keys;
            // SAFETY: P and α of this unit are complete and only read now.
            let memory = unsafe { tasks.memory.part(unit * len, len) };
            let p = MatRef::with_strides(&memory[block.place()..], rows, keys.len(), stride, 1);
            self.pack(p.expect("P holds these keys"), left.words_mut());
            let whole = tasks.held(b, keys).find(|(.., mine)| mine == keys);
            let v =
                match whole.map(|(part, position, _)| (part.cache.values(part.sequences[b], kv), position)) {
                    Some((Rows::Stored(CacheFormat::Bf16, words, _), position))
                        if cols.start.is_multiple_of(GROUP) =>
                    {
                        let stride = CacheFormat::Bf16.words(v_dim);
                        let words = &words[position * stride + cols.start / 2..];
                        Pairs::Bf16(Stored { words, stride, rows: keys.len(), cols: cols.len() })
                    }
                    _ => Pairs::F32(tasks.values(unit, keys, &cols, &mut copied)),
                };
            self.multiply(left.words_mut(), (rows, keys.len()), v, &mut sums, &mut odd);
            let alphas = &memory[alpha + block.index * rows..][..rows];
            for ((acc, sums), alpha) in acc.chunks_exact_mut(width).zip(sums.chunks_exact(width)).zip(alphas)
            {
                online::carry(simd, *alpha, sums, acc);
            }
        }
        if !odd {
            tasks.store(simd, unit, (&acc, width), cols);
        }
        !odd
    }

    /// Words along each row, [`left_words`] apart; whether an element is odd.
    fn pack(&self, rows: MatRef<'_>, words: &mut [u32]) -> bool {
        let mut odd = false;
        with_bf16_kernel(self.0, Pack { rows, words, odd: &mut odd });
        odd
    }

    /// `sums = left·pairs` of some rows that are so many elements deep; `odd` when an element of `pairs` is.
    fn multiply(
        &self,
        left: &[u32],
        (rows, depth): (usize, usize),
        pairs: Pairs<'_>,
        sums: &mut [f32],
        odd: &mut bool,
    ) {
        let stride = left_words(depth);
        assert!(left.len() >= rows.next_multiple_of(QUERIES) * stride);
        match pairs {
            Pairs::F32(right) => with_bf16_kernel(self.0, Sums { left, stride, rows, right, sums, odd }),
            Pairs::Bf16(right) => with_bf16_kernel(self.0, Sums { left, stride, rows, right, sums, odd }),
        }
    }
}

/// A right operand in either form.
enum Pairs<'a> {
    F32(MatRef<'a>),
    Bf16(Stored<'a>),
}

/// Rows of a cache in bf16, from the first column that is meant on.
struct Stored<'a> {
    words: &'a [u32],
    /// Words from one row to the next.
    stride: usize,
    rows: usize,
    cols: usize,
}

impl Stored<'_> {
    /// The words of 32 columns from `first` on of row `at`.
    #[inline(always)]
    fn group(&self, at: usize, first: usize) -> &[u32; WORDS] {
        let words = self.words[at * self.stride + first / 2..].first_chunk();
        words.expect("whole groups of words")
    }
}

/// V vectors of the set: 16 words.
type Vectors<D, const V: usize> = [<<D as Bf16Products>::Simd as Simd>::u32s; V];

/// Sums of H rows and G groups of columns.
type Chains<D, const V: usize, const H: usize, const G: usize> =
    [[[[<<D as Bf16Products>::Simd as Simd>::f32s; V]; 2]; G]; H];

/// Rows of a right operand, two of which become words.
trait RowPairs {
    fn rows(&self) -> usize;
    fn cols(&self) -> usize;
    /// Words of rows 2q and 2q + 1 in 32 columns from `first` on, all of which exist.
    fn words<D: Bf16Products, const V: usize>(&self, dots: D, q: usize, first: usize) -> [Vectors<D, V>; 2];
    /// The same where zeros stand for what does not exist. Apart, because the copy of a ragged row is a call, around which no sum stays in registers.
    fn ragged<D: Bf16Products>(&self, dots: D, q: usize, first: usize) -> [[u32; WORDS]; 2];
}

/// 16 words as vectors.
#[inline(always)]
fn vectors<D: Bf16Products, const V: usize>(words: &[u32; WORDS]) -> Vectors<D, V> {
    let (vectors, _) = <D::Simd as Simd>::as_simd_u32s(words);
    *vectors.first_chunk().expect("V vectors are 16 words")
}

impl RowPairs for MatRef<'_> {
    #[inline(always)]
    fn rows(&self) -> usize {
        MatRef::rows(self)
    }

    #[inline(always)]
    fn cols(&self) -> usize {
        MatRef::cols(self)
    }

    #[inline(always)]
    fn words<D: Bf16Products, const V: usize>(&self, dots: D, q: usize, first: usize) -> [Vectors<D, V>; 2] {
        // Written out: `array::map` is a call of its own where the compiler does not inline it, outside of the shell.
        let low =
            self.row(2 * q)[first..].first_chunk::<GROUP>().expect("whole groups").as_chunks::<WORDS>().0;
        let high =
            self.row(2 * q + 1)[first..].first_chunk::<GROUP>().expect("whole groups").as_chunks::<WORDS>().0;
        let lower = vectors::<D, V>(&dots.across::<false>(&low[0], &high[0]));
        [lower, vectors::<D, V>(&dots.across::<false>(&low[1], &high[1]))]
    }

    #[inline(always)]
    fn ragged<D: Bf16Products>(&self, dots: D, q: usize, first: usize) -> [[u32; WORDS]; 2] {
        let low = self.row(2 * q);
        let high = if 2 * q + 1 < MatRef::rows(self) { self.row(2 * q + 1) } else { &[] };
        let lower = dots.across::<false>(&filled(from(low, first)), &filled(from(high, first)));
        let first = first + WORDS;
        [lower, dots.across::<false>(&filled(from(low, first)), &filled(from(high, first)))]
    }
}

impl RowPairs for Stored<'_> {
    #[inline(always)]
    fn rows(&self) -> usize {
        self.rows
    }

    #[inline(always)]
    fn cols(&self) -> usize {
        self.cols
    }

    #[inline(always)]
    fn words<D: Bf16Products, const V: usize>(&self, dots: D, q: usize, first: usize) -> [Vectors<D, V>; 2] {
        let simd = dots.simd();
        let low = vectors::<D, V>(self.group(2 * q, first));
        let high = vectors::<D, V>(self.group(2 * q + 1, first));
        let (lower, upper) = (simd.splat_u32s(0xffff), simd.splat_u32s(0xffff_0000));
        // Column w of a group is the low half of word w, column 16 + w the high one.
        let mut words = [low; 2];
        for v in 0..V {
            words[0][v] = simd.or_u32s(simd.and_u32s(low[v], lower), shift_left(simd, high[v], 16));
            words[1][v] = simd.or_u32s(shift_right(simd, low[v], 16), simd.and_u32s(high[v], upper));
        }
        words
    }

    #[inline(always)]
    fn ragged<D: Bf16Products>(&self, _: D, q: usize, first: usize) -> [[u32; WORDS]; 2] {
        let low = self.group(2 * q, first);
        let high = if 2 * q + 1 < self.rows { self.group(2 * q + 1, first) } else { &[0; WORDS] };
        // Beyond the last column anything may stand.
        let columns = self.cols - first;
        let mut words = [[0; WORDS]; 2];
        for w in 0..WORDS.min(columns) {
            words[0][w] = low[w] & 0xffff | high[w] << 16;
        }
        for w in 0..WORDS.min(columns.saturating_sub(WORDS)) {
            words[1][w] = low[w] >> 16 | high[w] & 0xffff_0000;
        }
        words
    }
}

/// Looks for halves of words that are infinite or NaN, which what rounds to infinity is too.
#[derive(Clone, Copy)]
struct Halves<S: Simd>(S::u32s);

impl<S: Simd> Halves<S> {
    #[inline(always)]
    fn none(simd: S) -> Halves<S> {
        Halves(simd.splat_u32s(0))
    }

    /// An exponent of ones and one more carries into the sign, which was taken off.
    #[inline(always)]
    fn add(&mut self, simd: S, words: S::u32s) {
        let exponents = simd.and_u32s(words, simd.splat_u32s(0x7f80_7f80));
        self.0 = simd.or_u32s(self.0, simd.add_u32s(exponents, simd.splat_u32s(0x0080_0080)));
    }

    #[inline(always)]
    fn odd(&self) -> bool {
        let lanes: &[u32] = pulp::bytemuck::cast_slice(std::slice::from_ref(&self.0));
        lanes.iter().any(|lane| lane & 0x8000_8000 != 0)
    }
}

struct Pack<'a> {
    rows: MatRef<'a>,
    words: &'a mut [u32],
    odd: &'a mut bool,
}

impl Bf16Visitor for Pack<'_> {
    #[inline(always)]
    fn visit<D: Bf16Products, const VECS: usize>(self, kernel: Bf16Kernel<D, VECS>) {
        let simd = kernel.products().simd();
        let mut halves = Halves::none(simd);
        let stride = left_words(self.rows.cols());
        for (i, words) in self.words.chunks_exact_mut(stride).enumerate().take(self.rows.rows()) {
            let row = self.rows.row(i);
            let (whole, rest) = row.as_chunks::<GROUP>();
            for (step, words) in words.as_chunks_mut::<WORDS>().0.iter_mut().enumerate() {
                *words = match whole.get(step) {
                    Some(elements) => kernel.products().along::<false>(elements),
                    None => kernel.products().along::<false>(&filled(rest)),
                };
                <D::Simd as Simd>::as_simd_u32s(words).0.iter().for_each(
                    #[inline(always)]
                    |words| halves.add(simd, *words),
                );
            }
        }
        *self.odd = halves.odd();
    }
}

struct Sums<'a, R> {
    left: &'a [u32],
    stride: usize,
    rows: usize,
    right: R,
    /// [rows, columns in whole groups]; has room for whole fours of rows.
    sums: &'a mut [f32],
    odd: &'a mut bool,
}

impl<R: RowPairs> Bf16Visitor for Sums<'_, R> {
    #[inline(always)]
    fn visit<D: Bf16Products, const VECS: usize>(mut self, kernel: Bf16Kernel<D, VECS>) {
        let mut halves = Halves::none(kernel.products().simd());
        let groups = self.right.cols().div_ceil(GROUP);
        for first in (0..self.rows).step_by(QUERIES) {
            let mut group = 0;
            while group < groups {
                // One row reads two groups at a time: rows of the cache come in order, and four chains hide the latency.
                group += match (D::Simd::F32_LANES, self.rows - first, groups - group) {
                    (16, 1, 1) => self.chains::<D, 1, 1, 1>(kernel.products(), (first, group), &mut halves),
                    (16, 1, _) => self.chains::<D, 1, 1, 2>(kernel.products(), (first, group), &mut halves),
                    (16, ..) => {
                        self.chains::<D, 1, QUERIES, 1>(kernel.products(), (first, group), &mut halves)
                    }
                    (8, ..) => {
                        self.chains::<D, 2, QUERIES, 1>(kernel.products(), (first, group), &mut halves)
                    }
                    (lanes, ..) => unreachable!("dot products of bf16 on {lanes} lanes"),
                };
            }
        }
        *self.odd |= halves.odd();
    }
}

impl<R: RowPairs> Sums<'_, R> {
    /// H rows from row `first` on, G groups of columns from group `group` on, V vectors to 16 words; gives G.
    #[inline(always)]
    fn chains<D: Bf16Products, const V: usize, const H: usize, const G: usize>(
        &mut self,
        dots: D,
        (first, group): (usize, usize),
        halves: &mut Halves<D::Simd>,
    ) -> usize {
        let simd = dots.simd();
        let (mut acc, mut most) = ([[[[simd.splat_f32s(0.0); V]; 2]; G]; H], *halves);
        let left = &self.left[first * self.stride..];
        let (rows, whole_columns) = (self.right.rows(), (group + G) * GROUP <= self.right.cols());
        let whole = if whole_columns { rows / 2 } else { 0 };
        for q in 0..whole {
            for g in 0..G {
                let words = self.right.words::<D, V>(dots, q, (group + g) * GROUP);
                self.step::<D, V, H, G>(dots, (q, g), left, words, (&mut acc, &mut most));
            }
        }
        let pairs = rows.div_ceil(2);
        let mut rest = ScratchBuf::take((pairs - whole) * G * GROUP);
        let rest = rest.words_mut().as_chunks_mut::<WORDS>().0.as_chunks_mut::<2>().0;
        for (at, words) in rest.iter_mut().enumerate() {
            *words = self.right.ragged(dots, whole + at / G, (group + at % G) * GROUP);
        }
        for (q, words) in (whole..).zip(rest.chunks_exact(G)) {
            for g in 0..G {
                let words = [vectors::<D, V>(&words[g][0]), vectors::<D, V>(&words[g][1])];
                self.step::<D, V, H, G>(dots, (q, g), left, words, (&mut acc, &mut most));
            }
        }
        *halves = most;
        let width = self.right.cols().next_multiple_of(GROUP);
        for (h, acc) in acc.iter().enumerate() {
            for (g, acc) in acc.iter().enumerate() {
                let to = &mut self.sums[(first + h) * width + (group + g) * GROUP..][..GROUP];
                let to = <D::Simd as Simd>::as_mut_simd_f32s(to).0;
                to.iter_mut().zip(acc.as_flattened()).for_each(|(to, acc)| *to = *acc);
            }
        }
        G
    }

    /// One step of the chains of one group.
    #[inline(always)]
    fn step<D: Bf16Products, const V: usize, const H: usize, const G: usize>(
        &self,
        dots: D,
        (q, g): (usize, usize),
        left: &[u32],
        words: [Vectors<D, V>; 2],
        (acc, halves): (&mut Chains<D, V, H, G>, &mut Halves<D::Simd>),
    ) {
        let simd = dots.simd();
        for (side, words) in words.into_iter().enumerate() {
            for (v, words) in words.into_iter().enumerate() {
                halves.add(simd, words);
                for (h, acc) in acc.iter_mut().enumerate() {
                    let pair = simd.splat_u32s(left[h * self.stride + q]);
                    acc[g][side][v] = dots.add_dots(acc[g][side][v], pair, words);
                }
            }
        }
    }
}
