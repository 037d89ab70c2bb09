//! Scaled dot-product attention, forward and backward: the shapes of BERT base, of long inputs, of pronunciation.

use std::borrow::Cow;

use kavanam_kernels::{Precision, reference};

use crate::cases::{Case, Op, Work, check_close, tolerance};
use crate::error::HarnessError;
use crate::measure::statistics::SplitMix64;

/// The shape of one attention; queries, keys and values have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Sequences.
    pub(crate) batch: usize,
    /// Heads.
    pub(crate) heads: usize,
    /// Positions.
    pub(crate) seq: usize,
    /// Elements of a head.
    pub(crate) dim: usize,
    /// Whether a position sees only itself and what is before it.
    pub(crate) causal: bool,
    /// Whether the gradients are computed instead of the output.
    pub(crate) backward: bool,
}

/// batch, heads, positions, elements of a head; whether causal; whether `--quick` measures it.
const SHAPES: [([usize; 4], bool, bool); 14] = [
    ([64, 4, 12, 32], false, true),
    ([64, 4, 12, 32], true, false),
    ([8, 8, 128, 64], false, false),
    ([8, 8, 128, 64], true, false),
    ([1, 12, 512, 64], false, true),
    ([1, 12, 512, 64], true, true),
    ([1, 8, 4096, 64], false, false),
    ([1, 8, 4096, 64], true, false),
    ([32, 12, 128, 64], false, false),
    ([32, 12, 128, 64], true, false),
    ([1, 16, 1024, 128], false, false),
    ([1, 16, 1024, 128], true, false),
    ([4, 8, 512, 32], false, false),
    ([4, 8, 512, 32], true, false),
];

impl Shape {
    /// Two products forward, five backward; half of them under a causal mask.
    pub(crate) fn work(&self) -> Work {
        let pairs = (self.batch * self.heads * self.seq * self.seq) as f64;
        let seen = if self.causal { 0.5 } else { 1.0 };
        let (products, tensors) = if self.backward { (5.0, 8.0) } else { (2.0, 4.0) };
        Work {
            flops: Some(2.0 * products * seen * pairs * self.dim as f64),
            bytes: 4.0 * tensors * self.elements() as f64,
        }
    }

    /// Elements of one tensor, [batch, seq, heads, dim].
    pub(crate) fn elements(&self) -> usize {
        self.batch * self.seq * self.heads * self.dim
    }

    /// 1/√dim.
    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}

/// Every case.
pub(crate) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (backward, group) in [(false, "forward"), (true, "backward")] {
        for ([batch, heads, seq, dim], causal, quick) in SHAPES {
            let suffix = if causal { "-causal" } else { "" };
            all.push(Case {
                name: format!("{group}{suffix}/{batch}x{heads}x{seq}x{dim}"),
                op: Op::Attention(Shape { batch, heads, seq, dim, causal, backward }),
                quick,
            });
        }
    }
    all
}

/// The operands of one case, each [batch, seq, heads, dim].
#[derive(Debug)]
pub(crate) struct Problem {
    /// The shape.
    pub(crate) shape: Shape,
    /// Queries.
    pub(crate) q: Vec<f32>,
    /// Keys.
    pub(crate) k: Vec<f32>,
    /// Values.
    pub(crate) v: Vec<f32>,
    /// The gradient that comes in.
    pub(crate) d_out: Vec<f32>,
}

/// Up to this length all queries of a head are compared, beyond it [`FEW_QUERIES`] of them.
const WHOLE_HEAD: usize = 512;
const FEW_QUERIES: usize = 16;
/// The largest difference of f32, relative to the largest element.
const TOLERANCE: f64 = 2e-5;

impl Problem {
    /// Random operands in [−1, 1).
    pub(crate) fn new(shape: Shape) -> Problem {
        let mut random = SplitMix64(((shape.seq as u64) << 32) ^ shape.elements() as u64);
        let mut fill = || (0..shape.elements()).map(|_| random.signed_unit()).collect::<Vec<f32>>();
        Problem { shape, q: fill(), k: fill(), v: fill(), d_out: fill() }
    }

    /// Compares the last head of the last sequence with attention in f64. The outputs are `out`, or
    /// d_q, d_k, d_v.
    ///
    /// # Errors
    /// Names the tensor that differs.
    pub(crate) fn check(&self, outputs: &[Cow<'_, [f32]>], precision: Precision) -> Result<(), HarnessError> {
        let bound = tolerance(TOLERANCE, precision);
        let Shape { seq, dim, causal, backward, .. } = self.shape;
        let step = if seq <= WHOLE_HEAD { 1 } else { seq / FEW_QUERIES };
        let queries: Vec<usize> = (0..seq).step_by(step).collect();
        let every: Vec<usize> = (0..seq).collect();
        let (q, k, v) =
            (self.rows(&self.q, &queries), self.rows(&self.k, &every), self.rows(&self.v, &every));
        let sees = |_: usize, i: usize, j: usize| !causal || j <= queries[i];
        let problem = reference::Attention {
            batch: 1,
            heads: 1,
            kv_heads: 1,
            seq_q: queries.len(),
            seq_k: seq,
            dim,
            v_dim: dim,
            q: &q,
            k: &k,
            v: &v,
            scale: f64::from(self.shape.scale()),
            bias: None,
            sees: &sees,
        };
        let ours = |tensor: &[f32], positions: &[usize]| -> Vec<f32> {
            self.rows(tensor, positions).into_iter().map(|x| x as f32).collect()
        };
        if !backward {
            let (out, _) = reference::attention_forward(&problem);
            return check_close("out", &ours(&outputs[0], &queries), &out, bound);
        }
        let grads = reference::attention_backward(&problem, &self.rows(&self.d_out, &queries));
        check_close("d_q", &ours(&outputs[0], &queries), &grads.d_q, bound)?;
        if step == 1 {
            check_close("d_k", &ours(&outputs[1], &every), &grads.d_k, bound)?;
            check_close("d_v", &ours(&outputs[2], &every), &grads.d_v, bound)?;
        }
        Ok(())
    }

    /// The given positions of the last head of the last sequence, one after the other.
    fn rows(&self, tensor: &[f32], positions: &[usize]) -> Vec<f64> {
        let Shape { batch, heads, seq, dim, .. } = self.shape;
        let at = |i: usize| (((batch - 1) * seq + i) * heads + heads - 1) * dim;
        positions.iter().flat_map(|&i| tensor[at(i)..][..dim].iter().map(|&x| f64::from(x))).collect()
    }
}
