//! The naive form of every kernel in f64, as plain loops: the oracles that fast kernels are tested
//! against, here and in other crates. They know views and nothing else of this crate.

mod adamw;
mod additive_attention;
mod attention;
mod dropout;
mod elman;
mod gemm;
mod gru;
mod gru_reset_before;
mod lstm;
mod lstm_extended;
mod min_rnn;
mod recurrent;
mod rowwise;
mod special;

pub use adamw::{AdamWSpec, adamw_step};
pub use additive_attention::{
    AdditiveAttention, AdditiveAttentionGrads, additive_attention_backward, additive_attention_forward,
};
pub use attention::{
    Attention, AttentionGrads, attention_backward, attention_forward, attention_probabilities,
};
pub use dropout::{attention_dropout_keeps, dropout_keeps, philox4x32};
pub use elman::{elman_backward, elman_forward};
pub use gemm::{gemm, gemm_abs};
pub use gru::{gru_backward, gru_forward};
pub use gru_reset_before::{gru_reset_before_backward, gru_reset_before_forward};
pub use lstm::{lstm_backward, lstm_forward};
pub use lstm_extended::{LstmExtraGrads, LstmExtras, lstm_extended_backward, lstm_extended_forward};
pub use min_rnn::{MinRnn, min_rnn_backward, min_rnn_forward};
pub use recurrent::{Real, Recurrent, RecurrentGrads, RecurrentOutput};
pub use rowwise::{
    Element, Labels, NormGrads, cross_entropy_backward, cross_entropy_forward, embedding_backward,
    embedding_forward, layernorm_backward, layernorm_forward, log_softmax_backward, log_softmax_forward,
    rmsnorm_backward, rmsnorm_forward, softmax_backward, softmax_forward,
};
pub use special::{
    erf, erfc, gelu, gelu_derivative, gelu_tanh, gelu_tanh_argument, gelu_tanh_derivative, normal_cdf,
    normal_density, sigmoid, silu, silu_derivative,
};
