//! `kavanam sample`: a trained language model goes on from a prompt.

use kavanam_model::generate::{self, SampleOptions};
use kavanam_model::io::char_lm;

use crate::cli::SampleArgs;
use crate::error::HarnessError;

/// Prints the prompt and what the model says after it.
pub(crate) fn run(args: &SampleArgs) -> Result<(), HarnessError> {
    let ctx = args.context.context()?;
    let (model, vocab) = char_lm::load(&args.model)?;
    let characters: Vec<String> = args.prompt.chars().map(String::from).collect();
    let prompt = vocab
        .encode(characters.iter().map(String::as_str))
        .map_err(|error| HarnessError::Failed(format!("--prompt: {error}")))?;
    let options = SampleOptions {
        temperature: args.temperature,
        top_k: args.top_k.map_or(0, std::num::NonZeroUsize::get),
        seed: args.seed,
    };
    let said = generate::sample(&model, &ctx, &prompt, args.length, options)?;
    println!("{}{}", args.prompt, vocab.decode(&said).concat());
    Ok(())
}
