//! [`Trainable`]: what the trainer and its checkpoints need of a model.

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Example;
use crate::error::ModelError;
use crate::io::CheckpointError;
use crate::io::config::{self, Vocabs};
use crate::models::{Batch, LossOptions, ModelConfig, Seq2Seq};
use crate::param::ParamStore;
use crate::tape::{Tape, Var};

/// A model that a [`super::Trainer`] can train, save and resume.
pub trait Trainable: Send + Sync {
    /// What `config.json` holds, without the model's type.
    type Config: Serialize + DeserializeOwned;
    /// What `vocab.json` holds.
    type Vocabs;

    /// A new model, its weights initialised from `seed`.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the first field that no model can be built from.
    fn build(config: &Self::Config, seed: u64) -> Result<Box<Self>, ModelError>;

    /// What the model was built from.
    fn made_from(&self) -> Self::Config;

    /// The weights.
    fn weights(&self) -> &ParamStore;

    /// The weights, to load or to step.
    fn weights_mut(&mut self) -> &mut ParamStore;

    /// How many tokens of the example the loss is summed over.
    fn loss_tokens(example: &Example) -> usize;

    /// The loss **summed** over those tokens of all the examples: the trainer divides.
    ///
    /// # Errors
    /// [`ModelError`] when the model refuses an example.
    fn examples_loss(
        &self,
        tape: &mut Tape<'_>,
        examples: &[&Example],
        options: &LossOptions,
    ) -> Result<Var, ModelError>;

    /// Writes `config.json` and `vocab.json` into `folder`.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] when a file cannot be written.
    fn save_config(
        folder: &Path,
        config: &Self::Config,
        vocabs: &Self::Vocabs,
    ) -> Result<(), CheckpointError>;
}

impl Trainable for dyn Seq2Seq {
    type Config = ModelConfig;
    type Vocabs = Vocabs;

    fn build(config: &ModelConfig, seed: u64) -> Result<Box<dyn Seq2Seq>, ModelError> {
        config.build(seed)
    }

    fn made_from(&self) -> ModelConfig {
        self.config()
    }

    fn weights(&self) -> &ParamStore {
        self.params()
    }

    fn weights_mut(&mut self) -> &mut ParamStore {
        self.params_mut()
    }

    fn loss_tokens(example: &Example) -> usize {
        example.target.len() + 1
    }

    fn examples_loss(
        &self,
        tape: &mut Tape<'_>,
        examples: &[&Example],
        options: &LossOptions,
    ) -> Result<Var, ModelError> {
        let pairs: Vec<(&[u32], &[u32])> = examples.iter().map(|e| (&*e.source, &*e.target)).collect();
        self.loss(tape, &Batch::from_pairs(&pairs)?, options)
    }

    fn save_config(folder: &Path, config: &ModelConfig, vocabs: &Vocabs) -> Result<(), CheckpointError> {
        config::save_config(folder, config, vocabs)
    }
}
