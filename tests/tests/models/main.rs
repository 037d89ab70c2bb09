//! Statements about whole models.

mod char_lm;
mod classifier;
mod decoding;
mod properties;
mod support;
