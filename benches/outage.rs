//! What callers and the token endpoint experience while it is down, and when the API refuses the token of ten thousand
//! requests in flight.
//!
//! The outages run in paused time, where each figure is exact and two hundred runs take seconds.

mod support;

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::{Request, Response, StatusCode, header};
use support::{
    Body, DAY,
    endpoint::Endpoint,
    report::{Report, Table, median, millis},
    request, runtime, short,
};
use tokio::{
    runtime::Builder,
    sync::{Barrier, mpsc},
    task::JoinSet,
    time::{self, Instant},
};
use tower::{BoxError, Layer, Service, service_fn};
use tower_bearer::{BearerAuthLayer, CloneBody, TokenCache};

fn main() {
    let runs = if short() { 3 } else { 200 };
    let mut report = Report::new("outage");
    no_token(&mut report, runs);
    token_due(&mut report, runs);
    refused(&mut report, if short() { 1 } else { 9 });
    report.finish();
}

/// Runs `work` in time that passes only while all tasks sleep.
fn paused<T>(work: impl Future<Output = T>) -> T {
    let runtime = Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    runtime.expect("a runtime can be built").block_on(work)
}

/// What callers saw in one run.
struct Seen {
    token_requests: usize,
    failed: usize,
    slowest: Duration,
    /// From the endpoint's recovery to the first token.
    recovered: Duration,
}

/// Starts 100 callers every 10 ms, from before the outage until a token that is granted after it.
async fn crowd(endpoint: Arc<Endpoint>, cache: TokenCache) -> Seen {
    let start = Instant::now();
    let before = endpoint.seen().len();
    endpoint.set_down(true);
    let (done, mut calls) = mpsc::unbounded_channel();
    let mut down = true;
    let mut tick = time::interval(Duration::from_millis(10));
    let mut callers = JoinSet::new();
    let recovery = start + OUTAGE;
    let renewed = loop {
        tick.tick().await;
        if down && Instant::now() >= recovery {
            down = false;
            endpoint.set_down(false);
        }
        for _ in 0..100 {
            let (cache, done) = (cache.clone(), done.clone());
            callers.spawn(async move {
                let start = Instant::now();
                let ok = cache.get().await.is_ok();
                let _ = done.send((start, start.elapsed(), ok));
            });
        }
        let answered = endpoint.seen().last().and_then(|seen| seen.answered);
        if let Some(answered) = answered.filter(|answered| *answered >= recovery) {
            break answered;
        }
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "it never recovers"
        );
    };
    drop(done);
    while callers.join_next().await.is_some() {}
    let (mut failed, mut slowest) = (0, Duration::ZERO);
    while let Some((_, took, ok)) = calls.recv().await {
        failed += usize::from(!ok);
        slowest = slowest.max(took);
    }
    let seen = endpoint.seen();
    let during = seen[before..].iter().filter(|seen| seen.sent < recovery);
    Seen {
        token_requests: during.count(),
        failed,
        slowest,
        recovered: renewed - recovery,
    }
}

fn no_token(report: &mut Report, runs: u32) {
    let seen: Vec<_> = (0..runs)
        .map(|_| {
            paused(async {
                let endpoint = Endpoint::new(ANSWER, Duration::from_secs(300));
                let cache = TokenCache::new(endpoint.source());
                crowd(endpoint, cache).await
            })
        })
        .collect();
    let [most, _, slowest, recovered] = outage_table(report, "no_token", &seen);
    report.goal(
        "no token, 503 for 2 s, 100 callers every 10 ms",
        "≤ 8 token requests, each call answered within 1 s, first token on average ≤ 1.2 s after recovery",
        format!("at most {most} token requests, slowest call {slowest:.0} ms, first token after {recovered:.0} ms, averaged over {runs} runs"),
        most <= 8.0 && slowest <= 1_000.0 && recovered <= 1_200.0,
    );
}

fn token_due(report: &mut Report, runs: u32) {
    let seen: Vec<_> = (0..runs)
        .map(|_| {
            paused(async {
                let endpoint = Endpoint::new(ANSWER, Duration::from_secs(300));
                let cache = TokenCache::new(endpoint.source());
                cache.get().await.expect("the endpoint grants a token");
                // It is due after half of its life at the latest.
                time::sleep(endpoint.lifetime / 2).await;
                crowd(endpoint, cache).await
            })
        })
        .collect();
    let [most, failed, slowest, _] = outage_table(report, "token_due", &seen);
    assert_eq!(failed, 0.0, "calls failed despite a valid token");
    report.goal(
        "token due but valid, the same outage",
        "≤ 4 token requests, 0 failed calls, no call slower than usual",
        format!("at most {most} token requests, {failed} failed, slowest call {slowest:.0} ms"),
        most <= 4.0 && slowest == 0.0,
    );
}

/// Reports the runs, and returns the most token requests and failed calls, the slowest call, and the mean time to the
/// first token, in milliseconds.
fn outage_table(report: &mut Report, name: &'static str, seen: &[Seen]) -> [f64; 4] {
    let mut table = Table::new(
        name,
        &[
            "run",
            "token requests",
            "failed calls",
            "slowest call, ms",
            "recovery to token, ms",
        ],
    );
    for (run, seen) in seen.iter().enumerate() {
        table.row([
            (run + 1).to_string(),
            seen.token_requests.to_string(),
            seen.failed.to_string(),
            format!("{:.0}", millis(seen.slowest)),
            format!("{:.0}", millis(seen.recovered)),
        ]);
    }
    report.detail(table);
    let most = |of: fn(&Seen) -> f64| seen.iter().map(of).fold(0.0, f64::max);
    let recovered = seen.iter().map(|seen| millis(seen.recovered)).sum::<f64>();
    [
        most(|seen| seen.token_requests as f64),
        most(|seen| seen.failed as f64),
        most(|seen| millis(seen.slowest)),
        recovered / seen.len() as f64,
    ]
}

/// All requests are in flight when the API begins to refuse their token.
fn refused(report: &mut Report, runs: u32) {
    let runtime = runtime(2);
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        ours.push(runtime.block_on(refused_once()));
        bare.push(runtime.block_on(three_sleeps()));
    }
    let (ours, bare) = (median(&mut ours), median(&mut bare));
    report.goal(
        "401 to 10,000 requests in flight",
        "1 token request, 10,000 replays, the refresh adds one round trip",
        format!(
            "1 token request, 10,000 replays; {ours:.0} ms, and {bare:.0} ms for as many tasks that sleep for three trips of 50 ms"
        ),
        ours <= bare * 1.1,
    );
}

async fn refused_once() -> f64 {
    let endpoint = Endpoint::new(TRIP, DAY);
    let cache = TokenCache::new(endpoint.source());
    let old = cache.get().await.expect("the endpoint grants a token");
    let old = old.header_value().clone();
    let all = Together::new();
    let (sent, accepted) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let api = {
        let (all, sent, accepted) = (Arc::clone(&all), Arc::clone(&sent), Arc::clone(&accepted));
        service_fn(move |request: Request<Body>| {
            let refused = request.headers()[header::AUTHORIZATION] == old;
            sent.fetch_add(1, Ordering::Relaxed);
            accepted.fetch_add(usize::from(!refused), Ordering::Relaxed);
            let all = Arc::clone(&all);
            async move {
                if refused {
                    all.wait().await;
                }
                time::sleep(TRIP).await;
                let response = Response::builder();
                let response = match refused {
                    true => response
                        .status(StatusCode::UNAUTHORIZED)
                        .header(header::WWW_AUTHENTICATE, "Bearer error=\"invalid_token\""),
                    false => response,
                };
                Ok::<_, BoxError>(response.body(())?)
            }
        })
    };
    let mut service = BearerAuthLayer::new(cache).replay(CloneBody).layer(api);
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        callers.spawn(service.call(request()));
    }
    while let Some(response) = callers.join_next().await {
        let response = response.expect("no task panics").expect("the API answers");
        assert_eq!(response.status(), StatusCode::OK);
    }
    let took = all.since();
    assert_eq!(
        endpoint.seen().len(),
        2,
        "the first token and its replacement"
    );
    assert_eq!(sent.load(Ordering::Relaxed), 2 * CALLERS);
    assert_eq!(accepted.load(Ordering::Relaxed), CALLERS);
    millis(took)
}

/// How long as many tasks take to sleep for the same time.
async fn three_sleeps() -> f64 {
    let all = Together::new();
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let all = Arc::clone(&all);
        callers.spawn(async move {
            all.wait().await;
            for _ in 0..3 {
                time::sleep(TRIP).await;
            }
        });
    }
    while callers.join_next().await.is_some() {}
    millis(all.since())
}

/// Where tasks wait for the last of them.
struct Together {
    barrier: Barrier,
    met: OnceLock<Instant>,
}

impl Together {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            barrier: Barrier::new(CALLERS),
            met: OnceLock::new(),
        })
    }

    async fn wait(&self) {
        if self.barrier.wait().await.is_leader() {
            self.met.get_or_init(Instant::now);
        }
    }

    fn since(&self) -> Duration {
        self.met.get().expect("all have met").elapsed()
    }
}

const CALLERS: usize = 10_000;
const OUTAGE: Duration = Duration::from_secs(2);
/// How long the endpoint takes to answer.
const ANSWER: Duration = Duration::from_millis(20);
/// How long the API and the token endpoint each take to answer.
const TRIP: Duration = Duration::from_millis(50);
