//! Whole sequences against the naive form, and the bits that must not change.

use std::num::NonZeroUsize;

use proptest::prelude::*;

use super::*;
use crate::error::ShapeError;
use crate::rnn::plan::Plan;
use crate::rnn::{columns, project};
use crate::testing::{assert_same_bits, for_each_isa};

pub(super) const DIRECTIONS: [Direction; 2] = [Direction::Forward, Direction::Reverse];

#[track_caller]
fn check_against_reference(ctx: &Context, case: &Case) {
    let (out, grads) = case.run(ctx);
    let (naive_out, naive_grads) = case.naive::<f32>();
    let (exact_out, exact_grads) = case.naive::<f64>();
    let exact = tensors(&exact_out, &exact_grads);
    let is_gradient = |name: &str| name.starts_with("d_");
    let gradients = scale_of(exact.iter().copied().filter(|(name, _)| is_gradient(name)));
    let states = scale_of(exact.iter().copied().filter(|(name, _)| !is_gradient(name))).max(1.0);
    let all = tensors(&out, &grads).into_iter().zip(tensors(&naive_out, &naive_grads));
    for (((name, fast), (_, naive)), (_, exact)) in all.zip(exact) {
        let what = format!("{name} on {} of {case:?}", ctx.isa());
        let (factor, scale) = if is_gradient(name) { (3.0, gradients) } else { (2.0, states) };
        assert_near_scaled(&what, factor, (fast, naive, exact), scale);
    }
}

pub(super) fn all_but_relu() -> Vec<Kind> {
    Kind::all().into_iter().filter(|kind| kind.cell != Cell::Relu).collect()
}

/// All tensors of both have the same bits.
#[track_caller]
pub(super) fn assert_same_run((out, grads): &Run<f32>, (other_out, other_grads): &Run<f32>) {
    let both = tensors(out, grads).into_iter().zip(tensors(other_out, other_grads));
    both.for_each(|((_, one), (_, other))| assert_same_bits(one, other));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn outputs_and_gradients_are_as_exact_as_the_naive_form(
        // Not ReLU: near its corner the sign of a sum may differ between f32 and f64, and the whole gradient with it.
        kind in prop::sample::select(all_but_relu()),
        reverse in any::<bool>(),
        input in 0usize..20,
        hidden in prop::sample::select(vec![1usize, 3, 7, 8, 9, 15, 16, 17, 24, 33]),
        lengths in prop::collection::vec(0usize..7, 0..9),
    ) {
        let seq = lengths.iter().copied().max().unwrap_or(0) + input % 2;
        let case = Case::new(kind, DIRECTIONS[reverse as usize], [seq, input, hidden], &lengths);
        for_each_isa(|ctx| check_against_reference(ctx, &case));
    }
}

#[test]
fn larger_layers_are_as_exact_as_the_naive_form() {
    for kind in Kind::all() {
        for direction in DIRECTIONS {
            let case = Case::new(kind, direction, [11, 40, 72], &[11, 4, 9, 11, 1, 7, 2, 11, 10, 3, 5, 8, 6]);
            for_each_isa(|ctx| check_against_reference(ctx, &case));
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    for kind in Kind::all() {
        for direction in DIRECTIONS {
            let lengths: Vec<usize> = (0..29).map(|b| (b * 7) % 13).collect();
            let case = Case::new(kind, direction, [13, 31, 64], &lengths);
            for_each_isa(|ctx| {
                let one = case.run(ctx);
                for threads in 2..=4 {
                    assert_same_run(&one, &case.run(&ctx.threads(NonZeroUsize::new(threads).unwrap())));
                }
            });
        }
    }
}

#[test]
fn bits_do_not_depend_on_which_thread_owns_a_unit() {
    for kind in Kind::all() {
        for direction in DIRECTIONS {
            let case = Case::new(kind, direction, [40, 9, 264], &[40, 17, 0, 40, 8, 25]);
            let plan = Plan::new(&case.sequence()).unwrap();
            for_each_isa(|ctx| {
                let one = case.run(ctx);
                for threads in 2..=4 {
                    let many = ctx.threads(NonZeroUsize::new(threads).unwrap());
                    let team = if kind.projected { 1 } else { threads };
                    assert_eq!(columns::team_size(&many, &plan, &case.weights().sizes()), team);
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads - 1).build().unwrap();
                    for run in [case.run(&many), pool.install(|| case.run(&many))] {
                        assert_same_run(&one, &run);
                    }
                }
            });
        }
    }
}

#[test]
fn bits_do_not_depend_on_who_packs_the_input_weights() {
    for kind in Kind::all() {
        let case = Case::new(kind, Direction::Forward, [3, 340, 264], &[3, 0, 2]);
        let (weights, sequence) = (case.weights(), case.sequence());
        let (rows, columns) = (sequence.x.rows(), weights.gate_columns());
        let projected = |ctx: &Context| {
            let mut gates = vec![f32::NAN; rows * columns];
            project(ctx, &weights, sequence.x, MatMut::new(&mut gates, rows, columns).unwrap()).unwrap();
            gates
        };
        for_each_isa(|ctx| {
            let one = projected(ctx);
            assert!(one[..case.hidden].iter().all(|sum| sum.is_finite()));
            for threads in [2, 3, 5] {
                let many = projected(&ctx.threads(NonZeroUsize::new(threads).unwrap()));
                assert_same_bits(&one, &many);
            }
        });
    }
}

#[test]
fn inference_gives_the_bits_of_the_forward_pass() {
    let lengths: Vec<usize> = (0..29).map(|b| (b * 7) % 13).collect();
    let layers =
        [([13, 21, 64], &lengths[..]), ([9, 5, 40], &[9; 23]), ([9, 5, 40], &[9]), ([0, 2, 8], &[0, 0])];
    for kind in Kind::all() {
        for direction in DIRECTIONS {
            for (sizes, lengths) in layers {
                let case = Case::new(kind, direction, sizes, lengths);
                for_each_isa(|ctx| {
                    let (expected, _) = case.run(ctx);
                    for threads in 1..=3 {
                        let ctx = ctx.threads(NonZeroUsize::new(threads).unwrap());
                        let mut out = case.nan_output();
                        let ForwardPass { weights, sequence, initial, output } = case.forward_pass(&mut out);
                        infer(&ctx, &weights, &sequence, initial, output).unwrap();
                        assert_same_bits(&expected.y, &out.y);
                        assert_same_bits(&expected.h, &out.h);
                        assert_same_bits(&expected.c, &out.c);
                    }
                });
            }
        }
    }
}

#[test]
fn layers_side_by_side_give_the_bits_of_one_after_the_other() {
    for kind in Kind::all() {
        let cases = DIRECTIONS.map(|direction| {
            let lengths: Vec<usize> = (0..9).map(|b| 1 + (b * 7) % 40).collect();
            Case::new(kind, direction, [40, 21, 72], &lengths)
        });
        for_each_isa(|ctx| {
            let alone = cases.each_ref().map(|case| case.run(ctx));
            for threads in [1, 2, 3, 4] {
                let ctx = ctx.threads(NonZeroUsize::new(threads).unwrap());
                let mut outs = cases.each_ref().map(Case::nan_output);
                let passes = cases.iter().zip(&mut outs).map(|(case, out)| case.forward_pass(out));
                let saved = forward_all(&ctx, passes.collect()).unwrap();
                let mut inferred = cases.each_ref().map(Case::nan_output);
                let passes = cases.iter().zip(&mut inferred).map(|(case, out)| case.forward_pass(out));
                infer_all(&ctx, passes.collect()).unwrap();
                outs.iter().zip(&inferred).for_each(|(out, inferred)| assert_same_bits(&out.y, &inferred.y));
                let mut grads = cases.each_ref().map(Case::empty_grads);
                let passes = cases.iter().zip(saved).zip(&mut grads);
                let passes = passes.map(|((case, saved), grads)| case.backward_pass(saved, grads));
                backward_all(&ctx, passes.collect()).unwrap();
                for ((out, grads), (out_alone, grads_alone)) in outs.iter().zip(&grads).zip(&alone) {
                    let both = tensors(out, grads).into_iter().zip(tensors(out_alone, grads_alone));
                    both.for_each(|((_, beside), (_, alone))| assert_same_bits(beside, alone));
                }
            }
        });
    }
}

#[test]
fn a_shape_that_does_not_fit_in_one_layer_stops_both() {
    let case = Case::new(Cell::Gru, Direction::Forward, [3, 2, 4], &[3, 1]);
    let (ctx, mut outs) = (Context::with_isa(crate::Isa::best()), [case.nan_output(), case.nan_output()]);
    let [first, second] = outs.each_mut().map(|out| case.forward_pass(out));
    let second = ForwardPass { weights: Weights { b_hh: &[], ..second.weights }, ..second };
    let error = forward_all(&ctx, vec![first, second]).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "b_hh: length is 0, expected 12");
    assert!(outs.iter().all(|out| out.y.iter().all(|y| y.is_nan())), "written in spite of the error");
}

#[test]
fn layers_on_teams_within_tasks_of_a_crowded_pool_give_the_same_bits() {
    let case = Case::new(Cell::Gru, Direction::Forward, [48, 3, 256], &[48]);
    let ctx = Context::with_isa(crate::Isa::best());
    let (one, _) = case.run(&ctx);
    let many = ctx.threads(NonZeroUsize::new(3).unwrap());
    assert_eq!(columns::team_size(&many, &Plan::new(&case.sequence()).unwrap(), &case.weights().sizes()), 3);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    pool.install(|| many.for_each_task(12, |_| assert_same_bits(&one.y, &case.run(&many).0.y)));
}

/// Rows `rows` of each step of a time-major tensor of `batch` rows of `width`, the first `seq` steps.
pub(super) fn pick(data: &[f32], seq: usize, batch: usize, width: usize, rows: &[usize]) -> Vec<f32> {
    let row = |t: usize, b: usize| &data[(t * batch + b) * width..][..width];
    (0..seq).flat_map(|t| rows.iter().flat_map(move |&b| row(t, b))).copied().collect()
}

/// The same layer over some rows of the batch, padded to `seq` steps (padding is NaN).
pub(super) fn subset(case: &Case, rows: &[usize], seq: usize) -> Case {
    let batch = case.batch();
    let kept = case.seq.min(seq);
    let steps = |data: &[f32], width: usize| {
        let mut picked = pick(data, kept, batch, width, rows);
        picked.resize(seq * rows.len() * width, f32::NAN);
        picked
    };
    let once = |data: &[f32], width: usize| pick(data, 1, batch, width, rows);
    let (output, cell_columns) = (case.output, case.cell.cell_columns(case.hidden));
    Case {
        seq,
        lengths: rows.iter().map(|&b| case.lengths[b]).collect(),
        x: steps(&case.x, case.input),
        h0: once(&case.h0, output),
        c0: once(&case.c0, cell_columns),
        d: RecurrentOutput {
            y: steps(&case.d.y, output),
            h: once(&case.d.h, output),
            c: once(&case.d.c, cell_columns),
        },
        ..case.clone()
    }
}

#[test]
fn bits_of_a_row_depend_on_neither_its_neighbours_nor_the_padding() {
    for kind in Kind::all() {
        for direction in DIRECTIONS {
            let case = Case::new(kind, direction, [6, 10, 19], &[3, 6, 0, 5, 3, 1, 6, 2]);
            let (output, cell_columns) = (case.output, case.cell.cell_columns(case.hidden));
            for_each_isa(|ctx| {
                let (whole, Grads { layer: whole_grads, .. }) = case.run(ctx);
                for (rows, seq) in [(vec![3], 5), (vec![4], 9), (vec![6, 1, 0], 6), (vec![0, 5, 2], 4)] {
                    let part = subset(&case, &rows, seq);
                    let (out, Grads { layer: grads, .. }) = part.run(ctx);
                    let kept = seq.min(case.seq);
                    let same = |whole: &[f32], part: &[f32], seq: usize, width: usize| {
                        let len = seq * rows.len() * width;
                        assert_same_bits(&pick(whole, seq, case.batch(), width, &rows), &part[..len]);
                        assert!(part[len..].iter().all(|&x| x == 0.0), "padding is not zero");
                    };
                    same(&whole.y, &out.y, kept, output);
                    same(&whole.h, &out.h, 1, output);
                    same(&whole.c, &out.c, 1, cell_columns);
                    same(&whole_grads.d_x, &grads.d_x, kept, case.input);
                    same(&whole_grads.d_h0, &grads.d_h0, 1, output);
                    same(&whole_grads.d_c0, &grads.d_c0, 1, cell_columns);
                    assert!(grads.d_w_ih.iter().chain(&grads.d_w_hh).all(|x| x.is_finite()));
                }
            });
        }
    }
}

#[test]
fn carrying_the_state_over_a_cut_gives_the_bits_of_one_run() {
    for kind in Kind::all() {
        let case = Case::new(kind, Direction::Forward, [7, 5, 18], &[7, 4, 2, 6]);
        for_each_isa(|ctx| cut_in_two(ctx, &case, 3));
    }
}

/// The steps before `cut`, then the others from the state that these leave, give the bits of all steps at once.
pub(super) fn cut_in_two(ctx: &Context, case: &Case, cut: usize) {
    let (whole, _) = case.run(ctx);
    let rows = cut * case.batch();
    let mut first = case.clone();
    first.seq = cut;
    first.lengths.iter_mut().for_each(|length| *length = cut.min(*length));
    first.x.truncate(rows * case.input);
    first.d.y.truncate(rows * case.output);
    let (head, _) = first.run(ctx);
    let mut second = case.clone();
    second.seq -= cut;
    second.lengths.iter_mut().for_each(|length| *length -= cut.min(*length));
    second.x.drain(..rows * case.input);
    second.d.y.drain(..rows * case.output);
    (second.h0, second.c0) = (head.h.clone(), head.c.clone());
    let (tail, _) = second.run(ctx);
    assert_same_bits(&whole.y, &[head.y, tail.y].concat());
    assert_same_bits(&whole.h, &tail.h);
    assert_same_bits(&whole.c, &tail.c);
}

#[test]
fn reverse_is_forward_over_rows_reversed_within_their_lengths() {
    for kind in Kind::all() {
        let reverse = Case::new(kind, Direction::Reverse, [5, 4, 9], &[5, 2, 0, 3]);
        let flip = |data: &[f32], width: usize| {
            let mut flipped = data.to_vec();
            for (b, &length) in reverse.lengths.iter().enumerate() {
                for t in 0..length {
                    let (from, to) = ((length - 1 - t) * reverse.batch() + b, t * reverse.batch() + b);
                    flipped[to * width..][..width].copy_from_slice(&data[from * width..][..width]);
                }
            }
            flipped
        };
        let mut forward = reverse.clone();
        forward.direction = Direction::Forward;
        forward.x = flip(&reverse.x, reverse.input);
        forward.d.y = flip(&reverse.d.y, reverse.output);
        for_each_isa(|ctx| {
            let ((out, grads), (flipped, flipped_grads)) = (reverse.run(ctx), forward.run(ctx));
            let (grads, flipped_grads) = (grads.layer, flipped_grads.layer);
            assert_same_bits(&out.y, &flip(&flipped.y, reverse.output));
            assert_same_bits(&out.h, &flipped.h);
            assert_same_bits(&grads.d_x, &flip(&flipped_grads.d_x, reverse.input));
            assert_same_bits(&grads.d_h0, &flipped_grads.d_h0);
        });
    }
}

#[test]
fn gradients_of_weights_are_added_to_what_is_there() {
    for kind in [Kind::from(Cell::Gru), Kind { cell: Cell::LstmPeephole, projected: true }] {
        let case = Case::new(kind, Direction::Forward, [3, 2, 5], &[3, 1]);
        for_each_isa(|ctx| {
            let (_, once) = case.run(ctx);
            let mut y = vec![0.0; case.d.y.len()];
            let output = Output { y: MatMut::new(&mut y, 6, case.output).unwrap(), last: None };
            let initial = Some(case.state(&case.h0, &case.c0));
            let saved = forward(ctx, &case.weights(), &case.sequence(), initial, output).unwrap();
            let upstream = OutputGrads {
                d_y: Some(MatRef::new(&case.d.y, 6, case.output).unwrap()),
                d_last: Some(case.state(&case.d.h, &case.d.c)),
            };
            let mut added = case.empty_grads();
            let Grads { layer, extra } = &mut added;
            let sums = [&mut layer.d_w_ih, &mut layer.d_w_hh, &mut layer.d_b_ih, &mut layer.d_b_hh];
            sums.into_iter().chain([&mut extra.d_peepholes, &mut extra.d_w_hr]).for_each(|d| d.fill(1.0));
            let (weights, _) = case.split_grads(&mut added);
            let into = InputGrads { weights, d_x: None, d_initial: None };
            backward(ctx, &case.weights(), &case.sequence(), saved, upstream, into).unwrap();
            let pairs = [
                (&once.layer.d_w_ih, &added.layer.d_w_ih),
                (&once.layer.d_w_hh, &added.layer.d_w_hh),
                (&once.layer.d_b_ih, &added.layer.d_b_ih),
                (&once.layer.d_b_hh, &added.layer.d_b_hh),
                (&once.extra.d_peepholes, &added.extra.d_peepholes),
                (&once.extra.d_w_hr, &added.extra.d_w_hr),
            ];
            for (once, added) in pairs {
                let near =
                    |(&once, &added): (&f32, &f32)| (once + 1.0 - added).abs() <= 1e-5 * (1.0 + once.abs());
                assert!(once.iter().zip(added).all(near), "{once:?} {added:?}");
            }
        });
    }
}

/// Peepholes of zeros change no sum, and a projection by the unit matrix no state.
#[test]
fn extras_that_do_nothing_give_the_bits_of_an_lstm() {
    for direction in DIRECTIONS {
        let plain = Case::new(Cell::Lstm, direction, [9, 12, 37], &[9, 2, 0, 7, 9]);
        let unit = |i: usize| if i.is_multiple_of(37 + 1) { 1.0 } else { 0.0 };
        let w_hr: Vec<f32> = (0..37 * 37).map(unit).collect();
        let zeros = vec![0.0; 3 * 37];
        let peephole = Case { cell: Cell::LstmPeephole, peepholes: zeros, ..plain.clone() };
        let projected = Case { projected: true, w_hr: w_hr.clone(), ..plain.clone() };
        let both = Case { projected: true, w_hr, ..peephole.clone() };
        for_each_isa(|ctx| {
            let (out, grads) = plain.run(ctx);
            for extended in [&peephole, &projected, &both] {
                let (extended_out, extended_grads) = extended.run(ctx);
                let all = tensors(&out, &grads).into_iter().zip(tensors(&extended_out, &extended_grads));
                for ((name, one), (_, other)) in all.take(10) {
                    assert!(!one.is_empty(), "{name}");
                    // x + 0 turns −0 into 0.
                    let sum = |x: &[f32]| x.iter().map(|x| x + 0.0).collect::<Vec<f32>>();
                    assert_same_bits(&sum(one), &sum(other));
                }
            }
        });
    }
}

#[test]
fn bad_shapes_are_typed_errors() {
    let case = Case::new(Cell::Lstm, Direction::Forward, [3, 2, 4], &[3, 1]);
    let ctx = Context::with_isa(crate::Isa::best());
    let mut y = vec![7.0; 24];
    let mut run = |weights: &Weights<'_>, sequence: &Sequence<'_>, initial: Option<State<'_>>| {
        let output = Output { y: MatMut::new(&mut y, 6, 4).unwrap(), last: None };
        forward(&ctx, weights, sequence, initial, output).map(|_| ()).unwrap_err().to_string()
    };
    let (weights, sequence) = (case.weights(), case.sequence());
    let error = run(&Weights { b_hh: &case.b_hh[1..], ..weights }, &sequence, None);
    assert_eq!(error, "b_hh: length is 15, expected 16");
    let error = run(&Weights { peepholes: &[1.0; 12], ..weights }, &sequence, None);
    assert_eq!(error, "peepholes: length is 12, expected 0");
    let error = run(&Weights { cell: Cell::LstmPeephole, ..weights }, &sequence, None);
    assert_eq!(error, "peepholes: length is 0, expected 12");
    let w_hr = Some(MatRef::new(&case.w_ih[..12], 3, 4).unwrap());
    assert_eq!(run(&Weights { w_hr, ..weights }, &sequence, None), "w_hr: rows is 3, expected 4");
    let w_hh = weights.w_hh.sub(0..4, 0..4);
    let plain = Weights { cell: Cell::Tanh, w_hh, w_hr, ..weights };
    let plain = Weights { w_ih: weights.w_ih.sub(0..4, 0..2), b_ih: &[0.0; 4], b_hh: &[0.0; 4], ..plain };
    assert_eq!(run(&plain, &sequence, None), "w_hr: rows (this cell has no projection) is 3, expected 0");
    let error = run(&Weights { cell: Cell::Gru, ..weights }, &sequence, None);
    assert_eq!(error, "w_hh: rows is 16, expected 12");
    let error = run(&weights, &Sequence { lengths: &[3, 4], ..sequence }, None);
    assert!(error.starts_with("lengths[1] is 4"), "{error}");
    let error = run(&weights, &Sequence { lengths: &[1; 4], ..sequence }, None);
    assert!(error.starts_with("x: rows"), "{error}");
    let h = MatRef::new(&case.h0, 2, 4).unwrap();
    assert_eq!(run(&weights, &sequence, Some(State { h, c: None })), "initial.c: columns is 0, expected 4");
    assert!(y.iter().all(|&y| y == 7.0), "written in spite of the error");
    assert!(matches!(
        Case { b_ih: vec![], ..case.clone() }.weights().check(),
        Err(ShapeError::Dimension { argument: "b_ih", .. })
    ));
}
