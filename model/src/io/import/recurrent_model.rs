//! A whole recurrent encoder–decoder whose tensors have a framework's layouts.

use std::path::Path;

use super::recurrent::{CellTensor, transpose_blocks};
use super::tensors::Tensors;
use super::{Imported, load};
use crate::io::CheckpointError;
use crate::io::config::Vocabs;
use crate::models::{CellKind, RnnSeq2Seq, RnnSeq2SeqConfig, Seq2Seq};

/// Whose names and layouts a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framework {
    /// `nn.LSTM`, `nn.GRU`, `nn.Linear`, `nn.Embedding`: the names and layouts of this project, too.
    PyTorch,
    /// Kernels are `[in, out]`; LSTM gates i f c o with one bias, GRU gates z r h with two rows of bias (`reset_after`).
    Keras,
}

/// Fills the model that `config` describes from a `.safetensors` or `.npz` file.
///
/// What stands before `output.bias`, such as `model.`, is left out of all names. `docs/formats.md` lists the names.
///
/// # Errors
/// [`CheckpointError`] when the file is missing, foreign or cut off, or names the tensor that is missing, left over or
/// of another shape.
pub fn recurrent_model(
    path: &Path,
    framework: Framework,
    config: &RnnSeq2SeqConfig,
    vocabs: Vocabs,
) -> Result<Imported, CheckpointError> {
    let contents = load(path)?;
    let mut model = RnnSeq2Seq::new(config, 0).map_err(|e| CheckpointError::format(path, e.to_string()))?;
    let mut file = Tensors::new(path, &contents).without_prefix("output.bias");
    let params = model.params_mut();
    for id in params.ids() {
        let (name, shape) = (params.name(id), params.shape(id));
        let values = match framework {
            Framework::PyTorch => from_pytorch(&mut file, name, shape)?,
            Framework::Keras => from_keras(&mut file, config.cell, name, shape)?,
        };
        params.get_mut(id).copy_from_slice(&values);
    }
    file.finish()?;
    Ok(Imported { model, vocabs })
}

fn from_pytorch(file: &mut Tensors<'_>, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
    match CellTensor::parse(name) {
        Some(cell) => cell.pytorch_values(file, shape),
        None => Ok(file.take(name, shape)?.to_vec()),
    }
}

fn from_keras(
    file: &mut Tensors<'_>,
    cell: CellKind,
    name: &str,
    shape: &[usize],
) -> Result<Vec<f32>, CheckpointError> {
    if let Some(tensor) = CellTensor::parse(name) {
        return tensor.keras_values(file, cell, shape);
    }
    match name.strip_suffix(".weight") {
        Some(module) if module.ends_with("_embedding") => {
            Ok(file.take(&format!("{module}.embeddings"), shape)?.to_vec())
        }
        Some(module) => {
            let (out, input) = (shape[0], shape[1]);
            let kernel = file.take(&format!("{module}.kernel"), &[input, out])?;
            Ok(transpose_blocks(kernel, input, &[0]))
        }
        None => Ok(file.take(name, shape)?.to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::super::tests::TestFolder;
    use super::super::npy::tests::f32_file;
    use super::super::npz::tests::archive;
    use super::*;
    use crate::io::safetensors::{self, TensorRef};
    use crate::models::AttentionKind;
    use crate::ops::gradient_check::Random;
    use crate::vocab::Vocab;

    fn vocabs() -> Vocabs {
        let vocab = || Vocab::new(["a", "b", "c"]).unwrap();
        Vocabs::new(vocab(), vocab())
    }

    /// Two layers, both directions, attention: every kind of tensor, each value random.
    fn model(cell: CellKind) -> RnnSeq2Seq {
        let attention = if cell.is_scan() { AttentionKind::Dot } else { AttentionKind::Additive };
        let mut config = RnnSeq2SeqConfig::new(7, 7, cell, attention);
        config.layers = 2;
        (config.embedding, config.hidden, config.encoder_hidden) = (3, 10, 5);
        (config.attention_width, config.readout) = (4, 2);
        let mut model = RnnSeq2Seq::new(&config, 1).unwrap();
        let mut random = Random(9);
        model.params_mut().values_mut().fill_with(|| random.next());
        model
    }

    fn config(model: &RnnSeq2Seq) -> RnnSeq2SeqConfig {
        let crate::models::ModelConfig::RnnSeq2Seq(config) = model.config() else { unreachable!() };
        config
    }

    type Tensor = (String, Vec<usize>, Vec<f32>);

    fn tensors(model: &RnnSeq2Seq) -> Vec<Tensor> {
        let params = model.params();
        let tensor = |id| (params.name(id).to_owned(), params.shape(id).to_vec(), params.get(id).to_vec());
        params.ids().map(tensor).collect()
    }

    fn save(path: &Path, tensors: &[Tensor]) {
        let refs: Vec<TensorRef<'_>> =
            tensors.iter().map(|(name, shape, data)| TensorRef { name, shape, data }).collect();
        safetensors::save(path, &refs, None).unwrap();
    }

    /// The same model as Keras would hold it; an LSTM's second bias must be zero.
    fn to_keras(model: &RnnSeq2Seq) -> Vec<Tensor> {
        let cell = config(model).cell;
        let transposed = |shape: &[usize], data: &[f32]| {
            let (rows, columns) = (shape[0], shape[1]);
            let at = |i: usize| data[i % rows * columns + i / rows];
            (0..data.len()).map(at).collect::<Vec<f32>>()
        };
        // r z n → z r h, whole blocks of rows.
        let gates = |data: &[f32]| {
            let mut data = data.to_vec();
            if cell == CellKind::Gru {
                let block = data.len() / 3;
                let (r, z) = data.split_at_mut(block);
                r.swap_with_slice(&mut z[..block]);
            }
            data
        };
        let swapped = |shape: &[usize]| shape.iter().rev().copied().collect::<Vec<usize>>();
        let all = tensors(model);
        let find = |name: &str| all.iter().find(|(n, ..)| n == name).unwrap().2.clone();
        let mut keras = Vec::new();
        for (name, shape, data) in &all {
            if let Some((stack, layer)) = name.split_once(".weight_ih_") {
                keras.push((
                    format!("{stack}.{layer}.kernel"),
                    swapped(shape),
                    transposed(shape, &gates(data)),
                ));
            } else if let Some((stack, layer)) = name.split_once(".weight_hh_") {
                let name = format!("{stack}.{layer}.recurrent_kernel");
                keras.push((name, swapped(shape), transposed(shape, &gates(data))));
            } else if let Some((stack, layer)) = name.split_once(".bias_ih_") {
                let name = format!("{stack}.{layer}.bias");
                keras.push(match cell {
                    CellKind::Gru => {
                        let state = gates(&find(&format!("{stack}.bias_hh_{layer}")));
                        (name, vec![2, shape[0]], [gates(data), state].concat())
                    }
                    _ => (name, shape.clone(), data.clone()),
                });
            } else if name.contains(".bias_hh_") {
            } else if let Some(module) = name.strip_suffix("_embedding.weight") {
                keras.push((format!("{module}_embedding.embeddings"), shape.clone(), data.clone()));
            } else if let Some(module) = name.strip_suffix(".weight") {
                keras.push((format!("{module}.kernel"), swapped(shape), transposed(shape, data)));
            } else {
                keras.push((name.clone(), shape.clone(), data.clone()));
            }
        }
        keras
    }

    #[test]
    fn a_pytorch_model_comes_through_with_or_without_a_prefix() {
        let folder = TestFolder::new("import-pytorch");
        let mut deep = RnnSeq2SeqConfig::gnmt(7, 7);
        (deep.embedding, deep.hidden, deep.encoder_hidden) = (3, 4, 5);
        // `weight_hr_l*`, as `nn.LSTM(proj_size=…)` has them.
        let mut projected = deep.clone();
        (projected.projection, projected.encoder_projection) = (Some(2), Some(3));
        let [deep, projected] = [deep, projected].map(|config| RnnSeq2Seq::new(&config, 2).unwrap());
        let names = || projected.params().ids().map(|id| projected.params().name(id));
        assert_eq!(names().filter(|name| name.contains(".weight_hr_l")).count(), 9);
        let models = [
            (model(CellKind::Lstm), ""),
            (model(CellKind::Gru), "module."),
            (deep, ""),
            (projected, "m."),
            (model(CellKind::MinGru), ""),
            (model(CellKind::MinLstm), "m."),
        ];
        for (model, prefix) in models {
            let path = folder.0.join("m.safetensors");
            let named: Vec<Tensor> =
                tensors(&model).into_iter().map(|(n, s, d)| (format!("{prefix}{n}"), s, d)).collect();
            save(&path, &named);
            let got = recurrent_model(&path, Framework::PyTorch, &config(&model), vocabs()).unwrap();
            assert_eq!(got.model.params().values(), model.params().values());
        }
    }

    #[test]
    fn a_keras_model_comes_through_from_both_kinds_of_file() {
        let folder = TestFolder::new("import-keras");
        for cell in [CellKind::Lstm, CellKind::Gru, CellKind::MinGru, CellKind::MinLstm] {
            let mut model = model(cell);
            if cell == CellKind::Lstm {
                let params = model.params_mut();
                for id in params.ids().filter(|&id| params.name(id).contains("bias_hh")).collect::<Vec<_>>() {
                    params.get_mut(id).fill(0.0);
                }
            }
            let tensors = to_keras(&model);
            let path = folder.0.join("m.safetensors");
            save(&path, &tensors);
            let got = recurrent_model(&path, Framework::Keras, &config(&model), vocabs()).unwrap();
            assert_eq!(got.model.params().values(), model.params().values());

            let path = folder.0.join("m.npz");
            let member = |(name, shape, data): &Tensor| (format!("{name}.npy"), f32_file(shape, data));
            let members: Vec<(String, Vec<u8>)> = tensors.iter().map(member).collect();
            let members: Vec<(&str, Vec<u8>)> =
                members.iter().map(|(n, b)| (n.as_str(), b.clone())).collect();
            fs::write(&path, archive(&members, true)).unwrap();
            let got = recurrent_model(&path, Framework::Keras, &config(&model), vocabs()).unwrap();
            assert_eq!(got.model.params().values(), model.params().values());
        }
    }

    #[test]
    fn every_missing_surplus_or_misshapen_tensor_is_named() {
        let folder = TestFolder::new("import-errors");
        let path = folder.0.join("m.safetensors");
        let model = model(CellKind::Gru);
        let whole = to_keras(&model);
        let message = |tensors: &[Tensor]| {
            save(&path, tensors);
            let result = recurrent_model(&path, Framework::Keras, &config(&model), vocabs());
            result.err().unwrap().to_string()
        };
        for i in 0..whole.len() {
            let (name, shape, _) = whole[i].clone();
            let mut changed = whole.clone();
            changed.remove(i);
            // A layer without a bias is one made with use_bias=False.
            if !(name.contains("rnn.") && name.ends_with(".bias")) {
                let error = message(&changed);
                assert!(error.contains(&format!("{name:?} is missing")), "{error}");
                assert!(error.contains(&format!("{shape:?}")), "{error}");
            }
            changed.push((name.clone(), vec![1], vec![0.0]));
            let error = message(&changed);
            assert!(error.contains(&format!("{name:?} has shape [1]")), "{error}");
        }
        let extra = ("dense_7.kernel".to_owned(), vec![1], vec![0.0]);
        let error = message(&[whole, vec![extra]].concat());
        assert!(error.contains("\"dense_7.kernel\" (shape [1]) belongs to no parameter"), "{error}");
    }
}
