//! Letters to phones: the CMU pronouncing dictionary, embedded, parsed and split.
//!
//! A word is a–z only; its pronunciations lose their stress digits, which leaves the 39 phones of the
//! published work, and those that then are equal are one. All pronunciations of a word stand in the same
//! split. The split is a hash of the spelling: it depends on no seed and on no other word, so a model
//! trained anywhere with this program has not seen the test words.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::str::SplitAsciiWhitespace;

use kavanam_model::io::config::Vocabs;
use kavanam_model::train::Example;
use kavanam_model::vocab::{Vocab, VocabError};

use crate::error::HarnessError;

/// The dictionary, gzip-compressed; its licence stands beside it.
const DICTIONARY: &[u8] = include_bytes!("../../data/cmudict.dict.gz");
/// The letters that a word is made of.
pub(crate) const LETTERS: &str = "abcdefghijklmnopqrstuvwxyz";
/// The phones of ARPAbet as the dictionary uses it, without stress.
pub(crate) const PHONES: [&str; 39] = [
    "AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY", "F", "G", "HH", "IH", "IY",
    "JH", "K", "L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH", "UH", "UW", "V", "W", "Y",
    "Z", "ZH",
];

/// A word and every pronunciation that the dictionary lists, as ids of the two vocabularies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The spelling.
    pub(crate) word: String,
    /// Its letters.
    pub(crate) letters: Vec<u32>,
    /// The pronunciations, in the dictionary's order, without duplicates.
    pub(crate) pronunciations: Vec<Vec<u32>>,
}

/// Which part of the data a word belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Split {
    /// Seen in training.
    Train,
    /// For choosing: curves, checkpoints, recipes.
    Valid,
    /// For the figures that are reported.
    Test,
}

/// The whole task.
#[derive(Debug, Clone)]
pub(crate) struct G2p {
    /// Letters and phones.
    pub(crate) vocabs: Vocabs,
    /// Training words.
    pub(crate) train: Vec<Entry>,
    /// Validation words.
    pub(crate) valid: Vec<Entry>,
    /// Test words.
    pub(crate) test: Vec<Entry>,
}

/// The letter vocabulary.
pub(crate) fn letter_vocab() -> Vocab {
    Vocab::new(LETTERS.chars()).expect("no letter stands twice")
}

/// The phone vocabulary.
pub(crate) fn phone_vocab() -> Vocab {
    Vocab::new(PHONES).expect("no phone stands twice")
}

/// The part that a word belongs to: 90 % train, 2.5 % valid, 7.5 % test.
pub(crate) fn split_of(word: &str) -> Split {
    // FNV-1a, then a finaliser, because FNV's high bits mix badly on short words.
    let hash =
        word.bytes().fold(0xCBF2_9CE4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3));
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xC4CE_B9FE_1A85_EC53);
    match (hash ^ (hash >> 33)) % 1000 {
        0..900 => Split::Train,
        900..925 => Split::Valid,
        _ => Split::Test,
    }
}

impl G2p {
    /// The embedded dictionary.
    ///
    /// # Errors
    /// [`HarnessError::Failed`] when the embedded data is damaged.
    pub(crate) fn load() -> Result<G2p, HarnessError> {
        G2p::parse(&dictionary()?)
    }

    /// Lines of `word PHONE PHONE …`, `word(2) …` for a further pronunciation, `#` before a comment.
    fn parse(text: &str) -> Result<G2p, HarnessError> {
        let vocabs = Vocabs::new(letter_vocab(), phone_vocab());
        let mut words: BTreeMap<&str, Vec<Vec<u32>>> = BTreeMap::new();
        for (number, word, fields) in pronunciations(text) {
            let phones = vocabs
                .target
                .encode(fields.map(|phone| phone.trim_end_matches(|c: char| c.is_ascii_digit())))
                .map_err(|e| HarnessError::Failed(format!("dictionary line {number}: {e}")))?;
            let listed = words.entry(word).or_default();
            if !listed.contains(&phones) {
                listed.push(phones);
            }
        }
        let mut data = G2p { vocabs, train: Vec::new(), valid: Vec::new(), test: Vec::new() };
        for (word, pronunciations) in words {
            let letters = encode_word(&data.vocabs, word)?;
            let entry = Entry { word: word.to_owned(), letters, pronunciations };
            match split_of(word) {
                Split::Train => data.train.push(entry),
                Split::Valid => data.valid.push(entry),
                Split::Test => data.test.push(entry),
            }
        }
        Ok(data)
    }

    /// What training sees: every word with every one of its pronunciations.
    pub(crate) fn training_examples(&self) -> Vec<Example> {
        let pairs = self.train.iter().flat_map(|entry| entry.pronunciations.iter().map(move |p| (entry, p)));
        pairs.map(|(entry, p)| Example { source: entry.letters.clone(), target: p.clone() }).collect()
    }
}

/// The embedded dictionary's text.
fn dictionary() -> Result<String, HarnessError> {
    let mut text = String::new();
    flate2::read::GzDecoder::new(DICTIONARY)
        .read_to_string(&mut text)
        .map_err(|e| HarnessError::Failed(format!("the embedded dictionary is damaged: {e}")))?;
    Ok(text)
}

/// Each pronunciation of a word of a–z: the line's number, the word, the phones with their stress.
fn pronunciations(text: &str) -> impl Iterator<Item = (usize, &str, SplitAsciiWhitespace<'_>)> {
    text.lines().enumerate().filter_map(|(index, line)| {
        let mut fields = line.split('#').next()?.split_ascii_whitespace();
        let word = fields.next()?.split('(').next()?;
        let spelt = !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase());
        spelt.then_some((index + 1, word, fields))
    })
}

/// The dictionary's pronunciations of those words with stress, as ids of `phones`; a phone that those lack has none of
/// their ids.
///
/// # Errors
/// [`HarnessError::Failed`] when the embedded data is damaged.
pub(crate) fn stressed(phones: &Vocab, words: &[Entry]) -> Result<Vec<Vec<Vec<u32>>>, HarnessError> {
    let places: HashMap<&str, usize> = words.iter().enumerate().map(|(i, e)| (&*e.word, i)).collect();
    let mut listed = vec![Vec::new(); words.len()];
    for (_, word, fields) in pronunciations(&dictionary()?) {
        if let Some(&place) = places.get(word) {
            listed[place].push(fields.map(|phone| phones.id(phone).unwrap_or(u32::MAX)).collect());
        }
    }
    Ok(listed)
}

/// What the model's encoder reads for a word; upper case is taken as lower case.
///
/// # Errors
/// [`HarnessError::Failed`] when the word is empty or has a character that the model was not trained on.
pub(crate) fn encode_word(vocabs: &Vocabs, word: &str) -> Result<Vec<u32>, HarnessError> {
    if word.is_empty() {
        return Err(HarnessError::Failed("the word is empty: give at least one letter".to_owned()));
    }
    let lower = word.to_lowercase();
    let letters = lower.char_indices().map(|(start, letter)| &lower[start..start + letter.len_utf8()]);
    vocabs.encode_source(letters).map_err(|error| {
        let VocabError::Unknown { token, position, .. } = error else {
            return HarnessError::Failed(error.to_string());
        };
        let letter = token.chars().next().unwrap_or_default();
        HarnessError::Failed(format!(
            "{word:?}: character {position} is {letter:?}, which the model does not know; it knows a–z"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_dictionary_has_the_published_size() {
        let data = G2p::load().unwrap();
        let all = || data.train.iter().chain(&data.valid).chain(&data.test);
        assert_eq!(all().count(), 117_493);
        let share = |part: &[Entry]| part.len() as f64 / 117_493.0;
        // Five standard deviations of a binomial share are at most 0.0044 here.
        assert!((share(&data.train) - 0.9).abs() < 0.0044, "{}", data.train.len());
        assert!((share(&data.valid) - 0.025).abs() < 0.0023, "{}", data.valid.len());
        assert!((share(&data.test) - 0.075).abs() < 0.0039, "{}", data.test.len());
        let mut used = vec![false; data.vocabs.target.len()];
        for entry in all() {
            assert!(!entry.pronunciations.is_empty() && entry.letters.len() == entry.word.len());
            for (i, p) in entry.pronunciations.iter().enumerate() {
                assert!(!p.is_empty() && !entry.pronunciations[..i].contains(p), "{}", entry.word);
                p.iter().for_each(|&id| used[id as usize] = true);
            }
        }
        assert_eq!(used.iter().filter(|&&u| u).count(), PHONES.len());
    }

    #[test]
    fn the_split_is_fixed() {
        // Frozen: another hash would silently move test words into training.
        let data = G2p::load().unwrap();
        let count = |part: &[Entry]| part.len();
        assert_eq!((count(&data.train), count(&data.valid), count(&data.test)), (105702, 2975, 8816));
        assert!(data.test.iter().all(|e| split_of(&e.word) == Split::Test));
        let lengths =
            |part: &[Entry]| part.iter().map(|e| e.letters.len()).sum::<usize>() as f64 / part.len() as f64;
        assert!((lengths(&data.train) - lengths(&data.test)).abs() < 0.1, "the splits look alike");
    }

    #[test]
    fn stress_comments_and_variants_are_handled() {
        let text = "a AH0\na(2) EY1\na(3) AH1\na.m. EY2 EH1 M\nab AE1 B # note, danish\n\n's Z\n";
        let data = G2p::parse(text).unwrap();
        let mut all: Vec<_> = data.train.iter().chain(&data.valid).chain(&data.test).collect();
        all.sort_by_key(|e| &e.word);
        assert_eq!(all.len(), 2);
        let phones = |ids: &[u32]| data.vocabs.target.decode(ids).join(" ");
        let listed: Vec<_> = all[0].pronunciations.iter().map(|p| phones(p)).collect();
        assert_eq!((all[0].word.as_str(), listed), ("a", vec!["AH".to_owned(), "EY".to_owned()]));
        assert_eq!(phones(&all[1].pronunciations[0]), "AE B");
        assert!(G2p::parse("ab AE1 QQ\n").unwrap_err().to_string().contains("line 1"));
    }

    #[test]
    fn stress_is_there_for_those_who_want_it() {
        let data = G2p::load().unwrap();
        let phones = Vocab::new(["EY1", "B", "AH0", "L", "AE1"]).unwrap();
        let all = data.train.iter().chain(&data.valid).chain(&data.test);
        let words: Vec<Entry> = all.filter(|e| e.word == "able" || e.word == "a").cloned().collect();
        let listed = stressed(&phones, &words).unwrap();
        let place = words.iter().position(|e| e.word == "able").unwrap();
        assert_eq!(listed[place], [phones.encode(["EY1", "B", "AH0", "L"]).unwrap()]);
    }

    #[test]
    fn words_from_the_command_line_are_checked() {
        let letters = Vocabs::new(letter_vocab(), phone_vocab());
        assert_eq!(encode_word(&letters, "Ab").unwrap(), encode_word(&letters, "ab").unwrap());
        assert!(encode_word(&letters, "").unwrap_err().to_string().contains("empty"));
        let error = encode_word(&letters, "naïve").unwrap_err().to_string();
        assert!(error.contains("character 3 is 'ï'"), "{error}");
    }
}
