//! [`Tensor`]: a shape and contiguous row-major f32 values, cheap to clone.

use std::sync::Arc;

use kavanam_kernels::error::expect_dim;
use kavanam_kernels::{MatRef, ShapeError};

/// A row-major tensor without gaps. Clones share the values, which never change.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    data: Arc<Vec<f32>>,
}

impl Tensor {
    /// A tensor of that shape.
    ///
    /// # Errors
    /// [`ShapeError`] when `data` does not hold exactly the product of `shape`.
    pub fn new(shape: &[usize], data: Vec<f32>) -> Result<Tensor, ShapeError> {
        let elements = shape
            .iter()
            .try_fold(1usize, |product, &n| product.checked_mul(n))
            .ok_or(ShapeError::Overflow { argument: "shape" })?;
        expect_dim("data", "elements", elements, data.len())?;
        Ok(Tensor { shape: shape.to_vec(), data: Arc::new(data) })
    }

    /// The sizes of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The values, the last axis fastest.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// The last axis' size (1 for a scalar).
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The product of all axes but the last.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// Row `i` of the tensor seen as `rows × cols`.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row(&self, i: usize) -> &[f32] {
        let cols = self.cols();
        &self.data[i * cols..(i + 1) * cols]
    }

    /// The tensor seen as `rows × cols`.
    pub fn as_mat(&self) -> MatRef<'_> {
        MatRef::new(&self.data, self.rows(), self.cols()).expect("the constructor checked the size")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shape_and_data_must_agree() {
        assert!(Tensor::new(&[2, 3], vec![0.0; 5]).is_err());
        assert!(matches!(Tensor::new(&[usize::MAX, 2], vec![]), Err(ShapeError::Overflow { .. })));
        let t = Tensor::new(&[2, 1, 3], (0..6).map(|i| i as f32).collect()).unwrap();
        assert_eq!((t.rows(), t.cols()), (2, 3));
        assert_eq!(t.row(1), [3.0, 4.0, 5.0]);
        assert_eq!(t.as_mat().at(1, 2), 5.0);
    }
}
