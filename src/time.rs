//! The only place that reads clocks.
//!
//! Everything else takes a [`Now`] and returns plain values, so that each decision can be tested at any time of either
//! clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// One reading of both clocks.
///
/// The monotonic clock stops while a machine sleeps, and anybody can set the wall clock, so neither alone can tell
/// whether a token is dead.
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

    /// The moment `after` from now, by both clocks.
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
/// That is strict for a token's death (a laptop that slept sends no dead token) and lenient for a gate (a clock that
/// is set back keeps nobody out).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Deadline {
    monotonic: Instant,
    /// Absent past the end of the clock's range.
    wall: Option<SystemTime>,
}

impl Deadline {
    /// A moment that never comes, unless a test moves the clock by a lifetime.
    #[cfg(feature = "test-util")]
    pub(crate) fn never() -> Self {
        Self {
            monotonic: Instant::now() + FAR * 15,
            wall: None,
        }
    }

    /// Whether it has come by the monotonic clock alone.
    pub(crate) fn is_past(self, now: Instant) -> bool {
        now >= self.monotonic
    }

    pub(crate) fn has_come(self, now: Now) -> bool {
        self.is_past(now.monotonic) || self.wall.is_some_and(|wall| now.wall >= wall)
    }

    /// How long to sleep from `now`: zero if the moment has come.
    pub(crate) fn remaining(self, now: Now) -> Duration {
        if self.has_come(now) {
            return Duration::ZERO;
        }
        self.monotonic.saturating_duration_since(now.monotonic)
    }

    /// The later moment.
    pub(crate) fn latest(self, other: Self) -> Self {
        Self {
            monotonic: self.monotonic.max(other.monotonic),
            // `None` is later than any moment.
            wall: self.wall.and_then(|wall| Some(wall.max(other.wall?))),
        }
    }

    /// The earlier moment.
    pub(crate) fn earliest(self, other: Self) -> Self {
        Self {
            monotonic: self.monotonic.min(other.monotonic),
            wall: match (self.wall, other.wall) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            },
        }
    }

    pub(crate) fn wall(self) -> Option<SystemTime> {
        self.wall
    }
}

/// A moment of the wall clock, to compare with a coarse reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Coarse {
    seconds: i64,
    nanos: u32,
}

impl Coarse {
    /// A moment that never comes.
    pub(crate) const MAX: Self = Self {
        seconds: i64::MAX,
        nanos: 0,
    };

    pub(crate) fn of(moment: SystemTime) -> Self {
        // A clock before 1970 reads as 1970.
        let since = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            nanos: since.subsec_nanos(),
        }
    }

    /// Reads the wall clock as of the system's last tick, a few milliseconds ago, at a quarter of the cost of an exact
    /// reading.
    #[cfg(target_os = "linux")]
    #[inline]
    pub(crate) fn read() -> Self {
        use rustix::time::{ClockId, DynamicClockId, clock_gettime_dynamic};

        // `clock_gettime` panics where the clock is missing.
        match clock_gettime_dynamic(DynamicClockId::Known(ClockId::RealtimeCoarse)) {
            Ok(time) => Self {
                seconds: time.tv_sec,
                nanos: time.tv_nsec as u32,
            },
            // A sandbox may lack it.
            Err(_) => Self::of(SystemTime::now()),
        }
    }

    /// Reads the wall clock, which has no cheaper reading here.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn read() -> Self {
        Self::of(SystemTime::now())
    }
}

/// Nothing is scheduled further ahead, which keeps every sum far from the end of a clock's range.
const FAR: Duration = Duration::from_secs(2 * 365 * 24 * 60 * 60);
