//! Flash attention, forward and backward: single-threaded rates of many short heads and of few long ones.
//!
//! Throughput counts the floating-point operations of the products over visible pairs, 4·pairs·dim forward and
//! 10·pairs·dim backward, so `Gelem/s` is GFLOP/s.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kavanam_kernels::attention::{AttentionSpec, Grads, Inputs, Mask, Saved, backward, forward};
use kavanam_kernels::{Context, HeadsLayout, HeadsMut, HeadsRef, Isa};

/// (batch, heads, seq, dim): training on short words first, then the shapes that attention is known by.
const SHAPES: [(usize, usize, usize, usize); 8] = [
    (64, 2, 5, 16),
    (64, 4, 10, 32),
    (32, 8, 20, 64),
    (16, 4, 40, 32),
    (8, 8, 128, 64),
    (1, 12, 512, 64),
    (1, 4, 1024, 128),
    (1, 1, 4096, 64),
];

/// Values in (−1, 1) that are not all alike.
fn values(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i + seed) as f32 * 0.7).sin()).collect()
}

fn attention(criterion: &mut Criterion) {
    let ctx = Context::with_isa(Isa::best());
    for causal in [false, true] {
        let mask = if causal { Mask::causal(0) } else { Mask::none() };
        let name = if causal { "attention causal" } else { "attention" };
        let mut group = criterion.benchmark_group(name);
        for (batch, heads, seq, dim) in SHAPES {
            let layout = HeadsLayout::batch_seq_heads(batch, seq, heads, dim);
            let len = batch * seq * heads * dim;
            let [q, k, v, d_out] = [0, 1, 2, 3].map(|seed| values(len, seed));
            let view = |data| HeadsRef::new(data, layout).unwrap();
            let inputs = Inputs { q: view(&q), k: view(&k), v: view(&v) };
            let spec = AttentionSpec::scaled(dim).with_mask(mask);
            let (mut out, mut lse) = (vec![0.0; len], vec![0.0; batch * heads * seq]);
            let pairs = batch * heads * if causal { seq * (seq + 1) / 2 } else { seq * seq };
            let id = format!("{batch}x{heads}x{seq}x{dim}");
            group.throughput(Throughput::Elements((4 * pairs * dim) as u64));
            group.bench_function(BenchmarkId::new("forward", &id), |bencher| {
                bencher.iter(|| {
                    let out = HeadsMut::new(black_box(&mut out), layout).unwrap();
                    forward(&ctx, &inputs, &spec, out, &mut lse).unwrap();
                });
            });
            let Inputs { q, k, v } = inputs;
            let saved = Saved { q, k, v, out: HeadsRef::new(&out, layout).unwrap(), lse: &lse };
            let d_out = HeadsRef::new(&d_out, layout).unwrap();
            let mut grads = [(); 3].map(|()| vec![0.0; len]);
            group.throughput(Throughput::Elements((10 * pairs * dim) as u64));
            group.bench_function(BenchmarkId::new("backward", &id), |bencher| {
                bencher.iter(|| {
                    let [d_q, d_k, d_v] =
                        black_box(&mut grads).each_mut().map(|grad| HeadsMut::new(grad, layout).unwrap());
                    backward(&ctx, &saved, d_out, &spec, Grads { d_q, d_k, d_v, d_bias: None }).unwrap();
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, attention);
criterion_main!(benches);
