//! Packing for tiles: parts, padding, every order of the elements, and lanes for which parts do not stand.

use half::bf16;

use crate::gemm::microkernel::Storage;
use crate::gemm::microkernel::amx::{SIDE, STEP, TILE_WORDS};
use crate::gemm::split::{column_words, right_element, sum_of_parts};
use crate::gemm::tile_packing::{pack_left, pack_right};
use crate::isa::{Bf16Dots, Isa};
use crate::testing::uniform;
use crate::view::MatRef;

/// Of the CPU, or in plain arithmetic.
fn proof() -> Option<Bf16Dots> {
    Isa::avx512_bf16_or_emulated().and_then(Isa::bf16_dots)
}

/// Ragged and whole, along the depth, across it, and in neither direction.
fn matrices(each: impl Fn(MatRef<'_>, &str)) {
    for (rows, cols) in [(1, 1), (2, 16), (15, 31), (16, 32), (17, 33), (33, 48), (64, 70), (140, 5)] {
        let data = uniform(2 * rows * cols, 3);
        each(MatRef::new(&data[..rows * cols], rows, cols).unwrap(), "along");
        each(MatRef::new(&data[..rows * cols], cols, rows).unwrap().t(), "across");
        each(MatRef::with_strides(&data, rows, cols, 2 * cols, 2).unwrap(), "apart");
    }
}

/// Element (i, p) of left tiles: the sum of its parts.
fn left_element<const P: usize>(tiles: &[u32], depth: usize, i: usize, p: usize) -> f32 {
    let tile = (i / SIDE * depth.div_ceil(STEP) + p / STEP) * P;
    let word = |part| tiles[(tile + part) * TILE_WORDS + i % SIDE * SIDE + p % STEP / 2];
    (0..P)
        .map(|part| {
            f32::from_bits(if p.is_multiple_of(2) { word(part) << 16 } else { word(part) >> 16 << 16 })
        })
        .sum()
}

fn check<const P: usize>(proof: Bf16Dots, matrix: MatRef<'_>, order: &str) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let expected = |x: f32| sum_of_parts(x, P);
    let context = format!("{P} parts of {rows} x {cols}, {order}");
    let mut tiles = vec![u32::MAX; rows.next_multiple_of(SIDE) * column_words(cols, P)];
    pack_left::<f32, P>(proof, matrix, &mut tiles, Storage::Bf16, &mut []);
    for i in 0..rows.next_multiple_of(SIDE) {
        for p in 0..cols.next_multiple_of(STEP) {
            let there = i < rows && p < cols;
            let x = if there { expected(matrix.at(i, p)) } else { 0.0 };
            assert_eq!(left_element::<P>(&tiles, cols, i, p), x, "left, {context}: {i}, {p}");
        }
    }
    let column = column_words(rows, P);
    let mut tiles = vec![u32::MAX; cols.next_multiple_of(2 * SIDE) * column];
    pack_right::<f32, P>(proof, matrix, &mut tiles, Storage::Bf16, &mut []);
    for j in 0..cols.next_multiple_of(2 * SIDE) {
        let panel = &tiles[j / (2 * SIDE) * 2 * SIDE * column..];
        for p in 0..rows.next_multiple_of(STEP) {
            let there = p < rows && j < cols;
            let x = if there { expected(matrix.at(p, j)) } else { 0.0 };
            assert_eq!(right_element(panel, P, p, j % (2 * SIDE)), x, "right, {context}: {p}, {j}");
        }
    }
}

#[test]
fn tiles_hold_the_parts_of_their_elements() {
    let Some(proof) = proof() else { return };
    matrices(|matrix, order| {
        check::<1>(proof, matrix, order);
        check::<2>(proof, matrix, order);
        check::<3>(proof, matrix, order);
    });
}

#[test]
fn bf16_is_packed_as_it_is() {
    let Some(proof) = proof() else { return };
    matrices(|matrix, order| {
        let halves: Vec<bf16> = (0..matrix.rows() * matrix.cols())
            .map(|i| bf16::from_f32(matrix.at(i / matrix.cols(), i % matrix.cols())))
            .collect();
        let halves = MatRef::new(&halves, matrix.rows(), matrix.cols()).unwrap();
        let [mut ours, mut theirs] = [(); 2]
            .map(|()| vec![u32::MAX; matrix.cols().next_multiple_of(32) * column_words(matrix.rows(), 1)]);
        pack_right::<bf16, 1>(proof, halves, &mut ours, Storage::Bf16, &mut []);
        pack_right::<f32, 1>(proof, matrix, &mut theirs, Storage::Bf16, &mut []);
        assert_eq!(ours, theirs, "{order}");
    });
}

#[test]
fn lanes_without_parts_are_marked() {
    let Some(proof) = proof() else { return };
    for (x, storage, is_odd) in [
        (f32::MAX, Storage::Split2, true),
        (f32::NAN, Storage::Split2, true),
        (f32::NEG_INFINITY, Storage::Split3, true),
        (1e-32, Storage::Split3, true),
        (1e-32, Storage::Split2, false),
        (0.0, Storage::Split3, false),
    ] {
        let mut data = uniform(20 * 40, 7);
        data[17 * 40 + 35] = x;
        let matrix = MatRef::new(&data, 20, 40).unwrap();
        let mut tiles = vec![0; 64 * column_words(40, 3)];
        let (mut rows, mut cols) = ([false; 20], [false; 40]);
        pack_left::<f32, 3>(proof, matrix, &mut tiles, storage, &mut rows);
        pack_right::<f32, 3>(proof, matrix, &mut tiles, storage, &mut cols);
        for (i, odd) in rows.iter().enumerate() {
            assert_eq!(*odd, is_odd && i == 17, "row {i} with {x:e}");
        }
        for (j, odd) in cols.iter().enumerate() {
            assert_eq!(*odd, is_odd && j == 35, "column {j} with {x:e}");
        }
    }
}
