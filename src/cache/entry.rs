//! [`Entry`]: all that belongs to one key, and the one place where its state is locked.

use std::{fmt, sync::Arc};

use arc_swap::ArcSwapOption;
use fastrand::Rng;
use tokio::runtime::Handle;

use super::{
    acquire::Acquire,
    flight::{self, End, Flight, Outcome},
    state::{Decision, Plan, Refusal, State},
};
use crate::{
    error::{Kind, TokenError},
    policy::RefreshPolicy,
    source::{ErasedSource, SharedSource, TokenSource},
    sync::Mutex,
    time::{Deadline, Now},
    token::{self, AccessToken},
};

/// The source of a key's tokens, the state, and the token for the hot path.
pub(crate) struct Entry {
    source: SharedSource,
    policy: RefreshPolicy,
    /// The token that requests take without a lock; absent while the API has it named invalid.
    ///
    /// Written with the state locked, so that it follows the state in order.
    hot: ArcSwapOption<token::Inner>,
    pub(super) state: Mutex<State<Arc<Flight>>>,
}

/// What a caller who can wait for a token gets.
pub(super) enum Found {
    Token(AccessToken),
    /// Wait for this flight; with a fallback for a while only.
    Flight(Arc<Flight>, Option<AccessToken>),
    Error(TokenError),
}

/// What a request whose token was refused can do.
#[derive(Debug)]
pub(crate) enum Remedy {
    /// Go again with this token.
    Token(AccessToken),
    /// Wait for another token.
    Wait(Joined),
    /// Take the refusal for the answer.
    Nothing,
}

/// A flight to wait for, together with the entry that it fills.
#[derive(Debug)]
pub(crate) struct Joined {
    entry: Arc<Entry>,
    flight: Arc<Flight>,
}

impl Joined {
    /// Waits for this flight, and for no other.
    pub(crate) fn wait(self) -> Acquire {
        Acquire::joined(self.entry, self.flight)
    }
}

impl Entry {
    pub(super) fn new(source: impl TokenSource, policy: RefreshPolicy) -> Arc<Self> {
        Arc::new(Self {
            source: SharedSource::new(source),
            hot: ArcSwapOption::empty(),
            state: Mutex::new(State::new(policy.clone(), Rng::new())),
            policy,
        })
    }

    pub(super) fn policy(&self) -> &RefreshPolicy {
        &self.policy
    }

    pub(super) fn source(&self) -> &dyn ErasedSource {
        self.source.get()
    }

    /// The token, if there is one that is neither due nor refused: without a lock.
    pub(super) fn fresh(&self) -> Option<AccessToken> {
        let now = Now::read();
        let token = self.hot.load();
        let token = token.as_ref().filter(|token| token.is_fresh(now))?;
        Some(AccessToken(Arc::clone(token)))
    }

    /// The token, if there is one that may be attached without a wait; starts a refresh that is due.
    pub(super) fn use_or_refresh(self: &Arc<Self>) -> Option<AccessToken> {
        self.look(|state, now, can_start| match state.acquire(now) {
            Decision::Use(token) => (Some(token), None),
            Decision::UseAndStart(token) => {
                (Some(token), can_start.then(|| Start::unforced(state, now)))
            }
            Decision::Start | Decision::Join(..) | Decision::Fail(_) => (None, None),
        })
    }

    /// What a caller gets who can wait; starts the flight that it will wait for.
    pub(super) fn find(self: &Arc<Self>) -> Found {
        self.look(|state, now, can_start| match state.acquire(now) {
            Decision::Use(token) => (Found::Token(token), None),
            Decision::UseAndStart(token) => (
                Found::Token(token),
                can_start.then(|| Start::unforced(state, now)),
            ),
            Decision::Fail(error) => (Found::Error(error), None),
            // Without a runtime there is neither a task for the flight nor a timer for its waiter.
            Decision::Join(_, Some(token)) if !can_start => (Found::Token(token), None),
            Decision::Start | Decision::Join(..) if !can_start => {
                (Found::Error(TokenError::new(Kind::NoRuntime, false)), None)
            }
            Decision::Join(flight, fallback) => (Found::Flight(flight, fallback), None),
            Decision::Start => {
                let start = Start::unforced(state, now);
                (Found::Flight(Arc::clone(&start.flight), None), Some(start))
            }
        })
    }

    /// Starts the flight that is due, for nobody in particular.
    pub(super) fn refresh_if_due(self: &Arc<Self>) {
        self.look(|state, now, can_start| match state.acquire(now) {
            Decision::UseAndStart(_) | Decision::Start if can_start => {
                ((), Some(Start::unforced(state, now)))
            }
            _ => ((), None),
        });
    }

    /// How many flights there were, and when the next one is due.
    pub(super) fn watch(&self) -> (u64, Option<Deadline>) {
        let state = self.state.lock();
        (state.flights(), state.next_due())
    }

    /// What a request can do whose `token` was refused; starts the flight that brings another one.
    pub(super) fn refused(self: &Arc<Self>, token: &AccessToken, named: bool) -> Remedy {
        let join = |flight| {
            let entry = Arc::clone(self);
            Remedy::Wait(Joined { entry, flight })
        };
        self.look(|state, now, can_start| {
            let start = match state.refused(token, named, now) {
                Refusal::Replay(token) => return (Remedy::Token(token), None),
                Refusal::Join(flight) if can_start => return (join(flight), None),
                Refusal::Start if can_start => Start::forced(state, named, now),
                Refusal::Refresh if can_start => Start::unforced(state, now),
                _ => return (Remedy::Nothing, None),
            };
            (join(Arc::clone(&start.flight)), Some(start))
        })
    }

    /// Takes what came of `flight` and tells its waiters; forgets it if the flight was given up.
    pub(super) fn land(&self, flight: &Arc<Flight>, outcome: Outcome) {
        let now = Now::read();
        // A source's error holds anything, so no last handle on one is dropped under the lock.
        let error = match &outcome {
            Outcome::Failed(error) => Some(error.clone()),
            Outcome::Granted(..) | Outcome::Lost => None,
        };
        let mut state = self.state.lock();
        let _remembered = state.remembered();
        let mut retry_in = None;
        let end = match outcome {
            Outcome::Granted(response, sent) => {
                state.succeeded(flight, response, sent, now).map(End::Done)
            }
            Outcome::Failed(_) | Outcome::Lost => {
                retry_in = state.failed(flight, error.as_ref(), now);
                retry_in.map(|_| error.clone().map_or(End::Abandoned, End::Failed))
            }
        };
        self.publish(&state);
        drop(state);
        if let Some(end) = end {
            flight.end(end.clone());
            end.report(retry_in);
        }
    }

    /// Decides something with the state locked, and does afterwards what must not be done under the lock.
    ///
    /// `decide` is told whether there is a runtime to start a flight on.
    fn look<T>(
        self: &Arc<Self>,
        decide: impl FnOnce(&mut State<Arc<Flight>>, Now, bool) -> (T, Option<Start>),
    ) -> T {
        let runtime = Handle::try_current().ok();
        let now = Now::read();
        let mut state = self.state.lock();
        let overdue = state.give_up_overdue(now);
        let (found, start) = decide(&mut state, now, runtime.is_some());
        self.publish(&state);
        drop(state);
        // First of all, since wakers and subscribers are foreign code and may panic.
        if let (Some(runtime), Some(start)) = (runtime, start) {
            flight::launch(&runtime, Arc::clone(self), start.flight, start.plan);
        }
        if let Some(flight) = overdue {
            flight.end(End::Abandoned);
            End::Abandoned.report(None);
        }
        found
    }

    /// Shows the hot path the token that `state` holds.
    fn publish(&self, state: &State<Arc<Flight>>) {
        let token = state.unquestioned().map(|token| &token.0);
        let shown = self.hot.load();
        if shown.as_ref().map(Arc::as_ptr) != token.map(Arc::as_ptr) {
            self.hot.store(token.cloned());
        }
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

/// A flight that is on record and has yet to be launched.
struct Start {
    flight: Arc<Flight>,
    plan: Plan,
}

impl Start {
    fn unforced(state: &mut State<Arc<Flight>>, now: Now) -> Self {
        let (flight, plan) = state.begin(Flight::new, now);
        Self { flight, plan }
    }

    fn forced(state: &mut State<Arc<Flight>>, named: bool, now: Now) -> Self {
        let (flight, plan) = state.begin_forced(Flight::new, named, now);
        Self { flight, plan }
    }
}
