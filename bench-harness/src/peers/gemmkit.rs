//! The crate `gemmkit`; weights that are used again go into its prepacked form.

use std::borrow::Cow;
use std::time::Instant;

use kavanam_kernels::Context;
use kavanam_kernels::memory::AlignedVec;

use crate::cases::Problem;
use crate::cases::gemm::{Layout, Problem as GemmProblem, Shape};
use crate::error::HarnessError;
use crate::measure::workload::Workload;
use crate::peers::{Peer, Unready, locked_version};

/// The peer.
pub(crate) struct GemmKit;

impl Peer for GemmKit {
    fn name(&self) -> &'static str {
        "gemmkit"
    }

    fn version(&self) -> String {
        locked_version("gemmkit")
    }

    fn prepare<'a>(
        &self,
        problem: &'a Problem,
        context: &Context,
    ) -> Result<Box<dyn Workload + 'a>, Unready> {
        let parallelism = match context.thread_count() {
            1 => gemmkit::Parallelism::Serial,
            threads => gemmkit::Parallelism::Rayon(threads),
        };
        match problem {
            Problem::Gemm(problem) if problem.shape.in_fewer_bits() => Err(Unready::fewer_bits()),
            Problem::Gemm(problem) if problem.shape.cold => Err(Unready::cold()),
            Problem::Gemm(problem) => {
                let Shape { m, n, .. } = problem.shape;
                let mut product =
                    Product { problem, packed: None, c: AlignedVec::filled(m * n, f32::NAN), parallelism };
                if problem.shape.layout == Layout::Packed {
                    product.choose_form();
                }
                Ok(Box::new(product))
            }
            _ => Err(Unready::family()),
        }
    }
}

struct Product<'a> {
    problem: &'a GemmProblem,
    packed: Option<gemmkit::PackedRhs<f32>>,
    /// Row-major; column-major when `packed`, because the crate takes a prepacked B for no other C.
    c: AlignedVec<f32>,
    parallelism: gemmkit::Parallelism,
}

impl Product<'_> {
    /// Keeps the prepacked form where it is the faster one: its plain form has kernels of its own for thin
    /// products.
    fn choose_form(&mut self) {
        const TRIES: usize = 5;
        let fastest = |product: &mut Self| {
            product.multiply();
            let time = |_| {
                let start = Instant::now();
                product.multiply();
                start.elapsed()
            };
            (0..TRIES).map(time).min()
        };
        let plain = fastest(self);
        let Shape { n, k, .. } = self.problem.shape;
        self.packed = Some(gemmkit::prepack_rhs(gemmkit::MatRef::from_row_major(&self.problem.b, k, n)));
        if fastest(self) > plain {
            self.packed = None;
        }
    }

    fn multiply(&mut self) {
        let GemmProblem { shape, a, b, .. } = self.problem;
        let Shape { m, n, k, .. } = *shape;
        let ([a_row, a_col], [b_row, b_col]) = (shape.a_strides(), shape.b_strides());
        let a = gemmkit::MatRef::new(a, m, k, a_row as isize, a_col as isize);
        if let Some(packed) = &self.packed {
            let c = gemmkit::MatMut::from_col_major(&mut self.c, m, n);
            gemmkit::gemm_packed_b(1.0, a, packed, 0.0, c, self.parallelism);
        } else {
            let b = gemmkit::MatRef::new(b, k, n, b_row as isize, b_col as isize);
            let c = gemmkit::MatMut::from_row_major(&mut self.c, m, n);
            gemmkit::gemm(1.0, a, b, 0.0, c, self.parallelism);
        }
    }
}

impl Workload for Product<'_> {
    fn run(&mut self) -> Result<(), HarnessError> {
        self.multiply();
        Ok(())
    }

    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
        if self.packed.is_none() {
            return Ok(vec![Cow::Borrowed(&self.c)]);
        }
        let Shape { m, n, .. } = self.problem.shape;
        Ok(vec![(0..m * n).map(|index| self.c[index / n + index % n * m]).collect()])
    }

    fn kernel(&self) -> String {
        if self.packed.is_some() { "gemm_packed_b".into() } else { "gemm".into() }
    }
}
