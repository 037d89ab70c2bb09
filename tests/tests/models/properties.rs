//! Statements about whole models: gradients, parameter counts, bits, padding, causality, learning.

use crate::support::{Random, assert_differences, bits, ctx, pairs, rnns, small_pairs, transformers};
use kavanam_kernels::{Context, Isa};
use kavanam_model::models::{AttentionKind, BOS, NormPlacement, TransformerConfig};
use kavanam_model::{Batch, DropoutKey, Grads, LossOptions, ModelConfig, ParamStore, Pool, Seq2Seq, Tape};

/// Teacher-forced logits, `[size][target_len][vocab]` flat.
fn teacher_forced(ctx: &Context, model: &dyn Seq2Seq, batch: &Batch) -> Vec<f32> {
    let pool = Pool::new();
    let mut tape = Tape::inference(ctx, model.params(), &pool);
    let logits = model.logits(&mut tape, batch).unwrap();
    tape.value(logits).to_vec()
}

fn loss(model: &dyn Seq2Seq, batch: &Batch, pool: &Pool) -> f64 {
    let ctx = ctx();
    let mut tape = Tape::inference(&ctx, model.params(), pool);
    let loss = model.loss(&mut tape, batch, &LossOptions { label_smoothing: 0.1 }).unwrap();
    f64::from(tape.value(loss)[0])
}

#[test]
fn parameter_counts_are_known_before_a_model_is_built() {
    for config in transformers().into_iter().chain(rnns()) {
        let model = config.build(1).unwrap();
        assert_eq!(model.params().parameter_count(), config.parameter_count(), "{config:?}");
        assert_eq!(model.config(), config);
    }
}

#[test]
fn the_base_transformer_has_its_published_size() {
    // Vaswani et al. 2017, table 3: 65 million for the base model with a shared vocabulary of about 37,000.
    let mut config = TransformerConfig::new(37_000, 37_000);
    (config.width, config.heads, config.feed_forward) = (512, 8, 2048);
    (config.encoder_layers, config.decoder_layers) = (6, 6);
    (config.norm, config.final_norm) = (NormPlacement::Post, false);
    (config.share_embeddings, config.tie_output) = (true, true);
    let millions = config.parameter_count() as f64 / 1e6;
    assert!((62.0..66.0).contains(&millions), "{millions}");
}

#[test]
fn gradients_of_whole_models_agree_with_differences() {
    for config in transformers().into_iter().chain(rnns()) {
        let mut model = config.build(3).unwrap();
        // Weights of some size, so that every path carries a gradient that differences can see.
        let mut random = Random::new(5);
        for value in model.params_mut().values_mut() {
            *value += 0.2 * random.symmetric();
        }
        let batch = small_pairs();
        let pool = Pool::new();
        let ctx = ctx();
        let mut grads = Grads::zeros(model.params());
        let mut tape = Tape::recording(&ctx, model.params(), &pool);
        let out = model.loss(&mut tape, &batch, &LossOptions { label_smoothing: 0.1 }).unwrap();
        let at_start = f64::from(tape.value(out)[0]);
        tape.backward(out, &mut grads).unwrap();
        assert!((at_start - loss(model.as_ref(), &batch, &pool)).abs() <= 1e-5 * at_start);

        let grads = (&grads, at_start);
        let params =
            (&mut model, (|model| model.params_mut()) as fn(&mut Box<dyn Seq2Seq>) -> &mut ParamStore);
        assert_differences(&format!("{config:?}"), params, grads, &mut random, |model| {
            loss(model.as_ref(), &batch, &pool)
        });
    }
}

#[test]
fn teacher_forcing_equals_decoding_token_by_token_bit_for_bit() {
    for isa in Isa::available() {
        let ctx = Context::with_isa(isa);
        for config in transformers().into_iter().chain(rnns()) {
            let model = config.build(7).unwrap();
            let batch = small_pairs();
            let vocab = config.target_vocab();
            let forced = teacher_forced(&ctx, model.as_ref(), &batch);
            let encoded = model.encode(&ctx, &batch.source, &batch.source_lengths).unwrap();
            for beams in [1, 3] {
                let mut state = model.start(&ctx, &encoded, beams).unwrap();
                for t in 0..batch.target_len {
                    let token = |row: usize| batch.target_in[row / beams * batch.target_len + t];
                    let tokens: Vec<u32> = (0..batch.size * beams).map(token).collect();
                    let out = model.step(&ctx, state.as_mut(), &tokens).unwrap();
                    for row in (0..batch.size * beams).filter(|row| t < batch.target_lengths[row / beams]) {
                        let at = (row / beams * batch.target_len + t) * vocab;
                        let expected = &forced[at..at + vocab];
                        assert_eq!(bits(out.logits.row(row)), bits(expected), "{isa} {row} {t} {config:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn padding_changes_no_bit() {
    let ctx = ctx();
    for config in transformers().into_iter().chain(rnns()) {
        let model = config.build(9).unwrap();
        let pairs = pairs();
        let tight = Batch::from_pairs(&pairs).unwrap();
        let loose = Batch::padded_to(&pairs, tight.source_len + 5, tight.target_len + 3).unwrap();
        let vocab = config.target_vocab();
        let (a, b) =
            (teacher_forced(&ctx, model.as_ref(), &tight), teacher_forced(&ctx, model.as_ref(), &loose));
        for (i, pair) in pairs.iter().enumerate() {
            let alone = Batch::from_pairs(std::slice::from_ref(pair)).unwrap();
            let c = teacher_forced(&ctx, model.as_ref(), &alone);
            for t in 0..tight.target_lengths[i] {
                let row = |all: &[f32], len: usize, i: usize| bits(&all[(i * len + t) * vocab..][..vocab]);
                let expected = row(&a, tight.target_len, i);
                assert_eq!(row(&b, loose.target_len, i), expected, "padded {i} {t} {config:?}");
                assert_eq!(row(&c, alone.target_len, 0), expected, "alone {i} {t} {config:?}");
            }
        }
    }
}

#[test]
fn a_later_token_changes_no_earlier_logit() {
    let ctx = ctx();
    for config in transformers().into_iter().chain(rnns()) {
        let model = config.build(11).unwrap();
        let batch = small_pairs();
        let before = teacher_forced(&ctx, model.as_ref(), &batch);
        let vocab = config.target_vocab();
        let t = 2;
        let mut changed = batch.clone();
        changed.target_in[t] = if batch.target_in[t] == 5 { 6 } else { 5 };
        let after = teacher_forced(&ctx, model.as_ref(), &changed);
        assert_eq!(bits(&before[..t * vocab]), bits(&after[..t * vocab]), "{config:?}");
        assert_ne!(bits(&before[t * vocab..][..vocab]), bits(&after[t * vocab..][..vocab]), "{config:?}");
        let others = batch.target_len * vocab..;
        assert_eq!(bits(&before[others.clone()]), bits(&after[others]), "{config:?}");
    }
}

#[test]
fn attention_rows_are_distributions_over_the_source() {
    let ctx = ctx();
    for config in transformers().into_iter().chain(rnns()) {
        let model = config.build(13).unwrap();
        let batch = small_pairs();
        let encoded = model.encode(&ctx, &batch.source, &batch.source_lengths).unwrap();
        let mut state = model.start(&ctx, &encoded, 2).unwrap();
        let attends = !matches!(&config, ModelConfig::RnnSeq2Seq(c) if c.attention == AttentionKind::None);
        let tokens = vec![BOS; batch.size * 2];
        assert!(model.step(&ctx, state.as_mut(), &tokens).unwrap().attention.is_none());
        state.want_attention(true);
        let attention = model.step(&ctx, state.as_mut(), &tokens).unwrap().attention;
        assert_eq!(attention.is_some(), attends, "{config:?}");
        let Some(attention) = attention else { continue };
        assert_eq!(attention.shape(), [batch.size * 2, batch.source_len]);
        for row in 0..batch.size * 2 {
            let (weights, length) = (attention.row(row), batch.source_lengths[row / 2]);
            assert!(weights.iter().all(|&w| w >= 0.0));
            assert!(weights[length..].iter().all(|&w| w == 0.0));
            let sum: f32 = weights.iter().sum();
            // One rounding of each exponential and quotient, and of the sums.
            assert!((sum - 1.0).abs() <= 4.0 * (length + 4) as f32 * f32::EPSILON, "{sum}");
        }
    }
}

#[test]
fn the_run_is_the_same_for_any_threads_and_recycled_memory() {
    let batch = small_pairs();
    for config in transformers().into_iter().chain(rnns()) {
        let model = config.build(17).unwrap();
        let pool = Pool::new();
        let run = |threads: usize| {
            let ctx = ctx().threads(threads.try_into().unwrap());
            let mut grads = Grads::zeros(model.params());
            let key = DropoutKey { seed: 1, step: 2, shard: 3 };
            let mut tape = Tape::training(&ctx, model.params(), &pool, key);
            let loss = model.loss(&mut tape, &batch, &LossOptions::default()).unwrap();
            let value = tape.value(loss)[0].to_bits();
            tape.backward(loss, &mut grads).unwrap();
            (value, bits(grads.values()))
        };
        let first = run(1);
        assert_eq!(run(1), first, "{config:?}");
        assert_eq!(run(3), first, "{config:?}");
        assert!(pool.idle() > 0);
    }
}

#[test]
fn impossible_calls_are_typed_errors() {
    let ctx = ctx();
    let mut config = TransformerConfig::new(12, 12);
    (config.width, config.heads, config.feed_forward, config.max_positions) = (8, 2, 8, 4);
    let transformer = ModelConfig::Transformer(config).build(1).unwrap();
    let rnn = rnns()[0].build(1).unwrap();
    let too_long = vec![5; 5];
    let error = transformer.encode(&ctx, &too_long, &[5]).unwrap_err();
    assert_eq!(error.to_string(), "source has 5 positions, the model has 4");
    for model in [&transformer, &rnn] {
        assert!(model.encode(&ctx, &[5, 99], &[2]).is_err(), "unknown token");
        let encoded = model.encode(&ctx, &[5, 6], &[2]).unwrap();
        let mut state = model.start(&ctx, &encoded, 2).unwrap();
        assert!(model.step(&ctx, state.as_mut(), &[BOS]).is_err(), "one token for two rows");
        assert!(state.reorder(&[0, 2]).is_err());
        let other = if std::ptr::eq(model, &transformer) { &rnn } else { &transformer };
        assert!(other.step(&ctx, state.as_mut(), &[BOS, BOS]).is_err(), "another model's state");
    }
}
