//! The task of characters: a text, split into what is learnt from and what is judged by.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use kavanam_kernels::Context;
use kavanam_model::ModelError;
use kavanam_model::models::{CellKind, CharLm, CharLmConfig};
use kavanam_model::train::{Decay, Example, Schedule, TrainerConfig};
use kavanam_model::vocab::Vocab;

use super::fit::{At, Judge, Judged};
use super::recipe::{Preset, cell_name};
use crate::error::HarnessError;

/// Characters of a training window; each begins with a state of zeros.
const WINDOW: usize = 128;
/// The part of the text, at its end, that no model is trained on: one in so many.
const HELD_OUT: usize = 10;
/// The shortest text.
const SHORTEST: usize = 1000;
/// Characters that a point of the curve is judged by.
const JUDGED: usize = 20_000;
/// Characters read in one call while a text is judged.
const CHUNK: usize = 512;

/// A text as ids.
pub(crate) struct Text {
    /// Its characters, in the order of their code points.
    pub(crate) vocab: Vocab,
    ids: Vec<u32>,
}

impl Text {
    /// Reads a text in UTF-8.
    ///
    /// # Errors
    /// When the file cannot be read, is no UTF-8, or is too short to learn from.
    pub(crate) fn load(path: &Path) -> Result<Text, HarnessError> {
        let bytes = fs::read(path).map_err(HarnessError::io("read", path))?;
        let wrong = |problem: String| HarnessError::Failed(format!("{}: {problem}", path.display()));
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            wrong(format!("not a text in UTF-8: byte {} begins no character", at + 1))
        })?;
        let length = text.chars().count();
        if length < SHORTEST {
            return Err(wrong(format!("has {length} characters, expected at least {SHORTEST}")));
        }
        let distinct: BTreeSet<char> = text.chars().collect();
        let vocab = Vocab::new(distinct.iter().map(char::to_string)).map_err(|e| wrong(e.to_string()))?;
        let id = |c: char| vocab.id(c.encode_utf8(&mut [0; 4])).expect("the vocabulary is that of the text");
        let ids = text.chars().map(id).collect();
        Ok(Text { vocab, ids })
    }

    fn split(&self) -> usize {
        self.ids.len() - self.ids.len() / HELD_OUT
    }

    /// Windows of all but the end.
    pub(crate) fn training_examples(&self) -> Vec<Example> {
        kavanam_model::models::char_lm::windows(&self.ids[..self.split()], WINDOW)
    }

    /// The end, with the character before it.
    pub(crate) fn held_out(&self) -> &[u32] {
        &self.ids[self.split() - 1..]
    }
}

/// The model and the trainer's settings of a preset.
pub(crate) fn recipe(preset: Preset, vocab: usize, seed: u64) -> (CharLmConfig, TrainerConfig) {
    let base = CharLmConfig::new(vocab, CellKind::Lstm);
    let model = match preset {
        Preset::Quick => base,
        Preset::Full => CharLmConfig { hidden: 512, layers: 2, dropout: 0.1, ..base },
    };
    let schedule = Schedule {
        peak_lr: 5e-3,
        warmup_steps: 50,
        decay: Decay::InverseSqrt,
        total_steps: None,
        cooldown: 0.6,
    };
    let trainer = TrainerConfig {
        seed,
        batch_tokens: 32 * (WINDOW + 2),
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
pub(crate) fn describe(model: &CharLmConfig) -> String {
    let CharLmConfig { vocab, cell, hidden, layers, .. } = *model;
    format!("{} language model of {vocab} characters, {layers} × {hidden}", cell_name(cell))
}

/// The mean information of a character after those before it, −log₂ p, the state carried from the first to the last.
///
/// # Errors
/// When the model refuses the text or its logits are not finite.
pub(crate) fn bits_per_character(ctx: &Context, model: &CharLm, text: &[u32]) -> Result<f64, HarnessError> {
    let (mut state, mut bits) = (model.start(1), 0.0);
    let count = text.len().saturating_sub(1);
    for start in (0..count).step_by(CHUNK) {
        let end = (start + CHUNK).min(count);
        let logits = model.read(ctx, &mut state, &text[start..end])?;
        for (row, &next) in text[start + 1..=end].iter().enumerate() {
            let logits = logits.row(row);
            let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = logits.iter().map(|&x| f64::from(x - highest).exp()).sum();
            bits += (sum.ln() - f64::from(logits[next as usize] - highest)) / std::f64::consts::LN_2;
        }
    }
    if !bits.is_finite() {
        return Err(ModelError::NotFinite { what: "logits" }.into());
    }
    Ok(bits / count.max(1) as f64)
}

/// Judges a model by the beginning of the held-out text.
pub(crate) struct HeldOut<'a>(pub(crate) &'a Text);

impl Judge<CharLm> for HeldOut<'_> {
    type Point = ();

    fn judge(&self, ctx: &Context, model: &CharLm, _: At) -> Result<Judged<()>, HarnessError> {
        let text = self.0.held_out();
        let score = bits_per_character(ctx, model, &text[..text.len().min(JUDGED)])?;
        Ok(Judged { score, said: format!("{score:.3} bits a character"), point: () })
    }
}

#[cfg(test)]
mod tests {
    use kavanam_kernels::Isa;

    use super::*;

    fn text(content: &[u8]) -> Result<Text, HarnessError> {
        let path =
            std::env::temp_dir().join(format!("kavanam-text-{}-{}", std::process::id(), content.len()));
        fs::write(&path, content).unwrap();
        let text = Text::load(&path);
        fs::remove_file(&path).unwrap();
        text
    }

    #[test]
    fn nothing_of_the_end_is_trained_on() {
        let content = "zwölf Boxkämpfer\n".repeat(100);
        let text = text(content.as_bytes()).unwrap();
        let trained: Vec<u32> = text.training_examples().iter().flat_map(|e| e.target.clone()).collect();
        let whole = [&trained, &text.held_out()[1..]].concat();
        let read: String = whole.iter().map(|&id| text.vocab.token(id)).collect();
        assert_eq!(read, content);
        assert_eq!(text.held_out()[0], *trained.last().unwrap());
    }

    #[test]
    fn an_untrained_model_needs_about_the_bits_of_its_characters() {
        let text = text("abcdefghijklm nopqrstuvwxyz.".repeat(60).as_bytes()).unwrap();
        let (model, _) = recipe(Preset::Quick, text.vocab.len(), 1);
        let mut model = CharLm::new(&CharLmConfig { hidden: 8, ..model }, 1).unwrap();
        model.params_mut().values_mut().fill(0.0);
        let bits = bits_per_character(&Context::with_isa(Isa::best()), &model, text.held_out()).unwrap();
        // All of 28 characters and 4 special tokens are equally likely.
        assert!((bits - 5.0).abs() < 1e-6, "{bits}");
    }

    #[test]
    fn texts_that_cannot_be_learnt_from_are_refused() {
        let error = |content: &[u8]| text(content).err().unwrap().to_string();
        assert!(error(b"").contains("has 0 characters"), "{}", error(b""));
        assert!(error(b"short").contains("has 5 characters, expected at least 1000"));
        let latin = [&b"a".repeat(2000)[..], b"\xe9"].concat();
        assert!(error(&latin).contains("byte 2001 begins no character"), "{}", error(&latin));
    }
}
