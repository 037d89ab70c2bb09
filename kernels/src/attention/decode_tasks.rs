//! The tasks of a decoding step: scores, the softmax over them, and columns of the output.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::AttentionSpec;
use super::decode::{Block, Decode, KEYS_PER_TASK, Part, Places};
use super::decode_dots::Dots;
use super::decode_tiles::InParts;
use super::decode_vectors::Vectors;
use super::mask::Line;
use super::on_tiles::OnTiles;
use super::online::{self, Row};
use super::problem::{KEY_BLOCK, Shared, piece};
use crate::isa::may_have_tiles;
use crate::lanes;
use crate::scratch::ScratchBuf;

/// What a task does.
#[derive(Clone, Copy)]
pub(super) enum Step {
    /// The scores of some keys.
    Scores,
    /// m, l and P.
    Weights,
    /// Some columns of the output.
    Output,
    /// All of a unit, one after the other.
    All,
}

/// By what means the two products are made.
enum Means {
    Vectors,
    /// Dot products, and the form of tiles for tasks in which a number is odd.
    Dots(Dots, InParts<1>),
    Medium(InParts<1>),
    High(InParts<2>),
}

impl Means {
    #[inline(always)]
    fn of<S: Simd>(tiles: Option<OnTiles>) -> Means {
        match tiles {
            None => Means::Vectors,
            Some(_) if const { !may_have_tiles::<S>() } => {
                unreachable!("no tile unit stands beside these vectors")
            }
            Some(on @ OnTiles { parts: 1, .. }) => match on.dots() {
                Some(proof) => Means::Dots(Dots(proof), InParts(on.unit())),
                None => Means::Medium(InParts(on.unit())),
            },
            Some(on) => Means::High(InParts(on.unit())),
        }
    }
}

pub(super) struct Tasks<'a> {
    pub(super) problem: Decode<'a>,
    pub(super) places: Places,
    pub(super) memory: Shared,
    pub(super) tiles: Option<OnTiles>,
    pub(super) step: Step,
    /// Tasks of one unit.
    pub(super) pieces: usize,
    pub(super) tasks: Range<usize>,
}

impl WithSimd for Tasks<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let means = Means::of::<S>(self.tiles);
        let (columns, v_dim) = (self.places.stride, self.problem.v_dim);
        let (columns_per_task, cols_per_task) = match self.step {
            Step::All => (columns, v_dim),
            _ => (KEYS_PER_TASK, self.problem.cols_per_task()),
        };
        // Each step stands here once: all of it is compiled into this function.
        for task in self.tasks.clone() {
            let (unit, index) = (task / self.pieces, task % self.pieces);
            if matches!(self.step, Step::Scores | Step::All) {
                self.scores(simd, &means, unit, &piece(index, columns_per_task, columns));
            }
            if matches!(self.step, Step::Weights | Step::All) {
                self.weights(simd, unit);
            }
            if matches!(self.step, Step::Output | Step::All) {
                self.output(simd, &means, unit, piece(index, cols_per_task, v_dim));
            }
        }
    }
}

impl Tasks<'_> {
    /// `scale·q·k_j` of all rows of a unit, for the blocks of keys whose scores stand in `columns`.
    #[inline(always)]
    fn scores<S: Simd>(&self, simd: S, means: &Means, unit: usize, columns: &Range<usize>) {
        let tiles = match means {
            Means::Vectors => return Vectors.scores(simd, self, unit, columns),
            Means::High(tiles) => return tiles.scores(simd, self, unit, columns),
            Means::Dots(dots, _) if dots.scores(simd, self, unit, columns) => return,
            Means::Dots(_, tiles) | Means::Medium(tiles) => tiles,
        };
        tiles.scores(simd, self, unit, columns);
    }

    /// Columns `cols` of the output of a unit, whose weights are complete.
    #[inline(always)]
    fn output<S: Simd>(&self, simd: S, means: &Means, unit: usize, cols: Range<usize>) {
        let tiles = match means {
            Means::Vectors => return Vectors.output(simd, self, unit, cols),
            Means::High(tiles) => return tiles.output(simd, self, unit, cols),
            Means::Dots(dots, _) if dots.output(simd, self, unit, cols.clone()) => return,
            Means::Dots(_, tiles) | Means::Medium(tiles) => tiles,
        };
        tiles.output(simd, self, unit, cols);
    }

    /// The blocks of a unit whose scores stand in `columns`, those that follow one another as one: their scores do too.
    #[inline(always)]
    pub(super) fn runs_in(&self, unit: usize, columns: &Range<usize>) -> impl Iterator<Item = Block> {
        let columns = columns.clone();
        let mut blocks =
            self.problem.blocks(unit).filter(move |block| columns.contains(&block.place())).peekable();
        std::iter::from_fn(move || {
            let mut run = blocks.next()?;
            let follows = |run: &Block, next: &Block| {
                next.keys.start == run.keys.end && run.keys.len().is_multiple_of(KEY_BLOCK)
            };
            while let Some(next) = blocks.next_if(|next| follows(&run, next)) {
                run.keys.end = next.keys.end;
            }
            Some(run)
        })
    }

    /// What each part holds of some keys of sequence `b`: the part, its first position among them, and the keys.
    #[inline(always)]
    pub(super) fn held(
        &self,
        b: usize,
        keys: &Range<usize>,
    ) -> impl Iterator<Item = (&Part<'_>, usize, Range<usize>)> {
        let keys = keys.clone();
        let mut start = 0;
        self.problem.parts.iter().filter_map(move |part| {
            let all = start..start + part.lengths[b];
            start = all.end;
            let mine = keys.start.max(all.start)..keys.end.min(all.end);
            (mine.start < mine.end).then(|| (part, mine.start - all.start, mine))
        })
    }

    /// scale·q of all rows of a unit, [rows, dim].
    #[inline(always)]
    pub(super) fn scaled_queries<S: Simd>(&self, simd: S, unit: usize) -> ScratchBuf {
        let Decode { q, spec, dim, .. } = self.problem;
        let (b, _) = self.problem.place(unit);
        let mut scaled = ScratchBuf::take(self.problem.rows() * dim);
        for (r, to) in scaled.chunks_exact_mut(dim.max(1)).enumerate() {
            let (head, i) = self.problem.row(unit, r);
            let scale = simd.splat_f32s(spec.scale);
            lanes::map(
                simd,
                q.head(b, head).row(i),
                to,
                #[inline(always)]
                |x| simd.mul_f32s(x, scale),
            );
        }
        scaled
    }

    /// P of a unit, each row's α for each block, 1/l, and lse: what `online::absorb` does block by block, one part of it after the other for all
    /// blocks. A single row's exponentials would wait, at every block, for its maximum and for α.
    #[inline(always)]
    fn weights<S: Simd>(&self, simd: S, unit: usize) {
        let Decode { q, lse, .. } = self.problem;
        let Places { stride, alpha, shift, l, m, inverse, len } = self.places;
        let (b, _) = self.problem.place(unit);
        let rows = self.problem.rows();
        // SAFETY: a unit's weights are one task, and its scores are complete, so nobody else uses its scratch.
        let memory = unsafe { self.memory.part(unit * len, len) };
        let (scores, rest) = memory.split_at_mut(alpha);
        let (alphas, rest) = rest.split_at_mut(shift - alpha);
        let (shifts, rest) = rest.split_at_mut(l - shift);
        let (ls, rest) = rest.split_at_mut(m - l);
        let (ms, inverses) = rest.split_at_mut(inverse - m);
        let blocks = self.problem.blocks(unit).count();
        let vectors = |block: &Block| {
            let place = block.place() / S::F32_LANES;
            place..place + block.keys.len().div_ceil(S::F32_LANES)
        };
        for block in self.problem.blocks(unit) {
            let vectors = vectors(&block);
            let width = vectors.len() * S::F32_LANES;
            online::maxima(
                simd,
                scores,
                (stride / S::F32_LANES, &vectors),
                #[inline(always)]
                |r| self.masked(unit, r, &block.keys, width),
                &mut alphas[block.index * rows..][..rows],
            );
        }
        for first in (0..rows).step_by(S::F32_LANES) {
            let some = S::F32_LANES.min(rows - first);
            let mut before = simd.splat_f32s(f32::NEG_INFINITY);
            for block in 0..blocks {
                let at = block * rows + first..block * rows + first + some;
                let top = lanes::load_tail(simd, &alphas[at.clone()]);
                let [now, alpha, shift] = online::raise(simd, top, before);
                lanes::store_tail(simd, &mut alphas[at.clone()], alpha);
                lanes::store_tail(simd, &mut shifts[at], shift);
                before = now;
            }
            lanes::store_tail(simd, &mut ms[first..first + some], before);
        }
        ls.fill(0.0);
        for block in self.problem.blocks(unit) {
            let at = block.index * rows..(block.index + 1) * rows;
            let (stride, due) = (stride / S::F32_LANES, [&shifts[at.clone()], &alphas[at]]);
            online::exponentials(simd, scores, (stride, &vectors(&block)), due, ls);
        }
        for r in 0..rows {
            let l = S::as_simd_f32s(&ls[r * S::F32_LANES..][..S::F32_LANES]).0[0];
            let (head, i) = self.problem.row(unit, r);
            let (inverse, sum) = online::finish(simd, ms[r], l);
            inverses[r] = inverse;
            // SAFETY: (b, head, i) is an element of lse [batch, heads, seq_q], which this unit alone writes.
            unsafe { lse.part((b * q.layout().heads + head) * q.layout().seq + i, 1)[0] = sum };
        }
    }

    /// What is added to the scores of row `r` and a block of keys, and hidden; `None` when all of `width` columns stay as they are.
    #[inline(always)]
    fn masked(&self, unit: usize, r: usize, keys: &Range<usize>, width: usize) -> Option<Row<'_>> {
        let Decode { spec: AttentionSpec { mask, .. }, keys: longest, q, .. } = &self.problem;
        let (head, i) = self.problem.row(unit, r);
        let (b, _) = self.problem.place(unit);
        let visible = self.problem.visible(unit, r);
        let alibi = mask.alibi.map(|alibi| Line {
            slope: alibi.slopes[head],
            ahead: visible.end as f32 - 1.0 - keys.start as f32,
        });
        let bias = mask.bias.as_ref().map(|bias| {
            let before = longest - self.problem.total(b);
            &bias.row(head, i, q.layout().seq, *longest)[before + keys.start..before + keys.end]
        });
        let start = visible.start.clamp(keys.start, keys.end) - keys.start;
        let end = visible.end.clamp(keys.start, keys.end) - keys.start;
        let plain = (start, end) == (0, width) && alibi.is_none() && bias.is_none();
        (!plain).then_some(Row { bias, alibi, visible: start..end.max(start) })
    }

    /// Divides the sums of a unit's rows, `width` apart, by l, and writes columns `cols` of the output.
    #[inline(always)]
    pub(super) fn store<S: Simd>(
        &self,
        simd: S,
        unit: usize,
        (acc, width): (&[f32], usize),
        cols: Range<usize>,
    ) {
        let Decode { out, .. } = self.problem;
        let Places { inverse, len, .. } = self.places;
        let (b, _) = self.problem.place(unit);
        for (r, acc) in acc.chunks_exact(width.max(1)).enumerate() {
            let (head, i) = self.problem.row(unit, r);
            // SAFETY: this task alone writes these columns of this row; 1/l is complete and only read.
            let (out, inverse) =
                unsafe { (out.rows_unsync(b, head, i..i + 1), *self.memory.at(unit * len + inverse + r)) };
            let (inverse, zero) = (simd.splat_f32s(inverse), simd.splat_f32s(0.0));
            lanes::map(
                simd,
                &acc[..cols.len()],
                out.sub(0..1, cols.clone()).row_mut(0),
                #[inline(always)]
                |x| simd.mul_add_e_f32s(x, inverse, zero),
            );
        }
    }
}
