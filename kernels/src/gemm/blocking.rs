//! Block sizes: the tuned table, and the rule that cuts K.

use crate::context::{Blocking, Context};

use super::microkernel::{KernelInfo, Storage};
use crate::isa::IsaName;

/// The tuned sizes of each instruction set's kernel, in whole tiles.
///
/// A panel of B (kc × NR) streams through L1, a block of A (mc × kc) lies in L2, a block of B
/// (kc × nc) in L3.
///
/// | kernel | chosen on | measurement (one thread, ours / crate `gemm` 0.19 in the same run) |
/// |---|---|---|
/// | `f32_6x16_avx2` | AMD Zen 3, 32 KiB L1d, 512 KiB L2, 32 MiB L3, busy virtual machine | kc = 512 against 256 at n = 1024: 1.02–1.08 in three runs with mc = 96, against 0.92 and 0.93 with mc = 144 |
/// | `f32_8x48_avx512` | AMD Zen 5, 48 KiB L1d, 1 MiB L2, 32 MiB L3, quiet virtual machine | kc = 768 against 384, old and new alternating, medians: m = 4096 1.05–1.10 with k = 512 and 1.05–1.07 with k = 768–4096, 2048³ 1.03, 512³ 1.02, 1024 × 1024 × 4096 1.00; kc = 512 in between; mc = 96, nc = 1008 no better |
/// | `bf16_8x48_avx512bf16` | the same | kc = 768 against 512, 384 and 256: 1.05, 1.09 and 1.18 at 128 × 768 × 3072, 1.00, 1.12 and 1.12 at 512³ (one run each, before its epilogue stayed in registers) |
/// | `bf16_32x32_amx` | Intel Xeon with AMX, 48 KiB L1d, 2 MiB L2, 480 MiB L3 | a loop over packed operands, 1024³, GFLOP/s: kc = 256 1,002, 512 921, 1024 699 with mc = 256; then mc = nc = 512 1,113, 256 × 512 1,051, 384² 1,087 |
/// | `bf16x2_32x32_amx`, `bf16x3_32x32_amx` | the same | three parts: kc = 128 268, 64 254 with mc = nc = 512; 256 × 256 257 |
/// | the others | not measured | the same proportions of the usual cache sizes |
///
/// A panel of B is larger than L1 then, and streams from L2 at the third of its rate that the tile needs; what is gained is fewer passes over C.
/// `mc` and `nc` are not settled on AVX2: with kc = 512, mc = 48, 96 and 144 and nc = 1024 and 2048 lay within the
/// noise of one to three runs each (0.94–1.20, 48 and 144 also above 96), and 96 is simply the middle.
const fn tuned(kernel: &KernelInfo) -> Blocking {
    match kernel.isa {
        IsaName::Scalar => Blocking { mc: 96, kc: 512, nc: 1024 },
        IsaName::Neon => Blocking { mc: 96, kc: 512, nc: 2040 },
        IsaName::Avx2 | IsaName::Avx2Vnni => Blocking { mc: 96, kc: 512, nc: 2048 },
        IsaName::Avx512 | IsaName::Avx512Vnni | IsaName::Avx512Bf16 => {
            Blocking { mc: 192, kc: 768, nc: 2016 }
        }
        IsaName::Amx => match kernel.storage {
            Storage::Int8 => Blocking { mc: 256, kc: 512, nc: 1056 },
            Storage::Bf16 => Blocking { mc: 512, kc: 256, nc: 512 },
            _ => Blocking { mc: 512, kc: 128, nc: 512 },
        },
    }
}

/// The block sizes of one product: those of the context or the table, in whole tiles.
pub(super) fn blocking(ctx: &Context, kernel: &KernelInfo) -> Blocking {
    let Some(Blocking { mc, kc, nc }) = ctx.forced_blocking() else { return tuned(kernel) };
    Blocking {
        mc: mc.clamp(1, 1 << 20).next_multiple_of(kernel.mr),
        kc: kc.max(1),
        nc: nc.clamp(1, 1 << 20).next_multiple_of(kernel.nr),
    }
}

/// The depth of each block of K (the last may be shallower): the fewest blocks of at most `kc`, of
/// equal depth, in whole steps of the kernel. It depends on `k` and the table only, so that a row's bits do not depend on M.
pub(super) fn block_depth(k: usize, kc: usize, kernel: &KernelInfo) -> usize {
    if k == 0 { 1 } else { k.div_ceil(k.div_ceil(kc)).next_multiple_of(kernel.k_step) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::kernels;
    use crate::isa::Isa;

    #[test]
    fn blocks_are_whole_tiles_and_cover_k() {
        let ctx = Context::with_isa(Isa::scalar()).blocking(Blocking { mc: 1, kc: 0, nc: 5 });
        for kernel in kernels() {
            let forced = blocking(&ctx, kernel);
            assert_eq!((forced.mc, forced.kc, forced.nc), (kernel.mr, 1, 5usize.next_multiple_of(kernel.nr)));
            let Blocking { mc, nc, .. } = tuned(kernel);
            assert!(mc.is_multiple_of(kernel.mr) && nc.is_multiple_of(kernel.nr), "{}", kernel.name);
        }
        let [vectors, tiles] = [1, 32].map(|step| kernels().iter().find(|k| k.k_step == step).unwrap());
        for k in 0..1000 {
            let depth = block_depth(k, 100, vectors);
            assert!((1..=100).contains(&depth) && k.div_ceil(depth) == k.div_ceil(100));
            assert!(k == 0 || block_depth(k, 100, tiles).is_multiple_of(32));
        }
    }
}
