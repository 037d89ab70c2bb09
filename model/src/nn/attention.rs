//! Multi-head attention of a transformer: over the sequence itself, and over an encoded source.

use std::sync::Arc;

use kavanam_kernels::ShapeError;

use crate::generate::kv_cache::{CrossCache, SelfCache};
use crate::nn::Linear;
use crate::ops::{self, AttentionShape};
use crate::param::ParamStore;
use crate::tape::{Tape, Var};

/// Sequences side by side on the rows of a matrix.
#[derive(Debug, Clone)]
pub struct Sequences {
    /// How many.
    pub batch: usize,
    /// The length of each without its padding, where padding must be hidden.
    pub lengths: Option<Arc<[usize]>>,
}

impl Sequences {
    fn shape(&self, heads: usize, width: usize, causal: bool) -> AttentionShape {
        AttentionShape {
            batch: self.batch,
            heads,
            scale: ((width / heads) as f32).sqrt().recip(),
            causal,
            key_lengths: self.lengths.clone(),
            time_major: false,
        }
    }
}

/// `out_proj(softmax(q·kᵀ/√d)·v)` with q, k and v from one fused projection of the same sequence.
///
/// # Source
/// Vaswani et al. 2017, section 3.2.
#[derive(Debug, Clone, Copy)]
pub struct SelfAttention {
    qkv: Linear,
    out: Linear,
    heads: usize,
    width: usize,
    causal: bool,
}

impl SelfAttention {
    /// Adds `{name}.qkv_proj` (queries, keys and values, one under the other) and `{name}.out_proj`.
    pub fn new(store: &mut ParamStore, name: &str, width: usize, heads: usize, causal: bool) -> Self {
        let qkv = Linear::new(store, &format!("{name}.qkv_proj"), width, 3 * width, 3);
        let out = Linear::new(store, &format!("{name}.out_proj"), width, width, 1);
        SelfAttention { qkv, out, heads, width, causal }
    }

    /// `[batch · seq, width]` to the same.
    ///
    /// # Errors
    /// [`ShapeError`] when shapes do not fit.
    pub fn forward(&self, tape: &mut Tape<'_>, x: Var, sequences: &Sequences) -> Result<Var, ShapeError> {
        let qkv = self.qkv.forward(tape, x)?;
        let shape = sequences.shape(self.heads, self.width, self.causal);
        let mixed = ops::self_attention(tape, qkv, &shape)?;
        self.out.forward(tape, mixed)
    }

    /// One position more: x `[rows, width]` sees the cached positions and itself, and joins them.
    ///
    /// # Errors
    /// [`ShapeError`] when shapes do not fit.
    pub fn step(&self, tape: &mut Tape<'_>, x: Var, cache: &mut SelfCache) -> Result<Var, ShapeError> {
        let qkv = self.qkv.forward(tape, x)?;
        let shape = Sequences { batch: cache.rows(), lengths: None }.shape(self.heads, self.width, false);
        let mixed = cache.attend(tape, qkv, &shape)?;
        self.out.forward(tape, mixed)
    }
}

/// `out_proj(softmax(q·kᵀ/√d)·v)` with q from the decoder and k and v from the encoded source.
///
/// # Source
/// Vaswani et al. 2017, section 3.2.3.
#[derive(Debug, Clone, Copy)]
pub struct CrossAttention {
    q: Linear,
    kv: Linear,
    out: Linear,
    heads: usize,
    width: usize,
}

impl CrossAttention {
    /// Adds `{name}.q_proj`, `{name}.kv_proj` (keys and values, one under the other) and `{name}.out_proj`.
    pub fn new(store: &mut ParamStore, name: &str, width: usize, heads: usize) -> CrossAttention {
        let q = Linear::new(store, &format!("{name}.q_proj"), width, width, 1);
        let kv = Linear::new(store, &format!("{name}.kv_proj"), width, 2 * width, 2);
        let out = Linear::new(store, &format!("{name}.out_proj"), width, width, 1);
        CrossAttention { q, kv, out, heads, width }
    }

    /// x `[batch · seq, width]`, memory `[batch · source_len, width]` with the lengths of `source`.
    ///
    /// # Errors
    /// [`ShapeError`] when shapes do not fit.
    pub fn forward(
        &self,
        tape: &mut Tape<'_>,
        x: Var,
        memory: Var,
        source: &Sequences,
    ) -> Result<Var, ShapeError> {
        let q = self.q.forward(tape, x)?;
        let kv = self.kv.forward(tape, memory)?;
        let mixed = ops::cross_attention(tape, q, kv, &source.shape(self.heads, self.width, false))?;
        self.out.forward(tape, mixed)
    }

    /// The keys and values of an encoded source, `[batch · source_len, 2 · width]`: once for all steps.
    ///
    /// # Errors
    /// [`ShapeError`] when memory has another width.
    pub fn project(&self, tape: &mut Tape<'_>, memory: Var) -> Result<Var, ShapeError> {
        self.kv.forward(tape, memory)
    }

    /// One position more: x `[rows, width]` over the projected source; fills the cache's weights when wanted.
    ///
    /// # Errors
    /// [`ShapeError`] when shapes do not fit.
    pub fn step(&self, tape: &mut Tape<'_>, x: Var, cache: &mut CrossCache) -> Result<Var, ShapeError> {
        let q = self.q.forward(tape, x)?;
        let source = Sequences { batch: cache.sources(), lengths: Some(cache.lengths()) };
        let mixed = cache.attend(tape, q, &source.shape(self.heads, self.width, false))?;
        self.out.forward(tape, mixed)
    }
}
