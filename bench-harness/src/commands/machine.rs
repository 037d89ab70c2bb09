//! `kavanam machine`: what this CPU is, and how fast it computes and reads at most.

use kavanam_kernels::{Context, Isa, IsaName};
use serde::Serialize;

use crate::cli::MachineArgs;
use crate::error::HarnessError;
use crate::measure::fingerprint::Machine;
use crate::measure::roofline::{self, Roofline};
use crate::measure::threads;
use crate::report::markdown::Table;

#[derive(Serialize)]
struct Findings {
    machine: Machine,
    limits: Vec<Roofline>,
    tile_peak: &'static str,
}

/// Measures and prints the machine.
pub(crate) fn run(args: &MachineArgs) -> Result<(), HarnessError> {
    let machine = Machine::detect();
    let mut limits = Vec::new();
    let counts = if machine.cores > 1 { vec![1, machine.cores] } else { vec![1] };
    for count in counts.into_iter().map(threads::count) {
        limits.extend(threads::run_on(count, || {
            let context = |isa| Context::with_isa(isa).threads(count);
            let read_gbps = roofline::read_gbps(&context(Isa::best()), &machine);
            let of = |isa| Roofline::measure(&context(isa), read_gbps);
            Isa::available().into_iter().map(of).collect::<Vec<_>>()
        })?);
    }
    let findings = Findings { tile_peak: roofline::tile_peak(&machine), machine, limits };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&findings).expect("plain data always serialises"));
    } else {
        print(&findings);
    }
    Ok(())
}

fn print(findings: &Findings) {
    print!("{}", findings.machine);
    let missing: Vec<&str> =
        IsaName::ALL.into_iter().filter(|name| Isa::new(*name).is_err()).map(IsaName::as_str).collect();
    println!("lacking   {}", missing.join(", "));
    println!("tiles     {}\n", findings.tile_peak);
    let mut table = Table::new(["ISA", "threads", "f32 FMA GFLOP/s", "memory read GB/s"]);
    for limit in &findings.limits {
        table.row([
            limit.isa.clone(),
            limit.threads.to_string(),
            format!("{:.1}", limit.fma_gflops),
            format!("{:.1}", limit.read_gbps),
        ]);
    }
    print!("{table}");
}
