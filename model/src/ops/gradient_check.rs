//! Checks an op's backward against differences of its forward.
//!
//! With L = Σ w·y for fixed random weights w, the derivative of L along a random direction u in one input
//! or one parameter tensor is compared with the inner product of u and the gradient. The
//! forward runs in f32, L is summed in f64. The five-point difference
//! `(8(L(h) − L(−h)) − (L(2h) − L(−2h))) / 12h` has a truncation error of h⁴·L⁗′/30; the rounding of the
//! forward is at most some ε·Σ|w·y| for each L, so the tolerance is `DEPTH·ε·Σ|w·y|/h + h³·|u|₁` in scale.

use kavanam_kernels::{Context, Isa, ShapeError};

use crate::param::{Grads, ParamStore};
use crate::pool::Pool;
use crate::tape::{Tape, Var};

/// Step of the differences: with it h⁴ and ε/h are both about 1e-5.
const H: f32 = 1.0 / 32.0;
/// Roundings that add up on the way through a forward.
const DEPTH: f64 = 24.0;
/// Random directions for each tensor.
const DIRECTIONS: usize = 3;

/// Parameters and inputs of an op under test.
pub(crate) struct Case {
    pub(crate) store: ParamStore,
    inputs: Vec<(Vec<f32>, usize, usize)>,
    random: Random,
}

impl Case {
    pub(crate) fn new(seed: u64) -> Case {
        Case { store: ParamStore::new(seed), inputs: Vec::new(), random: Random(seed * 2 + 1) }
    }

    /// Adds an input of values in (−1, 1).
    pub(crate) fn input(&mut self, rows: usize, cols: usize) {
        let values = (0..rows * cols).map(|_| self.random.next()).collect();
        self.inputs.push((values, rows, cols));
    }
}

/// xorshift64*, for test data.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// Uniform in (−1, 1).
    pub(crate) fn next(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}

struct Loss {
    value: f64,
    /// Σ|w·y|: the scale of its rounding.
    scale: f64,
}

fn weights_of(out: usize) -> Vec<f32> {
    let mut random = Random(0x9e37_79b9);
    (0..out).map(|_| random.next()).collect()
}

fn weighted(y: &[f32]) -> Loss {
    let terms = || {
        weights_of(y.len()).into_iter().zip(y).map(|(w, y)| f64::from(w) * f64::from(*y)).collect::<Vec<_>>()
    };
    Loss { value: terms().iter().sum(), scale: terms().iter().map(|x| x.abs()).sum() }
}

fn run<F>(case: &Case, store: &ParamStore, inputs: &[(Vec<f32>, usize, usize)], forward: &F) -> Loss
where
    F: Fn(&mut Tape<'_>, &[Var]) -> Result<Var, ShapeError>,
{
    let _ = case;
    let pool = Pool::new();
    let mut tape = Tape::inference(&Context::with_isa(Isa::best()), store, &pool);
    let vars: Vec<Var> = inputs.iter().map(|(x, r, c)| tape.constant(x, *r, *c).unwrap()).collect();
    let out = forward(&mut tape, &vars).unwrap();
    weighted(tape.value(out))
}

/// Compares the gradients of every input and every parameter with differences, on every ISA's best kernel.
///
/// # Panics
/// When one is off.
pub(crate) fn check<F>(case: &Case, forward: F)
where
    F: Fn(&mut Tape<'_>, &[Var]) -> Result<Var, ShapeError>,
{
    let pool = Pool::new();
    let mut tape = Tape::recording(&Context::with_isa(Isa::best()), &case.store, &pool);
    let vars: Vec<Var> = case.inputs.iter().map(|(x, r, c)| tape.constant(x, *r, *c).unwrap()).collect();
    let out = forward(&mut tape, &vars).unwrap();
    let w = weights_of(tape.value(out).len());
    let mut grads = Grads::zeros(&case.store);
    let mut input_grads: Vec<Vec<f32>> = case.inputs.iter().map(|(x, ..)| vec![0.0; x.len()]).collect();
    tape.go_back(out, &w, &mut grads, |var, grad| {
        if let Some(i) = vars.iter().position(|v| *v == var) {
            input_grads[i].copy_from_slice(grad);
        }
    })
    .unwrap();

    let mut random = Random(77);
    for (i, grad) in input_grads.iter().enumerate() {
        compare(&format!("input {i}"), grad, &mut random, |direction, step| {
            let mut inputs = case.inputs.clone();
            shift(&mut inputs[i].0, direction, step);
            run(case, &case.store, &inputs, &forward)
        });
    }
    for id in case.store.ids() {
        compare(case.store.name(id), grads.get(id), &mut random, |direction, step| {
            let mut store = case.store.clone();
            shift(store.get_mut(id), direction, step);
            run(case, &store, &case.inputs, &forward)
        });
    }
}

fn shift(values: &mut [f32], direction: &[f32], step: f32) {
    for (x, u) in values.iter_mut().zip(direction) {
        *x += step * u;
    }
}

fn compare(name: &str, grad: &[f32], random: &mut Random, loss: impl Fn(&[f32], f32) -> Loss) {
    for _ in 0..DIRECTIONS {
        // Scaled so that the whole step is about H long in a large tensor too.
        let norm = (grad.len() as f32).sqrt().max(1.0);
        let direction: Vec<f32> = grad.iter().map(|_| random.next().signum() * 2.0 / norm).collect();
        let analytic: f64 = grad.iter().zip(&direction).map(|(g, u)| f64::from(*g) * f64::from(*u)).sum();
        let at = |k: f32| loss(&direction, k * H);
        let (p1, m1, p2, m2) = (at(1.0), at(-1.0), at(2.0), at(-2.0));
        let numeric = (8.0 * (p1.value - m1.value) - (p2.value - m2.value)) / (12.0 * f64::from(H));
        let rounding = DEPTH * f64::from(f32::EPSILON) * p1.scale.max(p2.scale) / f64::from(H);
        let truncation = 16.0 * f64::from(H).powi(4) * p1.scale.max(1.0) * 2.0;
        let tolerance = rounding + truncation;
        assert!(
            (analytic - numeric).abs() <= tolerance,
            "{name}: gradient {analytic}, differences {numeric}, tolerance {tolerance}"
        );
    }
}
