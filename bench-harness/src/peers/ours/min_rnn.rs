//! minGRU and minLSTM layers by `kavanam-kernels`: one product over all steps, then the scan.

use std::borrow::Cow;

use kavanam_kernels::gemm::{self, Accum, Epilogue};
use kavanam_kernels::memory::AlignedVec;
use kavanam_kernels::rnn::Direction;
use kavanam_kernels::rnn::min_rnn::{self, Candidate, MinCell, Scan, Upstream};
use kavanam_kernels::rowwise::reduce;
use kavanam_kernels::{Context, MatMut, MatRef, ShapeError};

use crate::cases::rnn::Problem;
use crate::error::HarnessError;
use crate::measure::workload::Workload;

/// Allocates the outputs.
pub(super) fn prepare(
    problem: &Problem,
    cell: MinCell,
    context: Context,
) -> Result<Box<dyn Workload + '_>, ShapeError> {
    let shape = problem.shape;
    Ok(Box::new(Layer {
        problem,
        cell,
        context,
        gates: AlignedVec::filled(shape.seq * shape.batch * shape.gate_rows(), f32::NAN),
        y: AlignedVec::filled(shape.elements(), f32::NAN),
        d_x: AlignedVec::filled(shape.elements(), f32::NAN),
        d_weight: AlignedVec::zeroed(shape.gate_rows() * shape.width),
        d_bias: AlignedVec::zeroed(shape.gate_rows()),
        sums: AlignedVec::zeroed(shape.gate_rows()),
    }))
}

struct Layer<'a> {
    problem: &'a Problem,
    cell: MinCell,
    context: Context,
    gates: AlignedVec<f32>,
    y: AlignedVec<f32>,
    d_x: AlignedVec<f32>,
    /// Every call adds to the gradients of weight and bias, as accumulated gradients do.
    d_weight: AlignedVec<f32>,
    d_bias: AlignedVec<f32>,
    /// The bias's gradient of one call.
    sums: AlignedVec<f32>,
}

impl Layer<'_> {
    fn compute(&mut self) -> Result<(), ShapeError> {
        let Problem { shape, x, d_y, w_ih, b_ih, lengths, .. } = self.problem;
        let (ctx, rows, columns, width) =
            (&self.context, shape.seq * shape.batch, shape.gate_rows(), shape.width);
        let (x, w) = (MatRef::new(x, rows, width)?, MatRef::new(w_ih, columns, width)?);
        let bias = Epilogue::default().bias(b_ih);
        gemm::gemm(ctx, x, w.t(), MatMut::new(&mut self.gates, rows, columns)?, Accum::Overwrite, &bias)?;
        let scan = Scan {
            cell: self.cell,
            candidate: Candidate::Linear,
            hidden: width,
            seq: shape.seq,
            lengths,
            direction: Direction::Forward,
        };
        min_rnn::forward(ctx, &scan, &mut self.gates, None, &mut self.y, None)?;
        if !shape.train {
            return Ok(());
        }
        let upstream = Upstream { initial: None, y: &self.y, d_y, d_last: None };
        min_rnn::backward(ctx, &scan, &upstream, &mut self.gates, None)?;
        let (d_sums, plain) = (MatRef::new(&self.gates, rows, columns)?, Epilogue::default());
        gemm::gemm(ctx, d_sums, w, MatMut::new(&mut self.d_x, rows, width)?, Accum::Overwrite, &plain)?;
        let d_weight = MatMut::new(&mut self.d_weight, columns, width)?;
        gemm::gemm(ctx, d_sums.t(), x, d_weight, Accum::Add, &plain)?;
        reduce::col_sum(ctx, d_sums, &mut self.sums)?;
        self.d_bias.iter_mut().zip(&self.sums).for_each(|(d_bias, sum)| *d_bias += sum);
        Ok(())
    }
}

impl Workload for Layer<'_> {
    fn run(&mut self) -> Result<(), HarnessError> {
        Ok(self.compute()?)
    }

    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
        Ok(vec![Cow::Borrowed(&self.y), Cow::Borrowed(&self.d_x)])
    }

    fn kernel(&self) -> String {
        gemm::kernel_name(&self.context).to_owned()
    }
}
