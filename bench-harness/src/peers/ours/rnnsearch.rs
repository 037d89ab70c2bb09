//! The training step of RNNsearch by `kavanam-model`.

use std::borrow::Cow;

use kavanam_kernels::Context;
use kavanam_model::{Grads, Pool, Seq2Seq};

use crate::cases::rnnsearch::Problem;
use crate::error::HarnessError;
use crate::measure::workload::Workload;

/// Allocates the gradients.
pub(super) fn prepare(problem: &Problem, context: Context) -> Box<dyn Workload + '_> {
    let grads = Grads::zeros(problem.model.params());
    Box::new(Step { problem, context, grads, pool: Pool::new(), loss: [f32::NAN] })
}

struct Step<'a> {
    problem: &'a Problem,
    context: Context,
    grads: Grads,
    pool: Pool,
    loss: [f32; 1],
}

impl Workload for Step<'_> {
    fn run(&mut self) -> Result<(), HarnessError> {
        self.loss = [self.problem.step(&self.context, &self.pool, &mut self.grads)?];
        Ok(())
    }

    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
        Ok(vec![Cow::Borrowed(&self.loss), Cow::Borrowed(self.problem.checked(&self.grads))])
    }

    fn kernel(&self) -> String {
        kavanam_kernels::gemm::kernel_name(&self.context).to_owned()
    }
}
