//! Weights in fewer bits than f32.

use super::*;

const FORMATS: [WeightFormat; 5] = [
    WeightFormat::F32,
    WeightFormat::Bf16,
    WeightFormat::Int8,
    WeightFormat::Int4 { group: 8 },
    WeightFormat::Int4 { group: 32 },
];

fn product(ctx: &Context, a: MatRef<'_>, b: &PackedWeights, epilogue: &Epilogue<'_>) -> Vec<f32> {
    let mut c = Guarded::poisoned(a.rows() * b.cols());
    let view = MatMut::new(c.body_mut(), a.rows(), b.cols()).unwrap();
    gemm_packed(ctx, a, b, view, Accum::Overwrite, epilogue).unwrap();
    c.check();
    c.body().to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// `γ_{2k+4}` with the elements that are stored: a chain over a group, the groups and the blocks make at most k + 1
    /// multiply-adds, of two roundings each where the CPU fuses none, a scaled group one more, scale and bias two.
    #[test]
    fn the_error_is_within_gamma_k_of_the_stored_weights(
        (m, n, k) in (straddle(&[2, 6, 8, 9]), straddle(&[4, 8, 16, 48]), straddle(&[1, 7, 8, 32])),
        order in 0u8..4,
        (scale, seed) in (prop_oneof![Just(1.0f32), -2.0f32..2.0], any::<u64>()),
    ) {
        let a = Matrix::new(m, k, order, |len| uniform(len, seed));
        let b = Matrix::new(k, n, 3 - order, |len| uniform(len, seed ^ 1));
        let bias = uniform(n, seed ^ 2);
        for_each_isa(|ctx| {
            for (ctx, format) in FORMATS.into_iter().flat_map(|format| [(*ctx, format), (ctx.blocking(TINY), format)]) {
                let packed = PackedWeights::pack_as(&ctx, b.view(), format).unwrap();
                let stored = packed.unpack();
                let stored = row_major(&stored, k, n);
                let magnitude = reference::gemm_abs(a.view(), stored);
                let expected: Vec<f64> = reference::gemm(a.view(), stored).into_iter().zip(bias.iter().cycle())
                    .map(|(x, &bias)| f64::from(scale) * x + f64::from(bias)).collect();
                let bound = |i: usize| gamma(2 * k + 4)
                    * (f64::from(scale).abs() * magnitude[i] + f64::from(bias[i % n]).abs());
                assert_within(&product(&ctx, a.view(), &packed, &Epilogue::new().scale(scale).bias(&bias)), &expected, bound);
            }
        });
    }

    #[test]
    fn what_is_stored_is_within_the_bound_of_its_format((n, k) in (straddle(&[4, 16]), straddle(&[7, 8, 32])), seed in any::<u64>()) {
        let b: Vec<f32> = uniform(k * n, seed).iter().zip(uniform(k * n, seed ^ 1)).map(|(x, y)| x * (20.0 * y).exp2()).collect();
        let b = row_major(&b, k, n);
        let largest = |rows: std::ops::Range<usize>, j| rows.map(|p| f64::from(b.at(p, j).abs())).fold(0.0, f64::max);
        for_each_isa(|ctx| for format in FORMATS {
            let packed = PackedWeights::pack_as(&ctx.blocking(TINY), b, format).unwrap();
            let block = packed.depth();
            assert_within(&packed.unpack(), &elements(b).into_iter().map(f64::from).collect::<Vec<_>>(), |i| {
                let (p, j) = (i / n, i % n);
                match format {
                    WeightFormat::F32 => 0.0,
                    WeightFormat::Bf16 => f64::from(b.at(p, j).abs()) / 256.0,
                    WeightFormat::Int8 => largest(0..k, j) / 254.0 * (1.0 + 1.0 / 16384.0),
                    WeightFormat::Int4 { group } => {
                        let first = p / block * block + p % block / group * group;
                        largest(first..(first + group).min(k), j) / 14.0 * (1.0 + 1.0 / 16384.0)
                    }
                }
            });
        });
    }

    #[test]
    fn bits_depend_neither_on_the_number_of_rows_nor_on_threads(
        (m, n, k) in (1usize..24, 1usize..420, 0usize..80),
        seed in any::<u64>(),
    ) {
        let (a, b) = (uniform(m * k, seed), uniform(k * n, seed ^ 1));
        let (a, b) = (row_major(&a, m, k), row_major(&b, k, n));
        let columns = elements(a.t());
        for_each_isa(|ctx| for format in FORMATS {
            let ctx = &ctx.blocking(Blocking { kc: 33, ..TINY });
            let packed = PackedWeights::pack_as(ctx, b, format).unwrap();
            let all = product(ctx, a, &packed, &Epilogue::new());
            for (first, rows) in [(0, 1), (m / 2, 1), (m / 3, (m - m / 3).min(2)), (0, m.min(5))] {
                let part = product(ctx, a.sub(first..first + rows, 0..k), &packed, &Epilogue::new());
                assert_same_bits(&part, &all[first * n..(first + rows) * n]);
            }
            assert_same_bits(&product(ctx, row_major(&columns, k, m).t(), &packed, &Epilogue::new()), &all);
            let threads = ctx.threads(NonZeroUsize::new(3).unwrap());
            assert_same_bits(&product(&threads, a, &packed, &Epilogue::new()), &all);
        });
    }
}

/// Each column reaches the largest integer in each group, so that every scale is 1.
#[test]
fn integers_are_exact_in_every_format() {
    let (m, n, k) = (7, 37, 200);
    let a = integers(m * k, 100, 1);
    let a = row_major(&a, m, k);
    for_each_isa(|ctx| {
        for format in FORMATS {
            let largest = match format.storage() {
                Storage::Int4 => 7,
                _ => 127,
            };
            let mut b = integers(k * n, largest, 2);
            for row in b.chunks_exact_mut(n).step_by(8) {
                row.fill(largest as f32);
            }
            let packed = PackedWeights::pack_as(ctx, row_major(&b, k, n), format).unwrap();
            assert_same_bits(&packed.unpack(), &b);
            let expected = reference::gemm(a, row_major(&b, k, n));
            assert_within(&product(ctx, a, &packed, &Epilogue::new()), &expected, |_| 0.0);
        }
    });
}

#[test]
fn bf16_weights_have_the_bits_of_their_elements_in_f32() {
    let (m, n, k) = (8, 50, 1100);
    let a = uniform(m * k, 1);
    let a = row_major(&a, m, k);
    let b: Vec<f32> = uniform(k * n, 2).iter().map(|x| f32::from_bits(x.to_bits() & 0xffff_0000)).collect();
    let b = row_major(&b, k, n);
    for_each_isa(|ctx| {
        let packed = PackedWeights::pack_as(ctx, b, WeightFormat::Bf16).unwrap();
        assert_same_bits(&packed.unpack(), b.as_slice().unwrap());
        assert_same_bits(&product(ctx, a, &packed, &Epilogue::new()), &overwrite(ctx, a, b));
    });
}

#[test]
fn an_infinity_and_a_nan_pass_through_bf16() {
    let b = [f32::INFINITY, 1.0, f32::NAN, 2.0, 3.0, 4.0];
    for_each_isa(|ctx| {
        let packed = PackedWeights::pack_as(ctx, row_major(&b, 2, 3), WeightFormat::Bf16).unwrap();
        let c = product(ctx, row_major(&[1.0, 1.0], 1, 2), &packed, &Epilogue::new());
        assert!(c[0] == f32::INFINITY && c[1] == 4.0 && c[2].is_nan());
    });
}

#[test]
fn a_format_that_cannot_hold_the_weights_is_an_error() {
    let ctx = Context::with_isa(crate::Isa::scalar());
    let refused = |b: &[f32], format| {
        PackedWeights::pack_as(&ctx, row_major(b, 1, b.len()), format).unwrap_err().to_string()
    };
    for group in [0, 12] {
        let error = refused(&[1.0], WeightFormat::Int4 { group });
        assert_eq!(error, format!("format.group is {group}, expected a positive multiple of 8"));
    }
    for wrong in [f32::NAN, f32::INFINITY, f32::MAX] {
        let error = refused(&[1.0, wrong], WeightFormat::Int8);
        assert!(error.starts_with(&format!("b is {wrong} at (0, 1), expected finite")), "{error}");
        assert!(PackedWeights::pack_as(&ctx, row_major(&[wrong], 1, 1), WeightFormat::Bf16).is_ok());
    }
}

#[test]
fn repacking_keeps_the_format_and_the_old_weights_stand_when_it_fails() {
    let ctx = Context::with_isa(crate::Isa::scalar());
    let mut packed =
        PackedWeights::pack_as(&ctx, row_major(&[1.0, 127.0], 2, 1), WeightFormat::Int8).unwrap();
    packed.repack(&ctx, row_major(&[127.0, 3.0], 1, 2)).unwrap();
    assert_eq!((packed.format(), packed.rows(), packed.cols()), (WeightFormat::Int8, 1, 2));
    assert!(packed.repack(&ctx, row_major(&[f32::NAN], 1, 1)).is_err());
    assert_eq!((packed.rows(), packed.cols(), packed.unpack()[0]), (1, 2, 127.0));
}

/// Broadcasts of one element: the views are in bounds, what they would become is not.
#[test]
fn sizes_that_overflow_are_errors_before_anything_is_read_or_allocated() {
    let ctx = Context::with_isa(crate::Isa::best());
    let one = [1.0];
    for (k, n) in [(usize::MAX, 1), (1, usize::MAX), (usize::MAX / 2, 4), (1 << 40, 1 << 40), (1 << 62, 3)] {
        let b = MatRef::with_strides(&one, k, n, 0, 0).unwrap();
        for format in FORMATS.into_iter().chain([WeightFormat::Int4 { group: 1 << 62 }]) {
            let mut packed = PackedWeights::pack_as(&ctx, row_major(&one, 1, 1), format).unwrap();
            let refused = ShapeError::Overflow { argument: "b" };
            assert_eq!(packed.repack(&ctx, b), Err(refused.clone()), "{k} × {n} as {format:?}");
            assert_eq!(PackedWeights::pack_as(&ctx, b, format).unwrap_err(), refused);
            assert_eq!((packed.rows(), packed.unpack()[0].round()), (1, 1.0));
        }
    }
}

/// Threads share the packing of what is large enough, also where there are fewer panels than threads.
#[test]
fn threads_pack_what_one_does() {
    for_each_isa(|ctx| {
        for (k, n, order) in [(530, 777, 0), (777, 530, 1), (60_000, 5, 0), (270_000, 1, 1)] {
            let b = Matrix::new(k, n, order, |len| uniform(len, 1));
            let alone = PackedWeights::pack(ctx, b.view()).unwrap();
            assert_eq!(alone.unpack(), elements(b.view()), "{k}x{n}");
            for threads in [2, 3, 8] {
                let ctx = ctx.threads(NonZeroUsize::new(threads).unwrap());
                assert_eq!(
                    PackedWeights::pack(&ctx, b.view()).unwrap().unpack(),
                    alone.unpack(),
                    "{k}x{n}, {threads}"
                );
            }
        }
    });
}
