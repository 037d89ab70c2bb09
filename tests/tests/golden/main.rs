//! Layers against golden files, each made by the script of its name beside it.

mod lstm_projected;
