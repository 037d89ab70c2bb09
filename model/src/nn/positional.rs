//! Where a token stands: a trained table, or sines and cosines.

use std::sync::Arc;

use crate::models::Positions;
use crate::ops::PositionTable;
use crate::param::{Init, ParamStore};

/// Makes the table of a stack; a trained one is added as `{name}.weight`.
pub fn position_table(
    store: &mut ParamStore,
    name: &str,
    kind: Positions,
    positions: usize,
    width: usize,
) -> PositionTable {
    match kind {
        Positions::Learned => {
            let init = Init::Normal((width as f32).sqrt().recip());
            PositionTable::Learned(store.add(&format!("{name}.weight"), &[positions, width], init))
        }
        Positions::Sinusoidal => PositionTable::Fixed(Arc::new(sinusoid(positions, width))),
    }
}

/// `PE(p, 2i) = sin(p / 10000^(2i/width))`, `PE(p, 2i + 1) = cos(p / 10000^(2i/width))`.
///
/// # Shapes
/// `[positions, width]`, sines and cosines interleaved as in the paper (other implementations put all sines
/// before all cosines: an imported model may need its columns permuted).
///
/// # Accuracy
/// Computed in f64, rounded once.
///
/// # Source
/// Vaswani et al. 2017, section 3.5.
pub fn sinusoid(positions: usize, width: usize) -> Vec<f32> {
    let frequencies: Vec<f64> =
        (0..width).map(|i| 10_000f64.powf(-((i / 2 * 2) as f64) / width.max(1) as f64)).collect();
    let value = |p: usize, i: usize| {
        let angle = p as f64 * frequencies[i];
        if i.is_multiple_of(2) { angle.sin() as f32 } else { angle.cos() as f32 }
    };
    (0..positions).flat_map(|p| (0..width).map(move |i| (p, i))).map(|(p, i)| value(p, i)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_is_a_rotation() {
        // PE(p + k) = R_k · PE(p), with R_k a rotation of each pair of columns that does not depend on p.
        let (positions, width, k) = (60, 16, 7);
        let pe = sinusoid(positions, width);
        for pair in 0..width / 2 {
            let angle = k as f64 * 10_000f64.powf(-((2 * pair) as f64) / width as f64);
            for p in 0..positions - k {
                let at = |p: usize, i: usize| f64::from(pe[p * width + 2 * pair + i]);
                let (s, c) = (at(p, 0), at(p, 1));
                let rotated = (s * angle.cos() + c * angle.sin(), c * angle.cos() - s * angle.sin());
                // Four values rounded to f32, none above 1.
                assert!((rotated.0 - at(p + k, 0)).abs() < 4.0 * 6e-8, "{p} {pair}");
                assert!((rotated.1 - at(p + k, 1)).abs() < 4.0 * 6e-8, "{p} {pair}");
            }
        }
    }

    #[test]
    fn position_zero_is_zeros_and_ones() {
        assert_eq!(sinusoid(1, 6), [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]);
    }
}
