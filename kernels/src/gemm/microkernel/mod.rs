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

pub(crate) mod amx;
pub(crate) mod bf16_block;
mod bf16_dots;
mod bf16_products;
mod bytes;
#[cfg(target_arch = "x86_64")]
mod dots;
mod finish;
mod nibbles;
mod outer_product;
mod pairs;
pub(crate) mod prefetch;
#[cfg(target_arch = "x86_64")]
mod sevens;
mod stored;

use std::marker::PhantomData;

use pulp::{Simd, WithSimd};

pub(crate) use bf16_dots::{
    Bf16Kernel, Bf16Strip, Bf16Visitor, GROUP as PAIR_GROUP, PairRows, with_bf16_kernel,
};
pub(crate) use bf16_products::{Bf16Products, Halves, WORDS};
pub(crate) use bytes::{
    ByteKernel, ByteProducts, ByteStrip, ByteVisitor, Order, PROOF, RowScale, Sink, WordBlock,
    with_byte_kernel, with_nibble_kernel, with_seven_kernel,
};
#[cfg(all(test, target_arch = "x86_64"))]
pub(crate) use dots::plain::with_plain_dots;
pub(crate) use finish::Tile;
pub(crate) use nibbles::{Chains, GroupStrip};
use outer_product::OuterProduct;
pub use stored::Storage;
pub(crate) use stored::{Bf16, F32, Int4, Int8, Stored};

use crate::context::{Context, Precision};
use crate::gemm::WeightFormat;
use crate::isa::{Isa, IsaName};
use crate::rowwise::Activation;
use crate::view::MatRef;

/// One row of the table of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelInfo {
    /// `{type}_{MR}x{NR}_{isa}`, as in logs, JSON and tests; `w` after a type says that only B is stored so.
    pub name: &'static str,
    /// The instruction set that it needs.
    pub isa: IsaName,
    /// How it reads A: as f32, as integers of 8 or 7 bits with a scale a row, or as bf16 parts.
    pub left: Storage,
    /// How it reads B.
    pub storage: Storage,
    /// The most exact precision that it serves. It serves the others too: precision is a floor.
    pub precision: Precision,
    /// Rows of C in one tile.
    pub mr: usize,
    /// Columns of C in one tile.
    pub nr: usize,
    /// f32 lanes of one of its vectors.
    pub lanes: usize,
    /// K is cut into blocks at multiples of it.
    pub k_step: usize,
}

/// The tile of an ISA: rows, columns, lanes.
const SCALAR: (IsaName, [usize; 3]) = (IsaName::Scalar, [4, 4, 1]);
const NEON: (IsaName, [usize; 3]) = (IsaName::Neon, [8, 12, 4]);
const AVX2: (IsaName, [usize; 3]) = (IsaName::Avx2, [6, 16, 8]);
/// Beside int4 sums of 16 bits need registers of their own, beside rows of 7 bits the products on their way to 32 bits.
const AVX2_FOUR_ROWS: (IsaName, [usize; 3]) = (IsaName::Avx2, [4, 16, 8]);
const AVX512: (IsaName, [usize; 3]) = (IsaName::Avx512, [8, 48, 16]);
/// Beside int4 the places of eight rows and of the words are more addresses than there are registers.
const AVX512_SIX_ROWS: (IsaName, [usize; 3]) = (IsaName::Avx512, [6, 48, 16]);
/// Those with dot products of bytes have the tiles of their vectors, so that packed weights serve both.
const AVX2_VNNI: (IsaName, [usize; 3]) = (IsaName::Avx2Vnni, AVX2.1);
const AVX512_VNNI: (IsaName, [usize; 3]) = (IsaName::Avx512Vnni, AVX512.1);
const AVX512_BF16: (IsaName, [usize; 3]) = (IsaName::Avx512Bf16, AVX512.1);

/// A kernel with f32 sums and a f32 left operand.
const fn f32_sums(
    name: &'static str,
    storage: Storage,
    (isa, [mr, nr, lanes]): (IsaName, [usize; 3]),
) -> KernelInfo {
    let (left, precision) = (Storage::F32, Precision::Strict);
    KernelInfo { name, isa, left, storage, precision, mr, nr, lanes, k_step: 1 }
}

/// A kernel on tiles, with f32 sums of products of bf16 parts.
const fn tile_sums(name: &'static str, storage: Storage, precision: Precision) -> KernelInfo {
    let (mr, nr, k_step) = (amx::BLOCK, amx::BLOCK, amx::STEP);
    KernelInfo { name, isa: IsaName::Amx, left: storage, storage, precision, mr, nr, lanes: 16, k_step }
}

/// A kernel on vectors, with f32 sums of products of bf16 pairs.
const fn pair_sums(name: &'static str, tile: (IsaName, [usize; 3])) -> KernelInfo {
    let (left, precision) = (Storage::Bf16, Precision::Medium);
    KernelInfo { left, precision, k_step: 2, ..f32_sums(name, Storage::Bf16, tile) }
}

/// A kernel with i32 sums of int8 products. What is rounded is A, and the caller asks for it by name.
const fn i32_sums(name: &'static str, storage: Storage, tile: (IsaName, [usize; 3])) -> KernelInfo {
    KernelInfo { left: Storage::Int8, ..f32_sums(name, storage, tile) }
}

/// Every kernel of this crate, whether or not this CPU can run it.
pub(crate) const KERNELS: [KernelInfo; 34] = [
    f32_sums("f32_4x4_scalar", Storage::F32, SCALAR),
    f32_sums("f32_8x12_neon", Storage::F32, NEON),
    f32_sums("f32_6x16_avx2", Storage::F32, AVX2),
    f32_sums("f32_8x48_avx512", Storage::F32, AVX512),
    f32_sums("bf16w_4x4_scalar", Storage::Bf16, SCALAR),
    f32_sums("bf16w_8x12_neon", Storage::Bf16, NEON),
    f32_sums("bf16w_6x16_avx2", Storage::Bf16, AVX2),
    f32_sums("bf16w_8x48_avx512", Storage::Bf16, AVX512),
    f32_sums("int8w_4x4_scalar", Storage::Int8, SCALAR),
    f32_sums("int8w_8x12_neon", Storage::Int8, NEON),
    f32_sums("int8w_6x16_avx2", Storage::Int8, AVX2),
    f32_sums("int8w_8x48_avx512", Storage::Int8, AVX512),
    f32_sums("int4w_4x4_scalar", Storage::Int4, SCALAR),
    f32_sums("int4w_8x12_neon", Storage::Int4, NEON),
    f32_sums("int4w_6x16_avx2", Storage::Int4, AVX2),
    f32_sums("int4w_8x48_avx512", Storage::Int4, AVX512),
    i32_sums("int8_4x4_scalar", Storage::Int8, SCALAR),
    i32_sums("int8_8x12_neon", Storage::Int8, NEON),
    i32_sums("int8_6x16_avx2", Storage::Int8, AVX2),
    i32_sums("int8_6x16_avx2vnni", Storage::Int8, AVX2_VNNI),
    i32_sums("int8_8x48_avx512", Storage::Int8, AVX512),
    i32_sums("int8_8x48_avx512vnni", Storage::Int8, AVX512_VNNI),
    KernelInfo { left: Storage::Int7, ..i32_sums("int7_4x16_avx2", Storage::Int8, AVX2_FOUR_ROWS) },
    i32_sums("int8_int4w_4x4_scalar", Storage::Int4, SCALAR),
    i32_sums("int8_int4w_8x12_neon", Storage::Int4, NEON),
    i32_sums("int8_int4w_4x16_avx2", Storage::Int4, AVX2_FOUR_ROWS),
    i32_sums("int8_int4w_6x16_avx2vnni", Storage::Int4, AVX2_VNNI),
    i32_sums("int8_int4w_6x48_avx512", Storage::Int4, AVX512_SIX_ROWS),
    i32_sums("int8_int4w_8x48_avx512vnni", Storage::Int4, AVX512_VNNI),
    pair_sums("bf16_8x48_avx512bf16", AVX512_BF16),
    tile_sums("bf16_32x32_amx", Storage::Bf16, Precision::Medium),
    tile_sums("bf16x2_32x32_amx", Storage::Split2, Precision::High),
    tile_sums("bf16x3_32x32_amx", Storage::Split3, Precision::Highest),
    i32_sums("int8_32x48_amx", Storage::Int8, (IsaName::Amx, [amx::BLOCK, AVX512.1[1], 16])),
];

/// The kernel of that instruction set for rows of 8 or 7 bits and weights in int8 or int4: where there is none for 7, the one for 8 has the
/// same bits.
pub(crate) fn int8_kernel_of(isa: Isa, rows: Storage, weights: Storage) -> &'static KernelInfo {
    let on_tiles = isa.tiles().is_some() && weights == Storage::Int8;
    let name = if on_tiles { IsaName::Amx } else { isa.bytes() };
    let of = |rows: Storage| {
        KERNELS.iter().find(|kernel| (kernel.isa, kernel.left, kernel.storage) == (name, rows, weights))
    };
    of(rows).or_else(|| of(Storage::Int8)).expect("the table has one for each instruction set")
}

/// The depth from which on tiles keep the bound of f32 for [`Precision::Highest`]; below it a step would be padding too.
const TILES_MIN_DEPTH: usize = amx::STEP;

/// The kernel that `ctx` selects for an A in f32 and a B of `depth` rows that is asked for in that format. It depends on the
/// instruction set, the precision, the format and k, never on the number of rows.
pub(crate) fn kernel_for(ctx: &Context, depth: usize, format: WeightFormat) -> &'static KernelInfo {
    let precision = ctx.matmul_precision();
    let rounded = match format {
        WeightFormat::F32 => precision != Precision::Strict,
        WeightFormat::Bf16 => precision == Precision::Medium,
        WeightFormat::Int8 | WeightFormat::Int4 { .. } => false,
    };
    if ctx.isa().tiles().is_some() && rounded && depth >= TILES_MIN_DEPTH {
        let found = KERNELS.iter().find(|k| k.isa == IsaName::Amx && k.precision == precision);
        return found.expect("the table has one for each precision");
    }
    if ctx.isa().bf16_dots().is_some() && rounded && precision == Precision::Medium {
        let found = KERNELS.iter().find(|k| k.isa == IsaName::Avx512Bf16);
        return found.expect("the table has one");
    }
    kernel_of(ctx.isa(), format.storage())
}

/// The kernel on vectors of that instruction set for a left operand in f32 and a right operand that is stored so.
pub(crate) fn kernel_of(isa: Isa, storage: Storage) -> &'static KernelInfo {
    // A table, because a search is a tenth of the time of a 16 × 16 × 16 product.
    static ON_VECTORS: [[&KernelInfo; IsaName::ALL.len()]; 4] = on_vectors();
    ON_VECTORS[storage as usize][isa.vectors() as usize]
}

/// For each storage and each set, in the order of their names, the row of the table; the first one where the set has none of its own.
const fn on_vectors() -> [[&'static KernelInfo; IsaName::ALL.len()]; 4] {
    let mut found = [[&KERNELS[0]; IsaName::ALL.len()]; 4];
    let mut i = 0;
    while i < KERNELS.len() {
        let kernel = &KERNELS[i];
        if kernel.left as usize == Storage::F32 as usize {
            found[kernel.storage as usize][kernel.isa as usize] = kernel;
        }
        i += 1;
    }
    found
}

/// The kernel whose vectors have that many lanes, for a right operand that is stored so.
const fn kernel_with_lanes(lanes: usize, storage: Storage) -> &'static KernelInfo {
    let mut i = 0;
    while KERNELS[i].lanes != lanes || KERNELS[i].storage as u8 != storage as u8 {
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

/// Panels of the right operand: word (q, j) of panel `r` lies at `r · panel_stride + q · depth_stride + j`, and
/// holds elements of column `j` as [`Stored`] says. Where the form is scaled, `group` is the depth of its groups, each
/// of which begins with a row of scales.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rhs {
    pub(crate) ptr: *const u32,
    pub(crate) depth_stride: usize,
    pub(crate) panel_stride: usize,
    pub(crate) group: usize,
    /// Whether the next panel follows this one and lies in no near cache.
    pub(crate) far: bool,
}

/// The part of C that a strip writes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Out<T> {
    pub(crate) ptr: *mut T,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl<T> Out<T> {
    /// The same from element (`row`, `col`) on.
    #[inline(always)]
    pub(crate) fn from(self, row: usize, col: usize) -> Out<T> {
        let offset = row * self.row_stride + col * self.col_stride;
        Out { ptr: self.ptr.wrapping_add(offset), ..self }
    }
}

/// What is done to the accumulators before the store; bias, gate and residual start at the first element of what they
/// are done to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Finish<'a> {
    pub(crate) scale: f32,
    pub(crate) add: bool,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) activation: Activation,
    pub(crate) gate: Option<MatRef<'a>>,
    pub(crate) residual: Option<MatRef<'a>>,
}

impl<'a> Finish<'a> {
    /// The same from column `first` on.
    #[inline(always)]
    fn after_col(&self, first: usize) -> Finish<'a> {
        let rest = |matrix: Option<MatRef<'a>>| matrix.map(|m| m.sub(0..m.rows(), first..m.cols()));
        let (gate, residual) = (rest(self.gate), rest(self.residual));
        Finish { bias: self.bias.map(|bias| &bias[first..]), gate, residual, ..*self }
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
    pub(crate) rhs: Rhs,
    pub(crate) out: Out<K::Out>,
    pub(crate) finish: Finish<'a>,
}

/// A kernel: how one strip of C is computed. See the module's text for the contract.
pub(crate) trait Microkernel: Copy {
    /// Element of the left operand as the kernel reads it.
    type Lhs: Copy;
    /// How the right operand is stored.
    type Rhs: Stored;
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
    /// As in the table.
    const NAME: &'static str;

    /// Computes one strip.
    ///
    /// # Safety
    /// - `lhs` reaches `rows × depth` readable elements, the last tile being `rows % MR` high, and
    ///   has a depth stride of 1 or, where `rhs` is stored as f32, a row stride of 1;
    /// - `rhs` reaches `depth` rows of `cols` readable elements in panels of NR, rounded up to whole vectors where
    ///   it is stored as f32, else to whole panels;
    /// - `out` reaches `rows × cols` elements that no one else uses meanwhile, readable if
    ///   `finish.add` is set;
    /// - bias, gate and residual, if any, have `cols` elements and `rows × cols`.
    unsafe fn run(self, strip: &Strip<'_, Self>);
}

/// Something to be done with the kernel of an ISA, inside the ISA's shell.
pub(crate) trait KernelVisitor {
    /// What comes of it.
    type Output;
    /// Does it. Must be `#[inline(always)]`, or it is compiled outside of the shell.
    fn visit<K: Microkernel<Lhs = f32, Out = f32>>(self, kernel: K) -> Self::Output;
}

/// Runs `visitor` with the kernel of `isa` for a right operand that is stored so.
#[inline]
pub(crate) fn with_kernel<V: KernelVisitor>(isa: Isa, storage: Storage, visitor: V) -> V::Output {
    match storage {
        Storage::F32 => isa.dispatch(Select::<V, F32>(visitor, PhantomData)),
        Storage::Bf16 => isa.dispatch(Select::<V, Bf16>(visitor, PhantomData)),
        Storage::Int8 => isa.dispatch(Select::<V, Int8>(visitor, PhantomData)),
        Storage::Int4 => isa.dispatch(Select::<V, Int4>(visitor, PhantomData)),
        Storage::Int7 => unreachable!("no weights are stored so"),
        Storage::Split2 | Storage::Split3 => unreachable!("{storage:?} is for tiles"),
    }
}

/// Picks the tile by the width of the vectors.
struct Select<V, T>(V, PhantomData<T>);

impl<V: KernelVisitor, T: Stored> WithSimd for Select<V, T> {
    type Output = V::Output;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> V::Output {
        match S::F32_LANES {
            1 => self.0.visit(OuterProduct::<S, T, 4, 4>(simd, PhantomData)),
            8 => self.0.visit(OuterProduct::<S, T, 6, 2>(simd, PhantomData)),
            _ => self.0.visit(OuterProduct::<S, T, 8, 3>(simd, PhantomData)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Shape;
    impl KernelVisitor for Shape {
        type Output = (&'static str, usize, usize, usize);
        #[inline(always)]
        fn visit<K: Microkernel<Lhs = f32, Out = f32>>(self, _: K) -> Self::Output {
            (K::NAME, K::MR, K::NR, <K::Simd as Simd>::F32_LANES)
        }
    }

    #[test]
    fn the_kernel_that_runs_is_the_one_in_the_table() {
        for isa in Isa::available() {
            let in_f32 = KERNELS.iter().filter(|info| info.left == Storage::F32);
            let of_isa: Vec<_> = in_f32.filter(|info| info.isa == isa.vectors()).collect();
            assert_eq!(of_isa.len(), 4);
            for info in of_isa {
                assert_eq!(kernel_of(isa, info.storage), info);
                let shape = (info.name, info.mr, info.nr, info.lanes);
                assert_eq!(with_kernel(isa, info.storage, Shape), shape);
                assert!(info.name.ends_with(&format!("_{}x{}_{}", info.mr, info.nr, isa.vectors())));
            }
        }
    }

    struct ByteShape<'a>(&'a mut [usize; 3]);
    impl ByteVisitor for ByteShape<'_> {
        #[inline(always)]
        fn visit<P: ByteProducts, const MR: usize, const VECS: usize>(self, _: ByteKernel<P, MR, VECS>) {
            *self.0 = [MR, ByteKernel::<P, MR, VECS>::NR, P::Simd::F32_LANES];
        }
    }

    #[test]
    fn int8_on_both_sides_has_the_tiles_of_int8_weights() {
        for isa in Isa::available() {
            if isa.tiles().is_some() {
                continue;
            }
            let rows = Storage::Int8;
            let (info, weights) = (int8_kernel_of(isa, rows, Storage::Int8), kernel_of(isa, Storage::Int8));
            assert_eq!((info.mr, info.nr, info.lanes), (weights.mr, weights.nr, weights.lanes));
            let mut shape = [0; 3];
            with_byte_kernel(isa, ByteShape(&mut shape));
            assert_eq!(shape, [info.mr, info.nr, info.lanes]);
            assert_eq!(info.name, format!("int8_{}x{}_{}", info.mr, info.nr, isa.bytes()));
        }
    }

    #[test]
    fn rows_of_seven_bits_have_a_kernel_of_their_own_where_it_is_faster() {
        for isa in Isa::available() {
            let [of_seven, of_eight] =
                [Storage::Int7, Storage::Int8].map(|rows| int8_kernel_of(isa, rows, Storage::Int8));
            assert_eq!(int8_kernel_of(isa, Storage::Int7, Storage::Int4).left, Storage::Int8);
            if isa.bytes() != IsaName::Avx2 {
                assert_eq!(of_seven, of_eight);
                continue;
            }
            assert_eq!(of_seven.name, "int7_4x16_avx2");
            let mut shape = [0; 3];
            with_seven_kernel(isa, ByteShape(&mut shape));
            assert_eq!(shape, [of_seven.mr, of_seven.nr, of_seven.lanes]);
        }
    }

    #[test]
    fn int8_beside_int4_has_the_panels_of_int4_weights() {
        for isa in Isa::available() {
            let rows = Storage::Int8;
            let (info, weights) = (int8_kernel_of(isa, rows, Storage::Int4), kernel_of(isa, Storage::Int4));
            assert_eq!((info.nr, info.lanes), (weights.nr, weights.lanes));
            let mut shape = [0; 3];
            with_nibble_kernel(isa, ByteShape(&mut shape));
            assert_eq!(shape, [info.mr, info.nr, info.lanes]);
            assert_eq!(info.name, format!("int8_int4w_{}x{}_{}", info.mr, info.nr, isa.bytes()));
        }
    }
}
