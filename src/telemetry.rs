//! The name of every event that the crate emits through `tracing`.
//!
//! Names and fields are part of the interface: people search their logs for them. Events carry an error's own
//! line and never its sources, which may come from a user's transport; no event carries a token or a secret.
//! Events are emitted with no lock held, since a subscriber is foreign code.

use tracing::{Level, event};

use crate::error::TokenError;

/// The target of all events.
const TARGET: &str = "tower_bearer";

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
