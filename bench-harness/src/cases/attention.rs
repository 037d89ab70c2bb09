//! Scaled dot-product attention, forward, backward, decoding and BigBird's pattern: the shapes of BERT base, of long
//! inputs, of pronunciation, of a step with a cache.

use std::borrow::Cow;

use kavanam_kernels::attention::cache::CacheFormat;
use kavanam_kernels::attention::{BigBird, BlockList};
use kavanam_kernels::memory::AlignedVec;
use kavanam_kernels::{Precision, reference};

use crate::cases::{Case, Op, Work, check_close, tolerance};
use crate::error::HarnessError;
use crate::measure::statistics::SplitMix64;

/// What is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    /// The output.
    Forward,
    /// The gradients.
    Backward,
    /// The output of one query over cached keys and values.
    Decode,
    /// The same with a cache in fewer bits.
    DecodeStored(CacheFormat),
    /// The output under BigBird's pattern: blocks of [`BIGBIRD_BLOCK`], three of them drawn for each row.
    BigBird,
}

/// Positions of one of BigBird's blocks.
pub(crate) const BIGBIRD_BLOCK: usize = 64;

/// The shape of one attention; keys and values have the length and width of the queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Sequences.
    pub(crate) batch: usize,
    /// Heads of the queries.
    pub(crate) heads: usize,
    /// Heads of keys and values, each read by as many heads of the queries.
    pub(crate) kv_heads: usize,
    /// Positions.
    pub(crate) seq: usize,
    /// Elements of a head.
    pub(crate) dim: usize,
    /// Whether a position sees only itself and what is before it.
    pub(crate) causal: bool,
    /// What is computed.
    pub(crate) pass: Pass,
}

/// batch, heads, positions, elements of a head; whether causal; whether `--quick` measures it.
const SHAPES: [([usize; 4], bool, bool); 15] = [
    ([64, 4, 12, 32], false, true),
    ([64, 4, 12, 32], true, false),
    ([8, 8, 128, 64], false, false),
    ([8, 8, 128, 64], true, false),
    ([1, 12, 512, 64], false, true),
    ([1, 12, 512, 64], true, true),
    ([1, 8, 4096, 64], false, false),
    ([1, 8, 4096, 64], true, false),
    ([1, 8, 8192, 64], false, false),
    ([32, 12, 128, 64], false, false),
    ([32, 12, 128, 64], true, false),
    ([1, 16, 1024, 128], false, false),
    ([1, 16, 1024, 128], true, false),
    ([4, 8, 512, 32], false, false),
    ([4, 8, 512, 32], true, false),
];

/// The same of decoding: positions are those of the cache.
const CACHES: [([usize; 4], bool); 4] = [
    ([1, 8, 2048, 64], true),
    ([1, 32, 4096, 128], false),
    ([8, 8, 512, 64], false),
    ([1, 1, 32768, 64], false),
];

/// Heads that share keys, as Llama 3 8B and Qwen 2 0.5B have them, causal: batch, heads, key heads, positions, elements of a head.
const GROUPED: [[usize; 5]; 2] = [[1, 32, 8, 1024, 128], [1, 14, 2, 1024, 64]];

/// The same of decoding.
const GROUPED_CACHES: [[usize; 5]; 2] = [[1, 32, 8, 4096, 128], [1, 14, 2, 4096, 64]];

/// The same of BigBird's pattern, from the length where it begins to pay to long documents.
const PATTERNS: [([usize; 4], bool); 6] = [
    ([1, 8, 1024, 64], true),
    ([1, 8, 4096, 64], false),
    ([1, 8, 8192, 64], false),
    ([1, 8, 16384, 64], false),
    ([1, 8, 32768, 64], false),
    ([1, 8, 65536, 64], false),
];

impl Shape {
    /// Two products forward, five backward; half of them under a causal mask.
    pub(crate) fn work(&self) -> Work {
        let pairs = (self.batch * self.heads * self.queries() * self.seq) as f64;
        let seen = match self.list() {
            Some(list) => {
                let blocks = self.seq.div_ceil(BIGBIRD_BLOCK);
                let listed: usize = (0..blocks).map(|row| list.keys(row).len()).sum();
                listed as f64 / (blocks * blocks) as f64
            }
            None if self.causal => 0.5,
            None => 1.0,
        };
        // Tensors with the heads of the queries, and with those of the keys.
        let (products, of_queries, of_keys) = match self.pass {
            Pass::Forward | Pass::BigBird => (2.0, 2.0, 2.0),
            Pass::Backward => (5.0, 4.0, 4.0),
            // Keys and values; one query and one output are nothing, and so are scales.
            Pass::Decode => (2.0, 0.0, 2.0),
            Pass::DecodeStored(CacheFormat::Bf16) => (2.0, 0.0, 1.0),
            Pass::DecodeStored(CacheFormat::Int8) => (2.0, 0.0, 0.5),
        };
        let elements = of_queries * self.query_elements() as f64 + of_keys * self.key_elements() as f64;
        Work { flops: Some(2.0 * products * seen * pairs * self.dim as f64), bytes: 4.0 * elements }
    }

    /// The blocks that are seen, under a pattern.
    pub(crate) fn list(&self) -> Option<BlockList> {
        let rule = BigBird::Paper { random: 3, seed: 1 };
        let blocks = self.seq.div_ceil(BIGBIRD_BLOCK);
        let list = || BlockList::bigbird(BIGBIRD_BLOCK, blocks, rule).expect("the block is not empty");
        (self.pass == Pass::BigBird).then(list)
    }

    fn decodes(&self) -> bool {
        matches!(self.pass, Pass::Decode | Pass::DecodeStored(_))
    }

    /// The bytes that bound the time: the cache, for a single query.
    pub(crate) fn read_bytes(&self) -> Option<f64> {
        self.decodes().then(|| self.work().bytes)
    }

    /// Queries of a sequence.
    pub(crate) fn queries(&self) -> usize {
        if self.decodes() { 1 } else { self.seq }
    }

    /// Elements of the queries and of the output, [batch, queries, heads, dim].
    pub(crate) fn query_elements(&self) -> usize {
        self.batch * self.queries() * self.heads * self.dim
    }

    /// Elements of the keys and of the values, [batch, seq, kv_heads, dim].
    pub(crate) fn key_elements(&self) -> usize {
        self.batch * self.seq * self.kv_heads * self.dim
    }

    /// Heads of the queries that share a head of the keys.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// 1/√dim.
    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}

/// Every case.
pub(crate) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for pass in [Pass::Forward, Pass::Backward] {
        all.extend(SHAPES.map(|([batch, heads, seq, dim], causal, quick)| {
            case(Shape { batch, heads, kv_heads: heads, seq, dim, causal, pass }, quick)
        }));
        all.extend(GROUPED.map(|[batch, heads, kv_heads, seq, dim]| {
            case(Shape { batch, heads, kv_heads, seq, dim, causal: true, pass }, false)
        }));
    }
    for (pass, shapes, grouped) in [
        (Pass::Decode, CACHES.as_slice(), GROUPED_CACHES.as_slice()),
        (Pass::DecodeStored(CacheFormat::Bf16), &CACHES, &GROUPED_CACHES),
        (Pass::DecodeStored(CacheFormat::Int8), &CACHES, &GROUPED_CACHES),
        (Pass::BigBird, &PATTERNS, &[]),
    ] {
        all.extend(shapes.iter().map(|&([batch, heads, seq, dim], quick)| {
            case(Shape { batch, heads, kv_heads: heads, seq, dim, causal: false, pass }, quick)
        }));
        all.extend(grouped.iter().map(|&[batch, heads, kv_heads, seq, dim]| {
            case(Shape { batch, heads, kv_heads, seq, dim, causal: false, pass }, false)
        }));
    }
    all
}

/// The case of a shape, which names it.
fn case(shape: Shape, quick: bool) -> Case {
    let Shape { batch, heads, kv_heads, seq, dim, causal, pass } = shape;
    let pass = match pass {
        Pass::Forward => "forward",
        Pass::Backward => "backward",
        Pass::Decode => "decode",
        Pass::DecodeStored(CacheFormat::Bf16) => "decode-bf16",
        Pass::DecodeStored(CacheFormat::Int8) => "decode-int8",
        Pass::BigBird => "bigbird",
    };
    let order = if causal { "-causal" } else { "" };
    let (shared, over) =
        if heads == kv_heads { ("", String::new()) } else { ("-grouped", format!("over{kv_heads}")) };
    Case {
        name: format!("{pass}{order}{shared}/{batch}x{heads}{over}x{seq}x{dim}"),
        op: Op::Attention(shape),
        quick,
    }
}

/// The operands of one case: queries and the gradient [batch, seq, heads, dim], in decoding [batch, 1, heads, dim]; keys and values [batch, seq, kv_heads, dim].
#[derive(Debug)]
pub(crate) struct Problem {
    /// The shape.
    pub(crate) shape: Shape,
    /// Queries.
    pub(crate) q: AlignedVec<f32>,
    /// Keys.
    pub(crate) k: AlignedVec<f32>,
    /// Values.
    pub(crate) v: AlignedVec<f32>,
    /// The gradient that comes in.
    pub(crate) d_out: AlignedVec<f32>,
}

/// Up to this length all queries of a head are compared, beyond it [`FEW_QUERIES`] of them.
const WHOLE_HEAD: usize = 512;
const FEW_QUERIES: usize = 16;
/// The largest difference of f32, relative to the largest element.
const TOLERANCE: f64 = 2e-5;

impl Problem {
    /// Random operands in [−1, 1).
    pub(crate) fn new(shape: Shape) -> Problem {
        let mut random = SplitMix64(((shape.seq as u64) << 32) ^ shape.key_elements() as u64);
        let mut fill = |len: usize| AlignedVec::from_fn(len, |_| random.signed_unit());
        let (queries, keys) = (shape.query_elements(), shape.key_elements());
        Problem { shape, q: fill(queries), k: fill(keys), v: fill(keys), d_out: fill(queries) }
    }

    /// Compares the heads that read the last head of keys, in the last sequence, with attention in f64. The outputs are `out`, or
    /// d_q, d_k, d_v.
    ///
    /// # Errors
    /// Names the tensor that differs.
    pub(crate) fn check(&self, outputs: &[Cow<'_, [f32]>], precision: Precision) -> Result<(), HarnessError> {
        let stored = matches!(self.shape.pass, Pass::DecodeStored(_));
        let bound = tolerance(TOLERANCE, if stored { Precision::Medium } else { precision });
        let Shape { seq, dim, causal, pass, .. } = self.shape;
        let group = self.shape.group();
        let step = if seq <= WHOLE_HEAD { 1 } else { seq / FEW_QUERIES };
        let queries: Vec<usize> = (0..self.shape.queries()).step_by(step).collect();
        let every: Vec<usize> = (0..seq).collect();
        let (q, k, v) = (
            self.rows(&self.q, group, &queries),
            self.rows(&self.k, 1, &every),
            self.rows(&self.v, 1, &every),
        );
        let list = self.shape.list();
        let sees = |_: usize, i: usize, j: usize| {
            let listed =
                |list: &BlockList| list.keys(queries[i] / BIGBIRD_BLOCK).contains(&(j / BIGBIRD_BLOCK));
            (!causal || j <= queries[i]) && list.as_ref().is_none_or(listed)
        };
        let problem = reference::Attention {
            batch: 1,
            heads: group,
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
            factor: None,
        };
        let ours = |tensor: &[f32], heads: usize, positions: &[usize]| -> Vec<f32> {
            self.rows(tensor, heads, positions).into_iter().map(|x| x as f32).collect()
        };
        if pass != Pass::Backward {
            let (out, _) = reference::attention_forward(&problem);
            return check_close("out", &ours(&outputs[0], group, &queries), &out, bound);
        }
        let grads = reference::attention_backward(&problem, &self.rows(&self.d_out, group, &queries));
        check_close("d_q", &ours(&outputs[0], group, &queries), &grads.d_q, bound)?;
        if step == 1 {
            check_close("d_k", &ours(&outputs[1], 1, &every), &grads.d_k, bound)?;
            check_close("d_v", &ours(&outputs[2], 1, &every), &grads.d_v, bound)?;
        }
        Ok(())
    }

    /// The given positions of the last `last` heads of the last sequence, one after the other: of a tensor with the heads of the keys, or of the queries, which are
    /// as many times more as `last` says.
    fn rows(&self, tensor: &[f32], last: usize, positions: &[usize]) -> Vec<f64> {
        let Shape { batch, kv_heads, dim, .. } = self.shape;
        let heads = kv_heads * last;
        let seq = tensor.len() / (batch * heads * dim);
        let at = |i: usize| (((batch - 1) * seq + i) * heads + heads - last) * dim;
        positions.iter().flat_map(|&i| tensor[at(i)..][..last * dim].iter().map(|&x| f64::from(x))).collect()
    }
}
