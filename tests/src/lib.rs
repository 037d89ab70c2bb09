//! Cross-crate contract tests; the tests themselves stand in `tests/tests/`.
