//! `kavanam report DIR`: everything that can be drawn from `results.json`, drawn again.

use crate::cli::ReportArgs;
use crate::error::HarnessError;
use crate::files;
use crate::report;
use crate::report::results::{CompareResults, FORMAT};

/// Reads `DIR/results.json`, writes what is drawn from it, prints its tables.
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
    report::draw(&args.dir, &results)?;
    print!("{}", report::tables(&results));
    println!("\nreport: {}", args.dir.join("report.html").display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::report::fixture;

    #[test]
    fn everything_is_drawn_from_the_json_alone() {
        let dir = std::env::temp_dir().join(format!("kavanam-report-{}", std::process::id()));
        files::prepare_dir(&dir).unwrap();
        let args = ReportArgs { dir: dir.clone() };
        let error = run(&args).unwrap_err();
        assert!(error.to_string().contains("results.json"), "{error}");

        let mut results = fixture::results();
        files::write_json(&dir.join("results.json"), &results).unwrap();
        run(&args).unwrap();
        assert!(fs::read_to_string(dir.join("report.html")).unwrap().contains("transformer"));
        assert!(fs::read_to_string(dir.join("picture.svg")).unwrap().starts_with("<svg"));

        results.format = FORMAT + 1;
        files::write_json(&dir.join("results.json"), &results).unwrap();
        assert!(run(&args).unwrap_err().to_string().contains("format"));
        fs::remove_dir_all(&dir).unwrap();
    }
}
