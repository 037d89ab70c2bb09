//! Measuring: the machine and the clock.

pub(crate) mod clock;
pub(crate) mod fingerprint;
