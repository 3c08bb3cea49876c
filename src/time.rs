//! The one place that reads clocks.
//!
//! Everything else takes a [`Now`] and returns plain values, so that each decision can be tested at any
//! point of either clock.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// One reading of both clocks.
///
/// The monotonic clock stops while a machine sleeps and the wall clock can be set by anybody, so neither
/// alone can tell whether a token is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Now {
    pub(crate) monotonic: Instant,
    pub(crate) wall: SystemTime,
}

impl Now {
    pub(crate) fn read() -> Self {
        Self {
            monotonic: Instant::now(),
            wall: SystemTime::now(),
        }
    }

    /// The moment `after` from here, by both clocks.
    pub(crate) fn after(self, after: Duration) -> Deadline {
        let after = after.min(FAR);
        Deadline {
            monotonic: self.monotonic + after,
            wall: self.wall.checked_add(after),
        }
    }
}

/// A moment that has come as soon as either clock says so.
///
/// That is the careful reading for a token's death (a laptop that slept sends no dead token) and the
/// generous one for a gate (a clock that is set back keeps nobody out).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Deadline {
    monotonic: Instant,
    /// Absent past the end of the clock's range.
    wall: Option<SystemTime>,
}

impl Deadline {
    pub(crate) fn has_come(self, now: Now) -> bool {
        now.monotonic >= self.monotonic || self.wall.is_some_and(|wall| now.wall >= wall)
    }

    /// How long to sleep from `now`: zero when the moment has come.
    pub(crate) fn remaining(self, now: Now) -> Duration {
        if self.has_come(now) {
            return Duration::ZERO;
        }
        self.monotonic.saturating_duration_since(now.monotonic)
    }

    /// The moment that comes last.
    pub(crate) fn latest(self, other: Self) -> Self {
        Self {
            monotonic: self.monotonic.max(other.monotonic),
            // `None` is the end of time.
            wall: self.wall.and_then(|wall| Some(wall.max(other.wall?))),
        }
    }

    pub(crate) fn wall(self) -> Option<SystemTime> {
        self.wall
    }
}

/// Nothing is planned further ahead, which keeps every sum far from the end of a clock's range.
const FAR: Duration = Duration::from_secs(2 * 365 * 24 * 60 * 60);
