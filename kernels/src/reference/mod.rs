//! The naive form of every kernel in f64, as plain loops: the oracles that fast kernels are tested
//! against, here and in other crates. They know views and nothing else of this crate.

mod gemm;
mod special;

pub use gemm::{gemm, gemm_abs};
pub use special::{erf, erfc, normal_cdf};
