//! What a request that finds a token allocates, and what one that waits for a token holds.
//!
//! A program of its own, because counting takes time: nothing is timed here. Bytes are those requested from the
//! allocator.

mod support;

use std::time::Duration;

use dhat::HeapStats;
use http::Request;
use support::{
    Body, call,
    endpoint::Endpoint,
    inner,
    report::{Report, Table},
    request, short,
    subjects::{FLOOR, KEYED_FLOOR, Measure, subjects},
};
use tokio::{runtime::Builder, task, time};
use tower::{Layer, Service, service_fn};
use tower_bearer::{BearerAuthLayer, TokenCache};

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

fn main() {
    let _counting = dhat::Profiler::builder().testing().build();
    let mut report = Report::new("allocations");
    per_request(&mut report);
    per_waiter(&mut report);
    report.finish();
}

/// What one service allocates for a request.
struct Found {
    name: &'static str,
    kept: u64,
    cloned: u64,
}

impl Measure for Vec<Found> {
    fn measure<S>(&mut self, name: &'static str, service: S, request: fn() -> Request<Body>)
    where
        S: Service<Request<Body>> + Clone + Send + Sync + 'static,
    {
        let mut kept = service.clone();
        // A service that is used often makes its own copy of each new token.
        for _ in 0..16 {
            call(&mut kept, request());
        }
        self.push(Found {
            name,
            kept: blocks(&mut |request| call(&mut kept, request), request),
            cloned: blocks(&mut |request| call(&mut service.clone(), request), request),
        });
    }
}

/// How many blocks a request allocates.
fn blocks(send: &mut dyn FnMut(Request<Body>), request: fn() -> Request<Body>) -> u64 {
    let requests: Vec<_> = (0..REQUESTS).map(|_| request()).collect();
    let before = HeapStats::get().total_blocks;
    requests.into_iter().for_each(send);
    (HeapStats::get().total_blocks - before) / REQUESTS
}

fn per_request(report: &mut Report) {
    let mut all = Vec::new();
    let _watch = subjects(&mut all);
    let mut table = Table::new(
        "per_request",
        &[
            "",
            "kept",
            "by the middleware",
            "cloned",
            "by the middleware",
        ],
    );
    let floor = |found: &Found| {
        let name = if found.name.starts_with("keyed") {
            KEYED_FLOOR
        } else {
            FLOOR
        };
        let floor = all.iter().find(|found| found.name == name);
        floor.expect("it was measured")
    };
    for found in &all {
        // `http` allocates the map for a request's first header, whoever inserts it.
        table.row([
            found.name.to_owned(),
            found.kept.to_string(),
            found.kept.saturating_sub(floor(found).kept).to_string(),
            found.cloned.to_string(),
            found.cloned.saturating_sub(floor(found).cloned).to_string(),
        ]);
    }
    for found in all
        .iter()
        .filter(|found| ["bearer", "bearer with origins"].contains(&found.name))
    {
        let ours = [
            found.kept - floor(found).kept,
            found.cloned - floor(found).cloned,
        ];
        assert_eq!(ours, [0, 0], "{} allocates", found.name);
    }
    report.goal(
        "a valid token is cached",
        "0 allocations by the layer",
        "0 kept, 0 cloned".to_owned(),
        true,
    );
    report.table(table);
}

fn per_waiter(report: &mut Report) {
    let waiters = if short() { 1_000 } else { 100_000 };
    let mut table = Table::new(
        "per_waiter",
        &[
            "waiters",
            "sleeping task, bytes",
            "waiting task, bytes",
            "difference",
        ],
    );
    let (bare, ours) = (held(waiters, sleep_and_call), held(waiters, call_and_wait));
    let mut row = |what: &str, bare: u64, ours: u64| {
        let cells = [bare, ours, ours.saturating_sub(bare)];
        let cells = cells.iter().map(ToString::to_string);
        table.row([format!("{waiters} {what}")].into_iter().chain(cells));
    };
    row("requests through the layer", bare, ours);
    row(
        "callers of `TokenCache::get`",
        held(waiters, sleep),
        held(waiters, get),
    );
    let over = ours.saturating_sub(bare);
    report.goal(
        &format!("{waiters} callers wait for a token"),
        "≤ 400 B per waiter more than the bare task",
        format!("{over} B"),
        over <= 400,
    );
    report.table(table);
}

/// How many bytes each of the tasks that `spawn` spawns holds while all of them wait.
fn held<F: Fn()>(waiters: u64, spawn: fn(TokenCache) -> F) -> u64 {
    let runtime = Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime can be built").block_on(async {
        let endpoint = Endpoint::new(Duration::ZERO, HOUR);
        // It never answers.
        endpoint.wait_for(1);
        let spawn = spawn(TokenCache::new(endpoint.source()));
        // Starts the flight before its waiters are counted.
        spawn();
        time::sleep(Duration::from_millis(5)).await;
        let before = HeapStats::get().curr_bytes;
        for _ in 0..waiters {
            spawn();
            task::yield_now().await;
        }
        time::sleep(Duration::from_millis(5)).await;
        let bytes = HeapStats::get().curr_bytes - before;
        u64::try_from(bytes).unwrap_or(u64::MAX) / waiters
    })
}

/// The bare task, which holds a request and sleeps.
fn sleep_and_call(_: TokenCache) -> impl Fn() {
    || {
        let mut service = service_fn(inner);
        task::spawn(async move {
            let request = request();
            time::sleep(HOUR).await;
            service.call(request).await
        });
    }
}

fn call_and_wait(cache: TokenCache) -> impl Fn() {
    let service = BearerAuthLayer::new(cache).layer(service_fn(inner));
    move || {
        let mut service = service.clone();
        task::spawn(async move { service.call(request()).await });
    }
}

fn sleep(_: TokenCache) -> impl Fn() {
    || drop(task::spawn(time::sleep(HOUR)))
}

fn get(cache: TokenCache) -> impl Fn() {
    move || {
        let cache = cache.clone();
        task::spawn(async move { cache.get().await });
    }
}

const REQUESTS: u64 = 256;
const HOUR: Duration = Duration::from_secs(3_600);
