//! The bounds of `math`, held against f64 on every instruction set: every [`STRIDE`]-th bit pattern of
//! f32 (so all exponents, both signs, denormals, infinities and NaN), and all the neighbours of the
//! places where a formula changes.

use pulp::{Simd, WithSimd};

use crate::isa::Isa;
use crate::lanes;
use crate::reference;

/// Prime, so the low bits vary; about a million patterns.
const STRIDE: u32 = 4093;
const BLOCK: usize = 8192;

const SMALLEST: f64 = 1.0 / (1u128 << 100) as f64 / (1u64 << 49) as f64;

/// A function to test, as a type, so that the loop around it is compiled for each.
trait Function: Copy {
    fn fast<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s;
    fn exact(self, x: f64) -> f64;
    /// The largest permitted error in units of `scale`'s ULP.
    fn bound(self, x: f64) -> f64;
    /// What denormal factors may add, in units of the smallest denormal.
    fn underflow(self, _x: f64) -> f64 {
        0.0
    }
    /// The quantity in whose ULP the error is counted: the result, unless it can cancel.
    fn scale(self, x: f64) -> f64 {
        self.exact(x)
    }
}

struct Evaluate<'a, F>(F, &'a [f32], &'a mut [f32]);

impl<F: Function> WithSimd for Evaluate<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        lanes::map(
            simd,
            self.1,
            self.2,
            #[inline(always)]
            |x| self.0.fast(simd, x),
        );
    }
}

/// The distance between the f32 around `x`; the smallest denormal below the normal range.
fn ulp(x: f64) -> f64 {
    let exponent = (x.abs().to_bits() >> 52) as i32 - 1023;
    f64::from(exponent.clamp(-126, 127) - 23).exp2()
}

/// Error in ULP; ∞ where exactly one of the two is NaN or infinite.
fn error(actual: f32, exact: f64, scale: f64) -> f64 {
    if actual.is_nan() || exact.is_nan() {
        return if actual.is_nan() && exact.is_nan() { 0.0 } else { f64::INFINITY };
    }
    if exact.is_infinite() || exact.abs() >= f64::from(f32::MAX) + 0.5 * ulp(f64::from(f32::MAX)) {
        return if actual.is_infinite() && f64::from(actual).signum() == exact.signum() {
            0.0
        } else {
            f64::INFINITY
        };
    }
    // An infinity stands one step above the largest number.
    let actual =
        if actual.is_infinite() { 128f64.exp2().copysign(f64::from(actual)) } else { f64::from(actual) };
    (actual - exact).abs() / ulp(scale)
}

fn samples(edges: &[f32]) -> Vec<f32> {
    let mut all: Vec<f32> = (0..=u32::MAX / STRIDE).map(|i| f32::from_bits(i * STRIDE)).collect();
    all.extend([f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, f32::MIN_POSITIVE]);
    all.extend([f32::MAX, f32::MIN, f32::from_bits(1), -f32::from_bits(1), f32::from_bits(0x007F_FFFF)]);
    for &edge in edges
        .iter()
        .flat_map(|&edge| [edge, -edge].into_iter().collect::<Vec<_>>())
        .collect::<Vec<_>>()
        .iter()
    {
        let bits = edge.to_bits();
        all.extend((0..3000).map(|i| f32::from_bits(bits.wrapping_add(i).wrapping_sub(1500))));
    }
    all
}

/// Asserts the bound at every sample and returns nothing; prints the worst, for the table in `math`.
fn check<F: Function>(name: &str, function: F, edges: &[f32]) {
    let samples = samples(edges);
    let exact: Vec<(f64, f64, f64)> = samples
        .iter()
        .map(|&x| f64::from(x))
        .map(|x| {
            (
                function.exact(x),
                function.scale(x),
                function.bound(x) + function.underflow(x) * SMALLEST / ulp(function.scale(x)),
            )
        })
        .collect();
    for isa in Isa::available() {
        let mut worst = (0.0, 0.0, 0.0f32, 0.0f32);
        for (xs, exact) in samples.chunks(BLOCK).zip(exact.chunks(BLOCK)) {
            let mut ys = vec![7.0; xs.len()];
            isa.dispatch(Evaluate(function, xs, &mut ys));
            for ((&x, &y), &(exact, scale, bound)) in xs.iter().zip(&ys).zip(exact) {
                let error = error(y, exact, scale);
                assert!(
                    error == 0.0 || error <= bound,
                    "{name}({x:e}) on {isa}: {y:e}, exact {exact:e}: {error} > {bound} ULP"
                );
                if error / bound > worst.0 {
                    worst = (error / bound, error, x, y);
                }
            }
        }
        println!(
            "{name} {isa}: worst {:.3} ULP ({:.0} % of the bound) at {:e}",
            worst.1,
            worst.0 * 100.0,
            worst.2
        );
    }
}

macro_rules! function {
    ($test:ident, $edges:expr, |$x:ident| $exact:expr, $bound:expr $(, underflow $underflow:expr)? $(, scale $scale:expr)?) => {
        #[test]
        fn $test() {
            #[derive(Clone, Copy)]
            struct F;
            impl Function for F {
                fn fast<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
                    super::$test(simd, x)
                }
                fn exact(self, $x: f64) -> f64 {
                    $exact
                }
                fn bound(self, $x: f64) -> f64 {
                    let _ = $x;
                    $bound
                }
                $(fn underflow(self, $x: f64) -> f64 {
                    $underflow
                })?
                $(fn scale(self, $x: f64) -> f64 {
                    $scale
                })?
            }
            check(stringify!($test), F, &$edges);
        }
    };
}

/// The larger of two summands: what the error of their sum is counted in.
fn larger([a, b]: [f64; 2]) -> f64 {
    a.abs().max(b.abs())
}

fn sum([a, b]: [f64; 2]) -> f64 {
    a + b
}

/// |z| of gelu_tanh.
fn argument(x: f64) -> f64 {
    reference::gelu_tanh_argument(x)[0].abs()
}

const HALF_LN_2: f32 = std::f32::consts::LN_2 / 2.0;

function!(exp, [88.722_84, 87.336_54, 103.972_08, 104.0, 89.0, HALF_LN_2, 3.0 * HALF_LN_2], |x| x.exp(), 1.5);

/// On the negative half, which is what it is for.
#[test]
fn exp_flushed() {
    #[derive(Clone, Copy)]
    struct F;
    impl Function for F {
        fn fast<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
            super::exp_flushed(simd, simd.neg_f32s(simd.abs_f32s(x)))
        }
        fn exact(self, x: f64) -> f64 {
            (-x.abs()).exp()
        }
        fn bound(self, x: f64) -> f64 {
            1.5 + x.abs() / 20.0
        }
        fn underflow(self, x: f64) -> f64 {
            if x.abs() > 87.3 { 8_388_608.0 } else { 0.0 }
        }
    }
    check("exp_flushed", F, &[87.336_54, 87.683_11, 88.0, HALF_LN_2, 3.0 * HALF_LN_2]);
}

function!(log, [1.0, 0.5, 2.0, std::f32::consts::SQRT_2, 0.707_106_77, f32::MIN_POSITIVE], |x| x.ln(), 1.5);
function!(tanh, [0.5 * HALF_LN_2, 1.5 * HALF_LN_2, 9.01, 9.25], |x| x.tanh(), 3.0);
function!(sigmoid, [88.722_84, 87.336_54, 103.972_08, 16.6, 17.4], |x| reference::sigmoid(x), 2.5);
function!(
    silu,
    [88.722_84, 87.336_54, 103.972_08, 108.7, 120.0],
    |x| reference::silu(x),
    3.5,
    underflow x.abs().min(120.0)
);
function!(erf, [1.0, 3.9, 4.0], |x| reference::erf(x), 2.0);
function!(
    normal_cdf,
    [1.0, 5.4, 13.0, 13.27, 14.2, 14.5],
    |x| reference::normal_cdf(x),
    7.0,
    underflow if x < -13.0 { 8_388_608.0 } else { 0.0 }
);
function!(
    gelu,
    [1.0, 3.43, 8.46, 12.33, 13.2, 13.27],
    |x| reference::gelu(x),
    7.5,
    underflow if x < -13.0 { 15.0 * 8_388_608.0 } else { x.abs().min(15.0) }
);
function!(
    gelu_tanh,
    [9.0, 10.05, 15.0],
    |x| reference::gelu_tanh(x),
    if x < 0.0 { 4.0 + 3.0 * argument(x) } else { 4.0 },
    underflow x.abs().min(15.0)
);
function!(
    silu_derivative,
    [1.278_464_5, 88.722_84, 103.972_08, 120.0],
    |x| sum(reference::silu_derivative(x)),
    5.0,
    underflow x.abs().min(120.0),
    scale larger(reference::silu_derivative(x))
);
function!(
    gelu_derivative,
    [1.0, 0.751_791_5, 13.2, 14.3, 14.5, 15.0],
    |x| sum(reference::gelu_derivative(x)),
    7.0,
    underflow if x < -13.0 { 15.0 * 8_388_608.0 } else { x.abs().min(15.0) },
    scale larger(reference::gelu_derivative(x))
);
function!(
    gelu_tanh_derivative,
    [0.752_461_4, 9.0, 10.05, 15.0],
    |x| sum(reference::gelu_tanh_derivative(x)),
    8.0 + 4.0 * argument(x),
    underflow (x * reference::gelu_tanh_argument(x)[1]).abs().min(1e4),
    scale larger(reference::gelu_tanh_derivative(x))
);

#[test]
fn signs_of_zero_are_kept() {
    #[derive(Clone, Copy)]
    struct Tanh;
    impl Function for Tanh {
        fn fast<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
            simd.mul_f32s(super::tanh(simd, x), simd.abs_f32s(super::erf(simd, simd.splat_f32s(1.0))))
        }
        fn exact(self, x: f64) -> f64 {
            x
        }
        fn bound(self, _: f64) -> f64 {
            0.0
        }
    }
    for isa in Isa::available() {
        let mut y = [1.0; 2];
        isa.dispatch(Evaluate(Tanh, &[-0.0, 0.0], &mut y));
        assert!(y[0].is_sign_negative() && y[1].is_sign_positive() && y == [0.0; 2], "{isa}");
    }
}

/// What lies below GELU's tail is −0, as x·Φ(x) has it.
#[test]
fn zeros_of_gelu_have_the_sign_of_their_argument() {
    #[derive(Clone, Copy)]
    struct Gelu;
    impl Function for Gelu {
        fn fast<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
            super::gelu(simd, x)
        }
        fn exact(self, x: f64) -> f64 {
            reference::gelu(x)
        }
        fn bound(self, _: f64) -> f64 {
            0.0
        }
    }
    for isa in Isa::available() {
        let mut y = [1.0; 5];
        isa.dispatch(Evaluate(Gelu, &[f32::NEG_INFINITY, f32::MIN, -20.0, -0.0, 0.0], &mut y));
        assert_eq!(y.map(f32::to_bits), [-0.0f32, -0.0, -0.0, -0.0, 0.0].map(f32::to_bits), "{isa}");
    }
}
