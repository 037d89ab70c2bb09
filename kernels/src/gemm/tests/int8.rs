//! int8 on both sides.

use super::*;

/// The product by the kernel of `ctx` into a poisoned, guarded C.
fn product(ctx: &Context, a: Int8Rows<'_>, m: usize, b: &PackedWeights) -> Vec<f32> {
    let mut c = Guarded::poisoned(m * b.cols());
    let view = MatMut::new(c.body_mut(), m, b.cols()).unwrap();
    gemm_int8(ctx, a, b, view, Accum::Overwrite, &Epilogue::new()).unwrap();
    c.check();
    c.body().to_vec()
}

/// Integers up to ±127, each column with a 127 so that its scale is 1.
fn weights(k: usize, n: usize, seed: u64) -> Vec<f32> {
    let mut b = integers(k * n, 127, seed);
    b[..n.min(k * n)].fill(127.0);
    b
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Sums of up to 100 products stay below 2²⁴, so scales of 1 leave them as they are.
    #[test]
    fn sums_are_exact(
        (m, n, k) in (straddle(&[2, 6, 8, 48]), straddle(&[4, 12, 16, 48]), straddle(&[1, 4, 7, 33])),
        column_major in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let values: Vec<i8> = uniform(m * k, seed).iter().map(|x| (x * 128.0).floor() as i8).collect();
        let values = if column_major { MatRef::with_strides(&values, m, k, 1, m) } else { MatRef::new(&values, m, k) }.unwrap();
        let b = weights(k, n, seed ^ 1);
        let b = row_major(&b, k, n);
        let scales: Vec<f32> = (0..m).map(|i| (i as f32).exp2().min(1024.0)).collect();
        let expected: Vec<f64> = reference::gemm(values, b).iter().enumerate()
            .map(|(at, sum)| sum * f64::from(scales[at / n.max(1)])).collect();
        for_each_isa(|ctx| for ctx in [*ctx, ctx.blocking(TINY)] {
            let packed = PackedWeights::pack_as(&ctx, b, WeightFormat::Int8).unwrap();
            assert_within(&product(&ctx, Int8Rows::Given { values: values.into(), scales: &scales }, m, &packed), &expected, |_| 0.0);
        });
    }

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
                let rounded = (largest / 254.0 * (1.0 + f64::powi(2.0, -13)) + f64::powi(2.0, -126)) * column;
                rounded + gamma(4) * (magnitude[at] + rounded)
            };
            assert_within(&product(ctx, Int8Rows::Quantise(a.view()), m, &packed), &expected, bound);
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
            let all = product(ctx, Int8Rows::Quantise(a), m, &packed);
            for (first, rows) in [(0, 1), (m / 2, 1), (m / 3, (m - m / 3).min(2)), (0, m.min(5))] {
                let part = product(ctx, Int8Rows::Quantise(a.sub(first..first + rows, 0..k)), rows, &packed);
                assert_same_bits(&part, &all[first * n..(first + rows) * n]);
            }
            assert_same_bits(&product(ctx, Int8Rows::Quantise(row_major(&columns, k, m).t()), m, &packed), &all);
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Signed and unsigned rows, given weights of all 256 values, tiles too; added to what is there.
    #[test]
    fn raw_sums_are_exact(
        (m, n, k) in (straddle(&[2, 6, 16, 32]), straddle(&[4, 16, 48]), straddle(&[1, 4, 33, 64])),
        (unsigned, add, column_major) in any::<(bool, bool, bool)>(),
        (threads, seed) in (1usize..4, any::<u64>()),
    ) {
        let bytes = |len: usize, seed: u64| uniform(len, seed).iter().map(|x| ((x + 1.0) * 128.0) as u8).collect::<Vec<u8>>();
        let strides = if column_major { (1, m) } else { (k, 1) };
        let (a, b, zero_points) = (bytes(m * k, seed), bytes(k * n, seed ^ 1), bytes(m, seed ^ 2));
        let (signed, b): (Vec<i8>, Vec<i8>) = (a.iter().map(|x| *x as i8).collect(), b.iter().map(|x| *x as i8).collect());
        let signed = MatRef::with_strides(&signed, m, k, strides.0, strides.1).unwrap();
        let values = MatRef::with_strides(&a, m, k, strides.0, strides.1).unwrap();
        let b = MatRef::new(&b, k, n).unwrap();
        let a: Integers = if unsigned { Integers::Unsigned { values, zero_points: &zero_points } } else { signed.into() };
        let element = |i: usize, p: usize| if unsigned {
            i32::from(values.at(i, p)) - i32::from(zero_points[i])
        } else {
            i32::from(signed.at(i, p))
        };
        let old: Vec<i32> = (0..(m * n) as i32).collect();
        let sum = |i: usize, j: usize| (0..k).map(|p| element(i, p) * i32::from(b.at(p, j))).sum::<i32>();
        let sums: Vec<i32> = (0..m * n).map(|at| sum(at / n, at % n)).collect();
        let expected: Vec<i32> = sums.iter().zip(&old).map(|(sum, old)| if add { old + sum } else { *sum }).collect();
        let accum = if add { Accum::Add } else { Accum::Overwrite };
        let row_scales: Vec<f32> = (0..m).map(|i| 1.0 + i as f32 / 8.0).collect();
        let col_scales: Vec<f32> = (0..n).map(|j| 0.5 + j as f32 / 16.0).collect();
        let check = |ctx: &Context| {
            for ctx in [*ctx, ctx.blocking(TINY)] {
                let ctx = ctx.threads(NonZeroUsize::new(threads).unwrap());
                let packed = PackedWeights::from_int8(&ctx, b, &col_scales).unwrap();
                let mut c = old.clone();
                gemm_int8_sums(&ctx, a, &packed, MatMut::new(&mut c, m, n).unwrap(), accum).unwrap();
                assert_eq!(c, expected);
                let scaled = product(&ctx, Int8Rows::Given { values: a, scales: &row_scales }, m, &packed);
                let of = |at: usize| sums[at] as f32 * (col_scales[at % n] * row_scales[at / n]);
                assert_same_bits(&scaled, &(0..m * n).map(of).collect::<Vec<_>>());
            }
        };
        for_each_isa(check);
        if let Some(isa) = crate::testing::amx() {
            check(&Context::with_isa(isa));
        }
    }
}

#[test]
fn integers_that_do_not_fit_are_errors_and_touch_nothing() {
    let ctx = Context::with_isa(crate::Isa::scalar());
    let bytes = vec![1u8; UINT8_MAX_DEPTH + 1];
    let weights = vec![1i8; bytes.len()];
    let refused = |k: usize, zero_points: &[u8], cols: usize| {
        let b = MatRef::new(&weights[..k], k, 1).unwrap();
        let packed = PackedWeights::from_int8(&ctx, b, &[1.0]).unwrap();
        let values = MatRef::new(&bytes[..k], 1, k).unwrap();
        let mut c = vec![7; cols];
        let view = MatMut::new(&mut c, 1, cols).unwrap();
        let a = Integers::Unsigned { values, zero_points };
        let error = gemm_int8_sums(&ctx, a, &packed, view, Accum::Overwrite).unwrap_err();
        assert!(c.iter().all(|x| *x == 7));
        error.to_string()
    };
    assert_eq!(refused(3, &[], 1), "zero_points: elements is 0, expected 1");
    assert_eq!(refused(3, &[1], 2), "c: cols is 2, expected 1");
    assert!(refused(bytes.len(), &[1], 1).starts_with("a.cols is 65794, expected at most 65793"));
    let b = MatRef::new(&weights[..2], 1, 2).unwrap();
    let error = |scales: &[f32]| PackedWeights::from_int8(&ctx, b, scales).unwrap_err().to_string();
    assert_eq!(error(&[1.0]), "scales: elements is 1, expected 2");
    assert_eq!(error(&[1.0, f32::NAN]), "scales is NaN at 1, expected finite");
}

/// Large enough that several threads get work, by rows and by columns.
#[test]
fn threads_do_not_change_a_bit() {
    for (m, n, k) in [(100, 300, 260), (2, 2000, 1200)] {
        let (a, b) = (uniform(m * k, 1), uniform(k * n, 2));
        let a = Int8Rows::Quantise(row_major(&a, m, k));
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

/// The sums pass 2³² on the way (`255·127·k` without the correction), and the last fits an i32 just so.
#[test]
fn the_largest_sums_that_fit_do_not_overflow() {
    let k = INT8_MAX_DEPTH;
    let b = vec![127.0; k];
    let sums: [(i8, f32); 3] = [(127, 127.0 * 127.0), (-128, -128.0 * 127.0), (-127, -127.0 * 127.0)];
    for_each_isa(|ctx| {
        let packed = PackedWeights::pack_as(ctx, row_major(&b, k, 1), WeightFormat::Int8).unwrap();
        for (value, product_of_one) in sums {
            let values = vec![value; k];
            let values = MatRef::new(&values, 1, k).unwrap();
            let c = product(ctx, Int8Rows::Given { values: values.into(), scales: &[1.0] }, 1, &packed);
            assert_eq!(c[0], (f64::from(product_of_one) * k as f64) as f32);
        }
    });
}

#[test]
fn the_epilogue_is_that_of_every_product() {
    let (m, n, k) = (7, 37, 20);
    let (a, b) = (uniform(m * k, 1), uniform(k * n, 2));
    let (old, residual, bias) = (uniform(m * n, 3), uniform(m * n, 4), uniform(n, 5));
    let gate = uniform(m * n, 6);
    let a = Int8Rows::Quantise(row_major(&a, m, k));
    let epilogue = Epilogue::new().scale(0.5).bias(&bias).activation(Activation::Relu);
    let epilogue = epilogue.gate(row_major(&gate, m, n)).residual(row_major(&residual, m, n));
    for_each_isa(|ctx| {
        let packed = PackedWeights::pack_as(ctx, row_major(&b, k, n), WeightFormat::Int8).unwrap();
        let plain = product(ctx, a, m, &packed);
        let mut c = old.clone();
        let view = MatMut::new(&mut c, m, n).unwrap();
        gemm_int8(ctx, a, &packed, view, Accum::Add, &epilogue).unwrap();
        let of = |at: usize| (plain[at] * 0.5 + old[at] + bias[at % n]).max(0.0) * gate[at] + residual[at];
        let expected: Vec<f32> = (0..m * n).map(of).collect();
        assert_same_bits(&c, &expected);
    });
}

#[test]
fn a_row_that_is_not_finite_is_nan_and_a_tiny_one_is_zero() {
    let a = [1.0, f32::INFINITY, 2.0, f32::NAN, 1e-44, 1e-40, 0.0, 0.0, 1.0, 127.0];
    for_each_isa(|ctx| {
        let packed =
            PackedWeights::pack_as(ctx, row_major(&[127.0, 127.0], 2, 1), WeightFormat::Int8).unwrap();
        let c = product(ctx, Int8Rows::Quantise(row_major(&a, 5, 2)), 5, &packed);
        assert!(c[0].is_nan() && c[1].is_nan());
        assert_eq!(c[2..], [0.0, 0.0, 128.0 * 127.0]);
    });
}

#[test]
fn operands_that_do_not_fit_are_errors_and_touch_nothing() {
    let ctx = Context::with_isa(crate::Isa::scalar());
    let b = vec![1.0; INT8_MAX_DEPTH + 1];
    let pack = |k: usize, format| PackedWeights::pack_as(&ctx, row_major(&b[..k], k, 1), format).unwrap();
    let refused = |ctx: &Context, a: Int8Rows<'_>, b: &PackedWeights| {
        let mut c = [7.0];
        let view = MatMut::new(&mut c, 1, 1).unwrap();
        let error = gemm_int8(ctx, a, b, view, Accum::Overwrite, &Epilogue::new()).unwrap_err();
        assert_eq!(c, [7.0]);
        error.to_string()
    };
    let two = Int8Rows::Quantise(row_major(&[1.0, 2.0], 1, 2));
    assert_eq!(refused(&ctx, two, &pack(3, WeightFormat::Int8)), "b: rows is 3, expected 2");
    assert_eq!(refused(&ctx, two, &pack(2, WeightFormat::Bf16)), "b.format is Bf16, expected Int8 or Int4");
    let long = Int8Rows::Quantise(row_major(&b, 1, b.len()));
    let error = refused(&ctx, long, &pack(b.len(), WeightFormat::Int8));
    assert!(error.starts_with("a.cols is 131072, expected at most 131071"), "{error}");
    let values = MatRef::new(&[1i8, 2], 1, 2).unwrap();
    let given = Int8Rows::Given { values: values.into(), scales: &[1.0, 1.0] };
    assert_eq!(refused(&ctx, given, &pack(2, WeightFormat::Int8)), "scales: elements is 2, expected 1");
    let wide = Context::with_isa(crate::Isa::best());
    if wide.isa() != ctx.isa() {
        let error = refused(&wide, two, &pack(2, WeightFormat::Int8));
        assert!(error.starts_with("b: packed for kernel int8w_4x4_scalar"), "{error}");
    }
}
