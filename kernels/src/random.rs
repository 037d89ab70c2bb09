//! A small generator of numbers that are drawn one after the other: patterns of blocks, data of tests. Dropout draws by
//! position instead, in `rowwise`.

/// One step of SplitMix64.
///
/// # Source
/// Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 17.
pub(crate) fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
