//! The crate `gemm`, with its feature `x86-v4`.

use std::borrow::Cow;

use kavanam_kernels::Context;

use crate::cases::Problem;
use crate::cases::gemm::Problem as GemmProblem;
use crate::peers::{Declined, Peer, Workload, locked_version};

/// The peer.
pub(crate) struct Gemm;

impl Peer for Gemm {
    fn name(&self) -> &'static str {
        "gemm"
    }

    fn version(&self) -> String {
        locked_version("gemm")
    }

    fn prepare<'a>(
        &self,
        problem: &'a Problem,
        context: &Context,
    ) -> Result<Box<dyn Workload + 'a>, Declined> {
        let parallelism = match context.thread_count() {
            1 => gemm::Parallelism::None,
            threads => gemm::Parallelism::Rayon(threads),
        };
        match problem {
            Problem::Gemm(problem) => {
                let c = vec![f32::NAN; problem.shape.m * problem.shape.n];
                Ok(Box::new(Product { problem, c, parallelism }))
            }
        }
    }
}

struct Product<'a> {
    problem: &'a GemmProblem,
    c: Vec<f32>,
    parallelism: gemm::Parallelism,
}

impl Workload for Product<'_> {
    fn run(&mut self) {
        let GemmProblem { shape, a, b } = self.problem;
        let ([a_row, a_col], [b_row, b_col]) = (shape.a_strides(), shape.b_strides());
        // SAFETY: `Problem::new` gave A m·k and B k·n elements and the strides step through exactly these;
        // C is row-major with m·n elements and belongs to this workload alone. C is not read.
        unsafe {
            gemm::gemm(
                shape.m,
                shape.n,
                shape.k,
                self.c.as_mut_ptr(),
                1,
                shape.n as isize,
                false,
                a.as_ptr(),
                a_col as isize,
                a_row as isize,
                b.as_ptr(),
                b_col as isize,
                b_row as isize,
                0.0,
                1.0,
                false,
                false,
                false,
                self.parallelism,
            );
        }
    }

    fn outputs(&self) -> Vec<Cow<'_, [f32]>> {
        vec![Cow::Borrowed(&self.c)]
    }

    fn kernel(&self) -> String {
        "gemm".into()
    }
}
