//! Beam search: the most likely sequence among those that always were among the best few.

use kavanam_kernels::Context;

use crate::error::ModelError;
use crate::generate::{Hypothesis, ended, log_probabilities, worth_leaving};
use crate::models::{BOS, EOS, PAD, Seq2Seq};

/// How wide, how long, and how length counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BeamOptions {
    /// Hypotheses that are kept for each source.
    pub beam: usize,
    /// The most tokens of a hypothesis.
    pub max_len: usize,
    /// α: log-probabilities are compared after division by lengthᵅ, [`EOS`] counted. 0 favours short sequences, 1 the
    /// most likely token on average.
    pub length_penalty: f32,
}

/// The best hypothesis of every source.
///
/// A source is finished when as many hypotheses have ended as the beam is wide, or when all have reached the limit.
///
/// # Shapes
/// `source` `[lengths.len() · source_len]`, padded, one sequence after the other; one hypothesis for each.
///
/// # Errors
/// As [`Seq2Seq::encode`], and [`ModelError::NotFinite`] when the model's weights have gone bad.
///
/// # Source
/// Graves 2012 and Sutskever et al. 2014, section 3.2; the power of the length as in Wu et al. 2016, section 7,
/// without its constant.
pub fn beam(
    model: &dyn Seq2Seq,
    ctx: &Context,
    source: &[u32],
    lengths: &[usize],
    options: &BeamOptions,
) -> Result<Vec<Hypothesis>, ModelError> {
    let beams = options.beam.max(1);
    let encoded = model.encode(ctx, source, lengths)?;
    let mut state = model.start(ctx, &encoded, beams)?;
    let mut searches: Vec<Search> = (0..lengths.len()).map(|_| Search::new(*options)).collect();
    // The source of each group of rows.
    let mut groups: Vec<usize> = (0..lengths.len()).collect();
    for _ in 0..=options.max_len {
        if groups.iter().all(|&i| searches[i].is_done()) {
            break;
        }
        let tokens: Vec<u32> = groups.iter().flat_map(|&i| searches[i].last_tokens()).collect();
        let logits = model.step(ctx, state.as_mut(), &tokens)?.logits;
        let mut rows = Vec::with_capacity(tokens.len());
        for (group, &i) in groups.iter().enumerate() {
            let first = group * beams;
            let parents = searches[i].advance(|beam| log_probabilities(logits.row(first + beam)))?;
            rows.extend(parents.into_iter().map(|beam| first + beam));
        }
        let alive: Vec<usize> =
            (0..groups.len()).filter(|&group| !searches[groups[group]].is_done()).collect();
        if worth_leaving(groups.len() - alive.len(), groups.len()) {
            rows =
                alive.iter().flat_map(|&group| &rows[group * beams..(group + 1) * beams]).copied().collect();
            groups = alive.into_iter().map(|group| groups[group]).collect();
        }
        state.reorder(&rows)?;
    }
    Ok(searches.into_iter().map(Search::best).collect())
}

/// An unfinished sequence.
#[derive(Debug, Clone)]
struct Alive {
    tokens: Vec<u32>,
    /// −∞ for one that only fills a row.
    log_p: f64,
}

/// The search of one source.
#[derive(Debug)]
struct Search {
    options: BeamOptions,
    alive: Vec<Alive>,
    ended: Vec<Hypothesis>,
}

/// Beam `parent` goes on with `token`.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    parent: usize,
    token: u32,
    log_p: f64,
}

impl Search {
    fn new(options: BeamOptions) -> Search {
        // All beams start alike, so only the first may go on.
        let start =
            |beam| Alive { tokens: Vec::new(), log_p: if beam == 0 { 0.0 } else { f64::NEG_INFINITY } };
        Search { options, alive: (0..options.beam.max(1)).map(start).collect(), ended: Vec::new() }
    }

    fn is_done(&self) -> bool {
        self.ended.len() >= self.alive.len() || self.alive.iter().all(|a| a.log_p == f64::NEG_INFINITY)
    }

    /// What each row is fed next.
    fn last_tokens(&self) -> Vec<u32> {
        let start = if self.is_done() { PAD } else { BOS };
        self.alive.iter().map(|alive| alive.tokens.last().copied().unwrap_or(start)).collect()
    }

    /// Takes a step; gives for each row the row that it goes on from.
    fn advance(
        &mut self,
        log_p: impl Fn(usize) -> Result<Vec<f64>, ModelError>,
    ) -> Result<Vec<usize>, ModelError> {
        let beams = self.alive.len();
        if self.is_done() {
            return Ok((0..beams).collect());
        }
        let best = self.candidates(log_p)?;
        let mut next = Vec::with_capacity(beams);
        let mut parents = Vec::with_capacity(beams);
        for (rank, candidate) in best.into_iter().enumerate() {
            let tokens = &self.alive[candidate.parent].tokens;
            if candidate.token == EOS {
                // One that ends counts only when it is as good as those that go on.
                if rank < beams && self.ended.len() < beams {
                    let score = self.normalised(candidate.log_p, tokens.len() + 1);
                    self.ended.push(ended(tokens, score, true));
                }
            } else if next.len() < beams && tokens.len() < self.options.max_len {
                let tokens = tokens.iter().copied().chain([candidate.token]).collect();
                next.push(Alive { tokens, log_p: candidate.log_p });
                parents.push(candidate.parent);
            }
        }
        if next.is_empty() {
            // Nothing may grow: what is alive has reached the limit.
            self.cut();
            return Ok((0..beams).collect());
        }
        while next.len() < beams {
            next.push(Alive { tokens: vec![PAD], log_p: f64::NEG_INFINITY });
            parents.push(parents[0]);
        }
        self.alive = next;
        Ok(parents)
    }

    /// The best 2 · beams continuations, so that as many remain when half of them end. Ties go to the lower beam, then
    /// the lower token.
    fn candidates(
        &self,
        log_p: impl Fn(usize) -> Result<Vec<f64>, ModelError>,
    ) -> Result<Vec<Candidate>, ModelError> {
        let mut all = Vec::new();
        for (parent, alive) in self.alive.iter().enumerate() {
            if alive.log_p == f64::NEG_INFINITY {
                continue;
            }
            let of_token = log_p(parent)?.into_iter().enumerate();
            all.extend(of_token.map(|(token, p)| Candidate {
                parent,
                token: token as u32,
                log_p: alive.log_p + p,
            }));
        }
        all.retain(|candidate| candidate.log_p > f64::NEG_INFINITY);
        let keep = 2 * self.alive.len();
        let better = |a: &Candidate, b: &Candidate| {
            b.log_p.total_cmp(&a.log_p).then(a.parent.cmp(&b.parent)).then(a.token.cmp(&b.token))
        };
        if all.len() > keep {
            all.select_nth_unstable_by(keep, better);
            all.truncate(keep);
        }
        all.sort_unstable_by(better);
        Ok(all)
    }

    fn normalised(&self, log_p: f64, len: usize) -> f64 {
        log_p / (len.max(1) as f64).powf(f64::from(self.options.length_penalty))
    }

    /// Ends what is alive without [`EOS`].
    fn cut(&mut self) {
        for alive in std::mem::take(&mut self.alive) {
            if alive.log_p > f64::NEG_INFINITY {
                let score = self.normalised(alive.log_p, alive.tokens.len());
                self.ended.push(ended(&alive.tokens, score, false));
            }
            self.alive.push(Alive { log_p: f64::NEG_INFINITY, ..alive });
        }
    }

    /// The best of those that ended by themselves; of those that were cut when there is none.
    fn best(mut self) -> Hypothesis {
        if self.ended.is_empty() {
            self.cut();
        }
        let better =
            |a: &Hypothesis, b: &Hypothesis| b.finished.cmp(&a.finished).then(b.score.total_cmp(&a.score));
        self.ended.into_iter().min_by(better).unwrap_or_else(|| ended(&[], f64::NEG_INFINITY, false))
    }
}
