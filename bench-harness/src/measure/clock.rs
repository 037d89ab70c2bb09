//! The time: a monotonic clock that tests can replace, and the calendar's date for file names.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A clock that never goes back.
pub(crate) trait Clock {
    /// Nanoseconds since some fixed moment.
    fn now_ns(&self) -> f64;
}

/// The system's monotonic clock.
pub(crate) struct Monotonic(Instant);

impl Monotonic {
    /// A clock that starts now.
    pub(crate) fn start() -> Monotonic {
        Monotonic(Instant::now())
    }
}

impl Clock for Monotonic {
    fn now_ns(&self) -> f64 {
        // A double counts nanoseconds exactly for a hundred days.
        self.0.elapsed().as_nanos() as f64
    }
}

/// Now, UTC, as `2026-11-23T04:05:06Z`.
pub(crate) fn utc_now() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
    format_utc(seconds)
}

/// Today, UTC, as `2026-11-23`.
pub(crate) fn utc_date() -> String {
    utc_now().chars().take(10).collect()
}

/// `2026-11-23T04:05:06Z` for the seconds since 1970.
///
/// # Source
/// The inverse of the Julian day number in the proleptic Gregorian calendar, years counted from March.
fn format_utc(seconds: u64) -> String {
    let days = seconds / 86_400;
    let second = seconds % 86_400;
    // Count from 0000-03-01: an era is 400 years of 146,097 days, and a leap day comes last.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3_600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_around_leap_days() {
        assert_eq!(format_utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(format_utc(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(format_utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(format_utc(1_709_251_200), "2024-03-01T00:00:00Z");
        assert_eq!(format_utc(1_767_225_599), "2025-12-31T23:59:59Z");
    }
}
