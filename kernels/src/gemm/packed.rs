//! Right operands that are packed once and used often.
//!
//! ```text
//! block of K after block of K:                  `depth` rows each, the last may have fewer
//!   panel after panel:                          NR columns
//!     group after group of the block's rows:    all of the block where the format has no groups
//!       [a row of scales]                       where it is scaled
//!       rows of words                           as `microkernel::Stored` says
//! ```
//! Panels of f32 words are as wide as their columns, rounded up to a vector; the others are filled up to NR.

use std::ops::Range;

use pulp::Simd;

use super::blocking::{block_depth, blocking};
use super::microkernel::{KernelInfo, KernelVisitor, Microkernel, Rhs, Storage, kernel_of, with_kernel};
use super::pack::{Source, pack_panels};
use super::quantise::{WeightFormat, decode, encode, scale_of};
use crate::context::Context;
use crate::error::ShapeError;
use crate::scratch::Words;
use crate::view::MatRef;

/// Bytes of weights that a core keeps near from one product to the next: the second-level cache of the core at hand.
const NEAR: usize = 512 * 1024;

/// A right operand `[k, n]` in the order in which one kernel reads it.
///
/// It carries the identity of that kernel; [`super::gemm_packed`] refuses it under a context that
/// selects another one. K is cut as the packing context's blocking says.
#[derive(Debug, Clone)]
pub struct PackedWeights {
    words: Words,
    rows: usize,
    cols: usize,
    /// The depth of the blocks of K, and of the groups in them.
    depth: usize,
    group: usize,
    format: WeightFormat,
    kernel: &'static KernelInfo,
}

impl PackedWeights {
    /// Packs `b` as f32 for the kernel that `ctx` selects.
    ///
    /// # Errors
    /// [`ShapeError::Overflow`] when the packed size does not fit in memory's address range.
    pub fn pack(ctx: &Context, b: MatRef<'_>) -> Result<Self, ShapeError> {
        PackedWeights::pack_as(ctx, b, WeightFormat::F32)
    }

    /// Packs `b` in that format for the kernel that `ctx` selects for it. What is smaller is read faster: a product
    /// of few rows takes as long as reading its weights.
    ///
    /// # Errors
    /// As [`PackedWeights::pack`]; and [`ShapeError::Value`] when the format's group is no positive multiple of 8, or
    /// when an integer format is asked for and an element is not finite or beyond half of the largest f32.
    pub fn pack_as(ctx: &Context, b: MatRef<'_>, format: WeightFormat) -> Result<Self, ShapeError> {
        let kernel = kernel_of(ctx.isa().name(), format.storage());
        let mut packed =
            PackedWeights { words: Words::default(), rows: 0, cols: 0, depth: 1, group: 1, format, kernel };
        packed.repack(ctx, b)?;
        Ok(packed)
    }

    /// Packs other values, or another matrix, into the same memory and format: for weights that change each step.
    ///
    /// # Errors
    /// As [`PackedWeights::pack_as`]; then the old weights stand.
    pub fn repack(&mut self, ctx: &Context, b: MatRef<'_>) -> Result<(), ShapeError> {
        self.format.check_numbers()?;
        let kernel = kernel_of(ctx.isa().name(), self.format.storage());
        let even = block_depth(b.rows(), blocking(ctx, kernel).kc);
        let (depth, group) = match self.format {
            WeightFormat::Int4 { group } => (even.next_multiple_of(group), group),
            _ => (even, even),
        };
        let shape = PackedWeights {
            words: Words::default(),
            rows: b.rows(),
            cols: b.cols(),
            depth,
            group,
            kernel,
            ..*self
        };
        let len = shape.len().ok_or(ShapeError::Overflow { argument: "b" })?;
        // After the size: a broadcast may claim more elements than anyone can look at.
        self.format.check_elements(b)?;
        let mut words = std::mem::take(&mut self.words);
        words.resize(len);
        *self = PackedWeights { words, ..shape };
        match kernel.storage {
            Storage::F32 => with_kernel(ctx.isa(), kernel.storage, PackF32(self, b)),
            _ => self.encode(b),
        }
        Ok(())
    }

    /// k: the inner dimension.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// n: the columns of the product.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the elements are stored.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// The bytes that hold the elements: what a product reads of them.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.words)
    }

    /// The kernel that it was packed for.
    pub fn kernel_name(&self) -> &'static str {
        self.kernel.name
    }

    /// The elements that the product uses, row-major `[k, n]`: those given, rounded as the format says.
    pub fn unpack(&self) -> Vec<f32> {
        let storage = self.kernel.storage;
        let mut elements = vec![0.0; self.rows * self.cols];
        for (p, row) in elements.chunks_exact_mut(self.cols.max(1)).enumerate() {
            let (block, within) = (p / self.depth * self.depth, p % self.depth);
            let (group, at) = (within / self.group * self.group, within % self.group);
            let depth = block..(block + self.depth).min(self.rows);
            for (j, x) in row.iter_mut().enumerate() {
                let panel = j / self.kernel.nr * self.kernel.nr;
                let width = self.panel_width(panel);
                let start = self.offset(depth.clone(), panel) + self.column_words(group) * width + j - panel;
                let scaled = usize::from(storage.largest() > 0);
                let word = self.words[start + (scaled + at / storage.per_word()) * width];
                *x = decode(storage, word, at % storage.per_word(), f32::from_bits(self.words[start]));
            }
        }
        elements
    }

    /// The depth of the blocks of K.
    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    /// The panels with columns `cols` of the block of K with rows `depth`, as the kernel reads them.
    #[inline]
    pub(super) fn panels(&self, depth: Range<usize>, cols: Range<usize>) -> Rhs {
        let column = self.column_words(depth.len());
        let at = self.offset(depth, cols.start);
        Rhs {
            ptr: self.words[at..at + cols.len() * column].as_ptr(),
            depth_stride: self.panel_width(cols.start),
            panel_stride: self.kernel.nr * column,
            group: self.group,
            far: self.bytes() > NEAR && self.panel_width(cols.start) == self.kernel.nr,
        }
    }

    /// Where the panel that starts with column `panel` begins in the block with rows `depth`.
    #[inline]
    fn offset(&self, depth: Range<usize>, panel: usize) -> usize {
        let before = depth.start / self.depth * self.column_words(self.depth);
        before * self.padded_cols() + panel * self.column_words(depth.len())
    }

    /// Words of one column, `depth` deep, its scales included.
    #[inline]
    fn column_words(&self, depth: usize) -> usize {
        let (per_word, scaled) =
            (self.kernel.storage.per_word(), usize::from(self.kernel.storage.largest() > 0));
        let (whole, rest) = (depth / self.group, depth % self.group);
        let words = |depth: usize| if depth == 0 { 0 } else { scaled + depth.div_ceil(per_word) };
        whole * words(self.group) + words(rest)
    }

    /// What the last panel is filled up to.
    #[inline]
    fn unit(&self) -> usize {
        if self.kernel.storage == Storage::F32 { self.kernel.lanes } else { self.kernel.nr }
    }

    #[inline]
    fn padded_cols(&self) -> usize {
        self.cols.next_multiple_of(self.unit())
    }

    /// The words of a row of the panel that starts with column `panel`.
    #[inline]
    fn panel_width(&self, panel: usize) -> usize {
        self.kernel.nr.min(self.padded_cols() - panel)
    }

    /// All words, or `None` when there are too many for an address range.
    fn len(&self) -> Option<usize> {
        let cols = self.cols.checked_next_multiple_of(self.unit())?;
        let blocks = (self.rows / self.depth).checked_mul(self.column_words(self.depth))?;
        let column = blocks.checked_add(self.column_words(self.rows % self.depth))?;
        cols.checked_mul(column).filter(|&len| len <= isize::MAX as usize / 8)
    }

    /// Stores the elements of `b`, rounded as the format says.
    fn encode(&mut self, b: MatRef<'_>) {
        let (k, n, nr) = (self.rows, self.cols, self.kernel.nr);
        let storage = self.kernel.storage;
        let magnitude = |rows: Range<usize>, j| rows.map(|p| b.at(p, j).abs()).fold(0.0, f32::max);
        for panel in (0..n).step_by(nr) {
            let cols = panel..(panel + nr).min(n);
            let mut scales: Vec<f32> = match self.format {
                WeightFormat::Int8 => cols.clone().map(|j| scale_of(magnitude(0..k, j), 127)).collect(),
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
                    at += encode_group(storage, group, &scales, &mut self.words[at..], nr);
                }
            }
        }
    }
}

/// Writes one group of a panel, rows `nr` words wide, and says how many words it took.
fn encode_group(storage: Storage, b: MatRef<'_>, scales: &[f32], words: &mut [u32], nr: usize) -> usize {
    let (per_word, bits) = (storage.per_word(), 32 / storage.per_word());
    let scaled = usize::from(storage.largest() > 0);
    let (head, body) = words.split_at_mut(scaled * nr);
    for (word, j) in head.iter_mut().zip(0..) {
        *word = scales.get(j).copied().unwrap_or(1.0).to_bits();
    }
    let rows = b.rows().div_ceil(per_word);
    for (q, row) in body.chunks_exact_mut(nr).take(rows).enumerate() {
        row.fill(0);
        for (j, word) in row.iter_mut().enumerate().take(b.cols()) {
            for p in q * per_word..((q + 1) * per_word).min(b.rows()) {
                *word |= encode(storage, b.at(p, j), scales[j]) << (bits * (p % per_word));
            }
        }
    }
    (scaled + rows) * nr
}

/// Packs f32 words, block of K after block of K, in the kernel's shell.
struct PackF32<'a>(&'a mut PackedWeights, MatRef<'a>);

impl KernelVisitor for PackF32<'_> {
    type Output = ();

    #[inline(always)]
    fn visit<K: Microkernel<Lhs = f32, Out = f32>>(self, _: K) {
        let PackF32(packed, b) = self;
        let lanes = <K::Simd as Simd>::F32_LANES;
        let (k, n, width) = (b.rows(), b.cols(), packed.padded_cols());
        let mut rest = packed.words.as_f32_mut();
        for pc in (0..k).step_by(packed.depth) {
            let depth = packed.depth.min(k - pc);
            let part = b.sub(pc..pc + depth, 0..n);
            let (block, after) = rest.split_at_mut(width * depth);
            rest = after;
            let source = Source {
                ptr: part.as_ptr(),
                depth_stride: part.row_stride(),
                lane_stride: part.col_stride(),
            };
            // SAFETY: the source is the view `part`.
            unsafe { pack_panels(source, depth, n, block, (K::NR, lanes)) };
        }
    }
}
