//! The transformer encoder–decoder.
//!
//! # Source
//! Vaswani et al. 2017, *Attention Is All You Need*: figure 1 is this file.

use std::any::Any;
use std::sync::Arc;

use kavanam_kernels::{Activation, Context};

use crate::error::ModelError;
use crate::generate::kv_cache::{CrossCache, LayerCache, SelfCache};
use crate::models::{
    Batch, DecoderState, Encoded, LossOptions, ModelConfig, Seq2Seq, StepOutput, TransformerConfig,
};
use crate::nn::Norm;
use crate::nn::attention::Sequences;
use crate::nn::decoder_layer::DecoderLayer;
use crate::nn::embedding::Embedding;
use crate::nn::encoder_layer::EncoderLayer;
use crate::nn::positional::position_table;
use crate::ops::{self, LinearWeights, Tokens};
use crate::packed::{PackedParams, PerKernel};
use crate::param::{Init, ParamStore};
use crate::pool::Pool;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// A transformer encoder–decoder with its weights.
#[derive(Debug)]
pub struct Transformer {
    config: TransformerConfig,
    store: ParamStore,
    source: Embedding,
    target: Embedding,
    encoder: Vec<EncoderLayer>,
    encoder_norm: Option<Norm>,
    decoder: Vec<DecoderLayer>,
    decoder_norm: Option<Norm>,
    output: LinearWeights,
    packed: PerKernel<PackedParams>,
    pool: Pool,
}

impl Transformer {
    /// A new model, its weights initialised from `seed`.
    ///
    /// # Errors
    /// [`ModelError::Config`] when no model can be built from `config`.
    pub fn new(config: &TransformerConfig, seed: u64) -> Result<Transformer, ModelError> {
        config.validate()?;
        let mut store = ParamStore::new(seed);
        let (source, target) = embeddings(&mut store, config);
        let layer = |stack: &str, i: usize| format!("{stack}.layers.{i}");
        let final_norm = |store: &mut ParamStore, stack: &str| {
            config
                .final_norm
                .then(|| Norm::new(store, &format!("{stack}.norm"), config.width, config.norm_epsilon))
        };
        let encoder = (0..config.encoder_layers)
            .map(|i| EncoderLayer::new(&mut store, &layer("encoder", i), config))
            .collect();
        let encoder_norm = final_norm(&mut store, "encoder");
        let decoder = (0..config.decoder_layers)
            .map(|i| DecoderLayer::new(&mut store, &layer("decoder", i), config))
            .collect();
        let decoder_norm = final_norm(&mut store, "decoder");
        let weight = if config.tie_output {
            target.table
        } else {
            store.add("output.weight", &[config.target_vocab, config.width], Init::Xavier { stacked: 1 })
        };
        let bias = Some(store.add("output.bias", &[config.target_vocab], Init::Zeros));
        Ok(Transformer {
            config: config.clone(),
            store,
            source,
            target,
            encoder,
            encoder_norm,
            decoder,
            decoder_norm,
            output: LinearWeights { weight, bias },
            packed: PerKernel::new(),
            pool: Pool::new(),
        })
    }

    fn encode_on(&self, tape: &mut Tape<'_>, tokens: &Tokens, source: &Sequences) -> Result<Var, ModelError> {
        self.check_positions("source", tokens.seq)?;
        let x = self.source.forward(tape, tokens)?;
        let mut x = ops::dropout(tape, x, self.config.dropout.embedding)?;
        for layer in &self.encoder {
            x = layer.forward(tape, x, source)?;
        }
        match &self.encoder_norm {
            Some(norm) => Ok(norm.forward(tape, x)?),
            None => Ok(x),
        }
    }

    /// From the decoder's last layer to logits.
    fn predict(&self, tape: &mut Tape<'_>, x: Var) -> Result<Var, ModelError> {
        let x = match &self.decoder_norm {
            Some(norm) => norm.forward(tape, x)?,
            None => x,
        };
        Ok(ops::linear(tape, x, &self.output, Activation::Identity)?)
    }

    fn check_positions(&self, argument: &'static str, length: usize) -> Result<(), ModelError> {
        let max_positions = self.config.max_positions;
        if length > max_positions {
            return Err(ModelError::TooLong { argument, length, max_positions });
        }
        Ok(())
    }

    fn packed(&self, ctx: &Context) -> Result<Arc<PackedParams>, ModelError> {
        self.packed.get_or_make(ctx, || Ok(PackedParams::new(&self.store)))
    }
}

/// Token and position embeddings of both sides.
fn embeddings(store: &mut ParamStore, config: &TransformerConfig) -> (Embedding, Embedding) {
    let side = |store: &mut ParamStore, side: &str, vocab: usize, shared: Option<&Embedding>| {
        let mut embedding = match shared {
            Some(other) => other.clone(),
            None => Embedding::new(store, &format!("{side}_embedding"), vocab, config.width),
        };
        embedding.scale = if config.scale_embeddings { (config.width as f32).sqrt() } else { 1.0 };
        let name = format!("{side}_positions");
        embedding.positions =
            position_table(store, &name, config.positions, config.max_positions, config.width);
        embedding
    };
    let source = side(store, "source", config.source_vocab, None);
    let target = side(store, "target", config.target_vocab, config.share_embeddings.then_some(&source));
    (source, target)
}

impl Seq2Seq for Transformer {
    fn config(&self) -> ModelConfig {
        ModelConfig::Transformer(self.config.clone())
    }

    fn params(&self) -> &ParamStore {
        &self.store
    }

    fn params_mut(&mut self) -> &mut ParamStore {
        self.packed.clear();
        &mut self.store
    }

    fn logits(&self, tape: &mut Tape<'_>, batch: &Batch) -> Result<Var, ModelError> {
        let source = Sequences { batch: batch.size, lengths: Some(batch.source_lengths.as_slice().into()) };
        // A target's padding comes after it, where causal attention never looks.
        let target = Sequences { batch: batch.size, lengths: None };
        let tokens = |ids: &[u32], seq| Tokens { ids: ids.into(), seq, first: 0 };
        let memory = self.encode_on(tape, &tokens(&batch.source, batch.source_len), &source)?;

        self.check_positions("target", batch.target_len)?;
        let x = self.target.forward(tape, &tokens(&batch.target_in, batch.target_len))?;
        let mut x = ops::dropout(tape, x, self.config.dropout.embedding)?;
        for layer in &self.decoder {
            x = layer.forward(tape, x, &target, (memory, &source))?;
        }
        self.predict(tape, x)
    }

    fn loss(&self, tape: &mut Tape<'_>, batch: &Batch, options: &LossOptions) -> Result<Var, ModelError> {
        let logits = self.logits(tape, batch)?;
        let targets = batch.target_out.as_slice().into();
        Ok(ops::cross_entropy(tape, logits, &targets, options.label_smoothing)?)
    }

    fn encode(&self, ctx: &Context, source: &[u32], lengths: &[usize]) -> Result<Encoded, ModelError> {
        let packed = self.packed(ctx)?;
        let mut tape = Tape::inference(ctx, &self.store, &self.pool).with_packed(&packed);
        let source_len = source.len() / lengths.len().max(1);
        let tokens = Tokens { ids: source.into(), seq: source_len, first: 0 };
        let sequences = Sequences { batch: lengths.len(), lengths: Some(lengths.into()) };
        let memory = self.encode_on(&mut tape, &tokens, &sequences)?;
        let shape = [lengths.len(), source_len, self.config.width];
        let memory = Tensor::new(&shape, tape.value(memory).to_vec())?;
        Ok(Encoded { memory, states: Vec::new(), lengths: lengths.to_vec(), source_len })
    }

    fn start(
        &self,
        ctx: &Context,
        encoded: &Encoded,
        beams: usize,
    ) -> Result<Box<dyn DecoderState>, ModelError> {
        let packed = self.packed(ctx)?;
        let mut tape = Tape::inference(ctx, &self.store, &self.pool).with_packed(&packed);
        let (rows, width) = (encoded.batch() * encoded.source_len, self.config.width);
        let memory = tape.constant(encoded.memory.data(), rows, width)?;
        let lengths: Arc<[usize]> = encoded.lengths.as_slice().into();
        let mut layers = Vec::with_capacity(self.decoder.len());
        for layer in &self.decoder {
            let projected = layer.cross_attention.project(&mut tape, memory)?;
            let values = tape.value(projected).to_vec();
            layers.push(LayerCache {
                to_self: SelfCache::new(encoded.batch() * beams, width),
                to_source: CrossCache::new(values, lengths.clone(), encoded.source_len, beams),
            });
        }
        let source_len = encoded.source_len;
        Ok(Box::new(TransformerState {
            layers,
            rows: encoded.batch() * beams,
            beams,
            source_len,
            position: 0,
        }))
    }

    fn step(
        &self,
        ctx: &Context,
        state: &mut dyn DecoderState,
        tokens: &[u32],
    ) -> Result<StepOutput, ModelError> {
        let foreign = ModelError::ForeignState { expected: "transformer" };
        let state = state.as_any_mut().downcast_mut::<TransformerState>().ok_or(foreign)?;
        kavanam_kernels::error::expect_dim("tokens", "length", state.rows, tokens.len())?;
        self.check_positions("target", state.position + 1)?;
        let packed = self.packed(ctx)?;
        let mut tape = Tape::inference(ctx, &self.store, &self.pool).with_packed(&packed);
        let tokens = Tokens { ids: tokens.into(), seq: 1, first: state.position };
        let mut x = self.target.forward(&mut tape, &tokens)?;
        for (layer, cache) in self.decoder.iter().zip(&mut state.layers) {
            x = layer.step(&mut tape, x, cache)?;
        }
        state.position += 1;
        let logits = self.predict(&mut tape, x)?;
        let attention = match state.layers.last().and_then(|layer| layer.to_source.weights()) {
            Some(weights) => Some(Tensor::new(&[state.rows, state.source_len], weights.to_vec())?),
            None => None,
        };
        let shape = [state.rows, self.config.target_vocab];
        Ok(StepOutput { logits: Tensor::new(&shape, tape.value(logits).to_vec())?, attention })
    }
}

/// The caches of all decoder layers.
struct TransformerState {
    layers: Vec<LayerCache>,
    rows: usize,
    beams: usize,
    source_len: usize,
    position: usize,
}

impl DecoderState for TransformerState {
    fn rows(&self) -> usize {
        self.rows
    }

    fn position(&self) -> usize {
        self.position
    }

    fn want_attention(&mut self, wanted: bool) {
        if let Some(last) = self.layers.last_mut() {
            last.to_source.want_weights(wanted);
        }
    }

    fn reorder(&mut self, rows: &[usize]) -> Result<(), ModelError> {
        let sources = super::sources_of(rows, self.rows, self.beams)?;
        if !rows.iter().copied().eq(0..self.rows) {
            for layer in &mut self.layers {
                layer.to_self.reorder(rows);
                layer.to_source.select(&sources);
            }
        }
        self.rows = rows.len();
        Ok(())
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
