//! [`Endpoint`]: what all keys of one source have in common.

use std::sync::atomic::{AtomicU64, Ordering};

use super::gate::SharedGate;
use crate::{
    source::{ErasedSource, SharedSource},
    sync::Mutex,
    time::Now,
};

/// A source, and what is known of the authorization server behind it.
#[derive(Debug)]
pub(super) struct Endpoint {
    source: SharedSource,
    /// Locked by whoever has locked a key's state, and never the other way round.
    pub(super) gate: Mutex<SharedGate>,
    /// The `not_before` that came with the last token of any key.
    not_before: AtomicU64,
}

impl Endpoint {
    pub(super) fn new(source: SharedSource) -> Self {
        Self {
            source,
            gate: Mutex::new(SharedGate::default()),
            not_before: AtomicU64::new(0),
        }
    }

    pub(super) fn source(&self) -> &dyn ErasedSource {
        self.source.get()
    }

    #[inline]
    pub(super) fn not_before(&self) -> u64 {
        // Nothing else is read by its value.
        self.not_before.load(Ordering::Relaxed)
    }

    pub(super) fn set_not_before(&self, not_before: u64) {
        self.not_before.store(not_before, Ordering::Relaxed);
    }

    /// Forgets that the client was refused if it can prove its identity by something else now.
    pub(super) fn heed_new_credentials(&self, now: Now) {
        let held = {
            let gate = self.gate.lock();
            gate.remembered().filter(|_| gate.is_refused(now)).cloned()
        };
        // A source is foreign code, and so is the error that is forgotten: neither has a place under the lock.
        if held.is_some() && self.source().has_new_credentials() {
            self.gate.lock().renew();
        }
    }
}
