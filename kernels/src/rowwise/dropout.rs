//! Dropout from a counter-based generator.
//!
//! ```text
//! forward:   keep[i] = word(seed, stream, i) ≥ p·2³²;  y[i] = keep[i] ? x[i]/(1 − p) : 0
//! backward:  the same on d_y
//! ```
//! The word of element i is a function of (seed, stream, i): nothing is stored, backward makes the same mask
//! again, and neither threads nor vector width change it.
//!
//! - Philox4x32-10 gives four words a counter. Element `64·b + 16·w + l` takes word w of counter `16·b + l`:
//!   vectors of words then lie in memory order for every width up to 16, with no shuffle.
//! - A dropped element is 0 by selection, not by a product: NaN and ∞ are dropped too. A kept one follows IEEE 754.
//!
//! Source: Salmon, Moraes, Dror and Shaw 2011, *Parallel Random Numbers: As Easy as 1, 2, 3*.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::CHUNK;
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::{lanes, view};

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Counters that one block of elements uses.
const COUNTERS: usize = 16;
/// Elements of a block: four words of each counter.
const BLOCK: usize = 4 * COUNTERS;

/// Which elements fall: a probability and the name of a sequence of random words.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// The probability, in 0..1, that an element becomes 0.
    pub p: f32,
    /// The key of the generator: one for a run.
    pub seed: u64,
    /// The upper half of the counter: one for each use (step, layer) of the run.
    pub stream: u64,
}

/// Where the words of some elements come from: element `64·b + 16·w + l` has word w of counter
/// `base + 16·b + l`, whose upper half is `high`, under `key`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source {
    /// Words below this fall.
    pub(crate) threshold: u32,
    /// 1/(1 − p).
    pub(crate) scale: f32,
    pub(crate) key: u64,
    pub(crate) base: u64,
    pub(crate) high: u64,
}

impl Dropout {
    /// The words of a buffer.
    pub(crate) fn source(&self) -> Source {
        // In 0 ..= 2³² − 1 because p < 1.
        let threshold = (f64::from(self.p) * (1u64 << 32) as f64) as u32;
        Source { threshold, scale: 1.0 / (1.0 - self.p), key: self.seed, base: 0, high: self.stream }
    }

    /// `Ok` when p is a probability below 1.
    pub(crate) fn check(&self) -> Result<(), ShapeError> {
        if (0.0..1.0).contains(&self.p) {
            return Ok(());
        }
        let value = self.p.to_string();
        Err(ShapeError::Value { argument: "p", value, expected: "a number in 0..1" })
    }
}

/// The four words of `counter`, a vector of counters.
#[inline(always)]
pub(crate) fn philox<S: Simd>(simd: S, mut counter: [S::u32s; 4], seed: u64) -> [S::u32s; 4] {
    let mut key = [seed as u32, (seed >> 32) as u32];
    let multipliers = [simd.splat_u32s(MULTIPLIERS[0]), simd.splat_u32s(MULTIPLIERS[1])];
    for _ in 0..ROUNDS {
        let (low_0, high_0) = simd.widening_mul_u32s(multipliers[0], counter[0]);
        let (low_1, high_1) = simd.widening_mul_u32s(multipliers[1], counter[2]);
        counter = [
            simd.xor_u32s(simd.xor_u32s(high_1, counter[1]), simd.splat_u32s(key[0])),
            low_1,
            simd.xor_u32s(simd.xor_u32s(high_0, counter[3]), simd.splat_u32s(key[1])),
            low_0,
        ];
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    counter
}

/// 1/(1 − p) where an element stays and 0 where it falls, for the elements `range` of the whole buffer.
///
/// `space` holds [`factors_space`] elements; the part that is returned begins somewhere in its first block.
#[inline(always)]
pub(crate) fn factors<'a, S: Simd>(
    simd: S,
    source: &Source,
    range: Range<u64>,
    space: &'a mut [f32],
) -> &'a [f32] {
    let Source { key, base, high, .. } = *source;
    let zero = simd.splat_f32s(0.0);
    let scale = simd.splat_f32s(source.scale);
    let threshold = simd.splat_u32s(source.threshold);
    let offsets: [u32; COUNTERS] = std::array::from_fn(|l| l as u32);
    let (offsets, _) = S::as_simd_u32s(&offsets);
    let high = [simd.splat_u32s(high as u32), simd.splat_u32s((high >> 32) as u32)];
    let first_block = range.start / BLOCK as u64;
    let blocks = range.end.div_ceil(BLOCK as u64) - first_block;
    let (parts, _) = space[..blocks as usize * BLOCK].as_chunks_mut::<BLOCK>();
    for (block, part) in (first_block..).zip(parts) {
        let counter = base + block * COUNTERS as u64;
        let (low, next) = (simd.splat_u32s(counter as u32), simd.splat_u32s((counter >> 32) as u32));
        let (part, _) = S::as_mut_simd_f32s(part);
        for (l, &offset) in offsets.iter().enumerate() {
            // 16 divides the counter, so this sum carries nothing.
            let words = philox(simd, [simd.add_u32s(low, offset), next, high[0], high[1]], key);
            for (w, word) in words.into_iter().enumerate() {
                let falls = simd.less_than_u32s(word, threshold);
                part[w * offsets.len() + l] = simd.select_f32s(falls, zero, scale);
            }
        }
    }
    let skipped = (range.start - first_block * BLOCK as u64) as usize;
    &space[skipped..skipped + (range.end - range.start) as usize]
}

/// What [`factors`] needs for `len` elements, wherever they begin.
pub(crate) const fn factors_space(len: usize) -> usize {
    len.next_multiple_of(BLOCK) + BLOCK
}

/// `x·factor`, and 0 where the factor is 0, whatever x is.
#[inline(always)]
pub(super) fn keep<S: Simd>(simd: S, x: S::f32s, factor: S::f32s) -> S::f32s {
    let zero = simd.splat_f32s(0.0);
    simd.select_f32s(simd.equal_f32s(factor, zero), zero, simd.mul_f32s(x, factor))
}

struct Apply<'a> {
    source: Source,
    /// The place of `x` in the whole buffer.
    first: u64,
    x: &'a [f32],
    y: &'a mut [f32],
}

/// Elements whose factors are held at a time: they stay in the first-level cache.
const HELD: usize = 1024;

impl WithSimd for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut space = [0.0f32; HELD + BLOCK];
        for (i, (x, y)) in self.x.chunks(HELD).zip(self.y.chunks_mut(HELD)).enumerate() {
            let first = self.first + (i * HELD) as u64;
            let factors = factors(simd, &self.source, first..first + x.len() as u64, &mut space);
            lanes::zip(
                simd,
                x,
                factors,
                y,
                #[inline(always)]
                |x, factor| keep(simd, x, factor),
            );
        }
    }
}

/// `y[i] = x[i]/(1 − p)` with probability 1 − p, else 0; the backward pass is the same on the gradient.
///
/// With p = 0 this is a copy.
///
/// # Errors
/// [`ShapeError`] when the lengths differ or p is not in 0..1.
///
/// Accuracy: two roundings. The mask is the same on every instruction set (`rowwise::tests::dropout`).
pub fn apply(ctx: &Context, spec: &Dropout, x: &[f32], y: &mut [f32]) -> Result<(), ShapeError> {
    expect_dim("y", "length", x.len(), y.len())?;
    spec.check()?;
    if spec.p == 0.0 {
        y.copy_from_slice(x);
        return Ok(());
    }
    view::for_each_chunk(ctx, y, CHUNK, |index, y| {
        let x = &x[index * CHUNK..][..y.len()];
        ctx.isa().dispatch(Apply { source: spec.source(), first: (index * CHUNK) as u64, x, y });
    });
    Ok(())
}
