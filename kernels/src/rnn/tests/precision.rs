//! `Medium`, `High` and `Highest`: products on dot products of bf16 and on tiles. The error against f64 within a bound that is computed
//! beside it, and the bits that must not change.
//!
//! The rule of the other tests, twice the error of the naive form in the same precision, has no naive form here: two ways to round a state to bf16 part
//! where it lies between two of them. So the naive form runs on numbers that carry a bound of their error ([`Bounded`]).

use std::iter::Sum;
use std::num::NonZeroUsize;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

use proptest::prelude::*;

use super::sequence::{DIRECTIONS, all_but_relu, assert_same_run, cut_in_two, pick, subset};
use super::*;
use crate::gemm::kernel_name;
use crate::rnn::columns;
use crate::rnn::plan::Plan;
use crate::testing::{amx, assert_same_bits};
use crate::{Isa, Precision};

/// What a product leaves out, in parts of 2⁻²³ of `|a·b|`: of Medium `2⁻⁷·(1 + 2⁻⁷)`, of High `2⁻¹⁵·(1 + 2⁻⁸)`, as the tests of the products have it.
const MEDIUM: u32 = (1 << 16) + (1 << 9);
const HIGH: u32 = (1 << 8) + 1;
const HIGHEST: u32 = 0;

/// Each precision that is no product of f32, on every unit that has it: dot products of bf16, and tiles (in software where the CPU has none).
fn for_each_precision(mut property: impl FnMut(&Context, Precision)) {
    if let Some(isa) = Isa::avx512_bf16_or_emulated() {
        let ctx = Context::with_isa(isa).precision(Precision::Medium);
        assert_eq!(kernel_name(&ctx), "bf16_8x48_avx512bf16");
        property(&ctx, Precision::Medium);
    }
    if let Some(isa) = amx() {
        for precision in [Precision::Medium, Precision::High, Precision::Highest] {
            let ctx = Context::with_isa(isa).precision(precision);
            assert!(kernel_name(&ctx).ends_with("_32x32_amx"));
            property(&ctx, precision);
        }
    }
}

/// A number with a bound of how far a computed one may be from it.
///
/// Every product may leave out `LEFT_OUT · 2⁻²³` of its magnitude and the roundings of [`ROUNDINGS`] sums: a sum of products, in any order, is off by
/// at most γ_n of the sum of their magnitudes. So the bound holds for every way to compute the layer in that precision; gates, which are computed in
/// f32, have more room than they need.
#[derive(Debug, Clone, Copy)]
struct Bounded<const LEFT_OUT: u32> {
    value: f64,
    error: f64,
}

/// Terms of the longest sum in these tests, and a few for what is done to it.
const ROUNDINGS: f64 = 200.0;
/// Roundings of an activation.
const OF_A_FUNCTION: f64 = 8.0 * UNIT_ROUNDOFF;

impl<const LEFT_OUT: u32> Bounded<LEFT_OUT> {
    fn of_a_product() -> f64 {
        f64::from(LEFT_OUT) / f64::from(1 << 23) + ROUNDINGS * UNIT_ROUNDOFF
    }

    fn new(value: f64, error: f64) -> Self {
        Bounded { value, error }
    }

    /// The largest magnitude that the computed number may have.
    fn reach(self) -> f64 {
        self.value.abs() + self.error
    }

    fn rounded(self) -> Self {
        Self::new(self.value, self.error + UNIT_ROUNDOFF * self.reach())
    }
}

impl<const LEFT_OUT: u32> From<f32> for Bounded<LEFT_OUT> {
    /// A term of a sum as it is, whose roundings are counted here.
    fn from(x: f32) -> Self {
        let value = f64::from(x);
        Self::new(value, ROUNDINGS * UNIT_ROUNDOFF * value.abs())
    }
}

impl<const LEFT_OUT: u32> From<Bounded<LEFT_OUT>> for f64 {
    fn from(x: Bounded<LEFT_OUT>) -> f64 {
        x.value
    }
}

impl<const LEFT_OUT: u32> PartialEq for Bounded<LEFT_OUT> {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

impl<const LEFT_OUT: u32> PartialOrd for Bounded<LEFT_OUT> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        self.value.partial_cmp(&other.value)
    }
}

impl<const LEFT_OUT: u32> Add for Bounded<LEFT_OUT> {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self::new(self.value + other.value, self.error + other.error).rounded()
    }
}

impl<const LEFT_OUT: u32> Neg for Bounded<LEFT_OUT> {
    type Output = Self;
    fn neg(self) -> Self {
        Self::new(-self.value, self.error)
    }
}

impl<const LEFT_OUT: u32> Sub for Bounded<LEFT_OUT> {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self + -other
    }
}

impl<const LEFT_OUT: u32> Mul for Bounded<LEFT_OUT> {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        let carried = self.value.abs() * other.error + self.error * other.reach();
        let own = Self::of_a_product() * self.reach() * other.reach();
        Self::new(self.value * other.value, carried + own)
    }
}

impl<const LEFT_OUT: u32> Div for Bounded<LEFT_OUT> {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        let least = (other.value.abs() - other.error).max(0.0);
        let value = self.value / other.value;
        Self::new(value, (self.error + value.abs() * other.error) / least).rounded()
    }
}

impl<const LEFT_OUT: u32> AddAssign for Bounded<LEFT_OUT> {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl<const LEFT_OUT: u32> Sum for Bounded<LEFT_OUT> {
    fn sum<I: Iterator<Item = Self>>(terms: I) -> Self {
        terms.fold(Self::zero(), Add::add)
    }
}

impl<const LEFT_OUT: u32> Real for Bounded<LEFT_OUT> {
    fn exp(self) -> Self {
        let steepest = (self.value + self.error).exp();
        Self::new(self.value.exp(), steepest * (self.error + OF_A_FUNCTION))
    }

    fn ln(self) -> Self {
        unreachable!("no recurrent layer takes a logarithm")
    }

    fn tanh(self) -> Self {
        let value = self.value.tanh();
        Self::new(value, self.error.min(2.0) + OF_A_FUNCTION * value.abs())
    }

    /// The slope of the sigmoid is at most 1/4, and its values are 1 apart.
    fn sigmoid(self) -> Self {
        let value = 1.0 / (1.0 + (-self.value).exp());
        Self::new(value, (self.error / 4.0).min(1.0) + OF_A_FUNCTION * value)
    }
}

/// Asserts the bounds, and that they say something: on average they are below `meaning` times the tensor's largest element.
#[track_caller]
fn check<const LEFT_OUT: u32>(ctx: &Context, case: &Case, meaning: Option<f64>) {
    let (out, grads) = case.run(ctx);
    let (bound_out, bound_grads) = case.naive::<Bounded<LEFT_OUT>>();
    let bounds = tensors(&bound_out, &bound_grads);
    for ((name, fast), (_, bounds)) in tensors(&out, &grads).into_iter().zip(bounds) {
        assert_eq!(fast.len(), bounds.len());
        for (i, (&fast, bound)) in fast.iter().zip(bounds).enumerate() {
            let error = (f64::from(fast) - bound.value).abs();
            assert!(
                error <= bound.error,
                "{name}[{i}] on {}, {}: {fast} is off by {error:e}, {bound:?}, {case:?}",
                ctx.isa(),
                ctx.matmul_precision()
            );
        }
        let Some(meaning) = meaning else { continue };
        let largest = bounds.iter().fold(0.0, |most: f64, bound| most.max(bound.value.abs()));
        let mean = bounds.iter().map(|bound| bound.error).sum::<f64>() / bounds.len().max(1) as f64;
        assert!(mean <= meaning * largest, "{name}: a bound of {mean:e} says nothing about {largest:e}");
    }
}

fn check_in_its_precision(ctx: &Context, precision: Precision, case: &Case, meaning: Option<f64>) {
    match precision {
        Precision::Medium => check::<MEDIUM>(ctx, case, meaning),
        Precision::High => check::<HIGH>(ctx, case, meaning.map(|most| most / 100.0)),
        _ => check::<HIGHEST>(ctx, case, meaning.map(|most| most / 100.0)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn errors_are_within_the_bound_of_the_precision(
        // Not ReLU: at its corner the sign of a sum may be another one.
        kind in prop::sample::select(all_but_relu()),
        reverse in any::<bool>(),
        input in 1usize..40,
        hidden in prop::sample::select(vec![1usize, 7, 16, 17, 32, 33, 40]),
        lengths in prop::collection::vec(0usize..4, 1..7),
    ) {
        let seq = lengths.iter().copied().max().unwrap_or(0) + input % 2;
        let case = Case::new(kind, DIRECTIONS[reverse as usize], [seq, input, hidden], &lengths);
        for_each_precision(|ctx, precision| check_in_its_precision(ctx, precision, &case, None));
    }
}

/// One step: with each further one the bound, which knows of no error that cancels another, grows by the sum of a row of `|W_hh|`.
#[test]
fn a_step_is_within_a_bound_that_says_something() {
    for kind in all_but_relu() {
        let case = Case::new(kind, Direction::Forward, [1, 40, 33], &[1, 1, 0, 1]);
        for_each_precision(|ctx, precision| check_in_its_precision(ctx, precision, &case, Some(1.0)));
    }
}

/// Rows are dealt to threads.
#[test]
fn bits_do_not_depend_on_threads() {
    for kind in [Kind::from(Cell::Lstm), Kind::from(Cell::Gru), Kind { cell: Cell::Lstm, projected: true }] {
        let lengths: Vec<usize> = (0..40).map(|b| 1 + (b * 7) % 4).collect();
        let case = Case::new(kind, Direction::Reverse, [4, 33, 72], &lengths);
        for_each_precision(|ctx, _| {
            let one = case.run(ctx);
            for threads in [2, 3] {
                assert_same_run(&one, &case.run(&ctx.threads(NonZeroUsize::new(threads).unwrap())));
            }
        });
    }
}

/// Tiles in software are slow: of their three precisions, which differ in products alone, one.
#[test]
fn bits_do_not_depend_on_which_thread_owns_a_unit() {
    for kind in [Cell::Lstm, Cell::GruResetBefore].map(Kind::from) {
        let case = Case::new(kind, Direction::Forward, [27, 9, 264], &[27, 12]);
        let plan = Plan::new(&case.sequence()).unwrap();
        for_each_precision(|ctx, precision| {
            if precision != Precision::Medium {
                return;
            }
            let one = case.run(ctx);
            let many = ctx.threads(NonZeroUsize::new(2).unwrap());
            assert_eq!(columns::team_size(&many, &plan, &case.weights().sizes()), 2);
            assert_same_run(&one, &case.run(&many));
        });
    }
}

#[test]
fn bits_of_a_row_depend_on_neither_its_neighbours_nor_the_padding() {
    for kind in Kind::all() {
        let case = Case::new(kind, Direction::Reverse, [4, 35, 37], &[3, 4, 0, 2, 4]);
        for_each_precision(|ctx, _| {
            let (whole, whole_grads) = case.run(ctx);
            for (rows, seq) in [(vec![3], 3), (vec![4, 0], 6)] {
                let (out, grads) = subset(&case, &rows, seq).run(ctx);
                let kept = seq.min(case.seq);
                let same = |whole: &[f32], part: &[f32], width: usize| {
                    let len = kept * rows.len() * width;
                    assert_same_bits(&pick(whole, kept, case.batch(), width, &rows), &part[..len]);
                };
                same(&whole.y, &out.y, case.output);
                same(&whole_grads.layer.d_x, &grads.layer.d_x, case.input);
                assert_same_bits(&pick(&whole.h, 1, case.batch(), case.output, &rows), &out.h);
                let (d_h0, of_part) = (&whole_grads.layer.d_h0, &grads.layer.d_h0);
                assert_same_bits(&pick(d_h0, 1, case.batch(), case.output, &rows), of_part);
            }
        });
    }
}

#[test]
fn carrying_the_state_over_a_cut_gives_the_bits_of_one_run() {
    for kind in Kind::all() {
        let case = Case::new(kind, Direction::Forward, [5, 35, 37], &[5, 4, 2]);
        for_each_precision(|ctx, _| cut_in_two(ctx, &case, 3));
    }
}
