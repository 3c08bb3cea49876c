//! A scripted authorization server and a scripted API, both in memory, so that time can be paused.

use std::{
    collections::HashMap,
    convert::Infallible,
    error::Error,
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    task::{Context, Poll, Waker},
    thread,
    time::Duration,
};

use http::{HeaderMap, Request, Response, StatusCode, Uri, header::AUTHORIZATION};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{self, Instant},
};
use tower::{Service, ServiceExt};
use tower_bearer::{
    AccessToken, BoxError, Fetch, RefreshToken, TokenCache, TokenError, TokenResponse, TokenSource,
};

/// What the authorization server does with a token request.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Grants a new token, `token-N` for the Nth request, with this lifetime.
    Grant(Duration),
    /// Grants a new token and names no lifetime.
    GrantUnnamed,
    /// Grants this text with this lifetime.
    Text(&'static str, Duration),
    /// Refuses.
    Fail(TokenError),
    /// Never answers.
    Hang,
    /// Panics.
    Panic,
}

/// One token request as the server saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub at: Instant,
    pub attempt: u32,
    pub refresh_token: Option<String>,
}

/// An authorization server in memory. Clones are one server.
#[derive(Clone)]
pub struct AuthServer {
    shared: Arc<Shared>,
}

struct Shared {
    answer: Mutex<Answer>,
    latency: Mutex<Duration>,
    open: watch::Sender<bool>,
    seen: Mutex<Vec<Seen>>,
    refresh_tokens: Mutex<bool>,
    refresh_lifetime: Mutex<Option<Duration>>,
    in_flight: AtomicU64,
    most_at_once: AtomicU64,
}

impl AuthServer {
    /// A server that answers at once with tokens of 300 s.
    pub fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                answer: Mutex::new(Answer::Grant(Duration::from_secs(300))),
                latency: Mutex::new(Duration::ZERO),
                open: watch::Sender::new(true),
                seen: Mutex::default(),
                refresh_tokens: Mutex::new(false),
                refresh_lifetime: Mutex::new(None),
                in_flight: AtomicU64::new(0),
                most_at_once: AtomicU64::new(0),
            }),
        }
    }

    /// Sets what it does from now on, with the requests that it holds as well.
    pub fn set(&self, answer: Answer) {
        *self.shared.answer.lock().unwrap() = answer;
    }

    /// Sets how long an answer takes.
    pub fn set_latency(&self, latency: Duration) {
        *self.shared.latency.lock().unwrap() = latency;
    }

    /// Sets whether it sends a new refresh token, `refresh-N`, with each answer.
    pub fn set_refresh_tokens(&self, yes: bool) {
        *self.shared.refresh_tokens.lock().unwrap() = yes;
    }

    /// Sets the lifetime that it names for its refresh tokens; by default it names none.
    pub fn set_refresh_lifetime(&self, lifetime: Duration) {
        *self.shared.refresh_lifetime.lock().unwrap() = Some(lifetime);
    }

    /// Holds all requests until [`release`](Self::release).
    pub fn hold(&self) {
        self.shared.open.send_replace(false);
    }

    pub fn release(&self) {
        self.shared.open.send_replace(true);
    }

    /// How many token requests it has seen.
    pub fn requests(&self) -> usize {
        self.shared.seen.lock().unwrap().len()
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }

    /// How many token requests it has not answered and nobody has given up.
    pub fn in_flight(&self) -> u64 {
        self.shared.in_flight.load(Ordering::SeqCst)
    }

    /// How many token requests it has had at once, at most: law 1 wants one.
    pub fn most_at_once(&self) -> u64 {
        self.shared.most_at_once.load(Ordering::SeqCst)
    }
}

impl TokenSource for AuthServer {
    async fn fetch(&self, fetch: Fetch) -> Result<TokenResponse, TokenError> {
        let number = {
            let mut seen = self.shared.seen.lock().unwrap();
            seen.push(Seen {
                at: Instant::now(),
                attempt: fetch.attempt,
                refresh_token: fetch
                    .refresh_token
                    .map(|token| token.expose_secret().to_owned()),
            });
            seen.len()
        };
        let _guest = Guest::enter(&self.shared);
        let latency = *self.shared.latency.lock().unwrap();
        if !latency.is_zero() {
            time::sleep(latency).await;
        }
        let mut open = self.shared.open.subscribe();
        open.wait_for(|open| *open).await.unwrap();
        let answer = self.shared.answer.lock().unwrap().clone();
        let response = match answer {
            Answer::Grant(lifetime) => {
                TokenResponse::new(format!("token-{number}"))?.expires_in(lifetime)
            }
            Answer::GrantUnnamed => TokenResponse::new(format!("token-{number}"))?,
            Answer::Text(text, lifetime) => TokenResponse::new(text)?.expires_in(lifetime),
            Answer::Fail(error) => return Err(error),
            Answer::Hang => std::future::pending().await,
            Answer::Panic => panic!("the scripted server panics"),
        };
        Ok(match *self.shared.refresh_tokens.lock().unwrap() {
            true => {
                let token = RefreshToken::new(format!("refresh-{number}"));
                let lifetime = *self.shared.refresh_lifetime.lock().unwrap();
                response.refresh_token(match lifetime {
                    Some(lifetime) => token.expires_in(lifetime),
                    None => token,
                })
            }
            false => response,
        })
    }
}

/// Counts who is inside.
struct Guest<'a>(&'a Shared);

impl<'a> Guest<'a> {
    fn enter(shared: &'a Shared) -> Self {
        let now = shared.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        shared.most_at_once.fetch_max(now, Ordering::SeqCst);
        Self(shared)
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The text of the bearer token on a request.
pub fn bearer<B>(request: &Request<B>) -> Option<&str> {
    bearer_of(request.headers())
}

fn bearer_of(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    value.strip_prefix("Bearer ")
}

/// 200 with the token's text for a body.
pub fn echo(token: Option<&str>) -> Response<String> {
    Response::new(token.unwrap_or("anonymous").to_owned())
}

/// A 401 with this challenge.
pub fn unauthorized(challenge: &str) -> Response<String> {
    Response::builder()
        .status(StatusCode::UNAUTHORIZED)
        .header("www-authenticate", challenge)
        .body(String::new())
        .unwrap()
}

pub const INVALID_TOKEN: &str = r#"Bearer error="invalid_token""#;

/// A request to a loopback origin.
pub fn get() -> Request<String> {
    Request::get("http://localhost/sims")
        .body(String::new())
        .unwrap()
}

/// Keeps all events and spans enabled for the whole process, so that a subscriber of one thread sees its own ones
/// whatever others come and go meanwhile: whether anybody cares for an event is remembered for all threads.
pub fn enable_tracing() {
    static ENABLED: LazyLock<tracing::Dispatch> =
        LazyLock::new(|| tracing::Dispatch::new(tracing_subscriber::registry()));
    LazyLock::force(&ENABLED);
    tracing::callsite::rebuild_interest_cache();
}

/// Waits until a service is ready for requests of [`get`]'s type, where it takes those of any.
pub async fn ready<S: Service<Request<String>>>(service: &mut S) -> Result<&mut S, S::Error> {
    service.ready().await
}

/// Lets every task run until none has anything to do, without time passing.
pub async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

/// One request as the API saw it.
#[derive(Clone, Debug)]
pub struct Arrival {
    pub uri: Uri,
    pub headers: HeaderMap,
}

impl Arrival {
    /// The text of its bearer token.
    pub fn token(&self) -> Option<&str> {
        bearer_of(&self.headers)
    }
}

/// An API in memory that remembers what it was sent. Clones are one API.
///
/// It takes requests with any body, which it does not read. What it answers is decided as a request arrives;
/// when it does, by [`hold`](Self::hold).
#[derive(Clone)]
pub struct Api {
    shared: Arc<ApiShared>,
}

type Judge = dyn Fn(&Arrival) -> Response<String> + Send + Sync;

struct ApiShared {
    judge: Box<Judge>,
    open: watch::Sender<bool>,
    arrivals: Mutex<Vec<Arrival>>,
}

impl Api {
    pub fn new(judge: impl Fn(&Arrival) -> Response<String> + Send + Sync + 'static) -> Self {
        Self {
            shared: Arc::new(ApiShared {
                judge: Box::new(judge),
                open: watch::Sender::new(true),
                arrivals: Mutex::default(),
            }),
        }
    }

    /// 200 with the token's text for a body.
    pub fn echoing() -> Self {
        Self::new(|arrival| echo(arrival.token()))
    }

    /// Refuses `token-1` for invalid, and sends the others' text for a body.
    pub fn refusing_the_first() -> Self {
        Self::refusing("token-1", || unauthorized(INVALID_TOKEN))
    }

    /// `refusal` to requests with this token, and the others' text for a body.
    pub fn refusing(
        token: &'static str,
        refusal: impl Fn() -> Response<String> + Send + Sync + 'static,
    ) -> Self {
        Self::new(move |arrival| match arrival.token() == Some(token) {
            true => refusal(),
            false => echo(arrival.token()),
        })
    }

    /// Holds all answers until [`release`](Self::release).
    pub fn hold(&self) {
        self.shared.open.send_replace(false);
    }

    pub fn release(&self) {
        self.shared.open.send_replace(true);
    }

    pub fn arrivals(&self) -> Vec<Arrival> {
        self.shared.arrivals.lock().unwrap().clone()
    }

    /// The tokens of all requests, in the order in which they came.
    pub fn tokens(&self) -> Vec<String> {
        let arrivals = self.shared.arrivals.lock().unwrap();
        let tokens = arrivals.iter().map(Arrival::token);
        tokens
            .map(|token| token.unwrap_or("anonymous").to_owned())
            .collect()
    }

    /// How often each path was sent to, at most.
    pub fn most_per_path(&self) -> usize {
        let arrivals = self.shared.arrivals.lock().unwrap();
        let mut counts = HashMap::<_, usize>::new();
        for arrival in &*arrivals {
            *counts.entry(arrival.uri.path()).or_default() += 1;
        }
        counts.into_values().max().unwrap_or_default()
    }
}

impl<B> Service<Request<B>> for Api {
    type Response = Response<String>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<String>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let arrival = Arrival {
            uri: request.uri().clone(),
            headers: request.headers().clone(),
        };
        let response = (self.shared.judge)(&arrival);
        self.shared.arrivals.lock().unwrap().push(arrival);
        let mut open = self.shared.open.subscribe();
        Box::pin(async move {
            open.wait_for(|open| *open).await.unwrap();
            Ok(response)
        })
    }
}

/// A request to this path of a loopback origin.
pub fn get_path(path: impl fmt::Display) -> Request<String> {
    Request::get(format!("http://localhost/{path}"))
        .body(String::new())
        .unwrap()
}

/// Waits for all tasks, and fails with them or if one would never end.
pub async fn all<T: 'static>(tasks: impl IntoIterator<Item = JoinHandle<T>>) -> Vec<T> {
    let mut results = Vec::new();
    for task in tasks {
        let result = time::timeout(Duration::from_secs(3_600), task).await;
        results.push(result.expect("it ends").unwrap());
    }
    results
}

/// Runs a future and tells how long it took; one that would never end fails.
pub async fn timed<F: Future>(future: F) -> (F::Output, Duration) {
    let start = Instant::now();
    let output = time::timeout(Duration::from_secs(3_600), future).await;
    (output.expect("it ends"), start.elapsed())
}

/// The token failure that this error must be.
pub fn token_error(error: &BoxError) -> &TokenError {
    error
        .downcast_ref()
        .unwrap_or_else(|| panic!("not a token failure: {error:?}"))
}

/// Everything that an error says of itself, down to its last source.
pub fn everything(error: &(dyn Error + 'static)) -> String {
    std::iter::successors(Some(error), |&error| error.source())
        .map(|error| format!("{error}\n{error:#}\n{error:?}\n{error:#?}\n"))
        .collect()
}

/// Makes what the caches of this thread leave to chance the same in every run.
pub fn seed(seed: u64) {
    fastrand::seed(seed);
}

pub const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Polls once, with a waker that does nothing.
pub fn poll_once<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// What a future that does not wait comes to, polled once.
#[track_caller]
pub fn now<F: Future>(future: F) -> F::Output {
    match poll_once(std::pin::pin!(future)) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("it waits"),
    }
}

/// Starts a caller of [`TokenCache::get`] in a task of its own.
pub fn caller(cache: &TokenCache) -> JoinHandle<Result<AccessToken, TokenError>> {
    let cache = cache.clone();
    tokio::spawn(async move { cache.get().await })
}

/// Waits until `condition` holds, by a real clock for some seconds at most.
pub async fn until(condition: impl Fn() -> bool) {
    for _ in 0..5_000 {
        if condition() {
            return;
        }
        time::sleep(millis(1)).await;
    }
    panic!("it never comes to that");
}

/// Runs `f` in a thread of its own, and fails if it takes longer than some seconds: it hangs.
pub fn without_a_hang<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(f()));
    receiver
        .recv_timeout(secs(10))
        .expect("it neither hangs nor panics")
}

/// Callers of [`TokenCache::get`] that do not wait for each other, and what becomes of them.
#[derive(Clone)]
pub struct Crowd {
    cache: TokenCache,
    tally: Arc<Mutex<Tally>>,
}

#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub served: usize,
    pub failed: usize,
    pub waiting: usize,
    /// The longest that a caller has waited for its answer.
    pub slowest: Duration,
    pub first_served: Option<Instant>,
}

impl Crowd {
    pub fn new(cache: &TokenCache) -> Self {
        Self {
            cache: cache.clone(),
            tally: Arc::default(),
        }
    }

    /// One more caller.
    pub fn call(&self) {
        let asked = Instant::now();
        let cache = self.cache.clone();
        let mut get = Box::pin(async move { cache.get().await });
        match poll_once(get.as_mut()) {
            Poll::Ready(result) => self.count(asked, &result),
            Poll::Pending => {
                self.tally.lock().unwrap().waiting += 1;
                let crowd = self.clone();
                tokio::spawn(async move {
                    let result = get.await;
                    crowd.tally.lock().unwrap().waiting -= 1;
                    crowd.count(asked, &result);
                });
            }
        }
    }

    /// So many callers at once, again and again for so long.
    pub async fn storm(&self, callers: usize, every: Duration, duration: Duration) {
        let end = Instant::now() + duration;
        while Instant::now() < end {
            for _ in 0..callers {
                self.call();
            }
            time::sleep(every).await;
        }
    }

    pub fn tally(&self) -> Tally {
        self.tally.lock().unwrap().clone()
    }

    fn count(&self, asked: Instant, result: &Result<AccessToken, TokenError>) {
        let mut tally = self.tally.lock().unwrap();
        tally.slowest = tally.slowest.max(asked.elapsed());
        match result {
            Ok(_) => {
                tally.served += 1;
                tally.first_served.get_or_insert_with(Instant::now);
            }
            Err(_) => tally.failed += 1,
        }
    }
}
