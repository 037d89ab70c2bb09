//! Matrix products C = A·B: squares, odd sizes, the layers of models with weights in fewer bits, weight gradients.

use kavanam_kernels::Precision;
use kavanam_kernels::gemm::WeightFormat;
use kavanam_kernels::memory::AlignedVec;

use crate::cases::{Case, Op, Work, rounding};
use crate::error::HarnessError;
use crate::measure::fingerprint::Machine;
use crate::measure::roofline;
use crate::measure::statistics::SplitMix64;

/// How the operands lie in memory. C is always row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// A `[m, k]` and B `[k, n]`, both row-major.
    Plain,
    /// A `[m, k]`, B stored as `[n, k]`: a linear layer whose weights lie `[out, in]`.
    TransposedB,
    /// A stored as `[k, m]`, B `[k, n]`: the gradient of weights, summed over k rows of a batch.
    TransposedA,
    /// As `Plain`, and each peer brings B into its own reusable form before the clock runs.
    Packed,
    /// As `Packed`, with elements that are stored in fewer bits.
    Stored(WeightFormat),
    /// As `Packed`, and A, B and C hold bf16: each peer's operands are converted before the clock runs.
    Halves,
    /// As `Stored`; A arrives as f32 and is rounded to integers within the clock.
    Rounded(RowBits, WeightFormat),
}

/// The bits to which rows are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowBits {
    /// ±127.
    Eight,
    /// ±63, as PyTorch has them where the CPU has no dot products of bytes.
    Seven,
}

/// The shape of one product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Rows of A and C.
    pub(crate) m: usize,
    /// Columns of B and C.
    pub(crate) n: usize,
    /// Columns of A, rows of B.
    pub(crate) k: usize,
    /// How A and B lie.
    pub(crate) layout: Layout,
    /// Whether each call takes another copy of B, more of them than the caches hold: a model's layers follow each other, and
    /// when a layer's turn comes again its weights lie in memory.
    pub(crate) cold: bool,
}

impl Shape {
    /// 2mnk operations; A and B read, C written.
    pub(crate) fn work(&self) -> Work {
        let (m, n, k) = (self.m as f64, self.n as f64, self.k as f64);
        let element = if self.layout == Layout::Halves { 2.0 } else { 4.0 };
        Work { flops: Some(2.0 * m * n * k), bytes: element * (m * k + m * n) + self.weight_bytes() }
    }

    /// Bytes of B as it is stored, scales included.
    fn weight_bytes(&self) -> f64 {
        let Shape { n, k, .. } = *self;
        let bytes = match self.layout {
            Layout::Halves => 2 * k * n,
            Layout::Stored(format) | Layout::Rounded(_, format) => match format {
                WeightFormat::F32 => 4 * k * n,
                WeightFormat::Bf16 => 2 * k * n,
                WeightFormat::Int8 => k * n + 4 * n,
                WeightFormat::Int4 { group } => k * n / 2 + 4 * n * k.div_ceil(group),
            },
            _ => 4 * k * n,
        };
        bytes as f64
    }

    /// Whether B is stored in fewer bits than f32.
    pub(crate) fn in_fewer_bits(&self) -> bool {
        matches!(self.layout, Layout::Stored(_) | Layout::Rounded(..) | Layout::Halves)
    }

    /// The bytes that bound the time: the weights that one row needs, where they lie in their reusable form.
    pub(crate) fn read_bytes(&self) -> Option<f64> {
        let reusable = self.layout == Layout::Packed || self.in_fewer_bits();
        (self.m == 1 && reusable).then(|| self.weight_bytes())
    }

    /// Row and column stride of A as it is stored.
    pub(crate) fn a_strides(&self) -> [usize; 2] {
        if self.layout == Layout::TransposedA { [1, self.m] } else { [self.k, 1] }
    }

    /// Row and column stride of B as it is stored.
    pub(crate) fn b_strides(&self) -> [usize; 2] {
        if self.layout == Layout::TransposedB { [1, self.k] } else { [self.n, 1] }
    }
}

const SQUARES: [usize; 9] = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096];
/// Beside powers of two on either side, and primes: every edge of a tile is ragged.
const ODD: [[usize; 3]; 8] = [
    [17, 17, 17],
    [31, 33, 37],
    [63, 65, 67],
    [127, 129, 131],
    [255, 257, 251],
    [511, 513, 509],
    [1000, 1000, 1000],
    [1023, 1025, 1021],
];
/// Rows: one token, beams and small batches, a batch of sentences.
const MODEL_ROWS: [usize; 9] = [1, 4, 8, 16, 32, 128, 512, 1024, 4096];
/// (n, k) of transformer base, BERT base, an LSTM step of 1024 units, a vocabulary.
const MODEL_LAYERS: [[usize; 2]; 8] =
    [[512, 512], [2048, 512], [512, 2048], [768, 768], [3072, 768], [768, 3072], [1024, 4096], [32000, 512]];
/// Rows of products with stored weights, which are for decoding.
const STORED_ROWS: [usize; 5] = [1, 4, 8, 16, 32];
/// Rows of products of rows in int8 with weights in int8, and in int4.
const INT8_ROWS: [usize; 7] = [1, 4, 8, 16, 32, 128, 512];
/// As [`FORMATS`], for rows in int8.
const ROUNDED: [(&str, RowBits, WeightFormat, &[usize]); 3] = [
    ("int8", RowBits::Eight, WeightFormat::Int8, &INT8_ROWS),
    ("int7", RowBits::Seven, WeightFormat::Int8, &INT8_ROWS),
    ("int8_int4w", RowBits::Eight, WeightFormat::Int4 { group: 32 }, &STORED_ROWS),
];
/// Weights whose copies are decoded with in turn, by the name of their group.
const COLD: [(&str, Layout); 6] = [
    ("cold-f32", Layout::Packed),
    ("cold-bf16w", Layout::Stored(WeightFormat::Bf16)),
    ("cold-int8w", Layout::Stored(WeightFormat::Int8)),
    ("cold-int4w", Layout::Stored(WeightFormat::Int4 { group: 32 })),
    ("cold-int8", Layout::Rounded(RowBits::Eight, WeightFormat::Int8)),
    ("cold-int8_int4w", Layout::Rounded(RowBits::Eight, WeightFormat::Int4 { group: 32 })),
];
/// (n, k) of those: layers of a size that a call takes long enough, and few enough copies fill the memory.
const COLD_LAYERS: [[usize; 2]; 3] = [[3072, 768], [1024, 4096], [32000, 512]];
/// The group is the smallest that PyTorch has too.
const FORMATS: [(&str, WeightFormat); 3] = [
    ("bf16w", WeightFormat::Bf16),
    ("int8w", WeightFormat::Int8),
    ("int4w", WeightFormat::Int4 { group: 32 }),
];
/// Layers of the small models that `kavanam compare` trains: m, n, k.
const SMALL_MODELS: [[usize; 3]; 8] = [
    [64, 512, 128],
    [256, 128, 128],
    [1024, 128, 128],
    [1024, 384, 128],
    [1024, 512, 128],
    [1024, 128, 512],
    [2048, 256, 256],
    [2048, 44, 128],
];
/// Weight gradients: a small C and a long sum. m, n, k.
const LONG_SUMS: [[usize; 3]; 6] = [
    [16, 16, 65536],
    [64, 64, 16384],
    [128, 128, 4096],
    [128, 512, 4096],
    [512, 512, 4096],
    [512, 512, 65536],
];

/// Every case, grouped by the first part of its name.
pub(crate) fn cases() -> Vec<Case> {
    let case = |group: &str, [m, n, k]: [usize; 3], layout, quick| Case {
        name: if group == "square" { format!("square/{m}") } else { format!("{group}/{m}x{n}x{k}") },
        op: Op::Gemm(Shape { m, n, k, layout, cold: group.starts_with("cold") }),
        quick,
    };
    let mut all = Vec::new();
    for n in SQUARES {
        all.push(case("square", [n, n, n], Layout::Plain, n <= 512));
    }
    for mnk in ODD {
        all.push(case("odd", mnk, Layout::Plain, mnk[0] == 127));
    }
    for mnk in SMALL_MODELS {
        all.push(case("small", mnk, Layout::TransposedB, mnk[0] == 1024));
    }
    for [n, k] in MODEL_LAYERS {
        for m in MODEL_ROWS {
            // What is decoded or batched thinly meets the same weights again and again.
            let (group, layout) =
                if m < 512 { ("packed", Layout::Packed) } else { ("linear", Layout::TransposedB) };
            let quick = [n, k] == [512, 512] && matches!(m, 1 | 8 | 32 | 512);
            all.push(case(group, [m, n, k], layout, quick));
        }
    }
    for mnk in in_halves() {
        let quick = matches!(mnk, [128, 128, 128] | [1 | 32 | 512, 512, 512] | [128, 128, 4096]);
        all.push(case("bf16", mnk, Layout::Halves, quick));
    }
    for (group, format) in FORMATS {
        for [n, k] in MODEL_LAYERS {
            for m in STORED_ROWS {
                let quick = [n, k] == [512, 512] && m == 1;
                all.push(case(group, [m, n, k], Layout::Stored(format), quick));
            }
        }
    }
    for (group, bits, format, rows) in ROUNDED {
        for [n, k] in MODEL_LAYERS {
            for &m in rows {
                let quick = [n, k] == [512, 512] && (m == 32 || m == 1 && bits == RowBits::Eight);
                all.push(case(group, [m, n, k], Layout::Rounded(bits, format), quick));
            }
        }
    }
    for (group, layout) in COLD {
        for [n, k] in COLD_LAYERS {
            all.push(case(group, [1, n, k], layout, false));
        }
    }
    for mnk in LONG_SUMS {
        all.push(case("gradient", mnk, Layout::TransposedA, mnk == [128, 128, 4096]));
    }
    all
}

/// m, n, k of products in bf16: all shapes of products in f32, once each.
fn in_halves() -> Vec<[usize; 3]> {
    let layers = MODEL_LAYERS.iter().flat_map(|&[n, k]| MODEL_ROWS.map(|m| [m, n, k]));
    let mut shapes: Vec<_> = SQUARES.map(|n| [n, n, n]).into_iter().collect();
    shapes.extend(ODD.into_iter().chain(SMALL_MODELS).chain(layers).chain(LONG_SUMS));
    let mut seen = std::collections::HashSet::new();
    shapes.retain(|mnk| seen.insert(*mnk));
    shapes
}

/// The operands of one case.
#[derive(Debug)]
pub(crate) struct Problem {
    /// The shape.
    pub(crate) shape: Shape,
    /// A, as the layout says.
    pub(crate) a: AlignedVec<f32>,
    /// B, as the layout says.
    pub(crate) b: AlignedVec<f32>,
    /// The copies of B in its reusable form, of which successive calls take the next one.
    pub(crate) copies: usize,
}

/// Elements of C that are compared with the reference.
const CHECKED: usize = 400;

impl Problem {
    /// Random operands in [−1, 1).
    pub(crate) fn new(shape: Shape) -> Problem {
        let mut random = SplitMix64(((shape.m as u64) << 42) ^ ((shape.n as u64) << 21) ^ shape.k as u64);
        let mut fill = |len: usize| AlignedVec::from_fn(len, |_| random.signed_unit());
        let copies = if shape.cold {
            roofline::uncached_bytes(&Machine::detect()).div_ceil(shape.weight_bytes() as u64) as usize
        } else {
            1
        };
        Problem { shape, a: fill(shape.m * shape.k), b: fill(shape.k * shape.n), copies }
    }

    /// Compares elements of C, picked at random and the corners, with sums in f64:
    /// |ĉ − c| ≤ (γ_k + r)·(|A|·|B|) + s, γ_k = ku / (1 − ku), u = 2⁻²⁴, r the rounding that the precision admits
    /// and s what [`Problem::storing`] adds.
    ///
    /// # Errors
    /// Names the first element outside of its bound; NaN is outside.
    pub(crate) fn check(&self, c: &[f32], precision: Precision) -> Result<(), HarnessError> {
        let Shape { m, n, k, .. } = self.shape;
        let ku = k as f64 * 2f64.powi(-24);
        let bound = ku / (1.0 - ku) + rounding(precision);
        let ([a_row, a_col], [b_row, b_col]) = (self.shape.a_strides(), self.shape.b_strides());
        let mut random = SplitMix64(7);
        let corners = [[0, 0], [0, n - 1], [m - 1, 0], [m - 1, n - 1]];
        let picked = (0..CHECKED).map(|_| [random.below(m), random.below(n)]);
        for [i, j] in corners.into_iter().chain(picked) {
            let (mut exact, mut magnitude) = (0.0f64, 0.0f64);
            for p in 0..k {
                let product =
                    f64::from(self.a[i * a_row + p * a_col]) * f64::from(self.b[p * b_row + j * b_col]);
                exact += product;
                magnitude += product.abs();
            }
            let actual = f64::from(c[i * n + j]);
            let within = (actual - exact).abs() <= bound * magnitude + self.storing(i, j, magnitude);
            if !within {
                return Err(HarnessError::Failed(format!(
                    "C[{i}, {j}] is {actual}, but the sum in f64 is {exact}"
                )));
            }
        }
        Ok(())
    }

    /// What fewer bits may add to the error of C[i, j], whose |A|·|B| is `magnitude`.
    ///
    /// An integer is off by half a step, the largest element of its group over 2·127 or 2·7. PyTorch's counterparts
    /// round A, C and the scales to bf16, each by at most 2⁻⁸; its int8 has one scale for all of A, and 7 bits so that
    /// its sums do not saturate, as ours have where a case says so. All are held to that.
    fn storing(&self, i: usize, j: usize, magnitude: f64) -> f64 {
        let Shape { k, layout, .. } = self.shape;
        let (group, steps) = match layout {
            Layout::Halves => (k, f64::INFINITY),
            Layout::Stored(format) | Layout::Rounded(_, format) => match format {
                WeightFormat::F32 | WeightFormat::Bf16 => (k, f64::INFINITY),
                WeightFormat::Int8 => (k, 254.0),
                WeightFormat::Int4 { group } => (group, 14.0),
            },
            _ => return 0.0,
        };
        let ([a_row, a_col], [b_row, b_col]) = (self.shape.a_strides(), self.shape.b_strides());
        let of_b = |p: usize| f64::from(self.b[p * b_row + j * b_col].abs());
        let mut off = 0.0;
        for first in (0..k).step_by(group) {
            let rows = first..(first + group).min(k);
            let largest = rows.clone().map(of_b).fold(0.0, f64::max);
            let of_a: f64 = rows.map(|p| f64::from(self.a[i * a_row + p * a_col].abs())).sum();
            off += of_a * largest / steps;
        }
        if let Layout::Rounded(..) = layout {
            let largest = self.a.iter().fold(0.0, |top: f32, x| top.max(x.abs()));
            off += f64::from(largest) / 126.0 * (0..k).map(of_b).sum::<f64>();
        }
        (1.0 + 2f64.powi(-6)) * off + 2f64.powi(-6) * magnitude
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_look_has_a_score_of_cases() {
        assert!((10..30).contains(&cases().iter().filter(|case| case.quick).count()));
    }

    #[test]
    fn copies_are_more_than_caches_hold() {
        let layout = Layout::Stored(WeightFormat::Int8);
        for cold in [false, true] {
            let problem = Problem::new(Shape { m: 1, n: 512, k: 256, layout, cold });
            let bytes = problem.copies as f64 * problem.shape.weight_bytes();
            let beyond = Machine::detect().caches.iter().all(|cache| bytes > 2.0 * cache.bytes as f64);
            assert_eq!((problem.copies > 1, beyond), (cold, cold));
        }
    }

    #[test]
    fn the_check_sees_a_wrong_element_and_an_unwritten_one() {
        for layout in [Layout::Plain, Layout::TransposedA, Layout::TransposedB] {
            let problem = Problem::new(Shape { m: 3, n: 2, k: 5, layout, cold: false });
            let ([a_row, a_col], [b_row, b_col]) = (problem.shape.a_strides(), problem.shape.b_strides());
            let mut c = vec![0.0f32; 6];
            for (index, c) in c.iter_mut().enumerate() {
                let (i, j) = (index / 2, index % 2);
                *c =
                    (0..5).map(|p| problem.a[i * a_row + p * a_col] * problem.b[p * b_row + j * b_col]).sum();
            }
            problem.check(&c, Precision::Strict).unwrap();
            let off = |by: f32| c.iter().map(|c| c + by).collect::<Vec<f32>>();
            assert!(problem.check(&off(1e-5), Precision::Strict).is_err());
            problem.check(&off(1e-5), Precision::Medium).unwrap();
            assert!(problem.check(&off(0.1), Precision::Medium).is_err());
            assert!(problem.check(&[f32::NAN; 6], Precision::Medium).is_err());
        }
    }
}
