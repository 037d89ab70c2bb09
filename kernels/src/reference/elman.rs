//! The plain recurrent cell: `h' = f(W_ih·x + b_ih + W_hh·h + b_hh)` with f = tanh or ReLU.

use super::recurrent::{self, GateGrads, Real, Recurrent, RecurrentGrads, RecurrentOutput, RowCell};

struct Elman<const RELU: bool>;

impl<T: Real, const RELU: bool> RowCell<T> for Elman<RELU> {
    fn forward(from_x: &[T], from_h: &[T], _: &[T], c: &[T]) -> (Vec<T>, Vec<T>) {
        let unit = |(&x, &h): (&T, &T)| match x + h {
            a if !RELU => a.tanh(),
            a if a < T::zero() => T::zero(),
            a => a,
        };
        (from_x.iter().zip(from_h).map(unit).collect(), c.to_vec())
    }

    fn backward(from_x: &[T], from_h: &[T], (h, c): (&[T], &[T]), (d_h, d_c): (&[T], &[T])) -> GateGrads<T> {
        let (y, _) = <Self as RowCell<T>>::forward(from_x, from_h, h, c);
        let slope = |&y: &T| match RELU {
            false => T::one() - y * y,
            true if y > T::zero() => T::one(),
            true => T::zero(),
        };
        let d: Vec<T> = y.iter().zip(d_h).map(|(y, &d)| d * slope(y)).collect();
        GateGrads { input: d.clone(), state: d, d_h: vec![T::zero(); h.len()], d_c: d_c.to_vec() }
    }
}

/// A plain layer over a padded batch; ReLU when `relu`, else tanh.
///
/// # Panics
/// When a slice is shorter than its shape.
pub fn elman_forward<T: Real>(layer: &Recurrent<'_, T>, relu: bool) -> RecurrentOutput<T> {
    if relu {
        recurrent::forward::<T, Elman<true>>(layer)
    } else {
        recurrent::forward::<T, Elman<false>>(layer)
    }
}

/// The gradients of [`elman_forward`] for gradients `d` of its outputs.
///
/// # Panics
/// When a slice is shorter than its shape.
pub fn elman_backward<T: Real>(
    layer: &Recurrent<'_, T>,
    relu: bool,
    d: &RecurrentOutput<T>,
) -> RecurrentGrads<T> {
    if relu {
        recurrent::backward::<T, Elman<true>>(layer, d)
    } else {
        recurrent::backward::<T, Elman<false>>(layer, d)
    }
}
