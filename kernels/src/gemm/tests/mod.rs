//! The properties of the product, on every ISA of the machine.

mod bf16;
mod int7;
mod int8;
mod int8_int4;
mod mixed;
mod stored;
mod tile_packing;
mod tiles;

use std::num::NonZeroUsize;

use proptest::prelude::*;

use super::*;
use crate::reference;
use crate::testing::{
    Guarded, assert_same_bits, assert_within, for_each_isa, gamma, integers, straddle, uniform,
};
use crate::view::{BatchLayout, MatBatchMut, MatBatchRef};

/// Blocks so small that a matrix of a few dozen rows crosses every edge.
const TINY: Blocking = Blocking { mc: 9, kc: 7, nc: 20 };

/// A matrix with its strides, in a buffer of its own.
#[derive(Debug, Clone)]
struct Matrix {
    data: Vec<f32>,
    rows: usize,
    cols: usize,
    strides: (usize, usize),
}

impl Matrix {
    /// `order` 0: row-major, 1: column-major, 2: rows with gaps, 3: both strides above 1.
    fn new(rows: usize, cols: usize, order: u8, fill: impl Fn(usize) -> Vec<f32>) -> Matrix {
        let strides = match order {
            0 => (cols, 1),
            1 => (1, rows),
            2 => (cols + 3, 1),
            _ => (2 * cols + 1, 2),
        };
        let len = rows * strides.0 + cols * strides.1;
        Matrix { data: fill(len), rows, cols, strides }
    }

    fn view(&self) -> MatRef<'_> {
        MatRef::with_strides(&self.data, self.rows, self.cols, self.strides.0, self.strides.1).unwrap()
    }

    fn view_mut(&mut self) -> MatMut<'_> {
        MatMut::with_strides(&mut self.data, self.rows, self.cols, self.strides.0, self.strides.1).unwrap()
    }
}

fn elements(view: MatRef<'_>) -> Vec<f32> {
    (0..view.rows()).flat_map(|i| (0..view.cols()).map(move |j| view.at(i, j))).collect()
}

fn row_major(data: &[f32], rows: usize, cols: usize) -> MatRef<'_> {
    MatRef::new(data, rows, cols).unwrap()
}

/// `A·B` into a poisoned, guarded C.
fn overwrite(ctx: &Context, a: MatRef<'_>, b: MatRef<'_>) -> Vec<f32> {
    let (m, n) = (a.rows(), b.cols());
    let mut c = Guarded::poisoned(m * n);
    let view = MatMut::new(c.body_mut(), m, n).unwrap();
    gemm(ctx, a, b, view, Accum::Overwrite, &Epilogue::new()).unwrap();
    c.check();
    c.body().to_vec()
}

fn dims() -> impl Strategy<Value = (usize, usize, usize)> {
    (straddle(&[4, 6, 8, 9]), straddle(&[4, 8, 16, 20]), straddle(&[1, 7]))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// `γ_{k+3}`: k roundings of the chains and block sums, scale, old C, bias; the activation does not
    /// amplify, gate and residual add one each.
    #[test]
    fn the_error_is_within_gamma_k(
        (m, n, k) in dims(),
        orders in (0u8..4, 0u8..4, 0u8..4),
        (add, relu, with_bias, with_gate, with_residual) in any::<(bool, bool, bool, bool, bool)>(),
        scale in prop_oneof![Just(1.0f32), -2.0f32..2.0],
        seed in any::<u64>(),
    ) {
        let a = Matrix::new(m, k, orders.0, |len| uniform(len, seed));
        let b = Matrix::new(k, n, orders.1, |len| uniform(len, seed ^ 1));
        let residual = Matrix::new(m, n, orders.0, |len| uniform(len, seed ^ 2));
        let gate = Matrix::new(m, n, orders.1, |len| uniform(len, seed ^ 5));
        let old = Matrix::new(m, n, orders.2, |len| if add { uniform(len, seed ^ 3) } else { vec![f32::NAN; len] });
        let bias = uniform(n, seed ^ 4);
        let mut epilogue = Epilogue::new().scale(scale);
        if relu { epilogue = epilogue.activation(Activation::Relu) }
        if with_bias { epilogue = epilogue.bias(&bias) }
        if with_gate { epilogue = epilogue.gate(gate.view()) }
        if with_residual { epilogue = epilogue.residual(residual.view()) }
        let accum = if add { Accum::Add } else { Accum::Overwrite };

        let product = reference::gemm(a.view(), b.view());
        let magnitude = reference::gemm_abs(a.view(), b.view());
        let term = |on: bool, x: f32| if on { f64::from(x) } else { 0.0 };
        let (mut expected, mut bound) = (Vec::new(), Vec::new());
        for i in 0..m { for j in 0..n {
            let parts = [term(add, old.view().at(i, j)), term(with_bias, bias[j])];
            let rest = term(with_residual, residual.view().at(i, j));
            let before = f64::from(scale) * product[i * n + j] + parts[0] + parts[1];
            let activated = if relu { before.max(0.0) } else { before };
            let factor = if with_gate { f64::from(gate.view().at(i, j)) } else { 1.0 };
            expected.push(activated * factor + rest);
            let sum = f64::from(scale).abs() * magnitude[i * n + j] + parts[0].abs() + parts[1].abs();
            bound.push(gamma(2 * k + 6) * (sum * factor.abs() + rest.abs()));
        }}
        for_each_isa(|ctx| {
            let ctx = ctx.blocking(TINY);
            let mut c = old.clone();
            gemm(&ctx, a.view(), b.view(), c.view_mut(), accum, &epilogue).unwrap();
            assert_within(&elements(c.view()), &expected, |i| bound[i]);
            let packed = PackedWeights::pack(&ctx, b.view()).unwrap();
            let mut same = old.clone();
            gemm_packed(&ctx, a.view(), &packed, same.view_mut(), accum, &epilogue).unwrap();
            assert_same_bits(&same.data, &c.data);
        });
    }

    #[test]
    fn integers_are_exact((m, n, k) in dims(), seed in any::<u64>()) {
        let (a, b) = (integers(m * k, 100, seed), integers(k * n, 100, seed ^ 1));
        let (a, b) = (row_major(&a, m, k), row_major(&b, k, n));
        let expected = reference::gemm(a, b);
        for_each_isa(|ctx| {
            for ctx in [*ctx, ctx.blocking(TINY)] {
                assert_within(&overwrite(&ctx, a, b), &expected, |_| 0.0);
            }
        });
    }

    #[test]
    fn bits_do_not_depend_on_threads((m, n, k) in (1usize..300, 1usize..300, 1usize..300), seed in any::<u64>()) {
        let (a, b) = (uniform(m * k, seed), uniform(k * n, seed ^ 1));
        let (a, b) = (row_major(&a, m, k), row_major(&b, k, n));
        for_each_isa(|ctx| {
            let one = overwrite(ctx, a, b);
            for threads in [2, 3, 5] {
                let ctx = ctx.threads(NonZeroUsize::new(threads).unwrap());
                assert_same_bits(&overwrite(&ctx, a, b), &one);
            }
        });
    }

    #[test]
    fn a_row_alone_has_the_bits_of_the_row_in_a_batch((m, n, k) in (1usize..40, 1usize..60, 0usize..600), seed in any::<u64>()) {
        let (a, b) = (uniform(m * k, seed), uniform(k * n, seed ^ 1));
        let (a, b) = (row_major(&a, m, k), row_major(&b, k, n));
        for_each_isa(|ctx| {
            let batch = overwrite(ctx, a, b);
            for i in 0..m {
                assert_same_bits(&overwrite(ctx, a.sub(i..i + 1, 0..k), b), &batch[i * n..(i + 1) * n]);
            }
            assert_same_bits(&overwrite(ctx, a, b.t().t()), &batch);
        });
    }

    /// One or two rows take several panels of B at a time (up to 4 × 48 columns), with a ragged last panel.
    #[test]
    fn few_rows_have_the_bits_of_many((n, k) in (1usize..420, 0usize..40), add in any::<bool>(), seed in any::<u64>()) {
        let m = 7;
        let (a, b) = (uniform(m * k, seed), uniform(k * n, seed ^ 1));
        let (a, b) = (row_major(&a, m, k), row_major(&b, k, n));
        let (old, bias, residual) = (uniform(m * n, seed ^ 2), uniform(n, seed ^ 3), uniform(m * n, seed ^ 4));
        let residual = row_major(&residual, m, n);
        let accum = if add { Accum::Add } else { Accum::Overwrite };
        let part = |first: usize, rows: usize| {
            let c = old[first * n..(first + rows) * n].to_vec();
            let rest = residual.sub(first..first + rows, 0..n);
            let epilogue = Epilogue::new().bias(&bias).gate(rest).residual(rest).scale(0.5);
            (a.sub(first..first + rows, 0..k), c, epilogue)
        };
        for_each_isa(|ctx| {
            let ctx = &ctx.blocking(Blocking { kc: 17, nc: 300, ..TINY });
            let packed = PackedWeights::pack(ctx, b).unwrap();
            let product = |(a, mut c, epilogue): (MatRef<'_>, Vec<f32>, Epilogue<'_>), packed: Option<&PackedWeights>| {
                let view = MatMut::new(&mut c, a.rows(), n).unwrap();
                match packed {
                    Some(packed) => gemm_packed(ctx, a, packed, view, accum, &epilogue).unwrap(),
                    None => gemm(ctx, a, b, view, accum, &epilogue).unwrap(),
                }
                c
            };
            let many = product(part(0, m), None);
            for (first, rows) in [(0, 1), (3, 1), (1, 2), (4, 3)] {
                let expected = &many[first * n..(first + rows) * n];
                assert_same_bits(&product(part(first, rows), None), expected);
                assert_same_bits(&product(part(first, rows), Some(&packed)), expected);
            }
        });
    }
}

/// A large power of two as B's row stride makes a part of few rows read B in place and a part of many
/// pack it; a short transposed A is read in place, a long one packed.
#[test]
fn packing_changes_no_bits() {
    let (m, n, k) = (100, 44, 300);
    let wide = uniform(k * 1024, 1);
    let b = MatRef::with_strides(&wide, k, n, 1024, 1).unwrap();
    let narrow = elements(b);
    let columns = elements(b.t());
    let a = uniform(m * k, 2);
    let a = row_major(&a, m, k);
    let a_columns = elements(a.t());
    let a_wide: Vec<f32> =
        (0..k).flat_map(|p| (0..1024).map(move |i| if i < m { a.at(i, p) } else { 0.0 })).collect();
    for_each_isa(|ctx| {
        let expected = overwrite(ctx, a, row_major(&narrow, k, n));
        assert_same_bits(&overwrite(ctx, a, b), &expected);
        assert_same_bits(&overwrite(ctx, a, row_major(&columns, n, k).t()), &expected);
        assert_same_bits(&overwrite(ctx, row_major(&a_columns, k, m).t(), b), &expected);
        assert_same_bits(&overwrite(ctx, row_major(&a_wide, k, 1024).t().sub(0..m, 0..k), b), &expected);
        for rows in [1, 3, 17] {
            assert_same_bits(&overwrite(ctx, a.sub(0..rows, 0..k), b), &expected[..rows * n]);
        }
    });
}

#[test]
fn batches_are_their_products() {
    let (m, n, k, count) = (9, 21, 13, 5);
    let (a, b) = (uniform(count * m * k, 1), uniform(count * k * n, 2));
    let bias = uniform(n, 3);
    let epilogue = Epilogue::new().bias(&bias).activation(Activation::Relu);
    let layout = |rows, cols| BatchLayout::contiguous(count, rows, cols);
    let one_b = BatchLayout { batch_stride: 0, ..layout(k, n) };
    for_each_isa(|ctx| {
        for (b_layout, threads) in [(layout(k, n), 1), (layout(k, n), 2), (one_b, 7)] {
            let ctx = ctx.threads(NonZeroUsize::new(threads).unwrap());
            let a = MatBatchRef::new(&a, layout(m, k)).unwrap();
            let b = MatBatchRef::new(&b, b_layout).unwrap();
            let mut c = vec![f32::NAN; count * m * n];
            let view = MatBatchMut::new(&mut c, layout(m, n)).unwrap();
            gemm_batched(&ctx, a, b, view, Accum::Overwrite, &epilogue).unwrap();
            for (i, c) in c.chunks(m * n).enumerate() {
                let mut alone = vec![f32::NAN; m * n];
                let view = MatMut::new(&mut alone, m, n).unwrap();
                gemm(&ctx, a.matrix(i), b.matrix(i), view, Accum::Overwrite, &epilogue).unwrap();
                assert_same_bits(c, &alone);
            }
        }
    });
}

#[test]
fn batches_that_do_not_fit_are_refused() {
    let ctx = Context::with_isa(crate::Isa::scalar());
    let data = uniform(24, 1);
    let mut c = vec![7.0; 8];
    let mut run = |a: (usize, usize, usize), b: (usize, usize, usize), epilogue: Epilogue<'_>| {
        let view = |(count, rows, cols)| {
            MatBatchRef::new(&data, BatchLayout::contiguous(count, rows, cols)).unwrap()
        };
        let out = MatBatchMut::new(&mut c, BatchLayout::contiguous(2, 2, 2)).unwrap();
        let error = gemm_batched(&ctx, view(a), view(b), out, Accum::Overwrite, &epilogue).unwrap_err();
        assert!(c.iter().all(|&x| x == 7.0));
        error.to_string()
    };
    assert_eq!(run((3, 2, 3), (2, 3, 2), Epilogue::new()), "a: count is 3, expected 2");
    assert_eq!(run((2, 2, 3), (2, 2, 2), Epilogue::new()), "b: rows is 2, expected 3");
    assert_eq!(run((2, 2, 3), (2, 3, 4), Epilogue::new()), "c: cols is 2, expected 4");
    let residual = row_major(&data[..4], 2, 2);
    assert!(run((2, 2, 3), (2, 3, 2), Epilogue::new().residual(residual)).contains("residual"));
    assert!(run((2, 2, 3), (2, 3, 2), Epilogue::new().gate(residual)).contains("gate"));
}

#[test]
fn a_mistake_of_the_caller_is_an_error_and_touches_nothing() {
    let ctx = Context::with_isa(crate::Isa::scalar());
    let data = uniform(12, 1);
    let (a, b) = (row_major(&data, 3, 4), row_major(&data, 4, 3));
    let mut c = vec![7.0; 9];
    let mut run = |a, b, epilogue: Epilogue<'_>| {
        let result = gemm(&ctx, a, b, MatMut::new(&mut c, 3, 3).unwrap(), Accum::Overwrite, &epilogue);
        assert!(c.iter().all(|&x| x == 7.0));
        result.unwrap_err().to_string()
    };
    assert_eq!(run(a, a, Epilogue::new()), "b: rows is 3, expected 4");
    assert_eq!(run(b, a, Epilogue::new()), "c: rows is 3, expected 4");
    assert_eq!(run(a, b, Epilogue::new().bias(&data)), "bias: elements is 12, expected 3");
    assert_eq!(run(a, b, Epilogue::new().residual(a)), "residual: cols is 4, expected 3");
    assert_eq!(run(a, b, Epilogue::new().gate(a)), "gate: cols is 4, expected 3");
}

#[test]
fn weights_packed_for_another_kernel_are_refused() {
    let data = uniform(16, 1);
    let b = row_major(&data, 4, 4);
    for_each_isa(|ctx| {
        let packed = PackedWeights::pack(ctx, b).unwrap();
        assert_eq!((packed.rows(), packed.cols(), packed.kernel_name()), (4, 4, kernel_name(ctx)));
        for_each_isa(|other| {
            let mut c = vec![0.0; 16];
            let c = MatMut::new(&mut c, 4, 4).unwrap();
            let result = gemm_packed(other, b, &packed, c, Accum::Overwrite, &Epilogue::new());
            assert_eq!(result.is_ok(), other.isa().vectors() == ctx.isa().vectors());
        });
    });
}

#[test]
fn the_table_lists_every_kernel_once() {
    for_each_isa(|ctx| {
        let named = kernels().iter().filter(|kernel| kernel.name == kernel_name(ctx));
        assert_eq!(named.map(|kernel| kernel.isa).collect::<Vec<_>>(), [ctx.isa().vectors()]);
        let mut names: Vec<_> = kernels().iter().map(|kernel| kernel.name).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
    });
}
