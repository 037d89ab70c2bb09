//! A run on disk: the model's folder with one more file, `training.safetensors`.
//!
//! That file alone holds everything a resumed run needs (weights, moments and, as metadata, how far the
//! run is), so it is consistent whatever moment the program was stopped at. It is written last.

use std::fs;
use std::path::Path;

use kavanam_kernels::memory::AlignedVec;
use serde::{Deserialize, Serialize};

use super::trainer::{Progress, Trainer, TrainerConfig};
use super::{Example, TrainError, Trainable};
use crate::io::CheckpointError;
use crate::io::config::{self, fill, tensor_refs};
use crate::io::safetensors::{self, TensorRef};

/// Weights, moments and progress of a run.
pub const TRAINING_FILE: &str = "training.safetensors";
/// The version of the metadata's layout.
const FORMAT: u32 = 1;
const MODEL: &str = "model.";
const FIRST: &str = "adam_first.";
const SECOND: &str = "adam_second.";

/// The metadata of [`TRAINING_FILE`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct State<C> {
    format: u32,
    model: C,
    trainer: TrainerConfig,
    progress: Progress,
    /// [`fingerprint`] of the examples.
    data: u64,
}

impl<M: Trainable + ?Sized> Trainer<M> {
    /// Writes the run into `folder`, which is made if need be: the model (as [`config::load_model`] reads it)
    /// and the state that [`Trainer::resume`] goes on from.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], for example when the disk is full. The last complete checkpoint stands then.
    pub fn save(&self, folder: &Path, vocabs: &M::Vocabs) -> Result<(), CheckpointError> {
        fs::create_dir_all(folder).map_err(|source| CheckpointError::Io {
            action: "create",
            path: folder.to_owned(),
            source,
        })?;
        let model = self.model().made_from();
        M::save_config(folder, &model, vocabs)?;
        config::save_weights(folder, self.model().weights())?;
        let state = State {
            format: FORMAT,
            model,
            trainer: *self.config(),
            progress: self.progress(),
            data: fingerprint(self.examples()),
        };
        let path = folder.join(TRAINING_FILE);
        let metadata = serde_json::to_string(&state)
            .map_err(|e| CheckpointError::Format { path: path.clone(), problem: e.to_string() })?;
        self.save_state(&path, metadata)
    }

    fn save_state(&self, path: &Path, metadata: String) -> Result<(), CheckpointError> {
        let params = self.model().weights();
        let parts =
            [(MODEL, params.values()), (FIRST, &self.moments.first[..]), (SECOND, &self.moments.second[..])];
        let mut named = Vec::with_capacity(3 * params.len());
        for (prefix, values) in parts {
            for (id, tensor) in params.ids().zip(tensor_refs(params)) {
                named.push((format!("{prefix}{}", tensor.name), tensor.shape, &values[params.range(id)]));
            }
        }
        let tensors: Vec<TensorRef<'_>> =
            named.iter().map(|(name, shape, data)| TensorRef { name, shape, data }).collect();
        safetensors::save(path, &tensors, Some(metadata))
    }

    /// The run that [`Trainer::save`] wrote into `folder`; its next step is the one that the uninterrupted run
    /// would have taken, bit for bit.
    ///
    /// # Errors
    /// [`CheckpointError`] when the file is missing, cut off, foreign, or of a run over other examples.
    pub fn resume(folder: &Path, examples: Vec<Example>) -> Result<Trainer<M>, TrainError> {
        let path = folder.join(TRAINING_FILE);
        let contents = safetensors::load(&path)?;
        let wrong = |problem: String| CheckpointError::Format { path: path.clone(), problem };
        let metadata = contents
            .metadata
            .as_deref()
            .ok_or_else(|| wrong("this is not the state of a training run".to_owned()))?;
        let state: State<M::Config> = serde_json::from_str(metadata).map_err(|e| wrong(e.to_string()))?;
        if state.format != FORMAT {
            let problem = format!("format {}, this program reads format {FORMAT}", state.format);
            return Err(wrong(problem).into());
        }
        if state.data != fingerprint(&examples) {
            return Err(wrong("the run was over other training examples".to_owned()).into());
        }
        let model = M::build(&state.model, 0)?;
        let mut trainer = Trainer::new(model, examples, state.trainer)?;
        // Moments have the layout of the parameters: they pass through the store, the weights last.
        for (prefix, target) in [(FIRST, 0), (SECOND, 1), (MODEL, 2)] {
            fill(trainer.model_mut().weights_mut(), &contents, prefix, &path)?;
            let values = AlignedVec::from(trainer.model().weights().values());
            match target {
                0 => trainer.moments.first = values,
                1 => trainer.moments.second = values,
                _ => {}
            }
        }
        trainer.restore(state.progress);
        Ok(trainer)
    }
}

/// Whether `folder` holds a run that can be resumed.
pub fn exists(folder: &Path) -> bool {
    folder.join(TRAINING_FILE).is_file()
}

/// A hash of all examples in order: FNV-1a over lengths and ids.
fn fingerprint(examples: &[Example]) -> u64 {
    let mut hash = 0xCBF2_9CE4_8422_2325u64;
    let mut mix = |x: u64| hash = (hash ^ x).wrapping_mul(0x0000_0100_0000_01B3);
    for example in examples {
        for side in [&example.source, &example.target] {
            mix(side.len() as u64);
            side.iter().for_each(|&id| mix(u64::from(id)));
        }
    }
    hash
}
