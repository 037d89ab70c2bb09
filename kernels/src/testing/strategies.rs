//! proptest strategies for shapes.

use proptest::prelude::*;

/// A size of at most `max`, small ones more often: 0 and 1 are frequent.
pub fn small_dim(max: usize) -> impl Strategy<Value = usize> {
    prop_oneof![1 => Just(0), 2 => Just(1), 4 => 0..=max.min(8), 8 => 0..=max]
}

/// A size next to a multiple of one of `edges` (vector lanes, tile heights, block depths): the
/// multiples 1 to 3, one less and one more, and 0 and 1.
pub fn straddle(edges: &[usize]) -> impl Strategy<Value = usize> + use<> {
    let mut sizes = vec![0, 1];
    for &edge in edges {
        for multiple in 1..=3 {
            sizes.extend([edge * multiple - 1, edge * multiple, edge * multiple + 1]);
        }
    }
    sizes.sort_unstable();
    sizes.dedup();
    prop::sample::select(sizes)
}
