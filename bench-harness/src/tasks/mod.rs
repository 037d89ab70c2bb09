//! Tasks that models are trained on: data, recipe, training run, scores, times.

pub(crate) mod chars;
pub(crate) mod classify;
pub(crate) mod evaluate;
pub(crate) mod fit;
pub(crate) mod g2p;
pub(crate) mod latency;
pub(crate) mod phone_map;
pub(crate) mod progress;
pub(crate) mod recipe;
pub(crate) mod score;
pub(crate) mod sweep;
pub(crate) mod worth;
