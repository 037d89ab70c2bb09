//! What a run promises, on tiny models: it learns, the seed fixes every bit, a resumed run is the same run.

use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;

use kavanam_kernels::{Context, Isa};

use super::checkpoint::TRAINING_FILE;
use super::*;
use crate::io::config::{CONFIG_FILE, MODEL_FILE, VOCAB_FILE, Vocabs, load_model};
use crate::io::tests::TestFolder;
use crate::models::{
    AttentionKind, CellKind, DropoutRates, ModelConfig, RnnSeq2SeqConfig, TransformerConfig,
};
use crate::vocab::Vocab;

const VOCAB: usize = 10;

fn ctx(threads: usize) -> Context {
    Context::with_isa(Isa::best()).threads(NonZeroUsize::new(threads).unwrap())
}

fn transformer() -> ModelConfig {
    ModelConfig::Transformer(TransformerConfig {
        width: 16,
        heads: 2,
        feed_forward: 32,
        encoder_layers: 1,
        decoder_layers: 1,
        max_positions: 32,
        dropout: DropoutRates::uniform(0.1),
        ..TransformerConfig::new(VOCAB, VOCAB)
    })
}

fn rnn() -> ModelConfig {
    ModelConfig::RnnSeq2Seq(RnnSeq2SeqConfig {
        embedding: 16,
        hidden: 16,
        encoder_hidden: 8,
        attention_width: 8,
        readout: 16,
        ..RnnSeq2SeqConfig::new(VOCAB, VOCAB, CellKind::Gru, AttentionKind::Additive)
    })
}

/// Sequences of a few lengths, to be copied.
fn examples() -> Vec<Example> {
    let sequence =
        |i: usize| (0..1 + i % 4).map(|t| 4 + ((i * 5 + t * 3 + i / 7) % 6) as u32).collect::<Vec<_>>();
    (0..120).map(|i| Example { source: sequence(i), target: sequence(i) }).collect()
}

fn config() -> TrainerConfig {
    TrainerConfig {
        seed: 11,
        batch_tokens: 200,
        grad_shards: 2,
        label_smoothing: 0.1,
        clip_norm: 1.0,
        beta1: 0.9,
        beta2: 0.98,
        epsilon: 1e-9,
        weight_decay: 0.01,
        schedule: Schedule {
            peak_lr: 1e-2,
            warmup_steps: 20,
            decay: Decay::InverseSqrt,
            total_steps: Some(300),
            cooldown: 0.3,
        },
    }
}

fn trainer(model: &ModelConfig, config: TrainerConfig) -> Trainer {
    Trainer::new(model.build(config.seed).unwrap(), examples(), config).unwrap()
}

fn vocabs() -> Vocabs {
    let vocab = || Vocab::new(["a", "b", "c", "d", "e", "f"]).unwrap();
    Vocabs::new(vocab(), vocab())
}

/// The bits of loss and gradient norm of so many steps.
fn run(trainer: &mut Trainer, ctx: &Context, steps: usize) -> Vec<(u64, u64)> {
    let step = |_| trainer.step(ctx).map(|r| (r.loss.to_bits(), r.grad_norm.to_bits())).unwrap();
    (0..steps).map(step).collect()
}

#[test]
fn both_families_learn_to_copy() {
    for model in [transformer(), rnn()] {
        let mut trainer = trainer(&model, TrainerConfig { label_smoothing: 0.0, ..config() });
        let first = trainer.step(&ctx(1)).unwrap().loss;
        let last = (0..250).map(|_| trainer.step(&ctx(1)).unwrap().loss).last().unwrap();
        assert!(first > 1.5 && last < 0.4 * first, "{}: {first} → {last}", model.model_type());
    }
}

#[test]
fn a_run_whose_length_is_settled_late_equals_one_that_began_with_it() {
    let open = Schedule { total_steps: None, ..config().schedule };
    let mut whole =
        trainer(&rnn(), TrainerConfig { schedule: Schedule { total_steps: Some(20), ..open }, ..config() });
    let expected = run(&mut whole, &ctx(1), 20);
    let mut late = trainer(&rnn(), TrainerConfig { schedule: open, ..config() });
    let mut got = run(&mut late, &ctx(1), 14);
    let refused = late.settle_length(18).unwrap_err();
    assert!(refused.to_string().contains("step 14"), "{refused}");
    late.settle_length(20).unwrap();
    got.extend(run(&mut late, &ctx(1), 6));
    assert_eq!(got, expected);
    assert_eq!(late.model().params().values(), whole.model().params().values());
    assert!(late.settle_length(30).is_err(), "a length is settled once");
}

#[test]
fn the_seed_fixes_every_bit_whatever_the_threads() {
    for model in [transformer(), rnn()] {
        let mut one = trainer(&model, config());
        let expected = run(&mut one, &ctx(1), 12);
        for threads in [1, 2, 3] {
            let mut other = trainer(&model, config());
            assert_eq!(run(&mut other, &ctx(threads), 12), expected, "{threads} threads");
            assert_eq!(other.model().params().values(), one.model().params().values());
        }
        let mut other_seed = trainer(&model, TrainerConfig { seed: 12, ..config() });
        assert_ne!(run(&mut other_seed, &ctx(1), 12), expected);
    }
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one() {
    for model in [transformer(), rnn()] {
        let folder = TestFolder::new(&format!("resume-{}", model.model_type()));
        let mut whole = trainer(&model, config());
        run(&mut whole, &ctx(2), 7);
        assert!(whole.note_score(0.5) && !whole.note_score(0.7));
        whole.add_seconds(1.25);
        whole.save(&folder.0, &vocabs()).unwrap();
        let expected = run(&mut whole, &ctx(2), 30);
        let mut resumed = Trainer::resume(&folder.0, examples()).unwrap();
        assert_eq!((resumed.progress().step, resumed.progress().best), (7, Some(0.5)));
        assert_eq!(resumed.progress().seconds, 1.25);
        assert_eq!(run(&mut resumed, &ctx(1), 30), expected);
        assert_eq!(resumed.model().params().values(), whole.model().params().values());
        assert_eq!(resumed.progress().tokens, whole.progress().tokens);
    }
}

#[test]
fn a_saved_model_loads_with_the_same_bits() {
    let folder = TestFolder::new("model");
    let mut trained = trainer(&rnn(), config());
    run(&mut trained, &ctx(1), 3);
    trained.save(&folder.0, &vocabs()).unwrap();
    let loaded = load_model(&folder.0).unwrap();
    assert_eq!(loaded.model.params().values(), trained.model().params().values());
    assert_eq!((loaded.model.config(), loaded.vocabs), (rnn(), vocabs()));
}

#[test]
fn a_gradient_that_is_not_finite_stops_before_the_step() {
    let mut trainer = trainer(&transformer(), config());
    run(&mut trainer, &ctx(1), 2);
    let id = trainer.model().params().find("output.bias").unwrap();
    trainer.model_mut().params_mut().get_mut(id)[5] = f32::NAN;
    let before = trainer.moments.clone();
    let error = trainer.step(&ctx(2)).unwrap_err();
    assert!(matches!(error, TrainError::Loss { step: 3, .. }), "{error}");
    assert_eq!((trainer.progress().step, &trainer.moments), (2, &before));
    let text = TrainError::Gradient { step: 3, tensor: "a.weight".to_owned() }.to_string();
    assert!(text.contains("step 3") && text.contains("\"a.weight\"") && text.contains("step 2"), "{text}");
}

/// The message of a failed load after `damage` has been done to a good checkpoint.
fn damaged(name: &str, damage: impl Fn(&Path)) -> (String, String) {
    let folder = TestFolder::new(name);
    let trained = trainer(&transformer(), config());
    trained.save(&folder.0, &vocabs()).unwrap();
    damage(&folder.0);
    let message = |error: Option<String>| error.unwrap_or_default();
    let load = message(load_model(&folder.0).err().map(|e| e.to_string()));
    (load, message(<Trainer>::resume(&folder.0, examples()).err().map(|e| e.to_string())))
}

#[test]
fn damaged_checkpoints_are_named() {
    let cut = |file: &'static str| {
        move |folder: &Path| {
            let whole = fs::read(folder.join(file)).unwrap();
            fs::write(folder.join(file), &whole[..whole.len() / 2]).unwrap();
        }
    };
    let (load, resume) = damaged("cut-model", cut(MODEL_FILE));
    assert!(load.contains(MODEL_FILE) && load.contains("cut off") && resume.is_empty(), "{load} {resume}");
    let (load, resume) = damaged("cut-state", cut(TRAINING_FILE));
    assert!(resume.contains(TRAINING_FILE) && resume.contains("cut off") && load.is_empty(), "{resume}");
    for file in [CONFIG_FILE, VOCAB_FILE, MODEL_FILE] {
        let (load, _) = damaged(&format!("missing-{file}"), |f| fs::remove_file(f.join(file)).unwrap());
        assert!(load.contains("cannot read") && load.contains(file), "{load}");
    }
    let (_, resume) = damaged("model-as-state", |f| {
        fs::copy(f.join(MODEL_FILE), f.join(TRAINING_FILE)).unwrap();
    });
    assert!(resume.contains("not the state of a training run"), "{resume}");
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let edit = |file: &'static str, from: &'static str, to: &'static str| {
        move |folder: &Path| {
            let path = folder.join(file);
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.contains(from), "{text}");
            fs::write(path, text.replace(from, to)).unwrap();
        }
    };
    let (load, _) = damaged("wider", edit(CONFIG_FILE, "\"feed_forward\": 32", "\"feed_forward\": 48"));
    assert!(load.contains(MODEL_FILE) && load.contains("has shape") && load.contains("48"), "{load}");
    let (load, _) = damaged("deeper", edit(CONFIG_FILE, "\"encoder_layers\": 1", "\"encoder_layers\": 2"));
    assert!(load.contains("encoder.layers.1") && load.contains("is missing"), "{load}");
    let (load, _) = damaged("shallower", edit(CONFIG_FILE, "\"decoder_layers\": 1", "\"decoder_layers\": 0"));
    assert!(load.contains("decoder.layers.0") && load.contains("no parameter"), "{load}");
    let (load, _) = damaged("type", edit(CONFIG_FILE, "\"transformer\"", "\"perceiver\""));
    assert!(load.contains(CONFIG_FILE) && load.contains("perceiver"), "{load}");
    let (load, _) = damaged("vocab", edit(VOCAB_FILE, "\"a\",", ""));
    assert!(load.contains(VOCAB_FILE) && load.contains("9 tokens"), "{load}");
}

#[test]
fn other_examples_and_bad_settings_are_refused() {
    let folder = TestFolder::new("other-data");
    trainer(&transformer(), config()).save(&folder.0, &vocabs()).unwrap();
    let mut other = examples();
    other.pop();
    let error = <Trainer>::resume(&folder.0, other).err().unwrap().to_string();
    assert!(error.contains("other training examples"), "{error}");
    let new = |config| Trainer::new(transformer().build(0).unwrap(), examples(), config).err().unwrap();
    assert!(new(TrainerConfig { grad_shards: 0, ..config() }).to_string().contains("grad_shards"));
    assert!(new(TrainerConfig { batch_tokens: 0, ..config() }).to_string().contains("batch_tokens"));
    let none = Trainer::new(transformer().build(0).unwrap(), Vec::new(), config()).err().unwrap();
    assert!(matches!(none, TrainError::NoExamples));
}
