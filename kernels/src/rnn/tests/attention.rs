//! Additive attention against the naive form, and the bits that must not change.

use std::num::NonZeroUsize;

use proptest::prelude::*;

use super::{assert_near_scaled, scale_of};
use crate::Context;
use crate::reference::{
    AdditiveAttention, AdditiveAttentionGrads, Real, additive_attention_backward, additive_attention_forward,
};
use crate::rnn::additive_attention::{InputGrads, Inputs, OutputGrads, backward, forward, values_gradient};
use crate::testing::{assert_same_bits, for_each_isa, uniform};
use crate::view::{HeadsLayout, HeadsMut, HeadsRef};

#[derive(Debug, Clone)]
struct Case {
    queries: usize,
    keys_len: usize,
    dim: usize,
    lengths: Vec<usize>,
    query: Vec<f32>,
    keys: Vec<f32>,
    v: Vec<f32>,
    values: Vec<f32>,
    d_alpha: Vec<f32>,
    d_context: Vec<f32>,
    time_major: bool,
}

type Outputs<T> = (Vec<T>, Vec<T>, AdditiveAttentionGrads<T>);

impl Case {
    fn new([queries, keys_len, width, dim]: [usize; 4], lengths: &[usize]) -> Case {
        let batch = lengths.len();
        Case {
            queries,
            keys_len,
            dim,
            lengths: lengths.to_vec(),
            query: uniform(batch * queries * width, 1),
            keys: uniform(batch * keys_len * width, 2),
            v: uniform(width, 3),
            values: uniform(batch * keys_len * dim, 4),
            d_alpha: uniform(batch * queries * keys_len, 5),
            d_context: uniform(batch * queries * dim, 6),
            time_major: false,
        }
    }

    fn layout(&self, seq: usize, dim: usize) -> HeadsLayout {
        let batch = self.lengths.len();
        if self.time_major {
            HeadsLayout::seq_batch(seq, batch, dim)
        } else {
            HeadsLayout::batch_seq_heads(batch, seq, 1, dim)
        }
    }

    fn inputs(&self) -> Inputs<'_> {
        let width = self.v.len();
        let view = |data, seq, dim| HeadsRef::new(data, self.layout(seq, dim)).unwrap();
        Inputs {
            query: view(&self.query, self.queries, width),
            keys: view(&self.keys, self.keys_len, width),
            v: &self.v,
            values: view(&self.values, self.keys_len, self.dim),
            lengths: &self.lengths,
        }
    }

    fn run(&self, ctx: &Context) -> Outputs<f32> {
        let nan = |like: &[f32]| vec![f32::NAN; like.len()];
        let zeros = |like: &[f32]| vec![0.0; like.len()];
        let (queries, keys_len, width, dim) = (self.queries, self.keys_len, self.v.len(), self.dim);
        let (mut alpha, mut context) = (nan(&self.d_alpha), nan(&self.d_context));
        let alpha_layout = self.layout(queries, keys_len);
        let into_alpha = HeadsMut::new(&mut alpha, alpha_layout).unwrap();
        let into_context = HeadsMut::new(&mut context, self.layout(queries, dim)).unwrap();
        forward(ctx, &self.inputs(), into_alpha, into_context).unwrap();
        let mut grads = AdditiveAttentionGrads {
            d_query: nan(&self.query),
            d_keys: zeros(&self.keys),
            d_v: zeros(&self.v),
            d_values: zeros(&self.values),
        };
        let upstream = OutputGrads {
            d_context: HeadsRef::new(&self.d_context, self.layout(queries, dim)).unwrap(),
            d_alpha: Some(HeadsRef::new(&self.d_alpha, alpha_layout).unwrap()),
        };
        let into = InputGrads {
            d_query: HeadsMut::new(&mut grads.d_query, self.layout(queries, width)).unwrap(),
            d_keys: HeadsMut::new(&mut grads.d_keys, self.layout(keys_len, width)).unwrap(),
            d_v: &mut grads.d_v,
        };
        let alpha_view = HeadsRef::new(&alpha, alpha_layout).unwrap();
        backward(ctx, &self.inputs(), alpha_view, upstream, into).unwrap();
        let into = HeadsMut::new(&mut grads.d_values, self.layout(keys_len, dim)).unwrap();
        values_gradient(ctx, alpha_view, upstream.d_context, &self.lengths, into).unwrap();
        (alpha, context, grads)
    }

    fn naive<T: Real>(&self) -> Outputs<T> {
        let real = |data: &[f32]| data.iter().map(|&x| T::from(x)).collect::<Vec<T>>();
        let (query, keys, v, values) =
            (real(&self.query), real(&self.keys), real(&self.v), real(&self.values));
        let problem = AdditiveAttention {
            queries: self.queries,
            keys_len: self.keys_len,
            dim: self.dim,
            query: &query,
            keys: &keys,
            v: &v,
            values: &values,
            lengths: &self.lengths,
        };
        let (alpha, context) = additive_attention_forward(&problem);
        let grads = additive_attention_backward(&problem, &real(&self.d_alpha), &real(&self.d_context));
        (alpha, context, grads)
    }
}

fn tensors<T>((alpha, context, grads): &Outputs<T>) -> [(&'static str, &[T]); 6] {
    [
        ("alpha", alpha),
        ("context", context),
        ("d_query", &grads.d_query),
        ("d_keys", &grads.d_keys),
        ("d_v", &grads.d_v),
        ("d_values", &grads.d_values),
    ]
}

#[track_caller]
fn check_against_reference(ctx: &Context, case: &Case) {
    let (fast, naive, exact) = (case.run(ctx), case.naive::<f32>(), case.naive::<f64>());
    let gradients = scale_of(tensors(&exact).into_iter().filter(|(name, _)| name.starts_with("d_")));
    // A context is a mean of values, a weight a part of one.
    let outputs = case.values.iter().fold(1.0, |top: f64, &x| top.max(f64::from(x).abs()));
    let all = tensors(&fast).into_iter().zip(tensors(&naive)).zip(tensors(&exact));
    for (((name, fast), (_, naive)), (_, exact)) in all {
        let (factor, scale) = if name.starts_with("d_") { (3.0, gradients) } else { (2.0, outputs) };
        let what = format!("{name} on {} of {case:?}", ctx.isa());
        assert_near_scaled(&what, factor, (fast, naive, exact), scale);
    }
    for (row, alpha) in fast.0.chunks(case.keys_len.max(1)).enumerate() {
        let length = case.lengths[row / case.queries.max(1)];
        assert!(alpha[length..].iter().all(|&a| a.to_bits() == 0), "padding has weight");
        let sum: f32 = alpha.iter().sum();
        assert!(length == 0 || (sum - 1.0).abs() < 1e-5, "weights sum to {sum}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn outputs_and_gradients_are_as_exact_as_the_naive_form(
        queries in 1usize..4,
        width in prop::sample::select(vec![1usize, 5, 8, 16, 17, 31, 40, 70]),
        dim in prop::sample::select(vec![0usize, 1, 8, 9, 33]),
        lengths in prop::collection::vec(0usize..9, 0..6),
        extra in 0usize..3,
    ) {
        let keys_len = lengths.iter().copied().max().unwrap_or(0) + extra;
        let case = Case::new([queries, keys_len, width, dim], &lengths);
        for_each_isa(|ctx| check_against_reference(ctx, &case));
    }
}

/// `[batch, seq, dim]` to `[seq, batch, dim]`.
fn to_time_major(data: &[f32], batch: usize, seq: usize, dim: usize) -> Vec<f32> {
    let row = |b: usize, t: usize| &data[(b * seq + t) * dim..][..dim];
    (0..seq).flat_map(|t| (0..batch).flat_map(move |b| row(b, t))).copied().collect()
}

#[test]
fn both_memory_orders_any_threads_and_any_batch_give_the_same_bits() {
    let (queries, keys_len, width, dim) = (6, 40, 64, 48);
    let case = Case::new([queries, keys_len, width, dim], &[40, 3, 0, 27, 40, 11]);
    let batch = case.lengths.len();
    let mut time_major = case.clone();
    time_major.time_major = true;
    for (data, seq, dim) in [
        (&mut time_major.query, queries, width),
        (&mut time_major.keys, keys_len, width),
        (&mut time_major.values, keys_len, dim),
        (&mut time_major.d_alpha, queries, keys_len),
        (&mut time_major.d_context, queries, dim),
    ] {
        *data = to_time_major(data, batch, seq, dim);
    }
    for_each_isa(|ctx| {
        let one = case.run(ctx);
        let many = case.run(&ctx.threads(NonZeroUsize::new(3).unwrap()));
        tensors(&one).into_iter().zip(tensors(&many)).for_each(|((_, a), (_, b))| assert_same_bits(a, b));
        let turned = time_major.run(ctx);
        let same = |batch_major: &[f32], time_major: &[f32], seq, dim| {
            assert_same_bits(&to_time_major(batch_major, batch, seq, dim), time_major);
        };
        same(&one.0, &turned.0, queries, keys_len);
        same(&one.1, &turned.1, queries, dim);
        same(&one.2.d_query, &turned.2.d_query, queries, width);
        same(&one.2.d_keys, &turned.2.d_keys, keys_len, width);
        same(&one.2.d_values, &turned.2.d_values, keys_len, dim);
        assert_same_bits(&one.2.d_v, &turned.2.d_v);
        let alone = Case {
            lengths: vec![27],
            query: case.query[3 * queries * width..4 * queries * width].to_vec(),
            keys: case.keys[3 * keys_len * width..4 * keys_len * width].to_vec(),
            values: case.values[3 * keys_len * dim..4 * keys_len * dim].to_vec(),
            d_alpha: case.d_alpha[3 * queries * keys_len..4 * queries * keys_len].to_vec(),
            d_context: case.d_context[3 * queries * dim..4 * queries * dim].to_vec(),
            ..case.clone()
        };
        let alone = alone.run(ctx);
        assert_same_bits(&one.0[3 * queries * keys_len..4 * queries * keys_len], &alone.0);
        assert_same_bits(&one.1[3 * queries * dim..4 * queries * dim], &alone.1);
        assert_same_bits(&one.2.d_query[3 * queries * width..4 * queries * width], &alone.2.d_query);
        assert_same_bits(&one.2.d_values[3 * keys_len * dim..4 * keys_len * dim], &alone.2.d_values);
    });
}

#[test]
fn bad_shapes_are_typed_errors() {
    let case = Case::new([2, 3, 4, 5], &[3, 4]);
    let ctx = Context::with_isa(crate::Isa::best());
    let (mut alpha, mut context) = (vec![0.0; 12], vec![0.0; 20]);
    let mut run = |case: &Case| {
        let alpha = HeadsMut::new(&mut alpha, case.layout(2, 3)).unwrap();
        let context = HeadsMut::new(&mut context, case.layout(2, 5)).unwrap();
        forward(&ctx, &case.inputs(), alpha, context).unwrap_err().to_string()
    };
    assert_eq!(run(&case), "lengths[1] is 4, but the table has 3 rows");
    let good = Case { lengths: vec![3, 3], ..case };
    let mut inputs = good.inputs();
    inputs.v = &good.v[1..];
    let alpha = HeadsMut::new(&mut alpha, good.layout(2, 3)).unwrap();
    let context = HeadsMut::new(&mut context, good.layout(2, 5)).unwrap();
    let error = forward(&ctx, &inputs, alpha, context).unwrap_err();
    assert_eq!(error.to_string(), "query: dim is 4, expected 3");

    let (alpha, d_context, mut d_values) = (vec![0.0; 12], vec![0.0; 20], vec![7.0; 30]);
    let mut values = |lengths: &[usize], keys, dim| {
        let alpha = HeadsRef::new(&alpha, good.layout(2, 3)).unwrap();
        let d_context = HeadsRef::new(&d_context, good.layout(2, 5)).unwrap();
        let into = HeadsMut::new(&mut d_values[..2 * keys * dim], good.layout(keys, dim)).unwrap();
        values_gradient(&ctx, alpha, d_context, lengths, into).unwrap_err().to_string()
    };
    assert_eq!(values(&[3, 4], 3, 5), "lengths[1] is 4, but the table has 3 rows");
    assert_eq!(values(&[3], 3, 5), "alpha: batch is 2, expected 1");
    assert_eq!(values(&[3, 3], 2, 5), "alpha: dim is 3, expected 2");
    assert_eq!(values(&[3, 3], 3, 4), "d_context: dim is 5, expected 4");
    assert!(d_values.iter().all(|&x| x == 7.0));
}
