//! The command line: what exists, what it is called, what `--help` says.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use kavanam_kernels::{Context, Isa, IsaName, Precision};
use regex::Regex;

use crate::cases::Family;
use crate::error::HarnessError;
pub(crate) use crate::import_args::ImportArgs;
pub(crate) use crate::task_args::{
    ClassifyArgs, CompareArgs, PronounceArgs, SampleArgs, ScoreArgs, TrainArgs,
};

const EXAMPLES: &str = "\
Examples:
  kavanam                                train three models for 3 minutes and compare them
  kavanam compare --preset full          larger models, twelve minutes of training each
  kavanam pronounce thought through      letters to phones, by the newest trained model
  kavanam train --model transformer --out DIR --seconds 120
  kavanam train --task chars --data text.txt --out DIR
  kavanam sample --model DIR --prompt 'The '
  kavanam train --task classify --data labelled.tsv --out DIR
  kavanam classify --model DIR 'The match ended in a draw'
  kavanam score --model DIR              phone and word error rates on held-out words
  kavanam import --format g2p-en g2p_en/checkpoint20.npz --out DIR
  kavanam bench gemm --quick             our matrix products against three other crates, a minute
  kavanam bench gemm --filter 'square/(64|512)$' --threads 1,2 --json gemm.json
  kavanam machine                        what this CPU can do, and how fast
  kavanam report results/epyc/2026-…     draw report.html again from results.json
  kavanam completions bash > ~/.local/share/bash-completion/completions/kavanam

Environment:
  KAVANAM_ISA   the instruction set to use instead of the best one: scalar, avx2, avx2vnni, avx512, avx512vnni, avx512bf16, amx, neon";

/// Compares parallel attention with sequential RNN baselines on this CPU, reproducibly.
#[derive(Debug, Parser)]
#[command(name = "kavanam", version, about, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// What to do [default: compare --preset quick]
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train an RNN, an RNN with attention and a transformer for the same time, and compare them
    Compare(CompareArgs),
    /// Train one model
    Train(TrainArgs),
    /// Say how words are pronounced, by a trained model
    Pronounce(PronounceArgs),
    /// Measure a trained model's errors on the dictionary's held-out words
    Score(ScoreArgs),
    /// Write on from a prompt, by a trained language model of characters
    Sample(SampleArgs),
    /// Put texts into classes, by a trained classifier
    Classify(ClassifyArgs),
    /// Turn a recurrent model of another program into a folder that pronounce and score read
    Import(ImportArgs),
    /// Measure a family of kernels against its peers
    Bench(BenchArgs),
    /// Show the CPU: instruction sets, caches, and its measured limits
    Machine(MachineArgs),
    /// Draw report.html again, from results.json alone
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
    /// Instruction set: scalar, avx2, avx2vnni, avx512, avx512vnni, avx512bf16, amx or neon [default: the best that this CPU has]
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

// A paragraph is one line here: clap breaks it to the width of the terminal.
const BENCH_HELP: &str = "\
Every peer computes each case on the same inputs, and its result is checked against sums in f64 before a time is kept. \
The samples of all peers alternate. The table shows rates at the median; a ratio above 1 means that ours is the faster \
one, and its bracket is a 95 % bootstrap interval.

The peer torch is PyTorch, with MKL and oneDNN as it calls them, in a Python process of its own that gets the same \
inputs and threads and measures beside the computation. It takes part only where --peers names it. Its environment \
(what is compared with what: docs/peers.md):
  python3 -m venv DIR
  DIR/bin/pip install -r bench-harness/peers/requirements.txt

--json writes an array of records, rewritten as a whole after every case, with these keys:
  family, case, peer, peer_version, kernel, precision, isa, threads, median_ns, min_ns,
  samples_ns, gflops, gbps, percent_of_peak, and percent_of_read where one row meets weights
  that are used again, or one query a cache
and beside it NAME.environment.txt: the command, the date, the machine.

Examples:
  kavanam bench gemm --quick
  kavanam bench gemm --filter '^square/' --threads 1,2 --peers ours,gemm --json squares.json
  kavanam bench gemm --quick --isa scalar,avx2 --peers ours
  kavanam bench attention --quick --peers ours,torch --python DIR/bin/python";

/// Arguments of `kavanam bench`.
#[derive(Debug, Args)]
#[command(after_help = BENCH_HELP)]
pub(crate) struct BenchArgs {
    /// What to measure
    pub(crate) family: Family,
    /// Only the cases whose name this regular expression matches
    #[arg(long, value_name = "RE")]
    pub(crate) filter: Option<Regex>,
    /// Thread counts, each measured in turn
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1")]
    pub(crate) threads: Vec<NonZeroUsize>,
    /// Precision of matrix products that ours is asked for: strict, highest, high or medium
    #[arg(long, value_name = "WORD", default_value = "strict")]
    pub(crate) precision: Precision,
    /// Instruction sets for ours: scalar, avx2, avx2vnni, avx512, avx512vnni, avx512bf16, amx or neon [default: the best that this CPU has]
    #[arg(long, value_name = "ISA,…", value_delimiter = ',', value_parser = parse_isa)]
    pub(crate) isa: Vec<Isa>,
    /// Who takes part, the first being the one that the others are compared with: ours, matrixmultiply, gemm,
    /// gemmkit, torch [default: all but torch]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub(crate) peers: Vec<String>,
    /// The Python that the peer torch runs in: one with PyTorch and NumPy [default: python3]
    #[arg(long, value_name = "PATH")]
    pub(crate) python: Option<PathBuf>,
    /// Write the records to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Fewer cases, fewer and shorter samples: a first look
    #[arg(long)]
    pub(crate) quick: bool,
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
