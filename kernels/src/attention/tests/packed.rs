//! Packed sequences against the padded batch, bit by bit.

use super::*;
use crate::testing::assert_same_bits;

/// Queries and keys of each sequence.
const SEQUENCES: [[usize; 2]; 6] = [[5, 5], [0, 3], [130, 140], [4, 0], [1, 1], [200, 129]];

fn offsets(of: usize) -> Vec<usize> {
    let ends = SEQUENCES.iter().scan(0, |sum, lens| {
        *sum += lens[of];
        Some(*sum)
    });
    std::iter::once(0).chain(ends).collect()
}

/// The part of sequence `s` of a packed tensor with rows of `width`, padded by NaN to `most` positions: a NaN that is
/// read shows. Queries and gradients, whose padding is computed on, are padded by zeros.
fn padded(packed: &[f32], offsets: &[usize], width: usize, most: usize, padding: f32) -> Vec<f32> {
    let parts = offsets.windows(2).map(|pair| {
        let mut part = packed[pair[0] * width..pair[1] * width].to_vec();
        part.resize(most * width, padding);
        part
    });
    parts.collect::<Vec<_>>().concat()
}

fn kinds(heads: usize, kv_heads: usize) -> Vec<Case> {
    let (total_q, total_k) = (offsets(0)[6], offsets(1)[6]);
    let shape = Shape { batch: 1, heads, kv_heads, seq_q: total_q, seq_k: total_k, dim: 12, v_dim: 20 };
    let plain = Case::new(shape);
    let dropout = Dropout { p: 0.25, seed: 3, stream: 9 };
    vec![
        Case { causal: Some(0), ..plain.clone() },
        Case { window: Some(Window { offset: 1, left: 30, right: 4 }), ..plain.clone() },
        Case {
            slopes: ((0..heads).map(|h| 0.5 / (h + 1) as f32).collect(), 2),
            dropout: Some(ScoreDropout { dropout, first_sequence: 4 }),
            ..plain.clone()
        },
        plain,
    ]
}

/// Runs the packed case: out, lse, d_q, d_k, d_v.
fn run_packed(ctx: &Context, case: &Case) -> [Vec<f32>; 5] {
    let [q_layout, k_layout, v_layout, out_layout] = case.layouts();
    let (q_offsets, k_offsets) = (offsets(0), offsets(1));
    let sequences = Packed { q_offsets: &q_offsets, k_offsets: &k_offsets };
    let q = HeadsRef::new(&case.data.q, q_layout).unwrap();
    let k = HeadsRef::new(&case.data.k, k_layout).unwrap();
    let v = HeadsRef::new(&case.data.v, v_layout).unwrap();
    let lens = [case.data.d_out.len(), case.shape.rows().unwrap()];
    let [mut out, mut lse] = lens.map(Guarded::poisoned);
    let view = HeadsMut::new(out.body_mut(), out_layout).unwrap();
    forward_packed(ctx, &Inputs { q, k, v }, &sequences, &case.spec(), view, lse.body_mut()).unwrap();
    let [mut d_q, mut d_k, mut d_v] =
        [&case.data.q, &case.data.k, &case.data.v].map(|x| Guarded::poisoned(x.len()));
    let saved = Saved { q, k, v, out: HeadsRef::new(out.body(), out_layout).unwrap(), lse: lse.body() };
    let grads = Grads {
        d_q: HeadsMut::new(d_q.body_mut(), q_layout).unwrap(),
        d_k: HeadsMut::new(d_k.body_mut(), k_layout).unwrap(),
        d_v: HeadsMut::new(d_v.body_mut(), v_layout).unwrap(),
        d_bias: None,
    };
    let d_out = HeadsRef::new(&case.data.d_out, out_layout).unwrap();
    backward_packed(ctx, &saved, &sequences, d_out, &case.spec(), grads).unwrap();
    let all = [out, lse, d_q, d_k, d_v];
    all.iter().for_each(Guarded::check);
    all.map(|buffer| buffer.body().to_vec())
}

/// The same sequences as a padded batch.
fn as_batch(case: &Case, most_q: usize, most_k: usize) -> Case {
    let Shape { heads, kv_heads, dim, v_dim, .. } = case.shape;
    let (q_offsets, k_offsets) = (offsets(0), offsets(1));
    let data = Data {
        q: padded(&case.data.q, &q_offsets, heads * dim, most_q, 0.0),
        k: padded(&case.data.k, &k_offsets, kv_heads * dim, most_k, f32::NAN),
        v: padded(&case.data.v, &k_offsets, kv_heads * v_dim, most_k, f32::NAN),
        bias: Vec::new(),
        d_out: padded(&case.data.d_out, &q_offsets, heads * v_dim, most_q, 0.0),
    };
    let shape = Shape { batch: 6, seq_q: most_q, seq_k: most_k, ..case.shape };
    let lengths = Some(SEQUENCES.iter().map(|lens| lens[1]).collect());
    Case { shape, lengths, data, ..case.clone() }
}

/// Holds the packed case to the bits of the batch.
fn check_packed(ctx: &Context, case: &Case, threads: &[usize]) {
    let Shape { heads, kv_heads, dim, v_dim, .. } = case.shape;
    let expected = as_batch(case, 203, 150).run(ctx);
    // lse is [heads, seq_q] in both; the padded one has more columns.
    let mut lse = Vec::new();
    for (s, [queries, _]) in SEQUENCES.into_iter().enumerate() {
        for h in 0..heads {
            lse.extend_from_slice(&expected.lse[(s * heads + h) * 203..][..queries]);
        }
    }
    let cut = |padded: &[f32], of: usize, width: usize, most: usize| -> Vec<f32> {
        let part = |(s, lens): (usize, &[usize; 2])| &padded[s * most * width..][..lens[of] * width];
        SEQUENCES.iter().enumerate().map(part).collect::<Vec<_>>().concat()
    };
    let grads = &expected.grads;
    let expected = [
        cut(&expected.out, 0, heads * v_dim, 203),
        lse,
        cut(&grads.d_q, 0, heads * dim, 203),
        cut(&grads.d_k, 1, kv_heads * dim, 150),
        cut(&grads.d_v, 1, kv_heads * v_dim, 150),
    ];
    for &n in threads {
        let ctx = ctx.threads(std::num::NonZeroUsize::new(n).unwrap());
        for (actual, expected) in run_packed(&ctx, case).iter().zip(&expected) {
            assert_same_bits(actual, expected);
        }
    }
}

#[test]
fn packed_sequences_have_the_bits_of_the_padded_batch() {
    for (heads, kv_heads) in [(2, 2), (4, 1)] {
        for case in kinds(heads, kv_heads) {
            for_each_isa(|ctx| check_packed(ctx, &case, &[1, 2, 5, 20]));
        }
    }
    tiles::for_each_precision(|ctx, _| check_packed(ctx, &kinds(2, 1)[0], &[1, 5]));
}

#[test]
fn misfits_of_packed_sequences_are_named() {
    let ctx = Context::with_isa(crate::Isa::scalar());
    let case = Case::new(shape(1, 2, 6, 6, 8));
    let [layout, ..] = case.layouts();
    let [q, k, v] = [&case.data.q, &case.data.k, &case.data.v].map(|x| HeadsRef::new(x, layout).unwrap());
    let error = |q_offsets: &[usize], k_offsets: &[usize], mask: Mask<'_>| {
        let (mut out, mut lse) = (vec![7.0; case.data.q.len()], vec![7.0; 12]);
        let view = HeadsMut::new(&mut out, layout).unwrap();
        let spec = AttentionSpec::scaled(8).with_mask(mask);
        let sequences = Packed { q_offsets, k_offsets };
        let error = forward_packed(&ctx, &Inputs { q, k, v }, &sequences, &spec, view, &mut lse).unwrap_err();
        assert!(out.iter().chain(&lse).all(|&x| x == 7.0));
        error.to_string()
    };
    assert!(error(&[0, 4, 6], &[0, 6], Mask::none()).contains("k_offsets: length is 2, expected 3"));
    assert!(error(&[0, 4, 5], &[0, 3, 6], Mask::none()).contains("q_offsets"));
    assert!(error(&[0, 4, 6], &[0, 7, 6], Mask::none()).contains("k_offsets"));
    assert!(error(&[], &[], Mask::none()).contains("q_offsets"));
    assert!(error(&[0, 6], &[0, 6], Mask::none().with_key_lengths(&[6])).contains("mask.key_lengths"));
}
