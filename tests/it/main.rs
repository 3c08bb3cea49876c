//! The crate's behaviour through its public interface.
#![expect(
    clippy::unwrap_used,
    reason = "clippy allows it in test functions only, not in their helpers"
)]
#![expect(
    unreachable_pub,
    reason = "a test binary exports nothing; `pub` marks what modules share"
)]

mod auto_traits;
mod bodies;
mod cancellation;
mod client_auth;
mod collect;
mod copies;
mod events;
mod fleet;
mod guide;
#[cfg(feature = "rustls")]
mod hostile;
mod interruption;
mod invalidate;
mod kept;
mod keys;
mod lifetimes;
mod limits;
mod log;
#[cfg(feature = "metrics")]
mod metrics;
mod origins;
mod outage;
mod readiness;
mod refresh_tokens;
mod secrets;
mod server_hints;
mod shutdown;
mod single_flight;
mod stack;
mod status;
#[path = "../support/mod.rs"]
mod support;
#[cfg(feature = "test-util")]
mod test_util;
#[cfg(feature = "rustls")]
mod token_endpoint;
mod unauthorized;
