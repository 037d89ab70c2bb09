//! Training: the order of the data, the learning rate, clipping, the step, and its state on disk.

pub mod batches;
pub mod checkpoint;
pub mod clip;
pub mod schedule;
pub mod trainable;
pub mod trainer;

pub use batches::{Batches, Example, Position};
pub use schedule::{Decay, Schedule};
pub use trainable::Trainable;
pub use trainer::{StepReport, Trainer, TrainerConfig};

#[cfg(test)]
mod tests;

use crate::error::ModelError;
use crate::io::CheckpointError;

/// A training run cannot go on. The weights are those of the last complete step.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The model refused a batch.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A checkpoint cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The loss is infinite or no number.
    #[error("step {step}: the loss is {loss}; the weights of step {} stand. Try a smaller learning rate", step - 1)]
    Loss {
        /// The step that was tried.
        step: u64,
        /// The loss.
        loss: f64,
    },
    /// A gradient is infinite or no number.
    #[error(
        "step {step}: the gradient of tensor {tensor:?} is not finite; the weights of step {} stand. \
         Try a smaller learning rate",
        step - 1
    )]
    Gradient {
        /// The step that was tried.
        step: u64,
        /// The first tensor whose gradient is not finite.
        tensor: String,
    },
    /// There is nothing to train on.
    #[error("there are no training examples")]
    NoExamples,
    /// A field of the trainer's configuration is outside of its range.
    #[error("trainer config: {field} is {value}, expected {expected}")]
    Config {
        /// The field's name.
        field: &'static str,
        /// What was given.
        value: String,
        /// What it must be.
        expected: String,
    },
}
