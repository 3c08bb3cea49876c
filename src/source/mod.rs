//! Where tokens come from: the [`TokenSource`] trait and its implementations.
//!
//! [`ClientCredentials`] turn what the `builder` has checked into token requests: `server` says where one goes,
//! `params` what it asks for, `auth` authenticates the client, `request` is what is sent and `response` what comes back,
//! over a `transport`. `refused` remembers credentials that were refused.

#[cfg(feature = "jwt")]
mod assertion;
mod auth;
mod builder;
mod client_credentials;
mod credential;
mod discovery;
#[cfg(feature = "rustls")]
mod https;
mod lease;
mod params;
mod refused;
mod request;
mod response;
mod server;
mod shared;
mod token_request;
mod transport;

use std::{
    fmt,
    future::Future,
    sync::{Arc, OnceLock},
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use tokio::time;

#[cfg(feature = "jwt")]
pub use self::assertion::{AssertionAudience, SigningAlgorithm};
#[cfg(feature = "test-util")]
pub(crate) use self::response::refused;
pub use self::{
    auth::AuthMethod, builder::ClientCredentialsBuilder, client_credentials::ClientCredentials,
    credential::Credential, shared::SharedSource, token_request::TokenRequest,
};
pub(crate) use self::{response::malformed, shared::ErasedSource};
use crate::{
    error::{Kind, TokenError},
    time::Now,
    token::AccessToken,
};

/// Fetches tokens, one attempt at a time.
///
/// A source only asks. The [`TokenCache`](crate::TokenCache) that owns it decides when to ask, how often to try again,
/// how long to wait and who shares the answer. The cache drives every fetch in a task of its own, and drops it when an
/// attempt takes longer than [`RefreshPolicy::attempt_timeout`](crate::RefreshPolicy::attempt_timeout). For one
/// [`TokenRequest`], it never runs two fetches at once, unless one was given up as lost; fetches for different ones may
/// run at the same time.
///
/// [`source_fn`] makes a source from a closure, and an `Arc` of a source is a source too. The trait is not dyn
/// compatible, and need not be: a [`TokenCache`](crate::TokenCache) and a [`SharedSource`] take a source of any type
/// and hide it.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a source of tokens",
    note = "a `ClientCredentialsBuilder` makes one by `.build()?`, and `source_fn` makes one from a closure"
)]
pub trait TokenSource: Send + Sync + 'static {
    /// Makes one attempt to get a token.
    ///
    /// It must not wait for a token of the cache that it serves, nor send requests through a service with that cache's
    /// layer: it would wait for itself until it times out. It may use such a service if it marks its requests with
    /// [`WithoutToken`](crate::WithoutToken).
    ///
    /// # Errors
    ///
    /// Whatever kept the source from getting a token. [`TokenError::is_transient`] tells the cache whether another
    /// attempt right away is worthwhile.
    fn fetch(&self, fetch: Fetch)
    -> impl Future<Output = Result<TokenResponse, TokenError>> + Send;

    /// Tells the authorization server that these tokens are no longer needed (RFC 7009).
    ///
    /// The cache calls it when it is [shut down](crate::TokenCache::shutdown_and_revoke), and at no other time. The
    /// default implementation returns a terminal error.
    ///
    /// # Errors
    ///
    /// Whatever kept the source from revoking one of them.
    fn revoke(
        &self,
        revocation: Revocation,
    ) -> impl Future<Output = Result<(), TokenError>> + Send {
        drop(revocation);
        async { Err(TokenError::no_revocation("the source cannot revoke tokens")) }
    }

    /// Returns whether the client's credentials have changed since the last token request that was refused for them.
    ///
    /// If so, the cache asks for a token at once, although the next attempt is not due yet. If that is refused too, it
    /// ignores further changes for 1 s, doubling to 60 s until a token request succeeds. It calls this method while it
    /// remembers a terminal `invalid_client` or `unauthorized_client`, or what [`ClientCredentials`] takes for one,
    /// possibly for every request, so the method has to be fast. `false` by default.
    fn has_new_credentials(&self) -> bool {
        false
    }

    /// Returns the name of the grant for spans and metrics: `custom` by default.
    ///
    /// It is called once, when the cache or a [`SharedSource`] takes the source. Names are static, since each one makes
    /// new time series. [`ClientCredentials`] reports tokens by a refresh token as `refresh_token`.
    fn grant(&self) -> &'static str {
        "custom"
    }
}

impl<T: TokenSource> TokenSource for Arc<T> {
    fn fetch(
        &self,
        fetch: Fetch,
    ) -> impl Future<Output = Result<TokenResponse, TokenError>> + Send {
        T::fetch(self, fetch)
    }

    fn revoke(
        &self,
        revocation: Revocation,
    ) -> impl Future<Output = Result<(), TokenError>> + Send {
        T::revoke(self, revocation)
    }

    fn has_new_credentials(&self) -> bool {
        T::has_new_credentials(self)
    }

    fn grant(&self) -> &'static str {
        T::grant(self)
    }
}

/// What one attempt to fetch a token needs to know.
#[derive(Debug)]
#[non_exhaustive]
pub struct Fetch {
    /// The number of this attempt within its flight, from 1.
    pub attempt: u32,
    /// How long the attempt may take before it is dropped.
    pub timeout: Duration,
    /// The refresh token that came with the last answer, handed out once: the cache forgets it here.
    ///
    /// Absent if there was none, if it has expired, or after the API has refused the access token, since the refresh
    /// token may have been revoked with it.
    pub refresh_token: Option<RefreshToken>,
    /// What the token is for; empty if the request came without a [`TokenRequest`].
    pub request: TokenRequest,
    /// The claims that the API demands in the token: a JSON object, for the parameter `claims` of the token request
    /// (OpenID Connect Core section 5.5).
    ///
    /// Present after a 401 with the error `insufficient_claims`, or `invalid_token` with claims, which Microsoft's
    /// continuous access evaluation sends to clients that have declared that they can handle it. After a timeout, or a
    /// terminal error that is not about the client, one more attempt follows without them.
    pub claims: Option<String>,
    /// Why the refresh token failed, set by a source before it goes on without.
    pub(crate) refresh_error: Arc<OnceLock<TokenError>>,
}

impl Fetch {
    /// Creates a first attempt of 10 s without a [`TokenRequest`], for tests of a source.
    #[must_use]
    pub fn new() -> Self {
        Self {
            attempt: 1,
            timeout: Duration::from_secs(10),
            refresh_token: None,
            request: TokenRequest::new(),
            claims: None,
            refresh_error: Arc::default(),
        }
    }
}

impl Default for Fetch {
    fn default() -> Self {
        Self::new()
    }
}

/// The tokens of one key, to be revoked.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Revocation {
    /// The last refresh token that the server sent, unless it has expired; even a used one, if no other has replaced
    /// it. Revoke it first, since some servers then revoke the access tokens as well.
    pub refresh_token: Option<RefreshToken>,
    /// The access token, if there is one that has not expired.
    pub access_token: Option<AccessToken>,
}

/// What a source returns: a token, with what the server said about it (RFC 6749 section 5.1).
///
/// ```
/// use std::time::Duration;
/// use tower_bearer::TokenResponse;
///
/// # fn main() -> Result<(), tower_bearer::TokenError> {
/// let response = TokenResponse::new("2YotnFZFEjr1zCsicMWpAA")?.expires_in(Duration::from_secs(300));
/// # let _ = response;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct TokenResponse {
    pub(crate) access_token: SecretString,
    pub(crate) expires_in: Option<Duration>,
    pub(crate) refresh_in: Option<Duration>,
    pub(crate) refresh_token: Option<RefreshToken>,
    pub(crate) scope: Option<String>,
    pub(crate) requested_scope: Option<String>,
    pub(crate) ext_expires_in: Option<Duration>,
    pub(crate) not_before_policy: Option<u64>,
    /// When the request was sent, if the source knows better than its caller.
    pub(crate) sent: Option<Now>,
    /// The grant that was used, if not the one that the source names.
    pub(crate) grant: Option<&'static str>,
}

impl TokenResponse {
    /// Creates a response around an access token of type Bearer.
    ///
    /// # Errors
    ///
    /// [`TokenError::is_malformed_response`] if the token is empty or has a byte outside of visible ASCII,
    /// which could not be put into a header (RFC 6750 section 2.1).
    pub fn new(access_token: impl Into<String>) -> Result<Self, TokenError> {
        let access_token = SecretString::from(access_token.into());
        let text = access_token.expose_secret();
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(malformed(
                "the access token has bytes that no header can carry",
            ));
        }
        Ok(Self {
            access_token,
            expires_in: None,
            refresh_in: None,
            refresh_token: None,
            scope: None,
            requested_scope: None,
            ext_expires_in: None,
            not_before_policy: None,
            sent: None,
            grant: None,
        })
    }

    /// Sets the lifetime, counted from when the request was sent.
    ///
    /// More than a year counts as a year. Without it the cache assumes
    /// [`RefreshPolicy::default_lifetime`](crate::RefreshPolicy::default_lifetime), 300 s.
    #[must_use]
    pub fn expires_in(mut self, lifetime: Duration) -> Self {
        self.expires_in = Some(lifetime);
        self
    }

    /// Sets the time after which the server wants the token to be refreshed.
    ///
    /// It is kept between half and nine tenths of the lifetime, and a random part of up to a tenth of the lifetime is
    /// subtracted: a token of 300 s for which the server says 240 s is refreshed after 210 s to 240 s. Without it, the
    /// cache chooses.
    #[must_use]
    pub fn refresh_in(mut self, after: Duration) -> Self {
        self.refresh_in = Some(after);
        self
    }

    /// Sets the refresh token, which the next [`Fetch`] carries.
    #[must_use]
    pub fn refresh_token(mut self, refresh_token: RefreshToken) -> Self {
        self.refresh_token = Some(refresh_token);
        self
    }

    /// Sets the scope that was granted (RFC 6749 section 3.3).
    #[must_use]
    pub fn scope(mut self, scope: impl Into<String>) -> Self {
        self.scope = Some(scope.into());
        self
    }

    /// Sets the scope that was asked for, so that the cache notices a narrower one.
    #[must_use]
    pub fn requested_scope(mut self, scope: impl Into<String>) -> Self {
        self.requested_scope = Some(scope.into());
        self
    }

    /// Sets the lifetime that applies while the token endpoint fails, counted from when the request was sent, if
    /// [`RefreshPolicy::extended_lifetime`](crate::RefreshPolicy::extended_lifetime) allows it
    /// (`ext_expires_in` at Entra ID).
    #[must_use]
    pub fn ext_expires_in(mut self, lifetime: Duration) -> Self {
        self.ext_expires_in = Some(lifetime);
        self
    }

    /// Sets the moment before which the server has declared all tokens void, in seconds of its own clock
    /// (`not-before-policy` at Keycloak).
    ///
    /// If the value is higher than one that came with another token of the same source, that other token is dropped.
    #[must_use]
    pub fn not_before_policy(mut self, not_before: u64) -> Self {
        self.not_before_policy = Some(not_before);
        self
    }
}

impl fmt::Debug for TokenResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenResponse")
            .field("expires_in", &self.expires_in)
            .field("refresh_in", &self.refresh_in)
            .field("refresh_token", &self.refresh_token)
            .field("scope", &self.scope)
            .finish_non_exhaustive()
    }
}

/// A refresh token (RFC 6749 section 1.5), with the lifetime that its server gave it.
///
/// The text is wiped from memory on drop and never printed.
#[derive(Clone)]
pub struct RefreshToken {
    text: SecretString,
    pub(crate) expires_in: Option<Duration>,
}

impl RefreshToken {
    /// Creates a refresh token that is valid until it is refused.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self {
            text: SecretString::from(text.into()),
            expires_in: None,
        }
    }

    /// Sets the lifetime, counted from when the request was sent (`refresh_expires_in` at Keycloak).
    #[must_use]
    pub fn expires_in(mut self, lifetime: Duration) -> Self {
        self.expires_in = Some(lifetime);
        self
    }

    pub(crate) fn same_text(&self, other: &Self) -> bool {
        self.expose_secret() == other.expose_secret()
    }

    /// Returns the text, to be sent to the token endpoint and nowhere else.
    pub fn expose_secret(&self) -> &str {
        self.text.expose_secret()
    }
}

impl fmt::Debug for RefreshToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RefreshToken")
            .field("expires_in", &self.expires_in)
            .finish_non_exhaustive()
    }
}

/// Makes a [`TokenSource`] from an async closure.
///
/// The closure is called once for each attempt, so it clones what its future needs:
///
/// ```
/// use std::{path::PathBuf, time::Duration};
/// use tower_bearer::{TokenCache, TokenError, TokenResponse, source_fn};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), TokenError> {
/// let path = PathBuf::from("/var/run/secrets/token");
/// let cache = TokenCache::new(source_fn(move |_fetch| {
///     let path = path.clone();
///     async move {
///         let read = tokio::fs::read_to_string(path).await;
///         let text = read.map_err(TokenError::transient)?;
///         Ok(TokenResponse::new(text.trim())?.expires_in(Duration::from_secs(600)))
///     }
/// }));
/// // There is no such file.
/// assert!(cache.get().await.unwrap_err().is_transient());
/// # Ok(())
/// # }
/// ```
#[must_use]
pub fn source_fn<F, Fut>(f: F) -> SourceFn<F>
where
    F: Fn(Fetch) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<TokenResponse, TokenError>> + Send,
{
    SourceFn { f }
}

/// Limits the time of a request to the authorization server.
async fn with_timeout<T>(
    limit: Duration,
    request: impl Future<Output = Result<T, TokenError>>,
) -> Result<T, TokenError> {
    time::timeout(limit, request)
        .await
        .unwrap_or_else(|_| Err(TokenError::new(Kind::Timeout)))
}

/// A [`TokenSource`] made from a closure by [`source_fn`].
#[derive(Clone)]
pub struct SourceFn<F> {
    f: F,
}

impl<F, Fut> TokenSource for SourceFn<F>
where
    F: Fn(Fetch) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<TokenResponse, TokenError>> + Send,
{
    fn fetch(
        &self,
        fetch: Fetch,
    ) -> impl Future<Output = Result<TokenResponse, TokenError>> + Send {
        (self.f)(fetch)
    }
}

impl<F> fmt::Debug for SourceFn<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceFn")
            .field("f", &format_args!("{}", std::any::type_name::<F>()))
            .finish()
    }
}
