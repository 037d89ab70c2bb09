//! Decoding under masks: the bits of the full pass, and no look at keys that nobody sees.

use std::num::NonZeroUsize;

use super::decode::{Owned, are_the_last_rows, cases, run};
use super::*;
use crate::attention::cache::CacheLayout;
use crate::testing::assert_same_bits;

/// The cases of decoding with windows, biases, both, and lists for all heads and for each.
pub(super) fn masked() -> Vec<Case> {
    let mut all = Vec::new();
    for (index, case) in cases().into_iter().enumerate() {
        let Shape { heads, seq_k, .. } = case.shape;
        let window = |left| Some(Window { offset: 0, left, right: 3 });
        all.push(Case { window: window([1, 9, 140, 0, 700, 150][index]), ..case.clone() });
        if seq_k > 1000 {
            continue;
        }
        let bias_heads = if index == 0 { 1 } else { heads };
        all.push(Case { bias_heads, ..case.clone() }.filled());
        all.push(Case { bias_heads: heads, window: window(33), ..case.clone() }.filled());
        let block = [2, 16, 64, 7, 1, 32][index];
        let bigbird = |blocks: usize, seed| {
            let rule = BigBird::Paper { random: 1, seed };
            BlockList::bigbird(block, blocks, rule).unwrap()
        };
        let blocks = seq_k.div_ceil(block);
        all.push(Case { lists: vec![bigbird(blocks, 3)], ..case.clone() });
        let lists = (0..heads).map(|h| bigbird(blocks, h as u64)).collect();
        all.push(Case { lists, window: window(90), ..case });
    }
    // A block that is listed twice, and a row that sees nothing.
    let twice = Case::new(shape(1, 2, 20, 20, 8));
    let lists = |last: Vec<usize>| vec![BlockList::new(10, 2, &[vec![0], last]).unwrap()];
    for last in [vec![0, 1, 0], vec![]] {
        all.push(Case { causal: Some(0), lists: lists(last), ..twice.clone() });
    }
    all
}

#[test]
fn masks_are_those_of_the_full_pass_bit_for_bit() {
    are_the_last_rows(masked());
}

#[test]
fn keys_that_no_query_sees_are_not_read() {
    let case = Case { causal: Some(0), ..Case::new(shape(1, 2, 700, 700, 16)) };
    let layout = CacheLayout { sequences: 1, kv_heads: 2, capacity: 704, dim: 16, v_dim: 16 };
    // The cache holds NaN where nothing was written: before the window's first block, and outside of the listed ones.
    let mut cache = Owned::new(layout);
    cache.append(0, 512, &case, 512..700);
    let window = Case { window: Some(Window { offset: 0, left: 100, right: 0 }), ..case.clone() };
    let listed = (0..11).map(|row| if row < 8 { vec![] } else { (8..=row).collect() });
    let lists = vec![BlockList::new(64, 11, &listed.collect::<Vec<_>>()).unwrap()];
    let lists = Case { lists, ..case };
    everywhere(|ctx| {
        for case in [&window, &lists] {
            let part = Part { cache: cache.view(), sequences: &[0], lengths: &[700] };
            let (out, lse) = run(ctx, case, 1, &[part]);
            assert!(out.iter().chain(&lse).all(|x| x.is_finite()), "{:?}", case.shape);
        }
    });
}

/// Lists of blocks of 16 positions, one for all heads or one for each: what a row of blocks sees does not depend on how many rows there are.
fn listed(positions: usize, lists: usize) -> Vec<BlockList> {
    let blocks = positions.div_ceil(16);
    let rows = |head: usize| (0..blocks).map(move |row| vec![row / 3, (row / 2).saturating_sub(head), row]);
    (0..lists).map(|head| BlockList::new(16, blocks, &rows(head).collect::<Vec<_>>()).unwrap()).collect()
}

/// Masks for three beams of up to 150 keys.
fn beamed() -> Vec<Case> {
    let plain = Case { causal: Some(0), ..Case::new(Shape { kv_heads: 2, ..shape(3, 4, 150, 150, 8) }) };
    let window = |left| Some(Window { offset: 0, left, right: 0 });
    let slopes = (vec![0.5, 0.25, 0.0, 0.01], 0);
    vec![
        Case { window: window(33), ..plain.clone() },
        Case { slopes: slopes.clone(), ..plain.clone() },
        Case { bias_heads: 4, window: window(120), ..plain.clone() }.filled(),
        Case { lists: listed(150, 1), ..plain.clone() },
        Case { lists: listed(150, 4), slopes, window: window(60), ..plain },
    ]
}

/// The full pass of the beam whose query is that of sequence `b`, over `n` keys: those of a prefix and those of a tail.
fn full_pass_of_beam(case: &Case, b: usize, n: usize, keys: [Vec<f32>; 2]) -> Case {
    let Shape { heads, seq_q, seq_k, dim, .. } = case.shape;
    let query = &case.data.q[((b + 1) * seq_q - 1) * heads * dim..][..heads * dim];
    let bias = |head: usize| &case.data.bias[((head + 1) * seq_q * seq_k - n)..][..n];
    let [k, v] = keys;
    let bias = (0..case.bias_heads).flat_map(|head| bias(head).repeat(n)).collect();
    let data = Data { q: query.repeat(n), k, v, bias, d_out: vec![0.0; n * heads * case.shape.v_dim] };
    let shape = Shape { batch: 1, seq_q: n, seq_k: n, ..case.shape };
    Case { shape, lists: listed(n, case.lists.len()), data, ..case.clone() }
}

#[test]
fn beams_under_masks_give_the_last_rows_of_their_own_passes() {
    const PREFIX: usize = 40;
    let (beams, tails) = ([2, 0, 2], [110, 77, 0]);
    for case in beamed() {
        let Shape { heads, kv_heads, seq_k, dim, v_dim, .. } = case.shape;
        let layout = CacheLayout { sequences: 3, kv_heads, capacity: 128, dim, v_dim };
        let (mut prefix, mut tail) = (Owned::new(layout), Owned::new(layout));
        prefix.append(1, 0, &case, 0..PREFIX);
        (0..3).for_each(|b| tail.append(b, 0, &case, PREFIX..seq_k));
        let parts = [
            Part { cache: prefix.view(), sequences: &[1; 3], lengths: &[PREFIX; 3] },
            Part { cache: tail.view(), sequences: &beams, lengths: &tails },
        ];
        let keys = |data: &[f32], width: usize, b: usize| {
            let rows = |sequence: usize, keys: std::ops::Range<usize>| {
                &data[(sequence * seq_k + keys.start) * width..][..keys.len() * width]
            };
            [rows(1, 0..PREFIX), rows(beams[b], PREFIX..PREFIX + tails[b])].concat()
        };
        let alone: Vec<Case> = (0..3)
            .map(|b| {
                let keys = [keys(&case.data.k, kv_heads * dim, b), keys(&case.data.v, kv_heads * v_dim, b)];
                full_pass_of_beam(&case, b, PREFIX + tails[b], keys)
            })
            .collect();
        everywhere(|ctx| {
            for threads in [1, 3] {
                let ctx = ctx.threads(NonZeroUsize::new(threads).unwrap());
                let (out, lse) = run(&ctx, &case, 1, &parts);
                for (b, alone) in alone.iter().enumerate() {
                    let (full, full_lse) = alone.forward(&ctx);
                    let n = alone.shape.seq_q;
                    assert_same_bits(
                        &out[b * heads * v_dim..][..heads * v_dim],
                        &full[(n - 1) * heads * v_dim..],
                    );
                    let last: Vec<f32> = full_lse.iter().skip(n - 1).step_by(n).copied().collect();
                    assert_same_bits(&lse[b * heads..][..heads], &last);
                }
            }
        });
    }
}

#[test]
fn a_bias_ends_with_each_sequence() {
    let case = Case { causal: Some(0), bias_heads: 2, ..Case::new(shape(2, 2, 70, 70, 8)) }.filled();
    let layout = CacheLayout { sequences: 2, kv_heads: 2, capacity: 128, dim: 8, v_dim: 8 };
    let mut cache = Owned::new(layout);
    (0..2).for_each(|b| cache.append(b, 0, &case, 0..70));
    let part = |lengths| Part { cache: cache.view(), sequences: &[0, 1], lengths };
    everywhere(|ctx| {
        let together = run(ctx, &case, 1, &[part(&[70, 33])]);
        let bias = |head: usize| &case.data.bias[(head * 70 + 69) * 70..][..70];
        let short: Vec<f32> = [&bias(0)[37..], &bias(1)[37..]].concat();
        let layout = HeadsLayout::batch_seq_heads(1, 1, 2, 8);
        let q = &case.data.q[(2 * 70 - 1) * 16..];
        let mask = Mask::none().with_bias(Bias { values: &short, heads: 2 });
        let (mut out, mut lse) = ([f32::NAN; 16], [f32::NAN; 2]);
        let alone = Part { sequences: &[1], lengths: &[33], ..part(&[]) };
        let spec = AttentionSpec::scaled(8).with_mask(mask);
        let q = HeadsRef::new(q, layout).unwrap();
        decode(ctx, q, &[alone], &spec, HeadsMut::new(&mut out, layout).unwrap(), &mut lse).unwrap();
        assert_same_bits(&together.0[16..], &out);
        assert_same_bits(&together.1[2..], &lse);
    });
}

#[test]
fn masks_that_do_not_fit_are_named() {
    let ctx = Context::with_isa(crate::Isa::scalar());
    let case = Case::new(shape(1, 1, 3, 3, 4));
    let layout = CacheLayout { sequences: 1, kv_heads: 1, capacity: 64, dim: 4, v_dim: 4 };
    let mut cache = Owned::new(layout);
    cache.append(0, 0, &case, 0..3);
    let q_layout = HeadsLayout::batch_seq_heads(1, 3, 1, 4);
    let error = |mask: Mask<'_>| {
        let (mut out, mut lse) = ([0.0; 12], [0.0; 3]);
        let q = HeadsRef::new(&case.data.q, q_layout).unwrap();
        let part = Part { cache: cache.view(), sequences: &[0], lengths: &[3] };
        let spec = AttentionSpec::scaled(4).with_mask(mask);
        let out = HeadsMut::new(&mut out, q_layout).unwrap();
        decode(&ctx, q, &[part], &spec, out, &mut lse).unwrap_err().to_string()
    };
    let (none, slopes) = (Mask::none(), &[0.5][..]);
    let lists = [BlockList::new(2, 1, &[vec![0]]).unwrap()];
    let dropout = Dropout { p: 0.5, seed: 0, stream: 0 };
    for (mask, named) in [
        (Mask::causal(1), "causal.offset"),
        (none.with_window(Window { offset: 2, left: 1, right: 0 }), "window.offset"),
        (none.with_alibi(Alibi { slopes, offset: 1 }), "alibi.offset"),
        (none.with_key_lengths(&[3]), "key_lengths"),
        (none.with_dropout(ScoreDropout { dropout, first_sequence: 0 }), "dropout"),
        (none.with_blocks(&lists), "mask.blocks"),
        (none.with_bias(Bias { values: slopes, heads: 1 }), "mask.bias"),
    ] {
        let error = error(mask);
        assert!(error.contains(named), "{named}: {error}");
    }
}
