//! `kavanam completions SHELL`.

use std::io::stdout;

use clap::CommandFactory;

use crate::cli::{Cli, CompletionsArgs};
use crate::error::HarnessError;

/// Prints the completion script of the shell.
pub(crate) fn run(args: &CompletionsArgs) -> Result<(), HarnessError> {
    clap_complete::generate(args.shell, &mut Cli::command(), "kavanam", &mut stdout());
    Ok(())
}
