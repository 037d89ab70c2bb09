//! From the phones of any model to those that errors are counted in: the dictionary's 39, without stress.

use kavanam_model::vocab::{SPECIAL, Vocab};

use crate::error::HarnessError;

/// For each target token of a model, the dictionary's phone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PhoneMap {
    /// [`None`] for a special token.
    phones: Vec<Option<u32>>,
    /// Whether some of the model's phones carry a stress digit.
    stressed: bool,
}

impl PhoneMap {
    /// The map from the tokens of `model` to those of `dictionary`; the stress digits 0 to 2 are dropped.
    ///
    /// # Errors
    /// [`HarnessError::Failed`] names a token that is no phone.
    pub(crate) fn new(model: &Vocab, dictionary: &Vocab) -> Result<PhoneMap, HarnessError> {
        let mut map = PhoneMap { phones: vec![None; SPECIAL.len()], stressed: false };
        for token in &model.tokens()[SPECIAL.len()..] {
            let plain = token.strip_suffix(['0', '1', '2']).unwrap_or(token);
            let Some(phone) = dictionary.id(plain) else {
                return Err(HarnessError::Failed(format!(
                    "the model says {token:?}, which is no phone of the dictionary: it was made for another task"
                )));
            };
            map.stressed |= plain != token;
            map.phones.push(Some(phone));
        }
        Ok(map)
    }

    /// Whether stress has been dropped.
    pub(crate) fn drops_stress(&self) -> bool {
        self.stressed
    }

    /// The dictionary's phones for what the model said.
    pub(crate) fn apply(&self, tokens: &[u32]) -> Vec<u32> {
        tokens.iter().filter_map(|&token| *self.phones.get(token as usize)?).collect()
    }
}

#[cfg(test)]
mod tests {
    use kavanam_model::vocab::UNK;

    use super::super::g2p::phone_vocab;
    use super::*;

    #[test]
    fn stress_is_dropped_and_noted() {
        let dictionary = phone_vocab();
        let model = Vocab::new(["AH0", "AH1", "B", "UW"]).unwrap();
        let map = PhoneMap::new(&model, &dictionary).unwrap();
        assert!(map.drops_stress());
        assert_eq!(dictionary.decode(&map.apply(&[5, 6, UNK, 4, 7])), ["AH", "B", "AH", "UW"]);
    }

    #[test]
    fn our_own_phones_stay_as_they_are() {
        let dictionary = phone_vocab();
        let map = PhoneMap::new(&dictionary, &dictionary).unwrap();
        assert!(!map.drops_stress());
        assert_eq!(map.apply(&[4, 42, 17]), [4, 42, 17]);
    }

    #[test]
    fn another_task_is_refused() {
        let words = Vocab::new(["Haus", "AH3"]).unwrap();
        let error = PhoneMap::new(&words, &phone_vocab()).unwrap_err().to_string();
        assert!(error.contains("\"Haus\""), "{error}");
    }
}
