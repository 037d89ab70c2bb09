//! Gradients on the tile unit: derived bounds and odd numbers. Their bits are held to the contract in [`super::tiles`].

use super::tiles::for_each_precision;
use super::*;
use crate::Precision;
use crate::testing::{UNIT_ROUNDOFF as U, assert_same_bits, gamma};

/// What the errors of gradients are bounded by: the table of [`crate::attention::backward_tiles`] with all terms.
///
/// `weight` and `out` are the bounds of a probability, relative, row by row of [batch, heads, seq_q], and of the output.
fn bounds(
    a: &reference::Attention<'_, f64>,
    d_out: &[f64],
    left_out: f64,
    (weight, out): (&[f64], &[f64]),
) -> AttentionGrads<f64> {
    let reference::Attention { batch, heads, kv_heads, seq_q, seq_k, dim, v_dim, .. } = *a;
    let (exact_out, _) = attention_forward(a);
    let p = attention_probabilities(a);
    let mut grads = attention_backward(a, d_out);
    [&mut grads.d_q, &mut grads.d_k, &mut grads.d_v, &mut grads.d_bias]
        .into_iter()
        .for_each(|x| x.fill(1e-33));
    let share = left_out + gamma(300 + seq_q + seq_k);
    for row in 0..batch * heads * seq_q {
        let (b, h, i) = (row / seq_q / heads, row / seq_q % heads, row % seq_q);
        let of_row = ((b * seq_q + i) * heads + h) * v_dim..((b * seq_q + i) * heads + h + 1) * v_dim;
        let d_o = &d_out[of_row.clone()];
        let (d, d_error) = d_o
            .iter()
            .zip(&exact_out[of_row.clone()])
            .zip(&out[of_row])
            .fold((0.0, 0.0), |(d, error), ((g, o), bound)| {
                (d + g * o, error + g.abs() * (bound + gamma(v_dim + 8) * o.abs()))
            });
        let q = ((b * seq_q + i) * heads + h) * dim;
        for j in 0..seq_k {
            let p = p[row * seq_k + j];
            if p == 0.0 {
                continue;
            }
            let z = a.factor.map_or(1.0, |factor| factor([b, h, i, j]));
            let kv = (b * seq_k + j) * kv_heads + h / (heads / kv_heads);
            let v = &a.v[kv * v_dim..][..v_dim];
            let d_p = z * d_o.iter().zip(v).map(|(g, v)| g * v).sum::<f64>();
            let magnitude = z * d_o.iter().zip(v).map(|(g, v)| (g * v).abs()).sum::<f64>();
            let d_s = p * (d_p - d);
            let off = weight[row] * (d_p.abs() + d.abs())
                + (1.0 + weight[row]) * (magnitude * share + d_error + 8.0 * U * (magnitude + d.abs()));
            let d_s_error = p * off;
            let carried = d_s_error + share * (d_s.abs() + d_s_error);
            for (c, g) in d_o.iter().enumerate() {
                grads.d_v[kv * v_dim + c] += p * z * (weight[row] + share * (1.0 + weight[row])) * g.abs();
            }
            for c in 0..dim {
                grads.d_q[q + c] += a.scale * carried * a.k[kv * dim + c].abs();
                grads.d_k[kv * dim + c] += a.scale * carried * a.q[q + c].abs();
            }
            if let Some(bias) = a.bias {
                let head = if bias.len() > seq_q * seq_k { h } else { 0 };
                grads.d_bias[(head * seq_q + i) * seq_k + j] += d_s_error + gamma(batch * heads) * d_s.abs();
            }
        }
    }
    grads
}

/// Holds the gradients to their bounds, where `oracle` hides the same as `case` by other means.
fn check_as(case: &Case, oracle: &Case) {
    let exact = oracle.naive::<f64, _>(attention_backward);
    for_each_precision(|ctx, left_out| {
        let bounds = oracle.naive::<f64, _>(|a, d_out| {
            let forward = tiles::bounds(a, left_out);
            bounds(a, d_out, left_out, (&forward.weight, &forward.out))
        });
        let fast = case.run(ctx).grads;
        assert_within(&fast.d_v, &exact.d_v, |i| bounds.d_v[i]);
        assert_within(&fast.d_q, &exact.d_q, |i| bounds.d_q[i]);
        assert_within(&fast.d_k, &exact.d_k, |i| bounds.d_k[i]);
        if case.bias_heads > 0 {
            assert_within(&fast.d_bias, &exact.d_bias, |i| bounds.d_bias[i]);
        }
        let strict = case.run(&ctx.precision(Precision::Strict)).grads;
        assert!(
            fast.d_v != strict.d_v || strict.d_v.iter().all(|x| *x == 0.0),
            "{:?} ran on vectors",
            case.shape
        );
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
        [(1, 2), (15, 16), (16, 17), (17, 31), (31, 32), (32, 33), (33, 127), (2, 128), (129, 129), (200, 65)]
    {
        let mut case = Case::new(shape(1, 1, seq_q, seq_k, 8));
        check(&case);
        case.causal = Some(seq_k.saturating_sub(seq_q));
        check(&case);
        case.causal = Some(0);
        check(&case);
    }
}

#[test]
fn masks_biases_groups_and_widths() {
    tiles::fewer().for_each(|case| check(&case));
}

#[test]
fn linear_biases_and_dropout() {
    for (k, mut case) in tiles::fewer().enumerate() {
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
fn rows_that_see_nothing_take_no_part() {
    for_each_precision(|ctx, _| {
        let mut case = Case { lengths: Some(vec![0, 9]), ..Case::new(shape(2, 2, 7, 9, 8)) };
        let grads = case.run(ctx).grads;
        for grad in [&grads.d_q, &grads.d_k, &grads.d_v] {
            assert!(grad[..grad.len() / 2].iter().all(|&x| x == 0.0));
            assert!(grad[grad.len() / 2..].iter().any(|&x| x != 0.0));
        }
        (case.lengths, case.bias_heads, case.data.bias) = (None, 1, vec![f32::NEG_INFINITY; 7 * 9]);
        let grads = case.run(ctx).grads;
        for zero in [grads.d_q, grads.d_k, grads.d_v, grads.d_bias] {
            assert!(zero.iter().all(|&x| x == 0.0), "hidden by the bias");
        }
        for (batch, heads, seq_q, seq_k) in [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0)] {
            let grads = Case::new(shape(batch, heads, seq_q, seq_k, 4)).run(ctx).grads;
            assert!([grads.d_q, grads.d_k, grads.d_v].iter().flatten().all(|&x| x == 0.0));
        }
        Case::new(shape(2, 2, 3, 3, 0)).run(ctx);
        Case::new(Shape { v_dim: 0, ..shape(1, 1, 3, 4, 5) }).run(ctx);
    });
}

/// Rows that do not see an odd number keep their bits; those that do get what f32 gives, NaN or not.
#[test]
fn odd_numbers_are_multiplied_in_f32() {
    let (seq, dim) = (70, 8);
    let plain_case = Case { causal: Some(0), ..Case::new(shape(1, 1, seq, seq, dim)) };
    for odd in [f32::INFINITY, f32::NAN, 3.395e38] {
        for_each_precision(|ctx, left_out| {
            let plain = plain_case.run(ctx).grads;
            for which in 0..4 {
                let mut case = plain_case.clone();
                let Data { q, k, v, d_out, .. } = &mut case.data;
                [q, k, v, d_out][which][40 * dim + 5] = odd;
                let (fast, strict) = (case.run(ctx).grads, case.run(&ctx.precision(Precision::Strict)).grads);
                // A row before 40 sees no odd key, and no odd row is before 40.
                if which == 1 || which == 2 {
                    assert_same_bits(&fast.d_q[..40 * dim], &plain.d_q[..40 * dim]);
                } else {
                    let rows = 41 * dim..;
                    assert_same_bits(&fast.d_k[rows.clone()], &plain.d_k[rows.clone()]);
                    assert_same_bits(&fast.d_v[rows.clone()], &plain.d_v[rows]);
                    assert_same_bits(&fast.d_q[..40 * dim], &plain.d_q[..40 * dim]);
                }
                if which == 3 && odd.is_finite() {
                    // Its products are those of f32: dV's column is about p times the odd number.
                    for j in 0..=40 {
                        let (x, strict) = (fast.d_v[j * dim + 5], strict.d_v[j * dim + 5]);
                        assert!(
                            (x - strict).abs() <= 8.0 * left_out as f32 * strict.abs(),
                            "{x:e} {strict:e}"
                        );
                    }
                }
                // Where the vectors' pass multiplies 0 by the odd number of a hidden row it has NaN too many.
                let keys = if which == 1 || which == 2 { 0..seq } else { 0..41 };
                let grads = [
                    (&fast.d_q, &strict.d_q, 40..seq),
                    (&fast.d_k, &strict.d_k, keys.clone()),
                    (&fast.d_v, &strict.d_v, keys),
                ];
                for (fast, strict, rows) in grads {
                    for at in rows.start * dim..rows.end * dim {
                        assert!(
                            !strict[at].is_nan() || fast[at].is_nan(),
                            "{odd:e} {which} at {at}: {:e}",
                            fast[at]
                        );
                    }
                }
            }
        });
    }
}

/// A tile whose rows are held meets a later block of keys after other tiles have used its scratch.
#[test]
fn odd_rows_meet_every_block_of_keys() {
    let (seq, dim) = (200, 8);
    let mut case = Case::new(shape(1, 1, seq, seq, dim));
    case.data.d_out[40 * dim + 5] = 3.395e38;
    // dP less D must stay a number.
    case.data.v.iter_mut().for_each(|v| *v *= 0.5);
    check(&case);
}
