//! [`Batch`]: padded pairs of token sequences, ready for teacher forcing.

use std::ops::Range;

use crate::error::ModelError;

/// Fills a batch up to its longest sequence; no model's output depends on it.
pub const PAD: u32 = 0;
/// Stands before the first target token.
pub const BOS: u32 = 1;
/// Ends a target.
pub const EOS: u32 = 2;
/// Stands for a token outside of the vocabulary.
pub const UNK: u32 = 3;

/// Padded sources and targets, batch-major: token `t` of sequence `b` stands at `b · len + t`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// `[size · source_len]`, padded with [`PAD`].
    pub source: Vec<u32>,
    /// The length of each source without padding, at least 1.
    pub source_lengths: Vec<usize>,
    /// What the decoder reads: [`BOS`] y₁ y₂ … , `[size · target_len]`.
    pub target_in: Vec<u32>,
    /// What the decoder must say: y₁ y₂ … [`EOS`], `[size · target_len]`; the loss ignores [`PAD`].
    pub target_out: Vec<u32>,
    /// The length of each target with its [`EOS`], at least 1.
    pub target_lengths: Vec<usize>,
    /// The number of pairs.
    pub size: usize,
    /// The padded length of a source.
    pub source_len: usize,
    /// The padded length of a target with its [`EOS`].
    pub target_len: usize,
}

impl Batch {
    /// Pads pairs of (source, target), without [`BOS`] and [`EOS`], to the longest of each. Only a source may end
    /// with [`EOS`], for a model that reads it there.
    ///
    /// # Errors
    /// [`ModelError::EmptyBatch`] for no pair, [`ModelError::Batch`] for an empty source or a special token
    /// ([`PAD`], [`BOS`], [`EOS`]) inside of a sequence. A target may be empty.
    pub fn from_pairs<S: AsRef<[u32]>, T: AsRef<[u32]>>(pairs: &[(S, T)]) -> Result<Batch, ModelError> {
        Batch::padded_to(pairs, 0, 0)
    }

    /// As [`Batch::from_pairs`], padded to at least these lengths.
    ///
    /// # Errors
    /// As [`Batch::from_pairs`].
    pub fn padded_to<S: AsRef<[u32]>, T: AsRef<[u32]>>(
        pairs: &[(S, T)],
        source_len: usize,
        target_len: usize,
    ) -> Result<Batch, ModelError> {
        for (index, (source, target)) in pairs.iter().enumerate() {
            let source = source.as_ref();
            check("source", index, source.strip_suffix(&[EOS]).unwrap_or(source))?;
            check("target", index, target.as_ref())?;
            if source.is_empty() {
                return Err(ModelError::Batch { side: "source", index, problem: "is empty" });
            }
        }
        let source_lengths: Vec<usize> = pairs.iter().map(|(s, _)| s.as_ref().len()).collect();
        let target_lengths: Vec<usize> = pairs.iter().map(|(_, t)| t.as_ref().len() + 1).collect();
        let source_len = source_lengths.iter().copied().max().ok_or(ModelError::EmptyBatch)?.max(source_len);
        let target_len = target_lengths.iter().copied().max().ok_or(ModelError::EmptyBatch)?.max(target_len);
        let size = pairs.len();
        let mut batch = Batch {
            source: vec![PAD; size * source_len],
            source_lengths,
            target_in: vec![PAD; size * target_len],
            target_out: vec![PAD; size * target_len],
            target_lengths,
            size,
            source_len,
            target_len,
        };
        for (b, (source, target)) in pairs.iter().enumerate() {
            let (source, target) = (source.as_ref(), target.as_ref());
            batch.source[b * source_len..][..source.len()].copy_from_slice(source);
            batch.target_in[b * target_len] = BOS;
            batch.target_in[b * target_len + 1..][..target.len()].copy_from_slice(target);
            batch.target_out[b * target_len..][..target.len()].copy_from_slice(target);
            batch.target_out[b * target_len + target.len()] = EOS;
        }
        Ok(batch)
    }

    /// The pairs of that range, padded as they are here: a shard of data-parallel training.
    ///
    /// # Panics
    /// When the range is empty or reaches outside of the batch.
    #[must_use]
    pub fn slice(&self, pairs: Range<usize>) -> Batch {
        assert!(pairs.start < pairs.end && pairs.end <= self.size, "pairs {pairs:?} of {}", self.size);
        let source = pairs.start * self.source_len..pairs.end * self.source_len;
        let target = pairs.start * self.target_len..pairs.end * self.target_len;
        Batch {
            source: self.source[source].to_vec(),
            source_lengths: self.source_lengths[pairs.clone()].to_vec(),
            target_in: self.target_in[target.clone()].to_vec(),
            target_out: self.target_out[target].to_vec(),
            target_lengths: self.target_lengths[pairs.clone()].to_vec(),
            size: pairs.len(),
            ..*self
        }
    }

    /// How many target tokens the loss counts, [`EOS`] included.
    pub fn target_tokens(&self) -> usize {
        self.target_lengths.iter().sum()
    }

    /// How many source tokens are no padding.
    pub fn source_tokens(&self) -> usize {
        self.source_lengths.iter().sum()
    }
}

fn check(side: &'static str, index: usize, tokens: &[u32]) -> Result<(), ModelError> {
    if tokens.iter().any(|&t| t == PAD || t == BOS || t == EOS) {
        return Err(ModelError::Batch { side, index, problem: "holds a special token" });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_padded_and_shifted() {
        let batch = Batch::from_pairs(&[(vec![5, 6, 7], vec![8]), (vec![9], vec![4, 5])]).unwrap();
        assert_eq!((batch.size, batch.source_len, batch.target_len), (2, 3, 3));
        assert_eq!(batch.source, [5, 6, 7, 9, PAD, PAD]);
        assert_eq!(batch.target_in, [BOS, 8, PAD, BOS, 4, 5]);
        assert_eq!(batch.target_out, [8, EOS, PAD, 4, 5, EOS]);
        assert_eq!((batch.source_tokens(), batch.target_tokens()), (4, 5));
        let second = batch.slice(1..2);
        assert_eq!(second.source, [9, PAD, PAD]);
        assert_eq!((second.size, second.target_lengths[0]), (1, 3));
    }

    #[test]
    fn bad_sequences_are_named() {
        assert_eq!(Batch::from_pairs::<Vec<u32>, Vec<u32>>(&[]), Err(ModelError::EmptyBatch));
        let error = Batch::from_pairs(&[(vec![5], vec![6]), (vec![], vec![6])]).unwrap_err();
        assert_eq!(error.to_string(), "batch: the source sequence 1 is empty");
        assert!(Batch::from_pairs(&[(vec![5], vec![EOS])]).is_err());
        assert!(Batch::from_pairs(&[(vec![EOS, 5], vec![6])]).is_err());
        assert_eq!(Batch::from_pairs(&[(vec![5, EOS], vec![6])]).unwrap().source_lengths, [2]);
    }
}
