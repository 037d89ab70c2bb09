//! The conversation with a worker, over any two streams: every request has its answer, or an error in time.

use std::io::{BufReader, Read, Write};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crate::peers::worker::protocol::{
    Answer, Broken, Hello, Reply, Request, Task, read_reply, write_request,
};

/// A worker that says nothing for longer is given up. The longest case of all lasts seconds; an interpreter
/// that reads its packages from a cold disk takes a minute.
pub(super) const LIMIT: Duration = Duration::from_secs(300);

/// Both directions. A thread reads, so that a silent worker cannot hold the program.
pub(super) struct Link<W> {
    requests: W,
    replies: mpsc::Receiver<Result<Reply, Broken>>,
    limit: Duration,
}

/// What became of a task.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Prepared {
    /// It is ready, and this kernel will run.
    Kernel(String),
    /// The worker does not do it, for this reason.
    Declined(String),
}

impl<W: Write> Link<W> {
    /// Starts to listen; no answer may take longer than `limit`.
    pub(super) fn new(requests: W, answers: impl Read + Send + 'static, limit: Duration) -> Link<W> {
        let (sender, replies) = mpsc::channel();
        thread::spawn(move || {
            let mut answers = BufReader::new(answers);
            loop {
                let reply = read_reply(&mut answers);
                let last = reply.is_err();
                if sender.send(reply).is_err() || last {
                    return;
                }
            }
        });
        Link { requests, replies, limit }
    }

    /// Waits for the first message.
    pub(super) fn hello(&mut self) -> Result<Hello, Broken> {
        match self.answer()?.answer {
            Answer::Hello(hello) => Ok(hello),
            _ => Err(Broken::Unexpected("the start")),
        }
    }

    /// Hands over a case, and makes sure that it arrived.
    pub(super) fn prepare(&mut self, task: &Task<'_>) -> Result<Prepared, Broken> {
        let sent = self.ask(&Request::Prepare(task))?;
        match self.answer()?.answer {
            Answer::Prepared { crc32, .. } if crc32 != sent => {
                Err(Broken::Checksum { sent, received: crc32 })
            }
            Answer::Prepared { kernel, .. } => Ok(Prepared::Kernel(kernel)),
            Answer::Declined { reason } => Ok(Prepared::Declined(reason)),
            _ => Err(Broken::Unexpected("prepare")),
        }
    }

    /// Has the case computed `untimed` and then `timed` times; returns the nanoseconds of the latter.
    pub(super) fn time(&mut self, id: u64, untimed: usize, timed: usize) -> Result<f64, Broken> {
        self.ask(&Request::Time { id, untimed, timed })?;
        match self.answer()?.answer {
            Answer::Timed { ns } => Ok(ns as f64),
            _ => Err(Broken::Unexpected("time")),
        }
    }

    /// Fetches the outputs, which must have the `expected` numbers of elements.
    pub(super) fn outputs(&mut self, id: u64, expected: &[usize]) -> Result<Vec<Vec<f32>>, Broken> {
        self.ask(&Request::Outputs { id })?;
        let Reply { answer: Answer::Outputs { lengths }, elements } = self.answer()? else {
            return Err(Broken::Unexpected("outputs"));
        };
        if lengths != expected {
            return Err(Broken::Lengths { expected: expected.to_vec(), received: lengths });
        }
        let mut rest = elements.as_slice();
        let outputs = lengths.iter().map(|&len| {
            let (output, after) = rest.split_at(len);
            rest = after;
            output.to_vec()
        });
        Ok(outputs.collect())
    }

    fn ask(&mut self, request: &Request<'_>) -> Result<u32, Broken> {
        write_request(&mut self.requests, request).map_err(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe => Broken::Closed,
            _ => Broken::Io(error),
        })
    }

    fn answer(&mut self) -> Result<Reply, Broken> {
        match self.replies.recv_timeout(self.limit) {
            Ok(Ok(Reply { answer: Answer::Failed { message }, .. })) => Err(Broken::Failed(message)),
            Ok(reply) => reply,
            Err(RecvTimeoutError::Timeout) => Err(Broken::Silent(self.limit)),
            Err(RecvTimeoutError::Disconnected) => Err(Broken::Closed),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::peers::worker::protocol::{Data, Tensor};

    const VALUES: [f32; 3] = [1.0, 2.0, 3.0];

    /// A worker whose answers are known beforehand.
    fn link(answers: &str) -> Link<Vec<u8>> {
        Link::new(Vec::new(), io::Cursor::new(answers.as_bytes().to_vec()), LIMIT)
    }

    fn task() -> Task<'static> {
        Task {
            id: 1,
            family: "gemm",
            operation: "plain",
            shape: serde_json::Value::Null,
            precision: "strict",
            threads: 1,
            tensors: vec![Tensor { name: "a", dims: vec![3], data: Data::F32(&VALUES) }],
            outputs: vec![2],
        }
    }

    fn checksum() -> u32 {
        crc32fast::hash(&VALUES.map(f32::to_le_bytes).concat())
    }

    #[test]
    fn a_whole_conversation() {
        let mut answers = format!(
            "{}\n{{\"prepared\": {{\"crc32\": {}, \"kernel\": \"mkl\"}}}}\n{}\n{}\n",
            r#"{"hello": {"python": "3.12.1", "packages": {"torch": {"version": "9.9"}}, "engine": []}}"#,
            checksum(),
            r#"{"timed": {"ns": 1234}}"#,
            r#"{"outputs": {"lengths": [1, 1]}}"#,
        )
        .into_bytes();
        answers.extend([4.0f32, 5.0].map(f32::to_le_bytes).concat());
        let mut link = Link::new(Vec::new(), io::Cursor::new(answers), LIMIT);
        assert_eq!(link.hello().unwrap().python, "3.12.1");
        assert_eq!(link.prepare(&task()).unwrap(), Prepared::Kernel("mkl".into()));
        assert_eq!(link.time(1, 2, 10).unwrap(), 1234.0);
        assert_eq!(link.outputs(1, &[1, 1]).unwrap(), [vec![4.0], vec![5.0]]);
        let said = String::from_utf8_lossy(&link.requests).into_owned();
        assert!(said.contains("{\"time\":{\"id\":1,\"untimed\":2,\"timed\":10}}\n"), "{said}");
        assert!(matches!(link.time(1, 2, 10), Err(Broken::Closed)));
    }

    #[test]
    fn other_inputs_than_were_sent_are_an_error() {
        let mut link = link("{\"prepared\": {\"crc32\": 1, \"kernel\": \"mkl\"}}\n");
        let text = link.prepare(&task()).unwrap_err().to_string();
        assert!(text.contains("00000001") && text.contains(&format!("{:08x}", checksum())), "{text}");
    }

    #[test]
    fn a_case_that_is_declined_is_no_error() {
        let mut link = link("{\"declined\": {\"reason\": \"it has no such operation\"}}\n");
        let declined = Prepared::Declined("it has no such operation".into());
        assert_eq!(link.prepare(&task()).unwrap(), declined);
    }

    #[test]
    fn an_error_inside_the_worker_is_its_text() {
        let mut link = link("{\"failed\": {\"message\": \"RuntimeError: out of memory\"}}\n");
        let error = link.time(1, 0, 1).unwrap_err();
        assert!(
            matches!(error, Broken::Failed(ref text) if text == "RuntimeError: out of memory"),
            "{error}"
        );
    }

    #[test]
    fn the_wrong_answer_is_seen() {
        let timed = "{\"timed\": {\"ns\": 5}}\n";
        assert!(matches!(link(timed).hello(), Err(Broken::Unexpected(_))));
        assert!(matches!(link(timed).prepare(&task()), Err(Broken::Unexpected("prepare"))));
        assert!(matches!(link(timed).outputs(1, &[1]), Err(Broken::Unexpected("outputs"))));
        let short = "{\"outputs\": {\"lengths\": [0]}}\n";
        assert!(matches!(link(short).outputs(1, &[1]), Err(Broken::Lengths { .. })));
    }

    #[test]
    fn an_early_exit_and_garbage_end_the_conversation() {
        assert!(matches!(link("").hello(), Err(Broken::Closed)));
        let mut garbled = link("Intel MKL WARNING: …\n{\"timed\": {\"ns\": 5}}\n");
        assert!(matches!(garbled.time(1, 0, 1), Err(Broken::Garbage(_))));
        assert!(matches!(garbled.time(1, 0, 1), Err(Broken::Closed)));
    }

    #[test]
    fn a_stream_that_is_closed_to_requests_is_an_early_exit() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut link = Link::new(Closed, io::empty(), LIMIT);
        assert!(matches!(link.time(1, 0, 1), Err(Broken::Closed)));
    }

    #[test]
    fn a_silent_worker_is_given_up() {
        let (answers, keeps_open) = io::pipe().unwrap();
        let mut link = Link::new(Vec::new(), answers, Duration::from_millis(20));
        assert!(matches!(link.time(1, 0, 1), Err(Broken::Silent(_))));
        drop(keeps_open);
    }
}
