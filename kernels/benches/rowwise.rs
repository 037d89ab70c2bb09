//! Row-wise kernels on one thread at the widths of small models, and at one that streams from memory.
//! The throughput counts the bytes that the kernel has to read and write once.

use std::time::Duration;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use kavanam_kernels::optim::adamw::{self, AdamW, Buffers};
use kavanam_kernels::rowwise::activation::{self, Activation};
use kavanam_kernels::rowwise::cross_entropy::{self, CrossEntropy};
use kavanam_kernels::rowwise::dropout::{self, Dropout};
use kavanam_kernels::rowwise::layernorm::{self, LayerNorm, RowStats};
use kavanam_kernels::rowwise::{elementwise, embedding, reduce, softmax};
use kavanam_kernels::{Context, Isa, MatMut, MatRef};

/// (rows, columns): shards of small models in cache, then 64 MiB.
const SHAPES: [(usize, usize); 4] = [(1024, 64), (1024, 128), (1024, 512), (16_384, 1024)];

fn context() -> Context {
    Context::with_isa(Isa::best())
}

/// Values in −2..2 without a pattern that a predictor could learn.
fn data(len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 22) as f32 - 2.0).collect()
}

fn mat(x: &[f32], cols: usize) -> MatRef<'_> {
    MatRef::new(x, x.len() / cols, cols).expect("a whole number of rows")
}

fn mat_mut(x: &mut [f32], cols: usize) -> MatMut<'_> {
    let rows = x.len() / cols;
    MatMut::new(x, rows, cols).expect("a whole number of rows")
}

/// Measures `run` for each shape; `passes` buffers of that shape are read or written.
fn bench(c: &mut Criterion, name: &str, passes: u64, mut run: impl FnMut(&Context, &mut Buf)) {
    let mut group = c.benchmark_group(name);
    group
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .sample_size(10);
    for (rows, cols) in SHAPES {
        let ctx = context();
        let mut buf = Buf::new(rows, cols);
        group.throughput(Throughput::Bytes(passes * (rows * cols * 4) as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{rows}x{cols}")), |b| {
            b.iter(|| run(&ctx, &mut buf));
        });
    }
    group.finish();
}

/// Buffers of one shape, shared by all cases.
struct Buf {
    cols: usize,
    x: Vec<f32>,
    d_y: Vec<f32>,
    y: Vec<f32>,
    z: Vec<f32>,
    gamma: Vec<f32>,
    sums: [Vec<f32>; 2],
    stats: Vec<RowStats>,
    targets: Vec<u32>,
    losses: Vec<f32>,
}

impl Buf {
    fn new(rows: usize, cols: usize) -> Buf {
        let targets = (0..rows).map(|i| (i * 7 % cols) as u32).collect();
        Buf {
            cols,
            x: data(rows * cols),
            d_y: data(rows * cols),
            y: data(rows * cols),
            z: data(rows * cols).iter().map(|x| x.abs()).collect(),
            gamma: data(cols),
            sums: [vec![0.0; cols], vec![0.0; cols]],
            stats: vec![RowStats { mean: 0.0, rstd: 1.0 }; rows],
            targets,
            losses: vec![1.0; rows],
        }
    }
}

fn rows(c: &mut Criterion) {
    bench(c, "softmax/forward", 2, |ctx, b| {
        softmax::forward(ctx, mat(&b.x, b.cols), mat_mut(&mut b.y, b.cols)).unwrap();
    });
    bench(c, "softmax/backward", 3, |ctx, b| {
        softmax::backward(ctx, mat(&b.x, b.cols), mat(&b.d_y, b.cols), mat_mut(&mut b.y, b.cols)).unwrap();
    });
    bench(c, "layernorm/forward", 2, |ctx, b| {
        let norm = LayerNorm { gamma: &b.gamma, beta: &b.gamma, eps: 1e-5 };
        layernorm::forward(ctx, mat(&b.x, b.cols), &norm, mat_mut(&mut b.y, b.cols), &mut b.stats).unwrap();
    });
    bench(c, "layernorm/backward", 3, |ctx, b| {
        let saved = layernorm::Saved { x: mat(&b.x, b.cols), gamma: &b.gamma, stats: &b.stats };
        let [d_gamma, d_beta] = &mut b.sums;
        let (d_y, d_x) = (mat(&b.d_y, b.cols), mat_mut(&mut b.y, b.cols));
        layernorm::backward(ctx, &saved, d_y, d_x, d_gamma, d_beta).unwrap();
    });
    let spec = CrossEntropy { label_smoothing: 0.1, ignore_index: Some(0) };
    bench(c, "cross_entropy/forward", 1, |ctx, b| {
        cross_entropy::forward(ctx, mat(&b.x, b.cols), &b.targets, &spec, &mut b.losses).unwrap();
    });
    bench(c, "cross_entropy/backward", 2, |ctx, b| {
        let (logits, d_logits) = (mat(&b.x, b.cols), mat_mut(&mut b.y, b.cols));
        cross_entropy::backward(ctx, logits, &b.targets, &spec, &b.losses, d_logits).unwrap();
    });
    bench(c, "col_sum", 1, |ctx, b| {
        reduce::col_sum(ctx, mat(&b.x, b.cols), &mut b.sums[0]).unwrap();
    });
}

fn elements(c: &mut Criterion) {
    for act in
        [Activation::Relu, Activation::GeluErf, Activation::GeluTanh, Activation::Tanh, Activation::Sigmoid]
    {
        bench(c, &format!("{}/forward", act.as_str()), 2, |ctx, b| {
            activation::forward(ctx, act, &b.x, &mut b.y).unwrap();
        });
        bench(c, &format!("{}/backward", act.as_str()), 3, |ctx, b| {
            activation::backward(ctx, act, &b.x, &b.d_y, &mut b.y).unwrap();
        });
    }
    let spec = Dropout { p: 0.1, seed: 1, stream: 2 };
    bench(c, "dropout", 2, |ctx, b| dropout::apply(ctx, &spec, &b.x, &mut b.y).unwrap());
    bench(c, "add", 3, |ctx, b| elementwise::add(ctx, &b.x, &b.d_y, &mut b.y).unwrap());
    bench(c, "sum_squares", 1, |ctx, b| {
        std::hint::black_box(reduce::sum_squares(ctx, &b.x));
    });
    let spec = AdamW { weight_decay: 0.01, ..AdamW::default() };
    bench(c, "adamw", 7, |ctx, b| {
        let buffers = Buffers { param: &mut b.x, grad: &b.d_y, m: &mut b.y, v: &mut b.z };
        adamw::step(ctx, &spec, 10, 0.5, buffers).unwrap();
    });
}

fn embeddings(c: &mut Criterion) {
    let mut group = c.benchmark_group("embedding");
    group
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .sample_size(10);
    let ctx = context();
    let (vocab, dim, rows) = (80, 128, 1024);
    let (table, d_out) = (data(vocab * dim), data(rows * dim));
    let ids: Vec<u32> = (0..rows as u32).map(|i| i * i % vocab as u32).collect();
    group.throughput(Throughput::Bytes((2 * rows * dim * 4) as u64));
    group.bench_function("forward/1024x128", |b| {
        let mut out = data(rows * dim);
        b.iter(|| embedding::forward(&ctx, mat(&table, dim), &ids, 1.5, mat_mut(&mut out, dim)).unwrap());
    });
    group.bench_function("backward/1024x128", |b| {
        b.iter_batched_ref(
            || vec![0.0; vocab * dim],
            |d_table| embedding::backward(&ctx, mat(&d_out, dim), &ids, 1.5, mat_mut(d_table, dim)).unwrap(),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    rows(&mut criterion);
    elements(&mut criterion);
    embeddings(&mut criterion);
    criterion.final_summary();
}
