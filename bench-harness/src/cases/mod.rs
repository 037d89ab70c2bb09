//! What is measured: tables of shapes, one file a family. A case is data; the inputs are made from it alone.

pub(crate) mod gemm;

use std::borrow::Cow;

use crate::error::HarnessError;

/// A family of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Family {
    /// Matrix products: squares, the shapes of models, thin and odd ones
    Gemm,
}

impl Family {
    /// The word in records and on the command line.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Family::Gemm => "gemm",
        }
    }
}

/// One thing to measure.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// The name, `group/shape`.
    pub(crate) name: String,
    /// What is computed, on which shape.
    pub(crate) op: Op,
    /// Whether `--quick` measures it too.
    pub(crate) quick: bool,
}

/// An operation and its shape.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Op {
    /// A matrix product.
    Gemm(gemm::Shape),
}

/// The work of one call, for rates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Work {
    /// Floating-point operations; `None` where counting them means nothing.
    pub(crate) flops: Option<f64>,
    /// Bytes of the operands, each read or written once.
    pub(crate) bytes: f64,
}

/// The inputs of one case, shared by all peers.
#[derive(Debug)]
pub(crate) enum Problem {
    /// A matrix product.
    Gemm(gemm::Problem),
}

/// Every case of a family, in the order of the table.
pub(crate) fn of(family: Family) -> Vec<Case> {
    match family {
        Family::Gemm => gemm::cases(),
    }
}

impl Case {
    /// Makes the inputs: from a fixed seed, in every run the same.
    pub(crate) fn problem(&self) -> Problem {
        match self.op {
            Op::Gemm(shape) => Problem::Gemm(gemm::Problem::new(shape)),
        }
    }

    /// The work of one call.
    pub(crate) fn work(&self) -> Work {
        match self.op {
            Op::Gemm(shape) => shape.work(),
        }
    }
}

impl Problem {
    /// Compares one call's outputs with a reference in f64.
    ///
    /// # Errors
    /// Says where the first output outside its bound stands.
    pub(crate) fn check(&self, outputs: &[Cow<'_, [f32]>]) -> Result<(), HarnessError> {
        match self {
            Problem::Gemm(problem) => problem.check(&outputs[0]),
        }
    }
}
