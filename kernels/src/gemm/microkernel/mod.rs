//! The contract of a microkernel, and the one table of kernels that drives dispatch, tests,
//! benches and the README's support matrix.
//!
//! # What a kernel's author promises
//! - Element (i, j) is `Σ_p lhs[i][p]·rhs[p][j]`, `p` ascending, each step one multiply-add of the
//!   ISA into one accumulator that starts at 0. So the height and width of the tile in which an
//!   element is computed do not change its bits.
//! - [`Finish`] is applied to the accumulators before they are stored; C is read only if
//!   `finish.add` is set.
//! - Any number of rows with 1 to NR columns, few rows with any number of panels, any depth (0 included) work.

mod outer_product;

use pulp::{Simd, WithSimd};

pub(crate) use outer_product::OuterProduct;

use crate::context::Precision;
use crate::isa::{Isa, IsaName};
use crate::rowwise::Activation;
use crate::view::MatRef;

/// One row of the table of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelInfo {
    /// `{type}_{MR}x{NR}_{isa}`, as in logs, JSON and tests.
    pub name: &'static str,
    /// The instruction set that it needs.
    pub isa: IsaName,
    /// The most exact precision that it serves. It serves the others too: precision is a floor.
    pub precision: Precision,
    /// Rows of C in one tile.
    pub mr: usize,
    /// Columns of C in one tile.
    pub nr: usize,
    /// f32 lanes of one of its vectors.
    pub lanes: usize,
}

const fn f32_kernel(name: &'static str, isa: IsaName, mr: usize, nr: usize, lanes: usize) -> KernelInfo {
    KernelInfo { name, isa, precision: Precision::Strict, mr, nr, lanes }
}

/// Every kernel of this crate, whether or not this CPU can run it.
pub(crate) const KERNELS: [KernelInfo; 4] = [
    f32_kernel("f32_4x4_scalar", IsaName::Scalar, 4, 4, 1),
    f32_kernel("f32_8x12_neon", IsaName::Neon, 8, 12, 4),
    f32_kernel("f32_6x16_avx2", IsaName::Avx2, 6, 16, 8),
    f32_kernel("f32_8x48_avx512", IsaName::Avx512, 8, 48, 16),
];

/// The kernel of that instruction set.
pub(crate) const fn kernel_of(isa: IsaName) -> &'static KernelInfo {
    match isa {
        IsaName::Scalar => &KERNELS[0],
        IsaName::Neon => &KERNELS[1],
        IsaName::Avx2 => &KERNELS[2],
        IsaName::Avx512 => &KERNELS[3],
    }
}

/// The kernel whose vectors have that many lanes.
const fn kernel_with_lanes(lanes: usize) -> &'static KernelInfo {
    let mut i = 0;
    while KERNELS[i].lanes != lanes {
        i += 1;
    }
    &KERNELS[i]
}

/// Rows of the left operand as a kernel reads them: tile `t` starts `t · tile_stride` elements in;
/// its element (i, p) lies at `i · row_stride + p · depth_stride`.
///
/// One of the two strides must be 1: a row stride of 1 is a packed tile or a transposed matrix, a
/// depth stride of 1 a row-major matrix that is read in place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lhs<T> {
    pub(crate) ptr: *const T,
    pub(crate) tile_stride: usize,
    pub(crate) row_stride: usize,
    pub(crate) depth_stride: usize,
}

/// Panels of the right operand: element (p, j) of panel `q` lies at `q · panel_stride + p · depth_stride + j`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rhs<T> {
    pub(crate) ptr: *const T,
    pub(crate) depth_stride: usize,
    pub(crate) panel_stride: usize,
}

/// The part of C that a strip writes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Out<T> {
    pub(crate) ptr: *mut T,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

/// What is done to the accumulators before the store; bias and residual start at the first element of what they
/// are done to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Finish<'a> {
    pub(crate) scale: f32,
    pub(crate) add: bool,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) activation: Activation,
    pub(crate) residual: Option<MatRef<'a>>,
}

impl<'a> Finish<'a> {
    /// The same from column `first` on.
    #[inline(always)]
    fn after_col(&self, first: usize) -> Finish<'a> {
        let residual = self.residual.map(|r| r.sub(0..r.rows(), first..r.cols()));
        Finish { bias: self.bias.map(|bias| &bias[first..]), residual, ..*self }
    }
}

/// One call of a kernel: `rows × cols` elements of C over one block of K.
///
/// It has at most NR columns; or at most THIN_ROWS rows and any number of whole panels of NR columns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strip<'a, K: Microkernel> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) depth: usize,
    pub(crate) lhs: Lhs<K::Lhs>,
    pub(crate) rhs: Rhs<K::Rhs>,
    pub(crate) out: Out<K::Out>,
    pub(crate) finish: Finish<'a>,
}

/// A kernel: how one strip of C is computed. See the module's text for the contract.
pub(crate) trait Microkernel: Copy {
    /// Element of the left operand as the kernel reads it.
    type Lhs: Copy;
    /// Element of the right operand as the kernel reads it.
    type Rhs: Copy;
    /// Element of C.
    type Out: Copy;
    /// The vectors that it is made of; packing uses them too.
    type Simd: Simd;
    /// Rows of a tile.
    const MR: usize;
    /// Columns of a tile.
    const NR: usize;
    /// Up to so many rows, a strip may span several panels.
    const THIN_ROWS: usize;
    /// Depth is packed in multiples of this.
    const K_STEP: usize;
    /// As in the table.
    const NAME: &'static str;

    /// Computes one strip.
    ///
    /// # Safety
    /// - `lhs` reaches `rows × depth` readable elements, the last tile being `rows % MR` high, and
    ///   has a row stride or a depth stride of 1;
    /// - `rhs` reaches `depth` rows of `cols` readable elements, rounded up to whole vectors, in panels of NR;
    /// - `out` reaches `rows × cols` elements that no one else uses meanwhile, readable if
    ///   `finish.add` is set;
    /// - bias and residual, if any, have `cols` elements and `rows × cols`.
    unsafe fn run(self, strip: &Strip<'_, Self>);
}

/// Something to be done with the kernel of an ISA, inside the ISA's shell.
pub(crate) trait KernelVisitor {
    /// What comes of it.
    type Output;
    /// Does it. Must be `#[inline(always)]`, or it is compiled outside of the shell.
    fn visit<K: Microkernel<Lhs = f32, Rhs = f32, Out = f32>>(self, kernel: K) -> Self::Output;
}

/// Runs `visitor` with the kernel of `isa`.
#[inline]
pub(crate) fn with_kernel<V: KernelVisitor>(isa: Isa, visitor: V) -> V::Output {
    struct Select<V>(V);
    impl<V: KernelVisitor> WithSimd for Select<V> {
        type Output = V::Output;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> V::Output {
            match S::F32_LANES {
                1 => self.0.visit(OuterProduct::<S, 4, 4>(simd)),
                8 => self.0.visit(OuterProduct::<S, 6, 2>(simd)),
                _ => self.0.visit(OuterProduct::<S, 8, 3>(simd)),
            }
        }
    }
    isa.dispatch(Select(visitor))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Shape;
    impl KernelVisitor for Shape {
        type Output = (&'static str, usize, usize, usize);
        #[inline(always)]
        fn visit<K: Microkernel<Lhs = f32, Rhs = f32, Out = f32>>(self, _: K) -> Self::Output {
            (K::NAME, K::MR, K::NR, <K::Simd as Simd>::F32_LANES)
        }
    }

    #[test]
    fn the_kernel_that_runs_is_the_one_in_the_table() {
        for isa in Isa::available() {
            let info = kernel_of(isa.name());
            assert_eq!(with_kernel(isa, Shape), (info.name, info.mr, info.nr, info.lanes));
            assert_eq!(info.name, format!("f32_{}x{}_{isa}", info.mr, info.nr));
            assert_eq!(info.isa, isa.name());
        }
    }
}
