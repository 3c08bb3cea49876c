//! The client, its API and its token endpoint, and a record of the run.

use std::{
    collections::HashMap,
    fmt, mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use http::{Request, Response, StatusCode, header::AUTHORIZATION};
use tokio::{
    task::JoinSet,
    time::{self, Instant},
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_bearer::{
    BearerAuthLayer, BoxError, CloneBody, TokenCache, TokenError, TokenResponse, source_fn,
};

/// How long a token lives; it is attached for nine tenths of it.
pub(crate) const LIFETIME: Duration = Duration::from_secs(4);
/// How long the token endpoint takes to answer.
const LATENCY: Duration = Duration::from_millis(150);
/// The same while it is slow.
const SLOW: Duration = Duration::from_millis(500);
/// How often a sample is taken.
const STEP: Duration = Duration::from_millis(100);
/// How many tasks send requests.
const SENDERS: u32 = 4;

/// How to interfere with the run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Action {
    /// Revokes every token.
    Revoke,
    /// Makes the token endpoint slow, or fast again.
    Slow(bool),
    /// Makes the token endpoint fail, or work again.
    Break(bool),
    /// Sets the requests per second.
    Load(u32),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Revoke => f.write_str("tokens revoked"),
            Self::Slow(true) => f.write_str("endpoint slow"),
            Self::Slow(false) => f.write_str("fast again"),
            Self::Break(true) => f.write_str("endpoint down"),
            Self::Break(false) => f.write_str("up again"),
            Self::Load(rate) => write!(f, "{rate} requests/s"),
        }
    }
}

/// A moment of the run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Seconds since the start.
    pub(crate) at: f64,
    /// Requests that ended since the last sample, per second.
    pub(crate) answered: f64,
    pub(crate) failed: f64,
    /// The most requests that waited for a token since then.
    pub(crate) waiting: usize,
    /// How long ago the current token was requested, in seconds.
    pub(crate) age: Option<f64>,
}

/// A token request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exchange {
    pub(crate) at: f64,
    /// Once answered: whether it was granted, and when it was answered.
    pub(crate) answer: Option<(bool, f64)>,
}

/// The whole run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Record {
    pub(crate) samples: Vec<Sample>,
    pub(crate) token_requests: Vec<Exchange>,
    pub(crate) actions: Vec<(f64, Action)>,
    /// When each failed request failed.
    pub(crate) failures: Vec<f64>,
    /// How many of them failed despite a token that the API would have accepted.
    pub(crate) needless: usize,
    /// How many requests the API refused.
    pub(crate) refused: usize,
    /// How many requests were answered.
    pub(crate) answered: usize,
    /// The most token requests at once.
    at_once: usize,
}

/// The run; clones share it.
#[derive(Clone)]
pub(crate) struct World(Arc<Inner>);

struct Inner {
    started: Instant,
    cache: TokenCache,
    endpoint: Arc<Endpoint>,
    /// Whether events are printed.
    prints: bool,
    rate: AtomicU32,
    /// Requests that have started, are not at the API and have not ended.
    waiting: AtomicUsize,
    most_waiting: AtomicUsize,
    record: Mutex<Record>,
    tasks: Mutex<JoinSet<()>>,
}

impl World {
    /// Starts everything on the current runtime.
    pub(crate) fn start(rate: u32, prints: bool) -> Self {
        let endpoint = Arc::new(Endpoint::new(prints));
        let shared = Arc::clone(&endpoint);
        let source = source_fn(move |_| {
            let endpoint = Arc::clone(&shared);
            async move { endpoint.answer().await }
        });
        let world = Self(Arc::new(Inner {
            started: endpoint.started,
            cache: TokenCache::new(source),
            endpoint,
            prints,
            rate: AtomicU32::new(rate),
            waiting: AtomicUsize::new(0),
            most_waiting: AtomicUsize::new(0),
            record: Mutex::default(),
            tasks: Mutex::default(),
        }));
        let mut tasks = lock(&world.0.tasks);
        for _ in 0..SENDERS {
            tasks.spawn(world.clone().send());
        }
        tasks.spawn(world.clone().sample());
        drop(tasks);
        world
    }

    /// Stops sending.
    pub(crate) async fn stop(&self) {
        let mut tasks = mem::take(&mut *lock(&self.0.tasks));
        tasks.shutdown().await;
    }

    pub(crate) fn started(&self) -> Instant {
        self.0.started
    }

    pub(crate) fn now(&self) -> f64 {
        self.0.started.elapsed().as_secs_f64()
    }

    pub(crate) fn apply(&self, action: Action) {
        let now = self.now();
        if self.0.prints {
            println!("{now:6.2} s  * {action}");
        }
        self.record_mut().actions.push((now, action));
        let endpoint = &self.0.endpoint;
        match action {
            Action::Revoke => endpoint.lock().valid.clear(),
            Action::Slow(slow) => endpoint.slow.store(slow, Relaxed),
            Action::Break(down) => endpoint.down.store(down, Relaxed),
            Action::Load(rate) => self.0.rate.store(rate, Relaxed),
        }
    }

    pub(crate) fn rate(&self) -> u32 {
        self.0.rate.load(Relaxed)
    }

    pub(crate) fn is_slow(&self) -> bool {
        self.0.endpoint.slow.load(Relaxed)
    }

    pub(crate) fn is_down(&self) -> bool {
        self.0.endpoint.down.load(Relaxed)
    }

    /// The run so far.
    pub(crate) fn record(&self) -> Record {
        let mut record = self.record_mut().clone();
        let tables = self.0.endpoint.lock();
        record.token_requests.clone_from(&tables.token_requests);
        record.at_once = tables.at_once;
        record
    }

    fn record_mut(&self) -> MutexGuard<'_, Record> {
        lock(&self.0.record)
    }

    /// Sends this sender's share of the requests, each when it is due, however long the others take.
    async fn send(self) {
        let api = service_fn({
            let world = self.clone();
            move |request| world.clone().serve(request)
        });
        let layer = BearerAuthLayer::new(self.0.cache.clone()).replay(CloneBody);
        let client = layer.layer(api);
        let mut requests = JoinSet::new();
        let mut due = Instant::now();
        loop {
            due += Duration::from_secs(1) * SENDERS / self.rate().max(1);
            time::sleep_until(due).await;
            requests.spawn(self.clone().send_one(client.clone()));
            while requests.try_join_next().is_some() {}
        }
    }

    /// Sends a request and records its outcome.
    async fn send_one<C>(self, mut client: C)
    where
        C: Service<Request<String>, Response = Response<()>, Error = BoxError>,
    {
        let started = self.now();
        let Ok(client) = client.ready().await else {
            return;
        };
        let progress = Progress::new(&self.0);
        let mut request = Request::new(String::new());
        request.extensions_mut().insert(Arc::clone(&progress));
        let response = client.call(request);
        // With a token at hand, it has arrived by now.
        if !progress.arrived.load(Relaxed) {
            progress.wait();
        }
        let result = response.await;
        progress.end_wait();
        let now = self.now();
        let needless = self.has_valid_token_since(started);
        let mut record = self.record_mut();
        match result {
            Ok(response) if response.status().is_success() => record.answered += 1,
            _ => {
                record.failures.push(now);
                record.needless += usize::from(needless);
            }
        }
    }

    /// Whether the cache holds a token that the API accepts, and held it at the time `since`.
    fn has_valid_token_since(&self, since: f64) -> bool {
        let token = self.0.cache.peek();
        let tables = self.0.endpoint.lock();
        let issued = token.and_then(|token| tables.valid.get(token.expose_secret()).copied());
        issued.is_some_and(|issued| issued.granted < since && self.now() < issued.expiry)
    }

    /// The API: it takes a few milliseconds, and accepts valid tokens.
    fn serve(
        self,
        request: Request<String>,
    ) -> impl Future<Output = Result<Response<()>, BoxError>> + Send {
        let header = request.headers().get(AUTHORIZATION);
        let text = header.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let now = self.now();
        let known = text.and_then(|text| self.0.endpoint.lock().valid.get(text).copied());
        let valid = known.is_some_and(|issued| now < issued.expiry);
        let progress = request.extensions().get::<Arc<Progress>>().cloned();
        if let Some(progress) = &progress {
            progress.arrived.store(true, Relaxed);
            progress.end_wait();
        }
        async move {
            time::sleep(Duration::from_millis(fastrand::u64(5..20))).await;
            if valid {
                return Ok(Response::new(()));
            }
            self.record_mut().refused += 1;
            // Until it is sent again, it waits for another token.
            if let Some(progress) = progress {
                progress.wait();
            }
            let refusal = Response::builder()
                .status(StatusCode::UNAUTHORIZED)
                .header("www-authenticate", r#"Bearer error="invalid_token""#);
            Ok(refusal.body(())?)
        }
    }

    /// Takes a sample at each step.
    async fn sample(self) {
        let mut last = (self.now(), 0, 0);
        let mut steps = time::interval_at(self.0.started + STEP, STEP);
        loop {
            steps.tick().await;
            let waiting = self.0.waiting.load(Relaxed);
            let waiting = self.0.most_waiting.swap(0, Relaxed).max(waiting);
            let token = self.0.cache.peek();
            let now = self.now();
            let sent = {
                let tables = self.0.endpoint.lock();
                token.and_then(|token| tables.sent.get(token.expose_secret()).copied())
            };
            let mut record = self.record_mut();
            let (answered, failed) = (record.answered, record.failures.len());
            let elapsed = (now - last.0).max(1e-3);
            let rate = |count: usize, before: usize| (count - before) as f64 / elapsed;
            let sample = Sample {
                at: now,
                answered: rate(answered, last.1),
                failed: rate(failed, last.2),
                waiting,
                age: sent.map(|sent| now - sent),
            };
            record.samples.push(sample);
            last = (now, answered, failed);
        }
    }

    /// The promises, and whether they held.
    pub(crate) fn promises(&self, scripted: bool) -> Vec<(String, bool)> {
        let record = self.record();
        let span = self.now();
        let answers = record
            .token_requests
            .iter()
            .filter_map(|exchange| exchange.answer);
        let granted = answers.filter(|(granted, _)| *granted).count();
        let requested = record.token_requests.len();
        // The crate's bound on load for tokens of this lifetime. No refresh is due before 0.35 of it.
        let due = LIFETIME.mul_f64(0.35).max(Duration::from_secs(1));
        let forced = 1.0 + span / 5.0;
        let most_granted = 1.0 + span / due.as_secs_f64() + forced;
        let lost = 7 * (granted + 1) + 1 + (2.0 * span / 10.0) as usize;
        let most = 3 * (granted + 2) + lost;
        let count = record.answered + record.failures.len();
        let mut promises = vec![
            (
                format!("{count} requests, {requested} token requests, at most one at a time"),
                record.at_once == 1,
            ),
            (
                format!(
                    "{granted} tokens granted <= {most_granted:.0}, {requested} requested <= {most}"
                ),
                granted as f64 <= most_granted && requested <= most,
            ),
            (
                format!(
                    "of {} failed requests, {} despite a valid token",
                    record.failures.len(),
                    record.needless
                ),
                record.needless == 0,
            ),
        ];
        if scripted {
            promises.extend(outage_promises(&record));
        }
        promises
    }
}

/// Where a request is.
struct Progress {
    world: Arc<Inner>,
    /// Whether it has reached the API.
    arrived: AtomicBool,
    waits: AtomicBool,
}

impl Progress {
    fn new(world: &Arc<Inner>) -> Arc<Self> {
        Arc::new(Self {
            world: Arc::clone(world),
            arrived: AtomicBool::new(false),
            waits: AtomicBool::new(false),
        })
    }

    fn wait(&self) {
        if !self.waits.swap(true, Relaxed) {
            let waiting = self.world.waiting.fetch_add(1, Relaxed) + 1;
            self.world.most_waiting.fetch_max(waiting, Relaxed);
        }
    }

    fn end_wait(&self) {
        if self.waits.swap(false, Relaxed) {
            self.world.waiting.fetch_sub(1, Relaxed);
        }
    }
}

/// The promises for a run with one outage.
fn outage_promises(record: &Record) -> [(String, bool); 2] {
    let acted = |down| {
        let mut actions = record.actions.iter();
        actions.find_map(|(at, action)| {
            matches!(action, Action::Break(it) if *it == down).then_some(*at)
        })
    };
    let (down, up) = (acted(true).unwrap_or(0.0), acted(false).unwrap_or(0.0));
    // The first flight has three attempts, the later ones one each.
    let lost = |exchange: &&Exchange| exchange.answer.is_some_and(|(granted, _)| !granted);
    let flights = record
        .token_requests
        .iter()
        .filter(lost)
        .count()
        .saturating_sub(2);
    let gate = 0.5 * 2_f64.powi(flights.saturating_sub(1) as i32);
    let gate = 1.1 * gate.min(10.0);
    // None fails if the outage ends before the token expires.
    let failures = &record.failures;
    let first = failures.first().map_or(f64::MAX, |first| *first);
    let late = failures.last().map_or(0.0, |last| (last - up).max(0.0));
    // What a busy machine may add.
    let slack = 1.0;
    [
        (
            format!(
                "{} requests refused for a revoked token and sent again, none failed before the outage",
                record.refused
            ),
            record.refused > 0 && first >= down,
        ),
        (
            format!("no failure later than {late:.1} s after the outage, within {gate:.1} s"),
            late <= gate + slack,
        ),
    ]
}

/// The token endpoint.
struct Endpoint {
    started: Instant,
    prints: bool,
    slow: AtomicBool,
    down: AtomicBool,
    in_flight: AtomicUsize,
    tables: Mutex<Tables>,
}

#[derive(Default)]
struct Tables {
    /// The tokens that the API accepts.
    valid: HashMap<String, Issued>,
    /// When each token was requested.
    sent: HashMap<String, f64>,
    token_requests: Vec<Exchange>,
    at_once: usize,
}

#[derive(Clone, Copy)]
struct Issued {
    granted: f64,
    expiry: f64,
}

impl Endpoint {
    fn new(prints: bool) -> Self {
        Self {
            started: Instant::now(),
            prints,
            slow: AtomicBool::new(false),
            down: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            tables: Mutex::default(),
        }
    }

    fn now(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        lock(&self.tables)
    }

    async fn answer(&self) -> Result<TokenResponse, TokenError> {
        let _in_flight = Count::enter(&self.in_flight);
        let sent = self.now();
        let number = {
            let mut tables = self.lock();
            tables.at_once = tables.at_once.max(self.in_flight.load(Relaxed));
            tables.token_requests.push(Exchange {
                at: sent,
                answer: None,
            });
            tables.token_requests.len()
        };
        let slow = self.slow.load(Relaxed);
        time::sleep(if slow { SLOW } else { LATENCY }).await;
        let granted = !self.down.load(Relaxed);
        let now = self.now();
        let text = format!("token-{number}");
        let mut tables = self.lock();
        tables.token_requests[number - 1].answer = Some((granted, now));
        if granted {
            let issued = Issued {
                granted: now,
                expiry: sent + LIFETIME.as_secs_f64(),
            };
            tables.valid.insert(text.clone(), issued);
            tables.sent.insert(text.clone(), sent);
        }
        drop(tables);
        if self.prints {
            let outcome = if granted { "granted" } else { "failed" };
            let took = (now - sent) * 1e3;
            println!("{sent:6.2} s    token request {number}, {outcome} after {took:.0} ms");
        }
        match granted {
            true => Ok(TokenResponse::new(text)?.expires_in(LIFETIME)),
            false => Err(TokenError::transient("the token endpoint is down")),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts one, until it is dropped.
struct Count<'a>(&'a AtomicUsize);

impl<'a> Count<'a> {
    fn enter(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Relaxed);
        Self(count)
    }
}

impl Drop for Count<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
