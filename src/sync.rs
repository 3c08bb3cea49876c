//! The mutex for shared state: std's, or loom's.

#[cfg(tower_bearer_loom)]
use loom::sync as imp;
#[cfg(not(tower_bearer_loom))]
use std::sync as imp;

pub(crate) use imp::MutexGuard;

/// A mutex that ignores poisoning.
///
/// While code that may panic runs, the guarded value changes in single assignments or not at all, so the value behind a
/// poisoned lock is still good; and a cache that one panic could kill would do more harm than the panic.
#[derive(Debug)]
pub(crate) struct Mutex<T>(imp::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(imp::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
