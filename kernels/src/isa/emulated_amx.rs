//! The tile unit in software, so that kernels on tiles are tested on machines without one.
//!
//! A CPU that lacks AMX raises an invalid-opcode fault at each tile instruction. The handler that `testing::amx` installs decodes the instruction,
//! does in software what the manual says, on tiles of the faulting thread, and lets the thread go on behind it. So the very machine code that would run on
//! the tile unit is run, a few microseconds an instruction. What is no tile instruction goes to the handler that was there before.
//!
//! # Source
//! Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: the pseudocode of each instruction, and VEX encoding (2.3).

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::sync::Once;

use super::{Isa, IsaName};

/// See `testing::amx`.
pub(crate) fn amx() -> Option<Isa> {
    static INSTALLED: Once = Once::new();
    if let Ok(isa) = Isa::new(IsaName::Amx) {
        return Some(isa);
    }
    INSTALLED.call_once(install);
    // SAFETY: tile instructions are emulated from here on.
    unsafe { Isa::with_emulated_tiles() }
}

/// The handler that was there before: written once, before ours can run.
static mut BEFORE: MaybeUninit<libc::sigaction> = MaybeUninit::uninit();

fn install() {
    type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
    // SAFETY: the structure is plain data; the handler has the signature that SA_SIGINFO asks for, and BEFORE is written before any tile
    // instruction can fault, because this runs once and before the first token is given out.
    let answer = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_invalid_opcode as Handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGILL, &raw const action, (&raw mut BEFORE).cast())
    };
    assert_eq!(answer, 0, "a handler of SIGILL can be installed");
}

extern "C" fn on_invalid_opcode(signal: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a handler with SA_SIGINFO the state of the thread that it stopped.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize] as *const u8;
    // SAFETY: an instruction faulted here, and those that we emulate have 5 to 10 bytes; the bytes behind a shorter one belong to the same code.
    let code = unsafe { std::ptr::read_unaligned(at.cast::<[u8; 10]>()) };
    let done = Instruction::decode(&code).map(|instruction| {
        TILES.with(|tiles| {
            // SAFETY: the tiles belong to this thread, which stands at the instruction: nothing else of it uses them.
            unsafe { instruction.run(&mut *tiles.get(), registers) };
        });
        instruction.length
    });
    match done {
        Some(length) => registers[libc::REG_RIP as usize] += length as i64,
        // SAFETY: BEFORE was written by `install`; with the old handler in place the instruction faults again and reaches it.
        None => unsafe {
            libc::sigaction(signal, (&raw const BEFORE).cast(), std::ptr::null_mut());
        },
    }
}

/// The tile registers of a thread: 16 rows of 64 bytes each, and what `ldtilecfg` said of them.
struct Tiles {
    rows: [[[u8; 64]; 16]; 8],
    height: [usize; 8],
    width: [usize; 8],
    configured: bool,
}

thread_local! {
    static TILES: UnsafeCell<Tiles> = const {
        UnsafeCell::new(Tiles { rows: [[[0; 64]; 16]; 8], height: [0; 8], width: [0; 8], configured: false })
    };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Configure(Address),
    Release,
    Zero { tile: usize },
    Load { tile: usize, from: Address },
    Store { tile: usize, to: Address },
    Multiply { kind: Product, sums: usize, left: usize, right: usize },
}

/// Which products are summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Product {
    /// Pairs of bf16 in f32.
    Bf16,
    /// Fours of bytes in i32: whether the left and the right ones have a sign.
    Bytes { left_signed: bool, right_signed: bool },
}

/// `base + index·scale + offset`, by number of register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Address {
    base: usize,
    index: Option<(usize, u32)>,
    offset: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    operation: Operation,
    length: usize,
}

impl Instruction {
    /// A tile instruction in its three-byte VEX form: `C4`, `R̅X̅B̅ 00010`, `W v̅v̅v̅v̅ L pp`, opcode, ModRM, …
    fn decode(code: &[u8; 10]) -> Option<Instruction> {
        let [0xc4, first, second, opcode, mod_rm, ..] = *code else { return None };
        if first & 0x1f != 2 || second & 0x84 != 0 {
            return None;
        }
        let (prefix, vvvv) = (second & 3, usize::from(!second >> 3 & 15));
        let extended = |bit: u8| usize::from(first & bit == 0) * 8;
        let (mode, reg, rm) = (mod_rm >> 6, usize::from(mod_rm >> 3 & 7), usize::from(mod_rm & 7));
        if mode == 3 {
            let operation = match (opcode, prefix) {
                (0x49, 0) if mod_rm == 0xc0 => Operation::Release,
                (0x49, 3) if rm == 0 => Operation::Zero { tile: reg },
                (0x5c, 2) => Operation::Multiply { kind: Product::Bf16, sums: reg, left: rm, right: vvvv },
                (0x5e, _) => {
                    let kind = Product::Bytes { left_signed: prefix >= 2, right_signed: prefix & 1 == 1 };
                    Operation::Multiply { kind, sums: reg, left: rm, right: vvvv }
                }
                _ => return None,
            };
            return Some(Instruction { operation, length: 5 });
        }
        // The address: ModRM, perhaps a scale-index-base byte, and an offset of 0, 1 or 4 bytes.
        let has_sib = rm == 4;
        let sib = code[5];
        let base = if has_sib { usize::from(sib & 7) } else { rm };
        if mode == 0 && base == 5 {
            return None;
        }
        let index = usize::from(sib >> 3 & 7) + extended(0x40);
        let at = 5 + usize::from(has_sib);
        let (offset, bytes) = match mode {
            0 => (0, 0),
            1 => (i64::from(code[at] as i8), 1),
            _ => {
                let four = code.get(at..at + 4)?.try_into().ok()?;
                (i64::from(i32::from_le_bytes(four)), 4)
            }
        };
        let address = Address {
            base: base + extended(0x20),
            index: (has_sib && index != 4).then_some((index, u32::from(sib >> 6))),
            offset,
        };
        let operation = match (opcode, prefix) {
            (0x49, 0) if reg == 0 => Operation::Configure(address),
            (0x4b, 1 | 3) if has_sib => Operation::Load { tile: reg, from: address },
            (0x4b, 2) if has_sib => Operation::Store { tile: reg, to: address },
            _ => return None,
        };
        Some(Instruction { operation, length: at + bytes })
    }

    /// # Safety
    /// The registers are those of a thread that stands at this instruction, so its addresses are those that it means.
    unsafe fn run(&self, tiles: &mut Tiles, registers: &[i64]) {
        match self.operation {
            Operation::Configure(address) => {
                // SAFETY: the instruction reads 64 bytes there.
                let config = unsafe { (address.base(registers) as *const [u8; 64]).read_unaligned() };
                assert!(config[0] == 1 && config[1] == 0, "palette 1, from the first row on");
                for tile in 0..8 {
                    tiles.width[tile] =
                        usize::from(u16::from_le_bytes([config[16 + 2 * tile], config[17 + 2 * tile]]));
                    tiles.height[tile] = usize::from(config[48 + tile]);
                }
                tiles.rows = [[[0; 64]; 16]; 8];
                tiles.configured = true;
            }
            Operation::Release => tiles.configured = false,
            _ => assert!(tiles.configured, "tiles are used on a thread that has not configured them"),
        }
        match self.operation {
            Operation::Configure(_) | Operation::Release => {}
            Operation::Zero { tile } => tiles.rows[tile] = [[0; 64]; 16],
            Operation::Load { tile, from } => {
                let (width, height) = (tiles.width[tile], tiles.height[tile]);
                tiles.rows[tile] = [[0; 64]; 16];
                for (i, row) in tiles.rows[tile].iter_mut().enumerate().take(height) {
                    let source = (from.base(registers) + i as i64 * from.stride(registers)) as *const u8;
                    // SAFETY: the instruction reads `width` bytes of each row.
                    unsafe { source.copy_to(row.as_mut_ptr(), width) };
                }
            }
            Operation::Store { tile, to } => {
                let (width, height) = (tiles.width[tile], tiles.height[tile]);
                for (i, row) in tiles.rows[tile].iter().enumerate().take(height) {
                    let target = (to.base(registers) + i as i64 * to.stride(registers)) as *mut u8;
                    // SAFETY: the instruction writes `width` bytes of each row.
                    unsafe { target.copy_from(row.as_ptr(), width) };
                }
            }
            Operation::Multiply { kind, sums, left, right } => tiles.multiply(kind, sums, (left, right)),
        }
    }
}

impl Address {
    /// Without the index: rows are `index·scale` apart.
    fn base(self, registers: &[i64]) -> i64 {
        register(registers, self.base) + self.offset
    }

    fn stride(self, registers: &[i64]) -> i64 {
        self.index.map_or(0, |(index, scale)| register(registers, index) << scale)
    }
}

/// A general register by its number in an instruction.
fn register(registers: &[i64], number: usize) -> i64 {
    use libc::{
        REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_RAX, REG_RBP, REG_RBX,
        REG_RCX, REG_RDI, REG_RDX, REG_RSI, REG_RSP,
    };
    const PLACES: [libc::c_int; 16] = [
        REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10,
        REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
    ];
    registers[PLACES[number] as usize]
}

impl Tiles {
    fn multiply(&mut self, kind: Product, sums: usize, (left, right): (usize, usize)) {
        let (a, b) = (self.rows[left], self.rows[right]);
        let depth = self.width[left] / 4;
        assert_eq!(depth, self.height[right], "as deep as each other");
        for (c, a) in self.rows[sums].iter_mut().zip(&a).take(self.height[left]) {
            let (a, c) = (a.as_chunks::<4>().0, c.as_chunks_mut::<4>().0);
            for (j, c) in c.iter_mut().enumerate().take(self.width[right] / 4) {
                let words = (0..depth).map(|p| (a[p], b[p].as_chunks::<4>().0[j]));
                *c = match kind {
                    Product::Bf16 => {
                        let sum = f32::from_le_bytes(*c);
                        flush(flush(sum) + pairs_of_bf16(words)).to_le_bytes()
                    }
                    Product::Bytes { left_signed, right_signed } => {
                        let byte = |x: u8, signed| if signed { i32::from(x as i8) } else { i32::from(x) };
                        let products = words.flat_map(|(a, b)| std::iter::zip(a, b));
                        let add =
                            |sum: i32, (a, b)| sum.wrapping_add(byte(a, left_signed) * byte(b, right_signed));
                        products.fold(i32::from_le_bytes(*c), add).to_le_bytes()
                    }
                };
            }
        }
    }
}

/// The chain of the even products, plus the chain of the odd ones.
fn pairs_of_bf16(words: impl Iterator<Item = ([u8; 4], [u8; 4])>) -> f32 {
    let half =
        |word: [u8; 4], odd: usize| flush(f32::from_le_bytes([0, 0, word[2 * odd], word[2 * odd + 1]]));
    let mut chains = [0.0f32; 2];
    for (a, b) in words {
        for (odd, chain) in chains.iter_mut().enumerate() {
            *chain = flush(half(a, odd).mul_add(half(b, odd), *chain));
        }
    }
    flush(chains[0] + chains[1])
}

/// Subnormal numbers are zero to the unit.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_decoded_as_an_assembler_encodes_them() {
        let decode = |bytes: &[u8]| {
            let mut code = [0x90; 10];
            code[..bytes.len()].copy_from_slice(bytes);
            let instruction = Instruction::decode(&code);
            assert!(instruction.is_none_or(|i| i.length == bytes.len()), "{bytes:x?}: {instruction:?}");
            instruction.map(|i| i.operation)
        };
        let at = |base, index, offset| Address { base, index, offset };
        let bytes = |left_signed, right_signed| Product::Bytes { left_signed, right_signed };
        let multiply = |kind, sums, left, right| Some(Operation::Multiply { kind, sums, left, right });
        // As GNU as 2.40 writes them.
        assert_eq!(decode(&[0xc4, 0xe2, 0x78, 0x49, 0x07]), Some(Operation::Configure(at(7, None, 0))));
        assert_eq!(decode(&[0xc4, 0xe2, 0x78, 0x49, 0xc0]), Some(Operation::Release));
        assert_eq!(decode(&[0xc4, 0xe2, 0x7b, 0x49, 0xd8]), Some(Operation::Zero { tile: 3 }));
        let load = |tile, from| Some(Operation::Load { tile, from });
        // tileloadd tmm4, [rsi + r8]; tmm5, [rsi + r8 + 0x400]; tmm1, [r9 + rcx*4 + 0x40]
        assert_eq!(decode(&[0xc4, 0xa2, 0x7b, 0x4b, 0x24, 0x06]), load(4, at(6, Some((8, 0)), 0)));
        assert_eq!(
            decode(&[0xc4, 0xa2, 0x7b, 0x4b, 0xac, 0x06, 0, 4, 0, 0]),
            load(5, at(6, Some((8, 0)), 0x400))
        );
        assert_eq!(decode(&[0xc4, 0xc2, 0x7b, 0x4b, 0x4c, 0x89, 0x40]), load(1, at(9, Some((1, 2)), 0x40)));
        // tilestored [rdx + r9], tmm0
        let store = Some(Operation::Store { tile: 0, to: at(2, Some((9, 0)), 0) });
        assert_eq!(decode(&[0xc4, 0xa2, 0x7a, 0x4b, 0x04, 0x0a]), store);
        assert_eq!(decode(&[0xc4, 0xe2, 0x5a, 0x5c, 0xc6]), multiply(Product::Bf16, 0, 6, 4));
        // tdpbssd, tdpbsud, tdpbusd, tdpbuud tmm1, tmm2, tmm3
        assert_eq!(decode(&[0xc4, 0xe2, 0x63, 0x5e, 0xca]), multiply(bytes(true, true), 1, 2, 3));
        assert_eq!(decode(&[0xc4, 0xe2, 0x62, 0x5e, 0xca]), multiply(bytes(true, false), 1, 2, 3));
        assert_eq!(decode(&[0xc4, 0xe2, 0x61, 0x5e, 0xca]), multiply(bytes(false, true), 1, 2, 3));
        assert_eq!(decode(&[0xc4, 0xe2, 0x60, 0x5e, 0xca]), multiply(bytes(false, false), 1, 2, 3));
        // ud2, and a multiply-add of vectors.
        assert_eq!(decode(&[0x0f, 0x0b]), None);
        assert_eq!(decode(&[0xc4, 0xe2, 0x75, 0xb8, 0xc2]), None);
    }
}
