//! Cuts C into one part for each task and runs them on the context's threads.
//!
//! A part is a slab of rows and columns that a task computes alone, with its own packing buffers and
//! all of K: there is no barrier, and no bit depends on where the cuts lie.

use std::ops::Range;

use half::bf16;

use super::macrokernel::{Part, Problem, RightOperand};
use super::microkernel::{KernelInfo, with_bf16_kernel, with_kernel};
use super::tiles::{Proofs, TilePart};
use crate::context::{Context, MEMORY_BOUND_ROWS};
use crate::isa::{Bf16Dots, Isa, IsaName};

/// Multiply-adds below which a task is not worth handing to another thread that is awake (about 10 µs on vectors).
const MIN_TASK_WORK: usize = 1 << 19;
/// Likewise of a product that may wake it.
const MIN_TASK_WORK_OF_LARGE: usize = 1 << 20;

/// How many threads a product of `m × n × k` is worth.
fn threads_for(ctx: &Context, kernel: &KernelInfo, [m, n, k]: [usize; 3]) -> usize {
    // Tiles do so many multiply-adds in the time of one on vectors; taken from the peak of the unit, not measured.
    let rate = match (kernel.isa, kernel.storage.parts()) {
        (IsaName::Amx, 1) => 16,
        (IsaName::Amx, _) => 4,
        (IsaName::Avx512Bf16, _) => 2,
        _ => 1,
    };
    let work = m.max(rate * MEMORY_BOUND_ROWS).saturating_mul(n).saturating_mul(k.max(1)) / rate;
    if work < 2 * MIN_TASK_WORK {
        return 1;
    }
    let of_task = if work < 4 * MIN_TASK_WORK_OF_LARGE { MIN_TASK_WORK } else { MIN_TASK_WORK_OF_LARGE };
    ctx.for_multiply_adds(work).thread_count().min(work / of_task)
}

/// Computes all of C.
pub(super) fn run(ctx: &Context, problem: &Problem<'_>) {
    let (m, n, k) = (problem.a.rows(), problem.n, problem.a.cols());
    if m == 0 || n == 0 {
        return;
    }
    let grid = Grid::of(ctx, problem.kernel, [m, n, k], matches!(problem.b, RightOperand::Packed(_)));
    ctx.for_each_task(grid.parts(), |task| {
        let (rows, cols) = grid.part(task);
        run_part(ctx.isa(), Part { problem, rows, cols });
    });
}

/// Out of line, so that the kernels are compiled once and not once for each way to run a task.
#[inline(never)]
pub(super) fn run_part(isa: Isa, part: Part<'_>) {
    let kernel = part.problem.kernel;
    match (kernel.isa, Proofs::of(isa), isa.bf16_dots()) {
        (IsaName::Amx, Some(proofs), _) => isa.dispatch(TilePart::new(part, proofs)),
        (IsaName::Avx512Bf16, _, Some(dots)) => with_bf16_kernel(dots, part),
        _ => with_kernel(isa, kernel.storage, part),
    }
}

/// As [`run_part`], with an A in bf16 and the kernel for it.
#[inline(never)]
pub(super) fn run_pairs(dots: Bf16Dots, part: Part<'_, bf16>) {
    with_bf16_kernel(dots, part);
}

/// C cut into slabs of rows and of columns.
pub(super) struct Grid {
    m: usize,
    n: usize,
    kernel: &'static KernelInfo,
    row_parts: usize,
    col_parts: usize,
}

/// Tiles of rows that each thread must get before packed weights are shared by rows, so that every thread reads all of them. With fewer, shares differ by up to
/// a half (16 rows are 6 + 10) and a thread's few rows leave it to wait for the weights. Two threads, by columns / by rows, alternating, minima and medians of one run each (none under results/): 16×512×2048
/// 1.27, 1.26 times as fast, 16×768×3072 1.20, 1.39, 16×2048×512 1.23, 1.29, 32×1024×4096 1.04, 1.16, 32×3072×768 0.94, 1.11, 128×768×768 1.02, 1.01, 128×2048×512 0.92, 1.02.
const TILES_A_THREAD: usize = 4;
/// Half as many are enough where rows come out more even than columns.
const EVEN_TILES_A_THREAD: usize = 2;

impl Grid {
    /// As many parts as threads, cut along one side: the longer one, or along the rows where the weights are packed and there are enough rows.
    pub(super) fn of(
        ctx: &Context,
        kernel: &'static KernelInfo,
        [m, n, k]: [usize; 3],
        packed: bool,
    ) -> Grid {
        let threads = threads_for(ctx, kernel, [m, n, k]);
        let (row_tiles, col_tiles) = (m.div_ceil(kernel.mr), n.div_ceil(kernel.nr));
        // The share of the last part, which no other exceeds by a tile.
        let share = |len, tile, parts: usize| slab(len, tile, parts, parts - 1).len() as f64 / len as f64;
        let evener = || share(m, kernel.mr, threads) < share(n, kernel.nr, threads);
        let by_rows = m >= n
            || packed
                && row_tiles >= EVEN_TILES_A_THREAD * threads
                && (row_tiles >= TILES_A_THREAD * threads || evener());
        let (row_parts, col_parts) =
            if by_rows { (threads.min(row_tiles), 1) } else { (1, threads.min(col_tiles)) };
        Grid { m, n, kernel, row_parts, col_parts }
    }

    /// How many parts there are.
    pub(super) fn parts(&self) -> usize {
        self.row_parts * self.col_parts
    }

    /// The rows and columns of one part. The first part, which the caller takes before anybody has come, is the last slab: none has more tiles.
    pub(super) fn part(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let index = self.parts() - 1 - index;
        let (row, col) = (index / self.col_parts, index % self.col_parts);
        (slab(self.m, self.kernel.mr, self.row_parts, row), slab(self.n, self.kernel.nr, self.col_parts, col))
    }

    /// The slabs of rows, in order.
    pub(super) fn rows(&self) -> impl Iterator<Item = Range<usize>> {
        (0..self.row_parts).map(|i| slab(self.m, self.kernel.mr, self.row_parts, i))
    }

    /// The slabs of columns, in order.
    pub(super) fn cols(&self) -> impl Iterator<Item = Range<usize>> {
        (0..self.col_parts).map(|i| slab(self.n, self.kernel.nr, self.col_parts, i))
    }
}

/// Slab `index` of `parts` of `0..len`, cut at multiples of `tile`.
pub(super) fn slab(len: usize, tile: usize, parts: usize, index: usize) -> Range<usize> {
    let tiles = len.div_ceil(tile);
    let edge = |i: usize| (tiles * i / parts * tile).min(len);
    edge(index)..edge(index + 1)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::super::microkernel::{Storage, kernel_of};
    use super::*;

    #[test]
    fn parts_cover_c_and_none_has_more_tiles_than_the_first() {
        let kernel = kernel_of(Isa::scalar(), Storage::F32);
        for n in 1usize..200 {
            for col_parts in 1..=n.div_ceil(kernel.nr).min(7) {
                let grid = Grid { m: 3, n, kernel, row_parts: 1, col_parts };
                let parts: Vec<_> = (0..grid.parts()).map(|index| grid.part(index).1).collect();
                let most = parts.iter().map(|cols| cols.len().div_ceil(kernel.nr)).max();
                assert_eq!(Some(parts[0].len().div_ceil(kernel.nr)), most);
                let mut covered: Vec<usize> = parts.into_iter().flatten().collect();
                covered.sort_unstable();
                assert!(covered.into_iter().eq(0..n));
            }
        }
    }

    #[test]
    fn packed_weights_are_shared_by_rows_where_rows_come_out_more_even() {
        let kernel = kernel_of(Isa::scalar(), Storage::F32);
        let two = Context::with_isa(Isa::scalar()).threads(NonZeroUsize::new(2).unwrap());
        // Four tiles of rows; 255 tiles of columns, or 256.
        let rows = 4 * kernel.mr;
        let parts = |tiles: usize, packed| {
            let grid = Grid::of(&two, kernel, [rows, tiles * kernel.nr, 1024], packed);
            (grid.row_parts, grid.col_parts)
        };
        assert_eq!([parts(255, true), parts(256, true), parts(255, false)], [(2, 1), (1, 2), (1, 2)]);
    }
}
