//! Special functions in f64 that the standard library lacks, accurate to a few 10⁻¹⁵ relative to themselves.

/// erf x = 2/√π · ∫₀ˣ exp(−t²) dt.
pub fn erf(x: f64) -> f64 {
    if x.abs() < 2.0 { series(x) } else { x.signum() - x.signum() * erfc(x.abs()) }
}

/// erfc x = 1 − erf x, accurate in the tail.
pub fn erfc(x: f64) -> f64 {
    if x < 2.0 { 1.0 - erf(x) } else { continued_fraction(x) }
}

/// Φ(x) = P(N(0, 1) ≤ x).
pub fn normal_cdf(x: f64) -> f64 {
    let t = x / std::f64::consts::SQRT_2;
    if t < -0.5 { 0.5 * erfc(-t) } else { 0.5 * (1.0 + erf(t)) }
}

/// e⁻ˣ²ᐟ²/√(2π): the density of N(0, 1).
pub fn normal_density(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

/// 1/(1 + e⁻ˣ).
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// x·y, where a vanishing factor wins over an infinite one: the limit, when it vanishes exponentially.
fn damped(x: f64, y: f64) -> f64 {
    if x == 0.0 || y == 0.0 { 0.0 } else { x * y }
}

/// x·sigmoid(x).
pub fn silu(x: f64) -> f64 {
    damped(x, sigmoid(x))
}

/// The derivative of [`silu`], as its two summands, which may cancel.
pub fn silu_derivative(x: f64) -> [f64; 2] {
    [sigmoid(x), damped(sigmoid(x), damped(x, sigmoid(-x)))]
}

/// x·Φ(x).
pub fn gelu(x: f64) -> f64 {
    damped(x, normal_cdf(x))
}

/// The derivative of [`gelu`], as its two summands, which may cancel.
pub fn gelu_derivative(x: f64) -> [f64; 2] {
    [normal_cdf(x), damped(x, normal_density(x))]
}

/// z = 2·√(2/π)·(x + 0.044715·x³), the argument of the sigmoid in [`gelu_tanh`], and dz/dx.
pub fn gelu_tanh_argument(x: f64) -> [f64; 2] {
    let c = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
    [c * (x + 0.044_715 * x * x * x), c * (1.0 + 3.0 * 0.044_715 * x * x)]
}

/// x·sigmoid(z) = x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))).
pub fn gelu_tanh(x: f64) -> f64 {
    damped(x, sigmoid(gelu_tanh_argument(x)[0]))
}

/// The derivative of [`gelu_tanh`], as its two summands, which may cancel.
pub fn gelu_tanh_derivative(x: f64) -> [f64; 2] {
    let [z, d_z] = gelu_tanh_argument(x);
    [sigmoid(z), damped(x * d_z, sigmoid(z) * sigmoid(-z))]
}

/// erf x = 2/√π·exp(−x²)·Σ 2ⁿx²ⁿ⁺¹/(1·3·5…(2n+1)): all terms have one sign, nothing cancels.
fn series(x: f64) -> f64 {
    let mut term = x;
    let mut sum = x;
    let mut n = 0.0;
    while term.abs() > sum.abs() * 1e-17 {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    sum * (-x * x).exp() * std::f64::consts::FRAC_2_SQRT_PI
}

/// erfc x = exp(−x²)/√π / (x + ½/(x + 1/(x + 3⁄2/(x + …)))), for x ≥ 2.
fn continued_fraction(x: f64) -> f64 {
    if x.is_nan() || x > 40.0 {
        return if x.is_nan() { x } else { 0.0 };
    }
    let mut fraction = x;
    for n in (1..=60).rev() {
        fraction = x + 0.5 * f64::from(n) / fraction;
    }
    (-x * x).exp() / (fraction * std::f64::consts::PI.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_from_tables() {
        // Abramowitz and Stegun, tables 7.1 and 7.3; NIST DLMF 7.23.
        for (x, want) in [
            (0.0, 0.0),
            (0.1, 0.112_462_916_018_284_9),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.0, 0.995_322_265_018_952_7),
            (3.0, 0.999_977_909_503_001_4),
        ] {
            assert!((erf(x) - want).abs() <= 4e-16, "erf({x}) = {}", erf(x));
            assert_eq!(erf(-x), -erf(x));
        }
        for (x, want) in [(2.0, 4.677_734_981_047_266e-3), (4.0, 1.541_725_790_028_002e-8)] {
            assert!((erfc(x) / want - 1.0).abs() < 1e-14, "erfc({x}) = {:e}", erfc(x));
        }
        // The two forms meet.
        assert!((series(2.2) + continued_fraction(2.2) - 1.0).abs() < 1e-15);
        assert!((continued_fraction(2.0) / (1.0 - series(2.0)) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn derivatives_agree_with_central_differences() {
        let h = 1e-5;
        for i in -60..=60 {
            let x = f64::from(i) * 0.1;
            for (f, d) in [
                (silu as fn(f64) -> f64, silu_derivative as fn(f64) -> [f64; 2]),
                (gelu, gelu_derivative),
                (gelu_tanh, gelu_tanh_derivative),
                (|x| 2.0 * normal_cdf(x), |x| [normal_density(x); 2]),
            ] {
                let slope = (f(x + h) - f(x - h)) / (2.0 * h);
                assert!((slope - d(x)[0] - d(x)[1]).abs() < 1e-9, "{x}: {slope} {:?}", d(x));
            }
        }
    }

    #[test]
    fn limits() {
        assert_eq!(erf(f64::INFINITY), 1.0);
        assert_eq!(erf(f64::NEG_INFINITY), -1.0);
        assert_eq!(normal_cdf(f64::NEG_INFINITY), 0.0);
        assert_eq!(normal_cdf(f64::INFINITY), 1.0);
        assert!(erf(f64::NAN).is_nan() && normal_cdf(f64::NAN).is_nan());
    }
}
