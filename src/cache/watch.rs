//! Watches the clock between two flights, so that requests do not have to.
//!
//! Reading a clock costs a request about as much as its header. So a flight's task stays behind and watches the
//! monotonic clock for the token, and requests attach the token without reading that clock while it is [`Watched`].
//! They do read the wall clock, coarsely and cheaply, because a sleeping machine or a parked runtime stops the
//! watch. If the wall clock is also set back while the watching runtime is parked, a token is attached for too long,
//! and only the API can refuse it.
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

/// Watches the token until it is due, dead, replaced or refused, and then starts the next flight if the cache is kept
/// warm.
///
/// Every flight for the plain token ends in this, so the newest flight's runtime keeps the watch. It ends with the
/// last handle on the cache.
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
            // Another key is probing the endpoint.
            pause = policy::FLOOR;
        }
        drop(entry);
        time::sleep(pause).await;
    }
}

/// The id of the token that may be attached without another check, or 0: its clock is watched, and it is neither
/// replaced, refused nor void.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watched(Arc<AtomicU64>);

impl Watched {
    #[inline]
    pub(crate) fn is(&self, token: TokenId) -> bool {
        // Relaxed, since all other data is in the token itself.
        self.0.load(Ordering::Relaxed) == token.get()
    }

    pub(super) fn begin(&self, token: TokenId) {
        self.0.store(token.get(), Ordering::SeqCst);
    }

    /// Ends the watch over `token`, unless another one is watched by now.
    pub(super) fn end(&self, token: TokenId) {
        let _ = self
            .0
            .compare_exchange(token.get(), 0, Ordering::SeqCst, Ordering::SeqCst);
    }

    pub(super) fn clear(&self) {
        self.0.store(0, Ordering::SeqCst);
    }
}

/// The watch over one token; it ends with its task, also when a runtime that shuts down drops that.
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

/// The monotonic clock, and with it this timer, stops while a machine sleeps: check the wall clock this often.
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
