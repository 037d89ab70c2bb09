//! Which rows are alive at which step, and where they stand in the gapless buffers.
//!
//! Rank = place in the order of lengths, longest first (equal lengths in batch order). The rows that are
//! alive at step t are the ranks `0..active[t]`, stored at `offsets[t]..offsets[t] + active[t]`. Both
//! directions share this order of memory; they differ in the order in which steps are visited.

use std::cmp::Reverse;
use std::ops::Range;

use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::scratch::ScratchBuf;
use crate::view::{MatMut, MatRef};

use super::{Direction, Sequence, check_lengths};

#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// Batch entry of each rank.
    order: Vec<usize>,
    /// Ranks alive at each step.
    active: Vec<usize>,
    /// First gapless row of each step, and the number of rows at the end.
    offsets: Vec<usize>,
    direction: Direction,
}

impl Plan {
    pub(super) fn new(sequence: &Sequence<'_>) -> Result<Plan, ShapeError> {
        let lengths = sequence.lengths;
        let batch = lengths.len();
        let seq = sequence.x.rows().checked_div(batch).unwrap_or(0);
        expect_dim("x", "rows (a multiple of the batch)", seq * batch, sequence.x.rows())?;
        check_lengths(lengths, seq)?;
        let mut order: Vec<usize> = (0..batch).collect();
        order.sort_by_key(|&b| Reverse(lengths[b]));
        let mut active = Vec::with_capacity(seq);
        let mut offsets = Vec::with_capacity(seq + 1);
        offsets.push(0);
        let mut alive = batch;
        for t in 0..seq {
            while alive > 0 && lengths[order[alive - 1]] <= t {
                alive -= 1;
            }
            active.push(alive);
            offsets.push(offsets[t] + alive);
        }
        Ok(Plan { order, active, offsets, direction: sequence.direction })
    }

    pub(super) fn batch(&self) -> usize {
        self.order.len()
    }

    pub(super) fn seq(&self) -> usize {
        self.active.len()
    }

    /// Rows of the gapless buffers: the sum of all lengths.
    pub(super) fn rows(&self) -> usize {
        self.offsets[self.seq()]
    }

    pub(super) fn direction(&self) -> Direction {
        self.direction
    }

    /// The step that is visited as number `visit`.
    pub(super) fn step(&self, visit: usize) -> usize {
        match self.direction {
            Direction::Forward => visit,
            Direction::Reverse => self.seq() - 1 - visit,
        }
    }

    /// Those steps, or chunks of steps, in the order of visits.
    pub(super) fn visits(&self, of: &Range<usize>) -> impl Iterator<Item = usize> + use<> {
        let (Range { start, end }, direction) = (of.clone(), self.direction);
        (0..of.len()).map(move |visit| match direction {
            Direction::Forward => start + visit,
            Direction::Reverse => end - 1 - visit,
        })
    }

    /// The first step at which one of the ranges has fewer than `rows` rows, as at all later ones.
    pub(super) fn first_step_below(&self, ranges: &[Range<usize>], rows: usize) -> usize {
        let few = |t: &usize| ranges.iter().any(|ranks| self.rows_at(*t, ranks).len() < rows);
        (0..self.seq()).find(few).unwrap_or(self.seq())
    }

    /// The step that follows `t` in the order of visits.
    pub(super) fn next(&self, t: usize) -> Option<usize> {
        match self.direction {
            Direction::Forward => (t + 1 < self.seq()).then_some(t + 1),
            Direction::Reverse => t.checked_sub(1),
        }
    }

    /// The step before `t` in the order of visits.
    fn previous(&self, t: usize) -> Option<usize> {
        match self.direction {
            Direction::Forward => t.checked_sub(1),
            Direction::Reverse => (t + 1 < self.seq()).then_some(t + 1),
        }
    }

    /// How many of step `t`'s ranks are alive at the next step too.
    pub(super) fn continuing(&self, t: usize) -> usize {
        self.next(t).map_or(0, |next| self.active[next].min(self.active[t]))
    }

    /// How many of step `t`'s ranks were alive at the step before; the others start here.
    pub(super) fn continued(&self, t: usize) -> usize {
        self.previous(t).map_or(0, |previous| self.active[previous].min(self.active[t]))
    }

    /// The gapless rows of `ranks` that are alive at step `t`.
    pub(super) fn rows_at(&self, t: usize, ranks: &Range<usize>) -> Range<usize> {
        let [first, last] = [ranks.start, ranks.end].map(|rank| self.offsets[t] + rank.min(self.active[t]));
        first..last
    }

    /// The time-major row of rank `rank` at step `t`.
    pub(super) fn padded_row(&self, t: usize, rank: usize) -> usize {
        t * self.batch() + self.order[rank]
    }

    /// Whether the gapless order is the time-major order itself.
    pub(super) fn is_identity(&self) -> bool {
        self.active.last().is_none_or(|&alive| alive == self.batch())
    }

    /// The batch entry of each rank.
    pub(super) fn order(&self) -> &[usize] {
        &self.order
    }

    /// At most `parts` ranges of ranks of about equal work. The results do not depend on where they lie.
    pub(super) fn split_ranks(&self, parts: usize) -> Vec<Range<usize>> {
        let steps = |rank: usize| self.active.iter().filter(|&&alive| alive > rank).count();
        let mut ranges = Vec::with_capacity(parts);
        let (mut start, mut done) = (0, 0);
        for rank in 0..self.batch() {
            done += steps(rank);
            let full = done * parts >= self.rows() * (ranges.len() + 1);
            if full && rank + 1 < self.batch() && ranges.len() + 1 < parts {
                ranges.push(start..rank + 1);
                start = rank + 1;
            }
        }
        ranges.push(start..self.batch());
        ranges
    }

    /// Each step alone.
    pub(super) fn steps(&self) -> Vec<Range<usize>> {
        (0..self.seq()).map(|t| t..t + 1).collect()
    }

    /// Steps that follow each other in memory, as many at a time as `ranks` have `rows` rows at, the last few with what is left.
    pub(super) fn chunks(&self, ranks: &Range<usize>, rows: usize) -> Vec<Range<usize>> {
        let mut chunks = Vec::new();
        let (mut start, mut gathered) = (0, 0);
        for t in 0..self.seq() {
            gathered += self.rows_at(t, ranks).len();
            if gathered >= rows || t + 1 == self.seq() {
                chunks.push(start..t + 1);
                (start, gathered) = (t + 1, 0);
            }
        }
        chunks
    }

    /// The gapless rows of step `t`, which may be the end, and of all steps that lie behind it in memory.
    pub(super) fn rows_from(&self, t: usize) -> Range<usize> {
        self.offsets[t]..self.rows()
    }

    /// Rows of `ranks` at those steps.
    pub(super) fn rows_in(&self, steps: &Range<usize>, ranks: &Range<usize>) -> usize {
        steps.clone().map(|t| self.rows_at(t, ranks).len()).sum()
    }

    /// Whether the rows of `ranks` at those steps follow each other in memory.
    pub(super) fn is_one_block(&self, steps: &Range<usize>, ranks: &Range<usize>) -> bool {
        steps.len() <= 1 || *ranks == (0..self.batch())
    }

    /// For each range of ranks, its block of rows at every step of a gapless matrix.
    pub(super) fn split_steps<'m>(
        &self,
        matrix: MatMut<'m>,
        ranges: &[Range<usize>],
    ) -> Vec<Vec<MatMut<'m>>> {
        self.split_chunks(matrix, ranges, &self.steps())
    }

    /// For each range of ranks, its block of rows at every chunk of steps: a block [`is_one_block`](Plan::is_one_block).
    pub(super) fn split_chunks<'m>(
        &self,
        matrix: MatMut<'m>,
        ranges: &[Range<usize>],
        chunks: &[Range<usize>],
    ) -> Vec<Vec<MatMut<'m>>> {
        let mut parts: Vec<Vec<MatMut<'m>>> =
            ranges.iter().map(|_| Vec::with_capacity(chunks.len())).collect();
        let mut rest = matrix;
        for steps in chunks {
            for (part, ranks) in parts.iter_mut().zip(ranges) {
                debug_assert!(self.is_one_block(steps, ranks));
                let (block, below) = rest.split_rows(self.rows_in(steps, ranks));
                part.push(block);
                rest = below;
            }
        }
        parts
    }

    /// The rows of a time-major matrix in gapless order: `x` itself where that is the same.
    pub(super) fn gather<'x>(&self, x: MatRef<'x>, buffer: &'x mut Option<ScratchBuf>) -> MatRef<'x> {
        if self.is_identity() {
            return x;
        }
        let buffer = buffer.insert(ScratchBuf::take(self.rows() * x.cols()));
        let mut gathered = matrix_mut(buffer, self.rows(), x.cols());
        for t in 0..self.seq() {
            for rank in 0..self.active[t] {
                gathered.row_mut(self.offsets[t] + rank).copy_from_slice(x.row(self.padded_row(t, rank)));
            }
        }
        matrix(buffer, self.rows(), x.cols())
    }

    /// Writes gapless rows to their time-major places and zeros to the padding; `row(t, rank)` gives a row.
    pub(super) fn scatter<'r>(
        &self,
        ctx: &Context,
        out: MatMut<'_>,
        row: impl Fn(usize, usize) -> &'r [f32] + Sync,
    ) {
        if self.batch() == 0 {
            return;
        }
        out.for_each_row_block(ctx, self.batch(), |first, mut block| {
            let t = first / self.batch();
            for (rank, &b) in self.order.iter().enumerate() {
                if rank < self.active[t] {
                    block.row_mut(b).copy_from_slice(row(t, rank));
                } else {
                    block.row_mut(b).fill(0.0);
                }
            }
        });
    }
}

/// A gapless view of the whole of `data`, whose size is right by construction.
pub(super) fn matrix(data: &[f32], rows: usize, cols: usize) -> MatRef<'_> {
    MatRef::new(data, rows, cols).expect("the buffer was taken for this shape")
}

/// Elements from one row of a gates buffer to the next.
///
/// Where a large power of two divides the rows' length, a column of the matrix lies in a few sets of the caches, and
/// the product `d_sumsᵀ·x`, which packs columns, waits for memory at every element. Two lines more spread it: on a Zen 3
/// core (32 KiB L1d, 512 KiB L2) that product went from 79 to 88 GFLOP/s for 8×128×512 (batch, steps, hidden),
/// 81 to 86 for 32×128×512, 73 to 87 for 64×64×256 and 82 to 86 for 128×32×1024. One line more gave less.
pub(super) fn gates_stride(columns: usize) -> usize {
    const POWER: usize = 256;
    const MORE: usize = 32;
    if columns.is_multiple_of(POWER) { columns + MORE } else { columns }
}

/// A gates buffer of that many columns: all rows, without what stands between them.
pub(super) fn gates_matrix(data: &[f32], rows: usize, columns: usize) -> MatRef<'_> {
    MatRef::with_strides(data, rows, columns, gates_stride(columns), 1)
        .expect("the buffer was taken for this shape")
}

/// As [`gates_matrix`], to write.
pub(super) fn gates_matrix_mut(data: &mut [f32], rows: usize, columns: usize) -> MatMut<'_> {
    MatMut::with_strides(data, rows, columns, gates_stride(columns), 1)
        .expect("the buffer was taken for this shape")
}

/// As [`matrix`], to write.
pub(super) fn matrix_mut(data: &mut [f32], rows: usize, cols: usize) -> MatMut<'_> {
    MatMut::new(data, rows, cols).expect("the buffer was taken for this shape")
}

/// `to = from`.
pub(super) fn copy(from: MatRef<'_>, mut to: MatMut<'_>) {
    for row in 0..from.rows() {
        to.row_mut(row).copy_from_slice(from.row(row));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(lengths: &[usize], seq: usize, direction: Direction) -> Plan {
        let x = vec![0.0; seq * lengths.len()];
        let x = MatRef::new(&x, seq * lengths.len(), 1).unwrap();
        Plan::new(&Sequence { x, lengths, direction }).unwrap()
    }

    #[test]
    fn ranks_are_by_length_and_alive_rows_are_a_prefix() {
        let forward = plan(&[2, 0, 3, 2], 4, Direction::Forward);
        assert_eq!(forward.order(), [2, 0, 3, 1]);
        assert_eq!(forward.active, [3, 3, 1, 0]);
        assert_eq!(forward.rows(), 7);
        assert_eq!((forward.continuing(1), forward.continuing(2), forward.continued(1)), (1, 0, 3));
        let reverse = plan(&[2, 0, 3, 2], 4, Direction::Reverse);
        assert_eq!((reverse.continuing(2), reverse.continuing(0), reverse.continued(1)), (1, 0, 1));
        assert!(!forward.is_identity() && plan(&[3, 3], 3, Direction::Reverse).is_identity());
    }

    #[test]
    fn chunks_cover_every_step_once_and_have_rows_enough() {
        let plan = plan(&[6, 4, 4, 1], 6, Direction::Reverse);
        assert_eq!(plan.active, [4, 3, 3, 3, 1, 1]);
        let all = 0..4;
        assert_eq!(plan.chunks(&all, 1), plan.steps());
        assert_eq!(plan.chunks(&all, 5), [0..2, 2..4, 4..6]);
        assert_eq!(plan.chunks(&(2..3), 2), [0..2, 2..4, 4..6]);
        let [whole] = &plan.chunks(&all, 100)[..] else { panic!("one chunk of all steps") };
        assert_eq!(*whole, 0..6);
        assert_eq!((plan.rows_in(&(1..3), &all), plan.rows_in(&(1..3), &(1..2))), (6, 2));
        assert!(plan.is_one_block(&(1..3), &all) && !plan.is_one_block(&(1..3), &(1..2)));
        assert_eq!(plan.visits(&(2..5)).collect::<Vec<_>>(), [4, 3, 2]);
        let ranges = [0..2, 2..4];
        assert_eq!([0, 1, 2, 3].map(|rows| plan.first_step_below(&ranges, rows)), [6, 4, 1, 0]);
        assert_eq!((plan.rows_from(4), plan.rows_from(6)), (13..15, 15..15));
    }

    #[test]
    fn ranges_cover_every_rank_once() {
        for lengths in [vec![], vec![5], vec![5, 4, 4, 1, 0], vec![1; 9]] {
            for parts in 1..6 {
                let plan = plan(&lengths, 5, Direction::Forward);
                let ranges = plan.split_ranks(parts);
                assert!(ranges.len() <= parts);
                assert_eq!(ranges.first().unwrap().start, 0);
                assert_eq!(ranges.last().unwrap().end, lengths.len());
                assert!(ranges.windows(2).all(|w| w[0].end == w[1].start));
            }
        }
    }
}
