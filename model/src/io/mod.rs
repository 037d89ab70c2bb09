//! Checkpoints on disk: `config.json` says what the model is, `model.safetensors` holds its tensors.
//!
//! Every file is written beside its place and renamed into it, so a reader, or the next start after a
//! crash, finds the old file or the new one and never a part. [`import`] reads models of other programs.

pub mod char_lm;
pub mod classifier;
pub mod config;
pub mod import;
pub mod safetensors;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A checkpoint cannot be read or written. The text names the file and, where there is one, the tensor.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: `read`, `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not what its name says.
    #[error("{}: {problem}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor is missing, left over, or of another shape or element type than the model's.
    #[error("{}: tensor {tensor:?} {problem}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl CheckpointError {
    pub(crate) fn format(path: &Path, problem: impl Into<String>) -> CheckpointError {
        CheckpointError::Format { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn tensor(path: &Path, tensor: &str, problem: impl Into<String>) -> CheckpointError {
        CheckpointError::Tensor { path: path.to_owned(), tensor: tensor.to_owned(), problem: problem.into() }
    }

    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
        let path = path.to_owned();
        move |source| CheckpointError::Io { action, path, source }
    }
}

/// The whole file.
///
/// # Errors
/// [`CheckpointError::Io`] when it is missing or cannot be read.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    fs::read(path).map_err(CheckpointError::io("read", path))
}

/// Replaces `path` by `contents`: written to a temporary file in the same folder, flushed to the disk,
/// renamed. Whatever fails, the old file stands and no fragment is left.
///
/// # Errors
/// [`CheckpointError::Io`], for example when the disk is full.
pub(crate) fn write_atomically(path: &Path, contents: &[u8]) -> Result<(), CheckpointError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(contents).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path))
        .and_then(|()| sync_folder(path));
    written.map_err(|source| {
        // The first error is the one to report; the fragment may not even exist.
        let _ = fs::remove_file(&temporary);
        CheckpointError::Io { action: "write", path: path.to_owned(), source }
    })
}

/// Makes a rename durable. Only Unix lets a folder be opened and flushed.
fn sync_folder(path: &Path) -> io::Result<()> {
    if cfg!(unix) {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A folder of its own for one test, removed at the end.
    pub(crate) struct TestFolder(pub(crate) PathBuf);

    impl TestFolder {
        pub(crate) fn new(name: &str) -> TestFolder {
            let path = std::env::temp_dir().join(format!("kavanam-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            TestFolder(path)
        }
    }

    impl Drop for TestFolder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_write_replaces_the_file_and_leaves_nothing_else() {
        let folder = TestFolder::new("atomic");
        let path = folder.0.join("a.bin");
        write_atomically(&path, b"one").unwrap();
        write_atomically(&path, b"two").unwrap();
        assert_eq!(read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_names_the_file_and_keeps_the_folder_clean() {
        let folder = TestFolder::new("failed");
        // A folder stands where the file should go: the rename fails after the write.
        let path = folder.0.join("taken");
        fs::create_dir_all(path.join("inside")).unwrap();
        let error = write_atomically(&path, b"x").unwrap_err().to_string();
        assert!(error.contains("cannot write") && error.contains("taken"), "{error}");
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1);
        let error = read(&folder.0.join("nowhere")).unwrap_err().to_string();
        assert!(error.contains("cannot read") && error.contains("nowhere"), "{error}");
    }
}
