//! What is trained, how: the models of a comparison at equal parameters, and the trainer's settings.
//!
//! The figures that chose each number stand in `docs/decisions/005-g2p-recipe.md`.

use kavanam_model::models::{
    AttentionKind, Bridge, CellKind, ContextTo, DropoutRates, Implementation, RnnSeq2SeqConfig,
    TransformerConfig,
};
use kavanam_model::train::{Decay, Schedule, TrainerConfig};
use kavanam_model::{ModelConfig, ModelError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::HarnessError;

/// How far a model's parameter count may be from the transformer's.
pub(crate) const TOLERANCE: f64 = 0.05;
/// Longest sequence of any model here; the sweep's longest.
const MAX_POSITIONS: usize = 520;

/// The size of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Preset {
    /// About 3 minutes
    Quick,
    /// At most 40 minutes
    Full,
}

/// The model families that are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Family {
    /// LSTM encoder–decoder through one fixed vector
    RnnFixed,
    /// The same model, computed step by step and gate by gate: what the fast layers are worth
    RnnNaive,
    /// Recurrent encoder–decoder with additive attention
    #[value(alias = "rnn")]
    RnnAttention,
    /// Transformer encoder–decoder
    Transformer,
}

impl Family {
    /// Those that are compared, in the order of the field's history, which is the order of training.
    pub(crate) const ALL: [Family; 3] = [Family::RnnFixed, Family::RnnAttention, Family::Transformer];

    /// The short name in tables, files and flags.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Family::RnnFixed => "rnn-fixed",
            Family::RnnNaive => "rnn-naive",
            Family::RnnAttention => "rnn-attention",
            Family::Transformer => "transformer",
        }
    }
}

/// One model and how it is trained.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Recipe {
    /// What it is, in words.
    pub(crate) description: String,
    /// The model.
    pub(crate) model: ModelConfig,
    /// The trainer, but for the number of steps.
    pub(crate) trainer: TrainerConfig,
}

impl Recipe {
    /// The recipe of a family for source and target vocabularies of those sizes.
    pub(crate) fn new(preset: Preset, family: Family, vocabs: (usize, usize), seed: u64) -> Recipe {
        let transformer = transformer(preset, vocabs);
        let target = transformer.parameter_count();
        let model = match family {
            Family::Transformer => ModelConfig::Transformer(transformer),
            Family::RnnAttention => nearest(target, |hidden| rnn_attention(preset, vocabs, hidden)),
            Family::RnnFixed => nearest(target, |hidden| rnn_fixed(preset, vocabs, hidden)),
            Family::RnnNaive => naive(nearest(target, |hidden| rnn_fixed(preset, vocabs, hidden))),
        };
        let peak_lr = if family == Family::Transformer { 2e-3 } else { 6e-3 };
        let (batch_tokens, warmup_steps, label_smoothing) = match preset {
            Preset::Quick => (1536, 100, 0.0),
            Preset::Full => (2048, 1500, 0.1),
        };
        let schedule =
            Schedule { peak_lr, warmup_steps, decay: Decay::InverseSqrt, total_steps: None, cooldown: 0.6 };
        let trainer = TrainerConfig {
            seed,
            batch_tokens,
            grad_shards: 2,
            label_smoothing,
            clip_norm: 1.0,
            beta1: 0.9,
            beta2: 0.98,
            epsilon: 1e-9,
            weight_decay: 0.01,
            schedule,
        };
        Recipe { description: describe(&model), model, trainer }
    }

    /// Changes fields of the model's configuration, named as in config.json.
    ///
    /// # Errors
    /// [`HarnessError::Usage`] when a field does not exist or its value cannot be.
    pub(crate) fn change_model(&mut self, changes: &Map<String, Value>) -> Result<(), HarnessError> {
        self.model = changed(&self.model, changes, ModelConfig::validate)?;
        self.description = describe(&self.model);
        Ok(())
    }
}

/// A model's configuration with some fields changed, named as in config.json, and checked.
///
/// # Errors
/// [`HarnessError::Usage`] when a field does not exist or its value cannot be.
pub(crate) fn changed<C: Serialize + DeserializeOwned>(
    model: &C,
    changes: &Map<String, Value>,
    validate: impl FnOnce(&C) -> Result<(), ModelError>,
) -> Result<C, HarnessError> {
    let wrong = |error: String| HarnessError::Usage(format!("--config: {error}"));
    let mut value = serde_json::to_value(model).map_err(|e| wrong(e.to_string()))?;
    for (field, new) in changes {
        match value.get_mut(field) {
            Some(old) => *old = new.clone(),
            None => return Err(wrong(format!("the model has no field {field:?}"))),
        }
    }
    let model = serde_json::from_value(value).map_err(|e| wrong(e.to_string()))?;
    validate(&model).map_err(|e| wrong(e.to_string()))?;
    Ok(model)
}

fn transformer(preset: Preset, (source, target): (usize, usize)) -> TransformerConfig {
    let base = TransformerConfig::new(source, target);
    let max_positions = MAX_POSITIONS;
    match preset {
        Preset::Quick => TransformerConfig {
            width: 96,
            heads: 4,
            feed_forward: 384,
            encoder_layers: 2,
            decoder_layers: 2,
            max_positions,
            dropout: DropoutRates::uniform(0.0),
            ..base
        },
        Preset::Full => TransformerConfig {
            width: 128,
            heads: 4,
            feed_forward: 512,
            encoder_layers: 2,
            decoder_layers: 2,
            max_positions,
            dropout: DropoutRates::uniform(0.05),
            ..base
        },
    }
}

fn rnn_attention(preset: Preset, (source, target): (usize, usize), hidden: usize) -> ModelConfig {
    let base = RnnSeq2SeqConfig::new(source, target, CellKind::Lstm, AttentionKind::Additive);
    ModelConfig::RnnSeq2Seq(RnnSeq2SeqConfig {
        embedding: 64,
        hidden,
        encoder_hidden: hidden / 2,
        attention_width: hidden / 2,
        readout: hidden / 2,
        dropout: match preset {
            Preset::Quick => 0.0,
            Preset::Full => 0.05,
        },
        ..base
    })
}

fn rnn_fixed(preset: Preset, (source, target): (usize, usize), hidden: usize) -> ModelConfig {
    let base = RnnSeq2SeqConfig::new(source, target, CellKind::Lstm, AttentionKind::None);
    ModelConfig::RnnSeq2Seq(RnnSeq2SeqConfig {
        embedding: 64,
        hidden,
        encoder_hidden: hidden,
        bridge: Bridge::Copy,
        dropout: match preset {
            Preset::Quick => 0.0,
            Preset::Full => 0.05,
        },
        ..base
    })
}

/// The same model by naive layers.
fn naive(model: ModelConfig) -> ModelConfig {
    match model {
        ModelConfig::RnnSeq2Seq(config) => {
            ModelConfig::RnnSeq2Seq(RnnSeq2SeqConfig { implementation: Implementation::Naive, ..config })
        }
        other => other,
    }
}

/// The model whose parameter count is nearest to `target`, over widths that fill whole vectors.
fn nearest(target: usize, model: impl Fn(usize) -> ModelConfig) -> ModelConfig {
    (16..=1024)
        .step_by(16)
        .map(model)
        .min_by_key(|m| m.parameter_count().abs_diff(target))
        .expect("the range of widths is not empty")
}

/// As papers write it.
pub(crate) fn cell_name(cell: CellKind) -> &'static str {
    match cell {
        CellKind::Lstm => "LSTM",
        CellKind::LstmPeephole => "LSTM with peepholes",
        CellKind::Gru => "GRU",
        CellKind::GruResetBefore => "GRU (reset before the product)",
        CellKind::Tanh => "tanh RNN",
        CellKind::Relu => "ReLU RNN",
        CellKind::MinGru => "minGRU",
        CellKind::MinLstm => "minLSTM",
    }
}

/// One line on the architecture.
pub(crate) fn describe(model: &ModelConfig) -> String {
    match model {
        ModelConfig::Transformer(c) => format!(
            "transformer, width {}, {} heads, feed-forward {}, {} + {} layers",
            c.width, c.heads, c.feed_forward, c.encoder_layers, c.decoder_layers
        ),
        ModelConfig::RnnSeq2Seq(c) => {
            let cell = cell_name(c.cell);
            let direction = match (c.bidirectional, c.only_first_bidirectional && c.layers > 1) {
                (false, _) => "forward",
                (true, false) => "bidirectional",
                (true, true) => "bidirectional at the bottom",
            };
            let attention = match c.attention {
                AttentionKind::None => "through one fixed vector",
                AttentionKind::Additive => "additive attention",
                AttentionKind::Dot => "dot attention",
            };
            let context = match c.context {
                ContextTo::Bottom => "",
                ContextTo::All => " to all layers",
            };
            let computed = match c.implementation {
                Implementation::Fast => "",
                Implementation::Naive => ", computed naively",
            };
            let projected = c.projection.map_or(String::new(), |width| format!(" projected to {width}"));
            let residual = if c.is_residual(c.layers - 1) { "residual " } else { "" };
            format!(
                "{cell} encoder ({direction}, {}) and decoder ({}{projected}), {} + {} {residual}layers, {attention}{context}{computed}",
                c.annotation(),
                c.hidden,
                c.layers,
                c.layers
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_of_a_comparison_have_equal_parameters() {
        for preset in [Preset::Quick, Preset::Full] {
            let counts = Family::ALL.map(|family| {
                let recipe = Recipe::new(preset, family, (30, 43), 1);
                recipe.model.validate().unwrap();
                recipe.model.parameter_count() as f64
            });
            for (family, count) in Family::ALL.iter().zip(counts) {
                let ratio = count / counts[2];
                assert!((ratio - 1.0).abs() <= TOLERANCE, "{preset:?} {}: {ratio}", family.name());
            }
        }
    }
}
