//! One file a subcommand; each has a `run`.

pub(crate) mod bench;
pub(crate) mod classify;
pub(crate) mod compare;
pub(crate) mod completions;
pub(crate) mod import;
pub(crate) mod machine;
pub(crate) mod pronounce;
pub(crate) mod report;
pub(crate) mod sample;
pub(crate) mod score;
pub(crate) mod train;
