//! Recurrent encoder–decoders: a fixed vector, additive attention, or dot-product attention between them.
//!
//! ```text
//!                 attention none          additive                       dot
//! annotations a = encoder(source)         (every layer in one or two directions)
//! s[0]          = bridge(final states)
//! s[t]          = cell(y[t−1], s[t−1])    cell([y[t−1], c[t]], s[t−1])   cell(y[t−1], s[t−1])
//! c[t]          =                         Σ α(s[t−1], a)·a               Σ α(s[t], a)·a
//! readout       = s[t]                    tanh(R·[s[t], y[t−1], c[t]])   tanh(R·[c[t], s[t]])
//! logits        = O·readout + b
//! ```
//! A deep stack may add a layer's input to its output from the third layer on, run only its first encoder layer in
//! both directions, and give the context of additive attention to every decoder layer; then the output reads the top
//! layer itself:
//! ```text
//! x[l]      = encoder layer l(x[l−1]) (+ x[l−1])
//! s[l, t]   = cell([y[l−1, t], c[t]], s[l, t−1]),    y[l, t] = s[l, t] (+ y[l−1, t]),    c[t] from s[0, t−1]
//! logits    = O·y[top] + b
//! ```
//! Inside, everything is time-major: row t · batch + b. With no or dot attention a decoder layer runs over the whole
//! target at once; additive attention must go step by step ([`crate::ops::additive_decoder`]), its upper layers
//! need not.
//!
//! # Source
//! Sutskever, Vinyals and Le 2014; Cho et al. 2014; Bahdanau, Cho and Bengio 2015 (its maxout readout is a tanh
//! here, and reads the new state, as later systems do); Luong, Pham and Manning 2015, sections 3 and 3.1; Wu et al. 2016
//! (arXiv:1609.08144), section 3.

use std::sync::Arc;

use kavanam_kernels::{Activation, Context};

use crate::error::ModelError;
use crate::generate::rnn_state::{Packed, RnnState};
use crate::models::{
    AttentionKind, Batch, Bridge, DecoderState, Encoded, Implementation, LossOptions, ModelConfig,
    RnnSeq2SeqConfig, Seq2Seq, StepOutput,
};
use crate::nn::Linear;
use crate::nn::additive_attention::AdditiveAttention;
use crate::nn::embedding::Embedding;
use crate::nn::rnn::RecurrentLayer;
use crate::ops::{self, AdditiveDecoder, AdditiveInputs, AttentionShape, LinearWeights, StateVars, Tokens};
use crate::packed::PerKernel;
use crate::param::{Init, ParamStore};
use crate::pool::Pool;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// A recurrent encoder–decoder with its weights.
#[derive(Debug)]
pub struct RnnSeq2Seq {
    config: RnnSeq2SeqConfig,
    store: ParamStore,
    layers: Layers,
    packed: PerKernel<Packed>,
    pool: Pool,
}

/// The layers of the model.
#[derive(Debug, Clone)]
pub(crate) struct Layers {
    source: Embedding,
    pub(crate) target: Embedding,
    encoder: Vec<RecurrentLayer>,
    /// For each decoder layer, one for h and one for c.
    bridge: Vec<Vec<Linear>>,
    pub(crate) decoder: Vec<RecurrentLayer>,
    pub(crate) attention: Option<AdditiveAttention>,
    pub(crate) readout: Option<LinearWeights>,
    pub(crate) output: LinearWeights,
}

impl Layers {
    fn new(store: &mut ParamStore, config: &RnnSeq2SeqConfig) -> Layers {
        let RnnSeq2SeqConfig { cell, embedding, .. } = *config;
        let annotation = config.annotation();
        let implemented = |layer: RecurrentLayer| match config.implementation {
            Implementation::Fast => layer,
            Implementation::Naive => layer.naive(),
        };
        let source = Embedding::new(store, "source_embedding", config.source_vocab, embedding);
        let target = Embedding::new(store, "target_embedding", config.target_vocab, embedding);
        let encoder = (0..config.layers).map(|l| {
            let widths = config.encoder_cell(l);
            implemented(RecurrentLayer::new(
                store,
                "encoder.rnn",
                l,
                cell,
                widths,
                config.is_bidirectional(l),
            ))
        });
        let encoder = encoder.collect();
        let mut bridge = Vec::new();
        if config.bridge == Bridge::Tanh {
            for l in 0..config.layers {
                let linear = |(state, [last, first]): (&str, [usize; 2])| {
                    Linear::new(store, &format!("bridge.{state}_l{l}"), last, first, 1)
                };
                bridge.push(["h", "c"].into_iter().zip(config.bridged(l)).map(linear).collect());
            }
        }
        let decoder = (0..config.layers).map(|l| {
            let widths = config.decoder_cell(l);
            implemented(RecurrentLayer::new(store, "decoder.rnn", l, cell, widths, false))
        });
        let decoder = decoder.collect();
        let (mut attention, mut readout) = (None, None);
        let state = config.decoder_width();
        match config.attention {
            AttentionKind::None => (),
            AttentionKind::Additive => {
                let sizes = [state, annotation, config.attention_width];
                attention = Some(AdditiveAttention::new(store, "attention", sizes));
                if config.has_readout() {
                    let input = state + embedding + annotation;
                    readout = Some(Linear::new(store, "readout", input, config.readout, 1).weights);
                }
            }
            AttentionKind::Dot => {
                let input = annotation + state;
                readout = Some(Linear::without_bias(store, "readout", input, config.readout).weights);
            }
        }
        let weight = if config.tie_output {
            target.table
        } else {
            let shape = [config.target_vocab, config.output_input()];
            store.add("output.weight", &shape, Init::Xavier { stacked: 1 })
        };
        let bias = Some(store.add("output.bias", &[config.target_vocab], Init::Zeros));
        let output = LinearWeights { weight, bias };
        Layers { source, target, encoder, bridge, decoder, attention, readout, output }
    }
}

/// What the decoder starts from, on a tape.
struct Source {
    /// `[source_len · batch, annotation]`.
    annotations: Var,
    lengths: Arc<[usize]>,
    /// One for each decoder layer.
    states: Vec<StateVars>,
}

impl RnnSeq2Seq {
    /// A new model, its weights initialised from `seed`.
    ///
    /// # Errors
    /// [`ModelError::Config`] when no model can be built from `config`.
    pub fn new(config: &RnnSeq2SeqConfig, seed: u64) -> Result<RnnSeq2Seq, ModelError> {
        config.validate()?;
        let mut store = ParamStore::new(seed);
        let layers = Layers::new(&mut store, config);
        Ok(RnnSeq2Seq { config: config.clone(), store, layers, packed: PerKernel::new(), pool: Pool::new() })
    }

    fn encode_on(
        &self,
        tape: &mut Tape<'_>,
        source: &[u32],
        lengths: &[usize],
    ) -> Result<Source, ModelError> {
        let lengths: Arc<[usize]> = lengths.into();
        let mut x = self.embed(tape, &self.layers.source, &time_major(source, lengths.len()))?;
        let mut states = Vec::with_capacity(self.layers.encoder.len());
        for (l, layer) in self.layers.encoder.iter().enumerate() {
            let input = if l > 0 { ops::dropout(tape, x, self.config.dropout)? } else { x };
            let mark = tape.mark();
            let (mut y, last) = layer.forward(tape, input, &lengths, None)?;
            if self.config.is_residual(l) {
                y = ops::residual(tape, x, y, 0.0)?;
            }
            let last = self.bridge(tape, l, last)?;
            let keep: Vec<Var> = last.vars().chain([y]).collect();
            tape.release(mark, &keep);
            states.push(last);
            x = y;
        }
        Ok(Source { annotations: x, lengths, states })
    }

    /// An encoder layer's final state as a decoder layer's first.
    fn bridge(&self, tape: &mut Tape<'_>, layer: usize, last: StateVars) -> Result<StateVars, ModelError> {
        let Some(linears) = self.layers.bridge.get(layer) else { return Ok(last) };
        let h = linears[0].activated(tape, last.h, Activation::Tanh)?;
        let c = match last.c {
            Some(c) => Some(linears[1].activated(tape, c, Activation::Tanh)?),
            None => None,
        };
        Ok(StateVars { h, c })
    }

    fn embed(&self, tape: &mut Tape<'_>, embedding: &Embedding, ids: &Arc<[u32]>) -> Result<Var, ModelError> {
        let x = embedding.forward(tape, &Tokens { ids: ids.clone(), seq: ids.len(), first: 0 })?;
        Ok(ops::dropout(tape, x, self.config.dropout)?)
    }

    /// Logits of all steps, time-major.
    fn time_major_logits(&self, tape: &mut Tape<'_>, batch: &Batch) -> Result<Var, ModelError> {
        let source = self.encode_on(tape, &batch.source, &batch.source_lengths)?;
        let embedded = self.embed(tape, &self.layers.target, &time_major(&batch.target_in, batch.size))?;
        let steps: Arc<[usize]> = batch.target_lengths.as_slice().into();
        let mut cell_inputs = None;
        let mut x = embedded;
        for (l, layer) in self.layers.decoder.iter().enumerate() {
            let y = match &self.layers.attention {
                Some(attention) if l == 0 => {
                    let cell = *layer.weights().recurrent().expect("the configuration was checked");
                    let weights = AdditiveDecoder { cell, query: attention.query, v: attention.v };
                    let keys = attention.keys(tape, source.annotations)?;
                    let inputs = AdditiveInputs {
                        embedded,
                        keys,
                        annotations: source.annotations,
                        lengths: source.lengths.clone(),
                        initial: source.states[0],
                    };
                    let [y, read] = ops::additive_decoder(tape, &weights, &inputs)?;
                    cell_inputs = Some(read);
                    y
                }
                _ => {
                    let input = self.upper_input(tape, l, x, cell_inputs)?;
                    layer.forward(tape, input, &steps, Some(source.states[l]))?.0
                }
            };
            x = if self.config.is_residual(l) { ops::residual(tape, x, y, 0.0)? } else { y };
        }
        let read = match self.config.attention {
            _ if !self.config.has_readout() => x,
            AttentionKind::None => unreachable!("a model that does not attend has no readout"),
            AttentionKind::Additive => {
                let cell_inputs = cell_inputs.expect("the bottom layer of additive attention ran");
                let both = ops::concat_cols(tape, &[x, cell_inputs])?;
                self.readout(tape, both)?
            }
            AttentionKind::Dot => {
                let shape = dot_shape(batch.size, &source.lengths);
                let context = ops::dot_attention(tape, x, source.annotations, &shape)?;
                let both = ops::concat_cols(tape, &[context, x])?;
                self.readout(tape, both)?
            }
        };
        let read = ops::dropout(tape, read, self.config.dropout)?;
        Ok(ops::linear(tape, read, &self.layers.output, Activation::Identity)?)
    }

    /// What decoder layer `l` reads: the layer below, beside the context where it goes to all layers, which stands
    /// behind the embedded token in the bottom layer's inputs.
    fn upper_input(
        &self,
        tape: &mut Tape<'_>,
        l: usize,
        below: Var,
        bottom_inputs: Option<Var>,
    ) -> Result<Var, ModelError> {
        let mut x = below;
        if let (true, Some(inputs)) = (self.config.reads_context(l), bottom_inputs) {
            let context = ops::columns(tape, inputs, self.config.embedding..self.config.decoder_input(0))?;
            x = ops::concat_cols(tape, &[below, context])?;
        }
        Ok(if l > 0 { ops::dropout(tape, x, self.config.dropout)? } else { x })
    }

    fn readout(&self, tape: &mut Tape<'_>, x: Var) -> Result<Var, ModelError> {
        let weights = self.layers.readout.as_ref().expect("a model that attends has a readout");
        Ok(ops::linear(tape, x, weights, Activation::Tanh)?)
    }

    fn packed(&self, ctx: &Context) -> Result<Arc<Packed>, ModelError> {
        Ok(self.packed.get_or_make(ctx, || Packed::new(ctx, &self.store, &self.layers))?)
    }
}

/// Dot attention of time-major rows: one head, no scale.
fn dot_shape(batch: usize, lengths: &Arc<[usize]>) -> AttentionShape {
    AttentionShape {
        batch,
        heads: 1,
        scale: 1.0,
        causal: false,
        key_lengths: Some(lengths.clone()),
        time_major: true,
    }
}

/// `[batch · seq]` tokens as `[seq · batch]`.
pub(super) fn time_major(ids: &[u32], batch: usize) -> Arc<[u32]> {
    let seq = ids.len() / batch.max(1);
    (0..seq).flat_map(|t| (0..batch).map(move |b| ids[b * seq + t])).collect()
}

impl Seq2Seq for RnnSeq2Seq {
    fn config(&self) -> ModelConfig {
        ModelConfig::RnnSeq2Seq(self.config.clone())
    }

    fn params(&self) -> &ParamStore {
        &self.store
    }

    fn params_mut(&mut self) -> &mut ParamStore {
        self.packed.clear();
        &mut self.store
    }

    fn logits(&self, tape: &mut Tape<'_>, batch: &Batch) -> Result<Var, ModelError> {
        let logits = self.time_major_logits(tape, batch)?;
        let (size, len) = (batch.size, batch.target_len);
        let order = (0..size).flat_map(|b| (0..len).map(move |t| t * size + b)).collect();
        Ok(ops::permute_rows(tape, logits, &order)?)
    }

    fn loss(&self, tape: &mut Tape<'_>, batch: &Batch, options: &LossOptions) -> Result<Var, ModelError> {
        let logits = self.time_major_logits(tape, batch)?;
        let targets = time_major(&batch.target_out, batch.size);
        Ok(ops::cross_entropy(tape, logits, &targets, options.label_smoothing)?)
    }

    fn encode(&self, ctx: &Context, source: &[u32], lengths: &[usize]) -> Result<Encoded, ModelError> {
        let packed = self.packed(ctx)?;
        let mut tape = Tape::inference(ctx, &self.store, &self.pool).with_packed(&packed.params);
        let encoded = self.encode_on(&mut tape, source, lengths)?;
        let source_len = source.len() / lengths.len().max(1);
        let shape = [source_len, lengths.len(), self.config.annotation()];
        let memory = Tensor::new(&shape, tape.value(encoded.annotations).to_vec())?;
        let vars = encoded.states.iter().flat_map(StateVars::vars);
        let states =
            vars.map(|var| Tensor::new(&[lengths.len(), tape.shape(var).1], tape.value(var).to_vec()));
        Ok(Encoded {
            memory,
            states: states.collect::<Result<_, _>>()?,
            lengths: lengths.to_vec(),
            source_len,
        })
    }

    fn start(
        &self,
        ctx: &Context,
        encoded: &Encoded,
        beams: usize,
    ) -> Result<Box<dyn DecoderState>, ModelError> {
        let packed = self.packed(ctx)?;
        let mut keys = None;
        if let Some(attention) = &self.layers.attention {
            let mut tape = Tape::inference(ctx, &self.store, &self.pool).with_packed(&packed.params);
            let rows = encoded.source_len * encoded.batch();
            let annotations = tape.constant(encoded.memory.data(), rows, self.config.annotation())?;
            let projected = attention.keys(&mut tape, annotations)?;
            keys = Some(tape.value(projected).to_vec());
        }
        Ok(Box::new(RnnState::new(encoded, keys, beams, self.config.cell.states())?))
    }

    fn step(
        &self,
        ctx: &Context,
        state: &mut dyn DecoderState,
        tokens: &[u32],
    ) -> Result<StepOutput, ModelError> {
        let foreign = ModelError::ForeignState { expected: "recurrent model" };
        let state = state.as_any_mut().downcast_mut::<RnnState>().ok_or(foreign)?;
        let packed = self.packed(ctx)?;
        let mut tape = Tape::inference(ctx, &self.store, &self.pool).with_packed(&packed.params);
        let (read, attention) = state.advance(&mut tape, &packed, (&self.config, &self.layers), tokens)?;
        let read = if self.layers.readout.is_some() { self.readout(&mut tape, read)? } else { read };
        let logits = ops::linear(&mut tape, read, &self.layers.output, Activation::Identity)?;
        let shape = [state.rows(), self.config.target_vocab];
        Ok(StepOutput { logits: Tensor::new(&shape, tape.value(logits).to_vec())?, attention })
    }
}
