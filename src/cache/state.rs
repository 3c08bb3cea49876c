//! The decisions of the cache, as a pure state machine: (state, event, now) -> decision.
//!
//! Nothing here locks, waits, spawns or reads a clock. `F` stands for a flight; the machine only compares flights.
//! The gate that a key shares with the other keys of its source is passed as an argument.
//!
//! # Invariants
//!
//! 1. At most one flight is on record. Only its end, or its being overdue, takes it off (law 1).
//! 2. A result counts only while its flight is on record: a flight that was given up is fenced.
//! 3. Only a newer token displaces a token, or the server's word that all earlier tokens are void. No failure and no
//!    401 does (law 3).
//! 4. A token is marked rejected only while a flight is on record.
//! 5. A flight starts only past the floor and through an open gate, except for the one exemption that each token has
//!    at its expiry; a forced one starts past the cooldown instead of the floor (law 2).
//! 6. Every gate, cooldown and floor is a moment that comes: nothing closes for good (law 7).

use std::{sync::Arc, time::Duration};

use fastrand::Rng;
use tokio::time::Instant;

use super::{
    gate::{OwnGate, SharedGate},
    status::TokenState,
};
use crate::{
    error::TokenError,
    policy::{self, RefreshPolicy},
    source::{RefreshToken, Revocation, TokenRequest, TokenResponse},
    telemetry::FailureReport,
    time::{Deadline, Now},
    token::{AccessToken, KeyId, TokenId},
};

/// The state of one key's token.
#[derive(Debug)]
pub(crate) struct State<F> {
    policy: Arc<RefreshPolicy>,
    /// What the token is for.
    request: TokenRequest,
    rng: Rng,
    token: Option<AccessToken>,
    /// The first token with the same text as this one: servers may grant the same token twice.
    same_text_since: Option<TokenId>,
    /// The API called the token invalid, and the flight on record is to replace it.
    rejected: bool,
    /// The API called the token invalid, and no flight has replaced it since: only reported.
    invalid: bool,
    /// The token's exemption from the gate is used up.
    exempted: bool,
    refresh_token: Option<Expiring>,
    /// The refresh token handed out last. It is not sent again, but its session may still be alive.
    spent: Option<Expiring>,
    /// No unforced flight sends before this.
    floor: Option<Deadline>,
    flight: Option<OnRecord<F>>,
    /// How many flights there were.
    flights: u64,
    /// When the last one succeeded.
    succeeded: Option<Now>,
    outage: Option<Outage>,
    gate: OwnGate,
    cooldown: Cooldown,
}

/// A refresh token, and its expiry if the server named one.
type Expiring = (RefreshToken, Option<Deadline>);

#[derive(Debug)]
struct OnRecord<F> {
    flight: F,
    /// When its waiters give it up. Monotonic only, like their timers.
    overdue: Instant,
    began: Instant,
    forced: bool,
    /// Whether it waits for the gate or the floor, and has asked nobody yet.
    waits: bool,
}

/// The flights that failed since the last success.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outage {
    /// When the first of them began.
    pub(crate) since: Instant,
    pub(crate) failures: u32,
    /// Whether it was reported that requests fail.
    reported: bool,
}

/// The state at one moment.
#[derive(Debug)]
pub(crate) struct Snapshot<F> {
    pub(crate) state: TokenState,
    pub(crate) token: Option<AccessToken>,
    pub(crate) succeeded: Option<Now>,
    pub(crate) outage: Option<Outage>,
    pub(crate) failures: u32,
    pub(crate) error: Option<TokenError>,
    pub(crate) opens: Option<Deadline>,
    pub(crate) flight: Option<F>,
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
    /// Wait for this flight. With a fallback, wait only briefly, and use it after that or if the flight fails.
    Join(F, Option<AccessToken>),
    /// There is no token, and this is why.
    Fail(TokenError),
}

/// What to do about a 401.
#[derive(Debug)]
pub(crate) enum Refusal<F> {
    /// Send the request with this token, which is newer than the refused one.
    Replay(AccessToken),
    /// This flight brings another token.
    Join(F),
    /// Start a forced flight: it brings another token.
    Start,
    /// Start the flight that is due anyway, since the token is dead.
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
    /// Whether no caller is going to wait for it.
    pub(crate) in_background: bool,
    pub(crate) forced: bool,
    /// How many flights failed in a row before it.
    pub(crate) failures: u32,
    pub(crate) refresh_token: Option<RefreshToken>,
    /// What the token is for.
    pub(crate) request: TokenRequest,
    /// The claims that the API missed in the token.
    pub(crate) claims: Option<String>,
}

impl<F: Clone + PartialEq> State<F> {
    pub(crate) fn new(
        key: KeyId,
        request: TokenRequest,
        policy: Arc<RefreshPolicy>,
        rng: Rng,
    ) -> Self {
        Self {
            policy,
            request,
            rng,
            token: None,
            same_text_since: None,
            rejected: false,
            invalid: false,
            exempted: false,
            refresh_token: None,
            spent: None,
            floor: None,
            flight: None,
            flights: 0,
            succeeded: None,
            outage: None,
            gate: OwnGate::new(key),
            cooldown: Cooldown::default(),
        }
    }

    /// Sets a token that never expires.
    #[cfg(feature = "test-util")]
    pub(crate) fn set_fixed_token(&mut self, response: TokenResponse) {
        let id = TokenId::new(self.gate.key(), self.flights);
        self.token = Some(AccessToken::fixed(response, id, self.request.clone()));
        self.same_text_since = Some(id);
    }

    /// What a caller who wants a token at `now` does.
    pub(crate) fn acquire(&self, shared: &SharedGate, now: Now) -> Decision<F> {
        let flight = self.flight.as_ref().map(|record| &record.flight);
        let open = self.gate.is_open(shared, now);
        match (self.attachable(now), flight) {
            (Some(token), Some(flight)) if self.rejected && self.gate.failures(shared) == 0 => {
                Decision::Join(flight.clone(), Some(token))
            }
            (Some(token), None) if token.is_due(now) && open => Decision::UseAndStart(token),
            (Some(token), _) => Decision::Use(token),
            (None, flight) => {
                let may_start = flight.is_none() && self.may_pass(shared, now);
                match (self.last_resort(shared, now), flight) {
                    (Some(token), _) if may_start => Decision::UseAndStart(token),
                    (Some(token), _) => Decision::Use(token),
                    (None, None) if may_start => Decision::Start,
                    (None, flight) => match (self.gate.remembered(shared), flight) {
                        (Some(error), _) => Decision::Fail(error.clone()),
                        (None, Some(flight)) => Decision::Join(flight.clone(), None),
                        // Shut by a lost flight: the next flight waits for the gate to open.
                        (None, None) => Decision::Start,
                    },
                }
            }
        }
    }

    /// What to do about a 401 to the token `sent`; `named` if the API called it invalid.
    ///
    /// A 401 counts against the token that was sent (law 8), and only as far as the cooldown and the gate allow:
    /// while no other token can be obtained, it changes nothing.
    pub(crate) fn refused(
        &mut self,
        shared: &SharedGate,
        sent: &AccessToken,
        named: bool,
        now: Now,
    ) -> Refusal<F> {
        let is_current = self
            .token
            .as_ref()
            .is_some_and(|token| token.same_text(sent));
        match (self.attachable(now), &self.flight) {
            (Some(token), _) if !is_current && !self.rejected => Refusal::Replay(token),
            (current, Some(record)) => {
                self.rejected |= named && is_current && current.is_some();
                self.invalid |= self.rejected;
                Refusal::Join(record.flight.clone())
            }
            (None, None) if is_current && self.may_pass(shared, now) => Refusal::Refresh,
            (Some(_), None) if self.gate.is_open(shared, now) && self.cooldown.is_over(now) => {
                Refusal::Start
            }
            (_, None) => Refusal::Pass,
        }
    }

    /// Puts a flight on record, as [`Decision::Start`] and [`Decision::UseAndStart`] ask for.
    ///
    /// `make` creates it, given the moment at which it is overdue.
    pub(crate) fn begin(
        &mut self,
        shared: &mut SharedGate,
        make: impl FnOnce(Instant) -> F,
        now: Now,
    ) -> (F, Plan) {
        let mut delay = remaining(self.floor, now);
        let is_exempt = self.is_exempt(shared, now);
        // Also if the gate is open: the flight may shut it.
        self.exempted |= is_exempt;
        if !is_exempt && !self.gate.is_open(shared, now) {
            delay = delay.max(remaining(self.gate.opens(shared), now));
        }
        // Each refresh token is handed out once, whatever comes of it: servers that rotate them treat a second use
        // as theft, and a lost answer cannot be told from a lost request.
        let refresh_token = self.refresh_token.take();
        let refresh_token = refresh_token.filter(|token| lives(token, now));
        if let Some(token) = &refresh_token {
            self.spent = Some(token.clone());
        }
        let refresh_token = refresh_token.map(|(token, _)| token);
        self.record(shared, make, false, delay, refresh_token, now)
    }

    /// Puts a flight on record that a 401 forced, as [`Refusal::Start`] asks for.
    ///
    /// The refresh token is forgotten, since its session may be gone.
    pub(crate) fn begin_forced(
        &mut self,
        shared: &mut SharedGate,
        make: impl FnOnce(Instant) -> F,
        named: bool,
        now: Now,
    ) -> (F, Plan) {
        self.rejected = named && self.attachable(now).is_some();
        self.invalid |= self.rejected;
        self.refresh_token = None;
        self.cooldown.begin(now);
        self.record(shared, make, true, Duration::ZERO, None, now)
    }

    /// Notes that `flight` is about to ask the source.
    pub(crate) fn asks(&mut self, flight: &F) {
        if let Some(record) = self.flight.as_mut() {
            record.waits &= record.flight != *flight;
        }
    }

    /// Takes the response of `flight` and returns the token, if the flight is still on record.
    pub(crate) fn succeeded(
        &mut self,
        shared: &mut SharedGate,
        flight: &F,
        mut response: TokenResponse,
        sent: Now,
        now: Now,
    ) -> Option<AccessToken> {
        self.close(flight, true, now)?;
        self.invalid = false;
        let first = self.floor.is_none();
        let schedule = self.policy.schedule(&response, first, &mut self.rng);
        self.refresh_token = response.refresh_token.take().map(|token| {
            let expiry = token.expires_in.map(|after| sent.after(after));
            (token, expiry)
        });
        // A server that does not rotate refresh tokens returns the one it was sent, or none.
        let again = self.refresh_token.take_if(|(token, _)| {
            let spent = self.spent.as_ref();
            spent.is_some_and(|(spent, _)| spent.same_text(token))
        });
        let replaced = self.refresh_token.is_some();
        self.spent = again.or(self.spent.take().filter(|_| !replaced));
        let id = TokenId::new(self.gate.key(), self.flights);
        let token = AccessToken::new(response, id, self.request.clone(), schedule, sent, now);
        let last = self.token.replace(token.clone());
        if !last.is_some_and(|last| last.same_text(&token)) {
            self.same_text_since = Some(id);
        }
        self.exempted = false;
        self.floor = Some(sent.after(policy::FLOOR));
        self.gate.open(shared, sent);
        self.succeeded = Some(now);
        self.outage = None;
        Some(token)
    }

    /// Takes the failure of `flight`, or its loss if there is no error, and returns for how long the gate is shut, if
    /// the flight is still on record.
    pub(crate) fn failed(
        &mut self,
        shared: &mut SharedGate,
        flight: &F,
        error: Option<&TokenError>,
        now: Now,
    ) -> Option<Duration> {
        let OnRecord { began, waits, .. } = self.close(flight, false, now)?;
        // Nobody was asked: if it shut the gate anew, runtimes that end before it opens would keep it shut for good.
        if error.is_none() && waits && self.outage.is_some() {
            self.gate.lose_probe(shared);
            return Some(remaining(self.gate.opens(shared), now));
        }
        let outage = self.outage.get_or_insert(Outage {
            since: began,
            failures: 0,
            reported: false,
        });
        outage.failures = outage.failures.saturating_add(1);
        let rng = &mut self.rng;
        Some(self.gate.shut(shared, error, rng, began, now))
    }

    /// Takes an overdue flight off the record and returns it, so that its waiters can be woken.
    ///
    /// Every decision does this first. It is the fence of law 6: from here on the flight's result is ignored.
    pub(crate) fn give_up_overdue(&mut self, shared: &mut SharedGate, now: Now) -> Option<F> {
        let record = self.flight.as_ref()?;
        if now.monotonic < record.overdue {
            return None;
        }
        let flight = record.flight.clone();
        self.failed(shared, &flight, None, now);
        Some(flight)
    }

    /// Drops a token that the server has voided: a later token came with a higher `not_before`. The refresh token of
    /// its session goes with it.
    pub(crate) fn apply_not_before(&mut self, not_before: u64) -> Option<AccessToken> {
        let void = self
            .token
            .take_if(|token| token.not_before() < not_before)?;
        self.refresh_token = None;
        self.rejected = false;
        Some(void)
    }

    /// The token, if it may be attached: alive, rejected or not.
    pub(crate) fn attachable(&self, now: Now) -> Option<AccessToken> {
        self.token.clone().filter(|token| token.is_alive(now))
    }

    /// A dead token, if its server lets it be used while the token endpoint fails.
    pub(crate) fn last_resort(&self, shared: &SharedGate, now: Now) -> Option<AccessToken> {
        let is_outage = self
            .gate
            .remembered(shared)
            .is_some_and(TokenError::is_transient);
        let token = self.token.as_ref().filter(|_| is_outage)?;
        token.is_extended(now).then(|| token.clone())
    }

    /// The token that requests may take without asking here while it is fresh.
    pub(crate) fn unrejected(&self) -> Option<&AccessToken> {
        self.token.as_ref().filter(|_| !self.rejected)
    }

    /// The held token, if it has the same text as the one with this id.
    pub(crate) fn token_like(&self, id: TokenId) -> Option<AccessToken> {
        let token = self.token.as_ref()?;
        let has_same_text = |first| id.is_between(first, token.id());
        let has_same_text = self.same_text_since.is_some_and(has_same_text);
        has_same_text.then(|| token.clone())
    }

    /// The errors for callers who cannot wait for a flight: the key's own and the shared one.
    pub(crate) fn remembered(&self, shared: &SharedGate) -> [Option<TokenError>; 2] {
        [
            self.gate.own_remembered().cloned(),
            shared.remembered().cloned(),
        ]
    }

    /// The flights that failed since the last success.
    pub(crate) fn outage(&self) -> Option<Outage> {
        self.outage
    }

    /// The report on a flight that has just failed. Notes that it is reported.
    pub(crate) fn failure_report(&mut self, shared: &SharedGate, now: Now) -> FailureReport {
        let attachable = self.attachable(now).map(|token| token.expiry());
        let extended = || self.last_resort(shared, now)?.extended();
        let usable_for = attachable
            .or_else(extended)
            .map(|until| until.remaining(now));
        let failures = self.outage.as_mut().map_or(0, |outage| {
            outage.reported |= usable_for.is_none();
            outage.failures
        });
        FailureReport {
            failures,
            usable_for,
            invalid: self.invalid,
            retry_in: remaining(self.gate.opens(shared), now),
            shared: self.gate.is_bound(shared),
        }
    }

    /// If a caller fails for the first time since the last success: for how long no flight starts.
    pub(crate) fn begins_to_fail(&mut self, shared: &SharedGate, now: Now) -> Option<Duration> {
        let outage = self.outage.as_mut().filter(|outage| !outage.reported)?;
        outage.reported = true;
        Some(remaining(self.gate.opens(shared), now))
    }

    pub(crate) fn snapshot(&self, shared: &SharedGate, not_before: u64, now: Now) -> Snapshot<F> {
        let token = self.token.clone();
        let token = token.filter(|token| token.not_before() >= not_before);
        let state = match &token {
            None => TokenState::Missing,
            Some(token) if token.is_alive(now) && self.invalid => TokenState::Refused,
            Some(token) if token.is_alive(now) && token.is_due(now) => TokenState::Due,
            Some(token) if token.is_alive(now) => TokenState::Fresh,
            Some(_) if self.last_resort(shared, now).is_some() => TokenState::Extended,
            Some(_) => TokenState::Expired,
        };
        Snapshot {
            state,
            token,
            succeeded: self.succeeded,
            outage: self.outage,
            failures: self.gate.failures(shared),
            error: self.gate.remembered(shared).cloned(),
            opens: self.gate.opens(shared).filter(|opens| !opens.has_come(now)),
            flight: self.flight.as_ref().map(|record| record.flight.clone()),
        }
    }

    /// How many flights there were.
    pub(crate) fn flights(&self) -> u64 {
        self.flights
    }

    /// When to check whether a refresh is due, if there is a token, or was one until the server voided it.
    pub(crate) fn next_due(&self, shared: &SharedGate, not_before: u64) -> Option<Deadline> {
        let token = self.token.as_ref();
        let token = token.filter(|token| token.not_before() >= not_before);
        let voided = self.floor.filter(|_| self.succeeded.is_some());
        let due = token.map(AccessToken::due).or(voided)?;
        let opens = self.gate.opens(shared);
        Some(opens.map_or(due, |opens| opens.latest(due)))
    }

    /// The token, and until when callers get it without starting anything: because a flight is under way, or the gate
    /// holds the next one back.
    ///
    /// What ends this sooner, such as another key's success or new credentials, is noticed within
    /// [`policy::SETTLED_LIMIT`].
    pub(crate) fn settled(&self, shared: &SharedGate, now: Now) -> Option<(AccessToken, Deadline)> {
        let token = self.unrejected().filter(|token| token.is_alive(now))?;
        let limit = now.after(policy::SETTLED_LIMIT);
        let until = match &self.flight {
            Some(record) if record.overdue <= now.monotonic + policy::SETTLED_LIMIT => return None,
            Some(_) => limit,
            None if !token.is_due(now) || self.gate.is_open(shared, now) => return None,
            None => self.gate.opens(shared)?.earliest(limit),
        };
        Some((token.clone(), until.earliest(token.expiry())))
    }

    /// Whether the gate is shut even for a token at its expiry.
    pub(crate) fn is_held_back(&self, shared: &SharedGate, now: Now) -> bool {
        !self.gate.is_lenient(shared, now)
    }

    /// Whether forgetting this loses nothing and causes no earlier token request.
    pub(crate) fn is_idle(&self, shared: &SharedGate, now: Now) -> bool {
        let is_dead = self
            .token
            .as_ref()
            .is_none_or(|token| !token.is_alive(now) && !token.is_extended(now));
        is_dead
            && self.flight.is_none()
            && self.gate.is_open(shared, now)
            && self.cooldown.is_over(now)
            && remaining(self.floor, now).is_zero()
    }

    /// Gives up everything: the flight on record, to be ended, and the tokens, to be revoked.
    pub(crate) fn shut_down(&mut self, now: Now) -> (Option<F>, Revocation) {
        let flight = self.flight.take().map(|record| record.flight);
        let token = self.token.take();
        let spent = self.spent.take();
        let refresh_token = self.refresh_token.take().or(spent);
        let revocation = Revocation {
            refresh_token: refresh_token
                .filter(|token| lives(token, now))
                .map(|(token, _)| token),
            access_token: token.filter(|token| token.is_alive(now)),
        };
        (flight, revocation)
    }

    fn record(
        &mut self,
        shared: &mut SharedGate,
        make: impl FnOnce(Instant) -> F,
        forced: bool,
        delay: Duration,
        refresh_token: Option<RefreshToken>,
        now: Now,
    ) -> (F, Plan) {
        let deadline = now.monotonic + delay + self.policy.flight_limit();
        let overdue = deadline + policy::GRACE;
        let token = self.attachable(now).filter(|_| !forced);
        let in_background =
            token.is_some_and(|token| token.outlives(policy::BACKGROUND_LIFETIME, now));
        let is_first_try = match self.gate.failures(shared) {
            0 => true,
            // A lost flight says nothing about the server. But once more it may be the many attempts that outlast the
            // runtime. And in the background, where they are far apart, they would leave callers to wait.
            1 => self.gate.remembered(shared).is_none() && !in_background,
            _ => false,
        };
        let attempts = if is_first_try {
            self.policy.attempts
        } else {
            1
        };
        self.gate.pass(shared, now, overdue);
        let flight = make(overdue);
        self.flights += 1;
        self.flight = Some(OnRecord {
            flight: flight.clone(),
            overdue,
            began: now.monotonic,
            forced,
            waits: !delay.is_zero(),
        });
        let plan = Plan {
            delay,
            deadline,
            attempts,
            in_background,
            forced,
            failures: self.outage.map_or(0, |outage| outage.failures),
            refresh_token,
            request: self.request.clone(),
            claims: None,
        };
        (flight, plan)
    }

    /// Takes `flight` off the record, if it is there.
    fn close(&mut self, flight: &F, succeeded: bool, now: Now) -> Option<OnRecord<F>> {
        let record = self.flight.take_if(|record| record.flight == *flight)?;
        self.rejected = false;
        if record.forced {
            self.cooldown.end(succeeded, now);
        }
        Some(record)
    }

    /// Whether a flight may start now, without an attachable token.
    fn may_pass(&self, shared: &SharedGate, now: Now) -> bool {
        self.gate.is_open(shared, now) || self.is_exempt(shared, now)
    }

    /// Whether the token is dead and its one flight past a backoff gate is unused.
    fn is_exempt(&self, shared: &SharedGate, now: Now) -> bool {
        let died = self
            .token
            .as_ref()
            .is_some_and(|token| !token.is_alive(now));
        died && !self.exempted && self.gate.is_lenient(shared, now)
    }
}

/// How soon after a forced refresh the next one may follow.
///
/// It grows with each one whose token is refused again. One that fails says nothing about the API.
#[derive(Debug, Default)]
struct Cooldown {
    length: Option<Duration>,
    over: Option<Deadline>,
    /// From here on a further forced refresh is no recurrence.
    calm: Option<Deadline>,
    /// Whether the one under way is a recurrence.
    recurs: bool,
}

impl Cooldown {
    fn is_over(&self, now: Now) -> bool {
        self.over.is_none_or(|over| over.has_come(now))
    }

    fn begin(&mut self, now: Now) {
        self.recurs = self.calm.is_some_and(|calm| !calm.has_come(now));
    }

    fn end(&mut self, succeeded: bool, now: Now) {
        let length = policy::cooldown(self.length.filter(|_| self.recurs && succeeded));
        self.over = Some(now.after(length));
        if succeeded {
            self.length = Some(length);
            self.calm = Some(now.after(length * policy::RECURRENCE));
        }
    }
}

fn lives((_, expiry): &Expiring, now: Now) -> bool {
    expiry.is_none_or(|expiry| !expiry.has_come(now))
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
        shared: SharedGate,
        now: Now,
        flights: u32,
    }

    impl Case {
        fn new() -> Self {
            Self {
                state: State::new(
                    1,
                    TokenRequest::new(),
                    Arc::new(RefreshPolicy::new()),
                    Rng::with_seed(1),
                ),
                shared: SharedGate::default(),
                now: Now::read(),
                flights: 0,
            }
        }

        /// A case with a token of 1,000 s that is neither the first nor due, and its predecessor.
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
            self.state.begin(&mut self.shared, |_| id, self.now)
        }

        fn begin_forced(&mut self, named: bool) -> u32 {
            self.flights += 1;
            let id = self.flights;
            self.state
                .begin_forced(&mut self.shared, |_| id, named, self.now)
                .0
        }

        fn grant(&mut self, text: &str, lifetime: u64) -> AccessToken {
            let (flight, _) = self.begin();
            self.land(flight, text, lifetime).unwrap()
        }

        fn land(&mut self, flight: u32, text: &str, lifetime: u64) -> Option<AccessToken> {
            let response = TokenResponse::new(text)
                .unwrap()
                .expires_in(Duration::from_secs(lifetime));
            self.state
                .succeeded(&mut self.shared, &flight, response, self.now, self.now)
        }

        fn fail(&mut self, flight: u32, error: &TokenError) {
            self.state
                .failed(&mut self.shared, &flight, Some(error), self.now)
                .unwrap();
        }

        /// What a caller does, in a word.
        fn acquire(&self) -> String {
            match self.state.acquire(&self.shared, self.now) {
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

        /// What to do about a 401 to `token`, in a word.
        fn refused(&mut self, token: &AccessToken, named: bool) -> String {
            match self.state.refused(&self.shared, token, named, self.now) {
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

    /// Law 4: a refresh under way makes nobody wait, until the token dies.
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

    /// Law 2: a flight that nobody waits for makes longer pauses.
    #[test]
    fn a_flight_is_in_the_background_unless_a_caller_may_wait() {
        for (passed, in_background) in [
            (800.0, true),
            (985.0, true),
            (987.0, false),
            (1_000.0, false),
        ] {
            let (mut case, _, _) = Case::with_token();
            case.pass(passed);
            let (_, plan) = case.begin();
            assert_eq!(plan.in_background, in_background, "{passed}");
        }
        let (mut case, _, _) = Case::with_token();
        case.flights += 1;
        let make = |_| 9;
        let (_, plan) = case
            .state
            .begin_forced(&mut case.shared, make, true, case.now);
        assert!(!plan.in_background);
    }

    /// Law 2: at hard expiry one flight passes a backoff gate, but neither a Retry-After nor a terminal error.
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

    /// Law 8, and every meaning of an answer that the cache decides.
    #[test]
    fn a_401_counts_against_the_token_that_was_sent() {
        let (mut case, old, new) = Case::with_token();
        assert_eq!(case.refused(&old, true), "replay new");
        assert_eq!(case.refused(&new, true), "start");
        let flight = case.begin_forced(true);
        assert_eq!(case.refused(&new, true), format!("join {flight}"));
        assert_eq!(case.acquire(), format!("join {flight} or use new"));
        // A token that is refused itself is of no use.
        assert_eq!(case.refused(&old, true), format!("join {flight}"));
        let newest = case.land(flight, "newest", 1_000).unwrap();
        assert_eq!(case.refused(&new, true), "replay newest");
        assert_eq!(case.refused(&newest, true), "pass");
        case.pass(5.1);
        assert_eq!(case.refused(&newest, true), "start");
    }

    #[test]
    fn an_id_stands_for_the_text_that_was_sent() {
        let (mut case, old, new) = Case::with_token();
        let mut again = Vec::new();
        for _ in 0..2 {
            case.pass(750.0);
            again.push(case.grant("new", 1_000));
        }
        for token in [&new, &again[0], &again[1]] {
            let held = case.state.token_like(token.id()).unwrap();
            assert_eq!(held.id(), again[1].id());
        }
        assert!(case.state.token_like(old.id()).is_none());
        // From before the flight numbers started over.
        let oldest = TokenId::new(1, u64::MAX);
        assert!(case.state.token_like(oldest).is_none());
        case.pass(750.0);
        case.grant("newest", 1_000);
        assert!(case.state.token_like(again[1].id()).is_none());
    }

    /// The flight number in an id starts over, and no 401 is lost by that.
    #[test]
    fn an_id_stands_for_its_text_past_the_last_number() {
        let mut case = Case::new();
        case.state.flights = (1 << 24) - 4;
        let old = case.grant("old", 1_000);
        let mut alike = Vec::new();
        for _ in 0..4 {
            case.pass(750.0);
            alike.push(case.grant("newer", 1_000));
            for token in &alike {
                assert!(case.state.token_like(token.id()).is_some());
            }
        }
        assert!(case.state.token_like(old.id()).is_none());
        case.pass(750.0);
        let newest = case.grant("newest", 1_000);
        for token in &alike {
            assert!(case.state.token_like(token.id()).is_none());
        }
        assert!(case.state.token_like(newest.id()).is_some());
    }

    /// Law 8: without a token to replay with, a late 401 costs nothing either.
    #[test]
    fn a_401_about_a_token_that_is_neither_held_nor_was_last_is_passed_on() {
        let (mut case, old, new) = Case::with_token();
        case.pass(990.5);
        assert_eq!(case.refused(&old, true), "pass");
        // The last token's death explains its 401: no force and no cooldown.
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

    /// Law 7: a token revoked while the endpoint is down is replaced as soon as any other.
    #[test]
    fn forced_refreshes_that_fail_lengthen_no_cooldown() {
        let (mut case, _, token) = Case::with_token();
        for _ in 0..20 {
            assert_eq!(case.refused(&token, true), "start");
            let flight = case.begin_forced(true);
            case.fail(flight, &down());
            case.pass(4.99);
            assert_eq!(case.refused(&token, true), "pass");
            case.pass(5.01);
        }
    }

    /// Laws 1 and 6: the result of a flight that was given up is ignored.
    #[test]
    fn an_overdue_flight_is_given_up_and_fenced() {
        let mut case = Case::new();
        let (flight, plan) = case.begin();
        case.now.monotonic = plan.deadline;
        assert_eq!(case.state.give_up_overdue(&mut case.shared, case.now), None);
        case.pass(0.5);
        assert_eq!(
            case.state.give_up_overdue(&mut case.shared, case.now),
            Some(flight)
        );
        // There is no error from the server, so callers wait for the gate and the next flight.
        assert_eq!(case.acquire(), "start");
        let (next, plan) = case.begin();
        assert!(plan.delay >= Duration::from_millis(250));
        assert!(case.land(flight, "late", 300).is_none());
        assert!(
            case.state
                .failed(&mut case.shared, &flight, None, case.now)
                .is_none()
        );
        assert_eq!(case.acquire(), format!("join {next}"));
    }

    /// The server's last error stands: a flight lost afterwards does not replace it.
    #[test]
    fn a_lost_flight_takes_back_no_error() {
        let mut case = Case::new();
        let (flight, _) = case.begin();
        case.fail(flight, &down());
        case.pass(0.6);
        let (flight, _) = case.begin();
        let lost = case.state.failed(&mut case.shared, &flight, None, case.now);
        assert!(lost.is_some());
        assert_eq!(case.acquire(), "fail");
    }

    /// It says nothing about the server: a caller should not fail by the next hiccup.
    #[test]
    fn after_a_lost_flight_one_that_callers_wait_for_has_all_its_attempts() {
        let lose = |case: &mut Case, flight| {
            let lost = case.state.failed(&mut case.shared, &flight, None, case.now);
            assert!(lost.is_some());
        };
        let mut case = Case::new();
        let (flight, _) = case.begin();
        lose(&mut case, flight);
        case.pass(0.5);
        let (flight, plan) = case.begin();
        assert_eq!(plan.attempts, 3);
        // It may be the many attempts that outlast each runtime.
        lose(&mut case, flight);
        case.pass(1.0);
        let (flight, plan) = case.begin();
        assert_eq!(plan.attempts, 1);
        case.fail(flight, &down());
        case.pass(10.0);
        let (flight, plan) = case.begin();
        assert_eq!(plan.attempts, 1);
        lose(&mut case, flight);
        let (_, plan) = case.begin();
        assert_eq!(plan.attempts, 1);

        let (mut case, _, _) = Case::with_token();
        case.pass(800.0);
        let (flight, _) = case.begin();
        lose(&mut case, flight);
        let (_, plan) = case.begin();
        assert_eq!((plan.in_background, plan.attempts), (true, 1));
    }

    /// Law 2: it is for a gate that was shut before the token died, not for one that the first flight after it shuts.
    #[test]
    fn a_dead_tokens_exemption_is_used_up_by_the_first_flight_after_it() {
        let (mut case, _, _) = Case::with_token();
        case.pass(991.0);
        assert_eq!(case.acquire(), "start");
        let (flight, plan) = case.begin();
        assert_eq!(plan.delay, Duration::ZERO);
        case.fail(flight, &down());
        assert_eq!(case.acquire(), "fail");
        case.pass(0.51);
        assert_eq!(case.acquire(), "start");
    }

    /// Law 7: otherwise runtimes that end, or stand still, before the gate opens would keep the server from ever being
    /// asked.
    #[test]
    fn a_flight_lost_before_it_asked_shuts_no_gate() {
        let lose = |case: &mut Case, flight| {
            let lost = case.state.failed(&mut case.shared, &flight, None, case.now);
            lost.unwrap()
        };
        let long = Duration::from_secs(5);
        let mut case = Case::new();
        for _ in 0..9 {
            let (flight, plan) = case.begin();
            case.now.monotonic += plan.delay;
            case.state.asks(&flight);
            lose(&mut case, flight);
        }
        let (flight, plan) = case.begin();
        assert!(plan.delay >= long, "{plan:?}");
        case.pass(1.0);
        let left = lose(&mut case, flight);
        assert_eq!(left, plan.delay - Duration::from_secs(1));
        assert_eq!(case.state.outage().unwrap().failures, 9);

        let (flight, plan) = case.begin();
        assert_eq!(plan.delay, left);
        case.pass(3_600.0);
        let overdue = case.state.give_up_overdue(&mut case.shared, case.now);
        assert_eq!(overdue, Some(flight));
        let (flight, plan) = case.begin();
        assert_eq!(plan.delay, Duration::ZERO);
        assert!(lose(&mut case, flight) >= long);
    }

    /// Law 7: a token dies by either clock, and a gate opens by either.
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
        // The same after a suspension: the wait is over.
        let mut case = Case::new();
        let (flight, _) = case.begin();
        case.fail(
            flight,
            &TokenError::transient("busy").with_retry_after(hour),
        );
        case.now.wall += Duration::from_secs(299);
        assert_eq!(case.acquire(), "fail");
        case.now.wall += hour;
        assert_eq!(case.acquire(), "start");
    }

    fn hinted(text: &str) -> TokenResponse {
        TokenResponse::new(text)
            .unwrap()
            .expires_in(Duration::from_secs(1_000))
            .ext_expires_in(Duration::from_secs(5_000))
    }

    /// A dead token stays in use while the endpoint fails, if user and server allow it, and nobody waits.
    #[test]
    fn an_extended_token_is_used_in_an_outage_only() {
        for (allowed, error, expected) in [
            (true, down(), "use token"),
            (false, down(), "fail"),
            (true, TokenError::terminal("refused"), "fail"),
        ] {
            let mut case = Case::new();
            case.state.policy = Arc::new(RefreshPolicy::new().extended_lifetime(allowed));
            let (flight, _) = case.begin();
            let now = case.now;
            let landed = case
                .state
                .succeeded(&mut case.shared, &flight, hinted("token"), now, now);
            assert!(landed.is_some());
            case.pass(1_500.0);
            // The endpoint has not failed: the token is dead.
            assert_eq!(case.acquire(), "start");
            let (flight, _) = case.begin();
            assert_eq!(case.acquire(), format!("join {flight}"));
            case.fail(flight, &error);
            case.state.exempted = true;
            assert_eq!(case.acquire(), expected, "{error}");
            if expected != "fail" {
                case.pass(0.6);
                assert_eq!(case.acquire(), "use token and start");
                let (flight, _) = case.begin();
                assert_eq!(case.acquire(), "use token");
                // Until its extended life is over.
                case.fail(flight, &error);
                case.pass(3_500.0);
                assert_eq!(case.acquire(), "start");
            }
        }
    }

    /// Keycloak: raising `not-before-policy` voids all earlier tokens.
    #[test]
    fn raising_not_before_drops_a_token_and_its_refresh_token() {
        let mut case = Case::new();
        let (flight, _) = case.begin();
        let response = hinted("old")
            .not_before_policy(7)
            .refresh_token(RefreshToken::new("refresh"));
        let now = case.now;
        case.state
            .succeeded(&mut case.shared, &flight, response, now, now)
            .unwrap();
        assert!(case.state.apply_not_before(7).is_none());
        // A server that was rolled back, or a replica that is behind.
        assert!(case.state.apply_not_before(0).is_none());
        assert_eq!(case.acquire(), "use old");
        assert!(case.state.apply_not_before(8).is_some());
        assert_eq!(case.acquire(), "start");
        let (_, plan) = case.begin();
        assert!(plan.refresh_token.is_none());
        // Law 2: the floor holds.
        assert_eq!(plan.delay, policy::FLOOR);
    }

    /// Law 6: a token is not settled past the moment at which its flight is to be given up.
    #[test]
    fn a_due_token_is_settled_until_its_flight_is_about_to_be_overdue() {
        let (mut case, _, _) = Case::with_token();
        case.pass(900.0);
        let settled = |case: &Case| case.state.settled(&case.shared, case.now).is_some();
        assert!(!settled(&case));
        let (_, plan) = case.begin();
        assert!(settled(&case));
        let overdue = plan.deadline + policy::GRACE;
        case.now.monotonic = overdue - policy::SETTLED_LIMIT - Duration::from_millis(1);
        assert!(settled(&case));
        case.now.monotonic = overdue - policy::SETTLED_LIMIT;
        assert!(!settled(&case));
    }

    #[test]
    fn only_what_has_nothing_to_lose_is_idle() {
        let mut case = Case::new();
        let idle = |case: &Case| case.state.is_idle(&case.shared, case.now);
        assert!(idle(&case));
        let (flight, _) = case.begin();
        assert!(!idle(&case), "a flight");
        case.land(flight, "token", 1).unwrap();
        assert!(!idle(&case), "a live token");
        case.pass(0.95);
        assert!(!idle(&case), "the floor");
        case.pass(0.1);
        assert!(idle(&case));
        let (flight, _) = case.begin();
        case.fail(flight, &down());
        assert!(!idle(&case), "a shut gate");
        case.pass(1.0);
        assert!(idle(&case));
    }

    #[test]
    fn shutdown_returns_the_live_tokens() {
        let mut case = Case::new();
        let (flight, _) = case.begin();
        let response = hinted("token").refresh_token(RefreshToken::new("refresh"));
        let now = case.now;
        case.state
            .succeeded(&mut case.shared, &flight, response, now, now)
            .unwrap();
        case.pass(800.0);
        let flight = case.begin_forced(false);
        let (ended, revocation) = case.state.shut_down(case.now);
        assert_eq!(ended, Some(flight));
        assert_eq!(revocation.access_token.unwrap().expose_secret(), "token");
        // Forgotten when its access token was refused.
        assert!(revocation.refresh_token.is_none());
        assert!(case.land(flight, "late", 300).is_none());
        assert_eq!(case.acquire(), "start");
    }

    /// RFC 6749 section 6: a refresh token stays valid until another replaces it, and so does its session.
    #[test]
    fn a_refresh_token_that_was_sent_and_not_replaced_is_left_to_be_revoked() {
        let hour = Duration::from_secs(3_600);
        let refresh = |text: &str| Some(RefreshToken::new(text).expires_in(hour));
        let grant = |case: &mut Case, refresh_token| {
            let (flight, _) = case.begin();
            let mut response = hinted("token");
            response.refresh_token = refresh_token;
            let (shared, now) = (&mut case.shared, case.now);
            case.state
                .succeeded(shared, &flight, response, now, now)
                .unwrap();
        };
        let revoked = |mut case: Case| {
            let (_, revocation) = case.state.shut_down(case.now);
            let left = revocation.refresh_token;
            left.map(|token| token.expose_secret().to_owned())
        };
        // It is kept while the answer is pending, and if none comes.
        for fails in [false, true] {
            let mut case = Case::new();
            grant(&mut case, refresh("first"));
            case.pass(750.0);
            let (flight, _) = case.begin();
            if fails {
                case.fail(flight, &down());
            }
            assert_eq!(revoked(case).as_deref(), Some("first"));
        }
        for (answered, later, expected) in [
            (None, 0.0, Some("first")),
            (None, 3_000.0, None),
            // Returned by the server, it lives on.
            (refresh("first"), 3_000.0, Some("first")),
            (refresh("second"), 3_000.0, Some("second")),
        ] {
            let mut case = Case::new();
            grant(&mut case, refresh("first"));
            case.pass(750.0);
            grant(&mut case, answered);
            case.pass(later);
            assert_eq!(revoked(case).as_deref(), expected);
        }
        // A replaced one is gone, whatever became of its replacement.
        let mut case = Case::new();
        grant(&mut case, refresh("first"));
        case.pass(750.0);
        let second = RefreshToken::new("second").expires_in(Duration::from_secs(100));
        grant(&mut case, Some(second));
        case.pass(750.0);
        grant(&mut case, None);
        assert_eq!(revoked(case), None);
    }

    #[test]
    fn a_refresh_token_is_handed_out_once_in_time_and_never_by_force() {
        let grant = |case: &mut Case, refresh_token: RefreshToken| {
            let (flight, _) = case.begin();
            let response = TokenResponse::new("token").unwrap();
            let response = response.refresh_token(refresh_token);
            let now = case.now;
            case.state
                .succeeded(&mut case.shared, &flight, response, now, now)
                .unwrap();
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
        // The server returns the one it was sent.
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
