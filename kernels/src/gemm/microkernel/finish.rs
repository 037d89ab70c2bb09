//! The epilogue of a tile: from accumulators to C.
//!
//! Whole vectors of contiguous rows stay in registers; a ragged or strided tile, and every tile of a kernel whose rhs is
//! narrower than f32, goes through memory a vector at a time, by the same operations in the same order.

use pulp::{Simd, WithSimd};

use super::{Activation, Finish, Out, Stored};
use crate::lanes;
use crate::view::MatRef;

/// A computed tile on its way to C: H × W vectors, of which the first `cols` columns count.
///
/// The order of operations on an element is the same wherever it stands: `scale`, old C, bias,
/// activation, gate, residual.
pub(crate) struct Tile<S: Simd, const H: usize, const W: usize> {
    pub(crate) simd: S,
    pub(crate) acc: [[S::f32s; W]; H],
}

impl<S: Simd, const H: usize, const W: usize> Tile<S, H, W> {
    /// Applies the strip's epilogue and stores; the tile's first row is row `first` of the strip. Where rhs is
    /// narrower than f32 the tile goes through memory: a fraction of what is spent on it, and one instance for all.
    ///
    /// # Safety
    /// Rows `first .. first + H` of `out`, and of bias, gate and residual if any, exist with `cols` columns.
    #[inline(always)]
    pub(crate) unsafe fn finish<T: Stored>(
        mut self,
        first: usize,
        cols: usize,
        finish: &Finish<'_>,
        out: Out<f32>,
    ) {
        let simd = self.simd;
        let of_c = [finish.gate, finish.residual];
        let contiguous = out.col_stride == 1 && of_c.iter().flatten().all(|matrix| matrix.col_stride() == 1);
        if const { T::PER_WORD > 1 } || cols < W * S::F32_LANES || !contiguous {
            // A copy, so that the tile itself stays in registers on the other path.
            let mut tile = self.acc;
            simd.vectorize(EdgeTile {
                simd,
                tile: tile.as_flattened_mut(),
                width: W,
                first,
                cols,
                finish,
                out,
            });
            return;
        }
        // SAFETY: the contract, with all W vectors whole and contiguous.
        unsafe {
            self.scale_and_add(first, finish, out);
            self.bias_and_activation(finish);
            self.residual_and_store(first, finish, out);
        }
    }

    /// # Safety
    /// As [`Tile::finish`], all vectors whole and contiguous.
    #[inline(always)]
    unsafe fn scale_and_add(&mut self, first: usize, finish: &Finish<'_>, out: Out<f32>) {
        let simd = self.simd;
        if finish.scale != 1.0 {
            let scale = simd.splat_f32s(finish.scale);
            for x in self.acc.as_flattened_mut() {
                *x = simd.mul_f32s(*x, scale);
            }
        }
        if finish.add {
            for (i, row) in self.acc.iter_mut().enumerate() {
                let old = out.ptr.wrapping_add((first + i) * out.row_stride).cast::<S::f32s>();
                for (w, x) in row.iter_mut().enumerate() {
                    // SAFETY: the contract on `out`.
                    *x = simd.add_f32s(unsafe { old.add(w).read_unaligned() }, *x);
                }
            }
        }
    }

    /// # Safety
    /// As [`Tile::finish`], all vectors whole.
    #[inline(always)]
    unsafe fn bias_and_activation(&mut self, finish: &Finish<'_>) {
        let simd = self.simd;
        if let Some(bias) = finish.bias {
            for w in 0..W {
                // SAFETY: the contract on the bias.
                let bias = unsafe { bias.as_ptr().cast::<S::f32s>().add(w).read_unaligned() };
                for row in &mut self.acc {
                    row[w] = simd.add_f32s(row[w], bias);
                }
            }
        }
        match finish.activation {
            Activation::Identity => {}
            Activation::Relu => {
                for x in self.acc.as_flattened_mut() {
                    *x = Activation::Relu.apply(simd, *x);
                }
            }
            activation => {
                // A copy, so that the tile itself stays in registers on the other paths.
                let mut tile = self.acc;
                simd.vectorize(Activate { simd, tile: tile.as_flattened_mut(), activation });
                self.acc = tile;
            }
        }
    }

    /// # Safety
    /// As [`Tile::finish`], all vectors whole and contiguous.
    #[inline(always)]
    unsafe fn residual_and_store(&mut self, first: usize, finish: &Finish<'_>, out: Out<f32>) {
        let simd = self.simd;
        if let Some(gate) = finish.gate {
            // SAFETY: the contract on the gate.
            unsafe {
                self.join(
                    first,
                    gate,
                    #[inline(always)]
                    |x, gate| simd.mul_f32s(x, gate),
                )
            };
        }
        if let Some(residual) = finish.residual {
            // SAFETY: the contract on the residual.
            unsafe {
                self.join(
                    first,
                    residual,
                    #[inline(always)]
                    |x, residual| simd.add_f32s(x, residual),
                )
            };
        }
        for (i, row) in self.acc.iter().enumerate() {
            let to = out.ptr.wrapping_add((first + i) * out.row_stride).cast::<S::f32s>();
            for (w, x) in row.iter().enumerate() {
                // SAFETY: the contract on `out`.
                unsafe { to.add(w).write_unaligned(*x) };
            }
        }
    }
}

impl<S: Simd, const H: usize, const W: usize> Tile<S, H, W> {
    /// Joins each element with that of a matrix of C's shape.
    ///
    /// # Safety
    /// Rows `first .. first + H` of `matrix` exist, whole vectors of them, contiguous.
    #[inline(always)]
    unsafe fn join(&mut self, first: usize, matrix: MatRef<'_>, with: impl Fn(S::f32s, S::f32s) -> S::f32s) {
        for (i, row) in self.acc.iter_mut().enumerate() {
            let from = matrix.as_ptr().wrapping_add((first + i) * matrix.row_stride()).cast::<S::f32s>();
            for (w, x) in row.iter_mut().enumerate() {
                // SAFETY: the contract.
                *x = with(*x, unsafe { from.add(w).read_unaligned() });
            }
        }
    }
}

/// One activation over a tile that lies in memory: a loop, where the register form would unroll a
/// polynomial MR·VECS times.
struct Activate<'a, S: Simd> {
    simd: S,
    tile: &'a mut [S::f32s],
    activation: Activation,
}

impl<S: Simd> WithSimd for Activate<'_, S> {
    type Output = ();

    #[inline(always)]
    fn with_simd<U: Simd>(self, _: U) {
        for x in self.tile {
            *x = self.activation.apply(self.simd, *x);
        }
    }
}

/// A tile that is not made of whole contiguous vectors of C: the same operations, one after the other over all vectors.
pub(super) struct EdgeTile<'a, S: Simd> {
    pub(super) simd: S,
    pub(super) tile: &'a mut [S::f32s],
    pub(super) width: usize,
    pub(super) first: usize,
    pub(super) cols: usize,
    pub(super) finish: &'a Finish<'a>,
    pub(super) out: Out<f32>,
}

impl<S: Simd> WithSimd for EdgeTile<'_, S> {
    type Output = ();

    #[inline(always)]
    fn with_simd<U: Simd>(mut self, _: U) {
        let Self { simd, finish, out, .. } = self;
        if finish.scale != 1.0 {
            let scale = simd.splat_f32s(finish.scale);
            self.for_each(
                #[inline(always)]
                |x, _, _, _| *x = simd.mul_f32s(*x, scale),
            );
        }
        if finish.add {
            self.for_each(
                #[inline(always)]
                |x, row, col, count| {
                    // SAFETY: `count` elements of C from (row, col).
                    *x = simd
                        .add_f32s(unsafe { load(simd, out.from(row, col).ptr, out.col_stride, count) }, *x);
                },
            );
        }
        if let Some(bias) = finish.bias {
            self.for_each(
                #[inline(always)]
                |x, _, col, count| {
                    *x = simd.add_f32s(*x, lanes::load_tail(simd, &bias[col..col + count]));
                },
            );
        }
        if finish.activation != Activation::Identity {
            self.for_each(
                #[inline(always)]
                |x, _, _, _| *x = finish.activation.apply(simd, *x),
            );
        }
        if let Some(gate) = finish.gate {
            self.for_each(
                #[inline(always)]
                |x, row, col, count| {
                    // SAFETY: `count` elements of the gate from (row, col).
                    *x = simd.mul_f32s(*x, unsafe { elements(simd, gate, (row, col), count) });
                },
            );
        }
        if let Some(residual) = finish.residual {
            self.for_each(
                #[inline(always)]
                |x, row, col, count| {
                    // SAFETY: `count` elements of the residual from (row, col).
                    *x = simd.add_f32s(*x, unsafe { elements(simd, residual, (row, col), count) });
                },
            );
        }
        self.for_each(
            #[inline(always)]
            |x, row, col, count| {
                // SAFETY: `count` elements of C from (row, col).
                unsafe { store(simd, *x, out.from(row, col).ptr, out.col_stride, count) };
            },
        );
    }
}

impl<S: Simd> EdgeTile<'_, S> {
    /// Does something with each vector, the row and column of its first element in the strip, and how many of its elements count.
    #[inline(always)]
    fn for_each(&mut self, mut step: impl FnMut(&mut S::f32s, usize, usize, usize)) {
        for (vectors, row) in self.tile.chunks_exact_mut(self.width).zip(self.first..) {
            for (vector, col) in vectors.iter_mut().zip((0..self.cols).step_by(S::F32_LANES)) {
                step(vector, row, col, S::F32_LANES.min(self.cols - col));
            }
        }
    }
}

/// `count` elements of a row of `matrix` from (row, col) on, and zeros.
///
/// # Safety
/// They exist.
#[inline(always)]
unsafe fn elements<S: Simd>(
    simd: S,
    matrix: MatRef<'_>,
    (row, col): (usize, usize),
    count: usize,
) -> S::f32s {
    let at = row * matrix.row_stride() + col * matrix.col_stride();
    // SAFETY: the contract.
    unsafe { load(simd, matrix.as_ptr().wrapping_add(at), matrix.col_stride(), count) }
}

/// `count` elements from `ptr`, `stride` apart, and zeros.
///
/// # Safety
/// They are readable.
#[inline(always)]
unsafe fn load<S: Simd>(simd: S, ptr: *const f32, stride: usize, count: usize) -> S::f32s {
    if stride == 1 && count == S::F32_LANES {
        // SAFETY: the contract, for a whole vector.
        unsafe { ptr.cast::<S::f32s>().read_unaligned() }
    } else if stride == 1 {
        // SAFETY: the contract.
        lanes::load_tail(simd, unsafe { std::slice::from_raw_parts(ptr, count) })
    } else {
        let mut vector = simd.splat_f32s(0.0);
        let lanes = std::ptr::from_mut(&mut vector).cast::<f32>();
        for j in 0..count {
            // SAFETY: the contract; `j` is a lane of the vector.
            unsafe { *lanes.add(j) = *ptr.add(j * stride) };
        }
        vector
    }
}

/// The first `count` lanes of `vector` to `ptr`, `stride` apart.
///
/// # Safety
/// They are writable.
#[inline(always)]
unsafe fn store<S: Simd>(simd: S, vector: S::f32s, ptr: *mut f32, stride: usize, count: usize) {
    if stride == 1 && count == S::F32_LANES {
        // SAFETY: the contract, for a whole vector.
        unsafe { ptr.cast::<S::f32s>().write_unaligned(vector) }
    } else if stride == 1 {
        // SAFETY: the contract. The elements are initialised: they are part of a `MatMut`.
        lanes::store_tail(simd, unsafe { std::slice::from_raw_parts_mut(ptr, count) }, vector);
    } else {
        let lanes = std::ptr::from_ref(&vector).cast::<f32>();
        for j in 0..count {
            // SAFETY: the contract; `j` is a lane of the vector.
            unsafe { *ptr.add(j * stride) = *lanes.add(j) };
        }
    }
}
