//! Attention by `kavanam-kernels`.

use std::borrow::Cow;

use kavanam_kernels::attention::cache::{
    Cache, CacheFormat, CacheLayout, CacheMut, PANEL, StoredBuffers, StoredBuffersMut, StoredSizes,
};
use kavanam_kernels::attention::{self, AttentionSpec, BlockList, Grads, Inputs, Mask, Part, Saved};
use kavanam_kernels::memory::AlignedVec;
use kavanam_kernels::{Context, HeadsLayout, HeadsMut, HeadsRef, Precision, ShapeError};

use crate::cases::attention::{Pass, Problem, Shape};
use crate::error::HarnessError;
use crate::measure::workload::Workload;

/// Allocates the outputs; for the backward pass runs the forward pass once.
pub(super) fn prepare(problem: &Problem, context: Context) -> Result<Box<dyn Workload + '_>, ShapeError> {
    let shape = problem.shape;
    match shape.pass {
        Pass::Decode => return Ok(Box::new(Decode::new(problem, context, None)?)),
        Pass::DecodeStored(format) => return Ok(Box::new(Decode::new(problem, context, Some(format))?)),
        _ => {}
    }
    let (queries, keys) = (shape.query_elements(), shape.key_elements());
    let mut attention = Attention {
        context,
        layout: HeadsLayout::batch_seq_heads(shape.batch, shape.seq, shape.heads, shape.dim),
        of_keys: HeadsLayout::batch_seq_heads(shape.batch, shape.seq, shape.kv_heads, shape.dim),
        lists: shape.list().map(|list| vec![list]),
        problem,
        out: AlignedVec::filled(queries, f32::NAN),
        lse: AlignedVec::zeroed(shape.batch * shape.heads * shape.seq),
        grads: (shape.pass == Pass::Backward).then(|| [queries, keys, keys].map(AlignedVec::zeroed)),
    };
    attention.forward()?;
    Ok(Box::new(attention))
}

struct Attention<'a> {
    context: Context,
    /// Of the queries, and of what has their shape.
    layout: HeadsLayout,
    of_keys: HeadsLayout,
    /// The blocks that are seen, under a pattern.
    lists: Option<Vec<BlockList>>,
    problem: &'a Problem,
    out: AlignedVec<f32>,
    lse: AlignedVec<f32>,
    /// d_q, d_k, d_v when they are what is measured.
    grads: Option<[AlignedVec<f32>; 3]>,
}

/// Scale and mask of the case.
fn spec(shape: Shape, lists: Option<&[BlockList]>) -> AttentionSpec<'_> {
    let mask = if shape.causal { Mask::causal(0) } else { Mask::none() };
    AttentionSpec { scale: shape.scale(), mask: Mask { blocks: lists, ..mask } }
}

impl Attention<'_> {
    fn forward(&mut self) -> Result<(), ShapeError> {
        let Problem { q, k, v, .. } = self.problem;
        let [k, v] = [k, v].map(|tensor| HeadsRef::new(tensor, self.of_keys));
        let inputs = Inputs { q: HeadsRef::new(q, self.layout)?, k: k?, v: v? };
        let out = HeadsMut::new(&mut self.out, self.layout)?;
        let spec = spec(self.problem.shape, self.lists.as_deref());
        attention::forward(&self.context, &inputs, &spec, out, &mut self.lse)
    }

    fn backward(&mut self) -> Result<(), ShapeError> {
        let Some([d_q, d_k, d_v]) = &mut self.grads else { return self.forward() };
        let view = |tensor| HeadsRef::new(tensor, self.layout);
        let Problem { q, k, v, d_out, .. } = self.problem;
        let [k, v] = [k, v].map(|tensor| HeadsRef::new(tensor, self.of_keys));
        let saved = Saved { q: view(q)?, k: k?, v: v?, out: view(&self.out)?, lse: &self.lse };
        let grads = Grads {
            d_q: HeadsMut::new(d_q, self.layout)?,
            d_k: HeadsMut::new(d_k, self.of_keys)?,
            d_v: HeadsMut::new(d_v, self.of_keys)?,
            d_bias: None,
        };
        let spec = spec(self.problem.shape, self.lists.as_deref());
        attention::backward(&self.context, &saved, view(d_out)?, &spec, grads)
    }
}

impl Workload for Attention<'_> {
    fn run(&mut self) -> Result<(), HarnessError> {
        Ok(if self.grads.is_some() { self.backward() } else { self.forward() }?)
    }

    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
        Ok(match &self.grads {
            Some(grads) => grads.iter().map(|grad| Cow::Borrowed(&grad[..])).collect(),
            None => vec![Cow::Borrowed(&self.out)],
        })
    }

    fn kernel(&self) -> String {
        format!("flash_{}", attention::kernel_name(&self.context, self.problem.shape.dim))
    }
}

/// One query over a cache that was filled beforehand.
struct Decode<'a> {
    context: Context,
    problem: &'a Problem,
    cache: CacheLayout,
    contents: Contents,
    sequences: Vec<usize>,
    lengths: Vec<usize>,
    out: AlignedVec<f32>,
    lse: AlignedVec<f32>,
}

/// The buffers of a cache: keys and values.
enum Contents {
    F32([AlignedVec<f32>; 2]),
    Stored(CacheFormat, [AlignedVec<u32>; 2], [AlignedVec<f32>; 2]),
}

impl Contents {
    fn new(cache: CacheLayout, format: Option<CacheFormat>) -> Result<Contents, ShapeError> {
        let Some(format) = format else {
            return Ok(Contents::F32(cache.sizes()?.map(AlignedVec::zeroed)));
        };
        let StoredSizes { keys, values, scales } = cache.stored_sizes(format)?;
        Ok(Contents::Stored(
            format,
            [AlignedVec::zeroed(keys), AlignedVec::zeroed(values)],
            [AlignedVec::zeroed(scales), AlignedVec::zeroed(scales)],
        ))
    }

    fn writer(&mut self, cache: CacheLayout) -> Result<CacheMut<'_>, ShapeError> {
        match self {
            Contents::F32([keys, values]) => CacheMut::new(cache, keys, values),
            Contents::Stored(format, [keys, values], [key_scales, value_scales]) => {
                let buffers = StoredBuffersMut { keys, values, key_scales, value_scales };
                CacheMut::stored(cache, *format, buffers)
            }
        }
    }

    fn reader(&self, cache: CacheLayout) -> Result<Cache<'_>, ShapeError> {
        match self {
            Contents::F32([keys, values]) => Cache::new(cache, keys, values),
            Contents::Stored(format, [keys, values], [key_scales, value_scales]) => {
                Cache::stored(cache, *format, StoredBuffers { keys, values, key_scales, value_scales })
            }
        }
    }
}

impl<'a> Decode<'a> {
    fn new(
        problem: &'a Problem,
        context: Context,
        format: Option<CacheFormat>,
    ) -> Result<Decode<'a>, ShapeError> {
        let shape = problem.shape;
        let cache = CacheLayout {
            sequences: shape.batch,
            kv_heads: shape.kv_heads,
            capacity: shape.seq.next_multiple_of(PANEL),
            dim: shape.dim,
            v_dim: shape.dim,
        };
        let mut contents = Contents::new(cache, format)?;
        let layout = HeadsLayout::batch_seq_heads(shape.batch, shape.seq, shape.kv_heads, shape.dim);
        let (k, v) = (HeadsRef::new(&problem.k, layout)?, HeadsRef::new(&problem.v, layout)?);
        let mut writer = contents.writer(cache)?;
        (0..shape.batch).try_for_each(|sequence| writer.append(sequence, 0, (k, v), sequence))?;
        Ok(Decode {
            context,
            problem,
            cache,
            contents,
            sequences: (0..shape.batch).collect(),
            lengths: vec![shape.seq; shape.batch],
            out: AlignedVec::filled(shape.query_elements(), f32::NAN),
            lse: AlignedVec::zeroed(shape.batch * shape.heads),
        })
    }
}

impl Workload for Decode<'_> {
    fn run(&mut self) -> Result<(), HarnessError> {
        let shape = self.problem.shape;
        let layout = HeadsLayout::batch_seq_heads(shape.batch, 1, shape.heads, shape.dim);
        let cache = self.contents.reader(self.cache)?;
        let part = Part { cache, sequences: &self.sequences, lengths: &self.lengths };
        let (q, out) = (HeadsRef::new(&self.problem.q, layout)?, HeadsMut::new(&mut self.out, layout)?);
        let spec = spec(shape, None);
        Ok(attention::decode(&self.context, q, &[part], &spec, out, &mut self.lse)?)
    }

    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
        Ok(vec![Cow::Borrowed(&self.out)])
    }

    fn kernel(&self) -> String {
        let int8 = matches!(self.contents, Contents::Stored(CacheFormat::Int8, ..));
        let context = if int8 { self.context.precision(Precision::Strict) } else { self.context };
        format!("decode_{}", attention::kernel_name(&context, self.problem.shape.dim))
    }
}
