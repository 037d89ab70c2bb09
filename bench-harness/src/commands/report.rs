//! `kavanam report DIR`: everything that can be drawn from `results.json`, drawn again.

use crate::cli::ReportArgs;
use crate::error::HarnessError;
use crate::files;
use crate::report;
use crate::report::results::{CompareResults, FORMAT};

/// Reads `DIR/results.json` and prints its tables and writes what is drawn from it.
pub(crate) fn run(args: &ReportArgs) -> Result<(), HarnessError> {
    let path = args.dir.join("results.json");
    let results: CompareResults = files::read_json(&path)?;
    if results.format != FORMAT {
        return Err(HarnessError::Failed(format!(
            "{}: format {}, this program reads format {FORMAT}",
            path.display(),
            results.format
        )));
    }
    report::write(&args.dir, &results)?;
    print!("{}", report::tables(&results));
    Ok(())
}
