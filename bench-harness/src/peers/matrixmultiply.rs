//! The crate `matrixmultiply`, on one thread.

use std::borrow::Cow;

use kavanam_kernels::Context;
use kavanam_kernels::memory::AlignedVec;

use crate::cases::Problem;
use crate::cases::gemm;
use crate::error::HarnessError;
use crate::measure::workload::Workload;
use crate::peers::{Peer, Unready, locked_version};

/// The peer. Its own threads are counted once a process from the environment, so that a run over several
/// thread counts cannot use them.
pub(crate) struct MatrixMultiply;

impl Peer for MatrixMultiply {
    fn name(&self) -> &'static str {
        "matrixmultiply"
    }

    fn version(&self) -> String {
        locked_version("matrixmultiply")
    }

    fn prepare<'a>(
        &self,
        problem: &'a Problem,
        context: &Context,
    ) -> Result<Box<dyn Workload + 'a>, Unready> {
        if context.thread_count() > 1 {
            return Err(Unready::Declined(
                "its thread count cannot be chosen, it runs on 1 thread only".into(),
            ));
        }
        match problem {
            Problem::Gemm(problem) if problem.shape.in_fewer_bits() => Err(Unready::fewer_bits()),
            Problem::Gemm(problem) if problem.shape.cold => Err(Unready::cold()),
            Problem::Gemm(problem) => {
                let c = AlignedVec::filled(problem.shape.m * problem.shape.n, f32::NAN);
                Ok(Box::new(Product { problem, c }))
            }
            _ => Err(Unready::family()),
        }
    }
}

struct Product<'a> {
    problem: &'a gemm::Problem,
    c: AlignedVec<f32>,
}

impl Workload for Product<'_> {
    fn run(&mut self) -> Result<(), HarnessError> {
        let gemm::Problem { shape, a, b, .. } = self.problem;
        let ([a_row, a_col], [b_row, b_col]) = (shape.a_strides(), shape.b_strides());
        // SAFETY: `Problem::new` gave A m·k and B k·n elements and the strides step through exactly these;
        // C is row-major with m·n elements and belongs to this workload alone.
        unsafe {
            matrixmultiply::sgemm(
                shape.m,
                shape.k,
                shape.n,
                1.0,
                a.as_ptr(),
                a_row as isize,
                a_col as isize,
                b.as_ptr(),
                b_row as isize,
                b_col as isize,
                0.0,
                self.c.as_mut_ptr(),
                shape.n as isize,
                1,
            );
        }
        Ok(())
    }

    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
        Ok(vec![Cow::Borrowed(&self.c)])
    }

    fn kernel(&self) -> String {
        "sgemm".into()
    }
}
