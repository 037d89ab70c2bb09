//! Axes of a chart: from values to places, and which values to name.

/// How values become places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scale {
    Linear,
    Logarithmic,
}

/// One axis: what it shows, its ends, its named values.
#[derive(Debug, Clone)]
pub(super) struct Axis {
    pub(super) label: String,
    pub(super) ticks: Vec<(f64, String)>,
    scale: Scale,
    low: f64,
    high: f64,
}

impl Axis {
    /// From 0 to a round value above the largest.
    pub(super) fn linear(label: &str, values: impl Iterator<Item = f64>) -> Axis {
        let largest = values.filter(|x| x.is_finite()).fold(0.0, f64::max);
        let largest = if largest > 0.0 { largest } else { 1.0 };
        let step = round_step(largest / 6.0);
        let count = (largest / step).ceil() as usize;
        let ticks = (0..=count).map(|i| i as f64 * step).map(|x| (x, number(x))).collect();
        Axis { label: label.into(), ticks, scale: Scale::Linear, low: 0.0, high: count as f64 * step }
    }

    /// Logarithmic, between round values around the smallest and the largest; what is not positive is left out.
    pub(super) fn logarithmic(label: &str, values: impl Iterator<Item = f64>) -> Axis {
        let (low, high) = positive_range(values);
        // Within one decade 1, 2, 5 would name too few values.
        let factors: &[f64] =
            if high / low < 8.0 { &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0] } else { &[1.0, 2.0, 5.0] };
        let all: Vec<f64> = (-9..=12).flat_map(|e| factors.iter().map(move |f| f * 10f64.powi(e))).collect();
        // A tick that is written in decimals differs from the same value read from a file by a rounding.
        // A single value would lie on the edge: give it room below.
        let below = if high / low < 1.01 { low * 0.99 } else { low * 1.000_001 };
        let low = all.iter().copied().rfind(|tick| *tick <= below).unwrap_or(low);
        let high = all.iter().copied().find(|tick| *tick >= high * 0.999_999 && *tick > low).unwrap_or(high);
        let mut named: Vec<f64> = all.into_iter().filter(|tick| (low..=high).contains(tick)).collect();
        if named.len() > 10 {
            named.retain(|tick| (tick.log10() - tick.log10().round()).abs() < 1e-9);
        }
        let ticks = named.into_iter().map(|x| (x, number(x))).collect();
        Axis { label: label.into(), ticks, scale: Scale::Logarithmic, low, high }
    }

    /// Logarithmic, and exactly these values are named: lengths that were measured.
    pub(super) fn logarithmic_at(label: &str, values: &[f64]) -> Axis {
        let (low, high) = positive_range(values.iter().copied());
        let ticks = values.iter().map(|&x| (x, number(x))).collect();
        Axis { label: label.into(), ticks, scale: Scale::Logarithmic, low: low / 1.12, high: high * 1.12 }
    }

    /// Names side by side; the value of the i-th is i.
    pub(super) fn categories(label: &str, names: &[String]) -> Axis {
        let ticks = names.iter().enumerate().map(|(i, name)| (i as f64, name.clone())).collect();
        let high = names.len().max(1) as f64 - 0.6;
        Axis { label: label.into(), ticks, scale: Scale::Linear, low: -0.4, high }
    }

    /// Where the value stands between the ends, 0 … 1; `None` where the axis does not show it.
    pub(super) fn place(&self, value: f64) -> Option<f64> {
        let place = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Logarithmic if value > 0.0 => (value / self.low).ln() / (self.high / self.low).ln(),
            Scale::Logarithmic => return None,
        };
        (place.is_finite() && (-1e-6..=1.0 + 1e-6).contains(&place)).then_some(place)
    }
}

fn positive_range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values
        .filter(|x| x.is_finite() && *x > 0.0)
        .fold((f64::INFINITY, 0.0), |(low, high): (f64, f64), x| (low.min(x), high.max(x)));
    if high > 0.0 { (low, high) } else { (1.0, 10.0) }
}

/// The next of 1, 2, 5, 10, 20 … that is at least `x`.
fn round_step(x: f64) -> f64 {
    let decade = 10f64.powf(x.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|f| f * decade).find(|step| *step >= x * 0.999_999).unwrap_or(x)
}

/// The shortest text of a tick's value.
fn number(x: f64) -> String {
    let text = format!("{x:.6}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|(_, name)| name.as_str()).collect()
    }

    #[test]
    fn ticks_are_round_and_hold_every_value() {
        let linear = Axis::linear("s", [3.0, 58.0].into_iter());
        assert_eq!(names(&linear), ["0", "10", "20", "30", "40", "50", "60"]);
        assert_eq!(linear.place(30.0), Some(0.5));
        let log = Axis::logarithmic("%", [7.0, 0.0, 93.0].into_iter());
        assert_eq!(names(&log), ["5", "10", "20", "50", "100"]);
        assert_eq!(names(&Axis::logarithmic("%", [35.0, 99.0].into_iter())), ["30", "40", "50", "70", "100"]);
        assert!(log.place(7.0).is_some() && log.place(0.0).is_none());
        let lengths = Axis::logarithmic_at("length", &[8.0, 512.0]);
        assert_eq!(names(&lengths), ["8", "512"]);
        assert!((lengths.place(64.0).unwrap() - 0.5).abs() < 1e-9);
    }

    #[test]
    fn no_values_still_give_an_axis() {
        for axis in [
            Axis::linear("", [].into_iter()),
            Axis::logarithmic("", [f64::NAN].into_iter()),
            Axis::logarithmic_at("", &[]),
            Axis::categories("", &[]),
        ] {
            assert_eq!(axis.place(f64::NAN), None);
            assert!(axis.low < axis.high, "{axis:?}");
        }
    }

    #[test]
    fn a_single_value_stands_inside() {
        let axis = Axis::logarithmic("", [10.0].into_iter());
        assert!(axis.place(10.0).is_some_and(|place| place > 0.2), "{axis:?}");
    }
}
