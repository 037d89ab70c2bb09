//! Clipping by the global norm: one factor for all gradients, so that their direction stays.
//!
//! `factor = min(1, limit / ‖g‖)`, ‖g‖ over all tensors together (Pascanu et al. 2013, algorithm 1).

use crate::param::{Grads, ParamId, ParamStore};

/// Elements whose squares are added up in one run before the run's sum joins the total.
const RUN: usize = 16;

/// The Euclidean norm over all gradients, or the first tensor whose gradient is not finite.
///
/// Squares are added in f64 in a fixed order (sixteen sums side by side, tensor after tensor), so the result depends on
/// the values alone and cannot overflow.
///
/// # Errors
/// The tensor that holds an infinity or a NaN.
pub fn global_norm(params: &ParamStore, grads: &Grads) -> Result<f64, ParamId> {
    let mut total = 0.0;
    for id in params.ids() {
        let squares = sum_squares(grads.get(id));
        if !squares.is_finite() {
            return Err(id);
        }
        total += squares;
    }
    Ok(total.sqrt())
}

/// The factor that brings a gradient of that norm down to `limit`; 1 for `limit` 0, which means no limit.
pub fn clip_factor(norm: f64, limit: f32) -> f32 {
    let limit = f64::from(limit);
    if limit > 0.0 && norm > limit { (limit / norm) as f32 } else { 1.0 }
}

fn sum_squares(values: &[f32]) -> f64 {
    let (runs, rest) = values.as_chunks::<RUN>();
    let mut sums = [0.0f64; RUN];
    for run in runs {
        for (sum, &x) in sums.iter_mut().zip(run) {
            *sum += f64::from(x) * f64::from(x);
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += f64::from(x) * f64::from(x);
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::param::Init;

    fn store() -> ParamStore {
        let mut store = ParamStore::new(0);
        store.add("a", &[50], Init::Zeros);
        store.add("b", &[2, 2], Init::Zeros);
        store
    }

    #[test]
    fn the_norm_is_over_all_tensors_and_does_not_overflow() {
        let params = store();
        let mut grads = Grads::zeros(&params);
        grads.get_mut(params.find("a").unwrap())[49] = 3e30;
        grads.get_mut(params.find("b").unwrap())[0] = -4e30;
        let norm = global_norm(&params, &grads).unwrap();
        assert!((norm / 5e30 - 1.0).abs() < 1e-6, "{norm}");
        assert!((f64::from(clip_factor(norm, 1.0)) * 5e30 - 1.0).abs() < 1e-6);
    }

    #[test]
    fn a_tensor_that_is_not_finite_is_found() {
        let params = store();
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut grads = Grads::zeros(&params);
            let b = params.find("b").unwrap();
            grads.get_mut(b)[3] = poison;
            assert_eq!(global_norm(&params, &grads), Err(b));
        }
    }

    #[test]
    fn small_gradients_and_no_limit_leave_the_factor_at_one() {
        assert_eq!(clip_factor(0.5, 1.0), 1.0);
        assert_eq!(clip_factor(1e9, 0.0), 1.0);
        assert_eq!(clip_factor(4.0, 1.0), 0.25);
    }
}
