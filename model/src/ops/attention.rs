//! Multi-head attention straight on the fused projections: no head is copied, split or transposed in memory.

use std::sync::Arc;

use kavanam_kernels::attention::{self as kernel, AttentionSpec, Mask};
use kavanam_kernels::error::expect_dim;
use kavanam_kernels::{HeadsLayout, HeadsMut, HeadsRef, ShapeError};

use crate::pool::Buffer;
use crate::tape::{Backward, BackwardPass, Tape, Var};

/// Sequences, heads and what is hidden.
#[derive(Debug, Clone)]
pub struct AttentionShape {
    /// Sequences.
    pub batch: usize,
    /// Heads that share the width evenly.
    pub heads: usize,
    /// Multiplies the scores; 1/√head_dim in the paper.
    pub scale: f32,
    /// Hide the future.
    pub causal: bool,
    /// Hide the keys of each sequence from this length on.
    pub key_lengths: Option<Arc<[usize]>>,
    /// Rows go position by position (time-major) instead of sequence by sequence.
    pub time_major: bool,
}

impl AttentionShape {
    pub(crate) fn spec(&self) -> AttentionSpec<'_> {
        let mask = if self.causal { Mask::causal(0) } else { Mask::none() };
        AttentionSpec { scale: self.scale, mask: Mask { key_lengths: self.key_lengths.as_deref(), ..mask } }
    }

    /// `[batch, seq, parts · heads, dim]` over a matrix of `rows` rows, each `parts · heads · dim` wide.
    pub(crate) fn layout(
        &self,
        (rows, cols): (usize, usize),
        parts: usize,
    ) -> Result<HeadsLayout, ShapeError> {
        expect_dim("rows", "rows modulo the batch", 0, rows % self.batch.max(1))?;
        expect_dim("columns", "columns modulo the heads", 0, cols % (parts * self.heads).max(1))?;
        let (seq, heads) = (rows / self.batch.max(1), parts * self.heads);
        let layout = HeadsLayout::batch_seq_heads(self.batch, seq, heads, cols / heads.max(1));
        if !self.time_major {
            return Ok(layout);
        }
        Ok(HeadsLayout { batch_stride: cols, seq_stride: self.batch * cols, ..layout })
    }
}

/// The heads `part · heads … (part + 1) · heads` of a fused tensor.
pub(crate) fn fused_part<'a>(
    data: &'a [f32],
    fused: HeadsLayout,
    heads: usize,
    part: usize,
) -> Result<HeadsRef<'a>, ShapeError> {
    let skipped = if data.is_empty() { 0 } else { part * heads * fused.head_stride };
    HeadsRef::new(&data[skipped..], HeadsLayout { heads, ..fused })
}

/// Self-attention on a fused projection `[q k v]`.
///
/// # Shapes
/// qkv `[batch · seq, 3 · width]`, result `[batch · seq, width]`, head h in columns `h·dim … (h + 1)·dim`.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit.
pub fn self_attention(tape: &mut Tape<'_>, qkv: Var, shape: &AttentionShape) -> Result<Var, ShapeError> {
    run(tape, Inputs { q: qkv, keys: Keys::Fused, shape: shape.clone() })
}

/// Attention of queries over the keys and values of another sequence, a fused projection `[k v]`.
///
/// # Shapes
/// q `[batch · seq_q, width]`, kv `[batch · seq_k, 2 · width]`, result as q.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit.
pub fn cross_attention(
    tape: &mut Tape<'_>,
    q: Var,
    kv: Var,
    shape: &AttentionShape,
) -> Result<Var, ShapeError> {
    run(tape, Inputs { q, keys: Keys::Apart(kv), shape: shape.clone() })
}

/// Attention of queries over annotations that are both keys and values.
///
/// # Shapes
/// q `[batch · seq_q, width]`, annotations `[batch · seq_k, width]`, result as q.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit.
///
/// # Source
/// Luong, Pham and Manning 2015, section 3.1, the score "dot".
pub fn dot_attention(
    tape: &mut Tape<'_>,
    q: Var,
    annotations: Var,
    shape: &AttentionShape,
) -> Result<Var, ShapeError> {
    run(tape, Inputs { q, keys: Keys::Same(annotations), shape: shape.clone() })
}

/// Where keys and values stand.
#[derive(Debug, Clone, Copy)]
enum Keys {
    /// In the matrix of the queries: `[q k v]`.
    Fused,
    /// In a matrix of their own: `[k v]`.
    Apart(Var),
    /// One matrix is both.
    Same(Var),
}

struct Inputs {
    q: Var,
    keys: Keys,
    shape: AttentionShape,
}

impl Inputs {
    /// q, k and v, given the values of the tape.
    fn views<'t>(
        &self,
        value: impl Fn(Var) -> (&'t [f32], (usize, usize)),
    ) -> Result<kernel::Inputs<'t>, ShapeError> {
        let (heads, shape) = (self.shape.heads, &self.shape);
        let (queries, q_shape) = value(self.q);
        let q = || HeadsRef::new(queries, shape.layout(q_shape, 1)?);
        match self.keys {
            Keys::Fused => {
                let layout = shape.layout(q_shape, 3)?;
                let [q, k, v] = [0, 1, 2].map(|part| fused_part(queries, layout, heads, part));
                Ok(kernel::Inputs { q: q?, k: k?, v: v? })
            }
            Keys::Apart(kv) => {
                let (kv, kv_shape) = value(kv);
                let layout = shape.layout(kv_shape, 2)?;
                let (k, v) = (fused_part(kv, layout, heads, 0)?, fused_part(kv, layout, heads, 1)?);
                Ok(kernel::Inputs { q: q()?, k, v })
            }
            Keys::Same(annotations) => {
                let (values, values_shape) = value(annotations);
                let k = HeadsRef::new(values, shape.layout(values_shape, 1)?)?;
                Ok(kernel::Inputs { q: q()?, k, v: k })
            }
        }
    }
}

fn run(tape: &mut Tape<'_>, inputs: Inputs) -> Result<Var, ShapeError> {
    let (rows, q_cols) = tape.shape(inputs.q);
    let width = if matches!(inputs.keys, Keys::Fused) { q_cols / 3 } else { q_cols };
    let mut out = tape.buffer(rows * width);
    let mut lse = tape.buffer(rows * inputs.shape.heads);
    let views = inputs.views(|var| (tape.value(var), tape.shape(var)))?;
    let out_view = HeadsMut::new(&mut out, inputs.shape.layout((rows, width), 1)?)?;
    kernel::forward(tape.context(), &views, &inputs.shape.spec(), out_view, &mut lse)?;
    Ok(tape.push(out, rows, width, || Saved { inputs, lse }))
}

struct Saved {
    inputs: Inputs,
    /// `[batch, heads, seq_q]`.
    lse: Buffer,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let q = self.inputs.q;
        let d_out = pass.output_grad(out);
        let mut d_q = pass.target(q);
        let shape = &self.inputs.shape;
        match self.inputs.keys {
            Keys::Fused => {
                let fused = HeadsMut::new(d_q.buffer(), shape.layout(pass.nodes.shape(q), 3)?)?;
                let (d_q, d_kv) = fused.split_heads(shape.heads);
                let (d_k, d_v) = d_kv.split_heads(shape.heads);
                self.run_back(pass, (out, &d_out), kernel::Grads { d_q, d_k, d_v, d_bias: None })?;
            }
            Keys::Apart(kv) => {
                let mut d_kv = pass.target(kv);
                let fused = HeadsMut::new(d_kv.buffer(), shape.layout(pass.nodes.shape(kv), 2)?)?;
                let (d_k, d_v) = fused.split_heads(shape.heads);
                let d_q = HeadsMut::new(d_q.buffer(), shape.layout(pass.nodes.shape(q), 1)?)?;
                self.run_back(pass, (out, &d_out), kernel::Grads { d_q, d_k, d_v, d_bias: None })?;
                pass.put(kv, d_kv)?;
            }
            Keys::Same(annotations) => {
                let layout = shape.layout(pass.nodes.shape(annotations), 1)?;
                let mut d_keys = pass.target(annotations);
                let mut d_values = pass.pool.take(d_keys.buffer().len());
                let d_q = HeadsMut::new(d_q.buffer(), shape.layout(pass.nodes.shape(q), 1)?)?;
                let d_k = HeadsMut::new(d_keys.buffer(), layout)?;
                let d_v = HeadsMut::new(&mut d_values, layout)?;
                self.run_back(pass, (out, &d_out), kernel::Grads { d_q, d_k, d_v, d_bias: None })?;
                pass.put(annotations, d_keys)?;
                pass.hand_on(annotations, d_values)?;
            }
        }
        pass.put(q, d_q)
    }
}

impl Saved {
    fn run_back(
        &self,
        pass: &BackwardPass<'_>,
        (out, d_out): (Var, &[f32]),
        grads: kernel::Grads<'_>,
    ) -> Result<(), ShapeError> {
        let shape = &self.inputs.shape;
        let kernel::Inputs { q, k, v } =
            self.inputs.views(|var| (pass.nodes.value(var), pass.nodes.shape(var)))?;
        let layout = shape.layout(pass.nodes.shape(out), 1)?;
        let out = HeadsRef::new(pass.nodes.value(out), layout)?;
        let saved = kernel::Saved { q, k, v, out, lse: &self.lse };
        kernel::backward(&pass.ctx, &saved, HeadsRef::new(d_out, layout)?, &shape.spec(), grads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{Case, check};

    fn shape(causal: bool, time_major: bool) -> AttentionShape {
        AttentionShape {
            batch: 2,
            heads: 2,
            scale: 0.7,
            causal,
            key_lengths: Some([3, 2].into()),
            time_major,
        }
    }

    #[test]
    fn gradients_of_self_attention() {
        for (causal, time_major) in [(false, false), (true, false), (true, true)] {
            let mut case = Case::new(8);
            case.input(2 * 4, 3 * 6);
            check(&case, |tape, v| self_attention(tape, v[0], &shape(causal, time_major)));
        }
    }

    #[test]
    fn gradients_of_cross_attention_with_shared_keys() {
        for time_major in [false, true] {
            let mut case = Case::new(8);
            case.input(2 * 2, 6);
            case.input(2 * 5, 12);
            check(&case, |tape, v| {
                let first = cross_attention(tape, v[0], v[1], &shape(false, time_major))?;
                cross_attention(tape, first, v[1], &shape(false, time_major))
            });
        }
    }

    #[test]
    fn gradients_of_dot_attention_where_keys_are_values() {
        let mut case = Case::new(8);
        case.input(2 * 3, 4);
        case.input(2 * 5, 4);
        let shape = AttentionShape { heads: 1, ..shape(false, true) };
        check(&case, |tape, v| {
            let first = dot_attention(tape, v[0], v[1], &shape)?;
            dot_attention(tape, first, v[1], &shape)
        });
    }

    #[test]
    fn many_heads_are_their_heads_one_by_one() {
        let (store, pool) = (crate::ParamStore::new(0), crate::Pool::new());
        let ctx = kavanam_kernels::Context::with_isa(kavanam_kernels::Isa::best());
        let mut tape = Tape::inference(&ctx, &store, &pool);
        let (rows, heads, dim) = (2 * 4, 2, 5);
        let mut random = crate::ops::gradient_check::Random(3);
        let fused: Vec<f32> = (0..rows * 3 * heads * dim).map(|_| random.next()).collect();
        let qkv = tape.constant(&fused, rows, 3 * heads * dim).unwrap();
        let all = self_attention(&mut tape, qkv, &shape(true, false)).unwrap();
        let all = tape.value(all).to_vec();
        for head in 0..heads {
            // Of q, k and v the columns of this head.
            let columns = |row: &[f32]| -> Vec<f32> {
                (0..3).flat_map(|part| row[(part * heads + head) * dim..][..dim].to_vec()).collect()
            };
            let own: Vec<f32> = fused.chunks(3 * heads * dim).flat_map(columns).collect();
            let own = tape.constant(&own, rows, 3 * dim).unwrap();
            let one =
                self_attention(&mut tape, own, &AttentionShape { heads: 1, ..shape(true, false) }).unwrap();
            for (row, expected) in tape.value(one).chunks(dim).enumerate() {
                assert_eq!(
                    &all[row * heads * dim + head * dim..][..dim],
                    expected,
                    "row {row} of head {head}"
                );
            }
        }
    }

    #[test]
    fn rows_must_fill_the_batch() {
        let (store, pool) = (crate::ParamStore::new(0), crate::Pool::new());
        let ctx = kavanam_kernels::Context::with_isa(kavanam_kernels::Isa::best());
        let mut tape = Tape::inference(&ctx, &store, &pool);
        let qkv = tape.constant(&[0.0; 90], 5, 18).unwrap();
        assert!(self_attention(&mut tape, qkv, &shape(false, false)).is_err());
    }
}
