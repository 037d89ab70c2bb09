//! Dropout: zeros a share p of the values and scales the rest by 1/(1 − p), in training.

use kavanam_kernels::ShapeError;
use kavanam_kernels::rowwise::dropout::{self as kernel, Dropout};

use crate::tape::{Backward, BackwardPass, Tape, Var};

/// Drops a share `p` of `x` when the tape was made for training; else gives `x` itself.
///
/// The mask is a function of the seed, the step, the shard and the op's place on the tape, and is drawn
/// again on the way back instead of being kept.
///
/// # Errors
/// [`ShapeError`] when `p` is outside of [0, 1).
pub fn dropout(tape: &mut Tape<'_>, x: Var, p: f32) -> Result<Var, ShapeError> {
    let Some(spec) = next(tape, p) else { return Ok(x) };
    let (rows, cols) = tape.shape(x);
    let mut y = tape.buffer(rows * cols);
    kernel::apply(tape.context(), &spec, tape.value(x), &mut y)?;
    Ok(tape.push(y, rows, cols, || Saved { x, spec }))
}

/// The next mask of the tape, `None` when nothing is to be dropped.
pub(super) fn next(tape: &mut Tape<'_>, p: f32) -> Option<Dropout> {
    if p == 0.0 {
        return None;
    }
    tape.next_dropout().map(|(seed, stream)| Dropout { p, seed, stream })
}

struct Saved {
    x: Var,
    spec: Dropout,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let d_y = pass.output_grad(out);
        let mut d_x = pass.target(self.x);
        kernel::apply(&pass.ctx, &self.spec, &d_y, d_x.buffer())?;
        pass.put(self.x, d_x)
    }
}

#[cfg(test)]
mod tests {
    use kavanam_kernels::{Context, Isa};

    use super::*;
    use crate::param::{Grads, ParamStore};
    use crate::pool::Pool;
    use crate::tape::DropoutKey;

    fn run(key: DropoutKey) -> (Vec<f32>, Vec<f32>) {
        let (store, pool) = (ParamStore::new(0), Pool::new());
        let mut tape = Tape::training(&Context::with_isa(Isa::best()), &store, &pool, key);
        let x = tape.constant(&[1.0; 4000], 40, 100).unwrap();
        let first = dropout(&mut tape, x, 0.25).unwrap();
        let y = dropout(&mut tape, first, 0.5).unwrap();
        let value = tape.value(y).to_vec();
        let mut d_x = Vec::new();
        tape.go_back(y, &[1.0; 4000], &mut Grads::zeros(&store), |_, d| d_x = d.to_vec()).unwrap();
        (value, d_x)
    }

    #[test]
    fn the_way_back_draws_the_same_mask() {
        let key = DropoutKey { seed: 3, step: 5, shard: 1 };
        let (y, d_x) = run(key);
        // y = mask·x with x = 1, and d_x = mask·d_y with d_y = 1.
        assert_eq!(y, d_x);
        assert_eq!(run(key).0, y);
        let kept = y.iter().filter(|&&v| v != 0.0).count();
        // 4000 draws that keep 3/8: five standard deviations are 153.
        assert!((1347..=1653).contains(&kept), "{kept}");
        assert!(y.iter().all(|&v| v == 0.0 || (v - 8.0 / 3.0).abs() < 1e-6));
    }

    #[test]
    fn seed_step_and_shard_each_change_the_mask() {
        let key = DropoutKey { seed: 3, step: 5, shard: 1 };
        for other in
            [DropoutKey { seed: 4, ..key }, DropoutKey { step: 6, ..key }, DropoutKey { shard: 2, ..key }]
        {
            assert_ne!(run(key).0, run(other).0, "{other:?}");
        }
    }

    #[test]
    fn without_training_it_is_the_identity() {
        let (store, pool) = (ParamStore::new(0), Pool::new());
        let mut tape = Tape::recording(&Context::with_isa(Isa::best()), &store, &pool);
        let x = tape.constant(&[1.0; 4], 2, 2).unwrap();
        assert_eq!(dropout(&mut tape, x, 0.5).unwrap(), x);
    }
}
