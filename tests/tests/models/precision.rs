//! Whole models below f32's precision, on the tile unit or the one in software: what is guaranteed does not depend on it.

use std::num::NonZeroUsize;

use crate::support::{VOCAB, bits, small_pairs};
use kavanam_kernels::{Context, Precision, testing};
use kavanam_model::models::{AttentionKind, CellKind, RnnSeq2SeqConfig, TransformerConfig};
use kavanam_model::{Grads, LossOptions, ModelConfig, Pool, Seq2Seq, Tape};

/// Models wide enough for tiles: k is at least 32 in every product that weights take part in.
fn models() -> Vec<ModelConfig> {
    let mut transformer = TransformerConfig::new(VOCAB, VOCAB);
    (transformer.width, transformer.heads, transformer.feed_forward) = (34, 2, 40);
    (transformer.encoder_layers, transformer.decoder_layers, transformer.max_positions) = (1, 1, 16);
    let rnn = |cell, attention| {
        let mut config = RnnSeq2SeqConfig::new(VOCAB, VOCAB, cell, attention);
        (config.embedding, config.hidden, config.encoder_hidden) = (33, 36, 36);
        (config.attention_width, config.readout) = (35, 37);
        if attention == AttentionKind::Dot {
            // What dot attention compares: both directions of the encoder.
            config.hidden = 2 * config.encoder_hidden;
        }
        ModelConfig::RnnSeq2Seq(config)
    };
    vec![
        ModelConfig::Transformer(transformer),
        rnn(CellKind::Lstm, AttentionKind::Additive),
        rnn(CellKind::Gru, AttentionKind::Dot),
    ]
}

/// A context for each precision below `Strict`; none where tiles cannot run.
fn contexts() -> Vec<Context> {
    let precisions = [Precision::Highest, Precision::High, Precision::Medium];
    let of = |isa| precisions.map(|precision| Context::with_isa(isa).precision(precision)).to_vec();
    testing::amx().map(of).unwrap_or_default()
}

/// The loss of a training step and its gradients.
fn step(ctx: &Context, model: &dyn Seq2Seq) -> (f32, Vec<f32>) {
    let pool = Pool::new();
    let mut grads = Grads::zeros(model.params());
    let mut tape = Tape::recording(ctx, model.params(), &pool);
    let out = model.loss(&mut tape, &small_pairs(), &LossOptions { label_smoothing: 0.0 }).unwrap();
    let loss = tape.value(out)[0];
    tape.backward(out, &mut grads).unwrap();
    let all = model.params().ids().flat_map(|id| grads.get(id).to_vec());
    (loss, all.collect())
}

#[test]
fn a_training_step_is_near_that_of_f32_and_has_the_same_bits_on_any_threads() {
    for config in models() {
        let model = config.build(3).unwrap();
        for ctx in contexts() {
            let (strict, strict_grads) = step(&ctx.precision(Precision::Strict), model.as_ref());
            let (loss, grads) = step(&ctx, model.as_ref());
            let (precision, scale) =
                (ctx.matmul_precision(), strict_grads.iter().fold(0.0f32, |m, x| m.max(x.abs())));
            // Roundings of a few products in a row; a bf16 has 8 bits, two parts have 17, three all.
            let tolerance = match precision {
                Precision::Medium => 0.05,
                Precision::High => 5e-4,
                _ => 2e-5,
            };
            assert!((loss - strict).abs() <= tolerance * strict, "{precision} {loss} {strict} {config:?}");
            for (x, exact) in grads.iter().zip(&strict_grads) {
                assert!(
                    (x - exact).abs() <= tolerance * scale,
                    "{precision} {x} {exact} of {scale} {config:?}"
                );
            }
            let (loss_of_two, grads_of_two) =
                step(&ctx.threads(NonZeroUsize::new(2).unwrap()), model.as_ref());
            assert_eq!(loss_of_two.to_bits(), loss.to_bits(), "{precision} {config:?}");
            assert_eq!(bits(&grads_of_two), bits(&grads), "{precision} {config:?}");
        }
    }
}

#[test]
fn decoding_has_the_bits_of_the_full_pass_and_padding_changes_none() {
    let batch = small_pairs();
    for config in models() {
        let model = config.build(7).unwrap();
        for ctx in contexts() {
            let pool = Pool::new();
            let mut tape = Tape::inference(&ctx, model.params(), &pool);
            let forced = model.logits(&mut tape, &batch).unwrap();
            let forced = tape.value(forced).to_vec();
            let encoded = model.encode(&ctx, &batch.source, &batch.source_lengths).unwrap();
            let mut state = model.start(&ctx, &encoded, 1).unwrap();
            for t in 0..batch.target_len {
                let tokens: Vec<u32> =
                    (0..batch.size).map(|row| batch.target_in[row * batch.target_len + t]).collect();
                let out = model.step(&ctx, state.as_mut(), &tokens).unwrap();
                for row in (0..batch.size).filter(|row| t < batch.target_lengths[*row]) {
                    let expected = &forced[(row * batch.target_len + t) * VOCAB..][..VOCAB];
                    let precision = ctx.matmul_precision();
                    assert_eq!(bits(out.logits.row(row)), bits(expected), "{precision} {row} {t} {config:?}");
                }
            }
        }
    }
}
