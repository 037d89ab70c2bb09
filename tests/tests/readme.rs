//! The README says what the code says.

use kavanam_kernels::IsaName;
use kavanam_kernels::gemm::{KernelInfo, kernels};

const README: &str = include_str!("../../README.md");

/// The rows of the table whose header begins with `first`, each as its cells.
fn table(first: &str) -> Vec<Vec<&'static str>> {
    let header = format!("| {first} |");
    let lines = README.lines().skip_while(|line| !line.starts_with(&header));
    let rows = lines.skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect()
}

fn needs(isa: IsaName) -> &'static str {
    match isa {
        IsaName::Scalar => "any CPU",
        IsaName::Neon => "64-bit Arm",
        IsaName::Avx2 => "x86-64-v3",
        IsaName::Avx2Vnni => "x86-64-v3, AVX-VNNI",
        IsaName::Avx512 => "x86-64-v4",
        IsaName::Avx512Vnni => "x86-64-v4, AVX512-VNNI",
        IsaName::Avx512Bf16 => "x86-64-v4, AVX512-VNNI and BF16",
        IsaName::Amx => "x86-64-v4, AMX",
    }
}

#[test]
fn the_matrix_of_kernels_is_the_table_of_kernels() {
    let row = |kernel: &KernelInfo| {
        vec![
            format!("`{}`", kernel.name),
            needs(kernel.isa).to_owned(),
            format!("{} × {}", kernel.mr, kernel.nr),
        ]
    };
    let expected: Vec<_> = kernels().iter().map(row).collect();
    assert_eq!(table("kernel"), expected);
}
