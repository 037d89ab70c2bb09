//! How packed weights get their words: f32 as panels, narrow formats as words along k, parts for tiles.

use std::ops::Range;

use pulp::Simd;

use super::PackedWeights;
use crate::context::Context;
use crate::gemm::driver::slab;
use crate::gemm::microkernel::{KernelVisitor, Microkernel, Storage, with_kernel};
use crate::gemm::pack::{Element, Source, pack_panel, pack_panels};
use crate::gemm::pair_packing::Paired;
use crate::gemm::quantise::{WeightFormat, bf16_bits, encode, scale_of};
use crate::gemm::split::column_words;
use crate::gemm::tile_packing::pack_right;
use crate::scratch::ScratchBuf;
use crate::view::MatRef;

/// Elements from which on a second thread is worth calling to pack them.
const SHARED_FROM: usize = 1 << 18;

impl PackedWeights {
    /// Stores the elements of `b`, rounded as the format says; or as they are, integers that go with `given` scales.
    pub(super) fn encode<T: Element>(&mut self, b: MatRef<'_, T>, given: Option<&[f32]>) {
        let (k, n, nr) = (self.rows, self.cols, self.kernel.nr);
        let storage = self.kernel.storage;
        let magnitude = |rows: Range<usize>, j| rows.map(|p| b.at(p, j).widen().abs()).fold(0.0, f32::max);
        self.column_sums = vec![0; if self.format == WeightFormat::Int8 { n } else { 0 }];
        let ones = [1.0; MAX_PANEL];
        for panel in (0..n).step_by(nr) {
            let cols = panel..(panel + nr).min(n);
            let mut scales: Vec<f32> = match (self.format, given) {
                (_, Some(given)) => given[cols.clone()].to_vec(),
                (WeightFormat::Int8, None) => {
                    cols.clone().map(|j| scale_of(magnitude(0..k, j), 127)).collect()
                }
                _ => vec![1.0; cols.len()],
            };
            for block in (0..k).step_by(self.depth) {
                let depth = block..(block + self.depth).min(k);
                let mut at = self.offset(depth.clone(), panel);
                for first in depth.clone().step_by(self.group) {
                    let rows = first..(first + self.group).min(depth.end);
                    if let WeightFormat::Int4 { .. } = self.format {
                        scales = cols.clone().map(|j| scale_of(magnitude(rows.clone(), j), 7)).collect();
                    }
                    let group = b.sub(rows.clone(), cols.clone());
                    let units = if given.is_some() { &ones[..cols.len()] } else { &*scales };
                    let len = encode_group(storage, group, (&scales, units), &mut self.words[at..], nr);
                    if self.format == WeightFormat::Int8 {
                        let words = &self.words[at + nr..at + len];
                        add_columns(words, nr, group.rows(), &mut self.column_sums[cols.clone()]);
                    }
                    at += len;
                }
            }
        }
    }

    /// Packs f32 words; threads share each block of K by its columns.
    pub(super) fn pack_words<T: Element>(&mut self, ctx: &Context, b: MatRef<'_, T>) {
        let (k, n, width, nr) = (b.rows(), b.cols(), self.padded_cols(), self.kernel.nr);
        let pieces = if k.saturating_mul(n) < SHARED_FROM { 1 } else { ctx.thread_count() };
        let mut tasks = Vec::with_capacity(k.div_ceil(self.depth) * pieces);
        let mut rest = self.words.as_f32_mut();
        for pc in (0..k).step_by(self.depth) {
            let depth = pc..(pc + self.depth).min(k);
            let (mut block, after) = rest.split_at_mut(width * depth.len());
            rest = after;
            for cols in (0..pieces).map(|i| slab(n, nr, pieces, i)) {
                let end = if cols.end == n { width } else { cols.end };
                let (to, after) = block.split_at_mut((end - cols.start) * depth.len());
                block = after;
                tasks.push(PackF32 { from: b.sub(depth.clone(), cols), to });
            }
        }
        let (isa, storage) = (ctx.isa(), self.kernel.storage);
        ctx.for_each_owned(tasks, |task| with_kernel(isa, storage, task));
    }
}

impl PackedWeights {
    /// Packs whole tiles of bf16 parts; threads share each block of K by its columns.
    pub(super) fn pack_tiles<T: Paired>(&mut self, ctx: &Context, b: MatRef<'_, T>) {
        let (k, n, nr, storage) = (b.rows(), b.cols(), self.kernel.nr, self.kernel.storage);
        let conversion = ctx.isa().bf16_conversion().expect("tiles are for sets that have them");
        let pieces = if k.saturating_mul(n) < SHARED_FROM { 1 } else { ctx.thread_count() };
        let blocks = self.depths();
        let mut odd = vec![false; blocks.len() * n];
        let mut tasks = Vec::with_capacity(blocks.len() * pieces);
        let (mut words, mut marks) = (&mut *self.words, &mut *odd);
        for depth in &blocks {
            let column = column_words(depth.len(), storage.parts());
            for cols in (0..pieces).map(|i| slab(n, nr, pieces, i)) {
                let (to, rest) = words.split_at_mut(cols.len().next_multiple_of(nr) * column);
                let (odd, others) = marks.split_at_mut(cols.len());
                (words, marks) = (rest, others);
                tasks.push((b.sub(depth.clone(), cols), to, odd));
            }
        }
        ctx.for_each_owned(tasks, |(from, to, odd)| match storage.parts() {
            1 => pack_right::<T, 1>(conversion, from, to, storage, odd),
            2 => pack_right::<T, 2>(conversion, from, to, storage, odd),
            _ => pack_right::<T, 3>(conversion, from, to, storage, odd),
        });
        for (depth, odd) in blocks.iter().zip(odd.chunks(n.max(1))) {
            self.odd.keep(b.sub(depth.clone(), 0..n), depth.start, odd);
        }
    }
}

/// Packs some columns of a block of K as f32 words, in the kernel's shell.
struct PackF32<'a, T> {
    from: MatRef<'a, T>,
    to: &'a mut [f32],
}

impl<T: Element> KernelVisitor for PackF32<'_, T> {
    type Output = ();

    #[inline(always)]
    fn visit<K: Microkernel<Lhs = f32, Out = f32>>(self, _: K) {
        let PackF32 { from, to } = self;
        let shape = (K::NR, <K::Simd as Simd>::F32_LANES);
        // SAFETY: the source is the view `from`.
        unsafe { pack_panels(Source::of(&from), from.rows(), from.cols(), to, shape) };
    }
}

/// The columns of the widest panel.
const MAX_PANEL: usize = 64;

/// Adds the integers of rows of words, `nr` wide and `depth` deep, to the sums of their columns.
fn add_columns(words: &[u32], nr: usize, depth: usize, sums: &mut [i32]) {
    for row in words.chunks_exact(nr) {
        for (sum, word) in sums.iter_mut().zip(row) {
            *sum += word.to_le_bytes().into_iter().map(i32::from).sum::<i32>();
        }
    }
    // Each integer was stored with 128 added; what fills the last word was not.
    sums.iter_mut().for_each(|sum| *sum -= 128 * depth as i32);
}

/// Writes one group of a panel, rows `nr` words wide, and says how many words it took. An element is divided by its column's unit.
fn encode_group<T: Element>(
    storage: Storage,
    b: MatRef<'_, T>,
    (scales, units): (&[f32], &[f32]),
    words: &mut [u32],
    nr: usize,
) -> usize {
    let (per_word, bits) = (storage.per_word(), 32 / storage.per_word());
    let scaled = usize::from(storage.largest() > 0);
    let (head, body) = words.split_at_mut(scaled * nr);
    for (word, j) in head.iter_mut().zip(0..) {
        *word = scales.get(j).copied().unwrap_or(1.0).to_bits();
    }
    let rows = b.rows().div_ceil(per_word);
    // The elements of a row of words, whatever their strides.
    let mut staging = ScratchBuf::take(per_word * b.cols());
    for (q, row) in body.chunks_exact_mut(nr).take(rows).enumerate() {
        row.fill(0);
        let part = b.sub(q * per_word..((q + 1) * per_word).min(b.rows()), 0..b.cols());
        let staged = &mut staging[..part.rows() * b.cols()];
        // SAFETY: the source is the view `part`.
        unsafe { pack_panel(Source::of(&part), part.rows(), b.cols(), staged, b.cols()) };
        for (p, elements) in staged.chunks_exact(b.cols()).enumerate() {
            encode_row(storage, elements, units, bits * p, row);
        }
    }
    (scaled + rows) * nr
}

/// Puts a row of elements into its bits, `shift` up, of a row of words.
fn encode_row(storage: Storage, elements: &[f32], units: &[f32], shift: usize, row: &mut [u32]) {
    let columns = row.iter_mut().zip(elements);
    if storage == Storage::Bf16 {
        // Without the choice in the loop it becomes vectors.
        columns.for_each(|(word, x)| *word |= bf16_bits(*x) << shift);
    } else {
        columns.zip(units).for_each(|((word, x), unit)| *word |= encode(storage, *x, *unit) << shift);
    }
}
