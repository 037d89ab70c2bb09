//! [`ModelConfig`]: what config.json holds, checked, with exact parameter counts before anything is built.

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

/// Where layer normalisation stands in a residual block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormPlacement {
    /// `x + f(norm(x))`: trains without warm-up (Xiong et al. 2020).
    Pre,
    /// `norm(x + f(x))`: the paper's.
    Post,
}

/// How a transformer knows where a token stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// A trained table of `max_positions` rows for each stack.
    Learned,
    /// Sine and cosine, interleaved (Vaswani et al. 2017, section 3.5).
    Sinusoidal,
}

/// The function between the two matrices of a feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeedForwardActivation {
    /// max(0, x).
    Relu,
    /// x·Φ(x), by the error function.
    Gelu,
}

/// The share of values that training sets to 0, for each place.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DropoutRates {
    /// Of the sum of token and position embedding.
    pub embedding: f32,
    /// Of an attention block's output, before it joins the residual stream.
    pub attention: f32,
    /// Of a feed-forward block: after its activation, and of its output.
    pub feed_forward: f32,
}

impl DropoutRates {
    /// The same rate everywhere.
    pub fn uniform(rate: f32) -> DropoutRates {
        DropoutRates { embedding: rate, attention: rate, feed_forward: rate }
    }
}

/// A transformer encoder–decoder (Vaswani et al. 2017).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransformerConfig {
    /// Source tokens, the special ones included.
    pub source_vocab: usize,
    /// Target tokens, the special ones included.
    pub target_vocab: usize,
    /// d_model: the width of the residual stream.
    pub width: usize,
    /// Attention heads; they share `width` evenly.
    pub heads: usize,
    /// The width inside of a feed-forward block.
    pub feed_forward: usize,
    /// Layers of the encoder.
    pub encoder_layers: usize,
    /// Layers of the decoder.
    pub decoder_layers: usize,
    /// The longest sequence, source or target.
    pub max_positions: usize,
    /// Where norms stand.
    pub norm: NormPlacement,
    /// Whether each stack ends with one more norm (usual with `pre`).
    pub final_norm: bool,
    /// How positions are told.
    pub positions: Positions,
    /// Whether token embeddings are multiplied by √width.
    pub scale_embeddings: bool,
    /// The feed-forward function.
    pub activation: FeedForwardActivation,
    /// Whether the output projection is the target embedding's table.
    pub tie_output: bool,
    /// Whether source and target share one embedding table (and so one vocabulary).
    pub share_embeddings: bool,
    /// ε inside of the norms' square root.
    pub norm_epsilon: f32,
    /// What training drops.
    pub dropout: DropoutRates,
}

impl TransformerConfig {
    /// A small pre-norm model: width 128, 4 heads, 3 + 3 layers, feed-forward 512, sinusoidal positions,
    /// ReLU, separate embeddings, tied output, dropout 0.1. Every field may be changed.
    pub fn new(source_vocab: usize, target_vocab: usize) -> TransformerConfig {
        TransformerConfig {
            source_vocab,
            target_vocab,
            width: 128,
            heads: 4,
            feed_forward: 512,
            encoder_layers: 3,
            decoder_layers: 3,
            max_positions: 512,
            norm: NormPlacement::Pre,
            final_norm: true,
            positions: Positions::Sinusoidal,
            scale_embeddings: true,
            activation: FeedForwardActivation::Relu,
            tie_output: true,
            share_embeddings: false,
            norm_epsilon: 1e-5,
            dropout: DropoutRates::uniform(0.1),
        }
    }

    /// The number of parameters, exactly.
    ///
    /// With d = width, f = feed_forward: an encoder layer holds 4d² + 4d (attention), 2df + f + d (feed-forward)
    /// and 2 norms of 2d; a decoder layer one attention and one norm more.
    pub fn parameter_count(&self) -> usize {
        let d = self.width;
        let norm = 2 * d;
        let attention = 4 * d * d + 4 * d;
        let feed_forward = 2 * d * self.feed_forward + self.feed_forward + d;
        let layers = self.encoder_layers * (attention + feed_forward + 2 * norm)
            + self.decoder_layers * (2 * attention + feed_forward + 3 * norm);
        let source = if self.share_embeddings { 0 } else { self.source_vocab * d };
        let embeddings = source + self.target_vocab * d;
        let positions = if self.positions == Positions::Learned { 2 * self.max_positions * d } else { 0 };
        let final_norms = if self.final_norm { 2 * norm } else { 0 };
        let output = self.target_vocab + if self.tie_output { 0 } else { self.target_vocab * d };
        embeddings + positions + layers + final_norms + output
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the first field that no model can be built from.
    pub fn validate(&self) -> Result<(), ModelError> {
        positive("source_vocab", self.source_vocab)?;
        positive("target_vocab", self.target_vocab)?;
        positive("width", self.width)?;
        positive("heads", self.heads)?;
        positive("feed_forward", self.feed_forward)?;
        positive("max_positions", self.max_positions)?;
        if !self.width.is_multiple_of(self.heads) {
            return Err(wrong("width", self.width, format!("a multiple of the {} heads", self.heads)));
        }
        if self.positions == Positions::Sinusoidal && !self.width.is_multiple_of(2) {
            return Err(wrong("width", self.width, "even with sinusoidal positions".to_owned()));
        }
        if self.share_embeddings && self.source_vocab != self.target_vocab {
            let expected = format!("{} as the shared source vocabulary", self.source_vocab);
            return Err(wrong("target_vocab", self.target_vocab, expected));
        }
        if !(self.norm_epsilon > 0.0 && self.norm_epsilon.is_finite()) {
            return Err(wrong("norm_epsilon", self.norm_epsilon, "positive".to_owned()));
        }
        rate("dropout.embedding", self.dropout.embedding)?;
        rate("dropout.attention", self.dropout.attention)?;
        rate("dropout.feed_forward", self.dropout.feed_forward)
    }
}

/// The recurrent cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CellKind {
    /// Input, forget, cell and output gate (Hochreiter and Schmidhuber 1997; forget gate by Gers et al. 2000).
    Lstm,
    /// Reset, update and new gate (Cho et al. 2014).
    Gru,
}

impl CellKind {
    /// How many blocks of `hidden` rows its weights have.
    pub fn gates(self) -> usize {
        match self {
            CellKind::Lstm => 4,
            CellKind::Gru => 3,
        }
    }

    /// How many vectors its state has: h, and c for the LSTM.
    pub fn states(self) -> usize {
        match self {
            CellKind::Lstm => 2,
            CellKind::Gru => 1,
        }
    }
}

/// How a recurrent decoder sees the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionKind {
    /// Through the encoder's final state alone (Sutskever et al. 2014, Cho et al. 2014).
    None,
    /// vᵀ·tanh(W·s + U·h), the context fed into the bottom cell (Bahdanau et al. 2015).
    Additive,
    /// sᵀ·h after the decoder's top layer (Luong et al. 2015, "dot", without input feeding).
    Dot,
}

/// How the encoder's final states become the decoder's first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bridge {
    /// As they are (both directions side by side): the widths must agree.
    Copy,
    /// tanh(W·x + b), one for each layer and state vector.
    Tanh,
}

/// A recurrent encoder–decoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RnnSeq2SeqConfig {
    /// Source tokens, the special ones included.
    pub source_vocab: usize,
    /// Target tokens, the special ones included.
    pub target_vocab: usize,
    /// LSTM or GRU, in encoder and decoder.
    pub cell: CellKind,
    /// The width of the token embeddings.
    pub embedding: usize,
    /// The width of a decoder layer's state.
    pub hidden: usize,
    /// The width of an encoder layer's state, for each direction.
    pub encoder_hidden: usize,
    /// Layers of the encoder, and of the decoder.
    pub layers: usize,
    /// Whether every encoder layer also runs from the end to the start.
    pub bidirectional: bool,
    /// From the encoder's final states to the decoder's first.
    pub bridge: Bridge,
    /// How the decoder sees the source.
    pub attention: AttentionKind,
    /// The width of additive attention's comparison; unused otherwise.
    pub attention_width: usize,
    /// The width of the readout between the top state and the output, in a model that attends.
    pub readout: usize,
    /// Whether the output projection is the target embedding's table: the layer before it then has `embedding` wide.
    pub tie_output: bool,
    /// The share of values that training sets to 0: of embeddings, between layers, and before the output.
    pub dropout: f32,
}

impl RnnSeq2SeqConfig {
    /// A small model of that kind of attention: one layer, 256 wide. With attention the encoder is a
    /// bidirectional one of 128 for each direction and the bridge a tanh; without, it is a forward one whose
    /// final state is copied. Every field may be changed.
    pub fn new(source_vocab: usize, target_vocab: usize, cell: CellKind, attention: AttentionKind) -> Self {
        let attends = attention != AttentionKind::None;
        RnnSeq2SeqConfig {
            source_vocab,
            target_vocab,
            cell,
            embedding: 128,
            hidden: 256,
            encoder_hidden: if attends { 128 } else { 256 },
            layers: 1,
            bidirectional: attends,
            bridge: if attends { Bridge::Tanh } else { Bridge::Copy },
            attention,
            attention_width: 128,
            readout: 256,
            tie_output: false,
            dropout: 0.2,
        }
    }

    /// 2 for a bidirectional encoder, else 1.
    pub fn directions(&self) -> usize {
        if self.bidirectional { 2 } else { 1 }
    }

    /// The width of a source position's annotation: `directions · encoder_hidden`.
    pub fn annotation(&self) -> usize {
        self.directions() * self.encoder_hidden
    }

    /// The width of what the output projection reads.
    pub fn output_input(&self) -> usize {
        if self.attention == AttentionKind::None { self.hidden } else { self.readout }
    }

    /// The number of parameters, exactly.
    ///
    /// A cell of H from an input of I holds gates·(H·I + H² + 2H). The bottom decoder cell of additive attention
    /// also reads the context, and its readout reads state, context and embedding; that of dot attention reads
    /// context and state and has no bias.
    pub fn parameter_count(&self) -> usize {
        let cell = |input: usize, hidden: usize| self.cell.gates() * hidden * (input + hidden + 2);
        let (e, h, a) = (self.embedding, self.hidden, self.annotation());
        let upper = self.layers - 1;
        let encoder =
            self.directions() * (cell(e, self.encoder_hidden) + upper * cell(a, self.encoder_hidden));
        let bridge = match self.bridge {
            Bridge::Copy => 0,
            Bridge::Tanh => self.layers * self.cell.states() * (a * h + h),
        };
        let (bottom_input, attention) = match self.attention {
            AttentionKind::None => (e, 0),
            AttentionKind::Additive => {
                let scores = self.attention_width * (h + a + 1) + self.attention_width;
                (e + a, scores + self.readout * (h + a + e + 1))
            }
            AttentionKind::Dot => (e, self.readout * (a + h)),
        };
        let decoder = cell(bottom_input, h) + upper * cell(h, h);
        let output = self.target_vocab * (1 + if self.tie_output { 0 } else { self.output_input() });
        (self.source_vocab + self.target_vocab) * e + encoder + bridge + attention + decoder + output
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the first field that no model can be built from.
    pub fn validate(&self) -> Result<(), ModelError> {
        positive("source_vocab", self.source_vocab)?;
        positive("target_vocab", self.target_vocab)?;
        positive("embedding", self.embedding)?;
        positive("hidden", self.hidden)?;
        positive("encoder_hidden", self.encoder_hidden)?;
        positive("layers", self.layers)?;
        positive("attention_width", self.attention_width)?;
        positive("readout", self.readout)?;
        let annotation = self.annotation();
        if self.bridge == Bridge::Copy && annotation != self.hidden {
            let expected = format!("{annotation} as the copied encoder state (or bridge tanh)");
            return Err(wrong("hidden", self.hidden, expected));
        }
        if self.attention == AttentionKind::Dot && annotation != self.hidden {
            let expected = format!("{annotation} as the annotation that dot attention compares it with");
            return Err(wrong("hidden", self.hidden, expected));
        }
        if self.tie_output && self.output_input() != self.embedding {
            let expected = format!("{} as the input of the tied output", self.output_input());
            return Err(wrong("embedding", self.embedding, expected));
        }
        rate("dropout", self.dropout)
    }
}

fn wrong(field: &'static str, value: impl ToString, expected: String) -> ModelError {
    ModelError::Config { field, value: value.to_string(), expected }
}

fn positive(field: &'static str, value: usize) -> Result<(), ModelError> {
    if value == 0 { Err(wrong(field, value, "at least 1".to_owned())) } else { Ok(()) }
}

fn rate(field: &'static str, value: f32) -> Result<(), ModelError> {
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
    }
}
