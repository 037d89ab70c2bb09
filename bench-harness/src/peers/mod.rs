//! Who is measured: each peer is an adapter from a [`Problem`] to a [`Workload`].

mod gemm_crate;
mod gemmkit;
mod matrixmultiply;
mod naive;
mod ours;
mod torch;
mod worker;

use std::path::Path;

use kavanam_kernels::Context;

use crate::cases::Problem;
use crate::error::HarnessError;
use crate::measure::workload::Workload;

/// Something that can compute cases.
pub(crate) trait Peer: Sync {
    /// Its name in records and in `--peers`.
    fn name(&self) -> &'static str;

    /// Its version: that of this program, where it is a part of it.
    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").to_owned()
    }

    /// Whether the context's instruction set decides what runs; otherwise the peer chooses for itself.
    fn follows_isa(&self) -> bool {
        false
    }

    /// Makes ready to compute `problem` on the context's number of threads: allocates the outputs, brings
    /// reusable operands into their best form.
    ///
    /// # Errors
    /// [`Unready`] when the peer does not do this, or fails to.
    fn prepare<'a>(&self, problem: &'a Problem, context: &Context)
    -> Result<Box<dyn Workload + 'a>, Unready>;
}

/// Why a peer has no workload for a case.
#[derive(Debug)]
pub(crate) enum Unready {
    /// It does not do such cases, for this reason. The others go on without it.
    Declined(String),
    /// It should, and cannot. The command ends.
    Failed(HarnessError),
}

impl Unready {
    /// Of a peer that computes matrix products alone.
    fn family() -> Unready {
        Unready::Declined("it computes matrix products only".into())
    }

    /// Of a peer that would read one copy of its operands again and again.
    fn cold() -> Unready {
        Unready::Declined("its weights are one copy, which caches hold".into())
    }

    /// Of a peer whose operands are f32 alone.
    fn fewer_bits() -> Unready {
        Unready::Declined("its weights are f32 only".into())
    }
}

/// Every peer that is part of this program, ours first.
pub(crate) fn built_in() -> Vec<Box<dyn Peer>> {
    vec![
        Box::new(ours::Ours),
        Box::new(matrixmultiply::MatrixMultiply),
        Box::new(gemm_crate::Gemm),
        Box::new(gemmkit::GemmKit),
        Box::new(naive::Naive),
    ]
}

/// The peers of those names, in that order; without names all that are built in. A peer outside of this
/// program takes part only when it is named, and is started here, by the given Python.
///
/// # Errors
/// Names the first unknown peer and lists the known; names a `python` that none of them uses; says what keeps
/// a peer from starting.
pub(crate) fn named(names: &[String], python: Option<&Path>) -> Result<Vec<Box<dyn Peer>>, HarnessError> {
    let known: Vec<&str> = built_in().iter().map(|peer| peer.name()).chain([torch::NAME]).collect();
    if let Some(name) = names.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(HarnessError::Usage(format!("unknown peer {name:?}; known: {}", known.join(", "))));
    }
    if python.is_some() && !names.iter().any(|name| name == torch::NAME) {
        let text = format!("--python is for the peer {0}: name it, as in --peers ours,{0}", torch::NAME);
        return Err(HarnessError::Usage(text));
    }
    if names.is_empty() {
        return Ok(built_in());
    }
    let start = |name: &String| -> Result<Box<dyn Peer>, HarnessError> {
        Ok(match built_in().into_iter().find(|peer| peer.name() == name) {
            Some(peer) => peer,
            None => Box::new(torch::Torch::start(python.unwrap_or(Path::new(worker::PYTHON)))?),
        })
    };
    names.iter().map(start).collect()
}

/// The version of a dependency, as the lock file has it.
fn locked_version(package: &str) -> String {
    let lock = include_str!("../../../Cargo.lock");
    let entry = lock.split("[[package]]").find(|entry| entry.contains(&format!("name = \"{package}\"\n")));
    let version = entry.and_then(|entry| entry.split("version = \"").nth(1)?.split('"').next());
    version.unwrap_or("unknown").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::attention::{Pass, Problem as AttentionProblem, Shape as AttentionShape};
    use crate::cases::gemm::{Layout, Problem as GemmProblem, RowBits, Shape};
    use crate::cases::{self, Family};
    use crate::measure::threads;
    use kavanam_kernels::gemm::WeightFormat;
    use kavanam_kernels::{Isa, Precision};

    #[test]
    fn versions_come_from_the_lock_file() {
        assert!(locked_version("gemm-f32").starts_with("0.19."));
        assert!(locked_version("matrixmultiply").starts_with("0.3."));
        assert!(locked_version("gemmkit").starts_with("0.1."));
        assert_eq!(locked_version("no-such-crate"), "unknown");
    }

    #[test]
    fn an_unknown_peer_is_a_wrong_command_line() {
        let error = named(&["ours".into(), "mkl".into()], None).err().unwrap();
        assert_eq!(error.exit_code(), 2);
        for part in ["\"mkl\"", "gemmkit", "torch"] {
            assert!(error.to_string().contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn a_python_that_nobody_uses_is_a_wrong_command_line() {
        for names in [vec![], vec!["ours".to_owned()]] {
            let error = named(&names, Some(Path::new("python3"))).err().unwrap();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains("--peers ours,torch"), "{error}");
        }
    }

    #[test]
    fn every_peer_computes_every_layout() {
        let stored =
            [WeightFormat::Bf16, WeightFormat::Int8, WeightFormat::Int4 { group: 8 }].map(Layout::Stored);
        let in_f32 = [Layout::Plain, Layout::TransposedA, Layout::TransposedB, Layout::Packed];
        let rounded = [WeightFormat::Int8, WeightFormat::Int4 { group: 8 }]
            .into_iter()
            .flat_map(|format| [RowBits::Eight, RowBits::Seven].map(|bits| Layout::Rounded(bits, format)));
        for layout in in_f32.into_iter().chain(stored).chain(rounded).chain([Layout::Halves]) {
            let problem = Problem::Gemm(GemmProblem::new(Shape { m: 19, n: 35, k: 23, layout, cold: false }));
            for count in [1, 2] {
                let context = Context::with_isa(Isa::best()).threads(threads::count(count));
                for peer in built_in() {
                    let mut workload = match peer.prepare(&problem, &context) {
                        Ok(workload) => workload,
                        Err(Unready::Declined(_)) => continue,
                        Err(Unready::Failed(error)) => panic!("{}: {error}", peer.name()),
                    };
                    workload.run().unwrap();
                    workload.run().unwrap();
                    problem.check(&workload.outputs().unwrap(), Precision::Strict).unwrap_or_else(|error| {
                        panic!("{} {layout:?} on {count} threads: {error}", peer.name())
                    });
                }
            }
        }
    }

    /// Every call gives the result, whichever copy it takes; the peers that keep one decline.
    #[test]
    fn cold_weights_are_copies() {
        for layout in [Layout::Packed, Layout::Rounded(RowBits::Eight, WeightFormat::Int8)] {
            let shape = Shape { m: 1, n: 2048, k: 2048, layout, cold: true };
            let problem = Problem::Gemm(GemmProblem { copies: 2, ..GemmProblem::new(shape) });
            let context = Context::with_isa(Isa::best());
            for peer in built_in() {
                let mut workload = match peer.prepare(&problem, &context) {
                    Ok(workload) if peer.name() == "ours" => workload,
                    Ok(_) => panic!("{} reads one copy", peer.name()),
                    Err(Unready::Declined(_)) => continue,
                    Err(Unready::Failed(error)) => panic!("{}: {error}", peer.name()),
                };
                for _ in 0..3 {
                    workload.run().unwrap();
                    problem.check(&workload.outputs().unwrap(), Precision::Strict).unwrap();
                }
            }
        }
    }

    /// Heads that share keys, so short that every gradient is compared: the result is right, and an element of it cannot change unseen.
    #[test]
    fn shared_keys_are_checked() {
        let context = Context::with_isa(Isa::best());
        for pass in [Pass::Forward, Pass::Backward, Pass::Decode] {
            let causal = pass != Pass::Decode;
            let shape = AttentionShape { batch: 2, heads: 6, kv_heads: 2, seq: 40, dim: 16, causal, pass };
            let problem = Problem::Attention(AttentionProblem::new(shape));
            let mut workload = ours::Ours.prepare(&problem, &context).unwrap();
            workload.run().unwrap();
            let right = workload.outputs().unwrap();
            problem.check(&right, Precision::Strict).unwrap_or_else(|error| panic!("{pass:?}: {error}"));
            // Compared are the last sequence's last heads: their last element, the first at that position, the first of all.
            for (tensor, output) in right.iter().enumerate() {
                let row = if tensor == 0 { shape.heads } else { shape.kv_heads } * shape.dim;
                let compared = if tensor == 0 { shape.heads / shape.kv_heads } else { 1 } * shape.dim;
                for at in [output.len() - 1, output.len() - compared, output.len() / 2 + row - compared] {
                    let mut wrong = right.clone();
                    wrong[tensor].to_mut()[at] += 0.1;
                    assert!(
                        problem.check(&wrong, Precision::Strict).is_err(),
                        "{pass:?}: element {at} of tensor {tensor}"
                    );
                }
            }
        }
    }

    #[test]
    fn ours_computes_every_quick_case_of_every_family() {
        let context = Context::with_isa(Isa::best());
        for family in [Family::Rowwise, Family::Attention, Family::Rnn] {
            for case in cases::of(family).into_iter().filter(|case| case.quick) {
                let problem = case.problem();
                let mut workload = ours::Ours.prepare(&problem, &context).unwrap();
                workload.run().unwrap();
                problem
                    .check(&workload.outputs().unwrap(), Precision::Strict)
                    .unwrap_or_else(|error| panic!("{}: {error}", case.name));
            }
        }
    }
}
