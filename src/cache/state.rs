//! The decisions of the cache, as a pure state machine: (state, event, now) -> decision.
//!
//! Nothing here locks, waits, spawns or reads a clock. `F` stands for a flight, of which the machine only
//! needs to know whether two are the same one.
//!
//! # Invariants
//!
//! 1. At most one flight is on record. Only its own end, or its being overdue, takes it off (law 1).
//! 2. A result counts only while its flight is on record: a flight that was given up is fenced.
//! 3. Only a newer token displaces a token. No failure and no 401 does (law 3).
//! 4. A token is named rejected only while a flight is on record.
//! 5. A flight starts only past the floor and through an open gate, but for the one exemption that each token
//!    has at its expiry; a forced one, past the cooldown instead of the floor (law 2).
//! 6. Every gate, cooldown and floor is a moment that comes: nothing closes for good (law 7).

use std::time::Duration;

use fastrand::Rng;
use tokio::time::Instant;

use crate::{
    error::TokenError,
    policy::{self, RefreshPolicy},
    source::{RefreshToken, TokenResponse},
    time::{Deadline, Now},
    token::AccessToken,
};

/// What is known about one key's token.
#[derive(Debug)]
pub(crate) struct State<F> {
    policy: RefreshPolicy,
    rng: Rng,
    token: Option<AccessToken>,
    /// The API has said that the token is invalid, and the flight on record is to replace it.
    rejected: bool,
    /// The token has used its exemption from the gate.
    exempted: bool,
    refresh_token: Option<(RefreshToken, Option<Deadline>)>,
    /// The refresh token that was handed out last.
    spent: Option<RefreshToken>,
    /// No unforced flight sends before this.
    floor: Option<Deadline>,
    flight: Option<OnRecord<F>>,
    /// How many flights have been on record.
    flights: u64,
    gate: Gate,
    cooldown: Cooldown,
}

#[derive(Debug)]
struct OnRecord<F> {
    flight: F,
    /// When its waiters give it up. By the monotonic clock alone, as their timers are.
    overdue: Instant,
    forced: bool,
}

/// What a caller who wants a token does.
#[derive(Debug)]
pub(crate) enum Decision<F> {
    /// Attach this token.
    Use(AccessToken),
    /// Attach this token and start a flight that nobody waits for.
    UseAndStart(AccessToken),
    /// Start a flight and wait for it.
    Start,
    /// Wait for this flight; with a fallback for a while only, and use that then or if the flight fails.
    Join(F, Option<AccessToken>),
    /// There is no token, and this is why.
    Fail(TokenError),
}

/// What becomes of a 401.
#[derive(Debug)]
pub(crate) enum Refusal<F> {
    /// This token is newer than the one that was refused: send the request with it.
    Replay(AccessToken),
    /// This flight brings another token.
    Join(F),
    /// Start a forced flight: it brings another token.
    Start,
    /// Start the flight that is due anyway, since the token has died.
    Refresh,
    /// There is no other token to try.
    Pass,
}

/// What a flight is to do.
#[derive(Debug)]
pub(crate) struct Plan {
    /// How long to wait before the first attempt.
    pub(crate) delay: Duration,
    /// When all attempts must have ended.
    pub(crate) deadline: Instant,
    pub(crate) attempts: u32,
    pub(crate) forced: bool,
    pub(crate) refresh_token: Option<RefreshToken>,
}

impl<F: Clone + PartialEq> State<F> {
    pub(crate) fn new(policy: RefreshPolicy, rng: Rng) -> Self {
        Self {
            policy,
            rng,
            token: None,
            rejected: false,
            exempted: false,
            refresh_token: None,
            spent: None,
            floor: None,
            flight: None,
            flights: 0,
            gate: Gate::default(),
            cooldown: Cooldown::default(),
        }
    }

    /// What a caller who wants a token at `now` does.
    pub(crate) fn acquire(&self, now: Now) -> Decision<F> {
        let flight = self.flight.as_ref().map(|record| &record.flight);
        match (self.attachable(now), flight) {
            (Some(token), Some(flight)) if self.rejected && self.gate.failures == 0 => {
                Decision::Join(flight.clone(), Some(token))
            }
            (Some(token), None) if token.is_due(now) && self.gate.is_open(now) => {
                Decision::UseAndStart(token)
            }
            (Some(token), _) => Decision::Use(token),
            (None, Some(flight)) => match &self.gate.remembered {
                Some(error) => Decision::Fail(error.clone()),
                None => Decision::Join(flight.clone(), None),
            },
            (None, None) => match &self.gate.remembered {
                Some(error) if !self.may_pass(now) => Decision::Fail(error.clone()),
                _ => Decision::Start,
            },
        }
    }

    /// What becomes of a 401 about the token `sent`, which the API has `named` invalid or just refused.
    ///
    /// A 401 counts against the token that was sent (law 8), and only for as much as the cooldown and the
    /// gate allow: while there is no way to another token, it changes nothing.
    pub(crate) fn refused(&mut self, sent: &AccessToken, named: bool, now: Now) -> Refusal<F> {
        let is_current = self
            .token
            .as_ref()
            .is_some_and(|token| token.same_text(sent));
        match (self.attachable(now), &self.flight) {
            (Some(token), _) if !is_current && !self.rejected => Refusal::Replay(token),
            (current, Some(record)) => {
                self.rejected |= named && is_current && current.is_some();
                Refusal::Join(record.flight.clone())
            }
            (None, None) if is_current && self.may_pass(now) => Refusal::Refresh,
            (Some(_), None) if self.gate.is_open(now) && self.cooldown.is_over(now) => {
                Refusal::Start
            }
            (_, None) => Refusal::Pass,
        }
    }

    /// Puts a flight on record, as [`Decision::Start`] and [`Decision::UseAndStart`] ask for.
    ///
    /// `make` makes it of the moment at which it is overdue.
    pub(crate) fn begin(&mut self, make: impl FnOnce(Instant) -> F, now: Now) -> (F, Plan) {
        let mut delay = remaining(self.floor, now);
        if !self.gate.is_open(now) {
            if self.is_exempt(now) {
                self.exempted = true;
            } else {
                delay = delay.max(remaining(self.gate.opens, now));
            }
        }
        // Each refresh token is handed out once, whatever becomes of it: servers that rotate them take a
        // second use for theft, and a lost answer cannot be told from a lost request.
        let refresh_token = self.refresh_token.take();
        let refresh_token = refresh_token
            .filter(|(_, expiry)| !expiry.is_some_and(|expiry| expiry.has_come(now)))
            .map(|(token, _)| token);
        if let Some(token) = &refresh_token {
            self.spent = Some(token.clone());
        }
        self.record(make, false, delay, refresh_token, now)
    }

    /// Puts a flight on record that a 401 forced, as [`Refusal::Start`] asks for.
    ///
    /// The session may be gone that the refresh token belongs to, so it is forgotten.
    pub(crate) fn begin_forced(
        &mut self,
        make: impl FnOnce(Instant) -> F,
        named: bool,
        now: Now,
    ) -> (F, Plan) {
        self.rejected = named && self.attachable(now).is_some();
        self.refresh_token = None;
        self.cooldown.begin(now);
        self.record(make, true, Duration::ZERO, None, now)
    }

    /// Takes the result of `flight` and returns the token, if the flight is still on record.
    pub(crate) fn succeeded(
        &mut self,
        flight: &F,
        response: TokenResponse,
        sent: Now,
        now: Now,
    ) -> Option<AccessToken> {
        self.close(flight, now)?;
        let first = self.floor.is_none();
        let schedule = self.policy.schedule(&response, first, &mut self.rng);
        let token = AccessToken::new(&response.access_token, response.scope, schedule, sent, now);
        // A server that does not rotate its refresh tokens sends the one that it got.
        let spent = self.spent.as_ref();
        let refresh_token = response
            .refresh_token
            .filter(|token| spent.is_none_or(|spent| !spent.same_text(token)));
        self.refresh_token = refresh_token.map(|token| {
            let expiry = token.expires_in.map(|after| sent.after(after));
            (token, expiry)
        });
        self.token = Some(token.clone());
        self.exempted = false;
        self.floor = Some(sent.after(policy::FLOOR));
        self.gate = Gate::default();
        Some(token)
    }

    /// Takes the failure of `flight`, or without an error its loss, and returns for how long the gate is shut, if
    /// the flight is still on record.
    pub(crate) fn failed(
        &mut self,
        flight: &F,
        error: Option<&TokenError>,
        now: Now,
    ) -> Option<Duration> {
        self.close(flight, now)?;
        Some(self.gate.shut(&self.policy, error, &mut self.rng, now))
    }

    /// Takes an overdue flight off the record and returns it, so that its waiters can be told.
    ///
    /// Whoever looks at the state does this first. It is the fence of law 6: from here on the flight's
    /// result counts for nothing.
    pub(crate) fn give_up_overdue(&mut self, now: Now) -> Option<F> {
        let record = self.flight.as_ref()?;
        if now.monotonic < record.overdue {
            return None;
        }
        let flight = record.flight.clone();
        self.failed(&flight, None, now);
        Some(flight)
    }

    /// The token, if it may be attached: alive, rejected or not.
    pub(crate) fn attachable(&self, now: Now) -> Option<AccessToken> {
        self.token.clone().filter(|token| token.is_alive(now))
    }

    /// The token that requests may take without asking here, as long as it is fresh.
    pub(crate) fn unquestioned(&self) -> Option<&AccessToken> {
        self.token.as_ref().filter(|_| !self.rejected)
    }

    /// What callers get who cannot wait for a flight.
    pub(crate) fn remembered(&self) -> Option<TokenError> {
        self.gate.remembered.clone()
    }

    /// How many flights have been on record.
    pub(crate) fn flights(&self) -> u64 {
        self.flights
    }

    /// When to look whether a refresh is due, if there is anything to refresh.
    pub(crate) fn next_due(&self) -> Option<Deadline> {
        let due = self.token.as_ref()?.due();
        Some(self.gate.opens.map_or(due, |opens| opens.latest(due)))
    }

    fn record(
        &mut self,
        make: impl FnOnce(Instant) -> F,
        forced: bool,
        delay: Duration,
        refresh_token: Option<RefreshToken>,
        now: Now,
    ) -> (F, Plan) {
        let deadline = now.monotonic + delay + self.policy.flight_limit();
        let overdue = deadline + policy::GRACE;
        let flight = make(overdue);
        self.flights += 1;
        self.flight = Some(OnRecord {
            flight: flight.clone(),
            overdue,
            forced,
        });
        let plan = Plan {
            delay,
            deadline,
            attempts: self.policy.attempts_after(self.gate.failures),
            forced,
            refresh_token,
        };
        (flight, plan)
    }

    /// Takes `flight` off the record, if it is on it.
    fn close(&mut self, flight: &F, now: Now) -> Option<()> {
        let record = self.flight.take_if(|record| record.flight == *flight)?;
        self.rejected = false;
        if record.forced {
            self.cooldown.end(now);
        }
        Some(())
    }

    /// Whether a flight may start now, with nothing attachable.
    fn may_pass(&self, now: Now) -> bool {
        self.gate.is_open(now) || self.is_exempt(now)
    }

    /// Whether the token has just died and its one flight past a backoff gate is still to be had.
    fn is_exempt(&self, now: Now) -> bool {
        let died = self
            .token
            .as_ref()
            .is_some_and(|token| !token.is_alive(now));
        died && !self.exempted && self.gate.is_lenient(now)
    }
}

/// What failed flights leave behind: how many there were and when the next may start.
///
/// A success opens it; a 401 never does.
#[derive(Debug, Default)]
struct Gate {
    failures: u32,
    terminal: u32,
    opens: Option<Deadline>,
    /// Until then the gate is shut even for a token at hard expiry.
    strict: Option<Deadline>,
    /// What callers get who cannot wait for a flight.
    remembered: Option<TokenError>,
}

impl Gate {
    fn is_open(&self, now: Now) -> bool {
        self.opens.is_none_or(|opens| opens.has_come(now))
    }

    fn is_lenient(&self, now: Now) -> bool {
        self.strict.is_none_or(|strict| strict.has_come(now))
    }

    fn shut(
        &mut self,
        policy: &RefreshPolicy,
        error: Option<&TokenError>,
        rng: &mut Rng,
        now: Now,
    ) -> Duration {
        self.failures = self.failures.saturating_add(1);
        self.terminal = match error.is_none_or(TokenError::is_transient) {
            true => 0,
            false => self.terminal.saturating_add(1),
        };
        let times = policy.gate(self.failures, self.terminal, error, rng);
        self.opens = Some(now.after(times.opens_after));
        self.strict = Some(now.after(times.strict_until));
        // A lost flight says nothing of the server: the next callers wait for a new one.
        if let Some(error) = error {
            self.remembered = Some(error.clone());
        }
        times.opens_after
    }
}

/// How long after a forced refresh the next one may follow.
#[derive(Debug, Default)]
struct Cooldown {
    length: Option<Duration>,
    over: Option<Deadline>,
    /// From here on a further forced refresh is no recurrence.
    calm: Option<Deadline>,
}

impl Cooldown {
    fn is_over(&self, now: Now) -> bool {
        self.over.is_none_or(|over| over.has_come(now))
    }

    fn begin(&mut self, now: Now) {
        let recurs = self.calm.is_some_and(|calm| !calm.has_come(now));
        self.length = Some(policy::cooldown(self.length.filter(|_| recurs)));
    }

    fn end(&mut self, now: Now) {
        let length = self.length.unwrap_or_default();
        self.over = Some(now.after(length));
        self.calm = Some(now.after(length * policy::RECURRENCE));
    }
}

fn remaining(deadline: Option<Deadline>, now: Now) -> Duration {
    deadline.map_or(Duration::ZERO, |deadline| deadline.remaining(now))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A state and a clock, with flights named by numbers.
    struct Case {
        state: State<u32>,
        now: Now,
        flights: u32,
    }

    impl Case {
        fn new() -> Self {
            Self {
                state: State::new(RefreshPolicy::new(), Rng::with_seed(1)),
                now: Now::read(),
                flights: 0,
            }
        }

        /// With a token of 1,000 s that is neither the first nor due, and its predecessor.
        fn with_token() -> (Self, AccessToken, AccessToken) {
            let mut case = Self::new();
            let old = case.grant("old", 1_000);
            case.pass(750.0);
            let token = case.grant("new", 1_000);
            (case, old, token)
        }

        fn pass(&mut self, seconds: f64) {
            let time = Duration::from_secs_f64(seconds);
            self.now.monotonic += time;
            self.now.wall += time;
        }

        fn begin(&mut self) -> (u32, Plan) {
            self.flights += 1;
            let id = self.flights;
            self.state.begin(|_| id, self.now)
        }

        fn begin_forced(&mut self, named: bool) -> u32 {
            self.flights += 1;
            let id = self.flights;
            self.state.begin_forced(|_| id, named, self.now).0
        }

        fn grant(&mut self, text: &str, lifetime: u64) -> AccessToken {
            let (flight, _) = self.begin();
            self.land(flight, text, lifetime).unwrap()
        }

        fn land(&mut self, flight: u32, text: &str, lifetime: u64) -> Option<AccessToken> {
            let response = TokenResponse::new(text)
                .unwrap()
                .expires_in(Duration::from_secs(lifetime));
            self.state.succeeded(&flight, response, self.now, self.now)
        }

        fn fail(&mut self, flight: u32, error: &TokenError) {
            self.state.failed(&flight, Some(error), self.now).unwrap();
        }

        /// What a caller does, in a word.
        fn acquire(&self) -> String {
            match self.state.acquire(self.now) {
                Decision::Use(token) => format!("use {}", token.expose_secret()),
                Decision::UseAndStart(token) => format!("use {} and start", token.expose_secret()),
                Decision::Start => "start".to_owned(),
                Decision::Join(flight, None) => format!("join {flight}"),
                Decision::Join(flight, Some(token)) => {
                    format!("join {flight} or use {}", token.expose_secret())
                }
                Decision::Fail(_) => "fail".to_owned(),
            }
        }

        /// What becomes of a 401 about `token`, in a word.
        fn refused(&mut self, token: &AccessToken, named: bool) -> String {
            match self.state.refused(token, named, self.now) {
                Refusal::Replay(token) => format!("replay {}", token.expose_secret()),
                Refusal::Join(flight) => format!("join {flight}"),
                Refusal::Start => "start".to_owned(),
                Refusal::Refresh => "refresh".to_owned(),
                Refusal::Pass => "pass".to_owned(),
            }
        }
    }

    fn down() -> TokenError {
        TokenError::transient("down")
    }

    #[test]
    fn a_token_is_used_then_refreshed_then_dead() {
        let (mut case, _, _) = Case::with_token();
        // The window is 250 s and up to 100 s more by chance; the margin 10 s.
        for (pass, expected) in [
            (0.0, "use new"),
            (649.0, "use new"),
            (102.0, "use new and start"),
            (238.9, "use new and start"),
            (0.2, "start"),
        ] {
            case.pass(pass);
            assert_eq!(case.acquire(), expected);
        }
    }

    /// Law 4: a refresh in the air makes nobody wait, until the token dies.
    #[test]
    fn callers_join_a_flight_only_without_a_token() {
        let (mut case, _, _) = Case::with_token();
        case.pass(800.0);
        let (flight, _) = case.begin();
        assert_eq!(case.acquire(), "use new");
        case.pass(200.0);
        assert_eq!(case.acquire(), format!("join {flight}"));
    }

    /// Law 3: a failed early refresh changes nothing for requests, and is tried again past the gate.
    #[test]
    fn a_failed_early_refresh_leaves_the_token() {
        let (mut case, _, _) = Case::with_token();
        case.pass(800.0);
        let (flight, plan) = case.begin();
        assert_eq!(plan.attempts, 3);
        case.fail(flight, &down());
        assert_eq!(case.acquire(), "use new");
        case.pass(0.6);
        assert_eq!(case.acquire(), "use new and start");
        let (_, plan) = case.begin();
        assert_eq!(plan.attempts, 1);
    }

    /// Law 2: at hard expiry one flight passes a backoff gate, and no Retry-After and no terminal error.
    #[test]
    fn one_flight_at_hard_expiry_passes_a_backoff_gate() {
        let strict = down().with_retry_after(Duration::from_secs(60));
        for (error, first, second) in [
            (down(), "start", "fail"),
            (strict, "fail", "fail"),
            (TokenError::terminal("refused"), "fail", "fail"),
        ] {
            let (mut case, _, _) = Case::with_token();
            case.pass(989.9);
            let (flight, _) = case.begin();
            case.fail(flight, &error);
            case.pass(0.15);
            assert_eq!(case.acquire(), first, "{error}");
            if first == "start" {
                let (flight, plan) = case.begin();
                assert_eq!(plan.delay, Duration::ZERO);
                case.fail(flight, &error);
                assert_eq!(case.acquire(), second, "{error}");
            }
        }
    }

    #[test]
    fn only_the_starter_waits_while_the_failure_count_is_above_zero() {
        let mut case = Case::new();
        let (flight, _) = case.begin();
        assert_eq!(case.acquire(), "join 1");
        case.fail(flight, &down());
        assert_eq!(case.acquire(), "fail");
        case.pass(0.6);
        assert_eq!(case.acquire(), "start");
        let (flight, _) = case.begin();
        assert_eq!(case.acquire(), "fail");
        case.land(flight, "token", 300).unwrap();
        assert_eq!(case.acquire(), "use token");
        // A success forgets the failures.
        case.pass(291.0);
        let (flight, plan) = case.begin();
        assert_eq!(plan.attempts, 3);
        assert_eq!(case.acquire(), format!("join {flight}"));
    }

    /// Law 2: a token that is dead on arrival is replaced a second after it was asked for.
    #[test]
    fn the_floor_delays_the_next_flight() {
        let mut case = Case::new();
        case.grant("dead", 0);
        case.pass(0.25);
        assert_eq!(case.acquire(), "start");
        let (_, plan) = case.begin();
        assert_eq!(plan.delay, Duration::from_millis(750));
        assert_eq!(case.acquire(), "join 2");
    }

    /// Law 8, and each row that the cache decides of what an answer means.
    #[test]
    fn a_401_counts_against_the_token_that_was_sent() {
        let (mut case, old, new) = Case::with_token();
        assert_eq!(case.refused(&old, true), "replay new");
        assert_eq!(case.refused(&new, true), "start");
        let flight = case.begin_forced(true);
        assert_eq!(case.refused(&new, true), format!("join {flight}"));
        assert_eq!(case.acquire(), format!("join {flight} or use new"));
        // There is nothing to be gained from a token that is refused itself.
        assert_eq!(case.refused(&old, true), format!("join {flight}"));
        let newest = case.land(flight, "newest", 1_000).unwrap();
        assert_eq!(case.refused(&new, true), "replay newest");
        assert_eq!(case.refused(&newest, true), "pass");
        case.pass(5.1);
        assert_eq!(case.refused(&newest, true), "start");
    }

    /// Law 8: without a token to replay with, a late 401 costs nothing either.
    #[test]
    fn a_401_about_a_token_that_is_neither_held_nor_was_last_is_passed_on() {
        let (mut case, old, new) = Case::with_token();
        case.pass(990.5);
        assert_eq!(case.refused(&old, true), "pass");
        // Its own death explains the 401 about the last token: no force, and no cooldown.
        assert_eq!(case.refused(&new, true), "refresh");
        let (flight, _) = case.begin();
        assert_eq!(case.refused(&old, true), format!("join {flight}"));
        assert_eq!(Case::new().refused(&new, true), "pass");
    }

    #[test]
    fn an_unexplained_401_makes_no_other_request_wait() {
        let (mut case, _, new) = Case::with_token();
        assert_eq!(case.refused(&new, false), "start");
        let flight = case.begin_forced(false);
        assert_eq!(case.acquire(), "use new");
        assert_eq!(case.refused(&new, true), format!("join {flight}"));
        assert_eq!(case.acquire(), format!("join {flight} or use new"));
    }

    /// Law 3: a 401 keeps the token as the last resort, and a failed replacement gives it back to all.
    #[test]
    fn a_failed_forced_refresh_leaves_the_token() {
        let (mut case, _, new) = Case::with_token();
        let flight = case.begin_forced(true);
        case.fail(flight, &down());
        assert_eq!(case.acquire(), "use new");
        assert_eq!(case.refused(&new, true), "pass");
        case.pass(5.1);
        let flight = case.begin_forced(true);
        // Nobody waits while the endpoint is known to be down.
        assert_eq!(case.acquire(), "use new");
        case.fail(flight, &down());
        assert_eq!(case.acquire(), "use new");
    }

    #[test]
    fn cooldowns_double_while_401s_recur_and_start_over_when_they_do_not() {
        let (mut case, _, _) = Case::with_token();
        let mut token = case.state.attachable(case.now).unwrap();
        for (quiet, cooldown) in [(0.0, 5.0), (5.0, 10.0), (10.0, 20.0), (61.0, 5.0)] {
            case.pass(quiet);
            assert_eq!(case.refused(&token, true), "start");
            let flight = case.begin_forced(true);
            token = case
                .land(flight, &format!("token-{flight}"), 10_000)
                .unwrap();
            case.pass(cooldown - 0.01);
            assert_eq!(case.refused(&token, true), "pass", "{cooldown}");
            case.pass(0.02);
        }
    }

    /// Laws 1 and 6: what a flight brings that was given up counts for nothing.
    #[test]
    fn an_overdue_flight_is_given_up_and_fenced() {
        let mut case = Case::new();
        let (flight, plan) = case.begin();
        case.now.monotonic = plan.deadline;
        assert_eq!(case.state.give_up_overdue(case.now), None);
        case.pass(0.5);
        assert_eq!(case.state.give_up_overdue(case.now), Some(flight));
        // Nothing is known against the server, so callers wait for the gate and the next flight.
        assert_eq!(case.acquire(), "start");
        let (next, plan) = case.begin();
        assert!(plan.delay >= Duration::from_millis(250));
        assert!(case.land(flight, "late", 300).is_none());
        assert!(case.state.failed(&flight, None, case.now).is_none());
        assert_eq!(case.acquire(), format!("join {next}"));
    }

    /// Law 7 (T14): a token dies by either clock, and a gate opens by either.
    #[test]
    fn clock_steps_neither_revive_a_token_nor_shut_a_gate_for_good() {
        let hour = Duration::from_secs(3_600);
        // Suspended for an hour: the monotonic clock stood still.
        let (mut case, _, _) = Case::with_token();
        case.now.wall += hour;
        assert_eq!(case.acquire(), "start");
        // The wall clock was set back: the monotonic one counts.
        let (mut case, _, _) = Case::with_token();
        case.now.wall -= hour;
        assert_eq!(case.acquire(), "use new");
        case.now.monotonic += Duration::from_secs(991);
        assert_eq!(case.acquire(), "start");
        // A gate, and the wall clock set back while it is shut.
        let mut case = Case::new();
        let (flight, _) = case.begin();
        case.fail(flight, &down());
        case.now.wall -= hour;
        assert_eq!(case.acquire(), "fail");
        case.pass(0.6);
        assert_eq!(case.acquire(), "start");
    }

    #[test]
    fn a_refresh_token_is_handed_out_once_in_time_and_never_by_force() {
        let grant = |case: &mut Case, refresh_token: RefreshToken| {
            let (flight, _) = case.begin();
            let response = TokenResponse::new("token").unwrap();
            let response = response.refresh_token(refresh_token);
            let now = case.now;
            case.state.succeeded(&flight, response, now, now).unwrap();
        };
        let sent = |plan: Plan| {
            plan.refresh_token
                .map(|token| token.expose_secret().to_owned())
        };
        let mut case = Case::new();
        grant(&mut case, RefreshToken::new("zero"));
        let forced = case.begin_forced(true);
        case.fail(forced, &down());
        let (flight, plan) = case.begin();
        assert_eq!(sent(plan), None);
        case.fail(flight, &down());
        grant(&mut case, RefreshToken::new("one"));
        let (flight, plan) = case.begin();
        assert_eq!(sent(plan).as_deref(), Some("one"));
        case.fail(flight, &down());
        let (flight, plan) = case.begin();
        assert_eq!(sent(plan), None);
        case.fail(flight, &down());
        // The server sends again what was sent to it.
        grant(&mut case, RefreshToken::new("one"));
        let (flight, plan) = case.begin();
        assert_eq!(sent(plan), None);
        case.fail(flight, &down());
        grant(
            &mut case,
            RefreshToken::new("two").expires_in(Duration::from_secs(60)),
        );
        case.pass(60.0);
        assert_eq!(sent(case.begin().1), None);
    }
}
