//! Recurrent models of other programs, read into this project's layout.
//!
//! | function | what it reads |
//! |---|---|
//! | [`g2p_en()`] | `checkpoint20.npz` of the Python package g2p-en: letters to phones, one GRU layer a side |
//! | [`recurrent_model()`] | a `.safetensors` or `.npz` file with a framework's layouts, beside a `config.json` of ours |
//!
//! A file is read whole, every tensor that the model needs is taken from it once, by name and with its shape
//! checked, and nothing may be left over. `docs/formats.md` lists the names.

mod g2p_en;
mod npy;
mod npz;
mod recurrent;
mod recurrent_model;
mod tensors;

pub use g2p_en::g2p_en;
pub use recurrent_model::{Framework, recurrent_model};

use std::path::Path;

use super::config::Vocabs;
use super::safetensors::{self, Contents};
use super::{CheckpointError, read};
use crate::models::RnnSeq2Seq;

/// A model that another program trained.
#[derive(Debug)]
pub struct Imported {
    /// The model with its weights.
    pub model: RnnSeq2Seq,
    /// Its tokens.
    pub vocabs: Vocabs,
}

/// The tensors of a `.npz` or `.safetensors` file, told apart by their first bytes.
fn load(path: &Path) -> Result<Contents, CheckpointError> {
    const ZIP: &[u8] = b"PK\x03\x04";
    const HDF5: &[u8] = b"\x89HDF";
    let file = read(path)?;
    if file.starts_with(ZIP) {
        npz::parse(path, &file)
    } else if file.starts_with(HDF5) {
        Err(CheckpointError::format(path, "this is an HDF5 file: save the arrays with numpy.savez instead"))
    } else if file.get(8) == Some(&b'{') {
        // Eight bytes of length, then JSON.
        safetensors::parse(path, &file)
    } else {
        Err(CheckpointError::format(path, "this is neither a .npz nor a .safetensors file"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::tests::TestFolder;
    use super::*;

    #[test]
    fn foreign_files_are_told_apart() {
        let folder = TestFolder::new("import-load");
        for (bytes, says) in [
            (&b"\x89HDF\r\n\x1a\n and so on"[..], "numpy.savez"),
            (b"PK\x03\x04 cut off", "cut off"),
            (b"\x40\0\0\0\0\0\0\0{\"a\":", "cut off"),
            (b"a letter to a friend, long enough for a header", "neither"),
            (b"", "neither"),
        ] {
            let path = folder.0.join("weights");
            fs::write(&path, bytes).unwrap();
            let error = load(&path).unwrap_err().to_string();
            assert!(error.contains("weights: ") && error.contains(says), "{error}");
        }
        assert!(load(&folder.0.join("nowhere")).unwrap_err().to_string().contains("cannot read"));
    }
}
