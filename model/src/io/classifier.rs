//! A classifier as a folder: `config.json`, `vocab.json`, `model.safetensors`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::config::{CONFIG_FILE, MODEL_FILE, VOCAB_FILE, fill, read_json, write_json};
use super::{CheckpointError, safetensors};
use crate::models::{Classifier, ClassifierConfig};
use crate::vocab::Vocab;

/// What a classifier reads and what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels {
    /// The tokens that it knows.
    pub tokens: Vocab,
    /// The names of the classes; the index is the class.
    pub classes: Vec<String>,
}

/// `config.json`: the model type beside the fields.
#[derive(Serialize, Deserialize)]
#[serde(tag = "model_type")]
enum ConfigFile {
    #[serde(rename = "classifier")]
    Classifier(ClassifierConfig),
}

/// `vocab.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VocabFile {
    tokens: Vec<String>,
    classes: Vec<String>,
}

/// Writes `config.json` and `vocab.json` into `folder`.
///
/// # Errors
/// [`CheckpointError::Io`] when a file cannot be written.
pub fn save_config(folder: &Path, config: &ClassifierConfig, labels: &Labels) -> Result<(), CheckpointError> {
    write_json(&folder.join(CONFIG_FILE), &ConfigFile::Classifier(config.clone()))?;
    let file = VocabFile { tokens: labels.tokens.tokens().to_vec(), classes: labels.classes.clone() };
    write_json(&folder.join(VOCAB_FILE), &file)
}

/// Reads a whole model.
///
/// # Errors
/// [`CheckpointError`] names the file and, for a tensor that is missing, left over or of another shape, the tensor.
pub fn load(folder: &Path) -> Result<(Classifier, Labels), CheckpointError> {
    let (config, vocab) = (folder.join(CONFIG_FILE), folder.join(VOCAB_FILE));
    let ConfigFile::Classifier(options) = read_json(&config)?;
    let mut model =
        Classifier::new(&options, 0).map_err(|e| CheckpointError::format(&config, e.to_string()))?;
    let VocabFile { tokens, classes } = read_json(&vocab)?;
    let tokens = Vocab::from_list(tokens).map_err(|e| CheckpointError::format(&vocab, e.to_string()))?;
    for (what, found, expected) in
        [("tokens", tokens.len(), options.vocab), ("classes", classes.len(), options.classes)]
    {
        if found != expected {
            let problem = format!("has {found} {what}, {} says {expected}", config.display());
            return Err(CheckpointError::format(&vocab, problem));
        }
    }
    let path = folder.join(MODEL_FILE);
    fill(model.params_mut(), &safetensors::load(&path)?, "", &path)?;
    Ok((model, Labels { tokens, classes }))
}

#[cfg(test)]
mod tests {
    use kavanam_kernels::{Context, Isa};

    use super::super::config::save_weights;
    use super::super::tests::TestFolder;
    use super::*;
    use crate::models::{CellKind, ClassifierEncoder, Pooling};

    fn configs() -> [ClassifierConfig; 3] {
        let recurrent = |cell, projection| ClassifierEncoder::Recurrent {
            cell,
            hidden: 5,
            projection,
            layers: 1,
            bidirectional: true,
        };
        let (plain, projected) = (recurrent(CellKind::Gru, None), recurrent(CellKind::Lstm, Some(3)));
        let transformer =
            ClassifierEncoder::Transformer { heads: 2, feed_forward: 6, layers: 1, max_positions: 8 };
        let all = [(plain, Pooling::Last), (projected, Pooling::Last), (transformer, Pooling::Mean)];
        all.map(|(encoder, pooling)| ClassifierConfig {
            vocab: 6,
            classes: 3,
            embedding: 4,
            encoder,
            pooling,
            dropout: 0.0,
        })
    }

    fn labels() -> Labels {
        Labels { tokens: Vocab::new(["a", "b"]).unwrap(), classes: ["x", "y", "z"].map(String::from).into() }
    }

    #[test]
    fn a_saved_classifier_loads_with_the_same_bits() {
        let ctx = Context::with_isa(Isa::best());
        for (i, config) in configs().iter().enumerate() {
            let folder = TestFolder::new(&format!("classifier-{i}"));
            let model = Classifier::new(config, 7).unwrap();
            save_config(&folder.0, config, &labels()).unwrap();
            save_weights(&folder.0, model.params()).unwrap();
            let (loaded, read) = load(&folder.0).unwrap();
            assert_eq!((loaded.config(), &read), (config, &labels()));
            let said = |model: &Classifier| model.predict(&ctx, &[4, 5, 3], &[3]).unwrap();
            assert_eq!(said(&loaded), said(&model));
        }
    }

    #[test]
    fn files_that_disagree_are_named() {
        let folder = TestFolder::new("classifier-classes");
        let [config, ..] = configs();
        let fewer = Labels { classes: vec!["x".to_owned()], ..labels() };
        save_config(&folder.0, &config, &fewer).unwrap();
        let error = load(&folder.0).unwrap_err().to_string();
        assert!(error.contains(VOCAB_FILE) && error.contains("has 1 classes"), "{error}");
    }
}
