//! Masks as data: which keys a query row sees, and an additive bias.
//!
//! Causal order, windows and key lengths together let query row `i` see an interval of keys whose two
//! ends never move back as `i` grows. So a block of scores is classified in constant time: nothing of
//! it is seen (skipped, it costs nothing), all of it (no masking), or a part.

use std::ops::Range;

use super::blocks::BlockList;
use super::dropout::ScoreDropout;
use crate::error::{ShapeError, expect_dim};

/// Query row `i` sees the keys `j ≤ i + offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Causal {
    /// The position of query row 0 among the keys: 0 in training, the number of cached keys before
    /// the first query in decoding.
    pub offset: usize,
}

/// Query row `i` sees the keys `i + offset − left ≤ j ≤ i + offset + right`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Window {
    /// The position of query row 0 among the keys.
    pub offset: usize,
    /// Keys seen before the row's own position.
    pub left: usize,
    /// Keys seen after the row's own position.
    pub right: usize,
}

/// An additive bias on the scaled scores, row-major [heads or 1, seq_q, seq_k], shared by the batch.
#[derive(Debug, Clone, Copy)]
pub struct Bias<'a> {
    /// The values; −∞ hides a key.
    pub values: &'a [f32],
    /// The number of query heads, or 1 for one bias for all heads.
    pub heads: usize,
}

/// Adds `−slope·|i + offset − j|` to the score of query row `i` and key `j`: attention with linear biases.
///
/// # Source
/// Press, Smith and Lewis 2022, arXiv:2108.12409, section 3: under a causal mask this is their bias.
#[derive(Debug, Clone, Copy)]
pub struct Alibi<'a> {
    /// One slope for each query head.
    pub slopes: &'a [f32],
    /// The position of query row 0 among the keys.
    pub offset: usize,
}

impl Alibi<'_> {
    /// The slope of one head, and how far its query row `i` stands after key `first`.
    #[inline(always)]
    pub(super) fn line(&self, head: usize, i: usize, first: usize) -> Line {
        Line { slope: self.slopes[head], ahead: (i + self.offset) as f32 - first as f32 }
    }
}

/// A row's linear bias: `−slope·|ahead − c|` in column c of some scores.
#[derive(Debug, Clone, Copy)]
pub(super) struct Line {
    pub(super) slope: f32,
    pub(super) ahead: f32,
}

/// What is hidden from whom. The default hides nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mask<'a> {
    /// Hide the future.
    pub causal: Option<Causal>,
    /// Hide what is far away.
    pub window: Option<Window>,
    /// Hide the keys from this index on, one length for each sequence of the batch (padding).
    pub key_lengths: Option<&'a [usize]>,
    /// Hide all but the listed blocks: one list for each query head, or one for all heads.
    pub blocks: Option<&'a [BlockList]>,
    /// Add to the scores.
    pub bias: Option<Bias<'a>>,
    /// Add to the scores what is linear in the distance.
    pub alibi: Option<Alibi<'a>>,
    /// Drop some of the probabilities, in training.
    pub dropout: Option<ScoreDropout>,
}

impl<'a> Mask<'a> {
    /// Nothing hidden.
    pub fn none() -> Mask<'a> {
        Mask::default()
    }

    /// The future hidden; query row 0 stands at key `offset`.
    pub fn causal(offset: usize) -> Mask<'a> {
        Mask { causal: Some(Causal { offset }), ..Mask::default() }
    }

    /// The same with keys from `lengths[batch]` on hidden.
    #[must_use]
    pub fn with_key_lengths(self, lengths: &'a [usize]) -> Mask<'a> {
        Mask { key_lengths: Some(lengths), ..self }
    }

    /// The same with only a window of keys seen.
    #[must_use]
    pub fn with_window(self, window: Window) -> Mask<'a> {
        Mask { window: Some(window), ..self }
    }

    /// The same with all but the listed blocks hidden.
    #[must_use]
    pub fn with_blocks(self, lists: &'a [BlockList]) -> Mask<'a> {
        Mask { blocks: Some(lists), ..self }
    }

    /// The same with an additive bias.
    #[must_use]
    pub fn with_bias(self, bias: Bias<'a>) -> Mask<'a> {
        Mask { bias: Some(bias), ..self }
    }

    /// The same with a linear bias.
    #[must_use]
    pub fn with_alibi(self, alibi: Alibi<'a>) -> Mask<'a> {
        Mask { alibi: Some(alibi), ..self }
    }

    /// The same with dropout of the probabilities.
    #[must_use]
    pub fn with_dropout(self, dropout: ScoreDropout) -> Mask<'a> {
        Mask { dropout: Some(dropout), ..self }
    }

    /// The mask fits these shapes.
    pub(super) fn check(
        &self,
        batch: usize,
        heads: usize,
        seq_q: usize,
        seq_k: usize,
    ) -> Result<(), ShapeError> {
        if let Some(lengths) = self.key_lengths {
            expect_dim("mask.key_lengths", "entries", batch, lengths.len())?;
            if let Some(&longest) = lengths.iter().max().filter(|&&longest| longest > seq_k) {
                return Err(ShapeError::Value {
                    argument: "mask.key_lengths",
                    value: longest.to_string(),
                    expected: "at most the number of keys",
                });
            }
        }
        if let Some(lists) = self.blocks {
            if lists.len() != 1 {
                expect_dim("mask.blocks", "lists", heads, lists.len())?;
            }
            for list in lists {
                list.check(seq_q, seq_k)?;
                expect_dim("mask.blocks", "block", lists[0].block(), list.block())?;
            }
        }
        if let Some(bias) = self.bias {
            if bias.heads != 1 {
                expect_dim("mask.bias", "heads", heads, bias.heads)?;
            }
            let len = bias.heads.checked_mul(seq_q).and_then(|n| n.checked_mul(seq_k));
            let len = len.ok_or(ShapeError::Overflow { argument: "mask.bias" })?;
            expect_dim("mask.bias", "elements", len, bias.values.len())?;
        }
        if let Some(alibi) = self.alibi {
            expect_dim("mask.alibi", "slopes", heads, alibi.slopes.len())?;
        }
        if let Some(dropout) = self.dropout {
            dropout.dropout.check()?;
        }
        Ok(())
    }

    /// Whether probabilities are made of the scores alone, seen or hidden: nothing is added to them and nothing dropped.
    #[inline(always)]
    pub(super) fn takes_scores(&self) -> bool {
        self.bias.is_none() && self.alibi.is_none() && self.dropout.is_none()
    }

    /// The block list of one query head.
    #[inline]
    pub(super) fn list(&self, head: usize) -> Option<&'a BlockList> {
        self.blocks.map(|lists| if lists.len() == 1 { &lists[0] } else { &lists[head] })
    }

    /// What the rows of sequence `batch` see of `seq_k` keys.
    #[inline]
    pub(super) fn sight(&self, batch: usize, seq_k: usize) -> Sight {
        let keys = self.key_lengths.map_or(seq_k, |lengths| lengths[batch]);
        let mut sight = Sight { keys, ahead: usize::MAX, behind: usize::MAX, offset: 0 };
        if let Some(causal) = self.causal {
            sight.ahead = causal.offset.saturating_add(1);
        }
        if let Some(window) = self.window {
            let ahead = window.offset.saturating_add(window.right).saturating_add(1);
            sight.ahead = sight.ahead.min(ahead);
            (sight.behind, sight.offset) = (window.left, window.offset);
        }
        sight
    }
}

impl<'a> Bias<'a> {
    /// The bias of one query row of one head.
    #[inline]
    pub(super) fn row(&self, head: usize, row: usize, seq_q: usize, seq_k: usize) -> &'a [f32] {
        let head = if self.heads == 1 { 0 } else { head };
        &self.values[(head * seq_q + row) * seq_k..][..seq_k]
    }
}

/// How much of a block of scores is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coverage {
    /// No row sees any key of the block.
    Skip,
    /// Every row sees every key of the block.
    Full,
    /// Anything else.
    Partial,
}

/// The interval of keys that each query row of one sequence sees.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sight {
    /// Keys from here on are padding.
    keys: usize,
    /// Row `i` sees no key from `i + ahead` on.
    ahead: usize,
    /// Row `i` sees no key before `i + offset − behind`.
    behind: usize,
    offset: usize,
}

impl Sight {
    /// The first key that row `i` sees.
    #[inline(always)]
    pub(super) fn first(&self, i: usize) -> usize {
        i.saturating_add(self.offset).saturating_sub(self.behind).min(self.keys)
    }

    /// One past the last key that row `i` sees; the row sees nothing when this is not above [`Sight::first`].
    #[inline(always)]
    pub(super) fn end(&self, i: usize) -> usize {
        i.saturating_add(self.ahead).min(self.keys)
    }

    /// The keys of `block` that row `i` sees.
    #[inline(always)]
    pub(super) fn row(&self, i: usize, block: &Range<usize>) -> Range<usize> {
        let start = self.first(i).clamp(block.start, block.end);
        start..self.end(i).min(block.end).max(start)
    }

    /// The smallest interval of `block` that holds all that `rows` (not empty) see.
    #[inline(always)]
    pub(super) fn rows(&self, rows: &Range<usize>, block: &Range<usize>) -> Range<usize> {
        let start = self.first(rows.start).clamp(block.start, block.end);
        start..self.end(rows.end - 1).min(block.end).max(start)
    }

    /// The rows among `rows` that may see a key of `keys` (not empty): outside of them none is seen.
    #[inline(always)]
    pub(super) fn seers(&self, keys: &Range<usize>, rows: &Range<usize>) -> Range<usize> {
        let start = (keys.start + 1).saturating_sub(self.ahead).max(rows.start);
        let end = keys.end.saturating_add(self.behind).saturating_sub(self.offset).min(rows.end);
        start..end.max(start)
    }

    /// How much of `rows × keys` (neither empty) is seen.
    #[inline(always)]
    pub(super) fn classify(&self, rows: &Range<usize>, keys: &Range<usize>) -> Coverage {
        if self.rows(rows, keys).is_empty() {
            Coverage::Skip
        } else if self.first(rows.end - 1) <= keys.start && self.end(rows.start) >= keys.end {
            Coverage::Full
        } else {
            Coverage::Partial
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rowwise::dropout::Dropout;

    fn masks(lengths: &[usize]) -> Vec<Mask<'_>> {
        let mut all = Vec::new();
        for base in [Mask::none(), Mask::causal(0), Mask::causal(3)] {
            all.push(base);
            all.push(base.with_key_lengths(lengths));
            for (offset, left, right) in [(0, 2, 0), (0, 0, 4), (2, 3, 1), (0, usize::MAX, 0)] {
                let windowed = base.with_window(Window { offset, left, right });
                all.extend([windowed, windowed.with_key_lengths(lengths)]);
            }
        }
        all
    }

    /// The definition, key by key.
    fn sees(mask: &Mask<'_>, batch: usize, i: usize, j: usize) -> bool {
        mask.causal.is_none_or(|c| j <= i + c.offset)
            && mask.window.is_none_or(|w| {
                let position = i + w.offset;
                position.saturating_sub(w.left) <= j && j <= position.saturating_add(w.right)
            })
            && mask.key_lengths.is_none_or(|lengths| j < lengths[batch])
    }

    #[test]
    fn intervals_are_the_definition() {
        for mask in masks(&[0, 5, 11]) {
            for batch in 0..3 {
                let sight = mask.sight(batch, 11);
                for i in 0..9 {
                    let row = sight.row(i, &(0..11));
                    for j in 0..11 {
                        assert_eq!(row.contains(&j), sees(&mask, batch, i, j), "{mask:?} {i} {j}");
                    }
                }
            }
        }
    }

    #[test]
    fn classification_is_the_definition() {
        for mask in masks(&[4, 11]) {
            for batch in 0..2 {
                let sight = mask.sight(batch, 11);
                for (i0, i1, j0, j1) in
                    [(0, 1, 0, 1), (0, 6, 0, 4), (3, 6, 4, 8), (5, 9, 8, 11), (0, 9, 0, 11)]
                {
                    let seen: Vec<bool> = (i0..i1)
                        .flat_map(|i| (j0..j1).map(move |j| (i, j)))
                        .map(|(i, j)| sees(&mask, batch, i, j))
                        .collect();
                    match sight.classify(&(i0..i1), &(j0..j1)) {
                        Coverage::Skip => assert!(!seen.contains(&true), "{mask:?}"),
                        Coverage::Full => assert!(!seen.contains(&false), "{mask:?}"),
                        Coverage::Partial => assert!(seen.contains(&false), "{mask:?}"),
                    }
                    let seers = sight.seers(&(j0..j1), &(i0..i1));
                    for i in (i0..i1).filter(|i| !seers.contains(i)) {
                        assert!((j0..j1).all(|j| !sees(&mask, batch, i, j)), "{mask:?} row {i}");
                    }
                }
            }
        }
    }

    #[test]
    fn misfits_are_named() {
        assert!(Mask::none().check(2, 4, 3, 5).is_ok());
        let error = Mask::none().with_key_lengths(&[1, 2, 3]).check(2, 4, 3, 5).unwrap_err();
        assert!(error.to_string().contains("key_lengths"), "{error}");
        let error = Mask::none().with_key_lengths(&[1, 6]).check(2, 4, 3, 5).unwrap_err();
        assert!(error.to_string().contains("is 6"), "{error}");
        let bias = Bias { values: &[0.0; 30], heads: 2 };
        assert!(Mask::none().with_bias(bias).check(2, 2, 3, 5).is_ok());
        assert!(Mask::none().with_bias(bias).check(2, 4, 3, 5).is_err());
        assert!(Mask::none().with_bias(Bias { heads: 1, ..bias }).check(2, 4, 3, 5).is_err());
        let alibi = Alibi { slopes: &[0.5; 3], offset: 0 };
        let error = Mask::none().with_alibi(alibi).check(2, 4, 3, 5).unwrap_err();
        assert!(error.to_string().contains("mask.alibi: slopes is 3, expected 4"), "{error}");
        let dropout = Dropout { p: 1.5, seed: 0, stream: 0 };
        let dropout = ScoreDropout { dropout, first_sequence: 0 };
        let error = Mask::none().with_dropout(dropout).check(2, 4, 3, 5).unwrap_err();
        assert!(error.to_string().contains("p is 1.5"), "{error}");
    }
}
