//! Recurrent layers and additive attention: single-threaded rates at the sizes of a training shard.
//!
//! Throughput counts the floating-point operations of the matrix products alone (for attention the elements
//! that go through tanh), so `Gelem/s` is GFLOP/s and compares with the `product` group: the product of one
//! step by itself, the rate that the recurrence cannot beat.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kavanam_kernels::gemm::{Accum, Epilogue, PackedWeights, gemm_packed};
use kavanam_kernels::rnn::{self, Cell, Direction, Sequence, WeightGrads, Weights, additive_attention};
use kavanam_kernels::{Context, HeadsLayout, HeadsMut, HeadsRef, Isa, MatMut, MatRef};

/// (hidden = input, batch, seq).
const SHAPES: [(usize, usize, usize); 5] =
    [(128, 64, 10), (256, 32, 10), (256, 64, 20), (512, 32, 20), (512, 128, 10)];

/// Values in (−1, 1) that are not all alike.
fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.7).sin() * 0.3).collect()
}

fn context() -> Context {
    Context::with_isa(Isa::best())
}

struct Layer {
    cell: Cell,
    hidden: usize,
    tensors: [Vec<f32>; 4],
    x: Vec<f32>,
    lengths: Vec<usize>,
    rows: usize,
}

impl Layer {
    fn new(cell: Cell, (hidden, batch, seq): (usize, usize, usize)) -> Layer {
        let gates = cell.gates() * hidden;
        let tensors = [gates * hidden, gates * hidden, gates, gates].map(values);
        let (x, lengths) = (values(seq * batch * hidden), vec![seq; batch]);
        Layer { cell, hidden, tensors, x, lengths, rows: seq * batch }
    }

    fn weights(&self) -> Weights<'_> {
        let [w_ih, w_hh, b_ih, b_hh] = &self.tensors;
        let matrix = |w| MatRef::new(w, self.cell.gates() * self.hidden, self.hidden).unwrap();
        let (w_ih, w_hh) = (matrix(w_ih), matrix(w_hh));
        Weights { cell: self.cell, w_ih, w_hh, b_ih, b_hh, peepholes: &[], w_hr: None }
    }

    fn sequence(&self) -> Sequence<'_> {
        let x = MatRef::new(&self.x, self.rows, self.hidden).unwrap();
        Sequence { x, lengths: &self.lengths, direction: Direction::Forward }
    }

    /// Floating-point operations of a forward pass.
    fn flops(&self) -> u64 {
        let steps: usize = self.lengths.iter().sum();
        (4 * steps * self.cell.gates() * self.hidden * self.hidden) as u64
    }

    fn forward(&self, ctx: &Context, y: &mut [f32]) -> rnn::Saved {
        let output = rnn::Output { y: MatMut::new(y, self.rows, self.hidden).unwrap(), last: None };
        rnn::forward(ctx, &self.weights(), &self.sequence(), None, output).unwrap()
    }

    fn forward_backward(&self, ctx: &Context, y: &mut [f32], grads: &mut [Vec<f32>; 4], d_x: &mut [f32]) {
        let saved = self.forward(ctx, y);
        let (rows, hidden) = (self.cell.gates() * self.hidden, self.hidden);
        let [d_w_ih, d_w_hh, d_b_ih, d_b_hh] = grads;
        let weights = WeightGrads {
            d_w_ih: MatMut::new(d_w_ih, rows, hidden).unwrap(),
            d_w_hh: MatMut::new(d_w_hh, rows, hidden).unwrap(),
            d_b_ih,
            d_b_hh,
            d_peepholes: &mut [],
            d_w_hr: None,
        };
        let d_x = Some(MatMut::new(d_x, self.rows, hidden).unwrap());
        let grads = rnn::InputGrads { weights, d_x, d_initial: None };
        let d_y = Some(MatRef::new(y, self.rows, hidden).unwrap());
        let upstream = rnn::OutputGrads { d_y, d_last: None };
        rnn::backward(ctx, &self.weights(), &self.sequence(), saved, upstream, grads).unwrap();
    }
}

fn layers(c: &mut Criterion) {
    let ctx = context();
    for (cell, name) in [(Cell::Lstm, "lstm"), (Cell::Gru, "gru")] {
        let mut group = c.benchmark_group(name);
        for shape in SHAPES {
            let mut layer = Layer::new(cell, shape);
            let label = format!("h{}_b{}_t{}", shape.0, shape.1, shape.2);
            let mut y = vec![0.0; layer.rows * layer.hidden];
            let (mut grads, mut d_x) = (layer.tensors.clone(), layer.x.clone());
            group.throughput(Throughput::Elements(layer.flops()));
            group.bench_function(BenchmarkId::new("forward", &label), |b| {
                b.iter(|| black_box(layer.forward(&ctx, &mut y)));
            });
            group.throughput(Throughput::Elements(3 * layer.flops()));
            group.bench_function(BenchmarkId::new("forward_backward", &label), |b| {
                b.iter(|| layer.forward_backward(&ctx, &mut y, &mut grads, &mut d_x));
            });
            // Lengths that shrink by half over the batch, as in a bucket of words.
            let batch = layer.lengths.len();
            layer.lengths.iter_mut().enumerate().for_each(|(b, length)| *length -= *length * b / (2 * batch));
            group.throughput(Throughput::Elements(layer.flops()));
            group.bench_function(BenchmarkId::new("forward_ragged", &label), |b| {
                b.iter(|| black_box(layer.forward(&ctx, &mut y)));
            });
        }
        group.finish();
    }
}

fn product(c: &mut Criterion) {
    let ctx = context();
    let mut group = c.benchmark_group("product");
    for (hidden, batch, _) in SHAPES {
        let (a, w) = (values(batch * hidden), values(4 * hidden * hidden));
        let mut out = vec![0.0; batch * 4 * hidden];
        let packed = PackedWeights::pack(&ctx, MatRef::new(&w, 4 * hidden, hidden).unwrap().t()).unwrap();
        group.throughput(Throughput::Elements((8 * batch * hidden * hidden) as u64));
        group.bench_function(format!("h{hidden}_b{batch}"), |b| {
            b.iter(|| {
                let (a, c) = (MatRef::new(&a, batch, hidden), MatMut::new(&mut out, batch, 4 * hidden));
                gemm_packed(&ctx, a.unwrap(), &packed, c.unwrap(), Accum::Overwrite, &Epilogue::new())
                    .unwrap();
            });
        });
    }
    group.finish();
}

fn attention(c: &mut Criterion) {
    let ctx = context();
    let mut group = c.benchmark_group("additive_attention");
    for (batch, queries, keys, width) in [(64, 1, 10, 128), (64, 10, 10, 128), (32, 32, 32, 512)] {
        let layout = |seq, dim| HeadsLayout::seq_batch(seq, batch, dim);
        let (q, k, v) = (values(batch * queries * width), values(batch * keys * width), values(width));
        let lengths = vec![keys; batch];
        let keys_view = HeadsRef::new(&k, layout(keys, width)).unwrap();
        let inputs = additive_attention::Inputs {
            query: HeadsRef::new(&q, layout(queries, width)).unwrap(),
            keys: keys_view,
            v: &v,
            values: keys_view,
            lengths: &lengths,
        };
        let (mut alpha, mut out) = (vec![0.0; batch * queries * keys], vec![0.0; batch * queries * width]);
        let (mut d_q, mut d_k, mut d_v, mut d_values) = (q.clone(), k.clone(), v.clone(), k.clone());
        let label = format!("b{batch}_t{queries}_s{keys}_a{width}");
        group.throughput(Throughput::Elements((batch * queries * keys * width) as u64));
        group.bench_function(BenchmarkId::new("forward", &label), |b| {
            b.iter(|| {
                let alpha = HeadsMut::new(&mut alpha, layout(queries, keys)).unwrap();
                let out = HeadsMut::new(&mut out, layout(queries, width)).unwrap();
                additive_attention::forward(&ctx, &inputs, alpha, out).unwrap();
            });
        });
        group.bench_function(BenchmarkId::new("backward", &label), |b| {
            b.iter(|| {
                let grads = additive_attention::InputGrads {
                    d_query: HeadsMut::new(&mut d_q, layout(queries, width)).unwrap(),
                    d_keys: HeadsMut::new(&mut d_k, layout(keys, width)).unwrap(),
                    d_v: &mut d_v,
                };
                let d_context = HeadsRef::new(&out, layout(queries, width)).unwrap();
                let upstream = additive_attention::OutputGrads { d_context, d_alpha: None };
                let alpha = HeadsRef::new(&alpha, layout(queries, keys)).unwrap();
                additive_attention::backward(&ctx, &inputs, alpha, upstream, grads).unwrap();
                let d_values = HeadsMut::new(&mut d_values, layout(keys, width)).unwrap();
                additive_attention::values_gradient(&ctx, alpha, d_context, &lengths, d_values).unwrap();
            });
        });
    }
    group.finish();
}

criterion_group!(benches, layers, product, attention);
criterion_main!(benches);
