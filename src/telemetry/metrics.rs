//! Every metric, through the facade of the crate `metrics`.
//!
//! Names, units and labels are part of the interface: people chart them and alert on them. Each metric has the label
//! `cache`; its other labels take a handful of values, none of them from what a peer sends.
//!
//! A request that finds a fresh token costs one increment of a counter that was looked up when the token came, and one
//! in 64 also a histogram sample. Everything else is looked up when it happens: at token requests, refusals and waits.
//!
//! A recorder that is installed late is found by the next token request: from then on everything is recorded, and the
//! gauges are right.

use std::{
    fmt,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};

use super::RefusalOutcome;
use crate::{error::TokenError, time::Now, token::AccessToken};

const TOKEN_REQUESTS: &str = "tower_bearer_token_requests_total";
const FLIGHT_DURATION: &str = "tower_bearer_flight_duration_seconds";
const REQUESTS: &str = "tower_bearer_requests_total";
const REMAINING: &str = "tower_bearer_token_remaining_seconds";
const REFUSALS: &str = "tower_bearer_token_refusals_total";
const REPLAYS: &str = "tower_bearer_replays_total";
const WAITERS: &str = "tower_bearer_waiting_requests";
const GATES: &str = "tower_bearer_closed_gates";
const KEYS: &str = "tower_bearer_keys";

/// The metrics of one cache. Clones share them.
#[derive(Clone)]
pub(crate) struct Meters(Arc<Inner>);

struct Inner {
    cache: &'static str,
    waiters: AtomicI64,
    gates: AtomicI64,
    keys: AtomicI64,
    handles: ArcSwap<Handles>,
}

/// The metrics used more often than token requests are made, looked up once.
struct Handles {
    fresh: Counter,
    due: Counter,
    waited: Counter,
    failed: Counter,
    refused: Counter,
    bare: Counter,
    remaining: Histogram,
    waiters: Gauge,
}

impl Meters {
    pub(crate) fn new(cache: &'static str) -> Self {
        describe();
        let meters = Self(Arc::new(Inner {
            cache,
            waiters: AtomicI64::new(0),
            gates: AtomicI64::new(0),
            keys: AtomicI64::new(0),
            handles: ArcSwap::from_pointee(Handles::of(cache)),
        }));
        meters.register_all();
        meters
    }

    /// Looks the recorder up again, which may be installed by now.
    ///
    /// Call it before a token comes: services keep the handles for as long as the token.
    pub(crate) fn renew(&self) {
        describe();
        self.0.handles.store(Arc::new(Handles::of(self.0.cache)));
        self.register_all();
    }

    fn register_all(&self) {
        self.waiters(0);
        self.gates(0);
        self.keys(0);
        // Without an initial zero, a rate misses the first increment.
        counter!(REPLAYS, "cache" => self.0.cache).increment(0);
        for outcome in RefusalOutcome::ALL {
            counter!(REFUSALS, "cache" => self.0.cache, "decision" => outcome.label()).increment(0);
        }
    }

    /// The counters for requests.
    pub(crate) fn requests(&self) -> Requests {
        Requests(self.0.handles.load_full())
    }

    /// A token request by this grant has ended.
    pub(crate) fn attempt_ended(&self, grant: &'static str, error: Option<&TokenError>) {
        let outcome = error.map_or("granted", outcome);
        counter!(TOKEN_REQUESTS, "cache" => self.0.cache, "grant" => grant, "outcome" => outcome)
            .increment(1);
    }

    pub(crate) fn flight_ended(&self, outcome: &'static str, took: Duration) {
        histogram!(FLIGHT_DURATION, "cache" => self.0.cache, "outcome" => outcome)
            .record(took.as_secs_f64());
    }

    pub(crate) fn refused(&self, outcome: RefusalOutcome) {
        counter!(REFUSALS, "cache" => self.0.cache, "decision" => outcome.label()).increment(1);
    }

    pub(crate) fn replayed(&self) {
        counter!(REPLAYS, "cache" => self.0.cache).increment(1);
    }

    /// This many more requests wait.
    pub(crate) fn waiters(&self, more: i64) {
        self.0.waiters.fetch_add(more, Ordering::SeqCst);
        set_gauge(&self.0.waiters, || self.0.handles.load().waiters.clone());
    }

    /// This many more gates are closed.
    pub(crate) fn gates(&self, more: i64) {
        self.0.gates.fetch_add(more, Ordering::SeqCst);
        set_gauge(&self.0.gates, || gauge!(GATES, "cache" => self.0.cache));
    }

    /// There are this many more keys.
    pub(crate) fn keys(&self, more: i64) {
        self.0.keys.fetch_add(more, Ordering::SeqCst);
        set_gauge(&self.0.keys, || gauge!(KEYS, "cache" => self.0.cache));
    }
}

impl fmt::Debug for Meters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meters").finish_non_exhaustive()
    }
}

/// Counts the requests of one cache by the token they found.
#[derive(Clone)]
pub(crate) struct Requests(Arc<Handles>);

impl Requests {
    /// A request is sent with a token that needs no check.
    #[inline]
    pub(crate) fn fresh(&self, token: &AccessToken) {
        self.0.fresh.increment(1);
        self.sample(token);
    }

    /// A request is sent with a token that was checked.
    pub(crate) fn checked(&self, token: &AccessToken) {
        match token.is_fresh() {
            true => self.0.fresh.increment(1),
            false => self.0.due.increment(1),
        }
        self.sample(token);
    }

    /// A request is sent with a token that it waited for.
    pub(crate) fn waited(&self, token: &AccessToken) {
        self.0.waited.increment(1);
        self.sample(token);
    }

    /// A request fails for lack of a token.
    pub(crate) fn failed(&self) {
        self.0.failed.increment(1);
    }

    /// A request is not sent, since its URI may not carry a token.
    pub(crate) fn refused(&self) {
        self.0.refused.increment(1);
    }

    /// A request is sent without our token.
    pub(crate) fn bare(&self) {
        self.0.bare.increment(1);
    }

    #[inline]
    fn sample(&self, token: &AccessToken) {
        if fastrand::u8(..) < SAMPLED {
            self.remaining(token);
        }
    }

    #[cold]
    fn remaining(&self, token: &AccessToken) {
        let remaining = token.expiry().remaining(Now::read());
        self.0.remaining.record(remaining.as_secs_f64());
    }
}

impl Handles {
    fn of(cache: &'static str) -> Self {
        let requests = |token: &'static str| counter!(REQUESTS, "cache" => cache, "token" => token);
        Self {
            fresh: requests("fresh"),
            due: requests("due"),
            waited: requests("waited"),
            failed: requests("failed"),
            refused: requests("refused"),
            bare: requests("bare"),
            remaining: histogram!(REMAINING, "cache" => cache),
            waiters: gauge!(WAITERS, "cache" => cache),
        }
    }
}

/// Sets a gauge to a level that others may change concurrently: the last one leaves it right.
///
/// Some levels change on drop, where a panic of the recorder must not escape: during an unwind it would abort the
/// process.
fn set_gauge(level: &AtomicI64, gauge: impl FnOnce() -> Gauge) {
    let set = || {
        let gauge = gauge();
        loop {
            let now = level.load(Ordering::SeqCst);
            gauge.set(now as f64);
            if level.load(Ordering::SeqCst) == now {
                return;
            }
        }
    };
    // The panic hook has reported it, and the level is right for the next time.
    let _ = panic::catch_unwind(AssertUnwindSafe(set));
}

/// An error's kind, as one of a few labels.
fn outcome(error: &TokenError) -> &'static str {
    match () {
        () if error.is_rejected() => "rejected",
        () if error.is_unavailable() => "unavailable",
        () if error.is_transport() => "transport",
        () if error.is_timeout() => "timeout",
        () if error.is_malformed_response() => "malformed",
        () => "failed",
    }
}

fn describe() {
    describe_counter!(
        TOKEN_REQUESTS,
        Unit::Count,
        "Token requests by grant and outcome."
    );
    describe_histogram!(
        FLIGHT_DURATION,
        Unit::Seconds,
        "How long flights took, all attempts together, by outcome."
    );
    describe_counter!(
        REQUESTS,
        Unit::Count,
        "Requests by the token that they found: fresh, due, waited for, none (failed, refused), or bare."
    );
    describe_histogram!(
        REMAINING,
        Unit::Seconds,
        "How long the token of a request may still be used, for one request in 64."
    );
    describe_counter!(
        REFUSALS,
        Unit::Count,
        "Refusals of tokens by the API, by what was decided: started, joined, replay or passed."
    );
    describe_counter!(
        REPLAYS,
        Unit::Count,
        "Requests that were sent once more with another token."
    );
    describe_gauge!(WAITERS, Unit::Count, "Requests that wait for a token.");
    describe_gauge!(GATES, Unit::Count, "Keys whose last token request failed.");
    describe_gauge!(
        KEYS,
        Unit::Count,
        "Keys in the cache, not counting the one of requests without a TokenRequest."
    );
}

/// How many of 256 requests are sampled.
const SAMPLED: u8 = 4;
