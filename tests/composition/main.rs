//! How the layer works with those of tower and tower-http, above it and below.
//!
//! Each test opens with the claim that it proves, as `Layer, above: claim` or `Layer, below: claim`. The table of
//! `src/guide/placement.md` consists of exactly these claims: [`page`] compares them.
#![expect(
    clippy::unwrap_used,
    reason = "clippy allows it in test functions only, not in their helpers"
)]
#![expect(
    unreachable_pub,
    reason = "a test binary exports nothing; `pub` marks what modules share"
)]

mod is_clone;
mod limits;
mod logs;
mod page;
mod requests;
mod retries;
mod routes;
#[path = "../support/mod.rs"]
#[expect(
    dead_code,
    unused_imports,
    reason = "the other test binaries need more of it"
)]
mod support;
mod timeouts;
