//! `kavanam pronounce WORD…`: letters in, phones out, by a trained model.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use kavanam_model::io::config::{self, CONFIG_FILE, Loaded, MODEL_FILE};

use crate::cli::PronounceArgs;
use crate::error::HarnessError;
use crate::files;
use crate::report::results::CompareResults;
use crate::tasks::evaluate::{self, Decoding};
use crate::tasks::g2p::encode_word;

/// Where comparisons are written.
const RESULTS: &str = "results";

/// Prints one line a word: the word, a tab, its phones.
pub(crate) fn run(args: &PronounceArgs) -> Result<(), HarnessError> {
    let ctx = args.context.context()?;
    let loaded = load(args.model.as_deref())?;
    let words = args.words.iter().map(|w| encode_word(&loaded.vocabs, w)).collect::<Result<Vec<_>, _>>()?;
    let sources: Vec<&[u32]> = words.iter().map(|w| &**w).collect();
    let decoding = Decoding { beam: args.beam.get() };
    let hypotheses = evaluate::decode(&ctx, &*loaded.model, &sources, decoding)?;
    for (word, hypothesis) in args.words.iter().zip(hypotheses) {
        println!("{word}\t{}", loaded.vocabs.target.decode(&hypothesis.tokens).join(" "));
    }
    Ok(())
}

/// The model in `folder`; without one the newest, whose folder is then told.
///
/// # Errors
/// When there is none, or it cannot be read.
pub(super) fn load(folder: Option<&Path>) -> Result<Loaded, HarnessError> {
    let Some(folder) = folder else {
        let newest = newest_model(Path::new(RESULTS))?;
        let loaded = config::load_model(&newest)?;
        eprintln!("model: {}", newest.display());
        return Ok(loaded);
    };
    Ok(config::load_model(folder)?)
}

/// The best model (by word error rate) of the newest run under `results/<machine>/<run>/models/`.
fn newest_model(results: &Path) -> Result<PathBuf, HarnessError> {
    let models = subfolders(results).into_iter().flat_map(|machine| subfolders(&machine)).flat_map(|run| {
        let found = subfolders(&run.join("models"));
        found.into_iter().map(move |model| (run.clone(), model))
    });
    let newest = models
        .filter(|(_, model)| model.join(CONFIG_FILE).is_file())
        .filter_map(|(run, model)| Some((modified(&model.join(MODEL_FILE))?, run, model)))
        .max();
    let Some((_, run, newest)) = newest else {
        return Err(HarnessError::Failed(format!(
            "there is no trained model under {}/: run `kavanam` first, or name one with --model DIR",
            results.display()
        )));
    };
    // A run that was stopped has no results.json yet: its newest model will do.
    let Ok(results) = files::read_json::<CompareResults>(&run.join("results.json")) else {
        return Ok(newest);
    };
    let best = results.models.iter().min_by(|a, b| a.wer.total_cmp(&b.wer));
    let best = best.map(|model| run.join("models").join(&model.name));
    Ok(best.filter(|folder| folder.join(MODEL_FILE).is_file()).unwrap_or(newest))
}

fn subfolders(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|data| data.modified()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_model_the_message_says_what_to_do() {
        let error = newest_model(Path::new("/nonexistent/results")).unwrap_err();
        assert!(error.to_string().contains("run `kavanam` first"), "{error}");
    }

    #[test]
    fn the_newest_model_is_found() {
        let root = std::env::temp_dir().join(format!("kavanam-newest-{}", std::process::id()));
        for (name, when) in [("old", 1_000), ("new", 2_000)] {
            let model = root.join("machine").join(name).join("models").join("transformer");
            fs::create_dir_all(&model).unwrap();
            fs::write(model.join(CONFIG_FILE), "{}").unwrap();
            let file = fs::File::create(model.join(MODEL_FILE)).unwrap();
            let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(when);
            file.set_modified(time).unwrap();
        }
        let found = newest_model(&root).unwrap();
        assert!(found.ends_with("machine/new/models/transformer"), "{}", found.display());
        fs::remove_dir_all(&root).unwrap();
    }
}
