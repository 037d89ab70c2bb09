//! Keys and values copied into the order in which tiles read them.

use crate::view::MatRef;

/// Side of the square that is transposed in registers: four loads, eight shuffles, four stores.
const SIDE: usize = 4;

/// Writes the transpose of `src` [keys, dim] to `dst` [dim, stride]: `dst[d·stride + j] = src[j][d]`.
///
/// Columns from the number of keys on hold anything afterwards.
///
/// # Panics
/// When `stride` is smaller than the number of keys or `dst` than `dim·stride`.
#[inline(always)]
pub(super) fn transpose(src: MatRef<'_>, dst: &mut [f32], stride: usize) {
    let (keys, dim) = (src.rows(), src.cols());
    assert!(keys <= stride && dim * stride <= dst.len(), "{keys} keys of {dim} in {stride}");
    let mut first = 0;
    while first + SIDE <= stride && first < keys {
        // Where keys run out the last one stands in: its columns lie below `stride` and nobody reads them.
        let rows: [&[f32]; SIDE] = std::array::from_fn(|i| src.row((first + i).min(keys - 1)));
        let whole = dim / SIDE * SIDE;
        for d in (0..whole).step_by(SIDE) {
            // SAFETY: `d + SIDE` is at most `dim`, the length of each row.
            let square: [[f32; SIDE]; SIDE] = std::array::from_fn(|i| unsafe {
                rows[i].as_ptr().add(d).cast::<[f32; SIDE]>().read_unaligned()
            });
            let columns: [[f32; SIDE]; SIDE] = std::array::from_fn(|i| square.map(|row| row[i]));
            for (i, column) in columns.into_iter().enumerate() {
                // SAFETY: row `d + i` is below `dim` and columns `first..first + SIDE` below `stride`, so these are
                // elements of `dst`.
                unsafe {
                    let to = dst.as_mut_ptr().add((d + i) * stride + first);
                    to.cast::<[f32; SIDE]>().write_unaligned(column);
                }
            }
        }
        for d in whole..dim {
            dst[d * stride + first..][..SIDE].copy_from_slice(&rows.map(|row| row[d]));
        }
        first += SIDE;
    }
    for j in first..keys {
        for (d, &x) in src.row(j).iter().enumerate() {
            dst[d * stride + j] = x;
        }
    }
}

/// Elements from the first to the last row beyond which strided rows evict each other: where heads
/// interleave, rows lie a power of two apart and meet in few sets of the first-level cache.
const SPREAD: usize = 2048;

/// `src` itself when its rows lie close together, else a gapless copy of it in `dst`.
#[inline(always)]
pub(super) fn gather<'a>(src: MatRef<'a>, dst: &'a mut [f32]) -> MatRef<'a> {
    let (rows, cols) = (src.rows(), src.cols());
    if src.row_stride() == cols || rows * src.row_stride() <= SPREAD || cols == 0 {
        return src;
    }
    let dst = &mut dst[..rows * cols];
    for (i, to) in dst.chunks_exact_mut(cols).enumerate() {
        to.copy_from_slice(src.row(i));
    }
    MatRef::new(dst, rows, cols).expect("cut to rows × cols")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::uniform;

    #[test]
    fn every_element_is_in_its_place() {
        for (keys, dim) in [(1, 1), (3, 5), (4, 4), (5, 8), (8, 7), (9, 16), (13, 9)] {
            let data = uniform(keys * (dim + 2), 1);
            let src = MatRef::with_strides(&data, keys, dim, dim + 2, 1).unwrap();
            for stride in [keys, keys.next_multiple_of(8)] {
                let mut dst = vec![f32::NAN; dim * stride];
                transpose(src, &mut dst, stride);
                for (j, d) in (0..keys).flat_map(|j| (0..dim).map(move |d| (j, d))) {
                    assert_eq!(dst[d * stride + j], src.at(j, d), "{keys} {dim} {stride}");
                }
            }
        }
    }
}
