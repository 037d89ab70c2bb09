//! A square of 16 elements, transposed in registers.
//!
//! ```text
//! for i in 0..4 { for j in 0..4 { out[j][i] = rows[i][j] } }
//! ```
//! Written like that it becomes 16 loads and 16 stores of single elements. Vectors of 4 lanes and the instructions that
//! interleave them are part of every x86-64 and every 64-bit Arm CPU, so no instruction set has to be asked for: 8 of them, 4 loads
//! and 4 stores. Packing a transposed B takes less than half of the time (docs/decisions/002-gemm.md).

/// The transpose of four rows of four.
#[inline(always)]
#[cfg(target_arch = "x86_64")]
pub(crate) fn transpose_4x4(rows: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
    use std::arch::x86_64::{__m128, _mm_movehl_ps, _mm_movelh_ps, _mm_unpackhi_ps, _mm_unpacklo_ps};
    use std::mem::transmute;
    // SAFETY: these are instructions of SSE, which is part of x86-64; a vector is its lanes.
    unsafe {
        let [a, b, c, d] = transmute::<[[f32; 4]; 4], [__m128; 4]>(rows);
        let (ab_low, ab_high) = (_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
        let (cd_low, cd_high) = (_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
        let columns = [
            _mm_movelh_ps(ab_low, cd_low),
            _mm_movehl_ps(cd_low, ab_low),
            _mm_movelh_ps(ab_high, cd_high),
            _mm_movehl_ps(cd_high, ab_high),
        ];
        transmute::<[__m128; 4], [[f32; 4]; 4]>(columns)
    }
}

/// The transpose of four rows of four.
#[inline(always)]
#[cfg(target_arch = "aarch64")]
pub(crate) fn transpose_4x4(rows: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
    use std::arch::aarch64::{float32x4_t, float64x2_t, vtrn1q_f32, vtrn1q_f64, vtrn2q_f32, vtrn2q_f64};
    use std::mem::transmute;
    // SAFETY: these are instructions of Advanced SIMD, which is part of 64-bit Arm; a vector is its lanes.
    unsafe {
        let [a, b, c, d] = transmute::<[[f32; 4]; 4], [float32x4_t; 4]>(rows);
        let pairs = [vtrn1q_f32(a, b), vtrn2q_f32(a, b), vtrn1q_f32(c, d), vtrn2q_f32(c, d)];
        let [ab_even, ab_odd, cd_even, cd_odd] = transmute::<[float32x4_t; 4], [float64x2_t; 4]>(pairs);
        let columns = [
            vtrn1q_f64(ab_even, cd_even),
            vtrn1q_f64(ab_odd, cd_odd),
            vtrn2q_f64(ab_even, cd_even),
            vtrn2q_f64(ab_odd, cd_odd),
        ];
        transmute::<[float64x2_t; 4], [[f32; 4]; 4]>(columns)
    }
}

/// The transpose of four rows of four.
#[inline(always)]
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) fn transpose_4x4(rows: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
    std::array::from_fn(|j| rows.map(|row| row[j]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_element_changes_row_and_column() {
        let rows = std::array::from_fn(|i| std::array::from_fn(|j| (4 * i + j) as f32));
        let columns = std::array::from_fn(|j| std::array::from_fn(|i| (4 * i + j) as f32));
        assert_eq!(transpose_4x4(rows), columns);
    }
}
