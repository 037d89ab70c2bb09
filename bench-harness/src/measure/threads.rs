//! Thread pools for measuring: one of exactly the size that is measured.

use std::num::NonZeroUsize;

use crate::error::HarnessError;

/// `threads` as the type that a context takes; 0 counts as 1.
pub(crate) fn count(threads: usize) -> NonZeroUsize {
    NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN)
}

/// Runs `work` on a thread of a pool of `threads`; a single thread is the calling one, with no pool at all.
pub(crate) fn run_on<T: Send>(
    threads: NonZeroUsize,
    work: impl FnOnce() -> T + Send,
) -> Result<T, HarnessError> {
    if threads == NonZeroUsize::MIN {
        return Ok(work());
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.get()).build();
    let pool =
        pool.map_err(|error| HarnessError::Failed(format!("cannot start {threads} threads: {error}")))?;
    Ok(pool.install(work))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_has_the_size_that_was_asked_for() {
        assert_eq!(run_on(count(3), rayon::current_num_threads).unwrap(), 3);
        let here = std::thread::current().id();
        assert_eq!(run_on(count(0), || std::thread::current().id()).unwrap(), here);
    }
}
