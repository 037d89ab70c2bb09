//! Phone and word error rates against the best listed pronunciation.
//!
//! PER = Σ edits / Σ phones of the pronunciation that was compared against; WER = share of words that match no
//! listed pronunciation. Of several pronunciations the one with the fewest edits counts (of equally many, the
//! first listed), as in the published figures.

use crate::report::results::LengthScore;

/// Word lengths that are reported together, in letters, both ends included.
const GROUPS: [(usize, usize); 7] = [(1, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 15), (16, usize::MAX)];

/// How one word was pronounced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WordScore {
    /// Letters of the word.
    pub(crate) letters: usize,
    /// Insertions, deletions and substitutions to the best pronunciation.
    pub(crate) edits: usize,
    /// Phones of that pronunciation.
    pub(crate) phones: usize,
}

/// Rates over many words, as fractions.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Rates {
    /// Phone error rate.
    pub(crate) per: f64,
    /// Word error rate.
    pub(crate) wer: f64,
}

impl WordScore {
    /// Compares `hypothesis` with every listed pronunciation.
    ///
    /// # Panics
    /// When none is listed.
    pub(crate) fn of(letters: usize, hypothesis: &[u32], listed: &[Vec<u32>]) -> WordScore {
        let scores = listed.iter().map(|reference| (edit_distance(hypothesis, reference), reference.len()));
        let (edits, phones) = scores.min_by_key(|&(edits, _)| edits).expect("a word has a pronunciation");
        WordScore { letters, edits, phones }
    }
}

/// Rates over the words; 0 for none.
pub(crate) fn rates<'a>(scores: impl IntoIterator<Item = &'a WordScore>) -> Rates {
    let (mut words, mut wrong, mut edits, mut phones) = (0usize, 0usize, 0usize, 0usize);
    for score in scores {
        words += 1;
        wrong += usize::from(score.edits > 0);
        edits += score.edits;
        phones += score.phones;
    }
    Rates { per: edits as f64 / phones.max(1) as f64, wer: wrong as f64 / words.max(1) as f64 }
}

/// Rates by the length of the word; groups without a word are left out.
pub(crate) fn by_length(scores: &[WordScore]) -> Vec<LengthScore> {
    let group = |(min, max): (usize, usize)| {
        let members: Vec<&WordScore> = scores.iter().filter(|s| (min..=max).contains(&s.letters)).collect();
        let max_letters = members.iter().map(|s| s.letters).max()?;
        let Rates { per, wer } = rates(members.iter().copied());
        Some(LengthScore {
            min_letters: min,
            max_letters: max.min(max_letters),
            words: members.len(),
            per,
            wer,
        })
    };
    GROUPS.into_iter().filter_map(group).collect()
}

/// Levenshtein's distance: the fewest insertions, deletions and substitutions, in two rows of memory.
pub(crate) fn edit_distance(a: &[u32], b: &[u32]) -> usize {
    let mut previous: Vec<usize> = (0..=b.len()).collect();
    let mut current = vec![0; b.len() + 1];
    for (i, x) in a.iter().enumerate() {
        current[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substitute = previous[j] + usize::from(x != y);
            current[j + 1] = substitute.min(previous[j + 1] + 1).min(current[j] + 1);
        }
        std::mem::swap(&mut previous, &mut current);
    }
    previous[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn distances_of_known_pairs() {
        for (a, b, distance) in [
            ("", "", 0),
            ("", "abc", 3),
            ("abc", "", 3),
            ("kitten", "sitting", 3),
            ("saturday", "sunday", 3),
            ("abc", "abc", 0),
            ("abc", "acb", 2),
        ] {
            assert_eq!(edit_distance(&ids(a), &ids(b)), distance, "{a} {b}");
            assert_eq!(edit_distance(&ids(b), &ids(a)), distance, "{b} {a}");
        }
    }

    #[test]
    fn the_best_pronunciation_counts() {
        let listed = [ids("abcd"), ids("xyz"), ids("xyzz")];
        let score = WordScore::of(5, &ids("xyq"), &listed);
        assert_eq!(score, WordScore { letters: 5, edits: 1, phones: 3 });
        assert_eq!(WordScore::of(5, &ids("abcd"), &listed).edits, 0);
    }

    #[test]
    fn rates_add_up_over_words_and_groups() {
        let score = |letters, edits, phones| WordScore { letters, edits, phones };
        let scores = [score(3, 0, 3), score(4, 2, 5), score(8, 1, 6), score(20, 3, 10)];
        assert_eq!(rates(&scores), Rates { per: 6.0 / 24.0, wer: 0.75 });
        assert_eq!(rates(&[]), Rates::default());
        let groups = by_length(&scores);
        assert_eq!(groups.iter().map(|g| g.words).collect::<Vec<_>>(), [2, 1, 1]);
        assert_eq!((groups[0].min_letters, groups[0].max_letters, groups[0].wer), (1, 4, 0.5));
        assert_eq!((groups[2].max_letters, groups[2].per), (20, 0.3));
    }
}
