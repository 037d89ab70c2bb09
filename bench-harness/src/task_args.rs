//! Arguments of the commands that train and use models.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use kavanam_model::train::TrainerConfig;

use crate::cli::ContextArgs;
use crate::tasks::recipe::{Family, Preset};

/// The tasks that there is data for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Task {
    /// Letters to phones: the embedded CMU pronouncing dictionary
    G2p,
    /// The next character of a text, by a recurrent language model: the text is --data
    Chars,
    /// The class of a text: --data has lines of label, tab, text
    Classify,
}

/// Arguments of `kavanam compare`.
#[derive(Debug, Clone, Args)]
pub(crate) struct CompareArgs {
    /// How large the models are and how long they train
    #[arg(long, value_enum, default_value = "quick")]
    pub(crate) preset: Preset,
    /// Seed of initialisation, data order and dropout
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Folder for results, report and models [default: results/MACHINE/DATE-COMMIT]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Seconds of training for each model instead of the preset's
    #[arg(long, value_parser = positive_seconds)]
    pub(crate) seconds: Option<f64>,
    /// Test words to decode instead of all
    #[arg(long, value_name = "N")]
    pub(crate) test_words: Option<usize>,
    /// Leave out the sweep over sequence lengths
    #[arg(long)]
    pub(crate) no_sweep: bool,
    /// How kernels run.
    #[command(flatten)]
    pub(crate) context: ContextArgs,
}

impl Default for CompareArgs {
    /// What `kavanam` alone runs.
    fn default() -> CompareArgs {
        CompareArgs {
            preset: Preset::Quick,
            seed: 1,
            out: None,
            seconds: None,
            test_words: None,
            no_sweep: false,
            context: ContextArgs::default(),
        }
    }
}

/// Arguments of `kavanam train`.
#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    /// What to learn
    #[arg(long, value_enum, default_value = "g2p")]
    pub(crate) task: Task,
    /// What to learn from, in UTF-8: for chars a text, its last tenth for validation; for classify lines of label, tab,
    /// text, every tenth line for validation
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,
    /// Which model, for the task g2p [default: transformer]; those of the others are LSTMs, or what --config says
    #[arg(long, value_enum)]
    pub(crate) model: Option<Family>,
    /// Folder of the checkpoint: config.json, vocab.json, model.safetensors, training.safetensors
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// The recipe: sizes and rates of that comparison
    #[arg(long, value_enum, default_value = "quick")]
    pub(crate) preset: Preset,
    /// Steps to train; with the seed this fixes the result bit for bit
    #[arg(long, value_name = "N", conflicts_with = "seconds", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) steps: Option<u64>,
    /// Seconds to train: the steps before the cooldown are timed, and as many planned as fit [default: 60]
    #[arg(long, value_parser = positive_seconds)]
    pub(crate) seconds: Option<f64>,
    /// Seed of initialisation, data order and dropout
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Go on from the checkpoint in --out, with its own configuration
    #[arg(long, conflicts_with_all = ["seed", "preset"])]
    pub(crate) resume: bool,
    /// Highest learning rate instead of the recipe's
    #[arg(long, value_name = "RATE", conflicts_with = "resume")]
    pub(crate) lr: Option<f32>,
    /// Most padded tokens in a batch (source and target) instead of the recipe's
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    pub(crate) batch_tokens: Option<usize>,
    /// Label smoothing instead of the recipe's
    #[arg(long, value_name = "SHARE", conflicts_with = "resume")]
    pub(crate) label_smoothing: Option<f32>,
    /// Steps over which the rate rises, instead of the recipe's
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    pub(crate) warmup_steps: Option<u64>,
    /// Part of the run, at its end, over which the rate falls to zero, instead of the recipe's
    #[arg(long, value_name = "SHARE", conflicts_with = "resume")]
    pub(crate) cooldown: Option<f32>,
    /// Fields of the model's configuration to change: JSON, for example '{"width": 64}'
    #[arg(long, value_name = "JSON", conflicts_with = "resume", value_parser = json_object)]
    pub(crate) config: Option<serde_json::Map<String, serde_json::Value>>,
    /// Points of the validation curve
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub(crate) points: u64,
    /// Validation words for each point, for the task g2p
    #[arg(long, default_value_t = 800, value_name = "N")]
    pub(crate) valid_words: usize,
    /// Beam width of the final validation, beside the greedy one, for the task g2p
    #[arg(long, default_value = "5", value_name = "N")]
    pub(crate) beam: NonZeroUsize,
    /// How kernels run.
    #[command(flatten)]
    pub(crate) context: ContextArgs,
}

impl TrainArgs {
    /// Puts the flags that were given into the trainer's settings.
    pub(crate) fn tune(&self, trainer: &mut TrainerConfig) {
        let schedule = &mut trainer.schedule;
        schedule.peak_lr = self.lr.unwrap_or(schedule.peak_lr);
        schedule.warmup_steps = self.warmup_steps.unwrap_or(schedule.warmup_steps);
        schedule.cooldown = self.cooldown.unwrap_or(schedule.cooldown);
        trainer.batch_tokens = self.batch_tokens.unwrap_or(trainer.batch_tokens);
        trainer.label_smoothing = self.label_smoothing.unwrap_or(trainer.label_smoothing);
    }
}

/// Arguments of `kavanam pronounce`.
#[derive(Debug, Args)]
pub(crate) struct PronounceArgs {
    /// The words, letters a–z
    #[arg(required = true, value_name = "WORD")]
    pub(crate) words: Vec<String>,
    /// Folder of a trained model [default: the best of the newest run under results/]
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Hypotheses kept while decoding; 1 is greedy
    #[arg(long, default_value = "5", value_name = "N")]
    pub(crate) beam: NonZeroUsize,
    /// How kernels run.
    #[command(flatten)]
    pub(crate) context: ContextArgs,
}

const SCORE_HELP: &str = "\
PER is the phones to insert, delete or replace, for each phone of the dictionary; WER the share of words that match \
none of their pronunciations. Stress marks are left out; a model that says them gets a second line, in which they count.

The words are those that no model trained here has seen. Another program's model may have seen them.

Examples:
  kavanam score --model results/epyc/2026-…/models/transformer
  kavanam score --model DIR --words 1000 --beam 1";

/// Arguments of `kavanam score`.
#[derive(Debug, Args)]
#[command(after_help = SCORE_HELP)]
pub(crate) struct ScoreArgs {
    /// Folder of a model, trained or imported [default: the best of the newest run under results/]
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Words to decode, evenly spread over the alphabet, instead of all 8,816
    #[arg(long, value_name = "N")]
    pub(crate) words: Option<NonZeroUsize>,
    /// Hypotheses kept while decoding; 1 is greedy
    #[arg(long, default_value = "5", value_name = "N")]
    pub(crate) beam: NonZeroUsize,
    /// How kernels run.
    #[command(flatten)]
    pub(crate) context: ContextArgs,
}

/// Arguments of `kavanam sample`.
#[derive(Debug, Args)]
pub(crate) struct SampleArgs {
    /// Folder of a model that `kavanam train --task chars` has written
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// What the text begins with
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) prompt: String,
    /// Characters to write after it
    #[arg(long, value_name = "N", default_value_t = 500)]
    pub(crate) length: usize,
    /// Below 1 likely characters become likelier; 0 always takes the likeliest
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    pub(crate) temperature: f32,
    /// Draw from the N likeliest characters only [default: all]
    #[arg(long, value_name = "N")]
    pub(crate) top_k: Option<NonZeroUsize>,
    /// Seed of the draws
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// How kernels run.
    #[command(flatten)]
    pub(crate) context: ContextArgs,
}

/// Arguments of `kavanam classify`.
#[derive(Debug, Args)]
pub(crate) struct ClassifyArgs {
    /// The texts
    #[arg(required = true, value_name = "TEXT")]
    pub(crate) texts: Vec<String>,
    /// Folder of a model that `kavanam train --task classify` has written
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// How kernels run.
    #[command(flatten)]
    pub(crate) context: ContextArgs,
}

fn positive_seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds.is_finite() => Ok(seconds),
        _ => Err("expected a positive number of seconds".to_owned()),
    }
}

fn json_object(text: &str) -> Result<serde_json::Map<String, serde_json::Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("expected a JSON object: {error}"))
}
