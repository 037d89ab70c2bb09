//! A key-value cache in the order that decoding reads: keys across, values along.
//!
//! ```text
//! keys   [sequences, kv_heads, capacity / PANEL, dim, PANEL]      key j at [j / PANEL, :, j mod PANEL]
//! values [sequences, kv_heads, capacity, v_dim]
//! ```
//! In fewer bits, a row of keys (one element of the keys of a panel) or of values stands in groups of 16 words:
//! element `at` of word `w` is column `16·at + w` of its group. int8 has one scale for each position and head of the
//! keys, and one of the values.
//!
//! Decoding reads each byte of a cache once, so nothing pays for transposing keys on the way: they are written
//! transposed, a panel of [`PANEL`] keys at a time, when they are appended. A head's keys and values are each one
//! stream through memory.

use std::ops::Range;

use super::stored::{GROUP_WORDS, put};
use crate::error::{ShapeError, expect_dim};
use crate::gemm::microkernel::Storage;
use crate::gemm::quantise::{encode, scale_of};
use crate::view::HeadsRef;

/// Keys of one panel: eight vectors of AVX2, which one query takes side by side.
pub const PANEL: usize = 64;

/// The dimensions of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheLayout {
    /// Sequences, or whatever the rows of a cache stand for.
    pub sequences: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// Positions that there is room for; a multiple of [`PANEL`].
    pub capacity: usize,
    /// Elements of a key.
    pub dim: usize,
    /// Elements of a value.
    pub v_dim: usize,
}

impl CacheLayout {
    /// How many elements the keys and the values take.
    ///
    /// # Errors
    /// [`ShapeError`] when the capacity is no multiple of [`PANEL`] or a size overflows.
    pub fn sizes(&self) -> Result<[usize; 2], ShapeError> {
        if !self.capacity.is_multiple_of(PANEL) {
            return Err(ShapeError::Value {
                argument: "capacity",
                value: self.capacity.to_string(),
                expected: "a multiple of 64",
            });
        }
        let positions = self.sequences.checked_mul(self.kv_heads).and_then(|n| n.checked_mul(self.capacity));
        let size = |dim: usize| {
            positions.and_then(|n| n.checked_mul(dim)).ok_or(ShapeError::Overflow { argument: "cache" })
        };
        Ok([size(self.dim)?, size(self.v_dim)?])
    }

    /// How many words, and how many scales, the keys and the values take in fewer bits.
    ///
    /// # Errors
    /// As [`CacheLayout::sizes`].
    pub fn stored_sizes(&self, format: CacheFormat) -> Result<StoredSizes, ShapeError> {
        let words = |columns: usize| format.words(columns);
        let rows = CacheLayout { dim: self.dim, v_dim: words(self.v_dim), ..*self };
        let [keys, values] = rows.sizes()?;
        let scales =
            if format == CacheFormat::Int8 { self.sequences * self.kv_heads * self.capacity } else { 0 };
        Ok(StoredSizes { keys: keys / format.per_word(), values, scales })
    }
}

/// How a cache stores its elements in fewer bits than f32.
///
/// | format | largest difference from the given element `x` |
/// |---|---|
/// | `Bf16` | `2⁻⁸·\|x\|` |
/// | `Int8` | `max\|key or value\|/254·(1 + 2⁻¹⁴)` |
///
/// Asserted by `attention::tests::decode_stored`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheFormat {
    /// The upper half of an f32, rounded to nearest, ties to even.
    Bf16,
    /// Integers of 8 bits and one scale for each position and head, of keys and of values.
    Int8,
}

impl CacheFormat {
    fn storage(self) -> Storage {
        match self {
            CacheFormat::Bf16 => Storage::Bf16,
            CacheFormat::Int8 => Storage::Int8,
        }
    }

    /// Elements in one word.
    pub(super) fn per_word(self) -> usize {
        self.storage().per_word()
    }

    /// Words of a row: whole groups.
    pub(super) fn words(self, columns: usize) -> usize {
        columns.div_ceil(GROUP_WORDS * self.per_word()) * GROUP_WORDS
    }
}

/// The sizes of a cache in fewer bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredSizes {
    /// Words of the keys.
    pub keys: usize,
    /// Words of the values.
    pub values: usize,
    /// Scales of the keys, and as many of the values; 0 for bf16.
    pub scales: usize,
}

/// The buffers of a cache in fewer bits.
#[derive(Debug, Clone, Copy)]
pub struct StoredBuffers<'a> {
    /// Words of the keys.
    pub keys: &'a [u32],
    /// Words of the values.
    pub values: &'a [u32],
    /// The scales of the keys, [sequences, kv_heads, capacity]; empty for bf16.
    pub key_scales: &'a [f32],
    /// The scales of the values, as those of the keys.
    pub value_scales: &'a [f32],
}

/// The same to write.
#[derive(Debug)]
pub struct StoredBuffersMut<'a> {
    /// Words of the keys.
    pub keys: &'a mut [u32],
    /// Words of the values.
    pub values: &'a mut [u32],
    /// The scales of the keys, [sequences, kv_heads, capacity]; empty for bf16.
    pub key_scales: &'a mut [f32],
    /// The scales of the values, as those of the keys.
    pub value_scales: &'a mut [f32],
}

/// A cache to read.
#[derive(Debug, Clone, Copy)]
pub struct Cache<'a> {
    layout: CacheLayout,
    contents: Contents<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Contents<'a> {
    F32 { keys: &'a [f32], values: &'a [f32] },
    Stored(CacheFormat, StoredBuffers<'a>),
}

/// Rows of a head, as they are stored.
pub(super) enum Rows<'a> {
    F32(&'a [f32]),
    /// Words, and a scale for each key; no scales for bf16.
    Stored(CacheFormat, &'a [u32], &'a [f32]),
}

impl<'a> Cache<'a> {
    /// A view of `keys` and `values`.
    ///
    /// # Errors
    /// [`ShapeError`] when a buffer is not of the layout's size.
    pub fn new(layout: CacheLayout, keys: &'a [f32], values: &'a [f32]) -> Result<Cache<'a>, ShapeError> {
        let [key_len, value_len] = layout.sizes()?;
        expect_dim("keys", "elements", key_len, keys.len())?;
        expect_dim("values", "elements", value_len, values.len())?;
        Ok(Cache { layout, contents: Contents::F32 { keys, values } })
    }

    /// A view of a cache in fewer bits.
    ///
    /// # Errors
    /// [`ShapeError`] when a buffer is not of the layout's size.
    pub fn stored(
        layout: CacheLayout,
        format: CacheFormat,
        buffers: StoredBuffers<'a>,
    ) -> Result<Cache<'a>, ShapeError> {
        let sizes = layout.stored_sizes(format)?;
        expect_dim("keys", "words", sizes.keys, buffers.keys.len())?;
        expect_dim("values", "words", sizes.values, buffers.values.len())?;
        expect_dim("key_scales", "elements", sizes.scales, buffers.key_scales.len())?;
        expect_dim("value_scales", "elements", sizes.scales, buffers.value_scales.len())?;
        Ok(Cache { layout, contents: Contents::Stored(format, buffers) })
    }

    /// The dimensions.
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// Whether elements are integers of 8 bits.
    pub(super) fn is_int8(&self) -> bool {
        matches!(self.contents, Contents::Stored(CacheFormat::Int8, _))
    }

    /// One panel of keys of one head, [dim, PANEL].
    #[inline(always)]
    pub(super) fn panel(&self, sequence: usize, head: usize, panel: usize) -> Rows<'a> {
        self.panels(sequence, head, panel..panel + 1)
    }

    /// Panels of keys of one head, one after the other, each [dim, PANEL].
    #[inline(always)]
    pub(super) fn panels(&self, sequence: usize, head: usize, panels: Range<usize>) -> Rows<'a> {
        let CacheLayout { kv_heads, capacity, dim, .. } = self.layout;
        let (index, count) = ((sequence * kv_heads + head) * (capacity / PANEL) + panels.start, panels.len());
        match self.contents {
            Contents::F32 { keys, .. } => {
                let size = dim * PANEL;
                Rows::F32(&keys[index * size..][..count * size])
            }
            Contents::Stored(format, buffers) => {
                let size = dim * PANEL / format.per_word();
                let scales = if format == CacheFormat::Int8 { PANEL } else { 0 };
                Rows::Stored(
                    format,
                    &buffers.keys[index * size..][..count * size],
                    &buffers.key_scales[index * scales..][..count * scales],
                )
            }
        }
    }

    /// The values of one head, [capacity, v_dim].
    #[inline(always)]
    pub(super) fn values(&self, sequence: usize, head: usize) -> Rows<'a> {
        let CacheLayout { kv_heads, capacity, v_dim, .. } = self.layout;
        let index = sequence * kv_heads + head;
        match self.contents {
            Contents::F32 { values, .. } => {
                Rows::F32(&values[index * capacity * v_dim..][..capacity * v_dim])
            }
            Contents::Stored(format, buffers) => {
                let size = capacity * format.words(v_dim);
                let scales = if format == CacheFormat::Int8 { capacity } else { 0 };
                Rows::Stored(
                    format,
                    &buffers.values[index * size..][..size],
                    &buffers.value_scales[index * scales..][..scales],
                )
            }
        }
    }
}

/// A cache to write.
#[derive(Debug)]
pub struct CacheMut<'a> {
    layout: CacheLayout,
    contents: ContentsMut<'a>,
}

#[derive(Debug)]
enum ContentsMut<'a> {
    F32 { keys: &'a mut [f32], values: &'a mut [f32] },
    Stored(CacheFormat, StoredBuffersMut<'a>),
}

impl<'a> CacheMut<'a> {
    /// A view of `keys` and `values`.
    ///
    /// # Errors
    /// [`ShapeError`] when a buffer is not of the layout's size.
    pub fn new(
        layout: CacheLayout,
        keys: &'a mut [f32],
        values: &'a mut [f32],
    ) -> Result<CacheMut<'a>, ShapeError> {
        Cache::new(layout, keys, values)?;
        Ok(CacheMut { layout, contents: ContentsMut::F32 { keys, values } })
    }

    /// A view of a cache in fewer bits.
    ///
    /// # Errors
    /// [`ShapeError`] when a buffer is not of the layout's size.
    pub fn stored(
        layout: CacheLayout,
        format: CacheFormat,
        buffers: StoredBuffersMut<'a>,
    ) -> Result<CacheMut<'a>, ShapeError> {
        let StoredBuffersMut { keys, values, key_scales, value_scales } = &buffers;
        Cache::stored(layout, format, StoredBuffers { keys, values, key_scales, value_scales })?;
        Ok(CacheMut { layout, contents: ContentsMut::Stored(format, buffers) })
    }

    /// Writes the keys and values of all positions of sequence `from` of `k` and `v` to `sequence` of the cache, from
    /// `position` on.
    ///
    /// # Shapes
    /// k [batch, n, kv_heads, dim], v [batch, n, kv_heads, v_dim].
    ///
    /// # Errors
    /// [`ShapeError`] when shapes do not fit, there is no room, or integers are to hold a number that is not finite;
    /// nothing has been written then.
    pub fn append(
        &mut self,
        sequence: usize,
        position: usize,
        (k, v): (HeadsRef<'_>, HeadsRef<'_>),
        from: usize,
    ) -> Result<(), ShapeError> {
        let CacheLayout { sequences, kv_heads, capacity, dim, v_dim } = self.layout;
        let n = k.layout().seq;
        for (argument, layout, dim) in [("k", k.layout(), dim), ("v", v.layout(), v_dim)] {
            expect_dim(argument, "seq", n, layout.seq)?;
            expect_dim(argument, "heads", kv_heads, layout.heads)?;
            expect_dim(argument, "dim", dim, layout.dim)?;
        }
        let batch = k.layout().batch.min(v.layout().batch);
        let end = position.checked_add(n).ok_or(ShapeError::Overflow { argument: "position" })?;
        let room =
            [("sequence", sequence, sequences), ("from", from, batch), ("position", end, capacity + 1)];
        for (argument, index, len) in room {
            if index >= len {
                return Err(ShapeError::Index { argument, position: 0, index, len });
            }
        }
        if let ContentsMut::Stored(CacheFormat::Int8, _) = self.contents {
            expect_finite("k", k, from)?;
            expect_finite("v", v, from)?;
        }
        for head in 0..kv_heads {
            let (k, v) = (k.head(from, head), v.head(from, head));
            for i in 0..n {
                let head = sequence * kv_heads + head;
                match &mut self.contents {
                    ContentsMut::F32 { keys, values } => {
                        let at = position + i;
                        let panel = &mut keys[(head * capacity + at / PANEL * PANEL) * dim..][..PANEL * dim];
                        for (to, &x) in panel[at % PANEL..].iter_mut().step_by(PANEL).zip(k.row(i)) {
                            *to = x;
                        }
                        values[(head * capacity + at) * v_dim..][..v_dim].copy_from_slice(v.row(i));
                    }
                    ContentsMut::Stored(format, buffers) => {
                        let at = head * capacity + position + i;
                        buffers.put(*format, at, k.row(i), v.row(i));
                    }
                }
            }
        }
        Ok(())
    }
}

fn expect_finite(argument: &'static str, x: HeadsRef<'_>, from: usize) -> Result<(), ShapeError> {
    for head in 0..x.layout().heads {
        let x = x.head(from, head);
        if let Some(x) = (0..x.rows()).flat_map(|i| x.row(i)).find(|x| !x.is_finite()) {
            let expected = "finite for a cache of integers";
            return Err(ShapeError::Value { argument, value: x.to_string(), expected });
        }
    }
    Ok(())
}

impl StoredBuffersMut<'_> {
    /// Writes the key and the value of position `at`, counted over all heads of all sequences.
    fn put(&mut self, format: CacheFormat, at: usize, k: &[f32], v: &[f32]) {
        let (storage, per_word) = (format.storage(), format.per_word());
        let scale = |x: &[f32]| {
            let max = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            if format == CacheFormat::Int8 { scale_of(max, storage.largest()) } else { 1.0 }
        };
        let (of_k, of_v) = (scale(k), scale(v));
        let row = PANEL / per_word;
        for (d, &x) in k.iter().enumerate() {
            let words = &mut self.keys[(at / PANEL * k.len() + d) * row..][..row];
            put(words, per_word, at % PANEL, encode(storage, x, of_k));
        }
        let words = format.words(v.len());
        for (c, &x) in v.iter().enumerate() {
            put(&mut self.values[at * words..][..words], per_word, c, encode(storage, x, of_v));
        }
        if format == CacheFormat::Int8 {
            (self.key_scales[at], self.value_scales[at]) = (of_k, of_v);
        }
    }
}
