//! Sums and products of whole buffers, one pass over memory each.
//!
//! ```text
//! add:         y[i] = a[i] + b[i]          mul:   y[i] = a[i]·b[i]
//! add_assign:  y[i] = y[i] + x[i]          scale: x[i] = alpha·x[i]
//! axpy:        y[i] = y[i] + alpha·x[i]
//! ```
//! Large buffers are bound by memory; small ones by the call, which allocates nothing. NaN and infinities
//! follow IEEE 754.

use pulp::{Simd, WithSimd};

use super::CHUNK;
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::{lanes, view};

/// `y = f(a, b)` as a type, so that one driver serves all.
trait Binary: Copy + Sync {
    fn apply<S: Simd>(self, simd: S, a: S::f32s, b: S::f32s) -> S::f32s;
}

#[derive(Clone, Copy)]
struct Add;

impl Binary for Add {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, a: S::f32s, b: S::f32s) -> S::f32s {
        simd.add_f32s(a, b)
    }
}

#[derive(Clone, Copy)]
struct Mul;

impl Binary for Mul {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, a: S::f32s, b: S::f32s) -> S::f32s {
        simd.mul_f32s(a, b)
    }
}

/// b + alpha·a.
#[derive(Clone, Copy)]
struct Axpy(f32);

impl Binary for Axpy {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, a: S::f32s, b: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(simd.splat_f32s(self.0), a, b)
    }
}

struct Zip<'a, F> {
    f: F,
    a: &'a [f32],
    b: &'a [f32],
    y: &'a mut [f32],
}

impl<F: Binary> WithSimd for Zip<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        lanes::zip(
            simd,
            self.a,
            self.b,
            self.y,
            #[inline(always)]
            |a, b| self.f.apply(simd, a, b),
        );
    }
}

struct Update<'a, F> {
    f: F,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl<F: Binary> WithSimd for Update<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        lanes::update(
            simd,
            self.x,
            self.y,
            #[inline(always)]
            |x, y| self.f.apply(simd, x, y),
        );
    }
}

struct Scale<'a>(f32, &'a mut [f32]);

impl WithSimd for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let alpha = simd.splat_f32s(self.0);
        lanes::map_in_place(
            simd,
            self.1,
            #[inline(always)]
            |x| simd.mul_f32s(alpha, x),
        );
    }
}

fn zip(ctx: &Context, f: impl Binary, a: &[f32], b: &[f32], y: &mut [f32]) -> Result<(), ShapeError> {
    expect_dim("b", "length", a.len(), b.len())?;
    expect_dim("y", "length", a.len(), y.len())?;
    view::for_each_chunk(ctx, y, CHUNK, |index, y| {
        let range = index * CHUNK..index * CHUNK + y.len();
        ctx.isa().dispatch(Zip { f, a: &a[range.clone()], b: &b[range], y });
    });
    Ok(())
}

fn update(ctx: &Context, f: impl Binary, x: &[f32], y: &mut [f32]) -> Result<(), ShapeError> {
    expect_dim("y", "length", x.len(), y.len())?;
    view::for_each_chunk(ctx, y, CHUNK, |index, y| {
        let x = &x[index * CHUNK..][..y.len()];
        ctx.isa().dispatch(Update { f, x, y });
    });
    Ok(())
}

/// `y[i] = a[i] + b[i]`. One rounding.
///
/// # Errors
/// [`ShapeError`] when the lengths differ.
pub fn add(ctx: &Context, a: &[f32], b: &[f32], y: &mut [f32]) -> Result<(), ShapeError> {
    zip(ctx, Add, a, b, y)
}

/// `y[i] = y[i] + x[i]`. One rounding.
///
/// # Errors
/// [`ShapeError`] when the lengths differ.
pub fn add_assign(ctx: &Context, x: &[f32], y: &mut [f32]) -> Result<(), ShapeError> {
    update(ctx, Add, x, y)
}

/// `y[i] = a[i]·b[i]`. One rounding.
///
/// # Errors
/// [`ShapeError`] when the lengths differ.
pub fn mul(ctx: &Context, a: &[f32], b: &[f32], y: &mut [f32]) -> Result<(), ShapeError> {
    zip(ctx, Mul, a, b, y)
}

/// `y[i] = y[i] + alpha·x[i]`. One rounding where the CPU has FMA, else two.
///
/// # Errors
/// [`ShapeError`] when the lengths differ.
pub fn axpy(ctx: &Context, alpha: f32, x: &[f32], y: &mut [f32]) -> Result<(), ShapeError> {
    update(ctx, Axpy(alpha), x, y)
}

/// `x[i] = alpha·x[i]`. One rounding.
///
/// # Errors
/// None today; a `Result` as with its siblings.
pub fn scale(ctx: &Context, alpha: f32, x: &mut [f32]) -> Result<(), ShapeError> {
    view::for_each_chunk(ctx, x, CHUNK, |_, x| ctx.isa().dispatch(Scale(alpha, x)));
    Ok(())
}
