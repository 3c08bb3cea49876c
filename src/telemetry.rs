//! The name of every event that the crate emits through `tracing`.
//!
//! Names and fields are part of the interface: people search their logs for them. Events carry an error's own
//! line and never its sources, which may come from a user's transport; no event carries a token or a secret.
//! Events are emitted with no lock held, since a subscriber is foreign code.

use std::time::Duration;

use tracing::{Level, event};

use crate::{error::TokenError, token::AccessToken};

/// The target of all events.
const TARGET: &str = "tower_bearer";

/// A token request is under way, to be sent in `delay`; `forced` if a 401 did it.
pub(crate) fn flight_started(forced: bool, delay: Duration) {
    event!(
        name: "flight_started",
        target: TARGET,
        Level::DEBUG,
        forced,
        ?delay,
        "token request started",
    );
}

/// One attempt failed and the flight goes on with another one.
pub(crate) fn attempt_failed(attempt: u32, error: &TokenError) {
    event!(
        name: "attempt_failed",
        target: TARGET,
        Level::DEBUG,
        attempt,
        %error,
        "an attempt to get a token failed, another one follows",
    );
}

/// A refresh token brought no access token, and the attempt goes on with the client's own credentials.
///
/// `INFO`, since it is how every session ends.
pub(crate) fn refresh_token_failed(error: &TokenError) {
    event!(
        name: "refresh_token_failed",
        target: TARGET,
        Level::INFO,
        %error,
        "the refresh token brought no access token, asking with client credentials",
    );
}

/// The server named no lifetime that can be read, and this one is assumed.
pub(crate) fn lifetime_assumed(lifetime: Duration) {
    event!(
        name: "lifetime_assumed",
        target: TARGET,
        Level::WARN,
        ?lifetime,
        "the token response has no usable expires_in",
    );
}

/// A token request brought a token.
pub(crate) fn token_received(token: &AccessToken) {
    event!(
        name: "token_received",
        target: TARGET,
        Level::DEBUG,
        usable_until = ?token.usable_until(),
        "token received",
    );
}

/// A token request failed, and no other one is sent for `retry_in`.
pub(crate) fn flight_failed(error: &TokenError, retry_in: Option<Duration>) {
    event!(
        name: "flight_failed",
        target: TARGET,
        Level::WARN,
        %error,
        ?retry_in,
        "token request failed",
    );
}

/// A token request ended with its runtime, or is overdue on one that nobody drives.
pub(crate) fn flight_lost() {
    event!(
        name: "flight_lost",
        target: TARGET,
        Level::WARN,
        "token request lost with the runtime that ran it",
    );
}

/// The server has granted less than was asked for, which the API may miss.
pub(crate) fn scope_narrowed(token: &AccessToken) {
    let missing = token.missing_scopes().collect::<Vec<_>>().join(" ");
    event!(
        name: "scope_narrowed",
        target: TARGET,
        Level::WARN,
        missing,
        "the token was granted for fewer scopes than were asked for",
    );
}

/// There is no room for a token of another key: all of the `limit` are in use.
pub(crate) fn keys_full(limit: usize) {
    event!(
        name: "keys_full",
        target: TARGET,
        Level::WARN,
        limit,
        "the cache is full of tokens that are in use, requests for others fail",
    );
}
