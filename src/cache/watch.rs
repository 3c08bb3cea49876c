//! What goes on between two flights: somebody watches the clock for those who have no time to.
//!
//! A clock reading costs a request about as much as its header. So the task of a flight stays behind and watches
//! the monotonic clock for the token, and requests attach it without a look at that clock for as long as they
//! see that it is [watched](Entry::watched). They do look at the wall clock, coarsely, which costs little: a
//! machine that slept, and a runtime that is parked, stop the watch.
//!
//! Tokens with a key are not watched: a cache may hold thousands.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::time;

use super::entry::Entry;
use crate::time::Now;

/// Watches the token until it is due, dead, replaced or refused, and then starts the flight that follows if the
/// cache is to be kept warm.
///
/// Every flight for the token without a key ends in this, so the newest one's runtime keeps the watch. It
/// ends with the last handle on the cache.
pub(super) async fn keep(entry: Arc<Entry>) {
    let this_flight = entry.progress().flights;
    let mut watch = Watch::begin(&entry);
    let entry = {
        let weak = Arc::downgrade(&entry);
        drop(entry);
        weak
    };
    while let Some(entry) = entry.upgrade() {
        let progress = entry.progress();
        if progress.flights != this_flight {
            return;
        }
        let now = Now::read();
        if progress.fresh_until.is_none_or(|until| until.has_come(now)) {
            watch = None;
        }
        let next = match watch {
            Some(_) => progress.fresh_until,
            None => progress.next_due.filter(|_| entry.stays_warm()),
        };
        let Some(next) = next else {
            return;
        };
        if next.has_come(now) {
            return entry.refresh_if_due();
        }
        drop(entry);
        time::sleep(next.remaining(now).min(STEP)).await;
    }
}

/// The watch over one token, which ends with its task: a runtime that shuts down drops it.
struct Watch {
    entry: Weak<Entry>,
    token: u64,
}

impl Watch {
    fn begin(entry: &Arc<Entry>) -> Option<Self> {
        let token = entry.begin_watch()?;
        let entry = Arc::downgrade(entry);
        Some(Self { entry, token })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.upgrade() {
            entry.end_watch(self.token);
        }
    }
}

/// The monotonic clock, and with it this timer, stops while a machine sleeps: look at the wall clock too.
const STEP: Duration = Duration::from_secs(30);
