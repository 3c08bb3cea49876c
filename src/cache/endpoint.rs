//! [`Endpoint`]: what all keys of one source have in common.

use std::{
    panic::{self, AssertUnwindSafe},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

#[cfg(feature = "test-util")]
use super::preset::Preset;
use super::{gate::SharedGate, watch::Watched};
use crate::{
    source::{ErasedSource, SharedSource},
    sync::Mutex,
    telemetry,
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
    /// Whether the source is being asked for new credentials.
    asking: AtomicBool,
    /// The token of the key for nothing in particular, if it is watched.
    watched: Watched,
    /// What is answered instead, if that is settled.
    #[cfg(feature = "test-util")]
    pub(super) preset: Option<Preset>,
}

impl Endpoint {
    pub(super) fn new(source: SharedSource) -> Self {
        Self {
            source,
            gate: Mutex::new(SharedGate::default()),
            not_before: AtomicU64::new(0),
            asking: AtomicBool::new(false),
            watched: Watched::default(),
            #[cfg(feature = "test-util")]
            preset: None,
        }
    }

    pub(super) fn source(&self) -> &dyn ErasedSource {
        self.source.get()
    }

    pub(super) fn grant(&self) -> &'static str {
        self.source.grant()
    }

    pub(super) fn watched(&self) -> &Watched {
        &self.watched
    }

    pub(super) fn not_before(&self) -> u64 {
        self.not_before.load(Ordering::SeqCst)
    }

    pub(super) fn set_not_before(&self, not_before: u64) {
        if self.not_before.swap(not_before, Ordering::SeqCst) != not_before {
            // Whoever comes now is to look whether the token is void.
            self.watched.clear();
        }
    }

    /// Forgets that the client was refused if it can prove its identity by something else now.
    pub(super) fn apply_new_credentials(&self, now: Now) {
        let held = {
            let gate = self.gate.lock();
            gate.remembered()
                .filter(|_| gate.is_renewable(now))
                .cloned()
        };
        // A source is foreign code, and so is the error that is forgotten: neither has a place under the lock. And
        // whoever asks for a token is not to panic for it.
        let is_renewed = || self.source().has_new_credentials();
        // A source that asks its own cache for something meanwhile would be asked again, and so on for ever.
        if held.is_none() || self.asking.swap(true, Ordering::SeqCst) {
            return;
        }
        let is_renewed = panic::catch_unwind(AssertUnwindSafe(is_renewed)).unwrap_or(false);
        self.asking.store(false, Ordering::SeqCst);
        if is_renewed {
            let forgotten = self.gate.lock().renew(now);
            if forgotten.is_some() {
                telemetry::gate_opened("new_credentials");
            }
            drop(forgotten);
        }
    }
}
