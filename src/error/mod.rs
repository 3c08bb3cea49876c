//! What can go wrong: [`TokenError`] while a token is fetched, [`ConfigError`] while the crate is set up.

mod connection;

use std::{error::Error, fmt, io, sync::Arc, time::Duration};

use http::StatusCode;

#[cfg(feature = "rustls")]
pub(crate) use self::connection::Unresolved;

/// The error type of tower: any error, boxed.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// The reason why there is no token for a request.
///
/// All callers that waited for one token request share its error, so cloning is cheap. Use the predicates, since the
/// text may change. No error holds a token, a secret, or the body of an answer.
///
/// The layer's service returns a [`BoxError`]; downcast it to find a token failure:
///
/// ```
/// use tower_bearer::{BoxError, TokenError};
///
/// fn worth_another_try(error: &BoxError) -> bool {
///     error
///         .downcast_ref::<TokenError>()
///         .is_some_and(TokenError::is_transient)
/// }
/// # assert!(worth_another_try(&TokenError::transient("down").into()));
/// # assert!(!worth_another_try(&TokenError::terminal("refused").into()));
/// ```
#[derive(Clone)]
pub struct TokenError(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    kind: Kind,
    request: RequestKind,
    status: Option<StatusCode>,
    oauth_error: Option<Box<str>>,
    retry_after: Option<Duration>,
    source: Option<Arc<dyn Error + Send + Sync>>,
}

/// The kind of request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestKind {
    Token,
    Metadata,
    Revocation,
}

impl fmt::Display for RequestKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Token => "token",
            Self::Metadata => "metadata",
            Self::Revocation => "revocation",
        })
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The request's URI may not carry a token.
    Insecure,
    /// There is no tokio runtime to run the token request on.
    NoRuntime,
    /// The limit of waiting requests is reached.
    Overloaded,
    /// The limit of keys is reached.
    TooManyKeys,
    /// The cache was shut down.
    ShutDown,
    /// The authorization server could not be reached, or the connection broke.
    Transport,
    /// An attempt, its connection, or all attempts together, took too long.
    Timeout,
    /// The authorization server answered with an RFC 6749 section 5.2 error.
    Rejected { transient: bool },
    /// An HTTP status that is about the endpoint rather than the request: a redirect, 408, 425, 429, 5xx, or any
    /// without an RFC 6749 error.
    Unavailable,
    /// The answer claims success but is no token response, or no usable metadata.
    Malformed,
    /// The client's credentials cannot be sent.
    Credentials,
    /// The client's secret, key or certificate is missing, for now.
    NoCredential,
    /// The server's metadata name another issuer than the configured one.
    OtherIssuer,
    /// The source panicked.
    Panicked,
    /// The runtime that ran the token request ended, or was not driven.
    Abandoned,
    /// A custom source said so.
    Custom { transient: bool },
}

impl Kind {
    /// Whether the same request may succeed later by itself.
    fn is_transient(self) -> bool {
        match self {
            Self::Rejected { transient } | Self::Custom { transient } => transient,
            Self::Overloaded
            | Self::TooManyKeys
            | Self::Transport
            | Self::Timeout
            | Self::Unavailable
            | Self::Malformed
            | Self::NoCredential
            | Self::Panicked
            | Self::Abandoned => true,
            Self::Insecure
            | Self::NoRuntime
            | Self::ShutDown
            | Self::Credentials
            | Self::OtherIssuer => false,
        }
    }
}

impl TokenError {
    /// Creates an error that may pass by itself, for use in a custom [`TokenSource`](crate::TokenSource).
    ///
    /// The cache tries again with backoff.
    pub fn transient(source: impl Into<BoxError>) -> Self {
        Self::new(Kind::Custom { transient: true }).with_source(source)
    }

    /// Creates an error that another try will not resolve, for use in a custom
    /// [`TokenSource`](crate::TokenSource).
    ///
    /// The cache remembers it for 50 % to 100 % of 5 s, doubling to 60 s while it recurs, plus up to a tenth, and then
    /// tries again: secrets get rotated and servers get fixed.
    pub fn terminal(source: impl Into<BoxError>) -> Self {
        Self::new(Kind::Custom { transient: false }).with_source(source)
    }

    /// Sets how long the server asked to be left alone, up to 300 s.
    ///
    /// The token request ends with it, even if attempts are left, and for that long, plus a random part of up to a
    /// tenth, the cache sends no other one for any key of the source. A [`ClientCredentials`](crate::ClientCredentials)
    /// still completes the attempt: if a refresh token gets this answer, the client's own credentials follow.
    #[must_use]
    pub fn with_retry_after(self, retry_after: Duration) -> Self {
        self.map(|inner| inner.retry_after = Some(retry_after.min(RETRY_AFTER_CAP)))
    }

    /// Sets the `error` code that the authorization server gave (RFC 6749 section 5.2). It is part of the error's text.
    ///
    /// In a terminal error, `invalid_client` and `unauthorized_client` hold back all keys of the source, other codes
    /// only the key that was asked for.
    #[must_use]
    pub fn with_oauth_error(self, code: &str) -> Self {
        self.map(|inner| inner.oauth_error = Some(code.into()))
    }

    /// Nobody was asked to revoke a token, since there is no way to.
    pub(crate) fn no_revocation(reason: &'static str) -> Self {
        Self::terminal(reason).with_request(RequestKind::Revocation)
    }

    pub(crate) fn new(kind: Kind) -> Self {
        Self(Arc::new(Inner {
            kind,
            request: RequestKind::Token,
            status: None,
            oauth_error: None,
            retry_after: None,
            source: None,
        }))
    }

    pub(crate) fn with_source(self, source: impl Into<BoxError>) -> Self {
        self.map(|inner| inner.source = Some(Arc::from(source.into())))
    }

    pub(crate) fn with_request(self, request: RequestKind) -> Self {
        self.map(|inner| inner.request = request)
    }

    pub(crate) fn with_status(self, status: StatusCode) -> Self {
        self.map(|inner| inner.status = Some(status))
    }

    /// Returns `true` if the same request may succeed later without anyone doing anything.
    ///
    /// True for transport failures and timeouts; for the statuses 408, 425, 429 and 5xx, and the codes
    /// `temporarily_unavailable`, `server_error` and `slow_down`; for any other answer that is neither a token response
    /// nor an error of RFC 6749 section 5.2, such as a redirect or a firewall's page; for a
    /// [`Credential`](crate::Credential) that cannot be obtained; for a source that panicked and a token request that
    /// was lost; and for the limits on waiting callers and on keys.
    pub fn is_transient(&self) -> bool {
        self.0.kind.is_transient()
    }

    /// Returns `true` if the authorization server refused with an error of RFC 6749 section 5.2.
    pub fn is_rejected(&self) -> bool {
        matches!(self.0.kind, Kind::Rejected { .. })
    }

    /// Returns `true` if the authorization server could not be reached or the connection broke.
    pub fn is_transport(&self) -> bool {
        self.0.kind == Kind::Transport
    }

    /// Returns `true` if an attempt, its connection, or all attempts together took too long.
    ///
    /// A token request that is no longer driven, so that its callers give it up, is one of
    /// [`is_interrupted`](Self::is_interrupted) instead.
    pub fn is_timeout(&self) -> bool {
        self.0.kind == Kind::Timeout
    }

    /// Returns `true` if the authorization server answered with a status that is about the endpoint and not the
    /// request: 408, 425, 429, 5xx, a redirect, or a 4xx without an error of RFC 6749 section 5.2.
    pub fn is_unavailable(&self) -> bool {
        self.0.kind == Kind::Unavailable
    }

    /// Returns `true` if the answer claimed success but was no usable token response (RFC 6749 section 5.1), or no usable
    /// metadata (RFC 8414 section 3.2).
    pub fn is_malformed_response(&self) -> bool {
        self.0.kind == Kind::Malformed
    }

    /// Returns `true` if the token request was lost with its task: the source panicked; or its runtime is gone, is no
    /// longer driven, or has stood still, and the same happened to the next token request.
    pub fn is_interrupted(&self) -> bool {
        matches!(self.0.kind, Kind::Panicked | Kind::Abandoned)
    }

    /// Whether the server does not accept the client's credentials.
    ///
    /// Not every server says `invalid_client` then: for a wrong secret, Keycloak says `unauthorized_client`, Auth0
    /// `access_denied` and Cloud Foundry's UAA `unauthorized`. The status tells this from the other meanings of these
    /// codes: 401 is about the client (RFC 6749 section 5.2).
    pub(crate) fn is_of_unknown_client(&self) -> bool {
        match self.oauth_error() {
            // Or each attempt at a server that is down would be two requests.
            _ if self.is_transient() => false,
            Some("invalid_client") => true,
            Some(
                "invalid_request"
                | "invalid_grant"
                | "invalid_scope"
                | "invalid_target"
                | "unsupported_grant_type",
            )
            | None => false,
            Some(_) => self.status() == Some(StatusCode::UNAUTHORIZED),
        }
    }

    /// Whether it may be about the credentials, though not in the words of RFC 6749: the server has words of its own,
    /// such as the `server_error` of ServiceNow, or a proxy answered, as nginx does about a client certificate.
    pub(crate) fn may_be_of_credentials(&self) -> bool {
        match self.status() {
            Some(StatusCode::UNAUTHORIZED) => self.is_transient(),
            Some(StatusCode::BAD_REQUEST | StatusCode::FORBIDDEN) => self.is_unavailable(),
            // A server that reports errors with a success has no status for this one.
            Some(status) => status.is_success() || self.oauth_error() == Some("invalid_client"),
            None => false,
        }
    }

    /// Whether other credentials may help: these cannot be sent, or the server does not accept them.
    pub(crate) fn is_of_credentials(&self) -> bool {
        self.0.kind == Kind::Credentials || self.is_of_unknown_client()
    }

    /// Whether it is about the client, whatever was asked for.
    pub(crate) fn is_of_client(&self) -> bool {
        // Credentials that cannot be sent fail for every server and key.
        self.is_of_credentials() || self.oauth_error() == Some("unauthorized_client")
    }

    /// Returns `true` if the request was not sent because its URI may not carry a token.
    pub fn is_insecure_uri(&self) -> bool {
        self.0.kind == Kind::Insecure
    }

    /// Returns `true` if as many callers as allowed were waiting for a token already.
    pub fn is_overloaded(&self) -> bool {
        self.0.kind == Kind::Overloaded
    }

    /// Returns `true` if the cache holds tokens for as many
    /// [`TokenRequest`](crate::TokenRequest)s as it may, all of them in use.
    pub fn is_too_many_keys(&self) -> bool {
        self.0.kind == Kind::TooManyKeys
    }

    /// Returns `true` if the cache was [shut down](crate::TokenCache::shutdown).
    pub fn is_shut_down(&self) -> bool {
        self.0.kind == Kind::ShutDown
    }

    /// Returns `true` if a token had to be fetched outside of a tokio runtime.
    pub fn is_no_runtime(&self) -> bool {
        self.0.kind == Kind::NoRuntime
    }

    /// Returns the HTTP status of the authorization server's answer, if there was one.
    pub fn status(&self) -> Option<StatusCode> {
        self.0.status
    }

    /// Returns the `error` code of the authorization server's answer (RFC 6749 section 5.2), such as
    /// `invalid_client`.
    ///
    /// Codes consist of at most 40 lower-case letters and underscores, as all registered ones do. Anything else does
    /// not come from an OAuth server, may echo a secret, and is left out.
    pub fn oauth_error(&self) -> Option<&str> {
        self.0.oauth_error.as_deref()
    }

    /// Returns how long the server asked to be left alone (`Retry-After`, RFC 9110 section 10.2.3),
    /// counted from its answer. Never more than 300 s, the longest time for which the cache follows it.
    ///
    /// The cache leaves the server alone for that long, plus a random part of up to a tenth; in the meantime its
    /// callers get this error. So a retry makes sense after 1.1 times this duration, or sooner if the error was a
    /// remembered one.
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }

    fn map(mut self, change: impl FnOnce(&mut Inner)) -> Self {
        change(Arc::make_mut(&mut self.0));
        self
    }
}

impl fmt::Debug for TokenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenError")
            .field("kind", &self.0.kind)
            .field("request", &self.0.request)
            .field("status", &self.0.status)
            .field("oauth_error", &self.0.oauth_error)
            .field("retry_after", &self.0.retry_after)
            .field("source", &self.0.source)
            .finish()
    }
}

impl TokenError {
    /// The source, if this crate has worded it: a log that shows the message alone then says what to mend. Foreign
    /// words may hold anything.
    fn own_reason(&self) -> Option<&dyn fmt::Display> {
        let source = &**self.0.source.as_ref()?;
        if let Some(reason) = source.downcast_ref::<NoCredential>() {
            return Some(reason);
        }
        let reason = source.downcast_ref::<ConfigError>()?;
        Some(reason)
    }
}

impl fmt::Display for TokenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let request = self.0.request;
        match self.0.kind {
            Kind::Insecure => f.write_str(
                "the request's URI may not carry a token: it is neither https, nor http to a loopback host \
                 or by the setting `dangerous_plain_http`",
            ),
            Kind::NoRuntime => f.write_str("a token can only be fetched within a tokio runtime"),
            Kind::Overloaded => f.write_str("too many requests are waiting for a token"),
            Kind::TooManyKeys => f.write_str("the cache is full of tokens that are in use"),
            Kind::ShutDown => f.write_str("the token cache was shut down"),
            Kind::Transport => write!(f, "the {request} endpoint could not be reached"),
            Kind::Timeout => write!(f, "the {request} request timed out"),
            Kind::Rejected { .. } => {
                write!(f, "the authorization server refused the {request} request")
            }
            Kind::Unavailable => write!(f, "the {request} endpoint is not available"),
            Kind::Malformed | Kind::Custom { .. } if request == RequestKind::Metadata => {
                f.write_str("the authorization server's metadata cannot be used")
            }
            Kind::Custom { .. } if request == RequestKind::Revocation => {
                f.write_str("tokens cannot be revoked")
            }
            Kind::Malformed => {
                f.write_str("the answer to the token request is not a token response")
            }
            Kind::Credentials => f.write_str("the client's credentials cannot be used"),
            Kind::NoCredential => f.write_str("the client's credential could not be obtained"),
            Kind::OtherIssuer => {
                f.write_str("the authorization server's metadata are those of another issuer")
            }
            Kind::Panicked => f.write_str("the token source panicked"),
            Kind::Abandoned => {
                f.write_str("the runtime that ran the token request ended, or stood still")
            }
            Kind::Custom { .. } => f.write_str("the token source failed"),
        }?;
        match (self.0.status, &self.0.oauth_error) {
            (Some(status), Some(code)) => write!(f, " ({code}, status {})", status.as_u16()),
            (Some(status), None) => write!(f, " (status {})", status.as_u16()),
            (None, Some(code)) => write!(f, " ({code})"),
            (None, None) => match (self.connection_cause(), self.own_reason()) {
                (Some(cause), _) => write!(f, " ({cause})"),
                (None, Some(reason)) => write!(f, " ({reason})"),
                (None, None) => Ok(()),
            },
        }
    }
}

impl Error for TokenError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source.as_ref().map(|source| &**source as _)
    }
}

/// The cache obeys no longer `Retry-After`: a server's mistake must not keep a client out for days.
const RETRY_AFTER_CAP: Duration = Duration::from_secs(300);

/// Why a credential could not be obtained.
#[derive(Debug, thiserror::Error)]
#[error("{problem}")]
pub(crate) struct NoCredential {
    pub(crate) problem: String,
    #[source]
    pub(crate) error: Option<io::Error>,
}

/// A setting that cannot work, reported where it enters.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ConfigError {
    message: String,
    source: Option<BoxError>,
}

impl ConfigError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            source: None,
        }
    }

    pub(crate) fn with_source(mut self, source: impl Into<BoxError>) -> Self {
        self.source = Some(source.into());
        self
    }
}
