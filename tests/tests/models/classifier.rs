//! Statements about classifiers: gradients, bits, padding, learning.

use crate::support::{Random, VOCAB, assert_differences, bits, ctx};
use kavanam_kernels::{Context, Isa};
use kavanam_model::models::{CellKind, Classifier, ClassifierConfig, ClassifierEncoder, Pooling};
use kavanam_model::{Grads, ParamStore, Pool, Tape};

const SEQUENCES: [&[u32]; 3] = [&[4, 9, 7, 5, 10], &[6], &[10, 3, 8]];
const CLASSES: [u32; 3] = [0, 3, 1];

/// Each encoder with each pooling.
fn configs() -> Vec<ClassifierConfig> {
    let recurrent = |cell, projection, (layers, bidirectional)| ClassifierEncoder::Recurrent {
        cell,
        hidden: 7,
        projection,
        layers,
        bidirectional,
    };
    let encoders = [
        recurrent(CellKind::Lstm, None, (2, true)),
        recurrent(CellKind::Lstm, Some(3), (2, true)),
        recurrent(CellKind::LstmPeephole, Some(5), (1, false)),
        recurrent(CellKind::Gru, None, (1, false)),
        recurrent(CellKind::MinGru, None, (2, true)),
        ClassifierEncoder::Transformer { heads: 2, feed_forward: 9, layers: 2, max_positions: 9 },
    ];
    let poolings = [Pooling::Mean, Pooling::Last];
    let all = encoders.into_iter().flat_map(|encoder| poolings.map(|pooling| (encoder, pooling)));
    all.map(|(encoder, pooling)| ClassifierConfig {
        vocab: VOCAB,
        classes: 4,
        embedding: 6,
        encoder,
        pooling,
        dropout: 0.1,
    })
    .collect()
}

/// The sequences padded to `seq`.
fn padded(sequences: &[&[u32]], seq: usize) -> (Vec<u32>, Vec<usize>) {
    let mut tokens = vec![0; sequences.len() * seq];
    for (row, sequence) in tokens.chunks_exact_mut(seq).zip(sequences) {
        row[..sequence.len()].copy_from_slice(sequence);
    }
    (tokens, sequences.iter().map(|sequence| sequence.len()).collect())
}

fn loss(model: &Classifier, pool: &Pool) -> f64 {
    let (ctx, (tokens, lengths)) = (ctx(), padded(&SEQUENCES, 5));
    let mut tape = Tape::inference(&ctx, model.params(), pool);
    let loss = model.loss(&mut tape, (&tokens, &lengths), &CLASSES).unwrap();
    f64::from(tape.value(loss)[0])
}

#[test]
fn gradients_agree_with_differences() {
    let (pool, ctx, (tokens, lengths)) = (Pool::new(), ctx(), padded(&SEQUENCES, 5));
    for config in configs() {
        let mut model = Classifier::new(&config, 3).unwrap();
        let mut random = Random::new(5);
        for value in model.params_mut().values_mut() {
            *value += 0.2 * random.symmetric();
        }
        let mut grads = Grads::zeros(model.params());
        let mut tape = Tape::recording(&ctx, model.params(), &pool);
        let out = model.loss(&mut tape, (&tokens, &lengths), &CLASSES).unwrap();
        let at_start = f64::from(tape.value(out)[0]);
        tape.backward(out, &mut grads).unwrap();
        let parts = (&mut model, Classifier::params_mut as fn(&mut Classifier) -> &mut ParamStore);
        let loss = |model: &Classifier| loss(model, &pool);
        assert_differences(&format!("{config:?}"), parts, (&grads, at_start), &mut random, loss);
    }
}

#[test]
fn batch_padding_and_threads_change_no_bit() {
    for isa in Isa::available() {
        let ctx = Context::with_isa(isa);
        for config in configs() {
            let model = Classifier::new(&config, 7).unwrap();
            let predict = |sequences: &[&[u32]], seq, threads: usize| {
                let (tokens, lengths) = padded(sequences, seq);
                let ctx = ctx.threads(threads.try_into().unwrap());
                model.predict(&ctx, &tokens, &lengths).unwrap()
            };
            let whole = predict(&SEQUENCES, 5, 1);
            let (loose, threaded) = (predict(&SEQUENCES, 9, 1), predict(&SEQUENCES, 5, 3));
            for (row, sequence) in SEQUENCES.iter().enumerate() {
                let expected = bits(whole.row(row));
                let alone = predict(&[sequence], sequence.len(), 1);
                assert_eq!(bits(alone.row(0)), expected, "{isa} alone {config:?}");
                assert_eq!(bits(loose.row(row)), expected, "{isa} padded {config:?}");
                assert_eq!(bits(threaded.row(row)), expected, "{isa} threads {config:?}");
            }
        }
    }
}

#[test]
fn plain_descent_learns_the_classes() {
    let (pool, ctx, (tokens, lengths)) = (Pool::new(), ctx(), padded(&SEQUENCES, 5));
    for config in configs() {
        let mut model = Classifier::new(&config, 11).unwrap();
        for _ in 0..400 {
            let mut grads = Grads::zeros(model.params());
            let mut tape = Tape::recording(&ctx, model.params(), &pool);
            let loss = model.loss(&mut tape, (&tokens, &lengths), &CLASSES).unwrap();
            tape.backward(loss, &mut grads).unwrap();
            for (value, grad) in model.params_mut().values_mut().iter_mut().zip(grads.values()) {
                *value -= 0.05 * grad;
            }
        }
        let logits = model.predict(&ctx, &tokens, &lengths).unwrap();
        for (row, class) in CLASSES.into_iter().enumerate() {
            let row = logits.row(row);
            let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
            assert_eq!(best, class as usize, "{config:?}: {row:?}");
        }
    }
}

#[test]
fn impossible_models_and_calls_are_typed_errors() {
    let mut config = configs().pop().unwrap();
    let model = Classifier::new(&config, 1).unwrap();
    assert!(model.predict(&ctx(), &[5; 3], &[2, 1]).is_err(), "three tokens of two sequences");
    assert!(model.predict(&ctx(), &[5; 2], &[3]).is_err(), "a length beyond the tokens");
    assert!(model.predict(&ctx(), &[5; 10], &[10]).is_err(), "more than the positions");
    assert!(model.predict(&ctx(), &[99], &[1]).is_err(), "unknown token");
    config.embedding = 5;
    assert!(Classifier::new(&config, 1).unwrap_err().to_string().starts_with("config: width is 5"));
    for (cell, projection) in [(CellKind::Gru, 4), (CellKind::Lstm, 7), (CellKind::Lstm, 0)] {
        let encoder = ClassifierEncoder::Recurrent {
            cell,
            hidden: 7,
            projection: Some(projection),
            layers: 1,
            bidirectional: true,
        };
        let config = ClassifierConfig { encoder, ..configs()[0].clone() };
        assert!(Classifier::new(&config, 1).unwrap_err().to_string().starts_with("config: projection is"));
    }
}
