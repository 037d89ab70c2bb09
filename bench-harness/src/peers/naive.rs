//! LSTM and GRU layers as they stand in a textbook, on our own matrix products: what the care in `kavanam-kernels`'
//! recurrent layers is worth.
//!
//! ```text
//! for each step:
//!     for each gate: a = x[t]·W_ihᵀ;  a += b_ih;  s = h·W_hhᵀ;  s += b_hh      # four passes, none fused
//!     the gates one after the other, each operation a pass of its own into new memory
//! backward, for each step from the last, for each gate: d_x, d_h and the gradients of both weights by one product each
//! ```
//! No product over several steps or gates, no weights packed once, no fused gates. Everything that this layer calls is
//! fast by itself.

use std::borrow::Cow;

use kavanam_kernels::gemm::{self, Accum, Epilogue};
use kavanam_kernels::rnn::Cell;
use kavanam_kernels::{Context, MatMut, MatRef, ShapeError};

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

    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").to_owned()
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
        let lstm = match problem.shape.kind {
            Kind::Recurrent(Cell::Lstm) => true,
            Kind::Recurrent(Cell::Gru) => false,
            _ => return Err(Unready::Declined("it has the LSTM and the GRU alone".into())),
        };
        let shape = problem.shape;
        let gates = shape.gate_rows();
        Ok(Box::new(Layer {
            problem,
            context: *context,
            lstm,
            steps: Vec::new(),
            y: Vec::new(),
            d_x: vec![f32::NAN; shape.elements()],
            d_weights: [0; 2].map(|_| vec![0.0; gates * shape.width]),
            d_biases: [0; 2].map(|_| vec![0.0; gates]),
        }))
    }
}

/// What a step leaves for the way back, `[batch, width]` each.
struct Step {
    h_prev: Vec<f32>,
    c_prev: Vec<f32>,
    /// i f g o, or r z n and the state's part of n.
    gates: [Vec<f32>; 4],
    /// The LSTM's new cell.
    c: Vec<f32>,
}

struct Layer<'a> {
    problem: &'a RnnProblem,
    context: Context,
    lstm: bool,
    steps: Vec<Step>,
    y: Vec<f32>,
    d_x: Vec<f32>,
    /// Of the input's and the state's weights. Every call adds to them, as accumulated gradients do.
    d_weights: [Vec<f32>; 2],
    d_biases: [Vec<f32>; 2],
}

/// One elementwise operation: a pass into new memory.
fn each<const N: usize>(inputs: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> Vec<f32> {
    (0..inputs[0].len()).map(|i| f(inputs.map(|input| input[i]))).collect()
}

fn sigmoid(x: &[f32]) -> Vec<f32> {
    each([x], |[x]| 1.0 / (1.0 + (-x).exp()))
}

fn tanh(x: &[f32]) -> Vec<f32> {
    each([x], |[x]| x.tanh())
}

fn add(x: &[f32], y: &[f32]) -> Vec<f32> {
    each([x, y], |[x, y]| x + y)
}

impl Layer<'_> {
    /// The rows of gate `g` in a weight matrix.
    fn gate<'w>(&self, w: &'w [f32], g: usize) -> Result<MatRef<'w>, ShapeError> {
        let width = self.problem.shape.width;
        MatRef::new(&w[g * width * width..(g + 1) * width * width], width, width)
    }

    /// Step `t` of a sequence.
    fn at<'x>(&self, x: &'x [f32], t: usize) -> &'x [f32] {
        let len = self.problem.shape.batch * self.problem.shape.width;
        &x[t * len..(t + 1) * len]
    }

    /// `input·Wᵀ + b` of one gate.
    fn sums(&self, input: &[f32], (w, b): (&[f32], &[f32]), g: usize) -> Result<Vec<f32>, ShapeError> {
        let (batch, width) = (self.problem.shape.batch, self.problem.shape.width);
        let mut a = vec![0.0; batch * width];
        let into = MatMut::new(&mut a, batch, width)?;
        let input = MatRef::new(input, batch, width)?;
        gemm::gemm(&self.context, input, self.gate(w, g)?.t(), into, Accum::Overwrite, &Epilogue::default())?;
        for row in a.chunks_exact_mut(width) {
            row.iter_mut().zip(&b[g * width..]).for_each(|(a, b)| *a += b);
        }
        Ok(a)
    }

    fn forward(&mut self) -> Result<(), ShapeError> {
        let RnnProblem { shape, x, w_ih, w_hh, b_ih, b_hh, .. } = self.problem;
        (self.steps, self.y) = (Vec::new(), Vec::new());
        let mut h = vec![0.0; shape.batch * shape.width];
        let mut c = h.clone();
        for t in 0..shape.seq {
            let from_input = |g| self.sums(self.at(x, t), (w_ih, b_ih), g);
            let from_state = |g| self.sums(&h, (w_hh, b_hh), g);
            let both = |g| Ok::<_, ShapeError>(add(&from_input(g)?, &from_state(g)?));
            let (gates, h_new, c_new);
            if self.lstm {
                let [i, f, o] = [sigmoid(&both(0)?), sigmoid(&both(1)?), sigmoid(&both(3)?)];
                let g = tanh(&both(2)?);
                c_new = each([&f, &c, &i, &g], |[f, c, i, g]| f * c + i * g);
                h_new = each([&o, &tanh(&c_new)], |[o, c]| o * c);
                gates = [i, f, g, o];
            } else {
                let [r, z] = [sigmoid(&both(0)?), sigmoid(&both(1)?)];
                let q = from_state(2)?;
                let n = tanh(&each([&from_input(2)?, &r, &q], |[a, r, q]| a + r * q));
                h_new = each([&z, &n, &h], |[z, n, h]| (1.0 - z) * n + z * h);
                c_new = Vec::new();
                gates = [r, z, n, q];
            }
            self.y.extend_from_slice(&h_new);
            let h_prev = std::mem::replace(&mut h, h_new);
            let c_prev = std::mem::replace(&mut c, c_new.clone());
            self.steps.push(Step { h_prev, c_prev, gates, c: c_new });
        }
        Ok(())
    }

    fn backward(&mut self) -> Result<(), ShapeError> {
        let RnnProblem { shape, x, d_y, w_ih, w_hh, .. } = self.problem;
        let mut d_h = vec![0.0; shape.batch * shape.width];
        let mut d_c = d_h.clone();
        while let Some(step) = self.steps.pop() {
            let t = self.steps.len();
            let d = add(&d_h, self.at(d_y, t));
            // The gradients of each gate's sums, with the input and with the state, and of the old state itself.
            let (of_input, of_state, direct);
            if self.lstm {
                let d_sums = lstm_gradients(&step, &d, &mut d_c);
                (of_input, of_state, direct) = (d_sums.clone(), d_sums, vec![0.0; d.len()]);
            } else {
                (of_input, of_state, direct) = gru_gradients(&step, &d);
            }
            d_h = direct;
            let x_t = self.at(x, t);
            let mut d_x = vec![0.0; d_h.len()];
            for (g, (d_a, d_s)) in of_input.iter().zip(&of_state).enumerate() {
                self.through(0, (w_ih, g), d_a, (x_t, &mut d_x))?;
                self.through(1, (w_hh, g), d_s, (&step.h_prev, &mut d_h))?;
            }
            self.d_x[t * d_x.len()..(t + 1) * d_x.len()].copy_from_slice(&d_x);
        }
        Ok(())
    }

    /// Backward through one product: adds to the gradients of its input, its weights (of the input, or of the state)
    /// and its bias.
    fn through(
        &mut self,
        which: usize,
        (w, g): (&[f32], usize),
        d_sums: &[f32],
        (input, d_input): (&[f32], &mut [f32]),
    ) -> Result<(), ShapeError> {
        let (batch, width) = (self.problem.shape.batch, self.problem.shape.width);
        let (d, plain) = (MatRef::new(d_sums, batch, width)?, Epilogue::default());
        let d_input = MatMut::new(d_input, batch, width)?;
        gemm::gemm(&self.context, d, self.gate(w, g)?, d_input, Accum::Add, &plain)?;
        let d_w = &mut self.d_weights[which][g * width * width..(g + 1) * width * width];
        let (d_w, input) = (MatMut::new(d_w, width, width)?, MatRef::new(input, batch, width)?);
        gemm::gemm(&self.context, d.t(), input, d_w, Accum::Add, &plain)?;
        for row in d_sums.chunks_exact(width) {
            self.d_biases[which][g * width..].iter_mut().zip(row).for_each(|(d_b, d)| *d_b += d);
        }
        Ok(())
    }
}

/// Of the sums of i f g o; `d_c` becomes that of the old cell.
fn lstm_gradients(step: &Step, d: &[f32], d_c: &mut Vec<f32>) -> Vec<Vec<f32>> {
    let [i, f, g, o] = &step.gates;
    let c = tanh(&step.c);
    let d_o = each([d, &c, o], |[d, c, o]| d * c * o * (1.0 - o));
    *d_c = each([d_c, d, o, &c], |[d_c, d, o, c]| d_c + d * o * (1.0 - c * c));
    let d_i = each([d_c, g, i], |[d, g, i]| d * g * i * (1.0 - i));
    let d_g = each([d_c, i, g], |[d, i, g]| d * i * (1.0 - g * g));
    let d_f = each([d_c, &step.c_prev, f], |[d, c, f]| d * c * f * (1.0 - f));
    *d_c = each([d_c, f], |[d, f]| d * f);
    vec![d_i, d_f, d_g, d_o]
}

/// Of the sums of r z n with the input, of those with the state, and of the old state where it goes into the new.
fn gru_gradients(step: &Step, d: &[f32]) -> (Vec<Vec<f32>>, Vec<Vec<f32>>, Vec<f32>) {
    let [r, z, n, q] = &step.gates;
    let d_n = each([d, z, n], |[d, z, n]| d * (1.0 - z) * (1.0 - n * n));
    let d_z = each([d, &step.h_prev, n, z], |[d, h, n, z]| d * (h - n) * z * (1.0 - z));
    let d_r = each([&d_n, q, r], |[d, q, r]| d * q * r * (1.0 - r));
    let d_q = each([&d_n, r], |[d, r]| d * r);
    (vec![d_r.clone(), d_z.clone(), d_n], vec![d_r, d_z, d_q], each([d, z], |[d, z]| d * z))
}

impl Workload for Layer<'_> {
    fn run(&mut self) -> Result<(), HarnessError> {
        self.forward()?;
        if self.problem.shape.train {
            self.backward()?;
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
