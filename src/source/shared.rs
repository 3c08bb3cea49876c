//! [`SharedSource`]: a source of any type, erased, that many can hold.

use std::{
    fmt,
    future::Future,
    hash::{Hash, Hasher},
    pin::Pin,
    sync::Arc,
};

use super::{Fetch, Revocation, TokenResponse, TokenSource};
use crate::error::TokenError;

/// A token source of any type that requests can name, such as a tenant's.
///
/// Clones of one `SharedSource` are equal; two that were made separately are not. So make one for each tenant, and
/// clone it into the [`TokenRequest`](crate::TokenRequest)s of that tenant: a new one for every request would never
/// find a token in the cache. Failures of the endpoint or of the client's credentials count for all keys of one source.
///
/// The cache's own source serves requests that name none. If every request has to name one, let it refuse:
/// `source_fn(|_| async { Err(TokenError::terminal("no tenant is named")) })`.
///
/// ```
/// use tower_bearer::{SharedSource, TokenCache, TokenRequest, TokenResponse, source_fn};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), tower_bearer::TokenError> {
/// let cache = TokenCache::new(source_fn(|_| async { TokenResponse::new("ours") }));
/// let tenant = SharedSource::new(source_fn(|_| async { TokenResponse::new("the-tenants") }));
///
/// let token = cache.get_for(&TokenRequest::new().source(tenant)).await?;
/// assert_eq!(token.expose_secret(), "the-tenants");
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct SharedSource {
    source: Arc<dyn ErasedSource>,
    /// Asked for once: a source is foreign code, which is not called in the middle of things.
    grant: &'static str,
}

impl SharedSource {
    /// Creates a source that is equal to its clones and to no other.
    #[must_use]
    pub fn new(source: impl TokenSource) -> Self {
        Self {
            grant: source.grant(),
            source: Arc::new(source),
        }
    }

    pub(crate) fn get(&self) -> &dyn ErasedSource {
        &*self.source
    }

    pub(crate) fn grant(&self) -> &'static str {
        self.grant
    }

    /// Distinguishes this source from every other live one.
    pub(crate) fn address(&self) -> usize {
        Arc::as_ptr(&self.source).cast::<()>().addr()
    }
}

impl PartialEq for SharedSource {
    fn eq(&self, other: &Self) -> bool {
        self.address() == other.address()
    }
}

impl Eq for SharedSource {}

impl Hash for SharedSource {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.address().hash(state);
    }
}

impl fmt::Debug for SharedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedSource").finish_non_exhaustive()
    }
}

/// A future of a source whose type is erased.
type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, TokenError>> + Send + 'a>>;

/// The object-safe form of [`TokenSource`].
pub(crate) trait ErasedSource: Send + Sync {
    fn fetch(&self, fetch: Fetch) -> BoxFuture<'_, TokenResponse>;

    fn revoke(&self, revocation: Revocation) -> BoxFuture<'_, ()>;

    fn has_new_credentials(&self) -> bool;
}

impl<T: TokenSource> ErasedSource for T {
    fn fetch(&self, fetch: Fetch) -> BoxFuture<'_, TokenResponse> {
        Box::pin(TokenSource::fetch(self, fetch))
    }

    fn revoke(&self, revocation: Revocation) -> BoxFuture<'_, ()> {
        Box::pin(TokenSource::revoke(self, revocation))
    }

    fn has_new_credentials(&self) -> bool {
        TokenSource::has_new_credentials(self)
    }
}
