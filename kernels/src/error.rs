//! Typed errors of the crate: each names the argument, what was expected and what was given.

use crate::isa::IsaName;

/// A caller's arguments do not fit together. Nothing has been read or written when it is returned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// A dimension of an argument differs from what the other arguments ask for.
    #[error("{argument}: {dimension} is {actual}, expected {expected}")]
    Dimension {
        /// The argument's name, as in the function's signature.
        argument: &'static str,
        /// Which dimension of it, for example `rows`.
        dimension: &'static str,
        /// What the other arguments ask for.
        expected: usize,
        /// What was given.
        actual: usize,
    },
    /// A buffer is too short for the shape and strides that are claimed for it.
    #[error("{argument}: buffer holds {actual} elements, the shape and strides need {expected}")]
    BufferTooShort {
        /// The argument's name.
        argument: &'static str,
        /// The elements that the view reaches.
        expected: usize,
        /// The elements that the buffer holds.
        actual: usize,
    },
    /// The product of a shape and its strides does not fit in `usize`.
    #[error("{argument}: the size of the shape overflows")]
    Overflow {
        /// The argument's name.
        argument: &'static str,
    },
    /// Strides of a mutable view let two indices name the same element.
    #[error("{argument}: strides make elements overlap")]
    Overlap {
        /// The argument's name.
        argument: &'static str,
    },
    /// An index (a token, a target class) is outside its table.
    #[error("{argument}[{position}] is {index}, but the table has {len} rows")]
    Index {
        /// The argument's name.
        argument: &'static str,
        /// Where in the argument the index stands.
        position: usize,
        /// The index.
        index: usize,
        /// The number of rows of the table.
        len: usize,
    },
    /// A scalar argument is outside the range where the operation is defined.
    #[error("{argument} is {value}, expected {expected}")]
    Value {
        /// The argument's name.
        argument: &'static str,
        /// What was given.
        value: String,
        /// The permitted range, in words.
        expected: &'static str,
    },
    /// Packed weights were packed for another kernel than the one that this context selects.
    #[error(
        "{argument}: packed for kernel {packed_for}, but this context runs {kernel}; pack again with this context"
    )]
    PackedForAnotherKernel {
        /// The argument's name.
        argument: &'static str,
        /// The kernel that it was packed for.
        packed_for: &'static str,
        /// The kernel that the context selects.
        kernel: &'static str,
    },
}

/// The instruction set cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    /// The CPU (or the operating system) lacks it.
    #[error("this CPU does not support {requested}; it supports: {available}")]
    Unsupported {
        /// What was asked for.
        requested: IsaName,
        /// The names of those that can be had.
        available: String,
    },
    /// No instruction set has that name.
    #[error("unknown ISA {name:?}; known: scalar, avx2, avx2vnni, avx512, avx512vnni, avx512bf16, amx, neon")]
    Unknown {
        /// The name that was given.
        name: String,
    },
}

/// `Ok` when `actual == expected`, else [`ShapeError::Dimension`].
pub fn expect_dim(
    argument: &'static str,
    dimension: &'static str,
    expected: usize,
    actual: usize,
) -> Result<(), ShapeError> {
    if expected == actual {
        Ok(())
    } else {
        Err(ShapeError::Dimension { argument, dimension, expected, actual })
    }
}
