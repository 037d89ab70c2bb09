//! [`Tensors`]: the tensors of a foreign file, taken by name, so that none is missed and none left over.

use std::path::Path;

use crate::io::CheckpointError;
use crate::io::safetensors::{Contents, NamedTensor};

/// What a file holds, and what of it has been used.
pub(super) struct Tensors<'f> {
    path: &'f Path,
    contents: &'f Contents,
    /// Stands before every name in the file, as in `module.`.
    prefix: &'f str,
    taken: Vec<bool>,
}

impl<'f> Tensors<'f> {
    /// Nothing taken yet.
    pub(super) fn new(path: &'f Path, contents: &'f Contents) -> Tensors<'f> {
        Tensors { path, contents, prefix: "", taken: vec![false; contents.tensors.len()] }
    }

    /// Leaves out what stands before `name`, which every such file has, in all names: `module.` of `module.output.bias`.
    pub(super) fn without_prefix(self, name: &str) -> Tensors<'f> {
        let prefixes = self.contents.tensors.iter().filter_map(|t| t.name.strip_suffix(name));
        let prefix = prefixes.filter(|p| p.ends_with('.')).min_by_key(|p| p.len());
        let there = self.find(name).is_some();
        Tensors { prefix: prefix.filter(|_| !there).unwrap_or_default(), ..self }
    }

    /// The values of the tensor, which must be there with that shape.
    ///
    /// # Errors
    /// [`CheckpointError::Tensor`] when it is missing or has another shape.
    pub(super) fn take(&mut self, name: &str, shape: &[usize]) -> Result<&'f [f32], CheckpointError> {
        let found = self.take_if_there(name, shape)?;
        found.ok_or_else(|| self.wrong(name, format!("is missing; the model needs it with shape {shape:?}")))
    }

    /// The values of the tensor, `None` when it is missing.
    ///
    /// # Errors
    /// [`CheckpointError::Tensor`] when it has another shape.
    pub(super) fn take_if_there(
        &mut self,
        name: &str,
        shape: &[usize],
    ) -> Result<Option<&'f [f32]>, CheckpointError> {
        let Some(index) = self.find(name) else { return Ok(None) };
        let NamedTensor { shape: found, data, .. } = &self.contents.tensors[index];
        if found != shape {
            return Err(self.wrong(name, format!("has shape {found:?}, the model needs {shape:?}")));
        }
        self.taken[index] = true;
        Ok(Some(data))
    }

    /// The tensor's shape, `None` when it is missing.
    pub(super) fn shape(&self, name: &str) -> Option<&'f [usize]> {
        self.find(name).map(|index| self.contents.tensors[index].shape.as_slice())
    }

    /// The columns of a matrix, from which the sizes of a model follow.
    ///
    /// # Errors
    /// [`CheckpointError::Tensor`] when it is missing or no matrix; `what` says its shape in words.
    pub(super) fn columns(&self, name: &str, what: &str) -> Result<usize, CheckpointError> {
        match self.shape(name) {
            Some(&[_, columns]) => Ok(columns),
            Some(shape) => Err(self.wrong(name, format!("has shape {shape:?}, the model needs {what}"))),
            None => Err(self.wrong(name, format!("is missing; the model needs it with shape {what}"))),
        }
    }

    /// An error about a tensor.
    pub(super) fn wrong(&self, name: &str, problem: String) -> CheckpointError {
        CheckpointError::tensor(self.path, &format!("{}{name}", self.prefix), problem)
    }

    /// Says that no more will be taken.
    ///
    /// # Errors
    /// [`CheckpointError::Tensor`] names a tensor that was not.
    pub(super) fn finish(self) -> Result<(), CheckpointError> {
        let mut left = self.contents.tensors.iter().zip(&self.taken).filter(|(_, taken)| !**taken);
        let Some((extra, _)) = left.next() else { return Ok(()) };
        let problem = format!("(shape {:?}) belongs to no parameter of this model", extra.shape);
        Err(CheckpointError::tensor(self.path, &extra.name, problem))
    }

    fn find(&self, name: &str) -> Option<usize> {
        let matches = |t: &NamedTensor| t.name.strip_prefix(self.prefix) == Some(name);
        self.contents.tensors.iter().position(matches)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(names: &[&str]) -> Contents {
        let tensor =
            |name: &&str| NamedTensor { name: (*name).to_owned(), shape: vec![2], data: vec![1.0, 2.0] };
        Contents { tensors: names.iter().map(tensor).collect(), metadata: None }
    }

    #[test]
    fn a_prefix_is_left_out() {
        let path = Path::new("f");
        for names in [["a.x", "b.x"], ["module.a.x", "module.b.x"]] {
            let contents = contents(&names);
            let mut tensors = Tensors::new(path, &contents).without_prefix("b.x");
            assert_eq!(tensors.take("a.x", &[2]).unwrap(), [1.0, 2.0]);
            let error = tensors.take("b.x", &[1, 2]).unwrap_err().to_string();
            assert_eq!(error, format!("f: tensor {:?} has shape [2], the model needs [1, 2]", names[1]));
            let error = tensors.finish().unwrap_err().to_string();
            assert!(error.contains(names[1]) && error.contains("belongs to no parameter"), "{error}");
        }
    }

    #[test]
    fn missing_tensors_are_named_with_their_shape() {
        let contents = contents(&["a"]);
        let mut tensors = Tensors::new(Path::new("f"), &contents);
        assert_eq!(tensors.take_if_there("b", &[2]).unwrap(), None);
        let error = tensors.take("b", &[3, 4]).unwrap_err().to_string();
        assert_eq!(error, "f: tensor \"b\" is missing; the model needs it with shape [3, 4]");
        assert!(tensors.columns("a", "[3·hidden, hidden]").unwrap_err().to_string().contains("hidden]"));
        tensors.take("a", &[2]).unwrap();
        tensors.finish().unwrap();
    }
}
