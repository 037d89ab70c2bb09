//! The options of a recurrent encoder–decoder.

use serde::{Deserialize, Serialize};

use super::{positive, rate, wrong};
use crate::error::ModelError;
use crate::nn::rnn::CellWidths;

/// The recurrent cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CellKind {
    /// Input, forget, cell and output gate (Hochreiter and Schmidhuber 1997; forget gate by Gers et al. 2000).
    Lstm,
    /// The same with peepholes: i and f see the old cell, o the new one (Gers and Schmidhuber 2000).
    LstmPeephole,
    /// Reset, update and new gate (Cho et al. 2014), the reset after the state's product: PyTorch's and cuDNN's, Keras's with
    /// `reset_after`.
    Gru,
    /// The same with the reset before the product, as the paper writes it: Keras's without `reset_after`.
    GruResetBefore,
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
            CellKind::Lstm | CellKind::LstmPeephole => 4,
            CellKind::Gru | CellKind::GruResetBefore | CellKind::MinLstm => 3,
            CellKind::MinGru => 2,
            CellKind::Tanh | CellKind::Relu => 1,
        }
    }

    /// How many vectors its state has: h, and c for an LSTM.
    pub fn states(self) -> usize {
        match self {
            CellKind::Lstm | CellKind::LstmPeephole => 2,
            CellKind::Gru
            | CellKind::GruResetBefore
            | CellKind::Tanh
            | CellKind::Relu
            | CellKind::MinGru
            | CellKind::MinLstm => 1,
        }
    }

    /// Whether the gates see the input alone, so that a layer is one product and a scan.
    pub fn is_scan(self) -> bool {
        matches!(self, CellKind::MinGru | CellKind::MinLstm)
    }

    /// The number of parameters of one layer and direction: gates·(H·I + H·P + 2H), or gates·(H·I + H) of a scan; with
    /// peepholes 3·H more, with a projection P·H more, and without one P = H.
    pub(crate) fn parameter_count(self, widths: impl Into<CellWidths>) -> usize {
        let CellWidths { input, hidden, projection } = widths.into();
        let output = projection.unwrap_or(hidden);
        let columns = if self.is_scan() { input + 1 } else { input + output + 2 };
        let peepholes = if self == CellKind::LstmPeephole { 3 } else { 0 };
        hidden * (self.gates() * columns + peepholes + projection.unwrap_or(0))
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

/// Which decoder layers read the context of additive attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContextTo {
    /// The bottom one; a readout sees it once more (Bahdanau et al. 2015).
    #[default]
    Bottom,
    /// Every one; the output reads the top layer alone (Wu et al. 2016, section 3).
    All,
}

/// How recurrent layers are computed; the weights and the mathematics are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Implementation {
    /// By the fast layers.
    #[default]
    Fast,
    /// Step by step and gate by gate ([`crate::ops::NaiveLayer`]), to show what the fast ones are worth.
    Naive,
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
    /// The width of a decoder layer's gates and, but for a projection, of its state.
    pub hidden: usize,
    /// As `hidden`, of an encoder layer, for each direction.
    pub encoder_hidden: usize,
    /// The width of a decoder layer's state h where an LSTM projects it (Sak et al. 2014), less than `hidden`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub projection: Option<usize>,
    /// As `projection`, of an encoder layer, for each direction; less than `encoder_hidden`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoder_projection: Option<usize>,
    /// Layers of the encoder, and of the decoder.
    pub layers: usize,
    /// Whether every encoder layer also runs from the end to the start.
    pub bidirectional: bool,
    /// Whether of those only the first does; not without `bidirectional`.
    #[serde(default)]
    pub only_first_bidirectional: bool,
    /// Whether a layer's input is added to its output, from the third layer on.
    #[serde(default)]
    pub residual: bool,
    /// From the encoder's final states to the decoder's first.
    pub bridge: Bridge,
    /// How the decoder sees the source.
    pub attention: AttentionKind,
    /// Which decoder layers read the context of additive attention.
    #[serde(default)]
    pub context: ContextTo,
    /// The width of additive attention's comparison; unused otherwise.
    pub attention_width: usize,
    /// The width of the readout between the top state and the output, in a model that has one
    /// ([`RnnSeq2SeqConfig::has_readout`]).
    pub readout: usize,
    /// Whether the output projection is the target embedding's table: the layer before it then has `embedding` wide.
    pub tie_output: bool,
    /// The share of values that training sets to 0: of embeddings, between layers, and before the output.
    pub dropout: f32,
    /// How the layers are computed.
    #[serde(default)]
    pub implementation: Implementation,
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
            projection: None,
            encoder_projection: None,
            layers: 1,
            bidirectional: attends,
            only_first_bidirectional: false,
            residual: false,
            bridge: if attends { Bridge::Tanh } else { Bridge::Copy },
            attention,
            context: ContextTo::Bottom,
            attention_width: 128,
            readout: 256,
            tie_output: false,
            dropout: 0.2,
            implementation: Implementation::Fast,
        }
    }

    /// A deep stack as Google's translator had it, in small: 4 LSTM layers of 256 on each side (there 8 of 1,024), the
    /// first of the encoder in both directions, residual connections from the third on, attention from the bottom
    /// decoder layer to all of them. Every field may be changed.
    ///
    /// # Source
    /// Wu et al. 2016 (arXiv:1609.08144), section 3. It does not say how the decoder starts: here through the tanh
    /// bridge, as each encoder layer has another width than the decoder's or may have.
    pub fn gnmt(source_vocab: usize, target_vocab: usize) -> Self {
        RnnSeq2SeqConfig {
            layers: 4,
            encoder_hidden: 256,
            only_first_bidirectional: true,
            residual: true,
            context: ContextTo::All,
            ..RnnSeq2SeqConfig::new(source_vocab, target_vocab, CellKind::Lstm, AttentionKind::Additive)
        }
    }

    /// Whether encoder layer `layer` also runs from the end to the start.
    pub fn is_bidirectional(&self, layer: usize) -> bool {
        self.bidirectional && (layer == 0 || !self.only_first_bidirectional)
    }

    /// How many directions encoder layer `layer` has.
    fn directions(&self, layer: usize) -> usize {
        if self.is_bidirectional(layer) { 2 } else { 1 }
    }

    /// The width of what encoder layer `layer` gives: for each of its directions `encoder_hidden`, or the projection's width.
    pub fn encoder_width(&self, layer: usize) -> usize {
        self.directions(layer) * self.encoder_projection.unwrap_or(self.encoder_hidden)
    }

    /// The width of what a decoder layer gives: `hidden`, or the projection's.
    pub fn decoder_width(&self) -> usize {
        self.projection.unwrap_or(self.hidden)
    }

    /// The widths of encoder layer `layer`, in each direction.
    pub(crate) fn encoder_cell(&self, layer: usize) -> CellWidths {
        let input = if layer == 0 { self.embedding } else { self.encoder_width(layer - 1) };
        CellWidths { input, hidden: self.encoder_hidden, projection: self.encoder_projection }
    }

    /// The widths of decoder layer `layer`.
    pub(crate) fn decoder_cell(&self, layer: usize) -> CellWidths {
        let input = self.decoder_input(layer);
        CellWidths { input, hidden: self.hidden, projection: self.projection }
    }

    /// From the final state vectors of encoder layer `layer` (h, and c for a cell that has it) to the decoder's first: both widths
    /// of each.
    pub(crate) fn bridged(&self, layer: usize) -> impl Iterator<Item = [usize; 2]> {
        let h = [self.encoder_width(layer), self.decoder_width()];
        let c = [self.directions(layer) * self.encoder_hidden, self.hidden];
        [h, c].into_iter().take(self.cell.states())
    }

    /// The width of a source position's annotation: what the top encoder layer gives.
    pub fn annotation(&self) -> usize {
        self.encoder_width(self.layers.saturating_sub(1))
    }

    /// Whether layer `layer`, of the encoder or the decoder, adds its input to its output.
    pub fn is_residual(&self, layer: usize) -> bool {
        self.residual && layer >= 2
    }

    /// Whether decoder layer `layer` reads the context.
    pub fn reads_context(&self, layer: usize) -> bool {
        self.attention == AttentionKind::Additive && (layer == 0 || self.context == ContextTo::All)
    }

    /// The width of what decoder layer `layer` reads: the embedded token or the layer below, then the context.
    pub fn decoder_input(&self, layer: usize) -> usize {
        let below = if layer == 0 { self.embedding } else { self.decoder_width() };
        below + if self.reads_context(layer) { self.annotation() } else { 0 }
    }

    /// Whether a layer stands between the top state and the output: where the model attends and the top layer has not
    /// read the context.
    pub fn has_readout(&self) -> bool {
        self.attention != AttentionKind::None && self.context == ContextTo::Bottom
    }

    /// The width of what the output projection reads.
    pub fn output_input(&self) -> usize {
        if self.has_readout() { self.readout } else { self.decoder_width() }
    }

    /// The number of parameters, exactly.
    ///
    /// A cell of H from an input of I holds gates·(H·I + H² + 2H), with peepholes 3·H more, that of a scan gates·(H·I + H); with a projection
    /// to P gates·(H·I + H·P + 2H) + P·H. The readout of additive attention reads state, context and embedding; that of dot attention reads
    /// context and state and has no bias.
    pub fn parameter_count(&self) -> usize {
        let (e, h, a) = (self.embedding, self.decoder_width(), self.annotation());
        let (mut encoder, mut bridge, mut decoder) = (0, 0, 0);
        for l in 0..self.layers {
            encoder += self.directions(l) * self.cell.parameter_count(self.encoder_cell(l));
            if self.bridge == Bridge::Tanh {
                bridge += self.bridged(l).map(|[from, to]| (from + 1) * to).sum::<usize>();
            }
            decoder += self.cell.parameter_count(self.decoder_cell(l));
        }
        let readout = if self.has_readout() { self.readout } else { 0 };
        let attention = match self.attention {
            AttentionKind::None => 0,
            AttentionKind::Additive => self.attention_width * (h + a + 2) + readout * (h + a + e + 1),
            AttentionKind::Dot => readout * (a + h),
        };
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
        if self.only_first_bidirectional && !self.bidirectional {
            let expected = "false where no encoder layer is bidirectional".to_owned();
            return Err(wrong("only_first_bidirectional", true, expected));
        }
        if self.context == ContextTo::All && self.attention != AttentionKind::Additive {
            let expected = "bottom: attention that is not additive comes after the top layer".to_owned();
            return Err(wrong("context", "all", expected));
        }
        self.validate_projections()?;
        let mut copied = (0..self.layers).flat_map(|l| self.bridged(l));
        if let (Bridge::Copy, Some([width, state])) = (self.bridge, copied.find(|[from, to]| from != to)) {
            let expected = format!("{width} as the copied encoder state (or bridge tanh)");
            let field = if self.projection == Some(state) { "projection" } else { "hidden" };
            return Err(wrong(field, state, expected));
        }
        let annotation = self.annotation();
        if self.attention == AttentionKind::Additive && self.cell.is_scan() {
            let expected =
                "none or dot with a cell that is a scan: the context would depend on the state before it";
            return Err(wrong("attention", "additive", expected.to_owned()));
        }
        let naive = matches!(self.cell, CellKind::Lstm | CellKind::Gru);
        if self.implementation == Implementation::Naive
            && !(naive && self.attention != AttentionKind::Additive)
        {
            let expected = "fast but for an LSTM or a GRU without additive attention".to_owned();
            return Err(wrong("implementation", "naive", expected));
        }
        if self.attention == AttentionKind::Dot && annotation != self.decoder_width() {
            let expected = format!("{annotation} as the annotation that dot attention compares it with");
            let field = if self.projection.is_some() { "projection" } else { "hidden" };
            return Err(wrong(field, self.decoder_width(), expected));
        }
        if self.tie_output && self.output_input() != self.embedding {
            let expected = format!("{} as the input of the tied output", self.output_input());
            return Err(wrong("embedding", self.embedding, expected));
        }
        rate("dropout", self.dropout)
    }

    fn validate_projections(&self) -> Result<(), ModelError> {
        let sides = [
            ("projection", self.projection, "hidden", self.hidden),
            ("encoder_projection", self.encoder_projection, "encoder_hidden", self.encoder_hidden),
        ];
        for (field, projection, of, hidden) in sides {
            check_projection(self.cell, (field, projection), (of, hidden))?;
            if let (Some(projection), Implementation::Naive) = (projection, self.implementation) {
                return Err(wrong(field, projection, "none with the implementation naive".to_owned()));
            }
        }
        Ok(())
    }
}

/// A projection is there for an LSTM alone, and narrower than the gates.
pub(super) fn check_projection(
    cell: CellKind,
    (field, projection): (&'static str, Option<usize>),
    (of, hidden): (&str, usize),
) -> Result<(), ModelError> {
    let Some(projection) = projection else { return Ok(()) };
    positive(field, projection)?;
    if cell.states() != 2 {
        return Err(wrong(field, projection, "none but for an LSTM".to_owned()));
    }
    if projection >= hidden {
        return Err(wrong(field, projection, format!("less than {of}, {hidden}")));
    }
    Ok(())
}
