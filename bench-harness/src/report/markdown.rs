//! Tables for the terminal.

use std::fmt;

use crate::report::results::{CompareResults, Crossing, ModelResult, Worth};

/// A Markdown table whose columns line up: the first one to the left, the others to the right.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table with that header.
    pub(crate) fn new<T: Into<String>>(header: impl IntoIterator<Item = T>) -> Table {
        Table { rows: vec![header.into_iter().map(Into::into).collect()] }
    }

    /// Appends a row; missing cells at its end stay empty.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cell = |row: &'_ Vec<String>, i: usize| row.get(i).cloned().unwrap_or_default();
        let columns = self.rows[0].len();
        let width = |i| self.rows.iter().map(|row| cell(row, i).chars().count()).max().unwrap_or(0).max(3);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for (r, row) in self.rows.iter().enumerate() {
            for (i, &width) in widths.iter().enumerate() {
                let text = cell(row, i);
                if i == 0 { write!(f, "| {text:<width$} |")? } else { write!(f, " {text:>width$} |")? }
            }
            writeln!(f)?;
            if r == 0 {
                let rules = widths.iter().enumerate().map(|(i, &width)| {
                    if i == 0 {
                        format!("|{:-<1$}|", ":", width + 2)
                    } else {
                        format!("{:->1$}|", ":", width + 2)
                    }
                });
                writeln!(f, "{}", rules.collect::<String>())?;
            }
        }
        Ok(())
    }
}

/// The models side by side: size, speed, error, latency.
pub(crate) fn models_table(models: &[ModelResult]) -> String {
    let mut table = Table::new([
        "model",
        "params",
        "train tok/s",
        "tokens seen",
        "PER %",
        "WER %",
        "encode ms",
        "decode ms/tok",
    ]);
    for model in models {
        table.row([
            model.name.clone(),
            thousands(model.params as u64),
            thousands(model.train_tokens_per_s.round() as u64),
            thousands(model.tokens_seen),
            format!("{:.2}", model.per * 100.0),
            format!("{:.2}", model.wer * 100.0),
            format!("{:.3}", model.encode_ms),
            format!("{:.3}", model.decode_ms_per_token),
        ]);
    }
    table.to_string()
}

/// One sentence on what the fast layers are worth.
pub(crate) fn worth(worth: &Worth) -> String {
    format!(
        "{} is {} computed step by step and gate by gate: it trains {} tokens a second, the fast layers {} in steps beside \
         it, {:.1} times as many.",
        worth.naive,
        worth.model,
        thousands(worth.naive_tokens_per_s.round() as u64),
        thousands(worth.fast_tokens_per_s.round() as u64),
        worth.ratio
    )
}

/// Step time in milliseconds: one row a length, one column a model, the fastest marked by `*`.
pub(crate) fn sweep_table(results: &CompareResults) -> String {
    let mut names: Vec<&str> = Vec::new();
    let mut lengths: Vec<usize> = Vec::new();
    for point in &results.sweep {
        if !names.contains(&point.model.as_str()) {
            names.push(&point.model);
        }
        if !lengths.contains(&point.length) {
            lengths.push(point.length);
        }
    }
    lengths.sort_unstable();
    let header: Vec<&str> = ["length"].into_iter().chain(names.iter().copied()).collect();
    let mut table = Table::new(header);
    for length in lengths {
        let at = |name: &str| results.sweep.iter().find(|p| p.length == length && p.model == name);
        let times: Vec<Option<f64>> = names.iter().map(|name| at(name).map(|p| p.step_ms)).collect();
        let fastest = times.iter().flatten().copied().fold(f64::INFINITY, f64::min);
        let cells = times.iter().map(|time| match time {
            Some(ms) if *ms == fastest => format!("{ms:.1} *"),
            Some(ms) => format!("{ms:.1}  "),
            None => "–  ".to_owned(),
        });
        table.row([length.to_string()].into_iter().chain(cells));
    }
    table.to_string()
}

/// One line for each place where two curves of the sweep cross, or one that says that none do.
pub(crate) fn crossings(results: &CompareResults) -> String {
    if results.crossings.is_empty() {
        return "\nno curves cross within these lengths\n".to_owned();
    }
    let line = |c: &Crossing| {
        format!(
            "crossing at length {:.0}: {} is faster below, {} above\n",
            c.length, c.faster_below, c.faster_above
        )
    };
    format!("\n{}", results.crossings.iter().map(line).collect::<String>())
}

/// `1234567` as `1,234,567`.
pub(crate) fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped() {
        for (n, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1234567, "1,234,567")] {
            assert_eq!(thousands(n), text);
        }
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(["a", "time"]);
        table.row(["long name".to_owned(), "1.5".to_owned()]);
        table.row(["b".to_owned()]);
        let expected = "\
| a         | time |
|:----------|-----:|
| long name |  1.5 |
| b         |      |
";
        assert_eq!(table.to_string(), expected);
    }
}
