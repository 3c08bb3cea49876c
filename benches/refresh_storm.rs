//! Many callers wait for one token: how soon the last of them goes on, and how many token requests they cause.
//!
//! They are measured beside as many tasks that sleep instead. In one half, the token request takes 50 ms, after which no
//! caller has to wait; in the other, it lasts until the last caller has arrived, so that all of them wait.

mod support;

use std::{
    future::poll_fn,
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use support::{
    DAY,
    endpoint::Endpoint,
    inner,
    plot::{self, Axis, Line},
    report::{Report, Table, median, millis, plot_path},
    request, short,
};
use tokio::{
    runtime::Builder,
    sync::{oneshot, watch},
    task,
    time::{self, Instant},
};
use tower::{Layer, Service, service_fn};
use tower_bearer::{BearerAuthLayer, TokenCache};

fn main() {
    let (crowds, rounds): (&[usize], _) = match short() {
        true => (&[1, 100, 10_000], 1),
        false => (&[1, 100, 1_000, 10_000, 100_000], 9),
    };
    let mut found: Vec<_> = crowds.iter().map(|crowd| Found::of(*crowd)).collect();
    for _ in 0..rounds {
        for found in &mut found {
            let crowd = found.crowd;
            found.sleepers_total.push(alone(sleepers(crowd)));
            found.callers_total.push(alone(callers(crowd)));
            found.sleepers_after.push(alone(woken(crowd)));
            found.callers_after.push(alone(waiters(crowd)));
        }
    }
    report(&mut found, rounds);
}

/// Runs `work` on two workers that nothing else has used.
///
/// A crowd leaves behind as many free blocks as it had tasks, and the allocator tidies them when it is next asked for a
/// larger one, such as a token. This asks for one, so that no measurement pays for the one before it.
fn alone(work: impl Future<Output = f64>) -> f64 {
    let tidy = || drop(black_box(vec![0_u8; 64 * 1_024]));
    tidy();
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .on_thread_start(tidy)
        .build()
        .expect("a runtime can be built");
    thread::sleep(FETCH);
    runtime.block_on(work)
}

/// Milliseconds of each round.
struct Found {
    crowd: usize,
    /// From the first task's start until the last task is done.
    callers_total: Vec<f64>,
    sleepers_total: Vec<f64>,
    /// From the token's arrival until the last task is done.
    callers_after: Vec<f64>,
    sleepers_after: Vec<f64>,
}

impl Found {
    fn of(crowd: usize) -> Self {
        Self {
            crowd,
            callers_total: Vec::new(),
            sleepers_total: Vec::new(),
            callers_after: Vec::new(),
            sleepers_after: Vec::new(),
        }
    }
}

/// Records when the last task of a crowd is done.
struct Crowd {
    left: AtomicUsize,
    done: watch::Sender<Option<Instant>>,
}

impl Crowd {
    fn of(size: usize) -> Arc<Self> {
        Arc::new(Self {
            left: AtomicUsize::new(size),
            done: watch::Sender::new(None),
        })
    }

    fn leave(&self) {
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.done.send_replace(Some(Instant::now()));
        }
    }

    async fn last(&self) -> Instant {
        let mut done = self.done.subscribe();
        let last = done.wait_for(Option::is_some).await.map(|last| *last);
        last.ok().flatten().expect("the last one is done")
    }
}

/// Tasks that sleep for as long as the token request takes, and then send a request without a token.
async fn sleepers(size: usize) -> f64 {
    let crowd = Crowd::of(size);
    let start = Instant::now();
    for _ in 0..size {
        let crowd = Arc::clone(&crowd);
        task::spawn(async move {
            time::sleep(FETCH).await;
            let response = service_fn(inner).call(request()).await;
            assert!(response.is_ok());
            crowd.leave();
        });
    }
    millis(crowd.last().await - start)
}

/// Tasks that send a request while there is no token.
async fn callers(size: usize) -> f64 {
    let endpoint = Endpoint::new(FETCH, DAY);
    let crowd = Crowd::of(size);
    let start = Instant::now();
    spawn_callers(&endpoint, &crowd, size);
    let took = crowd.last().await - start;
    assert_eq!(endpoint.seen().len(), 1, "token requests of {size} callers");
    millis(took)
}

/// The same with a token that arrives once all of them wait for it.
async fn waiters(size: usize) -> f64 {
    let endpoint = Endpoint::new(FETCH, DAY);
    endpoint.wait_for(size);
    let crowd = Crowd::of(size);
    spawn_callers(&endpoint, &crowd, size);
    let last = crowd.last().await;
    assert_eq!(endpoint.seen().len(), 1, "token requests of {size} waiters");
    millis(last.saturating_duration_since(endpoint.answered()))
}

/// As many tasks that sleep until a moment by which all of them are asleep.
async fn woken(size: usize) -> f64 {
    let crowd = Crowd::of(size);
    let asleep = Arc::new(AtomicUsize::new(0));
    // Longer than it takes to put that many tasks to sleep.
    let moment =
        Instant::now() + FETCH + Duration::from_micros(5) * u32::try_from(size).unwrap_or(0);
    for _ in 0..size {
        let (crowd, asleep) = (Arc::clone(&crowd), Arc::clone(&asleep));
        task::spawn(async move {
            let sleep = time::sleep_until(moment);
            asleep.fetch_add(1, Ordering::Relaxed);
            sleep.await;
            let response = service_fn(inner).call(request()).await;
            assert!(response.is_ok());
            crowd.leave();
        });
    }
    let last = crowd.last().await;
    assert_eq!(asleep.load(Ordering::Relaxed), size);
    millis(last - moment)
}

fn spawn_callers(endpoint: &Arc<Endpoint>, crowd: &Arc<Crowd>, size: usize) {
    let cache = TokenCache::new(endpoint.source());
    let service = BearerAuthLayer::new(cache).layer(service_fn(inner));
    for _ in 0..size {
        let mut service = service.clone();
        let (endpoint, crowd) = (Arc::clone(endpoint), Arc::clone(crowd));
        task::spawn(async move {
            let ready = poll_fn(|cx| service.poll_ready(cx)).await;
            assert!(ready.is_ok());
            let response = service.call(request());
            endpoint.arrive();
            assert!(response.await.is_ok());
            crowd.leave();
        });
    }
}

/// If `dropped`, drops the caller that started the token request halfway through it. Returns how long after the start the
/// last of the others is done.
async fn first_dropped(size: usize, dropped: bool) -> f64 {
    let endpoint = Endpoint::new(FETCH, DAY);
    let cache = TokenCache::new(endpoint.source());
    let mut service = BearerAuthLayer::new(cache).layer(service_fn(inner));
    let crowd = Crowd::of(size);
    let (begun, first_is_waiting) = oneshot::channel();
    let start = Instant::now();
    let first = {
        let mut service = service.clone();
        task::spawn(async move {
            let mut response = Box::pin(service.call(request()));
            let waits =
                poll_fn(|cx| std::task::Poll::Ready(response.as_mut().poll(cx).is_pending()));
            assert!(waits.await, "there is no token");
            assert!(begun.send(()).is_ok());
            assert!(response.await.is_ok());
        })
    };
    first_is_waiting.await.expect("the first caller waits");
    for _ in 0..size {
        let response = service.call(request());
        let crowd = Arc::clone(&crowd);
        task::spawn(async move {
            assert!(response.await.is_ok());
            crowd.leave();
        });
    }
    time::sleep_until(start + FETCH / 2).await;
    if dropped {
        first.abort();
    }
    let took = crowd.last().await - start;
    assert_eq!(first.await.is_err(), dropped);
    assert_eq!(endpoint.seen().len(), 1, "token requests");
    millis(took)
}

fn report(found: &mut [Found], rounds: u32) {
    let mut table = Table::new(
        "waiters",
        &[
            "callers",
            "token requests",
            "all served, ms",
            "all slept, ms",
            "ratio",
            "arrival to last, ms",
            "alarm to last sleeper, ms",
        ],
    );
    let mut report = Report::new("refresh_storm");
    let mut rounds_table = Table::new(
        "rounds",
        &["callers", "served", "slept", "arrival", "alarm"],
    );
    for found in found.iter() {
        for round in 0..found.callers_total.len() {
            let figures = [
                &found.callers_total,
                &found.sleepers_total,
                &found.callers_after,
                &found.sleepers_after,
            ];
            let figures = figures.map(|figures| format!("{:.3}", figures[round]));
            rounds_table.row([found.crowd.to_string()].into_iter().chain(figures));
        }
    }
    report.detail(rounds_table);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for found in found.iter_mut() {
        let ratios = found.callers_total.iter().zip(&found.sleepers_total);
        let ratio = median(
            &mut ratios
                .map(|(ours, theirs)| ours / theirs)
                .collect::<Vec<_>>(),
        );
        let callers = median(&mut found.callers_total);
        let sleepers = median(&mut found.sleepers_total);
        let after = median(&mut found.callers_after);
        let alarm = median(&mut found.sleepers_after);
        table.row([
            found.crowd.to_string(),
            "1".to_owned(),
            format!("{callers:.1}"),
            format!("{sleepers:.1}"),
            format!("{ratio:.2}"),
            format!("{after:.2}"),
            format!("{alarm:.2}"),
        ]);
        ours.push((found.crowd as f64, after.max(0.001)));
        theirs.push((found.crowd as f64, alarm.max(0.001)));
        if found.crowd == 100_000 {
            report.goal(
                "100,000 callers, no token, a fetch of 50 ms",
                "1 token request, the last served ≤ 10 % later than as many sleepers",
                format!("1 token request, {:+.0} %", (ratio - 1.0) * 100.0),
                ratio <= 1.1,
            );
        }
    }
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for (dropped, times) in [false, true].into_iter().zip(&mut times) {
            times.push(alone(first_dropped(1_000, dropped)));
        }
    }
    let [undisturbed, dropped] = times.map(|mut times| median(&mut times));
    report.goal(
        "first caller of 1,000 dropped halfway through the fetch",
        "1 token request, nobody delayed",
        format!(
            "1 token request, all served after {dropped:.1} ms, undisturbed {undisturbed:.1} ms"
        ),
        dropped <= undisturbed * 1.05,
    );
    plot::lines(
        &plot_path("refresh_storm"),
        "From the token's arrival until the last waiter goes on",
        Axis {
            name: "waiters",
            base: 10.0,
            label: &|waiters| format!("{waiters:.0}"),
        },
        Axis {
            name: "milliseconds",
            base: 10.0,
            label: &|millis| format!("{millis}"),
        },
        &[
            Line {
                name: "bearer",
                points: ours,
            },
            Line {
                name: "sleeping tasks, from their alarm",
                points: theirs,
            },
        ],
    );
    report.table(table);
    report.finish();
}

const FETCH: Duration = Duration::from_millis(50);
