//! Which examples a step sees: shuffled by the seed, grouped by length, bounded by tokens.
//!
//! ```text
//! epoch e:  shuffle all examples with a generator seeded by (seed, e)
//!           for each pool of POOL examples: sort by source, then target length, up and down in turn;
//!                                           cut into batches of at most `max_tokens` padded tokens
//!           shuffle the batches
//! ```
//! Sorting inside a pool makes the members of a batch nearly equally long, so that little is padded;
//! the pool's limit keeps the batches random. The order of an epoch depends on (seed, epoch) alone: a
//! position is two numbers, and a resumed run sees what the uninterrupted one would have seen.

use serde::{Deserialize, Serialize};

use crate::random::SplitMix64;

/// Examples that are sorted by length together.
const POOL: usize = 16_384;

/// A source and its target, as ids without special tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// What is read.
    pub source: Vec<u32>,
    /// What is to be written.
    pub target: Vec<u32>,
}

/// The tokens that a source and a target take in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Lengths {
    source: usize,
    /// The end token included.
    target: usize,
}

impl Lengths {
    fn of(example: &Example) -> Lengths {
        Lengths { source: example.source.len(), target: example.target.len() + 1 }
    }

    /// An order in which neighbours are close on both sides: by source length, and from one source length to the
    /// next the targets go up and down in turn.
    fn snake(self) -> (usize, isize) {
        let target = self.target as isize;
        (self.source, if self.source.is_multiple_of(2) { target } else { -target })
    }

    fn max(self, other: Lengths) -> Lengths {
        Lengths { source: self.source.max(other.source), target: self.target.max(other.target) }
    }

    fn total(self) -> usize {
        self.source + self.target
    }
}

/// Where in the data a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Position {
    /// Passes over the data that are complete.
    pub epoch: u64,
    /// The next batch of the current pass.
    pub batch: usize,
}

/// The endless, reproducible sequence of batches.
#[derive(Debug, Clone)]
pub struct Batches {
    lengths: Vec<Lengths>,
    max_tokens: usize,
    seed: u64,
    position: Position,
    epoch_batches: Vec<Vec<u32>>,
}

impl Batches {
    /// Batches of at most `max_tokens` padded tokens (source and target together) over `examples`,
    /// from the beginning. An example that is longer than that makes a batch of its own.
    ///
    /// # Panics
    /// When `examples` is empty: there is no batch to give.
    pub fn new(examples: &[Example], max_tokens: usize, seed: u64) -> Batches {
        assert!(!examples.is_empty(), "there are no training examples");
        let lengths = examples.iter().map(Lengths::of).collect();
        let mut batches =
            Batches { lengths, max_tokens, seed, position: Position::default(), epoch_batches: Vec::new() };
        batches.plan();
        batches
    }

    /// Where the next batch stands.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Goes on from `position`.
    pub fn seek(&mut self, position: Position) {
        self.position = position;
        self.plan();
    }

    /// Batches in the current pass.
    pub fn per_epoch(&self) -> usize {
        self.epoch_batches.len()
    }

    /// The indices of the next batch's examples.
    pub fn next_indices(&mut self) -> Vec<u32> {
        if self.position.batch >= self.epoch_batches.len() {
            self.position = Position { epoch: self.position.epoch + 1, batch: 0 };
            self.plan();
        }
        let batch = self.epoch_batches[self.position.batch].clone();
        self.position.batch += 1;
        batch
    }

    fn plan(&mut self) {
        let mut rng = SplitMix64::new(self.seed ^ self.position.epoch.wrapping_mul(0xA076_1D64_78BD_642F));
        let mut order: Vec<u32> = (0..self.lengths.len() as u32).collect();
        rng.shuffle(&mut order);
        let length = |i: &u32| self.lengths[*i as usize];
        let mut batches = Vec::new();
        for pool in order.chunks_mut(POOL) {
            pool.sort_by_key(|i| length(i).snake()); // stable: ties stay shuffled
            let (mut start, mut width) = (0, Lengths { source: 0, target: 0 });
            for (i, next) in pool.iter().map(length).enumerate() {
                let wider = width.max(next);
                if i > start && wider.total() * (i + 1 - start) > self.max_tokens {
                    batches.push(pool[start..i].to_vec());
                    (start, width) = (i, next);
                } else {
                    width = wider;
                }
            }
            batches.push(pool[start..].to_vec());
        }
        rng.shuffle(&mut batches);
        self.epoch_batches = batches;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples(n: usize) -> Vec<Example> {
        (0..n).map(|i| Example { source: vec![4; 1 + i % 13], target: vec![5; 1 + (i * 7) % 11] }).collect()
    }

    fn padded_tokens(examples: &[Example], batch: &[u32]) -> usize {
        let lengths = batch.iter().map(|&i| Lengths::of(&examples[i as usize]));
        lengths.reduce(Lengths::max).unwrap().total() * batch.len()
    }

    #[test]
    fn an_epoch_shows_every_example_once_within_the_bound() {
        let examples = examples(1000);
        let mut batches = Batches::new(&examples, 200, 3);
        let mut seen = vec![0; examples.len()];
        for _ in 0..batches.per_epoch() {
            let batch = batches.next_indices();
            assert!(padded_tokens(&examples, &batch) <= 200);
            batch.iter().for_each(|&i| seen[i as usize] += 1);
        }
        assert!(seen.iter().all(|&n| n == 1));
    }

    #[test]
    fn an_example_longer_than_the_bound_stands_alone() {
        let mut batches = Batches::new(&examples(50), 1, 0);
        assert_eq!(batches.per_epoch(), 50);
        assert_eq!(batches.next_indices().len(), 1);
    }

    #[test]
    fn order_is_a_function_of_seed_and_position() {
        let examples = examples(500);
        let mut a = Batches::new(&examples, 150, 7);
        let first_epoch: Vec<_> = (0..a.per_epoch()).map(|_| a.next_indices()).collect();
        a.next_indices();
        let position = a.position();
        assert_eq!(position, Position { epoch: 1, batch: 1 });
        let mut b = Batches::new(&examples, 150, 7);
        b.seek(position);
        for _ in 0..100 {
            assert_eq!(a.next_indices(), b.next_indices());
        }
        let mut other = Batches::new(&examples, 150, 8);
        assert_ne!(first_epoch, (0..first_epoch.len()).map(|_| other.next_indices()).collect::<Vec<_>>());
        b.seek(Position { epoch: 1, batch: 0 });
        assert_ne!(first_epoch[0], b.next_indices(), "epochs differ");
    }

    #[test]
    fn batches_pad_little() {
        let examples = examples(40_000);
        let mut batches = Batches::new(&examples, 4000, 1);
        let (mut real, mut padded) = (0, 0);
        for _ in 0..batches.per_epoch() {
            let batch = batches.next_indices();
            padded += padded_tokens(&examples, &batch);
            real += batch.iter().map(|&i| Lengths::of(&examples[i as usize]).total()).sum::<usize>();
        }
        // Unsorted batches of this size would all be padded to the longest source and target.
        let unsorted = examples.len() * (13 + 11);
        assert!((padded - real) * 6 <= unsorted - real, "{padded} of {real}, unsorted {unsorted}");
    }
}
