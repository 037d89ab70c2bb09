//! Sums and maxima of slices.
//!
//! A fold spreads the vectors over [`ACCUMULATORS`] registers, vector `i` into register
//! `i % ACCUMULATORS`, lane by lane, and combines them in a fixed order. So appending neutral
//! elements (zeros for a sum) never changes the bits: a padded row gives what the row gives.
//!
//! Sums are never indexed by a variable: they would lie in memory from then on, and a row of four vectors took 100 cycles (AVX-512) where it takes 40.

use pulp::Simd;

use super::{first, load_tail, store_tail};

/// Independent accumulators of a fold: enough to hide the latency of an addition.
pub const ACCUMULATORS: usize = 4;

/// `acc[i] = f(acc[i])`, where `i` is no constant.
#[inline(always)]
fn change<T: Copy>(acc: &mut [T; ACCUMULATORS], i: usize, f: impl Fn(T) -> T) {
    for (j, acc) in acc.iter_mut().enumerate() {
        if j == i {
            *acc = f(*acc);
        }
    }
}

/// `acc[i] += term`, where `i` is no constant.
#[inline(always)]
fn add_at<S: Simd>(simd: S, acc: &mut [S::f32s; ACCUMULATORS], i: usize, term: S::f32s) {
    change(
        acc,
        i,
        #[inline(always)]
        |acc| simd.add_f32s(acc, term),
    );
}

/// `Σ f(x[i])` in a fixed order. `f` must map 0 to 0, because a tail is filled with zeros.
#[inline(always)]
pub fn sum_map<S: Simd>(simd: S, x: &[f32], f: impl Fn(S::f32s) -> S::f32s) -> f32 {
    let mut acc = [simd.splat_f32s(0.0); ACCUMULATORS];
    let (body, tail) = S::as_simd_f32s(x);
    let (groups, rest) = body.as_chunks::<ACCUMULATORS>();
    for group in groups {
        for (acc, x) in acc.iter_mut().zip(group) {
            *acc = simd.add_f32s(*acc, f(*x));
        }
    }
    for (i, x) in rest.iter().enumerate() {
        let term = f(*x);
        add_at(simd, &mut acc, i, term);
    }
    if !tail.is_empty() {
        let term = f(load_tail(simd, tail));
        add_at(simd, &mut acc, rest.len(), term);
    }
    simd.reduce_sum_f32s(combine(
        acc,
        #[inline(always)]
        |a, b| simd.add_f32s(a, b),
    ))
}

/// `Σ x[i]` in a fixed order.
#[inline(always)]
pub fn sum<S: Simd>(simd: S, x: &[f32]) -> f32 {
    sum_map(
        simd,
        x,
        #[inline(always)]
        |x| x,
    )
}

/// `Σ a[i]·b[i]` in a fixed order.
///
/// # Panics
/// When the lengths differ.
#[inline(always)]
pub fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let mut acc = [simd.splat_f32s(0.0); ACCUMULATORS];
    let (a_body, a_tail) = S::as_simd_f32s(a);
    let (b_body, b_tail) = S::as_simd_f32s(b);
    let (a_groups, a_rest) = a_body.as_chunks::<ACCUMULATORS>();
    let (b_groups, b_rest) = b_body.as_chunks::<ACCUMULATORS>();
    for (a, b) in a_groups.iter().zip(b_groups) {
        for i in 0..ACCUMULATORS {
            acc[i] = simd.mul_add_e_f32s(a[i], b[i], acc[i]);
        }
    }
    for (i, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        change(
            &mut acc,
            i,
            #[inline(always)]
            |acc| simd.mul_add_e_f32s(*a, *b, acc),
        );
    }
    if !a_tail.is_empty() {
        let (a, b) = (load_tail(simd, a_tail), load_tail(simd, b_tail));
        change(
            &mut acc,
            a_rest.len(),
            #[inline(always)]
            |acc| simd.mul_add_e_f32s(a, b, acc),
        );
    }
    simd.reduce_sum_f32s(combine(
        acc,
        #[inline(always)]
        |a, b| simd.add_f32s(a, b),
    ))
}

/// `y[i] = f(x[i])`, and `Σ y[i]` in the order of [`sum`].
///
/// # Panics
/// When the lengths differ.
#[inline(always)]
pub fn map_sum<S: Simd>(simd: S, x: &[f32], y: &mut [f32], f: impl Fn(S::f32s) -> S::f32s) -> f32 {
    assert_eq!(x.len(), y.len());
    let mut acc = [simd.splat_f32s(0.0); ACCUMULATORS];
    let (x_body, x_tail) = S::as_simd_f32s(x);
    let (y_body, y_tail) = S::as_mut_simd_f32s(y);
    let (x_groups, x_rest) = x_body.as_chunks::<ACCUMULATORS>();
    let (y_groups, y_rest) = y_body.as_chunks_mut::<ACCUMULATORS>();
    for (x, y) in x_groups.iter().zip(y_groups) {
        for i in 0..ACCUMULATORS {
            y[i] = f(x[i]);
            acc[i] = simd.add_f32s(acc[i], y[i]);
        }
    }
    for (i, (x, y)) in x_rest.iter().zip(y_rest).enumerate() {
        let term = f(*x);
        *y = term;
        add_at(simd, &mut acc, i, term);
    }
    if !x_tail.is_empty() {
        let value = f(load_tail(simd, x_tail));
        store_tail(simd, y_tail, value);
        // Zeros where f made something of the filling.
        let term = simd.select_f32s(first(simd, y_tail.len()).mask(), value, simd.splat_f32s(0.0));
        add_at(simd, &mut acc, x_rest.len(), term);
    }
    simd.reduce_sum_f32s(combine(
        acc,
        #[inline(always)]
        |a, b| simd.add_f32s(a, b),
    ))
}

/// `Σ f(x[i])` for several functions at once, each in the order of [`sum`]. The filling of a tail is
/// masked, so `f` may map 0 to anything.
#[inline(always)]
pub fn sums<S: Simd, const N: usize>(simd: S, x: &[f32], f: impl Fn(S::f32s) -> [S::f32s; N]) -> [f32; N] {
    let zero = simd.splat_f32s(0.0);
    let mut acc = [[zero; ACCUMULATORS]; N];
    let (body, tail) = S::as_simd_f32s(x);
    let (groups, rest) = body.as_chunks::<ACCUMULATORS>();
    for group in groups {
        for i in 0..ACCUMULATORS {
            let terms = f(group[i]);
            for n in 0..N {
                acc[n][i] = simd.add_f32s(acc[n][i], terms[n]);
            }
        }
    }
    for (i, x) in rest.iter().enumerate() {
        let terms = f(*x);
        for n in 0..N {
            add_at(simd, &mut acc[n], i, terms[n]);
        }
    }
    if !tail.is_empty() {
        let filled = first(simd, tail.len()).mask();
        let terms = f(load_tail(simd, tail));
        for n in 0..N {
            let term = simd.select_f32s(filled, terms[n], zero);
            add_at(simd, &mut acc[n], rest.len(), term);
        }
    }
    let mut total = [0.0; N];
    for n in 0..N {
        total[n] = simd.reduce_sum_f32s(combine(
            acc[n],
            #[inline(always)]
            |a, b| simd.add_f32s(a, b),
        ));
    }
    total
}

/// `Σ f(x[0][i], x[1][i], …)` in a fixed order. `f` must map zeros to 0, because tails are filled with zeros.
///
/// # Panics
/// When the lengths differ.
#[inline(always)]
pub fn sum_zip<S: Simd, const I: usize>(simd: S, x: [&[f32]; I], f: impl Fn([S::f32s; I]) -> S::f32s) -> f32 {
    let len = x.first().map_or(0, |x| x.len());
    assert!(x.iter().all(|x| x.len() == len));
    let vectors = len / S::F32_LANES;
    let x = x.map(|x| S::as_simd_f32s(x));
    let zero = simd.splat_f32s(0.0);
    let (mut acc, mut value) = ([zero; ACCUMULATORS], [zero; I]);
    let grouped = vectors - vectors % ACCUMULATORS;
    for first in (0..grouped).step_by(ACCUMULATORS) {
        for (j, acc) in acc.iter_mut().enumerate() {
            for k in 0..I {
                value[k] = x[k].0[first + j];
            }
            *acc = simd.add_f32s(*acc, f(value));
        }
    }
    for i in grouped..vectors {
        for k in 0..I {
            value[k] = x[k].0[i];
        }
        let term = f(value);
        add_at(simd, &mut acc, i - grouped, term);
    }
    if len > vectors * S::F32_LANES {
        for k in 0..I {
            value[k] = load_tail(simd, x[k].1);
        }
        let term = f(value);
        add_at(simd, &mut acc, vectors - grouped, term);
    }
    simd.reduce_sum_f32s(combine(
        acc,
        #[inline(always)]
        |a, b| simd.add_f32s(a, b),
    ))
}

/// `max x[i]`, −∞ for an empty slice. Unspecified when an element is NaN.
#[inline(always)]
pub fn max<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let lowest = simd.splat_f32s(f32::NEG_INFINITY);
    let mut acc = [lowest; ACCUMULATORS];
    let (body, tail) = S::as_simd_f32s(x);
    let (groups, rest) = body.as_chunks::<ACCUMULATORS>();
    for group in groups {
        for (acc, x) in acc.iter_mut().zip(group) {
            *acc = simd.max_f32s(*acc, *x);
        }
    }
    for (i, x) in rest.iter().enumerate() {
        change(
            &mut acc,
            i,
            #[inline(always)]
            |acc| simd.max_f32s(acc, *x),
        );
    }
    let mut best = simd.reduce_max_f32s(combine(
        acc,
        #[inline(always)]
        |a, b| simd.max_f32s(a, b),
    ));
    for &x in tail {
        best = if x > best { x } else { best };
    }
    best
}

#[inline(always)]
fn combine<T: Copy>(acc: [T; ACCUMULATORS], f: impl Fn(T, T) -> T) -> T {
    f(f(acc[0], acc[1]), f(acc[2], acc[3]))
}
