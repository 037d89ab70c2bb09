//! `kavanam bench FAMILY`: our kernels and their peers, by turns, on the same inputs.

use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use kavanam_kernels::{Context, Isa};
use regex::Regex;

use crate::cases::{self, Case};
use crate::cli::BenchArgs;
use crate::error::HarnessError;
use crate::files;
use crate::measure::clock::{self, Monotonic};
use crate::measure::fingerprint::Machine;
use crate::measure::roofline::{self, Reading, Roofline};
use crate::measure::sampler::{self, Plan};
use crate::measure::workload::Workload;
use crate::measure::{statistics, threads};
use crate::peers::{self, Peer, Unready};
use crate::record::Record;
use crate::report::bench;

/// Measures the family and prints its table.
pub(crate) fn run(args: &BenchArgs) -> Result<(), HarnessError> {
    let bench = Bench::new(args)?;
    let mut log = Log::new(args.json.as_deref())?;
    for &count in &args.threads {
        let began = log.records.len();
        let notes = threads::run_on(count, || bench.measure(count.get(), &mut log))??;
        println!(
            "\n{} on {count} {}\n",
            args.family.as_str(),
            if count.get() == 1 { "thread" } else { "threads" }
        );
        print!("{}", bench::table(&log.records[began..]));
        notes.iter().for_each(|note| println!("{note}"));
    }
    if let Some(path) = &args.json {
        println!("\nrecords: {}", path.display());
    }
    Ok(())
}

/// Someone who takes part: a peer, on one instruction set.
struct Contestant<'a> {
    peer: &'a dyn Peer,
    isa: Isa,
}

/// What one contestant gave on one case.
struct Samples {
    /// Its index.
    contestant: usize,
    kernel: String,
    /// Nanoseconds a call.
    ns: Vec<f64>,
    /// The median time of reading the bytes that bound the case.
    read_ns: Option<f64>,
}

/// What a run of the command measures, checked before anything is.
struct Bench<'a> {
    args: &'a BenchArgs,
    cases: Vec<Case>,
    peers: Vec<Box<dyn Peer>>,
    isas: Vec<Isa>,
    machine: Machine,
    plan: Plan,
}

impl<'a> Bench<'a> {
    fn new(args: &'a BenchArgs) -> Result<Bench<'a>, HarnessError> {
        let isas = if args.isa.is_empty() { vec![Context::detect()?.isa()] } else { args.isa.clone() };
        let cases = select(cases::of(args.family), args.filter.as_ref(), args.quick)?;
        // Last, because a peer in another process takes seconds to start.
        let peers = peers::named(&args.peers, args.python.as_deref())?;
        let plan = if args.quick { Plan::QUICK } else { Plan::FULL };
        Ok(Bench { args, cases, peers, isas, machine: Machine::detect(), plan })
    }

    /// Each peer, and each that follows the instruction set once for every set.
    fn contestants(&self) -> Vec<Contestant<'_>> {
        let mut all = Vec::new();
        for peer in &self.peers {
            let isas = if peer.follows_isa() { self.isas.clone() } else { vec![Isa::best()] };
            all.extend(isas.into_iter().map(|isa| Contestant { peer: peer.as_ref(), isa }));
        }
        all
    }

    /// Measures every case on the calling pool; returns why some peers did not take part.
    fn measure(&self, threads: usize, log: &mut Log) -> Result<Vec<String>, HarnessError> {
        let contestants = self.contestants();
        let context =
            |isa: Isa| Context::with_isa(isa).threads(threads::count(threads)).precision(self.args.precision);
        let read_gbps = roofline::read_gbps(&context(Isa::best()), &self.machine);
        let limits: Vec<Roofline> = contestants
            .iter()
            .map(|contestant| Roofline::measure(&context(contestant.isa), read_gbps))
            .collect();
        let bar = progress(self.cases.len());
        let mut notes = Vec::new();
        for case in &self.cases {
            bar.set_message(format!("{} on {threads} threads", case.name));
            let samples =
                self.sample(case, &contestants, &context, &mut notes).map_err(|error| match error {
                    HarnessError::Peer { peer, reason } => {
                        HarnessError::Peer { peer, reason: format!("{}: {reason}", case.name) }
                    }
                    other => other,
                })?;
            for samples in samples {
                let (contestant, limit) = (&contestants[samples.contestant], &limits[samples.contestant]);
                log.records.push(self.record(case, contestant, limit, samples));
            }
            log.flush(&self.machine)?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(notes)
    }

    /// Prepares the case with every contestant that takes it, checks what each computes, and only then measures.
    fn sample(
        &self,
        case: &Case,
        contestants: &[Contestant<'_>],
        context: &dyn Fn(Isa) -> Context,
        notes: &mut Vec<String>,
    ) -> Result<Vec<Samples>, HarnessError> {
        let problem = case.problem();
        let mut ready: Vec<(usize, Box<dyn Workload + '_>)> = Vec::new();
        for (i, contestant) in contestants.iter().enumerate() {
            match contestant.peer.prepare(&problem, &context(contestant.isa)) {
                Ok(workload) => ready.push((i, workload)),
                Err(Unready::Failed(error)) => return Err(error),
                Err(Unready::Declined(reason)) => {
                    let note = format!("{}: {reason}", contestant.peer.name());
                    if !notes.contains(&note) {
                        notes.push(note);
                    }
                }
            }
        }
        for (i, workload) in &mut ready {
            workload.run()?;
            problem.check(&workload.outputs()?, self.args.precision).map_err(|error| {
                let name = contestants[*i].peer.name();
                HarnessError::Failed(format!("{}: the result of {name} is wrong: {error}", case.name))
            })?;
        }
        let mut work: Vec<&mut dyn Workload> =
            ready.iter_mut().map(|(_, workload)| workload.as_mut() as _).collect();
        let mut reading =
            case.read_bytes().map(|bytes| Reading::new(&context(Isa::best()), bytes, problem.copies()));
        work.extend(reading.as_mut().map(|reading| reading as &mut dyn Workload));
        let samples = sampler::interleave(&Monotonic::start(), &self.plan, &mut work)?;
        let read_ns = reading.and(samples.last()).map(|ns| statistics::median(ns));
        let all = ready.iter().zip(samples);
        let of = |((i, workload), ns): (&(usize, Box<dyn Workload + '_>), Vec<f64>)| Samples {
            contestant: *i,
            kernel: workload.kernel(),
            ns,
            read_ns,
        };
        Ok(all.map(of).collect())
    }

    fn record(
        &self,
        case: &Case,
        contestant: &Contestant<'_>,
        limit: &Roofline,
        Samples { kernel, ns: samples_ns, read_ns, .. }: Samples,
    ) -> Record {
        let work = case.work();
        let median_ns = statistics::median(&samples_ns);
        let gflops = work.flops.map(|flops| flops / median_ns);
        let gbps = work.bytes / median_ns;
        let share = match gflops {
            Some(gflops) => gflops / limit.fma_gflops,
            None => gbps / limit.read_gbps,
        };
        let follows = contestant.peer.follows_isa();
        Record {
            family: self.args.family.as_str().to_owned(),
            case: case.name.clone(),
            peer: contestant.peer.name().to_owned(),
            peer_version: contestant.peer.version(),
            kernel,
            precision: self.args.precision.to_string(),
            isa: if follows { contestant.isa.to_string() } else { "auto".to_owned() },
            threads: limit.threads,
            median_ns,
            min_ns: statistics::minimum(&samples_ns),
            samples_ns,
            gflops,
            gbps: Some(gbps),
            percent_of_peak: Some(100.0 * share),
            percent_of_read: read_ns.map(|ns| 100.0 * ns / median_ns),
        }
    }
}

/// The cases that the flags leave.
fn select(cases: Vec<Case>, filter: Option<&Regex>, quick: bool) -> Result<Vec<Case>, HarnessError> {
    let of_plan: Vec<Case> = cases.into_iter().filter(|case| case.quick || !quick).collect();
    let examples: Vec<String> = of_plan.iter().map(|case| case.name.clone()).collect();
    let chosen: Vec<Case> =
        of_plan.into_iter().filter(|case| filter.is_none_or(|re| re.is_match(&case.name))).collect();
    if let (true, Some(filter)) = (chosen.is_empty(), filter) {
        return Err(HarnessError::Usage(format!(
            "no case matches {filter}; there are: {}",
            examples.join(", ")
        )));
    }
    Ok(chosen)
}

/// The records so far, and the file that always holds them all.
struct Log {
    path: Option<PathBuf>,
    records: Vec<Record>,
}

impl Log {
    fn new(path: Option<&Path>) -> Result<Log, HarnessError> {
        path.map(files::prepare_file).transpose()?;
        Ok(Log { path: path.map(Path::to_owned), records: Vec::new() })
    }

    /// Rewrites the file as a whole, so that it is a JSON array after every case.
    fn flush(&self, machine: &Machine) -> Result<(), HarnessError> {
        let Some(path) = &self.path else { return Ok(()) };
        files::write_json(path, &self.records)?;
        let command: Vec<String> = std::env::args().skip(1).collect();
        let text =
            format!("command   kavanam {}\ndate      {}\n{machine}", command.join(" "), clock::utc_now());
        files::write_atomically(&path.with_extension("environment.txt"), text.as_bytes())
    }
}

/// A bar on the error stream; nothing when that is no terminal.
fn progress(cases: usize) -> ProgressBar {
    let style =
        ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}").expect("a valid template");
    ProgressBar::new(cases as u64).with_style(style)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::Family;

    #[test]
    fn a_filter_that_matches_nothing_is_a_wrong_command_line() {
        let filter = Regex::new("^nothing$").unwrap();
        let error = select(cases::of(Family::Gemm), Some(&filter), true).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("square/64"), "{error}");
    }

    #[test]
    fn quick_leaves_the_quick_cases() {
        let all = cases::of(Family::Gemm);
        let quick = select(all.clone(), None, true).unwrap();
        assert!(!quick.is_empty() && quick.len() < all.len());
        assert_eq!(select(all.clone(), None, false).unwrap().len(), all.len());
    }
}
