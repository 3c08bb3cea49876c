//! Whether a refresh slows requests down: an open-loop load at a fixed rate, across several refreshes, beside the caches
//! that users write by hand, and through an outage.
//!
//! One thread sends each request when it is due, whatever happened to those before it, and leaves a request that has to
//! wait to the runtime. Latency counts from when the request was due, which avoids the coordinated omission of a closed
//! loop, and includes the sender's own delays, which are the same for all.

mod support;

use std::{
    future::Future,
    hint::{black_box, spin_loop},
    iter,
    pin::Pin,
    sync::{Arc, mpsc},
    task::{Context, Poll, Waker},
    time::Duration,
};

use hdrhistogram::Histogram;
use http::Request;
use support::{
    Body,
    baselines::{ArcSwapCache, ByHand, MutexCache, RwLockCache},
    endpoint::Endpoint,
    inner,
    plot::{self, Axis, Line},
    report::{Report, Table, plot_path},
    request, runtime, short, token_text,
};
use tokio::{runtime::Runtime, time::Instant};
use tower::{Layer, Service, service_fn};
use tower_bearer::{BearerAuthLayer, TokenCache};
use tower_http::auth::AddAuthorizationLayer;

fn main() {
    let plan = match short() {
        true => Plan {
            rate: 5_000,
            lasts: Duration::from_secs(4),
            lifetime: Duration::from_secs(3),
            outages: 1,
        },
        false => Plan {
            rate: 40_000,
            lasts: Duration::from_secs(30),
            lifetime: Duration::from_secs(4),
            outages: 4,
        },
    };
    let runtime = runtime(1);
    let bare = service_fn(inner);
    let fixed = AddAuthorizationLayer::bearer(&token_text()).layer(bare);
    let runs = [
        plan.run(&runtime, "static header", |_| fixed.clone()),
        plan.run(&runtime, "mutex by hand", |e| {
            ByHand::<_, MutexCache>::new(bare, e)
        }),
        plan.run(&runtime, "RwLock by hand", |e| {
            ByHand::<_, RwLockCache>::new(bare, e)
        }),
        plan.run(&runtime, "ArcSwap by hand", |e| {
            ByHand::<_, ArcSwapCache>::new(bare, e)
        }),
        plan.run(&runtime, "bearer", |e| {
            BearerAuthLayer::new(TokenCache::new(e.source())).layer(bare)
        }),
    ];
    let outages = (0..plan.outages).map(|_| plan.outage(&runtime));
    let outage = outages.reduce(Run::and).expect("there is one");
    report(&plan, &runs, &outage);
}

/// A load.
struct Plan {
    /// Requests per second.
    rate: u32,
    lasts: Duration,
    lifetime: Duration,
    /// One is short, and has few of the slowest requests in a thousand.
    outages: usize,
}

/// The outcome of a load.
struct Run {
    name: &'static str,
    sent: Vec<Sent>,
    waited: usize,
    token_requests: usize,
    inside: Histogram<u64>,
    outside: Histogram<u64>,
}

/// One request.
struct Sent {
    due: Instant,
    took: Duration,
}

impl Plan {
    /// A load across refreshes.
    fn run<S>(
        &self,
        runtime: &Runtime,
        name: &'static str,
        service: impl FnOnce(&Arc<Endpoint>) -> S,
    ) -> Run
    where
        S: Service<Request<Body>>,
        S::Future: Send + 'static,
        S::Error: Send + 'static,
        S::Response: Send + 'static,
    {
        let endpoint = Endpoint::new(FETCH, self.lifetime);
        let mut service = service(&endpoint);
        self.warm_up(runtime, &mut service);
        let (sent, waited) = self.load(runtime, &mut service, self.lasts);
        let seen = endpoint.seen();
        // A request finds the token due a little before the token request is sent.
        let refreshes = seen.iter().skip(1).map(|seen| {
            let answered = seen.answered.unwrap_or_else(Instant::now);
            (seen.sent - MARGIN, answered + MARGIN)
        });
        let run = Run::new(
            name,
            sent,
            waited,
            seen.len(),
            &refreshes.collect::<Vec<_>>(),
        );
        if name == "bearer" {
            assert_eq!(run.waited, 0, "requests waited for a refresh");
            // Token requests follow one another, none sooner than after half a life, less a random tenth.
            let apart = self.lifetime.mul_f64(0.4) - MARGIN;
            let mut pairs = seen.windows(2);
            assert!(pairs.all(|pair| pair[1].sent - pair[0].sent >= apart));
            assert!(seen.len() > 2, "there were no refreshes");
        }
        run
    }

    /// A load through an outage of 2 s while the token is due, and on until its refresh.
    fn outage(&self, runtime: &Runtime) -> Run {
        // Due after 4 to 5 s, dead after 9.
        let endpoint = Endpoint::new(Duration::from_millis(5), Duration::from_secs(10));
        let cache = TokenCache::new(endpoint.source());
        let mut service = BearerAuthLayer::new(cache).layer(service_fn(inner));
        self.warm_up(runtime, &mut service);
        let start = endpoint.seen()[0].sent;
        endpoint.set_down(true);
        let recovers = {
            let endpoint = Arc::clone(&endpoint);
            runtime.spawn(async move {
                while endpoint.seen().len() < 2 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                let begun = endpoint.seen()[1].sent;
                tokio::time::sleep_until(begun + OUTAGE).await;
                endpoint.set_down(false);
                (begun, Instant::now())
            })
        };
        let (sent, waited) = self.load(
            runtime,
            &mut service,
            Duration::from_millis(8_800) - start.elapsed(),
        );
        let (begun, over) = runtime.block_on(recovers).expect("there was an outage");
        let seen = endpoint.seen();
        let failed = seen
            .iter()
            .filter(|seen| seen.sent > start && seen.sent < over);
        let run = Run::new(
            "bearer, outage",
            sent,
            waited,
            failed.count(),
            &[(begun, over)],
        );
        assert_eq!(run.waited, 0, "requests waited in an outage");
        run
    }

    /// Has the token fetched and the machine's caches filled.
    fn warm_up<S>(&self, runtime: &Runtime, service: &mut S)
    where
        S: Service<Request<Body>>,
    {
        for _ in 0..1_000 {
            let response = runtime.block_on(service.call(request()));
            assert!(response.is_ok());
        }
    }

    /// Sends the requests, and returns them with how many had to wait.
    fn load<S>(&self, runtime: &Runtime, service: &mut S, lasts: Duration) -> (Vec<Sent>, usize)
    where
        S: Service<Request<Body>>,
        S::Future: Send + 'static,
        S::Error: Send + 'static,
        S::Response: Send + 'static,
    {
        let _entered = runtime.enter();
        let (done, late) = mpsc::channel();
        let mut waited = 0;
        let period = Duration::from_secs(1) / self.rate;
        let count = (lasts.as_secs_f64() * f64::from(self.rate)) as u32;
        let mut sent = Vec::with_capacity(count as usize);
        let mut cx = Context::from_waker(Waker::noop());
        let start = Instant::now();
        for number in 0..count {
            let due = start + period * number;
            let request = request();
            while Instant::now() < due {
                spin_loop();
            }
            assert!(matches!(service.poll_ready(&mut cx), Poll::Ready(Ok(()))));
            let mut response = Box::pin(service.call(request));
            match response.as_mut().poll(&mut cx) {
                Poll::Ready(response) => {
                    assert!(black_box(response).is_ok());
                    let took = due.elapsed();
                    sent.push(Sent { due, took });
                }
                Poll::Pending => {
                    waited += 1;
                    runtime.spawn(finish(response, due, done.clone()));
                }
            }
        }
        drop(done);
        sent.extend(late);
        (sent, waited)
    }
}

/// Waits for the end of a request that has to wait.
async fn finish<F, T, E>(response: Pin<Box<F>>, due: Instant, done: mpsc::Sender<Sent>)
where
    F: Future<Output = Result<T, E>>,
{
    assert!(response.await.is_ok());
    let took = due.elapsed();
    // The sender waits for all of them.
    let _ = done.send(Sent { due, took });
}

impl Run {
    fn new(
        name: &'static str,
        sent: Vec<Sent>,
        waited: usize,
        token_requests: usize,
        windows: &[(Instant, Instant)],
    ) -> Self {
        let histogram = || Histogram::new(3).expect("three digits can be kept");
        let (mut inside, mut outside) = (histogram(), histogram());
        for Sent { due, took } in &sent {
            // A request is in a window if any part of its time is.
            let within = windows
                .iter()
                .any(|(from, to)| *due <= *to && *due + *took >= *from);
            let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
            let histogram = if within { &mut inside } else { &mut outside };
            histogram.record(nanos).expect("the histogram grows");
        }
        Self {
            name,
            sent,
            waited,
            token_requests,
            inside,
            outside,
        }
    }

    /// Combines both, with the token requests of the one that had more.
    fn and(mut self, other: Self) -> Self {
        self.sent.extend(other.sent);
        self.waited += other.waited;
        self.token_requests = self.token_requests.max(other.token_requests);
        for (all, more) in [
            (&mut self.inside, other.inside),
            (&mut self.outside, other.outside),
        ] {
            all.add(more).expect("both have the same digits");
        }
        self
    }
}

fn report(plan: &Plan, runs: &[Run], outage: &Run) {
    let mut table = Table::new(
        "latency_in_microseconds",
        &[
            "",
            "",
            "requests",
            "waited",
            "token requests",
            "p50",
            "p99",
            "p99.9",
            "p99.99",
            "max",
        ],
    );
    let fetch = ["at other times", "while a token is fetched"];
    let down = ["at other times", "while the endpoint is down"];
    let fetches = runs.iter().map(|run| (run, fetch));
    for (run, [outside, inside]) in fetches.chain(iter::once((outage, down))) {
        let windows = [(outside, &run.outside), (inside, &run.inside)];
        for (window, histogram) in windows.into_iter().filter(|(_, h)| !h.is_empty()) {
            let at = |quantile| format!("{:.1}", micros(histogram.value_at_quantile(quantile)));
            table.row([
                run.name.to_owned(),
                window.to_owned(),
                histogram.len().to_string(),
                run.waited.to_string(),
                run.token_requests.to_string(),
                at(0.5),
                at(0.99),
                at(0.999),
                at(0.9999),
                at(1.0),
            ]);
        }
    }
    let bearer = runs.last().expect("there are runs");
    let p999 = |histogram: &Histogram<u64>| micros(histogram.value_at_quantile(0.999));
    let verdict = |run: &Run| {
        let (inside, outside) = (p999(&run.inside), p999(&run.outside));
        let text = format!("p99.9 {inside:.1} µs during it, {outside:.1} µs at other times");
        (text, inside <= outside * 1.1)
    };
    let mut report = Report::new("refresh_under_load");
    let (text, same) = verdict(bearer);
    report.goal(
        &format!("expiry under {} requests/s", plan.rate),
        "1 token request per due refresh, no request waits; p99.9 during a refresh = at other times",
        format!(
            "{} refreshes, {} waited; {text}",
            bearer.token_requests - 1,
            bearer.waited
        ),
        same && bearer.waited == 0,
    );
    let (text, same) = verdict(outage);
    report.goal(
        &format!("token due but valid, 503 for 2 s, {} requests/s", plan.rate),
        "≤ 4 token requests, 0 failed calls, no call slower than usual",
        format!(
            "at most {} token requests, 0 failed; {text}",
            outage.token_requests
        ),
        same && outage.token_requests <= 4,
    );
    report.table(table);
    draw(runs);
    report.finish();
}

/// Latency over the share of requests that take longer.
fn draw(runs: &[Run]) {
    let lines: Vec<_> = runs
        .iter()
        .map(|run| {
            let mut all = run.outside.clone();
            all.add(&run.inside).expect("both have the same digits");
            // Down to the share of ten requests.
            let least = 10.0 / run.sent.len() as f64;
            let shares = iter::successors(Some(1.0), |share| Some(share / 1.3));
            let points = shares.take_while(|share| *share > least).map(|share| {
                let nanos = all.value_at_quantile(1.0 - share);
                (1.0 / share, micros(nanos.max(1)))
            });
            Line {
                name: run.name,
                points: points.collect(),
            }
        })
        .collect();
    plot::lines(
        &plot_path("refresh_under_load"),
        "Latency from when a request was due, across refreshes",
        Axis {
            name: "share of requests that take longer",
            base: 10.0,
            label: &|one_in| match one_in.round() > 1.0 {
                true => format!("1 in {one_in:.0}"),
                false => "all".to_owned(),
            },
        },
        Axis {
            name: "microseconds",
            base: 10.0,
            label: &|micros| format!("{micros}"),
        },
        &lines,
    );
}

fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1_000.0
}

/// How long a token request takes.
const FETCH: Duration = Duration::from_millis(100);
const OUTAGE: Duration = Duration::from_secs(2);
const MARGIN: Duration = Duration::from_millis(2);
