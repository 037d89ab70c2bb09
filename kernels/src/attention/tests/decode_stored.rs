//! Decoding from caches in fewer bits: the bits of the rounded numbers in bf16, the contract's bound in int8.

use std::num::NonZeroUsize;
use std::ops::Range;

use super::decode::{cases, rows_of, run};
use super::decode_masks::masked;
use super::*;
use crate::attention::cache::{
    Cache, CacheFormat, CacheLayout, CacheMut, StoredBuffers, StoredBuffersMut, StoredSizes,
};
use crate::gemm::microkernel::Storage;
use crate::gemm::quantise::{encode, scale_of};
use crate::testing::{UNIT_ROUNDOFF as U, assert_same_bits};

/// A cache that owns its buffers; garbage where nothing was written.
struct Owned {
    layout: CacheLayout,
    format: CacheFormat,
    words: [Vec<u32>; 2],
    scales: [Vec<f32>; 2],
}

impl Owned {
    fn new(layout: CacheLayout, format: CacheFormat) -> Owned {
        let StoredSizes { keys, values, scales } = layout.stored_sizes(format).unwrap();
        let words = [keys, values].map(|len| vec![0x7fc1_7fc1; len]);
        Owned { layout, format, words, scales: [(); 2].map(|()| vec![f32::NAN; scales]) }
    }

    fn append(&mut self, case: &Case, position: usize, keys: Range<usize>) {
        let [_, k_layout, v_layout, _] = case.layouts();
        let view = |data, layout| HeadsRef::new(data, layout).unwrap().positions(keys.clone());
        let (k, v) = (view(&case.data.k, k_layout), view(&case.data.v, v_layout));
        let ([keys, values], [key_scales, value_scales]) = (&mut self.words, &mut self.scales);
        let buffers = StoredBuffersMut { keys, values, key_scales, value_scales };
        let mut cache = CacheMut::stored(self.layout, self.format, buffers).unwrap();
        (0..case.shape.batch).for_each(|b| cache.append(b, position, (k, v), b).unwrap());
    }

    fn view(&self) -> Cache<'_> {
        let ([keys, values], [key_scales, value_scales]) = (&self.words, &self.scales);
        let buffers = StoredBuffers { keys, values, key_scales, value_scales };
        Cache::stored(self.layout, self.format, buffers).unwrap()
    }
}

/// What a cache of that format makes of `data`, whose rows are one head of one position; checks the stated bound.
fn rounded(data: &[f32], format: CacheFormat, dim: usize) -> Vec<f32> {
    let mut rounded = data.to_vec();
    for row in rounded.chunks_exact_mut(dim) {
        let max = row.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        for x in row {
            let (before, bound) = (
                *x,
                match format {
                    CacheFormat::Bf16 => f64::from(x.abs()) / 256.0,
                    CacheFormat::Int8 => f64::from(max) / 254.0 * (1.0 + 1.0 / 16384.0),
                },
            );
            *x = match format {
                CacheFormat::Bf16 => f32::from_bits(encode(Storage::Bf16, *x, 1.0) << 16),
                CacheFormat::Int8 => {
                    let scale = scale_of(max, 127);
                    (encode(Storage::Int8, *x, scale) as i32 - 128) as f32 * scale
                }
            };
            assert!((f64::from(*x) - f64::from(before)).abs() <= bound, "{before} became {x}");
        }
    }
    rounded
}

/// The same case with the keys and values that the cache holds.
fn as_stored(case: &Case, format: CacheFormat) -> Case {
    let Shape { dim, v_dim, .. } = case.shape;
    let (k, v) = (rounded(&case.data.k, format, dim), rounded(&case.data.v, format, v_dim));
    Case { data: Data { k, v, ..case.data.clone() }, ..case.clone() }
}

/// The outputs of one and of three queries, for several threads, with the keys in one part and in two, all of which have
/// the same bits.
fn decoded(ctx: &Context, case: &Case, format: CacheFormat) -> Vec<(usize, Vec<f32>, Vec<f32>)> {
    let Shape { batch, kv_heads, seq_k, dim, v_dim, .. } = case.shape;
    let layout = CacheLayout { sequences: batch, kv_heads, capacity: seq_k.next_multiple_of(64), dim, v_dim };
    let [mut whole, mut head, mut tail] = [(); 3].map(|()| Owned::new(layout, format));
    let cut = seq_k / 3;
    whole.append(case, 0, 0..1);
    whole.append(case, 1, 1..seq_k);
    head.append(case, 0, 0..cut);
    tail.append(case, 0, cut..seq_k);
    let sequences: Vec<usize> = (0..batch).collect();
    let [all, before, after] = [seq_k, cut, seq_k - cut].map(|n| vec![n; batch]);
    let part = |cache: &'static str, lengths| {
        let cache = match cache {
            "whole" => whole.view(),
            "head" => head.view(),
            _ => tail.view(),
        };
        Part { cache, sequences: &sequences, lengths }
    };
    let one = [part("whole", &all[..])];
    let two = [part("head", &before[..]), part("tail", &after[..])];
    let results = [1, 3].map(|queries| {
        let first = run(ctx, case, queries, &one);
        for threads in [1, 2, 3] {
            let ctx = ctx.threads(NonZeroUsize::new(threads).unwrap());
            for parts in [&one[..], &two] {
                let again = run(&ctx, case, queries, parts);
                assert_same_bits(&again.0, &first.0);
                assert_same_bits(&again.1, &first.1);
            }
        }
        (queries, first.0, first.1)
    });
    results.to_vec()
}

#[test]
fn a_bf16_cache_has_the_bits_of_the_full_pass_over_rounded_keys_and_values() {
    // Every third: one of each kind.
    for case in cases().into_iter().chain(masked().into_iter().step_by(3)) {
        let Shape { heads, seq_k, v_dim, .. } = case.shape;
        let stored = as_stored(&case, CacheFormat::Bf16);
        everywhere(|ctx| {
            let full = stored.forward(ctx);
            for (queries, out, lse) in decoded(ctx, &case, CacheFormat::Bf16) {
                let rows = seq_k - queries..seq_k;
                assert_same_bits(&out, &rows_of(&full.0, seq_k, heads * v_dim, rows.clone()));
                assert_same_bits(&lse, &rows_of(&full.1, seq_k, 1, rows));
            }
        });
    }
}

/// Where bf16 is what is multiplied, the cache's words are read as such or by way of f32.
#[test]
fn a_bf16_cache_has_those_bits_where_bf16_is_multiplied() {
    for case in cases().into_iter().chain(masked()).step_by(4) {
        let Shape { heads, seq_k, v_dim, .. } = case.shape;
        let stored = as_stored(&case, CacheFormat::Bf16);
        tiles::for_each_precision(|ctx, _| {
            let full = stored.forward(ctx);
            for (queries, out, lse) in decoded(ctx, &case, CacheFormat::Bf16) {
                let rows = seq_k - queries..seq_k;
                assert_same_bits(&out, &rows_of(&full.0, seq_k, heads * v_dim, rows.clone()));
                assert_same_bits(&lse, &rows_of(&full.1, seq_k, 1, rows));
            }
        });
    }
}

#[test]
fn an_int8_cache_is_within_the_contract_of_its_numbers() {
    let dense = masked().into_iter().filter(|case| case.lists.is_empty()).step_by(2);
    for case in cases().into_iter().chain(dense) {
        let Shape { heads, seq_k, dim, v_dim, .. } = case.shape;
        let stored = as_stored(&case, CacheFormat::Int8);
        let exact = stored.naive::<f64, _>(|a, _| attention_forward(a));
        let naive = stored.naive::<f32, _>(|a, _| attention_forward(a));
        // A scale multiplies each score and each probability: one rounding more for each.
        let score =
            f64::from(stored.spec().scale) * largest(&stored.data.q) * largest(&stored.data.k) * dim as f64;
        let more = 2.0 * U * (1.0 + score);
        let bounds = [
            2.0 * worst(&naive.0, &exact.0) + floor(&exact.0) + more * largest(&stored.data.v),
            2.0 * worst(&naive.1, &exact.1) + floor(&exact.1) + more,
        ];
        everywhere(|ctx| {
            for (queries, out, lse) in decoded(ctx, &case, CacheFormat::Int8) {
                let rows = |x: &[f64], width: usize| -> Vec<f64> {
                    let sequences = x.chunks_exact(seq_k * width);
                    sequences.flat_map(|s| s[(seq_k - queries) * width..].to_vec()).collect()
                };
                assert_within(&out, &rows(&exact.0, heads * v_dim), |_| bounds[0]);
                assert_within(&lse, &rows(&exact.1, 1), |_| bounds[1]);
            }
        });
    }
}

#[test]
fn misfits_of_stored_caches_are_named() {
    let layout = CacheLayout { sequences: 1, kv_heads: 1, capacity: 64, dim: 4, v_dim: 5 };
    assert_eq!(
        layout.stored_sizes(CacheFormat::Bf16).unwrap(),
        StoredSizes { keys: 128, values: 1024, scales: 0 }
    );
    assert_eq!(
        layout.stored_sizes(CacheFormat::Int8).unwrap(),
        StoredSizes { keys: 64, values: 1024, scales: 64 }
    );
    let error = |keys: usize, scales: usize| {
        let (keys, values, scales) = (vec![0; keys], vec![0; 1024], vec![0.0; scales]);
        let buffers =
            StoredBuffers { keys: &keys, values: &values, key_scales: &scales, value_scales: &scales };
        Cache::stored(layout, CacheFormat::Int8, buffers).unwrap_err().to_string()
    };
    assert!(error(63, 64).contains("keys: words is 63, expected 64"));
    assert!(error(64, 0).contains("key_scales"));
    let mut case = Case::new(Shape { v_dim: 5, ..shape(1, 1, 2, 2, 4) });
    case.data.v[3] = f32::INFINITY;
    let mut cache = Owned::new(layout, CacheFormat::Int8);
    let before = cache.words.clone();
    let [_, k_layout, v_layout, _] = case.layouts();
    let k = HeadsRef::new(&case.data.k, k_layout).unwrap();
    let v = HeadsRef::new(&case.data.v, v_layout).unwrap();
    let ([keys, values], [key_scales, value_scales]) = (&mut cache.words, &mut cache.scales);
    let buffers = StoredBuffersMut { keys, values, key_scales, value_scales };
    let mut writer = CacheMut::stored(layout, CacheFormat::Int8, buffers).unwrap();
    let error = writer.append(0, 0, (k, v), 0).unwrap_err().to_string();
    assert!(error.contains("v is inf"), "{error}");
    assert_eq!(cache.words, before);
}
