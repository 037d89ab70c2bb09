//! The matrix product as three loops.

use crate::view::MatRef;

/// `C = A·B` in f64, row-major: `C[i][j] = Σ_p A[i][p]·B[p][j]`, `p` ascending.
///
/// # Shapes
/// A `[m, k]`, B `[k, n]` → `[m, n]`; elements f32 or f64.
///
/// # Panics
/// When the inner dimensions differ.
pub fn gemm<T: Copy + Into<f64>, U: Copy + Into<f64>>(a: MatRef<'_, T>, b: MatRef<'_, U>) -> Vec<f64> {
    product(a, b, |x, y| x * y)
}

/// `|A|·|B|` in f64: what the error bound `|ĉ − c| ≤ γ_k·(|A|·|B|)` of a matrix product is stated in.
///
/// # Panics
/// When the inner dimensions differ.
pub fn gemm_abs<T: Copy + Into<f64>, U: Copy + Into<f64>>(a: MatRef<'_, T>, b: MatRef<'_, U>) -> Vec<f64> {
    product(a, b, |x, y| (x * y).abs())
}

fn product<T: Copy + Into<f64>, U: Copy + Into<f64>>(
    a: MatRef<'_, T>,
    b: MatRef<'_, U>,
    term: impl Fn(f64, f64) -> f64,
) -> Vec<f64> {
    assert_eq!(a.cols(), b.rows(), "inner dimensions");
    let mut c = vec![0.0; a.rows() * b.cols()];
    for i in 0..a.rows() {
        for p in 0..a.cols() {
            let x = a.at(i, p).into();
            for j in 0..b.cols() {
                c[i * b.cols() + j] += term(x, b.at(p, j).into());
            }
        }
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_by_two() {
        let a = [1.0f32, 2.0, -3.0, 4.0];
        let a = MatRef::new(&a, 2, 2).unwrap();
        assert_eq!(gemm(a, a), [-5.0, 10.0, -15.0, 10.0]);
        assert_eq!(gemm_abs(a, a), [7.0, 10.0, 15.0, 22.0]);
    }
}
