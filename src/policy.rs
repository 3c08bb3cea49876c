//! [`RefreshPolicy`]: when, how often and for how long to ask for a token. Plain arithmetic.

use std::time::Duration;

use fastrand::Rng;

use crate::{error::TokenError, source::TokenResponse};

/// When a token is refreshed, and what a token request may take.
///
/// Every window is limited in proportion to the lifetime that the server grants, so that the defaults fit a token of a
/// minute as well as one of a day. With them, a token of 300 s is refreshed 195 s to 225 s after it was requested, the
/// first one 105 s to 225 s, and it is no longer attached after 290 s.
///
/// ```
/// use std::time::Duration;
/// use tower_bearer::{RefreshPolicy, TokenCache, TokenResponse, source_fn};
///
/// let policy = RefreshPolicy::new()
///     .refresh_window(Duration::from_secs(60))
///     .attempt_timeout(Duration::from_secs(2));
/// let source = source_fn(|_| async { TokenResponse::new("token") });
/// let cache = TokenCache::with_policy(source, policy);
/// # let _ = cache;
/// ```
#[derive(Clone, Debug)]
pub struct RefreshPolicy {
    expiry_margin: Duration,
    refresh_window: Duration,
    pub(crate) default_lifetime: Duration,
    pub(crate) attempt_timeout: Duration,
    flight_timeout: Duration,
    pub(crate) attempts: u32,
    max_waiters: Option<usize>,
    pub(crate) max_keys: usize,
    extended_lifetime: bool,
    pub(crate) keep_warm: bool,
    pub(crate) name: &'static str,
}

impl RefreshPolicy {
    /// Creates the default policy.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            expiry_margin: Duration::from_secs(10),
            refresh_window: Duration::from_secs(300),
            default_lifetime: Duration::from_secs(300),
            attempt_timeout: Duration::from_secs(10),
            flight_timeout: Duration::from_secs(30),
            attempts: 3,
            max_waiters: None,
            max_keys: 16_384,
            extended_lifetime: false,
            keep_warm: false,
            name: "default",
        }
    }

    /// Sets how long before its expiry a token is no longer attached: default 10 s.
    ///
    /// Never more than a tenth of the lifetime: a token of 60 s is attached for 54 s.
    #[must_use]
    pub const fn expiry_margin(mut self, margin: Duration) -> Self {
        self.expiry_margin = margin;
        self
    }

    /// Sets how long before its expiry a token is refreshed in the background: default 5 min.
    ///
    /// Never less than the [`expiry_margin`](Self::expiry_margin), since nobody is to wait for it, and never more than
    /// a quarter of the lifetime; and up to a tenth of the lifetime earlier by chance, drawn once per token: with a
    /// window of 60 s, a token of 600 s is refreshed after 480 s to 540 s. The first token of a cache, and of each
    /// [`TokenRequest`](crate::TokenRequest), is refreshed after 0.35 to 0.75 of its lifetime, so that processes that
    /// start together fall out of step. What a server says itself, by [`TokenResponse::refresh_in`], goes before both.
    #[must_use]
    pub const fn refresh_window(mut self, window: Duration) -> Self {
        self.refresh_window = window;
        self
    }

    /// Sets the lifetime of a token whose server does not name one: default 300 s.
    #[must_use]
    pub const fn default_lifetime(mut self, lifetime: Duration) -> Self {
        self.default_lifetime = lifetime;
        self
    }

    /// Sets how long one attempt to fetch a token may take: default 10 s.
    ///
    /// That includes obtaining credentials and metadata, and trying a refresh token first. The default client of
    /// [`ClientCredentials`](crate::ClientCredentials) gives up after 3 s if no connection is made.
    #[must_use]
    pub const fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.attempt_timeout = timeout;
        self
    }

    /// Sets how long all attempts to fetch a token together may take: default 30 s.
    ///
    /// Counted from the first attempt, which is delayed by up to 1 s after a success and up to 10 s after a token
    /// request that was lost with its runtime. A caller waits for a token request no longer than its delay, this time
    /// and half a second.
    #[must_use]
    pub const fn flight_timeout(mut self, timeout: Duration) -> Self {
        self.flight_timeout = timeout;
        self
    }

    /// Sets how many attempts are made before waiting callers see an error: default 3, at least 1.
    ///
    /// Another attempt follows only after a transient error, unless the error has a `Retry-After` or is a panic of the
    /// source. The pause before it is up to 200 ms, doubling to up to 5 s. It is 0.5 s to 1 s, doubling to up to 5 s,
    /// after a `429`; and, unless a 401 has caused the token request, while there is a token that lives for longer than
    /// 4 s, since nobody waits then. After a failed token request, each further one has a single attempt until one
    /// succeeds; but the first one after a token request that was lost with its runtime has all attempts, if callers
    /// wait for it. No attempt follows if [`flight_timeout`](Self::flight_timeout) leaves no time for it, or if another
    /// key has learned that the server wants to be left alone or refuses the client.
    ///
    /// If the claims that an API demands cannot be obtained, one more attempt follows without them, whatever the number
    /// ([`Fetch::claims`](crate::Fetch::claims)).
    #[must_use]
    pub const fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = if attempts == 0 { 1 } else { attempts };
        self
    }

    /// Sets how many callers may wait for one token request: default no limit.
    ///
    /// Further ones get an error of [`TokenError::is_overloaded`], at once. With 0, nobody may wait: the first caller
    /// starts a token request, which goes on without it.
    #[must_use]
    pub const fn max_waiters(mut self, limit: usize) -> Self {
        self.max_waiters = Some(limit);
        self
    }

    /// Sets for how many different [`TokenRequest`](crate::TokenRequest)s a cache keeps tokens: default 16,384.
    ///
    /// One is dropped for a new one if it has no live token, no token request under way and no pause to wait out after
    /// a failure. If there is none to drop, the new one gets an error of [`TokenError::is_too_many_keys`]. The token of
    /// requests without a `TokenRequest` does not count.
    #[must_use]
    pub const fn max_keys(mut self, limit: usize) -> Self {
        self.max_keys = limit;
        self
    }

    /// Sets whether a token that has expired is used while the token endpoint fails, for as long as the server
    /// said in `ext_expires_in`: default `false`.
    ///
    /// Entra ID grants that lifetime for outages of its own; its APIs accept such tokens then. It counts only
    /// while the last token request failed with a transient error.
    #[must_use]
    pub const fn extended_lifetime(mut self, allowed: bool) -> Self {
        self.extended_lifetime = allowed;
        self
    }

    /// Sets whether the token is refreshed even if no request needs it: default `false`.
    ///
    /// By default an idle service sends no token requests, and the first request after a quiet time waits for one. A
    /// cache is kept warm from its first token until its last handle is dropped. If the runtime ends on which the last
    /// token request ran, that is suspended until the next request. Tokens for a [`TokenRequest`](crate::TokenRequest)
    /// are not kept warm: a key that nobody uses any more would be refreshed forever.
    #[must_use]
    pub const fn keep_warm(mut self, keep_warm: bool) -> Self {
        self.keep_warm = keep_warm;
        self
    }

    /// Sets the name of the cache in events, spans and metrics: default `default`.
    ///
    /// Caches with the same name share their metrics: counters add up, and gauges show the cache that has changed last.
    /// The name is static, since each one makes new time series of all metrics.
    #[must_use]
    pub const fn name(mut self, name: &'static str) -> Self {
        self.name = name;
        self
    }

    /// When the token of `response` is due and when it dies, counted from its request.
    ///
    /// `first` says whether it is this key's first token. Draws one random sample per token.
    pub(crate) fn schedule(
        &self,
        response: &TokenResponse,
        first: bool,
        rng: &mut Rng,
    ) -> Schedule {
        let lifetime = response
            .expires_in
            .unwrap_or(self.default_lifetime)
            .min(MAX_LIFETIME);
        let margin = self.expiry_margin.min(lifetime.mul_f64(0.1));
        let chance = rng.f64();
        let refresh_after = match response.refresh_in {
            Some(after) => {
                after.clamp(lifetime.mul_f64(0.5), lifetime.mul_f64(0.9))
                    - lifetime.mul_f64(0.1 * chance)
            }
            None if first => lifetime.mul_f64(0.35 + 0.4 * chance),
            None => {
                let window = self.refresh_window.min(lifetime.mul_f64(0.25)).max(margin);
                lifetime - window - lifetime.mul_f64(0.1 * chance)
            }
        };
        Schedule {
            refresh_after: refresh_after.max(FLOOR),
            expires_after: lifetime - margin,
            extended_after: response
                .ext_expires_in
                .filter(|_| self.extended_lifetime)
                .map(|extended| extended.min(MAX_LIFETIME)),
        }
    }

    pub(crate) fn flight_limit(&self) -> Duration {
        self.flight_timeout.min(MAX_LIFETIME)
    }

    pub(crate) fn waiter_limit(&self) -> usize {
        self.max_waiters.unwrap_or(usize::MAX)
    }
}

impl Default for RefreshPolicy {
    fn default() -> Self {
        Self::new()
    }
}

/// A token's moments, counted from its request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    /// When the token is to be replaced; never sooner than [`FLOOR`].
    pub(crate) refresh_after: Duration,
    /// When the token is no longer attached.
    pub(crate) expires_after: Duration,
    /// When the token is no longer attached even while the token endpoint fails.
    pub(crate) extended_after: Option<Duration>,
}

/// How long a gate stays shut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GateTimes {
    pub(crate) opens_after: Duration,
    /// The part that holds even at hard expiry: a `Retry-After` or a terminal error.
    pub(crate) strict_until: Duration,
}

/// How long the gate stays shut after `failures` failed flights in a row, the last `terminal` of them with terminal
/// errors, and the very last with `error`, or lost.
pub(crate) fn gate_times(
    failures: u32,
    terminal: u32,
    error: Option<&TokenError>,
    rng: &mut Rng,
) -> GateTimes {
    let half_to_whole = 0.5 + 0.5 * rng.f64();
    // Added to the server's own wait: clients told the same moment must not all come at once.
    let up_to_a_tenth = 1.0 + 0.1 * rng.f64();
    let backoff = doubled(BACKOFF, failures, BACKOFF_CAP).mul_f64(half_to_whole);
    let terminal = match terminal {
        0 => Duration::ZERO,
        n => doubled(TERMINAL, n, TERMINAL_CAP).mul_f64(half_to_whole),
    };
    let retry_after = error.and_then(TokenError::retry_after).unwrap_or_default();
    let strict = terminal.max(retry_after).mul_f64(up_to_a_tenth);
    GateTimes {
        opens_after: backoff.max(strict),
        strict_until: strict,
    }
}

/// How long to pause after the `attempt`th attempt of a flight.
pub(crate) fn pause(attempt: u32, is_patient: bool, rng: &mut Rng) -> Duration {
    match is_patient {
        true => doubled(PATIENT_PAUSE, attempt, PAUSE_CAP).mul_f64(0.5 + rng.f64() / 2.0),
        false => doubled(PAUSE, attempt, PAUSE_CAP).mul_f64(rng.f64()),
    }
}

/// The cooldown after a forced refresh; `previous` is the last cooldown, if this refresh recurs within three of it.
pub(crate) fn cooldown(previous: Option<Duration>) -> Duration {
    match previous {
        Some(previous) => previous.saturating_mul(2).min(COOLDOWN_CAP),
        None => COOLDOWN,
    }
}

/// For how long new credentials open no gate after opening it in vain `n` times in a row.
pub(crate) fn renewal_pause(n: u32) -> Duration {
    doubled(FLOOR, n, TERMINAL_CAP)
}

/// `first · 2^(n-1)`, at most `cap`, for `n` from 1.
fn doubled(first: Duration, n: u32, cap: Duration) -> Duration {
    let factor = 1_u32.checked_shl(n.saturating_sub(1)).unwrap_or(u32::MAX);
    first.saturating_mul(factor).min(cap)
}

/// No unforced token request is sent sooner than this after the last successful one was sent.
pub(crate) const FLOOR: Duration = Duration::from_secs(1);
/// How long a request waits for the replacement of a refused token before it uses the refused one.
pub(crate) const REPLACEMENT_WAIT: Duration = Duration::from_secs(1);
/// With a token that lives for longer than this, nobody waits for a flight that starts now, unless an attempt hangs:
/// its background pauses take up to 3 s together.
pub(crate) const BACKGROUND_LIFETIME: Duration = Duration::from_secs(4);
/// How long requests may take a due token without checking what else has happened.
pub(crate) const SETTLED_LIMIT: Duration = Duration::from_millis(100);
/// How much longer the waiters' timers run than a flight's own limit, so that the flight's timer fires first.
pub(crate) const GRACE: Duration = Duration::from_millis(500);
/// A forced refresh that recurs within this many cooldowns doubles the next one.
pub(crate) const RECURRENCE: u32 = 3;

const MAX_LIFETIME: Duration = Duration::from_secs(365 * 24 * 60 * 60);
const BACKOFF: Duration = Duration::from_millis(500);
const BACKOFF_CAP: Duration = Duration::from_secs(10);
const TERMINAL: Duration = Duration::from_secs(5);
const TERMINAL_CAP: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(200);
const PATIENT_PAUSE: Duration = Duration::from_secs(1);
const PAUSE_CAP: Duration = Duration::from_secs(5);
const COOLDOWN: Duration = Duration::from_secs(5);
const COOLDOWN_CAP: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert, prop_oneof, proptest};

    use super::*;

    fn response(expires_in: Option<u64>) -> TokenResponse {
        let response = TokenResponse::new("token").unwrap();
        match expires_in {
            Some(seconds) => response.expires_in(Duration::from_secs(seconds)),
            None => response,
        }
    }

    fn schedule(expires_in: Option<u64>, first: bool, seed: u64) -> Schedule {
        RefreshPolicy::new().schedule(&response(expires_in), first, &mut Rng::with_seed(seed))
    }

    #[test]
    fn windows_follow_the_lifetime() {
        // (lifetime, refresh from, refresh to, dead at), in milliseconds
        let rows = [
            (Some(0), 1_000, 1_000, 0),
            (Some(1), 1_000, 1_000, 900),
            (Some(2), 1_300, 1_500, 1_800),
            (Some(60), 39_000, 45_000, 54_000),
            (Some(300), 195_000, 225_000, 290_000),
            (None, 195_000, 225_000, 290_000),
            (Some(3_600), 2_940_000, 3_300_000, 3_590_000),
            (Some(86_400), 77_460_000, 86_100_000, 86_390_000),
        ];
        for (lifetime, from, to, dead) in rows {
            for seed in 0..200 {
                let schedule = schedule(lifetime, false, seed);
                let after = schedule.refresh_after.as_millis();
                assert!((from..=to).contains(&after), "{lifetime:?}: {after} ms");
                assert_eq!(schedule.expires_after.as_millis(), dead, "{lifetime:?}");
            }
        }
    }

    /// Law 4: otherwise a request would wait each time, and a warm cache would be without a token.
    #[test]
    fn a_token_is_due_before_it_dies_however_small_the_window() {
        for (window, margin) in [(0, 10), (5, 10), (10, 60), (0, 0), (300, 10)] {
            let policy = RefreshPolicy::new()
                .refresh_window(Duration::from_secs(window))
                .expiry_margin(Duration::from_secs(margin));
            for lifetime in [60, 300, 3_600] {
                for seed in 0..200 {
                    let rng = &mut Rng::with_seed(seed);
                    let schedule = policy.schedule(&response(Some(lifetime)), false, rng);
                    assert!(
                        schedule.refresh_after <= schedule.expires_after,
                        "{window} s, {margin} s, {lifetime} s: {schedule:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn first_tokens_are_spread_over_two_fifths_of_the_lifetime() {
        let after = |seed| schedule(Some(1_000), true, seed).refresh_after.as_secs();
        let all: Vec<_> = (0..500).map(after).collect();
        assert!(all.iter().all(|after| (350..=750).contains(after)));
        assert!(all.iter().any(|after| *after < 400) && all.iter().any(|after| *after > 700));
    }

    #[test]
    fn refresh_in_is_kept_within_the_lifetime() {
        for (refresh_in, from, to) in [
            (0, 400, 500),
            (500, 400, 500),
            (700, 600, 700),
            (5_000, 800, 900),
        ] {
            let response = response(Some(1_000)).refresh_in(Duration::from_secs(refresh_in));
            for seed in 0..200 {
                let rng = &mut Rng::with_seed(seed);
                let after = RefreshPolicy::new().schedule(&response, seed % 2 == 0, rng);
                let after = after.refresh_after.as_secs();
                assert!((from..=to).contains(&after), "{refresh_in}: {after}");
            }
        }
    }

    #[test]
    fn backoff_doubles_to_ten_seconds_and_saturates() {
        let rows = [
            (1, 500),
            (2, 1_000),
            (3, 2_000),
            (5, 8_000),
            (6, 10_000),
            (58, 10_000),
            (u32::MAX, 10_000),
        ];
        for (failures, whole) in rows {
            for seed in 0..200 {
                let rng = &mut Rng::with_seed(seed);
                let gate = gate_times(failures, 0, None, rng);
                let shut = gate.opens_after.as_millis();
                assert!((whole / 2..=whole).contains(&shut), "{failures}: {shut}");
                assert_eq!(gate.strict_until, Duration::ZERO);
            }
        }
    }

    #[test]
    fn terminal_errors_double_to_a_minute() {
        for (terminal, whole) in [(1, 5), (2, 10), (4, 40), (5, 60), (u32::MAX, 60)] {
            for seed in 0..200 {
                let rng = &mut Rng::with_seed(seed);
                let gate = gate_times(u32::MAX, terminal, None, rng);
                let shut = gate.opens_after.as_secs_f64();
                assert!(shut >= f64::from(whole) * 0.5 && shut <= f64::from(whole.max(10)) * 1.1);
                assert!(gate.strict_until.as_secs_f64() >= f64::from(whole) * 0.5);
            }
        }
    }

    #[test]
    fn retry_after_is_obeyed_up_to_five_minutes() {
        for (asked, least) in [(0, 0), (7, 7), (300, 300), (86_400, 300)] {
            let error = TokenError::transient("busy").with_retry_after(Duration::from_secs(asked));
            for seed in 0..200 {
                let rng = &mut Rng::with_seed(seed);
                let gate = gate_times(1, 0, Some(&error), rng);
                assert!(gate.opens_after >= Duration::from_secs(least));
                assert!(gate.opens_after <= Duration::from_secs(least + 1).mul_f64(1.1));
            }
        }
    }

    #[test]
    fn cooldowns_double_to_a_minute() {
        let mut all = vec![cooldown(None)];
        for _ in 0..5 {
            all.push(cooldown(all.last().copied()));
        }
        let seconds: Vec<_> = all.iter().map(Duration::as_secs).collect();
        assert_eq!(seconds, [5, 10, 20, 40, 60, 60]);
    }

    proptest! {
        /// Law 7: no lifetime that a server can name breaks the arithmetic.
        #[test]
        fn any_lifetime_has_a_schedule(seconds in prop_oneof![0_u64..100_000, any::<u64>()], first: bool, seed: u64) {
            let schedule = schedule(Some(seconds), first, seed);
            prop_assert!(schedule.refresh_after >= FLOOR);
            prop_assert!(schedule.expires_after <= MAX_LIFETIME);
            // A token that lives for two seconds or more is due before it dies.
            prop_assert!(seconds < 2 || schedule.refresh_after < schedule.expires_after);
        }
    }
}
