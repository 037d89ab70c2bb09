//! The matrix product on every instruction set of the machine, one thread. `--test` runs each case once.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kavanam_kernels::gemm::{Accum, Epilogue, PackedWeights, gemm, gemm_packed, kernel_name};
use kavanam_kernels::{Context, Isa, MatMut, MatRef};

/// What a product is for; it decides which operand is transposed or packed.
#[derive(Clone, Copy)]
enum Role {
    /// `y = x·W`, all row-major.
    Forward,
    /// `d_x = d_y·Wᵀ`.
    InputGradient,
    /// `d_W = xᵀ·d_y`.
    WeightGradient,
    /// One step of an RNN: weights packed beforehand.
    Step,
}

/// Name, role, m, n, k.
const CASES: [(&str, Role, usize, usize, usize); 8] = [
    ("square_64", Role::Forward, 64, 64, 64),
    ("square_256", Role::Forward, 256, 256, 256),
    ("square_1024", Role::Forward, 1024, 1024, 1024),
    ("forward", Role::Forward, 1000, 256, 256),
    ("input_gradient", Role::InputGradient, 1000, 256, 256),
    ("weight_gradient", Role::WeightGradient, 256, 256, 1000),
    ("rnn_step_32", Role::Step, 32, 1024, 256),
    ("rnn_step_1", Role::Step, 1, 1024, 256),
];

/// Values without pattern: a benchmark on zeroed memory reads one shared page.
fn filled(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.618).fract() - 0.5).collect()
}

fn case(c: &mut Criterion, ctx: &Context, (name, role, m, n, k): (&str, Role, usize, usize, usize)) {
    let (a, b, mut out) = (filled(m * k), filled(k * n), filled(m * n));
    let a_strides = if matches!(role, Role::WeightGradient) { (1, m) } else { (k, 1) };
    let b_strides = if matches!(role, Role::InputGradient) { (1, k) } else { (n, 1) };
    let a = MatRef::with_strides(&a, m, k, a_strides.0, a_strides.1).expect("a's buffer fits");
    let b = MatRef::with_strides(&b, k, n, b_strides.0, b_strides.1).expect("b's buffer fits");
    let packed = PackedWeights::pack(ctx, b).expect("b can be packed");
    let epilogue = Epilogue::new();
    let mut group = c.benchmark_group(name);
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500));
    // Elements are floating-point operations: criterion's elem/s is FLOP/s.
    group.throughput(Throughput::Elements(2 * (m * n * k) as u64));
    group.bench_function(BenchmarkId::from_parameter(kernel_name(ctx)), |bencher| {
        bencher.iter(|| {
            let c = MatMut::new(black_box(&mut out), m, n).expect("c's buffer fits");
            match role {
                Role::Step => gemm_packed(ctx, black_box(a), &packed, c, Accum::Overwrite, &epilogue),
                _ => gemm(ctx, black_box(a), black_box(b), c, Accum::Overwrite, &epilogue),
            }
            .expect("the shapes fit");
        });
    });
    group.finish();
}

fn benches(c: &mut Criterion) {
    for isa in Isa::available() {
        for shape in CASES {
            case(c, &Context::with_isa(isa), shape);
        }
    }
}

criterion_group!(gemm_benches, benches);
criterion_main!(gemm_benches);
