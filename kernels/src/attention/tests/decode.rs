//! Decoding from caches: the bits of the causal pass, whatever the parts, the beams and the threads.

use std::num::NonZeroUsize;

use super::*;
use crate::attention::cache::{Cache, CacheLayout, CacheMut};
use crate::testing::assert_same_bits;

/// A cache that owns its buffers; NaN where nothing was written.
pub(super) struct Owned {
    layout: CacheLayout,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Owned {
    pub(super) fn new(layout: CacheLayout) -> Owned {
        let [keys, values] = layout.sizes().unwrap().map(|len| vec![f32::NAN; len]);
        Owned { layout, keys, values }
    }

    pub(super) fn append(
        &mut self,
        sequence: usize,
        position: usize,
        case: &Case,
        keys: std::ops::Range<usize>,
    ) {
        let Shape { kv_heads, seq_k, dim, v_dim, .. } = case.shape;
        let part = |data: &[f32], dim: usize| {
            data[sequence * seq_k * kv_heads * dim..][keys.start * kv_heads * dim..keys.end * kv_heads * dim]
                .to_vec()
        };
        let (k, v) = (part(&case.data.k, dim), part(&case.data.v, v_dim));
        let view = |data, dim| {
            HeadsRef::new(data, HeadsLayout::batch_seq_heads(1, keys.len(), kv_heads, dim)).unwrap()
        };
        let mut cache = CacheMut::new(self.layout, &mut self.keys, &mut self.values).unwrap();
        cache.append(sequence, position, (view(&k, dim), view(&v, v_dim)), 0).unwrap();
    }

    pub(super) fn view(&self) -> Cache<'_> {
        Cache::new(self.layout, &self.keys, &self.values).unwrap()
    }
}

pub(super) fn cases() -> Vec<Case> {
    let shapes = [
        (2, 4, 4, 5, 8, 8),
        (2, 4, 2, 130, 12, 20),
        (3, 2, 1, 300, 64, 64),
        (2, 6, 3, 64, 7, 3),
        (1, 1, 1, 1500, 16, 70),
        // Twelve rows read each panel, more than one product takes.
        (1, 4, 1, 300, 9, 8),
    ];
    let shape = |(batch, heads, kv_heads, seq, dim, v_dim)| Shape {
        batch,
        heads,
        kv_heads,
        seq_q: seq,
        seq_k: seq,
        dim,
        v_dim,
    };
    let mut cases = shapes.map(|dims| Case { causal: Some(0), ..Case::new(shape(dims)) }).to_vec();
    for case in &mut cases[1..4] {
        case.slopes = ((1..=case.shape.heads).map(|h| 0.5f32.powi(h as i32)).collect(), 0);
    }
    cases
}

/// `data` [batch, seq, width], rows `keys` of each sequence.
pub(super) fn rows_of(data: &[f32], seq: usize, width: usize, rows: std::ops::Range<usize>) -> Vec<f32> {
    data.chunks_exact(seq * width).flat_map(|s| s[rows.start * width..rows.end * width].to_vec()).collect()
}

pub(super) fn run(ctx: &Context, case: &Case, queries: usize, parts: &[Part<'_>]) -> (Vec<f32>, Vec<f32>) {
    let Shape { batch, heads, seq_q, seq_k, dim, v_dim, .. } = case.shape;
    let q = rows_of(&case.data.q, seq_q, heads * dim, seq_q - queries..seq_q);
    let mut out = Guarded::poisoned(batch * queries * heads * v_dim);
    let mut lse = Guarded::poisoned(batch * heads * queries);
    let bias: Vec<f32> = (0..case.bias_heads)
        .flat_map(|h| &case.data.bias[(h * seq_q + seq_q - queries) * seq_k..(h + 1) * seq_q * seq_k])
        .copied()
        .collect();
    let spec = case.spec();
    let bias = spec.mask.bias.map(|all| Bias { values: &bias, ..all });
    // Of a pass over the last queries alone; that a step stands at the end is understood.
    let causal = spec.mask.causal.filter(|causal| causal.offset == 0);
    decode(
        ctx,
        HeadsRef::new(&q, HeadsLayout::batch_seq_heads(batch, queries, heads, dim)).unwrap(),
        parts,
        &AttentionSpec { mask: Mask { bias, causal, ..spec.mask }, ..spec },
        HeadsMut::new(out.body_mut(), HeadsLayout::batch_seq_heads(batch, queries, heads, v_dim)).unwrap(),
        lse.body_mut(),
    )
    .unwrap();
    out.check();
    lse.check();
    (out.body().to_vec(), lse.body().to_vec())
}

#[test]
fn the_last_rows_of_the_causal_pass_bit_for_bit() {
    are_the_last_rows(cases());
}

#[test]
fn the_last_of_a_hundred_thousand_positions() {
    let case = Case::new(shape(1, 1, 2, 100_000, 8));
    are_the_last_rows(vec![Case { causal: Some(99_998), ..case }]);
}

/// Decoding gives the last rows of the full pass of each case, with the keys in one part and in two, on several threads.
pub(super) fn are_the_last_rows(cases: Vec<Case>) {
    for case in cases {
        let Shape { batch, heads, kv_heads, seq_q, seq_k, dim, v_dim } = case.shape;
        let capacity = seq_k.next_multiple_of(64);
        let layout = CacheLayout { sequences: batch, kv_heads, capacity, dim, v_dim };
        // The keys in three appends, and as a prefix with a tail of its own.
        let (mut whole, mut head, mut tail) = (Owned::new(layout), Owned::new(layout), Owned::new(layout));
        let cut = seq_k / 3;
        for b in 0..batch {
            whole.append(b, 0, &case, 0..1);
            whole.append(b, 1, &case, 1..cut.max(1));
            whole.append(b, cut.max(1), &case, cut.max(1)..seq_k);
            head.append(b, 0, &case, 0..cut);
            tail.append(b, 0, &case, cut..seq_k);
        }
        let sequences: Vec<usize> = (0..batch).collect();
        let lengths = |n: usize| vec![n; batch];
        let (all, before, after) = (lengths(seq_k), lengths(cut), lengths(seq_k - cut));
        let one = [Part { cache: whole.view(), sequences: &sequences, lengths: &all }];
        let two = [
            Part { cache: head.view(), sequences: &sequences, lengths: &before },
            Part { cache: tail.view(), sequences: &sequences, lengths: &after },
        ];
        everywhere(|ctx| {
            let full = case.forward(ctx);
            for queries in [1, 3.min(seq_q)] {
                let out = rows_of(&full.0, seq_q, heads * v_dim, seq_q - queries..seq_q);
                let lse = rows_of(&full.1, seq_q, 1, seq_q - queries..seq_q);
                for threads in [1, 2, 3] {
                    let ctx = ctx.threads(NonZeroUsize::new(threads).unwrap());
                    for parts in [&one[..], &two] {
                        let step = run(&ctx, &case, queries, parts);
                        assert_same_bits(&step.0, &out);
                        assert_same_bits(&step.1, &lse);
                    }
                }
            }
        });
    }
}

#[test]
fn beams_read_the_rows_that_they_name() {
    let case = Case { causal: Some(0), ..Case::new(shape(3, 2, 300, 300, 8)) };
    let layout = CacheLayout { sequences: 3, kv_heads: 2, capacity: 320, dim: 8, v_dim: 8 };
    let mut cache = Owned::new(layout);
    (0..3).for_each(|b| cache.append(b, 0, &case, 0..300));
    // Three blocks of keys, two, and one.
    let lengths = [300, 200, 33];
    everywhere(|ctx| {
        let beams = [2, 0, 2];
        let together =
            run(ctx, &case, 1, &[Part { cache: cache.view(), sequences: &beams, lengths: &lengths }]);
        for (b, &beam) in beams.iter().enumerate() {
            let alone = [Part { cache: cache.view(), sequences: &[beam; 3], lengths: &[lengths[b]; 3] }];
            let alone = run(ctx, &case, 1, &alone);
            assert_same_bits(&together.0[b * 16..][..16], &alone.0[b * 16..][..16]);
            assert_same_bits(&together.1[b * 2..][..2], &alone.1[b * 2..][..2]);
        }
        let nothing =
            run(ctx, &case, 1, &[Part { cache: cache.view(), sequences: &beams, lengths: &[0; 3] }]);
        assert!(nothing.0.iter().all(|&x| x == 0.0), "no key");
        let part = Part { cache: cache.view(), sequences: &beams, lengths: &lengths };
        assert!(run(ctx, &case, 0, &[part]).0.is_empty(), "no query");
        assert!(nothing.1.iter().all(|&x| x == f32::NEG_INFINITY));
    });
}

#[test]
fn misfits_are_named() {
    let layout = CacheLayout { sequences: 2, kv_heads: 2, capacity: 64, dim: 4, v_dim: 4 };
    assert!(CacheLayout { capacity: 60, ..layout }.sizes().is_err());
    let mut cache = Owned::new(layout);
    let case = Case::new(shape(2, 2, 3, 3, 4));
    cache.append(0, 61, &case, 0..3);
    let k = HeadsRef::new(&case.data.k, case.layouts()[1]).unwrap();
    let mut writer = CacheMut::new(layout, &mut cache.keys, &mut cache.values).unwrap();
    for (sequence, position, from) in [(2, 0, 0), (0, 62, 0), (0, 0, 2)] {
        assert!(writer.append(sequence, position, (k, k), from).is_err(), "{sequence} {position} {from}");
    }
    let ctx = Context::with_isa(crate::Isa::scalar());
    let out_layout = HeadsLayout::batch_seq_heads(2, 3, 2, 4);
    let attempt = |sequences: &[usize], lengths: &[usize], lse: usize| {
        let mut out = vec![0.0; 48];
        let out = HeadsMut::new(&mut out, out_layout).unwrap();
        let part = Part { cache: cache.view(), sequences, lengths };
        let error = decode(&ctx, k, &[part], &AttentionSpec::scaled(4), out, &mut vec![0.0; lse]);
        error.map_err(|error| error.to_string())
    };
    assert!(attempt(&[0, 2], &[1, 1], 12).unwrap_err().contains("sequences"));
    assert!(attempt(&[0, 1], &[1, 65], 12).unwrap_err().contains("lengths"));
    assert!(attempt(&[0], &[1, 1], 12).unwrap_err().contains("sequences"));
    assert!(attempt(&[0, 1], &[1, 1], 11).unwrap_err().contains("lse"));
    let mut out = vec![0.0; 48];
    let out = HeadsMut::new(&mut out, out_layout).unwrap();
    let part = Part { cache: cache.view(), sequences: &[0, 1], lengths: &[1, 1] };
    let spec =
        AttentionSpec::scaled(4).with_mask(Mask::none().with_alibi(Alibi { slopes: &[0.5], offset: 0 }));
    let error = decode(&ctx, k, &[part], &spec, out, &mut [0.0; 12]).unwrap_err();
    assert!(error.to_string().contains("mask.alibi: slopes is 1, expected 2"), "{error}");
    cache_is_required(&ctx, k, out_layout);
}

fn cache_is_required(ctx: &Context, q: HeadsRef<'_>, layout: HeadsLayout) {
    let mut out = vec![0.0; 48];
    let out = HeadsMut::new(&mut out, layout).unwrap();
    assert!(
        decode(ctx, q, &[], &AttentionSpec::scaled(4), out, &mut [0.0; 12])
            .unwrap_err()
            .to_string()
            .contains("parts")
    );
}
