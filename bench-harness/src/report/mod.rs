//! What is written after a run: `results.json`, the terminal's tables, and `report.html` drawn from the JSON alone.

mod axis;
pub(crate) mod bench;
mod charts;
#[cfg(test)]
pub(crate) mod fixture;
pub(crate) mod html;
pub(crate) mod markdown;
mod plots;
pub(crate) mod results;

use std::path::{Path, PathBuf};

use crate::error::HarnessError;
use crate::files;
use crate::measure::fingerprint::Machine;
use crate::report::results::CompareResults;

/// Where a run goes that names no folder: `results/<machine>/<date>-<commit>`.
pub(crate) fn default_dir(machine: &Machine, date: &str) -> PathBuf {
    Path::new("results").join(machine.slug()).join(format!("{date}-{}", machine.commit))
}

/// Writes `results.json` and everything drawn from it into `dir`, each file atomically.
pub(crate) fn write(dir: &Path, results: &CompareResults) -> Result<(), HarnessError> {
    files::write_json(&dir.join("results.json"), results)?;
    files::write_atomically(&dir.join("environment.txt"), environment(results).as_bytes())?;
    draw(dir, results)
}

/// Draws `report.html` and `picture.svg`, the picture for a README, into `dir`.
pub(crate) fn draw(dir: &Path, results: &CompareResults) -> Result<(), HarnessError> {
    files::write_atomically(&dir.join("picture.svg"), html::picture(results).as_bytes())?;
    files::write_atomically(&dir.join("report.html"), html::page(results).as_bytes())
}

/// The text of `environment.txt`: by which command, when, on what.
fn environment(results: &CompareResults) -> String {
    let environment = &results.environment;
    let mut text = format!(
        "command   {}\ndate      {}\nseed      {}\nrun with  {} threads, {}, {}, kernels {}\n",
        results.command,
        results.date,
        results.seed,
        environment.threads,
        environment.isa,
        environment.precision,
        environment.kernels.join(" ")
    );
    for (key, value) in &environment.fingerprint {
        text.push_str(&format!("{key:<9} {value}\n"));
    }
    text
}

/// The tables that a run ends with.
pub(crate) fn tables(results: &CompareResults) -> String {
    let mut text = markdown::models_table(&results.models);
    if let Some(worth) = &results.worth {
        text.push_str(&format!("\n{}\n", markdown::worth(worth)));
    }
    if !results.sweep.is_empty() {
        text.push_str("\nTime of one training step in ms, by sequence length (* fastest):\n\n");
        text.push_str(&markdown::sweep_table(results));
        text.push_str(&markdown::crossings(results));
    }
    text
}
