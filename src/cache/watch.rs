//! What goes on between two flights: somebody watches the clock for those who have no time to.
//!
//! A clock reading costs a request about as much as its header. So the task of a flight stays behind and watches
//! the monotonic clock for the token, and requests attach it without a look at that clock for as long as they
//! see that it is [`Watched`]. They do look at the wall clock, coarsely, which costs little: a machine that slept,
//! and a runtime that is parked, stop the watch. If the wall clock is set back as well while the runtime that watches is
//! parked, a token is attached for too long, and the API has the last word on it.
//!
//! Tokens with a key are not watched: a cache may hold thousands.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time;

use super::entry::Entry;
use crate::{policy, time::Now, token::TokenId};

/// Watches the token until it is due, dead, replaced or refused, and then starts the flight that follows if the
/// cache is to be kept warm.
///
/// Every flight for the token without a key ends in this, so the newest one's runtime keeps the watch. It
/// ends with the last handle on the cache.
pub(super) async fn run(entry: Arc<Entry>) {
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
        let mut pause = next.remaining(now).min(MAX_SLEEP);
        if next.has_come(now) {
            entry.refresh_if_due();
            if entry.progress().flights != this_flight {
                return;
            }
            // Another key tries whether the endpoint is well.
            pause = policy::FLOOR;
        }
        drop(entry);
        time::sleep(pause).await;
    }
}

/// The id of the token that may be attached without a further look, or 0: somebody watches the clock for it, and
/// it is neither replaced, nor refused, nor void.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watched(Arc<AtomicU64>);

impl Watched {
    #[inline]
    pub(crate) fn is(&self, token: TokenId) -> bool {
        // All else that is known of the token is in the token.
        self.0.load(Ordering::Relaxed) == token.get()
    }

    pub(super) fn begin(&self, token: TokenId) {
        self.0.store(token.get(), Ordering::SeqCst);
    }

    /// Ends the watch over `token`, if no other one is watched by now.
    pub(super) fn end(&self, token: TokenId) {
        let _ = self
            .0
            .compare_exchange(token.get(), 0, Ordering::SeqCst, Ordering::SeqCst);
    }

    pub(super) fn clear(&self) {
        self.0.store(0, Ordering::SeqCst);
    }
}

/// The watch over one token, which ends with its task: a runtime that shuts down drops it.
struct Watch {
    watched: Watched,
    token: TokenId,
}

impl Watch {
    fn begin(entry: &Entry) -> Option<Self> {
        let token = entry.begin_watch()?;
        let watched = entry.watched().clone();
        Some(Self { watched, token })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.watched.end(self.token);
    }
}

/// The monotonic clock, and with it this timer, stops while a machine sleeps: look at the wall clock too.
const MAX_SLEEP: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_watch_ends_no_later_one() {
        let watched = Watched::default();
        let [old, new] = [1, 2].map(|flight| TokenId::new(1, flight));
        watched.begin(old);
        watched.begin(new);
        watched.end(old);
        assert!(watched.is(new) && !watched.is(old));
        watched.end(new);
        assert!(!watched.is(new));
    }
}
