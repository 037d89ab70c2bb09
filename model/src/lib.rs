//! Sequence-to-sequence models on [`kavanam_kernels`]: transformers and recurrent encoder–decoders,
//! built, trained and decoded without another library.
//!
//! # Map
//! | room | what it holds |
//! |---|---|
//! | [`tensor`], [`param`] | values, and the named weights of a model |
//! | [`pool`], [`tape`] | memory of a step, and the way back through it |
//! | [`models`] | the model families, their configurations, [`Seq2Seq`] |
#![forbid(unsafe_code)]

pub mod error;
pub mod models;
pub mod param;
pub mod pool;
pub mod tape;
pub mod tensor;

pub use error::ModelError;
pub use models::{Batch, LossOptions, ModelConfig, Seq2Seq};
pub use param::{Grads, Init, ParamId, ParamStore};
pub use pool::{Buffer, Pool};
pub use tape::{DropoutKey, Tape, Var};
pub use tensor::Tensor;
