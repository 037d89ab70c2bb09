//! Right operands that are packed once and used often.

use pulp::Simd;

use super::blocking::{block_depth, blocking};
use super::macrokernel::packed_cols;
use super::microkernel::{KernelVisitor, Microkernel, kernel_of, with_kernel};
use super::pack::{Source, pack_panels};
use crate::context::Context;
use crate::error::ShapeError;
use crate::view::MatRef;

/// A right operand `[k, n]` in the order in which one kernel reads it.
///
/// It carries the identity of that kernel; [`super::gemm_packed`] refuses it under a context that
/// selects another one. K is cut as the packing context's blocking says.
#[derive(Debug, Clone)]
pub struct PackedWeights {
    data: Vec<f32>,
    rows: usize,
    cols: usize,
    depth: usize,
    kernel: &'static str,
}

impl PackedWeights {
    /// Packs `b` for the kernel that `ctx` selects.
    ///
    /// # Errors
    /// [`ShapeError::Overflow`] when the packed size does not fit in memory's address range.
    pub fn pack(ctx: &Context, b: MatRef<'_>) -> Result<Self, ShapeError> {
        let mut packed = PackedWeights { data: Vec::new(), rows: 0, cols: 0, depth: 1, kernel: "" };
        packed.repack(ctx, b)?;
        Ok(packed)
    }

    /// Packs other values, or another matrix, into the same memory: for weights that change each step.
    ///
    /// # Errors
    /// As [`PackedWeights::pack`]; then the old weights stand.
    pub fn repack(&mut self, ctx: &Context, b: MatRef<'_>) -> Result<(), ShapeError> {
        let kernel = kernel_of(ctx.isa().name());
        let overflow = ShapeError::Overflow { argument: "b" };
        let cols = b.cols().checked_next_multiple_of(kernel.lanes).ok_or(overflow.clone())?;
        let len = cols.checked_mul(b.rows()).filter(|&len| len <= isize::MAX as usize / 8).ok_or(overflow)?;
        self.data.resize(len, 0.0);
        (self.rows, self.cols) = (b.rows(), b.cols());
        self.depth = block_depth(b.rows(), blocking(ctx).kc);
        self.kernel = with_kernel(ctx.isa(), Pack { b, depth: self.depth, data: &mut self.data });
        Ok(())
    }

    /// k: the inner dimension.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// n: the columns of the product.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The kernel that it was packed for.
    pub fn kernel_name(&self) -> &'static str {
        self.kernel
    }

    /// The depth of the blocks of K.
    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    pub(super) fn data(&self) -> &[f32] {
        &self.data
    }
}

/// Packs all of `b`, block of K after block of K, and says for which kernel.
struct Pack<'a> {
    b: MatRef<'a>,
    depth: usize,
    data: &'a mut [f32],
}

impl KernelVisitor for Pack<'_> {
    type Output = &'static str;

    #[inline(always)]
    fn visit<K: Microkernel<Lhs = f32, Rhs = f32, Out = f32>>(self, _: K) -> &'static str {
        let lanes = <K::Simd as Simd>::F32_LANES;
        let (k, n) = (self.b.rows(), self.b.cols());
        let mut rest = self.data;
        for pc in (0..k).step_by(self.depth) {
            let depth = self.depth.min(k - pc);
            let part = self.b.sub(pc..pc + depth, 0..n);
            let (block, after) = rest.split_at_mut(packed_cols(n, lanes) * depth);
            rest = after;
            let source = Source {
                ptr: part.as_ptr(),
                depth_stride: part.row_stride(),
                lane_stride: part.col_stride(),
            };
            // SAFETY: the source is the view `part`.
            unsafe { pack_panels(source, depth, n, block, (K::NR, lanes)) };
        }
        K::NAME
    }
}
