//! `cargo xtask isa`: a property that silently skipped an instruction set proves nothing about it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use kavanam_kernels::{Isa, IsaName};

use crate::steps;

/// Which instruction sets must have run.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Instruction sets that must have run, separated by commas [default: all that this CPU has]
    #[arg(long, value_delimiter = ',', value_name = "ISA")]
    require: Vec<IsaName>,
}

/// Runs the kernels' tests with a log of what each property ran on, and compares it with what was asked for.
pub(crate) fn run(arguments: &Arguments) -> Result<(), String> {
    let required = if arguments.require.is_empty() {
        Isa::available().into_iter().map(Isa::name).collect()
    } else {
        arguments.require.clone()
    };
    for &isa in &required {
        Isa::new(isa).map_err(|error| format!("{isa} cannot be exercised here: {error}"))?;
    }

    let log = steps::workspace_root().join("target").join("isa.log");
    fs::write(&log, "").map_err(|error| format!("cannot write {}: {error}", log.display()))?;
    let mut tests = steps::cargo(&["test", "--package", "kavanam-kernels", "--package", "kavanam-tests"]);
    // The name stands in kernels/src/testing.
    tests.args(["--features", "kavanam-kernels/testing"]).env("KAVANAM_ISA_LOG", &log);
    steps::run("tests on every instruction set", tests)?;

    let text = fs::read_to_string(&log).map_err(|error| format!("cannot read {}: {error}", log.display()))?;
    judge(&text, &required)
}

/// Every property of the log must have run on every required instruction set.
fn judge(log: &str, required: &[IsaName]) -> Result<(), String> {
    let mut properties: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (isa, place) in log.lines().filter_map(|line| line.split_once(' ')) {
        properties.entry(place).or_default().insert(isa);
    }
    if properties.is_empty() {
        return Err("no property ran on any instruction set".to_owned());
    }
    for isa in required {
        let missing: Vec<&str> = properties
            .iter()
            .filter(|(_, ran)| !ran.contains(isa.as_str()))
            .map(|(place, _)| *place)
            .collect();
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
        assert!(judge(log, &[IsaName::Scalar]).is_ok());
        let error = judge(log, &[IsaName::Scalar, IsaName::Avx2]).unwrap_err();
        assert_eq!(error, "avx2 was skipped by b.rs:2");
        assert!(judge("", &[]).is_err());
    }
}
