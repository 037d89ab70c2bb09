//! Instruction-set tokens: to hold an [`Isa`] is the proof that this CPU has it.
//!
//! The best set is found at run time, so a downstream build needs no `target-cpu` and no feature
//! flag. A kernel is one generic body over [`pulp::Simd`]; [`Isa::dispatch`] enters the shell that
//! is compiled for the token's set. rayon stays outside of that shell: a closure handed to it
//! inside would be compiled without the set's features.

use std::fmt;
use std::str::FromStr;

use pulp::{Simd, WithSimd};

use crate::error::IsaError;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(all(target_arch = "x86_64", target_os = "linux", any(test, feature = "testing")))]
mod emulated_amx;

/// The name of an instruction set, whether or not this CPU has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IsaName {
    /// Portable Rust, one lane; no fused multiply-add.
    Scalar,
    /// 64-bit Arm Advanced SIMD, four f32 lanes.
    Neon,
    /// x86-64-v3: AVX2 and FMA, eight f32 lanes.
    Avx2,
    /// AVX2 and dot products of bytes in vectors of 256 bits (AVX-VNNI), for products of int8. All else is what
    /// [`IsaName::Avx2`] runs.
    Avx2Vnni,
    /// x86-64-v4: AVX-512 F, BW, CD, DQ, VL, sixteen f32 lanes.
    Avx512,
    /// AVX-512 and dot products of bytes (AVX512-VNNI), for products of int8. All else is what [`IsaName::Avx512`] runs.
    Avx512Vnni,
    /// AVX-512 and dot products of bytes and of bf16 (AVX512-VNNI, AVX512-BF16), for products of int8 and those with operands in bf16, of matrices and in attention,
    /// that [`Precision::Medium`](crate::Precision::Medium) permits. All else is what [`IsaName::Avx512`] runs.
    Avx512Bf16,
    /// AVX-512 and the tile unit with bf16 and int8, for matrix products and attention below f32's precision. What runs
    /// on vectors is what [`IsaName::Avx512`] runs.
    Amx,
}

impl IsaName {
    /// Every name, from the narrowest to the widest.
    pub const ALL: [IsaName; 8] = [
        IsaName::Scalar,
        IsaName::Neon,
        IsaName::Avx2,
        IsaName::Avx2Vnni,
        IsaName::Avx512,
        IsaName::Avx512Vnni,
        IsaName::Avx512Bf16,
        IsaName::Amx,
    ];

    /// The word that logs, JSON and `KAVANAM_ISA` use.
    pub const fn as_str(self) -> &'static str {
        match self {
            IsaName::Scalar => "scalar",
            IsaName::Neon => "neon",
            IsaName::Avx2 => "avx2",
            IsaName::Avx2Vnni => "avx2vnni",
            IsaName::Avx512 => "avx512",
            IsaName::Avx512Vnni => "avx512vnni",
            IsaName::Avx512Bf16 => "avx512bf16",
            IsaName::Amx => "amx",
        }
    }
}

impl fmt::Display for IsaName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for IsaName {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Self, IsaError> {
        IsaName::ALL
            .into_iter()
            .find(|isa| isa.as_str().eq_ignore_ascii_case(name))
            .ok_or_else(|| IsaError::Unknown { name: name.to_owned() })
    }
}

#[derive(Debug, Clone, Copy)]
enum Token {
    Scalar(pulp::Scalar),
    #[cfg(target_arch = "x86_64")]
    Avx2(pulp::x86::V3),
    #[cfg(target_arch = "x86_64")]
    Avx2Vnni(pulp::x86::V3),
    #[cfg(target_arch = "x86_64")]
    Avx512(pulp::x86::V4),
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(pulp::x86::V4),
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(pulp::x86::V4),
    #[cfg(target_arch = "x86_64")]
    Amx(pulp::x86::V4),
    /// The tile unit in software, beside the vectors that there are: see `testing::amx`.
    #[cfg(all(target_arch = "x86_64", target_os = "linux", any(test, feature = "testing")))]
    EmulatedAmx(EmulatedBeside),
    /// Dot products of bf16 in plain arithmetic.
    #[cfg(all(target_arch = "x86_64", test))]
    EmulatedBf16(pulp::x86::V3),
    #[cfg(target_arch = "aarch64")]
    Neon(pulp::aarch64::Neon),
}

/// The vectors beside an emulated tile unit.
#[cfg(all(target_arch = "x86_64", target_os = "linux", any(test, feature = "testing")))]
#[derive(Debug, Clone, Copy)]
enum EmulatedBeside {
    Avx2(pulp::x86::V3),
    Avx512(pulp::x86::V4),
}

/// The proof that tile instructions run in this process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiles(());

/// Whether tile instructions, or dot products of bf16, may run beside vectors of S: real ones beside 512 bits alone, those in software that tests use
/// beside 256 too. What asks for the proof of them need not be compiled for others.
#[inline(always)]
pub(crate) const fn may_have_tiles<S: Simd>() -> bool {
    S::F32_LANES == 16 || (S::F32_LANES == 8 && cfg!(any(test, feature = "testing")))
}

/// The proof that dot products of pairs of bf16 and conversions to bf16 run, and the vectors on which they do.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bf16Dots {
    /// AVX512-BF16.
    #[cfg(target_arch = "x86_64")]
    Wide(pulp::x86::V4, Found),
    /// In plain arithmetic.
    #[cfg(all(target_arch = "x86_64", any(test, feature = "testing")))]
    Emulated(pulp::x86::V3),
    /// No other CPU has them.
    #[cfg(not(target_arch = "x86_64"))]
    #[expect(dead_code, reason = "nobody makes one")]
    Never(Nowhere),
}

/// What cannot be made.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Nowhere(std::convert::Infallible);

#[cfg(not(target_arch = "x86_64"))]
impl Nowhere {
    /// Never called, as nobody has one.
    pub(crate) fn never(self) -> ! {
        match self.0 {}
    }
}

/// What only this module can make.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found(());

/// An instruction set that this CPU has. There is no way to make one that it has not.
#[derive(Debug, Clone, Copy)]
pub struct Isa(Token);

impl Isa {
    /// The portable set, which every CPU has.
    pub fn scalar() -> Isa {
        Isa(Token::Scalar(pulp::Scalar::new()))
    }

    /// The set of that name.
    ///
    /// # Errors
    /// [`IsaError::Unsupported`] when the CPU lacks it.
    pub fn new(name: IsaName) -> Result<Isa, IsaError> {
        let token = match name {
            IsaName::Scalar => Some(Isa::scalar()),
            #[cfg(target_arch = "x86_64")]
            IsaName::Avx2 => pulp::x86::V3::try_new().map(|t| Isa(Token::Avx2(t))),
            #[cfg(target_arch = "x86_64")]
            IsaName::Avx2Vnni => Isa::avx2_vnni(),
            #[cfg(target_arch = "x86_64")]
            IsaName::Avx512 => pulp::x86::V4::try_new().map(|t| Isa(Token::Avx512(t))),
            #[cfg(target_arch = "x86_64")]
            IsaName::Avx512Vnni => Isa::avx512_vnni(),
            #[cfg(target_arch = "x86_64")]
            IsaName::Avx512Bf16 => Isa::avx512_bf16(),
            #[cfg(target_arch = "x86_64")]
            IsaName::Amx => Isa::amx(),
            #[cfg(target_arch = "aarch64")]
            IsaName::Neon => pulp::aarch64::Neon::try_new().map(|t| Isa(Token::Neon(t))),
            #[allow(unreachable_patterns)]
            _ => None,
        };
        token.ok_or_else(|| IsaError::Unsupported {
            requested: name,
            available: Isa::available().iter().map(|isa| isa.name().as_str()).collect::<Vec<_>>().join(", "),
        })
    }

    #[cfg(target_arch = "x86_64")]
    fn avx2_vnni() -> Option<Isa> {
        let vectors = pulp::x86::V3::try_new().filter(|_| is_x86_feature_detected!("avxvnni"));
        vectors.map(|t| Isa(Token::Avx2Vnni(t)))
    }

    #[cfg(target_arch = "x86_64")]
    fn avx512_vnni() -> Option<Isa> {
        let vectors = pulp::x86::V4::try_new().filter(|_| is_x86_feature_detected!("avx512vnni"));
        vectors.map(|t| Isa(Token::Avx512Vnni(t)))
    }

    #[cfg(target_arch = "x86_64")]
    fn avx512_bf16() -> Option<Isa> {
        let found = is_x86_feature_detected!("avx512vnni") && Isa::converts();
        pulp::x86::V4::try_new().filter(|_| found).map(|t| Isa(Token::Avx512Bf16(t)))
    }

    #[cfg(target_arch = "x86_64")]
    fn converts() -> bool {
        is_x86_feature_detected!("avx512bf16")
    }

    /// Whether a dot product of bf16 takes longer than the two multiply-adds of f32 that it stands for. Intel's cores finish one in two cycles and four multiply-adds
    /// meanwhile (80 and 164 GFLOP/s in registers on an Emerald Rapids whose tile unit was hidden), AMD's Zen 4 twice as many products as multiply-adds. So f32 serves
    /// [`Precision::Medium`](crate::Precision::Medium) better there (docs/decisions/002-gemm.md).
    #[cfg(target_arch = "x86_64")]
    fn dots_of_bf16_are_slow() -> bool {
        let vendor = std::arch::x86_64::__cpuid(0);
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        name.as_flattened() == b"GenuineIntel"
    }

    /// The set `avx512bf16`: of this CPU, or else in plain arithmetic beside AVX2.
    #[cfg(test)]
    pub(crate) fn avx512_bf16_or_emulated() -> Option<Isa> {
        #[cfg(target_arch = "x86_64")]
        return Isa::avx512_bf16().or_else(|| pulp::x86::V3::try_new().map(|t| Isa(Token::EmulatedBf16(t))));
        #[cfg(not(target_arch = "x86_64"))]
        None
    }

    /// Tiles of bf16 are made by the CPU's own conversion, which every CPU with a tile unit has.
    #[cfg(target_arch = "x86_64")]
    fn amx() -> Option<Isa> {
        pulp::x86::V4::try_new().filter(|_| Isa::converts() && amx::available()).map(|t| Isa(Token::Amx(t)))
    }

    /// The tile unit in software, beside the widest vectors that there are; `None` where they have fewer than eight lanes.
    ///
    /// # Safety
    /// Tile instructions must be emulated in this process from now on.
    #[cfg(all(target_arch = "x86_64", target_os = "linux", any(test, feature = "testing")))]
    unsafe fn with_emulated_tiles() -> Option<Isa> {
        let wide = pulp::x86::V4::try_new().map(EmulatedBeside::Avx512);
        let vectors = wide.or_else(|| pulp::x86::V3::try_new().map(EmulatedBeside::Avx2));
        vectors.map(|vectors| Isa(Token::EmulatedAmx(vectors)))
    }

    /// See `testing::amx`.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn amx_or_emulated() -> Option<Isa> {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        return emulated_amx::amx();
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        None
    }

    /// The proof that tile instructions run, where they do.
    pub(crate) fn tiles(self) -> Option<Tiles> {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Token::Amx(_) => Some(Tiles(())),
            #[cfg(all(target_arch = "x86_64", target_os = "linux", any(test, feature = "testing")))]
            Token::EmulatedAmx(_) => Some(Tiles(())),
            _ => None,
        }
    }

    /// The proof that dot products of bf16 run, where they do and no tiles take their place.
    pub(crate) fn bf16_dots(self) -> Option<Bf16Dots> {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Token::Avx512Bf16(t) => Some(Bf16Dots::Wide(t, Found(()))),
            #[cfg(all(target_arch = "x86_64", test))]
            Token::EmulatedBf16(t) => Some(Bf16Dots::Emulated(t)),
            _ => None,
        }
    }

    /// The proof that conversions to bf16 run, whatever multiplies: wherever tiles do, and dot products.
    pub(crate) fn bf16_conversion(self) -> Option<Bf16Dots> {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Token::Amx(t) => Some(Bf16Dots::Wide(t, Found(()))),
            #[cfg(all(target_arch = "x86_64", target_os = "linux", any(test, feature = "testing")))]
            Token::EmulatedAmx(beside) => match beside {
                EmulatedBeside::Avx512(t) if Isa::converts() => Some(Bf16Dots::Wide(t, Found(()))),
                EmulatedBeside::Avx512(_) => pulp::x86::V3::try_new().map(Bf16Dots::Emulated),
                EmulatedBeside::Avx2(t) => Some(Bf16Dots::Emulated(t)),
            },
            _ => self.bf16_dots(),
        }
    }

    /// The set whose products of bytes run on its vectors: that of its vectors, unless it has dot products.
    pub(crate) fn bytes(self) -> IsaName {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Token::Avx2Vnni(_) => IsaName::Avx2Vnni,
            #[cfg(target_arch = "x86_64")]
            Token::Avx512Vnni(_) | Token::Avx512Bf16(_) => IsaName::Avx512Vnni,
            _ => self.vectors(),
        }
    }

    /// The set of its vectors: its own name, unless that has instructions beside them.
    pub(crate) fn vectors(self) -> IsaName {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Token::Avx2Vnni(_) => IsaName::Avx2,
            #[cfg(target_arch = "x86_64")]
            Token::Avx512Vnni(_) | Token::Avx512Bf16(_) | Token::Amx(_) => IsaName::Avx512,
            #[cfg(all(target_arch = "x86_64", test))]
            Token::EmulatedBf16(_) => IsaName::Avx2,
            #[cfg(all(target_arch = "x86_64", target_os = "linux", any(test, feature = "testing")))]
            Token::EmulatedAmx(EmulatedBeside::Avx2(_)) => IsaName::Avx2,
            #[cfg(all(target_arch = "x86_64", target_os = "linux", any(test, feature = "testing")))]
            Token::EmulatedAmx(EmulatedBeside::Avx512(_)) => IsaName::Avx512,
            _ => self.name(),
        }
    }

    /// The fastest set that this CPU has.
    pub fn best() -> Isa {
        Isa::available().pop().unwrap_or_else(Isa::scalar)
    }

    /// Every set that this CPU has, the slowest first. Tests run over all of them.
    pub fn available() -> Vec<Isa> {
        // `Isa::new` calls this for its error text only, so ask pulp directly.
        let mut all = vec![Isa::scalar()];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(pulp::x86::V3::try_new().map(|t| Isa(Token::Avx2(t))));
            all.extend(Isa::avx2_vnni());
            all.extend(pulp::x86::V4::try_new().map(|t| Isa(Token::Avx512(t))));
            let (bytes, pairs) = (Isa::avx512_vnni(), Isa::avx512_bf16());
            all.extend(
                if Isa::dots_of_bf16_are_slow() { [pairs, bytes] } else { [bytes, pairs] }
                    .into_iter()
                    .flatten(),
            );
            all.extend(Isa::amx());
        }
        #[cfg(target_arch = "aarch64")]
        all.extend(pulp::aarch64::Neon::try_new().map(|t| Isa(Token::Neon(t))));
        all
    }

    /// The set's name.
    pub fn name(self) -> IsaName {
        match self.0 {
            Token::Scalar(_) => IsaName::Scalar,
            #[cfg(target_arch = "x86_64")]
            Token::Avx2(_) => IsaName::Avx2,
            #[cfg(target_arch = "x86_64")]
            Token::Avx2Vnni(_) => IsaName::Avx2Vnni,
            #[cfg(target_arch = "x86_64")]
            Token::Avx512(_) => IsaName::Avx512,
            #[cfg(target_arch = "x86_64")]
            Token::Avx512Vnni(_) => IsaName::Avx512Vnni,
            #[cfg(target_arch = "x86_64")]
            Token::Avx512Bf16(_) => IsaName::Avx512Bf16,
            #[cfg(all(target_arch = "x86_64", test))]
            Token::EmulatedBf16(_) => IsaName::Avx512Bf16,
            #[cfg(target_arch = "x86_64")]
            Token::Amx(_) => IsaName::Amx,
            #[cfg(all(target_arch = "x86_64", target_os = "linux", any(test, feature = "testing")))]
            Token::EmulatedAmx(_) => IsaName::Amx,
            #[cfg(target_arch = "aarch64")]
            Token::Neon(_) => IsaName::Neon,
        }
    }

    /// How many f32 one vector register holds.
    pub fn f32_lanes(self) -> usize {
        struct Lanes;
        impl WithSimd for Lanes {
            type Output = usize;
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) -> usize {
                S::F32_LANES
            }
        }
        self.dispatch(Lanes)
    }

    /// Runs `op` inside the shell compiled for this set.
    // Not inlined: each operation's shells would be compiled once in every unit that calls them.
    pub fn dispatch<Op: WithSimd>(self, op: Op) -> Op::Output {
        match self.0 {
            Token::Scalar(t) => t.vectorize(op),
            #[cfg(target_arch = "x86_64")]
            Token::Avx2(t) | Token::Avx2Vnni(t) => Simd::vectorize(t, op),
            #[cfg(target_arch = "x86_64")]
            Token::Avx512(t) | Token::Avx512Vnni(t) | Token::Avx512Bf16(t) | Token::Amx(t) => {
                Simd::vectorize(t, op)
            }
            #[cfg(all(target_arch = "x86_64", target_os = "linux", any(test, feature = "testing")))]
            Token::EmulatedAmx(EmulatedBeside::Avx2(t)) => Simd::vectorize(t, op),
            #[cfg(all(target_arch = "x86_64", target_os = "linux", any(test, feature = "testing")))]
            Token::EmulatedAmx(EmulatedBeside::Avx512(t)) => Simd::vectorize(t, op),
            #[cfg(all(target_arch = "x86_64", test))]
            Token::EmulatedBf16(t) => Simd::vectorize(t, op),
            #[cfg(target_arch = "aarch64")]
            Token::Neon(t) => Simd::vectorize(t, op),
        }
    }
}

impl PartialEq for Isa {
    fn eq(&self, other: &Isa) -> bool {
        (self.name(), self.vectors()) == (other.name(), other.vectors())
    }
}

impl Eq for Isa {}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalar_is_always_there_and_comes_first() {
        let all = Isa::available();
        assert_eq!(all[0].name(), IsaName::Scalar);
        assert_eq!(Isa::best(), *all.last().unwrap());
        assert!(all.windows(2).all(|w| w[0].f32_lanes() <= w[1].f32_lanes()));
    }

    #[test]
    fn names_parse_back() {
        for name in IsaName::ALL {
            assert_eq!(name.as_str().parse::<IsaName>(), Ok(name));
        }
        let error = "sse9".parse::<IsaName>().unwrap_err();
        assert!(error.to_string().contains("sse9"), "{error}");
    }

    #[test]
    fn an_isa_that_the_cpu_lacks_is_an_error() {
        let foreign = if cfg!(target_arch = "x86_64") { IsaName::Neon } else { IsaName::Avx2 };
        let error = Isa::new(foreign).unwrap_err();
        assert!(error.to_string().contains("it supports: scalar"), "{error}");
    }
}
