//! Some rows of one head: what the forward pass keeps of them, whatever means multiply.
//!
//! ```text
//! begin:  m = −∞, l = 0      for each block of keys:  scores become P, and m, l, α are the next ones      finish:  o / l, lse
//! ```

use std::ops::Range;

use pulp::Simd;

use super::dropout::{HeadDropout, SPACE};
use super::flash::Forward;
use super::mask::{Coverage, Mask, Sight};
use super::online::{self, Carried, Row};
use super::problem::Shape;
use super::stage;
use super::tile::GROUP;
use crate::gemm::microkernel::prefetch;
use crate::lanes;
use crate::view::{MatMut, MatRef};

/// The scores of one tile [ROW_TILE, stride] and its rows' α; o, l (one vector each) and m of
/// the chunk's rows.
pub(super) struct Rows<'a> {
    /// The tile's first row.
    pub(super) first: usize,
    pub(super) scores: &'a mut [f32],
    pub(super) alpha: &'a mut [f32],
    pub(super) acc: &'a mut [f32],
    pub(super) l: &'a mut [f32],
    pub(super) m: &'a mut [f32],
}

/// Some rows of one head of one sequence.
pub(super) struct Chunk<'a> {
    pub(super) problem: &'a Forward<'a>,
    head: usize,
    pub(super) rows: Range<usize>,
    pub(super) q: MatRef<'a>,
    pub(super) k: MatRef<'a>,
    pub(super) v: MatRef<'a>,
    out: MatMut<'a>,
    lse: &'a mut [f32],
    pub(super) sight: Sight,
    dropout: Option<HeadDropout>,
}

impl<'a> Chunk<'a> {
    #[inline(always)]
    pub(super) fn new(problem: &'a Forward<'a>, batch: usize, head: usize, rows: Range<usize>) -> Chunk<'a> {
        let Shape { heads, seq_q, seq_k, .. } = problem.shape;
        let kv_head = head / problem.shape.group();
        // SAFETY: each unit is a (batch, head, rows) of its own and runs once, so nobody else has these rows of
        // `out`, of which only they are written, nor these elements of `lse`, which holds [batch, heads, seq_q].
        let (out, lse) = unsafe {
            let first = (batch * heads + head) * seq_q + rows.start;
            (problem.out.rows_unsync(batch, head, rows.clone()), problem.lse.part(first, rows.len()))
        };
        Chunk {
            problem,
            head,
            q: problem.q.head(batch, head),
            k: problem.k.head(batch, kv_head),
            v: problem.v.head(batch, kv_head),
            out,
            lse,
            sight: problem.spec.mask.sight(batch, seq_k),
            dropout: problem.spec.mask.dropout.map(|dropout| dropout.head(batch, head)),
            rows,
        }
    }

    /// Nothing has been seen.
    #[inline(always)]
    pub(super) fn begin<S: Simd>(&self, state: &mut Rows<'_>) {
        state.m[..self.rows.len()].fill(f32::NEG_INFINITY);
        state.l[..self.rows.len() * S::F32_LANES].fill(0.0);
    }

    /// The blocks of keys that the rows go through, up to the last key that one of them sees.
    pub(super) fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<'a> {
        self.problem.blocks(&self.sight, self.head, self.rows.clone())
    }

    /// The rows of the output, which are written in the end.
    pub(super) fn out(&self) -> MatRef<'_> {
        self.out.as_ref()
    }

    /// Whether the rows see all of `columns` of a block of keys and nothing is added to their scores.
    #[inline(always)]
    fn adds_nothing(&self, rows: &Range<usize>, keys: &Range<usize>, columns: &Range<usize>) -> bool {
        let Mask { bias, alibi, .. } = &self.problem.spec.mask;
        let seen = keys.start + columns.start..keys.start + columns.end;
        bias.is_none()
            && alibi.is_none()
            && columns.end <= keys.len()
            && self.sight.classify(rows, &seen) == Coverage::Full
    }

    /// Turns the scores of at most six rows, in `columns` of a block of keys, into `P`; their new m, l and α.
    #[inline(always)]
    pub(super) fn weigh<S: Simd>(
        &self,
        simd: S,
        state: &mut Rows<'_>,
        (keys, stride): (&Range<usize>, usize),
        rows: Range<usize>,
        columns: Range<usize>,
    ) {
        let Shape { seq_q, seq_k, .. } = self.problem.shape;
        let in_tile = rows.start - state.first;
        let scores = &mut state.scores[in_tile * stride..][..rows.len() * stride];
        let vectors = columns.start / S::F32_LANES..columns.end / S::F32_LANES;
        let from = keys.start + columns.start;
        let Mask { bias, alibi, .. } = self.problem.spec.mask;
        let plain = self.adds_nothing(&rows, keys, &columns);
        let n = rows.len();
        let local = rows.start - self.rows.start;
        let carried = Carried {
            m: &mut state.m[local..][..n],
            l: &mut state.l[local * S::F32_LANES..][..n * S::F32_LANES],
            alpha: &mut state.alpha[in_tile..][..n],
        };
        online::absorb(
            simd,
            scores,
            (stride / S::F32_LANES, &vectors),
            #[inline(always)]
            |r| {
                if plain {
                    return None;
                }
                let visible = self.sight.row(rows.start + r, keys);
                let visible = visible.start.max(from) - from..visible.end.max(from) - from;
                let bias =
                    bias.map(|bias| &bias.row(self.head, rows.start + r, seq_q, seq_k)[from..keys.end]);
                let alibi = alibi.map(|alibi| alibi.line(self.head, rows.start + r, from));
                Some(Row { bias, alibi, visible })
            },
            carried,
        );
        if let Some(dropout) = &self.dropout {
            let dropped = from..keys.end.min(keys.start + columns.end);
            let mut space = SPACE;
            for (r, p) in scores.chunks_exact_mut(stride).enumerate() {
                let factors = dropout.factors(simd, rows.start + r, dropped.clone(), &mut space);
                times(simd, factors, &mut p[columns.start..][..dropped.len()]);
            }
        }
    }

    /// Divides by l and writes the output and lse. Adding 0 makes every zero the positive one: on tiles its sign would tell how many
    /// hidden keys a block had.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(&mut self, simd: S, state: &Rows<'_>) {
        let v_dim = self.problem.shape.v_dim;
        for r in 0..self.rows.len() {
            if r + stage::AHEAD < self.rows.len() {
                prefetch::row(self.out.as_ref().row(r + stage::AHEAD));
            }
            let l = S::as_simd_f32s(&state.l[r * S::F32_LANES..][..S::F32_LANES]).0[0];
            let (inverse, lse) = online::finish(simd, state.m[r], l);
            self.lse[r] = lse;
            if lse == f32::NEG_INFINITY {
                self.out.row_mut(r).fill(0.0);
                continue;
            }
            let (inverse, zero) = (simd.splat_f32s(inverse), simd.splat_f32s(0.0));
            let acc = &state.acc[r * v_dim..][..v_dim];
            lanes::map(
                simd,
                acc,
                self.out.row_mut(r),
                #[inline(always)]
                |x| simd.mul_add_e_f32s(x, inverse, zero),
            );
        }
    }
}

/// `x = factors ∘ x`.
#[inline(always)]
pub(super) fn times<S: Simd>(simd: S, factors: &[f32], x: &mut [f32]) {
    lanes::update(
        simd,
        factors,
        x,
        #[inline(always)]
        |factor, x| simd.mul_f32s(factor, x),
    );
}

/// The rows of a tile, six at a time.
#[inline(always)]
pub(super) fn groups(tile: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = tile.end;
    tile.clone().step_by(GROUP).map(move |first| first..(first + GROUP).min(end))
}

/// The vectors of a block that hold the keys `seen`.
#[inline(always)]
pub(super) fn vectors<S: Simd>(seen: &Range<usize>, keys: &Range<usize>) -> Range<usize> {
    (seen.start - keys.start) / S::F32_LANES..(seen.end - keys.start).div_ceil(S::F32_LANES)
}
