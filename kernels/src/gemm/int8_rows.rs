//! The left operand of products in int8: where its integers come from, and how a row of them is laid out for a kernel.
//!
//! Kernels multiply signed numbers with weights to which 128 was added. What that adds to a sum depends on the row alone and is subtracted from
//! it. An unsigned integer `u` with zero point `z` stands for `u − z`: 9 bits, which pairs of 16 bits hold as they are. Bytes do not: they hold
//! `u − 128`, and `(128 − z)·Σ_p r[p][j]` is added to the sum, for which packed weights keep the sums of their columns.

use super::microkernel::{Order, RowScale, Storage};
use super::quantise::scale_of;
use crate::error::{ShapeError, expect_dim};
use crate::view::MatRef;

/// Integers of 8 bits `[m, k]`, any strides.
#[derive(Debug, Clone, Copy)]
pub enum Integers<'a> {
    /// From −128 to 127, as they are.
    Signed(MatRef<'a, i8>),
    /// From 0 to 255, less what stands for zero.
    Unsigned {
        /// The integers.
        values: MatRef<'a, u8>,
        /// What stands for zero in each row `[m]`.
        zero_points: &'a [u8],
    },
}

impl<'a> From<MatRef<'a, i8>> for Integers<'a> {
    fn from(values: MatRef<'a, i8>) -> Self {
        Integers::Signed(values)
    }
}

impl Integers<'_> {
    fn shape(&self) -> (usize, usize) {
        match self {
            Integers::Signed(values) => (values.rows(), values.cols()),
            Integers::Unsigned { values, .. } => (values.rows(), values.cols()),
        }
    }

    /// The largest k for which every sum fits 32 bits.
    fn max_depth(&self) -> usize {
        match self {
            Integers::Signed(_) => INT8_MAX_DEPTH,
            Integers::Unsigned { .. } => UINT8_MAX_DEPTH,
        }
    }
}

/// The largest k of signed integers: `128·128·k` must stay below 2³¹.
pub const INT8_MAX_DEPTH: usize = 131_071;
/// The largest k of unsigned integers: `255·128·k` must stay below 2³¹.
pub const UINT8_MAX_DEPTH: usize = 65_793;

/// The left operand of [`gemm_int8`](super::gemm_int8).
#[derive(Debug, Clone, Copy)]
pub enum Int8Rows<'a> {
    /// Each row is quantised by its own largest element: `a[i][p] ≈ s[i]·q[i][p]`, `|q| ≤ 127`.
    Quantise(MatRef<'a>),
    /// As `Quantise` with `|q| ≤ 63`: twice the step, and faster on CPUs with AVX2 that have no dot products of bytes, where two products
    /// of such a byte and a weight fit 16 bits. The result has the same bits on every instruction set.
    Quantise7(MatRef<'a>),
    /// Already integers, and a scale for each row.
    Given {
        /// The integers `[m, k]`.
        values: Integers<'a>,
        /// The scales `[m]`.
        scales: &'a [f32],
    },
}

impl Int8Rows<'_> {
    pub(super) fn shape(&self) -> (usize, usize) {
        match self {
            Int8Rows::Quantise(a) | Int8Rows::Quantise7(a) => (a.rows(), a.cols()),
            Int8Rows::Given { values, .. } => values.shape(),
        }
    }

    /// What a kernel reads: integers of 7 bits are bytes of 8, too.
    pub(super) fn storage(&self) -> Storage {
        match self {
            Int8Rows::Quantise7(_) => Storage::Int7,
            Int8Rows::Quantise(_) | Int8Rows::Given { .. } => Storage::Int8,
        }
    }

    /// `Ok` when the numbers of scales and zero points fit, and every sum of products too.
    pub(super) fn check(&self) -> Result<(), ShapeError> {
        let (m, k) = self.shape();
        let max_depth = match self {
            Int8Rows::Quantise(_) | Int8Rows::Quantise7(_) => INT8_MAX_DEPTH,
            Int8Rows::Given { values, .. } => values.max_depth(),
        };
        if k > max_depth {
            let expected = match max_depth {
                INT8_MAX_DEPTH => "at most 131071 columns, whose sums fit 32 bits",
                _ => "at most 65793 columns of unsigned integers, whose sums fit 32 bits",
            };
            return Err(ShapeError::Value { argument: "a.cols", value: k.to_string(), expected });
        }
        if let Int8Rows::Given { values, scales } = self {
            expect_dim("scales", "elements", m, scales.len())?;
            if let Integers::Unsigned { zero_points, .. } = values {
                expect_dim("zero_points", "elements", m, zero_points.len())?;
            }
        }
        Ok(())
    }
}

/// Row `i` in an order, block of K by block.
#[inline(always)]
pub(super) fn quantise_row(
    a: Int8Rows<'_>,
    i: usize,
    depth: usize,
    order: Order,
    (staging, words): (&mut [f32], &mut [u32]),
) -> RowScale {
    let mut sum = 0u32;
    let (scale, shift) = quantise_blocks(
        a,
        i,
        depth,
        order,
        (staging, words),
        #[inline(always)]
        |of_block| sum = sum.wrapping_add(of_block),
    );
    RowScale { scale, excess: sum.wrapping_mul(128), shift }
}

/// Row `i` in an order, block of K by block: `each` is given the sum of every block, modulo 2³². Returns the row's scale, and what each
/// element has too little where bytes hold unsigned rows.
#[inline(always)]
pub(super) fn quantise_blocks(
    a: Int8Rows<'_>,
    i: usize,
    depth: usize,
    order: Order,
    (staging, words): (&mut [f32], &mut [u32]),
    mut each: impl FnMut(u32),
) -> (f32, u32) {
    let mut shift = 0;
    let (row, scale, inverse): (&[f32], f32, f32) = match a {
        Int8Rows::Given { values: Integers::Signed(values), scales } => {
            staging.iter_mut().zip(0..).for_each(|(x, p)| *x = f32::from(values.at(i, p)));
            (staging, scales[i], 1.0)
        }
        Int8Rows::Given { values: Integers::Unsigned { values, zero_points }, scales } => {
            let held = if order == Order::Bytes { 128 } else { zero_points[i] };
            shift = u32::from(held).wrapping_sub(u32::from(zero_points[i]));
            let difference = |x: u8| f32::from(i16::from(x) - i16::from(held));
            staging.iter_mut().zip(0..).for_each(|(x, p)| *x = difference(values.at(i, p)));
            (staging, scales[i], 1.0)
        }
        Int8Rows::Quantise(values) | Int8Rows::Quantise7(values) => {
            let row = if values.col_stride() == 1 {
                values.row(i)
            } else {
                staging.iter_mut().zip(0..).for_each(|(x, p)| *x = values.at(i, p));
                staging
            };
            // As integers the magnitudes are ordered, infinity and NaN last.
            let largest = row.iter().map(|x| x.to_bits() & 0x7fff_ffff).fold(0, u32::max);
            let largest = f32::from_bits(largest);
            let scale = if largest.is_finite() { scale_of(largest, a.storage().largest()) } else { f32::NAN };
            (row, scale, 1.0 / scale)
        }
    };
    let mut to = words;
    for block in row.chunks(depth) {
        let (here, rest) = to.split_at_mut(order.words() * block.len().div_ceil(order.elements()));
        each(integers_of(block, inverse, order, here));
        to = rest;
    }
    (scale, shift)
}

/// Writes one block's integers and returns their sum, modulo 2³².
#[inline(always)]
fn integers_of(row: &[f32], inverse: f32, order: Order, to: &mut [u32]) -> u32 {
    match order {
        Order::Pairs => pairs_in_order(row, inverse, to),
        Order::Bytes => bytes_in_order(row, inverse, to),
        Order::Nibbles => lay_out(
            row,
            inverse,
            to,
            #[inline(always)]
            |q: [u32; 8]| [bytes([q[0], q[2], q[4], q[6]]), bytes([q[1], q[3], q[5], q[7]])],
        ),
    }
}

#[inline(always)]
fn bytes(q: [u32; 4]) -> u32 {
    (q[0] & 0xff) | (q[1] & 0xff) << 8 | (q[2] & 0xff) << 16 | q[3] << 24
}

/// 1.5·2²³: the last place of its neighbours is 1.
const ROUND: f32 = 12_582_912.0;

/// The integer next to `x·inverse`, ties to even, modulo 2³².
#[inline(always)]
fn integer(x: f32, inverse: f32) -> u32 {
    (x * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits())
}

/// Integers of a turn, which lie in the first-level cache between loops that all become vectors; one loop for all did not.
const TURN: usize = 256;

/// Writes the pairs of even and of odd elements of each four, and returns the sum of all, modulo 2³². Zeros fill the last ones up.
#[inline(always)]
fn pairs_in_order(row: &[f32], inverse: f32, to: &mut [u32]) -> u32 {
    let mut sum = 0u32;
    for (elements, to) in row.chunks(TURN).zip(to.chunks_mut(TURN / 2)) {
        let mut halves = [0u16; TURN];
        for (half, x) in halves.iter_mut().zip(elements) {
            *half = integer(*x, inverse) as u16;
        }
        sum = halves.iter().fold(sum, |sum, half| sum.wrapping_add(*half as i16 as u32));
        // The two in the middle change places.
        for (to, four) in to.as_chunks_mut::<2>().0.iter_mut().zip(halves.as_chunks::<4>().0) {
            let [a, b, c, d] = four.map(u32::from);
            *to = [a | c << 16, b | d << 16];
        }
    }
    sum
}

/// Writes four integers a word, and returns the sum of all, modulo 2³². Zeros fill the last word up.
#[inline(always)]
fn bytes_in_order(row: &[f32], inverse: f32, to: &mut [u32]) -> u32 {
    let mut integers = [0; TURN];
    let mut sum = 0u32;
    let to = pulp::bytemuck::cast_slice_mut::<u32, u8>(to);
    for (elements, to) in row.chunks(TURN).zip(to.chunks_mut(TURN)) {
        let integers = &mut integers[..elements.len()];
        for (q, x) in integers.iter_mut().zip(elements) {
            *q = integer(*x, inverse);
        }
        sum = integers.iter().fold(sum, |sum, q| sum.wrapping_add(*q));
        let (bytes, rest) = to.split_at_mut(integers.len());
        for (byte, q) in bytes.iter_mut().zip(integers) {
            *byte = *q as u8;
        }
        rest.fill(0);
    }
    sum
}

/// Writes W words for each E elements, and returns the sum of all integers, modulo 2³². Zeros fill the last ones up.
#[inline(always)]
fn lay_out<const E: usize, const W: usize>(
    row: &[f32],
    inverse: f32,
    to: &mut [u32],
    words_of: impl Fn([u32; E]) -> [u32; W],
) -> u32 {
    let (whole, rest) = row.as_chunks::<E>();
    let mut last = [0.0; E];
    last[..rest.len()].copy_from_slice(rest);
    let tail = (!rest.is_empty()).then_some(&last);
    let mut sum = 0u32;
    for (elements, to) in whole.iter().chain(tail).zip(to.as_chunks_mut::<W>().0) {
        let q = elements.map(
            #[inline(always)]
            |x| integer(x, inverse),
        );
        sum = q.iter().fold(sum, |sum, q| sum.wrapping_add(*q));
        *to = words_of(q);
    }
    sum
}
