//! The crate `gemm`, with its feature `x86-v4`, through its f32 part.
//!
//! `gemm::gemm` does two things before it calls the function that is called here: it picks that function by
//! type, and it transposes a product whose C is row-major. The second is done below in the same way.

use std::borrow::Cow;

use kavanam_kernels::Context;
use kavanam_kernels::memory::AlignedVec;

use crate::cases::Problem;
use crate::cases::gemm::Problem as GemmProblem;
use crate::error::HarnessError;
use crate::measure::workload::Workload;
use crate::peers::{Peer, Unready, locked_version};

/// The peer.
pub(crate) struct Gemm;

impl Peer for Gemm {
    fn name(&self) -> &'static str {
        "gemm"
    }

    fn version(&self) -> String {
        locked_version("gemm-f32")
    }

    fn prepare<'a>(
        &self,
        problem: &'a Problem,
        context: &Context,
    ) -> Result<Box<dyn Workload + 'a>, Unready> {
        let parallelism = match context.thread_count() {
            1 => gemm_common::Parallelism::None,
            threads => gemm_common::Parallelism::Rayon(threads),
        };
        match problem {
            Problem::Gemm(problem) if problem.shape.in_fewer_bits() => Err(Unready::fewer_bits()),
            Problem::Gemm(problem) if problem.shape.cold => Err(Unready::cold()),
            Problem::Gemm(problem) => {
                let c = AlignedVec::filled(problem.shape.m * problem.shape.n, f32::NAN);
                Ok(Box::new(Product { problem, c, parallelism }))
            }
            _ => Err(Unready::family()),
        }
    }
}

struct Product<'a> {
    problem: &'a GemmProblem,
    c: AlignedVec<f32>,
    parallelism: gemm_common::Parallelism,
}

impl Workload for Product<'_> {
    fn run(&mut self) -> Result<(), HarnessError> {
        let GemmProblem { shape, a, b, .. } = self.problem;
        let ([a_row, a_col], [b_row, b_col]) = (shape.a_strides(), shape.b_strides());
        let product = gemm_f32::gemm::f32::get_gemm_fn();
        // A column of C has the stride 1 here; where that is the smaller one, Cᵀ = Bᵀ·Aᵀ is computed.
        let (m, n, [c_row, c_col], left, right) = if shape.n > 1 {
            (shape.n, shape.m, [1, shape.n], (b, b_col, b_row), (a, a_col, a_row))
        } else {
            (shape.m, shape.n, [1, 1], (a, a_row, a_col), (b, b_row, b_col))
        };
        // SAFETY: `Problem::new` gave A m·k and B k·n elements and the strides step through exactly these;
        // C is row-major with m·n elements and belongs to this workload alone. C is not read.
        unsafe {
            product(
                m,
                n,
                shape.k,
                self.c.as_mut_ptr(),
                c_col as isize,
                c_row as isize,
                false,
                left.0.as_ptr(),
                left.2 as isize,
                left.1 as isize,
                right.0.as_ptr(),
                right.2 as isize,
                right.1 as isize,
                0.0,
                1.0,
                false,
                false,
                false,
                self.parallelism,
            );
        }
        Ok(())
    }

    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
        Ok(vec![Cow::Borrowed(&self.c)])
    }

    fn kernel(&self) -> String {
        "gemm".into()
    }
}
