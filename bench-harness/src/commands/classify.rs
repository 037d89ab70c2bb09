//! `kavanam classify`: which class a trained classifier puts a text into.

use kavanam_model::io::classifier;

use crate::cli::ClassifyArgs;
use crate::error::HarnessError;
use crate::tasks::classify::{encode, likeliest, probabilities};

/// Prints class, probability and text, a line for each text.
pub(crate) fn run(args: &ClassifyArgs) -> Result<(), HarnessError> {
    let ctx = args.context.context()?;
    let (model, labels) = classifier::load(&args.model)?;
    for text in &args.texts {
        let ids = encode(&labels.tokens, text);
        if ids.is_empty() {
            return Err(HarnessError::Failed(format!("{text:?} has no word")));
        }
        let rows = probabilities(&ctx, &model, &[&ids])?;
        let class = likeliest(&rows[0]);
        println!("{}\t{:.4}\t{text}", labels.classes[class], rows[0][class]);
    }
    Ok(())
}
