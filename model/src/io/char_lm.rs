//! A language model of characters as a folder: `config.json`, `vocab.json`, `model.safetensors`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::config::{CONFIG_FILE, MODEL_FILE, VOCAB_FILE, fill, read_json, write_json};
use super::{CheckpointError, safetensors};
use crate::models::{CharLm, CharLmConfig};
use crate::vocab::Vocab;

/// `config.json`: the model type beside the fields.
#[derive(Serialize, Deserialize)]
#[serde(tag = "model_type")]
enum ConfigFile {
    #[serde(rename = "char_lm")]
    CharLm(CharLmConfig),
}

/// `vocab.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VocabFile {
    tokens: Vec<String>,
}

/// Writes `config.json` and `vocab.json` into `folder`.
///
/// # Errors
/// [`CheckpointError::Io`] when a file cannot be written.
pub fn save_config(folder: &Path, config: &CharLmConfig, vocab: &Vocab) -> Result<(), CheckpointError> {
    write_json(&folder.join(CONFIG_FILE), &ConfigFile::CharLm(config.clone()))?;
    write_json(&folder.join(VOCAB_FILE), &VocabFile { tokens: vocab.tokens().to_vec() })
}

/// Reads a whole model.
///
/// # Errors
/// [`CheckpointError`] names the file and, for a tensor that is missing, left over or of another shape, the tensor.
pub fn load(folder: &Path) -> Result<(CharLm, Vocab), CheckpointError> {
    let (config, vocab) = (folder.join(CONFIG_FILE), folder.join(VOCAB_FILE));
    let ConfigFile::CharLm(options) = read_json(&config)?;
    let mut model = CharLm::new(&options, 0).map_err(|e| CheckpointError::format(&config, e.to_string()))?;
    let VocabFile { tokens } = read_json(&vocab)?;
    let tokens = Vocab::from_list(tokens).map_err(|e| CheckpointError::format(&vocab, e.to_string()))?;
    if tokens.len() != options.vocab {
        let problem = format!("has {} tokens, {} says {}", tokens.len(), config.display(), options.vocab);
        return Err(CheckpointError::format(&vocab, problem));
    }
    let path = folder.join(MODEL_FILE);
    fill(model.params_mut(), &safetensors::load(&path)?, "", &path)?;
    Ok((model, tokens))
}
