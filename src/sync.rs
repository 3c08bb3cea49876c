//! The mutex that shared state is kept in: std's, or the model checker's.

#[cfg(tower_bearer_loom)]
use loom::sync as imp;
#[cfg(not(tower_bearer_loom))]
use std::sync as imp;

pub(crate) use imp::MutexGuard;

/// A mutex that a panic does not close.
///
/// What it guards changes in single assignments or not at all while code that may panic runs, so the value
/// behind a poisoned lock is as good as any other, and a cache that one panic could kill would break
/// more than the panic did.
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
