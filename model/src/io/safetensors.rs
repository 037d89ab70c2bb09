//! Named f32 tensors in the safetensors format, read and written whole.

use std::collections::HashMap;
use std::path::Path;

use ::safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorView};

use super::{CheckpointError, read, write_atomically};

/// The key of the one metadata string that this project stores beside its tensors.
const METADATA_KEY: &str = "kavanam";

/// A tensor's name, shape and values.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor {
    /// The name, in PyTorch's style.
    pub name: String,
    /// The shape; a weight is [out, in].
    pub shape: Vec<usize>,
    /// The values, row-major.
    pub data: Vec<f32>,
}

/// A tensor to write, borrowed.
#[derive(Debug, Clone, Copy)]
pub struct TensorRef<'a> {
    /// The name, in PyTorch's style.
    pub name: &'a str,
    /// The shape; a weight is [out, in].
    pub shape: &'a [usize],
    /// The values, row-major.
    pub data: &'a [f32],
}

/// What a file holds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Contents {
    /// The tensors, sorted by name.
    pub tensors: Vec<NamedTensor>,
    /// The string stored beside them, if any.
    pub metadata: Option<String>,
}

impl Contents {
    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&NamedTensor> {
        self.tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok().map(|i| &self.tensors[i])
    }
}

/// Writes the tensors, and `metadata` beside them, to `path`, atomically.
///
/// # Errors
/// [`CheckpointError::Io`] when the file cannot be written; the old one stands then.
/// [`CheckpointError::Tensor`] when a shape does not fit its values.
pub fn save(path: &Path, tensors: &[TensorRef<'_>], metadata: Option<String>) -> Result<(), CheckpointError> {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|t| t.data.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let mut views = Vec::with_capacity(tensors.len());
    for (tensor, bytes) in tensors.iter().zip(&bytes) {
        let view = TensorView::new(Dtype::F32, tensor.shape.to_vec(), bytes)
            .map_err(|e| CheckpointError::tensor(path, tensor.name, e.to_string()))?;
        views.push((tensor.name, view));
    }
    let metadata = metadata.map(|text| HashMap::from([(METADATA_KEY.to_owned(), text)]));
    let file = ::safetensors::serialize(views, metadata)
        .map_err(|e| CheckpointError::format(path, e.to_string()))?;
    write_atomically(path, &file)
}

/// Reads a whole file.
///
/// # Errors
/// [`CheckpointError::Io`] when it is missing, [`CheckpointError::Format`] when it is not of this format or
/// cut off (the first tensor that is incomplete is named), [`CheckpointError::Tensor`] when a tensor is not f32.
pub fn load(path: &Path) -> Result<Contents, CheckpointError> {
    parse(path, &read(path)?)
}

/// The tensors in `file`, which `path` holds.
pub(super) fn parse(path: &Path, file: &[u8]) -> Result<Contents, CheckpointError> {
    let tensors =
        SafeTensors::deserialize(file).map_err(|e| CheckpointError::format(path, explain(file, &e)))?;
    let (_, header) =
        SafeTensors::read_metadata(file).map_err(|e| CheckpointError::format(path, e.to_string()))?;
    let metadata = header.metadata().as_ref().and_then(|m| m.get(METADATA_KEY)).cloned();
    let mut contents = Contents { tensors: Vec::with_capacity(tensors.len()), metadata };
    for (name, view) in tensors.iter() {
        if view.dtype() != Dtype::F32 {
            let problem = format!("has element type {}, expected F32", view.dtype());
            return Err(CheckpointError::tensor(path, name, problem));
        }
        let (words, _) = view.data().as_chunks::<4>();
        let data = words.iter().map(|&b| f32::from_le_bytes(b)).collect();
        contents.tensors.push(NamedTensor { name: name.to_owned(), shape: view.shape().to_vec(), data });
    }
    contents.tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(contents)
}

/// Says why `file` is none of ours: cut off (and in which tensor), or something else altogether.
fn explain(file: &[u8], error: &SafeTensorError) -> String {
    let foreign = format!("this is not a safetensors file ({error})");
    let Some((length, rest)) = file.split_first_chunk::<8>() else { return foreign };
    let Ok(header_len) = usize::try_from(u64::from_le_bytes(*length)) else { return foreign };
    let Some((header, data)) = rest.split_at_checked(header_len) else {
        return if rest.starts_with(b"{\"") {
            "the file is cut off inside its header".to_owned()
        } else {
            foreign
        };
    };
    let Ok(serde_json::Value::Object(header)) = serde_json::from_slice(header) else { return foreign };
    let end = |info: &serde_json::Value| info.get("data_offsets")?.get(1)?.as_u64();
    let cut = header
        .iter()
        .filter_map(|(name, info)| Some((end(info)?, name)))
        .filter(|(end, _)| *end > data.len() as u64)
        .min();
    match cut {
        Some((end, name)) => {
            format!(
                "the file is cut off: tensor {name:?} ends at byte {end} of the data, {} are there",
                data.len()
            )
        }
        None => format!("the file is damaged ({error})"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::tests::TestFolder;
    use super::*;

    const B: TensorRef<'_> =
        TensorRef { name: "b", shape: &[2, 3], data: &[1.0, -2.0, 3.5, 0.0, -0.0, f32::MIN_POSITIVE] };
    const A: TensorRef<'_> =
        TensorRef { name: "a.weight", shape: &[4], data: &[f32::NAN, 1e30, -1e-30, 7.0] };

    #[test]
    fn bits_and_metadata_survive() {
        let folder = TestFolder::new("safetensors");
        let path = folder.0.join("m.safetensors");
        save(&path, &[B, A], Some("{\"step\":7}".to_owned())).unwrap();
        let contents = load(&path).unwrap();
        assert_eq!(contents.metadata.as_deref(), Some("{\"step\":7}"));
        assert_eq!(contents.tensors.len(), 2);
        for tensor in [A, B] {
            let found = contents.get(tensor.name).unwrap();
            assert_eq!(found.shape, tensor.shape);
            let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&found.data), bits(tensor.data));
        }
        assert!(contents.get("c").is_none());
    }

    #[test]
    fn every_truncation_is_an_error_that_names_the_file() {
        let folder = TestFolder::new("truncated");
        let path = folder.0.join("m.safetensors");
        save(&path, &[A, B], None).unwrap();
        let whole = fs::read(&path).unwrap();
        for len in 0..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            let error = load(&path).unwrap_err().to_string();
            assert!(error.contains("m.safetensors"), "{len}: {error}");
        }
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        let error = load(&path).unwrap_err().to_string();
        assert!(error.contains("cut off") && error.contains("tensor \"b\""), "{error}");
    }

    #[test]
    fn foreign_files_are_errors() {
        let folder = TestFolder::new("foreign");
        let path = folder.0.join("m.safetensors");
        for bytes in [&b"PK\x03\x04 a zip archive and so on"[..], b"{\"json\": true, \"not\": \"tensors\"}"] {
            fs::write(&path, bytes).unwrap();
            let error = load(&path).unwrap_err().to_string();
            assert!(error.contains("not a safetensors file"), "{error}");
        }
        let halves = [0u8; 8];
        let view = TensorView::new(Dtype::F16, vec![4], &halves).unwrap();
        fs::write(&path, ::safetensors::serialize([("h", view)], None).unwrap()).unwrap();
        let error = load(&path).unwrap_err().to_string();
        assert!(error.contains("\"h\"") && error.contains("F16"), "{error}");
    }

    #[test]
    fn a_shape_that_does_not_fit_is_named() {
        let wrong = TensorRef { shape: &[5], ..B };
        let folder = TestFolder::new("shape");
        let error = save(&folder.0.join("m.safetensors"), &[wrong], None).unwrap_err().to_string();
        assert!(error.contains("tensor \"b\""), "{error}");
    }
}
