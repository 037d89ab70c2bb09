//! Philox4x32-10 and dropout, one word at a time.

/// The four words that Philox4x32-10 makes of a counter and a key.
///
/// # Source
/// Salmon, Moraes, Dror and Shaw 2011, *Parallel Random Numbers: As Easy as 1, 2, 3*, section 3.3.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let first = 0xD251_1F53_u64 * u64::from(counter[0]);
        let second = 0xCD9E_8D57_u64 * u64::from(counter[2]);
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// Whether dropout keeps element `index`: word `(index mod 64)/16` of counter
/// `16·(index/64) + index mod 16` in the stream, if it is at least p·2³².
pub fn dropout_keeps(p: f64, seed: u64, stream: u64, index: u64) -> bool {
    let counter = index / 64 * 16 + index % 16;
    let halves = |x: u64| [x as u32, (x >> 32) as u32];
    let ([c0, c1], [c2, c3]) = (halves(counter), halves(stream));
    let words = philox4x32([c0, c1, c2, c3], halves(seed));
    f64::from(words[(index % 64 / 16) as usize]) >= (p * 4_294_967_296.0).floor()
}

/// Whether dropout of probabilities keeps that of `[sequence, head, query, key]`: word `(key mod 64)/16` of the counter
/// `[16·(key/64) + key mod 16, query, head, sequence]`, if it is at least p·2³². The key of the generator are the first two
/// words of the counter `[stream, 0, 0]` under the seed.
pub fn attention_dropout_keeps(p: f64, seed: u64, stream: u64, at: [usize; 4]) -> bool {
    let halves = |x: u64| [x as u32, (x >> 32) as u32];
    let [low, high] = halves(stream);
    let [first, second, ..] = philox4x32([low, high, 0, 0], halves(seed));
    let [sequence, head, query, key] = at.map(|x| x as u32);
    let counter = [key / 64 * 16 + key % 16, query, head, sequence];
    let words = philox4x32(counter, [first, second]);
    f64::from(words[(key % 64 / 16) as usize]) >= (p * 4_294_967_296.0).floor()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors of Random123's `kat_vectors`, philox4x32 with 10 rounds.
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }
}
