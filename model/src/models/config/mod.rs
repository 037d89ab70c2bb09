//! [`ModelConfig`]: what config.json holds, checked, with exact parameter counts before anything is built.

mod char_lm;
mod classifier;
mod rnn;
mod transformer;

pub use char_lm::CharLmConfig;
pub use classifier::{ClassifierConfig, ClassifierEncoder, Pooling};
pub use rnn::{AttentionKind, Bridge, CellKind, ContextTo, Implementation, RnnSeq2SeqConfig};
pub use transformer::{DropoutRates, FeedForwardActivation, NormPlacement, Positions, TransformerConfig};

use serde::{Deserialize, Serialize};

use crate::error::ModelError;

/// The configuration of any model family, told apart in JSON by `model_type`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "model_type")]
pub enum ModelConfig {
    /// `"transformer"`: encoder and decoder of self-attention.
    #[serde(rename = "transformer")]
    Transformer(TransformerConfig),
    /// `"rnn_seq2seq"`: recurrent encoder and decoder, with or without attention.
    #[serde(rename = "rnn_seq2seq")]
    RnnSeq2Seq(RnnSeq2SeqConfig),
}

impl ModelConfig {
    /// The word in JSON.
    pub fn model_type(&self) -> &'static str {
        match self {
            ModelConfig::Transformer(_) => "transformer",
            ModelConfig::RnnSeq2Seq(_) => "rnn_seq2seq",
        }
    }

    /// How many numbers the model will hold, without building it.
    pub fn parameter_count(&self) -> usize {
        match self {
            ModelConfig::Transformer(config) => config.parameter_count(),
            ModelConfig::RnnSeq2Seq(config) => config.parameter_count(),
        }
    }

    /// The number of source tokens it knows.
    pub fn source_vocab(&self) -> usize {
        match self {
            ModelConfig::Transformer(config) => config.source_vocab,
            ModelConfig::RnnSeq2Seq(config) => config.source_vocab,
        }
    }

    /// The number of target tokens it knows.
    pub fn target_vocab(&self) -> usize {
        match self {
            ModelConfig::Transformer(config) => config.target_vocab,
            ModelConfig::RnnSeq2Seq(config) => config.target_vocab,
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the first field that no model can be built from.
    pub fn validate(&self) -> Result<(), ModelError> {
        match self {
            ModelConfig::Transformer(config) => config.validate(),
            ModelConfig::RnnSeq2Seq(config) => config.validate(),
        }
    }
}

pub(crate) fn wrong(field: &'static str, value: impl ToString, expected: String) -> ModelError {
    ModelError::Config { field, value: value.to_string(), expected }
}

pub(super) fn positive(field: &'static str, value: usize) -> Result<(), ModelError> {
    if value == 0 { Err(wrong(field, value, "at least 1".to_owned())) } else { Ok(()) }
}

pub(super) fn rate(field: &'static str, value: f32) -> Result<(), ModelError> {
    if (0.0..1.0).contains(&value) { Ok(()) } else { Err(wrong(field, value, "in [0, 1)".to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both() -> [ModelConfig; 2] {
        [
            ModelConfig::Transformer(TransformerConfig::new(30, 40)),
            ModelConfig::RnnSeq2Seq(RnnSeq2SeqConfig::new(30, 40, CellKind::Gru, AttentionKind::Additive)),
        ]
    }

    #[test]
    fn json_carries_the_model_type_and_reads_back() {
        for config in both() {
            config.validate().unwrap();
            let json = serde_json::to_string(&config).unwrap();
            assert!(json.contains(&format!("\"model_type\":\"{}\"", config.model_type())), "{json}");
            assert_eq!(serde_json::from_str::<ModelConfig>(&json).unwrap(), config);
            let misspelt = json.replace("\"dropout\"", "\"dropuot\"");
            assert!(serde_json::from_str::<ModelConfig>(&misspelt).is_err());
        }
    }

    #[test]
    fn impossible_projections_name_the_field() {
        let base = RnnSeq2SeqConfig::new(30, 40, CellKind::Lstm, AttentionKind::Additive);
        let json = |config: &RnnSeq2SeqConfig| serde_json::to_string(config).unwrap();
        assert!(!json(&base).contains("projection"), "files without one stay as they were");
        let refused = |change: &dyn Fn(&mut RnnSeq2SeqConfig), start: &str| {
            let mut changed = base.clone();
            (changed.projection, changed.encoder_projection) = (Some(64), Some(32));
            changed.validate().unwrap();
            assert_eq!(serde_json::from_str::<RnnSeq2SeqConfig>(&json(&changed)).unwrap(), changed);
            change(&mut changed);
            let error = changed.validate().unwrap_err().to_string();
            assert!(error.starts_with(start), "{error}");
        };
        refused(&|c| c.projection = Some(256), "config: projection is 256, expected less than hidden, 256");
        refused(&|c| c.projection = Some(0), "config: projection is 0");
        refused(&|c| c.encoder_projection = Some(128), "config: encoder_projection is 128");
        refused(&|c| c.cell = CellKind::Gru, "config: projection is 64, expected none but for an LSTM");
        let naive = |c: &mut RnnSeq2SeqConfig| {
            (c.attention, c.implementation) = (AttentionKind::None, Implementation::Naive);
        };
        refused(&naive, "config: projection is 64, expected none with the implementation naive");
        let dot = |c: &mut RnnSeq2SeqConfig| {
            (c.attention, c.projection) = (AttentionKind::Dot, Some(63));
        };
        refused(&dot, "config: projection is 63, expected 64 as the annotation");
        // Copied, both parts of the state must agree: h 2·32 = 64, c 2·128 = 256.
        refused(
            &|c| (c.bridge, c.projection) = (Bridge::Copy, Some(63)),
            "config: projection is 63, expected 64",
        );
        refused(&|c| (c.bridge, c.hidden) = (Bridge::Copy, 255), "config: hidden is 255, expected 256");
    }

    #[test]
    fn a_configuration_from_before_deep_stacks_reads_as_it_was() {
        let config =
            ModelConfig::RnnSeq2Seq(RnnSeq2SeqConfig::new(30, 40, CellKind::Lstm, AttentionKind::Additive));
        let mut json = serde_json::to_value(&config).unwrap();
        for field in ["only_first_bidirectional", "residual", "context", "implementation"] {
            assert!(json.as_object_mut().unwrap().remove(field).is_some(), "{field}");
        }
        assert_eq!(serde_json::from_value::<ModelConfig>(json).unwrap(), config);
    }

    #[test]
    fn impossible_configurations_name_the_field() {
        let mut t = TransformerConfig::new(30, 40);
        t.heads = 3;
        assert!(t.validate().unwrap_err().to_string().starts_with("config: width is 128"));
        t.heads = 4;
        t.share_embeddings = true;
        assert!(t.validate().is_err());
        let mut r = RnnSeq2SeqConfig::new(30, 40, CellKind::Lstm, AttentionKind::None);
        r.bidirectional = true;
        assert!(r.validate().unwrap_err().to_string().contains("hidden"));
        r.dropout = 1.0;
        r.bridge = Bridge::Tanh;
        assert!(r.validate().unwrap_err().to_string().contains("dropout"));
        let scan = RnnSeq2SeqConfig::new(30, 40, CellKind::MinGru, AttentionKind::Additive);
        assert!(scan.validate().unwrap_err().to_string().starts_with("config: attention is additive"));
        for (cell, attention) in
            [(CellKind::Tanh, AttentionKind::None), (CellKind::Lstm, AttentionKind::Additive)]
        {
            let mut naive = RnnSeq2SeqConfig::new(30, 40, cell, attention);
            naive.implementation = Implementation::Naive;
            assert!(naive.validate().unwrap_err().to_string().starts_with("config: implementation is naive"));
        }
        let gnmt = RnnSeq2SeqConfig::gnmt(30, 40);
        gnmt.validate().unwrap();
        let refused = |change: &dyn Fn(&mut RnnSeq2SeqConfig), start: &str| {
            let mut changed = gnmt.clone();
            change(&mut changed);
            let error = changed.validate().unwrap_err().to_string();
            assert!(error.starts_with(start), "{error}");
        };
        refused(&|c| c.bidirectional = false, "config: only_first_bidirectional is true");
        refused(&|c| c.attention = AttentionKind::Dot, "config: context is all");
        // Its bottom layer gives twice what the others give: no one width can copy them.
        refused(&|c| c.bridge = Bridge::Copy, "config: hidden is 256, expected 512");
    }
}
