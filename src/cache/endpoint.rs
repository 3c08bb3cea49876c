//! [`Endpoint`]: what all keys of one source share.

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

/// A source, and what is known about the authorization server behind it.
#[derive(Debug)]
pub(super) struct Endpoint {
    source: SharedSource,
    /// Lock order: a key's state first, then this gate.
    pub(super) gate: Mutex<SharedGate>,
    /// The `not_before` that came with the last token of any key.
    not_before: AtomicU64,
    /// Whether the source is being asked for new credentials.
    asking: AtomicBool,
    /// The plain key's token, if it is watched.
    watched: Watched,
    /// What the cache answers instead of asking the source.
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
            // From now on requests must check whether the token is void.
            self.watched.clear();
        }
    }

    /// Forgets that the client was refused if it has new credentials now.
    pub(super) fn apply_new_credentials(&self, now: Now) {
        let is_renewable = self.gate.lock().is_renewable(now);
        // The source and the forgotten error are foreign code: neither may run under the lock, and a panic must not
        // reach whoever asks for a token.
        let is_renewed = || self.source().has_new_credentials();
        // A source that asks its own cache meanwhile would be asked again, without end.
        if !is_renewable || self.asking.swap(true, Ordering::SeqCst) {
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
