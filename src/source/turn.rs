//! [`Turn`]: one at a time, unless that one is asleep.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::OwnedMutexGuard,
    time::{self, Instant},
};

use crate::sync::Mutex;

/// Lets one token request ask for what many need; whoever is dropped meanwhile leaves it to the next.
///
/// A runtime that is parked drops nothing, and keeps the turn of a token request that nobody waits for any more. So a
/// turn is over after [`LEASE`], whatever has become of it (law 6).
pub(super) struct Turn(Mutex<Lease>);

struct Lease {
    /// A new one after each turn that was given up for lost.
    lock: Arc<tokio::sync::Mutex<()>>,
    /// When the turn that was taken last is over.
    over: Instant,
}

impl Turn {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Lease {
            lock: Arc::default(),
            over: Instant::now(),
        }))
    }

    /// Waits for the turn, and has it until the guard is dropped.
    pub(super) async fn take(&self) -> OwnedMutexGuard<()> {
        loop {
            let (lock, over) = {
                let mut lease = self.0.lock();
                if let Ok(guard) = lease.lock.clone().try_lock_owned() {
                    lease.over = Instant::now() + LEASE;
                    return guard;
                }
                (lease.lock.clone(), lease.over)
            };
            let taken = time::timeout_at(over, lock.clone().lock_owned()).await;
            let mut lease = self.0.lock();
            if !Arc::ptr_eq(&lease.lock, &lock) {
                // Somebody else has given that turn up for lost.
                continue;
            }
            match taken {
                Ok(guard) => {
                    lease.over = Instant::now() + LEASE;
                    return guard;
                }
                // The queue goes with it: whoever is next there may be on the same parked runtime.
                Err(_) if lease.over == over => lease.lock = Arc::default(),
                Err(_) => {}
            }
        }
    }
}

/// As long as an attempt, by default.
const LEASE: Duration = Duration::from_secs(10);
