//! `kavanam machine`: what this CPU is and can do.

use crate::cli::MachineArgs;
use crate::error::HarnessError;
use crate::measure::fingerprint::Machine;

/// Prints the machine.
pub(crate) fn run(args: &MachineArgs) -> Result<(), HarnessError> {
    let machine = Machine::detect();
    if args.json {
        let text = serde_json::to_string_pretty(&machine).expect("plain data always serialises");
        println!("{text}");
    } else {
        print!("{machine}");
    }
    Ok(())
}
