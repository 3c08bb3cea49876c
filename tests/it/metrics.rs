//! What the metrics say to a recorder of this thread.

use std::{
    collections::BTreeMap,
    future::Future,
    pin::pin,
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Wake, Waker},
    thread,
};

use http::Request;
use metrics::{
    Counter, Gauge, GaugeFn, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit,
};
use metrics_exporter_prometheus::PrometheusBuilder;
use metrics_util::{
    MetricKind,
    debugging::{DebugValue, DebuggingRecorder, Snapshotter},
};
use tokio::{sync::Semaphore, time};
use tower::{Layer, Service, ServiceExt, limit::GlobalConcurrencyLimitLayer};
use tower_bearer::{
    BearerAuth, BearerAuthLayer, ClientCredentials, CloneBody, Never, RefreshPolicy, TokenCache,
    TokenError, TokenRequest, WithoutToken,
};

use crate::support::{
    Answer, Api, AuthServer, TokenEndpoint, all, caller, current_thread, get, get_path, millis,
    now, poll_once, reply, secs, settle, token_error,
};

/// The metrics recorded since the last read, gauges included.
struct Read(BTreeMap<String, DebugValue>);

impl Read {
    fn from(snapshotter: &Snapshotter) -> Self {
        let metrics = snapshotter.snapshot().into_vec();
        let named = metrics.into_iter().map(|(key, _, _, value)| {
            let key = key.key();
            let labels = key
                .labels()
                .map(|label| format!(",{}={}", label.key(), label.value()));
            (
                format!("{}{}", key.name(), labels.collect::<String>()),
                value,
            )
        });
        Self(named.collect())
    }

    fn counter(&self, name: &str) -> u64 {
        match self.0.get(&format!("tower_bearer_{name}")) {
            Some(DebugValue::Counter(value)) => *value,
            None => 0,
            other => panic!("{name}: {other:?}"),
        }
    }

    fn gauge(&self, name: &str) -> f64 {
        match self.0.get(&format!("tower_bearer_{name}")) {
            Some(DebugValue::Gauge(value)) => value.into_inner(),
            other => panic!("{name}: {other:?}"),
        }
    }

    fn histogram(&self, name: &str) -> Vec<f64> {
        match self.0.get(&format!("tower_bearer_{name}")) {
            Some(DebugValue::Histogram(values)) => {
                values.iter().map(|value| value.into_inner()).collect()
            }
            None => Vec::new(),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn requests_are_counted_by_the_token_they_find() {
    let recorder = DebuggingRecorder::new();
    let read = || Read::from(&recorder.snapshotter());
    let _guard = metrics::set_default_local_recorder(&recorder);
    let server = AuthServer::new();
    let layer = BearerAuthLayer::new(server.clone())
        .origins(["http://localhost"])
        .unwrap();
    let mut client = layer.layer(Api::echoing());
    let requests = |token: &str| format!("requests_total,cache=default,token={token}");

    client.call_one().await;
    assert_eq!(read().counter(&requests("waited")), 1);
    settle().await;
    // From one service, which keeps the token, and from clones used once.
    for _ in 0..1_000 {
        client.call_one().await;
        client.clone().call_one().await;
    }
    let fresh = read();
    assert_eq!(fresh.counter(&requests("fresh")), 2_000);
    assert_eq!(fresh.counter(&requests("due")), 0);
    // One in 64 records how long its token may still be sent.
    let remaining = fresh.histogram("token_remaining_seconds,cache=default");
    assert!((10..=70).contains(&remaining.len()), "{}", remaining.len());
    assert!(
        remaining
            .iter()
            .all(|remaining| (289.0..=290.0).contains(remaining))
    );

    for token in ["waited", "fresh"] {
        let mut keyed = get();
        keyed
            .extensions_mut()
            .insert(TokenRequest::new().scope("a"));
        client.call(keyed).await.unwrap();
        assert_eq!(read().counter(&requests(token)), 1);
    }

    let mut bare = get();
    bare.extensions_mut().insert(WithoutToken);
    client.clone().oneshot(bare).await.unwrap();
    let elsewhere = Request::get("https://other.example")
        .body(String::new())
        .unwrap();
    client.clone().oneshot(elsewhere).await.unwrap();
    assert_eq!(read().counter(&requests("bare")), 2);
    let client_of_all = BearerAuthLayer::new(client.cache().clone()).layer(Api::echoing());
    let plain = Request::get("http://api.example.com")
        .body(String::new())
        .unwrap();
    client_of_all.oneshot(plain).await.unwrap_err();
    assert_eq!(read().counter(&requests("refused")), 1);

    server.set(Answer::Fail(TokenError::terminal("no")));
    time::sleep(secs(285)).await;
    client.call_one().await;
    assert_eq!(read().counter(&requests("due")), 1);
    time::sleep(secs(10)).await;
    for _ in 0..2 {
        client.clone().oneshot(get()).await.unwrap_err();
    }
    assert_eq!(read().counter(&requests("failed")), 2);
}

trait CallOne {
    async fn call_one(&mut self);
}

impl<S> CallOne for S
where
    S: Service<Request<String>>,
    S::Error: std::fmt::Debug,
{
    async fn call_one(&mut self) {
        self.ready().await.unwrap();
        self.call(get_path("one")).await.map(drop).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn token_requests_are_counted_by_grant_and_outcome_and_flights_are_timed() {
    let recorder = DebuggingRecorder::new();
    let read = || Read::from(&recorder.snapshotter());
    let _guard = metrics::set_default_local_recorder(&recorder);
    let server = AuthServer::new();
    server.set_latency(millis(250));
    server.set_refresh_tokens(true);
    let policy = RefreshPolicy::new().name("billing");
    let cache = TokenCache::with_policy(server.clone(), policy);
    cache.get().await.unwrap();
    let granted = read();
    assert_eq!(
        granted.counter("token_requests_total,cache=billing,grant=custom,outcome=granted"),
        1
    );
    assert_eq!(
        granted.histogram("flight_duration_seconds,cache=billing,outcome=granted"),
        [0.25]
    );

    server.set(Answer::Fail(TokenError::transient("down")));
    time::sleep(secs(295)).await;
    cache.get().await.unwrap_err();
    let failed = read();
    assert_eq!(
        failed.counter("token_requests_total,cache=billing,grant=custom,outcome=failed"),
        3
    );
    let took = failed.histogram("flight_duration_seconds,cache=billing,outcome=failed");
    assert!(took.len() == 1 && took[0] >= 0.75, "{took:?}");
}

/// Nor is it a timeout.
#[tokio::test(start_paused = true)]
async fn a_token_request_ended_by_a_shutdown_is_no_failure() {
    let recorder = DebuggingRecorder::new();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let server = AuthServer::new();
    server.set(Answer::Hang);
    let cache = TokenCache::new(server.clone());
    let waits = caller(&cache);
    time::sleep(millis(250)).await;
    assert_eq!(server.in_flight(), 1);
    cache.shutdown();
    assert!(waits.await.unwrap().unwrap_err().is_shut_down());
    settle().await;
    let read = Read::from(&recorder.snapshotter());
    let counted = read.0.keys().find(|name| name.contains("token_requests"));
    assert_eq!(counted, None);
    assert_eq!(
        read.histogram("flight_duration_seconds,cache=default,outcome=shut_down"),
        [0.25]
    );
}

/// A refresh token that is refused counts as well.
#[tokio::test(start_paused = true)]
async fn token_requests_are_counted_by_the_grant_used() {
    let recorder = DebuggingRecorder::new();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let endpoint = TokenEndpoint::new(|request| async move {
        let mut pairs = request.body().split('&');
        // Only the first refresh token is good.
        let next = match pairs.find_map(|pair| pair.strip_prefix("refresh_token=")) {
            None => 1,
            Some("1") => 2,
            Some(_) => return reply(400, r#"{"error":"invalid_grant"}"#),
        };
        reply(
            200,
            format!(
                r#"{{"access_token":"a{next}","token_type":"Bearer","expires_in":300,"refresh_token":"{next}"}}"#
            ),
        )
    });
    let source = ClientCredentials::builder("https://as.example/token", "client-id")
        .client_secret("secret")
        .build_with(endpoint)
        .unwrap();
    let cache = TokenCache::new(source);
    for _ in 0..3 {
        cache.get().await.unwrap();
        time::sleep(secs(295)).await;
    }
    let read = Read::from(&recorder.snapshotter());
    let counted = |grant: &str, outcome: &str| {
        read.counter(&format!(
            "token_requests_total,cache=default,grant={grant},outcome={outcome}"
        ))
    };
    assert_eq!(counted("client_credentials", "granted"), 2);
    assert_eq!(counted("refresh_token", "granted"), 1);
    // The server refused it.
    assert_eq!(counted("refresh_token", "rejected"), 1);
}

/// To a scraper that saw no zero, a first count is no increase.
#[tokio::test(start_paused = true)]
async fn counters_for_alerts_start_at_zero() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let _cache = TokenCache::new(AuthServer::new());
    let text = recorder.handle().render();
    let decisions = ["started", "joined", "replay", "passed"];
    let refusals = decisions.map(|decision| {
        format!(r#"tower_bearer_token_refusals_total{{cache="default",decision="{decision}"}} 0"#)
    });
    let replays = r#"tower_bearer_replays_total{cache="default"} 0"#.to_owned();
    for line in refusals.into_iter().chain([replays]) {
        assert!(text.lines().any(|it| it == line), "no {line} in {text}");
    }
}

/// With a recorder whose gauges keep their values.
#[tokio::test(start_paused = true)]
async fn gauges_show_waits_keys_and_gates() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let gauge = |name: &str| -> u32 {
        let text = recorder.handle().render();
        let name = format!("tower_bearer_{name}{{cache=\"default\"}} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&name));
        let value = value.unwrap_or_else(|| panic!("no {name} in {text}"));
        value.parse().unwrap()
    };
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    assert_eq!(gauge("waiting_requests"), 0);
    server.hold();
    let waiting: Vec<_> = (0..5).map(|_| caller(&cache)).collect();
    let given_up = caller(&cache);
    settle().await;
    assert_eq!(gauge("waiting_requests"), 6);
    given_up.abort();
    settle().await;
    assert_eq!(gauge("waiting_requests"), 5);
    server.release();
    all(waiting).await;
    assert_eq!(gauge("waiting_requests"), 0);
    // Those that wait a second for a replacement count as well.
    server.hold();
    cache.invalidate(&cache.peek().unwrap());
    let waiting: Vec<_> = (0..2).map(|_| caller(&cache)).collect();
    settle().await;
    assert_eq!(gauge("waiting_requests"), 2);
    all(waiting).await;
    assert_eq!(gauge("waiting_requests"), 0);
    server.release();
    settle().await;

    let key = |name: &str| TokenRequest::new().scope(name);
    for name in ["a", "b"] {
        cache.get_for(&key(name)).await.unwrap();
    }
    assert_eq!(gauge("keys"), 2);
    assert_eq!(gauge("closed_gates"), 0);
    server.set(Answer::Fail(TokenError::terminal("no")));
    for name in ["c", "d"] {
        cache.get_for(&key(name)).await.unwrap_err();
    }
    assert_eq!(gauge("keys"), 4);
    assert_eq!(gauge("closed_gates"), 2);
    server.set(Answer::Grant(secs(300)));
    time::sleep(secs(6)).await;
    cache.get_for(&key("c")).await.unwrap();
    assert_eq!(gauge("closed_gates"), 1);
    drop(cache);
    settle().await;
    assert_eq!(gauge("keys"), 0);
    assert_eq!(gauge("closed_gates"), 0);

    let small = TokenCache::with_policy(server, RefreshPolicy::new().max_keys(2));
    for name in ["a", "b"] {
        small.get_for(&key(name)).await.unwrap();
    }
    small.get_for(&key("c")).await.unwrap_err();
    assert_eq!(gauge("keys"), 2);
    time::sleep(secs(300)).await;
    small.get_for(&key("c")).await.unwrap();
    assert_eq!(gauge("keys"), 1);
    small.shutdown();
    assert_eq!(gauge("keys"), 0);
}

/// A lost flight closes the gate, like a failed one.
#[test]
fn a_lost_flight_counts_as_a_closed_gate() {
    let level = Arc::<AtomicU64>::default();
    let recorder = Single("tower_bearer_closed_gates", level.clone());
    let _guard = metrics::set_default_local_recorder(&recorder);
    let server = AuthServer::new();
    server.hold();
    let cache = TokenCache::new(server);
    let runtime = current_thread();
    runtime.block_on(async {
        assert!(poll_once(pin!(cache.get())).is_pending());
        settle().await;
    });
    drop(runtime);
    assert_eq!(f64::from_bits(level.load(Ordering::SeqCst)), 1.0);
    drop(cache);
    assert_eq!(f64::from_bits(level.load(Ordering::SeqCst)), 0.0);
}

/// Records one gauge and nothing else.
struct Single<G>(&'static str, Arc<G>);

impl<G: GaugeFn + Send + Sync + 'static> Recorder for Single<G> {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        Counter::noop()
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        match key.name() == self.0 {
            true => Gauge::from_arc(Arc::clone(&self.1)),
            false => Gauge::noop(),
        }
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

/// A gauge that panics while told to, and holds the last level set.
#[derive(Default)]
struct Moody {
    panics: AtomicBool,
    level: AtomicU64,
}

impl GaugeFn for Moody {
    fn increment(&self, _: f64) {}

    fn decrement(&self, _: f64) {}

    fn set(&self, value: f64) {
        assert!(!self.panics.load(Ordering::SeqCst), "the gauge panics");
        self.level.set(value);
    }
}

/// A gauge is foreign code, called on drop too, even of a request that a panic drops.
#[tokio::test(start_paused = true)]
async fn a_panicking_gauge_ends_no_process_and_stays_right() {
    let gauge = Arc::<Moody>::default();
    let recorder = Single("tower_bearer_waiting_requests", gauge.clone());
    let _guard = metrics::set_default_local_recorder(&recorder);
    let server = AuthServer::new();
    server.set_latency(millis(10));
    let cache = TokenCache::new(server);
    gauge.panics.store(true, Ordering::SeqCst);
    let panicking = tokio::spawn({
        let cache = cache.clone();
        async move {
            let mut waits = pin!(cache.get());
            assert!(poll_once(waits.as_mut()).is_pending());
            panic!("the request panics while it waits");
        }
    });
    assert!(panicking.await.unwrap_err().is_panic());
    gauge.panics.store(false, Ordering::SeqCst);
    let waits = caller(&cache);
    settle().await;
    assert_eq!(f64::from_bits(gauge.level.load(Ordering::SeqCst)), 1.0);
    waits.await.unwrap().unwrap();
    assert_eq!(f64::from_bits(gauge.level.load(Ordering::SeqCst)), 0.0);
}

/// Of threads that add keys at the same time.
#[test]
fn the_gauge_of_keys_is_right_after_a_race() {
    for round in 0..2_000 {
        let shown = Arc::<AtomicU64>::default();
        let recorder = Single("tower_bearer_keys", shown.clone());
        let cache = TokenCache::new(AuthServer::new());
        let barrier = Barrier::new(4);
        thread::scope(|scope| {
            for thread in 0..4 {
                let (recorder, cache, barrier) = (&recorder, &cache, &barrier);
                scope.spawn(move || {
                    let _guard = metrics::set_default_local_recorder(recorder);
                    barrier.wait();
                    for key in 0..3 {
                        let request = TokenRequest::new().scope(format!("{thread}-{key}"));
                        // Without a runtime this adds the key and sends no token request.
                        now(cache.get_for(&request)).unwrap_err();
                    }
                });
            }
        });
        let shown = f64::from_bits(shown.load(Ordering::SeqCst));
        assert_eq!(shown, 12.0, "round {round}");
    }
}

#[tokio::test(start_paused = true)]
async fn refusals_are_counted_by_decision_and_so_are_replays() {
    let recorder = DebuggingRecorder::new();
    let read = || Read::from(&recorder.snapshotter());
    let _guard = metrics::set_default_local_recorder(&recorder);
    let api = Api::refusing_the_first();
    let layer = BearerAuthLayer::new(AuthServer::new()).replay(CloneBody);
    let client = layer.layer(api.clone());
    api.hold();
    let tasks: Vec<_> = (0..3)
        .map(|_| tokio::spawn(client.clone().oneshot(get())))
        .collect();
    settle().await;
    api.release();
    all(tasks).await;
    let refused = read();
    let decided = |decision: &str| {
        refused.counter(&format!(
            "token_refusals_total,cache=default,decision={decision}"
        ))
    };
    assert_eq!(decided("started"), 1);
    assert_eq!(decided("joined") + decided("replay"), 2);
    assert_eq!(decided("passed"), 0);
    assert_eq!(refused.counter("replays_total,cache=default"), 3);
}

/// A refusal of an older token counts whether or not its request can be sent again.
#[tokio::test(start_paused = true)]
async fn late_refusals_are_counted() {
    let recorder = DebuggingRecorder::new();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let api = Api::refusing_the_first();
    let layer = BearerAuthLayer::new(AuthServer::new());
    let once = layer.layer(api.clone());
    let twice = layer.clone().replay(CloneBody).layer(api.clone());
    let token = layer.cache().get().await.unwrap();
    api.hold();
    let mut tasks = vec![];
    tasks.extend((0..2).map(|_| tokio::spawn(once.clone().oneshot(get()))));
    tasks.extend((0..3).map(|_| tokio::spawn(twice.clone().oneshot(get()))));
    settle().await;
    layer.cache().invalidate(&token);
    settle().await;
    api.release();
    all(tasks).await;
    let read = Read::from(&recorder.snapshotter());
    let decided = ["started", "joined", "passed", "replay"].map(|decision| {
        read.counter(&format!(
            "token_refusals_total,cache=default,decision={decision}"
        ))
    });
    assert_eq!(decided, [1, 0, 2, 3]);
}

/// It misses only what came before.
#[tokio::test(start_paused = true)]
async fn the_next_token_request_finds_a_recorder_installed_late() {
    let recorder = DebuggingRecorder::new();
    let server = AuthServer::new();
    let client = BearerAuthLayer::new(server.clone()).layer(Api::echoing());
    client.clone().oneshot(get()).await.unwrap();
    client
        .cache()
        .get_for(&TokenRequest::new().scope("a"))
        .await
        .unwrap();

    let _guard = metrics::set_default_local_recorder(&recorder);
    time::sleep(secs(295)).await;
    for _ in 0..3 {
        client.clone().oneshot(get()).await.unwrap();
    }
    let late = Read::from(&recorder.snapshotter());
    assert_eq!(late.counter("requests_total,cache=default,token=fresh"), 2);
    assert_eq!(late.gauge("keys,cache=default"), 1.0);
}

/// The first request to find a token may come before the flight records itself.
#[tokio::test(start_paused = true)]
async fn a_recorder_installed_late_is_found_before_the_token() {
    /// Sends a request as soon as it is woken, as another thread may.
    struct Hasty(Mutex<BearerAuth<Api, Never>>);

    impl Wake for Hasty {
        fn wake(self: Arc<Self>) {
            let sent = self.0.lock().unwrap().call(get());
            let polled = pin!(sent).poll(&mut Context::from_waker(Waker::noop()));
            assert!(polled.is_ready());
        }
    }

    let recorder = DebuggingRecorder::new();
    let mut client = BearerAuthLayer::new(AuthServer::new()).layer(Api::echoing());
    let hasty = Hasty(Mutex::new(client.clone()));
    let cache = client.cache().clone();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let mut get_token = pin!(cache.get());
    let waker = Waker::from(Arc::new(hasty));
    let polled = get_token.as_mut().poll(&mut Context::from_waker(&waker));
    assert!(polled.is_pending());
    settle().await;
    // From the service of which the hasty one is a clone.
    client.call_one().await;
    let late = Read::from(&recorder.snapshotter());
    assert_eq!(late.counter("requests_total,cache=default,token=fresh"), 2);
}

/// Each has a description, a unit if there is one, and a name that says so.
#[tokio::test(start_paused = true)]
async fn every_metric_is_described_and_named_for_prometheus() {
    let recorder = DebuggingRecorder::new();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let api = Api::refusing_the_first();
    let layer = BearerAuthLayer::new(AuthServer::new()).replay(CloneBody);
    layer.layer(api).oneshot(get()).await.unwrap();
    let metrics = recorder.snapshotter().snapshot().into_vec();
    assert!(metrics.len() >= 9);
    for (key, unit, description, _) in metrics {
        let name = key.key().name();
        assert!(description.is_some(), "{name}");
        let (suffix, expected) = match key.kind() {
            MetricKind::Counter => ("_total", Unit::Count),
            MetricKind::Gauge => ("", Unit::Count),
            MetricKind::Histogram => ("_seconds", Unit::Seconds),
        };
        assert!(
            name.starts_with("tower_bearer_") && name.ends_with(suffix),
            "{name}"
        );
        assert_eq!(unit, Some(expected), "{name}");
        let labels: Vec<_> = key.key().labels().map(|label| label.key()).collect();
        assert!(
            labels.contains(&"cache") && labels.len() <= 3,
            "{name}: {labels:?}"
        );
    }
}

/// The first waiter that gets the failure shuts the cache down.
#[tokio::test(start_paused = true)]
async fn a_cache_shut_down_over_a_failure_has_no_closed_gate() {
    struct Ends(TokenCache);

    impl Wake for Ends {
        fn wake(self: Arc<Self>) {
            self.0.shutdown();
        }
    }

    let level = Arc::<AtomicU64>::default();
    let recorder = Single("tower_bearer_closed_gates", level.clone());
    let _guard = metrics::set_default_local_recorder(&recorder);
    let server = AuthServer::new();
    server.set(Answer::Fail(TokenError::terminal("no")));
    let cache = TokenCache::new(server);
    let mut waits = pin!(cache.get());
    let waker = Waker::from(Arc::new(Ends(cache.clone())));
    let polled = waits.as_mut().poll(&mut Context::from_waker(&waker));
    assert!(polled.is_pending());
    settle().await;
    assert!(cache.get().await.unwrap_err().is_shut_down());
    assert_eq!(f64::from_bits(level.load(Ordering::SeqCst)), 0.0);
}

/// A refused request whose replay the shutdown prevents was counted when it left.
#[tokio::test(start_paused = true)]
async fn a_shutdown_counts_no_request_twice() {
    for (refused, key) in [
        (false, None),
        (true, None),
        (false, Some("a")),
        (true, Some("a")),
    ] {
        let mut request = get();
        if let Some(scope) = key {
            let key = TokenRequest::new().scope(scope);
            request.extensions_mut().insert(key);
        }
        let recorder = DebuggingRecorder::new();
        let _guard = metrics::set_default_local_recorder(&recorder);
        let server = AuthServer::new();
        let api = Api::refusing_the_first();
        let permits = Arc::new(Semaphore::new(1));
        let inner = GlobalConcurrencyLimitLayer::with_semaphore(permits.clone()).layer(api);
        let client = BearerAuthLayer::new(server.clone())
            .replay(CloneBody)
            .layer(inner);
        let cache = client.cache().clone();
        if refused {
            match request.extensions().get::<TokenRequest>() {
                Some(key) => cache.get_for(key).await.unwrap(),
                None => cache.get().await.unwrap(),
            };
            settle().await;
        }
        server.hold();
        let request = tokio::spawn(client.oneshot(request));
        settle().await;
        // When its token comes, it waits for the service.
        let permit = permits.try_acquire().unwrap();
        server.release();
        settle().await;
        cache.shutdown();
        drop(permit);
        let error = request.await.unwrap().unwrap_err();
        assert!(token_error(&error).is_shut_down());

        let read = Read::from(&recorder.snapshotter());
        let requests =
            |token: &str| read.counter(&format!("requests_total,cache=default,token={token}"));
        let counted = ["fresh", "waited", "failed"].map(requests);
        assert_eq!(counted, if refused { [1, 0, 0] } else { [0, 0, 1] });
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_finds_the_cache_full_is_counted_as_failed() {
    let recorder = DebuggingRecorder::new();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let policy = RefreshPolicy::new().max_keys(1);
    let cache = TokenCache::with_policy(AuthServer::new(), policy);
    let client = BearerAuthLayer::new(cache).layer(Api::echoing());
    let send = |scope: &str| {
        let mut request = get();
        let key = TokenRequest::new().scope(scope);
        request.extensions_mut().insert(key);
        client.clone().oneshot(request)
    };
    send("a").await.unwrap();
    let error = send("b").await.unwrap_err();
    assert!(token_error(&error).is_too_many_keys());
    let read = Read::from(&recorder.snapshotter());
    let requests =
        |token: &str| read.counter(&format!("requests_total,cache=default,token={token}"));
    assert_eq!(["waited", "failed"].map(requests), [1, 1]);
}
