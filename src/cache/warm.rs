//! Refreshes without requests, for caches that opted in to
//! [`keep_warm`](crate::RefreshPolicy::keep_warm).

use std::{sync::Arc, time::Duration};

use tokio::time;

use super::entry::Entry;
use crate::time::Now;

/// Starts the flight that follows the last one once it is due, unless something else does before.
///
/// Every flight of a warm cache ends in this, so the newest one's runtime keeps the watch. It ends with the
/// last handle on the cache.
pub(super) async fn keep(entry: Arc<Entry>) {
    let (this_flight, _) = entry.watch();
    let entry = {
        let weak = Arc::downgrade(&entry);
        drop(entry);
        weak
    };
    while let Some(entry) = entry.upgrade() {
        let (last_flight, due) = entry.watch();
        let Some(due) = due.filter(|_| last_flight == this_flight) else {
            return;
        };
        let wait = due.remaining(Now::read());
        if wait.is_zero() {
            return entry.refresh_if_due();
        }
        drop(entry);
        time::sleep(wait.min(STEP)).await;
    }
}

/// The monotonic clock, and with it this timer, stops while a machine sleeps: look at the wall clock too.
const STEP: Duration = Duration::from_secs(30);
