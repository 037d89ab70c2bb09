//! Loops over vectors: map, zip, fold. The only place that handles a slice's tail.
//!
//! Every function is `#[inline(always)]` so that it is compiled inside the `#[target_feature]`
//! shell of its caller. **The closure must be too**: write `#[inline(always)] |x| …` at every call. Each function
//! calls its closure in two places, so the compiler leaves a long one (an exponential is enough) outside of the
//! shell, where every vector instruction becomes a function call: a gate pass ran 30 times slower so.
//!
//! A tail runs the same instructions on a partly filled register, so an
//! element's result does not depend on where in the slice it stands.
//!
//! Sums and maxima are in `folds`.

use pulp::{MemMask, Simd};

mod folds;

pub use folds::{ACCUMULATORS, dot, map_sum, max, sum, sum_map, sum_zip, sums};

/// A tail, at most a vector long, with zeros behind it.
///
/// Where masks have registers of their own this is one instruction. Elsewhere it is pulp's way, which enters a routine for each length through a table: a store under a mask
/// takes some twenty instructions of the CPU on AVX2.
#[inline(always)]
pub(crate) fn load_tail<S: Simd>(simd: S, tail: &[f32]) -> S::f32s {
    if const { S::F32_LANES == 16 } {
        // SAFETY: what the mask names are elements of the slice.
        unsafe { simd.mask_load_ptr_f32s(first(simd, tail.len()), tail.as_ptr()) }
    } else {
        simd.partial_load_f32s(tail)
    }
}

/// The first elements of a vector to a tail, which is at most a vector long.
#[inline(always)]
pub(crate) fn store_tail<S: Simd>(simd: S, tail: &mut [f32], vector: S::f32s) {
    if const { S::F32_LANES == 16 } {
        // SAFETY: what the mask names are elements of the slice.
        unsafe { simd.mask_store_ptr_f32s(first(simd, tail.len()), tail.as_mut_ptr(), vector) };
    } else {
        simd.partial_store_f32s(tail, vector);
    }
}

/// The first `len` lanes.
#[inline(always)]
fn first<S: Simd>(simd: S, len: usize) -> MemMask<S::m32s> {
    MemMask::new(simd.mask_between_m32s(0, len as u32).mask())
}

/// `y[i] = f(x[i])`.
///
/// # Panics
/// When the lengths differ.
#[inline(always)]
pub fn map<S: Simd>(simd: S, x: &[f32], y: &mut [f32], f: impl Fn(S::f32s) -> S::f32s) {
    assert_eq!(x.len(), y.len());
    let (x_body, x_tail) = S::as_simd_f32s(x);
    let (y_body, y_tail) = S::as_mut_simd_f32s(y);
    for (x, y) in x_body.iter().zip(y_body) {
        *y = f(*x);
    }
    if !x_tail.is_empty() {
        store_tail(simd, y_tail, f(load_tail(simd, x_tail)));
    }
}

/// `x[i] = f(x[i])`.
#[inline(always)]
pub fn map_in_place<S: Simd>(simd: S, x: &mut [f32], f: impl Fn(S::f32s) -> S::f32s) {
    let (body, tail) = S::as_mut_simd_f32s(x);
    for x in body {
        *x = f(*x);
    }
    if !tail.is_empty() {
        let value = f(load_tail(simd, tail));
        store_tail(simd, tail, value);
    }
}

/// `y[i] = f(a[i], b[i])`.
///
/// # Panics
/// When the lengths differ.
#[inline(always)]
pub fn zip<S: Simd>(simd: S, a: &[f32], b: &[f32], y: &mut [f32], f: impl Fn(S::f32s, S::f32s) -> S::f32s) {
    assert!(a.len() == y.len() && b.len() == y.len());
    let (a_body, a_tail) = S::as_simd_f32s(a);
    let (b_body, b_tail) = S::as_simd_f32s(b);
    let (y_body, y_tail) = S::as_mut_simd_f32s(y);
    for ((a, b), y) in a_body.iter().zip(b_body).zip(y_body) {
        *y = f(*a, *b);
    }
    if !y_tail.is_empty() {
        let value = f(load_tail(simd, a_tail), load_tail(simd, b_tail));
        store_tail(simd, y_tail, value);
    }
}

/// `y[i] = f(x[i], y[i])`.
///
/// # Panics
/// When the lengths differ.
#[inline(always)]
pub fn update<S: Simd>(simd: S, x: &[f32], y: &mut [f32], f: impl Fn(S::f32s, S::f32s) -> S::f32s) {
    assert_eq!(x.len(), y.len());
    let (x_body, x_tail) = S::as_simd_f32s(x);
    let (y_body, y_tail) = S::as_mut_simd_f32s(y);
    for (x, y) in x_body.iter().zip(y_body) {
        *y = f(*x, *y);
    }
    if !x_tail.is_empty() {
        let value = f(load_tail(simd, x_tail), load_tail(simd, y_tail));
        store_tail(simd, y_tail, value);
    }
}

/// Goes over several slices at once: `f` gets the vectors at one place of all of them, those to read
/// and those to update, and returns the new values of the latter. A tail is filled with zeros.
///
/// # Panics
/// When the lengths differ.
#[inline(always)]
pub fn visit<S: Simd, const R: usize, const W: usize>(
    simd: S,
    read: [&[f32]; R],
    write: [&mut [f32]; W],
    mut f: impl FnMut([S::f32s; R], [S::f32s; W]) -> [S::f32s; W],
) {
    visit_by(simd, read, write, &mut f);
}

/// [`visit`] by a closure that stays with the caller. It is called by `(*f)(…)`: as `&mut F` it would be a function of the standard library that
/// is no part of the shell.
#[inline(always)]
fn visit_by<S: Simd, const R: usize, const W: usize, F>(
    simd: S,
    read: [&[f32]; R],
    write: [&mut [f32]; W],
    f: &mut F,
) where
    F: FnMut([S::f32s; R], [S::f32s; W]) -> [S::f32s; W],
{
    let len = write[0].len();
    let bodies = len / S::F32_LANES;
    let zero = simd.splat_f32s(0.0);
    let mut read_parts: [(&[S::f32s], &[f32]); R] = [(&[], &[]); R];
    for (part, slice) in read_parts.iter_mut().zip(read) {
        assert_eq!(slice.len(), len);
        let (body, tail) = S::as_simd_f32s(slice);
        *part = (&body[..bodies], tail);
    }
    let write_parts = write.map(|slice| {
        assert_eq!(slice.len(), len);
        let (body, tail) = S::as_mut_simd_f32s(slice);
        (&mut body[..bodies], tail)
    });
    let mut reads = [zero; R];
    let mut writes = [zero; W];
    for i in 0..bodies {
        for k in 0..R {
            reads[k] = read_parts[k].0[i];
        }
        for k in 0..W {
            writes[k] = write_parts[k].0[i];
        }
        writes = (*f)(reads, writes);
        for k in 0..W {
            write_parts[k].0[i] = writes[k];
        }
    }
    if !len.is_multiple_of(S::F32_LANES) {
        for k in 0..R {
            reads[k] = load_tail(simd, read_parts[k].1);
        }
        for k in 0..W {
            writes[k] = load_tail(simd, write_parts[k].1);
        }
        writes = (*f)(reads, writes);
        for k in 0..W {
            store_tail(simd, write_parts[k].1, writes[k]);
        }
    }
}

/// [`visit`] in two parts, of which the second begins where a vector of `write[0]` lies within a line of the cache. A slice of a
/// `Vec` begins anywhere, and every second or each store of a loop over it would touch two lines. For loops that memory bounds.
///
/// # Panics
/// When the lengths differ.
#[inline(always)]
pub fn visit_aligned<S: Simd, const R: usize, const W: usize>(
    simd: S,
    read: [&[f32]; R],
    mut write: [&mut [f32]; W],
    mut f: impl FnMut([S::f32s; R], [S::f32s; W]) -> [S::f32s; W],
) {
    let len = write[0].len();
    let first = write[0].as_ptr().align_offset(size_of::<S::f32s>()).min(len);
    // One loop over two parts: each call would be a copy of the closure.
    for part in [0..first, first..len] {
        let read = read.map(|slice| &slice[part.clone()]);
        let write = write.each_mut().map(|slice| &mut slice[part.clone()]);
        visit_by(simd, read, write, &mut f);
    }
}

#[cfg(test)]
mod tests {
    use pulp::WithSimd;

    use super::*;
    use crate::isa::Isa;

    struct All<'a>(&'a [f32]);

    impl WithSimd for All<'_> {
        type Output = (Vec<f32>, Vec<f32>, f32, f32, f32);

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
            let x = self.0;
            let mut doubled = vec![f32::NAN; x.len()];
            map(simd, x, &mut doubled, |x| simd.add_f32s(x, x));
            let mut difference = vec![f32::NAN; x.len()];
            zip(simd, &doubled, x, &mut difference, |a, b| simd.sub_f32s(a, b));
            update(simd, x, &mut doubled, |x, y| simd.add_f32s(x, y));
            map_in_place(simd, &mut doubled, |y| simd.mul_f32s(y, simd.splat_f32s(2.0)));
            (doubled, difference, sum(simd, x), dot(simd, x, x), max(simd, x))
        }
    }

    #[test]
    fn every_length_on_every_isa() {
        for isa in Isa::available() {
            for len in (0..=70).chain([127, 128, 129]) {
                let x: Vec<f32> = (0..len).map(|i| ((i * 7) % 23) as f32 - 11.0).collect();
                let (six_times, same, sum, dot, max) = isa.dispatch(All(&x));
                assert!(x.iter().zip(&six_times).all(|(x, y)| *y == 6.0 * x), "{isa} {len}");
                assert_eq!(same, x);
                assert_eq!(sum, x.iter().sum::<f32>());
                assert_eq!(dot, x.iter().map(|x| x * x).sum::<f32>());
                assert_eq!(max, x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            }
        }
    }

    struct Visits<'a> {
        aligned: bool,
        x: &'a [f32],
        y: [&'a mut [f32]; 2],
    }

    impl WithSimd for Visits<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let f =
                |[x]: [S::f32s; 1], [a, b]: [S::f32s; 2]| [simd.mul_add_f32s(x, a, b), simd.add_f32s(x, b)];
            if self.aligned {
                visit_aligned(simd, [self.x], self.y, f);
            } else {
                visit(simd, [self.x], self.y, f);
            }
        }
    }

    #[test]
    fn where_a_slice_begins_changes_no_bits() {
        let x: Vec<f32> = (0..200).map(|i| (i as f32 * 0.37).sin()).collect();
        for isa in Isa::available() {
            for (first, len) in (0..17).flat_map(|first| [0, 1, 7, 16, 33, 100].map(|len| (first, len))) {
                let part = first..first + len;
                let results = [false, true].map(|aligned| {
                    let (mut a, mut b) = (x.clone(), x.clone());
                    let y = [&mut a[part.clone()], &mut b[part.clone()]];
                    isa.dispatch(Visits { aligned, x: &x[50..][..len], y });
                    [a, b].concat().into_iter().map(f32::to_bits).collect::<Vec<_>>()
                });
                assert_eq!(results[0], results[1], "{isa} {first} {len}");
            }
        }
    }

    #[test]
    fn appended_zeros_change_no_bits() {
        for isa in Isa::available() {
            let mut x: Vec<f32> = (0..37).map(|i| (i as f32 * 0.37).sin()).collect();
            let before = isa.dispatch(All(&x));
            x.resize(101, 0.0);
            let after = isa.dispatch(All(&x));
            assert_eq!(before.2.to_bits(), after.2.to_bits(), "{isa} sum");
            assert_eq!(before.3.to_bits(), after.3.to_bits(), "{isa} dot");
        }
    }
}
