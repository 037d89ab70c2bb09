//! Peers outside of this program: a Python process that gets cases over its standard streams, computes them,
//! and measures the time beside the computation.
//!
//! - `protocol`: the messages, and how tensors travel.
//! - `link`: requests and their answers over any two streams.
//! - `task`: what is sent of a case.
//! - `requirements`: what the Python environment must have.
//! - `process`: the child process, what it says on its error stream, how it ends.

mod link;
mod process;
mod protocol;
mod requirements;
mod task;

pub(crate) use process::Worker;

/// The Python that is used when none is named.
pub(crate) const PYTHON: &str = "python3";
