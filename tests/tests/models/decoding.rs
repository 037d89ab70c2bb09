//! Statements about decoding, and that models learn.

use crate::support::{Random, ctx, pairs, rnns, transformers};
use kavanam_kernels::Context;
use kavanam_kernels::optim::adamw::{self, AdamW, Buffers};
use kavanam_model::generate::{self, BeamOptions, Hypothesis};
use kavanam_model::models::{
    AttentionKind, BOS, CellKind, DropoutRates, EOS, PAD, RnnSeq2SeqConfig, TransformerConfig,
};
use kavanam_model::{Batch, DropoutKey, Grads, LossOptions, ModelConfig, Pool, Seq2Seq, Tape};

/// Pads words to the longest: tokens and lengths.
fn padded<W: AsRef<[u32]>>(words: &[W]) -> (Vec<u32>, Vec<usize>) {
    let lengths: Vec<usize> = words.iter().map(|word| word.as_ref().len()).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let row = |word: &W| word.as_ref().iter().copied().chain(std::iter::repeat(PAD)).take(longest).collect();
    (words.iter().flat_map(|word| -> Vec<u32> { row(word) }).collect(), lengths)
}

fn sources() -> Vec<Vec<u32>> {
    pairs().into_iter().map(|(source, _)| source).collect()
}

fn beam(model: &dyn Seq2Seq, words: &[Vec<u32>], beam: usize, length_penalty: f32) -> Vec<Hypothesis> {
    let (source, lengths) = padded(words);
    generate::beam(model, &ctx(), &source, &lengths, &BeamOptions { beam, max_len: 6, length_penalty })
        .unwrap()
}

#[test]
fn a_beam_of_one_is_greedy_search() {
    for config in transformers().into_iter().chain(rnns()) {
        let model = config.build(2).unwrap();
        let (source, lengths) = padded(&sources());
        let greedy = generate::greedy(model.as_ref(), &ctx(), &source, &lengths, 6).unwrap();
        for (one, greedy) in beam(model.as_ref(), &sources(), 1, 0.0).iter().zip(&greedy) {
            assert_eq!((&one.tokens, one.finished), (&greedy.tokens, greedy.finished), "{config:?}");
            assert!((one.score - greedy.score).abs() < 1e-9);
        }
    }
}

#[test]
fn a_word_is_decoded_alike_alone_and_in_any_batch() {
    for config in transformers().into_iter().chain(rnns()) {
        let model = config.build(4).unwrap();
        let together = beam(model.as_ref(), &sources(), 3, 1.0);
        for (word, expected) in sources().into_iter().zip(&together) {
            assert_eq!(beam(model.as_ref(), &[word], 3, 1.0)[0], *expected, "{config:?}");
        }
    }
}

/// The log-probability of a target with its end, by teacher forcing.
fn log_probability(ctx: &Context, model: &dyn Seq2Seq, source: &[u32], target: &[u32]) -> f64 {
    let batch = Batch::from_pairs(&[(source, target)]).unwrap();
    let pool = Pool::new();
    let mut tape = Tape::inference(ctx, model.params(), &pool);
    let loss = model.loss(&mut tape, &batch, &LossOptions::default()).unwrap();
    -f64::from(tape.value(loss)[0])
}

#[test]
fn a_beam_as_wide_as_the_tree_finds_the_best_sequence_there_is() {
    let mut transformer = TransformerConfig::new(6, 6);
    (transformer.width, transformer.heads, transformer.feed_forward) = (8, 2, 8);
    let mut rnn = RnnSeq2SeqConfig::new(6, 6, CellKind::Gru, AttentionKind::Additive);
    (rnn.embedding, rnn.hidden, rnn.encoder_hidden, rnn.attention_width, rnn.readout) = (6, 8, 4, 5, 7);
    for config in [ModelConfig::Transformer(transformer), ModelConfig::RnnSeq2Seq(rnn)] {
        for seed in 0..4 {
            let model = config.build(seed).unwrap();
            let source = [4, 5, 3];
            let tokens = [3u32, 4, 5];
            let mut all: Vec<Vec<u32>> = vec![vec![]];
            all.extend(tokens.iter().map(|&a| vec![a]));
            all.extend(tokens.iter().flat_map(|&a| tokens.map(|b| vec![a, b])));
            for penalty in [0.0f32, 1.0] {
                let score = |target: &Vec<u32>| {
                    let log_p = log_probability(&ctx(), model.as_ref(), &source, target);
                    log_p / ((target.len() + 1) as f64).powf(f64::from(penalty))
                };
                let best = all.iter().map(score).fold(f64::NEG_INFINITY, f64::max);
                let options = BeamOptions { beam: 40, max_len: 2, length_penalty: penalty };
                let found = generate::beam(model.as_ref(), &ctx(), &source, &[3], &options).unwrap();
                assert!(found[0].finished);
                assert!((found[0].score - best).abs() < 1e-5, "{} {best}", found[0].score);
            }
        }
    }
}

#[test]
fn alignment_has_a_row_for_every_token_and_the_end() {
    for config in transformers().into_iter().chain(rnns()) {
        let model = config.build(6).unwrap();
        let (source, lengths) = padded(&sources());
        let mut found = generate::greedy(model.as_ref(), &ctx(), &source, &lengths, 5).unwrap();
        generate::align(model.as_ref(), &ctx(), &source, &lengths, &mut found).unwrap();
        let attends = !matches!(&config, ModelConfig::RnnSeq2Seq(c) if c.attention == AttentionKind::None);
        for (hypothesis, length) in found.iter().zip(lengths) {
            let rows = hypothesis.attention.as_ref().map(Vec::len);
            let said = hypothesis.tokens.len() + usize::from(hypothesis.finished);
            assert_eq!(rows, attends.then_some(said), "{config:?}");
            for row in hypothesis.attention.iter().flatten() {
                assert!((row[..length].iter().sum::<f32>() - 1.0).abs() < 1e-5);
            }
        }
    }
}

#[test]
fn bad_weights_are_an_error_and_not_an_answer() {
    let mut model = rnns()[0].build(1).unwrap();
    model.params_mut().values_mut().fill(f32::NAN);
    let error = generate::greedy(model.as_ref(), &ctx(), &[4, 5], &[2], 3).unwrap_err();
    assert_eq!(error.to_string(), "logits are not finite");
}

/// A word of 2 to 6 letters.
fn word(random: &mut Random) -> Vec<u32> {
    (0..2 + random.below(5)).map(|_| 4 + random.below(8) as u32).collect()
}

/// Trains on copying random words with Adam, at a rate that falls to 0 over the second half of the steps (at a constant
/// one the share of copied words moves by some between roundings); gives the loss a token at first and at last, and the trained model.
fn train_to_copy(config: &ModelConfig, steps: u64, rate: f32, seed: u64) -> (f64, f64, Box<dyn Seq2Seq>) {
    let ctx = ctx();
    let mut model = config.build(seed).unwrap();
    let mut random = Random::new(seed + 1);
    let pool = Pool::new();
    let [mut m, mut v] = [(); 2].map(|()| vec![0.0; config.parameter_count()]);
    let mut grads = Grads::zeros(model.params());
    let (mut first, mut last) = (0.0, 0.0);
    for step in 1..=steps {
        let pairs: Vec<_> = (0..32).map(|_| word(&mut random)).map(|w| (w.clone(), w)).collect();
        let batch = Batch::from_pairs(&pairs).unwrap();
        grads.zero();
        let key = DropoutKey { seed: 1, step, shard: 0 };
        let mut tape = Tape::training(&ctx, model.params(), &pool, key);
        let loss = model.loss(&mut tape, &batch, &LossOptions::default()).unwrap();
        last = f64::from(tape.value(loss)[0]) / batch.target_tokens() as f64;
        first = if step == 1 { last } else { first };
        tape.backward(loss, &mut grads).unwrap();
        let lr = rate * f32::min(1.0, 2.0 * (steps - step) as f32 / steps as f32);
        let spec = AdamW { lr, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.0 };
        let (param, grad) = (model.params_mut().values_mut(), grads.values());
        let buffers = Buffers { param, grad, m: &mut m, v: &mut v };
        adamw::step(&ctx, &spec, step, 1.0 / batch.target_tokens() as f32, buffers).unwrap();
    }
    (first, last, model)
}

/// The share of new words that greedy decoding copies, and of weights rows whose largest stands on the diagonal.
fn copies(model: &dyn Seq2Seq) -> (f64, f64) {
    let mut random = Random::new(99);
    let words: Vec<Vec<u32>> = (0..50).map(|_| word(&mut random)).collect();
    let (source, lengths) = padded(&words);
    let mut said = generate::greedy(model, &ctx(), &source, &lengths, 10).unwrap();
    generate::align(model, &ctx(), &source, &lengths, &mut said).unwrap();
    let right = words.iter().zip(&said).filter(|(word, said)| **word == said.tokens).count();
    let (mut rows, mut diagonal) = (0, 0);
    for (hypothesis, &length) in said.iter().zip(&lengths) {
        for (t, row) in hypothesis.attention.iter().flatten().enumerate().take(length) {
            let largest = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
            rows += 1;
            diagonal += usize::from(largest == Some(t));
        }
    }
    (right as f64 / words.len() as f64, diagonal as f64 / f64::max(rows as f64, 1.0))
}

#[test]
fn a_transformer_learns_to_copy() {
    let mut config = TransformerConfig::new(12, 12);
    (config.width, config.heads, config.feed_forward) = (32, 4, 64);
    (config.encoder_layers, config.decoder_layers) = (1, 1);
    config.dropout = DropoutRates::uniform(0.0);
    // The middle one of several runs must be good; an untrained model copies no word.
    let mut runs = [21, 31, 41].map(|seed| {
        let (first, last, model) = train_to_copy(&ModelConfig::Transformer(config.clone()), 400, 5e-3, seed);
        assert!(last < 0.1 * first, "seed {seed}: {first} to {last}");
        copies(model.as_ref()).0
    });
    runs.sort_by(f64::total_cmp);
    assert!(runs[1] >= 0.9, "{runs:?} copied");
}

#[test]
fn additive_attention_learns_to_copy_along_the_diagonal() {
    let mut config = RnnSeq2SeqConfig::new(12, 12, CellKind::Gru, AttentionKind::Additive);
    (config.embedding, config.hidden, config.encoder_hidden) = (32, 48, 32);
    (config.attention_width, config.readout, config.dropout) = (32, 32, 0.0);
    let (first, last, model) = train_to_copy(&ModelConfig::RnnSeq2Seq(config), 300, 5e-3, 21);
    let (right, diagonal) = copies(model.as_ref());
    assert!(last < 0.1 * first && right >= 0.9, "{first} to {last}, {right} copied");
    assert!(diagonal >= 0.9, "{diagonal} of the rows look along the diagonal");
}

#[test]
fn a_deep_residual_stack_learns_to_copy_with_the_bottom_layer_looking() {
    let mut config = RnnSeq2SeqConfig::gnmt(12, 12);
    (config.embedding, config.hidden, config.encoder_hidden) = (32, 48, 48);
    (config.attention_width, config.layers, config.dropout) = (32, 3, 0.0);
    let (first, last, model) = train_to_copy(&ModelConfig::RnnSeq2Seq(config), 400, 3e-3, 21);
    let (right, _) = copies(model.as_ref());
    assert!(last < 0.1 * first && right >= 0.9, "{first} to {last}, {right} copied");
}

#[test]
fn a_fixed_vector_learns_too() {
    let mut config = RnnSeq2SeqConfig::new(12, 12, CellKind::Lstm, AttentionKind::None);
    (config.embedding, config.hidden, config.encoder_hidden, config.dropout) = (32, 64, 64, 0.0);
    let (first, last, _) = train_to_copy(&ModelConfig::RnnSeq2Seq(config), 200, 5e-3, 21);
    assert!(last < 0.7 * first, "{first} to {last}");
}

#[test]
fn beams_fork_as_their_state_does() {
    // Row by row, a state that was reordered goes on as one that was fed that row's tokens from the start.
    for config in transformers().into_iter().chain(rnns()) {
        let model = config.build(8).unwrap();
        let (source, lengths) = padded(&sources());
        let encoded = model.encode(&ctx(), &source, &lengths).unwrap();
        let mut forked = model.start(&ctx(), &encoded, 2).unwrap();
        let fed = [[BOS; 6], [4, 5, 6, 7, 8, 9]];
        for tokens in &fed {
            model.step(&ctx(), forked.as_mut(), tokens).unwrap();
        }
        // Sources 2 and 0 stay, in another order, the second with one beam twice.
        let rows = [5, 4, 1, 1];
        forked.reorder(&rows).unwrap();
        let next = [EOS, 10, 3, 5];
        let got = model.step(&ctx(), forked.as_mut(), &next).unwrap().logits;
        for (row, &old) in rows.iter().enumerate() {
            let mut alone = model.start(&ctx(), &encoded, 2).unwrap();
            for tokens in &fed {
                model.step(&ctx(), alone.as_mut(), tokens).unwrap();
            }
            let expected = model.step(&ctx(), alone.as_mut(), &[next[row]; 6]).unwrap().logits;
            assert_eq!(got.row(row), expected.row(old), "{config:?}");
        }
        assert_eq!((forked.rows(), forked.position()), (4, 3));
    }
}
