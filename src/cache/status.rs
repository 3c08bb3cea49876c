//! [`Status`]: how a key's token is, at one moment.

use std::time::{Duration, SystemTime};

use crate::{error::TokenError, source::TokenRequest};

/// The state of a token and of its token requests at one moment: for a health endpoint.
///
/// Made by [`TokenCache::status`](crate::TokenCache::status), which causes no token request. It does not contain the
/// token.
///
/// ```
/// use tower_bearer::{TokenCache, TokenResponse, TokenState, source_fn};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), tower_bearer::TokenError> {
/// let cache = TokenCache::new(source_fn(|_| async { TokenResponse::new("mF_9.B5f-4.1JqM") }));
/// let status = cache.status();
/// assert_eq!(status.state(), TokenState::Missing);
/// // No request has come yet, which is no reason to be taken out of service.
/// assert!(status.is_healthy() && !status.has_token());
///
/// cache.get().await?;
/// let status = cache.status();
/// assert_eq!(status.state(), TokenState::Fresh);
/// assert!(status.is_healthy() && status.has_token());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Status {
    pub(super) request: TokenRequest,
    pub(super) state: TokenState,
    pub(super) usable_until: Option<SystemTime>,
    pub(super) expires_in: Option<Duration>,
    pub(super) due_in: Option<Duration>,
    pub(super) age: Option<Duration>,
    pub(super) last_success: Option<SystemTime>,
    pub(super) failures: u32,
    pub(super) failing_for: Option<Duration>,
    pub(super) last_error: Option<TokenError>,
    pub(super) retry_in: Option<Duration>,
    pub(super) flight: Option<u64>,
    pub(super) flight_age: Option<Duration>,
    pub(super) slow_after: Duration,
    pub(super) waiters: usize,
}

/// What there is to send, in the order in which a token ages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TokenState {
    /// There is no token: none was requested yet, or none obtained, or the server has declared it void.
    Missing,
    /// Requests take the token.
    Fresh,
    /// Requests take the token, and it is to be replaced.
    Due,
    /// The API has called the token invalid, and there is no other one yet. Requests wait for the first
    /// token request that is to replace it, and use the token if that fails or takes longer than a second.
    Refused,
    /// The token has expired, and is still used while the token endpoint fails: see
    /// [`RefreshPolicy::extended_lifetime`](crate::RefreshPolicy::extended_lifetime).
    Extended,
    /// The token has expired.
    Expired,
    /// The cache was shut down.
    ShutDown,
}

impl Status {
    /// Returns whether a request can be expected to get a working token: there is one that may be sent, or the last
    /// token request has not failed and the one under way has not taken longer than
    /// [`RefreshPolicy::attempt_timeout`](crate::RefreshPolicy::attempt_timeout). A token that the API has called
    /// invalid counts until a request for another one fails.
    ///
    /// A cache that has not been used yet is healthy, and one that was shut down is not. During an outage, a cache is
    /// healthy as long as its token lasts; [`consecutive_failures`](Self::consecutive_failures) shows such an outage.
    pub fn is_healthy(&self) -> bool {
        match self.state {
            TokenState::ShutDown => false,
            TokenState::Refused => self.failures == 0,
            _ => self.has_token() || (self.failures == 0 && !self.is_slow()),
        }
    }

    fn is_slow(&self) -> bool {
        self.flight_age.is_some_and(|age| age > self.slow_after)
    }

    /// Returns whether there is a token that may be sent.
    pub fn has_token(&self) -> bool {
        matches!(
            self.state,
            TokenState::Fresh | TokenState::Due | TokenState::Refused | TokenState::Extended
        )
    }

    /// Returns what the token is for.
    pub fn request(&self) -> &TokenRequest {
        &self.request
    }

    /// Returns the state of the token.
    pub fn state(&self) -> TokenState {
        self.state
    }

    /// Returns when the cache stops handing the token out, or has stopped, by the wall clock; `None` without a token or
    /// past the clock's range.
    ///
    /// An extended lifetime is not counted.
    pub fn usable_until(&self) -> Option<SystemTime> {
        self.usable_until
    }

    /// Returns how much longer the cache hands the token out: zero if it has expired, `None` without one.
    pub fn expires_in(&self) -> Option<Duration> {
        self.expires_in
    }

    /// Returns the time until the token is to be replaced: zero if it is due, `None` without one.
    pub fn due_in(&self) -> Option<Duration> {
        self.due_in
    }

    /// Returns how long ago the token came; `None` without one.
    pub fn age(&self) -> Option<Duration> {
        self.age
    }

    /// Returns when the last token request succeeded, by the wall clock of then.
    pub fn last_success(&self) -> Option<SystemTime> {
        self.last_success
    }

    /// Returns how many token requests have failed in a row, each with all its attempts, including those of other keys
    /// that hold this one back.
    pub fn consecutive_failures(&self) -> u32 {
        self.failures
    }

    /// Returns how long ago the first of this key's failed token requests began; `None` if the last one did not fail.
    pub fn failing_for(&self) -> Option<Duration> {
        self.failing_for
    }

    /// Returns the error of the last failed token request, this key's or one that holds it back. `None` after a
    /// success, or if all token requests since were lost with their runtime, which leaves no error.
    pub fn last_error(&self) -> Option<&TokenError> {
        self.last_error.as_ref()
    }

    /// Returns the time until the next token request may start; `None` if nothing holds it back.
    pub fn retry_in(&self) -> Option<Duration> {
        self.retry_in
    }

    /// Returns the number of the flight under way, as events have it.
    pub fn flight(&self) -> Option<u64> {
        self.flight
    }

    /// Returns how long ago that flight's first attempt began: zero if it is to come.
    pub fn flight_age(&self) -> Option<Duration> {
        self.flight_age
    }

    /// Returns how many callers wait for that flight.
    pub fn waiters(&self) -> usize {
        self.waiters
    }
}
