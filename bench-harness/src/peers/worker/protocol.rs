//! What is said to a worker and what it answers.
//!
//! A message is one line of JSON, an object whose only key is the message's name; `prepare` and `outputs` are
//! followed by the elements of their tensors, one tensor after the other, little-endian, four bytes each.
//! ```text
//! harness                                       worker
//!                                               {"hello": {"python": …, "packages": …, "engine": …}}
//! {"prepare": {"id", "family", …}} elements     {"prepared": {"crc32", "kernel"}}  or {"declined": {"reason"}}
//! {"time": {"id", "untimed", "timed"}}          {"timed": {"ns"}}
//! {"outputs": {"id"}}                           {"outputs": {"lengths"}} elements
//!                                               {"failed": {"message"}}  instead of any of these
//! ```
//! The worker ends when its input does.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Read, Write};
use std::time::Duration;

use serde::{Deserialize, Serialize, Serializer};

/// The conversation cannot go on, or the worker cannot do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    /// The other end of a stream is closed.
    #[error("it ended without an answer")]
    Closed,
    /// No answer came in time.
    #[error("it gave no answer within {} seconds", .0.as_secs())]
    Silent(Duration),
    /// A stream failed.
    #[error("talking to it failed: {0}")]
    Io(#[from] io::Error),
    /// What was read is no message.
    #[error("it wrote {0:?} where a message was expected")]
    Garbage(String),
    /// A message came that does not answer the request.
    #[error("it answered {0} with another message")]
    Unexpected(&'static str),
    /// The inputs changed on their way.
    #[error("it received other inputs (CRC-32 {received:08x}) than were sent ({sent:08x})")]
    Checksum {
        /// Of the bytes that were written.
        sent: u32,
        /// Of the bytes that the worker read.
        received: u32,
    },
    /// The outputs do not have the shape of the case.
    #[error("its outputs have {received:?} elements, expected {expected:?}")]
    Lengths {
        /// Of the case.
        expected: Vec<usize>,
        /// Of the answer.
        received: Vec<usize>,
    },
    /// An error inside the worker, which goes on.
    #[error("{0}")]
    Failed(String),
}

/// One operand of a case.
#[derive(Debug, Serialize)]
pub(super) struct Tensor<'a> {
    /// Its name in the family.
    pub(super) name: &'a str,
    /// Its dimensions as it lies in memory, row-major.
    pub(super) dims: Vec<usize>,
    /// Its elements; the header names their type alone.
    #[serde(rename = "type")]
    pub(super) data: Data<'a>,
}

/// The elements of a tensor.
#[derive(Debug, Clone, Copy)]
pub(super) enum Data<'a> {
    /// Numbers.
    F32(&'a [f32]),
    /// Indices.
    U32(&'a [u32]),
}

impl Serialize for Data<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            Data::F32(_) => "f32",
            Data::U32(_) => "u32",
        })
    }
}

/// A case as a worker gets it.
#[derive(Debug, Serialize)]
pub(super) struct Task<'a> {
    /// A number that later requests name it by.
    pub(super) id: u64,
    /// The family of kernels.
    pub(super) family: &'static str,
    /// What is computed, in the words of the family.
    pub(super) operation: &'static str,
    /// Sizes and switches of the family.
    pub(super) shape: serde_json::Value,
    /// The precision of matrix products.
    pub(super) precision: &'static str,
    /// How many threads it may use.
    pub(super) threads: usize,
    /// The operands.
    pub(super) tensors: Vec<Tensor<'a>>,
    /// Elements of each output that the check needs.
    #[serde(skip)]
    pub(super) outputs: Vec<usize>,
}

/// A message to the worker.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Request<'a> {
    /// Make ready to compute this case, in the place of the one before.
    Prepare(&'a Task<'a>),
    /// Compute, say how long it took, and do so only when the threads sleep and disturb no other peer.
    Time {
        /// The case.
        id: u64,
        /// How often before the clock runs.
        untimed: usize,
        /// How often by the clock.
        timed: usize,
    },
    /// Give what the last call wrote.
    Outputs {
        /// The case.
        id: u64,
    },
}

/// A package of the worker's environment.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Package {
    /// It was imported and has this version.
    Version(String),
    /// It cannot be imported, for this reason.
    Error(String),
}

impl Package {
    /// The version of a package that can be imported.
    pub(super) fn version(self) -> Option<String> {
        match self {
            Package::Version(version) => Some(version),
            Package::Error(_) => None,
        }
    }
}

/// The first message of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Hello {
    /// The version of Python.
    pub(super) python: String,
    /// The packages that it needs.
    pub(super) packages: BTreeMap<String, Package>,
    /// What computes, in a few words: versions of libraries, instruction set.
    pub(super) engine: Vec<String>,
}

/// A message of the worker.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// It has started.
    Hello(Hello),
    /// The case is ready.
    Prepared {
        /// Of the elements that arrived.
        crc32: u32,
        /// What will run.
        kernel: String,
    },
    /// It does not do this case.
    Declined {
        /// Why.
        reason: String,
    },
    /// The calls are done.
    Timed {
        /// The nanoseconds of all calls together.
        ns: u64,
    },
    /// The elements of the outputs follow.
    Outputs {
        /// Elements of each.
        lengths: Vec<usize>,
    },
    /// The request led to an error.
    Failed {
        /// Its kind and text.
        message: String,
    },
}

/// An answer and the elements that followed it.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) answer: Answer,
    pub(super) elements: Vec<f32>,
}

/// No header is longer, in bytes: what is longer is no header.
const LONGEST_HEADER: u64 = 1 << 16;
/// Elements that are converted at once.
const CHUNK: usize = 1 << 14;

/// Writes a message; after `prepare` the elements too. Returns the CRC-32 of the elements' bytes.
pub(super) fn write_request(stream: &mut impl Write, request: &Request<'_>) -> io::Result<u32> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut checksum = crc32fast::Hasher::new();
    if let Request::Prepare(task) = request {
        for tensor in &task.tensors {
            match tensor.data {
                Data::F32(values) => write_elements(stream, &mut checksum, values, f32::to_le_bytes)?,
                Data::U32(values) => write_elements(stream, &mut checksum, values, u32::to_le_bytes)?,
            }
        }
    }
    stream.flush()?;
    Ok(checksum.finalize())
}

fn write_elements<T: Copy>(
    stream: &mut impl Write,
    checksum: &mut crc32fast::Hasher,
    values: &[T],
    to_bytes: impl Fn(T) -> [u8; 4],
) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(4 * CHUNK);
    for chunk in values.chunks(CHUNK) {
        bytes.clear();
        chunk.iter().for_each(|&value| bytes.extend_from_slice(&to_bytes(value)));
        checksum.update(&bytes);
        stream.write_all(&bytes)?;
    }
    Ok(())
}

/// Reads a message and the elements that follow it.
pub(super) fn read_reply(stream: &mut impl BufRead) -> Result<Reply, Broken> {
    let mut line = Vec::new();
    stream.by_ref().take(LONGEST_HEADER).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Err(Broken::Closed);
    }
    let answer: Answer = serde_json::from_slice(&line).map_err(|_| Broken::Garbage(beginning(&line)))?;
    let elements = match &answer {
        Answer::Outputs { lengths } => read_elements(stream, lengths)?,
        _ => Vec::new(),
    };
    Ok(Reply { answer, elements })
}

fn read_elements(stream: &mut impl BufRead, lengths: &[usize]) -> Result<Vec<f32>, Broken> {
    let bytes = lengths.iter().try_fold(0u64, |sum, &len| (len as u64).checked_mul(4)?.checked_add(sum));
    let bytes = bytes.ok_or_else(|| Broken::Garbage(format!("{lengths:?}")))?;
    let mut read = Vec::new();
    if stream.take(bytes).read_to_end(&mut read)? as u64 != bytes {
        return Err(Broken::Closed);
    }
    let (words, _) = read.as_chunks::<4>();
    Ok(words.iter().map(|word| f32::from_le_bytes(*word)).collect())
}

/// Enough of a line to recognise it in an error.
fn beginning(line: &[u8]) -> String {
    const SHOWN: usize = 120;
    String::from_utf8_lossy(line).trim_end().chars().take(SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(bytes: &[u8]) -> Result<Reply, Broken> {
        read_reply(&mut &bytes[..])
    }

    #[test]
    fn a_task_is_a_line_and_its_elements() {
        let task = Task {
            id: 3,
            family: "gemm",
            operation: "plain",
            shape: serde_json::json!({"m": 1}),
            precision: "strict",
            threads: 2,
            tensors: vec![
                Tensor { name: "a", dims: vec![1, 2], data: Data::F32(&[1.0, -2.5]) },
                Tensor { name: "targets", dims: vec![1], data: Data::U32(&[7]) },
            ],
            outputs: vec![1],
        };
        let mut bytes = Vec::new();
        let checksum = write_request(&mut bytes, &Request::Prepare(&task)).unwrap();
        let end = bytes.iter().position(|&byte| byte == b'\n').unwrap();
        let header: serde_json::Value = serde_json::from_slice(&bytes[..end]).unwrap();
        assert_eq!(header["prepare"]["tensors"][1]["type"], "u32");
        assert_eq!(header["prepare"]["tensors"][0]["dims"], serde_json::json!([1, 2]));
        let elements = &bytes[end + 1..];
        assert_eq!(elements, [1.0f32.to_le_bytes(), (-2.5f32).to_le_bytes(), 7u32.to_le_bytes()].concat());
        assert_eq!(checksum, crc32fast::hash(elements));
    }

    #[test]
    fn a_checksum_is_the_one_of_zlib() {
        // The check value that every description of CRC-32 (ISO-HDLC) gives.
        assert_eq!(crc32fast::hash(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn outputs_carry_their_elements() {
        let mut bytes = b"{\"outputs\": {\"lengths\": [1, 2]}}\n".to_vec();
        for value in [0.5f32, 1.5, -3.0] {
            bytes.extend(value.to_le_bytes());
        }
        let reply = reply(&bytes).unwrap();
        assert!(matches!(reply.answer, Answer::Outputs { lengths } if lengths == [1, 2]));
        assert_eq!(reply.elements, [0.5, 1.5, -3.0]);
    }

    #[test]
    fn an_early_end_is_seen() {
        assert!(matches!(reply(b""), Err(Broken::Closed)));
        assert!(matches!(reply(b"{\"outputs\": {\"lengths\": [2]}}\n1234"), Err(Broken::Closed)));
    }

    #[test]
    fn garbage_is_quoted_and_never_waited_for() {
        let text = reply(b"Welcome to Python\n").unwrap_err().to_string();
        assert!(text.contains("Welcome to Python"), "{text}");
        assert!(matches!(reply(&[0xff; 300]), Err(Broken::Garbage(_))));
        assert!(matches!(reply(b"{\"timed\": {\"ns\": -1}}\n"), Err(Broken::Garbage(_))));
        let huge = format!("{{\"outputs\": {{\"lengths\": [{}, 1]}}}}\n", u64::MAX / 2);
        assert!(matches!(reply(huge.as_bytes()), Err(Broken::Garbage(_))));
        let endless = vec![b'x'; 2 * LONGEST_HEADER as usize];
        assert!(matches!(reply(&endless), Err(Broken::Garbage(_))));
    }
}
