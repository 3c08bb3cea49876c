//! Gates hold back flights after failures, for one key and for all keys of a source.
//!
//! Each failure shuts its key's gate. A failure of the endpoint or the client (no connection, `429`, `Retry-After`,
//! `invalid_client`) also shuts the [`SharedGate`], and no key's flights start while that is shut. A failure of what
//! was asked for (`invalid_scope`) does not, so that a refused key holds back no other. The rest (a timeout, a `500`)
//! is ambiguous. Once two keys have had an ambiguous failure, with no success in between, such a failure shuts the
//! shared gate too, but only for keys that have failed: a key that has not may try.
//!
//! When the shared gate opens, one key probes, and the keys bound by the gate wait for its result. If the probe's
//! failure is ambiguous, the gate from then on binds only keys that have failed. And since broken keys in high demand
//! would win the probe every time, one key that has waited long bypasses the gate every 5 s; so it does if a probe is
//! lost with its runtime, once the gate is open.

use std::time::Duration;

use fastrand::Rng;
use http::StatusCode;
use tokio::time::Instant;

use crate::{
    error::TokenError,
    policy,
    time::{Deadline, Now},
    token::KeyId,
};

/// How many flights failed in a row, and when the next may start.
///
/// A success opens it; a 401 never does.
#[derive(Debug, Default)]
struct Gate {
    failures: u32,
    terminal: u32,
    opens: Option<Deadline>,
    /// Until then, the gate is shut even for a token at hard expiry.
    strict: Option<Deadline>,
    /// The error for callers who cannot wait for a flight.
    remembered: Option<TokenError>,
}

impl Gate {
    fn is_open(&self, now: Now) -> bool {
        self.opens.is_none_or(|opens| opens.has_come(now))
    }

    fn is_lenient(&self, now: Now) -> bool {
        self.strict.is_none_or(|strict| strict.has_come(now))
    }

    fn shut(&mut self, error: Option<&TokenError>, rng: &mut Rng, now: Now) -> Duration {
        self.failures = self.failures.saturating_add(1);
        self.terminal = match error.is_none_or(TokenError::is_transient) {
            true => 0,
            false => self.terminal.saturating_add(1),
        };
        let times = policy::gate_times(self.failures, self.terminal, error, rng);
        self.opens = Some(now.after(times.opens_after));
        self.strict = Some(now.after(times.strict_until));
        // A lost flight says nothing about the server: the next callers wait for a new one.
        if let Some(error) = error {
            self.remembered = Some(error.clone());
        }
        times.opens_after
    }
}

/// The gate of an authorization server, for one client.
#[derive(Debug, Default)]
pub(crate) struct SharedGate {
    gate: Gate,
    /// Whether it also binds keys that have not failed themselves.
    certain: bool,
    /// When it was shut: a success requested before that does not open it.
    shut_at: Option<Instant>,
    /// The key that had the last ambiguous failure.
    suspect: Option<KeyId>,
    /// The key that probes whether the endpoint has recovered, and until when others wait for it.
    probe: Option<(KeyId, Instant)>,
    /// Whether a probe was lost since it was shut, so that nobody knows.
    lost_probe: bool,
    /// How often a refused client got new credentials.
    renewals: u64,
    /// How often since the last success, and when the next renewal may be.
    vain_renewals: u32,
    renewable: Option<Deadline>,
    /// When the next starved key may bypass the gate.
    next_bypass: Option<Deadline>,
}

impl SharedGate {
    fn is_open(&self, key: KeyId, now: Now) -> bool {
        let waits = |(other, until)| other != key && now.monotonic < until;
        self.gate.is_open(now) && !self.probe.is_some_and(waits)
    }

    /// Whether a refusal of the client holds all keys back, which new credentials would end.
    pub(crate) fn is_renewable(&self, now: Now) -> bool {
        let may_be = self
            .renewable
            .is_none_or(|renewable| renewable.has_come(now));
        may_be && self.gate.terminal > 0 && !self.gate.is_open(now)
    }

    /// Opens the gates that a refusal of the client has shut, since its credentials are new.
    ///
    /// A source that claims this repeatedly while the server keeps refusing gets fewer and fewer tries (law 2).
    ///
    /// Returns the forgotten error, to be dropped outside the lock.
    pub(crate) fn renew(&mut self, now: Now) -> Option<TokenError> {
        if !self.is_renewable(now) {
            return None;
        }
        let vain = self.vain_renewals.saturating_add(1);
        let forgotten = self.gate.remembered.take();
        self.forget();
        self.renewals += 1;
        self.vain_renewals = vain;
        self.renewable = Some(now.after(policy::renewal_pause(vain)));
        forgotten
    }

    pub(crate) fn remembered(&self) -> Option<&TokenError> {
        self.gate.remembered.as_ref()
    }

    /// Takes a failure that concerns, or may concern, all keys, of a flight that `began` at this time.
    fn shut(&mut self, error: Option<&TokenError>, rng: &mut Rng, began: Instant, now: Now) {
        let is_certain = Fault::of(error) != Fault::Either;
        let is_open = self.gate.is_open(now);
        // A thousand concurrent flights are one failure of the endpoint.
        let is_known = !is_open && self.shut_at.is_some_and(|shut| began < shut);
        let asks_for_more =
            error.is_some_and(|error| !error.is_transient() || error.retry_after().is_some());
        if is_known && !asks_for_more {
            return;
        }
        let before = (self.gate.opens, self.gate.strict, self.gate.terminal);
        if is_known {
            self.gate.failures -= 1;
            self.gate.terminal = self.gate.terminal.saturating_sub(1);
        }
        self.gate.shut(error, rng, now);
        if !is_open {
            // A failure shortens no earlier wait.
            self.gate.opens = later(before.0, self.gate.opens);
            self.gate.strict = later(before.1, self.gate.strict);
            if is_known {
                self.gate.terminal = self.gate.terminal.max(before.2);
            }
        }
        self.certain = is_certain || (self.certain && !is_open);
        self.lost_probe = false;
        self.shut_at = Some(now.monotonic);
    }

    /// Whether an answer to a request sent at this time counts against what shut the gate.
    fn is_answered(&self, asked: Instant) -> bool {
        self.shut_at.is_none_or(|shut| shut <= asked)
    }

    fn forget(&mut self) {
        *self = Self {
            renewals: self.renewals,
            ..Self::default()
        };
    }
}

/// The gates that a key's flights have to pass: its own and the shared one.
#[derive(Debug)]
pub(crate) struct OwnGate {
    key: KeyId,
    gate: Gate,
    /// The count of renewals when the client was refused, if that shut the gate.
    refused: Option<u64>,
    /// From here on the key has waited long.
    starved_from: Option<Deadline>,
}

impl OwnGate {
    pub(crate) fn new(key: KeyId) -> Self {
        Self {
            key,
            gate: Gate::default(),
            refused: None,
            starved_from: None,
        }
    }

    pub(crate) fn key(&self) -> KeyId {
        self.key
    }

    pub(crate) fn is_open(&self, shared: &SharedGate, now: Now) -> bool {
        let own = self.gate.is_open(now) || self.is_renewed(shared);
        let opens =
            |shared: &SharedGate| shared.is_open(self.key, now) || self.may_bypass(shared, now);
        own && self.binding(shared).is_none_or(opens)
    }

    /// Whether this key may bypass the shared gate, which other keys' faults may have shut.
    fn may_bypass(&self, shared: &SharedGate, now: Now) -> bool {
        let has_come = |moment: Option<Deadline>| moment.is_none_or(|moment| moment.has_come(now));
        let may_any = !shared.certain || (shared.lost_probe && shared.gate.is_open(now));
        may_any && has_come(self.starved_from) && has_come(shared.next_bypass)
    }

    /// Whether a token at hard expiry may pass even a shut gate.
    pub(crate) fn is_lenient(&self, shared: &SharedGate, now: Now) -> bool {
        let own = self.gate.is_lenient(now) || self.is_renewed(shared);
        own && self
            .binding(shared)
            .is_none_or(|shared| shared.gate.is_lenient(now))
    }

    /// Whether the shared gate holds this key back.
    pub(crate) fn is_bound(&self, shared: &SharedGate) -> bool {
        self.binding(shared).is_some()
    }

    pub(crate) fn failures(&self, shared: &SharedGate) -> u32 {
        let shared = self.binding(shared).map(|shared| shared.gate.failures);
        self.gate.failures.max(shared.unwrap_or_default())
    }

    /// The error for callers who cannot wait for a flight.
    pub(crate) fn remembered<'a>(&'a self, shared: &'a SharedGate) -> Option<&'a TokenError> {
        let shared = self.binding(shared).and_then(SharedGate::remembered);
        shared.or_else(|| self.own_remembered())
    }

    pub(crate) fn own_remembered(&self) -> Option<&TokenError> {
        self.gate.remembered.as_ref()
    }

    /// When both gates are open.
    pub(crate) fn opens(&self, shared: &SharedGate) -> Option<Deadline> {
        let own = self.gate.opens.filter(|_| !self.is_renewed(shared));
        let shared = self.binding(shared).and_then(|shared| shared.gate.opens);
        later(own, shared)
    }

    /// Notes that a flight starts, to be over at `until`.
    pub(crate) fn pass(&self, shared: &mut SharedGate, now: Now, until: Instant) {
        // A key that is not bound takes no turn from those that are.
        if !self.is_bound(shared) {
            return;
        }
        if !shared.is_open(self.key, now) {
            shared.next_bypass = Some(now.after(BYPASS_INTERVAL));
        }
        let probed = shared.probe.is_some_and(|(_, until)| now.monotonic < until);
        if !probed {
            shared.probe = Some((self.key, until));
        }
    }

    /// Opens the gates after a success requested at `sent`.
    pub(crate) fn open(&mut self, shared: &mut SharedGate, sent: Now) {
        *self = Self::new(self.key);
        self.end_probe(shared);
        if shared.is_answered(sent.monotonic) {
            shared.forget();
        }
    }

    /// Shuts the gates that `error` concerns, or the key's own for a lost flight, and returns for how long the key's
    /// own is shut. The flight `began` when it was put on record.
    pub(crate) fn shut(
        &mut self,
        shared: &mut SharedGate,
        error: Option<&TokenError>,
        rng: &mut Rng,
        began: Instant,
        now: Now,
    ) -> Duration {
        let was_probe = match error {
            Some(_) => self.end_probe(shared),
            None => self.lose_probe(shared),
        };
        let fault = Fault::of(error);
        let is_shared = match fault {
            Fault::Endpoint | Fault::Client => true,
            Fault::Either => {
                let before = shared.suspect.replace(self.key);
                shared.gate.failures > 0 || before.is_some_and(|key| key != self.key)
            }
            Fault::Key => false,
            Fault::Request => {
                // The endpoint answered, and knows the client.
                if was_probe && shared.is_answered(began) {
                    shared.forget();
                }
                false
            }
        };
        if is_shared {
            // With the same random sample, so that both open at the same time for a single key.
            shared.shut(error, &mut rng.clone(), began, now);
        }
        self.refused = (fault == Fault::Client).then_some(shared.renewals);
        let own_for = self.gate.shut(error, rng, now);
        self.starved_from = Some(now.after(own_for + STARVED_AFTER));
        own_for
    }

    /// The shared gate, if it holds this key back.
    fn binding<'a>(&self, shared: &'a SharedGate) -> Option<&'a SharedGate> {
        let binds = shared.gate.failures > 0 && (shared.certain || self.gate.failures > 0);
        binds.then_some(shared)
    }

    /// Whether the client was refused with credentials that it no longer uses.
    fn is_renewed(&self, shared: &SharedGate) -> bool {
        self.refused
            .is_some_and(|renewals| renewals != shared.renewals)
    }

    /// Ends the probe without a result, if this key's flight was it.
    pub(crate) fn lose_probe(&self, shared: &mut SharedGate) -> bool {
        let was_probe = self.end_probe(shared);
        shared.lost_probe |= was_probe;
        was_probe
    }

    /// Ends the probe, if this key's flight was it.
    fn end_probe(&self, shared: &mut SharedGate) -> bool {
        shared.probe.take_if(|(key, _)| *key == self.key).is_some()
    }
}

fn later(a: Option<Deadline>, b: Option<Deadline>) -> Option<Deadline> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.latest(b)),
        (a, b) => a.or(b),
    }
}

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Endpoint,
    /// The client's, whose credentials all keys share.
    Client,
    /// The endpoint's or the key's.
    Either,
    /// The key's alone, for whatever reason.
    Key,
    /// That of what the key asks for, as the server says.
    Request,
}

impl Fault {
    fn of(error: Option<&TokenError>) -> Self {
        let Some(error) = error else {
            return Self::Key;
        };
        let is_busy =
            error.retry_after().is_some() || error.status() == Some(StatusCode::TOO_MANY_REQUESTS);
        match error.oauth_error() {
            _ if error.is_transport() || is_busy => Self::Endpoint,
            _ if error.is_interrupted() => Self::Key,
            _ if error.is_transient() => Self::Either,
            _ if error.is_of_client() => Self::Client,
            Some(_) => Self::Request,
            None => Self::Key,
        }
    }
}

/// How long a key waits for others after its own gate has opened: as long as a backoff shuts that at most.
const STARVED_AFTER: Duration = Duration::from_secs(10);

/// How often a starved key may bypass: rarely enough to add little load on an endpoint that is down.
const BYPASS_INTERVAL: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    /// Some keys of one source, and a clock.
    struct Case {
        shared: SharedGate,
        keys: Vec<OwnGate>,
        now: Now,
    }

    impl Case {
        fn new() -> Self {
            Self {
                shared: SharedGate::default(),
                keys: (0..3).map(OwnGate::new).collect(),
                now: Now::read(),
            }
        }

        fn pass(&mut self, seconds: u64) {
            self.now.monotonic += Duration::from_secs(seconds);
            self.now.wall += Duration::from_secs(seconds);
        }

        fn fail(&mut self, key: usize, error: &TokenError) {
            self.fail_after(key, error, self.now.monotonic);
        }

        /// A flight fails that began at this time.
        fn fail_after(&mut self, key: usize, error: &TokenError, began: Instant) {
            let rng = &mut Rng::with_seed(7);
            let (shared, now) = (&mut self.shared, self.now);
            self.keys[key].shut(shared, Some(error), rng, began, now);
        }

        fn start(&mut self, key: usize) {
            let until = self.now.monotonic + Duration::from_secs(30);
            self.keys[key].pass(&mut self.shared, self.now, until);
        }

        fn succeed(&mut self, key: usize, sent: Now) {
            self.keys[key].open(&mut self.shared, sent);
        }

        /// Which keys' flights may start.
        fn open(&self) -> [bool; 3] {
            [0, 1, 2].map(|key: usize| self.keys[key].is_open(&self.shared, self.now))
        }
    }

    fn rejected(code: &str) -> TokenError {
        TokenError::new(Kind::Rejected { transient: false }).with_oauth_error(code)
    }

    #[test]
    fn a_failure_of_the_endpoint_or_client_binds_all_keys() {
        let too_many =
            TokenError::new(Kind::Unavailable).with_status(StatusCode::TOO_MANY_REQUESTS);
        let retry_after = TokenError::transient("busy").with_retry_after(Duration::from_secs(9));
        for error in [
            TokenError::new(Kind::Transport),
            too_many,
            retry_after,
            rejected("invalid_client"),
            rejected("unauthorized_client"),
            rejected("access_denied").with_status(StatusCode::UNAUTHORIZED),
            TokenError::new(Kind::Credentials),
        ] {
            let mut case = Case::new();
            case.fail(0, &error);
            assert_eq!(case.open(), [false; 3], "{error}");
        }
    }

    #[test]
    fn a_failure_of_the_request_binds_its_key_alone() {
        for error in [
            rejected("invalid_scope"),
            rejected("invalid_target"),
            rejected("access_denied").with_status(StatusCode::FORBIDDEN),
            TokenError::terminal("refused"),
            TokenError::new(Kind::Panicked),
        ] {
            let mut case = Case::new();
            case.fail(0, &error);
            case.fail(1, &error);
            assert_eq!(case.open(), [false, false, true], "{error}");
        }
    }

    #[test]
    fn two_failing_keys_shut_the_shared_gate_for_themselves() {
        let timeout = TokenError::new(Kind::Timeout);
        let mut case = Case::new();
        case.fail(0, &timeout);
        case.fail(0, &timeout);
        assert_eq!(case.shared.gate.failures, 0);
        case.fail(1, &timeout);
        assert_eq!(case.shared.gate.failures, 1);
        assert_eq!(case.open(), [false, false, true]);
        // The first key's own gate has opened, and the shared one has not.
        let busy = TokenError::new(Kind::Unavailable);
        for _ in 0..6 {
            case.fail(1, &busy);
        }
        case.pass(2);
        assert!(case.keys[0].gate.is_open(case.now));
        assert_eq!(case.open(), [false, false, true]);
    }

    /// A parked runtime loses the flights of all keys without any word from the server.
    #[test]
    fn lost_flights_do_not_shut_the_shared_gate() {
        let mut case = Case::new();
        for key in 0..2 {
            let (shared, now) = (&mut case.shared, case.now);
            let rng = &mut Rng::with_seed(7);
            case.keys[key].shut(shared, None, rng, now.monotonic, now);
        }
        assert_eq!(case.shared.gate.failures, 0);
        // Nor does one count as the first of two failures.
        case.fail(2, &TokenError::new(Kind::Timeout));
        assert_eq!(case.shared.gate.failures, 0);
    }

    #[test]
    fn a_success_between_them_clears_the_endpoint() {
        let timeout = TokenError::new(Kind::Timeout);
        let mut case = Case::new();
        case.fail(0, &timeout);
        case.succeed(2, case.now);
        case.fail(1, &timeout);
        assert_eq!(case.shared.gate.failures, 0);
    }

    #[test]
    fn one_key_goes_first_when_a_shared_gate_opens() {
        let mut case = Case::new();
        case.fail(0, &TokenError::new(Kind::Transport));
        case.pass(1);
        assert_eq!(case.open(), [true; 3]);
        case.start(2);
        assert_eq!(case.open(), [false, false, true]);
        // The probe succeeds, fails, or takes so long that the others stop waiting.
        case.pass(31);
        assert_eq!(case.open(), [true; 3]);
        case.start(1);
        case.fail(1, &TokenError::new(Kind::Transport));
        assert_eq!(case.open(), [false; 3]);
        case.pass(2);
        case.start(1);
        case.succeed(1, case.now);
        assert_eq!(case.open(), [true; 3]);
        assert_eq!(case.keys[2].failures(&case.shared), 0);
    }

    #[test]
    fn a_refusal_of_the_request_shows_that_the_endpoint_is_well() {
        let mut case = Case::new();
        case.fail(0, &TokenError::new(Kind::Transport));
        case.pass(1);
        case.start(1);
        case.fail(1, &rejected("invalid_scope"));
        assert_eq!(case.open(), [true, false, true]);
        assert_eq!(case.keys[2].failures(&case.shared), 0);
    }

    #[test]
    fn a_success_requested_before_the_failure_opens_nothing() {
        let mut case = Case::new();
        let sent = case.now;
        case.pass(1);
        let error = TokenError::transient("busy").with_retry_after(Duration::from_secs(60));
        case.fail(0, &error);
        case.succeed(1, sent);
        assert_eq!(case.open(), [false; 3]);
    }

    #[test]
    fn concurrent_failures_count_once() {
        let rng = &mut Rng::with_seed(7);
        let mut case = Case::new();
        let began = case.now.monotonic;
        case.pass(1);
        let error = TokenError::new(Kind::Transport);
        for key in &mut case.keys {
            key.shut(&mut case.shared, Some(&error), rng, began, case.now);
        }
        assert_eq!(case.shared.gate.failures, 1);
        // Its Retry-After still counts.
        let error = error.with_retry_after(Duration::from_secs(60));
        let key = &mut case.keys[1];
        key.shut(&mut case.shared, Some(&error), rng, began, case.now);
        case.pass(59);
        assert_eq!(case.open(), [false; 3]);
    }

    #[test]
    fn concurrent_refusals_of_the_client_count_once() {
        let mut case = Case::new();
        let began = case.now.monotonic;
        case.pass(1);
        for key in 0..3 {
            case.fail_after(key, &rejected("invalid_client"), began);
        }
        assert_eq!(
            (case.shared.gate.failures, case.shared.gate.terminal),
            (1, 1)
        );
        // A later refusal counts.
        case.pass(6);
        case.fail(0, &rejected("invalid_client"));
        assert_eq!(
            (case.shared.gate.failures, case.shared.gate.terminal),
            (2, 2)
        );
    }

    #[test]
    fn nothing_shortens_a_retry_after() {
        let busy =
            |seconds| TokenError::transient("busy").with_retry_after(Duration::from_secs(seconds));
        for (other, refused) in [
            (busy(2), false),
            (rejected("invalid_client"), true),
            (TokenError::new(Kind::Transport), false),
        ] {
            for in_the_air in [true, false] {
                let mut case = Case::new();
                let before = case.now.monotonic;
                case.pass(1);
                case.fail(0, &busy(60));
                let began = if in_the_air {
                    before
                } else {
                    case.now.monotonic
                };
                case.fail_after(1, &other, began);
                case.pass(59);
                assert_eq!(case.open(), [false; 3], "{other}");
                assert_eq!(case.shared.is_renewable(case.now), refused);
            }
        }
        // Nor does one hide that the client is refused.
        let mut case = Case::new();
        let began = case.now.monotonic;
        case.pass(1);
        case.fail(0, &rejected("invalid_client"));
        case.fail_after(1, &busy(60), began);
        assert!(case.shared.is_renewable(case.now));
    }

    /// Broken keys in constant demand win the probe whenever a gate opens.
    #[test]
    fn broken_keys_that_win_every_probe_starve_no_other() {
        let down = TokenError::new(Kind::Transport);
        let broken = TokenError::new(Kind::Timeout);
        let mut case = Case::new();
        for key in 0..3 {
            case.fail(key, &down);
        }
        case.pass(12);
        assert_eq!(case.open(), [true; 3]);
        for round in 0.. {
            case.start(round % 2);
            case.pass(10);
            assert!(case.keys[2].gate.is_open(case.now));
            if case.open()[2] {
                // Not all at once.
                case.start(2);
                assert!(!case.open()[2]);
                break;
            }
            assert!(round < 1, "it is kept out");
            case.fail(round % 2, &broken);
        }
        // A key that has not failed since may try, and none once the failure is unambiguous.
        let mut case = Case::new();
        case.fail(0, &down);
        case.pass(12);
        case.start(0);
        case.fail(0, &broken);
        assert_eq!(case.open(), [false, true, true]);
        case.pass(12);
        case.fail(0, &down.with_retry_after(Duration::from_secs(60)));
        case.pass(59);
        assert_eq!(case.open(), [false; 3]);
    }

    /// Law 7: a program may always have new keys, each of which may try and fails in its own way.
    #[test]
    fn unbound_keys_use_up_no_bypass() {
        let timeout = TokenError::new(Kind::Timeout);
        let mut case = Case::new();
        case.fail(0, &timeout);
        case.fail(1, &timeout);
        case.pass(12);
        // One key probes; another has waited long.
        case.start(0);
        assert_eq!(case.open(), [true, true, true]);
        case.start(2);
        case.fail(2, &rejected("invalid_scope"));
        assert_eq!(case.open(), [true, true, false]);
    }

    /// Law 2: an answer to an earlier request does not undo what another key was told since.
    #[test]
    fn a_refusal_of_the_probe_undoes_no_later_retry_after() {
        let timeout = TokenError::new(Kind::Timeout);
        for told in [true, false] {
            let mut case = Case::new();
            case.fail(0, &timeout);
            case.fail(1, &timeout);
            case.pass(12);
            case.start(0);
            let began = case.now.monotonic;
            case.pass(1);
            if told {
                // An unbound key was told.
                let busy = TokenError::transient("busy");
                case.fail(2, &busy.with_retry_after(Duration::from_secs(60)));
            }
            case.pass(1);
            case.fail_after(0, &rejected("invalid_scope"), began);
            case.pass(20);
            assert_eq!(case.open(), [!told; 3]);
        }
    }

    /// Law 7: keys whose flights are lost, one after the other, would keep the rest out.
    #[test]
    fn after_a_lost_probe_a_starved_key_bypasses_an_open_gate() {
        let mut case = Case::new();
        let down = TokenError::new(Kind::Transport);
        case.fail(0, &down);
        case.pass(12);
        case.start(0);
        assert_eq!(case.open(), [true, false, false]);
        assert!(case.keys[0].lose_probe(&mut case.shared));
        case.start(1);
        assert_eq!(case.open(), [true; 3]);
        case.start(2);
        assert_eq!(case.open(), [false, true, false]);
        case.pass(5);
        assert_eq!(case.open(), [true; 3]);
        case.fail(2, &down);
        assert_eq!(case.open(), [false; 3]);
        // Now the failure is known again, and one probe is enough.
        case.pass(12);
        assert_eq!(case.open(), [false, true, false]);
    }

    /// Law 2: whatever happens to other keys, a key's own failures hold it back.
    #[test]
    fn another_keys_success_opens_no_own_gate() {
        let mut case = Case::new();
        case.fail(0, &TokenError::new(Kind::Transport));
        case.succeed(1, case.now);
        assert_eq!(case.open(), [false, true, true]);
    }

    #[test]
    fn new_credentials_open_what_a_refusal_of_the_client_shut() {
        let mut case = Case::new();
        case.fail(0, &rejected("invalid_scope"));
        case.fail(1, &rejected("invalid_client"));
        assert!(case.shared.is_renewable(case.now));
        case.shared.renew(case.now);
        assert!(!case.shared.is_renewable(case.now));
        assert_eq!(case.open(), [false, true, true]);
        assert!(case.keys[1].is_lenient(&case.shared, case.now));
        // The next refusal shuts it again.
        case.fail(1, &rejected("invalid_client"));
        assert_eq!(case.open(), [false; 3]);
    }
}
