//! Error bounds against f64 and the comparators that apply them.

/// Half the distance from 1 to the next f32: the largest relative error of one rounding.
pub const UNIT_ROUNDOFF: f64 = 1.0 / (1u64 << 24) as f64;

/// `γ_k = k·u / (1 − k·u)`: the relative error of `k` roundings in a row, each at most `u`.
///
/// # Source
/// Higham, *Accuracy and Stability of Numerical Algorithms*, lemma 3.1.
///
/// # Panics
/// When `k·u` reaches 1 and the bound means nothing.
pub fn gamma(k: usize) -> f64 {
    let ku = k as f64 * UNIT_ROUNDOFF;
    assert!(ku < 1.0, "γ_{k} is undefined in f32");
    ku / (1.0 - ku)
}

/// The distance between `x` and the next f32 away from zero (for zero and denormals, the smallest denormal).
pub fn ulp_size(x: f64) -> f64 {
    let smallest = f64::powi(2.0, -149);
    if !x.is_finite() || x.abs() < f64::from(f32::MIN_POSITIVE) {
        return smallest;
    }
    let exponent = ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023;
    f64::powi(2.0, (exponent - 23).min(104))
}

/// How many units in the last place `actual` is away from the exact `expected`.
///
/// Two NaN, or two equal infinities, are 0 apart; a value beyond f32's range counts as its infinity.
pub fn ulp_error(actual: f32, expected: f64) -> f64 {
    if actual.is_nan() || expected.is_nan() {
        return if actual.is_nan() && expected.is_nan() { 0.0 } else { f64::INFINITY };
    }
    if actual.is_infinite() || (expected as f32).is_infinite() {
        return if actual == expected as f32 { 0.0 } else { f64::INFINITY };
    }
    (f64::from(actual) - expected).abs() / ulp_size(expected)
}

/// Asserts `|actual[i] − expected[i]| ≤ bound(i)` for every `i`, and names the worst offender otherwise.
///
/// NaN meets NaN only, and an infinity the same infinity only.
///
/// # Panics
/// When an element is outside its bound or the lengths differ.
#[track_caller]
pub fn assert_within(actual: &[f32], expected: &[f64], bound: impl Fn(usize) -> f64) {
    assert_eq!(actual.len(), expected.len(), "lengths differ");
    let mut worst: Option<(f64, usize)> = None;
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let same = f64::from(a) == e || (a.is_nan() && e.is_nan());
        let error = (f64::from(a) - e).abs();
        if same || error <= bound(i) {
            continue;
        }
        let excess = if error.is_nan() { f64::INFINITY } else { error / bound(i).max(f64::MIN_POSITIVE) };
        if worst.is_none_or(|(w, _)| excess > w) {
            worst = Some((excess, i));
        }
    }
    if let Some((excess, i)) = worst {
        panic!(
            "element {i} of {}: {:e}, expected {:e} ± {:e} ({excess:.3} times the bound)",
            actual.len(),
            actual[i],
            expected[i],
            bound(i)
        );
    }
}

/// Asserts that two results have the same bits (two NaN count as the same).
///
/// # Panics
/// When a bit differs or the lengths differ.
#[track_caller]
pub fn assert_same_bits(left: &[f32], right: &[f32]) {
    assert_eq!(left.len(), right.len(), "lengths differ");
    for (i, (l, r)) in left.iter().zip(right).enumerate() {
        assert!(
            l.to_bits() == r.to_bits() || (l.is_nan() && r.is_nan()),
            "element {i} of {}: {l:e} ({:08x}) and {r:e} ({:08x})",
            left.len(),
            l.to_bits(),
            r.to_bits()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ulps_are_counted_in_the_binade_of_the_expected_value() {
        assert_eq!(ulp_size(1.0), f64::from(f32::EPSILON));
        assert_eq!(ulp_size(0.0), f64::from(f32::from_bits(1)));
        assert_eq!(ulp_error(1.0 + f32::EPSILON, 1.0), 1.0);
        assert_eq!(ulp_error(f32::INFINITY, 1e300), 0.0);
        assert_eq!(ulp_error(f32::MAX, 1e300), f64::INFINITY);
        assert_eq!(ulp_error(f32::NAN, f64::NAN), 0.0);
    }

    #[test]
    #[should_panic(expected = "element 1 of 2")]
    fn the_offender_is_named() {
        assert_within(&[1.0, 2.0], &[1.0, 2.1], |_| 0.01);
    }

    #[test]
    #[should_panic(expected = "element 0 of 1")]
    fn nan_is_outside_every_bound() {
        assert_within(&[f32::NAN], &[1.0], |_| f64::INFINITY);
    }
}
