//! What is said about a list of samples: robust against the outliers of a shared machine.

/// The two ends of an interval of confidence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Interval {
    /// The lower end.
    pub(crate) low: f64,
    /// The upper end.
    pub(crate) high: f64,
}

/// The median; the mean of the middle two for an even number, NaN for none.
pub(crate) fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

/// The median distance from the median: the spread of the better half.
pub(crate) fn median_absolute_deviation(samples: &[f64]) -> f64 {
    let centre = median(samples);
    median(&samples.iter().map(|x| (x - centre).abs()).collect::<Vec<f64>>())
}

/// The smallest sample, infinity for none.
pub(crate) fn minimum(samples: &[f64]) -> f64 {
    samples.iter().copied().fold(f64::INFINITY, f64::min)
}

/// `(Π x)^(1/n)`, NaN for none.
pub(crate) fn geometric_mean(values: &[f64]) -> f64 {
    if values.is_empty() {
        return f64::NAN;
    }
    (values.iter().map(|x| x.ln()).sum::<f64>() / values.len() as f64).exp()
}

/// How often [`ratio_interval`] draws anew.
const RESAMPLES: usize = 1_000;

/// The 95 % interval of `median(numerator) / median(denominator)`.
///
/// The bootstrap's percentile form: both lists are drawn again with replacement, [`RESAMPLES`] times, and the
/// middle 95 % of the ratios are kept. The draws come from a fixed seed, so a file gives the same interval
/// every time.
///
/// # Source
/// Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
pub(crate) fn ratio_interval(numerator: &[f64], denominator: &[f64]) -> Interval {
    let mut random = SplitMix64(0x6b61_7661_6e61_6d00);
    let mut draw = |from: &[f64]| {
        let again: Vec<f64> = from.iter().map(|_| from[random.below(from.len())]).collect();
        median(&again)
    };
    let mut ratios: Vec<f64> = (0..RESAMPLES).map(|_| draw(numerator) / draw(denominator)).collect();
    ratios.sort_unstable_by(f64::total_cmp);
    Interval { low: ratios[RESAMPLES / 40], high: ratios[RESAMPLES - 1 - RESAMPLES / 40] }
}

/// A small generator for resampling and for benchmark inputs.
///
/// # Source
/// Steele, Lea, Flood 2014, Fast Splittable Pseudorandom Number Generators, figure 16.
pub(crate) struct SplitMix64(pub(crate) u64);

impl SplitMix64 {
    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A whole number below `n`, which must be small beside 2⁶⁴ for it to be uniform.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// A number in [−1, 1), a multiple of 2⁻²³.
    pub(crate) fn signed_unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_spread() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
        assert_eq!(median_absolute_deviation(&[1.0, 2.0, 3.0, 4.0, 100.0]), 1.0);
        assert_eq!(minimum(&[3.0, 1.0, 2.0]), 1.0);
    }

    #[test]
    fn a_geometric_mean_multiplies() {
        assert!((geometric_mean(&[0.5, 2.0]) - 1.0).abs() < 1e-12);
        assert!((geometric_mean(&[2.0, 8.0]) - 4.0).abs() < 1e-12);
    }

    #[test]
    fn an_interval_holds_the_ratio_and_narrows_with_the_spread() {
        let calm: Vec<f64> = (0..30).map(|i| 100.0 + f64::from(i % 3)).collect();
        let noisy: Vec<f64> = (0..30).map(|i| 100.0 + 10.0 * f64::from(i % 7)).collect();
        let narrow = ratio_interval(&calm, &calm);
        let wide = ratio_interval(&noisy, &calm);
        assert!(narrow.low <= 1.0 && narrow.high >= 1.0);
        assert!(wide.high - wide.low > narrow.high - narrow.low);
        assert_eq!(narrow, ratio_interval(&calm, &calm));
    }

    #[test]
    fn random_inputs_are_centred() {
        let mut random = SplitMix64(1);
        let values: Vec<f32> = (0..10_000).map(|_| random.signed_unit()).collect();
        assert!(values.iter().all(|x| (-1.0..1.0).contains(x)));
        assert!(values.iter().sum::<f32>().abs() < 300.0);
    }
}
