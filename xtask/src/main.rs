//! `cargo xtask`: what CI calls and developers call.

mod asm;
mod check;
mod isa;
mod steps;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Checks of the kavanam workspace.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Everything that must hold before a change lands: format, clippy, docs, tests, kernels' assembly
    Check(check::Arguments),
    /// Run the kernels' tests and fail unless each required instruction set was really exercised
    Isa(isa::Arguments),
    /// Fail if a microkernel's inner loop spills registers or calls a function
    Asm,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Check(arguments) => check::run(&arguments),
        Command::Isa(arguments) => isa::run(&arguments),
        Command::Asm => asm::run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}
