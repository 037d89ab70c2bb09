//! Rows and columns for which bf16 parts do not stand: what the right operand holds for them.
//!
//! Packing finds them block of K by block ([`super::tile_packing`]), and [`super::tiles`] computes what they make by f32 multiply-adds. A column is odd in blocks of K: there its
//! elements are those that were given; in the others they are the sums of their parts, as tiles see them. So a B that was packed beforehand, which keeps nothing else, gives the bits of one that
//! comes plain.

use std::ops::Range;

use super::macrokernel::RightOperand;
use super::microkernel::Storage;
use super::microkernel::amx::BLOCK;
use super::pack::Element;
use super::split::{Magnitudes, sum_of_parts};
use crate::view::MatRef;

/// The right operand as f32.
pub(super) struct RightElements<'a> {
    pub(super) of: RightOperand<'a>,
    pub(super) storage: Storage,
    /// The depth of the blocks of K.
    pub(super) kc: usize,
}

impl RightElements<'_> {
    /// Column `j`: in blocks of K in which it is odd as it was given, in the others as the sum of its parts.
    pub(super) fn column(&self, j: usize, k: usize) -> Vec<f32> {
        let b = match self.of {
            RightOperand::Packed(packed) => return (0..k).map(|p| packed.tile_element(p, j)).collect(),
            RightOperand::Plain(b) => b,
        };
        let mut elements: Vec<f32> = (0..k).map(|p| b.at(p, j)).collect();
        for block in elements.chunks_mut(self.kc) {
            if Magnitudes::of(block).fit(self.storage) {
                block.iter_mut().for_each(|x| *x = sum_of_parts(*x, self.storage.parts()));
            }
        }
        elements
    }
}

/// The columns of a packed operand for which parts do not stand, block of K by block.
#[derive(Debug, Clone, Default)]
pub(super) struct OddColumns(Vec<OddColumn>);

#[derive(Debug, Clone)]
struct OddColumn {
    col: usize,
    first: usize,
    elements: Vec<f32>,
}

impl OddColumns {
    /// Keeps the columns of `b`, whose first element is (`first`, 0) of the operand, that are marked.
    pub(super) fn keep<T: Element>(&mut self, b: MatRef<'_, T>, first: usize, odd: &[bool]) {
        for (col, _) in odd.iter().enumerate().filter(|(_, odd)| **odd) {
            let elements = (0..b.rows()).map(|p| b.at(p, col).widen()).collect();
            self.0.push(OddColumn { col, first, elements });
        }
    }

    /// Marks those of a panel, whatever the block of K.
    #[inline]
    pub(super) fn mark(&self, cols: &Range<usize>, odd: &mut [bool; BLOCK]) {
        for column in self.0.iter().filter(|c| cols.contains(&c.col)) {
            odd[column.col - cols.start] = true;
        }
    }

    /// Element (p, j), if it is in one of them.
    pub(super) fn element(&self, p: usize, j: usize) -> Option<f32> {
        let of_column = |c: &&OddColumn| c.col == j && (c.first..c.first + c.elements.len()).contains(&p);
        self.0.iter().find(of_column).map(|column| column.elements[p - column.first])
    }
}
