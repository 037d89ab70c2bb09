//! Keys and values copied into the order in which tiles read them.

use crate::view::MatRef;

/// Writes the transpose of `src` [keys, dim] to `dst` [dim, stride]: `dst[d·stride + j] = src[j][d]`.
///
/// Columns from the number of keys on keep what they held.
#[inline(always)]
pub(super) fn transpose(src: MatRef<'_>, dst: &mut [f32], stride: usize) {
    for j in 0..src.rows() {
        for (d, &x) in src.row(j).iter().enumerate() {
            dst[d * stride + j] = x;
        }
    }
}
