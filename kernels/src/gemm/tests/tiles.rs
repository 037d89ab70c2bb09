//! Kernels on tiles, and on dot products of bf16: the bounds of the precisions, what parts do not stand for, and equal bits. On a CPU without a tile unit the same
//! instructions run in software.

use super::*;
use crate::testing::amx;
use crate::{Isa, Precision};

/// The precisions that tiles serve, and what each leaves out of `|A|·|B|`.
const PRECISIONS: [(Precision, f64); 3] = [
    (Precision::Medium, (1.0 + 1.0 / 128.0) / 128.0),
    (Precision::High, (1.0 + 1.0 / 256.0) / 32768.0),
    (Precision::Highest, 0.0),
];

/// Calls `property` for each of them, and for `Medium` on dot products of bf16, whose bound is that of tiles.
fn for_each_precision(mut property: impl FnMut(&Context, f64)) {
    for_each_precision_on_tiles(&mut property);
    if let Some(isa) = Isa::avx512_bf16_or_emulated() {
        let (precision, left_out) = PRECISIONS[0];
        let ctx = Context::with_isa(isa).precision(precision);
        assert_eq!(kernel_name(&ctx), "bf16_8x48_avx512bf16");
        property(&ctx, left_out);
    }
}

fn for_each_precision_on_tiles(mut property: impl FnMut(&Context, f64)) {
    let Some(isa) = amx() else { return };
    for (precision, left_out) in PRECISIONS {
        let ctx = Context::with_isa(isa).precision(precision);
        assert!(kernel_name(&ctx).ends_with("_32x32_amx"));
        property(&ctx, left_out);
    }
}

/// What the products of `A·B` may be off by, for sums of that many roundings.
fn bounds(a: MatRef<'_>, b: MatRef<'_>, roundings: usize, left_out: f64) -> Vec<f64> {
    let magnitude = reference::gemm_abs(a, b);
    magnitude.into_iter().map(|sum| (gamma(roundings) + left_out) * sum).collect()
}

#[test]
fn every_x86_64_linux_machine_runs_these_tests() {
    let has_vectors = Isa::available().iter().any(|isa| isa.f32_lanes() >= 8);
    assert_eq!(amx().is_some(), has_vectors && cfg!(all(target_arch = "x86_64", target_os = "linux")));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// `Highest` has the bound of f32 alone. Blocks of 32 along k and blocks of all of k.
    #[test]
    fn the_error_is_within_the_bound_of_the_precision(
        (m, n, k) in (straddle(&[16, 32, 48]), straddle(&[16, 32, 48]), 32usize..140),
        orders in (0u8..4, 0u8..4),
        seed in any::<u64>(),
    ) {
        let a = Matrix::new(m, k, orders.0, |len| uniform(len, seed));
        let b = Matrix::new(k, n, orders.1, |len| uniform(len, seed ^ 1));
        let expected = reference::gemm(a.view(), b.view());
        for_each_precision(|ctx, left_out| {
            let bound = bounds(a.view(), b.view(), k, left_out);
            for ctx in [*ctx, ctx.blocking(TINY)] {
                let c = overwrite(&ctx, a.view(), b.view());
                assert_within(&c, &expected, |i| bound[i]);
                let packed = PackedWeights::pack(&ctx, b.view()).unwrap();
                prop_assert_packed(&ctx, a.view(), &packed, &c);
            }
        });
    }

    #[test]
    fn epilogues_act_on_tiles(
        (m, n) in (1usize..50, 1usize..50),
        (add, with_bias, with_residual) in any::<(bool, bool, bool)>(),
        activation in prop_oneof![Just(Activation::Identity), Just(Activation::Relu), Just(Activation::Tanh)],
        seed in any::<u64>(),
    ) {
        let k = 40;
        let [a, b, residual, old] =
            [m * k, k * n, m * n, m * n].map(|len| integers(len, 3, seed ^ len as u64));
        let bias = integers(n, 3, seed ^ 7);
        let (a, b) = (row_major(&a, m, k), row_major(&b, k, n));
        let mut epilogue = Epilogue::new().scale(0.5).activation(activation);
        if with_bias { epilogue = epilogue.bias(&bias) }
        if with_residual {
            epilogue = epilogue.gate(row_major(&old, m, n)).residual(row_major(&residual, m, n));
        }
        let accum = if add { Accum::Add } else { Accum::Overwrite };
        // Small integers are bf16, and their sums are exact: every precision gives what f32 gives.
        for_each_precision(|ctx, _| {
            for ctx in [*ctx, ctx.blocking(TINY)] {
                let results = [ctx, ctx.precision(Precision::Strict)].map(|ctx| {
                    let mut c = if add { old.clone() } else { vec![f32::NAN; m * n] };
                    gemm(&ctx, a, b, MatMut::new(&mut c, m, n).unwrap(), accum, &epilogue).unwrap();
                    c
                });
                assert_same_bits(&results[0], &results[1]);
            }
        });
    }

    #[test]
    fn bits_depend_neither_on_threads_nor_on_other_rows(
        (m, n, k) in (2usize..70, 1usize..70, 32usize..100),
        seed in any::<u64>(),
    ) {
        let (a, b) = (uniform(m * k, seed), uniform(k * n, seed ^ 1));
        let (a, b) = (row_major(&a, m, k), row_major(&b, k, n));
        for_each_precision(|ctx, _| {
            let all = overwrite(ctx, a, b);
            let row = seed as usize % m;
            let alone = overwrite(ctx, a.sub(row..row + 1, 0..k), b);
            assert_same_bits(&alone, &all[row * n..(row + 1) * n]);
            // Parts as `driver::run` would deal them to threads, for any amount of work.
            let mut parts = vec![0.0; m * n];
            let (left, right) = (0..n / 2, n / 2..n);
            for cols in [left, right] {
                let part = overwrite(ctx, a, b.sub(0..k, cols.clone()));
                for (i, row) in part.chunks_exact(cols.len().max(1)).enumerate() {
                    parts[i * n + cols.start..i * n + cols.end].copy_from_slice(row);
                }
            }
            assert_same_bits(&parts, &all);
        });
    }
}

fn prop_assert_packed(ctx: &Context, a: MatRef<'_>, packed: &PackedWeights, expected: &[f32]) {
    let mut c = vec![f32::NAN; expected.len()];
    let view = MatMut::new(&mut c, a.rows(), packed.cols()).unwrap();
    gemm_packed(ctx, a, packed, view, Accum::Overwrite, &Epilogue::new()).unwrap();
    assert_same_bits(&c, expected);
}

#[test]
fn threads_do_not_change_bits_of_a_product_that_is_dealt_out() {
    for_each_precision(|ctx, _| {
        // Work for two threads, of this precision.
        let [m, n, k] =
            if ctx.matmul_precision() == Precision::Medium { [330, 330, 320] } else { [200, 160, 300] };
        let (a, b) = (uniform(m * k, 1), uniform(k * n, 2));
        let (a, b) = (row_major(&a, m, k), row_major(&b, k, n));
        let two = ctx.threads(NonZeroUsize::new(2).unwrap());
        assert_same_bits(&overwrite(&two, a, b), &overwrite(ctx, a, b));
    });
}

/// Elements that parts do not stand for: their rows and columns are what f32 multiply-adds make, and no other bit changes.
#[test]
fn odd_rows_and_columns_are_computed_in_f32() {
    let (m, n, k) = (37, 45, 50);
    let (plain_a, plain_b) = (uniform(m * k, 3), uniform(k * n, 4));
    for odd in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, -3.4e38, 1e-36, f32::from_bits(1)] {
        let (mut a, mut b) = (plain_a.clone(), plain_b.clone());
        let (row, col) = (33, 20);
        a[row * k + 7] = odd;
        b[11 * n + col] = odd;
        let (a, b) = (row_major(&a, m, k), row_major(&b, k, n));
        for_each_precision(|ctx, _| {
            let precision = ctx.matmul_precision();
            let (strict, result) = (overwrite(&ctx.precision(Precision::Strict), a, b), overwrite(ctx, a, b));
            let plain = overwrite(ctx, row_major(&plain_a, m, k), row_major(&plain_b, k, n));
            for i in 0..m {
                for j in 0..n {
                    let (x, strict, plain) = (result[i * n + j], strict[i * n + j], plain[i * n + j]);
                    let of_odd = i == row || j == col;
                    // High keeps subnormal rests as zero, and Medium rounds whatever it is: only what is not finite is f32's there.
                    let exact = match precision {
                        Precision::Highest => true,
                        Precision::High => j == col && odd.abs() >= 3.4e38 || odd.is_nan(),
                        _ => false,
                    };
                    if !of_odd {
                        assert_eq!(x.to_bits(), plain.to_bits(), "({i}, {j}) has nothing odd");
                    } else if exact {
                        let same = x.to_bits() == strict.to_bits() || x.is_nan() && strict.is_nan();
                        assert!(same, "{precision} ({i}, {j}) with {odd:e}: {x:e}, f32 {strict:e}");
                    } else if !odd.is_finite() {
                        assert_eq!(
                            x.is_nan(),
                            strict.is_nan(),
                            "{precision} ({i}, {j}) with {odd:e}: {x:e}, f32 {strict:e}"
                        );
                        assert!(
                            x.is_nan() || x == strict,
                            "{precision} ({i}, {j}) with {odd:e}: {x:e}, f32 {strict:e}"
                        );
                    }
                }
            }
            for ctx in [*ctx, ctx.blocking(TINY)] {
                let packed = PackedWeights::pack(&ctx, b).unwrap();
                prop_assert_packed(&ctx, a, &packed, &overwrite(&ctx, a, b));
            }
        });
    }
}

#[test]
fn weights_of_another_precision_are_refused() {
    let b = uniform(40 * 8, 1);
    let (a, b) = (row_major(&b, 8, 40), row_major(&b, 40, 8));
    for_each_precision(|ctx, _| {
        let packed = PackedWeights::pack(ctx, b).unwrap();
        for (other, _) in PRECISIONS.into_iter().filter(|(other, _)| *other != ctx.matmul_precision()) {
            let mut c = vec![0.0; 64];
            let view = MatMut::new(&mut c, 8, 8).unwrap();
            let ctx = ctx.precision(other);
            let error = gemm_packed(&ctx, a, &packed, view, Accum::Overwrite, &Epilogue::new()).unwrap_err();
            assert!(matches!(error, ShapeError::PackedForAnotherKernel { .. }), "{error}");
        }
    });
}

/// What a packed operand says it holds is what the product uses.
#[test]
fn unpacked_parts_are_within_their_bound() {
    let (k, n) = (70, 45);
    let b = uniform(k * n, 9);
    for_each_precision(|ctx, _| {
        let bound = match ctx.matmul_precision() {
            Precision::Medium => f64::powi(2.0, -8),
            Precision::High => f64::powi(2.0, -17),
            _ => 0.0,
        };
        for ctx in [*ctx, ctx.blocking(TINY)] {
            let packed = PackedWeights::pack(&ctx, row_major(&b, k, n)).unwrap();
            let expected: Vec<f64> = b.iter().map(|x| f64::from(*x)).collect();
            assert_within(&packed.unpack(), &expected, |i| bound * expected[i].abs());
        }
    });
}

/// k below a step stays with vectors, whatever the precision.
#[test]
fn shallow_products_are_those_of_vectors() {
    let (a, b) = (uniform(5 * 31, 1), uniform(31 * 7, 2));
    let (a, b) = (row_major(&a, 5, 31), row_major(&b, 31, 7));
    for_each_precision_on_tiles(|ctx, _| {
        assert_same_bits(&overwrite(ctx, a, b), &overwrite(&ctx.precision(Precision::Strict), a, b));
    });
}

/// Sums of integers are exact, so the tile unit gives the bits of the vectors beside it.
#[test]
fn bytes_on_tiles_have_the_bits_of_bytes_on_vectors() {
    let Some(isa) = amx() else { return };
    let rows = [0.0];
    let rows = Int8Rows::Quantise(row_major(&rows, 1, 1));
    assert_eq!(int8_kernel_name(&Context::with_isa(isa), &rows, WeightFormat::Int8), "int8_32x48_amx");
    let vectors = Context::with_isa(Isa::new(isa.vectors()).unwrap());
    for (m, n, k) in [(1, 1, 1), (5, 16, 64), (16, 17, 63), (17, 49, 65), (33, 100, 200), (40, 33, 0)] {
        let (a, b, old) = (uniform(m * k, 1), uniform(k * n, 2), uniform(m * n, 3));
        let (a, b) = (Int8Rows::Quantise(row_major(&a, m, k)), row_major(&b, k, n));
        let residual = row_major(&old, m, n);
        let epilogue = Epilogue::new().scale(0.5).activation(Activation::Tanh).residual(residual);
        for blocking in [None, Some(Blocking { kc: 33, ..TINY }), Some(Blocking { kc: 70, ..TINY })] {
            let results = [vectors, Context::with_isa(isa)].map(|ctx| {
                let ctx = blocking.map_or(ctx, |blocking| ctx.blocking(blocking));
                let packed = PackedWeights::pack_as(&ctx, b, WeightFormat::Int8).unwrap();
                let mut c = old.clone();
                let view = MatMut::new(&mut c, m, n).unwrap();
                gemm_int8(&ctx, a, &packed, view, Accum::Add, &epilogue).unwrap();
                c
            });
            assert_same_bits(&results[1], &results[0]);
        }
    }
}
