//! Products of rows of 7 bits with int8 weights by multiply-adds of bytes (`vpmaddubsw`), for vectors of 256 bits without dot products of
//! bytes. The kernel around them is in `bytes`, their loop that of `dots`.
//!
//! # Naive form
//! ```text
//! for q in 0..words { for t in 0..4 { sum[i][j] += lhs[i][4·q + t] * word[q][j].byte(t) } }
//! ```
//! # Deviations
//! - `vpmaddubsw` adds two products of unsigned and signed bytes, and saturates at 16 bits. A weight with its offset is at most 255, so
//!   with `|lhs| ≤ 63` two of them are at most `2·255·63 = 32,130`: nothing saturates, and the sums are exact. A multiply-add of pairs
//!   with ones widens them. Three instructions stand where pairs of 16 bits take four, two broadcasts and four ANDs and shifts.
//! - Tiles have four rows: with six, one of seventeen registers lies on the stack. In the loop alone both take 195 to 197 GOP/s.
//! - Tried: adding the products of two words in 16 bits, less `128·Σ lhs` of these eight elements from a third broadcast. That is exact too
//!   (`4·128·63 = 32,256`) and saves every second widening. Six instructions take 0.94 cycles a vector of words with three rows, where ports would
//!   permit 0.75 and these three take 1.00; it wants tiles of three rows, and loses with one (Zen 3, loops alone, words in L1: 208 and 195
//!   GOP/s, with one row 164 to 181 and 192).

use pulp::bytemuck::cast;
use pulp::x86::V3;
use pulp::{Simd, WithSimd};

use super::bytes::{ByteKernel, ByteVisitor, PROOF};
use super::dots::{ByteDots, Dots};

/// AVX2, for bytes up to ±63 in the left operand.
#[derive(Debug, Clone, Copy)]
struct Sevens(V3);

impl ByteDots for Sevens {
    type Simd = V3;

    #[inline(always)]
    fn simd(self) -> V3 {
        self.0
    }

    #[inline(always)]
    fn add_dots(self, sum: pulp::u32x8, words: pulp::u32x8, bytes: pulp::u32x8) -> pulp::u32x8 {
        let ones = self.0.splat_u32s(0x0001_0001);
        let pairs = self.0.avx2._mm256_maddubs_epi16(cast(words), cast(bytes));
        let fours = self.0.avx2._mm256_madd_epi16(pairs, cast(ones));
        cast(self.0.avx2._mm256_add_epi32(cast(sum), fours))
    }
}

/// Runs a visitor within the shell of AVX2.
struct Shell<V>(V);

impl<V: ByteVisitor> WithSimd for Shell<V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let simd = V3::try_new().expect(PROOF);
        self.0.visit(ByteKernel::<_, 4, 2>(Dots(Sevens(simd))));
    }
}

/// Runs `visitor` with the kernel of AVX2 for rows of 7 bits.
pub(super) fn enter<V: ByteVisitor>(visitor: V) {
    Simd::vectorize(V3::try_new().expect(PROOF), Shell(visitor));
}
