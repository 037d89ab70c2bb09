//! Statements about whole models.

mod classifier;
mod decoding;
mod properties;
mod support;
