//! Greedy search: the most likely next token, each time.

use kavanam_kernels::Context;

use crate::error::ModelError;
use crate::generate::{Hypothesis, ended, log_probabilities, worth_leaving};
use crate::models::{BOS, EOS, PAD, Seq2Seq};

/// Decodes every source until the model says [`EOS`] or `max_len` tokens are there. Of equally likely tokens the
/// first is taken.
///
/// # Shapes
/// `source` `[lengths.len() · source_len]`, padded, one sequence after the other; one hypothesis for each.
///
/// # Errors
/// As [`Seq2Seq::encode`], and [`ModelError::NotFinite`] when the model's weights have gone bad.
pub fn greedy(
    model: &dyn Seq2Seq,
    ctx: &Context,
    source: &[u32],
    lengths: &[usize],
    max_len: usize,
) -> Result<Vec<Hypothesis>, ModelError> {
    let encoded = model.encode(ctx, source, lengths)?;
    let mut state = model.start(ctx, &encoded, 1)?;
    let mut found: Vec<Hypothesis> = lengths.iter().map(|_| ended(&[], 0.0, false)).collect();
    // The source of each row.
    let mut rows: Vec<usize> = (0..lengths.len()).collect();
    let mut tokens = vec![BOS; rows.len()];
    for len in 0..=max_len {
        if rows.iter().all(|&i| found[i].finished) {
            break;
        }
        let logits = model.step(ctx, state.as_mut(), &tokens)?.logits;
        for (row, (&i, token)) in rows.iter().zip(&mut tokens).enumerate() {
            let hypothesis = &mut found[i];
            if hypothesis.finished {
                *token = PAD;
                continue;
            }
            let log_p = log_probabilities(logits.row(row))?;
            let best = (0..log_p.len()).fold(0, |best, j| if log_p[j] > log_p[best] { j } else { best });
            *token = best as u32;
            if *token == EOS {
                hypothesis.finished = true;
            } else if len < max_len {
                hypothesis.tokens.push(*token);
            } else {
                continue;
            }
            hypothesis.score += log_p[best];
        }
        let alive: Vec<usize> = (0..rows.len()).filter(|&row| !found[rows[row]].finished).collect();
        if worth_leaving(rows.len() - alive.len(), rows.len()) {
            state.reorder(&alive)?;
            tokens = alive.iter().map(|&row| tokens[row]).collect();
            rows = alive.iter().map(|&row| rows[row]).collect();
        }
    }
    Ok(found)
}
