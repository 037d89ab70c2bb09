//! The ops of the tape, one a file: forward, what it saves, backward, gradient check.
//!
//! An op runs one kernel (or a few that belong together) at once and hands its result to the tape.
//! Shapes are `rows × cols`; a batch of sequences is `batch · seq` rows, batch-major in transformers and
//! time-major in recurrent models.

mod activation;
mod additive_decoder;
mod attention;
mod columns;
mod concat;
mod cross_entropy;
mod dropout;
mod embedding;
mod layer_norm;
mod linear;
mod min_rnn;
mod naive_recurrent;
mod permute_rows;
mod pool_sequences;
mod projected_cross_entropy;
mod recurrent;
mod residual;

#[cfg(test)]
pub(crate) mod gradient_check;

pub use activation::activation;
pub use additive_decoder::{AdditiveDecoder, AdditiveInputs, additive_decoder};
pub(crate) use attention::fused_part;
pub use attention::{AttentionShape, cross_attention, dot_attention, self_attention};
pub use columns::columns;
pub use concat::concat_cols;
pub use cross_entropy::{classification_loss, cross_entropy};
pub use dropout::dropout;
pub use embedding::{PositionTable, Tokens, embedding};
pub use layer_norm::{NormWeights, layer_norm};
pub use linear::{LinearWeights, linear};
pub use min_rnn::min_rnn;
pub use naive_recurrent::{NaiveLayer, NaiveRun, NaiveUpstream, naive_recurrent};
pub use permute_rows::permute_rows;
pub use pool_sequences::pool_sequences;
pub use projected_cross_entropy::projected_cross_entropy;
pub use recurrent::{
    RecurrentOutput, RecurrentPass, RecurrentWeights, StateVars, recurrent, recurrent_layers,
};
pub use residual::residual;
