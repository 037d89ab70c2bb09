//! Arguments of `kavanam import`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// Whose file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ImportFormat {
    /// The Python package g2p-en: checkpoint20.npz, letters to phones
    G2pEn,
    /// PyTorch: nn.LSTM, nn.GRU, nn.Linear and nn.Embedding
    Pytorch,
    /// Keras: LSTM, GRU, Dense and Embedding
    Keras,
}

const HELP: &str = "\
The folder gets config.json, vocab.json and model.safetensors. It appears complete or not at all; one that exists \
is left as it is.

g2p-en needs the file alone. For pytorch and keras, --config and --vocab say what the model is: docs/formats.md lists \
the fields and, under \"Import\", the names of the tensors. The file is .safetensors or .npz.

Examples:
  pip download --no-deps g2p-en==2.1.0 && unzip g2p_en-2.1.0-*.whl
  kavanam import --format g2p-en g2p_en/checkpoint20.npz --out g2p-en
  kavanam pronounce --model g2p-en activationist
  kavanam import --format keras weights.npz --config config.json --vocab vocab.json --out DIR";

/// Arguments of `kavanam import`.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct ImportArgs {
    /// The weights
    pub(crate) file: PathBuf,
    /// Whose names and layouts they have
    #[arg(long, value_enum)]
    pub(crate) format: ImportFormat,
    /// Folder to make
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// What the model is: a config.json with model_type rnn_seq2seq
    #[arg(long, value_name = "FILE", required_if_eq_any = [("format", "pytorch"), ("format", "keras")])]
    pub(crate) config: Option<PathBuf>,
    /// Its tokens: a vocab.json
    #[arg(long, value_name = "FILE", required_if_eq_any = [("format", "pytorch"), ("format", "keras")])]
    pub(crate) vocab: Option<PathBuf>,
}
