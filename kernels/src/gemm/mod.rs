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
//! for zero, and elements below that too (`gemm::tests::tiles`). [`gemm_int8`], which rounds A to integers, is asked for by name.
//!
//! # Source
//! Goto and van de Geijn, *Anatomy of High-Performance Matrix Multiplication*, 2008; the macrokernel
//! and microkernel of Van Zee and van de Geijn, *BLIS*, 2015.

mod batched;
mod blocking;
mod byte_tiles;
mod driver;
mod epilogue;
mod int8;
mod macrokernel;
pub(crate) mod microkernel;
mod pack;
mod packed;
mod placement;
pub(crate) mod quantise;
mod split;
#[cfg(test)]
mod tests;
mod tiles;

pub use crate::rowwise::Activation;
pub use batched::gemm_batched;
pub use epilogue::{Accum, Epilogue};
pub use int8::{INT8_MAX_DEPTH, Int8Rows, gemm_int8, int8_kernel_name};
pub use microkernel::{KernelInfo, Storage};
pub use packed::PackedWeights;
pub use quantise::WeightFormat;

use crate::context::{Blocking, Context};
use crate::error::{ShapeError, expect_dim};
use crate::view::{MatMut, MatRef};
use macrokernel::{Problem, RightOperand};
use microkernel::kernel_for;

/// `C = activation(scale·A·B [+ C] + bias)∘gate + residual`, any strides.
///
/// # Shapes
/// A `[m, k]`, B `[k, n]`, C `[m, n]`, bias `[n]`, gate and residual `[m, n]`. With k = 0 the product is 0.
///
/// # Errors
/// [`ShapeError`] when the shapes do not fit together; nothing has been read or written then.
///
/// # Accuracy
/// See the [module](self); asserted by `gemm::tests::the_error_is_within_gamma_k`.
pub fn gemm(
    ctx: &Context,
    a: MatRef<'_>,
    b: MatRef<'_>,
    c: MatMut<'_>,
    accum: Accum,
    epilogue: &Epilogue<'_>,
) -> Result<(), ShapeError> {
    product(ctx, a, RightOperand::Plain(b), c, accum, epilogue)
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
pub fn gemm_packed(
    ctx: &Context,
    a: MatRef<'_>,
    b: &PackedWeights,
    c: MatMut<'_>,
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
    product(ctx, a, RightOperand::Packed(b), c, accum, epilogue)
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

fn product(
    ctx: &Context,
    a: MatRef<'_>,
    b: RightOperand<'_>,
    mut c: MatMut<'_>,
    accum: Accum,
    epilogue: &Epilogue<'_>,
) -> Result<(), ShapeError> {
    let (k, n) = (b.rows(), b.cols());
    expect_dim("b", "rows", a.cols(), k)?;
    expect_dim("c", "rows", a.rows(), c.rows())?;
    expect_dim("c", "cols", n, c.cols())?;
    epilogue.check(a.rows(), n)?;
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
