//! Every [`Entry`] by its number, for those who have the number alone.
//!
//! A request in flight may come back with a refusal of its token, so it has to know where the token came from. A
//! reference count for that would cost every request two writes to memory that others write as well, about a tenth
//! of what a header costs; a number costs nothing, and one look here for each refusal.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock, Weak},
};

use super::entry::{Complaint, Entry};
use crate::token::{KeyId, TokenId};

/// Nothing is dropped under this lock, and no other one is taken.
static ENTRIES: RwLock<BTreeMap<KeyId, Weak<Entry>>> = RwLock::new(BTreeMap::new());

pub(super) fn add(id: KeyId, entry: Weak<Entry>) {
    let mut entries = ENTRIES.write().unwrap_or_else(PoisonError::into_inner);
    entries.insert(id, entry);
}

/// Hears that the API refused a token, from a request that is not to be sent again.
pub(crate) fn refused(token: TokenId, complaint: Complaint) {
    // With nobody left who holds the entry, nobody is left to get another token from it.
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
    async fn an_entry_is_found_for_as_long_as_its_cache_is_there() {
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
