//! [`TokenCache`]: the handle that all users of a token share.

mod acquire;
mod entry;
mod flight;
#[cfg(test)]
mod laws;
mod state;
mod warm;

use std::{fmt, sync::Arc};

use self::entry::Entry;
pub(crate) use self::{acquire::Acquire, entry::Remedy};
use crate::{
    error::TokenError, policy::RefreshPolicy, source::TokenSource, time::Now, token::AccessToken,
};

/// Keeps a token and replaces it, with at most one token request in flight.
///
/// Clones are cheap and share everything. One cache can feed many [`BearerAuthLayer`](crate::BearerAuthLayer)s
/// and, without tower, anything else that needs a token: a gRPC interceptor, a WebSocket handshake, a
/// message broker's login.
///
/// Making one needs no runtime and sends nothing. The first caller of [`get`](Self::get), or the first
/// request through a layer, causes the first token request, which runs in a task on that caller's
/// runtime and goes on when that caller is dropped.
///
/// ```
/// use tower_bearer::{TokenCache, TokenResponse, source_fn};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), tower_bearer::TokenError> {
/// let cache = TokenCache::new(source_fn(|_fetch| async { TokenResponse::new("mF_9.B5f-4.1JqM") }));
/// assert!(cache.peek().is_none());
///
/// let token = cache.get().await?;
/// assert_eq!(token.header_value(), "Bearer mF_9.B5f-4.1JqM");
/// assert!(cache.peek().is_some());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct TokenCache {
    entry: Arc<Entry>,
}

impl TokenCache {
    /// Creates an empty cache with the default [`RefreshPolicy`].
    #[must_use]
    pub fn new(source: impl TokenSource) -> Self {
        Self::with_policy(source, RefreshPolicy::new())
    }

    /// Creates an empty cache.
    #[must_use]
    pub fn with_policy(source: impl TokenSource, policy: RefreshPolicy) -> Self {
        Self {
            entry: Entry::new(source, policy),
        }
    }

    /// Returns a token that may be sent, and waits for one if there is none.
    ///
    /// A token that is due for refresh is returned at once, while its replacement is fetched in the background.
    /// A token that is dead on arrival is returned to those who waited for it.
    ///
    /// The wait is bounded: by [`RefreshPolicy::flight_timeout`] and half a second for each of at most two token
    /// requests, the second of which comes about only when the first was lost with its runtime, and by 11 s
    /// between the two.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future at any point loses nothing: a token request that it has started goes on and its
    /// result is kept.
    ///
    /// # Errors
    ///
    /// The error of the token request, or the last one's while the next is not due. See [`TokenError`].
    ///
    /// # Panics
    ///
    /// If it has to wait on a tokio runtime without timers.
    pub async fn get(&self) -> Result<AccessToken, TokenError> {
        match self.attach() {
            Some(token) => Ok(token),
            None => self.acquire().await,
        }
    }

    /// Returns the current token, if there is one that may be sent.
    ///
    /// Causes no token request.
    pub fn peek(&self) -> Option<AccessToken> {
        let now = Now::read();
        self.entry.state.lock().attachable(now)
    }

    /// Tells the cache that `token` was refused: what a 401 with the challenge `invalid_token` does.
    ///
    /// Only the token that the cache holds can be refused; one that it has replaced is of no interest. A
    /// replacement is fetched in the background, at most one per cooldown: 5 s, doubling to 60 s while refusals
    /// go on. Callers of [`get`](Self::get) wait for it for at most 1 s and use the old token after that. During
    /// the cooldown, after a failed token request whose retry is not due, and without a tokio runtime,
    /// nothing happens.
    pub fn invalidate(&self, token: &AccessToken) {
        self.refused(token, true);
    }

    /// The token for a request that has no time to wait; starts a refresh that is due.
    pub(crate) fn attach(&self) -> Option<AccessToken> {
        self.entry.fresh().or_else(|| self.entry.use_or_refresh())
    }

    /// Waits for a token.
    pub(crate) fn acquire(&self) -> Acquire {
        Acquire::new(Arc::clone(&self.entry))
    }

    /// Hears that the API refused `token`, and either `named` it invalid or gave no word of it.
    pub(crate) fn refused(&self, token: &AccessToken, named: bool) -> Remedy {
        self.entry.refused(token, named)
    }
}

// This rules out that a cache is a source for another one, whose retries would add up with its own.
impl<T: TokenSource> From<T> for TokenCache {
    fn from(source: T) -> Self {
        Self::new(source)
    }
}

impl fmt::Debug for TokenCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenCache")
            .field("token", &self.peek())
            .field("policy", self.entry.policy())
            .finish_non_exhaustive()
    }
}
