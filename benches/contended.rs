//! How many requests 1 to 64 tasks on two workers send over one cache, beside the caches that users write by hand.
//!
//! The token is fresh, or in one of the two states in which requests take the slow path but need not wait: due while its
//! replacement is in flight, and due while the token endpoint fails.

mod support;

use std::{
    future::poll_fn,
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::Request;
use support::{
    Body, DAY,
    baselines::{ArcSwapCache, ByHand, MutexCache, RwLockCache},
    endpoint::Endpoint,
    inner,
    plot::{self, Axis, Line},
    report::{Report, Table, median, plot_path},
    request, runtime, short, token_text,
};
use tokio::{
    runtime::Runtime,
    task,
    time::{self, Instant},
};
use tower::{Layer, Service, service_fn};
use tower_bearer::{BearerAuthLayer, TokenCache};
use tower_http::auth::AddAuthorizationLayer;

fn main() {
    let (rounds, slice, lifetime) = match short() {
        true => (1, Duration::from_millis(10), Duration::from_secs(5)),
        false => (11, Duration::from_millis(20), Duration::from_secs(40)),
    };
    let runtime = runtime(2);
    let mut subjects = baselines(&runtime);
    let states = runtime.block_on(States::reach(lifetime));
    let layer = |cache: &TokenCache| BearerAuthLayer::new(cache.clone()).layer(service_fn(inner));
    subjects.push(Subject::new("bearer", layer(&states.fresh)));
    subjects.push(Subject::new(
        "bearer, due, refresh under way",
        layer(&states.due),
    ));
    subjects.push(Subject::new(
        "bearer, due, endpoint fails",
        layer(&states.outage),
    ));

    for _ in 0..rounds {
        for (index, tasks) in TASKS.into_iter().enumerate() {
            for subject in &mut subjects {
                let sent = (subject.run)(&runtime, tasks, slice);
                subject.found[index].push(sent);
            }
        }
    }
    states.check();
    report(&subjects);
}

/// Three caches, each with its token in another state.
struct States {
    fresh: TokenCache,
    due: TokenCache,
    outage: TokenCache,
    hanging: Arc<Endpoint>,
    failing: Arc<Endpoint>,
}

impl States {
    async fn reach(lifetime: Duration) -> Self {
        let fresh = TokenCache::new(Endpoint::new(Duration::ZERO, DAY).source());
        let hanging = Endpoint::new(Duration::ZERO, lifetime);
        let failing = Endpoint::new(Duration::ZERO, lifetime);
        let due = TokenCache::new(hanging.source());
        let outage = TokenCache::new(failing.source());
        for cache in [&fresh, &due, &outage] {
            cache.get().await.expect("the endpoint grants a token");
        }
        failing.set_down(true);
        hanging.wait_for(usize::MAX);
        // A token is due after half of its life at the latest.
        time::sleep(lifetime / 2).await;
        for cache in [&due, &outage] {
            cache.get().await.expect("the token is still alive");
        }
        time::sleep(Duration::from_millis(20)).await;
        Self {
            fresh,
            due,
            outage,
            hanging,
            failing,
        }
    }

    /// Checks that the states lasted until everything was measured.
    fn check(&self) {
        for cache in [&self.fresh, &self.due, &self.outage] {
            assert!(cache.peek().is_some(), "a token died before the end");
        }
        let in_flight = |endpoint: &Endpoint| endpoint.seen().last().map(|s| s.answered.is_none());
        assert_eq!(in_flight(&self.hanging), Some(true));
        assert!(self.failing.seen().len() > 1);
    }
}

fn baselines(runtime: &Runtime) -> Vec<Subject> {
    let bare = service_fn(inner);
    let fixed = AddAuthorizationLayer::bearer(&token_text()).layer(bare);
    let mutex = runtime.block_on(ByHand::<_, MutexCache>::with_token(bare));
    let rwlock = runtime.block_on(ByHand::<_, RwLockCache>::with_token(bare));
    let arcswap = runtime.block_on(ByHand::<_, ArcSwapCache>::with_token(bare));
    vec![
        Subject::new("bare", bare),
        Subject::new("static header", fixed),
        Subject::new("mutex by hand", mutex),
        Subject::new("RwLock by hand", rwlock),
        Subject::new("ArcSwap by hand", arcswap),
    ]
}

/// Returns how many requests this many tasks send per second.
type Run = dyn Fn(&Runtime, usize, Duration) -> f64;

/// One service, measured in turns with the others.
struct Subject {
    name: &'static str,
    run: Box<Run>,
    /// For each number of tasks, the figures of all rounds.
    found: [Vec<f64>; TASKS.len()],
}

impl Subject {
    fn new<S>(name: &'static str, service: S) -> Self
    where
        S: Service<Request<Body>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Send,
        S::Response: Send,
    {
        let run = move |runtime: &Runtime, tasks, slice| {
            runtime.block_on(send(service.clone(), tasks, slice))
        };
        Self {
            name,
            run: Box::new(run),
            found: Default::default(),
        }
    }
}

/// Lets this many tasks send requests for as long as `slice`, each on its own clone, and returns how many they send per
/// second.
async fn send<S>(service: S, tasks: usize, slice: Duration) -> f64
where
    S: Service<Request<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    S::Response: Send,
{
    let stop = Arc::new(AtomicBool::new(false));
    let start = Instant::now();
    let tasks = (0..tasks).map(|_| {
        let (mut service, stop) = (service.clone(), Arc::clone(&stop));
        task::spawn(async move {
            let mut sent = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..TURN {
                    let ready = poll_fn(|cx| service.poll_ready(cx)).await;
                    assert!(ready.is_ok());
                    let response = service.call(request()).await;
                    assert!(black_box(response.is_ok()));
                }
                sent += TURN;
                task::yield_now().await;
            }
            sent
        })
    });
    let tasks: Vec<_> = tasks.collect();
    time::sleep(slice).await;
    stop.store(true, Ordering::Relaxed);
    let mut sent = 0;
    for task in tasks {
        sent += task.await.expect("the requests succeed");
    }
    sent as f64 / start.elapsed().as_secs_f64()
}

fn report(subjects: &[Subject]) {
    let names = TASKS.map(|tasks| format!("{tasks}"));
    let header: Vec<_> = [""]
        .into_iter()
        .chain(names.iter().map(String::as_str))
        .collect();
    let mut table = Table::new("million_requests_per_second_by_tasks", &header);
    let mut lines = Vec::new();
    for subject in subjects {
        let rates = subject
            .found
            .iter()
            .map(|found| median(&mut found.clone()) / 1e6);
        let rates: Vec<_> = rates.collect();
        let cells = rates.iter().map(|rate| format!("{rate:.2}"));
        table.row([subject.name.to_owned()].into_iter().chain(cells));
        lines.push(Line {
            name: subject.name,
            points: TASKS
                .map(|tasks| tasks as f64)
                .into_iter()
                .zip(rates)
                .collect(),
        });
    }
    plot::lines(
        &plot_path("contended"),
        "Requests that tasks on two workers send over one cache",
        Axis {
            name: "tasks",
            base: 2.0,
            label: &|tasks| format!("{tasks:.0}"),
        },
        Axis {
            name: "million requests per second",
            base: 2.0,
            label: &|rate| format!("{rate}"),
        },
        &lines,
    );
    let mut report = Report::new("contended");
    report.table(table);
    report.finish();
}

/// Requests between two checks of whether to stop.
const TURN: u64 = 32;
const TASKS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
