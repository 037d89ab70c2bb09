//! Statements about language models of characters: gradients, bits, carried state, learning, checkpoints.

use crate::support::{Random, VOCAB, assert_differences, bits, ctx};
use kavanam_kernels::{Context, Isa};
use kavanam_model::generate::{SampleOptions, sample};
use kavanam_model::models::char_lm::windows;
use kavanam_model::models::{CellKind, CharLm, CharLmConfig};
use kavanam_model::train::{Decay, Example, Schedule, Trainable, Trainer, TrainerConfig};
use kavanam_model::vocab::Vocab;
use kavanam_model::{Grads, LossOptions, ParamStore, Pool, Tape};

const CELLS: [CellKind; 5] =
    [CellKind::Lstm, CellKind::LstmPeephole, CellKind::Gru, CellKind::MinGru, CellKind::MinLstm];

/// With peepholes goes a projection too.
fn config(cell: CellKind) -> CharLmConfig {
    let projection = (cell == CellKind::LstmPeephole).then_some(4);
    CharLmConfig { vocab: VOCAB, cell, embedding: 5, hidden: 9, projection, layers: 2, dropout: 0.1 }
}

/// Windows of different lengths.
fn examples() -> Vec<Example> {
    windows(&[4, 9, 7, 5, 10, 6, 10, 3, 8, 4], 4)
}

fn loss(model: &CharLm, examples: &[&Example], pool: &Pool) -> f64 {
    let ctx = ctx();
    let mut tape = Tape::inference(&ctx, model.params(), pool);
    let loss = model.examples_loss(&mut tape, examples, &LossOptions { label_smoothing: 0.1 }).unwrap();
    f64::from(tape.value(loss)[0])
}

#[test]
fn gradients_agree_with_differences() {
    let (pool, ctx, examples) = (Pool::new(), ctx(), examples());
    let examples: Vec<&Example> = examples.iter().collect();
    for cell in CELLS {
        let mut model = CharLm::new(&config(cell), 3).unwrap();
        assert_eq!(model.params().parameter_count(), config(cell).parameter_count());
        let mut random = Random::new(5);
        for value in model.params_mut().values_mut() {
            *value += 0.2 * random.symmetric();
        }
        let mut grads = Grads::zeros(model.params());
        let mut tape = Tape::recording(&ctx, model.params(), &pool);
        let out = model.examples_loss(&mut tape, &examples, &LossOptions { label_smoothing: 0.1 }).unwrap();
        let at_start = f64::from(tape.value(out)[0]);
        tape.backward(out, &mut grads).unwrap();
        let parts = (&mut model, CharLm::params_mut as fn(&mut CharLm) -> &mut ParamStore);
        let loss = |model: &CharLm| loss(model, &examples, &pool);
        assert_differences(&format!("{cell:?}"), parts, (&grads, at_start), &mut random, loss);
    }
}

#[test]
fn a_carried_state_is_the_whole_text_read_again_bit_for_bit() {
    let texts: [[u32; 7]; 3] = [[1, 4, 9, 7, 5, 10, 6], [1, 10, 3, 8, 8, 4, 4], [5, 5, 6, 7, 8, 9, 10]];
    for isa in Isa::available() {
        for (cell, threads) in CELLS.into_iter().flat_map(|cell| [(cell, 1usize), (cell, 3)]) {
            let ctx = Context::with_isa(isa).threads(threads.try_into().unwrap());
            let model = CharLm::new(&config(cell), 7).unwrap();
            let mut state = model.start(3);
            let whole = model.read(&Context::with_isa(isa), &mut state, &texts.concat()).unwrap();
            for cuts in [&[1, 1, 1, 1, 1, 1, 1][..], &[3, 1, 2, 1], &[6, 1], &[0, 7]] {
                let (mut parts, mut first) = (model.start(3), 0);
                for &len in cuts {
                    let read: Vec<u32> = texts.iter().flat_map(|t| t[first..first + len].to_vec()).collect();
                    let logits = model.read(&ctx, &mut parts, &read).unwrap();
                    for row in 0..3 * len {
                        let expected = whole.row(row / len * 7 + first + row % len);
                        assert_eq!(bits(logits.row(row)), bits(expected), "{isa} {cell:?} {cuts:?} {row}");
                    }
                    first += len;
                }
            }
            // A text's logits do not depend on those beside it.
            let alone = model.read(&ctx, &mut model.start(1), &texts[1]).unwrap();
            for t in 0..7 {
                assert_eq!(bits(alone.row(t)), bits(whole.row(7 + t)), "{isa} {cell:?} alone {t}");
            }
        }
    }
}

#[test]
fn padding_adds_nothing_to_the_loss() {
    let (all, pool) = (examples(), Pool::new());
    for cell in CELLS {
        let model = CharLm::new(&config(cell), 9).unwrap();
        let together = loss(&model, &all.iter().collect::<Vec<_>>(), &pool);
        let alone: f64 = all.iter().map(|example| loss(&model, &[example], &pool)).sum();
        // Each sum is rounded to f32 once.
        let tolerance = 4.0 * f64::from(f32::EPSILON) * together;
        assert!((together - alone).abs() <= tolerance, "{cell:?}: {together} {alone}");
    }
}

/// A sentence over and over, and the run that learns it.
fn trainer(cell: CellKind, steps: u64) -> Trainer<CharLm> {
    let sentence = [4, 5, 6, 4, 7, 8, 9, 9, 10, 5];
    let text: Vec<u32> = sentence.into_iter().cycle().take(400).collect();
    let schedule = Schedule {
        peak_lr: 0.02,
        warmup_steps: 5,
        decay: Decay::InverseSqrt,
        total_steps: Some(steps),
        cooldown: 0.5,
    };
    let config = TrainerConfig {
        seed: 4,
        batch_tokens: 160,
        grad_shards: 2,
        label_smoothing: 0.0,
        clip_norm: 1.0,
        beta1: 0.9,
        beta2: 0.98,
        epsilon: 1e-9,
        weight_decay: 0.0,
        schedule,
    };
    let model = CharLmConfig { hidden: 24, layers: 1, dropout: 0.0, ..self::config(cell) };
    Trainer::new(Box::new(CharLm::new(&model, 5).unwrap()), windows(&text, 20), config).unwrap()
}

#[test]
fn every_cell_learns_a_sentence_and_says_it() {
    for cell in CELLS {
        let mut trainer = trainer(cell, 150);
        let reports: Vec<f64> = (0..150).map(|_| trainer.step(&ctx()).unwrap().loss).collect();
        assert!(reports[149] < 0.1 * reports[0], "{cell:?}: {} to {}", reports[0], reports[149]);
        let said = |seed, temperature| {
            let options = SampleOptions { temperature, top_k: 0, seed };
            sample(trainer.model(), &ctx(), &[4, 5, 6], 12, options).unwrap()
        };
        assert_eq!(said(1, 0.0), [4, 7, 8, 9, 9, 10, 5, 4, 5, 6, 4, 7], "{cell:?}");
        assert_eq!(said(2, 5.0), said(2, 5.0), "a seed fixes what is said");
        assert_ne!(said(2, 5.0), said(3, 5.0));
    }
}

fn take(trainer: &mut Trainer<CharLm>, steps: usize, threads: usize) {
    for _ in 0..steps {
        trainer.step(&ctx().threads(threads.try_into().unwrap())).unwrap();
    }
}

#[test]
fn a_resumed_run_is_the_same_run_and_its_folder_reads_back() {
    let folder = std::env::temp_dir().join(format!("kavanam-char-lm-{}", std::process::id()));
    let vocab = Vocab::new(["a", "b", "c", "d", "e", "\n", "\""]).unwrap();
    let mut whole = trainer(CellKind::Lstm, 9);
    take(&mut whole, 9, 1);
    let mut part = trainer(CellKind::Lstm, 9);
    take(&mut part, 4, 1);
    part.save(&folder, &vocab).unwrap();
    let mut resumed = Trainer::<CharLm>::resume(&folder, part.examples().to_vec()).unwrap();
    take(&mut resumed, 5, 3);
    assert_eq!(bits(resumed.model().params().values()), bits(whole.model().params().values()));
    resumed.save(&folder, &vocab).unwrap();
    let (model, read) = kavanam_model::io::char_lm::load(&folder).unwrap();
    assert_eq!((model.config(), &read), (resumed.model().config(), &vocab));
    assert_eq!(bits(model.params().values()), bits(whole.model().params().values()));
    // It is no model from sequence to sequence, and says so.
    let error = kavanam_model::io::config::load_model(&folder).err().unwrap().to_string();
    assert!(error.contains("char_lm"), "{error}");
    let error = <Trainer>::resume(&folder, part.examples().to_vec()).err().unwrap().to_string();
    assert!(error.contains("training.safetensors"), "{error}");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn impossible_models_and_calls_are_typed_errors() {
    let model = CharLm::new(&config(CellKind::Gru), 1).unwrap();
    assert!(model.read(&ctx(), &mut model.start(2), &[4, 5, 6]).is_err(), "three tokens of two texts");
    assert!(model.read(&ctx(), &mut model.start(1), &[99]).is_err(), "unknown token");
    assert!(model.read(&ctx(), &mut model.start(1), &[4, 99]).is_err(), "unknown token");
    for (cell, projection) in [(CellKind::Gru, 4), (CellKind::Lstm, 9), (CellKind::Lstm, 0)] {
        let config = CharLmConfig { projection: Some(projection), ..config(cell) };
        assert!(CharLm::new(&config, 1).unwrap_err().to_string().contains("projection"));
    }
    let layers = CharLmConfig { layers: 0, ..config(CellKind::Gru) };
    assert!(CharLm::new(&layers, 1).unwrap_err().to_string().starts_with("config: layers is 0"));
}
