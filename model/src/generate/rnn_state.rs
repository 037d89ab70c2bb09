//! What a recurrent decoder remembers: the states of its layers, and the source that it attends to.

use std::any::Any;
use std::sync::Arc;

use kavanam_kernels::attention::{self as dot, AttentionSpec, Mask};
use kavanam_kernels::error::expect_dim;
use kavanam_kernels::gemm::{self, Accum, Epilogue};
use kavanam_kernels::rnn::additive_attention as additive;
use kavanam_kernels::rnn::{self, PackedCell, Weights};
use kavanam_kernels::{Context, HeadsLayout, HeadsMut, HeadsRef, MatMut, MatRef, ShapeError};

use crate::error::ModelError;
use crate::generate::cells::{CellStates, StepCell};
use crate::models::rnn_seq2seq::Layers;
use crate::models::{DecoderState, Encoded, RnnSeq2SeqConfig, sources_of};
use crate::nn::additive_attention::AdditiveAttention;
use crate::nn::rnn::CellWeights;
use crate::ops::Tokens;
use crate::packed::PackedParams;
use crate::param::ParamStore;
use crate::pool::Buffer;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// The decoder's weights, packed for many steps.
#[derive(Debug)]
pub(crate) struct Packed {
    pub(crate) params: PackedParams,
    /// One a layer; with additive attention the bottom one's input is the context alone,
    cells: Vec<StepCell>,
    /// and this one's is the embedded token.
    token_cell: Option<PackedCell>,
}

impl Packed {
    pub(crate) fn new(ctx: &Context, params: &ParamStore, layers: &Layers) -> Result<Packed, ShapeError> {
        let mut token_cell = None;
        let mut cells = Vec::with_capacity(layers.decoder.len());
        for (l, layer) in layers.decoder.iter().enumerate() {
            match layer.weights() {
                CellWeights::Recurrent(weights) if l == 0 && layers.attention.is_some() => {
                    let whole = weights.views(params);
                    let columns =
                        |range| Weights { w_ih: whole.w_ih.sub(0..whole.w_ih.rows(), range), ..whole };
                    let embedding = params.shape(layers.target.table)[1];
                    token_cell = Some(PackedCell::pack(ctx, &columns(0..embedding))?);
                    let of_context = PackedCell::pack(ctx, &columns(embedding..whole.input()))?;
                    cells.push(StepCell::Recurrent(Box::new(of_context)));
                }
                weights => cells.push(StepCell::pack(ctx, params, weights)?),
            }
        }
        Ok(Packed { params: PackedParams::new(params), cells, token_cell })
    }
}

/// The encoded sources, time-major, each shared by `beams` rows.
#[derive(Debug, Clone)]
struct Source {
    /// `[source_len, sources, annotation]`.
    annotations: Arc<Vec<f32>>,
    /// `[source_len, sources, attention]` for additive attention.
    keys: Option<Arc<Vec<f32>>>,
    lengths: Arc<[usize]>,
    source_len: usize,
    annotation: usize,
}

/// A recurrent decoder between two tokens.
#[derive(Debug, Clone)]
pub(crate) struct RnnState {
    cells: CellStates,
    beams: usize,
    position: usize,
    source: Source,
    attention_wanted: bool,
}

impl RnnState {
    pub(crate) fn new(
        encoded: &Encoded,
        keys: Option<Vec<f32>>,
        beams: usize,
        vectors: usize,
    ) -> Result<RnnState, ModelError> {
        if encoded.states.is_empty() {
            return Err(ModelError::ForeignState { expected: "recurrent model" });
        }
        let repeat = |state: &Tensor| -> Vec<f32> {
            (0..state.rows()).flat_map(|row| state.row(row).repeat(beams)).collect()
        };
        Ok(RnnState {
            cells: CellStates {
                states: encoded.states.iter().map(repeat).collect(),
                vectors,
                rows: encoded.batch() * beams,
            },
            beams,
            position: 0,
            source: Source {
                annotations: Arc::new(encoded.memory.data().to_vec()),
                keys: keys.map(Arc::new),
                lengths: encoded.lengths.as_slice().into(),
                source_len: encoded.source_len,
                annotation: encoded.memory.cols(),
            },
            attention_wanted: false,
        })
    }

    /// One token a row; gives what the readout reads (or, without attention, the top state) and the weights.
    pub(crate) fn advance(
        &mut self,
        tape: &mut Tape<'_>,
        packed: &Packed,
        (config, layers): (&RnnSeq2SeqConfig, &Layers),
        tokens: &[u32],
    ) -> Result<(Var, Option<Tensor>), ModelError> {
        expect_dim("tokens", "length", self.cells.rows, tokens.len())?;
        let tokens = Tokens { ids: tokens.into(), seq: tokens.len(), first: 0 };
        let embedded = layers.target.forward(tape, &tokens)?;
        let mut weights = None;
        let mut context = None;
        // What the layer below gives.
        let mut x = tape.value(embedded).to_vec();
        for l in 0..layers.decoder.len() {
            let mut y = match (&packed.cells[l], &layers.attention) {
                (StepCell::Recurrent(cell), Some(attention)) if l == 0 => {
                    let columns = cell.gate_columns();
                    let mut gates = tape.buffer(self.cells.rows * columns);
                    let (looked, alpha) = self.look(tape, packed, attention)?;
                    weights = Some(alpha);
                    let token_cell = packed.token_cell.as_ref().expect("packed with additive attention");
                    let into = MatMut::new(&mut gates, self.cells.rows, columns)?;
                    rnn::project_with(tape.context(), token_cell, tape.matrix(embedded), into)?;
                    let looked = context.insert(looked);
                    self.cells.step(tape.context(), cell, (l, Accum::Add), looked, &mut gates)?
                }
                (cell, _) => {
                    let looked = context.as_deref().filter(|_| config.reads_context(l));
                    let both = looked.map(|looked| side_by_side(tape, self.cells.rows, &[&x, looked]));
                    self.cells.advance(tape, cell, l, both.as_deref().unwrap_or(&x))?
                }
            };
            if config.is_residual(l) {
                y.iter_mut().zip(&x).for_each(|(y, x)| *y += x);
            }
            x = y;
        }
        self.position += 1;
        let wanted = self.attention_wanted;
        let read = match (config.has_readout(), &context) {
            (false, _) => side_by_side(tape, self.cells.rows, &[&x]),
            (true, Some(context)) => {
                side_by_side(tape, self.cells.rows, &[&x, tape.value(embedded), context])
            }
            (true, None) => {
                let (context, alpha) = self.look_back(tape, &x, wanted)?;
                weights = alpha;
                side_by_side(tape, self.cells.rows, &[&context, &x])
            }
        };
        let cols = read.len() / self.cells.rows.max(1);
        let read = tape.push_inference(read, self.cells.rows, cols);
        let shape = [self.cells.rows, self.source.source_len];
        let weights =
            weights.filter(|_| wanted).map(|alpha| Tensor::new(&shape, alpha.to_vec())).transpose()?;
        Ok((read, weights))
    }

    /// Additive attention from the bottom layer's state: the context `[rows, annotation]` and the weights.
    fn look(
        &self,
        tape: &Tape<'_>,
        packed: &Packed,
        attention: &AdditiveAttention,
    ) -> Result<(Buffer, Buffer), ShapeError> {
        let (ctx, params, s) = (tape.context(), tape.params(), &self.source);
        let sources = s.lengths.len();
        let w_query = packed.params.transposed(ctx, params, attention.query)?;
        let width = w_query.cols();
        let mut query = tape.buffer(self.cells.rows * width);
        let h = MatRef::new(&self.cells.states[0], self.cells.rows, w_query.rows())?;
        let query_mat = MatMut::new(&mut query, self.cells.rows, width)?;
        gemm::gemm_packed(ctx, h, w_query, query_mat, Accum::Overwrite, &Epilogue::default())?;
        let beams_of = |width| HeadsLayout::batch_seq_heads(sources, self.beams, 1, width);
        let over_time = |width| HeadsLayout::seq_batch(s.source_len, sources, width);
        let keys = s.keys.as_ref().expect("keys were projected at the start");
        let inputs = additive::Inputs {
            query: HeadsRef::new(&query, beams_of(width))?,
            keys: HeadsRef::new(keys, over_time(width))?,
            v: params.get(attention.v),
            values: HeadsRef::new(&s.annotations, over_time(s.annotation))?,
            lengths: &s.lengths,
        };
        let mut alpha = tape.buffer(self.cells.rows * s.source_len);
        let mut context = tape.buffer(self.cells.rows * s.annotation);
        let alpha_view = HeadsMut::new(&mut alpha, beams_of(s.source_len))?;
        additive::forward(ctx, &inputs, alpha_view, HeadsMut::new(&mut context, beams_of(s.annotation))?)?;
        Ok((context, alpha))
    }

    /// Dot attention from the top layer's new state; the weights where they are wanted.
    fn look_back(
        &self,
        tape: &Tape<'_>,
        top: &[f32],
        wanted: bool,
    ) -> Result<(Buffer, Option<Buffer>), ShapeError> {
        let (ctx, s) = (tape.context(), &self.source);
        let sources = s.lengths.len();
        let beams_of = |width| HeadsLayout::batch_seq_heads(sources, self.beams, 1, width);
        let annotations =
            HeadsRef::new(&s.annotations, HeadsLayout::seq_batch(s.source_len, sources, s.annotation))?;
        let inputs = dot::Inputs {
            q: HeadsRef::new(top, beams_of(top.len() / self.cells.rows.max(1)))?,
            k: annotations,
            v: annotations,
        };
        let mask = Mask { key_lengths: Some(&s.lengths), ..Mask::none() };
        let spec = AttentionSpec { scale: 1.0, mask };
        let mut context = tape.buffer(self.cells.rows * s.annotation);
        let mut lse = tape.buffer(self.cells.rows);
        let out = HeadsMut::new(&mut context, beams_of(s.annotation))?;
        dot::forward(ctx, &inputs, &spec, out, &mut lse)?;
        if !wanted {
            return Ok((context, None));
        }
        let mut alpha = tape.buffer(self.cells.rows * s.source_len);
        for (source, alpha) in alpha.chunks_exact_mut((self.beams * s.source_len).max(1)).enumerate() {
            let into = MatMut::new(alpha, self.beams, s.source_len)?;
            dot::probabilities(ctx, inputs.q, inputs.k, &spec, (source, 0), into)?;
        }
        Ok((context, Some(alpha)))
    }
}

impl Source {
    /// Source `i` becomes what source `sources[i]` was; nothing is copied when all stay.
    fn select(&mut self, sources: &[usize]) {
        let old = self.lengths.len();
        if sources.iter().copied().eq(0..old) {
            return;
        }
        let gather = |from: &[f32]| -> Arc<Vec<f32>> {
            let width = from.len() / (self.source_len * old).max(1);
            let rows = (0..self.source_len).flat_map(|t| sources.iter().map(move |s| t * old + s));
            Arc::new(rows.flat_map(|row| &from[row * width..(row + 1) * width]).copied().collect())
        };
        let (annotations, keys) = (gather(&self.annotations), self.keys.as_ref().map(|keys| gather(keys)));
        (self.annotations, self.keys) = (annotations, keys);
        self.lengths = sources.iter().map(|&s| self.lengths[s]).collect();
    }
}

impl DecoderState for RnnState {
    fn rows(&self) -> usize {
        self.cells.rows
    }

    fn position(&self) -> usize {
        self.position
    }

    fn want_attention(&mut self, wanted: bool) {
        self.attention_wanted = wanted;
    }

    fn reorder(&mut self, rows: &[usize]) -> Result<(), ModelError> {
        let sources = sources_of(rows, self.cells.rows, self.beams)?;
        if !rows.iter().copied().eq(0..self.cells.rows) {
            self.cells.select(rows);
            self.source.select(&sources);
        }
        Ok(())
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// Columns of several row-major matrices next to each other, as a value of the tape.
fn side_by_side(tape: &Tape<'_>, rows: usize, parts: &[&[f32]]) -> Buffer {
    let cols: usize = parts.iter().map(|part| part.len() / rows.max(1)).sum();
    let mut joined = tape.buffer(rows * cols);
    let mut first = 0;
    for part in parts {
        let width = part.len() / rows.max(1);
        for (to, from) in joined.chunks_exact_mut(cols.max(1)).zip(part.chunks_exact(width.max(1))) {
            to[first..first + width].copy_from_slice(from);
        }
        first += width;
    }
    joined
}
