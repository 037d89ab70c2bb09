//! Sequence models on [`kavanam_kernels`]: transformers and recurrent encoder–decoders, language models and
//! classifiers, built, trained and decoded without another library.
//!
//! # Map
//! | room | what it holds |
//! |---|---|
//! | [`tensor`], [`param`] | values, and the named weights of a model |
//! | [`pool`], [`tape`] | memory of a step, and the way back through it |
//! | [`ops`] | what a tape can do, forward and backward |
//! | [`nn`] | layers: weights, their names, and how ops go together |
//! | [`models`] | the model families, their configurations, [`Seq2Seq`] |
//! | [`generate`] | decoding: caches, greedy search, beams |
//! | [`train`] | order of the data, learning rate, the training step and its state on disk |
//! | [`vocab`], [`io`] | tokens and ids; checkpoints |
#![forbid(unsafe_code)]

pub mod error;
pub mod generate;
pub mod io;
pub mod models;
pub mod nn;
pub mod ops;
pub mod packed;
pub mod param;
pub mod pool;
mod random;
pub mod tape;
pub mod tensor;
pub mod train;
pub mod vocab;

pub use error::ModelError;
pub use models::{Batch, LossOptions, ModelConfig, Seq2Seq};
pub use param::{Grads, Init, ParamId, ParamStore};
pub use pool::{Buffer, Pool};
pub use tape::{DropoutKey, Tape, Var};
pub use tensor::Tensor;
