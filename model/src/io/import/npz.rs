//! NumPy's `.npz`: a zip archive of `.npy` arrays, stored (`numpy.savez`) or deflated (`numpy.savez_compressed`).

use std::io::Read;
use std::path::Path;

use flate2::bufread::DeflateDecoder;
use rawzip::{CompressionMethod, ZipArchive, ZipSliceArchive};

use super::npy;
use crate::io::CheckpointError;
use crate::io::safetensors::{Contents, NamedTensor};

/// What the name of an array's member ends with.
const EXTENSION: &str = ".npy";

/// The arrays in `file`, which `path` holds.
///
/// # Errors
/// [`CheckpointError::Format`] when it is no such archive or is cut off, [`CheckpointError::Tensor`] names an array
/// that is damaged or of another element type.
pub(super) fn parse(path: &Path, file: &[u8]) -> Result<Contents, CheckpointError> {
    let damaged =
        |e: rawzip::Error| CheckpointError::format(path, format!("the archive is cut off or damaged ({e})"));
    let archive = ZipArchive::from_slice(file).map_err(damaged)?;
    let mut contents = Contents::default();
    let mut entries = archive.entries();
    while let Some(entry) = entries.next_entry().map_err(damaged)? {
        let member = String::from_utf8_lossy(entry.file_path().as_ref()).into_owned();
        let Some(name) = member.strip_suffix(EXTENSION) else {
            return Err(CheckpointError::format(path, foreign_member(&member)));
        };
        let wrong = |problem: String| CheckpointError::tensor(path, name, problem);
        let bytes = inflate(&archive, &entry).map_err(wrong)?;
        let array = npy::parse(&bytes).map_err(wrong)?;
        let tensor = NamedTensor { name: name.to_owned(), shape: array.shape, data: array.data };
        contents.tensors.push(tensor);
    }
    contents.tensors.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = contents.tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(CheckpointError::tensor(path, &pair[0].name, "is there twice"));
    }
    Ok(contents)
}

fn foreign_member(member: &str) -> String {
    let hint = if member.ends_with("data.pkl") {
        ": this is a file of torch.save, whose reading may run code; save the tensors as safetensors instead"
    } else {
        ""
    };
    format!("the archive holds {member:?}, which is no .npy array{hint}")
}

/// The member's bytes, their length and checksum proved.
fn inflate(
    archive: &ZipSliceArchive<&[u8]>,
    entry: &rawzip::ZipFileHeaderRecord<'_>,
) -> Result<Vec<u8>, String> {
    let damaged = |e: &dyn std::fmt::Display| format!("is cut off or damaged ({e})");
    let method = entry.compression_method();
    let member = archive.get_entry(entry.wayfinder()).map_err(|e| damaged(&e))?;
    let mut bytes = Vec::new();
    let read = if method == CompressionMethod::STORE {
        member.verifying_reader(member.data()).read_to_end(&mut bytes)
    } else if method == CompressionMethod::DEFLATE {
        member.verifying_reader(DeflateDecoder::new(member.data())).read_to_end(&mut bytes)
    } else {
        return Err("is compressed in another way than numpy.savez_compressed does it".to_owned());
    };
    read.map_err(|e| damaged(&e))?;
    Ok(bytes)
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::DeflateEncoder;
    use rawzip::ZipArchiveWriter;

    use super::super::npy::tests::f32_file;
    use super::*;

    /// An archive of these members.
    pub(crate) fn archive(members: &[(&str, Vec<u8>)], deflate: bool) -> Vec<u8> {
        let mut output = Vec::new();
        let mut archive = ZipArchiveWriter::new(&mut output);
        for (name, bytes) in members {
            let method = if deflate { CompressionMethod::DEFLATE } else { CompressionMethod::STORE };
            let (mut entry, config) = archive.new_file(name).compression_method(method).start().unwrap();
            let descriptor = if deflate {
                let mut writer = config.wrap(DeflateEncoder::new(&mut entry, Compression::default()));
                writer.write_all(bytes).unwrap();
                let (encoder, descriptor) = writer.finish().unwrap();
                encoder.finish().unwrap();
                descriptor
            } else {
                let mut writer = config.wrap(&mut entry);
                writer.write_all(bytes).unwrap();
                writer.finish().unwrap().1
            };
            entry.finish(descriptor).unwrap();
        }
        archive.finish().unwrap();
        output
    }

    fn two(deflate: bool) -> Vec<u8> {
        let b = ("b.npy", f32_file(&[2, 2], &[1.0, 2.0, 3.0, 4.0]));
        archive(&[b, ("a.npy", f32_file(&[1], &[7.0]))], deflate)
    }

    #[test]
    fn stored_and_deflated_arrays_are_read_and_sorted() {
        for deflate in [false, true] {
            let contents = parse(Path::new("x.npz"), &two(deflate)).unwrap();
            let names: Vec<_> = contents.tensors.iter().map(|t| t.name.as_str()).collect();
            assert_eq!(names, ["a", "b"]);
            assert_eq!(contents.get("b").unwrap().data, [1.0, 2.0, 3.0, 4.0]);
        }
    }

    #[test]
    fn every_truncation_and_every_changed_value_is_an_error() {
        for deflate in [false, true] {
            let whole = two(deflate);
            for length in 0..whole.len() {
                let error = parse(Path::new("x.npz"), &whole[..length]).unwrap_err().to_string();
                assert!(error.contains("x.npz"), "{length}: {error}");
            }
        }
        let mut changed = two(false);
        let place = changed.windows(4).position(|w| w == 3f32.to_le_bytes()).unwrap();
        changed[place] ^= 1;
        let error = parse(Path::new("x.npz"), &changed).unwrap_err().to_string();
        assert!(error.contains("tensor \"b\"") && error.contains("damaged"), "{error}");
    }

    #[test]
    fn other_archives_are_refused() {
        let says = |members: &[(&str, Vec<u8>)]| {
            parse(Path::new("x"), &archive(members, false)).unwrap_err().to_string()
        };
        assert!(says(&[("model/data.pkl", vec![1])]).contains("torch.save"));
        assert!(says(&[("model.weights.h5", vec![1])]).contains("\"model.weights.h5\""));
        assert!(says(&[("a.npy", b"text".to_vec())]).contains("tensor \"a\" is not a .npy"));
        let twice = ("a.npy", f32_file(&[1], &[7.0]));
        assert!(says(&[twice.clone(), twice]).contains("twice"));
    }
}
