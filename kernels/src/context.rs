//! [`Context`]: everything about *how* a kernel runs, explicit and cheap to copy.
//!
//! There are no globals: which instruction set, how many threads, which precision and which
//! blocking are arguments. Whatever they are, the result has the same bits for any number of
//! threads (see the numerical contract in the crate's documentation).

use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::error::{IsaError, ShapeError};
use crate::invitation::{company_is_likely, invite};
use crate::isa::{Isa, IsaName};
use crate::waiting::Waiting;

/// How long a thread that has no task left waits for the others before it goes back to its pool, whose threads sleep after about 30 µs without work and
/// need about 50 µs to be awake again. Two tasks of 50 and 150 µs, called one after the other on two threads of an AMD Zen 3, took 189 µs (minimum of 40
/// samples; median 221) and take 151 (153) so; tasks of 150 and 50 µs 157 (159) and 151 (152).
const PATIENCE: Duration = Duration::from_micros(500);

/// A call that takes so long alone is worth waking threads for, whose waking costs the caller 9 µs and which are there 50 µs later
/// (docs/decisions/001-foundations.md).
const WAKES: Duration = Duration::from_micros(80);
/// Rows that multiply with one operand take as long as this many where they are fewer: they wait for its memory. A product of 512×512 with one row gains from
/// a second thread that is awake (docs/decisions/001-foundations.md).
pub(crate) const MEMORY_BOUND_ROWS: usize = 4;

/// How exact a matrix product must be, in PyTorch's words. It is a floor: where the CPU has no
/// faster means, a more exact kernel runs, and its name stands in every benchmark record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// f32 fused multiply-add only.
    #[default]
    Strict,
    /// The error bound of f32, by the fastest means.
    Highest,
    /// About 2⁻¹⁷ relative to |A|·|B|: three bf16 products where the CPU has them.
    High,
    /// bf16 operands, f32 accumulation.
    Medium,
}

impl Precision {
    /// Every precision, the most exact first.
    pub const ALL: [Precision; 4] =
        [Precision::Strict, Precision::Highest, Precision::High, Precision::Medium];

    /// The word that flags and JSON use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Precision::Strict => "strict",
            Precision::Highest => "highest",
            Precision::High => "high",
            Precision::Medium => "medium",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Precision {
    type Err = ShapeError;

    fn from_str(word: &str) -> Result<Self, ShapeError> {
        Precision::ALL.into_iter().find(|p| p.as_str().eq_ignore_ascii_case(word)).ok_or_else(|| {
            ShapeError::Value {
                argument: "precision",
                value: format!("{word:?}"),
                expected: "strict, highest, high or medium",
            }
        })
    }
}

/// Block sizes of the five-loop matrix product. Tests force tiny ones so that small matrices
/// cross every block edge. `kc` is part of the numerical result (K is summed in blocks of `kc`);
/// `mc` and `nc` are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Blocking {
    /// Rows of A in one packed block.
    pub mc: usize,
    /// Depth of one packed block.
    pub kc: usize,
    /// Columns of B in one packed block.
    pub nc: usize,
}

/// How kernels run: instruction set, threads, precision, blocking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    isa: Isa,
    threads: NonZeroUsize,
    precision: Precision,
    blocking: Option<Blocking>,
}

impl Context {
    /// The environment variable that [`Context::detect`], and nothing else, reads.
    pub const ISA_VARIABLE: &'static str = "KAVANAM_ISA";

    /// The best instruction set and all threads of the current rayon pool, `Strict`.
    ///
    /// # Errors
    /// [`IsaError`] when `KAVANAM_ISA` is set to a name that is unknown or that this CPU lacks.
    pub fn detect() -> Result<Context, IsaError> {
        let isa = match std::env::var(Context::ISA_VARIABLE) {
            Ok(name) if !name.is_empty() => Isa::new(name.parse::<IsaName>()?)?,
            _ => Isa::best(),
        };
        let threads = NonZeroUsize::new(rayon::current_num_threads()).unwrap_or(NonZeroUsize::MIN);
        Ok(Context { threads, ..Context::with_isa(isa) })
    }

    /// That instruction set, one thread, `Strict`, default blocking.
    pub fn with_isa(isa: Isa) -> Context {
        Context { isa, threads: NonZeroUsize::MIN, precision: Precision::Strict, blocking: None }
    }

    /// The same with another number of threads. The result of no kernel depends on it.
    #[must_use]
    pub fn threads(self, threads: NonZeroUsize) -> Context {
        Context { threads, ..self }
    }

    /// The same on the calling thread alone.
    #[must_use]
    pub fn single_threaded(self) -> Context {
        self.threads(NonZeroUsize::MIN)
    }

    /// The same for a call that takes about `alone` without help: on the calling thread alone where that is little and the others are likely to sleep.
    pub(crate) fn for_call_of(self, alone: Duration) -> Context {
        // Tests are of small problems and must not depend on who happens to be awake.
        self.for_call_where(alone, || cfg!(test) || company_is_likely(alone))
    }

    /// [`Context::for_call_of`] so many multiply-adds, 50 a nanosecond: an AVX-512 core's peak, which slower ones reach half of. Where fewer than
    /// [`MEMORY_BOUND_ROWS`] share an operand, as many as if they were that many.
    pub(crate) fn for_multiply_adds(self, count: usize) -> Context {
        self.for_call_of(Duration::from_nanos(count as u64 / 50))
    }

    fn for_call_where(self, alone: Duration, others_are_awake: impl FnOnce() -> bool) -> Context {
        if self.thread_count() == 1 || alone >= WAKES || others_are_awake() {
            self
        } else {
            self.single_threaded()
        }
    }

    /// The same with another precision.
    #[must_use]
    pub fn precision(self, precision: Precision) -> Context {
        Context { precision, ..self }
    }

    /// The same with forced block sizes (for tests and tuning).
    #[must_use]
    pub fn blocking(self, blocking: Blocking) -> Context {
        Context { blocking: Some(blocking), ..self }
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The number of threads that a kernel may use, the calling one included.
    pub fn thread_count(&self) -> usize {
        self.threads.get()
    }

    /// The precision of matrix products.
    pub fn matmul_precision(&self) -> Precision {
        self.precision
    }

    /// The forced block sizes, if any.
    pub fn forced_blocking(&self) -> Option<Blocking> {
        self.blocking
    }

    /// Runs `task(0) … task(tasks - 1)`, each once, on at most [`Context::thread_count`] threads of
    /// the current rayon pool, the calling thread among them. Which thread runs which task is not
    /// fixed, so a task must write to its own place and must not depend on another.
    ///
    /// No pool is made and none is nested: inside a task, a further call shares the same pool.
    pub fn for_each_task(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        self.deal(tasks, 1, task);
    }

    /// As [`Context::for_each_task`], for tasks that go through memory in their order: each thread begins with a run of its own, and helps with
    /// the others' when that is done. A thread whose next task lies behind another's would not read on where its prefetchers already are.
    pub fn for_each_piece(&self, pieces: usize, task: impl Fn(usize) + Sync) {
        self.deal(pieces, self.thread_count().min(pieces), task);
    }

    /// Runs each task once; those of a run are handed out in order, and a thread starts with the run of its own number.
    fn deal(&self, tasks: usize, runs: usize, task: impl Fn(usize) + Sync) {
        let workers = self.thread_count().min(tasks);
        if workers <= 1 {
            (0..tasks).for_each(task);
            return;
        }
        let begin = |run: usize| tasks / runs * run + run.min(tasks % runs);
        let runs: Vec<Run> =
            (0..runs).map(|run| Run { next: AtomicUsize::new(begin(run)), end: begin(run + 1) }).collect();
        let finished = AtomicUsize::new(0);
        let work = |worker: usize| {
            for run in (worker..worker + runs.len()).map(|run| &runs[run % runs.len()]) {
                loop {
                    // Relaxed: the counter hands out indices; the end of the call publishes the results.
                    let index = run.next.fetch_add(1, Ordering::Relaxed);
                    if index >= run.end {
                        break;
                    }
                    task(index);
                    finished.fetch_add(1, Ordering::Relaxed);
                }
            }
            Waiting::until(|| finished.load(Ordering::Relaxed) >= tasks, PATIENCE);
        };
        invite(workers - 1, &work, |_| work(0));
    }

    /// Runs `task` on each of `items`, which it takes by value: what owns disjoint parts of buffers is
    /// handed to threads this way. As [`Context::for_each_task`] otherwise.
    pub fn for_each_owned<T: Send>(&self, items: Vec<T>, task: impl Fn(T) + Sync) {
        if self.thread_count() == 1 || items.len() <= 1 {
            items.into_iter().for_each(task);
            return;
        }
        let items: Vec<Mutex<Option<T>>> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
        self.for_each_task(items.len(), |i| {
            let item = items[i].lock().unwrap_or_else(PoisonError::into_inner).take();
            task(item.expect("each index runs once"));
        });
    }
}

/// Tasks that follow one another; in a cache line of its own, because one thread asks it most of the time.
#[repr(align(64))]
struct Run {
    next: AtomicUsize,
    end: usize,
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_threads() {
        for threads in 1..=5 {
            let context = Context::with_isa(Isa::scalar()).threads(NonZeroUsize::new(threads).unwrap());
            for tasks in [0, 1, 2, 7, 100] {
                let ran: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
                let run = |i: usize| {
                    ran[i].fetch_add(1, Ordering::Relaxed);
                };
                context.for_each_task(tasks, run);
                assert!(ran.iter().all(|r| r.load(Ordering::Relaxed) == 1));
                context.for_each_piece(tasks, run);
                assert!(ran.iter().all(|r| r.load(Ordering::Relaxed) == 2));
            }
        }
    }

    #[test]
    fn a_short_call_is_shared_with_those_who_are_awake() {
        let two = Context::with_isa(Isa::scalar()).threads(NonZeroUsize::new(2).unwrap());
        let threads = |alone, awake| two.for_call_where(alone, || awake).thread_count();
        let short = WAKES - Duration::from_nanos(1);
        assert_eq!([threads(short, false), threads(short, true), threads(WAKES, false)], [1, 2, 2]);
        let unasked =
            || -> bool { unreachable!("there is nobody to share with, or it is worth to wake them") };
        assert_eq!(two.single_threaded().for_call_where(short, unasked).thread_count(), 1);
        assert_eq!(two.for_call_where(WAKES, unasked).thread_count(), 2);
    }

    #[test]
    fn nested_tasks_finish() {
        let context = Context::with_isa(Isa::scalar()).threads(NonZeroUsize::new(3).unwrap());
        let total = AtomicU32::new(0);
        context.for_each_task(8, |_| {
            context.for_each_task(8, |_| {
                total.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(total.load(Ordering::Relaxed), 64);
    }

    #[test]
    fn precision_words_parse_back() {
        for precision in Precision::ALL {
            assert_eq!(precision.as_str().parse(), Ok(precision));
        }
        assert!("exact".parse::<Precision>().is_err());
    }
}
