//! PyTorch, and with it MKL and oneDNN as PyTorch calls them, in a Python process of its own.
//!
//! The program of that process stands in `bench-harness/peers/`; `docs/peers.md` says what is compared.

use std::path::Path;

use kavanam_kernels::Context;
use kavanam_kernels::rnn::Cell;

use crate::cases::Problem;
use crate::cases::rnn::{self, Kind};
use crate::error::HarnessError;
use crate::measure::workload::Workload;
use crate::peers::worker::Worker;
use crate::peers::{Peer, Unready};

/// The name in records and in `--peers`.
pub(super) const NAME: &str = "torch";

/// Python modules by name.
const MODULES: [(&str, &str); 2] = [
    ("worker", include_str!("../../peers/worker.py")),
    ("calculations", include_str!("../../peers/calculations.py")),
];

/// The peer.
pub(crate) struct Torch {
    worker: Worker,
}

impl Torch {
    /// Starts the process.
    ///
    /// # Errors
    /// When `python` cannot be run, or a package is missing or too old: its name, and how to get it.
    pub(super) fn start(python: &Path) -> Result<Torch, HarnessError> {
        Ok(Torch { worker: Worker::start(NAME, python, &MODULES)? })
    }
}

impl Peer for Torch {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> String {
        self.worker.version("torch")
    }

    fn prepare<'a>(
        &self,
        problem: &'a Problem,
        context: &Context,
    ) -> Result<Box<dyn Workload + 'a>, Unready> {
        if let Problem::Rnn(rnn::Problem { shape, .. }) = problem {
            match shape.kind {
                Kind::Scan(_) => return Err(Unready::Declined("it has no minGRU and no minLSTM".into())),
                Kind::Recurrent(Cell::GruResetBefore) => {
                    return Err(Unready::Declined("its GRU resets after the product".into()));
                }
                Kind::Recurrent(_) => {}
            }
        }
        Ok(Box::new(self.worker.prepare(problem, context)?))
    }
}
