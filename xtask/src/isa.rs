//! `cargo xtask isa`: a property that silently skipped an instruction set proves nothing about it.
//!
//! What ran stands in the log that the tests write; the names are taken from there, so that the gate does not have to wait until the kernels are compiled.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use crate::steps;

/// Which instruction sets must have run.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Instruction sets that must have run, separated by commas [default: all that any test ran on]
    #[arg(long, value_delimiter = ',', value_name = "ISA")]
    require: Vec<String>,
}

/// Runs the kernels' tests with a log of what each property ran on, and compares it with what was asked for.
pub(crate) fn run(arguments: &Arguments) -> Result<(), String> {
    let log = steps::workspace_root().join("target").join("isa.log");
    fs::write(&log, "").map_err(|error| format!("cannot write {}: {error}", log.display()))?;
    let mut tests = steps::cargo(&["test", "--package", "kavanam-kernels", "--package", "kavanam-tests"]);
    // The name stands in kernels/src/testing.
    tests.args(["--features", "kavanam-kernels/testing"]).env("KAVANAM_ISA_LOG", &log);
    steps::run("tests on every instruction set", tests)?;

    let text = fs::read_to_string(&log).map_err(|error| format!("cannot read {}: {error}", log.display()))?;
    judge(&text, &arguments.require)
}

/// Every property of the log must have run on every required instruction set, or on all that any ran on.
fn judge(log: &str, required: &[String]) -> Result<(), String> {
    let mut properties: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (isa, place) in log.lines().filter_map(|line| line.split_once(' ')) {
        properties.entry(place).or_default().insert(isa);
    }
    if properties.is_empty() {
        return Err("no property ran on any instruction set".to_owned());
    }
    let all: BTreeSet<&str> = properties.values().flatten().copied().collect();
    let required =
        if required.is_empty() { all.clone() } else { required.iter().map(String::as_str).collect() };
    for isa in required {
        if !all.contains(isa) {
            let all = Vec::from_iter(all).join(", ");
            return Err(format!(
                "no property ran on {isa}: this CPU lacks it, or it is misspelt (those that ran: {all})"
            ));
        }
        let missing: Vec<&str> =
            properties.iter().filter(|(_, ran)| !ran.contains(isa)).map(|(place, _)| *place).collect();
        println!("{isa:>8}: {} of {} properties", properties.len() - missing.len(), properties.len());
        if !missing.is_empty() {
            return Err(format!("{isa} was skipped by {}", missing.join(", ")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skipped_instruction_set_is_named_with_its_property() {
        let log = "scalar a.rs:1\navx2 a.rs:1\nscalar b.rs:2\n";
        let judge = |log, required: &[&str]| {
            judge(log, &required.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert!(judge(log, &["scalar"]).is_ok());
        assert_eq!(judge(log, &["scalar", "avx2"]).unwrap_err(), "avx2 was skipped by b.rs:2");
        assert_eq!(judge(log, &[]).unwrap_err(), "avx2 was skipped by b.rs:2");
        assert!(judge(log, &["amx"]).unwrap_err().starts_with("no property ran on amx"));
        assert!(judge("", &[]).is_err());
    }
}
