//! `kavanam import FILE`: a model of another program as a folder of ours.

use kavanam_model::io::config;
use kavanam_model::io::import::{self, Framework, Imported};
use kavanam_model::{ModelConfig, Seq2Seq};

use crate::error::HarnessError;
use crate::import_args::{ImportArgs, ImportFormat};

/// Reads the file, writes the folder, says what it holds.
pub(crate) fn run(args: &ImportArgs) -> Result<(), HarnessError> {
    let Imported { model, vocabs } = match args.format {
        ImportFormat::G2pEn if args.config.is_some() || args.vocab.is_some() => {
            return Err(HarnessError::Usage(
                "g2p-en takes no --config and no --vocab: its checkpoint says everything".to_owned(),
            ));
        }
        ImportFormat::G2pEn => import::g2p_en(&args.file)?,
        ImportFormat::Pytorch => configured(args, Framework::PyTorch)?,
        ImportFormat::Keras => configured(args, Framework::Keras)?,
    };
    config::save_new(&args.out, &model, &vocabs)?;
    println!(
        "{} parameters, {} source and {} target tokens; written to {}",
        model.params().parameter_count(),
        vocabs.source.len(),
        vocabs.target.len(),
        args.out.display()
    );
    Ok(())
}

fn configured(args: &ImportArgs, framework: Framework) -> Result<Imported, HarnessError> {
    let (Some(config), Some(vocab)) = (&args.config, &args.vocab) else {
        return Err(HarnessError::Usage("this format needs --config and --vocab".to_owned()));
    };
    let (model, vocabs) = config::load_config(config, vocab)?;
    let ModelConfig::RnnSeq2Seq(model) = model else {
        return Err(HarnessError::Failed(format!(
            "{}: model_type is {:?}, only \"rnn_seq2seq\" can be imported",
            config.display(),
            model.model_type()
        )));
    };
    Ok(import::recurrent_model(&args.file, framework, &model, vocabs)?)
}
