//! Optimiser steps: one pass over memory each.

pub mod adamw;

pub use adamw::AdamW;
