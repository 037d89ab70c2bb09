//! `kavanam train`: one model, by steps or by seconds, from the beginning or from a checkpoint.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kavanam_kernels::Context;
use kavanam_model::Seq2Seq;
use kavanam_model::models::{CharLm, CharLmConfig, Classifier, ClassifierConfig};
use kavanam_model::train::{Example, Trainable, Trainer, TrainerConfig, checkpoint};

use super::compare::spread;
use crate::cli::TrainArgs;
use crate::error::HarnessError;
use crate::measure::threads;
use crate::task_args::Task;
use crate::tasks::chars::{self, HeldOut, Text};
use crate::tasks::classify::{self, Labelled};
use crate::tasks::evaluate::{self, Decoding, Words};
use crate::tasks::fit::{self, Fit, Judge, Length};
use crate::tasks::g2p::G2p;
use crate::tasks::recipe::{Family, Recipe, changed};
use crate::tasks::score::rates;

/// The length of a new run when no flag says it.
const DEFAULT_LENGTH: Length = Length::Seconds(60.0);

/// A flag that Ctrl-C (or a polite kill) sets; the run ends after the step it is in. A second one ends the program at once.
///
/// # Errors
/// When the system refuses a handler.
pub(crate) fn stop_on_interrupt() -> Result<Arc<AtomicBool>, HarnessError> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let handler = move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    };
    ctrlc::set_handler(handler)
        .map_err(|error| HarnessError::Failed(format!("cannot watch for Ctrl-C: {error}")))?;
    Ok(stop)
}

/// Trains and says how well the model does on what it has not seen.
pub(crate) fn run(args: &TrainArgs) -> Result<(), HarnessError> {
    let ctx = args.context.context()?;
    threads::run_on(threads::count(ctx.thread_count()), || match args.task {
        Task::G2p => g2p(args, &ctx),
        Task::Chars => chars(args, &ctx),
        Task::Classify => classes(args, &ctx),
    })?
}

fn g2p(args: &TrainArgs, ctx: &Context) -> Result<(), HarnessError> {
    if args.data.is_some() {
        return Err(HarnessError::Usage(
            "--data is for --task chars and classify: g2p has its dictionary".to_owned(),
        ));
    }
    check_folder(args)?;
    let data = G2p::load()?;
    let family = args.model.unwrap_or(Family::Transformer);
    let mut run = Run::<dyn Seq2Seq>::open(args, data.training_examples(), || {
        let vocabs = (data.vocabs.source.len(), data.vocabs.target.len());
        let mut recipe = Recipe::new(args.preset, family, vocabs, args.seed);
        args.tune(&mut recipe.trainer);
        if let Some(changes) = &args.config {
            recipe.change_model(changes)?;
        }
        eprintln!("{} parameters: {}", recipe.model.parameter_count(), recipe.description);
        Ok((recipe.model, recipe.trainer))
    })?;
    let valid = spread(&data.valid, args.valid_words);
    run.fit(args, ctx, family.name(), &Words { valid: &valid }, &data.vocabs)?;
    for beam in [1, args.beam.get()] {
        let scores = evaluate::score(ctx, run.trainer.model(), &data.valid, Decoding { beam })?;
        let rates = rates(&scores);
        println!(
            "validation, {} words, beam {beam}: PER {:.2} %, WER {:.2} %",
            data.valid.len(),
            100.0 * rates.per,
            100.0 * rates.wer
        );
    }
    run.report(args, "target tokens");
    Ok(())
}

/// The file of `--data`; `model` and `what` say in an error how the model is chosen and what the file holds.
fn data_file<'a>(args: &'a TrainArgs, model: &str, what: &str) -> Result<&'a Path, HarnessError> {
    if args.model.is_some() {
        return Err(HarnessError::Usage(format!("--model is for --task g2p: {model}")));
    }
    args.data.as_deref().ok_or_else(|| HarnessError::Usage(format!("--task {what}")))
}

fn classes(args: &TrainArgs, ctx: &Context) -> Result<(), HarnessError> {
    let model = r#"name the pooling, as in --config '{"pooling": "last"}', or a whole encoder"#;
    let file = data_file(args, model, "classify needs --data FILE, lines of label, tab, text")?;
    check_folder(args)?;
    let data = Labelled::load(file)?;
    let sizes = (data.labels.tokens.len(), data.labels.classes.len());
    let mut run = Run::<Classifier>::open(args, data.training_examples(), || {
        let (mut model, mut trainer) = classify::recipe(args.preset, sizes, args.seed);
        args.tune(&mut trainer);
        if let Some(changes) = &args.config {
            model = changed(&model, changes, ClassifierConfig::validate)?;
        }
        if (model.vocab, model.classes) != sizes {
            return Err(HarnessError::Usage("--config: vocab and classes are those of the data".to_owned()));
        }
        data.check_length(&model)?;
        eprintln!("{}", classify::describe(&model));
        Ok((model, trainer))
    })?;
    let judge = classify::HeldOut(&data);
    run.fit(args, ctx, "classify", &judge, &data.labels)?;
    let wrong = judge.error_rate(ctx, run.trainer.model())?;
    println!("validation, {} texts: {:.2} % wrong", data.held_out(), 100.0 * wrong);
    run.report(args, "texts");
    Ok(())
}

fn chars(args: &TrainArgs, ctx: &Context) -> Result<(), HarnessError> {
    let usage = |text: &str| HarnessError::Usage(text.to_owned());
    let model = r#"name the cell, as in --config '{"cell": "gru"}'"#;
    let file = data_file(args, model, "chars needs --data FILE, a text in UTF-8")?;
    check_folder(args)?;
    let text = Text::load(file)?;
    let mut run = Run::<CharLm>::open(args, text.training_examples(), || {
        let (mut model, mut trainer) = chars::recipe(args.preset, text.vocab.len(), args.seed);
        args.tune(&mut trainer);
        if let Some(changes) = &args.config {
            model = changed(&model, changes, CharLmConfig::validate)?;
        }
        if model.vocab != text.vocab.len() {
            return Err(usage("--config: vocab is that of the text"));
        }
        eprintln!("{} parameters: {}", model.parameter_count(), chars::describe(&model));
        Ok((model, trainer))
    })?;
    run.fit(args, ctx, "chars", &HeldOut(&text), &text.vocab)?;
    let held_out = text.held_out();
    println!(
        "validation, {} characters: {:.3} bits a character",
        held_out.len() - 1,
        chars::bits_per_character(ctx, run.trainer.model(), held_out)?
    );
    run.report(args, "characters");
    Ok(())
}

/// Refuses to write over a run.
fn check_folder(args: &TrainArgs) -> Result<(), HarnessError> {
    if !args.resume && checkpoint::exists(&args.out) {
        return Err(HarnessError::Failed(format!(
            "{} already holds a training run: give --resume to go on, or another --out",
            args.out.display()
        )));
    }
    crate::files::prepare_dir(&args.out)
}

/// A run, new or resumed.
struct Run<M: Trainable + ?Sized> {
    trainer: Trainer<M>,
    /// Seconds, where they say how long it is.
    budget: Option<f64>,
}

impl<M: Trainable + ?Sized> Run<M> {
    /// The run that the flags ask for; `recipe` gives the model and the settings of a new one.
    fn open(
        args: &TrainArgs,
        examples: Vec<Example>,
        recipe: impl FnOnce() -> Result<(M::Config, TrainerConfig), HarnessError>,
    ) -> Result<Run<M>, HarnessError> {
        let length = match (args.steps, args.seconds) {
            (Some(steps), _) => Some(Length::Steps(steps)),
            (None, Some(seconds)) => Some(Length::Seconds(seconds)),
            (None, None) => (!args.resume).then_some(DEFAULT_LENGTH),
        };
        let budget = match length {
            Some(Length::Seconds(seconds)) => Some(seconds),
            _ => None,
        };
        if !args.resume {
            let (model, config) = recipe()?;
            let trainer = fit::prepare::<M>(&model, config, &examples, length.unwrap_or(DEFAULT_LENGTH))?;
            return Ok(Run { trainer, budget });
        }
        let mut trainer = Trainer::<M>::resume(&args.out, examples)?;
        match (length, trainer.config().schedule.total_steps) {
            (Some(_), Some(settled)) => {
                return Err(HarnessError::Usage(format!(
                    "the run's length is {settled} steps: resume it without --steps and --seconds"
                )));
            }
            (Some(Length::Steps(steps)), None) => trainer.settle_length(steps)?,
            _ => {}
        }
        Ok(Run { trainer, budget })
    }

    /// Trains to the end.
    fn fit<J: Judge<M>>(
        &mut self,
        args: &TrainArgs,
        ctx: &Context,
        label: &str,
        judge: &J,
        vocabs: &M::Vocabs,
    ) -> Result<(), HarnessError> {
        let stop = stop_on_interrupt()?;
        if let Some(steps) = self.trainer.config().schedule.total_steps {
            eprintln!("{}", fit::how_to_repeat(&self.trainer, steps));
        }
        let (points, folder) = (args.points, &*args.out);
        let fit = Fit { ctx, label, judge, points, folder, vocabs, stop: &stop };
        fit.run(&mut self.trainer, self.budget)?;
        Ok(())
    }

    /// Says how far the run has come.
    fn report(&self, args: &TrainArgs, unit: &str) {
        let progress = self.trainer.progress();
        println!(
            "{} steps, {:.1} s, {:.0} {unit}/s, {:.2} passes; written to {}",
            progress.step,
            progress.seconds,
            progress.tokens as f64 / progress.seconds.max(1e-9),
            self.trainer.epochs(),
            args.out.display()
        );
    }
}
