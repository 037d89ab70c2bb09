//! [`ModelError`]: what can be wrong with a configuration, a batch or a call.

use kavanam_kernels::ShapeError;

/// A caller's mistake, named; nothing has been changed when it is returned.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ModelError {
    /// Arguments of a kernel do not fit together.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// A field of a model's configuration has a value that no model can be built from.
    #[error("config: {field} is {value}, expected {expected}")]
    Config {
        /// The field's name, as in config.json.
        field: &'static str,
        /// What it is.
        value: String,
        /// What it must be, in words.
        expected: String,
    },
    /// A batch cannot be made from these sequences.
    #[error("batch: the {side} sequence {index} {problem}")]
    Batch {
        /// `source` or `target`.
        side: &'static str,
        /// Which pair.
        index: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A batch of no sequences.
    #[error("batch: it holds no sequence")]
    EmptyBatch,
    /// A sequence is longer than the positions that the model has.
    #[error("{argument} has {length} positions, the model has {max_positions}")]
    TooLong {
        /// The argument's name.
        argument: &'static str,
        /// The sequence's (padded) length.
        length: usize,
        /// The model's limit.
        max_positions: usize,
    },
    /// A tensor of that name is not in the store, or has another shape there.
    #[error("parameter {name:?}: {problem}")]
    Parameter {
        /// The tensor's name.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The model's weights have gone bad: what it computes is NaN or infinite.
    #[error("{what} are not finite")]
    NotFinite {
        /// What was computed.
        what: &'static str,
    },
    /// A decoder state was made by another kind of model.
    #[error("the decoder state was not made by a {expected}")]
    ForeignState {
        /// The kind of model that was asked to step.
        expected: &'static str,
    },
}
