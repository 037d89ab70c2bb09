//! Charts as SVG: lines over two axes, and heat maps. Colours come from CSS classes, so that a page or a
//! standalone picture sets them once for light and dark.

use std::fmt::Write as _;

use crate::report::axis::Axis;

/// The colours of charts, as custom properties: light, then dark. Blue, orange, green, pink: they stay apart
/// for every kind of colour vision.
///
/// # Source
/// Okabe and Ito 2008, Color Universal Design; the dark ones lightened.
pub(super) const STYLE: &str = "\
:root{--surface:#fff;--ink:#1d2129;--faint:#667085;--grid:#e4e7ec;--s0:#0072b2;--s1:#d55e00;--s2:#00845f;--s3:#b0508a;--heat:#0072b2}
@media (prefers-color-scheme:dark){:root{--surface:#16191f;--ink:#e6e9ef;--faint:#98a2b3;--grid:#2c323c;\
--s0:#5bb4ec;--s1:#f0904d;--s2:#3fc79a;--s3:#e28fc0;--heat:#5bb4ec}}
.chart text{font:15px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:var(--ink)}
.chart .tick,.chart .axis{fill:var(--faint)}.chart .tick{font-size:14px}.chart .head{font-weight:600;font-size:17px}
.chart .grid{stroke:var(--grid)}.chart .mark{stroke:var(--faint);stroke-dasharray:5 4}
.chart .line{fill:none;stroke-width:2.4;stroke-linejoin:round}.chart .range{stroke-width:1.2;opacity:.55}
.chart .s0{stroke:var(--s0);color:var(--s0)}.chart .s1{stroke:var(--s1);color:var(--s1)}
.chart .s2{stroke:var(--s2);color:var(--s2)}.chart .s3{stroke:var(--s3);color:var(--s3)}
.chart .dot{fill:var(--surface);stroke-width:2}.chart .cell{fill:var(--heat)}.chart .frame{fill:none;stroke:var(--grid)}";

/// How many colours and shapes there are; a further series begins again.
const STYLES: usize = 4;
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 66.0;
const RIGHT: f64 = 18.0;
const BOTTOM: f64 = 56.0;
/// The height of one line of the legend.
const LEGEND_LINE: f64 = 24.0;

/// One line of a chart.
#[derive(Debug, Clone)]
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<Point>,
}

/// A point, and the range of the samples behind it where there are several.
#[derive(Debug, Clone, Copy)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) range: Option<(f64, f64)>,
}

/// Lines over two axes.
#[derive(Debug, Clone)]
pub(super) struct LineChart {
    /// Written above the legend in a standalone picture; a page has its own heading.
    pub(super) title: Option<String>,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) series: Vec<Series>,
    /// Values of x that deserve a line across and a sentence, which may have several lines of text.
    pub(super) marks: Vec<(f64, String)>,
}

impl LineChart {
    /// The chart as an `svg` element without a style.
    pub(super) fn svg(&self) -> String {
        let heading = if self.title.is_some() { 34.0 } else { 0.0 };
        let (legend, legend_height) = self.legend(heading);
        let top = heading + legend_height + 10.0;
        let mut out = format!(
            "<svg class=\"chart\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{} against {}\" \
             xmlns=\"http://www.w3.org/2000/svg\">",
            escape(&self.y.label),
            escape(&self.x.label)
        );
        if let Some(title) = &self.title {
            let _ = write!(out, "<text class=\"head\" x=\"{LEFT}\" y=\"24\">{}</text>", escape(title));
        }
        out.push_str(&legend);
        self.draw_axes(&mut out, top);
        self.draw_marks(&mut out, top);
        for (i, series) in self.series.iter().enumerate() {
            self.draw_series(&mut out, series, i, top);
        }
        out.push_str("</svg>");
        out
    }

    fn across(&self, x: f64) -> Option<f64> {
        self.x.place(x).map(|place| LEFT + place * (WIDTH - LEFT - RIGHT))
    }

    fn up(&self, y: f64, top: f64) -> Option<f64> {
        self.y.place(y).map(|place| HEIGHT - BOTTOM - place * (HEIGHT - BOTTOM - top))
    }

    /// The legend below `heading`, and how high it is.
    fn legend(&self, heading: f64) -> (String, f64) {
        let mut out = String::new();
        let (mut x, mut y) = (LEFT, heading + 16.0);
        for (i, series) in self.series.iter().enumerate() {
            // No font is at hand to measure with: a character is about 8 units wide.
            let width = 40.0 + 8.0 * series.name.chars().count() as f64 + 14.0;
            if x > LEFT && x + width > WIDTH {
                (x, y) = (LEFT, y + LEGEND_LINE);
            }
            let style = i % STYLES;
            let _ = write!(out, "<path class=\"line s{style}\" d=\"M{x:.1} {y:.1}h30\"/>");
            out.push_str(&dot(style, x + 15.0, y));
            let _ = write!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                x + 38.0,
                y + 5.0,
                escape(&series.name)
            );
            x += width;
        }
        (out, if self.series.is_empty() { 0.0 } else { y - heading + 12.0 })
    }

    fn draw_axes(&self, out: &mut String, top: f64) {
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        for (value, name) in &self.y.ticks {
            let Some(y) = self.up(*value, top) else { continue };
            let _ = write!(out, "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{right}\"/>");
            let (x, below) = (LEFT - 8.0, y + 5.0);
            let _ = write!(
                out,
                "<text class=\"tick\" text-anchor=\"end\" x=\"{x}\" y=\"{below:.1}\">{}</text>",
                escape(name)
            );
        }
        for (value, name) in &self.x.ticks {
            let Some(x) = self.across(*value) else { continue };
            let _ = write!(out, "<path class=\"grid\" d=\"M{x:.1} {bottom}v5\"/>");
            let _ = write!(
                out,
                "<text class=\"tick\" text-anchor=\"middle\" x=\"{x:.1}\" y=\"{}\">{}</text>",
                bottom + 21.0,
                escape(name)
            );
        }
        let _ = write!(
            out,
            "<text class=\"axis\" text-anchor=\"middle\" x=\"{}\" y=\"{}\">{}</text>",
            (LEFT + right) / 2.0,
            HEIGHT - 8.0,
            escape(&self.x.label)
        );
        let middle = (top + bottom) / 2.0;
        let _ = write!(
            out,
            "<text class=\"axis\" text-anchor=\"middle\" transform=\"translate(18 {middle:.1}) rotate(-90)\">{}</text>",
            escape(&self.y.label)
        );
    }

    fn draw_marks(&self, out: &mut String, top: f64) {
        for (i, (value, text)) in self.marks.iter().enumerate() {
            let Some(x) = self.across(*value) else { continue };
            let _ = write!(out, "<path class=\"mark\" d=\"M{x:.1} {top:.1}V{}\"/>", HEIGHT - BOTTOM);
            let (anchor, x) = if x > WIDTH / 2.0 { ("end", x - 7.0) } else { ("start", x + 7.0) };
            for (line, text) in text.lines().enumerate() {
                let y = top + 14.0 + 19.0 * line as f64 + 44.0 * i as f64;
                let _ = write!(
                    out,
                    "<text class=\"tick\" text-anchor=\"{anchor}\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>",
                    escape(text)
                );
            }
        }
    }

    fn draw_series(&self, out: &mut String, series: &Series, index: usize, top: f64) {
        let style = index % STYLES;
        let place = |point: &Point| Some((self.across(point.x)?, self.up(point.y, top)?));
        let places: Vec<(f64, f64)> = series.points.iter().filter_map(place).collect();
        let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
        if path.is_empty() {
            return;
        }
        for point in &series.points {
            let ends = point.range.and_then(|(low, high)| Some((self.up(low, top)?, self.up(high, top)?)));
            if let (Some((low, high)), Some(x)) = (ends, self.across(point.x)) {
                let _ = write!(out, "<path class=\"range s{style}\" d=\"M{x:.1} {low:.1}V{high:.1}\"/>");
            }
        }
        let _ = write!(out, "<path class=\"line s{style}\" d=\"M{}\"/>", path.join("L"));
        // Points of a dense curve would hide it: the line says enough.
        if places.len() <= 24 {
            out.extend(places.iter().map(|(x, y)| dot(style, *x, *y)));
        }
    }
}

/// The mark of a point: another shape for each series.
fn dot(style: usize, x: f64, y: f64) -> String {
    match style {
        0 => format!("<circle class=\"dot s0\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"/>"),
        1 => format!("<path class=\"dot s1\" d=\"M{:.1} {:.1}h7.4v7.4h-7.4z\"/>", x - 3.7, y - 3.7),
        2 => format!("<path class=\"dot s2\" d=\"M{x:.1} {:.1}l4.9 8.4h-9.8z\"/>", y - 5.2),
        _ => format!("<path class=\"dot s3\" d=\"M{x:.1} {:.1}l5 5l-5 5l-5 -5z\"/>", y - 5.0),
    }
}

/// A matrix of weights in 0 … 1: columns named above, rows to the left, the weight as the cell's opacity.
pub(super) fn heat_map(columns: &[String], rows: &[String], weights: &[Vec<f32>]) -> String {
    const CELL: f64 = 30.0;
    const ABOVE: f64 = 30.0;
    // No font is at hand to measure with: a character of a name is at most about 10 units wide.
    let names = 16.0 + 10.0 * rows.iter().map(|name| name.chars().count()).max().unwrap_or(0) as f64;
    let width = names + CELL * columns.len() as f64 + 2.0;
    let height = ABOVE + CELL * rows.len() as f64 + 2.0;
    let mut out = format!(
        "<svg class=\"chart heat\" viewBox=\"0 0 {width} {height}\" style=\"width:{width}px\" role=\"img\" \
         aria-label=\"attention over {}\" xmlns=\"http://www.w3.org/2000/svg\">",
        escape(&columns.concat())
    );
    for (j, name) in columns.iter().enumerate() {
        let x = names + CELL * (j as f64 + 0.5);
        let _ = write!(
            out,
            "<text text-anchor=\"middle\" x=\"{x}\" y=\"{}\">{}</text>",
            ABOVE - 9.0,
            escape(name)
        );
    }
    for (i, name) in rows.iter().enumerate() {
        let y = ABOVE + CELL * i as f64;
        let _ = write!(
            out,
            "<text text-anchor=\"end\" x=\"{}\" y=\"{}\">{}</text>",
            names - 8.0,
            y + CELL / 2.0 + 5.0,
            escape(name)
        );
        for (j, weight) in weights.get(i).into_iter().flatten().take(columns.len()).enumerate() {
            let _ = write!(
                out,
                "<rect class=\"cell\" x=\"{}\" y=\"{y}\" width=\"{CELL}\" height=\"{CELL}\" opacity=\"{:.3}\">\
                 <title>{} → {}: {:.2}</title></rect>",
                names + CELL * j as f64,
                weight.clamp(0.0, 1.0),
                escape(&columns[j]),
                escape(name),
                weight
            );
        }
    }
    let _ = write!(
        out,
        "<rect class=\"frame\" x=\"{names}\" y=\"{ABOVE}\" width=\"{}\" height=\"{}\"/></svg>",
        CELL * columns.len() as f64,
        CELL * rows.len() as f64
    );
    out
}

/// Two charts beside each other as a picture of its own, with its style and a ground to stand on.
pub(super) fn picture(left: &LineChart, right: &LineChart) -> String {
    const GAP: f64 = 28.0;
    let (width, height) = (2.0 * WIDTH + 3.0 * GAP, HEIGHT + 2.0 * GAP);
    let place = |chart: &LineChart, x: f64| {
        let size = format!("<svg x=\"{x}\" y=\"{GAP}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" ");
        chart.svg().replacen("<svg ", &size, 1)
    };
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\"><style>{STYLE}</style><rect width=\"{width}\" height=\"{height}\" rx=\"10\" \
         style=\"fill:var(--surface)\"/>{}{}</svg>\n",
        place(left, GAP),
        place(right, 2.0 * GAP + WIDTH)
    )
}

/// `text` where HTML or XML expects text or an attribute's value.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            _ => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(series: Vec<Series>) -> LineChart {
        let values: Vec<f64> = series.iter().flat_map(|s| s.points.iter().map(|p| p.y)).collect();
        LineChart {
            title: Some("a < b".into()),
            x: Axis::linear("seconds", [10.0].into_iter()),
            y: Axis::logarithmic("PER %", values.into_iter()),
            series,
            marks: vec![(5.0, "here".into())],
        }
    }

    fn series(name: &str, ys: &[f64]) -> Series {
        let point = |(i, &y): (usize, &f64)| Point { x: i as f64, y, range: Some((y, y * 1.1)) };
        Series { name: name.into(), points: ys.iter().enumerate().map(point).collect() }
    }

    #[test]
    fn every_series_is_drawn_and_named() {
        let svg = chart(vec![series("one", &[50.0, 20.0]), series("two", &[60.0, 0.0, 30.0])]).svg();
        assert_eq!(svg.matches("class=\"line s0\"").count(), 2, "legend and line: {svg}");
        assert_eq!(svg.matches("class=\"line s1\"").count(), 2);
        assert!(svg.contains("a &lt; b") && svg.contains(">here<"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn an_empty_chart_is_still_a_chart() {
        let svg = chart(vec![Series { name: "none".into(), points: vec![] }]).svg();
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>") && !svg.contains("NaN"));
    }

    #[test]
    fn a_heat_map_has_a_cell_a_weight() {
        let names = |text: &str| text.chars().map(String::from).collect::<Vec<_>>();
        let svg = heat_map(&names("ab<"), &names("xy"), &[vec![0.1, 0.9, 0.0], vec![2.0, 0.0, 0.0, 7.0]]);
        assert_eq!(svg.matches("class=\"cell\"").count(), 6);
        assert!(svg.contains("&lt;") && svg.contains("opacity=\"1.000\""));
    }

    #[test]
    fn a_picture_brings_its_style() {
        let one = chart(vec![series("one", &[50.0, 20.0])]);
        let svg = picture(&one, &one);
        assert!(svg.contains("<style>") && svg.matches("<svg").count() == 3);
    }
}
