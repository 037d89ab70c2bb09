//! Products on the tile unit (AMX): blocks of 32 × 32 sums in four tile registers, operands in bf16 or 8 bits.
//!
//! # Naive form
//! ```text
//! for (a, b) in the products of parts { for i in 0..32 { for j in 0..32 { for p in 0..depth {
//!     sums[i][j] += lhs.part[a][i][p] * rhs.part[b][p][j]
//! } } } }
//! ```
//! An operand in f32 is a sum of one, two or three bf16 parts (`gemm::split`); one, three or six products of parts are kept.
//!
//! # Deviations
//! - Two tiles of each side feed four products: each tile that is loaded is used twice, so loads keep up with the unit.
//! - The next product of parts changes one side only, so three products need 8 loads for 12 multiplications, six need 14 for 24.
//!   Within a step they come in the order from small to large where that order allows it.
//! - The whole loop over k is one `asm!` block: the compiler knows no tile registers and cannot keep sums in them.
//! - The sums are stored to a block of memory of their own, rows 128 bytes apart, and go through the epilogue from there: rows of C
//!   that lie a power of two apart would all meet in one set of the cache.
//! - Up to 16 rows use two tiles of sums, not four.
//!
//! # Accuracy
//! One tile instruction adds 16 pairs: the even and the odd products of a row are two chains of fused multiply-adds, from
//! zero, whose sum is added to the tile. Products of bf16 are exact in f32. Subnormal numbers count as zero, on the way in and on the
//! way out.
//!
//! # Source
//! Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, `TDPBF16PS`, `TDPBSUD`; Intel 64 and IA-32 Architectures
//! Optimization Reference Manual, chapter 20.

// What drives the unit is compiled everywhere, so that no caller asks for the architecture; only the instructions are not.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, unused_macros))]

#[cfg(target_arch = "x86_64")]
use std::arch::asm;
use std::marker::PhantomData;

use super::Storage;
use crate::isa::Tiles;

/// Rows of A, and columns of B, of one tile.
pub(crate) const SIDE: usize = 16;
/// Rows and columns of a block of sums.
pub(crate) const BLOCK: usize = 2 * SIDE;
/// 32-bit words of one tile: 16 rows of 64 bytes.
pub(crate) const TILE_WORDS: usize = SIDE * SIDE;
/// Elements along k of one tile of bf16; of bytes there are twice as many.
pub(crate) const STEP: usize = 32;

/// What `ldtilecfg` reads: eight tiles of rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_a_row: [u16; 16],
    rows: [u8; 16],
}

static WHOLE_TILES: Config = Config::of_rows(SIDE as u8, SIDE as u8);

impl Config {
    /// So many rows in the tiles of the first rows of sums and of A, and in those of the second.
    const fn of_rows(upper: u8, lower: u8) -> Config {
        Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            bytes_a_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
            rows: [upper, upper, lower, lower, upper, lower, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
        }
    }
}

/// The tile unit of this thread, configured. It gives the registers back when it is dropped, so it cannot be sent to
/// another thread.
pub(crate) struct TileUnit(PhantomData<*const ()>);

impl TileUnit {
    /// Configures the tiles of this thread.
    pub(crate) fn configure(_: Tiles) -> TileUnit {
        TileUnit::load(&WHOLE_TILES)
    }

    /// As [`TileUnit::configure`], for products of so many rows, all of which are in one block: the unit spends no time on rows that it does not have.
    pub(crate) fn configure_rows(_: Tiles, rows: usize) -> TileUnit {
        debug_assert!((1..=BLOCK).contains(&rows));
        // A tile without rows cannot be; what nobody uses stays whole.
        let lower = if rows > SIDE { rows - SIDE } else { SIDE };
        TileUnit::load(&Config::of_rows(rows.min(SIDE) as u8, lower as u8))
    }

    fn load(config: &Config) -> TileUnit {
        // SAFETY: the caller has the token, which proves that the instruction runs; it reads the 64 bytes of the configuration.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const *config, options(nostack, readonly, preserves_flags));
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = config;
        TileUnit(PhantomData)
    }
}

impl Drop for TileUnit {
    fn drop(&mut self) {
        // SAFETY: a `TileUnit` exists only where tile instructions run, and nobody's sums live between blocks.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            asm!("tilerelease", options(nostack, nomem, preserves_flags))
        };
    }
}

/// The operands of one block of sums, in whole tiles.
///
/// Left: step `s`, part `q` of the first 16 rows is tile `s · parts + q`; the second 16 rows lie `left_stride` words on. A tile has
/// a row of A in each row. Right: step `s`, part `q` of the first 16 columns is tile `(s · parts + q) · 2`, the other 16
/// columns are the next tile. A tile has in row `q` the words of k = `q · per_word …` of 16 columns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TileBlock {
    pub(crate) left: *const u32,
    pub(crate) left_stride: usize,
    pub(crate) right: *const u32,
    pub(crate) steps: usize,
    /// Whether there is a second tile of rows.
    pub(crate) two_rows: bool,
}

/// The operands of one block of sums in bytes: signed on the left, in tiles as [`TileBlock`] has them; unsigned on the right, as rows of
/// words for vectors, four elements along k in each.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ByteBlock {
    pub(crate) left: *const u32,
    pub(crate) left_stride: usize,
    pub(crate) right: *const u32,
    /// Words from one row of the right operand to the next.
    pub(crate) right_stride: usize,
    pub(crate) steps: usize,
    pub(crate) two_rows: bool,
    pub(crate) two_cols: bool,
}

// The registers: sums in 0 … 3 (row by row), the left operand in 4 and 5, the right one in 6 and 7.
macro_rules! left {
    (0, $part:literal) => {
        concat!("tileloadd tmm4, [{left} + {row}*1 + 1024*", $part, "]\n")
    };
    (1, $part:literal) => {
        concat!("tileloadd tmm5, [{lower} + {row}*1 + 1024*", $part, "]\n")
    };
}
macro_rules! right {
    (0, $part:literal) => {
        concat!("tileloadd tmm6, [{right} + {row}*1 + 2048*", $part, "]\n")
    };
    (1, $part:literal) => {
        concat!("tileloadd tmm7, [{right} + {row}*1 + 2048*", $part, " + 1024]\n")
    };
}
macro_rules! multiply {
    ($with:literal, 0, 0) => {
        concat!($with, " tmm0, tmm4, tmm6\n")
    };
    ($with:literal, 0, 1) => {
        concat!($with, " tmm1, tmm4, tmm7\n")
    };
    ($with:literal, 1, 0) => {
        concat!($with, " tmm2, tmm5, tmm6\n")
    };
    ($with:literal, 1, 1) => {
        concat!($with, " tmm3, tmm5, tmm7\n")
    };
}
/// The first product of a step: both sides are loaded, each tile just before its first use.
macro_rules! load_both {
    (four, $with:literal, $a:literal, $b:literal) => {
        concat!(
            right!(0, $b),
            left!(0, $a),
            multiply!($with, 0, 0),
            right!(1, $b),
            multiply!($with, 0, 1),
            left!(1, $a),
            multiply!($with, 1, 0),
            multiply!($with, 1, 1),
        )
    };
    (two, $with:literal, $a:literal, $b:literal) => {
        concat!(right!(0, $b), left!(0, $a), multiply!($with, 0, 0), right!(1, $b), multiply!($with, 0, 1),)
    };
}
/// A product with another part of the left operand.
macro_rules! load_left {
    (four, $with:literal, $a:literal) => {
        concat!(
            left!(0, $a),
            multiply!($with, 0, 0),
            multiply!($with, 0, 1),
            left!(1, $a),
            multiply!($with, 1, 0),
            multiply!($with, 1, 1),
        )
    };
    (two, $with:literal, $a:literal) => {
        concat!(left!(0, $a), multiply!($with, 0, 0), multiply!($with, 0, 1))
    };
}
/// A product with another part of the right operand.
macro_rules! load_right {
    (four, $with:literal, $b:literal) => {
        concat!(
            right!(0, $b),
            multiply!($with, 0, 0),
            multiply!($with, 1, 0),
            right!(1, $b),
            multiply!($with, 0, 1),
            multiply!($with, 1, 1),
        )
    };
    (two, $with:literal, $b:literal) => {
        concat!(right!(0, $b), multiply!($with, 0, 0), right!(1, $b), multiply!($with, 0, 1))
    };
}
/// Part 0 is the largest. One product.
macro_rules! one_product {
    ($tiles:tt, $with:literal) => {
        load_both!($tiles, $with, 0, 0)
    };
}
/// low·high, high·high, high·low.
macro_rules! three_products {
    ($tiles:tt, $with:literal) => {
        concat!(load_both!($tiles, $with, 1, 0), load_left!($tiles, $with, 0), load_right!($tiles, $with, 1))
    };
}
/// low·high, middle·high, middle·middle, high·middle, high·high, high·low.
macro_rules! six_products {
    ($tiles:tt, $with:literal) => {
        concat!(
            load_both!($tiles, $with, 2, 0),
            load_left!($tiles, $with, 1),
            load_right!($tiles, $with, 1),
            load_left!($tiles, $with, 0),
            load_right!($tiles, $with, 0),
            load_right!($tiles, $with, 2),
        )
    };
}

/// How the four tiles of sums begin, or the upper two: as zero or as what lies where they will be stored.
macro_rules! begin {
    (zero, four) => {
        "tilezero tmm0\ntilezero tmm1\ntilezero tmm2\ntilezero tmm3\n"
    };
    (zero, two) => {
        "tilezero tmm0\ntilezero tmm1\n"
    };
    (load, four) => {
        concat!(
            begin!(load, two),
            "tileloadd tmm2, [{below} + {sums_row}*1]\n",
            "tileloadd tmm3, [{below} + {sums_row}*1 + 64]\n",
        )
    };
    (load, two) => {
        "tileloadd tmm0, [{sums} + {sums_row}*1]\ntileloadd tmm1, [{sums} + {sums_row}*1 + 64]\n"
    };
}
/// Stores what [`begin`] began.
macro_rules! end {
    (four) => {
        concat!(
            end!(two),
            "tilestored [{below} + {sums_row}*1], tmm2\n",
            "tilestored [{below} + {sums_row}*1 + 64], tmm3\n",
        )
    };
    (two) => {
        "tilestored [{sums} + {sums_row}*1], tmm0\ntilestored [{sums} + {sums_row}*1 + 64], tmm1\n"
    };
}

/// The loop over k with `$step` in it.
macro_rules! sums {
    ($name:ident, $begin:tt, $tiles:tt, $step:expr, $parts:literal) => {
        /// # Safety
        /// As [`TileUnit::sums_to`].
        #[inline(never)]
        unsafe fn $name(block: &TileBlock, sums: *mut u32, sums_row: usize) {
            debug_assert!(block.steps > 0);
            #[cfg(not(target_arch = "x86_64"))]
            {
                _ = (block, sums, sums_row);
                unreachable!("a token of tiles exists on x86-64 only");
            }
            // SAFETY: the contract: the tiles are configured, the operands are readable in whole tiles, `sums` is a
            // writable block whose rows are `sums_row` words apart.
            #[cfg(target_arch = "x86_64")]
            unsafe {
                asm!(
                    begin!($begin, $tiles),
                    "2:",
                    $step,
                    concat!("add {left}, 1024*", $parts),
                    concat!("add {lower}, 1024*", $parts),
                    concat!("add {right}, 2048*", $parts),
                    "dec {steps}",
                    "jnz 2b",
                    end!($tiles),
                    // The upper tiles do not ask where the lower ones are.
                    "/* {lower} {below} */",
                    left = inout(reg) block.left => _,
                    lower = inout(reg) block.left.wrapping_add(block.left_stride) => _,
                    right = inout(reg) block.right => _,
                    steps = inout(reg) block.steps => _,
                    row = in(reg) 64usize,
                    sums = in(reg) sums,
                    below = in(reg) sums.wrapping_add(SIDE * sums_row),
                    sums_row = in(reg) 4 * sums_row,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

/// As [`sums`], but for bytes: adds to the sums, and reads the right operand where rows of words lie for vectors. `$lower` says whether
/// there is a second tile of rows, `$wide` a second one of columns.
macro_rules! byte_sums {
    ($name:ident, $step:expr) => {
        /// # Safety
        /// As [`TileUnit::add_bytes`].
        #[inline(never)]
        unsafe fn $name(block: &ByteBlock, sums: *mut u32) {
            #[cfg(not(target_arch = "x86_64"))]
            {
                _ = (block, sums);
                unreachable!("a token of tiles exists on x86-64 only");
            }
            // SAFETY: the contract: the tiles are configured, the operands are readable in whole tiles, `sums` is a block.
            #[cfg(target_arch = "x86_64")]
            unsafe {
                asm!(
                    "tileloadd tmm0, [{sums} + {sums_row}*1]",
                    "tileloadd tmm1, [{sums} + {sums_row}*1 + 64]",
                    "tileloadd tmm2, [{sums} + {sums_row}*1 + 2048]",
                    "tileloadd tmm3, [{sums} + {sums_row}*1 + 2048 + 64]",
                    "2:",
                    $step,
                    "add {left}, 1024",
                    "add {lower}, 1024",
                    "add {right}, {right_step}",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{sums} + {sums_row}*1], tmm0",
                    "tilestored [{sums} + {sums_row}*1 + 64], tmm1",
                    "tilestored [{sums} + {sums_row}*1 + 2048], tmm2",
                    "tilestored [{sums} + {sums_row}*1 + 2048 + 64], tmm3",
                    left = inout(reg) block.left => _,
                    lower = inout(reg) block.left.wrapping_add(block.left_stride) => _,
                    right = inout(reg) block.right => _,
                    steps = inout(reg) block.steps => _,
                    row = in(reg) 64usize,
                    right_row = in(reg) 4 * block.right_stride,
                    right_step = in(reg) 4 * SIDE * block.right_stride,
                    sums = in(reg) sums,
                    sums_row = in(reg) 128usize,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

sums!(bf16_four, zero, four, one_product!(four, "tdpbf16ps"), 1);
sums!(bf16_two, zero, two, one_product!(two, "tdpbf16ps"), 1);
sums!(split2_four, zero, four, three_products!(four, "tdpbf16ps"), 2);
sums!(split2_two, zero, two, three_products!(two, "tdpbf16ps"), 2);
sums!(split3_four, zero, four, six_products!(four, "tdpbf16ps"), 3);
sums!(split3_two, zero, two, six_products!(two, "tdpbf16ps"), 3);
sums!(more_bf16_four, load, four, one_product!(four, "tdpbf16ps"), 1);
sums!(more_bf16_two, load, two, one_product!(two, "tdpbf16ps"), 1);
sums!(more_split2_four, load, four, three_products!(four, "tdpbf16ps"), 2);
sums!(more_split2_two, load, two, three_products!(two, "tdpbf16ps"), 2);
sums!(more_split3_four, load, four, six_products!(four, "tdpbf16ps"), 3);
sums!(more_split3_two, load, two, six_products!(two, "tdpbf16ps"), 3);

// Registers as above; a row of the right operand is `right_row` bytes from the next, and 16 columns are 64 bytes of it.
macro_rules! bytes_right {
    (0) => {
        "tileloadd tmm6, [{right} + {right_row}*1]\n"
    };
    (1) => {
        "tileloadd tmm7, [{right} + {right_row}*1 + 64]\n"
    };
}
byte_sums!(
    bytes_two_by_two,
    concat!(
        bytes_right!(0),
        left!(0, 0),
        multiply!("tdpbsud", 0, 0),
        bytes_right!(1),
        multiply!("tdpbsud", 0, 1),
        left!(1, 0),
        multiply!("tdpbsud", 1, 0),
        multiply!("tdpbsud", 1, 1),
    )
);
byte_sums!(
    bytes_one_by_two,
    concat!(
        bytes_right!(0),
        left!(0, 0),
        multiply!("tdpbsud", 0, 0),
        bytes_right!(1),
        multiply!("tdpbsud", 0, 1)
    )
);
byte_sums!(
    bytes_two_by_one,
    concat!(
        bytes_right!(0),
        left!(0, 0),
        multiply!("tdpbsud", 0, 0),
        left!(1, 0),
        multiply!("tdpbsud", 1, 0)
    )
);
byte_sums!(bytes_one_by_one, concat!(bytes_right!(0), left!(0, 0), multiply!("tdpbsud", 0, 0)));

/// A loop over k for one block of sums.
type SumsLoop = unsafe fn(&TileBlock, *mut u32, usize);

/// The loops from zero and from sums that are there.
#[inline(always)]
fn loops(storage: Storage, two_rows: bool) -> [SumsLoop; 2] {
    match (storage, two_rows) {
        (Storage::Bf16, true) => [bf16_four, more_bf16_four],
        (Storage::Bf16, false) => [bf16_two, more_bf16_two],
        (Storage::Split2, true) => [split2_four, more_split2_four],
        (Storage::Split2, false) => [split2_two, more_split2_two],
        (Storage::Split3, true) => [split3_four, more_split3_four],
        (Storage::Split3, false) => [split3_two, more_split3_two],
        (Storage::F32 | Storage::Int8 | Storage::Int4 | Storage::Int7, _) => {
            unreachable!("tiles hold no {storage:?}")
        }
    }
}

impl TileUnit {
    /// Writes the sums of one block, 32 rows of 32 columns that are `stride` elements apart; only the upper 16 where `block` has one tile of rows.
    ///
    /// # Safety
    /// `block` reaches readable tiles, the second tile of rows only if `two_rows`, and has at least one step; as many rows of 32 elements as are
    /// written are writable from `sums` on.
    pub(crate) unsafe fn sums_to(&self, storage: Storage, block: &TileBlock, sums: *mut f32, stride: usize) {
        let [from_zero, _] = loops(storage, block.two_rows);
        // SAFETY: the unit is configured, because `self` exists; the rest is the contract.
        unsafe { from_zero(block, sums.cast::<u32>(), stride) };
    }

    /// As [`TileUnit::sums_to`], but goes on from the sums that lie there.
    ///
    /// # Safety
    /// As [`TileUnit::sums_to`], and the sums are readable.
    pub(crate) unsafe fn go_on(&self, storage: Storage, block: &TileBlock, sums: *mut f32, stride: usize) {
        let [_, from_sums] = loops(storage, block.two_rows);
        // SAFETY: as above.
        unsafe { from_sums(block, sums.cast::<u32>(), stride) };
    }

    /// Adds the products of one block of bytes to its sums, 32 rows of 32 columns, modulo 2³².
    ///
    /// # Safety
    /// `block` reaches readable tiles, the second ones of rows and columns only if it says so, and has at least one step.
    pub(crate) unsafe fn add_bytes(&self, block: &ByteBlock, sums: &mut [u32; BLOCK * BLOCK]) {
        let sums = sums.as_mut_ptr();
        // SAFETY: the unit is configured, because `self` exists; the rest is the contract.
        unsafe {
            match (block.two_rows, block.two_cols) {
                (true, true) => bytes_two_by_two(block, sums),
                (true, false) => bytes_two_by_one(block, sums),
                (false, true) => bytes_one_by_two(block, sums),
                (false, false) => bytes_one_by_one(block, sums),
            }
        }
    }
}
