//! The table after `kavanam bench`: rates side by side, and who is faster by how much.

use crate::measure::statistics::{geometric_mean, median, median_absolute_deviation, ratio_interval};
use crate::record::Record;
use crate::report::markdown::Table;

/// The records of one case.
struct Row<'a> {
    case: &'a str,
    records: Vec<&'a Record>,
}

/// Rates of every peer and the ratio `best peer's time / our time` with its 95 % interval, then the
/// geometric mean and the worst shape against each peer. All records are of one thread count.
pub(crate) fn table(records: &[Record]) -> String {
    let rows = rows(records);
    let mut labels: Vec<String> = Vec::new();
    for record in records {
        if !labels.contains(&label(record, records)) {
            labels.push(label(record, records));
        }
    }
    let unit = if records.iter().any(|record| record.gflops.is_some()) { "GFLOP/s" } else { "GB/s" };
    let mut header = vec![format!("case, {unit}")];
    header.extend(labels.iter().cloned());
    let reading = records.iter().any(|record| record.percent_of_read.is_some());
    header.extend(reading.then(|| "of reading".to_owned()));
    header.extend(["of peak", "spread", "best peer / ours"].map(str::to_owned));
    let mut table = Table::new(header);
    for row in &rows {
        let find = |name: &String| row.records.iter().find(|record| label(record, records) == *name);
        let rate = |record: &&Record| format!("{:.1}", record.gflops.or(record.gbps).unwrap_or(f64::NAN));
        let rates = labels.iter().map(|name| find(name).map_or("–".to_owned(), rate));
        let first = row.records[0];
        let peak = first.percent_of_peak.map_or(String::new(), |percent| format!("{percent:.0} %"));
        let spread = 100.0 * median_absolute_deviation(&first.samples_ns) / first.median_ns;
        let ratio = row.best_peer().map_or(String::new(), |best| {
            let interval = ratio_interval(&best.samples_ns, &first.samples_ns);
            format!("{:.2} [{:.2}, {:.2}]", best.median_ns / first.median_ns, interval.low, interval.high)
        });
        let read =
            reading.then(|| first.percent_of_read.map_or(String::new(), |percent| format!("{percent:.0} %")));
        table.row([row.case.to_owned()].into_iter().chain(rates).chain(read).chain([
            peak,
            format!("{spread:.1} %"),
            ratio,
        ]));
    }
    format!("{table}{}", summary(&rows, &labels, records))
}

/// One line a peer: the geometric mean of `its time / our time`, and where that is smallest. On a machine that
/// other work disturbs, the same of the shortest samples is the better guide.
fn summary(rows: &[Row<'_>], labels: &[String], all: &[Record]) -> String {
    let Some((ours, peers)) = labels.split_first() else { return String::new() };
    if peers.is_empty() {
        return String::new();
    }
    let mut table = Table::new([
        &format!("time / time of {ours}"),
        "geometric mean",
        "of the shortest",
        "worst",
        "at",
        "cases",
    ]);
    let mut line = |name: &str, pick: &dyn Fn(&Row<'_>) -> Option<Record>| {
        let pairs: Vec<(Record, &Row<'_>)> =
            rows.iter().filter_map(|row| pick(row).map(|record| (record, row))).collect();
        let medians: Vec<f64> = pairs.iter().map(|(r, row)| r.median_ns / row.records[0].median_ns).collect();
        let minima: Vec<f64> = pairs.iter().map(|(r, row)| r.min_ns / row.records[0].min_ns).collect();
        let worst = (0..pairs.len()).min_by(|&a, &b| medians[a].total_cmp(&medians[b]));
        table.row([
            name.to_owned(),
            format!("{:.2}", geometric_mean(&medians)),
            format!("{:.2}", geometric_mean(&minima)),
            worst.map_or(String::new(), |i| format!("{:.2}", medians[i])),
            worst.map_or(String::new(), |i| pairs[i].1.case.to_owned()),
            pairs.len().to_string(),
        ]);
    };
    for peer in peers {
        line(peer, &|row| row.records.iter().find(|r| label(r, all) == *peer).map(|r| (*r).clone()));
    }
    if peers.len() > 1 {
        line("best of them a case", &|row| row.best_peer().cloned());
    }
    format!("\n{table}")
}

impl Row<'_> {
    /// The fastest of the others.
    fn best_peer(&self) -> Option<&Record> {
        let others = self.records[1..].iter().copied();
        others.min_by(|a, b| median(&a.samples_ns).total_cmp(&median(&b.samples_ns)))
    }
}

/// The records by case, in the order of the file; the first peer that was asked for stands first.
fn rows(records: &[Record]) -> Vec<Row<'_>> {
    let mut rows: Vec<Row<'_>> = Vec::new();
    for record in records {
        match rows.last_mut().filter(|row| row.case == record.case) {
            Some(row) => row.records.push(record),
            None => rows.push(Row { case: &record.case, records: vec![record] }),
        }
    }
    rows
}

/// The peer's name, with its instruction set where the same peer ran on several.
fn label(record: &Record, all: &[Record]) -> String {
    let several = all.iter().any(|other| other.peer == record.peer && other.isa != record.isa);
    if several { format!("{} {}", record.peer, record.isa) } else { record.peer.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(case: &str, peer: &str, ns: f64) -> Record {
        Record {
            family: "gemm".into(),
            case: case.into(),
            peer: peer.into(),
            peer_version: "1".into(),
            kernel: "k".into(),
            precision: "strict".into(),
            isa: "auto".into(),
            threads: 1,
            median_ns: ns,
            min_ns: ns,
            samples_ns: vec![ns; 3],
            gflops: Some(1000.0 / ns),
            gbps: Some(1.0),
            percent_of_peak: Some(50.0),
            percent_of_read: None,
        }
    }

    #[test]
    fn the_table_compares_with_the_best_and_names_the_worst() {
        let records = [
            record("a", "ours", 10.0),
            record("a", "x", 20.0),
            record("a", "y", 40.0),
            record("b", "ours", 10.0),
            record("b", "x", 5.0),
        ];
        let text = table(&records);
        assert!(text.contains("2.00 [2.00, 2.00]"), "{text}");
        assert!(text.contains("0.50 [0.50, 0.50]"), "{text}");
        let x = text.lines().find(|line| line.starts_with("| x ")).unwrap();
        assert!(x.contains("1.00") && x.contains("0.50") && x.contains(" b "), "{text}");
    }

    #[test]
    fn instruction_sets_get_columns_of_their_own() {
        let mut scalar = record("a", "ours", 90.0);
        scalar.isa = "scalar".into();
        let text = table(&[record("a", "ours", 10.0), scalar]);
        assert!(text.contains("ours auto") && text.contains("ours scalar"), "{text}");
    }
}
