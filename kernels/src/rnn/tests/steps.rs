//! Single steps: the bits of the whole sequence, forward and backward.

use super::*;
use crate::gemm::Accum;
use crate::rnn::{
    PackedBackward, PackedCell, StepInput, input_gradient, project, step, step_backward, weight_gradients,
};
use crate::testing::{assert_same_bits, for_each_isa};

/// Steps through a case whose rows all have full length; gives y, final state, the gates of all steps and the
/// cell states before each.
fn by_steps(ctx: &Context, case: &Case) -> (RecurrentOutput<f32>, Vec<f32>, Vec<Vec<f32>>) {
    let (batch, hidden, input) = (case.batch(), case.hidden, case.input);
    let packed = PackedCell::pack(ctx, &case.weights()).unwrap();
    assert_eq!((packed.cell(), packed.hidden(), packed.input()), (case.cell, hidden, input));
    let columns = packed.gate_columns();
    assert_eq!((packed.output(), columns), (case.output, case.weights().gate_columns()));
    let (mut h, mut c) = (case.h0.clone(), case.c0.clone());
    let (mut y, mut all_gates, mut cells) = (vec![], vec![], vec![]);
    for x in case.x.chunks(batch * input) {
        let mut gates = vec![f32::NAN; batch * columns];
        let (mut h_next, mut c_next) = (vec![f32::NAN; h.len()], vec![f32::NAN; c.len()]);
        let x = MatRef::new(x, batch, input).unwrap();
        let into = MatMut::new(&mut gates, batch, columns).unwrap();
        let next = case.state_mut(&mut h_next, &mut c_next);
        step(ctx, &packed, StepInput { x, accum: Accum::Overwrite }, case.state(&h, &c), into, next).unwrap();
        cells.push(c);
        (h, c) = (h_next, c_next);
        y.extend_from_slice(&h);
        all_gates.extend(gates);
    }
    (RecurrentOutput { y, h, c }, all_gates, cells)
}

#[test]
fn steps_give_the_bits_of_the_whole_sequence() {
    for kind in Kind::all() {
        let case = Case::new(kind, Direction::Forward, [4, 6, 21], &[4; 5]);
        for_each_isa(|ctx| {
            let (whole, _) = case.run(ctx);
            let (stepped, ..) = by_steps(ctx, &case);
            assert_same_bits(&whole.y, &stepped.y);
            assert_same_bits(&whole.h, &stepped.h);
            assert_same_bits(&whole.c, &stepped.c);
        });
    }
}

#[test]
fn steps_backward_give_the_bits_of_the_whole_sequence() {
    for kind in Kind::all() {
        let case = Case::new(kind, Direction::Forward, [4, 6, 21], &[4; 5]);
        let (batch, output, input) = (case.batch(), case.output, case.input);
        let columns = case.weights().gate_columns();
        for_each_isa(|ctx| {
            let (out, grads) = case.run(ctx);
            let (_, mut gates, cells) = by_steps(ctx, &case);
            let packed = PackedBackward::pack(ctx, &case.weights()).unwrap();
            let h_prev = [&case.h0[..], &out.y[..3 * batch * output]].concat();
            let (mut d_h, mut d_c) = (case.d.h.clone(), case.d.c.clone());
            let mut d_x = vec![f32::NAN; case.x.len()];
            for t in (0..case.seq).rev() {
                let d_y = &case.d.y[t * batch * output..][..batch * output];
                d_h.iter_mut().zip(d_y).for_each(|(d_h, d_y)| *d_h += d_y);
                let gates = &mut gates[t * batch * columns..][..batch * columns];
                let gates = MatMut::new(gates, batch, columns).unwrap();
                let d_x = MatMut::new(&mut d_x[t * batch * input..][..batch * input], batch, input).unwrap();
                let state = case.state(&h_prev[t * batch * output..][..batch * output], &cells[t]);
                let d_state = case.state_mut(&mut d_h, &mut d_c);
                step_backward(ctx, &packed, state, gates, d_state, Some(d_x)).unwrap();
            }
            assert_same_bits(&grads.layer.d_h0, &d_h);
            assert_same_bits(&grads.layer.d_c0, &d_c);
            assert_same_bits(&grads.layer.d_x, &d_x);
            check_weight_gradients(ctx, &case, &gates, &h_prev, &grads);
            let d_gates = MatRef::new(&gates, case.seq * batch, columns).unwrap();
            for part in [0..input, 0..2, 2..input] {
                let expected: Vec<f32> =
                    d_x.chunks_exact(input).flat_map(|row| &row[part.clone()]).copied().collect();
                assert_same_bits(&expected, &input_gradient_of(ctx, &case, d_gates, part));
            }
        });
    }
}

/// The gradient of some columns of the input, from the gates' gradients of all steps.
fn input_gradient_of(
    ctx: &Context,
    case: &Case,
    d_gates: MatRef<'_>,
    columns: std::ops::Range<usize>,
) -> Vec<f32> {
    let (weights, rows) = (case.weights(), d_gates.rows());
    let mut d_x = vec![f32::NAN; rows * columns.len()];
    let into = MatMut::new(&mut d_x, rows, columns.len()).unwrap();
    let w_ih = weights.w_ih.sub(0..weights.w_ih.rows(), columns);
    input_gradient(ctx, &Weights { w_ih, ..weights }, d_gates, into).unwrap();
    d_x
}

fn check_weight_gradients(
    ctx: &Context,
    case: &Case,
    d_gates: &[f32],
    h_prev: &[f32],
    expected: &Grads<f32>,
) {
    let rows = case.seq * case.batch();
    let mut found = case.empty_grads();
    let d_gates = MatRef::new(d_gates, rows, case.weights().gate_columns()).unwrap();
    let x = MatRef::new(&case.x, rows, case.input).unwrap();
    let h_prev = MatRef::new(h_prev, rows, case.output).unwrap();
    let (into, _) = case.split_grads(&mut found);
    weight_gradients(ctx, case.cell, d_gates, x, h_prev, into).unwrap();
    assert_same_bits(&expected.layer.d_w_ih, &found.layer.d_w_ih);
    assert_same_bits(&expected.layer.d_w_hh, &found.layer.d_w_hh);
    assert_same_bits(&expected.layer.d_b_ih, &found.layer.d_b_ih);
    assert_same_bits(&expected.layer.d_b_hh, &found.layer.d_b_hh);
    assert_same_bits(&expected.extra.d_peepholes, &found.extra.d_peepholes);
    assert_same_bits(&expected.extra.d_w_hr, &found.extra.d_w_hr);
}

#[test]
fn an_input_in_two_parts_gives_what_the_whole_input_gives() {
    for kind in Kind::all() {
        let case = Case::new(kind, Direction::Forward, [1, 9, 12], &[1; 3]);
        let (batch, hidden, known) = (3, case.hidden, 5);
        let (gate_rows, columns) = (kind.cell.gates() * hidden, case.weights().gate_columns());
        for_each_isa(|ctx| {
            let (whole, ..) = by_steps(ctx, &case);
            let weights = case.weights();
            let x = MatRef::new(&case.x, batch, 9).unwrap();
            let first = Weights { w_ih: weights.w_ih.sub(0..gate_rows, 0..known), ..weights };
            let rest = Weights { w_ih: weights.w_ih.sub(0..gate_rows, known..9), ..weights };
            let mut gates = vec![f32::NAN; batch * columns];
            let mut gates = MatMut::new(&mut gates, batch, columns).unwrap();
            project(ctx, &first, x.sub(0..batch, 0..known), gates.reborrow()).unwrap();
            let packed = PackedCell::pack(ctx, &rest).unwrap();
            let (mut h, mut c) = (vec![f32::NAN; case.h0.len()], vec![f32::NAN; case.c0.len()]);
            let input = StepInput { x: x.sub(0..batch, known..9), accum: Accum::Add };
            let next = case.state_mut(&mut h, &mut c);
            step(ctx, &packed, input, case.state(&case.h0, &case.c0), gates, next).unwrap();
            let (naive, _) = case.naive::<f32>();
            let (exact, _) = case.naive::<f64>();
            assert_near("h", 2.0, &h, &naive.h, &exact.h);
            assert_near("whole h", 2.0, &whole.h, &naive.h, &exact.h);
        });
    }
}

#[test]
fn bad_shapes_are_typed_errors() {
    let case = Case::new(Cell::Gru, Direction::Forward, [1, 3, 4], &[1; 2]);
    let ctx = Context::with_isa(crate::Isa::best());
    let packed = PackedCell::pack(&ctx, &case.weights()).unwrap();
    let x = MatRef::new(&case.x, 2, 3).unwrap();
    let input = StepInput { x, accum: Accum::Overwrite };
    let (mut gates, mut h, mut c) = (vec![0.0; 32], vec![0.0; 8], vec![0.0; 8]);
    let next = case.state_mut(&mut h, &mut c);
    let narrow = MatMut::new(&mut gates[..24], 2, 12).unwrap();
    let error = step(&ctx, &packed, input, case.state(&case.h0, &[]), narrow, next).unwrap_err();
    assert_eq!(error.to_string(), "gates: columns is 12, expected 16");
    let with_cell =
        State { h: MatRef::new(&case.h0, 2, 4).unwrap(), c: Some(MatRef::new(&case.h0, 2, 4).unwrap()) };
    let next = case.state_mut(&mut h, &mut c);
    let all = MatMut::new(&mut gates, 2, 16).unwrap();
    let error = step(&ctx, &packed, input, with_cell, all, next).unwrap_err();
    assert!(error.to_string().starts_with("state.c: columns (this cell has no such state)"), "{error}");

    let mut d_x = [7.0; 8];
    let mut refused = |gate_columns: usize, [rows, input]: [usize; 2]| {
        let d_gates = MatRef::new(&gates[..2 * gate_columns], 2, gate_columns).unwrap();
        let d_x = MatMut::new(&mut d_x[..rows * input], rows, input).unwrap();
        input_gradient(&ctx, &case.weights(), d_gates, d_x).unwrap_err().to_string()
    };
    assert_eq!(refused(12, [2, 3]), "gates: columns is 12, expected 16");
    assert_eq!(refused(16, [1, 3]), "gates: rows is 2, expected 1");
    assert_eq!(refused(16, [2, 4]), "d_x: columns is 4, expected 3");
    assert!(d_x.iter().all(|&x| x == 7.0));
}
