//! Every event and span that the crate emits through `tracing`, and in [`metrics`] every metric.
//!
//! Names and fields are part of the interface: people search their logs for them. Events carry an error's own message
//! and never its sources, which may come from a user's transport; no event carries a token or a secret. Events are
//! emitted with no lock held, since a subscriber is foreign code.

#[cfg(feature = "metrics")]
mod metrics;
#[cfg(not(feature = "metrics"))]
#[path = "unmetered.rs"]
mod metrics;

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use arc_swap::ArcSwapOption;
use tokio::time::Instant;
use tracing::{
    Level, Span, event,
    field::{self, Empty},
    span,
};

pub(crate) use self::metrics::{Meters, Requests};
use crate::{error::TokenError, source::TokenRequest, time::Now, token::AccessToken};

/// The target of all events and spans.
const TARGET: &str = "tower_bearer";

/// Emits an event: `emit!(LEVEL "name", fields.., "message")`.
macro_rules! emit {
    ($level:ident $name:literal, $($rest:tt)+) => {
        event!(name: $name, target: TARGET, Level::$level, $($rest)+)
    };
}

/// The span of a flight, from its start to its end.
///
/// It has no parent: the request that starts a flight may be gone long before the flight ends, and its trace must not
/// be prolonged. Instead the span follows from that request's span, and the span of each waiting request follows from
/// this one.
#[derive(Debug)]
pub(crate) struct FlightSpan {
    /// Not behind a lock, since cloning a span calls the subscriber.
    span: ArcSwapOption<Span>,
    /// When the first attempt is made.
    starts: OnceLock<Instant>,
    /// How many attempts were made.
    attempts: AtomicU32,
}

impl FlightSpan {
    pub(crate) const fn new() -> Self {
        Self {
            span: ArcSwapOption::const_empty(),
            starts: OnceLock::new(),
            attempts: AtomicU32::new(0),
        }
    }

    /// Opens the span, following from the current one, and returns it.
    pub(crate) fn open(
        &self,
        flight: u64,
        subject: Subject<'_>,
        forced: bool,
        starts: Instant,
    ) -> Span {
        // A flight starts once.
        let _ = self.starts.set(starts);
        let span = span!(
            target: TARGET,
            parent: None,
            Level::DEBUG,
            "token_flight",
            cache = subject.cache,
            flight,
            key = key(subject.request),
            grant = Empty,
            forced,
            attempts = Empty,
            outcome = Empty,
            error = Empty,
            otel.status_code = Empty,
        );
        span.follows_from(Span::current());
        self.span.store(Some(Arc::new(span.clone())));
        span
    }

    /// Links the current span, a waiting request's, to the flight's.
    fn link(&self) {
        if let Some(span) = self.span.load_full() {
            Span::current().follows_from(&*span);
        }
    }

    /// Runs `tell` within the span.
    pub(crate) fn within<T>(&self, tell: impl FnOnce() -> T) -> T {
        match self.span.load_full() {
            Some(span) => span.in_scope(tell),
            None => tell(),
        }
    }

    /// Counts an attempt.
    pub(crate) fn attempt(&self) {
        self.attempts.fetch_add(1, Ordering::Relaxed);
    }

    /// Records the flight's outcome, and returns how long it took.
    ///
    /// Each field is recorded once: subscribers that write lines show every recording.
    pub(crate) fn close(
        &self,
        outcome: &'static str,
        grant: &'static str,
        error: Option<&TokenError>,
        now: Instant,
    ) -> Duration {
        if let Some(span) = self.span.swap(None) {
            span.record("grant", grant);
            span.record("attempts", self.attempts.load(Ordering::Relaxed));
            span.record("outcome", outcome);
            if let Some(error) = error {
                span.record("error", field::display(error));
                span.record("otel.status_code", "ERROR");
            }
        }
        self.age(now)
    }

    /// How long ago the first attempt was made; zero before it.
    pub(crate) fn age(&self, now: Instant) -> Duration {
        let since = |starts: &Instant| now.saturating_duration_since(*starts);
        self.starts.get().map_or(Duration::ZERO, since)
    }
}

/// The grants of the crate's own source, for spans and metrics.
pub(crate) const CLIENT_CREDENTIALS: &str = "client_credentials";
pub(crate) const REFRESH_TOKEN: &str = "refresh_token";

/// The outcomes of a flight, for its span and its metric.
pub(crate) const GRANTED: &str = "granted";
pub(crate) const FAILED: &str = "failed";
pub(crate) const LOST: &str = "lost";
pub(crate) const SHUT_DOWN: &str = "shut_down";

/// A request's wait for a flight, reported in the request's own span.
#[derive(Debug)]
pub(crate) struct Wait {
    meters: Meters,
    flight: u64,
    since: Instant,
    ended: bool,
}

impl Wait {
    pub(crate) fn begin(meters: Meters, flight: u64, span: &FlightSpan, now: Instant) -> Self {
        span.link();
        meters.waiters(1);
        Self {
            meters,
            flight,
            since: now,
            ended: false,
        }
    }

    /// Reports the end of the wait; `outcome` is what it brought.
    pub(crate) fn end(&mut self, outcome: &'static str) {
        self.ended = true;
        let (flight, took) = (self.flight, round(self.since.elapsed()));
        emit!(
            DEBUG "waited",
            flight,
            ?took,
            outcome,
            "waited for a token request",
        );
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.meters.waiters(-1);
        // A subscriber is foreign code: its panic during an unwind would abort the process.
        if !self.ended && !thread::panicking() {
            self.end("dropped");
        }
    }
}

/// A token request starts, to be sent in `delay`, after `failures` failed ones in a row; `forced` if a 401 caused it.
pub(crate) fn flight_started(flight: u64, forced: bool, delay: Duration, failures: u32) {
    let delay = round(delay);
    emit!(
        DEBUG "flight_started",
        flight,
        forced,
        ?delay,
        failures,
        "token request started",
    );
}

/// An attempt failed and another one follows.
pub(crate) fn attempt_failed(flight: u64, attempt: u32, error: &TokenError) {
    emit!(
        DEBUG "attempt_failed",
        flight,
        attempt,
        %error,
        "an attempt to get a token failed, another one follows",
    );
}

/// A refresh token brought no access token, and the attempt goes on with the client's own credentials.
///
/// `DEBUG`, since it is how every session ends.
pub(crate) fn refresh_token_failed(flight: u64, subject: Subject<'_>, error: &TokenError) {
    emit!(
        DEBUG "refresh_token_failed",
        cache = subject.cache,
        flight,
        key = key(subject.request),
        %error,
        "the refresh token brought no access token, client credentials are tried next",
    );
}

/// The server named no usable lifetime, so this one is assumed.
pub(crate) fn lifetime_assumed(flight: u64, subject: Subject<'_>, lifetime: Duration) {
    emit!(
        WARN "lifetime_assumed",
        cache = subject.cache,
        flight,
        key = key(subject.request),
        ?lifetime,
        "the token response has no usable expires_in",
    );
}

/// A token request brought a token, by this grant.
pub(crate) fn token_received(
    flight: u64,
    token: &AccessToken,
    grant: &'static str,
    took: Duration,
) {
    let took = round(took);
    let usable_for = round(token.expiry().remaining(Now::read()));
    emit!(
        DEBUG "token_received",
        flight,
        grant,
        ?took,
        ?usable_for,
        "token received",
    );
}

/// Whose token an event is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject<'a> {
    /// The cache's name.
    pub(crate) cache: &'static str,
    /// What the token is for.
    pub(crate) request: &'a TokenRequest,
}

/// The consequences of a failed flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FailureReport {
    /// How many failed in a row.
    pub(crate) failures: u32,
    /// For how long requests can go on with the token they have, if there is one.
    pub(crate) usable_for: Option<Duration>,
    /// Whether the API called that token invalid.
    pub(crate) invalid: bool,
    /// For how long no other token request is sent.
    pub(crate) retry_in: Duration,
    /// Whether other keys wait too.
    pub(crate) shared: bool,
}

/// A token request failed.
pub(crate) fn flight_failed(
    flight: u64,
    subject: Subject<'_>,
    error: &TokenError,
    took: Duration,
    failure: &FailureReport,
) {
    let FailureReport {
        failures,
        usable_for,
        invalid,
        retry_in,
        ..
    } = *failure;
    macro_rules! tell {
        ($message:literal) => {
            emit!(
                WARN "flight_failed",
                cache = subject.cache,
                flight,
                key = key(subject.request),
                %error,
                failures,
                took = ?round(took),
                retry_in = ?round(retry_in),
                usable_for = usable_for.map(|usable_for| field::debug(round(usable_for))),
                $message,
            )
        };
    }
    match usable_for {
        Some(_) if invalid => {
            tell!("token request failed, and the API refuses the token that there is")
        }
        Some(_) => tell!("token request failed, requests go on with the token they have"),
        None => tell!("token request failed, and requests fail without a token"),
    }
}

/// Requests wait for a token request that has taken this long and goes on.
pub(crate) fn requests_waiting(flight: u64, subject: Subject<'_>, waiters: usize, age: Duration) {
    emit!(
        WARN "requests_waiting",
        cache = subject.cache,
        flight,
        key = key(subject.request),
        waiters,
        age = ?round(age),
        "requests are waiting for a slow token request",
    );
}

/// A token request was lost: its runtime ended, or was not driven for too long.
pub(crate) fn flight_lost(flight: u64, subject: Subject<'_>, failures: u32) {
    emit!(
        WARN "flight_lost",
        cache = subject.cache,
        flight,
        key = key(subject.request),
        failures,
        "token request lost with the runtime that ran it",
    );
}

/// The last token died while token requests fail: from here on, requests fail too.
pub(crate) fn requests_failing(subject: Subject<'_>, error: &TokenError, retry_in: Duration) {
    emit!(
        WARN "requests_failing",
        cache = subject.cache,
        key = key(subject.request),
        %error,
        retry_in = ?round(retry_in),
        "the last token has expired, requests fail until a token request succeeds",
    );
}

/// A token request succeeded after `failures` failed ones, the first of them an `outage` ago.
pub(crate) fn recovered(flight: u64, subject: Subject<'_>, failures: u32, outage: Duration) {
    let outage = round(outage);
    emit!(
        INFO "recovered",
        cache = subject.cache,
        flight,
        key = key(subject.request),
        failures,
        ?outage,
        "token requests succeed again",
    );
}

/// No token request of this key, or if `shared` of any key of its source, starts for a while.
pub(crate) fn gate_closed(failure: &FailureReport) {
    let FailureReport {
        failures,
        retry_in,
        shared,
        ..
    } = *failure;
    emit!(
        DEBUG "gate_closed",
        failures,
        opens_in = ?round(retry_in),
        shared,
        "token requests are held back",
    );
}

/// Token requests may start again, for this `cause`.
pub(crate) fn gate_opened(cause: &'static str) {
    emit!(
        DEBUG "gate_opened",
        cause,
        "token requests are no longer held back",
    );
}

/// The server granted less than was asked for, which the API may miss.
pub(crate) fn scope_narrowed(subject: Subject<'_>, token: &AccessToken) {
    let missing = token.missing_scopes().collect::<Vec<_>>().join(" ");
    emit!(
        WARN "scope_narrowed",
        cache = subject.cache,
        missing,
        "the token was granted for fewer scopes than were asked for",
    );
}

/// The API refused a token; `flight` is the token request that was started or joined for it.
pub(crate) fn token_refused(
    subject: Subject<'_>,
    complaint: &'static str,
    outcome: RefusalOutcome,
    flight: Option<u64>,
) {
    let (cache, label) = (subject.cache, outcome.label());
    match outcome {
        // As rare as forced token requests; what may come in floods is for DEBUG.
        RefusalOutcome::Started => emit!(
            INFO "token_refused",
            cache,
            complaint,
            decision = label,
            flight,
            "the API refused the token, another one is requested",
        ),
        RefusalOutcome::Joined | RefusalOutcome::Replay | RefusalOutcome::Passed => emit!(
            DEBUG "token_refused",
            cache,
            complaint,
            decision = label,
            flight,
            "the API refused a token",
        ),
    }
}

/// What is done about a token's refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RefusalOutcome {
    /// A token request is started.
    Started,
    /// A token request is under way.
    Joined,
    /// There is another token already.
    Replay,
    /// There is no other token, and none is requested yet.
    Passed,
}

impl RefusalOutcome {
    #[cfg(feature = "metrics")]
    pub(crate) const ALL: [Self; 4] = [Self::Started, Self::Joined, Self::Replay, Self::Passed];

    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Joined => "joined",
            Self::Replay => "replay",
            Self::Passed => "passed",
        }
    }
}

/// A request is sent again, with another token than the refused one.
pub(crate) fn replayed(meters: &Meters) {
    meters.replayed();
    emit!(
        DEBUG "replayed",
        "the request is sent once more, with another token",
    );
}

/// The program reported a refused token.
pub(crate) fn invalidated() {
    emit!(
        DEBUG "invalidated",
        "the cache was told that the token was refused",
    );
}

/// There is no room for another key's token: all `limit` keys are in use.
pub(crate) fn keys_full(cache: &'static str, limit: usize) {
    emit!(
        WARN "keys_full",
        cache,
        limit,
        "the cache is full of tokens that are in use, requests for others fail",
    );
}

/// This many idle keys were evicted.
pub(crate) fn keys_evicted(cache: &'static str, count: usize) {
    emit!(
        DEBUG "keys_evicted",
        cache,
        count,
        "keys without a token were dropped to make room for others",
    );
}

/// The cache was shut down.
pub(crate) fn shut_down(cache: &'static str) {
    emit!(
        DEBUG "shut_down",
        cache,
        "the token cache was shut down",
    );
}

/// A short description of a key, without the values of parameters; `None` for the plain key.
fn key(request: &TokenRequest) -> Option<field::DisplayValue<Key<'_>>> {
    (!request.is_plain()).then(|| field::display(Key(request)))
}

struct Key<'a>(&'a TokenRequest);

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut space = "";
        let names = self.0.params().map(|(name, _)| name);
        let groups: [(&str, &mut dyn Iterator<Item = &str>); 3] = [
            ("scope", &mut self.0.scopes()),
            ("resource", &mut self.0.resources()),
            ("param", &mut { names }),
        ];
        for (kind, items) in groups {
            for item in items {
                write!(f, "{space}{kind}={item}")?;
                space = " ";
            }
        }
        if self.0.own_source().is_some() {
            write!(f, "{space}own source")?;
        }
        Ok(())
    }
}

/// Rounds a duration down to milliseconds.
fn round(duration: Duration) -> Duration {
    Duration::from_millis(duration.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Law 9: a parameter may be a secret.
    #[test]
    fn a_key_is_described_without_the_values_of_its_parameters() {
        let request = TokenRequest::new()
            .scope("b a")
            .resource("https://api.example.com")
            .param("audience", "CANARY");
        let text = Key(&request).to_string();
        assert_eq!(
            text,
            "scope=a scope=b resource=https://api.example.com param=audience"
        );
        assert!(key(&TokenRequest::new()).is_none());
    }
}
