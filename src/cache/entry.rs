//! [`Entry`]: everything that belongs to one key, and the only place that locks its state.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwapOption;
use fastrand::Rng;
use tokio::{runtime::Handle, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    acquire::Acquire,
    common::Common,
    endpoint::Endpoint,
    flight::{self, End, Flight, Outcome},
    gate::SharedGate,
    registry,
    reporter::{Landing, Reporter, swallow_panics},
    state::{Decision, Plan, Refusal, State},
    status::{Status, TokenState},
    watch::Watched,
};
use crate::{
    error::{Kind, TokenError},
    policy::RefreshPolicy,
    source::{ErasedSource, Revocation, TokenRequest, TokenResponse},
    sync::Mutex,
    telemetry::{self, RefusalOutcome},
    time::{Deadline, Now},
    token::{self, AccessToken, KeyId, TokenId},
};

/// A key's source, its state, and its token for the hot path.
pub(crate) struct Entry {
    endpoint: Arc<Endpoint>,
    common: Arc<Common>,
    /// Whether this is the plain key, that of requests without a [`TokenRequest`]: only its token is watched.
    plain: bool,
    id: KeyId,
    /// The token that requests take without a lock; absent while it is rejected.
    ///
    /// Written with the state locked, so that it follows the state in order.
    hot: ArcSwapOption<token::Inner>,
    /// A due token that requests take without a lock while its refresh cannot start.
    ///
    /// Written like `hot`, and cleared by every change of the state.
    settled: ArcSwapOption<Settled>,
    pub(super) state: Mutex<State<Arc<Flight>>>,
    reporter: Reporter,
}

/// A due token, and until when no refresh can start.
struct Settled {
    token: AccessToken,
    until: Deadline,
}

/// What a caller that can wait for a token gets.
pub(super) enum Found {
    Token(AccessToken),
    /// Wait for this flight; with a fallback, only briefly.
    Flight(Arc<Flight>, Option<AccessToken>),
    Error(TokenError),
}

/// What the watch needs to know.
pub(super) struct Progress {
    /// How many flights there were.
    pub(super) flights: u64,
    /// When the next one is due.
    pub(super) next_due: Option<Deadline>,
    /// Until when requests may take the token without another check.
    pub(super) fresh_until: Option<Deadline>,
}

/// What to do with a request whose token was refused.
#[derive(Debug)]
pub(crate) enum Remedy {
    /// Send it again with this token.
    Token(AccessToken),
    /// Wait for another token.
    Wait(Joined),
    /// Return the refusal.
    Nothing,
}

/// A flight to wait for, and the entry that it fills.
#[derive(Debug)]
pub(crate) struct Joined {
    entry: Arc<Entry>,
    flight: Arc<Flight>,
}

impl Joined {
    /// Waits for this flight only.
    pub(crate) fn wait(self) -> Acquire {
        Acquire::joined(self.entry, self.flight)
    }
}

impl Entry {
    pub(super) fn new(
        request: TokenRequest,
        endpoint: Arc<Endpoint>,
        common: Arc<Common>,
    ) -> Arc<Self> {
        static IDS: AtomicU64 = AtomicU64::new(1);
        let id: KeyId = IDS.fetch_add(1, Ordering::Relaxed);
        let entry = Arc::new(Self {
            endpoint,
            plain: request.is_plain(),
            id,
            hot: ArcSwapOption::empty(),
            settled: ArcSwapOption::empty(),
            reporter: Reporter::new(Arc::clone(&common.outlets), request.clone()),
            state: Mutex::new(State::new(
                id,
                request,
                Arc::clone(&common.policy),
                Rng::new(),
            )),
            common,
        });
        registry::add(id, Arc::downgrade(&entry));
        #[cfg(feature = "test-util")]
        entry.apply_preset();
        entry
    }

    #[cfg(feature = "test-util")]
    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(super) fn policy(&self) -> &RefreshPolicy {
        &self.common.policy
    }

    pub(super) fn source(&self) -> &dyn ErasedSource {
        self.endpoint.source()
    }

    pub(super) fn reporter(&self) -> &Reporter {
        &self.reporter
    }

    /// Counts the outcome of a call of the source, and reports a refresh token that failed in it.
    pub(super) fn attempt_ended(
        &self,
        flight: &Flight,
        refresh_error: Option<&TokenError>,
        answer: &Result<TokenResponse, TokenError>,
    ) {
        let meters = self.reporter.meters();
        if let Some(error) = refresh_error {
            meters.attempt_ended(telemetry::REFRESH_TOKEN, Some(error));
            self.reporter.refresh_token_failed(flight, error);
        }
        let grant = answer.as_ref().ok().and_then(|response| response.grant);
        let grant = grant.unwrap_or_else(|| self.endpoint.grant());
        meters.attempt_ended(grant, answer.as_ref().err());
    }

    pub(super) fn is_plain(&self) -> bool {
        self.plain
    }

    /// Whether the token is refreshed without a request for it.
    pub(super) fn stays_warm(&self) -> bool {
        self.plain && self.policy().keep_warm
    }

    pub(super) fn closing(&self) -> &CancellationToken {
        &self.common.closing
    }

    pub(super) fn watching(&self) -> &CancellationToken {
        &self.common.watching
    }

    /// The token for a request that cannot wait; starts a refresh that is due.
    pub(super) fn attach(self: &Arc<Self>) -> Option<AccessToken> {
        self.fresh().or_else(|| self.attach_slow())
    }

    /// As [`attach`](Self::attach), without a fresh token.
    pub(super) fn attach_slow(self: &Arc<Self>) -> Option<AccessToken> {
        self.settled().or_else(|| self.use_or_refresh())
    }

    /// The token, if it is neither due nor refused; takes no lock.
    pub(super) fn fresh(&self) -> Option<AccessToken> {
        let token = self.hot.load();
        let token = token.as_ref()?;
        let is_watched = self.plain && self.watched().is(token.id());
        let is_fresh = token.is_coarsely_fresh()
            && (is_watched || token.is_fresh_otherwise(self.endpoint.not_before(), Instant::now()));
        is_fresh.then(|| AccessToken(Arc::clone(token)))
    }

    /// The token, if it is due and its refresh cannot start; takes no lock.
    fn settled(&self) -> Option<AccessToken> {
        let settled = self.settled.load();
        let Settled { token, until } = &**settled.as_ref()?;
        let is_settled = !until.has_come(Now::read()) && !self.is_void(token);
        is_settled.then(|| token.clone())
    }

    /// The token, if one may be attached without a wait; starts a refresh that is due.
    fn use_or_refresh(self: &Arc<Self>) -> Option<AccessToken> {
        self.with_state(|mut view| match view.acquire() {
            Decision::Use(token) => (Some(token), None),
            Decision::UseAndStart(token) => (Some(token), view.start_if_possible()),
            Decision::Start | Decision::Join(..) | Decision::Fail(_) => (None, None),
        })
    }

    /// What a caller that can wait gets; starts the flight that it will wait for.
    pub(super) fn find(self: &Arc<Self>) -> Found {
        #[cfg(feature = "test-util")]
        if let Some(error) = self.preset_error() {
            return Found::Error(error);
        }
        let mut begins_to_fail = None;
        let found = self.with_state(|mut view| match (view.acquire(), view.obstacle) {
            (_, Some(Kind::ShutDown)) => (Found::Error(TokenError::new(Kind::ShutDown)), None),
            (Decision::Use(token), _) => (Found::Token(token), None),
            (Decision::UseAndStart(token), _) => (Found::Token(token), view.start_if_possible()),
            (Decision::Fail(error), _) => {
                begins_to_fail = view.state.begins_to_fail(view.shared, view.now);
                (Found::Error(error), None)
            }
            // Without a runtime, the flight has no task and its waiter no timer.
            (Decision::Join(_, Some(token)), Some(_)) => (Found::Token(token), None),
            (Decision::Start | Decision::Join(..), Some(kind)) => {
                (Found::Error(TokenError::new(kind)), None)
            }
            (Decision::Join(flight, fallback), None) => (Found::Flight(flight, fallback), None),
            (Decision::Start, None) => {
                let start = view.start();
                (Found::Flight(Arc::clone(&start.flight), None), Some(start))
            }
        });
        if let (Found::Error(error), Some(retry_in)) = (&found, begins_to_fail) {
            self.reporter.requests_failing(error, retry_in);
        }
        found
    }

    /// Starts the flight that is due, if any, without a caller.
    pub(super) fn refresh_if_due(self: &Arc<Self>) {
        self.with_state(|mut view| match view.acquire() {
            Decision::UseAndStart(_) | Decision::Start => ((), view.start_if_possible()),
            _ => ((), None),
        });
    }

    /// The token, if one may be attached; starts nothing.
    pub(super) fn peek(&self) -> Option<AccessToken> {
        // Lock-free: callers that cannot wait, such as a gRPC interceptor, call this for each request.
        self.fresh().or_else(|| self.peek_slow())
    }

    /// As [`peek`](Self::peek), without a fresh token.
    fn peek_slow(&self) -> Option<AccessToken> {
        let now = Now::read();
        let state = self.state.lock();
        let shared = self.endpoint.gate.lock();
        let token = state.attachable(now);
        let token = token.or_else(|| state.last_resort(&shared, now));
        token.filter(|token| !self.is_void(token))
    }

    /// A dead token that callers may still use after their flight failed.
    pub(super) fn last_resort(&self) -> Option<AccessToken> {
        let state = self.state.lock();
        let shared = self.endpoint.gate.lock();
        let token = state.last_resort(&shared, Now::read());
        token.filter(|token| !self.is_void(token))
    }

    /// Whether the server has voided the token since it was granted.
    #[inline]
    pub(super) fn is_void(&self, token: &AccessToken) -> bool {
        token.not_before() < self.endpoint.not_before()
    }

    /// Notes that `flight` is about to ask the source.
    pub(super) fn asks(&self, flight: &Arc<Flight>) {
        self.state.lock().asks(flight);
    }

    /// Whether the server has told another key to back off, or that the client is refused, since the flight under way
    /// began.
    pub(super) fn is_held_back(&self) -> bool {
        let state = self.state.lock();
        let shared = self.endpoint.gate.lock();
        state.is_held_back(&shared, Now::read())
    }

    pub(super) fn progress(&self) -> Progress {
        let state = self.state.lock();
        let shared = self.endpoint.gate.lock();
        let token = state.unrejected().filter(|token| !self.is_void(token));
        Progress {
            flights: state.flights(),
            next_due: state.next_due(&shared, self.endpoint.not_before()),
            fresh_until: token.map(AccessToken::fresh_until),
        }
    }

    pub(super) fn watched(&self) -> &Watched {
        self.endpoint.watched()
    }

    /// Marks the token as watched, if it is fresh, and returns its id: the caller then watches the clock.
    pub(super) fn begin_watch(&self) -> Option<TokenId> {
        let state = self.state.lock();
        let token = state.unrejected()?;
        if token.fresh_until().has_come(Now::read()) {
            return None;
        }
        self.watched().begin(token.id());
        // Only now, or a higher `not_before` in between would be missed.
        if self.is_void(token) {
            self.watched().end(token.id());
            return None;
        }
        Some(token.id())
    }

    /// Whether forgetting this entry loses nothing.
    pub(super) fn is_idle(&self, now: Now) -> bool {
        let state = self.state.lock();
        let shared = self.endpoint.gate.lock();
        state.is_idle(&shared, now)
    }

    /// Takes the API's refusal of this token, for a request that is not sent again.
    ///
    /// It counts only for the token that the entry holds, or an earlier one with the same text.
    pub(super) fn refused_by_id(self: &Arc<Self>, token: TokenId, complaint: Complaint) {
        let current = self.state.lock().token_like(token);
        match current {
            Some(token) => drop(self.refused(&token, complaint)),
            None => self
                .reporter
                .refused(complaint.name(), RefusalOutcome::Passed, None),
        }
    }

    /// What to do with a request whose `token` was refused; starts the flight that brings another one.
    pub(super) fn refused(self: &Arc<Self>, token: &AccessToken, complaint: Complaint) -> Remedy {
        let join = |flight| {
            let entry = Arc::clone(self);
            Remedy::Wait(Joined { entry, flight })
        };
        let name = complaint.name();
        let mut outcome = RefusalOutcome::Passed;
        let remedy = self.with_state(|mut view| {
            let start = match (view.refused(token, &complaint), view.obstacle) {
                (Refusal::Replay(token), _) => {
                    outcome = RefusalOutcome::Replay;
                    return (Remedy::Token(token), None);
                }
                (Refusal::Join(flight), None) => {
                    outcome = RefusalOutcome::Joined;
                    return (join(flight), None);
                }
                (Refusal::Start, None) => view.start_forced(complaint),
                (Refusal::Refresh, None) => view.start(),
                _ => return (Remedy::Nothing, None),
            };
            outcome = RefusalOutcome::Started;
            (join(Arc::clone(&start.flight)), Some(start))
        });
        let flight = match &remedy {
            Remedy::Wait(joined) => Some(joined.flight.number()),
            Remedy::Token(_) | Remedy::Nothing => None,
        };
        self.reporter.refused(name, outcome, flight);
        remedy
    }

    /// Takes the outcome of `flight` and wakes its waiters; drops it if the flight was given up.
    pub(super) fn land(&self, flight: &Arc<Flight>, outcome: Outcome) {
        let now = Now::read();
        // A flight lost to a shutdown is no outage.
        let is_ended = matches!(outcome, Outcome::Lost) && self.closing().is_cancelled();
        // A source's error may hold anything, so its last handle must not be dropped under the lock.
        let error = match &outcome {
            Outcome::Failed(error) => Some(error.clone()),
            Outcome::Lost if is_ended => Some(TokenError::new(Kind::ShutDown)),
            Outcome::Granted(..) | Outcome::Lost => None,
        };
        let mut state = self.state.lock();
        let mut shared = self.endpoint.gate.lock();
        let _remembered = state.remembered(&shared);
        let mut landing = Landing {
            now,
            grant: self.endpoint.grant(),
            before: state.outage(),
            failure: None,
        };
        let end = match outcome {
            Outcome::Granted(mut response, sent) => {
                let not_before = response.not_before_policy;
                landing.grant = response.grant.unwrap_or(landing.grant);
                // An answer without a `not_before` does not void its own token.
                response
                    .not_before_policy
                    .get_or_insert(self.endpoint.not_before());
                let token = state.succeeded(&mut shared, flight, response, sent, now);
                if let (Some(_), Some(not_before)) = (&token, not_before) {
                    self.endpoint.set_not_before(not_before);
                }
                token.map(End::Done)
            }
            Outcome::Failed(_) | Outcome::Lost => {
                let shut = state.failed(&mut shared, flight, error.as_ref(), now);
                landing.failure = shut
                    .filter(|_| !is_ended)
                    .map(|_| state.failure_report(&shared, now));
                shut.map(|_| error.clone().map_or(End::Abandoned, End::Failed))
            }
        };
        self.publish(&state, None);
        drop(shared);
        drop(state);
        if let Some(end) = end {
            flight.end(end.clone());
            self.report_landed(flight, &end, &landing);
        }
    }

    fn report_landed(&self, flight: &Flight, end: &End, landing: &Landing) {
        self.reporter.landed(flight, end, landing);
        // A woken waiter may have shut the cache down, after which nothing else opens the gate.
        if self.closing().is_cancelled() {
            self.reporter.opened();
        }
    }

    /// Ends the flight, if there is one, and takes the tokens out.
    ///
    /// The cache must be `closing` already, so that no other flight starts.
    pub(super) fn close(&self) -> Revocation {
        let now = Now::read();
        let mut state = self.state.lock();
        let (flight, revocation) = state.shut_down(now);
        self.publish(&state, None);
        drop(state);
        if let Some(flight) = flight {
            let end = End::Failed(TokenError::new(Kind::ShutDown));
            flight.end(end.clone());
            swallow_panics(|| {
                self.reporter
                    .landed(&flight, &end, &self.empty_landing(now))
            });
        }
        self.reporter.opened();
        revocation
    }

    /// Decides with the state locked, and then does what must not be done under the lock.
    fn with_state<T>(self: &Arc<Self>, decide: impl FnOnce(View<'_>) -> (T, Option<Start>)) -> T {
        let runtime = Handle::try_current().ok();
        let now = Now::read();
        self.endpoint.apply_new_credentials(now);
        let mut state = self.state.lock();
        let mut shared = self.endpoint.gate.lock();
        let void = state.apply_not_before(self.endpoint.not_before());
        let overdue = state.give_up_overdue(&mut shared, now);
        let failure = overdue.as_ref().map(|_| state.failure_report(&shared, now));
        let obstacle = match &runtime {
            _ if self.closing().is_cancelled() => Some(Kind::ShutDown),
            Some(_) => None,
            None => Some(Kind::NoRuntime),
        };
        let (found, start) = decide(View {
            state: &mut state,
            shared: &mut shared,
            now,
            obstacle,
        });
        let settled = state.settled(&shared, now);
        self.publish(&state, settled);
        drop(shared);
        drop(state);
        drop(void);
        // First, since wakers and subscribers are foreign code and may panic.
        if let (Some(runtime), Some(start)) = (runtime, start) {
            flight::launch(&runtime, Arc::clone(self), start.flight, start.plan);
        }
        if let Some(flight) = overdue {
            flight.end(End::Abandoned);
            let landing = Landing {
                failure,
                ..self.empty_landing(now)
            };
            self.report_landed(&flight, &End::Abandoned, &landing);
        }
        found
    }

    /// The landing of a flight that brought nothing.
    fn empty_landing(&self, now: Now) -> Landing {
        Landing {
            now,
            grant: self.endpoint.grant(),
            before: None,
            failure: None,
        }
    }

    /// The current status.
    pub(super) fn status(&self) -> Status {
        let now = Now::read();
        let state = self.state.lock();
        let shared = self.endpoint.gate.lock();
        let seen = state.snapshot(&shared, self.endpoint.not_before(), now);
        drop(shared);
        drop(state);
        let token = seen.token.as_ref();
        let since = |then: Instant| now.monotonic.saturating_duration_since(then);
        Status {
            request: self.reporter.request().clone(),
            state: match self.closing().is_cancelled() {
                true => TokenState::ShutDown,
                false => seen.state,
            },
            usable_until: token.and_then(AccessToken::usable_until),
            expires_in: token.map(|token| token.expiry().remaining(now)),
            due_in: token.map(|token| token.fresh_until().remaining(now)),
            age: token
                .and(seen.succeeded)
                .map(|succeeded| since(succeeded.monotonic)),
            last_success: seen.succeeded.map(|succeeded| succeeded.wall),
            failures: seen.failures,
            failing_for: seen.outage.map(|outage| since(outage.since)),
            last_error: seen.error,
            retry_in: seen.opens.map(|opens| opens.remaining(now)),
            flight: seen.flight.as_ref().map(|flight| flight.number()),
            flight_age: seen
                .flight
                .as_ref()
                .map(|flight| flight.span().age(now.monotonic)),
            slow_after: self.policy().attempt_timeout,
            waiters: seen.flight.as_ref().map_or(0, |flight| flight.waiters()),
        }
    }

    /// Publishes the token that `state` holds to the hot path, and whether it is settled.
    pub(super) fn publish(
        &self,
        state: &State<Arc<Flight>>,
        settled: Option<(AccessToken, Deadline)>,
    ) {
        let settled = settled.map(|(token, until)| Arc::new(Settled { token, until }));
        if settled.is_some() || self.settled.load().is_some() {
            self.settled.store(settled);
        }
        let token = state.unrejected().map(|token| &token.0);
        let shown = self.hot.load();
        if shown.as_ref().map(Arc::as_ptr) != token.map(Arc::as_ptr) {
            if self.plain {
                self.watched().clear();
            }
            self.hot.store(token.cloned());
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        registry::remove(self.id);
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("policy", self.policy())
            .field("plain", &self.plain)
            .finish_non_exhaustive()
    }
}

/// What a decision works on, all of it locked.
struct View<'a> {
    state: &'a mut State<Arc<Flight>>,
    shared: &'a mut SharedGate,
    now: Now,
    /// Why no flight can start, if it cannot.
    obstacle: Option<Kind>,
}

impl View<'_> {
    fn acquire(&self) -> Decision<Arc<Flight>> {
        self.state.acquire(self.shared, self.now)
    }

    fn refused(&mut self, token: &AccessToken, complaint: &Complaint) -> Refusal<Arc<Flight>> {
        self.state
            .refused(self.shared, token, complaint.names_token(), self.now)
    }

    fn start(&mut self) -> Start {
        let (flight, plan) = self.state.begin(self.shared, Flight::new, self.now);
        Start { flight, plan }
    }

    fn start_if_possible(&mut self) -> Option<Start> {
        self.obstacle.is_none().then(|| self.start())
    }

    fn start_forced(&mut self, complaint: Complaint) -> Start {
        let named = complaint.names_token();
        let (flight, mut plan) = self
            .state
            .begin_forced(self.shared, Flight::new, named, self.now);
        if let Complaint::Claims(claims) = complaint {
            plan.claims = Some(claims);
        }
        Start { flight, plan }
    }
}

/// A flight that is on record and has yet to be launched.
struct Start {
    flight: Arc<Flight>,
    plan: Plan,
}

/// What the API said about a token it refused.
#[derive(Debug)]
pub(crate) enum Complaint {
    /// That it is invalid.
    Invalid,
    /// That it lacks these claims, which is as good as invalid.
    Claims(String),
    /// Nothing.
    Unexplained,
}

impl Complaint {
    fn name(&self) -> &'static str {
        match self {
            Self::Invalid => "invalid_token",
            Self::Claims(_) => "missing_claims",
            Self::Unexplained => "unexplained",
        }
    }

    fn names_token(&self) -> bool {
        !matches!(self, Self::Unexplained)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{atomic::AtomicUsize, mpsc},
        thread,
        time::Duration,
    };

    use tokio::time;

    use super::*;
    use crate::{
        cache::TokenCache,
        source::{SharedSource, TokenResponse, source_fn},
    };

    #[tokio::test]
    async fn a_fresh_token_is_peeked_at_without_a_lock() {
        let cache = TokenCache::new(source_fn(|_| async { TokenResponse::new("token") }));
        let key = TokenRequest::new().scope("a");
        cache.get().await.unwrap();
        cache.get_for(&key).await.unwrap();
        for entry in [Arc::clone(&cache.plain), cache.entry(&key).unwrap()] {
            let locked = entry.state.lock();
            let (done, peeked) = mpsc::channel();
            let same = Arc::clone(&entry);
            let peeks = thread::spawn(move || done.send(same.peek().is_some()));
            assert_eq!(peeked.recv_timeout(Duration::from_secs(2)), Ok(true));
            drop(locked);
            peeks.join().unwrap().unwrap();
        }
    }

    /// Law 4: even in an outage, requests wait neither for one another nor for a lock.
    #[tokio::test(start_paused = true)]
    async fn a_due_token_is_taken_without_a_lock_while_no_refresh_can_start() {
        let requests = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&requests);
        let cache = TokenCache::new(source_fn(move |_| {
            let request = count.fetch_add(1, Ordering::SeqCst);
            async move {
                match request {
                    0 => Ok(TokenResponse::new("token")?.expires_in(Duration::from_secs(300))),
                    _ => Err(TokenError::transient("down")),
                }
            }
        }));
        cache.get().await.unwrap();
        time::sleep(Duration::from_secs(250)).await;
        let (runtime, entry) = (Handle::current(), &cache.plain);
        let takes = || {
            let (done, taken) = mpsc::channel();
            let (runtime, entry) = (runtime.clone(), Arc::clone(entry));
            thread::spawn(move || {
                let _guard = runtime.enter();
                let _ = done.send(entry.attach().is_some());
            });
            taken.recv_timeout(Duration::from_secs(2)).ok()
        };
        // One of the first two starts the flight, which fails at once and shuts the gate.
        for state in ["under way", "over"] {
            assert_eq!(takes(), Some(true));
            let locked = entry.state.lock();
            assert_eq!(takes(), Some(true), "{state}");
            drop(locked);
            time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(requests.load(Ordering::SeqCst), 2);
        // The gate opens, and the next one starts a flight.
        time::sleep(Duration::from_secs(1)).await;
        assert_eq!(takes(), Some(true));
        time::sleep(Duration::from_millis(1)).await;
        assert_eq!(requests.load(Ordering::SeqCst), 3);
        // Another key's token shows that this one is void.
        assert_eq!(takes(), Some(true));
        entry.endpoint.set_not_before(1);
        assert_eq!(takes(), Some(false));
    }

    /// An entry with a token of 300 s that was asked for at `sent`.
    fn with_token(request: TokenRequest, sent: Now) -> Arc<Entry> {
        let source = source_fn(|_| async { Err(TokenError::transient("not asked")) });
        let endpoint = Arc::new(Endpoint::new(SharedSource::new(source)));
        let entry = Entry::new(request, endpoint, Common::new(RefreshPolicy::new()));
        let shared = &mut SharedGate::default();
        let (flight, _) = entry.state.lock().begin(shared, Flight::new, sent);
        let response = TokenResponse::new("token").unwrap();
        let response = response.expires_in(Duration::from_secs(300));
        entry.land(&flight, Outcome::Granted(response, sent));
        entry
    }

    /// Neither a laptop that slept nor one whose wall clock was set back sends a dead token.
    #[tokio::test(start_paused = true)]
    async fn a_token_is_fresh_by_both_clocks() {
        let hour = Duration::from_secs(3600);
        // A clock may not reach back before its start.
        time::advance(hour).await;
        let now = Now::read();
        for request in [TokenRequest::new(), TokenRequest::new().scope("a")] {
            for (monotonic, wall) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
                let sent = Now {
                    monotonic: now.monotonic - hour * monotonic,
                    wall: now.wall - hour * wall,
                };
                let entry = with_token(request.clone(), sent);
                assert_eq!(entry.fresh().is_some(), monotonic + wall == 0);
            }
        }
    }

    /// Another key's answer may void a token between its arrival and its watch.
    #[tokio::test]
    async fn a_token_that_is_void_by_now_is_not_watched() {
        for (not_before, watched) in [(0, true), (7, false)] {
            let entry = with_token(TokenRequest::new(), Now::read());
            entry.endpoint.set_not_before(not_before);
            let id = entry.hot.load().as_ref().unwrap().id();
            assert_eq!(entry.begin_watch(), watched.then_some(id));
            assert_eq!(entry.watched().is(id), watched);
        }
    }
}
