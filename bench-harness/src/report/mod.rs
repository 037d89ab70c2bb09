//! Results and the pictures drawn from them.

pub mod results;
