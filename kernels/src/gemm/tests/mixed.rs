//! Matrices of bf16: the result is that of the same numbers in f32, rounded once.

use half::bf16;

use super::*;
use crate::Precision;
use crate::testing::amx;

/// A matrix as f32 and, with the same numbers, as bf16.
struct Both {
    wide: Matrix,
    narrow: Vec<bf16>,
}

impl Both {
    fn new(rows: usize, cols: usize, order: u8, seed: u64) -> Both {
        let mut wide = Matrix::new(rows, cols, order, |len| uniform(len, seed));
        let narrow: Vec<bf16> = wide.data.iter().map(|x| bf16::from_f32(*x)).collect();
        wide.data.iter_mut().zip(&narrow).for_each(|(wide, narrow)| *wide = narrow.to_f32());
        Both { wide, narrow }
    }

    fn operand(&self, narrow: bool) -> Operand<'_> {
        let Matrix { rows, cols, strides, .. } = self.wide;
        if narrow {
            MatRef::with_strides(&self.narrow, rows, cols, strides.0, strides.1).unwrap().into()
        } else {
            self.wide.view().into()
        }
    }
}

/// What is computed, and where C starts from.
struct Sum<'a> {
    ctx: Context,
    accum: Accum,
    epilogue: Epilogue<'a>,
    old: &'a Both,
}

impl Sum<'_> {
    /// All of C's buffer, gaps included, in f32.
    fn wide(&self, a: Operand<'_>, b: Operand<'_>, packed: Option<&PackedWeights>) -> Vec<f32> {
        let mut c = self.old.wide.clone();
        match packed {
            Some(packed) => gemm_packed(&self.ctx, a, packed, c.view_mut(), self.accum, &self.epilogue),
            None => gemm(&self.ctx, a, b, c.view_mut(), self.accum, &self.epilogue),
        }
        .unwrap();
        c.data
    }

    /// The same with a C in bf16.
    fn narrow(&self, a: Operand<'_>, b: Operand<'_>, packed: Option<&PackedWeights>) -> Vec<bf16> {
        let Matrix { rows, cols, strides, .. } = self.old.wide;
        let mut c = self.old.narrow.clone();
        let view = MatMut::with_strides(&mut c, rows, cols, strides.0, strides.1).unwrap();
        match packed {
            Some(packed) => gemm_packed(&self.ctx, a, packed, view, self.accum, &self.epilogue),
            None => gemm(&self.ctx, a, b, view, self.accum, &self.epilogue),
        }
        .unwrap();
        c
    }

    /// Every choice of bf16 among the three matrices against f32 alone.
    fn check(&self, a: &Both, b: &Both) {
        let expected = self.wide(a.operand(false), b.operand(false), None);
        let rounded: Vec<bf16> = expected.iter().map(|x| bf16::from_f32(*x)).collect();
        let packed_wide = PackedWeights::pack(&self.ctx, b.operand(true)).unwrap();
        let packed_narrow = PackedWeights::pack_as(&self.ctx, b.operand(true), WeightFormat::Bf16).unwrap();
        for (a_narrow, b_narrow) in [(false, false), (false, true), (true, false), (true, true)] {
            let (a, b) = (a.operand(a_narrow), b.operand(b_narrow));
            let packed = if b_narrow { &packed_narrow } else { &packed_wide };
            for packed in [None, Some(packed)] {
                // Stored bf16 runs on vectors where parts run on tiles; both are exact numbers, in another order of sums.
                if packed.is_some_and(|packed| {
                    packed.kernel().isa != PackedWeights::pack(&self.ctx, b).unwrap().kernel().isa
                }) {
                    continue;
                }
                assert_same_bits(&self.wide(a, b, packed), &expected);
                assert_eq!(self.narrow(a, b, packed), rounded);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn bf16_matrices_give_the_bits_of_the_same_numbers_in_f32(
        (m, n, k) in (straddle(&[6, 9, 32]), straddle(&[16, 48]), prop_oneof![0usize..5, 30usize..70]),
        orders in (0u8..4, 0u8..4, 0u8..4),
        (add, relu, threads) in (any::<bool>(), any::<bool>(), 1usize..4),
        seed in any::<u64>(),
    ) {
        let (a, b) = (Both::new(m, k, orders.0, seed), Both::new(k, n, orders.1, seed ^ 1));
        let old = Both::new(m, n, orders.2, seed ^ 2);
        let (bias, gate, residual) = (uniform(n, seed ^ 3), uniform(m * n, seed ^ 4), uniform(m * n, seed ^ 5));
        let mut epilogue = Epilogue::new().scale(0.7).bias(&bias);
        if relu {
            epilogue = epilogue.activation(Activation::Relu);
        } else {
            epilogue = epilogue.gate(row_major(&gate, m, n)).residual(row_major(&residual, m, n));
        }
        let accum = if add { Accum::Add } else { Accum::Overwrite };
        let threads = NonZeroUsize::new(threads).unwrap();
        for_each_isa(|ctx| {
            for ctx in [*ctx, ctx.blocking(TINY)] {
                Sum { ctx: ctx.threads(threads), accum, epilogue, old: &old }.check(&a, &b);
            }
        });
        let Some(isa) = amx() else { return Ok(()) };
        for precision in Precision::ALL {
            let ctx = Context::with_isa(isa).precision(precision).blocking(TINY).threads(threads);
            Sum { ctx, accum, epilogue, old: &old }.check(&a, &b);
        }
    }
}

/// Parts, blocks of rows and blocks of columns of the usual sizes.
#[test]
fn large_bf16_matrices_are_cut_without_a_trace() {
    let (m, n, k) = (230, 1100, 64);
    let (a, b, old) = (Both::new(m, k, 0, 1), Both::new(k, n, 0, 2), Both::new(m, n, 0, 3));
    for_each_isa(|ctx| {
        for threads in [1, 3] {
            let ctx = ctx.threads(NonZeroUsize::new(threads).unwrap());
            Sum { ctx, accum: Accum::Add, epilogue: Epilogue::new(), old: &old }.check(&a, &b);
        }
    });
}

#[test]
fn mistakes_with_bf16_are_errors_and_touch_nothing() {
    let ctx = Context::with_isa(crate::Isa::scalar());
    let data = [bf16::ONE; 12];
    let view = |rows, cols| MatRef::new(&data, rows, cols).unwrap();
    let mut c = [bf16::NEG_ONE; 9];
    let mut run = |a: MatRef<'_, bf16>, b: MatRef<'_, bf16>, epilogue: Epilogue<'_>| {
        let to = MatMut::new(&mut c, 3, 3).unwrap();
        let error = gemm(&ctx, a, b, to, Accum::Overwrite, &epilogue).unwrap_err().to_string();
        assert_eq!(c, [bf16::NEG_ONE; 9]);
        error
    };
    assert_eq!(run(view(3, 4), view(3, 4), Epilogue::new()), "b: rows is 3, expected 4");
    assert_eq!(run(view(4, 3), view(3, 4), Epilogue::new()), "c: rows is 3, expected 4");
    assert!(run(view(3, 4), view(4, 3), Epilogue::new().bias(&[0.0; 2])).contains("bias"));
}
