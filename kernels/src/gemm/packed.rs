//! Right operands that are packed once and used often.
//!
//! ```text
//! block of K after block of K:                  `depth` rows each, the last may have fewer
//!   panel after panel:                          NR columns
//!     group after group of the block's rows:    all of the block where the format has no groups
//!       [a row of scales]                       where it is scaled
//!       rows of words                           as `microkernel::Stored` says
//! ```
//! Panels of f32 words are as wide as their columns, rounded up to a vector; the others are filled up to NR. Panels for tiles hold whole
//! tiles instead of rows of words: see `gemm::split`.

mod fill;

use std::ops::Range;

use super::bf16_pairs::PackPairs;
use super::blocking::{block_depth, blocking};
use super::microkernel::amx::{BLOCK, SIDE};
use super::microkernel::{KernelInfo, PROOF, Rhs, Storage, kernel_for, with_bf16_kernel};
use super::odd_elements::OddColumns;
use super::operand::Operand;
use super::pair_packing::Paired;
use super::placement::lies_far;
use super::quantise::{WeightFormat, decode};
use super::split::right_element;
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::isa::IsaName;
use crate::scratch::Words;
use crate::view::MatRef;

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
    /// Columns that a kernel on tiles needs as they were.
    odd: OddColumns,
    /// The sum of each column's integers, in `Int8`.
    column_sums: Vec<i32>,
}

impl PackedWeights {
    /// Packs `b` for the kernel that `ctx` selects: as f32, or where its precision asks for less and the CPU has tiles, as bf16 parts.
    ///
    /// # Errors
    /// [`ShapeError::Overflow`] when the packed size does not fit in memory's address range.
    pub fn pack<'b>(ctx: &Context, b: impl Into<Operand<'b>>) -> Result<Self, ShapeError> {
        PackedWeights::pack_as(ctx, b, WeightFormat::F32)
    }

    /// As [`PackedWeights::pack`], into memory of the thread's scratch list: for a call that packs, multiplies and forgets. Fresh memory
    /// would be cleared first, and new pages mapped.
    pub(crate) fn pack_for_call(ctx: &Context, b: MatRef<'_>) -> Result<Self, ShapeError> {
        PackedWeights::pack_for_call_as(ctx, b.into(), WeightFormat::F32)
    }

    /// The same in that format.
    pub(super) fn pack_for_call_as(
        ctx: &Context,
        b: Operand<'_>,
        format: WeightFormat,
    ) -> Result<Self, ShapeError> {
        let (mut packed, len) = PackedWeights::shaped(ctx, [b.rows(), b.cols()], format)?;
        packed.words = Words::lent(len);
        packed.repack(ctx, b)?;
        Ok(packed)
    }

    /// Packs `b` in that format for the kernel that `ctx` selects for it. What is smaller is read faster: a product
    /// of few rows takes as long as reading its weights.
    ///
    /// # Errors
    /// As [`PackedWeights::pack`]; and [`ShapeError::Value`] when the format's group is no positive multiple of 8, or
    /// when an integer format is asked for and an element is not finite or beyond half of the largest f32.
    pub fn pack_as<'b>(
        ctx: &Context,
        b: impl Into<Operand<'b>>,
        format: WeightFormat,
    ) -> Result<Self, ShapeError> {
        let b = b.into();
        let mut packed = PackedWeights::shaped(ctx, [b.rows(), b.cols()], format)?.0;
        packed.repack(ctx, b)?;
        Ok(packed)
    }

    /// Packs weights that are integers already, as [`WeightFormat::Int8`]: element (p, j) is `scales[j]·values[p][j]`.
    ///
    /// # Shapes
    /// values `[k, n]`, any strides; scales `[n]`.
    ///
    /// # Errors
    /// [`ShapeError`] when there is not one scale a column, when one is not finite, or when the packed size overflows.
    pub fn from_int8(ctx: &Context, values: MatRef<'_, i8>, scales: &[f32]) -> Result<Self, ShapeError> {
        expect_dim("scales", "elements", values.cols(), scales.len())?;
        if let Some(at) = scales.iter().position(|scale| !scale.is_finite()) {
            let value = format!("{} at {at}", scales[at]);
            return Err(ShapeError::Value { argument: "scales", value, expected: "finite" });
        }
        let shape = [values.rows(), values.cols()];
        let (mut packed, len) = PackedWeights::shaped(ctx, shape, WeightFormat::Int8)?;
        packed.words.resize(len);
        packed.encode(values, Some(scales));
        Ok(packed)
    }

    /// Weights of that shape without their words, and how many words they need.
    fn shaped(
        ctx: &Context,
        [rows, cols]: [usize; 2],
        format: WeightFormat,
    ) -> Result<(Self, usize), ShapeError> {
        format.check_numbers()?;
        let kernel = kernel_for(ctx, rows, format);
        let even = block_depth(rows, blocking(ctx, kernel).kc, kernel);
        let (depth, group) = match format {
            WeightFormat::Int4 { group } => (even.next_multiple_of(group), group),
            _ => (even, even),
        };
        let shaped = PackedWeights {
            words: Words::default(),
            rows,
            cols,
            depth,
            group,
            format,
            kernel,
            odd: OddColumns::default(),
            column_sums: Vec::new(),
        };
        let len = shaped.len().ok_or(ShapeError::Overflow { argument: "b" })?;
        let beyond = shaped.beyond();
        Ok((shaped, len + beyond))
    }

    /// Packs other values, or another matrix, into the same memory and format: for weights that change each step.
    ///
    /// # Errors
    /// As [`PackedWeights::pack_as`]; then the old weights stand.
    pub fn repack<'b>(&mut self, ctx: &Context, b: impl Into<Operand<'b>>) -> Result<(), ShapeError> {
        match b.into() {
            Operand::F32(b) => self.repack_elements(ctx, b),
            Operand::Bf16(b) => self.repack_elements(ctx, b),
        }
    }

    fn repack_elements<T: Paired>(&mut self, ctx: &Context, b: MatRef<'_, T>) -> Result<(), ShapeError> {
        let (shape, len) = PackedWeights::shaped(ctx, [b.rows(), b.cols()], self.format)?;
        // After the size: a broadcast may claim more elements than anyone can look at.
        self.format.check_elements(b)?;
        let mut words = std::mem::take(&mut self.words);
        words.resize(len);
        let kernel = shape.kernel;
        *self = PackedWeights { words, ..shape };
        match (kernel.isa, kernel.storage) {
            (IsaName::Amx, _) => self.pack_tiles(ctx, b),
            (IsaName::Avx512Bf16, _) => {
                with_bf16_kernel(ctx.isa().bf16_dots().expect(PROOF), PackPairs(self, b));
            }
            (_, Storage::F32) => self.pack_words(ctx, b),
            _ => self.encode(b, None),
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
        size_of_val(&*self.words) - size_of::<u32>() * self.beyond()
    }

    /// The kernel that it was packed for.
    pub fn kernel_name(&self) -> &'static str {
        self.kernel.name
    }

    /// The elements that the product uses, row-major `[k, n]`: those given, rounded as the format says.
    pub fn unpack(&self) -> Vec<f32> {
        let storage = self.kernel.storage;
        let mut elements = vec![0.0; self.rows * self.cols];
        if self.kernel.isa == IsaName::Amx {
            for (i, x) in elements.iter_mut().enumerate() {
                *x = self.tile_element(i / self.cols, i % self.cols);
            }
            return elements;
        }
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

    /// The kernel that it was packed for.
    pub(super) fn kernel(&self) -> &'static KernelInfo {
        self.kernel
    }

    /// The depth of the blocks of K.
    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    /// The depth of the groups that have a scale each.
    pub(super) fn group(&self) -> usize {
        self.group
    }

    /// The blocks of K.
    pub(super) fn depths(&self) -> Vec<Range<usize>> {
        (0..self.rows).step_by(self.depth).map(|p| p..(p + self.depth).min(self.rows)).collect()
    }

    /// Columns of a panel.
    pub(super) fn panel_cols(&self) -> usize {
        self.kernel.nr
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
            far: lies_far(self.bytes()) && self.panel_width(cols.start) == self.kernel.nr,
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
        let parts = self.kernel.storage.parts();
        let words = |depth: usize| match depth.next_multiple_of(self.kernel.k_step) {
            0 => 0,
            depth => scaled + depth.div_ceil(per_word) * parts,
        };
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

    /// Words behind the last one that a tile of bytes may read: the rows that the last step of a block lacks.
    fn beyond(&self) -> usize {
        if self.kernel.storage == Storage::Int8 { self.kernel.nr * (SIDE - 1) } else { 0 }
    }
}

impl PackedWeights {
    /// The sums of the integers of those columns.
    pub(super) fn column_sums(&self, cols: &Range<usize>) -> &[i32] {
        &self.column_sums[cols.clone()]
    }

    /// The scales of columns `cols` of a panel of int8.
    pub(super) fn column_scales(&self, panel: &Range<usize>, cols: &Range<usize>) -> &[f32] {
        if self.rows == 0 {
            return &[0.0; BLOCK][..cols.len()];
        }
        let at = self.offset(0..self.depth.min(self.rows), panel.start) + cols.start - panel.start;
        self.words.as_f32(at..at + cols.len())
    }

    /// The words of `count` columns from column `first` of a panel of int8 on, in the block of K with rows `depth`: rows of `panel_cols`
    /// words, whole steps of 16 rows and whole tiles of 16 columns, of which those beyond the block hold anything.
    pub(super) fn panel_words(
        &self,
        depth: Range<usize>,
        panel: &Range<usize>,
        (first, count): (usize, usize),
    ) -> &[u32] {
        let rows = depth.len().div_ceil(4).next_multiple_of(SIDE);
        // The words follow their row of scales.
        let at = self.offset(depth, panel.start) + self.kernel.nr + first;
        let reached = (rows - 1) * self.kernel.nr + count.next_multiple_of(SIDE);
        &self.words[at..at + reached]
    }

    /// The panel of whole words that starts with column `panel`, in the block of K with rows `depth`.
    #[inline]
    pub(super) fn panel_mut(&mut self, depth: Range<usize>, panel: usize) -> &mut [u32] {
        let words = self.column_words(depth.len()) * self.kernel.nr;
        let at = self.offset(depth, panel);
        &mut self.words[at..at + words]
    }

    /// The panel for tiles that starts with column `panel`, in the block of K with rows `depth`.
    #[inline]
    pub(super) fn tile_panel(&self, depth: Range<usize>, panel: usize) -> &[u32] {
        let words = self.column_words(depth.len()) * self.kernel.nr;
        &self.words[self.offset(depth, panel)..][..words]
    }

    /// Marks the columns of a panel for which parts do not stand.
    pub(super) fn mark_odd(&self, cols: &Range<usize>, odd: &mut [bool; BLOCK]) {
        self.odd.mark(cols, odd);
    }

    /// Element (p, j) as a product on tiles uses it.
    pub(super) fn tile_element(&self, p: usize, j: usize) -> f32 {
        let block = p / self.depth * self.depth;
        let depth = block..(block + self.depth).min(self.rows);
        let panel = j / self.kernel.nr * self.kernel.nr;
        self.odd.element(p, j).unwrap_or_else(|| {
            let words = self.tile_panel(depth, panel);
            right_element(words, self.kernel.storage.parts(), p - block, j - panel)
        })
    }
}
