//! The command line: what exists, what it is called, what `--help` says.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use kavanam_kernels::{Context, Isa, IsaName, Precision};

use crate::error::HarnessError;

const EXAMPLES: &str = "\
Examples:
  kavanam machine                        what this CPU can do, and how fast
  kavanam report results/epyc/2026-…     draw report.html again from results.json
  kavanam completions bash > ~/.local/share/bash-completion/completions/kavanam

Environment:
  KAVANAM_ISA   the instruction set to use instead of the best one: scalar, avx2, avx512, neon";

/// Compares parallel attention with sequential RNN baselines on this CPU, reproducibly.
#[derive(Debug, Parser)]
#[command(name = "kavanam", version, about, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the CPU: instruction sets, caches, and its measured limits
    Machine(MachineArgs),
    /// Draw the tables again from a results.json
    Report(ReportArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
}

/// How kernels run; the same flags on every command that computes.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ContextArgs {
    /// Number of threads [default: one for each core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Instruction set: scalar, avx2, avx512 or neon [default: the best that this CPU has]
    #[arg(long, value_name = "ISA", value_parser = parse_isa)]
    pub(crate) isa: Option<Isa>,
    /// Precision of matrix products: strict, highest, high or medium
    #[arg(long, value_name = "WORD", default_value = "strict")]
    pub(crate) precision: Precision,
}

impl ContextArgs {
    /// The context that the flags ask for.
    ///
    /// # Errors
    /// When `KAVANAM_ISA` names a set that does not exist or that this CPU lacks.
    pub(crate) fn context(&self) -> Result<Context, HarnessError> {
        let detected = Context::detect()?;
        let isa = self.isa.unwrap_or(detected.isa());
        let threads =
            self.threads.or(NonZeroUsize::new(detected.thread_count())).unwrap_or(NonZeroUsize::MIN);
        Ok(Context::with_isa(isa).threads(threads).precision(self.precision))
    }
}

fn parse_isa(name: &str) -> Result<Isa, kavanam_kernels::IsaError> {
    Isa::new(name.parse::<IsaName>()?)
}

/// Arguments of `kavanam machine`.
#[derive(Debug, Args)]
pub(crate) struct MachineArgs {
    /// Print JSON instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `kavanam report`.
#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// The folder with results.json
    pub(crate) dir: PathBuf,
}

/// Arguments of `kavanam completions`.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_argument_is_explained() {
        let mut waiting = vec![Cli::command()];
        while let Some(command) = waiting.pop() {
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{}: {}", command.get_name(), argument.get_id());
            }
            assert!(command.get_about().is_some(), "{}", command.get_name());
            waiting.extend(command.get_subcommands().cloned());
        }
    }

    #[test]
    fn an_isa_that_this_cpu_lacks_is_refused() {
        assert!(parse_isa("neon").is_err() || parse_isa("avx2").is_err());
        assert!(parse_isa("mmx").unwrap_err().to_string().contains("mmx"));
    }
}
