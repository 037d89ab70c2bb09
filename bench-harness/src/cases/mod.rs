//! What is measured: tables of shapes, one file a family. A case is data; the inputs are made from it alone.

pub(crate) mod attention;
pub(crate) mod gemm;
pub(crate) mod rnn;
pub(crate) mod rnnsearch;
pub(crate) mod rowwise;

use std::borrow::Cow;

use kavanam_kernels::Precision;

use crate::error::HarnessError;

/// A family of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Family {
    /// Matrix products: squares, the shapes of models, thin and odd ones
    Gemm,
    /// Softmax, LayerNorm, cross-entropy, GELU
    Rowwise,
    /// Scaled dot-product attention, forward and backward
    Attention,
    /// LSTM, GRU and minGRU layers over whole sequences, forward and as a training step; a training step of RNNsearch
    Rnn,
}

impl Family {
    /// The word in records and on the command line.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Family::Gemm => "gemm",
            Family::Rowwise => "rowwise",
            Family::Attention => "attention",
            Family::Rnn => "rnn",
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
    /// An operation on rows.
    Rowwise(rowwise::Shape),
    /// Attention.
    Attention(attention::Shape),
    /// A recurrent layer.
    Rnn(rnn::Shape),
    /// A training step of a recurrent model with attention.
    RnnSearch(rnnsearch::Shape),
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
    /// An operation on rows.
    Rowwise(rowwise::Problem),
    /// Attention.
    Attention(attention::Problem),
    /// A recurrent layer.
    Rnn(rnn::Problem),
    /// A training step of a recurrent model with attention.
    RnnSearch(rnnsearch::Problem),
}

/// Every case of a family, in the order of the table.
pub(crate) fn of(family: Family) -> Vec<Case> {
    match family {
        Family::Gemm => gemm::cases(),
        Family::Rowwise => rowwise::cases(),
        Family::Attention => attention::cases(),
        Family::Rnn => rnn::cases().into_iter().chain(rnnsearch::cases()).collect(),
    }
}

impl Case {
    /// Makes the inputs: from a fixed seed, in every run the same.
    pub(crate) fn problem(&self) -> Problem {
        match self.op {
            Op::Gemm(shape) => Problem::Gemm(gemm::Problem::new(shape)),
            Op::Rowwise(shape) => Problem::Rowwise(rowwise::Problem::new(shape)),
            Op::Attention(shape) => Problem::Attention(attention::Problem::new(shape)),
            Op::Rnn(shape) => Problem::Rnn(rnn::Problem::new(shape)),
            Op::RnnSearch(shape) => Problem::RnnSearch(rnnsearch::Problem::new(shape)),
        }
    }

    /// The bytes whose reading bounds the time of one call, where that is what is asked.
    pub(crate) fn read_bytes(&self) -> Option<f64> {
        match self.op {
            Op::Gemm(shape) => shape.read_bytes(),
            Op::Attention(shape) => shape.read_bytes(),
            Op::Rowwise(_) | Op::Rnn(_) | Op::RnnSearch(_) => None,
        }
    }

    /// The work of one call.
    pub(crate) fn work(&self) -> Work {
        match self.op {
            Op::Gemm(shape) => shape.work(),
            Op::Rowwise(shape) => shape.work(),
            Op::Attention(shape) => shape.work(),
            Op::Rnn(shape) => shape.work(),
            Op::RnnSearch(shape) => shape.work(),
        }
    }
}

impl Problem {
    /// The copies of what bounds a call that successive calls read in turn.
    pub(crate) fn copies(&self) -> usize {
        match self {
            Problem::Gemm(problem) => problem.copies,
            Problem::Rowwise(_) | Problem::Attention(_) | Problem::Rnn(_) | Problem::RnnSearch(_) => 1,
        }
    }

    /// Compares one call's outputs with a reference in f64. The precision is that of matrix products, so rows
    /// without one are always held to f32.
    ///
    /// # Errors
    /// Says where the first output outside its bound stands.
    pub(crate) fn check(&self, outputs: &[Cow<'_, [f32]>], precision: Precision) -> Result<(), HarnessError> {
        match self {
            Problem::Gemm(problem) => problem.check(&outputs[0], precision),
            Problem::Rowwise(problem) => problem.check(outputs),
            Problem::Attention(problem) => problem.check(outputs, precision),
            Problem::Rnn(problem) => problem.check(outputs, precision),
            Problem::RnnSearch(problem) => problem.check(outputs, precision),
        }
    }
}

/// What rounding the operands and the result may add to a product's error, relative to |A|·|B|.
///
/// bf16 has 8 significant bits and rounds by at most u = 2⁻⁸: two operands and a result make (1 + u)³ − 1. A sum of two
/// bf16 is within u² of its f32: three products of such sums' parts keep that of both operands and lose the product of
/// the two low parts, again u².
fn rounding(precision: Precision) -> f64 {
    match precision {
        Precision::Strict | Precision::Highest => 0.0,
        Precision::High => (1.0 + 2f64.powi(-16)).powi(3) - 1.0,
        Precision::Medium => (1.0 + 2f64.powi(-8)).powi(3) - 1.0,
    }
}

/// The largest difference, relative to the largest element, of what several products in a row give: `in_f32`
/// where they are f32, four times the rounding of one product where that is coarser.
fn tolerance(in_f32: f64, precision: Precision) -> f64 {
    in_f32.max(4.0 * rounding(precision))
}

/// |actual − expected| ≤ `tolerance`·max |expected|, in every element: a guard against measuring something that
/// is wrong. The tests of the kernels hold them to tighter bounds.
///
/// # Errors
/// Names the first element that differs; NaN differs.
fn check_close(what: &str, actual: &[f32], expected: &[f64], tolerance: f64) -> Result<(), HarnessError> {
    if actual.len() != expected.len() {
        let text = format!("{what} has {} elements, expected {}", actual.len(), expected.len());
        return Err(HarnessError::Failed(text));
    }
    let bound = tolerance * expected.iter().fold(0.0, |top: f64, x| top.max(x.abs()));
    let wrong = |(actual, expected): (&f32, &f64)| {
        let within = (f64::from(*actual) - expected).abs() <= bound;
        !within
    };
    match actual.iter().zip(expected).position(wrong) {
        None => Ok(()),
        Some(i) => Err(HarnessError::Failed(format!(
            "element {i} of {what} is {}, but in f64 it is {}",
            actual[i], expected[i]
        ))),
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_family_has_distinct_cases_some_quick() {
        for family in Family::value_variants() {
            let cases = of(*family);
            let mut names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
            names.sort_unstable();
            assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{family:?}");
            assert!(cases.iter().any(|case| case.quick), "{family:?}");
            for case in &cases {
                assert!(case.work().bytes > 0.0, "{}", case.name);
            }
        }
    }

    #[test]
    fn what_differs_is_named() {
        check_close("y", &[1.0, 2.0], &[1.0, 2.000001], 1e-5).unwrap();
        let error = check_close("y", &[1.0, f32::NAN], &[1.0, 2.0], 1e-5).unwrap_err();
        assert!(error.to_string().contains("element 1 of y"), "{error}");
        assert!(check_close("y", &[1.0], &[1.0, 2.0], 1.0).is_err());
    }
}
