//! Finds an [`Entry`] by its id.
//!
//! A request whose token is refused has to know where the token came from. A reference count for that would cost
//! every request two writes to contended memory, about a tenth of what a header costs; an id costs nothing but one
//! lookup here per refusal.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock, Weak},
};

use super::entry::{Complaint, Entry};
use crate::token::{KeyId, TokenId};

/// Nothing is dropped and no other lock is taken under this one.
static ENTRIES: RwLock<BTreeMap<KeyId, Weak<Entry>>> = RwLock::new(BTreeMap::new());

pub(super) fn add(id: KeyId, entry: Weak<Entry>) {
    let mut entries = ENTRIES.write().unwrap_or_else(PoisonError::into_inner);
    entries.insert(id, entry);
}

/// Takes the API's refusal of a token, for a request that is not sent again.
pub(crate) fn refused(token: TokenId, complaint: Complaint) {
    // If nothing holds the entry any more, nobody can use another token from it.
    if let Some(entry) = find(token.entry()) {
        entry.refused_by_id(token, complaint);
    }
}

fn find(id: KeyId) -> Option<Arc<Entry>> {
    let entries = ENTRIES.read().unwrap_or_else(PoisonError::into_inner);
    entries.get(&id)?.upgrade()
}

pub(super) fn remove(id: KeyId) {
    let mut entries = ENTRIES.write().unwrap_or_else(PoisonError::into_inner);
    entries.remove(&id);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cache::TokenCache,
        source::{TokenRequest, TokenResponse, source_fn},
    };

    #[tokio::test]
    async fn an_entry_is_found_for_as_long_as_its_cache_lives() {
        let cache = TokenCache::new(source_fn(|_| async { TokenResponse::new("token") }));
        let mut ids = Vec::new();
        for key in 0..100 {
            let request = TokenRequest::new().scope(key.to_string());
            ids.push(cache.get_for(&request).await.unwrap().id().entry());
        }
        ids.push(cache.get().await.unwrap().id().entry());
        assert!(ids.iter().all(|id| find(*id).is_some()));
        drop(cache);
        // The tasks of the last flights let go of them.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        let entries = ENTRIES.read().unwrap();
        assert!(ids.iter().all(|id| !entries.contains_key(id)));
    }
}
