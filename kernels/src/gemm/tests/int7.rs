//! Rows of 7 bits beside int8 and int4.

use super::*;
use crate::gemm::quantise::scale_of;
use crate::isa::IsaName;

/// The product by the kernel of `ctx` into a poisoned, guarded C.
fn product(ctx: &Context, a: Int8Rows<'_>, m: usize, b: &PackedWeights) -> Vec<f32> {
    let mut c = Guarded::poisoned(m * b.cols());
    let view = MatMut::new(c.body_mut(), m, b.cols()).unwrap();
    gemm_int8(ctx, a, b, view, Accum::Overwrite, &Epilogue::new()).unwrap();
    c.check();
    c.body().to_vec()
}

/// What the naive form gives: integers up to ±63 and a scale for each row.
fn quantised(a: MatRef<'_>) -> (Vec<i8>, Vec<f32>) {
    let mut values = Vec::new();
    let mut scales = Vec::new();
    for i in 0..a.rows() {
        let largest = (0..a.cols()).map(|p| a.at(i, p).abs()).fold(0.0, f32::max);
        let scale = scale_of(largest, 63);
        values.extend((0..a.cols()).map(|p| (a.at(i, p) * (1.0 / scale)).round_ties_even() as i8));
        scales.push(scale);
    }
    assert!(values.iter().all(|q| q.abs() <= 63));
    (values, scales)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Half a step of each row, `γ_4` for the conversion of the sum and its two scales.
    #[test]
    fn rounding_the_rows_is_within_half_a_step(
        (m, n, k) in (straddle(&[2, 6, 8]), straddle(&[4, 16, 48]), straddle(&[1, 7, 33])),
        order in 0u8..4,
        seed in any::<u64>(),
    ) {
        let a = Matrix::new(m, k, order, |len| uniform(len, seed).iter().zip(uniform(len, seed ^ 3)).map(|(x, y)| x * (20.0 * y).exp2()).collect());
        let b = uniform(k * n, seed ^ 1);
        for_each_isa(|ctx| {
            let packed = PackedWeights::pack_as(ctx, row_major(&b, k, n), WeightFormat::Int8).unwrap();
            let stored = packed.unpack();
            let stored = row_major(&stored, k, n);
            let expected = reference::gemm(a.view(), stored);
            let magnitude = reference::gemm_abs(a.view(), stored);
            let bound = |at: usize| {
                let (i, j) = (at / n, at % n);
                let largest = (0..k).map(|p| f64::from(a.view().at(i, p).abs())).fold(0.0, f64::max);
                let column: f64 = (0..k).map(|p| f64::from(stored.at(p, j).abs())).sum();
                let rounded = (largest / 126.0 * (1.0 + f64::powi(2.0, -13)) + f64::powi(2.0, -126)) * column;
                rounded + gamma(4) * (magnitude[at] + rounded)
            };
            assert_within(&product(ctx, Int8Rows::Quantise7(a.view()), m, &packed), &expected, bound);
        });
    }

    /// Weights of all 256 values: the sums of 16 bits come to `2·255·63`. On every instruction set the bits are those of the kernel for 8 bits
    /// with the same integers, for whole blocks and shallow ones, and for int4.
    #[test]
    fn bits_are_those_of_the_same_integers_in_eight_bits(
        (m, n, k) in (straddle(&[1, 6, 12]), straddle(&[8, 16, 48]), straddle(&[4, 8, 33, 64])),
        extreme in any::<bool>(),
        (threads, seed) in (1usize..4, any::<u64>()),
    ) {
        let round = |x: f32| if extreme { x.signum() } else { x };
        let a: Vec<f32> = uniform(m * k, seed).into_iter().map(round).collect();
        let b: Vec<i8> = uniform(k * n, seed ^ 1).iter().map(|x| if extreme { if *x < 0.0 { -128 } else { 127 } } else { (x * 128.0).floor() as i8 }).collect();
        let of_cols: Vec<f32> = (0..n).map(|j| 0.5 + j as f32 / 16.0).collect();
        let a = row_major(&a, m, k);
        let (values, scales) = quantised(a);
        let given = Int8Rows::Given { values: MatRef::new(&values, m, k).unwrap().into(), scales: &scales };
        for_each_isa(|ctx| for ctx in [*ctx, ctx.blocking(TINY)] {
            let ctx = ctx.threads(NonZeroUsize::new(threads).unwrap());
            let packed = PackedWeights::from_int8(&ctx, MatRef::new(&b, k, n).unwrap(), &of_cols).unwrap();
            let expected = product(&ctx, given, m, &packed);
            assert_same_bits(&product(&ctx, Int8Rows::Quantise7(a), m, &packed), &expected);
            let floats: Vec<f32> = b.iter().map(|x| f32::from(*x)).collect();
            let format = WeightFormat::Int4 { group: 16 };
            let packed = PackedWeights::pack_as(&ctx, row_major(&floats, k, n), format).unwrap();
            let expected = product(&ctx, given, m, &packed);
            assert_same_bits(&product(&ctx, Int8Rows::Quantise7(a), m, &packed), &expected);
        });
    }

    #[test]
    fn bits_depend_neither_on_the_number_of_rows_nor_on_threads(
        (m, n, k) in (1usize..60, 1usize..420, 0usize..80),
        seed in any::<u64>(),
    ) {
        let (a, b) = (uniform(m * k, seed), uniform(k * n, seed ^ 1));
        let (a, b) = (row_major(&a, m, k), row_major(&b, k, n));
        let columns = elements(a.t());
        for_each_isa(|ctx| {
            let ctx = &ctx.blocking(Blocking { kc: 33, ..TINY });
            let packed = PackedWeights::pack_as(ctx, b, WeightFormat::Int8).unwrap();
            let all = product(ctx, Int8Rows::Quantise7(a), m, &packed);
            for (first, rows) in [(0, 1), (m / 2, 1), (m / 3, (m - m / 3).min(2)), (0, m.min(5))] {
                let part = product(ctx, Int8Rows::Quantise7(a.sub(first..first + rows, 0..k)), rows, &packed);
                assert_same_bits(&part, &all[first * n..(first + rows) * n]);
            }
            assert_same_bits(&product(ctx, Int8Rows::Quantise7(row_major(&columns, k, m).t()), m, &packed), &all);
            let ctx = &ctx.threads(NonZeroUsize::new(3).unwrap());
            assert_same_bits(&product(ctx, Int8Rows::Quantise7(a), m, &packed), &all);
        });
    }
}

/// Large enough that several threads get work, by rows and by columns.
#[test]
fn threads_do_not_change_a_bit() {
    for (m, n, k) in [(100, 300, 260), (2, 2000, 1200)] {
        let (a, b) = (uniform(m * k, 1), uniform(k * n, 2));
        let a = Int8Rows::Quantise7(row_major(&a, m, k));
        for_each_isa(|ctx| {
            let packed = PackedWeights::pack_as(ctx, row_major(&b, k, n), WeightFormat::Int8).unwrap();
            let alone = product(ctx, a, m, &packed);
            for threads in [2, 3, 5] {
                let ctx = ctx.threads(NonZeroUsize::new(threads).unwrap());
                assert_same_bits(&product(&ctx, a, m, &packed), &alone);
            }
        });
    }
}

#[test]
fn the_kernel_has_the_name_in_the_table() {
    let a = [0.0];
    let a = row_major(&a, 1, 1);
    for_each_isa(|ctx| {
        let of = |rows: Int8Rows<'_>, format| int8_kernel_name(ctx, &rows, format);
        let (int4, eight) = (WeightFormat::Int4 { group: 8 }, of(Int8Rows::Quantise(a), WeightFormat::Int8));
        let expected = if ctx.isa().name() == IsaName::Avx2 { "int7_4x16_avx2" } else { eight };
        assert_eq!(of(Int8Rows::Quantise7(a), WeightFormat::Int8), expected);
        assert_eq!(of(Int8Rows::Quantise7(a), int4), of(Int8Rows::Quantise(a), int4));
    });
}

#[test]
fn a_row_that_is_not_finite_is_nan_and_a_tiny_one_is_zero() {
    let a = [1.0, f32::INFINITY, 2.0, f32::NAN, 1e-44, 1e-40, 0.0, 0.0, 1.0, 63.0];
    for_each_isa(|ctx| {
        let packed =
            PackedWeights::pack_as(ctx, row_major(&[127.0, 127.0], 2, 1), WeightFormat::Int8).unwrap();
        let c = product(ctx, Int8Rows::Quantise7(row_major(&a, 5, 2)), 5, &packed);
        assert!(c[0].is_nan() && c[1].is_nan());
        assert_eq!(c[2..], [0.0, 0.0, 64.0 * 127.0]);
    });
}

#[test]
fn operands_that_do_not_fit_are_errors_and_touch_nothing() {
    let ctx = Context::with_isa(crate::Isa::best());
    let b = vec![1.0; INT8_MAX_DEPTH + 1];
    let refused = |k: usize, format, cols: usize| {
        let packed = PackedWeights::pack_as(&ctx, row_major(&b[..3], 3, 1), format).unwrap();
        let mut c = vec![7.0; cols];
        let view = MatMut::new(&mut c, 1, cols).unwrap();
        let a = Int8Rows::Quantise7(row_major(&b[..k], 1, k));
        let error = gemm_int8(&ctx, a, &packed, view, Accum::Overwrite, &Epilogue::new()).unwrap_err();
        assert!(c.iter().all(|x| *x == 7.0));
        error.to_string()
    };
    assert_eq!(refused(2, WeightFormat::Int8, 1), "b: rows is 3, expected 2");
    assert_eq!(refused(3, WeightFormat::Int8, 2), "c: cols is 2, expected 1");
    assert_eq!(refused(3, WeightFormat::F32, 1), "b.format is F32, expected Int8 or Int4");
    let packed = PackedWeights::pack_as(&ctx, row_major(&b, b.len(), 1), WeightFormat::Int8).unwrap();
    let mut c = [7.0];
    let a = Int8Rows::Quantise7(row_major(&b, 1, b.len()));
    let view = MatMut::new(&mut c, 1, 1).unwrap();
    let error = gemm_int8(&ctx, a, &packed, view, Accum::Overwrite, &Epilogue::new()).unwrap_err();
    assert!(error.to_string().starts_with("a.cols is 131072, expected at most 131071"), "{error}");
    assert_eq!(c, [7.0]);
}
