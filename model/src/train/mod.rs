//! Training: the order of the data, the learning rate, clipping, the step, and its state on disk.

pub mod schedule;

pub use schedule::{Decay, Schedule};
