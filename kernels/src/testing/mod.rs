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

use std::fs::OpenOptions;
use std::io::Write;
use std::panic::Location;

use crate::context::Context;
use crate::isa::Isa;

/// The environment variable that names the file in which [`for_each_isa`] writes what it ran:
/// a line `isa file:line` a property. `cargo xtask isa` reads it.
pub const ISA_LOG_VARIABLE: &str = "KAVANAM_ISA_LOG";

/// Calls `property` once for each instruction set of this machine, single-threaded, `Strict`.
///
/// # Panics
/// When the property does, or when the log that [`ISA_LOG_VARIABLE`] names cannot be written.
#[track_caller]
pub fn for_each_isa(mut property: impl FnMut(&Context)) {
    let place = Location::caller();
    let mut log = std::env::var_os(ISA_LOG_VARIABLE).map(|path| {
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .expect("the log of instruction sets can be opened")
    });
    for isa in Isa::available() {
        property(&Context::with_isa(isa));
        if let Some(log) = &mut log {
            // One write a line: tests of other threads append to the same file.
            let line = format!("{isa} {}:{}\n", place.file(), place.line());
            log.write_all(line.as_bytes()).expect("the log of instruction sets can be written");
        }
    }
}

/// The instruction set `amx`: of this CPU, or else, on Linux, in software beside the widest vectors that there are. `None` where those have fewer than eight
/// lanes, or where it cannot be emulated.
///
/// A CPU without a tile unit faults at each tile instruction; a handler of `SIGILL`, installed by the first call, does what the manual
/// says and goes on. So tests run the machine code that the unit would run.
///
/// # Panics
/// When the handler cannot be installed.
pub fn amx() -> Option<Isa> {
    Isa::amx_or_emulated()
}
