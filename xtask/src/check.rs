//! `cargo xtask check`: the gate.

use crate::{asm, steps};

/// What to leave out while working on something else.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Leave the tests out (format, clippy, docs and assembly only)
    #[arg(long)]
    no_tests: bool,
}

/// Format, clippy, docs, assembly, tests: in the order in which they fail fastest.
pub(crate) fn run(arguments: &Arguments) -> Result<(), String> {
    steps::run("format", steps::cargo(&["fmt", "--all", "--check"]))?;
    steps::run("clippy", steps::cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    let mut docs = steps::cargo(&["doc", "--workspace", "--no-deps", "--document-private-items"]);
    docs.env("RUSTDOCFLAGS", "-D warnings");
    steps::run("docs", docs)?;
    asm::run()?;
    if !arguments.no_tests {
        // The README's own command.
        steps::run("tests", steps::cargo(&["test", "--workspace"]))?;
    }
    Ok(())
}
