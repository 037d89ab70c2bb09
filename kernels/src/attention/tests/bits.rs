//! The same bits for any threads, batch, padding, memory order and for cached decoding.

use std::num::NonZeroUsize;

use super::*;
use crate::testing::assert_same_bits;

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let mut cases = varied();
    cases.extend(blocks::cases());
    cases.push(Case::new(shape(1, 1, 400, 600, 8)));
    cases.push(Case { causal: Some(0), bias_heads: 1, ..Case::new(shape(1, 1, 500, 500, 8)) }.filled());
    cases.push(Case::new(shape(40, 4, 20, 20, 16)));
    for_each_isa(|ctx| cases.iter().for_each(|case| check_threads(ctx, case)));
}

pub(super) fn check_threads(ctx: &Context, case: &Case) {
    let one = case.run(ctx);
    for threads in [2, 3] {
        let many = case.run(&ctx.threads(NonZeroUsize::new(threads).unwrap()));
        assert_eq!(one, many, "{} {threads} threads {:?}", ctx.isa(), case.shape);
    }
}

#[test]
fn heads_that_share_keys_have_the_bits_of_heads_with_copies() {
    for (seq, dim, kv_heads, causal) in
        [(20, 8, 1, None), (130, 12, 2, Some(0)), (140, 64, 3, None), (150, 400, 2, Some(0))]
    {
        let case = Case { causal, ..Case::new(Shape { kv_heads, ..shape(2, 6, seq, seq, dim) }) };
        let copies = |x: &[f32]| x.chunks_exact(dim).flat_map(|row| row.repeat(6 / kv_heads)).collect();
        let data = Data { k: copies(&case.data.k), v: copies(&case.data.v), ..case.data.clone() };
        let apart = Case { shape: shape(2, 6, seq, seq, dim), data, ..case.clone() };
        for_each_isa(|ctx| {
            let apart = apart.run(ctx);
            for threads in [1, 2] {
                let shared = case.run(&ctx.threads(NonZeroUsize::new(threads).unwrap()));
                assert_same_bits(&shared.out, &apart.out);
                assert_same_bits(&shared.lse, &apart.lse);
                assert_same_bits(&shared.grads.d_q, &apart.grads.d_q);
            }
        });
    }
}

/// Rows `rows` of every sequence and head of a [batch, seq, width] buffer.
fn rows_of(data: &[f32], seq: usize, width: usize, rows: std::ops::Range<usize>) -> Vec<f32> {
    data.chunks_exact(seq * width).flat_map(|s| s[rows.start * width..rows.end * width].to_vec()).collect()
}

/// `data` [batch, seq, width] with `extra` rows of garbage after each sequence.
fn padded(data: &[f32], seq: usize, width: usize, extra: usize, garbage: f32) -> Vec<f32> {
    let pad = vec![garbage; extra * width];
    data.chunks_exact(seq * width).flat_map(|s| [s, &pad].concat()).collect()
}

#[test]
fn a_sequence_does_not_know_its_batch() {
    let cases: Vec<Case> = varied().into_iter().filter(|case| case.bias_heads == 0).collect();
    for_each_isa(|ctx| cases.iter().for_each(|case| check_batch(ctx, case)));
}

/// The second sequence of the two of a case has the bits that it has alone.
pub(super) fn check_batch(ctx: &Context, case: &Case) {
    let all = case.run(ctx);
    let Shape { heads, kv_heads, seq_q, seq_k, dim, v_dim, .. } = case.shape;
    let half = |x: &[f32]| x[x.len() / 2..].to_vec();
    let Data { q, k, v, bias, d_out } = &case.data;
    let data = Data { q: half(q), k: half(k), v: half(v), bias: bias.clone(), d_out: half(d_out) };
    let shape = Shape { batch: 1, heads, kv_heads, seq_q, seq_k, dim, v_dim };
    let lengths = case.lengths.as_ref().map(|lengths| lengths[1..].to_vec());
    let alone = Case { shape, lengths, data, ..case.clone() }.run(ctx);
    assert_same_bits(&half(&all.out), &alone.out);
    assert_same_bits(&half(&all.lse), &alone.lse);
    assert_same_bits(&half(&all.grads.d_q), &alone.grads.d_q);
    assert_same_bits(&half(&all.grads.d_k), &alone.grads.d_k);
    assert_same_bits(&half(&all.grads.d_v), &alone.grads.d_v);
}

#[test]
fn padding_changes_no_bit() {
    let all = [(5, 7, None), (10, 140, Some(0)), (127, 3, None), (130, 70, Some(0)), (128, 1, None)];
    for_each_isa(|ctx| all.into_iter().for_each(|sizes| check_padding(ctx, sizes)));
}

/// Sequences of a length, so many positions more, and a causal offset.
pub(super) fn check_padding(ctx: &Context, (seq, extra, causal): (usize, usize, Option<usize>)) {
    let case = Case { causal, ..Case::new(shape(2, 2, seq, seq, 12)) };
    let plain = case.run(ctx);
    let width = 2 * 12;
    let longer = seq + extra;
    let data = Data {
        q: padded(&case.data.q, seq, width, extra, 3.0),
        k: padded(&case.data.k, seq, width, extra, f32::NAN),
        v: padded(&case.data.v, seq, width, extra, f32::NAN),
        bias: Vec::new(),
        d_out: padded(&case.data.d_out, seq, width, extra, 0.0),
    };
    let lengths = Some(vec![seq; 2]);
    let long = Case { shape: shape(2, 2, longer, longer, 12), lengths, data, ..case }.run(ctx);
    assert_same_bits(&plain.out, &rows_of(&long.out, longer, width, 0..seq));
    assert_same_bits(&plain.lse, &rows_of(&long.lse, longer, 1, 0..seq));
    let pairs = [
        (&plain.grads.d_q, &long.grads.d_q),
        (&plain.grads.d_k, &long.grads.d_k),
        (&plain.grads.d_v, &long.grads.d_v),
    ];
    for (plain, long) in pairs {
        assert_same_bits(plain, &rows_of(long, longer, width, 0..seq));
        assert!(rows_of(long, longer, width, seq..longer).iter().all(|&x| x == 0.0));
    }
}

#[test]
fn a_decoding_step_gives_the_row_of_the_causal_pass() {
    for_each_isa(|ctx| {
        [(20, 32, 4), (67, 12, 2), (140, 8, 1)].into_iter().for_each(|sizes| check_step(ctx, sizes))
    });
}

/// A length, the elements of a head, and the heads of the keys.
pub(super) fn check_step(ctx: &Context, (seq, dim, kv_heads): (usize, usize, usize)) {
    let shape = Shape { kv_heads, ..shape(2, 4, seq, seq, dim) };
    let case = Case { shape, causal: Some(0), ..Case::new(shape) };
    let full = case.run(ctx);
    let (width, kv_width) = (4 * dim, kv_heads * dim);
    for (first, queries) in [(0, 1), (1, 1), (15, 1), (16, 3), (seq - 7, 7), (seq - 1, 1)] {
        let keys = first + queries;
        let data = Data {
            q: rows_of(&case.data.q, seq, width, first..keys),
            k: rows_of(&case.data.k, seq, kv_width, 0..keys),
            v: rows_of(&case.data.v, seq, kv_width, 0..keys),
            bias: Vec::new(),
            d_out: rows_of(&case.data.d_out, seq, width, first..keys),
        };
        let shape = Shape { seq_q: queries, seq_k: keys, ..shape };
        let step = Case { shape, causal: Some(first), data, ..case.clone() }.run(ctx);
        assert_same_bits(&step.out, &rows_of(&full.out, seq, width, first..keys));
        assert_same_bits(&step.lse, &rows_of(&full.lse, seq, 1, first..keys));
        assert_same_bits(&step.grads.d_q, &rows_of(&full.grads.d_q, seq, width, first..keys));
    }
}

#[test]
fn memory_order_changes_no_bit() {
    let case = Case { causal: Some(0), ..Case::new(shape(2, 3, 70, 70, 20)) };
    everywhere(|ctx| check_memory_order(ctx, &case));
}

fn check_memory_order(ctx: &Context, case: &Case) {
    let Shape { batch, heads, seq_q: seq, dim, .. } = case.shape;
    let fused = HeadsLayout {
        batch_stride: seq * 3 * heads * dim,
        seq_stride: 3 * heads * dim,
        ..HeadsLayout::batch_seq_heads(batch, seq, heads, dim)
    };
    let by_head = HeadsLayout::batch_heads_seq(batch, heads, seq, dim);
    let spread = |layout: HeadsLayout, first: usize, from: &[f32], to: &mut [f32]| {
        let from = HeadsRef::new(from, HeadsLayout::batch_seq_heads(batch, seq, heads, dim)).unwrap();
        let mut to = HeadsMut::new(&mut to[first..], layout).unwrap();
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            for i in 0..seq {
                to.head_mut(b, h).row_mut(i).copy_from_slice(from.head(b, h).row(i));
            }
        }
    };
    let expected = case.run(ctx);
    let width = heads * dim;
    let mut qkv = vec![f32::NAN; 3 * case.data.q.len()];
    for (first, from) in [&case.data.q, &case.data.k, &case.data.v].into_iter().enumerate() {
        spread(fused, first * width, from, &mut qkv);
    }
    let [q, k, v] = [0, 1, 2].map(|i| HeadsRef::new(&qkv[i * width..], fused).unwrap());
    let (mut out, mut lse) = (vec![f32::NAN; case.data.q.len()], vec![0.0; expected.lse.len()]);
    let out_view = HeadsMut::new(&mut out, by_head).unwrap();
    forward(ctx, &Inputs { q, k, v }, &case.spec(), out_view, &mut lse).unwrap();
    let mut expected_out = vec![0.0; out.len()];
    spread(by_head, 0, &expected.out, &mut expected_out);
    assert_same_bits(&out, &expected_out);
    assert_same_bits(&lse, &expected.lse);

    let mut d_out = vec![0.0; out.len()];
    spread(by_head, 0, &case.data.d_out, &mut d_out);
    let saved = Saved { q, k, v, out: HeadsRef::new(&out, by_head).unwrap(), lse: &lse };
    let mut grads = vec![vec![f32::NAN; out.len()]; 3];
    let [d_q, d_k, d_v] = &mut grads[..] else { unreachable!() };
    let [d_q, d_k, d_v] = [d_q, d_k, d_v].map(|x| HeadsMut::new(x, by_head).unwrap());
    let d_out = HeadsRef::new(&d_out, by_head).unwrap();
    backward(ctx, &saved, d_out, &case.spec(), Grads { d_q, d_k, d_v, d_bias: None }).unwrap();
    for (grad, plain) in grads.iter().zip([&expected.grads.d_q, &expected.grads.d_k, &expected.grads.d_v]) {
        let mut expected = vec![0.0; grad.len()];
        spread(by_head, 0, plain, &mut expected);
        assert_same_bits(grad, &expected);
    }
}
