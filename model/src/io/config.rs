//! A trained model as a folder: `config.json`, `vocab.json`, `model.safetensors`.

use std::fs;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::safetensors::{self, Contents, TensorRef};
use super::{CheckpointError, read, write_atomically};
use crate::error::ModelError;
use crate::models::{ModelConfig, Seq2Seq};
use crate::param::ParamStore;
use crate::vocab::{EOS, Vocab, VocabError};

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
    /// Whether the encoder reads [`EOS`] after the last token of every source, as some published models do.
    pub source_ends_with_eos: bool,
}

impl Vocabs {
    /// The lists of a model whose sources end with their last token, as this project trains them.
    pub fn new(source: Vocab, target: Vocab) -> Vocabs {
        Vocabs { source, target, source_ends_with_eos: false }
    }

    /// What the encoder reads for a source of these tokens.
    ///
    /// # Errors
    /// [`VocabError::Unknown`] names the first token that the source vocabulary lacks.
    pub fn encode_source<'a>(
        &self,
        tokens: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<u32>, VocabError> {
        let mut ids = self.source.encode(tokens)?;
        if self.source_ends_with_eos {
            ids.push(EOS);
        }
        Ok(ids)
    }
}

/// `vocab.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VocabFile {
    source: Vec<String>,
    target: Vec<String>,
    #[serde(default, skip_serializing_if = "is_false")]
    source_ends_with_eos: bool,
}

fn is_false(flag: &bool) -> bool {
    !flag
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
    let vocabs = VocabFile {
        source: vocabs.source.tokens().to_vec(),
        target: vocabs.target.tokens().to_vec(),
        source_ends_with_eos: vocabs.source_ends_with_eos,
    };
    write_json(&folder.join(VOCAB_FILE), &vocabs)
}

/// Writes a whole model into `folder`, which appears complete or not at all.
///
/// # Errors
/// [`CheckpointError::Format`] when something of that name exists, [`CheckpointError::Io`] when it cannot be written.
pub fn save_new(folder: &Path, model: &dyn Seq2Seq, vocabs: &Vocabs) -> Result<(), CheckpointError> {
    if folder.symlink_metadata().is_ok() {
        return Err(CheckpointError::format(folder, "already exists; give another folder, or remove it"));
    }
    let mut name = folder.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = folder.with_file_name(name);
    let written = fs::create_dir_all(&temporary)
        .map_err(CheckpointError::io("create", &temporary))
        .and_then(|()| save_config(&temporary, &model.config(), vocabs))
        .and_then(|()| save_weights(&temporary, model.params()))
        .and_then(|()| fs::rename(&temporary, folder).map_err(CheckpointError::io("write", folder)));
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_dir_all(&temporary);
    }
    written
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
    let (config, vocabs) = load_config(&folder.join(CONFIG_FILE), &folder.join(VOCAB_FILE))?;
    let refused = |e: ModelError| CheckpointError::format(&folder.join(CONFIG_FILE), e.to_string());
    let mut model = config.build(0).map_err(refused)?;
    let path = folder.join(MODEL_FILE);
    fill(model.params_mut(), &safetensors::load(&path)?, "", &path)?;
    Ok(Loaded { model, vocabs })
}

/// Reads a `config.json` and the `vocab.json` that goes with it.
///
/// # Errors
/// [`CheckpointError`] when one is missing or malformed, or when they speak of different numbers of tokens.
pub fn load_config(config: &Path, vocab: &Path) -> Result<(ModelConfig, Vocabs), CheckpointError> {
    let model: ModelConfig = read_json(config)?;
    model.validate().map_err(|e| CheckpointError::format(config, e.to_string()))?;
    let vocabs = load_vocabs(vocab)?;
    for (side, tokens, expected) in [
        ("source", vocabs.source.len(), model.source_vocab()),
        ("target", vocabs.target.len(), model.target_vocab()),
    ] {
        if tokens != expected {
            let problem = format!("{side} has {tokens} tokens, {} says {expected}", config.display());
            return Err(CheckpointError::format(vocab, problem));
        }
    }
    Ok((model, vocabs))
}

fn load_vocabs(path: &Path) -> Result<Vocabs, CheckpointError> {
    let lists: VocabFile = read_json(path)?;
    let parse = |list| Vocab::from_list(list).map_err(|e| CheckpointError::format(path, e.to_string()));
    let (source, target) = (parse(lists.source)?, parse(lists.target)?);
    Ok(Vocabs { source, target, source_ends_with_eos: lists.source_ends_with_eos })
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

#[cfg(test)]
mod tests {
    use super::super::tests::TestFolder;
    use super::*;
    use crate::models::{AttentionKind, CellKind, RnnSeq2Seq, RnnSeq2SeqConfig};

    fn tiny() -> (RnnSeq2Seq, Vocabs) {
        let vocab = || Vocab::new(["a", "b"]).unwrap();
        let mut config = RnnSeq2SeqConfig::new(6, 6, CellKind::Gru, AttentionKind::None);
        (config.embedding, config.hidden, config.encoder_hidden) = (3, 4, 4);
        (RnnSeq2Seq::new(&config, 1).unwrap(), Vocabs::new(vocab(), vocab()))
    }

    #[test]
    fn a_source_ends_as_vocab_json_says() {
        let folder = TestFolder::new("vocabs");
        let (model, mut vocabs) = tiny();
        for ends in [false, true] {
            vocabs.source_ends_with_eos = ends;
            let path = folder.0.join(format!("{ends}"));
            save_new(&path, &model, &vocabs).unwrap();
            let json = fs::read_to_string(path.join(VOCAB_FILE)).unwrap();
            assert_eq!(json.contains("source_ends_with_eos"), ends, "files of old stay as they were");
            let loaded = load_model(&path).unwrap();
            assert_eq!(loaded.vocabs, vocabs);
            assert_eq!(loaded.model.params().values(), model.params().values());
            let ids = loaded.vocabs.encode_source(["b", "a"]).unwrap();
            assert_eq!(ids, if ends { vec![5, 4, EOS] } else { vec![5, 4] });
            assert!(vocabs.encode_source(["c"]).is_err());
        }
    }

    #[test]
    fn a_new_model_replaces_nothing_and_leaves_no_fragment() {
        let folder = TestFolder::new("save-new");
        let (model, vocabs) = tiny();
        let path = folder.0.join("deep").join("model");
        save_new(&path, &model, &vocabs).unwrap();
        let error = save_new(&path, &model, &vocabs).unwrap_err().to_string();
        assert!(error.contains("model: already exists"), "{error}");
        let error = save_new(&path.join(CONFIG_FILE).join("x"), &model, &vocabs).unwrap_err().to_string();
        assert!(error.contains("cannot create"), "{error}");
        assert_eq!(fs::read_dir(folder.0.join("deep")).unwrap().count(), 1);
    }
}
