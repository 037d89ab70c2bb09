//! A trained model as a folder: `config.json`, `vocab.json`, `model.safetensors`.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::safetensors::{self, Contents, TensorRef};
use super::{CheckpointError, read, write_atomically};
use crate::models::{ModelConfig, Seq2Seq};
use crate::param::ParamStore;
use crate::vocab::Vocab;

/// The model's configuration.
pub const CONFIG_FILE: &str = "config.json";
/// The tokens of both sides.
pub const VOCAB_FILE: &str = "vocab.json";
/// The tensors.
pub const MODEL_FILE: &str = "model.safetensors";

/// The two token lists of a model, [`crate::vocab::SPECIAL`] first; the index is the id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vocabs {
    /// What the encoder reads.
    pub source: Vocab,
    /// What the decoder writes.
    pub target: Vocab,
}

/// `vocab.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VocabFile {
    source: Vec<String>,
    target: Vec<String>,
}

/// A model read from a folder.
pub struct Loaded {
    /// The model with its weights.
    pub model: Box<dyn Seq2Seq>,
    /// Its tokens.
    pub vocabs: Vocabs,
}

/// Writes `config.json` and `vocab.json` into `folder`.
///
/// # Errors
/// [`CheckpointError::Io`] when a file cannot be written.
pub fn save_config(folder: &Path, config: &ModelConfig, vocabs: &Vocabs) -> Result<(), CheckpointError> {
    write_json(&folder.join(CONFIG_FILE), config)?;
    let vocabs =
        VocabFile { source: vocabs.source.tokens().to_vec(), target: vocabs.target.tokens().to_vec() };
    write_json(&folder.join(VOCAB_FILE), &vocabs)
}

/// Writes the weights into `folder`.
///
/// # Errors
/// [`CheckpointError::Io`] when the file cannot be written; the old one stands then.
pub fn save_weights(folder: &Path, params: &ParamStore) -> Result<(), CheckpointError> {
    safetensors::save(&folder.join(MODEL_FILE), &tensor_refs(params), None)
}

/// Reads a whole model.
///
/// # Errors
/// [`CheckpointError`] names the file and, for a tensor that is missing, left over or of another shape, the tensor.
pub fn load_model(folder: &Path) -> Result<Loaded, CheckpointError> {
    let config_path = folder.join(CONFIG_FILE);
    let config: ModelConfig = read_json(&config_path)?;
    let mut model = config.build(0).map_err(|e| CheckpointError::format(&config_path, e.to_string()))?;
    let vocabs = load_vocabs(folder)?;
    let vocab_path = folder.join(VOCAB_FILE);
    for (side, tokens, expected) in [
        ("source", vocabs.source.len(), config.source_vocab()),
        ("target", vocabs.target.len(), config.target_vocab()),
    ] {
        if tokens != expected {
            let problem = format!("{side} has {tokens} tokens, {CONFIG_FILE} says {expected}");
            return Err(CheckpointError::format(&vocab_path, problem));
        }
    }
    let path = folder.join(MODEL_FILE);
    fill(model.params_mut(), &safetensors::load(&path)?, "", &path)?;
    Ok(Loaded { model, vocabs })
}

/// Reads `vocab.json`.
///
/// # Errors
/// [`CheckpointError`] when it is missing or malformed.
pub fn load_vocabs(folder: &Path) -> Result<Vocabs, CheckpointError> {
    let path = folder.join(VOCAB_FILE);
    let lists: VocabFile = read_json(&path)?;
    let parse = |list| Vocab::from_list(list).map_err(|e| CheckpointError::format(&path, e.to_string()));
    Ok(Vocabs { source: parse(lists.source)?, target: parse(lists.target)? })
}

/// All tensors of a store, to write.
pub(crate) fn tensor_refs(params: &ParamStore) -> Vec<TensorRef<'_>> {
    let tensor = |id| TensorRef { name: params.name(id), shape: params.shape(id), data: params.get(id) };
    params.ids().map(tensor).collect()
}

/// Fills a store from the tensors called `prefix` + name; every one of the store's must be there, and
/// without a prefix no other.
pub(crate) fn fill(
    params: &mut ParamStore,
    contents: &Contents,
    prefix: &str,
    path: &Path,
) -> Result<(), CheckpointError> {
    for id in params.ids() {
        let name = format!("{prefix}{}", params.name(id));
        let expected = params.shape(id);
        let tensor = contents.get(&name).ok_or_else(|| {
            CheckpointError::tensor(
                path,
                &name,
                format!("is missing; the model needs it with shape {expected:?}"),
            )
        })?;
        if tensor.shape != expected {
            let problem = format!("has shape {:?}, the model needs {expected:?}", tensor.shape);
            return Err(CheckpointError::tensor(path, &name, problem));
        }
        params.get_mut(id).copy_from_slice(&tensor.data);
    }
    let extra = contents.tensors.iter().find(|t| params.find(&t.name).is_none());
    if let Some(extra) = extra.filter(|_| prefix.is_empty()) {
        let problem = format!("(shape {:?}) belongs to no parameter of this model", extra.shape);
        return Err(CheckpointError::tensor(path, &extra.name, problem));
    }
    Ok(())
}

pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), CheckpointError> {
    let mut text =
        serde_json::to_string_pretty(value).map_err(|e| CheckpointError::format(path, e.to_string()))?;
    text.push('\n');
    write_atomically(path, text.as_bytes())
}

pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, CheckpointError> {
    serde_json::from_slice(&read(path)?).map_err(|e| CheckpointError::format(path, e.to_string()))
}
