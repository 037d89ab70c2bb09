//! Reproducible inputs and buffers that notice a write outside of them.

use crate::random::split_mix;

/// `len` values uniform in [−1, 1), the same for the same seed.
pub fn uniform(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..len).map(|_| (split_mix(&mut state) >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
}

/// `len` integers in [−`magnitude`, `magnitude`], the same for the same seed.
pub fn integers(len: usize, magnitude: u32, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let span = u64::from(magnitude) * 2 + 1;
    (0..len).map(|_| (split_mix(&mut state) % span) as f32 - magnitude as f32).collect()
}

/// A buffer between two margins; [`Guarded::check`] notices when a kernel wrote into a margin.
#[derive(Debug, Clone)]
pub struct Guarded {
    data: Vec<f32>,
}

impl Guarded {
    /// Elements of each margin: more than the widest vector.
    const MARGIN: usize = 64;
    /// The bits of a margin: a NaN that no arithmetic makes.
    const CANARY: u32 = 0x7fc0_dead;

    /// A copy of `body` between margins.
    pub fn new(body: &[f32]) -> Guarded {
        let canary = [f32::from_bits(Guarded::CANARY); Guarded::MARGIN];
        Guarded { data: [&canary, body, &canary].concat() }
    }

    /// `len` times NaN between margins: what a kernel that must not read its output gets.
    pub fn poisoned(len: usize) -> Guarded {
        Guarded::new(&vec![f32::NAN; len])
    }

    /// The part between the margins.
    pub fn body(&self) -> &[f32] {
        &self.data[Guarded::MARGIN..self.data.len() - Guarded::MARGIN]
    }

    /// The part between the margins, to write.
    pub fn body_mut(&mut self) -> &mut [f32] {
        let end = self.data.len() - Guarded::MARGIN;
        &mut self.data[Guarded::MARGIN..end]
    }

    /// Asserts that both margins are untouched.
    ///
    /// # Panics
    /// When they are not.
    #[track_caller]
    pub fn check(&self) {
        let end = self.data.len() - Guarded::MARGIN;
        let margins = self.data[..Guarded::MARGIN].iter().chain(&self.data[end..]);
        assert!(margins.into_iter().all(|x| x.to_bits() == Guarded::CANARY), "a write outside of the buffer");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_reproducible_and_in_range() {
        assert_eq!(uniform(100, 7), uniform(100, 7));
        assert_ne!(uniform(100, 7), uniform(100, 8));
        assert!(uniform(1000, 1).iter().all(|x| (-1.0..1.0).contains(x)));
        assert!(integers(1000, 3, 1).iter().all(|x| x.fract() == 0.0 && x.abs() <= 3.0));
    }

    #[test]
    #[should_panic(expected = "outside of the buffer")]
    fn a_write_into_a_margin_is_noticed() {
        let mut guarded = Guarded::new(&[1.0, 2.0]);
        guarded.check();
        guarded.data[Guarded::MARGIN + 2] = 0.0;
        guarded.check();
    }
}
