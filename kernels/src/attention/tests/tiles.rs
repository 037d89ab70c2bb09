//! The passes on the tile unit: derived bounds, equal bits, odd numbers. On a CPU without a tile unit the same instructions run in software.

use super::*;
use crate::attention::cache::CacheLayout;
use crate::testing::{UNIT_ROUNDOFF as U, amx, assert_same_bits, gamma};
use crate::{Isa, Precision};

/// The precisions that tiles serve, and what each leaves out of `|A|·|B|`.
const PRECISIONS: [(Precision, f64); 2] =
    [(Precision::Medium, (1.0 + 1.0 / 128.0) / 128.0), (Precision::High, (1.0 + 1.0 / 256.0) / 32768.0)];

/// Calls `property` for each of them, with what it leaves out.
pub(super) fn for_each_precision(mut property: impl FnMut(&Context, f64)) {
    let on_tiles = amx().map(|isa| (isa, ["bf16_32x32_amx", "bf16x2_32x32_amx"].as_slice()));
    let dots = Isa::avx512_bf16_or_emulated().map(|isa| (isa, ["bf16_8x48_avx512bf16"].as_slice()));
    for (isa, names) in on_tiles.into_iter().chain(dots) {
        for ((precision, left_out), name) in PRECISIONS.into_iter().zip(names) {
            let ctx = Context::with_isa(isa).precision(precision);
            assert_eq!(kernel_name(&ctx, 8), *name);
            property(&ctx, left_out);
        }
    }
}

/// What the errors of the output and of the log-sum-exp are bounded by.
pub(super) struct Bounds {
    pub(super) out: Vec<f64>,
    lse: Vec<f64>,
    /// Relative, of a probability made from the log-sum-exp, row by row of [batch, heads, seq_q].
    pub(super) weight: Vec<f64>,
}

/// The bounds of [`crate::attention::on_tiles`], where a product leaves out `left_out` of its magnitude, with all terms.
///
/// A score is off by that share of `scale·Σ|q|·|k|` and by f32's roundings of the sum and of what is added to it. A probability is `exp(s)` over a sum of
/// such, so it is off by the factor `exp(2δ)`, δ being the largest error of a score in the row, and by the roundings of exp, l and α.
pub(super) fn bounds(a: &reference::Attention<'_, f64>, left_out: f64) -> Bounds {
    let reference::Attention { batch, heads, kv_heads, seq_q, seq_k, dim, v_dim, .. } = *a;
    let v: Vec<f64> = a.v.iter().map(|x| x.abs()).collect();
    let (magnitude, lse) = attention_forward(&reference::Attention { v: &v, ..*a });
    let weights = U * (64 + 16 * seq_k.div_ceil(128) + seq_k) as f64;
    let mut bounds = Bounds { out: magnitude, weight: lse.clone(), lse };
    for (b, h, i) in (0..batch).flat_map(|b| (0..heads).flat_map(move |h| (0..seq_q).map(move |i| (b, h, i))))
    {
        let q = &a.q[((b * seq_q + i) * heads + h) * dim..][..dim];
        let score = |j: usize| {
            let k = &a.k[((b * seq_k + j) * kv_heads + h / (heads / kv_heads)) * dim..][..dim];
            let magnitude = a.scale.abs() * q.iter().zip(k).map(|(q, k)| (q * k).abs()).sum::<f64>();
            let per_head = a.bias.is_some_and(|bias| bias.len() > seq_q * seq_k);
            let head = if per_head { h } else { 0 };
            let bias = a.bias.map_or(0.0, |bias| bias[(head * seq_q + i) * seq_k + j].abs());
            // −∞ hides whatever the score is.
            let bias = if bias.is_finite() { bias } else { 0.0 };
            magnitude * (left_out + gamma(dim + 40)) + 8.0 * U * (magnitude + bias)
        };
        let score = (0..seq_k).filter(|&j| (a.sees)(b, i, j)).map(score).fold(0.0, f64::max);
        let out = &mut bounds.out[((b * seq_q + i) * heads + h) * v_dim..][..v_dim];
        let relative = (2.0 * score).exp() * (1.0 + weights) * (1.0 + left_out + gamma(64)) - 1.0;
        out.iter_mut().for_each(|x| *x = *x * relative + 1e-35);
        let lse = &mut bounds.lse[(b * heads + h) * seq_q + i];
        let of_lse = score + weights + 4.0 * U * (1.0 + lse.abs().min(1e30));
        *lse = of_lse;
        bounds.weight[(b * heads + h) * seq_q + i] = (score + of_lse).exp() * (1.0 + weights) - 1.0;
    }
    bounds
}

/// Holds the forward pass to its bounds, where `oracle` hides the same as `case` by other means.
fn check_as(case: &Case, oracle: &Case) {
    let (out, lse) = oracle.naive::<f64, _>(|a, _| attention_forward(a));
    for_each_precision(|ctx, left_out| {
        let bounds = oracle.naive::<f64, _>(|a, _| bounds(a, left_out));
        let fast = case.forward(ctx);
        assert_within(&fast.0, &out, |i| bounds.out[i]);
        assert_within(&fast.1, &lse, |i| bounds.lse[i]);
        let strict = case.forward(&ctx.precision(Precision::Strict));
        assert!(case.shape.dim == 0 || fast != strict, "{:?} ran on vectors", case.shape);
    });
}

fn check(case: &Case) {
    check_as(case, case);
}

#[test]
fn heads_of_any_width() {
    for (i, dim) in [1, 15, 16, 31, 32, 33, 64, 80].into_iter().enumerate() {
        let v_dim = [3, 15, 33, 64, 32, 31, 80, 17][i];
        check(&Case::new(Shape { v_dim, ..shape(1, 1, 20, 45, dim) }));
    }
}

#[test]
fn lengths_straddle_tiles_and_blocks() {
    for (seq_q, seq_k) in
        [(1, 2), (15, 16), (16, 17), (17, 31), (31, 32), (32, 33), (33, 127), (2, 128), (65, 129), (3, 257)]
    {
        let mut case = Case::new(shape(1, 1, seq_q, seq_k, 8));
        check(&case);
        case.causal = Some(seq_k - seq_q);
        check(&case);
        case.causal = Some(0);
        check(&case);
    }
}

/// Some of [`varied`]: those of lengths up to 70 and every third of the longer ones.
pub(super) fn fewer() -> impl Iterator<Item = Case> {
    varied()
        .into_iter()
        .enumerate()
        .filter(|(i, case)| case.shape.seq_q <= 33 || i % 3 == 0)
        .map(|(_, case)| case)
}

#[test]
fn masks_biases_groups_and_widths() {
    fewer().for_each(|case| check(&case));
}

#[test]
fn linear_biases_and_dropout() {
    for (k, mut case) in fewer().enumerate() {
        let dropout = Dropout { p: [0.1, 0.5][k % 2], seed: 1 << 40 | 7, stream: k as u64 };
        case.dropout = Some(ScoreDropout { dropout, first_sequence: 5 * k });
        if case.bias_heads != 1 {
            case.slopes = (vec![0.5, 0.25, 0.0, 0.01], [0, 3, 70][k % 3]);
        }
        check(&case);
    }
}

#[test]
fn block_lists() {
    for case in blocks::cases().into_iter().filter(|case| case.shape.seq_q <= 150) {
        check_as(&case, &blocks::dense(&case));
    }
}

#[test]
fn extreme_logits_stay_among_the_values() {
    for magnitude in [1e4, 1e15, 1e30] {
        let case = Case { magnitude, ..Case::new(shape(1, 2, 9, 70, 16)) }.filled();
        for_each_precision(|ctx, left_out| {
            let (out, lse) = case.forward(ctx);
            let most = largest(&case.data.v) * (1.0 + 2.0 * left_out);
            assert!(out.iter().all(|x| f64::from(x.abs()) <= most), "{magnitude:e}");
            assert!(lse.iter().all(|x| x.is_finite()));
        });
    }
    check(&Case { magnitude: 1e-30, ..Case::new(shape(1, 2, 9, 70, 16)) }.filled());
}

#[test]
fn rows_that_see_nothing_are_zero() {
    for_each_precision(|ctx, _| {
        let mut case = Case { lengths: Some(vec![0, 9]), ..Case::new(shape(2, 2, 7, 9, 8)) };
        let (out, lse) = case.forward(ctx);
        assert!(out[..7 * 16].iter().all(|&x| x == 0.0) && out[7 * 16..].iter().all(|&x| x != 0.0));
        assert!(lse[..14].iter().all(|&x| x == f32::NEG_INFINITY) && lse[14..].iter().all(|x| x.is_finite()));
        (case.lengths, case.bias_heads, case.data.bias) = (None, 1, vec![f32::NEG_INFINITY; 7 * 9]);
        let (out, lse) = case.forward(ctx);
        assert!(out.iter().all(|&x| x == 0.0) && lse.iter().all(|&x| x == f32::NEG_INFINITY));
        for (batch, heads, seq_q, seq_k, dim) in
            [(0, 2, 3, 3, 4), (2, 0, 3, 3, 4), (2, 2, 0, 3, 4), (2, 2, 3, 0, 4), (2, 2, 3, 3, 0)]
        {
            let out = Case::new(shape(batch, heads, seq_q, seq_k, dim)).forward(ctx).0;
            assert!(out.iter().all(|&x| x == 0.0));
        }
    });
}

#[test]
fn threads_change_no_bit() {
    let mut cases: Vec<Case> = varied().into_iter().filter(|case| case.shape.seq_q == 33).collect();
    cases.extend(blocks::cases().into_iter().take(3));
    // One head is cut into keys and then rows, with a bias into rows of that too; many heads are not.
    cases.push(Case::new(shape(1, 1, 250, 300, 8)));
    cases.push(Case { causal: Some(0), bias_heads: 1, ..Case::new(shape(1, 1, 260, 260, 8)) }.filled());
    let mut listed = Case::new(shape(1, 1, 400, 400, 8));
    listed.lists = vec![BlockList::bigbird(150, 3, BigBird::Paper { random: 1, seed: 3 }).unwrap()];
    listed.window = Some(Window { offset: 0, left: 100, right: 0 });
    cases.push(listed);
    cases.push(Case::new(shape(10, 2, 20, 20, 16)));
    for_each_precision(|ctx, _| cases.iter().for_each(|case| bits::check_threads(ctx, case)));
}

/// With a bias, P and its gradient are made before they are packed; without one they are packed as they are made, and steps that 32 rows do not see take no part.
#[test]
fn a_bias_of_zeros_changes_no_bit() {
    let mut cases: Vec<Case> = fewer().filter(|case| case.bias_heads == 0).collect();
    let window = |offset, left, right| Some(Window { offset, left, right });
    for (window, lengths) in [
        (None, None),
        (window(0, 40, 0), None),
        (window(100, 2, 70), Some(vec![131])),
        (window(7, 1, 1), None),
    ] {
        for causal in [None, Some(0), Some(20)] {
            let shape = shape(1, 1, 165, 190, 8);
            cases.push(Case { causal, window, lengths: lengths.clone(), ..Case::new(shape) });
        }
    }
    cases.extend(blocks::cases().into_iter().filter(|case| case.bias_heads == 0).take(3));
    for_each_precision(|ctx, _| {
        for case in &cases {
            let mut biased = Case { bias_heads: 1, ..case.clone() };
            biased.data.bias = vec![0.0; case.shape.seq_q * case.shape.seq_k];
            let (plain, biased) = (case.run(ctx), biased.run(ctx));
            assert_same_bits(&plain.out, &biased.out);
            assert_same_bits(&plain.lse, &biased.lse);
            assert_same_bits(&plain.grads.d_q, &biased.grads.d_q);
            assert_same_bits(&plain.grads.d_k, &biased.grads.d_k);
            assert_same_bits(&plain.grads.d_v, &biased.grads.d_v);
        }
    });
}

/// `data` [batch, seq, width], rows `rows` of each sequence.
fn rows_of(data: &[f32], seq: usize, width: usize, rows: std::ops::Range<usize>) -> Vec<f32> {
    data.chunks_exact(seq * width).flat_map(|s| s[rows.start * width..rows.end * width].to_vec()).collect()
}

#[test]
fn a_row_does_not_know_its_neighbours() {
    for_each_precision(|ctx, _| {
        for case in varied().into_iter().filter(|case| case.bias_heads == 0 && case.shape.seq_q == 33) {
            let Shape { heads, kv_heads, seq_q, seq_k, dim, v_dim, .. } = case.shape;
            let (out, lse) = case.forward(ctx);
            // The second sequence alone, and of it a few rows.
            let half = |x: &[f32]| x[x.len() / 2..].to_vec();
            let lengths = case.lengths.as_ref().map(|lengths| lengths[1..].to_vec());
            for rows in [0..seq_q, 17..18, 20..33] {
                let (q, n) = (rows_of(&half(&case.data.q), seq_q, heads * dim, rows.clone()), rows.len());
                let data = Data {
                    q,
                    k: half(&case.data.k),
                    v: half(&case.data.v),
                    d_out: vec![0.0; n * heads * v_dim],
                    ..Data::default()
                };
                let shape = Shape { batch: 1, heads, kv_heads, seq_q: n, seq_k, dim, v_dim };
                let causal = case.causal.map(|offset| offset + rows.start);
                let window = case.window.map(|w| Window { offset: w.offset + rows.start, ..w });
                let alone = Case { shape, causal, window, lengths: lengths.clone(), data, ..case.clone() };
                let alone = alone.forward(ctx);
                assert_same_bits(&rows_of(&half(&out), seq_q, heads * v_dim, rows.clone()), &alone.0);
                assert_same_bits(&rows_of(&half(&lse), seq_q, 1, rows), &alone.1);
            }
        }
    });
}

#[test]
fn batches_padding_and_the_keys_so_far_change_no_bit() {
    let cases: Vec<Case> =
        varied().into_iter().filter(|case| case.bias_heads == 0 && case.shape.seq_q == 33).collect();
    for_each_precision(|ctx, _| {
        cases.iter().for_each(|case| bits::check_batch(ctx, case));
        let sizes = [(5, 7, None), (10, 140, Some(0)), (31, 3, None), (70, 60, Some(0))];
        sizes.into_iter().for_each(|sizes| bits::check_padding(ctx, sizes));
        [(20, 33, 4), (67, 12, 2), (140, 8, 1)].into_iter().for_each(|sizes| bits::check_step(ctx, sizes));
    });
}

/// What rows do not see may hold anything.
#[test]
fn hidden_keys_and_values_do_not_matter() {
    let (seq, dim) = (70, 8);
    for_each_precision(|ctx, _| {
        let mut case = Case { causal: Some(0), ..Case::new(shape(1, 1, seq, seq, dim)) };
        case.window = Some(Window { offset: 0, left: 20, right: 0 });
        let plain = case.forward(ctx);
        for odd in [f32::INFINITY, f32::NAN, f32::MAX] {
            let mut spoilt = case.clone();
            spoilt.data.k[40 * dim + 3] = odd;
            spoilt.data.v[40 * dim + 5] = odd;
            let result = spoilt.forward(ctx);
            for rows in [0..40, 61..70] {
                assert_same_bits(
                    &result.0[rows.start * dim..rows.end * dim],
                    &plain.0[rows.start * dim..rows.end * dim],
                );
                assert_same_bits(&result.1[rows.clone()], &plain.1[rows]);
            }
        }
    });
}

/// Numbers that have no parts give what they give in f32; rows that do not see them keep their bits.
#[test]
fn odd_numbers_are_multiplied_in_f32() {
    let (seq_q, seq_k, dim) = (20, 40, 8);
    let case = Case::new(shape(1, 1, seq_q, seq_k, dim));
    for odd in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, -3.4e38] {
        for_each_precision(|ctx, left_out| {
            let plain = case.forward(ctx);
            let [mut q, mut k, mut v] = [(); 3].map(|()| case.clone());
            q.data.q[17 * dim + 2] = odd;
            (k.data.k[33 * dim + 2], v.data.v[33 * dim + 2]) = (odd, odd);
            let near = |x: f32, strict: f32, most: f32| {
                x == strict || x.is_nan() && strict.is_nan() || (x - strict).abs() <= most
            };
            for (which, case) in [q, k, v].into_iter().enumerate() {
                let (result, strict) = (case.forward(ctx), case.forward(&ctx.precision(Precision::Strict)));
                // Scores that a softmax compares are either of f32 or as far from each other as ordinary ones are.
                let share = 8.0 * left_out as f32;
                for (at, (&x, &strict)) in result.0.iter().zip(&strict.0).enumerate() {
                    let most = share * if at % dim == 2 && which == 2 { strict.abs() } else { 1.0 };
                    assert!(near(x, strict, most), "{odd:e} {which} at {at}: {x:e}, f32 {strict:e}");
                    let touched = [at / dim == 17, true, at % dim == 2][which];
                    assert!(which == 2 || touched || x.to_bits() == plain.0[at].to_bits());
                }
                for (x, strict) in result.1.iter().zip(&strict.1) {
                    assert!(
                        near(*x, *strict, share * strict.abs().max(8.0)),
                        "{odd:e} {which}: {x:e}, f32 {strict:e}"
                    );
                }
            }
        });
    }
}

#[test]
fn decoding_multiplies_odd_numbers_as_the_full_pass_does() {
    let (seq, dim) = (150, 33);
    let mut case = Case { causal: Some(0), ..Case::new(shape(1, 2, seq, seq, dim)) };
    let row = 2 * dim;
    for (at, odd) in [(20, f32::MAX), (140, -3.4e38), (148, f32::INFINITY)] {
        case.data.v[at * row + 5] = odd;
        case.data.k[(at - 1) * row + 7] = -odd / 3e38;
    }
    case.data.k[149 * row + 3] = f32::MAX;
    case.data.q[148 * row + 2] = f32::MAX;
    let layout = CacheLayout { sequences: 1, kv_heads: 2, capacity: 192, dim, v_dim: dim };
    let [mut head, mut tail] = [(); 2].map(|()| decode::Owned::new(layout));
    head.append(0, 0, &case, 0..45);
    tail.append(0, 0, &case, 45..seq);
    let lengths = [[45], [seq - 45]];
    let parts = [(head.view(), &lengths[0]), (tail.view(), &lengths[1])];
    let parts = parts.map(|(cache, lengths)| Part { cache, sequences: &[0], lengths });
    for_each_precision(|ctx, _| {
        let full = case.forward(ctx);
        let (out, lse) = decode::run(ctx, &case, 4, &parts);
        assert_same_bits(&out, &full.0[(seq - 4) * row..]);
        assert_same_bits(&lse, &rows_of(&full.1, seq, 1, seq - 4..seq));
        assert!(out[..row].iter().all(|x| x.is_finite()));
    });
}
