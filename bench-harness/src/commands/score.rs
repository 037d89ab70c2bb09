//! `kavanam score`: phone and word error rates of any model of letters and phones.

use super::compare::spread;
use super::pronounce;
use crate::cli::ScoreArgs;
use crate::error::HarnessError;
use crate::measure::threads;
use crate::tasks::evaluate::{self, Decoding};
use crate::tasks::g2p::{G2p, encode_word, stressed};
use crate::tasks::phone_map::PhoneMap;
use crate::tasks::score::{Rates, WordScore, rates};

/// Decodes held-out words and prints a line; for a model that says stress a second one, in which it counts.
pub(crate) fn run(args: &ScoreArgs) -> Result<(), HarnessError> {
    let ctx = args.context.context()?;
    let loaded = pronounce::load(args.model.as_deref())?;
    let data = G2p::load()?;
    let map = PhoneMap::new(&loaded.vocabs.target, &data.vocabs.target)?;
    let test = spread(&data.test, args.words.map_or(usize::MAX, usize::from));
    let sources =
        test.iter().map(|entry| encode_word(&loaded.vocabs, &entry.word)).collect::<Result<Vec<_>, _>>()?;
    let sources: Vec<&[u32]> = sources.iter().map(|source| &**source).collect();
    let decoding = Decoding { beam: args.beam.get() };
    let hypotheses = threads::run_on(threads::count(ctx.thread_count()), || {
        evaluate::decode(&ctx, &*loaded.model, &sources, decoding)
    })??;
    let said = test.iter().zip(&hypotheses);
    let plain = said.clone().map(|(entry, h)| (entry, map.apply(&h.tokens)));
    let scores: Vec<WordScore> =
        plain.map(|(entry, said)| WordScore::of(entry.letters.len(), &said, &entry.pronunciations)).collect();
    let head = format!("test, {} words, beam {}", test.len(), args.beam);
    if !map.drops_stress() {
        println!("{head}: {}", percent(&scores));
        return Ok(());
    }
    println!("{head}, without stress: {}", percent(&scores));
    let listed = stressed(&loaded.vocabs.target, &test)?;
    let scores: Vec<WordScore> = said
        .zip(&listed)
        .map(|((entry, h), listed)| WordScore::of(entry.letters.len(), &h.tokens, listed))
        .collect();
    println!("{head}, with stress: {}", percent(&scores));
    Ok(())
}

fn percent(scores: &[WordScore]) -> String {
    let Rates { per, wer } = rates(scores);
    format!("PER {:.2} %, WER {:.2} %", 100.0 * per, 100.0 * wer)
}
