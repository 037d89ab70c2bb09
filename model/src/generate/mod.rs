//! From a model to sequences: what a decoder remembers, greedy search, beam search.

pub mod kv_cache;
pub mod rnn_state;
