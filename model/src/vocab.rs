//! [`Vocab`]: tokens to ids and back, with the four special ids in front.

use std::collections::HashMap;

pub use crate::models::{BOS, EOS, PAD, UNK};

/// The names of the special tokens; a token's index here is its id.
pub const SPECIAL: [&str; 4] = ["<pad>", "<bos>", "<eos>", "<unk>"];

/// A token is not in the vocabulary, or a vocabulary is malformed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VocabError {
    /// The vocabulary lacks the token.
    #[error("token {position} is {token:?}, which the vocabulary lacks; it knows: {known}")]
    Unknown {
        /// The token.
        token: String,
        /// Where it stands in the input, from 1.
        position: usize,
        /// The tokens that are known, shortened.
        known: String,
    },
    /// The same token stands twice in a list.
    #[error("token {0:?} stands twice in the vocabulary")]
    Duplicate(String),
    /// The list does not begin with the special tokens.
    #[error("entry {position} of the vocabulary is {found:?}, expected {expected:?}")]
    Special {
        /// The index in the list.
        position: usize,
        /// What stands there.
        found: String,
        /// What must stand there.
        expected: &'static str,
    },
}

/// A list of tokens; the index is the id, [`SPECIAL`] comes first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vocab {
    tokens: Vec<String>,
    ids: HashMap<String, u32>,
}

impl Vocab {
    /// The special tokens, then `tokens` in the order given.
    ///
    /// # Errors
    /// [`VocabError::Duplicate`] when a token stands twice.
    pub fn new<T: Into<String>>(tokens: impl IntoIterator<Item = T>) -> Result<Vocab, VocabError> {
        let special = SPECIAL.iter().map(|&s| s.to_owned());
        Vocab::from_list(special.chain(tokens.into_iter().map(Into::into)).collect())
    }

    /// A list as [`Vocab::tokens`] gives it, from a file.
    ///
    /// # Errors
    /// [`VocabError::Special`] when it does not begin with [`SPECIAL`], [`VocabError::Duplicate`].
    pub fn from_list(tokens: Vec<String>) -> Result<Vocab, VocabError> {
        for (position, expected) in SPECIAL.into_iter().enumerate() {
            let found = tokens.get(position).cloned().unwrap_or_default();
            if found != expected {
                return Err(VocabError::Special { position, found, expected });
            }
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            if ids.insert(token.clone(), id as u32).is_some() {
                return Err(VocabError::Duplicate(token.clone()));
            }
        }
        Ok(Vocab { tokens, ids })
    }

    /// The number of ids, the special ones included.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Never: the special tokens are always there.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// All tokens; the index is the id.
    pub fn tokens(&self) -> &[String] {
        &self.tokens
    }

    /// The token's id, if it has one.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// The token of that id, `<unk>` for an id outside the list.
    pub fn token(&self, id: u32) -> &str {
        self.tokens.get(id as usize).map_or(SPECIAL[UNK as usize], String::as_str)
    }

    /// The ids of the tokens. Nothing is replaced by `<unk>`.
    ///
    /// # Errors
    /// [`VocabError::Unknown`] names the first token that the vocabulary lacks.
    pub fn encode<'a>(&self, tokens: impl IntoIterator<Item = &'a str>) -> Result<Vec<u32>, VocabError> {
        let encode = |(index, token): (usize, &str)| {
            self.id(token).filter(|&id| id as usize >= SPECIAL.len()).ok_or_else(|| VocabError::Unknown {
                token: token.to_owned(),
                position: index + 1,
                known: self.known(),
            })
        };
        tokens.into_iter().enumerate().map(encode).collect()
    }

    /// The tokens of the ids up to the first `<eos>`, without special ones.
    pub fn decode(&self, ids: &[u32]) -> Vec<&str> {
        ids.iter()
            .take_while(|&&id| id != EOS)
            .filter(|&&id| id as usize >= SPECIAL.len())
            .map(|&id| self.token(id))
            .collect()
    }

    fn known(&self) -> String {
        const SHOWN: usize = 60;
        let own = &self.tokens[SPECIAL.len()..];
        let mut text = own.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(" ");
        if own.len() > SHOWN {
            text.push_str(" …");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_follow_the_special_ones_and_come_back() {
        let vocab = Vocab::new(["a", "b", "c"]).unwrap();
        assert_eq!(vocab.len(), 7);
        let ids = vocab.encode(["c", "a"]).unwrap();
        assert_eq!(ids, [6, 4]);
        assert_eq!(vocab.decode(&[BOS, 6, 4, EOS, 5, PAD]), ["c", "a"]);
        assert_eq!(Vocab::from_list(vocab.tokens().to_vec()).unwrap(), vocab);
    }

    #[test]
    fn an_unknown_token_is_named_with_its_place() {
        let vocab = Vocab::new(["a", "b"]).unwrap();
        let error = vocab.encode(["a", "é"]).unwrap_err().to_string();
        assert!(error.contains("token 2") && error.contains('é') && error.contains("a b"), "{error}");
        assert!(vocab.encode(["<eos>"]).is_err(), "special tokens are no input");
    }

    #[test]
    fn malformed_lists_are_errors() {
        assert_eq!(Vocab::new(["a", "a"]), Err(VocabError::Duplicate("a".to_owned())));
        let error = Vocab::from_list(vec!["<pad>".to_owned(), "a".to_owned()]).unwrap_err();
        assert_eq!(error.to_string(), "entry 1 of the vocabulary is \"a\", expected \"<bos>\"");
    }
}
