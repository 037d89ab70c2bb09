//! What tests of numerical code need: error bounds, comparators that say where and by how much,
//! reproducible data, guarded buffers, sizes that straddle block edges.
//!
//! Every property of this crate runs on every instruction set of the machine: see [`for_each_isa`].

mod bounds;
mod data;
mod strategies;

pub use bounds::{UNIT_ROUNDOFF, assert_same_bits, assert_within, gamma, ulp_error, ulp_size};
pub use data::{Guarded, integers, uniform};
pub use strategies::{small_dim, straddle};

use crate::context::Context;
use crate::isa::Isa;

/// Calls `property` once for each instruction set of this machine, single-threaded, `Strict`.
pub fn for_each_isa(mut property: impl FnMut(&Context)) {
    for isa in Isa::available() {
        property(&Context::with_isa(isa));
    }
}
