//! The worker's process: started with its program, listened to, killed when the run is over.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kavanam_kernels::Context;

use crate::cases::Problem;
use crate::error::HarnessError;
use crate::measure::clock::Clock;
use crate::measure::workload::Workload;
use crate::peers::Unready;
use crate::peers::worker::link::{LIMIT, Link, Prepared};
use crate::peers::worker::protocol::{Broken, Hello};
use crate::peers::worker::requirements;
use crate::peers::worker::task;

/// Reads the modules of the worker's program as a line of JSON, because an argument cannot be so long everywhere,
/// and runs it. A file in the working folder must not hide a package.
const LAUNCH: &str = "\
import sys
sys.path[:] = [folder for folder in sys.path if folder]
import json, types
for name, source in json.loads(sys.stdin.buffer.readline()):
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name + '.py', 'exec'), module.__dict__)
import worker
worker.main()";

/// The modules of a worker's program, by name, in the order in which they are run; one is called `worker`.
pub(crate) type Modules = [(&'static str, &'static str)];

/// Lines of the error stream that are kept for an error message.
const KEPT_LINES: usize = 12;
/// A process whose streams are closed may take this long to end by itself.
const GRACE: Duration = Duration::from_secs(2);

/// A running worker. Clones talk to the same process.
#[derive(Clone)]
pub(crate) struct Worker {
    peer: &'static str,
    engine: Vec<String>,
    packages: Vec<(String, String)>,
    process: Arc<Mutex<Process>>,
}

struct Process {
    child: Child,
    link: Link<BufWriter<ChildStdin>>,
    errors: ErrorStream,
    last_id: u64,
}

impl Worker {
    /// Starts a program with `python` and makes sure that its environment has what it needs.
    ///
    /// # Errors
    /// Says what is missing, or what the process said before it ended, and how to make the environment.
    pub(crate) fn start(
        peer: &'static str,
        python: &Path,
        modules: &Modules,
    ) -> Result<Worker, HarnessError> {
        let refused = |reason: String| HarnessError::Peer {
            peer,
            reason: format!("{} cannot run it: {reason}\n{}", python.display(), requirements::HINT),
        };
        let mut process = Process::spawn(python, modules).map_err(|error| refused(error.to_string()))?;
        let hello = process.link.hello().map_err(|broken| refused(process.explain(&broken)))?;
        requirements::check(&hello).map_err(refused)?;
        let Hello { engine, packages, .. } = hello;
        let packages = packages.into_iter().filter_map(|(name, package)| Some((name, package.version()?)));
        Ok(Worker { peer, engine, packages: packages.collect(), process: Arc::new(Mutex::new(process)) })
    }

    /// The version of a package and, in brackets, what it computes with.
    pub(crate) fn version(&self, package: &str) -> String {
        let version = self.packages.iter().find(|(name, _)| name == package);
        let version = version.map_or("unknown", |(_, version)| version.as_str());
        match self.engine.as_slice() {
            [] => version.to_owned(),
            engine => format!("{version} ({})", engine.join(", ")),
        }
    }

    /// Hands over a case, in the place of the one before.
    ///
    /// # Errors
    /// [`Unready`] when the worker declines it, fails, or has gone.
    pub(crate) fn prepare(&self, problem: &Problem, context: &Context) -> Result<Calculation, Unready> {
        let mut process = self.lock();
        process.last_id += 1;
        let id = process.last_id;
        let task = task::new(id, problem, context);
        let prepared = process.link.prepare(&task);
        match prepared.map_err(|broken| Unready::Failed(self.failed(&mut process, &broken)))? {
            Prepared::Kernel(kernel) => {
                Ok(Calculation { worker: self.clone(), id, outputs: task.outputs, kernel })
            }
            Prepared::Declined(reason) => Err(Unready::Declined(reason)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request; an error says what the process said before it ended.
    fn call<T>(
        &self,
        request: impl FnOnce(&mut Link<BufWriter<ChildStdin>>) -> Result<T, Broken>,
    ) -> Result<T, HarnessError> {
        let mut process = self.lock();
        request(&mut process.link).map_err(|broken| self.failed(&mut process, &broken))
    }

    fn failed(&self, process: &mut Process, broken: &Broken) -> HarnessError {
        HarnessError::Peer { peer: self.peer, reason: process.explain(broken) }
    }
}

impl Process {
    fn spawn(python: &Path, modules: &Modules) -> std::io::Result<Process> {
        let mut child = Command::new(python)
            .args(["-c", LAUNCH])
            // Its tensors lie as the others' operands do: at cache lines, on huge pages where they are large.
            .env("THP_MEM_ALLOC_ENABLE", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let missing = || std::io::Error::other("a standard stream of the process is missing");
        let mut stdin = child.stdin.take().ok_or_else(missing)?;
        let stdout = child.stdout.take().ok_or_else(missing)?;
        let errors = ErrorStream::listen(child.stderr.take().ok_or_else(missing)?);
        // Whether the program arrived shows in its first answer; if not, the process says why.
        let _ = writeln!(stdin, "{}", serde_json::to_string(modules)?);
        Ok(Process { child, link: Link::new(BufWriter::new(stdin), stdout, LIMIT), errors, last_id: 0 })
    }

    /// What happened, in words. The process is ended, unless it only refused something.
    fn explain(&mut self, broken: &Broken) -> String {
        if let Broken::Failed(message) = broken {
            return message.clone();
        }
        let status = match broken {
            Broken::Closed | Broken::Garbage(_) => self.wait(),
            _ => None,
        };
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mut text = format!("the worker failed: {broken}");
        if let Some(status) = status {
            text += &format!(" ({status})");
        }
        let lines = self.errors.last_lines();
        if !lines.is_empty() {
            text += "; the last lines of its error stream:";
            lines.iter().for_each(|line| text += &format!("\n  {line}"));
        }
        text
    }

    /// The exit status of a process that ends by itself.
    fn wait(&mut self) -> Option<ExitStatus> {
        let began = Instant::now();
        while began.elapsed() < GRACE {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            thread::sleep(Duration::from_millis(10));
        }
        None
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last lines that a process wrote to its error stream.
struct ErrorStream {
    lines: Arc<Mutex<VecDeque<String>>>,
    listener: JoinHandle<()>,
}

impl ErrorStream {
    fn listen(stream: impl Read + Send + 'static) -> ErrorStream {
        let lines = Arc::new(Mutex::new(VecDeque::new()));
        let kept = Arc::clone(&lines);
        let listener = thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while matches!(stream.read_until(b'\n', &mut line), Ok(1..)) {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                if kept.len() == KEPT_LINES {
                    kept.pop_front();
                }
                kept.push_back(String::from_utf8_lossy(&line).trim_end().to_owned());
                line.clear();
            }
        });
        ErrorStream { lines, listener }
    }

    /// All that is there once the stream has ended, or soon, if a child of the process keeps it open.
    fn last_lines(&self) -> Vec<String> {
        let began = Instant::now();
        while !self.listener.is_finished() && began.elapsed() < GRACE {
            thread::sleep(Duration::from_millis(10));
        }
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

/// A case that the worker has made ready.
pub(crate) struct Calculation {
    worker: Worker,
    id: u64,
    /// Elements of each output.
    outputs: Vec<usize>,
    kernel: String,
}

impl Workload for Calculation {
    fn run(&mut self) -> Result<(), HarnessError> {
        self.worker.call(|link| link.time(self.id, 0, 1)).map(|_| ())
    }

    /// By the worker's clock, around its loop of calls: nothing of the conversation is in it.
    fn time(&mut self, _: &dyn Clock, untimed: usize, timed: usize) -> Result<f64, HarnessError> {
        self.worker.call(|link| link.time(self.id, untimed, timed))
    }

    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
        let outputs = self.worker.call(|link| link.outputs(self.id, &self.outputs))?;
        Ok(outputs.into_iter().map(Cow::Owned).collect())
    }

    fn kernel(&self) -> String {
        self.kernel.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_many_are_kept() {
        let text: String = (0..40).map(|i| format!("line {i}\n")).collect();
        let stream = ErrorStream::listen(std::io::Cursor::new(text + "the end"));
        let lines = stream.last_lines();
        assert_eq!(lines.len(), KEPT_LINES);
        assert_eq!(lines.last().unwrap(), "the end");
    }

    #[test]
    fn a_program_that_does_not_exist_is_named_with_the_way_out() {
        let error = Worker::start("torch", Path::new("/no/such/python"), &[]).err().unwrap();
        for part in ["the peer torch", "/no/such/python", "python3 -m venv DIR", "pip install -r"] {
            assert!(error.to_string().contains(part), "{part}: {error}");
        }
    }
}
