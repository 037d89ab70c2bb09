//! One file a subcommand; each has a `run`.

pub(crate) mod bench;
pub(crate) mod completions;
pub(crate) mod machine;
pub(crate) mod report;
