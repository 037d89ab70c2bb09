//! What the machine can do at most, measured: fused multiply-adds in registers, bytes read from memory.

use std::borrow::Cow;
use std::hint::black_box;

use kavanam_kernels::memory::AlignedVec;
use kavanam_kernels::{Context, Isa};
use pulp::{Simd, WithSimd};
use serde::Serialize;

use crate::error::HarnessError;
use crate::measure::clock::{Clock, Monotonic};
use crate::measure::fingerprint::Machine;
use crate::measure::threads;
use crate::measure::workload::Workload;

/// Independent chains of multiply-adds: more than latency × ports of any core (4 × 2), and with their two
/// operands within AVX2's 16 registers.
const CHAINS: usize = 12;
/// Steps of every chain in one timed run: some milliseconds.
const STEPS: usize = 1 << 21;
/// Timed runs at least, of which the fastest counts: a limit is what the machine can do undisturbed …
const RUNS: usize = 7;
/// … and as many more as this time holds: threads that have just woken up share a core for some runs.
const RUNS_NS: f64 = 0.25e9;
/// The buffer of the bandwidth test is this many times the largest cache …
const CACHE_MULTIPLE: u64 = 4;
/// … and within these bounds, in bytes.
const BUFFER_BYTES: std::ops::RangeInclusive<u64> = (128 << 20)..=(1 << 30);

/// The limits that records are compared with.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Roofline {
    /// The instruction set.
    pub(crate) isa: String,
    /// The threads that ran at once.
    pub(crate) threads: usize,
    /// f32 multiply-adds in registers, two operations each, in 10⁹ operations a second.
    pub(crate) fma_gflops: f64,
    /// Bytes read from memory in 10⁹ a second.
    pub(crate) read_gbps: f64,
}

impl Roofline {
    /// Measures the arithmetic of the context's instruction set; `read_gbps` comes from [`read_gbps`], which
    /// depends on the threads alone.
    pub(crate) fn measure(context: &Context, read_gbps: f64) -> Roofline {
        Roofline {
            isa: context.isa().name().to_string(),
            threads: context.thread_count(),
            fma_gflops: peak_fma_gflops(context),
            read_gbps,
        }
    }
}

/// The fastest run of `task` on every thread at once, in nanoseconds: of [`RUNS`], or of as many as [`RUNS_NS`] holds.
fn fastest_ns(context: &Context, task: impl Fn(usize) + Sync) -> f64 {
    let clock = Monotonic::start();
    let once = || {
        let start = clock.now_ns();
        context.for_each_task(context.thread_count(), &task);
        clock.now_ns() - start
    };
    let begin = clock.now_ns();
    let runs = (0..).take_while(|run| *run < RUNS || clock.now_ns() - begin < RUNS_NS);
    runs.map(|_| once()).fold(f64::INFINITY, f64::min)
}

struct Chains;

impl WithSimd for Chains {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        // x ← x·f + a stays near 1 for ever; unknown to the compiler, so that it cannot be computed beforehand.
        let factor = simd.splat_f32s(black_box(0.5));
        let addend = simd.splat_f32s(black_box(0.5));
        let mut chains = [simd.splat_f32s(black_box(1.0)); CHAINS];
        for _ in 0..STEPS {
            for chain in &mut chains {
                *chain = simd.mul_add_e_f32s(*chain, factor, addend);
            }
        }
        chains.into_iter().map(|chain| simd.reduce_sum_f32s(chain)).sum()
    }
}

/// f32 multiply-adds in registers, in GFLOP/s over all threads of the context.
pub(crate) fn peak_fma_gflops(context: &Context) -> f64 {
    let isa = context.isa();
    let ns = fastest_ns(context, |_| {
        black_box(isa.dispatch(Chains));
    });
    let operations = 2 * CHAINS * STEPS * isa.f32_lanes() * context.thread_count();
    operations as f64 / ns
}

/// Bytes read from memory in GB/s over all threads of the context, through a buffer that no cache holds.
pub(crate) fn read_gbps(context: &Context, machine: &Machine) -> f64 {
    read_buffer_gbps(context, uncached_bytes(machine) as usize)
}

/// So many bytes no cache holds.
pub(crate) fn uncached_bytes(machine: &Machine) -> u64 {
    let largest_cache = machine.caches.iter().map(|cache| cache.bytes).max().unwrap_or(0);
    (largest_cache * CACHE_MULTIPLE).clamp(*BUFFER_BYTES.start(), *BUFFER_BYTES.end())
}

fn read_buffer_gbps(context: &Context, bytes: usize) -> f64 {
    let threads = context.thread_count();
    let share = bytes / size_of::<f32>() / threads;
    // Written, not merely allocated: untouched memory is one shared page of zeros and reads twice as fast.
    let buffer = AlignedVec::from_fn(share * threads, |i| (i % 7) as f32);
    // The widest set that there is: a limit of the memory must not be one of the instructions.
    let isa = Isa::best();
    let ns = fastest_ns(context, |task| {
        black_box(isa.dispatch(Sum(&buffer[task * share..][..share])));
    });
    (share * threads * size_of::<f32>()) as f64 / ns
}

/// Reads a buffer from one end to the other, again and again: what bounds a computation that must read as many
/// bytes. A buffer that fits a cache is read from it, as the computation's operand is. Of several buffers each run reads the next one, as the
/// computation does.
pub(crate) struct Reading {
    context: Context,
    buffers: Vec<AlignedVec<f32>>,
    next: usize,
}

impl Reading {
    /// On the context's threads, with the widest vectors that there are.
    pub(crate) fn new(context: &Context, bytes: f64, copies: usize) -> Reading {
        let filled = || AlignedVec::filled(bytes as usize / size_of::<f32>(), 1.0);
        let buffers = (0..copies).map(|_| filled()).collect();
        let context = Context::with_isa(Isa::best()).threads(threads::count(context.thread_count()));
        Reading { context, buffers, next: 0 }
    }
}

impl Workload for Reading {
    fn run(&mut self) -> Result<(), HarnessError> {
        let buffer = &self.buffers[self.next];
        self.next = (self.next + 1) % self.buffers.len();
        let share = buffer.len().div_ceil(self.context.thread_count());
        let parts: Vec<&[f32]> = buffer.chunks(share.max(1)).collect();
        self.context.for_each_task(parts.len(), |task| {
            black_box(self.context.isa().dispatch(Sum(parts[task])));
        });
        Ok(())
    }

    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
        Ok(Vec::new())
    }

    fn kernel(&self) -> String {
        "read".to_owned()
    }
}

struct Sum<'a>(&'a [f32]);

impl WithSimd for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        kavanam_kernels::lanes::sum(simd, self.0)
    }
}

/// What to say about the limit of matrix tiles.
pub(crate) fn tile_peak(machine: &Machine) -> &'static str {
    if machine.flags.iter().any(|flag| flag == "amx_tile") {
        "AMX, which medium, high and highest multiply on; its peak is not measured here"
    } else {
        "no AMX on this CPU"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_beat_scalars_and_figures_are_finite() {
        let peaks: Vec<f64> =
            Isa::available().into_iter().map(|isa| peak_fma_gflops(&Context::with_isa(isa))).collect();
        assert!(peaks.iter().all(|peak| peak.is_finite() && *peak > 0.0), "{peaks:?}");
        assert!(read_buffer_gbps(&Context::with_isa(Isa::best()), 1 << 20) > 0.0);
    }

    #[test]
    fn a_cpu_without_tiles_says_so() {
        assert_eq!(tile_peak(&Machine::default()), "no AMX on this CPU");
    }
}
