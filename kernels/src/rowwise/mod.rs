//! Kernels that go over rows or elements: one or two passes over memory, forward and backward.

pub mod activation;

pub use activation::Activation;
