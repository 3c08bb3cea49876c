//! [`Keys`]: the entries of all requests that say what their token is for.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::{Arc, PoisonError, Weak},
    time::Duration,
};

use crossbeam_utils::sync::{ShardedLock, ShardedLockReadGuard, ShardedLockWriteGuard};
use tokio::time::Instant;

use super::{common::Common, endpoint::Endpoint, entry::Entry, reporter::Outlets};
use crate::{
    error::{Kind, TokenError},
    source::TokenRequest,
    time::Now,
    token::AccessToken,
};

/// The entries by key, at most as many as the policy allows.
///
/// An entry is evicted only if that loses nothing: no live token, no flight, no shut gate. It is in use as long as
/// anything but the map holds it, so a flight keeps its entry, and a key never has two.
pub(super) struct Keys {
    /// The endpoint of the cache's own source.
    endpoint: Arc<Endpoint>,
    common: Arc<Common>,
    /// In shards, since each request with a key reads it: few threads write the same cache line.
    map: ShardedLock<Map>,
}

#[derive(Default)]
struct Map {
    entries: HashMap<TokenRequest, Arc<Entry>, BuildHasherDefault<Prehashed>>,
    /// The endpoints of other sources, by the source's address; each endpoint keeps its source alive.
    endpoints: HashMap<usize, Weak<Endpoint>>,
    /// When the map was last swept.
    swept: Option<Instant>,
}

impl Keys {
    pub(super) fn new(endpoint: Arc<Endpoint>, common: Arc<Common>) -> Self {
        Self {
            endpoint,
            common,
            map: ShardedLock::default(),
        }
    }

    /// The token, if it is neither due nor refused.
    pub(super) fn fresh(&self, request: &TokenRequest) -> Option<AccessToken> {
        // Holding the map costs less than another reference to the entry. No source is dropped under it: what a token
        // holds of one, its entry holds too.
        self.read().entries.get(request)?.fresh()
    }

    pub(super) fn get(&self, request: &TokenRequest) -> Option<Arc<Entry>> {
        self.read().entries.get(request).cloned()
    }

    pub(super) fn get_or_insert(&self, request: &TokenRequest) -> Result<Arc<Entry>, TokenError> {
        if let Some(entry) = self.get(request) {
            return Ok(entry);
        }
        let mut map = self.write();
        if let Some(entry) = map.entries.get(request) {
            return Ok(Arc::clone(entry));
        }
        if self.common.closing.is_cancelled() {
            return Err(TokenError::new(Kind::ShutDown));
        }
        let limit = self.common.policy.max_keys;
        let mut evicted = None;
        if map.entries.len() >= limit {
            evicted = map.sweep(Now::read());
        }
        let full = map.entries.len() >= limit;
        let entry = (!full).then(|| {
            let endpoint = map.endpoint(request, &self.endpoint);
            let entry = Entry::new(request.clone(), endpoint, Arc::clone(&self.common));
            map.entries.insert(request.clone(), Arc::clone(&entry));
            entry
        });
        drop(map);
        let gone = evicted.as_ref().map_or(0, Vec::len);
        self.outlets().meters().keys(i64::from(!full) - gone as i64);
        if let Some(evicted) = evicted.as_ref().filter(|evicted| !evicted.is_empty()) {
            self.outlets().keys_evicted(evicted.len());
        }
        if full && evicted.is_some() {
            self.outlets().keys_full(limit);
        }
        // Dropped after the lock, since entries hold errors and sources, which are foreign code.
        drop(evicted);
        entry.ok_or_else(|| TokenError::new(Kind::TooManyKeys))
    }

    /// Takes out all entries.
    pub(super) fn take(&self) -> Vec<Arc<Entry>> {
        let map = std::mem::take(&mut *self.write());
        self.outlets().meters().keys(-(map.entries.len() as i64));
        map.entries.into_values().collect()
    }

    /// Up to `limit` entries, in no particular order.
    pub(super) fn up_to(&self, limit: usize) -> Vec<Arc<Entry>> {
        let map = self.read();
        map.entries.values().take(limit).cloned().collect()
    }

    pub(super) fn outlets(&self) -> &Outlets {
        &self.common.outlets
    }

    fn read(&self) -> ShardedLockReadGuard<'_, Map> {
        self.map.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> ShardedLockWriteGuard<'_, Map> {
        self.map.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        self.common.watching.cancel();
        self.outlets().bus().close();
        let keys = self.read().entries.len();
        self.outlets().meters().keys(-(keys as i64));
    }
}

impl Map {
    /// The endpoint of the source that `request` names, or the cache's `own`.
    fn endpoint(&mut self, request: &TokenRequest, own: &Arc<Endpoint>) -> Arc<Endpoint> {
        let Some(source) = request.own_source() else {
            return Arc::clone(own);
        };
        #[cfg(feature = "test-util")]
        if own.preset.is_some() {
            return Arc::clone(own);
        }
        let known = self.endpoints.entry(source.address()).or_default();
        known.upgrade().unwrap_or_else(|| {
            let endpoint = Arc::new(Endpoint::new(source.clone()));
            *known = Arc::downgrade(&endpoint);
            endpoint
        })
    }

    /// Takes out all idle entries; rate-limited, since it visits each entry.
    fn sweep(&mut self, now: Now) -> Option<Vec<(TokenRequest, Entry)>> {
        let recent = |swept: Instant| now.monotonic < swept + SWEEP_INTERVAL;
        if self.swept.is_some_and(recent) {
            return None;
        }
        self.swept = Some(now.monotonic);
        let idle: Vec<_> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.is_idle(now))
            .map(|(request, _)| request.clone())
            .collect();
        let mut evicted = Vec::new();
        for request in idle {
            let Some((request, entry)) = self.entries.remove_entry(&request) else {
                continue;
            };
            // Unwrapped, so that a late refusal, which uses the registry, finds an entry that is in the map or none.
            match Arc::try_unwrap(entry) {
                Ok(entry) => evicted.push((request, entry)),
                Err(held) => {
                    self.entries.insert(request, held);
                }
            }
        }
        self.endpoints
            .retain(|_, endpoint| endpoint.strong_count() > 0);
        Some(evicted)
    }
}

/// Takes the hash that a [`TokenRequest`] keeps, which is random already.
#[derive(Default)]
struct Prehashed(u64);

impl Hasher for Prehashed {
    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("a token request writes its hash alone");
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// How often a full cache is swept.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        policy::RefreshPolicy,
        source::{SharedSource, source_fn},
    };

    fn keys(limit: usize) -> Keys {
        let source = source_fn(|_| async { Err(TokenError::transient("not asked")) });
        let endpoint = Arc::new(Endpoint::new(SharedSource::new(source)));
        Keys::new(endpoint, Common::new(RefreshPolicy::new().max_keys(limit)))
    }

    fn key(name: &str) -> TokenRequest {
        TokenRequest::new().scope(name)
    }

    /// Law 1: whoever holds an entry may start its flight, so no other may replace it.
    #[test]
    fn an_entry_that_is_held_is_not_evicted() {
        let keys = keys(1);
        let held = keys.get_or_insert(&key("held")).unwrap();
        assert!(keys.get_or_insert(&key("other")).is_err());
        assert!(Arc::ptr_eq(&held, &keys.get(&key("held")).unwrap()));
        drop(held);
        keys.write().swept = None;
        keys.get_or_insert(&key("other")).unwrap();
        assert!(keys.get(&key("held")).is_none());
    }

    #[test]
    fn a_cache_that_was_shut_down_takes_no_key() {
        let keys = keys(9);
        keys.common.closing.cancel();
        assert!(keys.get_or_insert(&key("a")).unwrap_err().is_shut_down());
        assert!(keys.read().entries.is_empty());
    }

    #[test]
    fn one_source_has_one_endpoint_and_none_when_it_is_gone() {
        let keys = keys(1);
        let source = source_fn(|_| async { Err(TokenError::transient("not asked")) });
        let source = SharedSource::new(source);
        let [a, b] = ["a", "b"].map(|name| key(name).source(source.clone()));
        let own = Arc::clone(&keys.endpoint);
        let endpoint = |request: &TokenRequest| keys.write().endpoint(request, &own);
        let first = endpoint(&a);
        assert!(Arc::ptr_eq(&first, &endpoint(&b)));
        assert!(Arc::ptr_eq(&own, &endpoint(&key("a"))));
        drop(first);
        keys.write().sweep(Now::read());
        assert!(keys.read().endpoints.is_empty());
    }
}
