//! [`HarnessError`]: what a command can fail with, and the exit status that it gives.

use std::path::PathBuf;

use kavanam_kernels::{IsaError, ShapeError};
use kavanam_model::ModelError;
use kavanam_model::io::CheckpointError;
use kavanam_model::train::TrainError;

/// A command cannot go on. Its text is the whole message for the person at the terminal.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HarnessError {
    /// The command line asks for something that does not exist.
    #[error("{0}")]
    Usage(String),
    /// The instruction set is unknown, or this CPU lacks it.
    #[error(transparent)]
    Isa(#[from] IsaError),
    /// A kernel rejected its arguments.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// A file or folder cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: `read`, `write`, `create`.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file does not hold what it should.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why it fails.
        source: serde_json::Error,
    },
    /// Training cannot go on.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// A checkpoint cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A model refused its input.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Ctrl-C ended a training run; what it had learnt is on disk.
    #[error("stopped at step {step}; the checkpoint is {}", checkpoint.display())]
    Interrupted {
        /// The last step taken.
        step: u64,
        /// The folder of the checkpoint.
        checkpoint: PathBuf,
    },
    /// A peer that runs in another process cannot be started, or broke down.
    #[error("the peer {peer}: {reason}")]
    Peer {
        /// Its name in `--peers`.
        peer: &'static str,
        /// What happened, and what the process said.
        reason: String,
    },
    /// A run went wrong.
    #[error("{0}")]
    Failed(String),
}

impl HarnessError {
    /// The process's exit status: 2 for a wrong command line, 130 after Ctrl-C, 1 for everything else.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            HarnessError::Usage(_) | HarnessError::Isa(_) => 2,
            HarnessError::Interrupted { .. } => 130,
            _ => 1,
        }
    }

    /// For `map_err`: an I/O error with what was tried and where.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> HarnessError {
        let path = path.into();
        move |source| HarnessError::Io { action, path, source }
    }
}
