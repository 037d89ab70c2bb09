//! Block lists: which blocks of keys each block of query rows sees.
//!
//! A list costs what its blocks cost: nothing looks at a block that is not listed, so a pattern with a fixed number
//! of blocks a row is linear in the length. Both directions are kept, rows to keys for the output and dQ, keys to
//! rows for dK and dV.

use std::ops::Range;

use crate::error::{ShapeError, expect_dim};
use crate::random::split_mix;

/// Which blocks of keys each block of query rows sees, in ascending order. A block that is listed twice counts
/// twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockList {
    block: usize,
    keys_of: Csr,
    rows_of: Csr,
}

/// Lists of indices, one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Csr {
    starts: Vec<usize>,
    indices: Vec<usize>,
}

impl Csr {
    fn new(lists: &[Vec<usize>]) -> Csr {
        let mut starts = vec![0];
        starts.extend(lists.iter().scan(0, |sum, list| {
            *sum += list.len();
            Some(*sum)
        }));
        Csr { starts, indices: lists.concat() }
    }

    fn list(&self, index: usize) -> &[usize] {
        &self.indices[self.starts[index]..self.starts[index + 1]]
    }
}

/// Which blocks BigBird's middle rows see besides their window and the two global blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BigBird {
    /// `random` blocks of each row, drawn from those that it does not see yet.
    Paper {
        /// Blocks to draw.
        random: usize,
        /// The seed of the draw.
        seed: u64,
    },
    /// What the published implementation computes when it does not train: its random indices are all 0, so that
    /// block 0 counts `1 + random` times.
    HfEval {
        /// The times that block 0 counts more.
        random: usize,
    },
}

impl BlockList {
    /// `lists[i]` names the key blocks, of `key_blocks`, that block `i` of `block` query rows sees.
    ///
    /// # Errors
    /// [`ShapeError`] when the block is empty, or a list names a block that does not exist.
    pub fn new(block: usize, key_blocks: usize, lists: &[Vec<usize>]) -> Result<BlockList, ShapeError> {
        if block == 0 {
            let expected = "at least 1";
            return Err(ShapeError::Value { argument: "block", value: "0".into(), expected });
        }
        let mut lists = lists.to_vec();
        let mut rows_of = vec![Vec::new(); key_blocks];
        for (position, list) in lists.iter_mut().enumerate() {
            list.sort_unstable();
            for &index in list.iter() {
                let rows = rows_of.get_mut(index);
                let len = key_blocks;
                rows.ok_or(ShapeError::Index { argument: "lists", position, index, len })?.push(position);
            }
        }
        Ok(BlockList { block, keys_of: Csr::new(&lists), rows_of: Csr::new(&rows_of) })
    }

    /// BigBird's pattern over `blocks` blocks of `block` positions, for an encoder: the first and last rows see all;
    /// the others see the window of three blocks around them, the first and the last block, and what `rule` adds.
    /// The second row and its mirror image have the window {0, 1, 2} of their end.
    ///
    /// # Errors
    /// [`ShapeError`] when the block is empty.
    ///
    /// # Source
    /// Zaheer et al. 2020, arXiv:2007.14062, section 2 and appendix D.
    pub fn bigbird(block: usize, blocks: usize, rule: BigBird) -> Result<BlockList, ShapeError> {
        let list = |row: usize| -> Vec<usize> {
            if row == 0 || row + 1 == blocks {
                return (0..blocks).collect();
            }
            let mut list = vec![0, row - 1, row, row + 1, blocks - 1];
            list.sort_unstable();
            list.dedup();
            match rule {
                BigBird::HfEval { random } => list.extend(std::iter::repeat_n(0, random)),
                BigBird::Paper { random, seed } => {
                    let mut free: Vec<usize> = (0..blocks).filter(|j| !list.contains(j)).collect();
                    let mut state = seed ^ (row as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                    for _ in 0..random.min(free.len()) {
                        list.push(free.swap_remove((split_mix(&mut state) % free.len() as u64) as usize));
                    }
                }
            }
            list
        };
        BlockList::new(block, blocks, &(0..blocks).map(list).collect::<Vec<_>>())
    }

    /// Positions of one block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// The key blocks that one block of rows sees.
    pub fn keys(&self, rows: usize) -> &[usize] {
        self.keys_of.list(rows)
    }

    /// The list fits these lengths.
    pub(super) fn check(&self, seq_q: usize, seq_k: usize) -> Result<(), ShapeError> {
        let [rows, keys] = [&self.keys_of, &self.rows_of].map(|csr| csr.starts.len() - 1);
        expect_dim("mask.blocks", "blocks of rows", seq_q.div_ceil(self.block), rows)?;
        expect_dim("mask.blocks", "blocks of keys", seq_k.div_ceil(self.block), keys)
    }

    /// The list has rows and keys for `positions` positions, or more.
    pub(super) fn check_reaches(&self, positions: usize) -> Result<(), ShapeError> {
        let [rows, keys] = [&self.keys_of, &self.rows_of].map(|csr| csr.starts.len() - 1);
        if rows.min(keys) < positions.div_ceil(self.block) {
            return Err(ShapeError::Value {
                argument: "mask.blocks",
                value: rows.min(keys).to_string(),
                expected: "blocks of rows and of keys for all positions",
            });
        }
        Ok(())
    }

    /// The keys that one block of rows sees, in pieces of at most `most`: listed blocks that are neighbours make
    /// one piece.
    #[inline]
    pub(super) fn pieces(&self, rows: usize, most: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut list = self.keys(rows);
        let mut rest = 0..0;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                let (&first, _) = list.split_first()?;
                let fits = (most / self.block).max(1);
                let run = (1..fits.min(list.len())).take_while(|&n| list[n] == first + n).count() + 1;
                list = &list[run..];
                rest = first * self.block..(first + run) * self.block;
            }
            let piece = rest.start..rest.end.min(rest.start + most);
            rest.start = piece.end;
            Some(piece)
        })
    }

    /// The rows of `rows` that see keys of block `key_block`, block of rows by block of rows.
    #[inline]
    pub(super) fn seers(
        &self,
        key_block: usize,
        rows: Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + '_ {
        self.rows_of.list(key_block).iter().filter_map(move |&i| {
            let seers = (i * self.block).max(rows.start)..((i + 1) * self.block).min(rows.end);
            (!seers.is_empty()).then_some(seers)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bigbird_is_its_definition() {
        let hf = BlockList::bigbird(64, 12, BigBird::HfEval { random: 3 }).unwrap();
        assert_eq!(hf.keys(0), (0..12).collect::<Vec<_>>());
        assert_eq!(hf.keys(1), [0, 0, 0, 0, 1, 2, 11]);
        assert_eq!(hf.keys(5), [0, 0, 0, 0, 4, 5, 6, 11]);
        assert_eq!(hf.keys(10), [0, 0, 0, 0, 9, 10, 11]);
        let paper = BlockList::bigbird(64, 12, BigBird::Paper { random: 3, seed: 7 }).unwrap();
        for row in 1..11 {
            let keys = paper.keys(row);
            assert!(keys.windows(2).all(|pair| pair[0] < pair[1]), "{keys:?}");
            assert!([0, row - 1, row, row + 1, 11].iter().all(|j| keys.contains(j)), "{keys:?}");
            assert_eq!(keys.len(), if row == 1 || row == 10 { 7 } else { 8 });
        }
        assert_eq!(paper, BlockList::bigbird(64, 12, BigBird::Paper { random: 3, seed: 7 }).unwrap());
        assert_ne!(paper, BlockList::bigbird(64, 12, BigBird::Paper { random: 3, seed: 8 }).unwrap());
        for blocks in 0..4 {
            BlockList::bigbird(64, blocks, BigBird::Paper { random: 3, seed: 7 }).unwrap();
        }
    }

    #[test]
    fn pieces_join_neighbours_and_seers_are_the_transpose() {
        let list = BlockList::new(4, 6, &[vec![5, 0, 1, 2], vec![2, 2, 3]]).unwrap();
        let pieces = |most| list.pieces(0, most).collect::<Vec<_>>();
        assert_eq!(pieces(8), [0..8, 8..12, 20..24]);
        assert_eq!(pieces(3), [0..3, 3..4, 4..7, 7..8, 8..11, 11..12, 20..23, 23..24]);
        assert_eq!(list.pieces(1, 100).collect::<Vec<_>>(), [8..12, 8..16]);
        assert_eq!(list.seers(2, 0..8).collect::<Vec<_>>(), [0..4, 4..8, 4..8]);
        assert_eq!(list.seers(2, 3..6).collect::<Vec<_>>(), [3..4, 4..6, 4..6]);
        assert!(BlockList::new(4, 5, &[vec![5]]).is_err());
        assert!(BlockList::new(0, 5, &[]).is_err());
        assert!(list.check(8, 24).is_ok() && list.check(9, 24).is_err() && list.check(8, 25).is_err());
    }
}
