//! `kavanam train`: one model, by steps or by seconds, from the beginning or from a checkpoint.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kavanam_kernels::Context;
use kavanam_model::train::{Trainer, checkpoint};

use super::compare::spread;
use crate::cli::TrainArgs;
use crate::error::HarnessError;
use crate::measure::threads;
use crate::tasks::evaluate::{self, Decoding};
use crate::tasks::fit::{self, Fit, Length};
use crate::tasks::g2p::G2p;
use crate::tasks::recipe::Recipe;
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

/// Trains and says how well the model does on validation words.
pub(crate) fn run(args: &TrainArgs) -> Result<(), HarnessError> {
    let ctx = args.context.context()?;
    threads::run_on(threads::count(ctx.thread_count()), || train(args, &ctx))?
}

fn train(args: &TrainArgs, ctx: &Context) -> Result<(), HarnessError> {
    if !args.resume && checkpoint::exists(&args.out) {
        return Err(HarnessError::Failed(format!(
            "{} already holds a training run: give --resume to go on, or another --out",
            args.out.display()
        )));
    }
    crate::files::prepare_dir(&args.out)?;
    let data = G2p::load()?;
    let examples = data.training_examples();
    let length = match (args.steps, args.seconds) {
        (Some(steps), _) => Some(Length::Steps(steps)),
        (None, Some(seconds)) => Some(Length::Seconds(seconds)),
        (None, None) => None,
    };
    let mut trainer = if args.resume {
        let mut trainer = Trainer::resume(&args.out, examples)?;
        match (length, trainer.config().schedule.total_steps) {
            (Some(_), Some(settled)) => {
                return Err(HarnessError::Usage(format!(
                    "the run's length is {settled} steps: resume it without --steps and --seconds"
                )));
            }
            (Some(Length::Steps(steps)), None) => trainer.settle_length(steps)?,
            _ => {}
        }
        trainer
    } else {
        let vocabs = (data.vocabs.source.len(), data.vocabs.target.len());
        let mut recipe = Recipe::new(args.preset, args.model, vocabs, args.seed);
        args.tune(&mut recipe)?;
        eprintln!("{} parameters: {}", recipe.model.parameter_count(), recipe.description);
        fit::prepare(&recipe, &examples, length.unwrap_or(DEFAULT_LENGTH))?
    };
    let stop = stop_on_interrupt()?;
    if let Some(steps) = trainer.config().schedule.total_steps {
        eprintln!("{}", fit::how_to_repeat(&trainer, steps));
    }
    let valid = spread(&data.valid, args.valid_words);
    let fit = Fit {
        ctx,
        label: args.model.name(),
        valid: &valid,
        points: args.points,
        folder: &args.out,
        vocabs: &data.vocabs,
        stop: &stop,
    };
    let budget = match length.or((!args.resume).then_some(DEFAULT_LENGTH)) {
        Some(Length::Seconds(seconds)) => Some(seconds),
        _ => None,
    };
    fit.run(&mut trainer, budget)?;
    for beam in [1, args.beam.get()] {
        let scores = evaluate::score(ctx, trainer.model(), &data.valid, Decoding { beam })?;
        let rates = rates(&scores);
        println!(
            "validation, {} words, beam {beam}: PER {:.2} %, WER {:.2} %",
            data.valid.len(),
            100.0 * rates.per,
            100.0 * rates.wer
        );
    }
    let progress = trainer.progress();
    println!(
        "{} steps, {:.1} s, {:.0} target tokens/s, {:.2} passes; written to {}",
        progress.step,
        progress.seconds,
        progress.tokens as f64 / progress.seconds.max(1e-9),
        trainer.epochs(),
        args.out.display()
    );
    Ok(())
}
