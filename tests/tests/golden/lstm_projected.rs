//! The projected LSTM against `torch.nn.LSTM(proj_size=…)`, both directions, packed sequences, states in and out.

use std::path::Path;

use kavanam_kernels::reference::{self, LstmExtras, Recurrent, RecurrentOutput};
use kavanam_kernels::rnn::{
    self, Cell, Direction, InputGrads, Output, OutputGrads, Sequence, State, StateMut, WeightGrads, Weights,
};
use kavanam_kernels::testing::{UNIT_ROUNDOFF, for_each_isa};
use kavanam_kernels::{Context, MatMut, MatRef};
use kavanam_model::io::safetensors::{self, Contents};

const BATCH: usize = 4;
const SEQ: usize = 6;
const INPUT: usize = 3;
const HIDDEN: usize = 7;
const OUTPUT: usize = 4;
const LENGTHS: [usize; BATCH] = [5, 2, 6, 1];

struct Golden(Contents);

impl Golden {
    fn load() -> Golden {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/lstm_projected.safetensors");
        Golden(safetensors::load(&path).unwrap())
    }

    fn whole(&self, name: &str) -> Vec<f32> {
        self.0.get(name).unwrap_or_else(|| panic!("no tensor {name}")).data.clone()
    }

    /// A weight of that direction, or its gradient.
    fn weight(&self, name: &str, reverse: bool) -> Vec<f32> {
        self.whole(&format!("{name}_l0{}", if reverse { "_reverse" } else { "" }))
    }

    /// That direction's half of `[2, batch, width]`.
    fn state(&self, name: &str, reverse: bool) -> Vec<f32> {
        let whole = self.whole(name);
        let (there, back) = whole.split_at(whole.len() / 2);
        if reverse { back } else { there }.to_vec()
    }

    /// That direction's columns of `[seq, batch, 2 · output]`.
    fn columns(&self, name: &str, reverse: bool) -> Vec<f32> {
        let first = if reverse { OUTPUT } else { 0 };
        self.whole(name).chunks_exact(2 * OUTPUT).flat_map(|row| &row[first..][..OUTPUT]).copied().collect()
    }
}

/// One direction: weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, x, h0, c0 and the gradients of y, h, c.
struct Inputs {
    reverse: bool,
    tensors: [Vec<f32>; 11],
}

/// y, h, c, d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh, d_weight_hr, d_h0, d_c0, and d_x last.
type Results<T> = Vec<Vec<T>>;

const WEIGHTS: [&str; 5] = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"];

impl Inputs {
    fn new(golden: &Golden, reverse: bool) -> Inputs {
        let [w_ih, w_hh, b_ih, b_hh, w_hr] = WEIGHTS.map(|name| golden.weight(name, reverse));
        let [h0, c0, d_h, d_c] = ["h0", "c0", "d_h", "d_c"].map(|name| golden.state(name, reverse));
        let (x, d_y) = (golden.whole("x"), golden.columns("d_y", reverse));
        Inputs { reverse, tensors: [w_ih, w_hh, b_ih, b_hh, w_hr, x, h0, c0, d_y, d_h, d_c] }
    }

    fn naive<T: reference::Real>(&self) -> Results<T> {
        let real = |x: &Vec<f32>| x.iter().map(|&x| T::from(x)).collect::<Vec<T>>();
        let [w_ih, w_hh, b_ih, b_hh, w_hr, x, h0, c0, y, h, c] = self.tensors.each_ref().map(real);
        let layer = Recurrent {
            seq: SEQ,
            input: INPUT,
            hidden: HIDDEN,
            w_ih: &w_ih,
            w_hh: &w_hh,
            b_ih: &b_ih,
            b_hh: &b_hh,
            x: &x,
            lengths: &LENGTHS,
            reverse: self.reverse,
            h0: &h0,
            c0: &c0,
        };
        let extras = LstmExtras { peepholes: &[], w_hr: Some(&w_hr) };
        let out = reference::lstm_extended_forward(&layer, &extras);
        let (g, extra) = reference::lstm_extended_backward(&layer, &extras, &RecurrentOutput { y, h, c });
        let weights = [g.d_w_ih, g.d_w_hh, g.d_b_ih, g.d_b_hh, extra.d_w_hr];
        [out.y, out.h, out.c].into_iter().chain(weights).chain([g.d_h0, g.d_c0, g.d_x]).collect()
    }

    fn kernels(&self, ctx: &Context) -> Results<f32> {
        let [w_ih, w_hh, b_ih, b_hh, w_hr, x, h0, c0, d_y, d_h, d_c] = self.tensors.each_ref();
        let matrix = |data, rows, cols| MatRef::new(data, rows, cols).unwrap();
        let (gates, rows) = (4 * HIDDEN, SEQ * BATCH);
        let weights = Weights {
            cell: Cell::Lstm,
            w_ih: matrix(w_ih, gates, INPUT),
            w_hh: matrix(w_hh, gates, OUTPUT),
            b_ih,
            b_hh,
            peepholes: &[],
            w_hr: Some(matrix(w_hr, OUTPUT, HIDDEN)),
        };
        let direction = if self.reverse { Direction::Reverse } else { Direction::Forward };
        let sequence = Sequence { x: matrix(x, rows, INPUT), lengths: &LENGTHS, direction };
        let state = |h, c| State { h: matrix(h, BATCH, OUTPUT), c: Some(matrix(c, BATCH, HIDDEN)) };
        let like = [d_y, d_h, d_c, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, x];
        let mut results: Results<f32> = like.map(|like| vec![0.0; like.len()]).to_vec();
        let [y, h, c, d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_w_hr, d_h0, d_c0, d_x] = &mut results[..] else {
            unreachable!("eleven tensors")
        };
        let state_mut = |h, c| StateMut {
            h: MatMut::new(h, BATCH, OUTPUT).unwrap(),
            c: Some(MatMut::new(c, BATCH, HIDDEN).unwrap()),
        };
        let output = Output { y: MatMut::new(y, rows, OUTPUT).unwrap(), last: Some(state_mut(h, c)) };
        let saved = rnn::forward(ctx, &weights, &sequence, Some(state(h0, c0)), output).unwrap();
        let upstream = OutputGrads { d_y: Some(matrix(d_y, rows, OUTPUT)), d_last: Some(state(d_h, d_c)) };
        let grads = InputGrads {
            weights: WeightGrads {
                d_w_ih: MatMut::new(d_w_ih, gates, INPUT).unwrap(),
                d_w_hh: MatMut::new(d_w_hh, gates, OUTPUT).unwrap(),
                d_b_ih,
                d_b_hh,
                d_peepholes: &mut [],
                d_w_hr: Some(MatMut::new(d_w_hr, OUTPUT, HIDDEN).unwrap()),
            },
            d_x: Some(MatMut::new(d_x, rows, INPUT).unwrap()),
            d_initial: Some(state_mut(d_h0, d_c0)),
        };
        rnn::backward(ctx, &weights, &sequence, saved, upstream, grads).unwrap();
        results
    }
}

/// What PyTorch gives for one direction; d_x, the sum of both, apart.
fn expected(golden: &Golden, reverse: bool) -> Vec<Vec<f32>> {
    let gradients = WEIGHTS.map(|name| golden.weight(&format!("d_{name}"), reverse));
    let states = ["h", "c", "d_h0", "d_c0"].map(|name| golden.state(name, reverse));
    let [h, c, d_h0, d_c0] = states;
    [golden.columns("y", reverse), h, c].into_iter().chain(gradients).chain([d_h0, d_c0]).collect()
}

fn sum<T: reference::Real>(a: &[T], b: &[T]) -> Vec<T> {
    a.iter().zip(b).map(|(&a, &b)| a + b).collect()
}

/// PyTorch's f64, rounded to f32 when it was written, is the oracle's to that rounding: a factor of 1.01 and 1e-12 are for
/// the roundings of both in f64.
#[test]
fn the_oracle_computes_what_pytorch_computes() {
    let golden = Golden::load();
    let both = [false, true].map(|reverse| {
        let mut found = Inputs::new(&golden, reverse).naive::<f64>();
        let d_x = found.pop().unwrap();
        for (found, expected) in found.iter().zip(expected(&golden, reverse)) {
            assert_rounded(found, &expected);
        }
        d_x
    });
    assert_rounded(&sum(&both[0], &both[1]), &golden.whole("d_x"));
}

#[track_caller]
fn assert_rounded(exact: &[f64], rounded: &[f32]) {
    assert_eq!(exact.len(), rounded.len());
    for (exact, &rounded) in exact.iter().zip(rounded) {
        let error = (exact - f64::from(rounded)).abs();
        assert!(error <= 1.01 * UNIT_ROUNDOFF * exact.abs() + 1e-12, "{exact:e} and {rounded:e}");
    }
}

/// The error of outputs is at most twice, that of gradients three times the naive f32 form's, whose smallest error is taken to be
/// six roundings of the largest element, as in the kernels' own tests.
#[test]
fn the_kernels_compute_what_pytorch_computes() {
    let golden = Golden::load();
    for reverse in [false, true] {
        let (inputs, exact) = (Inputs::new(&golden, reverse), expected(&golden, reverse));
        let naive = inputs.naive::<f32>();
        let scale = |tensors: &[Vec<f32>]| tensors.iter().flatten().fold(1.0, |m: f32, x| m.max(x.abs()));
        let (states, gradients) = (scale(&exact[..3]), scale(&exact[3..]));
        for_each_isa(|ctx| {
            let found = inputs.kernels(ctx);
            for (i, exact) in exact.iter().enumerate() {
                let worst = |x: &[f32]| x.iter().zip(exact).fold(0.0, |m: f32, (x, e)| m.max((x - e).abs()));
                let (factor, largest) = if i < 3 { (2.0, states) } else { (3.0, gradients) };
                let bound = factor * worst(&naive[i]).max(6.0 * UNIT_ROUNDOFF as f32 * largest);
                assert!(worst(&found[i]) <= bound, "tensor {i} on {}: {}", ctx.isa(), worst(&found[i]));
            }
        });
    }
}
