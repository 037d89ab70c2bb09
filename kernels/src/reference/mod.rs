//! The naive form of every kernel in f64, as plain loops: the oracles that fast kernels are tested
//! against, here and in other crates. They know views and nothing else of this crate.

mod additive_attention;
mod attention;
mod gemm;
mod gru;
mod lstm;
mod recurrent;
mod special;

pub use additive_attention::{
    AdditiveAttention, AdditiveAttentionGrads, additive_attention_backward, additive_attention_forward,
};
pub use attention::{
    Attention, AttentionGrads, attention_backward, attention_forward, attention_probabilities,
};
pub use gemm::{gemm, gemm_abs};
pub use gru::{gru_backward, gru_forward};
pub use lstm::{lstm_backward, lstm_forward};
pub use recurrent::{Real, Recurrent, RecurrentGrads, RecurrentOutput};
pub use special::{erf, erfc, normal_cdf};
