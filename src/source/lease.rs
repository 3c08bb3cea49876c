//! [`LeasedLock`]: an async lock whose holder may be asleep.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::OwnedMutexGuard,
    time::{self, Instant},
};

use crate::sync::Mutex;

/// Lets one token request obtain what many need. If it is dropped meanwhile, the next one does.
///
/// A parked runtime drops nothing, so it may hold the lock for a token request that nobody waits for any more. A lock
/// therefore expires after [`LEASE`], whatever has become of its holder (law 6).
pub(super) struct LeasedLock(Mutex<State>);

struct State {
    /// Replaced when its holder is given up as lost.
    lock: Arc<tokio::sync::Mutex<()>>,
    /// When the lease of the last holder ends.
    expires: Instant,
}

impl LeasedLock {
    pub(super) fn new() -> Self {
        Self(Mutex::new(State {
            lock: Arc::default(),
            expires: Instant::now(),
        }))
    }

    /// Waits for the lock, and holds it until the guard is dropped.
    pub(super) async fn acquire(&self) -> OwnedMutexGuard<()> {
        loop {
            let (lock, expires) = {
                let mut state = self.0.lock();
                if let Ok(guard) = state.lock.clone().try_lock_owned() {
                    state.expires = Instant::now() + LEASE;
                    return guard;
                }
                (state.lock.clone(), state.expires)
            };
            let acquired = time::timeout_at(expires, lock.clone().lock_owned()).await;
            let mut state = self.0.lock();
            if !Arc::ptr_eq(&state.lock, &lock) {
                // Another waiter has given its holder up as lost.
                continue;
            }
            match acquired {
                Ok(guard) => {
                    state.expires = Instant::now() + LEASE;
                    return guard;
                }
                // Its queue is dropped too: the next in it may be on the same parked runtime.
                Err(_) if state.expires == expires => state.lock = Arc::default(),
                Err(_) => {}
            }
        }
    }
}

/// As long as an attempt by default.
const LEASE: Duration = Duration::from_secs(10);
