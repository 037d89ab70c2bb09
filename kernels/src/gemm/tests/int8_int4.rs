//! Rows in int8 beside weights in int4.

use super::*;

fn product(ctx: &Context, a: Int8Rows<'_>, m: usize, b: &PackedWeights) -> Vec<f32> {
    let mut c = Guarded::poisoned(m * b.cols());
    let view = MatMut::new(c.body_mut(), m, b.cols()).unwrap();
    gemm_int8(ctx, a, b, view, Accum::Overwrite, &Epilogue::new()).unwrap();
    c.check();
    c.body().to_vec()
}

fn check_chain(ctx: &Context, a: MatRef<'_, i8>, scales: &[f32], b: MatRef<'_>, group: usize) {
    let (m, k, n) = (a.rows(), a.cols(), b.cols());
    let packed = PackedWeights::pack_as(ctx, b, WeightFormat::Int4 { group }).unwrap();
    let stored = packed.unpack();
    let stored = row_major(&stored, k, n);
    let mut expected = vec![0.0; m * n];
    let mut magnitude = vec![0.0; m * n];
    for (at, (sum, of_groups)) in expected.iter_mut().zip(&mut magnitude).enumerate() {
        let (i, j, scale) = (at / n, at % n, f64::from(scales[at / n]));
        for first in (0..k).step_by(group) {
            let rows = first..(first + group).min(k);
            let of_group: f64 = rows.map(|p| f64::from(a.at(i, p)) * f64::from(stored.at(p, j))).sum();
            *sum += scale * of_group;
            *of_groups += (scale * of_group).abs();
        }
    }
    let c = product(ctx, Int8Rows::Given { values: a.into(), scales }, m, &packed);
    assert_within(&c, &expected, |at| gamma(2 * k.div_ceil(group) + 3) * magnitude[at]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]

    /// Integers up to ±128 in rows of either order, groups that end within a word and blocks of K of several groups.
    #[test]
    fn the_error_is_that_of_a_chain_of_groups(
        (m, n, k) in (straddle(&[2, 6, 8, 48]), straddle(&[4, 12, 16, 48]), straddle(&[1, 8, 16, 33, 64])),
        (group, column_major) in (prop_oneof![Just(8usize), Just(16), Just(32)], any::<bool>()),
        seed in any::<u64>(),
    ) {
        let values: Vec<i8> = uniform(m * k, seed).iter().map(|x| (x * 128.0).floor() as i8).collect();
        let strides = if column_major { (1, m) } else { (k, 1) };
        let a = MatRef::with_strides(&values, m, k, strides.0, strides.1).unwrap();
        let b = uniform(k * n, seed ^ 1);
        let scales: Vec<f32> = (0..m).map(|i| 1.0 + i as f32 / 8.0).collect();
        for_each_isa(|ctx| for ctx in [*ctx, ctx.blocking(TINY)] {
            check_chain(&ctx, a, &scales, row_major(&b, k, n), group);
        });
    }

    #[test]
    fn bits_depend_neither_on_the_number_of_rows_nor_on_threads(
        (m, n, k) in (1usize..60, 1usize..420, 0usize..120),
        seed in any::<u64>(),
    ) {
        let (a, b) = (uniform(m * k, seed), uniform(k * n, seed ^ 1));
        let (a, b) = (row_major(&a, m, k), row_major(&b, k, n));
        // One row goes through blocks of K in another order than several.
        for_each_isa(|ctx| for ctx in &[*ctx, ctx.blocking(TINY)] {
            let packed = PackedWeights::pack_as(ctx, b, WeightFormat::Int4 { group: 32 }).unwrap();
            let all = product(ctx, Int8Rows::Quantise(a), m, &packed);
            for (first, rows) in [(0, 1), (m / 2, 1), (m / 3, (m - m / 3).min(2)), (0, m.min(5))] {
                let part = product(ctx, Int8Rows::Quantise(a.sub(first..first + rows, 0..k)), rows, &packed);
                assert_same_bits(&part, &all[first * n..(first + rows) * n]);
            }
        });
    }
}

/// Large enough that several threads get work, by rows and by columns; on tiles vectors compute it, with the same bits.
#[test]
fn threads_and_tiles_do_not_change_a_bit() {
    for (m, n, k) in [(100, 300, 260), (2, 2000, 1200)] {
        let (a, b) = (uniform(m * k, 1), uniform(k * n, 2));
        let a = Int8Rows::Quantise(row_major(&a, m, k));
        let check = |ctx: &Context| {
            let packed =
                PackedWeights::pack_as(ctx, row_major(&b, k, n), WeightFormat::Int4 { group: 32 }).unwrap();
            let alone = product(ctx, a, m, &packed);
            for threads in [2, 3, 5] {
                let ctx = ctx.threads(NonZeroUsize::new(threads).unwrap());
                assert_same_bits(&product(&ctx, a, m, &packed), &alone);
            }
            alone
        };
        for_each_isa(|ctx| drop(check(ctx)));
        if let Some(isa) = crate::testing::amx() {
            let on_tiles = check(&Context::with_isa(isa));
            let vectors = crate::Isa::new(isa.vectors()).unwrap();
            assert_same_bits(&on_tiles, &check(&Context::with_isa(vectors)));
        }
    }
}

/// One group of 8·127·(−7) and the like: the sums that weigh most, and rows that are no numbers.
#[test]
fn extremes_are_exact_and_what_is_not_finite_is_nan() {
    for_each_isa(|ctx| {
        let b = [7.0, -7.0].repeat(40);
        let packed =
            PackedWeights::pack_as(ctx, row_major(&b, 40, 2), WeightFormat::Int4 { group: 8 }).unwrap();
        for value in [127i8, -128] {
            let values = [value; 40];
            let a = MatRef::new(&values, 1, 40).unwrap();
            let c = product(ctx, Int8Rows::Given { values: a.into(), scales: &[0.5] }, 1, &packed);
            let expected = 20.0 * f32::from(value) * 7.0;
            assert_eq!(c, [expected, -expected]);
        }
        let mut a = [1.0; 80];
        a[3] = f32::INFINITY;
        let c = product(ctx, Int8Rows::Quantise(row_major(&a, 2, 40)), 2, &packed);
        assert!(c[0].is_nan() && c[1].is_nan() && c[2].is_finite());
    });
}

#[test]
fn the_epilogue_is_that_of_every_product() {
    let (m, n, k) = (7, 37, 40);
    let (a, b) = (uniform(m * k, 1), uniform(k * n, 2));
    let (old, residual, bias) = (uniform(m * n, 3), uniform(m * n, 4), uniform(n, 5));
    let a = Int8Rows::Quantise(row_major(&a, m, k));
    let epilogue = Epilogue::new().scale(0.5).bias(&bias).activation(Activation::Relu);
    let epilogue = epilogue.residual(row_major(&residual, m, n));
    for_each_isa(|ctx| {
        let packed =
            PackedWeights::pack_as(ctx, row_major(&b, k, n), WeightFormat::Int4 { group: 16 }).unwrap();
        let plain = product(ctx, a, m, &packed);
        let mut c = old.clone();
        gemm_int8(ctx, a, &packed, MatMut::new(&mut c, m, n).unwrap(), Accum::Add, &epilogue).unwrap();
        let of = |at: usize| (plain[at] * 0.5 + old[at] + bias[at % n]).max(0.0) + residual[at];
        assert_same_bits(&c, &(0..m * n).map(of).collect::<Vec<f32>>());
    });
}

#[test]
fn unsigned_rows_and_raw_sums_are_refused() {
    let ctx = Context::with_isa(crate::Isa::scalar());
    let packed =
        PackedWeights::pack_as(&ctx, row_major(&[1.0; 8], 8, 1), WeightFormat::Int4 { group: 8 }).unwrap();
    let bytes = [1u8; 8];
    let values = MatRef::new(&bytes, 1, 8).unwrap();
    let a = Int8Rows::Given { values: Integers::Unsigned { values, zero_points: &[1] }, scales: &[1.0] };
    let mut c = [7.0];
    let view = MatMut::new(&mut c, 1, 1).unwrap();
    let error = gemm_int8(&ctx, a, &packed, view, Accum::Overwrite, &Epilogue::new()).unwrap_err();
    assert_eq!(error.to_string(), "a is unsigned, expected signed beside int4 weights");
    assert_eq!(c, [7.0]);
    let mut sums = [7];
    let values = MatRef::new(&[1i8; 8], 1, 8).unwrap();
    let view = MatMut::new(&mut sums, 1, 1).unwrap();
    let error = gemm_int8_sums(&ctx, values, &packed, view, Accum::Overwrite).unwrap_err();
    assert_eq!(error.to_string(), "b.format is Int4 { group: 8 }, expected Int8");
    assert_eq!(sums, [7]);
}

/// Integers of 4 bits are 15 in their word and rows at the end of their range: sixteen such products are all that a sum of 16 bits holds.
#[test]
fn the_largest_products_do_not_overflow_on_their_way() {
    let (m, k, n) = (7, 160, 20);
    let ends: Vec<i8> = (0..m * k).map(|at| if at / k % 2 == 0 { -128 } else { 127 }).collect();
    let b: Vec<f32> = (0..k * n).map(|at| if at % n % 3 == 0 { -1.0 } else { 1.0 }).collect();
    for_each_isa(|ctx| {
        for group in [8, 32, 80, 160] {
            check_chain(ctx, MatRef::new(&ends, m, k).unwrap(), &[1.0; 7], row_major(&b, k, n), group);
        }
    });
}
