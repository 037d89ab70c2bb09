//! Attention by `kavanam-kernels`.

use std::borrow::Cow;

use kavanam_kernels::attention::{self, AttentionSpec, Grads, Inputs, Mask, Saved};
use kavanam_kernels::{Context, HeadsLayout, HeadsMut, HeadsRef, ShapeError};

use crate::cases::attention::Problem;
use crate::error::HarnessError;
use crate::measure::workload::Workload;

/// Allocates the outputs; for the backward pass runs the forward pass once.
pub(super) fn prepare(problem: &Problem, context: Context) -> Result<Box<dyn Workload + '_>, ShapeError> {
    let shape = problem.shape;
    let layout = HeadsLayout::batch_seq_heads(shape.batch, shape.seq, shape.heads, shape.dim);
    let zeros = || vec![0.0; shape.elements()];
    let mask = if shape.causal { Mask::causal(0) } else { Mask::none() };
    let mut attention = Attention {
        context,
        layout,
        spec: AttentionSpec { scale: shape.scale(), mask },
        problem,
        out: vec![f32::NAN; shape.elements()],
        lse: vec![0.0; shape.batch * shape.heads * shape.seq],
        grads: shape.backward.then(|| [zeros(), zeros(), zeros()]),
    };
    attention.forward()?;
    Ok(Box::new(attention))
}

struct Attention<'a> {
    context: Context,
    layout: HeadsLayout,
    spec: AttentionSpec<'static>,
    problem: &'a Problem,
    out: Vec<f32>,
    lse: Vec<f32>,
    /// d_q, d_k, d_v when they are what is measured.
    grads: Option<[Vec<f32>; 3]>,
}

impl Attention<'_> {
    fn forward(&mut self) -> Result<(), ShapeError> {
        let view = |tensor| HeadsRef::new(tensor, self.layout);
        let Problem { q, k, v, .. } = self.problem;
        let inputs = Inputs { q: view(q)?, k: view(k)?, v: view(v)? };
        let out = HeadsMut::new(&mut self.out, self.layout)?;
        attention::forward(&self.context, &inputs, &self.spec, out, &mut self.lse)
    }

    fn backward(&mut self) -> Result<(), ShapeError> {
        let Some([d_q, d_k, d_v]) = &mut self.grads else { return self.forward() };
        let view = |tensor| HeadsRef::new(tensor, self.layout);
        let Problem { q, k, v, d_out, .. } = self.problem;
        let (q, k, v, out) = (view(q)?, view(k)?, view(v)?, view(&self.out)?);
        let saved = Saved { q, k, v, out, lse: &self.lse };
        let grads = Grads {
            d_q: HeadsMut::new(d_q, self.layout)?,
            d_k: HeadsMut::new(d_k, self.layout)?,
            d_v: HeadsMut::new(d_v, self.layout)?,
            d_bias: None,
        };
        attention::backward(&self.context, &saved, view(d_out)?, &self.spec, grads)
    }
}

impl Workload for Attention<'_> {
    fn run(&mut self) -> Result<(), HarnessError> {
        Ok(if self.problem.shape.backward { self.backward() } else { self.forward() }?)
    }

    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
        Ok(match &self.grads {
            Some(grads) => grads.iter().map(|grad| Cow::Borrowed(grad.as_slice())).collect(),
            None => vec![Cow::Borrowed(&self.out)],
        })
    }

    fn kernel(&self) -> String {
        format!("flash_{}", kavanam_kernels::gemm::kernel_name(&self.context))
    }
}
