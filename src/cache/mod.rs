//! [`TokenCache`]: the handle that all users of a token share.

mod acquire;
mod flight;
#[cfg(test)]
mod laws;
mod state;
mod warm;

use std::{fmt, future::Future, pin::Pin, sync::Arc};

use arc_swap::ArcSwapOption;
use fastrand::Rng;
use tokio::runtime::Handle;

pub(crate) use self::acquire::Acquire;
use self::{
    flight::{End, Flight},
    state::{Decision, Plan, Refusal, State},
};
use crate::{
    error::{Kind, TokenError},
    policy::RefreshPolicy,
    source::{Fetch, TokenResponse, TokenSource},
    sync::Mutex,
    time::{Deadline, Now},
    token::{self, AccessToken},
};

/// Keeps a token and replaces it, with at most one token request in flight.
///
/// Clones are cheap and share everything. One cache can feed many [`BearerAuthLayer`](crate::BearerAuthLayer)s
/// and, without tower, anything else that needs a token: a gRPC interceptor, a WebSocket handshake, a
/// message broker's login.
///
/// Making one needs no runtime and sends nothing. The first caller of [`get`](Self::get), or the first
/// request through a layer, causes the first token request, which runs in a task on that caller's
/// runtime and goes on when that caller is dropped.
///
/// ```
/// use tower_bearer::{TokenCache, TokenResponse, source_fn};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), tower_bearer::TokenError> {
/// let cache = TokenCache::new(source_fn(|_fetch| async { TokenResponse::new("mF_9.B5f-4.1JqM") }));
/// assert!(cache.peek().is_none());
///
/// let token = cache.get().await?;
/// assert_eq!(token.header_value(), "Bearer mF_9.B5f-4.1JqM");
/// assert!(cache.peek().is_some());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct TokenCache {
    entry: Arc<Entry>,
}

impl TokenCache {
    /// Creates an empty cache with the default [`RefreshPolicy`].
    pub fn new(source: impl TokenSource) -> Self {
        Self::with_policy(source, RefreshPolicy::new())
    }

    /// Creates an empty cache.
    pub fn with_policy(source: impl TokenSource, policy: RefreshPolicy) -> Self {
        Self {
            entry: Arc::new(Entry {
                source: Box::new(source),
                hot: ArcSwapOption::empty(),
                state: Mutex::new(State::new(policy.clone(), Rng::new())),
                policy,
            }),
        }
    }

    /// Returns a token that may be sent, and waits for one if there is none.
    ///
    /// A token that is due for refresh is returned at once, while its replacement is fetched in the
    /// background. The wait is bounded: by [`RefreshPolicy::flight_timeout`] for each of at most two token
    /// requests, the second of which comes about only when the first was lost with its runtime, and by
    /// 10 s between the two.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future at any point loses nothing: a token request that it has started goes on and its
    /// result is kept.
    ///
    /// # Errors
    ///
    /// The error of the token request, or the last one's while the next is not due. See [`TokenError`].
    ///
    /// # Panics
    ///
    /// If it has to wait on a tokio runtime without timers.
    pub async fn get(&self) -> Result<AccessToken, TokenError> {
        match self.attach() {
            Some(token) => Ok(token),
            None => self.acquire().await,
        }
    }

    /// Returns the current token, if there is one that may be sent.
    ///
    /// Causes no token request.
    pub fn peek(&self) -> Option<AccessToken> {
        let now = Now::read();
        self.entry.state.lock().attachable(now)
    }

    /// Tells the cache that `token` was refused: what a 401 with the challenge `invalid_token` does.
    ///
    /// Ignored if the cache has another token by now (RFC 6750 section 3.1 leaves it to the client to get a
    /// new one, and it has). Otherwise a replacement is fetched in the background, at most one per cooldown:
    /// 5 s, doubling to 60 s while refusals go on. Callers of [`get`](Self::get) wait for it for at most
    /// 1 s and use the old token after that.
    ///
    /// Without a tokio runtime it does nothing.
    pub fn invalidate(&self, token: &AccessToken) {
        self.refused(token, true);
    }

    /// The token for a request that has no time to wait; starts a refresh that is due.
    pub(crate) fn attach(&self) -> Option<AccessToken> {
        let now = Now::read();
        if let Some(token) = &*self.entry.hot.load() {
            if token.is_fresh(now) {
                return Some(AccessToken(Arc::clone(token)));
            }
        }
        self.entry.use_or_refresh()
    }

    /// Waits for a token.
    pub(crate) fn acquire(&self) -> Acquire {
        Acquire::new(Arc::clone(&self.entry))
    }

    /// Hears that the API refused `token`, and either `named` it invalid or gave no word of it.
    pub(crate) fn refused(&self, token: &AccessToken, named: bool) -> Remedy {
        self.entry.refused(token, named)
    }
}

impl<T: TokenSource> From<T> for TokenCache {
    fn from(source: T) -> Self {
        Self::new(source)
    }
}

impl fmt::Debug for TokenCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenCache")
            .field("token", &self.peek())
            .field("policy", &self.entry.policy)
            .finish_non_exhaustive()
    }
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

/// All that belongs to one key: the source of its tokens, the state, and the token for the hot path.
pub(crate) struct Entry {
    source: Box<dyn ErasedSource>,
    policy: RefreshPolicy,
    /// The token that requests take without a lock; absent while the API has it named invalid.
    ///
    /// Written with the state locked, so that it follows the state in order.
    hot: ArcSwapOption<token::Inner>,
    state: Mutex<State<Arc<Flight>>>,
}

/// What a caller who wants a token gets.
enum Found {
    Token(AccessToken),
    /// Wait for this flight; with a fallback for a while only.
    Flight(Arc<Flight>, Option<AccessToken>),
    Error(TokenError),
}

impl Entry {
    pub(crate) fn policy(&self) -> &RefreshPolicy {
        &self.policy
    }

    pub(crate) fn source(&self) -> &dyn ErasedSource {
        &*self.source
    }

    /// The token, if there is one that may be attached without a wait; starts a refresh that is due.
    fn use_or_refresh(self: &Arc<Self>) -> Option<AccessToken> {
        self.look(|state, now, can_start| match state.acquire(now) {
            Decision::Use(token) => (Some(token), None),
            Decision::UseAndStart(token) => {
                (Some(token), can_start.then(|| Start::unforced(state, now)))
            }
            Decision::Start | Decision::Join(..) | Decision::Fail(_) => (None, None),
        })
    }

    /// What a caller gets who can wait; starts the flight that it will wait for.
    fn find(self: &Arc<Self>) -> Found {
        self.look(|state, now, can_start| match state.acquire(now) {
            Decision::Use(token) => (Found::Token(token), None),
            Decision::UseAndStart(token) => (
                Found::Token(token),
                can_start.then(|| Start::unforced(state, now)),
            ),
            Decision::Fail(error) => (Found::Error(error), None),
            // Without a runtime there is neither a task for the flight nor a timer for its waiter.
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
    fn refresh_if_due(self: &Arc<Self>) {
        self.look(|state, now, can_start| match state.acquire(now) {
            Decision::UseAndStart(_) | Decision::Start if can_start => {
                ((), Some(Start::unforced(state, now)))
            }
            _ => ((), None),
        });
    }

    /// How many flights there were, and when the next one is due.
    fn watch(&self) -> (u64, Option<Deadline>) {
        let state = self.state.lock();
        (state.flights(), state.next_due())
    }

    /// What a request can do whose `token` was refused; starts the flight that brings another one.
    fn refused(self: &Arc<Self>, token: &AccessToken, named: bool) -> Remedy {
        let join = |flight| {
            let entry = Arc::clone(self);
            Remedy::Wait(Joined { entry, flight })
        };
        self.look(
            |state, now, can_start| match state.refused(token, named, now) {
                Refusal::Replay(token) => (Remedy::Token(token), None),
                Refusal::Join(flight) if can_start => (join(flight), None),
                Refusal::Start if can_start => {
                    let start = Start::forced(state, named, now);
                    (join(Arc::clone(&start.flight)), Some(start))
                }
                Refusal::Join(_) | Refusal::Start | Refusal::Pass => (Remedy::Nothing, None),
            },
        )
    }

    /// Takes the result of `flight`, tells its waiters, and forgets it if the flight was given up.
    fn land(&self, flight: &Arc<Flight>, outcome: Result<(TokenResponse, Now), TokenError>) {
        let now = Now::read();
        // A source's error holds anything, so no last handle on one is dropped under the lock.
        let _error = outcome.as_ref().err().cloned();
        let mut state = self.state.lock();
        let _remembered = state.remembered();
        let mut retry_in = None;
        let end = match outcome {
            Ok((response, sent)) => state.succeeded(flight, response, sent, now).map(End::Done),
            Err(error) => {
                retry_in = state.failed(flight, &error, now);
                retry_in.map(|_| End::failed(error))
            }
        };
        self.publish(&state);
        drop(state);
        if let Some(end) = end {
            end.report(retry_in);
            flight.end(end);
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
        if let Some(flight) = overdue {
            End::Abandoned.report(None);
            flight.end(End::Abandoned);
        }
        if let (Some(runtime), Some(start)) = (runtime, start) {
            flight::launch(&runtime, Arc::clone(self), start.flight, start.plan);
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

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

/// The object-safe form of [`TokenSource`].
pub(crate) trait ErasedSource: Send + Sync {
    fn fetch<'a>(
        &'a self,
        fetch: Fetch,
    ) -> Pin<Box<dyn Future<Output = Result<TokenResponse, TokenError>> + Send + 'a>>;
}

impl<T: TokenSource> ErasedSource for T {
    fn fetch<'a>(
        &'a self,
        fetch: Fetch,
    ) -> Pin<Box<dyn Future<Output = Result<TokenResponse, TokenError>> + Send + 'a>> {
        Box::pin(TokenSource::fetch(self, fetch))
    }
}
