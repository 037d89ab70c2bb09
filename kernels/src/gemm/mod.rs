//! The matrix product `C = activation(scale·A·B [+ C] + bias)∘gate + residual` in f32.
//!
//! # Naive form
//! ```text
//! for i in 0..m { for j in 0..n { for p in 0..k { c[i][j] += a[i][p] * b[p][j] } } }
//! ```
//! # Accuracy
//! `|ĉ − c| ≤ γ_k·(|A|·|B|)` element by element: each element is a chain of fused multiply-adds
//! over `p` within a block of K, and the blocks are added in order. The result has the same bits for
//! any number of threads, for a row alone or in any batch, and for plain or packed weights.
//!
//! A [`Precision`](crate::Precision) is a floor of accuracy. Kernels on vectors have an A in f32 and serve all of them. Where the CPU has
//! tiles and k is at least 32, `Highest` obeys the same bound with six products of bf16 parts, `High` adds `2⁻¹⁵·(1 + 2⁻⁸)·(|A|·|B|)` (about 2⁻¹⁷ on
//! random data) and `Medium` `2·2⁻⁸·(1 + 2⁻⁷)·(|A|·|B|)`, the rounding of both operands; all three take products below 2⁻¹²⁶
//! for zero, and elements below that too (`gemm::tests::tiles`). Where it has dot products of bf16 but no tiles, `Medium` uses those for every k, with
//! the same bound (`gemm::bf16_pairs`); the two others are f32 there. [`gemm_int8`], which rounds A to integers, is asked for by name.
//!
//! # Source
//! Goto and van de Geijn, *Anatomy of High-Performance Matrix Multiplication*, 2008; the macrokernel
//! and microkernel of Van Zee and van de Geijn, *BLIS*, 2015.

mod batched;
mod bf16_pairs;
mod blocking;
mod byte_tiles;
mod driver;
mod epilogue;
mod int8;
mod int8_int4;
mod int8_rows;
mod macrokernel;
pub(crate) mod microkernel;
mod mixed;
mod odd_elements;
mod operand;
mod pack;
mod packed;
pub(crate) mod pair_packing;
mod placement;
pub(crate) mod quantise;
pub(crate) mod split;
#[cfg(test)]
mod tests;
pub(crate) mod tile_packing;
mod tile_store;
mod tiles;

pub use crate::rowwise::Activation;
pub use batched::gemm_batched;
pub use epilogue::{Accum, Epilogue};
pub use int8::{gemm_int8, gemm_int8_sums, int8_kernel_name};
pub use int8_rows::{INT8_MAX_DEPTH, Int8Rows, Integers, UINT8_MAX_DEPTH};
pub use microkernel::{KernelInfo, Storage};
pub use operand::{Operand, Output};
pub use packed::PackedWeights;
pub use quantise::WeightFormat;

use crate::context::{Blocking, Context};
use crate::error::{ShapeError, expect_dim};
use crate::view::{MatMut, MatRef};
use macrokernel::{Problem, RightOperand};
use microkernel::kernel_for;

/// `C = activation(scale·A·B [+ C] + bias)∘gate + residual`, any strides, each matrix in f32 or bf16.
///
/// Numbers in bf16 are used as they are, and a C in bf16 is rounded once, when all is done: the result is that of the same numbers in f32. A plain
/// B beside a matrix in bf16 is packed as a whole first; what is used often is better packed beforehand ([`PackedWeights`]).
///
/// # Shapes
/// A `[m, k]`, B `[k, n]`, C `[m, n]`, bias `[n]`, gate and residual `[m, n]`. With k = 0 the product is 0.
///
/// # Errors
/// [`ShapeError`] when the shapes do not fit together; nothing has been read or written then.
///
/// # Accuracy
/// See the [module](self); asserted by `gemm::tests::the_error_is_within_gamma_k`.
pub fn gemm<'a, 'b, 'c>(
    ctx: &Context,
    a: impl Into<Operand<'a>>,
    b: impl Into<Operand<'b>>,
    c: impl Into<Output<'c>>,
    accum: Accum,
    epilogue: &Epilogue<'_>,
) -> Result<(), ShapeError> {
    match (a.into(), b.into(), c.into()) {
        (Operand::F32(a), Operand::F32(b), Output::F32(c)) => {
            product(ctx, a, RightOperand::Plain(b), c, accum, epilogue)
        }
        (a, b, c) => {
            check([a.rows(), a.cols()], [b.rows(), b.cols()], [c.rows(), c.cols()], epilogue)?;
            mixed::run(ctx, a, &mixed::pack(ctx, b)?, c, accum, epilogue);
            Ok(())
        }
    }
}

/// As [`gemm`] with weights that were packed beforehand: with the same bits where they are stored as f32 or their
/// elements are bf16.
///
/// # Errors
/// As [`gemm`], and [`ShapeError::PackedForAnotherKernel`].
///
/// # Accuracy
/// That of the [module](self) for the elements that the weights hold ([`PackedWeights::unpack`]), whatever their
/// format; what storing them rounded stands at [`WeightFormat`]. Asserted by
/// `gemm::tests::stored::the_error_is_within_gamma_k_of_the_stored_weights`.
pub fn gemm_packed<'a, 'c>(
    ctx: &Context,
    a: impl Into<Operand<'a>>,
    b: &PackedWeights,
    c: impl Into<Output<'c>>,
    accum: Accum,
    epilogue: &Epilogue<'_>,
) -> Result<(), ShapeError> {
    let kernel = kernel_for(ctx, b.rows(), b.format()).name;
    if b.kernel_name() != kernel {
        return Err(ShapeError::PackedForAnotherKernel {
            argument: "b",
            packed_for: b.kernel_name(),
            kernel,
        });
    }
    match (a.into(), c.into()) {
        (Operand::F32(a), Output::F32(c)) => product(ctx, a, RightOperand::Packed(b), c, accum, epilogue),
        (a, c) => {
            check([a.rows(), a.cols()], [b.rows(), b.cols()], [c.rows(), c.cols()], epilogue)?;
            mixed::run(ctx, a, b, c, accum, epilogue);
            Ok(())
        }
    }
}

/// The name of the kernel that `ctx` selects for operands in f32, for example `f32_6x16_avx2`. (With k below 32 a kernel on tiles is
/// never selected.)
pub fn kernel_name(ctx: &Context) -> &'static str {
    kernel_for(ctx, usize::MAX, WeightFormat::F32).name
}

/// Every kernel of this crate, whether or not this CPU can run it: the support matrix.
pub fn kernels() -> &'static [KernelInfo] {
    &microkernel::KERNELS
}

/// The shapes against each other.
fn check(a: [usize; 2], b: [usize; 2], c: [usize; 2], epilogue: &Epilogue<'_>) -> Result<(), ShapeError> {
    expect_dim("b", "rows", a[1], b[0])?;
    expect_dim("c", "rows", a[0], c[0])?;
    expect_dim("c", "cols", b[1], c[1])?;
    epilogue.check(a[0], b[1])
}

fn product(
    ctx: &Context,
    a: MatRef<'_>,
    b: RightOperand<'_>,
    mut c: MatMut<'_>,
    accum: Accum,
    epilogue: &Epilogue<'_>,
) -> Result<(), ShapeError> {
    let (k, n) = (b.rows(), b.cols());
    check([a.rows(), a.cols()], [k, n], [c.rows(), c.cols()], epilogue)?;
    let kernel = match b {
        RightOperand::Plain(_) => kernel_for(ctx, k, WeightFormat::F32),
        RightOperand::Packed(packed) => packed.kernel(),
    };
    let sizes = blocking::blocking(ctx, kernel);
    let kc = match b {
        RightOperand::Plain(_) => blocking::block_depth(k, sizes.kc, kernel),
        RightOperand::Packed(packed) => packed.depth(),
    };
    let blocking = Blocking { kc, ..sizes };
    let (row_stride, col_stride) = (c.row_stride(), c.col_stride());
    let c = microkernel::Out { ptr: c.as_mut_ptr(), row_stride, col_stride };
    driver::run(ctx, &Problem { kernel, a, b, n, c, accum, epilogue: *epilogue, blocking });
    Ok(())
}
