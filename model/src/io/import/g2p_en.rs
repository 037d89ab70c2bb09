//! The published weights of g2p-en: a GRU encoder–decoder from letters to phones, without attention.
//!
//! Its program computes
//! ```text
//! h = 0;      for letter in word + "</s>":  h = gru(encoder, E[letter], h)
//! p = "<s>";  repeat:                       h = gru(decoder, D[p], h);  p = argmax(F·h + b)   until p = "</s>"
//! ```
//! which is [`RnnSeq2Seq`] with a copied state and sources that end with `<eos>`. Only the order of the tokens differs:
//! its `<pad> <unk> </s>` (letters) and `<pad> <unk> <s> </s>` (phones) become the four special tokens of
//! [`crate::vocab::SPECIAL`], so rows of the embeddings and of the output change places. What it has no row for, a
//! `<bos>` among the letters, is zeros and never read. Its search stops after 20 phones; here the caller says when.
//!
//! # Source
//! `g2p_en/g2p.py` and `g2p_en/checkpoint20.npz` of g2p-en 2.1.0 (Park and Kim 2019).

use std::path::Path;

use super::tensors::Tensors;
use super::{Imported, load};
use crate::io::CheckpointError;
use crate::io::config::Vocabs;
use crate::models::{AttentionKind, CellKind, RnnSeq2Seq, RnnSeq2SeqConfig, Seq2Seq};
use crate::vocab::{SPECIAL, Vocab};

/// The letters, after three special tokens.
const LETTERS: std::ops::RangeInclusive<char> = 'a'..='z';
/// The phones with their stress, after four special tokens.
#[rustfmt::skip]
const PHONES: [&str; 70] = [
    "AA0", "AA1", "AA2", "AE0", "AE1", "AE2", "AH0", "AH1", "AH2", "AO0", "AO1", "AO2", "AW0", "AW1", "AW2",
    "AY0", "AY1", "AY2", "B", "CH", "D", "DH", "EH0", "EH1", "EH2", "ER0", "ER1", "ER2", "EY0", "EY1", "EY2",
    "F", "G", "HH", "IH0", "IH1", "IH2", "IY0", "IY1", "IY2", "JH", "K", "L", "M", "N", "NG", "OW0", "OW1",
    "OW2", "OY0", "OY1", "OY2", "P", "R", "S", "SH", "T", "TH", "UH0", "UH1", "UH2", "UW", "UW0", "UW1", "UW2",
    "V", "W", "Y", "Z", "ZH",
];

/// Where the rows of a table stand in the file.
struct Rows {
    /// For each of [`SPECIAL`], its row there.
    special: [Option<usize>; SPECIAL.len()],
    /// The row of the first other token.
    first: usize,
    /// How many rows there are.
    all: usize,
}

/// `<pad> <unk> </s> a … z`.
const SOURCE: Rows = Rows { special: [Some(0), None, Some(2), Some(1)], first: 3, all: 29 };
/// `<pad> <unk> <s> </s> AA0 … ZH`.
const TARGET: Rows = Rows { special: [Some(0), Some(2), Some(3), Some(1)], first: 4, all: 74 };

impl Rows {
    /// A table of the file, `[all, width]`, in this project's order of tokens.
    fn reorder(&self, table: &[f32]) -> Vec<f32> {
        let width = table.len() / self.all;
        let mut rows = Vec::with_capacity(table.len() + width);
        for row in self.special {
            match row {
                Some(row) => rows.extend_from_slice(&table[row * width..(row + 1) * width]),
                None => rows.extend(std::iter::repeat_n(0.0, width)),
            }
        }
        rows.extend_from_slice(&table[self.first * width..]);
        rows
    }
}

/// Reads `checkpoint20.npz`. The widths follow from the shapes of `enc_emb` and `enc_w_hh`.
///
/// # Errors
/// [`CheckpointError`] when the file is missing, foreign or cut off, or names the tensor that is missing, left over or
/// of another shape.
pub fn g2p_en(path: &Path) -> Result<Imported, CheckpointError> {
    let contents = load(path)?;
    let mut file = Tensors::new(path, &contents);
    let letters = Vocab::new(LETTERS).expect("no letter stands twice");
    let phones = Vocab::new(PHONES).expect("no phone stands twice");
    let embedding = file.columns("enc_emb", "[29, embedding]")?;
    let hidden = file.columns("enc_w_hh", "[3·hidden, hidden]")?;
    let config = RnnSeq2SeqConfig {
        embedding,
        hidden,
        encoder_hidden: hidden,
        dropout: 0.0,
        ..RnnSeq2SeqConfig::new(letters.len(), phones.len(), CellKind::Gru, AttentionKind::None)
    };
    let refused = |e: crate::ModelError| CheckpointError::format(path, e.to_string());
    let mut model = RnnSeq2Seq::new(&config, 0).map_err(refused)?;
    let mut set = |name: &str, values: &[f32]| {
        let id = model.params().find(name).expect("the model has this tensor");
        model.params_mut().get_mut(id).copy_from_slice(values);
    };
    set("source_embedding.weight", &SOURCE.reorder(file.take("enc_emb", &[SOURCE.all, embedding])?));
    set("target_embedding.weight", &TARGET.reorder(file.take("dec_emb", &[TARGET.all, embedding])?));
    set("output.weight", &TARGET.reorder(file.take("fc_w", &[TARGET.all, hidden])?));
    set("output.bias", &TARGET.reorder(file.take("fc_b", &[TARGET.all])?));
    for (side, stack) in [("enc", "encoder.rnn"), ("dec", "decoder.rnn")] {
        let rows = 3 * hidden;
        for (part, ours, shape) in [
            ("w_ih", "weight_ih_l0", &[rows, embedding][..]),
            ("w_hh", "weight_hh_l0", &[rows, hidden]),
            ("b_ih", "bias_ih_l0", &[rows]),
            ("b_hh", "bias_hh_l0", &[rows]),
        ] {
            // Gates r z n, the bias of n inside of the reset: as here.
            set(&format!("{stack}.{ours}"), file.take(&format!("{side}_{part}"), shape)?);
        }
    }
    file.finish()?;
    let vocabs = Vocabs { source: letters, target: phones, source_ends_with_eos: true };
    Ok(Imported { model, vocabs })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use kavanam_kernels::Context;

    use super::super::super::tests::TestFolder;
    use super::super::npy::tests::f32_file;
    use super::super::npz::tests::archive;
    use super::*;
    use crate::generate::greedy;
    use crate::ops::gradient_check::Random;

    const EMBEDDING: usize = 3;
    const HIDDEN: usize = 6;
    /// Steps of the package's search.
    const STEPS: usize = 20;

    type Tensor = (&'static str, Vec<usize>, Vec<f32>);

    /// Random weights with the published names; no special token but `</s>` is ever likely.
    fn checkpoint() -> Vec<Tensor> {
        let mut random = Random(23);
        let rows = 3 * HIDDEN;
        let mut all: Vec<Tensor> = [
            ("enc_emb", vec![29, EMBEDDING]),
            ("enc_w_ih", vec![rows, EMBEDDING]),
            ("enc_w_hh", vec![rows, HIDDEN]),
            ("enc_b_ih", vec![rows]),
            ("enc_b_hh", vec![rows]),
            ("dec_emb", vec![74, EMBEDDING]),
            ("dec_w_ih", vec![rows, EMBEDDING]),
            ("dec_w_hh", vec![rows, HIDDEN]),
            ("dec_b_ih", vec![rows]),
            ("dec_b_hh", vec![rows]),
            ("fc_w", vec![74, HIDDEN]),
            ("fc_b", vec![74]),
        ]
        .into_iter()
        .map(|(name, shape)| {
            let data = (0..shape.iter().product()).map(|_| 2.0 * random.next()).collect();
            (name, shape, data)
        })
        .collect();
        all[11].2[..3].fill(-100.0);
        all[11].2[3] = 4.0;
        all
    }

    fn write(path: &Path, tensors: &[Tensor]) {
        let names: Vec<String> = tensors.iter().map(|(name, ..)| format!("{name}.npy")).collect();
        let members =
            names.iter().zip(tensors).map(|(n, (_, shape, data))| (n.as_str(), f32_file(shape, data)));
        fs::write(path, archive(&members.collect::<Vec<_>>(), false)).unwrap();
    }

    /// The package's own search, written after its `G2p.predict`, in f64.
    fn predict(tensors: &[Tensor], word: &str) -> Vec<&'static str> {
        let get = |name: &str| -> Vec<f64> {
            let (.., data) = tensors.iter().find(|(n, ..)| *n == name).unwrap();
            data.iter().map(|&x| f64::from(x)).collect()
        };
        let times = |w: &[f64], x: &[f64], b: &[f64]| -> Vec<f64> {
            w.chunks_exact(x.len())
                .zip(b)
                .map(|(w, b)| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + b)
                .collect()
        };
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let cell = |side: &str, x: &[f64], h: &[f64]| -> Vec<f64> {
            let ih = times(&get(&format!("{side}_w_ih")), x, &get(&format!("{side}_b_ih")));
            let hh = times(&get(&format!("{side}_w_hh")), h, &get(&format!("{side}_b_hh")));
            let new = |j: usize| {
                let r = sigmoid(ih[j] + hh[j]);
                let z = sigmoid(ih[HIDDEN + j] + hh[HIDDEN + j]);
                let n = (ih[2 * HIDDEN + j] + r * hh[2 * HIDDEN + j]).tanh();
                (1.0 - z) * n + z * h[j]
            };
            (0..HIDDEN).map(new).collect()
        };
        let row = |table: &str, i: usize| get(table)[i * EMBEDDING..(i + 1) * EMBEDDING].to_vec();
        let letters = word.bytes().map(|b| usize::from(b - b'a') + 3).chain([2]);
        let mut h = letters.fold(vec![0.0; HIDDEN], |h, letter| cell("enc", &row("enc_emb", letter), &h));
        let (mut said, mut phones) = (2, Vec::new());
        for _ in 0..STEPS {
            h = cell("dec", &row("dec_emb", said), &h);
            let logits = times(&get("fc_w"), &h, &get("fc_b"));
            said = (0..74).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
            if said == 3 {
                break;
            }
            phones.push(PHONES[said - 4]);
        }
        phones
    }

    #[test]
    fn the_imported_model_says_what_the_package_says() {
        let folder = TestFolder::new("g2p-en");
        let path = folder.0.join("checkpoint20.npz");
        let tensors = checkpoint();
        write(&path, &tensors);
        let Imported { model, vocabs } = g2p_en(&path).unwrap();
        assert_eq!((vocabs.source.len(), vocabs.target.len()), (30, 74));
        let ctx = Context::detect().unwrap();
        let mut ended = 0;
        for word in ["a", "zebra", "kavanam", "attention", "qqqqqq", "thebigone", "xyz", "mn", "other"] {
            let letters: Vec<String> = word.chars().map(String::from).collect();
            let ids = vocabs.encode_source(letters.iter().map(String::as_str)).unwrap();
            assert_eq!(ids.len(), word.len() + 1);
            let said = greedy(&model, &ctx, &ids, &[ids.len()], STEPS).unwrap().remove(0);
            assert_eq!(vocabs.target.decode(&said.tokens), predict(&tensors, word), "{word}");
            ended += usize::from(said.finished);
        }
        assert!(ended > 0, "some word must end before the limit for the end token to be tested");
    }

    #[test]
    fn every_missing_surplus_or_misshapen_tensor_is_named() {
        let folder = TestFolder::new("g2p-en-errors");
        let path = folder.0.join("checkpoint20.npz");
        let message = |tensors: &[Tensor]| {
            write(&path, tensors);
            g2p_en(&path).unwrap_err().to_string()
        };
        let whole = checkpoint();
        for i in 0..whole.len() {
            let (name, ..) = whole[i];
            let mut changed = whole.clone();
            changed.remove(i);
            let error = message(&changed);
            assert!(error.contains(&format!("tensor {name:?} is missing")), "{error}");
            changed.push((name, vec![2, 1, 2], vec![0.0; 4]));
            let error = message(&changed);
            assert!(error.contains(&format!("tensor {name:?} has shape [2, 1, 2]")), "{error}");
        }
        let mut changed = whole.clone();
        changed.push(("att_w", vec![1], vec![0.0]));
        assert!(message(&changed).contains("\"att_w\" (shape [1]) belongs to no parameter"));
        let mut changed = whole;
        changed[5].1 = vec![EMBEDDING, 74];
        let error = message(&changed);
        assert!(error.contains("\"dec_emb\" has shape [3, 74], the model needs [74, 3]"), "{error}");
    }
}
