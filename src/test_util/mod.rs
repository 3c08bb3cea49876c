//! For the tests of programs that use the crate: a scripted source, settled caches, and each kind of error.
//!
//! - [`ScriptedSource`] stands in for the authorization server and remembers what it was asked.
//! - [`TokenCache::fixed`](crate::TokenCache::fixed) and [`TokenCache::failing`](crate::TokenCache::failing) make
//!   caches that ask nobody, for tests that are about something else.
//! - [`errors`] makes the errors that no code but this crate's can make.
//! - [`bearer`] and [`unauthorized`] are for the API that a test plays: the token that came, and the answer that
//!   refuses it.
//!
#![cfg_attr(
    any(doc, doctest),
    doc = "The guide has a page about [testing](crate::guide::testing), with a test for each of them."
)]
//!
//! # Time
//!
//! A token has died as soon as either the monotonic clock, which is tokio's, or the wall clock says so. Under
//! [paused time] only the first one moves, and that is enough: a token of 300 s is gone after
//! `tokio::time::sleep(Duration::from_secs(300))`, which takes no time. Three things to know:
//!
//! - Move the clock by `sleep` and not by `tokio::time::advance`. `advance` goes past timers whose tasks have not
//!   run by then. One of them is the watch over the token that requests through a layer rely on, so that a request
//!   right after it may still leave with the token that has just expired. And a token request that it jumps over is
//!   lost, as if its runtime had stood still, where `sleep` would have it time out.
//! - [`AccessToken::usable_until`](crate::AccessToken::usable_until) is a time of the wall clock, which no test moves.
//! - When a token is refreshed is left to chance within bounds: the first one of a cache after 0.35 to 0.75 of
//!   its lifetime, the others within the window of [`RefreshPolicy`](crate::RefreshPolicy). A test looks before or
//!   after these bounds.
//!
//! With real sockets, time must not be paused: it would jump to the next timeout while the socket is waited for.
//! Such a test replaces a token by [`TokenCache::invalidate`](crate::TokenCache::invalidate), or has its source
//! grant a lifetime of a second or two.
//!
//! [paused time]: https://docs.rs/tokio/latest/tokio/time/fn.pause.html

pub mod errors;
mod script;

use http::{
    HeaderValue, Request, Response, StatusCode,
    header::{AUTHORIZATION, WWW_AUTHENTICATE},
};

pub use self::script::{Answer, Asked, ScriptedSource};

/// Returns the text of the bearer token that a request carries (RFC 6750 section 2.1).
///
/// `None` without an `Authorization` header, with more than one, or with one of another scheme.
///
/// ```
/// use tower_bearer::test_util::bearer;
///
/// # fn main() -> Result<(), http::Error> {
/// let request = http::Request::get("/sims")
///     .header("authorization", "Bearer token-1")
///     .body(())?;
/// assert_eq!(bearer(&request), Some("token-1"));
/// # Ok(())
/// # }
/// ```
pub fn bearer<B>(request: &Request<B>) -> Option<&str> {
    let mut values = request.headers().get_all(AUTHORIZATION).iter();
    let value = values.next().filter(|_| values.next().is_none())?;
    let (scheme, text) = value.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("Bearer").then_some(text)
}

/// Makes the answer of an API that takes the request's token for invalid: a 401 with the challenge
/// `Bearer error="invalid_token"` (RFC 6750 section 3.1).
///
/// ```
/// use tower_bearer::test_util::unauthorized;
///
/// assert_eq!(unauthorized("no such token").status(), 401);
/// ```
pub fn unauthorized<B>(body: B) -> Response<B> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::UNAUTHORIZED;
    let challenge = HeaderValue::from_static(r#"Bearer error="invalid_token""#);
    response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
    response
}
