//! `kavanam compare`: trains the three families on the same data for the same seconds, and says what came of it.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use kavanam_kernels::Context;
use kavanam_model::train::{Example, Trainer};
use kavanam_model::{ParamStore, Seq2Seq};

use crate::cli::CompareArgs;
use crate::error::HarnessError;
use crate::measure::fingerprint::Machine;
use crate::measure::statistics::median;
use crate::measure::{clock, threads};
use crate::report;
use crate::report::results::{CompareResults, CurvePoint, DataSummary, Environment, FORMAT, ModelResult};
use crate::tasks::evaluate::{self, Decoding, Words};
use crate::tasks::fit::{self, Fit, Length, Outcome};
use crate::tasks::g2p::{self, Entry, G2p};
use crate::tasks::latency;
use crate::tasks::recipe::{Family, Preset, Recipe, TOLERANCE};
use crate::tasks::score::{by_length, rates};
use crate::tasks::sweep::{self, Sweep};
use crate::tasks::worth;

/// Words whose attention is drawn in the report.
const SHOWN_WORDS: [&str; 6] =
    ["attention", "thoughtfully", "knowledge", "reproducible", "psychology", "internationalization"];
/// Seconds for the comparison of fast and naive layers, at most.
const WORTH_SECONDS: f64 = 10.0;
/// Words that latency is measured on.
const LATENCY_WORDS: usize = 200;

/// Sizes of a comparison that are no part of a recipe.
struct Scale {
    seconds: f64,
    curve_points: u64,
    valid_words: usize,
    test_words: usize,
    beam: usize,
    sweep: Sweep,
}

impl Scale {
    fn of(args: &CompareArgs) -> Scale {
        let lengths: Vec<usize> = (3..=9).map(|power| 1 << power).collect();
        let mut scale = match args.preset {
            Preset::Quick => Scale {
                seconds: 40.0,
                curve_points: 6,
                valid_words: 600,
                test_words: usize::MAX,
                beam: 1,
                sweep: Sweep { lengths, tokens: 1024, samples: 9 },
            },
            Preset::Full => Scale {
                seconds: 720.0,
                curve_points: 16,
                valid_words: 1500,
                test_words: usize::MAX,
                beam: 5,
                sweep: Sweep { lengths, tokens: 2048, samples: 7 },
            },
        };
        scale.seconds = args.seconds.unwrap_or(scale.seconds);
        scale.test_words = args.test_words.unwrap_or(scale.test_words);
        scale.valid_words = scale.valid_words.min(scale.test_words);
        if args.no_sweep {
            scale.sweep.lengths.clear();
        }
        scale
    }
}

/// Trains, measures, prints the tables, writes the results.
pub(crate) fn run(args: &CompareArgs) -> Result<(), HarnessError> {
    let ctx = args.context.context()?;
    threads::run_on(threads::count(ctx.thread_count()), || compare(args, &ctx))?
}

fn compare(args: &CompareArgs, ctx: &Context) -> Result<(), HarnessError> {
    let machine = Machine::detect();
    let date = clock::utc_date();
    let folder = args.out.clone().unwrap_or_else(|| report::default_dir(&machine, &date));
    crate::files::prepare_dir(&folder)?;
    let stop = super::train::stop_on_interrupt()?;
    let run = Run {
        ctx,
        data: G2p::load()?,
        scale: Scale::of(args),
        folder: &folder,
        stop: &stop,
        recipes: recipes(args.preset, args.seed),
    };
    run.announce()?;
    let examples = run.data.training_examples();
    let mut results = run.results(args, &machine, date, examples.len());
    for (family, recipe) in &run.recipes {
        results.models.push(run.train(*family, recipe, &examples)?);
        // After every model: what is done is not lost if a later one fails.
        report::write(&folder, &results)?;
    }
    let seconds = WORTH_SECONDS.min(run.scale.seconds / 4.0);
    eprintln!("timing training steps of naive layers …");
    let vocabs = (run.data.vocabs.source.len(), run.data.vocabs.target.len());
    results.worth = Some(worth::measure(ctx, (args.preset, args.seed), vocabs, &examples, seconds)?);
    report::write(&folder, &results)?;
    if !run.scale.sweep.lengths.is_empty() {
        eprintln!("timing training steps at lengths {:?} …", run.scale.sweep.lengths);
        results.sweep = sweep::measure(ctx, &run.recipes, &run.scale.sweep)?;
        results.crossings = sweep::crossings(&results.sweep);
        report::write(&folder, &results)?;
    }
    print!("{}", report::tables(&results));
    println!("\nwritten to {}", folder.display());
    Ok(())
}

/// The three recipes of a preset over the task's vocabularies.
pub(crate) fn recipes(preset: Preset, seed: u64) -> Vec<(Family, Recipe)> {
    let vocabs = (g2p::letter_vocab().len(), g2p::phone_vocab().len());
    Family::ALL.map(|family| (family, Recipe::new(preset, family, vocabs, seed))).to_vec()
}

/// One comparison under way.
struct Run<'a> {
    ctx: &'a Context,
    data: G2p,
    scale: Scale,
    folder: &'a Path,
    stop: &'a AtomicBool,
    recipes: Vec<(Family, Recipe)>,
}

impl Run<'_> {
    /// Says what will be trained.
    ///
    /// # Errors
    /// When the models are not equal in parameters: their figures could not be compared.
    fn announce(&self) -> Result<(), HarnessError> {
        eprintln!(
            "letters to phones: {} training words, {} validation, {} test; {:.0} s of training for each model",
            self.data.train.len(),
            self.data.valid.len(),
            self.data.test.len(),
            self.scale.seconds
        );
        let counts: Vec<usize> = self.recipes.iter().map(|(_, r)| r.model.parameter_count()).collect();
        let reference = counts.last().copied().unwrap_or_default() as f64;
        for ((family, recipe), &count) in self.recipes.iter().zip(&counts) {
            let difference = count as f64 / reference - 1.0;
            let (name, description) = (family.name(), &recipe.description);
            eprintln!("{name:<14} {count:>9} parameters ({:+.1} %): {description}", 100.0 * difference);
            if difference.abs() > TOLERANCE {
                return Err(HarnessError::Failed(format!(
                    "{name} has {count} parameters, not {reference} ± 5 %"
                )));
            }
        }
        Ok(())
    }

    fn results(&self, args: &CompareArgs, machine: &Machine, date: String, pairs: usize) -> CompareResults {
        CompareResults {
            format: FORMAT,
            command: std::env::args().collect::<Vec<_>>().join(" "),
            preset: format!("{:?}", args.preset).to_lowercase(),
            seed: args.seed,
            date,
            commit: machine.commit.clone(),
            environment: environment(self.ctx, machine),
            data: DataSummary {
                name: "CMU pronouncing dictionary, words of a–z, 39 phones".to_owned(),
                train_words: self.data.train.len(),
                train_pairs: pairs,
                valid_words: self.data.valid.len(),
                test_words: self.data.test.len(),
            },
            models: Vec::new(),
            worth: None,
            sweep: Vec::new(),
            crossings: Vec::new(),
        }
    }

    fn train(
        &self,
        family: Family,
        recipe: &Recipe,
        examples: &[Example],
    ) -> Result<ModelResult, HarnessError> {
        let folder: PathBuf = self.folder.join("models").join(family.name());
        let seconds = self.scale.seconds;
        let length = Length::Seconds(seconds);
        let mut trainer = fit::prepare::<dyn Seq2Seq>(&recipe.model, recipe.trainer, examples, length)?;
        let valid = spread(&self.data.valid, self.scale.valid_words);
        let outcome = Fit {
            ctx: self.ctx,
            label: family.name(),
            judge: &Words { valid: &valid },
            points: self.scale.curve_points,
            folder: &folder,
            vocabs: &self.data.vocabs,
            stop: self.stop,
        }
        .run(&mut trainer, Some(seconds))?;
        self.examine(family, recipe, &trainer, outcome)
    }

    /// Everything that is said about a trained model.
    fn examine(
        &self,
        family: Family,
        recipe: &Recipe,
        trainer: &Trainer,
        outcome: Outcome<CurvePoint>,
    ) -> Result<ModelResult, HarnessError> {
        let model = trainer.model();
        let test = spread(&self.data.test, self.scale.test_words);
        let scores = evaluate::score(self.ctx, model, &test, Decoding { beam: self.scale.beam })?;
        let rates = rates(&scores);
        let timed = spread(&self.data.test, LATENCY_WORDS);
        let timed: Vec<&[u32]> = timed.iter().map(|e| &*e.letters).collect();
        let latency = latency::measure(self.ctx, model, &timed)?;
        let shown = SHOWN_WORDS
            .iter()
            .map(|w| g2p::encode_word(&self.data.vocabs, w))
            .collect::<Result<Vec<_>, _>>()?;
        let alignments = evaluate::alignments(self.ctx, model, &shown, &self.data.vocabs)?;
        let progress = trainer.progress();
        eprintln!(
            "{}: {} steps in {:.1} s; test PER {:.2} %, WER {:.2} %",
            family.name(),
            progress.step,
            progress.seconds,
            100.0 * rates.per,
            100.0 * rates.wer
        );
        Ok(ModelResult {
            name: family.name().to_owned(),
            description: recipe.description.clone(),
            params: recipe.model.parameter_count(),
            embedding_params: embedding_parameters(model.params()),
            config: serde_json::json!({ "model": recipe.model, "trainer": trainer.config() }),
            steps: progress.step,
            planned_steps: outcome.planned_steps,
            stopped_by_guard: outcome.stopped_by_guard,
            train_seconds: progress.seconds,
            tokens_seen: progress.tokens,
            epochs: trainer.epochs(),
            train_tokens_per_s: progress.tokens as f64 / progress.seconds.max(1e-9),
            curve: outcome.curve,
            beam: self.scale.beam,
            test_words: test.len(),
            per: rates.per,
            wer: rates.wer,
            by_length: by_length(&scores),
            encode_ms: median(&latency.encode_ms),
            encode_samples_ms: latency.encode_ms,
            decode_ms_per_token: median(&latency.decode_ms_per_token),
            decode_samples_ms_per_token: latency.decode_ms_per_token,
            alignments,
        })
    }
}

/// Parameters of the embedding tables and of the output projection.
fn embedding_parameters(params: &ParamStore) -> usize {
    let ids = params.ids().filter(|&id| {
        let name = params.name(id);
        name.contains("_embedding") || name.starts_with("output.")
    });
    ids.map(|id| params.get(id).len()).sum()
}

fn environment(ctx: &Context, machine: &Machine) -> Environment {
    Environment {
        cpu: machine.cpu.clone(),
        threads: ctx.thread_count(),
        isa: ctx.isa().to_string(),
        precision: ctx.matmul_precision().to_string(),
        kernels: vec![kavanam_kernels::gemm::kernel_name(ctx).to_owned()],
        fingerprint: machine.fields(),
    }
}

/// At most `count` entries, evenly spread over the alphabet.
pub(crate) fn spread(entries: &[Entry], count: usize) -> Vec<Entry> {
    let take = count.min(entries.len());
    (0..take).map(|i| entries[i * entries.len() / take].clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_spread_evenly_and_fixed() {
        let entry = |i: usize| Entry { word: i.to_string(), letters: vec![4], pronunciations: vec![vec![4]] };
        let entries: Vec<Entry> = (0..10).map(entry).collect();
        let words = |n| spread(&entries, n).into_iter().map(|e| e.word).collect::<Vec<_>>();
        assert_eq!(words(3), ["0", "3", "6"]);
        assert_eq!(words(99).len(), 10);
        assert!(words(0).is_empty());
    }
}
