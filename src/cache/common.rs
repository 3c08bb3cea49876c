//! [`Common`]: what all keys of one cache share.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::reporter::Outlets;
use crate::policy::RefreshPolicy;

/// A cache's configuration and what ends with the cache.
pub(super) struct Common {
    pub(super) policy: Arc<RefreshPolicy>,
    /// Cancelled when the cache is shut down.
    pub(super) closing: CancellationToken,
    /// Cancelled when the last handle on the cache is dropped: watching is of no use then.
    pub(super) watching: CancellationToken,
    pub(super) outlets: Arc<Outlets>,
}

impl Common {
    pub(super) fn new(policy: RefreshPolicy) -> Arc<Self> {
        Arc::new(Self {
            outlets: Outlets::new(&policy),
            policy: Arc::new(policy),
            closing: CancellationToken::new(),
            watching: CancellationToken::new(),
        })
    }
}
