//! Decoding many words, and what the attention looks at.

use std::sync::{Mutex, PoisonError};

use kavanam_kernels::Context;
use kavanam_model::generate::{self, BeamOptions, Hypothesis};
use kavanam_model::io::config::Vocabs;
use kavanam_model::vocab::PAD;
use kavanam_model::{ModelError, Seq2Seq};

use super::fit::{At, Judge, Judged};
use super::g2p::Entry;
use super::score::{WordScore, rates};
use crate::error::HarnessError;
use crate::report::results::{Alignment, CurvePoint};

/// Words decoded together: enough rows for the kernels, few enough to share out among threads.
const CHUNK: usize = 48;
/// The power of the length that a hypothesis's log-probability is divided by.
const LENGTH_PENALTY: f32 = 1.0;

/// How words are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Decoding {
    /// Hypotheses kept; 1 is greedy.
    pub(crate) beam: usize,
}

impl Decoding {
    /// The most likely next phone each time.
    pub(crate) const GREEDY: Decoding = Decoding { beam: 1 };

    fn options(self, letters: usize) -> BeamOptions {
        // "www" has the most phones a letter: 21 for 3. Long words have fewer than twice their letters.
        BeamOptions { beam: self.beam, max_len: 2 * letters + 16, length_penalty: LENGTH_PENALTY }
    }
}

/// The best hypothesis of every source, in the order of `sources`.
///
/// Sources are decoded in chunks of nearly equal length, each chunk on one thread. A word's result does not depend
/// on which words are beside it.
///
/// # Errors
/// [`ModelError`] when a source is empty or longer than the model's positions.
pub(crate) fn decode(
    ctx: &Context,
    model: &dyn Seq2Seq,
    sources: &[&[u32]],
    decoding: Decoding,
) -> Result<Vec<Hypothesis>, ModelError> {
    let mut order: Vec<usize> = (0..sources.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(sources[i].len()));
    let chunks: Vec<&[usize]> = order.chunks(CHUNK).collect();
    let done: Vec<Mutex<Result<Vec<Hypothesis>, ModelError>>> =
        chunks.iter().map(|_| Mutex::new(Ok(Vec::new()))).collect();
    ctx.for_each_task(chunks.len(), |c| {
        let members: Vec<&[u32]> = chunks[c].iter().map(|&i| sources[i]).collect();
        let result = decode_chunk(&ctx.single_threaded(), model, &members, decoding);
        *done[c].lock().unwrap_or_else(PoisonError::into_inner) = result;
    });
    let mut best: Vec<Option<Hypothesis>> = vec![None; sources.len()];
    for (chunk, result) in chunks.iter().zip(done) {
        let hypotheses = result.into_inner().unwrap_or_else(PoisonError::into_inner)?;
        for (&i, hypothesis) in chunk.iter().zip(hypotheses) {
            best[i] = Some(hypothesis);
        }
    }
    Ok(best.into_iter().map(|h| h.expect("every chunk gives a hypothesis for each of its words")).collect())
}

fn decode_chunk(
    ctx: &Context,
    model: &dyn Seq2Seq,
    sources: &[&[u32]],
    decoding: Decoding,
) -> Result<Vec<Hypothesis>, ModelError> {
    let lengths: Vec<usize> = sources.iter().map(|s| s.len()).collect();
    let width = lengths.iter().copied().max().unwrap_or(0);
    let mut padded = vec![PAD; sources.len() * width];
    for (row, source) in sources.iter().enumerate() {
        padded[row * width..][..source.len()].copy_from_slice(source);
    }
    let options = decoding.options(width);
    if decoding.beam == 1 {
        generate::greedy(model, ctx, &padded, &lengths, options.max_len)
    } else {
        generate::beam(model, ctx, &padded, &lengths, &options)
    }
}

/// Decodes the words and compares each with its listed pronunciations.
///
/// # Errors
/// As [`decode`].
pub(crate) fn score(
    ctx: &Context,
    model: &dyn Seq2Seq,
    entries: &[Entry],
    decoding: Decoding,
) -> Result<Vec<WordScore>, ModelError> {
    let sources: Vec<&[u32]> = entries.iter().map(|e| &*e.letters).collect();
    let hypotheses = decode(ctx, model, &sources, decoding)?;
    let scored = entries.iter().zip(&hypotheses);
    Ok(scored.map(|(e, h)| WordScore::of(e.letters.len(), &h.tokens, &e.pronunciations)).collect())
}

/// Judges a model by the words that it pronounces greedily.
pub(crate) struct Words<'a> {
    /// The words and their pronunciations.
    pub(crate) valid: &'a [Entry],
}

impl Judge<dyn Seq2Seq> for Words<'_> {
    type Point = CurvePoint;

    fn judge(&self, ctx: &Context, model: &dyn Seq2Seq, at: At) -> Result<Judged<CurvePoint>, HarnessError> {
        let valid = rates(&score(ctx, model, self.valid, Decoding::GREEDY)?);
        let said = format!("PER {:.2} %, WER {:.2} %", 100.0 * valid.per, 100.0 * valid.wer);
        let At { seconds, step, loss } = at;
        let point = CurvePoint { seconds, step, loss, valid_per: valid.per, valid_wer: valid.wer };
        Ok(Judged { score: valid.per, said, point })
    }
}

/// What the model looks at while it pronounces `words`; empty for a model without attention.
///
/// # Errors
/// As [`decode`].
pub(crate) fn alignments(
    ctx: &Context,
    model: &dyn Seq2Seq,
    words: &[Vec<u32>],
    vocabs: &Vocabs,
) -> Result<Vec<Alignment>, ModelError> {
    let sources: Vec<&[u32]> = words.iter().map(|w| &**w).collect();
    let mut hypotheses = decode(ctx, model, &sources, Decoding::GREEDY)?;
    let mut all = Vec::new();
    for (word, hypothesis) in words.iter().zip(&mut hypotheses) {
        generate::align(model, ctx, word, &[word.len()], std::slice::from_mut(hypothesis))?;
        let Some(weights) = hypothesis.attention.take() else { continue };
        let mut target: Vec<String> =
            vocabs.target.decode(&hypothesis.tokens).into_iter().map(str::to_owned).collect();
        if weights.len() > target.len() {
            target.push("end".to_owned());
        }
        let source = word.iter().map(|&id| vocabs.source.token(id).to_owned()).collect();
        all.push(Alignment { source, target, weights });
    }
    Ok(all)
}
