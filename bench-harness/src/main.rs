//! `kavanam`: compares parallel attention with sequential RNN baselines, and every kernel with its peers.

mod cases;
mod cli;
mod commands;
mod error;
mod files;
mod import_args;
mod measure;
mod peers;
mod record;
mod report;
mod task_args;
mod tasks;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};
use crate::error::HarnessError;
use crate::task_args::CompareArgs;

fn main() -> ExitCode {
    match dispatch(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn dispatch(cli: Cli) -> Result<(), HarnessError> {
    match cli.command.unwrap_or_else(|| Command::Compare(CompareArgs::default())) {
        Command::Bench(args) => commands::bench::run(&args),
        Command::Compare(args) => commands::compare::run(&args),
        Command::Train(args) => commands::train::run(&args),
        Command::Pronounce(args) => commands::pronounce::run(&args),
        Command::Score(args) => commands::score::run(&args),
        Command::Sample(args) => commands::sample::run(&args),
        Command::Classify(args) => commands::classify::run(&args),
        Command::Import(args) => commands::import::run(&args),
        Command::Machine(args) => commands::machine::run(&args),
        Command::Report(args) => commands::report::run(&args),
        Command::Completions(args) => commands::completions::run(&args),
    }
}
