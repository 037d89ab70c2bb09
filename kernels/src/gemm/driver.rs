//! Cuts C into one part for each task and runs them on the context's threads.
//!
//! A part is a slab of rows and columns that a task computes alone, with its own packing buffers and
//! all of K: there is no barrier, and no bit depends on where the cuts lie.

use super::macrokernel::{Part, Problem, RightOperand};
use super::microkernel::{KernelInfo, with_kernel};
use super::tiles::TilePart;
use crate::context::Context;
use crate::isa::{Isa, IsaName};

/// Multiply-adds below which a task is not worth handing to another thread (about 20 µs on vectors).
const MIN_TASK_WORK: usize = 1 << 20;
/// A product of fewer rows takes as long as one of this many: it waits for memory. With it a second thread gains
/// from 768×768 on and is not called for 512×512 (docs/decisions/002-gemm.md).
const MEMORY_BOUND_ROWS: usize = 4;

/// How many threads a product of `m × n × k` is worth.
pub(super) fn threads_for(ctx: &Context, kernel: &KernelInfo, [m, n, k]: [usize; 3]) -> usize {
    // Tiles do so many multiply-adds in the time of one on vectors; taken from the peak of the unit, not measured.
    let rate = match (kernel.isa, kernel.storage.parts()) {
        (IsaName::Amx, 1) => 16,
        (IsaName::Amx, _) => 4,
        _ => 1,
    };
    let work = m.max(rate * MEMORY_BOUND_ROWS).saturating_mul(n).saturating_mul(k.max(1));
    ctx.thread_count().min((work / (rate * MIN_TASK_WORK)).max(1))
}

/// Computes all of C.
pub(super) fn run(ctx: &Context, problem: &Problem<'_>) {
    let (m, n, k) = (problem.a.rows(), problem.n, problem.a.cols());
    if m == 0 || n == 0 {
        return;
    }
    let threads = threads_for(ctx, problem.kernel, [m, n, k]);
    let (row_parts, col_parts) = grid(problem, threads);
    let (mr, nr) = (problem.kernel.mr, problem.kernel.nr);
    ctx.for_each_task(row_parts * col_parts, |task| {
        let rows = slab(m, mr, row_parts, task / col_parts);
        let cols = slab(n, nr, col_parts, task % col_parts);
        run_part(ctx.isa(), Part { problem, rows, cols });
    });
}

/// Out of line, so that the kernels are compiled once and not once for each way to run a task.
#[inline(never)]
fn run_part(isa: Isa, part: Part<'_>) {
    match isa.tiles() {
        Some(tiles) if part.problem.kernel.isa == IsaName::Amx => isa.dispatch(TilePart { part, tiles }),
        _ => with_kernel(isa, part.problem.kernel.storage, part),
    }
}

/// How many slabs of rows and of columns: as many parts as threads, cut along the longer side.
fn grid(problem: &Problem<'_>, threads: usize) -> (usize, usize) {
    let row_tiles = problem.a.rows().div_ceil(problem.kernel.mr);
    let col_tiles = problem.n.div_ceil(problem.kernel.nr);
    let by_rows = match problem.b {
        RightOperand::Packed(_) => row_tiles >= threads,
        RightOperand::Plain(_) => problem.a.rows() >= problem.n,
    };
    if by_rows { (threads.min(row_tiles), 1) } else { (1, threads.min(col_tiles)) }
}

/// Slab `index` of `parts` of `0..len`, cut at multiples of `tile`.
pub(super) fn slab(len: usize, tile: usize, parts: usize, index: usize) -> std::ops::Range<usize> {
    let tiles = len.div_ceil(tile);
    let edge = |i: usize| (tiles * i / parts * tile).min(len);
    edge(index)..edge(index + 1)
}
