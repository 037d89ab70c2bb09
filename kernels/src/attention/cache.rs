//! A key-value cache in the order that decoding reads: keys across, values along.
//!
//! ```text
//! keys   [sequences, kv_heads, capacity / PANEL, dim, PANEL]      key j at [j / PANEL, :, j mod PANEL]
//! values [sequences, kv_heads, capacity, v_dim]
//! ```
//! Decoding reads each byte of a cache once, so nothing pays for transposing keys on the way: they are written
//! transposed, a panel of [`PANEL`] keys at a time, when they are appended. A head's keys and values are each one
//! stream through memory.

use crate::error::{ShapeError, expect_dim};
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
}

/// A cache to read.
#[derive(Debug, Clone, Copy)]
pub struct Cache<'a> {
    layout: CacheLayout,
    keys: &'a [f32],
    values: &'a [f32],
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
        Ok(Cache { layout, keys, values })
    }

    /// The dimensions.
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// One panel of keys of one head, [dim, PANEL].
    #[inline(always)]
    pub(super) fn panel(&self, sequence: usize, head: usize, panel: usize) -> &'a [f32] {
        let CacheLayout { kv_heads, capacity, dim, .. } = self.layout;
        let size = dim * PANEL;
        &self.keys[((sequence * kv_heads + head) * (capacity / PANEL) + panel) * size..][..size]
    }

    /// The values of one head, [capacity, v_dim].
    #[inline(always)]
    pub(super) fn values(&self, sequence: usize, head: usize) -> &'a [f32] {
        let CacheLayout { kv_heads, capacity, v_dim, .. } = self.layout;
        let size = capacity * v_dim;
        &self.values[(sequence * kv_heads + head) * size..][..size]
    }
}

/// A cache to write.
#[derive(Debug)]
pub struct CacheMut<'a> {
    layout: CacheLayout,
    keys: &'a mut [f32],
    values: &'a mut [f32],
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
        Ok(CacheMut { layout, keys, values })
    }

    /// Writes the keys and values of all positions of sequence `from` of `k` and `v` to `sequence` of the cache, from
    /// `position` on.
    ///
    /// # Shapes
    /// k [batch, n, kv_heads, dim], v [batch, n, kv_heads, v_dim].
    ///
    /// # Errors
    /// [`ShapeError`] when shapes do not fit or there is no room; nothing has been written then.
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
        for head in 0..kv_heads {
            let (k, v) = (k.head(from, head), v.head(from, head));
            let first = (sequence * kv_heads + head) * capacity;
            let keys = &mut self.keys[first * dim..][..capacity * dim];
            let values = &mut self.values[first * v_dim..][..capacity * v_dim];
            for i in 0..n {
                let at = position + i;
                let panel = &mut keys[at / PANEL * PANEL * dim..][..PANEL * dim];
                for (to, &x) in panel[at % PANEL..].iter_mut().step_by(PANEL).zip(k.row(i)) {
                    *to = x;
                }
                values[at * v_dim..][..v_dim].copy_from_slice(v.row(i));
            }
        }
        Ok(())
    }
}
