//! LSTM and GRU layers as they stand in a textbook, on our own matrix products: [`NaiveLayer`], which the models have
//! as an implementation too.

use std::borrow::Cow;

use kavanam_kernels::rnn::{Cell, Direction};
use kavanam_kernels::{Context, gemm};
use kavanam_model::ops::{NaiveLayer, NaiveUpstream};

use crate::cases::Problem;
use crate::cases::rnn::{Kind, Problem as RnnProblem};
use crate::error::HarnessError;
use crate::measure::workload::Workload;
use crate::peers::{Peer, Unready};

/// The peer.
pub(crate) struct Naive;

impl Peer for Naive {
    fn name(&self) -> &'static str {
        "naive"
    }

    fn follows_isa(&self) -> bool {
        true
    }

    fn prepare<'a>(
        &self,
        problem: &'a Problem,
        context: &Context,
    ) -> Result<Box<dyn Workload + 'a>, Unready> {
        let Problem::Rnn(problem) = problem else {
            return Err(Unready::Declined("it computes recurrent layers only".into()));
        };
        let cell = match problem.shape.kind {
            Kind::Recurrent(cell @ (Cell::Lstm | Cell::Gru)) => cell,
            _ => return Err(Unready::Declined("it has the LSTM and the GRU alone".into())),
        };
        let shape = problem.shape;
        let gates = shape.gate_rows();
        Ok(Box::new(Layer {
            problem,
            context: *context,
            cell,
            lengths: vec![shape.seq; shape.batch],
            y: Vec::new(),
            d_x: vec![f32::NAN; shape.elements()],
            grads: [gates * shape.width, gates * shape.width, gates, gates].map(|len| vec![0.0; len]),
        }))
    }
}

struct Layer<'a> {
    problem: &'a RnnProblem,
    context: Context,
    cell: Cell,
    lengths: Vec<usize>,
    y: Vec<f32>,
    d_x: Vec<f32>,
    /// Of both weights and both biases. Every call adds to them, as accumulated gradients do.
    grads: [Vec<f32>; 4],
}

impl Workload for Layer<'_> {
    fn run(&mut self) -> Result<(), HarnessError> {
        let RnnProblem { shape, x, d_y, w_ih, w_hh, b_ih, b_hh, .. } = self.problem;
        let layer = NaiveLayer {
            ctx: self.context,
            cell: self.cell,
            weights: [w_ih, w_hh],
            biases: [b_ih, b_hh],
            widths: [shape.width; 2],
            lengths: &self.lengths,
            direction: Direction::Forward,
        };
        let run = layer.forward(x, [None, None])?;
        self.y.clone_from(&run.y);
        if shape.train {
            let upstream = NaiveUpstream { d_y: Some(d_y), ..NaiveUpstream::default() };
            let mut grads = self.grads.each_mut().map(Vec::as_mut_slice);
            self.d_x = layer.backward(x, run, upstream, &mut grads)?.0;
        }
        Ok(())
    }

    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
        Ok(vec![Cow::Borrowed(&self.y), Cow::Borrowed(&self.d_x)])
    }

    fn kernel(&self) -> String {
        gemm::kernel_name(&self.context).to_owned()
    }
}

#[cfg(test)]
mod tests {
    use kavanam_kernels::{Isa, Precision};

    use super::*;
    use crate::cases::rnn::Shape;
    use crate::peers::ours::Ours;

    #[test]
    fn the_naive_layer_agrees_with_f64_and_with_the_fast_one() {
        for (cell, train) in [Cell::Lstm, Cell::Gru].into_iter().flat_map(|c| [(c, false), (c, true)]) {
            let shape = Shape { kind: Kind::Recurrent(cell), batch: 3, seq: 7, width: 20, train };
            let problem = Problem::Rnn(RnnProblem::new(shape));
            let context = Context::with_isa(Isa::best());
            let mut results = Vec::new();
            for peer in [&Naive as &dyn Peer, &Ours] {
                let mut workload = peer.prepare(&problem, &context).unwrap();
                // The second run starts from what the first left.
                workload.run().unwrap();
                workload.run().unwrap();
                let outputs = workload.outputs().unwrap();
                problem.check(&outputs, Precision::Strict).unwrap();
                results.push(outputs[..=usize::from(train)].concat());
            }
            for (naive, fast) in results[0].iter().zip(&results[1]) {
                // Each is within 1e-4 of the largest element of f64; at this size both are far closer.
                assert!((naive - fast).abs() <= 1e-5, "{cell:?} {train}: {naive} {fast}");
            }
        }
    }
}
