//! Bakes the commit and the compiler's version into the binary, so that every result names both.

use std::process::Command;

fn main() {
    for path in ["../.git/logs/HEAD", "src", "../kernels/src", "../model/src", "../Cargo.lock"] {
        if std::path::Path::new(path).exists() {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    let commit = output("git", &["rev-parse", "--short=12", "HEAD"]).map_or("unknown".to_owned(), |commit| {
        let sources = ["status", "--porcelain", "--untracked-files=no", "--", ".", "../kernels", "../model"];
        let clean = output("git", &sources).is_some_and(|changes| changes.is_empty());
        if clean { commit } else { format!("{commit}+dirty") }
    });
    let compiler = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let rustc = output(&compiler, &["--version"]).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo::rustc-env=KAVANAM_COMMIT={commit}");
    println!("cargo::rustc-env=KAVANAM_RUSTC={rustc}");
}

/// What the program prints, trimmed; `None` when it cannot run or fails.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
