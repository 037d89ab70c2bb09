//! Block sizes: the tuned table, and the rule that cuts K.

use crate::context::{Blocking, Context};

use super::microkernel::{KernelInfo, kernel_of};

/// The tuned sizes, one line a kernel.
///
/// A panel of B (kc × NR) and a tile of A (MR × kc) share the L1 cache, a block of A (mc × kc) lies
/// in L2, a block of B (kc × nc) in L3.
const TUNED: [(&str, Blocking); 4] = [
    ("f32_4x4_scalar", Blocking { mc: 64, kc: 256, nc: 1024 }),
    ("f32_8x12_neon", Blocking { mc: 128, kc: 256, nc: 1020 }),
    ("f32_6x16_avx2", Blocking { mc: 144, kc: 256, nc: 1024 }),
    ("f32_8x48_avx512", Blocking { mc: 192, kc: 256, nc: 1008 }),
];

/// The block sizes of one product: those of the context or the table, in whole tiles.
pub(super) fn blocking(ctx: &Context) -> Blocking {
    let kernel = kernel_of(ctx.isa().name());
    let Blocking { mc, kc, nc } = ctx.forced_blocking().unwrap_or_else(|| tuned(kernel));
    Blocking {
        mc: mc.clamp(1, 1 << 20).next_multiple_of(kernel.mr),
        kc: kc.max(1),
        nc: nc.clamp(1, 1 << 20).next_multiple_of(kernel.nr),
    }
}

fn tuned(kernel: &KernelInfo) -> Blocking {
    let line = TUNED.iter().find(|line| line.0 == kernel.name);
    line.expect("every kernel has a line in the table").1
}

/// The depth of each block of K (the last may be shallower): the fewest blocks of at most `kc`, of
/// equal depth. It depends on `k` and the table only, so that a row's bits do not depend on M.
pub(super) fn block_depth(k: usize, kc: usize) -> usize {
    if k == 0 { 1 } else { k.div_ceil(k.div_ceil(kc)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    #[test]
    fn blocks_are_whole_tiles_and_cover_k() {
        for isa in Isa::available() {
            let ctx = Context::with_isa(isa).blocking(Blocking { mc: 1, kc: 0, nc: 5 });
            let kernel = kernel_of(isa.name());
            let forced = blocking(&ctx);
            assert_eq!((forced.mc, forced.kc, forced.nc), (kernel.mr, 1, 5usize.next_multiple_of(kernel.nr)));
        }
        for k in 0..1000 {
            let depth = block_depth(k, 100);
            assert!((1..=100).contains(&depth) && k.div_ceil(depth) == k.div_ceil(100));
        }
    }
}
