//! [`TokenCache`]: the handle that all users of a token share.
//!
//! Law 1 to law 10, here and in the tests, are the promises that the README numbers.

mod acquire;
mod common;
mod endpoint;
mod entry;
mod events;
mod flight;
mod gate;
mod keys;
#[cfg(test)]
mod laws;
#[cfg(feature = "test-util")]
mod preset;
mod registry;
mod reporter;
mod state;
mod status;
mod watch;

use std::{fmt, sync::Arc};

use tokio::{task::JoinSet, time};

pub(crate) use self::{
    acquire::Acquire,
    entry::{Complaint, Remedy},
    registry::refused,
    watch::Watched,
};
use self::{common::Common, endpoint::Endpoint, entry::Entry, keys::Keys};
pub use self::{
    events::{Events, TokenEvent},
    status::{Status, TokenState},
};
use crate::{
    error::{Kind, RequestKind, TokenError},
    policy::RefreshPolicy,
    source::{Revocation, SharedSource, TokenRequest, TokenSource},
    telemetry::{self, Meters},
    token::AccessToken,
};

/// Keeps tokens and replaces them, with at most one token request in flight for each.
///
/// There is one token for requests without a [`TokenRequest`], and one for each different `TokenRequest`. What is said
/// below of the token holds for each of them.
///
/// Clones are cheap and share everything. One cache can feed many [`BearerAuthLayer`](crate::BearerAuthLayer)s
/// and, without tower, anything else that needs a token: a gRPC interceptor, a WebSocket handshake, a
/// message broker's login.
///
/// Making one needs no runtime and sends nothing. The first caller of [`get`](Self::get), or the first request through
/// a layer, starts the first token request. It runs in a task on that caller's runtime, and goes on if that caller is
/// dropped.
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
    /// For requests that name nothing, which need no look into the map.
    plain: Arc<Entry>,
    keys: Arc<Keys>,
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
        Self::over(Endpoint::new(SharedSource::new(source)), policy)
    }

    fn over(endpoint: Endpoint, policy: RefreshPolicy) -> Self {
        let endpoint = Arc::new(endpoint);
        let common = Common::new(policy);
        let keys = Keys::new(Arc::clone(&endpoint), Arc::clone(&common));
        Self {
            plain: Entry::new(TokenRequest::new(), endpoint, common),
            keys: Arc::new(keys),
        }
    }

    /// Returns a token that may be sent, and waits for one if there is none.
    ///
    /// A token that is due for refresh is returned at once, while its replacement is fetched in the background.
    /// A token that has already expired when it arrives is still returned to those that waited for it.
    ///
    /// The wait for a token request is bounded by its delay, [`RefreshPolicy::flight_timeout`] and half a second. The
    /// delay is at most 1 s after a success, and 10 s after a token request that was lost with its runtime. If the
    /// token request is lost, the caller waits for one more, and no further.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future at any point loses nothing: a token request that it has started goes on and its
    /// result is kept.
    ///
    /// # Errors
    ///
    /// The error of the token request, or that of the last one while the next is not due. See [`TokenError`].
    ///
    /// # Panics
    ///
    /// If it has to wait on a tokio runtime without timers.
    pub async fn get(&self) -> Result<AccessToken, TokenError> {
        self.get_or_wait(None).await
    }

    /// Returns a token for what `request` names, and waits for one as [`get`](Self::get) does.
    ///
    /// # Cancel safety
    ///
    /// As [`get`](Self::get).
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get), and [`TokenError::is_too_many_keys`] if there is no room for another token.
    ///
    /// # Panics
    ///
    /// As [`get`](Self::get).
    pub async fn get_for(&self, request: &TokenRequest) -> Result<AccessToken, TokenError> {
        self.get_or_wait(Some(request)).await
    }

    /// Returns the current token, if there is one that may be sent.
    ///
    /// Causes no token request.
    pub fn peek(&self) -> Option<AccessToken> {
        self.plain.peek()
    }

    /// Returns the current token for what `request` names, if there is one that may be sent.
    ///
    /// Causes no token request.
    pub fn peek_for(&self, request: &TokenRequest) -> Option<AccessToken> {
        self.entry(request)?.peek()
    }

    /// Tells the cache that `token` was refused, as a 401 with the challenge `invalid_token` does.
    ///
    /// A token that the cache has already replaced is ignored. Otherwise a replacement is fetched in the background,
    /// unless one is on its way, and at most once per cooldown: 5 s, doubling to 60 s while refusals go on. Callers of
    /// [`get`](Self::get) wait for it for at most 1 s, and use the old token after that. No replacement is fetched
    /// during the cooldown, while the next attempt after a failed token request is not due, or outside of a tokio
    /// runtime; then the token is used as before.
    pub fn invalidate(&self, token: &AccessToken) {
        telemetry::invalidated();
        self.refused(token, Complaint::Invalid);
    }

    /// Returns the state of the token and of its token requests: for a health endpoint.
    ///
    /// Causes no token request.
    pub fn status(&self) -> Status {
        self.plain.status()
    }

    /// Returns the state of the token for what `request` names; `None` if no request has asked for it, or if it was
    /// dropped to make room for others.
    ///
    /// Causes no token request.
    pub fn status_for(&self, request: &TokenRequest) -> Option<Status> {
        Some(self.entry(request)?.status())
    }

    /// Returns the states of all tokens: first that of requests without a [`TokenRequest`], and then those of up to
    /// `limit` `TokenRequest`s, in no particular order.
    ///
    /// Causes no token request. They are read one after the other, so they are not a snapshot of one moment.
    pub fn statuses(&self, limit: usize) -> Vec<Status> {
        let keyed = self.keys.up_to(limit);
        let keyed = keyed.iter().map(|entry| entry.status());
        std::iter::once(self.status()).chain(keyed).collect()
    }

    /// Returns a stream of what happens to the tokens of the cache from now on.
    ///
    /// It does not keep the cache alive, and a slow listener does not slow the cache down: one that is more than 256
    /// events behind misses some, and is told how many. Without a listener, an event costs next to nothing.
    ///
    /// ```
    /// use tower_bearer::{TokenCache, TokenEvent, TokenResponse, source_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tower_bearer::TokenError> {
    /// let cache = TokenCache::new(source_fn(|_| async { TokenResponse::new("mF_9.B5f-4.1JqM") }));
    /// let mut events = cache.events();
    /// cache.get().await?;
    /// drop(cache);
    ///
    /// assert!(matches!(events.next().await, Some(TokenEvent::FlightStarted { .. })));
    /// assert!(matches!(events.next().await, Some(TokenEvent::TokenReceived { .. })));
    /// assert!(events.next().await.is_none());
    /// # Ok(())
    /// # }
    /// ```
    pub fn events(&self) -> Events {
        self.keys.outlets().bus().listen()
    }

    /// Ends all background work: token requests under way, and the watch over tokens that are
    /// [kept warm](RefreshPolicy::keep_warm).
    ///
    /// The cache forgets its tokens; copies in a layer and its services go when those are dropped. Callers that wait
    /// for a token, and all later ones, get an error of [`TokenError::is_shut_down`]. This holds for all clones of the
    /// cache and cannot be undone.
    pub fn shutdown(&self) {
        self.close();
    }

    /// Ends all background work as [`shutdown`](Self::shutdown) does, and has the tokens revoked (RFC 7009): the
    /// refresh tokens, which end their sessions, and the access tokens.
    ///
    /// Call it when no more requests are under way, and instead of [`shutdown`](Self::shutdown), which leaves nothing
    /// to revoke. A token that the server is just granting is not known, and is not revoked. The tokens of up to 16
    /// keys are revoked at a time, those of each key within [`RefreshPolicy::attempt_timeout`].
    ///
    /// # Cancel safety
    ///
    /// The cache is shut down at the first poll. Dropping the future after that leaves tokens unrevoked.
    ///
    /// # Errors
    ///
    /// The first error; the other tokens are revoked all the same. A source that cannot revoke tokens gives a
    /// terminal one.
    ///
    /// # Panics
    ///
    /// If there are tokens to be revoked and no tokio runtime.
    pub async fn shutdown_and_revoke(&self) -> Result<(), TokenError> {
        let mut revocations = self.close().into_iter();
        let mut tasks = JoinSet::new();
        let mut outcome = Ok(());
        loop {
            while tasks.len() < REVOCATIONS {
                let Some((entry, revocation)) = revocations.next() else {
                    break;
                };
                tasks.spawn(async move {
                    let limit = entry.policy().attempt_timeout;
                    let revoked = time::timeout(limit, entry.source().revoke(revocation)).await;
                    revoked.unwrap_or_else(|_| {
                        Err(TokenError::new(Kind::Timeout).with_request(RequestKind::Revocation))
                    })
                });
            }
            match tasks.join_next().await {
                Some(revoked) => {
                    let panicked = |_| Err(TokenError::new(Kind::Panicked));
                    outcome = outcome.and(revoked.unwrap_or_else(panicked));
                }
                None => return outcome,
            }
        }
    }

    async fn get_or_wait(&self, request: Option<&TokenRequest>) -> Result<AccessToken, TokenError> {
        match self.attach(request) {
            Some(token) => Ok(token),
            None => self.acquire(request)?.await,
        }
    }

    /// Ends everything and returns the tokens to revoke.
    fn close(&self) -> Vec<(Arc<Entry>, Revocation)> {
        let is_first = !self.is_closed();
        self.plain.closing().cancel();
        // The plain entry first: services hold on to its token.
        let mut entries = vec![Arc::clone(&self.plain)];
        entries.extend(self.keys.take());
        let mut revocations = Vec::new();
        for entry in entries {
            let revocation = entry.close();
            if revocation.refresh_token.is_some() || revocation.access_token.is_some() {
                revocations.push((entry, revocation));
            }
        }
        if is_first {
            self.keys.outlets().shut_down();
        }
        revocations
    }

    /// The token for a request that cannot wait; starts a refresh that is due.
    pub(crate) fn attach(&self, request: Option<&TokenRequest>) -> Option<AccessToken> {
        match keyed(request) {
            None => self.plain.attach(),
            // `acquire` returns the error of a full map.
            Some(request) => {
                let token = self.keys.fresh(request);
                token.or_else(|| self.keys.get_or_insert(request).ok()?.attach_slow())
            }
        }
    }

    /// Tells a request whether it may attach the plain token without reading the monotonic clock.
    pub(crate) fn watched(&self) -> &Watched {
        self.plain.watched()
    }

    /// Waits for a token.
    pub(crate) fn acquire(&self, request: Option<&TokenRequest>) -> Result<Acquire, TokenError> {
        let entry = match keyed(request) {
            None => Arc::clone(&self.plain),
            Some(request) => self.keys.get_or_insert(request)?,
        };
        Ok(Acquire::new(entry))
    }

    /// Takes the API's refusal of `token`, and its reason.
    pub(crate) fn refused(&self, token: &AccessToken, complaint: Complaint) -> Remedy {
        match self.entry(token.request()) {
            Some(entry) => entry.refused(token, complaint),
            None => Remedy::Nothing,
        }
    }

    /// The metrics of this cache.
    pub(crate) fn meters(&self) -> &Meters {
        self.plain.reporter().meters()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.plain.closing().is_cancelled()
    }

    /// Whether the server has voided `token` since it was granted.
    pub(crate) fn is_void(&self, token: &AccessToken) -> bool {
        let entry = self.entry(token.request());
        entry.is_some_and(|entry| entry.is_void(token))
    }

    fn entry(&self, request: &TokenRequest) -> Option<Arc<Entry>> {
        match keyed(Some(request)) {
            None => Some(Arc::clone(&self.plain)),
            Some(request) => self.keys.get(request),
        }
    }
}

/// The request, if it names anything.
fn keyed(request: Option<&TokenRequest>) -> Option<&TokenRequest> {
    request.filter(|request| !request.is_plain())
}

/// How many keys' tokens are revoked at a time.
const REVOCATIONS: usize = 16;

// This keeps a cache from being the source of another one: their retries would add up.
impl<T: TokenSource> From<T> for TokenCache {
    fn from(source: T) -> Self {
        Self::new(source)
    }
}

impl fmt::Debug for TokenCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenCache")
            .field("token", &self.peek())
            .field("policy", self.plain.policy())
            .finish_non_exhaustive()
    }
}
