//! The shape of a scan, and how its rows and channels are dealt to threads.

use std::ops::Range;

use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::view::{HeadsLayout, HeadsMut, MatMut};

use super::super::{Direction, check_lengths};
use super::{Candidate, MinCell};

/// Channels of one task: with its gates, a step of them is a few kilobytes.
const CHANNELS: usize = 256;
/// Channels of a task at least, where a row is cut for more threads: with fewer vectors a step waits for the one before it.
const NARROW: usize = 64;
/// Steps times channels that are worth a thread: about 60 µs.
///
/// One row on two threads against one, microseconds, Zen 3, the best of 10 to 300 runs in alternation. The other thread slept before, or was
/// awake; "chunks" is the rejected form, with the best of chunks of 32 and of 256 steps and of two chunks, the other thread awake:
///
/// | steps × channels | one thread | halves, asleep | halves, awake | chunks |
/// |---|--:|--:|--:|--:|
/// | 4096 × 32 | 167 | 217 | 167 | 142 |
/// | 512 × 64 | 36 | | 49 | 42 |
/// | 64 × 1024 | 63 | 63 | 32 | 36 |
/// | 512 × 128 | 64 | 82 | 51 | 58 |
/// | 512 × 256 | 118 | 122 | 96 | 91 |
/// | 4096 × 64 | 281 | 337 | 267 | 298 |
/// | 4096 × 128 | 523 | 424 | 352 | 357 |
/// | 4096 × 256 | 1253 | 1004 | 1001 | 963 |
/// | 4096 × 512 | 4501 | 2471 | 2527 | 2181 |
const PARALLEL: usize = 65_536;

/// A scan over a padded batch.
#[derive(Debug, Clone, Copy)]
pub struct Scan<'a> {
    /// Which recurrence.
    pub cell: MinCell,
    /// What the candidate is of its sum.
    pub candidate: Candidate,
    /// Width of the state.
    pub hidden: usize,
    /// Steps of the padded batch.
    pub seq: usize,
    /// Steps of each row, each at most `seq`; zero allowed.
    pub lengths: &'a [usize],
    /// The order of the steps.
    pub direction: Direction,
}

impl Scan<'_> {
    pub(super) fn batch(&self) -> usize {
        self.lengths.len()
    }

    /// Elements of `columns` for each step and row.
    pub(super) fn elements(&self, columns: usize) -> Result<usize, ShapeError> {
        let len = self.seq.checked_mul(self.batch()).and_then(|n| n.checked_mul(columns));
        len.ok_or(ShapeError::Overflow { argument: "scan" })
    }

    pub(super) fn check(&self, gates: usize, outputs: &[(&'static str, usize)]) -> Result<(), ShapeError> {
        let columns = self.cell.gates().checked_mul(self.hidden);
        let columns = columns.ok_or(ShapeError::Overflow { argument: "hidden" })?;
        expect_dim("gates", "elements", self.elements(columns)?, gates)?;
        let len = self.elements(self.hidden)?;
        outputs.iter().try_for_each(|&(name, actual)| expect_dim(name, "elements", len, actual))?;
        check_lengths(self.lengths, self.seq)
    }

    pub(super) fn check_state(&self, name: &'static str, state: Option<usize>) -> Result<(), ShapeError> {
        state.map_or(Ok(()), |len| expect_dim(name, "elements", self.batch() * self.hidden, len))
    }

    /// The step that a row of `length` steps visits as number `visit`.
    #[inline(always)]
    pub(super) fn step(&self, visit: usize, length: usize) -> usize {
        match self.direction {
            Direction::Forward => visit,
            Direction::Reverse => length - 1 - visit,
        }
    }

    /// Gates as [batch, seq, gate, hidden].
    pub(super) fn gates_layout(&self) -> HeadsLayout {
        let (gates, hidden, batch) = (self.cell.gates(), self.hidden, self.batch());
        HeadsLayout {
            batch,
            seq: self.seq,
            heads: gates,
            dim: hidden,
            batch_stride: gates * hidden,
            seq_stride: batch * gates * hidden,
            head_stride: hidden,
        }
    }

    /// A state `[batch, hidden]` as [batch, 1, 1, hidden].
    pub(super) fn state_layout(&self) -> HeadsLayout {
        HeadsLayout::seq_batch(1, self.batch(), self.hidden)
    }

    /// How many threads have enough to do, and the channels of a task.
    pub(super) fn deal(&self, ctx: &Context) -> (Context, usize) {
        let work = self.lengths.iter().sum::<usize>() * self.hidden;
        let threads = ctx.thread_count().min(work / PARALLEL).max(1);
        if threads == 1 {
            return (ctx.single_threaded(), CHANNELS);
        }
        let blocks = threads.div_ceil(self.batch());
        (*ctx, self.hidden.div_ceil(blocks).next_multiple_of(NARROW).min(CHANNELS))
    }

    /// For each task of so many channels: its gates, each `[seq, channels]`; its rows of `outputs`, `[seq or 1, channels]`.
    pub(super) fn tasks<'b>(
        &self,
        block: usize,
        gates: &'b mut [f32],
        outputs: Vec<(&'b mut [f32], HeadsLayout)>,
    ) -> Result<Vec<Task<'b>>, ShapeError> {
        let count = self.cell.gates();
        let mut gates = HeadsMut::new(gates, self.gates_layout())?.into_heads().into_iter();
        let outputs = outputs.into_iter().map(|(data, layout)| Ok(HeadsMut::new(data, layout)?.into_heads()));
        let mut outputs: Vec<_> =
            outputs.map(|o| o.map(Vec::into_iter)).collect::<Result<_, ShapeError>>()?;
        let mut tasks = Vec::new();
        for row in 0..self.batch() {
            let mut parts: Vec<MatMut<'b>> = gates.by_ref().take(count).collect();
            parts.extend(outputs.iter_mut().filter_map(Iterator::next));
            for first in (0..self.hidden).step_by(block) {
                let channels = first..(first + block).min(self.hidden);
                let mut mine = Vec::with_capacity(parts.len());
                parts = parts
                    .into_iter()
                    .map(|part| {
                        let (left, right) = part.split_cols(channels.len());
                        mine.push(left);
                        right
                    })
                    .collect();
                tasks.push(Task { row, channels, parts: mine });
            }
        }
        Ok(tasks)
    }
}

/// A block of channels of one row: the gates' parts, then those of the outputs.
pub(super) struct Task<'a> {
    pub(super) row: usize,
    pub(super) channels: Range<usize>,
    parts: Vec<MatMut<'a>>,
}

impl<'a> Task<'a> {
    /// The parts by name.
    pub(super) fn parts<const N: usize>(self) -> [MatMut<'a>; N] {
        self.parts.try_into().unwrap_or_else(|parts: Vec<_>| unreachable!("{} parts, not {N}", parts.len()))
    }
}
