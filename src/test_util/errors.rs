//! A [`TokenError`] of each kind, as the crate makes them.
//!
//! For tests of code that tells errors apart, together with [`TokenCache::failing`](crate::TokenCache::failing) or
//! as the answer of a [`ScriptedSource`](super::ScriptedSource). [`TokenError::with_retry_after`] works on them, and
//! [`TokenError::transient`] and [`TokenError::terminal`] make those of a custom source.
//!
//! ```
//! use std::time::Duration;
//!
//! use http::StatusCode;
//! use tower_bearer::{BoxError, TokenError, test_util::errors};
//!
//! /// The status of a gateway whose own token could not be obtained.
//! fn status(error: &BoxError) -> StatusCode {
//!     match error.downcast_ref::<TokenError>() {
//!         Some(error) if error.is_timeout() => StatusCode::GATEWAY_TIMEOUT,
//!         Some(error) if error.is_transient() => StatusCode::SERVICE_UNAVAILABLE,
//!         _ => StatusCode::INTERNAL_SERVER_ERROR,
//!     }
//! }
//!
//! assert_eq!(status(&errors::timeout().into()), 504);
//! assert_eq!(status(&errors::unavailable(StatusCode::BAD_GATEWAY).into()), 503);
//! assert_eq!(status(&errors::rejected("invalid_client").into()), 500);
//! // And all the others have some answer.
//! for error in errors::all() {
//!     assert!(status(&error.into()).is_server_error());
//! }
//! ```

use std::io;

use http::StatusCode;

use crate::{
    error::{ConfigError, Kind, NoCredential, TokenError},
    source,
};

/// The token endpoint refused the connection: [`TokenError::is_transport`], transient.
#[must_use]
pub fn transport() -> TokenError {
    TokenError::new(Kind::Transport).with_source(io::Error::from(io::ErrorKind::ConnectionRefused))
}

/// The token request took too long: [`TokenError::is_timeout`], transient.
#[must_use]
pub fn timeout() -> TokenError {
    TokenError::new(Kind::Timeout)
}

/// The token endpoint answered with this status and no OAuth error: [`TokenError::is_unavailable`], transient.
#[must_use]
pub fn unavailable(status: StatusCode) -> TokenError {
    TokenError::new(Kind::Unavailable).with_status(status)
}

/// The authorization server refused with this `error` code (RFC 6749 section 5.2): [`TokenError::is_rejected`].
///
/// Terminal, unless the code is `temporarily_unavailable`, `server_error` or `slow_down`. The status is 401 for
/// `invalid_client` and 400 for others.
///
/// # Panics
///
/// If the code is not made of 1 to 40 lower-case letters and underscores: such an answer is taken for
/// [`unavailable`].
#[must_use]
#[track_caller]
pub fn rejected(code: &str) -> TokenError {
    let status = match code {
        "invalid_client" => StatusCode::UNAUTHORIZED,
        _ => StatusCode::BAD_REQUEST,
    };
    let error = source::refused(status, code);
    assert!(error.is_rejected(), "not an OAuth error code: {code:?}");
    error.with_status(status)
}

/// The answer claimed success and was no token response: [`TokenError::is_malformed_response`], transient.
#[must_use]
pub fn malformed_response() -> TokenError {
    source::malformed("the answer is not JSON (line 1, column 1)").with_status(StatusCode::OK)
}

/// The token source panicked: [`TokenError::is_interrupted`], transient.
#[must_use]
pub fn panicked() -> TokenError {
    TokenError::new(Kind::Panicked)
}

/// The token request was lost with its runtime, and so was the next one: [`TokenError::is_interrupted`], transient.
#[must_use]
pub fn abandoned() -> TokenError {
    TokenError::new(Kind::Abandoned)
}

/// The request's URI may not carry a token: [`TokenError::is_insecure_uri`], terminal.
///
/// A layer makes it, and no cache.
#[must_use]
pub fn insecure_uri() -> TokenError {
    TokenError::new(Kind::Insecure)
}

/// As many callers as allowed were waiting: [`TokenError::is_overloaded`], transient.
#[must_use]
pub fn overloaded() -> TokenError {
    TokenError::new(Kind::Overloaded)
}

/// The cache was full of tokens in use: [`TokenError::is_too_many_keys`], transient.
#[must_use]
pub fn too_many_keys() -> TokenError {
    TokenError::new(Kind::TooManyKeys)
}

/// The cache was shut down: [`TokenError::is_shut_down`], terminal.
#[must_use]
pub fn shut_down() -> TokenError {
    TokenError::new(Kind::ShutDown)
}

/// A token had to be fetched outside of a tokio runtime: [`TokenError::is_no_runtime`], terminal.
#[must_use]
pub fn no_runtime() -> TokenError {
    TokenError::new(Kind::NoRuntime)
}

/// The client's key or certificate cannot be used, so nothing was sent: terminal.
///
/// No predicate is true of it.
#[must_use]
pub fn credentials() -> TokenError {
    TokenError::new(Kind::Credentials)
        .with_source(ConfigError::new("the private key cannot be read"))
}

/// A [`Credential`](crate::Credential) could not be obtained, such as a file that is not there: transient.
///
/// No predicate is true of it.
#[must_use]
pub fn no_credential() -> TokenError {
    TokenError::new(Kind::NoCredential).with_source(NoCredential {
        problem: "the environment variable \"CLIENT_SECRET\" is not set".to_owned(),
        error: None,
    })
}

/// The metadata of a [discovered](crate::ClientCredentials::discover) server are those of another issuer: terminal.
///
/// No predicate is true of it.
#[must_use]
pub fn other_issuer() -> TokenError {
    TokenError::new(Kind::OtherIssuer)
}

/// One error of each kind, for a test that none is forgotten. More may follow in later versions.
#[must_use]
pub fn all() -> Vec<TokenError> {
    vec![
        transport(),
        timeout(),
        unavailable(StatusCode::SERVICE_UNAVAILABLE),
        rejected("invalid_client"),
        rejected("temporarily_unavailable"),
        malformed_response(),
        panicked(),
        abandoned(),
        insecure_uri(),
        overloaded(),
        too_many_keys(),
        shut_down(),
        no_runtime(),
        credentials(),
        no_credential(),
        other_issuer(),
        TokenError::transient("the source failed, perhaps not for long"),
        TokenError::terminal("the source failed for good"),
    ]
}
