//! The options of a recurrent encoder–decoder.

use serde::{Deserialize, Serialize};

use super::{positive, rate, wrong};
use crate::error::ModelError;

/// The recurrent cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CellKind {
    /// Input, forget, cell and output gate (Hochreiter and Schmidhuber 1997; forget gate by Gers et al. 2000).
    Lstm,
    /// Reset, update and new gate (Cho et al. 2014).
    Gru,
    /// No gate, tanh (Elman 1990).
    Tanh,
    /// No gate, ReLU (Le, Jaitly and Hinton 2015).
    Relu,
    /// One gate, which sees the input alone: a scan (Feng et al. 2024, section 3.1).
    MinGru,
    /// Two gates, which see the input alone and are normalised: a scan (Feng et al. 2024, section 3.2).
    MinLstm,
}

impl CellKind {
    /// How many blocks of `hidden` rows its weights have.
    pub fn gates(self) -> usize {
        match self {
            CellKind::Lstm => 4,
            CellKind::Gru | CellKind::MinLstm => 3,
            CellKind::MinGru => 2,
            CellKind::Tanh | CellKind::Relu => 1,
        }
    }

    /// How many vectors its state has: h, and c for the LSTM.
    pub fn states(self) -> usize {
        match self {
            CellKind::Lstm => 2,
            CellKind::Gru | CellKind::Tanh | CellKind::Relu | CellKind::MinGru | CellKind::MinLstm => 1,
        }
    }

    /// Whether the gates see the input alone, so that a layer is one product and a scan.
    pub fn is_scan(self) -> bool {
        matches!(self, CellKind::MinGru | CellKind::MinLstm)
    }

    /// The number of parameters of one layer and direction: gates·(H·I + H² + 2H), or gates·(H·I + H) of a scan.
    pub(crate) fn parameter_count(self, input: usize, hidden: usize) -> usize {
        let columns = if self.is_scan() { input + 1 } else { input + hidden + 2 };
        self.gates() * hidden * columns
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
    /// The kind of cell, in encoder and decoder.
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
    /// A cell of H from an input of I holds gates·(H·I + H² + 2H), that of a scan gates·(H·I + H). The bottom decoder
    /// cell of additive attention also reads the context, and its readout reads state, context and embedding; that of
    /// dot attention reads context and state and has no bias.
    pub fn parameter_count(&self) -> usize {
        let cell = |input: usize, hidden: usize| self.cell.parameter_count(input, hidden);
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
        if self.attention == AttentionKind::Additive && self.cell.is_scan() {
            let expected =
                "none or dot with a cell that is a scan: the context would depend on the state before it";
            return Err(wrong("attention", "additive", expected.to_owned()));
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
