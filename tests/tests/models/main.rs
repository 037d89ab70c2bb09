//! Statements about whole models.

mod char_lm;
mod classifier;
mod decoding;
mod precision;
mod properties;
mod support;
