//! Statements about whole models.

mod decoding;
mod properties;
mod support;
