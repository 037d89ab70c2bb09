//! What the worker's environment must have: a Python, and the packages of `requirements.txt` or newer ones.

use crate::peers::worker::protocol::{Hello, Package};

/// The file that `pip install -r` is given: lines `package==version`, comments.
const REQUIREMENTS: &str = include_str!("../../../peers/requirements.txt");

/// The oldest Python that the pinned packages are made for.
const OLDEST_PYTHON: &str = "3.11";

/// How the environment is made.
pub(super) const HINT: &str = "\
its environment is made by
  python3 -m venv DIR
  DIR/bin/pip install -r bench-harness/peers/requirements.txt
and named with --python DIR/bin/python";

/// Whether the worker has what it needs.
///
/// # Errors
/// Names what is missing or too old.
pub(super) fn check(hello: &Hello) -> Result<(), String> {
    check_against(REQUIREMENTS, hello)
}

fn check_against(requirements: &str, hello: &Hello) -> Result<(), String> {
    let python = &hello.python;
    if is_older(python, OLDEST_PYTHON) {
        return Err(format!("Python {python} is too old, it needs {OLDEST_PYTHON} or newer"));
    }
    for (name, oldest) in packages(requirements) {
        match hello.packages.get(name) {
            Some(Package::Version(version)) if is_older(version, oldest) => {
                return Err(format!("the package {name} {version} is too old, it needs {oldest} or newer"));
            }
            Some(Package::Version(_)) => {}
            Some(Package::Error(error)) => {
                return Err(format!("the package {name} cannot be imported by Python {python}: {error}"));
            }
            None => return Err(format!("the package {name} is missing")),
        }
    }
    Ok(())
}

fn packages(requirements: &str) -> impl Iterator<Item = (&str, &str)> {
    let lines = requirements.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    lines.filter_map(|line| line.split_once("==")).map(|(name, version)| (name.trim(), version.trim()))
}

/// Compares the numbers of two versions; what follows them (`+cpu`, `rc1`) does not count.
fn is_older(version: &str, than: &str) -> bool {
    numbers(version) < numbers(than)
}

fn numbers(version: &str) -> Vec<u64> {
    let number = |part: &str| {
        let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().ok()
    };
    let public = version.split('+').next().unwrap_or_default();
    let mut numbers: Vec<u64> = public.split('.').map_while(number).collect();
    while numbers.last() == Some(&0) {
        numbers.pop();
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(python: &str, torch: Option<Package>) -> Hello {
        let mut packages = std::collections::BTreeMap::new();
        packages.insert("numpy".to_owned(), Package::Version("2.4.1".into()));
        packages.extend(torch.map(|torch| ("torch".to_owned(), torch)));
        Hello { python: python.into(), packages, engine: vec![] }
    }

    const PINS: &str = "# two packages\ntorch==2.10.0  # with MKL\n\nnumpy==2.4.1\n";

    #[test]
    fn what_is_pinned_or_newer_is_enough() {
        for version in ["2.10.0", "2.10.0+cpu", "2.10", "2.11.0a0+git1", "3.0"] {
            let torch = Some(Package::Version(version.into()));
            check_against(PINS, &hello("3.11.0", torch)).unwrap();
        }
    }

    #[test]
    fn what_is_missing_or_too_old_is_named() {
        let refused = |python: &str, torch| check_against(PINS, &hello(python, torch)).unwrap_err();
        let version = |text: &str| Some(Package::Version(text.to_owned()));
        assert!(refused("3.8.18", version("2.10.0")).contains("Python 3.8.18 is too old, it needs 3.11"));
        let text = refused("3.12.0", version("2.9.1+cpu"));
        assert!(text.contains("torch 2.9.1+cpu is too old, it needs 2.10.0"), "{text}");
        let text = refused("3.12.0", Some(Package::Error("No module named 'torch'".into())));
        assert!(text.contains("torch cannot be imported by Python 3.12.0: No module"), "{text}");
        assert!(refused("3.12.0", None).contains("torch is missing"));
    }

    #[test]
    fn the_file_pins_what_the_worker_imports() {
        let names: Vec<&str> = packages(REQUIREMENTS).map(|(name, _)| name).collect();
        assert_eq!(names, ["torch", "numpy"]);
        assert!(packages(REQUIREMENTS).all(|(_, version)| numbers(version).len() >= 2));
    }
}
