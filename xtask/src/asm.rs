//! `cargo xtask asm`: reads the assembly of the microkernels and fails when an inner loop spills a register
//! or calls a function: both cost more than a wrong block size, and no test of results notices them.

use std::fs;
use std::path::PathBuf;

use crate::steps;

/// A symbol of a microkernel contains one of these (mangling v0 keeps the names of generic arguments, behind their lengths).
const MICROKERNELS: [&str; 3] = ["outer_product", "dots", "5bytes5Shell"];
/// The epilogue of a tile at an edge: its loop runs over the tile's vectors, and its multiply-adds are an activation's.
const EPILOGUE: &str = "EdgeTile";
/// A loop with at least this many packed multiply-adds is the k-loop of a full-sized tile.
const MULTIPLY_ADDS: usize = 8;

/// Compiles the kernels with `--emit asm` into a target folder of its own and judges every k-loop.
pub(crate) fn run() -> Result<(), String> {
    if !cfg!(target_arch = "x86_64") {
        println!("── assembly: skipped, the rules are written for x86_64");
        return Ok(());
    }
    let target = steps::workspace_root().join("target").join("asm");
    let mut build =
        steps::cargo(&["rustc", "--package", "kavanam-kernels", "--lib", "--release", "--target-dir"]);
    // In as many units as the profile says: this is the code that ships.
    build.arg(&target).args(["--", "--emit", "asm", "-C", "debuginfo=0"]);
    build.args(["-C", "symbol-mangling-version=v0"]);
    steps::run("assembly", build)?;

    let path = newest_assembly(&target.join("release").join("deps"))?;
    let text =
        fs::read_to_string(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let (mut loops, mut faults) = (0, Vec::new());
    for function in functions(&text).into_iter().filter(|f| is_microkernel(f.symbol)) {
        for body in innermost_loops(&function.lines) {
            if body.iter().filter(|line| is_multiply_add(line)).count() < MULTIPLY_ADDS {
                continue;
            }
            loops += 1;
            faults
                .extend(faults_of(&body).into_iter().map(|fault| format!("{fault}, in {}", function.symbol)));
        }
    }
    if loops == 0 {
        return Err("no microkernel loop was found in the assembly: has the kernel been renamed?".to_owned());
    }
    println!("{loops} microkernel loops, {} faults", faults.len());
    if faults.is_empty() { Ok(()) } else { Err(faults.join("\n")) }
}

fn is_microkernel(symbol: &str) -> bool {
    MICROKERNELS.iter().any(|name| symbol.contains(name)) && !symbol.contains(EPILOGUE)
}

/// Of packed f32, of pairs of 16 bits or of bytes, of four bytes, or of two bf16.
fn is_multiply_add(line: &str) -> bool {
    line.contains("vfmadd") && line.contains("ps\t")
        || line.contains("vpmaddwd")
        || line.contains("vpmaddubsw")
        || line.contains("vpdpbusd")
        || line.contains("vdpbf16ps")
}

fn newest_assembly(folder: &std::path::Path) -> Result<PathBuf, String> {
    let entries =
        fs::read_dir(folder).map_err(|error| format!("cannot read {}: {error}", folder.display()))?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("kavanam_kernels") && name.ends_with(".s")
        })
        .max_by_key(|path| path.metadata().and_then(|m| m.modified()).ok())
        .ok_or_else(|| format!("no assembly of kavanam-kernels in {}", folder.display()))
}

/// One function of the assembly.
struct Function<'a> {
    symbol: &'a str,
    lines: Vec<&'a str>,
}

/// Cuts the file at the labels that start a symbol.
fn functions(text: &str) -> Vec<Function<'_>> {
    let mut all: Vec<Function<'_>> = Vec::new();
    for line in text.lines() {
        match line.strip_suffix(':') {
            Some(symbol) if !symbol.starts_with(['.', '\t', ' ']) => {
                all.push(Function { symbol, lines: Vec::new() });
            }
            _ => {
                if let Some(function) = all.last_mut() {
                    function.lines.push(line);
                }
            }
        }
    }
    all
}

/// The lines between a label and a jump back to it, where no other label and no other jump lies between: a k-loop is one
/// block. (A larger span may be no loop at all: the tiles that a strip is cut into are blocks that jump to each other.)
fn innermost_loops<'a>(lines: &[&'a str]) -> Vec<Vec<&'a str>> {
    let mut loops = Vec::new();
    let mut start = None;
    for (at, line) in lines.iter().enumerate() {
        if let Some(label) = line.strip_suffix(':') {
            start = Some((at, label));
            continue;
        }
        let mut words = line.split_whitespace();
        let (Some(mnemonic), Some(target)) = (words.next(), words.next()) else { continue };
        if mnemonic.starts_with('j') {
            if let Some((start, _)) = start.filter(|(_, label)| *label == target) {
                loops.push(lines[start..=at].to_vec());
            }
            start = None;
        }
    }
    loops
}

/// What is wrong with the instructions of a k-loop. One constant may wait on the stack, which costs a load a turn; what the loop writes
/// there may not.
fn faults_of(body: &[&str]) -> Vec<String> {
    // A base pointer that the loop moves points into an operand, not at the stack.
    let operand = body.iter().any(|line| line.ends_with(", %rbp"));
    let on_stack = |instruction: &str| {
        instruction.contains("(%rsp)")
            || instruction.contains("(%rbp)") && instruction.starts_with('v') && !operand
    };
    let (calls, spills): (Vec<&str>, Vec<&str>) = body
        .iter()
        .map(|line| line.trim())
        .filter(|instruction| instruction.starts_with("call") || on_stack(instruction))
        .partition(|instruction| instruction.starts_with("call"));
    let calls = calls.into_iter().map(|call| format!("call in the k-loop: {call}"));
    let writes = spills.iter().any(|instruction| instruction.ends_with(')'));
    let spills = if spills.len() <= 1 && !writes { Vec::new() } else { spills };
    calls.chain(spills.into_iter().map(|spill| format!("spilled register in the k-loop: {spill}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "other:\n\tret\nkernel:\n.LBB0_1:\n\tmovq\t%rax, %rbx\n.LBB0_2:\n\tvfmadd231ps\t%ymm0, \
                        %ymm1, %ymm2\n\tvmovups\t%ymm3, 32(%rsp)\n\tjne\t.LBB0_2\n\tjne\t.LBB0_1\n\tjmp\t.LBB0_9\n";

    #[test]
    fn the_innermost_loop_and_its_spill_are_found() {
        let all = functions(TEXT);
        assert_eq!(all.iter().map(|f| f.symbol).collect::<Vec<_>>(), ["other", "kernel"]);
        let loops = innermost_loops(&all[1].lines);
        assert_eq!(loops.len(), 1);
        assert_eq!(loops[0].len(), 4);
        assert_eq!(faults_of(&loops[0]), ["spilled register in the k-loop: vmovups\t%ymm3, 32(%rsp)"]);
        assert_eq!(faults_of(&["\tcallq\tmemcpy"]).len(), 1);
        let load = "\tvmovups\t(%rbp), %ymm3";
        assert_eq!(faults_of(&[load]), Vec::<String>::new());
        assert_eq!(faults_of(&[load, load]).len(), 2);
        assert_eq!(faults_of(&[load, load, "\taddq\t$32, %rbp"]), Vec::<String>::new());
    }
}
