//! Packing: a block of an operand in the order in which the microkernel reads it.
//!
//! ```text
//! for p in 0..depth { for j in 0..width { packed[p][j] = source[p][j], or 0 where there is none } }
//! ```
//! Any strides are absorbed here, transposes included; zeros fill a panel up to its width.

use pulp::Simd;

/// Where a panel comes from: element (p, j) lies at `p · depth_stride + j · lane_stride`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source {
    pub(super) ptr: *const f32,
    pub(super) depth_stride: usize,
    pub(super) lane_stride: usize,
}

/// Packs `count` lanes, `depth` deep, into panel rows of `width ≥ count`.
///
/// # Safety
/// All `depth × count` elements of `source` are readable.
///
/// # Panics
/// When `packed` does not hold `depth · width` elements.
#[inline(always)]
pub(super) unsafe fn pack_panel<S: Simd>(
    simd: S,
    source: Source,
    depth: usize,
    count: usize,
    packed: &mut [f32],
    width: usize,
) {
    assert!(packed.len() == depth * width && count <= width);
    let Source { ptr, depth_stride, lane_stride } = source;
    if lane_stride == 1 {
        for (p, row) in packed.chunks_exact_mut(width).enumerate() {
            // SAFETY: row `p` of the source.
            let from = unsafe { std::slice::from_raw_parts(ptr.add(p * depth_stride), count) };
            copy(simd, from, &mut row[..count]);
            row[count..].fill(0.0);
        }
        return;
    }
    for (p, row) in packed.chunks_exact_mut(width).enumerate() {
        for (j, x) in row[..count].iter_mut().enumerate() {
            // SAFETY: element (p, j) of the source.
            *x = unsafe { *ptr.add(p * depth_stride + j * lane_stride) };
        }
        row[count..].fill(0.0);
    }
}

/// A short copy by whole vectors (a call to `memcpy` costs more than the copy).
#[inline(always)]
fn copy<S: Simd>(simd: S, from: &[f32], to: &mut [f32]) {
    let (from_body, from_tail) = S::as_simd_f32s(from);
    let (to_body, to_tail) = S::as_mut_simd_f32s(to);
    for (to, from) in to_body.iter_mut().zip(from_body) {
        *to = *from;
    }
    if !to_tail.is_empty() {
        simd.partial_store_f32s(to_tail, simd.partial_load_f32s(from_tail));
    }
}
