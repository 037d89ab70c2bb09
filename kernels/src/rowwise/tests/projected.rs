//! The projected cross entropy against the product and the loss one after the other.

use super::*;
use crate::gemm::{Accum, Epilogue, gemm};
use crate::reference;
use crate::rowwise::cross_entropy::{self, CrossEntropy};
use crate::rowwise::projected_cross_entropy::{
    Grads, Projection, backward, backward_in_chunks, forward, forward_and_backward,
};
use crate::testing::{Guarded, assert_within, gamma, uniform};

struct Case {
    dims: [usize; 3],
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    targets: Vec<u32>,
    d_loss: Vec<f32>,
    spec: CrossEntropy,
}

impl Case {
    fn new(rows: usize, dim: usize, classes: usize, label_smoothing: f32) -> Case {
        Case {
            dims: [rows, dim, classes],
            x: uniform(rows * dim, 1),
            weight: uniform(classes * dim, 2),
            bias: uniform(classes, 3),
            targets: (0..rows).map(|i| (i * 7 % classes) as u32).collect(),
            d_loss: uniform(rows, 4),
            spec: CrossEntropy { label_smoothing, ignore_index: Some(2) },
        }
    }

    fn projection(&self) -> Projection<'_> {
        let dim = self.dims[1];
        Projection { x: mat(&self.x, dim), weight: mat(&self.weight, dim), bias: Some(&self.bias) }
    }

    /// d_x, d_weight, d_bias in chunks of `chunk` rows; the latter two begin at 1.
    fn gradients(&self, ctx: &Context, chunk: usize) -> [Vec<f32>; 3] {
        let [rows, dim, classes] = self.dims;
        let mut d_x = Guarded::poisoned(rows * dim);
        let (mut d_weight, mut d_bias) =
            (Guarded::new(&vec![1.0; classes * dim]), Guarded::new(&vec![1.0; classes]));
        let grads = Grads {
            d_x: mat_mut(d_x.body_mut(), dim),
            d_weight: mat_mut(d_weight.body_mut(), dim),
            d_bias: Some(d_bias.body_mut()),
        };
        let loss = (&self.targets[..], &self.spec, &self.d_loss[..]);
        backward_in_chunks(ctx, &self.projection(), loss, None, grads, chunk).unwrap();
        [&d_x, &d_weight, &d_bias].into_iter().for_each(Guarded::check);
        [d_x, d_weight, d_bias].map(|grad| grad.body().to_vec())
    }
}

impl Case {
    /// losses, d_x, d_weight, d_bias in one call.
    fn both(&self, ctx: &Context) -> [Vec<f32>; 4] {
        let [rows, dim, classes] = self.dims;
        let (mut losses, mut d_x) = (vec![f32::NAN; rows], vec![f32::NAN; rows * dim]);
        let (mut d_weight, mut d_bias) = (vec![1.0; classes * dim], vec![1.0; classes]);
        let grads = Grads {
            d_x: mat_mut(&mut d_x, dim),
            d_weight: mat_mut(&mut d_weight, dim),
            d_bias: Some(&mut d_bias),
        };
        let loss = (&self.spec, &self.d_loss[..]);
        forward_and_backward(ctx, &self.projection(), &self.targets, loss, &mut losses, grads).unwrap();
        [losses, d_x, d_weight, d_bias]
    }
}

/// Losses and d_logits of the product and the loss apart.
fn apart(ctx: &Context, case: &Case) -> (Vec<f32>, Vec<f32>) {
    let [rows, _, classes] = case.dims;
    let Projection { x, weight, .. } = case.projection();
    let mut logits = vec![0.0; rows * classes];
    let epilogue = Epilogue::new().bias(&case.bias);
    gemm(ctx, x, weight.t(), mat_mut(&mut logits, classes), Accum::Overwrite, &epilogue).unwrap();
    let (mut losses, mut d_logits) = (vec![0.0; rows], vec![0.0; rows * classes]);
    let logits = mat(&logits, classes);
    cross_entropy::forward(ctx, logits, &case.targets, &case.spec, &mut losses).unwrap();
    let to = mat_mut(&mut d_logits, classes);
    cross_entropy::backward(ctx, logits, &case.targets, &case.spec, &case.d_loss, to).unwrap();
    (losses, d_logits)
}

#[test]
fn projected_cross_entropy_is_the_product_and_the_loss() {
    for (rows, dim, classes, smoothing) in
        [(1, 1, 1, 0.0), (7, 9, 5, 0.1), (70, 20, 33, 0.0), (130, 8, 100, 0.1)]
    {
        let case = Case::new(rows, dim, classes, smoothing);
        testing::for_each_isa(|ctx| {
            let (expected, d_logits) = apart(ctx, &case);
            let mut losses = Guarded::poisoned(rows);
            forward(ctx, &case.projection(), &case.targets, &case.spec, losses.body_mut()).unwrap();
            losses.check();
            assert_same_bits(losses.body(), &expected);

            let d_logits = mat(&d_logits, classes);
            let (x, weight) = (mat(&case.x, dim), mat(&case.weight, dim));
            let mut d_x = vec![0.0; rows * dim];
            gemm(ctx, d_logits, weight, mat_mut(&mut d_x, dim), Accum::Overwrite, &Epilogue::new()).unwrap();
            let d_weight = reference::gemm(d_logits.t(), x);
            let scale = reference::gemm_abs(d_logits.t(), x);
            let exact: Vec<f64> = d_weight.iter().map(|x| x + 1.0).collect();
            let [both_losses, both @ ..] = case.both(ctx);
            assert_same_bits(&both_losses, &expected);
            for (both, alone) in both.iter().zip(case.gradients(ctx, 4096)) {
                assert_same_bits(both, &alone);
            }
            for chunk in [rows, 6, 64] {
                let [got_x, got_weight, got_bias] = case.gradients(ctx, chunk);
                assert_same_bits(&got_x, &d_x);
                assert_within(&got_weight, &exact, |i| gamma(2 * rows + 2) * (scale[i] + 1.0));
                for (j, bias) in got_bias.iter().enumerate() {
                    let column = (0..rows).map(|i| f64::from(d_logits.at(i, j)));
                    let [sum, abs] = column.fold([1.0, 1.0], |[s, a], x| [s + x, a + x.abs()]);
                    assert!((f64::from(*bias) - sum).abs() <= gamma(rows + 2) * abs, "{bias} {sum}");
                }
                for n in [2, 3] {
                    let many = case.gradients(&threads(ctx, n), chunk);
                    assert_same_bits(&many[0], &got_x);
                    assert_same_bits(&many[1], &got_weight);
                    assert_same_bits(&many[2], &got_bias);
                }
            }
        });
    }
}

#[test]
fn misfits_of_the_projection_are_named() {
    let case = Case::new(4, 3, 5, 0.0);
    let ctx = Context::with_isa(crate::Isa::scalar());
    let fails = |projection: &Projection<'_>, targets: &[u32], losses: usize, name: &str| {
        let error = forward(&ctx, projection, targets, &case.spec, &mut vec![0.0; losses]).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    };
    let whole = case.projection();
    fails(&Projection { weight: mat(&case.weight, 5), ..whole }, &case.targets, 4, "weight");
    fails(&Projection { bias: Some(&case.bias[1..]), ..whole }, &case.targets, 4, "bias");
    fails(&whole, &[1, 1, 1, 5], 4, "targets");
    fails(&whole, &case.targets, 3, "losses");
    let (mut d_x, mut d_weight) = (vec![0.0; 12], vec![0.0; 12]);
    let grads = Grads { d_x: mat_mut(&mut d_x, 3), d_weight: mat_mut(&mut d_weight, 3), d_bias: None };
    let error = backward(&ctx, &whole, &case.targets, &case.spec, &case.d_loss, grads).unwrap_err();
    assert!(error.to_string().contains("d_weight"), "{error}");
}
