//! Measuring: the clock, the turns that peers take, what is said about samples, the machine and its limits.

pub(crate) mod clock;
pub(crate) mod fingerprint;
pub(crate) mod roofline;
pub(crate) mod sampler;
pub(crate) mod statistics;
pub(crate) mod threads;
pub(crate) mod workload;
