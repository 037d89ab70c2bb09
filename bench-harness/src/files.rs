//! Writing without half-written files: a temporary file beside the target, then a rename.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::HarnessError;

/// Replaces `path` by `contents`; a reader sees the old file or the new one, never a part.
pub(crate) fn write_atomically(path: &Path, contents: &[u8]) -> Result<(), HarnessError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(contents).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(|source| {
        // The disk may be full: leave no fragment behind. The first error is the one to report.
        let _ = fs::remove_file(&temporary);
        HarnessError::Io { action: "write", path: path.to_owned(), source }
    })
}

/// Writes `value` as indented JSON, atomically.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), HarnessError> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|source| HarnessError::Json { path: path.to_owned(), source })?;
    text.push('\n');
    write_atomically(path, text.as_bytes())
}

/// Reads a JSON file into `T`.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, HarnessError> {
    let text = fs::read_to_string(path).map_err(HarnessError::io("read", path))?;
    serde_json::from_str(&text).map_err(|source| HarnessError::Json { path: path.to_owned(), source })
}

/// Makes the folder `dir` and proves that a file can be written in it. Called before the long work starts.
pub(crate) fn prepare_dir(dir: &Path) -> Result<(), HarnessError> {
    fs::create_dir_all(dir).map_err(HarnessError::io("create", dir))?;
    let probe = dir.join(format!(".probe.{}.tmp", std::process::id()));
    fs::write(&probe, b"probe").map_err(HarnessError::io("write into", dir))?;
    fs::remove_file(&probe).map_err(HarnessError::io("write into", dir))
}

/// Proves that the file `path` can be written: its folder exists or can be made, and takes files.
pub(crate) fn prepare_file(path: &Path) -> Result<(), HarnessError> {
    if path.is_dir() {
        return Err(HarnessError::Usage(format!("{} is a folder, expected a file", path.display())));
    }
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    prepare_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_replaces_and_leaves_nothing_else() {
        let dir = std::env::temp_dir().join(format!("kavanam-files-{}", std::process::id()));
        prepare_dir(&dir).unwrap();
        let path = dir.join("a.json");
        write_json(&path, &vec![1, 2]).unwrap();
        write_json(&path, &vec![3]).unwrap();
        assert_eq!(read_json::<Vec<i32>>(&path).unwrap(), [3]);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let error = prepare_dir(Path::new("/dev/null/out")).unwrap_err();
        assert!(error.to_string().contains("/dev/null/out"), "{error}");
        assert_eq!(error.exit_code(), 1);
    }
}
