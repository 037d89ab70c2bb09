//! The task of classes: lines of `label<TAB>text`, split into what is learnt from and what is judged by.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use kavanam_kernels::Context;
use kavanam_model::ModelError;
use kavanam_model::Tensor;
use kavanam_model::io::classifier::Labels;
use kavanam_model::models::classifier::padded;
use kavanam_model::models::{CellKind, Classifier, ClassifierConfig, ClassifierEncoder, Pooling};
use kavanam_model::train::{Decay, Example, Schedule, TrainerConfig};
use kavanam_model::vocab::{UNK, Vocab};

use super::fit::{At, Judge, Judged};
use super::recipe::{Preset, cell_name};
use crate::error::HarnessError;

/// One line in so many is for validation.
const HELD_OUT: usize = 10;
/// The most words of a vocabulary, the most frequent ones.
const MOST_WORDS: usize = 20_000;
/// How often the training lines must have a word for it to count; rarer ones are all the same unknown word.
const FEWEST: usize = 2;
/// Lines that are judged in one call.
const CHUNK: usize = 64;

/// Labelled texts as ids.
pub(crate) struct Labelled {
    /// The words and the names of the classes, both in alphabetical order.
    pub(crate) labels: Labels,
    train: Vec<Example>,
    held_out: Vec<Example>,
}

/// The words of a text: runs of letters and digits, in lower case.
pub(crate) fn words(text: &str) -> impl Iterator<Item = String> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_lowercase)
}

/// What a classifier reads for a text.
pub(crate) fn encode(vocab: &Vocab, text: &str) -> Vec<u32> {
    words(text).map(|word| vocab.id(&word).unwrap_or(UNK)).collect()
}

impl Labelled {
    /// Reads lines of `label<TAB>text` in UTF-8. Every tenth line is held out; the words are those of the others.
    ///
    /// # Errors
    /// When the file cannot be read or is no UTF-8, when a line has no tab, no label or no word (the line is named), or
    /// when all lines to learn from have one label, or a held-out line has a label that they lack.
    pub(crate) fn load(path: &Path) -> Result<Labelled, HarnessError> {
        let bytes = fs::read(path).map_err(HarnessError::io("read", path))?;
        let wrong = |problem: String| HarnessError::Failed(format!("{}: {problem}", path.display()));
        let content = String::from_utf8(bytes).map_err(|error| {
            let line = error.as_bytes()[..error.utf8_error().valid_up_to()].split(|&b| b == b'\n').count();
            wrong(format!("line {line} is no text in UTF-8"))
        })?;
        let mut lines = Vec::new();
        for (index, line) in content.lines().enumerate() {
            let wrong = |problem: &str| wrong(format!("line {} {problem}", index + 1));
            let (label, text) = line.split_once('\t').ok_or_else(|| wrong("has no tab after its label"))?;
            if label.trim().is_empty() {
                return Err(wrong("has no label before its tab"));
            }
            if words(text).next().is_none() {
                return Err(wrong("has no word after its label"));
            }
            lines.push((label.trim(), text));
        }
        let learnt_from =
            || lines.iter().enumerate().filter(|(i, _)| !is_held_out(*i)).map(|(_, line)| *line);
        let classes: BTreeSet<&str> = learnt_from().map(|(label, _)| label).collect();
        if classes.len() < 2 || lines.len() < HELD_OUT {
            let (count, classes) = (lines.len(), classes.len());
            let problem = format!(
                "{count} lines with {classes} labels to learn from, expected at least {HELD_OUT} and 2"
            );
            return Err(wrong(problem));
        }
        let classes: Vec<String> = classes.into_iter().map(String::from).collect();
        let tokens = vocabulary(learnt_from().map(|(_, text)| text)).map_err(|e| wrong(e.to_string()))?;
        let (mut train, mut held_out) = (Vec::new(), Vec::new());
        for (index, (label, text)) in lines.iter().enumerate() {
            let class = classes.iter().position(|class| class == label).ok_or_else(|| {
                wrong(format!("line {}: no line that is learnt from has the label {label:?}", index + 1))
            })?;
            let example = Example { source: encode(&tokens, text), target: vec![class as u32] };
            if is_held_out(index) { held_out.push(example) } else { train.push(example) }
        }
        Ok(Labelled { labels: Labels { tokens, classes }, train, held_out })
    }

    /// All lines that are not held out.
    pub(crate) fn training_examples(&self) -> Vec<Example> {
        self.train.clone()
    }

    /// How many lines a model is judged by.
    pub(crate) fn held_out(&self) -> usize {
        self.held_out.len()
    }

    /// Refuses a model that cannot read the longest text.
    ///
    /// # Errors
    /// [`HarnessError::Usage`] names both lengths.
    pub(crate) fn check_length(&self, model: &ClassifierConfig) -> Result<(), HarnessError> {
        let longest = self.train.iter().chain(&self.held_out).map(|e| e.source.len()).max().unwrap_or(0);
        match model.encoder {
            ClassifierEncoder::Transformer { max_positions, .. } if longest > max_positions => {
                Err(HarnessError::Usage(format!(
                    "--data has a text of {longest} words, max_positions of --config is {max_positions}"
                )))
            }
            _ => Ok(()),
        }
    }
}

fn is_held_out(line: usize) -> bool {
    line % HELD_OUT == HELD_OUT - 1
}

/// The most frequent words, in alphabetical order.
fn vocabulary<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Vocab, kavanam_model::vocab::VocabError> {
    let mut counts = BTreeMap::<String, usize>::new();
    for word in texts.flat_map(words) {
        *counts.entry(word).or_default() += 1;
    }
    let mut frequent: Vec<(String, usize)> = counts.into_iter().filter(|(_, n)| *n >= FEWEST).collect();
    frequent.sort_by_key(|(_, n)| std::cmp::Reverse(*n)); // stable: ties stay alphabetical
    frequent.truncate(MOST_WORDS);
    frequent.sort();
    Vocab::new(frequent.into_iter().map(|(word, _)| word))
}

/// The model and the trainer's settings of a preset, for so many tokens and classes.
pub(crate) fn recipe(
    preset: Preset,
    (vocab, classes): (usize, usize),
    seed: u64,
) -> (ClassifierConfig, TrainerConfig) {
    let (embedding, hidden) = match preset {
        Preset::Quick => (64, 64),
        Preset::Full => (128, 256),
    };
    let (cell, layers) = (CellKind::Lstm, 1);
    let encoder =
        ClassifierEncoder::Recurrent { cell, hidden, projection: None, layers, bidirectional: true };
    let model = ClassifierConfig { vocab, classes, embedding, encoder, pooling: Pooling::Mean, dropout: 0.3 };
    let schedule = Schedule {
        peak_lr: 3e-3,
        warmup_steps: 50,
        decay: Decay::InverseSqrt,
        total_steps: None,
        cooldown: 0.6,
    };
    let trainer = TrainerConfig {
        seed,
        batch_tokens: 2048,
        grad_shards: 2,
        label_smoothing: 0.0,
        clip_norm: 1.0,
        beta1: 0.9,
        beta2: 0.98,
        epsilon: 1e-9,
        weight_decay: 0.01,
        schedule,
    };
    (model, trainer)
}

/// One line on the architecture.
pub(crate) fn describe(model: &ClassifierConfig) -> String {
    let pooling = match model.pooling {
        Pooling::Mean => "mean",
        Pooling::Last => "last state",
    };
    let encoder = match model.encoder {
        ClassifierEncoder::Recurrent { cell, hidden, projection, layers, bidirectional } => {
            let direction = if bidirectional { "bidirectional" } else { "forward" };
            let projected = projection.map_or(String::new(), |width| format!(" projected to {width}"));
            format!("{direction} {}, {layers} × {hidden}{projected}", cell_name(cell))
        }
        ClassifierEncoder::Transformer { heads, feed_forward, layers, .. } => {
            let width = model.embedding;
            format!("transformer, {layers} layers, width {width}, {heads} heads, feed-forward {feed_forward}")
        }
    };
    format!("classifier of {} words into {} classes, {encoder}, {pooling}", model.vocab, model.classes)
}

/// The probability of each class, row by row.
///
/// # Errors
/// When the model refuses a text or its logits are not finite.
pub(crate) fn probabilities(
    ctx: &Context,
    model: &Classifier,
    texts: &[&[u32]],
) -> Result<Vec<Vec<f64>>, HarnessError> {
    let (tokens, lengths) = padded(texts);
    let logits: Tensor = model.predict(ctx, &tokens, &lengths)?;
    let row = |i: usize| {
        let logits = logits.row(i);
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let shares: Vec<f64> = logits.iter().map(|&x| f64::from(x - highest).exp()).collect();
        let sum: f64 = shares.iter().sum();
        if !sum.is_finite() {
            return Err(ModelError::NotFinite { what: "logits" }.into());
        }
        Ok(shares.into_iter().map(|share| share / sum).collect())
    };
    (0..texts.len()).map(row).collect()
}

/// The likeliest class; the first of several.
pub(crate) fn likeliest(probabilities: &[f64]) -> usize {
    let best = |best: usize, i: usize| if probabilities[i] > probabilities[best] { i } else { best };
    (0..probabilities.len()).fold(0, best)
}

/// Judges a model by the lines that are held out.
pub(crate) struct HeldOut<'a>(pub(crate) &'a Labelled);

impl HeldOut<'_> {
    /// The share of held-out lines whose likeliest class is wrong.
    ///
    /// # Errors
    /// As [`probabilities`].
    pub(crate) fn error_rate(&self, ctx: &Context, model: &Classifier) -> Result<f64, HarnessError> {
        let mut wrong = 0;
        for examples in self.0.held_out.chunks(CHUNK) {
            let texts: Vec<&[u32]> = examples.iter().map(|example| &*example.source).collect();
            for (row, example) in probabilities(ctx, model, &texts)?.iter().zip(examples) {
                wrong += usize::from(likeliest(row) != example.target[0] as usize);
            }
        }
        Ok(wrong as f64 / self.0.held_out.len().max(1) as f64)
    }
}

impl Judge<Classifier> for HeldOut<'_> {
    type Point = ();

    fn judge(&self, ctx: &Context, model: &Classifier, _: At) -> Result<Judged<()>, HarnessError> {
        let score = self.error_rate(ctx, model)?;
        Ok(Judged { score, said: format!("{:.2} % wrong", 100.0 * score), point: () })
    }
}
