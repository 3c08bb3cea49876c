//! For the tests of programs that use the crate: a scripted source, caches that always or never have a token, and
//! errors of each kind.
//!
//! - [`ScriptedSource`] stands in for the authorization server and remembers what it was asked.
//! - [`TokenCache::fixed`](crate::TokenCache::fixed) and [`TokenCache::failing`](crate::TokenCache::failing) make
//!   caches that send no token requests, for tests that are about something else.
//! - [`errors`] makes the errors that only this crate can make.
//! - [`bearer`] and [`unauthorized`] are for the API that a test plays: the token that it got, and the answer that
//!   refuses it.
//!
#![cfg_attr(
    any(doc, doctest),
    doc = "The guide has a page about [testing](crate::guide::testing), with a test for each of them."
)]
//!
//! # Time
//!
//! A token has expired as soon as either the monotonic clock, which is tokio's, or the wall clock says so. Under
//! [paused time] only the first one moves, and that is enough: a token of 300 s has expired after
//! `tokio::time::sleep(Duration::from_secs(300))`, which takes no time. Three things to know:
//!
//! - Move the clock by `sleep` and not by `tokio::time::advance`, which jumps past timers whose tasks have not run when
//!   it returns. One of them belongs to the task that watches a token's expiry for the layer, so that a request right
//!   after it may still leave with a token that has just expired. And a token request that is jumped over is lost, as
//!   if its runtime had stood still, where with `sleep` it would time out.
//! - [`AccessToken::usable_until`](crate::AccessToken::usable_until) is a time of the wall clock, which a test cannot
//!   move.
//! - The moment of a refresh is random within bounds: for the first token of a cache 0.35 to 0.75 of its lifetime, for
//!   later ones the window of [`RefreshPolicy`](crate::RefreshPolicy). A test should look before or after these bounds.
//!
//! With real sockets, time must not be paused: it would jump to the next timeout while tasks wait for the network. Such
//! a test can replace a token by [`TokenCache::invalidate`](crate::TokenCache::invalidate), or have its source grant a
//! lifetime of a second or two.
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

/// Makes the answer of an API that calls the request's token invalid: a 401 with the challenge
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
