//! What it costs a request to find a valid token, beside the same request without one, with a static header, and
//! with the caches that users write by hand.
//!
//! The inner service only takes the request, so that the middleware is measured. `kept` calls one service repeatedly;
//! `cloned` clones it for each request, as an HTTP client that hands out clones does. A `keyed` request has a
//! `TokenRequest` among its extensions.
//!
//! Criterion measures one thread, one subject after the other. The ratios come from rounds in which every subject has
//! its turn, on one thread and on two at once, so that other work of the machine affects all alike. Two threads have a
//! service each, or clone one for all their requests.
#![expect(missing_docs, reason = "a macro of criterion's makes the function")]

mod support;

use std::{
    future::poll_fn,
    hint::black_box,
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};

use criterion::{BatchSize, Criterion, criterion_group};
use http::Request;
use support::{
    Body, call, plot,
    report::{Report, Table, median, plot_path},
    short,
    subjects::{FLOOR, KEYED_FLOOR, Measure, subjects},
};
use tokio::runtime;
use tower::Service;

criterion_group! {
    name = criterion;
    config = match short() {
        true => Criterion::default()
            .sample_size(10)
            .warm_up_time(Duration::from_millis(5))
            .measurement_time(Duration::from_millis(20)),
        false => Criterion::default()
            .warm_up_time(Duration::from_secs(1))
            .measurement_time(Duration::from_secs(2)),
    };
    targets = one_thread
}

fn main() {
    criterion();
    rounds();
}

impl Measure for Criterion {
    fn measure<S>(&mut self, name: &'static str, service: S, request: fn() -> Request<Body>)
    where
        S: Service<Request<Body>> + Clone + Send + Sync + 'static,
    {
        let mut kept = service.clone();
        self.bench_function(&format!("kept/{name}"), |b| {
            b.iter_batched(
                request,
                |request| call(&mut kept, request),
                BatchSize::SmallInput,
            );
        });
        self.bench_function(&format!("cloned/{name}"), |b| {
            b.iter_batched(
                request,
                |request| call(&mut service.clone(), request),
                BatchSize::SmallInput,
            );
        });
    }
}

fn one_thread(criterion: &mut Criterion) {
    drop(subjects(criterion));
}

/// One service, measured in turns with the others.
struct Subject {
    name: &'static str,
    /// Returns the nanoseconds that a request takes in the round of this number.
    run: Box<dyn Fn(Way, usize, Duration) -> f64>,
    /// For each way, the figures of all rounds.
    found: [Vec<f64>; WAYS.len()],
}

/// How the requests are sent.
#[derive(Clone, Copy)]
struct Way {
    cloned: bool,
    /// Whether all threads clone the same service.
    shared: bool,
    threads: usize,
}

impl Way {
    const fn new(cloned: bool, shared: bool, threads: usize) -> Self {
        Self {
            cloned,
            shared,
            threads,
        }
    }
}

impl Measure for Vec<Subject> {
    fn measure<S>(&mut self, name: &'static str, service: S, request: fn() -> Request<Body>)
    where
        S: Service<Request<Body>> + Clone + Send + Sync + 'static,
    {
        let service = Arc::new(service);
        let run = move |way: Way, round, slice| {
            let start = Arc::new(Barrier::new(way.threads));
            let threads = (0..way.threads).map(|_| {
                let (service, start) = (Arc::clone(&service), Arc::clone(&start));
                thread::spawn(move || {
                    // A caller of a contended lock waits.
                    let runtime = runtime::Builder::new_current_thread().build();
                    let runtime = runtime.expect("a runtime can be built");
                    let run = || runtime.block_on(send(&*service, request, way, slice, &start));
                    deeper(round % DEPTHS, &run)
                })
            });
            let threads: Vec<_> = threads.collect();
            let took = threads
                .into_iter()
                .map(|thread| thread.join().expect("the requests succeed"));
            took.sum::<f64>() / way.threads as f64
        };
        self.push(Subject {
            name,
            run: Box::new(run),
            found: Default::default(),
        });
    }
}

/// Runs something deeper in the stack.
///
/// How fast requests are moved depends on their addresses relative to each other modulo a page, which would be the same
/// in all rounds of a build: that can change a request by up to 20 ns.
#[inline(never)]
fn deeper(by: usize, run: &dyn Fn() -> f64) -> f64 {
    let room = black_box([0_u8; 256 - 64]);
    match by {
        0 => run(),
        _ => deeper(by - 1, run) + f64::from(black_box(room[0])),
    }
}

/// Sends requests for about as long as `slice`, and returns how many nanoseconds each took.
async fn send<S>(
    shared: &S,
    request: fn() -> Request<Body>,
    way: Way,
    slice: Duration,
    start: &Barrier,
) -> f64
where
    S: Service<Request<Body>> + Clone,
{
    let mut own = shared.clone();
    for _ in 0..BATCH {
        one(&mut own, request()).await;
    }
    start.wait();
    let (mut took, mut sent) = (Duration::ZERO, 0);
    while took < slice {
        let requests: Vec<_> = (0..BATCH).map(|_| request()).collect();
        let start = Instant::now();
        for request in requests {
            match (way.cloned, way.shared) {
                (false, _) => one(&mut own, request).await,
                (true, false) => one(&mut own.clone(), request).await,
                (true, true) => one(&mut shared.clone(), request).await,
            }
        }
        took += start.elapsed();
        sent += BATCH;
    }
    took.as_nanos() as f64 / f64::from(sent)
}

async fn one<S: Service<Request<Body>>>(service: &mut S, request: Request<Body>) {
    let ready = poll_fn(|cx| service.poll_ready(cx)).await;
    assert!(ready.is_ok());
    assert!(black_box(service.call(request).await).is_ok());
}

fn rounds() {
    let (rounds, slice) = match short() {
        true => (3, Duration::from_micros(500)),
        false => (41, Duration::from_millis(15)),
    };
    let mut all = Vec::new();
    let _watch = subjects(&mut all);
    for round in 0..rounds {
        for (index, way) in WAYS.into_iter().enumerate() {
            for subject in &mut all {
                let took = (subject.run)(way, round, slice);
                subject.found[index].push(took);
            }
        }
    }
    report(&all);
}

fn report(all: &[Subject]) {
    let find = |name: &str| {
        let found = all.iter().find(|subject| subject.name == name);
        found.expect("it was measured")
    };
    let (bare, floor, keyed_floor) = (find("bare"), find(FLOOR), find(KEYED_FLOOR));
    let mut table = Table::new(
        "one_and_two_threads",
        &[
            "",
            "kept, ns",
            "× static",
            "cloned, ns",
            "× static",
            "kept, 2 ÷ 1 threads",
            "cloned, 2 ÷ 1 threads",
            "clones of one, 2 ÷ 1 threads",
        ],
    );
    for subject in all {
        let floor = match subject.name.starts_with("keyed") {
            true => keyed_floor,
            false => floor,
        };
        table.row([
            subject.name.to_owned(),
            format!("{:.0}", subject.time(0)),
            format!("{:.2}", subject.ratio(0, floor)),
            format!("{:.0}", subject.time(1)),
            format!("{:.2}", subject.ratio(1, floor)),
            format!("{:.2}", subject.scaling(0, 2)),
            format!("{:.2}", subject.scaling(1, 3)),
            format!("{:.2}", subject.scaling(1, 4)),
        ]);
    }
    let mut report = Report::new("fresh_token");
    let bearer = find("bearer");
    for (work, subject, way, goal) in [
        ("a valid token is cached, service kept", bearer, 0, 1.08),
        ("the same, service cloned per request", bearer, 1, 1.15),
        (
            "replay on, service kept",
            find("bearer with replay"),
            0,
            1.35,
        ),
    ] {
        let ratio = subject.ratio(way, floor);
        let goal_text = format!("≤ {goal} × static header in time");
        report.goal(work, &goal_text, format!("{ratio:.2} ×"), ratio <= goal);
    }
    for (work, one, two) in [
        ("on 2 threads, kept", 0, 2),
        ("on 2 threads, cloned", 1, 3),
        ("on 2 threads, clones of one service", 1, 4),
    ] {
        let (ours, least) = (bearer.scaling(one, two), bare.scaling(one, two));
        let measured = format!("{ours:.2}, bare {least:.2}");
        // A ratio of two ratios is not more exact than that.
        report.goal(
            work,
            "scaling of the bare service",
            measured,
            ours >= 0.97 * least,
        );
    }
    report.table(table);
    for (name, way, title) in [
        (
            "fresh_token_kept",
            0,
            "A request that finds a token, service kept",
        ),
        (
            "fresh_token_cloned",
            1,
            "A request that finds a token, service cloned for it",
        ),
    ] {
        let bars: Vec<_> = all
            .iter()
            .map(|subject| (subject.name.to_owned(), subject.time(way)))
            .collect();
        plot::bars(&plot_path(name), title, "ns", &bars);
    }
    report.finish();
}

impl Subject {
    fn time(&self, way: usize) -> f64 {
        median(&mut self.found[way].clone())
    }

    /// How many times as long as `other` it takes, in the median round.
    fn ratio(&self, way: usize, other: &Self) -> f64 {
        let pairs = self.found[way].iter().zip(&other.found[way]);
        median(
            &mut pairs
                .map(|(ours, theirs)| ours / theirs)
                .collect::<Vec<_>>(),
        )
    }

    /// How many times as many requests two threads send in the way `two` as one thread does in the way `one`.
    fn scaling(&self, one: usize, two: usize) -> f64 {
        let pairs = self.found[one].iter().zip(&self.found[two]);
        median(&mut pairs.map(|(one, two)| 2.0 * one / two).collect::<Vec<_>>())
    }
}

const BATCH: u32 = 64;
const DEPTHS: usize = 16;
const WAYS: [Way; 5] = [
    Way::new(false, false, 1),
    Way::new(true, false, 1),
    Way::new(false, false, 2),
    Way::new(true, false, 2),
    Way::new(true, true, 2),
];
