//! Matrix products by `kavanam-kernels`.

use std::borrow::Cow;

use half::bf16;
use kavanam_kernels::gemm::{
    Accum, Epilogue, Int8Rows, PackedWeights, WeightFormat, gemm, gemm_int8, gemm_packed, int8_kernel_name,
};
use kavanam_kernels::memory::AlignedVec;
use kavanam_kernels::{Context, MatMut, MatRef, Precision, ShapeError};

use crate::cases::gemm::{Layout, Problem, RowBits, Shape};
use crate::error::HarnessError;
use crate::measure::workload::Workload;

/// Packs B where the case says so; the rest of the work is inside the clock.
pub(super) fn prepare(problem: &Problem, context: Context) -> Result<Box<dyn Workload + '_>, ShapeError> {
    let Shape { m, n, k, layout, .. } = problem.shape;
    let ([a_row, a_col], [b_row, b_col]) = (problem.shape.a_strides(), problem.shape.b_strides());
    let a = MatRef::with_strides(&problem.a, m, k, a_row, a_col)?;
    let b = MatRef::with_strides(&problem.b, k, n, b_row, b_col)?;
    let format = match layout {
        Layout::Packed => Some(WeightFormat::F32),
        Layout::Stored(format) | Layout::Rounded(_, format) => Some(format),
        Layout::Halves => return halves(problem, context),
        _ => None,
    };
    let packed = format.map(|format| PackedWeights::pack_as(&context, b, format)).transpose()?;
    let packed = packed.map_or_else(Vec::new, |packed| vec![packed; problem.copies]);
    let c = AlignedVec::filled(m * n, f32::NAN);
    Ok(Box::new(Product { context, a, b, packed, next: 0, shape: problem.shape, c }))
}

/// All in bf16, which is what Medium rounds to.
fn halves(problem: &Problem, context: Context) -> Result<Box<dyn Workload + '_>, ShapeError> {
    let Shape { m, n, k, .. } = problem.shape;
    let context = context.precision(Precision::Medium);
    let b = MatRef::new(&problem.b, k, n)?;
    let packed = PackedWeights::pack_as(&context, b, WeightFormat::Bf16)?;
    let a = problem.a.iter().map(|x| bf16::from_f32(*x)).collect();
    Ok(Box::new(Halves {
        context,
        a,
        packed,
        shape: problem.shape,
        c: vec![bf16::NAN; m * n],
        wide: Vec::new(),
    }))
}

struct Halves {
    context: Context,
    a: Vec<bf16>,
    packed: PackedWeights,
    shape: Shape,
    c: Vec<bf16>,
    wide: Vec<f32>,
}

impl Workload for Halves {
    fn run(&mut self) -> Result<(), HarnessError> {
        let Shape { m, n, k, .. } = self.shape;
        let (a, c) = (MatRef::new(&self.a, m, k)?, MatMut::new(&mut self.c, m, n)?);
        gemm_packed(&self.context, a, &self.packed, c, Accum::Overwrite, &Epilogue::default())?;
        Ok(())
    }

    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
        self.wide = self.c.iter().map(|x| x.to_f32()).collect();
        Ok(vec![Cow::Borrowed(&self.wide)])
    }

    fn kernel(&self) -> String {
        self.packed.kernel_name().to_owned()
    }
}

/// A, to be rounded to so many bits.
fn rows(a: MatRef<'_>, bits: RowBits) -> Int8Rows<'_> {
    match bits {
        RowBits::Eight => Int8Rows::Quantise(a),
        RowBits::Seven => Int8Rows::Quantise7(a),
    }
}

struct Product<'a> {
    context: Context,
    a: MatRef<'a>,
    b: MatRef<'a>,
    /// Copies of B, none where it is used as it is.
    packed: Vec<PackedWeights>,
    /// The one for the next call.
    next: usize,
    shape: Shape,
    c: AlignedVec<f32>,
}

impl Workload for Product<'_> {
    fn run(&mut self) -> Result<(), HarnessError> {
        let c = MatMut::new(&mut self.c, self.shape.m, self.shape.n);
        let epilogue = Epilogue::default();
        let done = c.and_then(|c| match (self.packed.get(self.next), self.shape.layout) {
            (Some(packed), Layout::Rounded(bits, _)) => {
                gemm_int8(&self.context, rows(self.a, bits), packed, c, Accum::Overwrite, &epilogue)
            }
            (Some(packed), _) => gemm_packed(&self.context, self.a, packed, c, Accum::Overwrite, &epilogue),
            (None, _) => gemm(&self.context, self.a, self.b, c, Accum::Overwrite, &epilogue),
        });
        self.next = (self.next + 1) % self.packed.len().max(1);
        Ok(done?)
    }

    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
        Ok(vec![Cow::Borrowed(&self.c)])
    }

    fn kernel(&self) -> String {
        if let Layout::Rounded(bits, format) = self.shape.layout {
            return int8_kernel_name(&self.context, &rows(self.a, bits), format).to_owned();
        }
        let of_context = || kavanam_kernels::gemm::kernel_name(&self.context);
        self.packed.first().map_or_else(of_context, PackedWeights::kernel_name).to_owned()
    }
}
