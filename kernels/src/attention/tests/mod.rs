//! The contract of the module, on every instruction set of the machine: accuracy here, bits in [`bits`].

mod bits;
mod blocks;
mod decode;
mod decode_masks;
mod decode_stored;
mod packed;
mod tiles;
mod tiles_backward;

use super::*;
use crate::Context;
use crate::reference::{
    self, AttentionGrads, Real, attention_backward, attention_forward, attention_probabilities,
};
use crate::rowwise::dropout::Dropout;
use crate::testing::{Guarded, assert_within, for_each_isa, uniform};
use crate::view::HeadsLayout;

/// A problem with its data; the mask in parts so that it can be cut and padded.
#[derive(Clone, Debug)]
struct Case {
    shape: Shape,
    causal: Option<usize>,
    window: Option<Window>,
    lengths: Option<Vec<usize>>,
    bias_heads: usize,
    lists: Vec<BlockList>,
    /// A slope for each head and the position of query 0; empty without.
    slopes: (Vec<f32>, usize),
    dropout: Option<ScoreDropout>,
    /// Multiplies the queries: large values make extreme logits.
    magnitude: f32,
    data: Data,
}

#[derive(Clone, Debug, Default)]
struct Data {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    bias: Vec<f32>,
    d_out: Vec<f32>,
}

#[derive(Debug, PartialEq)]
struct Results {
    out: Vec<f32>,
    lse: Vec<f32>,
    grads: AttentionGrads<f32>,
}

fn shape(batch: usize, heads: usize, seq_q: usize, seq_k: usize, dim: usize) -> Shape {
    Shape { batch, heads, kv_heads: heads, seq_q, seq_k, dim, v_dim: dim }
}

impl Case {
    fn new(shape: Shape) -> Case {
        let case = Case {
            shape,
            causal: None,
            window: None,
            lengths: None,
            bias_heads: 0,
            lists: Vec::new(),
            slopes: (Vec::new(), 0),
            dropout: None,
            magnitude: 1.0,
            data: Data::default(),
        };
        case.filled()
    }

    fn filled(mut self) -> Case {
        let Shape { batch, heads, kv_heads, seq_q, seq_k, dim, v_dim } = self.shape;
        self.data = Data {
            q: uniform(batch * seq_q * heads * dim, 1).iter().map(|x| x * self.magnitude).collect(),
            k: uniform(batch * seq_k * kv_heads * dim, 2),
            v: uniform(batch * seq_k * kv_heads * v_dim, 3),
            bias: uniform(self.bias_heads * seq_q * seq_k, 4),
            d_out: uniform(batch * seq_q * heads * v_dim, 5),
        };
        self
    }

    fn spec(&self) -> AttentionSpec<'_> {
        let mask = Mask {
            causal: self.causal.map(|offset| Causal { offset }),
            window: self.window,
            key_lengths: self.lengths.as_deref(),
            blocks: (!self.lists.is_empty()).then_some(&self.lists),
            bias: (self.bias_heads > 0).then_some(Bias { values: &self.data.bias, heads: self.bias_heads }),
            alibi: (!self.slopes.0.is_empty())
                .then_some(Alibi { slopes: &self.slopes.0, offset: self.slopes.1 }),
            dropout: self.dropout,
        };
        AttentionSpec::scaled(self.shape.dim).with_mask(mask)
    }

    fn layouts(&self) -> [HeadsLayout; 4] {
        let Shape { batch, heads, kv_heads, seq_q, seq_k, dim, v_dim } = self.shape;
        [
            HeadsLayout::batch_seq_heads(batch, seq_q, heads, dim),
            HeadsLayout::batch_seq_heads(batch, seq_k, kv_heads, dim),
            HeadsLayout::batch_seq_heads(batch, seq_k, kv_heads, v_dim),
            HeadsLayout::batch_seq_heads(batch, seq_q, heads, v_dim),
        ]
    }

    fn inputs(&self) -> Inputs<'_> {
        let [q, k, v, _] = self.layouts();
        let view = |data, layout| HeadsRef::new(data, layout).unwrap();
        Inputs { q: view(&self.data.q, q), k: view(&self.data.k, k), v: view(&self.data.v, v) }
    }

    /// The output and the log-sum-exp.
    fn forward(&self, ctx: &Context) -> (Vec<f32>, Vec<f32>) {
        let mut out = Guarded::poisoned(self.data.d_out.len());
        let mut lse = Guarded::poisoned(self.shape.rows().unwrap());
        let out_view = HeadsMut::new(out.body_mut(), self.layouts()[3]).unwrap();
        forward(ctx, &self.inputs(), &self.spec(), out_view, lse.body_mut()).unwrap();
        [&out, &lse].into_iter().for_each(Guarded::check);
        (out.body().to_vec(), lse.body().to_vec())
    }

    fn run(&self, ctx: &Context) -> Results {
        let [q_layout, k_layout, v_layout, out_layout] = self.layouts();
        let Inputs { q, k, v } = self.inputs();
        let d_out = HeadsRef::new(&self.data.d_out, out_layout).unwrap();
        let (out, lse) = self.forward(ctx);
        let mut d_q = Guarded::poisoned(self.data.q.len());
        let mut d_k = Guarded::poisoned(self.data.k.len());
        let mut d_v = Guarded::poisoned(self.data.v.len());
        let mut d_bias = Guarded::new(&vec![0.0; self.data.bias.len()]);
        let saved = Saved { q, k, v, out: HeadsRef::new(&out, out_layout).unwrap(), lse: &lse };
        let grads = Grads {
            d_q: HeadsMut::new(d_q.body_mut(), q_layout).unwrap(),
            d_k: HeadsMut::new(d_k.body_mut(), k_layout).unwrap(),
            d_v: HeadsMut::new(d_v.body_mut(), v_layout).unwrap(),
            d_bias: (self.bias_heads > 0).then_some(d_bias.body_mut()),
        };
        backward(ctx, &saved, d_out, &self.spec(), grads).unwrap();
        [&d_q, &d_k, &d_v, &d_bias].into_iter().for_each(Guarded::check);
        let grads = AttentionGrads {
            d_q: d_q.body().to_vec(),
            d_k: d_k.body().to_vec(),
            d_v: d_v.body().to_vec(),
            d_bias: d_bias.body().to_vec(),
        };
        Results { out, lse, grads }
    }

    /// Calls `f` with the naive form in `T`.
    fn naive<T: Real, R>(&self, f: impl Fn(&reference::Attention<'_, T>, &[T]) -> R) -> R {
        let Shape { batch, heads, kv_heads, seq_q, seq_k, dim, v_dim } = self.shape;
        let convert = |x: &[f32]| -> Vec<T> { x.iter().map(|&x| T::from(x)).collect() };
        let [q, k, v] = [&self.data.q, &self.data.k, &self.data.v].map(|x| convert(x));
        let mut bias = convert(&self.data.bias);
        let (slopes, offset) = &self.slopes;
        if !slopes.is_empty() {
            assert!(
                self.bias_heads == 0 || self.bias_heads == heads,
                "one bias for all has no room for slopes"
            );
            bias.resize(heads * seq_q * seq_k, T::zero());
            for (x, bias) in bias.iter_mut().enumerate() {
                let (h, i, j) = (x / seq_k / seq_q, x / seq_k % seq_q, x % seq_k);
                *bias = *bias - T::from(slopes[h]) * T::from((i + offset).abs_diff(j) as f32);
            }
        }
        let factor = |at: [usize; 4]| {
            let ScoreDropout { dropout: Dropout { p, seed, stream }, first_sequence } = self.dropout.unwrap();
            let at = [at[0] + first_sequence, at[1], at[2], at[3]];
            let keeps = reference::attention_dropout_keeps(f64::from(p), seed, stream, at);
            T::from(if keeps { 1.0 / (1.0 - p) } else { 0.0 })
        };
        let factor: Option<&dyn Fn([usize; 4]) -> T> =
            if self.dropout.is_some() { Some(&factor) } else { None };
        let sees = |b: usize, i: usize, j: usize| {
            self.causal.is_none_or(|offset| j <= i + offset)
                && self.lengths.as_ref().is_none_or(|lengths| j < lengths[b])
                && self
                    .window
                    .is_none_or(|w| j + w.left >= i + w.offset && j <= (i + w.offset).saturating_add(w.right))
        };
        let bias = (!bias.is_empty()).then_some(&bias[..]);
        let scale = T::from(self.spec().scale);
        let sees = &sees;
        let (q, k, v) = (&q[..], &k[..], &v[..]);
        let problem = reference::Attention {
            batch,
            heads,
            kv_heads,
            seq_q,
            seq_k,
            dim,
            v_dim,
            q,
            k,
            v,
            scale,
            bias,
            sees,
            factor,
        };
        f(&problem, &convert(&self.data.d_out))
    }

    /// Holds the fast results to the contract's 2× (forward) and 3× (gradients) of the naive f32 form.
    fn check(&self) {
        self.check_as(self);
    }

    /// The same where the naive form is that of another case, which hides the same by other means.
    fn check_as(&self, oracle: &Case) {
        let forward64 = oracle.naive::<f64, _>(|a, _| attention_forward(a));
        let forward32 = oracle.naive::<f32, _>(|a, _| attention_forward(a));
        let grads64 = oracle.naive::<f64, _>(attention_backward);
        let grads32 = oracle.naive::<f32, _>(attention_backward);
        for_each_isa(|ctx| {
            let fast = self.run(ctx);
            let g = &fast.grads;
            let pairs = [
                ("out", 2.0, &fast.out, &forward32.0, &forward64.0),
                ("lse", 2.0, &fast.lse, &forward32.1, &forward64.1),
                ("d_q", 3.0, &g.d_q, &grads32.d_q, &grads64.d_q),
                ("d_k", 3.0, &g.d_k, &grads32.d_k, &grads64.d_k),
                ("d_v", 3.0, &g.d_v, &grads32.d_v, &grads64.d_v),
                ("d_bias", 3.0, &g.d_bias, &grads32.d_bias, &grads64.d_bias),
            ];
            for (name, factor, fast, naive, exact) in pairs {
                if name == "d_bias" && self.bias_heads == 0 {
                    continue;
                }
                let bound = factor * worst(naive, exact) + floor(exact) + oracle.cancellation(name);
                assert_within(fast, exact, |_| bound);
            }
        });
    }

    /// dS is a difference of two sums of `v_dim` products, dP and D, which any form rounds: four roundings of the
    /// largest Σ|dO·V|, carried to the gradient by the probabilities. It matters where the exact gradient
    /// vanishes by cancellation, as for a row with one key.
    fn cancellation(&self, gradient: &str) -> f64 {
        let Shape { batch, heads, kv_heads, seq_q, seq_k, v_dim, .. } = self.shape;
        let p = self.naive::<f64, _>(|a, _| attention_probabilities(a));
        let column =
            |x: usize| (0..seq_q).map(|i| p[(x / seq_k * seq_q + i) * seq_k + x % seq_k]).sum::<f64>();
        let columns = (0..batch * heads * seq_k).map(column).fold(0.0, f64::max);
        let scale = f64::from(self.spec().scale);
        let carried = match gradient {
            "d_q" => scale * largest(&self.data.k),
            "d_k" => scale * largest(&self.data.q) * columns * (heads / kv_heads) as f64,
            "d_bias" => (batch * heads / self.bias_heads.max(1)) as f64,
            _ => 0.0,
        };
        let product = largest(&self.data.d_out) * largest(&self.data.v) * v_dim as f64;
        4.0 * crate::testing::UNIT_ROUNDOFF * product * carried
    }
}

fn largest(x: &[f32]) -> f64 {
    x.iter().fold(0.0, |m, &x| f64::from(x.abs()).max(m))
}

/// The largest error of the naive f32 form.
fn worst(naive: &[f32], exact: &[f64]) -> f64 {
    let errors = naive
        .iter()
        .zip(exact)
        .map(|(&x, &e)| if f64::from(x) == e { 0.0 } else { (f64::from(x) - e).abs() });
    errors.fold(0.0, f64::max)
}

/// Four roundings of the largest value: what a form that happens to be exact leaves room for.
fn floor(exact: &[f64]) -> f64 {
    let largest = exact.iter().filter(|x| x.is_finite()).fold(0.0f64, |m, x| m.max(x.abs()));
    4.0 * crate::testing::UNIT_ROUNDOFF * largest
}

/// Calls `property` for each instruction set, and for each precision that tiles serve.
fn everywhere(mut property: impl FnMut(&Context)) {
    for_each_isa(&mut property);
    tiles::for_each_precision(|ctx, _| property(ctx));
}

#[test]
fn plain_shapes() {
    for (seq_q, seq_k, dim) in [(1, 1, 1), (5, 7, 8), (10, 10, 32), (13, 17, 20), (6, 16, 64), (7, 64, 3)] {
        Case::new(shape(2, 2, seq_q, seq_k, dim)).check();
    }
}

#[test]
fn lengths_straddle_blocks() {
    for seq in [63, 127, 128, 129, 200, 257] {
        let mut case = Case::new(shape(1, 1, seq, seq, 8));
        case.check();
        case.causal = Some(0);
        case.check();
    }
}

#[test]
fn a_hundred_thousand_keys() {
    for causal in [None, Some(99_998)] {
        Case { causal, ..Case::new(shape(1, 1, 2, 100_000, 8)) }.check();
    }
}

#[test]
fn rows_straddle_what_is_held_and_tiles() {
    // At 512 elements few rows are held at a time; interleaved heads spread, so that gradients are summed apart.
    for (seq_q, seq_k, causal) in [(200, 140, None), (200, 200, Some(0))] {
        let mut case = Case { causal, ..Case::new(shape(1, 2, seq_q, seq_k, 512)) };
        case.check();
        case.shape.kv_heads = 1;
        case.filled().check();
    }
}

/// One case of each kind: masks, windows, lengths, biases, grouped heads, other value widths, block edges.
fn varied() -> Vec<Case> {
    let mut all = Vec::new();
    for (seq_q, seq_k) in [(10, 10), (4, 13), (33, 70), (70, 70), (130, 140)] {
        for kind in 0..7 {
            let mut case = Case::new(shape(2, 4, seq_q, seq_k, [8, 12, 16, 20, 5, 32, 7][kind]));
            case.causal = [None, Some(0), Some(seq_k - seq_q), None, Some(2), Some(0), None][kind];
            case.lengths = [
                None,
                None,
                Some(vec![seq_k, seq_k / 2]),
                Some(vec![3, 0]),
                None,
                Some(vec![1, seq_k - 1]),
                None,
            ][kind]
                .clone();
            case.bias_heads = [0, 4, 1, 0, 0, 4, 1][kind];
            case.shape.kv_heads = [4, 2, 1, 4, 2, 4, 4][kind];
            case.shape.v_dim = [8, 12, 24, 3, 5, 32, 16][kind];
            case.window = (kind == 4 || kind == 6).then_some(Window { offset: 0, left: 9, right: 2 });
            all.push(case.filled());
        }
    }
    all
}

#[test]
fn masks_biases_groups_and_widths() {
    varied().iter().for_each(Case::check);
}

#[test]
fn linear_biases() {
    for (k, mut case) in varied().into_iter().enumerate() {
        if case.bias_heads == 1 {
            continue;
        }
        case.slopes = (vec![0.5, 0.25, 0.0, 0.01], [0, 3, 70][k % 3]);
        case.check();
    }
}

#[test]
fn dropped_probabilities() {
    for (k, mut case) in varied().into_iter().enumerate() {
        let dropout = Dropout { p: [0.1, 0.5][k % 2], seed: 1 << 40 | 7, stream: k as u64 };
        case.dropout = Some(ScoreDropout { dropout, first_sequence: 5 * k });
        case.check();
    }
}

#[test]
fn extreme_logits() {
    for magnitude in [1e4, 1e15, 1e-30] {
        let mut case = Case::new(shape(1, 2, 9, 70, 16));
        case.magnitude = magnitude;
        case.filled().check();
    }
}

#[test]
fn rows_that_see_nothing_are_zero_and_take_no_part() {
    let hidden = vec![f32::NEG_INFINITY; 7 * 9];
    for_each_isa(|ctx| {
        let mut case = Case { lengths: Some(vec![0, 9]), ..Case::new(shape(2, 2, 7, 9, 8)) };
        let results = case.run(ctx);
        assert!(results.out[..7 * 16].iter().all(|&x| x == 0.0));
        assert!(results.lse[..14].iter().all(|&x| x == f32::NEG_INFINITY));
        assert!(results.lse[14..].iter().all(|&x| x.is_finite()));
        for grad in [&results.grads.d_q, &results.grads.d_k, &results.grads.d_v] {
            assert!(grad[..grad.len() / 2].iter().all(|&x| x == 0.0));
            assert!(grad[grad.len() / 2..].iter().any(|&x| x != 0.0));
        }
        case.bias_heads = 1;
        case.data.bias = hidden.clone();
        let results = case.run(ctx);
        assert!(results.lse.iter().all(|&x| x == f32::NEG_INFINITY));
        let grads = results.grads;
        for zero in [results.out, grads.d_q, grads.d_k, grads.d_v, grads.d_bias] {
            assert!(zero.iter().all(|&x| x == 0.0), "hidden by the bias");
        }
    });
}

#[test]
fn probabilities_are_the_naive_ones_and_sum_to_one() {
    for case in varied() {
        let Shape { batch, heads, seq_q, seq_k, .. } = case.shape;
        let exact = case.naive::<f64, _>(|a, _| attention_probabilities(a));
        let naive = case.naive::<f32, _>(|a, _| attention_probabilities(a));
        let bound = 2.0 * worst(&naive, &exact) + floor(&exact);
        let [q_layout, k_layout, ..] = case.layouts();
        let q = HeadsRef::new(&case.data.q, q_layout).unwrap();
        let k = HeadsRef::new(&case.data.k, k_layout).unwrap();
        for_each_isa(|ctx| {
            for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
                let mut p = Guarded::poisoned(seq_q * seq_k);
                let out = MatMut::new(p.body_mut(), seq_q, seq_k).unwrap();
                probabilities(ctx, q, k, &case.spec(), (b, h), out).unwrap();
                p.check();
                let exact = &exact[(b * heads + h) * seq_q * seq_k..][..seq_q * seq_k];
                assert_within(p.body(), exact, |_| bound);
                for (p, exact) in p.body().chunks(seq_k).zip(exact.chunks(seq_k)) {
                    let sum: f64 = p.iter().map(|&x| f64::from(x)).sum();
                    assert!(exact.iter().all(|&x| x == 0.0) || (sum - 1.0).abs() < 1e-5, "{sum}");
                    assert!(p.iter().zip(exact).all(|(&p, &e)| e > 0.0 || p == 0.0), "0 where hidden");
                }
            }
        });
    }
}

#[test]
fn bias_gradients_are_added() {
    let mut case = Case { bias_heads: 1, ..Case::new(shape(2, 2, 5, 9, 8)) }.filled();
    case.causal = Some(4);
    let ctx = Context::with_isa(crate::Isa::scalar());
    let once = case.run(&ctx);
    let [q_layout, k_layout, v_layout, out_layout] = case.layouts();
    let q = HeadsRef::new(&case.data.q, q_layout).unwrap();
    let k = HeadsRef::new(&case.data.k, k_layout).unwrap();
    let v = HeadsRef::new(&case.data.v, v_layout).unwrap();
    let out = HeadsRef::new(&once.out, out_layout).unwrap();
    let saved = Saved { q, k, v, out, lse: &once.lse };
    let mut grads = [case.data.q.clone(), case.data.k.clone(), case.data.v.clone()];
    let [d_q, d_k, d_v] = &mut grads;
    let mut d_bias = vec![100.0; 45];
    let grads = Grads {
        d_q: HeadsMut::new(d_q, q_layout).unwrap(),
        d_k: HeadsMut::new(d_k, k_layout).unwrap(),
        d_v: HeadsMut::new(d_v, v_layout).unwrap(),
        d_bias: Some(&mut d_bias),
    };
    backward(&ctx, &saved, HeadsRef::new(&case.data.d_out, out_layout).unwrap(), &case.spec(), grads)
        .unwrap();
    for (with, without) in d_bias.iter().zip(&once.grads.d_bias) {
        assert!((with - 100.0 - without).abs() < 1e-4, "{with} {without}");
    }
}

#[test]
fn empty_problems_are_fine() {
    for_each_isa(|ctx| {
        for (batch, heads, seq_q, seq_k, dim) in
            [(0, 2, 3, 3, 4), (2, 0, 3, 3, 4), (2, 2, 0, 3, 4), (2, 2, 3, 0, 4), (2, 2, 3, 3, 0)]
        {
            let results = Case::new(shape(batch, heads, seq_q, seq_k, dim)).run(ctx);
            assert!(results.out.iter().chain(&results.grads.d_k).all(|&x| x == 0.0));
        }
        let uniform = Case::new(Shape { v_dim: 2, ..shape(1, 1, 1, 4, 0) });
        let mean = uniform.data.v.chunks(2).map(|v| v[0]).sum::<f32>() / 4.0;
        assert!((uniform.run(ctx).out[0] - mean).abs() < 1e-6, "no dimension: every key counts the same");
    });
}

#[test]
fn misfits_are_named() {
    let case = Case::new(shape(2, 4, 3, 5, 8));
    let ctx = Context::with_isa(crate::Isa::scalar());
    let [q_layout, k_layout, v_layout, out_layout] = case.layouts();
    let view = |data, layout| HeadsRef::new(data, layout).unwrap();
    let q = view(&case.data.q, q_layout);
    let k = view(&case.data.k, k_layout);
    let v = view(&case.data.v, v_layout);
    let mut lse = [0.0; 24];
    let mut run = |inputs: Inputs<'_>, out_layout: HeadsLayout, rows: usize, spec: AttentionSpec<'_>| {
        let mut out = vec![0.0; 2 * 4 * 3 * 8];
        let out = HeadsMut::new(&mut out, out_layout).unwrap();
        forward(&ctx, &inputs, &spec, out, &mut lse[..rows]).map_err(|error| error.to_string())
    };
    let spec = case.spec();
    let inputs = Inputs { q, k, v };
    assert_eq!(run(inputs, out_layout, 24, spec), Ok(()));
    let short = HeadsLayout { seq: 4, ..k_layout };
    let wrong = run(Inputs { v: view(&case.data.v, short), ..inputs }, out_layout, 24, spec);
    assert_eq!(wrong, Err("v: seq is 4, expected 5".into()));
    let three = HeadsLayout { heads: 3, ..k_layout };
    let wrong = Inputs { k: view(&case.data.k, three), v: view(&case.data.v, three), q };
    assert!(run(wrong, out_layout, 24, spec).unwrap_err().contains("q.heads is 4"));
    let narrow = HeadsLayout { dim: 7, ..out_layout };
    assert_eq!(run(inputs, narrow, 24, spec), Err("out: dim is 7, expected 8".into()));
    assert_eq!(run(inputs, out_layout, 23, spec), Err("lse: elements is 23, expected 24".into()));
    let lengths = [1];
    let masked = spec.with_mask(Mask::none().with_key_lengths(&lengths));
    assert!(run(inputs, out_layout, 24, masked).unwrap_err().contains("key_lengths"));
    let mut p = vec![0.0; 15];
    let out = MatMut::new(&mut p, 3, 5).unwrap();
    let wrong = probabilities(&ctx, q, k, &spec, (0, 4), out).unwrap_err();
    assert!(wrong.to_string().contains("head"), "{wrong}");
}
