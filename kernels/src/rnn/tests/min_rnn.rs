//! minGRU and minLSTM against the naive form, and the bits that must not change.

use std::num::NonZeroUsize;

use proptest::prelude::*;

use super::*;
use crate::error::ShapeError;
use crate::reference::MinRnn;
use crate::rnn::min_rnn::{Candidate, MinCell, Scan, Upstream};
use crate::rnn::{Direction, min_rnn};
use crate::testing::{assert_same_bits, for_each_isa};

/// A scan with its inputs and the gradients of its outputs.
#[derive(Debug, Clone)]
struct Scanned {
    cell: MinCell,
    candidate: Candidate,
    direction: Direction,
    seq: usize,
    hidden: usize,
    lengths: Vec<usize>,
    gates: Vec<f32>,
    h0: Vec<f32>,
    d_y: Vec<f32>,
    d_last: Vec<f32>,
}

/// y, last, d_gates, d_initial.
type Tensors<T> = [Vec<T>; 4];
const NAMES: [&str; 4] = ["y", "last", "d_gates", "d_initial"];

impl Scanned {
    fn new(kind: (MinCell, Candidate, Direction), seq: usize, hidden: usize, lengths: &[usize]) -> Scanned {
        let batch = lengths.len();
        Scanned {
            cell: kind.0,
            candidate: kind.1,
            direction: kind.2,
            seq,
            hidden,
            lengths: lengths.to_vec(),
            gates: scaled(seq * batch * kind.0.gates() * hidden, 4.0, 1),
            h0: scaled(batch * hidden, 2.0, 2),
            d_y: uniform(seq * batch * hidden, 3),
            d_last: uniform(batch * hidden, 4),
        }
    }

    fn scan(&self) -> Scan<'_> {
        let Scanned { cell, candidate, hidden, seq, ref lengths, direction, .. } = *self;
        Scan { cell, candidate, hidden, seq, lengths, direction }
    }

    fn run(&self, ctx: &Context) -> Tensors<f32> {
        let nan = |like: &[f32]| vec![f32::NAN; like.len()];
        let (mut y, mut last, mut d_initial) = (nan(&self.d_y), nan(&self.h0), nan(&self.h0));
        let mut gates = self.gates.clone();
        let scan = self.scan();
        min_rnn::forward(ctx, &scan, &mut gates, Some(&self.h0), &mut y, Some(&mut last)).unwrap();
        let upstream =
            Upstream { initial: Some(&self.h0), y: &y, d_y: &self.d_y, d_last: Some(&self.d_last) };
        min_rnn::backward(ctx, &scan, &upstream, &mut gates, Some(&mut d_initial)).unwrap();
        [y, last, gates, d_initial]
    }

    fn naive<T: Real>(&self) -> Tensors<T> {
        let real = |data: &[f32]| data.iter().map(|&x| T::from(x)).collect::<Vec<T>>();
        let (gates, h0) = (real(&self.gates), real(&self.h0));
        let rnn = MinRnn {
            lstm: self.cell == MinCell::Lstm,
            positive: self.candidate == Candidate::Positive,
            hidden: self.hidden,
            gates: &gates,
            lengths: &self.lengths,
            reverse: self.direction == Direction::Reverse,
            h0: &h0,
        };
        let (y, last) = reference::min_rnn_forward(&rnn);
        let (d_gates, d_h0) = reference::min_rnn_backward(&rnn, &real(&self.d_y), &real(&self.d_last));
        [y, last, d_gates, d_h0]
    }
}

fn kinds() -> Vec<(MinCell, Candidate, Direction)> {
    let cells = [MinCell::Gru, MinCell::Lstm];
    let candidates = [Candidate::Linear, Candidate::Positive];
    let directions = [Direction::Forward, Direction::Reverse];
    let pairs = cells.into_iter().flat_map(|cell| candidates.map(|candidate| (cell, candidate)));
    pairs.flat_map(|(cell, candidate)| directions.map(|d| (cell, candidate, d))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn scans_are_as_exact_as_the_naive_form(
        kind in prop::sample::select(kinds()),
        hidden in prop::sample::select(vec![0usize, 1, 7, 8, 9, 16, 33, 255, 256, 257, 300]),
        lengths in prop::collection::vec(0usize..9, 0..5),
    ) {
        let seq = lengths.iter().copied().max().unwrap_or(0) + hidden % 2;
        let case = Scanned::new(kind, seq, hidden, &lengths);
        let (naive, exact) = (case.naive::<f32>(), case.naive::<f64>());
        for_each_isa(|ctx| {
            let fast = case.run(ctx);
            for (i, name) in NAMES.iter().enumerate() {
                let gradient = name.starts_with("d_");
                let group = if gradient { [&exact[2], &exact[3]] } else { [&exact[0], &exact[1]] };
                let scale = largest(group[0]).max(largest(group[1])).max(1.0);
                let factor = if gradient { 3.0 } else { 2.0 };
                assert_near_scaled(name, factor, (&fast[i], &naive[i], &exact[i]), scale);
            }
        });
    }
}

#[test]
fn bits_of_a_row_depend_on_neither_threads_nor_neighbours_nor_padding() {
    for kind in kinds() {
        let (hidden, lengths) = (270, [5usize, 3, 0, 4]);
        let case = Scanned::new(kind, 5, hidden, &lengths);
        let columns = kind.0.gates() * hidden;
        let pick = |data: &[f32], steps: usize, width: usize, row: usize| -> Vec<f32> {
            (0..steps).flat_map(|t| &data[(t * lengths.len() + row) * width..][..width]).copied().collect()
        };
        for_each_isa(|ctx| {
            let whole = case.run(ctx);
            let threaded = case.run(&ctx.threads(NonZeroUsize::new(3).unwrap()));
            whole.iter().zip(&threaded).for_each(|(one, many)| assert_same_bits(one, many));
            let (row, steps) = (1, 3);
            let alone = Scanned {
                seq: steps,
                lengths: vec![lengths[row]],
                gates: pick(&case.gates, steps, columns, row),
                h0: pick(&case.h0, 1, hidden, row),
                d_y: pick(&case.d_y, steps, hidden, row),
                d_last: pick(&case.d_last, 1, hidden, row),
                ..case.clone()
            };
            let [y, last, d_gates, d_initial] = alone.run(ctx);
            assert_same_bits(&y, &pick(&whole[0], steps, hidden, row));
            assert_same_bits(&last, &pick(&whole[1], 1, hidden, row));
            assert_same_bits(&d_gates, &pick(&whole[2], steps, columns, row));
            assert_same_bits(&d_initial, &pick(&whole[3], 1, hidden, row));
        });
    }
}

#[test]
fn bits_do_not_depend_on_how_channels_are_dealt() {
    let steps = 1100;
    for kind in kinds() {
        // One row, and two that are not equally long.
        for (hidden, lengths) in [(180, vec![steps]), (150, vec![steps, steps / 2])] {
            let case = Scanned::new(kind, steps, hidden, &lengths);
            for_each_isa(|ctx| {
                let whole = case.run(ctx);
                for threads in [2, 3, 5] {
                    let many = case.run(&ctx.threads(NonZeroUsize::new(threads).unwrap()));
                    whole.iter().zip(&many).for_each(|(one, many)| assert_same_bits(one, many));
                }
            });
        }
    }
}

#[test]
fn a_carried_state_gives_the_bits_of_one_pass() {
    let case = Scanned::new((MinCell::Lstm, Candidate::Linear, Direction::Forward), 6, 20, &[6, 6]);
    for_each_isa(|ctx| {
        let [whole, last, ..] = case.run(ctx);
        let (mut state, mut joined) = (case.h0.clone(), Vec::new());
        for gates in case.gates.chunks(2 * 2 * 60) {
            let scan = Scan { seq: 2, lengths: &[2, 2], ..case.scan() };
            let (before, mut y) = (state.clone(), vec![f32::NAN; 2 * 2 * 20]);
            let mut gates = gates.to_vec();
            min_rnn::forward(ctx, &scan, &mut gates, Some(&before), &mut y, Some(&mut state)).unwrap();
            joined.extend(y);
        }
        assert_same_bits(&joined, &whole);
        assert_same_bits(&state, &last);
    });
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let ctx = Context::with_isa(crate::Isa::scalar());
    let case = Scanned::new((MinCell::Gru, Candidate::Linear, Direction::Forward), 2, 3, &[2, 1]);
    let (mut gates, mut y) = (case.gates.clone(), vec![7.0; 12]);
    let mut run = |scan: &Scan<'_>, initial: Option<&[f32]>| {
        let error = min_rnn::forward(&ctx, scan, &mut gates, initial, &mut y, None).unwrap_err();
        assert!(y.iter().all(|&x| x == 7.0));
        error
    };
    assert!(run(&Scan { hidden: 4, ..case.scan() }, None).to_string().contains("gates"));
    assert!(run(&case.scan(), Some(&[0.0; 5])).to_string().contains("initial"));
    let long = Scan { lengths: &[2, 3], ..case.scan() };
    assert!(matches!(run(&long, None), ShapeError::Index { argument: "lengths", position: 1, .. }));
}
