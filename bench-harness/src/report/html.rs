//! `report.html`: one file with its style and pictures inside, drawn from [`CompareResults`] alone.

use std::fmt::Write as _;

use crate::report::charts;
use crate::report::markdown::{self, thousands};
use crate::report::plots::{self, LineChart, escape};
use crate::report::results::{CompareResults, ModelResult, SweepPoint};

const PAGE_STYLE: &str = include_str!("style.css");

/// The whole page.
pub(crate) fn page(results: &CompareResults) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\"><title>{}</title>\n<style>{}\n{PAGE_STYLE}</style></head>\n\
         <body><main>\n",
        escape(&title(results)),
        plots::STYLE
    );
    opening(&mut out, results);
    models_table(&mut out, results);
    if let Some(worth) = &results.worth {
        let _ = writeln!(out, "<p>{}</p>", escape(&markdown::worth(worth)));
    }
    learning(&mut out, results);
    lengths(&mut out, results);
    sweep(&mut out, results);
    alignments(&mut out, results);
    reproduction(&mut out, results);
    out.push_str("</main></body></html>\n");
    out
}

/// The picture that stands for the run: error against seconds, step time against length.
pub(crate) fn picture(results: &CompareResults) -> String {
    let mut left = charts::curves(results, "phone error rate, %", |point| point.valid_per);
    left.title = Some("Errors on unseen words while training".into());
    let mut right = charts::sweep(results);
    right.title = Some("Time of a training step by sequence length".into());
    plots::picture(&left, &right)
}

fn title(results: &CompareResults) -> String {
    let names: Vec<&str> = results.models.iter().map(|model| model.name.as_str()).collect();
    format!("{} on {}", names.join(", "), results.data.name)
}

fn opening(out: &mut String, results: &CompareResults) {
    let environment = &results.environment;
    let _ = writeln!(
        out,
        "<h1>{}</h1>\n<p class=\"faint\">kavanam compare, preset {}, {} · {} · {} {} · {} · {}</p>",
        escape(&title(results)),
        escape(&results.preset),
        escape(&results.date),
        escape(&environment.cpu),
        environment.threads,
        if environment.threads == 1 { "thread" } else { "threads" },
        escape(&environment.isa),
        escape(&environment.precision),
    );
    let fewest = results.models.iter().min_by(|a, b| a.wer.total_cmp(&b.wer).then(a.per.total_cmp(&b.per)));
    let quickest = results.models.iter().max_by(|a, b| a.train_tokens_per_s.total_cmp(&b.train_tokens_per_s));
    if let (Some(fewest), Some(quickest)) = (fewest, quickest) {
        let _ = writeln!(
            out,
            "<p><b>{}</b> makes the fewest errors: {:.2} % of phones and {:.1} % of words on {} held-out words. \
             <b>{}</b> trains fastest: {} tokens a second.</p>",
            escape(&fewest.name),
            100.0 * fewest.per,
            100.0 * fewest.wer,
            thousands(fewest.test_words as u64),
            escape(&quickest.name),
            thousands(quickest.train_tokens_per_s.round() as u64),
        );
    }
}

/// A column of the table: its head, its text, and who is the best.
struct Column {
    head: &'static str,
    text: fn(&ModelResult) -> String,
    rank: Rank,
}

/// Who is the best of a column.
enum Rank {
    /// Nobody: it is no matter of better and worse.
    Unranked,
    /// Whoever has the least.
    Least(fn(&ModelResult) -> f64),
    /// Whoever has the most.
    Most(fn(&ModelResult) -> f64),
}

const COLUMNS: [Column; 9] = [
    Column { head: "parameters", text: |m| thousands(m.params as u64), rank: Rank::Unranked },
    Column {
        head: "of them in<br>embeddings",
        text: |m| thousands(m.embedding_params as u64),
        rank: Rank::Unranked,
    },
    Column {
        head: "training<br>tokens/s",
        text: |m| thousands(m.train_tokens_per_s.round() as u64),
        rank: Rank::Most(|m| m.train_tokens_per_s),
    },
    Column { head: "training<br>seconds", text: |m| format!("{:.1}", m.train_seconds), rank: Rank::Unranked },
    Column { head: "tokens<br>seen", text: |m| thousands(m.tokens_seen), rank: Rank::Unranked },
    Column { head: "PER %", text: |m| format!("{:.2}", 100.0 * m.per), rank: Rank::Least(|m| m.per) },
    Column { head: "WER %", text: |m| format!("{:.2}", 100.0 * m.wer), rank: Rank::Least(|m| m.wer) },
    Column {
        head: "encoding<br>ms/word",
        text: |m| format!("{:.3}", m.encode_ms),
        rank: Rank::Least(|m| m.encode_ms),
    },
    Column {
        head: "decoding<br>ms/token",
        text: |m| format!("{:.3}", m.decode_ms_per_token),
        rank: Rank::Least(|m| m.decode_ms_per_token),
    },
];

fn models_table(out: &mut String, results: &CompareResults) {
    out.push_str("<div class=\"scroll\"><table><thead><tr><th>model</th>");
    for column in &COLUMNS {
        let _ = write!(out, "<th>{}</th>", column.head);
    }
    out.push_str("</tr></thead><tbody>\n");
    for model in &results.models {
        let guard =
            if model.stopped_by_guard { ", stopped by the clock before its planned steps" } else { "" };
        let about =
            format!("{} · {} steps{guard}", model.description.trim_end_matches('.'), thousands(model.steps));
        let _ = write!(out, "<tr><td>{}<small>{}</small></td>", escape(&model.name), escape(&about));
        for column in &COLUMNS {
            let class = if is_best(column, model, &results.models) { " class=\"best\"" } else { "" };
            let _ = write!(out, "<td{class}>{}</td>", (column.text)(model));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>\n");
    out.push_str(
        "<p class=\"faint\">PER: edits over phones of the nearest listed pronunciation. WER: words with any error. \
         Bold: the best of a column. Encoding and decoding are measured one word at a time.</p>\n",
    );
}

fn is_best(column: &Column, model: &ModelResult, models: &[ModelResult]) -> bool {
    let against = |value: fn(&ModelResult) -> f64, wins: fn(&f64, &f64) -> bool| {
        models.iter().all(|other| wins(&value(model), &value(other)))
    };
    models.len() > 1
        && match column.rank {
            Rank::Unranked => false,
            Rank::Least(value) => against(value, f64::le),
            Rank::Most(value) => against(value, f64::ge),
        }
}

fn figure(out: &mut String, heading: &str, chart: &LineChart) {
    let _ = writeln!(out, "<figure><h3>{heading}</h3>{}</figure>", chart.svg());
}

fn learning(out: &mut String, results: &CompareResults) {
    out.push_str("<h2>Errors against seconds of training</h2>\n<p>Measured on validation words while training, greedy decoding. Logarithmic upwards: equal steps are equal shares of the errors.</p>\n<div class=\"pair\">");
    figure(out, "Phones", &charts::curves(results, "PER, %", |point| point.valid_per));
    figure(out, "Words", &charts::curves(results, "WER, %", |point| point.valid_wer));
    out.push_str("</div>\n");
}

fn lengths(out: &mut String, results: &CompareResults) {
    out.push_str("<h2>Errors by length of the word</h2>\n<p>A model that squeezes a word into one vector of fixed size loses most on long ones.</p>\n<div class=\"pair\">");
    figure(out, "Phones", &charts::by_length(results, "PER, %", |score| score.per));
    figure(out, "Words", &charts::by_length(results, "WER, %", |score| score.wer));
    out.push_str("</div>\n");
}

fn sweep(out: &mut String, results: &CompareResults) {
    if results.sweep.is_empty() {
        return;
    }
    out.push_str("<h2>Time of a training step against sequence length</h2>\n<p>Forward, backward and update of models with equal numbers of parameters, on batches of about equal numbers of tokens. The points are medians, the bars reach from the fastest to the slowest sample; the models' samples alternate in time.");
    if results.crossings.is_empty() {
        out.push_str(" No curves cross within these lengths.");
    }
    out.push_str("</p>\n<div class=\"pair\">");
    figure(out, "Milliseconds a step", &charts::sweep(results));
    sweep_table(out, results);
    out.push_str("</div>\n");
}

/// One row a length, one column a model, the fastest in bold.
fn sweep_table(out: &mut String, results: &CompareResults) {
    let mut names: Vec<&str> = Vec::new();
    let mut shapes: Vec<(usize, usize)> = Vec::new();
    for point in &results.sweep {
        if !names.contains(&point.model.as_str()) {
            names.push(&point.model);
        }
        shapes.push((point.length, point.sequences));
    }
    shapes.sort_unstable();
    shapes.dedup();
    out.push_str("<div><h3>The same in figures</h3><div class=\"scroll\"><table><thead><tr><th>length</th><th>sequences</th>");
    for name in &names {
        let _ = write!(out, "<th>{}</th>", escape(name));
    }
    out.push_str("</tr></thead><tbody>\n");
    for (length, sequences) in shapes {
        let of = |name: &str| {
            let here = |p: &&SweepPoint| (p.length, p.sequences) == (length, sequences) && p.model == name;
            results.sweep.iter().find(here).map(|p| p.step_ms)
        };
        let times: Vec<Option<f64>> = names.iter().map(|name| of(name)).collect();
        let fastest = times.iter().flatten().copied().fold(f64::INFINITY, f64::min);
        let _ = write!(out, "<tr><td>{length}</td><td>{sequences}</td>");
        for time in times {
            let class = if time == Some(fastest) { " class=\"best\"" } else { "" };
            let text = time.map_or("–".to_owned(), |ms| format!("{ms:.1}"));
            let _ = write!(out, "<td{class}>{text}</td>");
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div></div>");
}

fn alignments(out: &mut String, results: &CompareResults) {
    let mut models = results.models.iter().filter(|model| !model.alignments.is_empty()).peekable();
    if models.peek().is_none() {
        return;
    }
    out.push_str("<h2>What the models look at</h2>\n<p>Letters from left to right, phones from top to bottom as the model says them; the stronger the colour, the more weight the model gives to the letter for that phone.</p>\n");
    for model in models {
        let _ = writeln!(out, "<h3>{}</h3>\n<div class=\"maps\">", escape(&model.name));
        for alignment in &model.alignments {
            let map = plots::heat_map(&alignment.source, &alignment.target, &alignment.weights);
            let word = escape(&alignment.source.concat());
            let _ = writeln!(out, "<figure>{map}<figcaption>{word}</figcaption></figure>");
        }
        out.push_str("</div>\n");
    }
}

fn reproduction(out: &mut String, results: &CompareResults) {
    let environment = &results.environment;
    let _ = writeln!(out, "<h2>To do it again</h2>\n<pre>{}</pre>\n<dl>", escape(&results.command));
    let data = &results.data;
    let split = format!(
        "{}: {} words ({} pronunciations) to train on, {} to watch, {} held out",
        data.name,
        thousands(data.train_words as u64),
        thousands(data.train_pairs as u64),
        thousands(data.valid_words as u64),
        thousands(data.test_words as u64)
    );
    let run = format!("{} threads, {}, {}", environment.threads, environment.isa, environment.precision);
    let mut fields = vec![
        ("data".to_owned(), split),
        ("seed".to_owned(), results.seed.to_string()),
        ("commit".to_owned(), results.commit.clone()),
        ("run with".to_owned(), run),
        ("kernels".to_owned(), environment.kernels.join(", ")),
    ];
    let known = ["commit"];
    fields.extend(environment.fingerprint.iter().filter(|(key, _)| !known.contains(&key.as_str())).cloned());
    for (key, value) in fields {
        let _ = writeln!(out, "<dt>{}</dt><dd>{}</dd>", escape(&key), escape(&value));
    }
    out.push_str("</dl>\n");
    for model in &results.models {
        let config = serde_json::to_string_pretty(&model.config).unwrap_or_default();
        let _ = writeln!(
            out,
            "<details><summary>configuration of {}</summary><pre>{}</pre></details>",
            escape(&model.name),
            escape(&config)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::fixture;

    #[test]
    fn the_page_has_every_part_and_needs_no_other_file() {
        let results = fixture::results();
        let page = page(&results);
        assert_eq!(page.matches("<svg").count(), 5 + 2 * 3, "five charts, three words of two models");
        for part in [
            "rnn-fixed",
            "3.1 times as many",
            "held out",
            "kavanam compare --preset quick",
            "0123456789ab",
            "rnn-attention at 37",
        ] {
            assert!(page.contains(part), "{part}");
        }
        for foreign in ["src=", "href=", "@import", "url("] {
            assert!(!page.contains(foreign), "{foreign}");
        }
        assert!(!page.contains("NaN") && !page.contains(">inf"));
        assert_eq!(page.matches("<figure>").count(), page.matches("</figure>").count());
    }

    #[test]
    fn text_of_the_file_is_text_in_the_page() {
        let mut results = fixture::results();
        let evil = "<script>alert('x')</script>&\"";
        results.command = evil.into();
        results.environment.cpu = evil.into();
        results.data.name = evil.into();
        results.models[1].name = evil.into();
        results.models[1].description = evil.into();
        results.models[1].alignments[0].source[0] = evil.into();
        results.sweep[0].model = evil.into();
        let page = page(&results) + &picture(&results);
        assert!(!page.contains("<script") && page.contains("&lt;script&gt;"));
    }

    #[test]
    fn a_run_cut_short_is_still_drawn() {
        let mut results = fixture::results();
        results.sweep.clear();
        results.crossings.clear();
        for model in &mut results.models {
            model.curve.clear();
            model.by_length.clear();
            model.alignments.clear();
        }
        assert!(!page(&results).contains("NaN"));
        results.models.clear();
        assert!(page(&results).contains("</html>"));
    }

    #[test]
    fn the_best_of_a_column_is_bold() {
        let page = page(&fixture::results());
        assert!(page.contains("<td class=\"best\">8.30</td>"), "the smallest PER");
        assert!(page.contains("<td class=\"best\">41,000</td>"), "the highest rate");
    }
}
