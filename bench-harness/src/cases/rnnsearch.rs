//! A training step of RNNsearch: a bidirectional GRU, additive attention, a GRU decoder and the loss of its words,
//! forward and backward to every weight. The optimiser is left out: the weights stay, so every call has one result.

use std::borrow::Cow;

use kavanam_kernels::{Context, Isa, Precision};
use kavanam_model::models::{AttentionKind, CellKind, RnnSeq2Seq, RnnSeq2SeqConfig};
use kavanam_model::{Batch, DropoutKey, Grads, LossOptions, Pool, Seq2Seq, Tape};

use crate::cases::{Case, Op, Work, check_close, tolerance};
use crate::error::HarnessError;
use crate::measure::statistics::SplitMix64;

/// The sizes of one step. Every sentence is full: padding costs neither side anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Pairs of sentences.
    pub(crate) batch: usize,
    /// Words of a source, and of a target with its end.
    pub(crate) seq: usize,
    /// Width of embeddings, of each direction of the encoder, of decoder, comparison and readout.
    pub(crate) width: usize,
    /// Words of each language.
    pub(crate) vocab: usize,
}

/// batch, words, width, vocabulary; whether `--quick` measures it.
const SHAPES: [([usize; 4], bool); 2] = [([16, 10, 64, 500], true), ([32, 32, 512, 8000], false)];

/// The weights whose gradient is checked: it has come back through the loss, the decoder and its attention.
const CHECKED: &str = "encoder.rnn.weight_hh_l0";

/// Ids from here on are words.
const FIRST_WORD: usize = 4;

impl Shape {
    fn config(&self) -> RnnSeq2SeqConfig {
        let Shape { width, vocab, .. } = *self;
        RnnSeq2SeqConfig {
            embedding: width,
            hidden: width,
            encoder_hidden: width,
            attention_width: width,
            readout: width,
            dropout: 0.0,
            ..RnnSeq2SeqConfig::new(vocab, vocab, CellKind::Gru, AttentionKind::Additive)
        }
    }

    /// The matrix products, each of them once forward and twice backward.
    pub(crate) fn work(&self) -> Work {
        let Shape { batch, seq, width, vocab } = *self;
        let square = width * width;
        let source_word = 2 * 6 * square + 2 * square;
        let target_word = (3 * 4 + 1 + 4) * square + width * vocab;
        let rows = (batch * seq) as f64;
        let flops = 6.0 * rows * (source_word + target_word) as f64;
        let bytes = 12.0 * self.config().parameter_count() as f64;
        Work { flops: Some(flops), bytes }
    }
}

/// Every case.
pub(crate) fn cases() -> Vec<Case> {
    let case = |([batch, seq, width, vocab], quick): ([usize; 4], bool)| Case {
        name: format!("rnnsearch-train/{batch}x{seq}x{width}x{vocab}"),
        op: Op::RnnSearch(Shape { batch, seq, width, vocab }),
        quick,
    };
    SHAPES.into_iter().map(case).collect()
}

/// The model, a batch, and what one call gives.
#[derive(Debug)]
pub(crate) struct Problem {
    /// The sizes.
    pub(crate) shape: Shape,
    /// The model with its weights.
    pub(crate) model: Box<RnnSeq2Seq>,
    /// The words.
    pub(crate) batch: Batch,
    /// The loss, and the gradient that is checked.
    expected: [Vec<f64>; 2],
}

/// The largest difference of f32, relative to the largest element.
const TOLERANCE: f64 = 1e-3;

impl Problem {
    /// A new model and random words.
    ///
    /// # Panics
    /// When the model refuses its own configuration or words, which is a fault of this table.
    pub(crate) fn new(shape: Shape) -> Problem {
        let mut random = SplitMix64(shape.width as u64);
        let mut words = |count: usize| -> Vec<u32> {
            (0..count).map(|_| (FIRST_WORD + random.below(shape.vocab - FIRST_WORD)) as u32).collect()
        };
        let pairs: Vec<_> = (0..shape.batch).map(|_| (words(shape.seq), words(shape.seq - 1))).collect();
        let batch = Batch::from_pairs(&pairs).expect("sentences of words");
        let model = Box::new(RnnSeq2Seq::new(&shape.config(), 1).expect("a valid configuration"));
        let mut problem = Problem { shape, model, batch, expected: [Vec::new(), Vec::new()] };
        let mut grads = Grads::zeros(problem.model.params());
        let context = Context::with_isa(Isa::best());
        let loss = problem.step(&context, &Pool::new(), &mut grads).expect("the model takes its own batch");
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect();
        problem.expected = [wide(&[loss]), wide(problem.checked(&grads))];
        problem
    }

    /// Forward and backward; gives the loss summed over all words.
    ///
    /// # Errors
    /// When the model refuses the batch.
    pub(crate) fn step(
        &self,
        context: &Context,
        pool: &Pool,
        grads: &mut Grads,
    ) -> Result<f32, HarnessError> {
        grads.zero();
        let dropout = DropoutKey { seed: 0, step: 0, shard: 0 };
        let mut tape = Tape::training(context, self.model.params(), pool, dropout);
        let loss = self.model.loss(&mut tape, &self.batch, &LossOptions { label_smoothing: 0.0 })?;
        let value = tape.value(loss)[0];
        tape.backward(loss, grads)?;
        Ok(value)
    }

    /// The gradient that is checked.
    ///
    /// # Panics
    /// When the model has no such weights.
    pub(crate) fn checked<'g>(&self, grads: &'g Grads) -> &'g [f32] {
        grads.get(self.model.params().find(CHECKED).expect("a recurrent encoder"))
    }

    /// The elements of each output: the loss and the gradient.
    pub(crate) fn output_lengths(&self) -> [usize; 2] {
        [1, self.expected[1].len()]
    }

    /// Compares the loss and a gradient with those of this crate's model on one thread: a peer computes them from
    /// the same weights by a program of its own. The kernels below have their tests against f64.
    ///
    /// # Errors
    /// Names what differs.
    pub(crate) fn check(&self, outputs: &[Cow<'_, [f32]>], precision: Precision) -> Result<(), HarnessError> {
        let bound = tolerance(TOLERANCE, precision);
        check_close("loss", &outputs[0], &self.expected[0], bound)?;
        check_close(CHECKED, &outputs[1], &self.expected[1], bound)
    }
}
