//! Our own kernels, one adapter a family.

mod attention;
mod gemm;
mod min_rnn;
mod rnn;
mod rnnsearch;
mod rowwise;

use kavanam_kernels::Context;

use crate::cases::Problem;
use crate::cases::rnn::Kind;
use crate::error::HarnessError;
use crate::measure::workload::Workload;
use crate::peers::{Peer, Unready};

/// The peer that the others are compared with.
pub(crate) struct Ours;

impl Peer for Ours {
    fn name(&self) -> &'static str {
        "ours"
    }

    fn follows_isa(&self) -> bool {
        true
    }

    fn prepare<'a>(
        &self,
        problem: &'a Problem,
        context: &Context,
    ) -> Result<Box<dyn Workload + 'a>, Unready> {
        let prepared = match problem {
            Problem::Gemm(problem) => gemm::prepare(problem, *context),
            Problem::Rowwise(problem) => rowwise::prepare(problem, *context),
            Problem::Attention(problem) => attention::prepare(problem, *context),
            Problem::Rnn(problem) => match problem.shape.kind {
                Kind::Recurrent(cell) => rnn::prepare(problem, cell, *context),
                Kind::Scan(cell) => min_rnn::prepare(problem, cell, *context),
            },
            Problem::RnnSearch(problem) => Ok(rnnsearch::prepare(problem, *context)),
        };
        prepared.map_err(|error| Unready::Failed(HarnessError::Shape(error)))
    }
}
