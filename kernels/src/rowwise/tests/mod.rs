//! The row-wise kernels against their oracles, with bounds derived from the kernels' roundings, on every
//! instruction set; same bits for any number of threads and any batch.

mod elements;
mod gated;
mod masked_softmax;
mod norms;
mod projected;
mod residual_norm;
mod softmax;

use std::num::NonZeroUsize;

use crate::context::Context;
use crate::testing::{self, assert_same_bits};
use crate::view::{MatMut, MatRef};

/// Row lengths on both sides of every vector length, group of accumulators, and a few cache lines.
const COLS: [usize; 17] = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 513];
const ROWS: usize = 3;
const U: f64 = testing::UNIT_ROUNDOFF;
/// What underflow may add: a few of the smallest denormals.
const TINY: f64 = 8.0 / (1u128 << 100) as f64 / (1u64 << 49) as f64;

fn mat(x: &[f32], cols: usize) -> MatRef<'_> {
    MatRef::new(x, x.len() / cols.max(1), cols).unwrap()
}

fn mat_mut(x: &mut [f32], cols: usize) -> MatMut<'_> {
    let rows = x.len() / cols.max(1);
    MatMut::new(x, rows, cols).unwrap()
}

fn threads(ctx: &Context, n: usize) -> Context {
    ctx.threads(NonZeroUsize::new(n).unwrap())
}

/// Logits of several magnitudes: a row's spread is up to ±40.
fn logits(rows: usize, cols: usize, seed: u64) -> Vec<f32> {
    let x = testing::uniform(rows * cols, seed);
    x.iter().enumerate().map(|(i, x)| x * [0.01, 3.0, 40.0][i / cols % 3]).collect()
}

/// Calls `check` with every row length of [`COLS`] on every instruction set.
fn for_each_width(check: impl Fn(&Context, usize)) {
    testing::for_each_isa(|ctx| COLS.iter().for_each(|&cols| check(ctx, cols)));
}

/// `run(ctx, rows)` gives the results of those rows, equally long. Asserts that they depend neither on the
/// threads nor on which rows are computed together.
fn assert_rows_independent(rows: usize, run: impl Fn(&Context, &[usize]) -> Vec<f32>) {
    testing::for_each_isa(|ctx| {
        let all: Vec<usize> = (0..rows).collect();
        let expected = run(ctx, &all);
        for n in [2, 3, 7] {
            assert_same_bits(&run(&threads(ctx, n), &all), &expected);
        }
        let len = expected.len() / rows;
        for row in [0, 1, rows / 2, rows - 1] {
            assert_same_bits(&run(ctx, &[row]), &expected[row * len..(row + 1) * len]);
        }
        let backwards: Vec<usize> = all.into_iter().rev().collect();
        let mixed = run(ctx, &backwards);
        for row in [0, rows / 3, rows - 1] {
            let place = (rows - 1 - row) * len;
            assert_same_bits(&mixed[place..place + len], &expected[row * len..(row + 1) * len]);
        }
    });
}

/// The given rows of a matrix, one after the other.
fn pick(x: &[f32], cols: usize, rows: &[usize]) -> Vec<f32> {
    rows.iter().flat_map(|&row| &x[row * cols..(row + 1) * cols]).copied().collect()
}
