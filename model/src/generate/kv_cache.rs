//! What a transformer decoder remembers: keys and values of the positions so far, and of the source.

use std::sync::Arc;

use kavanam_kernels::attention::{self as kernel, AttentionSpec, Mask};
use kavanam_kernels::memory::AlignedVec;
use kavanam_kernels::{HeadsLayout, HeadsMut, HeadsRef, MatMut, ShapeError};

use crate::ops::{AttentionShape, fused_part};
use crate::tape::{Tape, Var};

/// The caches of one decoder layer.
#[derive(Debug, Clone)]
pub struct LayerCache {
    /// Of the target so far.
    pub to_self: SelfCache,
    /// Of the source.
    pub to_source: CrossCache,
}

/// Keys and values of the positions so far, `[rows, capacity, 2 · width]`; grows by doubling.
#[derive(Debug, Clone)]
pub struct SelfCache {
    values: AlignedVec<f32>,
    rows: usize,
    width: usize,
    capacity: usize,
    len: usize,
}

/// Positions that a new cache has room for.
const FIRST_CAPACITY: usize = 16;

impl SelfCache {
    /// No position yet.
    pub fn new(rows: usize, width: usize) -> SelfCache {
        let capacity = FIRST_CAPACITY;
        let values = AlignedVec::zeroed(rows * capacity * 2 * width);
        SelfCache { values, rows, width, capacity, len: 0 }
    }

    /// How many sequences.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How many positions.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no position yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Row `i` becomes what row `rows[i]` was.
    pub fn reorder(&mut self, rows: &[usize]) {
        *self = self.gathered(rows.iter().copied(), self.capacity);
    }

    fn gathered(&self, rows: impl ExactSizeIterator<Item = usize>, capacity: usize) -> SelfCache {
        let (used, old, new) =
            (self.len * 2 * self.width, self.capacity * 2 * self.width, capacity * 2 * self.width);
        let count = rows.len();
        let mut values = AlignedVec::zeroed(count * new);
        for (i, row) in rows.enumerate() {
            values[i * new..][..used].copy_from_slice(&self.values[row * old..][..used]);
        }
        SelfCache { values, rows: count, capacity, ..*self }
    }

    /// Appends the keys and values of `qkv` `[rows, 3 · width]` and attends from its queries to all positions.
    ///
    /// # Errors
    /// [`ShapeError`] when shapes do not fit.
    pub fn attend(
        &mut self,
        tape: &mut Tape<'_>,
        qkv: Var,
        shape: &AttentionShape,
    ) -> Result<Var, ShapeError> {
        if self.len == self.capacity {
            *self = self.gathered(0..self.rows, 2 * self.capacity);
        }
        let (rows, width) = (self.rows, self.width);
        let stride = self.capacity * 2 * width;
        for (row, new) in tape.value(qkv).chunks_exact(3 * width).enumerate() {
            self.values[row * stride + self.len * 2 * width..][..2 * width].copy_from_slice(&new[width..]);
        }
        self.len += 1;
        let fused = HeadsLayout {
            batch_stride: stride,
            ..HeadsLayout::batch_seq_heads(rows, self.len, 2 * shape.heads, width / shape.heads)
        };
        let k = fused_part(&self.values, fused, shape.heads, 0)?;
        let v = fused_part(&self.values, fused, shape.heads, 1)?;
        let q = fused_part(tape.value(qkv), shape.layout((rows, 3 * width), 3)?, shape.heads, 0)?;
        let mut out = tape.buffer(rows * width);
        let mut lse = tape.buffer(rows * shape.heads);
        let out_view = HeadsMut::new(&mut out, shape.layout((rows, width), 1)?)?;
        kernel::forward(tape.context(), &kernel::Inputs { q, k, v }, &shape.spec(), out_view, &mut lse)?;
        Ok(tape.push_inference(out, rows, width))
    }
}

/// Keys and values of the sources, `[sources, source_len, 2 · width]`, each shared by `beams` rows.
#[derive(Debug, Clone)]
pub struct CrossCache {
    values: Arc<Vec<f32>>,
    lengths: Arc<[usize]>,
    source_len: usize,
    width: usize,
    beams: usize,
    /// The weights of the last step over the source positions, averaged over the heads, where they are wanted.
    weights: Option<Vec<f32>>,
}

impl CrossCache {
    /// Of projected sources, `[lengths.len() · source_len, 2 · width]`.
    pub fn new(values: Vec<f32>, lengths: Arc<[usize]>, source_len: usize, beams: usize) -> CrossCache {
        let width = values.len() / (lengths.len() * source_len * 2).max(1);
        CrossCache { values: Arc::new(values), lengths, source_len, width, beams, weights: None }
    }

    /// How many sources.
    pub fn sources(&self) -> usize {
        self.lengths.len()
    }

    /// The length of each source.
    pub fn lengths(&self) -> Arc<[usize]> {
        self.lengths.clone()
    }

    /// Whether steps fill [`CrossCache::weights`].
    pub fn want_weights(&mut self, wanted: bool) {
        self.weights = wanted.then(Vec::new);
    }

    /// The weights of the last step, `[rows, source_len]`.
    pub fn weights(&self) -> Option<&[f32]> {
        self.weights.as_deref()
    }

    /// Source `i` becomes what source `sources[i]` was; nothing is copied when all stay.
    pub fn select(&mut self, sources: &[usize]) {
        if sources.iter().copied().eq(0..self.sources()) {
            return;
        }
        let size = self.source_len * 2 * self.width;
        let part = |&s: &usize| &self.values[s * size..(s + 1) * size];
        self.values = Arc::new(sources.iter().flat_map(part).copied().collect());
        self.lengths = sources.iter().map(|&s| self.lengths[s]).collect();
    }

    /// Attends from `q` `[sources · beams, width]`: the beams of a source are so many queries to the same keys.
    ///
    /// # Errors
    /// [`ShapeError`] when shapes do not fit.
    pub fn attend(&mut self, tape: &mut Tape<'_>, q: Var, shape: &AttentionShape) -> Result<Var, ShapeError> {
        let (sources, heads) = (self.sources(), shape.heads);
        let rows = sources * self.beams;
        let fused = shape.layout((sources * self.source_len, 2 * self.width), 2)?;
        let k = fused_part(&self.values, fused, heads, 0)?;
        let v = fused_part(&self.values, fused, heads, 1)?;
        let layout = shape.layout((rows, self.width), 1)?;
        let mut out = tape.buffer(rows * self.width);
        let mut lse = tape.buffer(rows * heads);
        let q = HeadsRef::new(tape.value(q), layout)?;
        let out_view = HeadsMut::new(&mut out, layout)?;
        let spec = AttentionSpec {
            scale: shape.scale,
            mask: Mask { key_lengths: Some(&self.lengths), ..Mask::none() },
        };
        kernel::forward(tape.context(), &kernel::Inputs { q, k, v }, &spec, out_view, &mut lse)?;
        if let Some(weights) = &mut self.weights {
            let (beams, source_len) = (self.beams, self.source_len);
            let mut of_head = tape.buffer(beams * source_len);
            weights.clear();
            weights.resize(rows * source_len, 0.0);
            for (source, sum) in weights.chunks_exact_mut((beams * source_len).max(1)).enumerate() {
                for head in 0..heads {
                    let into = MatMut::new(&mut of_head, beams, source_len)?;
                    kernel::probabilities(tape.context(), q, k, &spec, (source, head), into)?;
                    for (sum, p) in sum.iter_mut().zip(of_head.iter()) {
                        *sum += p / heads as f32;
                    }
                }
            }
        }
        Ok(tape.push_inference(out, rows, self.width))
    }
}
