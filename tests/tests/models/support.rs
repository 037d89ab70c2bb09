//! Small configurations of every kind, and data for them.

use kavanam_kernels::{Context, Isa};
use kavanam_model::models::{
    AttentionKind, Bridge, CellKind, DropoutRates, FeedForwardActivation, Implementation, NormPlacement,
    Positions, RnnSeq2SeqConfig, TransformerConfig,
};
use kavanam_model::{Batch, Grads, ModelConfig, ParamStore};

pub(crate) const VOCAB: usize = 11;

/// The best instruction set, one thread.
pub(crate) fn ctx() -> Context {
    Context::with_isa(Isa::best())
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// xorshift64*.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed * 2 + 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Uniform in (−1, 1).
    pub(crate) fn symmetric(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 33) % n as u64) as usize
    }
}

/// A transformer of each kind: both norm placements, positions, activations, tied, shared, uneven depths.
pub(crate) fn transformers() -> Vec<ModelConfig> {
    let mut base = TransformerConfig::new(VOCAB, VOCAB);
    (base.width, base.heads, base.feed_forward, base.max_positions) = (12, 3, 20, 16);
    (base.encoder_layers, base.decoder_layers) = (1, 2);
    // Smooth, so that differences of the loss have no corner to step over.
    base.activation = FeedForwardActivation::Gelu;
    base.dropout = DropoutRates::uniform(0.1);
    let mut post = base.clone();
    (post.norm, post.final_norm, post.positions) = (NormPlacement::Post, false, Positions::Learned);
    (post.tie_output, post.scale_embeddings, post.heads) = (false, false, 2);
    let mut shared = base.clone();
    (shared.share_embeddings, shared.encoder_layers, shared.decoder_layers) = (true, 2, 1);
    [base, post, shared].map(ModelConfig::Transformer).to_vec()
}

/// A recurrent model of each kind: all cells, all attentions, one to four layers, residual or not, projected or not, both bridges.
pub(crate) fn rnns() -> Vec<ModelConfig> {
    let mut all = Vec::new();
    for cell in [CellKind::Lstm, CellKind::Gru, CellKind::Tanh] {
        for attention in [AttentionKind::None, AttentionKind::Additive, AttentionKind::Dot] {
            let mut config = RnnSeq2SeqConfig::new(VOCAB, VOCAB, cell, attention);
            (config.embedding, config.hidden, config.encoder_hidden) = (6, 10, 5);
            (config.attention_width, config.readout, config.dropout) = (7, 9, 0.1);
            config.bidirectional = true;
            config.layers = if cell == CellKind::Gru { 2 } else { 1 };
            config.bridge = if attention == AttentionKind::Additive { Bridge::Tanh } else { Bridge::Copy };
            if attention == AttentionKind::Additive {
                config.encoder_hidden = 4;
            }
            if attention == AttentionKind::Dot {
                (config.tie_output, config.readout) = (true, config.embedding);
            }
            all.push(ModelConfig::RnnSeq2Seq(config));
        }
    }
    for (cell, attention) in [
        (CellKind::LstmPeephole, AttentionKind::Additive),
        (CellKind::GruResetBefore, AttentionKind::None),
        (CellKind::GruResetBefore, AttentionKind::Additive),
        (CellKind::MinGru, AttentionKind::None),
        (CellKind::MinGru, AttentionKind::Dot),
        (CellKind::MinLstm, AttentionKind::Dot),
    ] {
        let mut config = RnnSeq2SeqConfig::new(VOCAB, VOCAB, cell, attention);
        (config.embedding, config.hidden, config.encoder_hidden) = (6, 10, 5);
        (config.readout, config.layers, config.dropout, config.bidirectional) = (9, 2, 0.1, true);
        config.bridge = if cell == CellKind::MinGru { Bridge::Copy } else { Bridge::Tanh };
        all.push(ModelConfig::RnnSeq2Seq(config));
    }
    let mut gnmt = RnnSeq2SeqConfig::gnmt(VOCAB, VOCAB);
    (gnmt.embedding, gnmt.hidden, gnmt.encoder_hidden, gnmt.attention_width) = (6, 9, 5, 7);
    let mut residual = RnnSeq2SeqConfig::new(VOCAB, VOCAB, CellKind::Gru, AttentionKind::Dot);
    (residual.embedding, residual.hidden, residual.encoder_hidden, residual.readout) = (6, 10, 5, 7);
    (residual.layers, residual.residual, residual.dropout) = (3, true, 0.1);
    let mut scans = residual.clone();
    (scans.cell, scans.attention, scans.layers) = (CellKind::MinGru, AttentionKind::None, 4);
    let mut naive = residual.clone();
    naive.implementation = Implementation::Naive;
    all.extend([gnmt, residual, scans, naive].map(ModelConfig::RnnSeq2Seq));
    let mut forward = RnnSeq2SeqConfig::new(VOCAB, VOCAB, CellKind::Lstm, AttentionKind::None);
    (forward.embedding, forward.hidden, forward.encoder_hidden) = (6, 8, 8);
    all.push(ModelConfig::RnnSeq2Seq(forward));
    all.extend(projected_rnns().map(ModelConfig::RnnSeq2Seq));
    all
}

/// LSTMs whose state is projected: without attention and copied, with either attention, in a deep stack.
fn projected_rnns() -> [RnnSeq2SeqConfig; 4] {
    let model = |cell, attention| {
        let mut config = RnnSeq2SeqConfig::new(VOCAB, VOCAB, cell, attention);
        (config.embedding, config.hidden, config.encoder_hidden) = (6, 10, 5);
        (config.projection, config.encoder_projection) = (Some(6), Some(3));
        (config.attention_width, config.readout, config.dropout) = (7, 9, 0.1);
        (config.layers, config.bidirectional) = (2, true);
        config
    };
    let mut copied = model(CellKind::Lstm, AttentionKind::None);
    (copied.bridge, copied.tie_output) = (Bridge::Copy, true);
    let additive = model(CellKind::LstmPeephole, AttentionKind::Additive);
    let mut dot = model(CellKind::Lstm, AttentionKind::Dot);
    // The encoder alone is projected, so that its annotations are as wide as the decoder's state.
    (dot.hidden, dot.projection) = (6, None);
    let mut gnmt = RnnSeq2SeqConfig::gnmt(VOCAB, VOCAB);
    (gnmt.embedding, gnmt.hidden, gnmt.encoder_hidden, gnmt.attention_width) = (6, 9, 5, 7);
    (gnmt.projection, gnmt.encoder_projection) = (Some(4), Some(3));
    [copied, additive, dot, gnmt]
}

/// Pairs of different lengths.
pub(crate) fn pairs() -> Vec<(Vec<u32>, Vec<u32>)> {
    vec![
        (vec![4, 9, 7, 5, 10], vec![8, 4, 6, 9]),
        (vec![6], vec![7]),
        (vec![10, 3, 8], vec![5, 5, 10, 3, 4, 9]),
    ]
}

pub(crate) fn small_pairs() -> Batch {
    Batch::from_pairs(&pairs()).unwrap()
}

/// Asserts that the gradient of each tensor agrees with differences of the loss along one direction of random signs.
/// `at_start` is the loss where the gradients were made; `params` gives the model's parameters.
#[track_caller]
pub(crate) fn assert_differences<M: ?Sized>(
    what: &str,
    (model, params): (&mut M, fn(&mut M) -> &mut ParamStore),
    (grads, at_start): (&Grads, f64),
    random: &mut Random,
    loss: impl Fn(&M) -> f64,
) {
    let h = 1.0f32 / 64.0;
    for id in params(model).ids().collect::<Vec<_>>() {
        let gradient = grads.get(id);
        let scale = 1.0 / (gradient.len() as f32).sqrt();
        let direction: Vec<f32> = gradient.iter().map(|_| random.symmetric().signum() * scale).collect();
        let analytic: f64 = gradient.iter().zip(&direction).map(|(g, u)| f64::from(g * u)).sum();
        let mut at = |steps: f32| {
            let old = params(model).get(id).to_vec();
            for (x, u) in params(model).get_mut(id).iter_mut().zip(&direction) {
                *x += steps * h * u;
            }
            let value = loss(model);
            params(model).get_mut(id).copy_from_slice(&old);
            value
        };
        let numeric = (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * f64::from(h));
        // The loss is rounded to f32 and carries some roundings more: 8·ε·loss for each of 18/12 differences.
        let tolerance = 12.0 * f64::from(f32::EPSILON) * at_start / f64::from(h) + 2e-3 * analytic.abs();
        assert!(
            (analytic - numeric).abs() <= tolerance,
            "{} of {what}: gradient {analytic}, differences {numeric}, tolerance {tolerance}",
            params(model).name(id)
        );
    }
}
