//! Which charts a comparison gives: results become series.

use crate::report::axis::Axis;
use crate::report::plots::{LineChart, Point, Series};
use crate::report::results::{CompareResults, CurvePoint, LengthScore};

/// A rate of error, in percent, of a point of a curve.
pub(super) type Error<T> = fn(&T) -> f64;

/// Error on the validation words against seconds of training.
pub(super) fn curves(results: &CompareResults, label: &str, error: Error<CurvePoint>) -> LineChart {
    let series: Vec<Series> = results
        .models
        .iter()
        .map(|model| Series {
            name: model.name.clone(),
            points: model
                .curve
                .iter()
                .map(|point| Point { x: point.seconds, y: 100.0 * error(point), range: None })
                .collect(),
        })
        .collect();
    let points = || series.iter().flat_map(|series| &series.points);
    LineChart {
        title: None,
        x: Axis::linear("seconds of training", points().map(|point| point.x)),
        y: Axis::logarithmic(label, points().map(|point| point.y)),
        series,
        marks: Vec::new(),
    }
}

/// Time of a training step against length; bars span all samples.
pub(super) fn sweep(results: &CompareResults) -> LineChart {
    let mut series: Vec<Series> = Vec::new();
    let mut lengths: Vec<f64> = Vec::new();
    for model in results.models.iter().map(|model| &model.name).chain(results.sweep.iter().map(|p| &p.model))
    {
        if !series.iter().any(|series| series.name == *model) {
            series.push(Series { name: model.clone(), points: Vec::new() });
        }
    }
    for point in &results.sweep {
        let x = point.length as f64;
        if !lengths.contains(&x) {
            lengths.push(x);
        }
        let ends = |pick: fn(f64, f64) -> f64| point.samples_ms.iter().copied().reduce(pick);
        let range = ends(f64::min).zip(ends(f64::max));
        let series = series.iter_mut().find(|series| series.name == point.model);
        series.expect("made above").points.push(Point { x, y: point.step_ms, range });
    }
    lengths.sort_unstable_by(f64::total_cmp);
    for series in &mut series {
        series.points.sort_unstable_by(|a, b| a.x.total_cmp(&b.x));
    }
    let values = |point: &Point| [Some(point.y), point.range.map(|r| r.0), point.range.map(|r| r.1)];
    let times: Vec<f64> = series.iter().flat_map(|s| &s.points).flat_map(values).flatten().collect();
    let marks = results.crossings.iter().map(|crossing| {
        let text = format!(
            "{} overtakes\n{} at {:.0}",
            crossing.faster_above, crossing.faster_below, crossing.length
        );
        (crossing.length, text)
    });
    LineChart {
        title: None,
        x: Axis::logarithmic_at("sequence length in tokens", &lengths),
        y: Axis::logarithmic("ms a training step", times.into_iter()),
        marks: marks.collect(),
        series,
    }
}

/// Error on held-out words by their number of letters.
pub(super) fn by_length(results: &CompareResults, label: &str, error: Error<LengthScore>) -> LineChart {
    let mut groups: Vec<(usize, usize)> = results
        .models
        .iter()
        .flat_map(|model| &model.by_length)
        .map(|score| (score.min_letters, score.max_letters))
        .collect();
    groups.sort_unstable();
    groups.dedup();
    let name = |&(low, high): &(usize, usize)| match high {
        _ if low == high => low.to_string(),
        _ if high > 40 => format!("{low}+"),
        _ => format!("{low}–{high}"),
    };
    let series: Vec<Series> = results
        .models
        .iter()
        .map(|model| Series {
            name: model.name.clone(),
            points: model
                .by_length
                .iter()
                .filter(|score| score.words > 0)
                .map(|score| {
                    let group = (score.min_letters, score.max_letters);
                    let x = groups.iter().position(|g| *g == group).map_or(f64::NAN, |i| i as f64);
                    Point { x, y: 100.0 * error(score), range: None }
                })
                .collect(),
        })
        .collect();
    let errors = series.iter().flat_map(|series| series.points.iter().map(|point| point.y));
    LineChart {
        title: None,
        x: Axis::categories("letters of the word", &groups.iter().map(name).collect::<Vec<_>>()),
        y: Axis::linear(label, errors),
        series: series.clone(),
        marks: Vec::new(),
    }
}
