//! Layers: which weights they have, how these are named and initialised, and how ops go together.

pub mod additive_attention;
pub mod attention;
pub mod decoder_layer;
pub mod embedding;
pub mod encoder_layer;
pub mod feed_forward;
pub mod linear;
pub mod norm;
pub mod positional;
pub mod rnn;

pub use linear::Linear;
pub use norm::Norm;
