//! `Medium` on dot products of bf16: what is not also said of tiles (`super::tiles` runs its properties here too). On a CPU without them
//! they are plain arithmetic.

use half::bf16;

use super::*;
use crate::{Isa, Precision};

fn context() -> Option<Context> {
    Isa::avx512_bf16_or_emulated().map(|isa| Context::with_isa(isa).precision(Precision::Medium))
}

#[test]
fn only_medium_rounds_its_operands() {
    let Some(ctx) = context() else { return };
    assert_eq!(kernel_name(&ctx), "bf16_8x48_avx512bf16");
    let vectors = Context::with_isa(Isa::new(ctx.isa().vectors()).unwrap());
    for precision in [Precision::Strict, Precision::Highest, Precision::High] {
        assert_eq!(kernel_name(&ctx.precision(precision)), kernel_name(&vectors));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Magnitudes from subnormal to the largest f32. What is below 2⁻¹²⁶ may count as zero: an operand, a product, a sum.
    #[test]
    fn the_ends_of_the_range(
        (m, n, k) in (1usize..10, 1usize..60, 1usize..40),
        seed in any::<u64>(),
    ) {
        let Some(ctx) = context() else { return Ok(()) };
        let spread = |len: usize, (lowest, highest): (f32, f32), seed: u64| -> Vec<f32> {
            let exponents = uniform(len, seed ^ 5).into_iter().map(|x| (x + 1.0) / 2.0 * (highest - lowest) + lowest);
            uniform(len, seed).iter().zip(exponents).map(|(x, e)| (x.signum() * (1.0 + x.abs())) * e.exp2()).collect()
        };
        let (mut a, b) = (spread(m * k, (-149.0, 127.0), seed), spread(k * n, (-149.0, -10.0), seed ^ 1));
        a[0] = f32::MAX;
        let (a, b) = (row_major(&a, m, k), row_major(&b, k, n));
        let (expected, magnitude) = (reference::gemm(a, b), reference::gemm_abs(a, b));
        let tiny = f64::from(f32::MIN_POSITIVE);
        let bound = |at: usize| {
            let (i, j) = (at / n, at % n);
            let of_subnormal: f64 = (0..k)
                .map(|p| (f64::from(a.at(i, p).abs()), f64::from(b.at(p, j).abs())))
                .filter(|(a, b)| a.min(*b) < tiny)
                .map(|(a, b)| a * b)
                .sum();
            (gamma(k) + (1.0 + 1.0 / 128.0) / 128.0) * magnitude[at] + of_subnormal + 2.0 * k as f64 * tiny
        };
        let c = overwrite(&ctx, a, b);
        assert_within(&c, &expected, bound);
        for ctx in [ctx, ctx.blocking(TINY)] {
            let packed = PackedWeights::pack(&ctx, b).unwrap();
            let mut c = vec![f32::NAN; m * n];
            let view = MatMut::new(&mut c, m, n).unwrap();
            gemm_packed(&ctx, a, &packed, view, Accum::Overwrite, &Epilogue::new()).unwrap();
            assert_same_bits(&c, &overwrite(&ctx, a, b));
        }
    }

    /// They are not rounded again, so matrices in bf16 are those of the same numbers in f32; depths of one and odd ones included.
    #[test]
    fn bf16_matrices_give_the_bits_of_the_same_numbers_in_f32(
        (m, n, k) in (straddle(&[8]), straddle(&[16, 48]), straddle(&[1, 2, 9])),
        seed in any::<u64>(),
    ) {
        let Some(ctx) = context() else { return Ok(()) };
        let narrow = |len, seed| -> Vec<bf16> { uniform(len, seed).into_iter().map(bf16::from_f32).collect() };
        let (a, b) = (narrow(m * k, seed), narrow(k * n, seed ^ 1));
        let wide = |from: &[bf16]| -> Vec<f32> { from.iter().map(|x| x.to_f32()).collect() };
        let (wide_a, wide_b) = (wide(&a), wide(&b));
        let (a, b) = (MatRef::new(&a, m, k).unwrap(), MatRef::new(&b, k, n).unwrap());
        for ctx in [ctx, ctx.blocking(TINY)] {
            let expected = overwrite(&ctx, row_major(&wide_a, m, k), row_major(&wide_b, k, n));
            let mut c = vec![f32::NAN; m * n];
            gemm(&ctx, a, b, MatMut::new(&mut c, m, n).unwrap(), Accum::Overwrite, &Epilogue::new()).unwrap();
            assert_same_bits(&c, &expected);
            let packed = PackedWeights::pack_as(&ctx, b, WeightFormat::Bf16).unwrap();
            let stored = packed.unpack();
            assert_same_bits(&stored, &wide_b);
            c.fill(f32::NAN);
            gemm_packed(&ctx, a, &packed, MatMut::new(&mut c, m, n).unwrap(), Accum::Overwrite, &Epilogue::new()).unwrap();
            assert_same_bits(&c, &expected);
        }
    }
}
