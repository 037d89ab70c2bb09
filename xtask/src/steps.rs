//! Running cargo in the workspace's root and saying what ran and how long it took.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// The folder of the workspace's `Cargo.toml`.
pub(crate) fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask stands in the workspace").to_path_buf()
}

/// A cargo command in the workspace's root, by the cargo that runs this program.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.args(arguments).current_dir(workspace_root());
    command
}

/// Runs a step to its end with its output on this terminal.
///
/// # Errors
/// A sentence when it cannot be started or does not succeed.
pub(crate) fn run(title: &str, mut command: Command) -> Result<(), String> {
    println!("── {title}");
    let start = Instant::now();
    let status = command.status().map_err(|error| format!("{title}: cannot start {command:?}: {error}"))?;
    let seconds = start.elapsed().as_secs_f64();
    if status.success() {
        println!("── {title}: ok, {seconds:.0} s");
        Ok(())
    } else {
        Err(format!("{title} failed ({status}) after {seconds:.0} s: {command:?}"))
    }
}
