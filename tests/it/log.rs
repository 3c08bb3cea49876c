//! What the log says: the events of an outage in order, and the spans of flights and their waiters.

use std::{
    cell::Cell,
    collections::BTreeMap,
    fmt,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::Request;
use tokio::time::{self, Instant};
use tower::{Layer as _, Service, ServiceExt};
use tower_bearer::{
    BearerAuthLayer, ClientCredentials, CloneBody, RefreshPolicy, TokenCache, TokenError,
    TokenRequest,
};
use tracing::{
    Event, Id, Instrument, Level, Metadata, Subscriber,
    field::{Field, Visit},
    info_span,
    span::{Attributes, Record},
};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
};

use crate::support::{
    Answer, Api, AuthServer, INVALID_TOKEN, TokenEndpoint, all, caller, current_thread,
    enable_tracing, get, millis, paused, poll_once, reply, secs, seed, settle, unauthorized,
    without_a_hang,
};

type Fields = BTreeMap<String, String>;

#[derive(Clone, Debug)]
struct Line {
    at: Duration,
    level: Level,
    name: &'static str,
    fields: Fields,
    /// The span that the event is in.
    span: Option<u64>,
}

impl Line {
    fn field(&self, name: &str) -> Option<&str> {
        self.fields.get(name).map(String::as_str)
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            at, level, name, ..
        } = self;
        write!(f, "{:>7.1}s {level:>5} {name}", at.as_secs_f64())?;
        for (name, value) in &self.fields {
            write!(f, " {name}={value}")?;
        }
        Ok(())
    }
}

#[derive(Clone, Debug, Default)]
struct SpanSeen {
    name: &'static str,
    is_root: bool,
    fields: Fields,
    follows: Vec<u64>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Seen {
    lines: Vec<Line>,
    spans: BTreeMap<u64, SpanSeen>,
    /// Spans are numbered here, since a registry reuses its ids.
    ids: BTreeMap<u64, u64>,
}

/// Collects the events under the crate's target, and all spans.
#[derive(Clone)]
struct Log {
    start: Instant,
    seen: Arc<Mutex<Seen>>,
}

impl Log {
    fn collect() -> (Self, tracing::subscriber::DefaultGuard) {
        enable_tracing();
        let log = Self {
            start: Instant::now(),
            seen: Arc::default(),
        };
        let guard =
            tracing::subscriber::set_default(tracing_subscriber::registry().with(log.clone()));
        (log, guard)
    }

    fn lines(&self, least: Level) -> Vec<Line> {
        let seen = self.seen.lock().unwrap();
        let lines = seen.lines.iter();
        lines.filter(|line| line.level <= least).cloned().collect()
    }

    fn named(&self, name: &str) -> Vec<Line> {
        let lines = self.lines(Level::TRACE);
        lines.into_iter().filter(|line| line.name == name).collect()
    }

    fn spans(&self, name: &str) -> Vec<(u64, SpanSeen)> {
        let seen = self.seen.lock().unwrap();
        let spans = seen.spans.iter().filter(|(_, span)| span.name == name);
        spans.map(|(id, span)| (*id, span.clone())).collect()
    }
}

/// Keeps every value of a field, like subscribers that write lines.
struct Collect<'a>(&'a mut Fields);

impl Visit for Collect<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        let values = self.0.entry(field.name().to_owned()).or_default();
        if !values.is_empty() {
            values.push_str(", ");
        }
        values.push_str(value);
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Log {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, _: Context<'_, S>) {
        let mut seen = self.seen.lock().unwrap();
        let number = seen.spans.len() as u64;
        seen.ids.insert(id.into_u64(), number);
        let mut span = SpanSeen {
            name: attributes.metadata().name(),
            is_root: attributes.is_root(),
            ..SpanSeen::default()
        };
        attributes.record(&mut Collect(&mut span.fields));
        seen.spans.insert(number, span);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: Context<'_, S>) {
        let mut seen = self.seen.lock().unwrap();
        let number = seen.ids[&id.into_u64()];
        let span = seen.spans.get_mut(&number).unwrap();
        values.record(&mut Collect(&mut span.fields));
    }

    fn on_follows_from(&self, id: &Id, follows: &Id, context: Context<'_, S>) {
        // A layer that looks up the other span, like an exporter, must find it.
        assert!(context.span(follows).is_some());
        let mut seen = self.seen.lock().unwrap();
        let (number, follows) = (seen.ids[&id.into_u64()], seen.ids[&follows.into_u64()]);
        seen.spans.get_mut(&number).unwrap().follows.push(follows);
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        if event.metadata().target() != "tower_bearer" {
            return;
        }
        let mut seen = self.seen.lock().unwrap();
        let span = context.event_span(event);
        let mut line = Line {
            at: self.start.elapsed(),
            level: *event.metadata().level(),
            name: event.metadata().name(),
            fields: Fields::new(),
            span: span.map(|span| seen.ids[&span.id().into_u64()]),
        };
        event.record(&mut Collect(&mut line.fields));
        seen.lines.push(line);
    }

    fn on_close(&self, id: Id, _: Context<'_, S>) {
        let mut seen = self.seen.lock().unwrap();
        let number = seen.ids[&id.into_u64()];
        seen.spans.get_mut(&number).unwrap().closed = true;
    }
}

/// A request every five seconds, each in its own span.
async fn traffic<S>(client: &S, duration: Duration)
where
    S: Service<Request<String>, Response: Send, Error: Send, Future: Send> + Clone,
{
    let end = Instant::now() + duration;
    while Instant::now() < end {
        let request = client.clone().oneshot(get());
        let _ = request.instrument(info_span!("request")).await;
        settle().await;
        time::sleep(secs(5)).await;
    }
}

/// A reader sees when the outage began, what failed and why, whether requests went on or failed too, and when it
/// was over.
#[tokio::test(start_paused = true)]
async fn the_log_of_an_outage_tells_what_happened_in_order() {
    seed(7);
    let (log, _guard) = Log::collect();
    let server = AuthServer::new();
    let api = Api::refusing_the_first();
    let layer = BearerAuthLayer::new(server.clone()).replay(CloneBody);
    let client = layer.layer(api);

    // The first token, which is refused, and its replacement.
    traffic(&client, secs(200)).await;
    // An outage that outlives the token, and the recovery.
    server.set(Answer::Fail(TokenError::transient("down")));
    traffic(&client, secs(60)).await;
    let busy = TokenError::transient("busy").with_retry_after(secs(40));
    server.set(Answer::Fail(busy));
    traffic(&client, secs(15)).await;
    server.set(Answer::Fail(TokenError::transient("down")));
    traffic(&client, secs(60)).await;
    server.set(Answer::Grant(secs(300)));
    traffic(&client, secs(30)).await;

    let lines = log.lines(Level::INFO);
    let text: Vec<_> = lines.iter().map(Line::to_string).collect();
    println!("{}", text.join("\n"));
    let names: Vec<_> = lines.iter().map(|line| line.name).collect();
    let failing = names.iter().position(|name| *name == "requests_failing");
    let failing = failing.expect("the outage outlives the token");
    let last = names.len() - 1;
    assert_eq!(names[0], "token_refused");
    assert!(
        names[1..failing]
            .iter()
            .all(|name| *name == "flight_failed")
    );
    assert!(failing > 3, "{names:?}");
    assert!(
        names[failing + 1..last]
            .iter()
            .all(|name| *name == "flight_failed")
    );
    assert!(last > failing + 2, "{names:?}");
    assert_eq!(names[last], "recovered");

    // Each failure says why, how many there were, what comes next and how requests fare.
    let failed = log.named("flight_failed");
    for (index, line) in failed.iter().enumerate() {
        assert_eq!(line.level, Level::WARN);
        assert_eq!(line.field("error"), Some("the token source failed"));
        assert_eq!(line.field("failures").unwrap(), (index + 1).to_string());
        assert_ne!(line.field("retry_in").unwrap(), "0ns");
        let goes_on = line.at < lines[failing].at;
        assert_eq!(line.field("usable_for").is_some(), goes_on, "{line}");
        let message = line.field("message").unwrap();
        assert_eq!(message.contains("requests go on"), goes_on, "{line}");
    }
    let recovered = &lines[last];
    assert_eq!(
        recovered.field("failures").unwrap(),
        failed.len().to_string()
    );
    let started = log.named("flight_started");
    let first = failed[0].field("flight");
    let first = started.iter().find(|line| line.field("flight") == first);
    let outage = recovered.at - first.unwrap().at;
    let outage = Duration::from_millis(outage.as_millis() as u64);
    assert_eq!(recovered.field("outage").unwrap(), format!("{outage:?}"));

    // Each line names the cache.
    for line in log.lines(Level::INFO) {
        assert_eq!(line.field("cache"), Some("default"), "{line}");
    }

    // DEBUG adds the rest, each event of a flight in the flight's span.
    let debug: Vec<_> = log.lines(Level::DEBUG);
    let text: Vec<_> = debug.iter().map(Line::to_string).collect();
    println!("\n{}", text.join("\n"));
    let names: Vec<_> = debug.iter().take(9).map(|line| line.name).collect();
    assert_eq!(
        names,
        [
            "flight_started",
            "token_received",
            "waited",
            "token_refused",
            "flight_started",
            "token_received",
            "waited",
            "replayed",
            "flight_started",
        ]
    );
    let flights = log.spans("token_flight");
    let in_flight = [
        "flight_started",
        "attempt_failed",
        "token_received",
        "flight_failed",
        "gate_closed",
        "gate_opened",
        "recovered",
    ];
    for line in &debug {
        let span = line.span.expect("it is in a span");
        let flight = flights.iter().find(|(id, _)| *id == span);
        assert_eq!(flight.is_some(), in_flight.contains(&line.name), "{line}");
        if let (Some((_, flight)), Some(number)) = (flight, line.field("flight")) {
            assert_eq!(flight.fields["flight"], number);
        }
    }
    for name in ["gate_closed", "gate_opened"] {
        assert!(!log.named(name).is_empty(), "{name}");
    }
}

/// And the flight is linked to the request that started it.
#[tokio::test(start_paused = true)]
async fn waiting_requests_are_linked_to_the_span_of_their_flight() {
    let (log, _guard) = Log::collect();
    let server = AuthServer::new();
    server.set_latency(millis(40));
    let policy = RefreshPolicy::new().name("billing");
    let cache = TokenCache::with_policy(server.clone(), policy);
    let request = TokenRequest::new().scope("sims:read").param("key", "v");
    let tasks: Vec<_> = (0..3)
        .map(|_| {
            let (cache, request) = (cache.clone(), request.clone());
            let get = async move { cache.get_for(&request).await };
            tokio::spawn(get.instrument(info_span!("request")))
        })
        .collect();
    for result in all(tasks).await {
        result.unwrap();
    }
    settle().await;

    let [(id, flight)] = &log.spans("token_flight")[..] else {
        panic!("there is one flight");
    };
    // It ends with the flight, not with the cache.
    assert!(flight.is_root && flight.closed);
    let field = |name: &str| flight.fields.get(name).map(String::as_str);
    assert_eq!(field("cache"), Some("billing"));
    assert_eq!(field("key"), Some("scope=sims:read param=key"));
    assert_eq!(field("grant"), Some("custom"));
    assert_eq!(field("forced"), Some("false"));
    assert_eq!(field("attempts"), Some("1"));
    assert_eq!(field("outcome"), Some("granted"));
    let requests = log.spans("request");
    assert_eq!(flight.follows, [requests[0].0]);
    for (_, request) in &requests {
        assert_eq!(request.follows, [*id]);
    }
    let waited = log.named("waited");
    for ((request, _), line) in requests.iter().zip(&waited) {
        assert_eq!(line.span, Some(*request));
        assert_eq!(line.field("flight"), field("flight"));
        assert_eq!(line.field("took"), Some("40ms"));
        assert_eq!(line.field("outcome"), Some("token"));
    }
    assert_eq!(waited.len(), 3);
}

/// A hanging server causes no failure for half a minute, and users notice it sooner.
#[tokio::test(start_paused = true)]
async fn the_log_warns_once_that_requests_wait_for_a_slow_token_request() {
    let (log, _guard) = Log::collect();
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    for (latency, told) in [(millis(900), 0), (millis(1_100), 1), (millis(9_000), 2)] {
        server.set_latency(latency);
        server.set(Answer::Grant(secs(1)));
        let callers: Vec<_> = (0..3).map(|_| caller(&cache)).collect();
        all(callers).await;
        let lines = log.named("requests_waiting");
        assert_eq!(lines.len(), told);
        if let Some(line) = lines.last() {
            assert_eq!(line.level, Level::WARN);
            assert_eq!(line.field("waiters"), Some("3"));
            assert_eq!(line.field("age"), Some("1s"));
        }
        time::sleep(secs(2)).await;
    }
    // Nobody waits for the refresh of a valid token.
    server.set_latency(millis(1));
    server.set(Answer::Grant(secs(300)));
    cache.get().await.unwrap();
    time::sleep(secs(200)).await;
    server.set_latency(secs(5));
    cache.get().await.unwrap();
    time::sleep(secs(9)).await;
    assert_eq!(log.named("requests_waiting").len(), 2);
}

/// There may be many of each, and their spans filtered out.
#[tokio::test(start_paused = true)]
async fn events_about_an_answer_name_its_cache_key_and_flight() {
    let (log, _guard) = Log::collect();
    let endpoint = TokenEndpoint::new(|request| async move {
        match request.body().starts_with("grant_type=refresh_token") {
            true => reply(400, r#"{"error":"invalid_grant"}"#),
            false => reply(
                200,
                r#"{"access_token":"a","token_type":"Bearer","refresh_token":"r"}"#,
            ),
        }
    });
    let source = ClientCredentials::builder("https://as.example/token", "client-id")
        .client_secret("secret")
        .build_with(endpoint)
        .unwrap();
    let cache = TokenCache::with_policy(source, RefreshPolicy::new().name("billing"));
    let key = TokenRequest::new().scope("read");
    for _ in 0..2 {
        cache.get_for(&key).await.unwrap();
        time::sleep(secs(295)).await;
    }
    let flights: Vec<_> = log.spans("token_flight");
    let numbers: Vec<_> = flights
        .iter()
        .map(|(_, span)| Some(span.fields["flight"].as_str()))
        .collect();
    let [first, second] = numbers[..] else {
        panic!("there are two flights: {numbers:?}");
    };
    for (name, flights) in [
        ("lifetime_assumed", &[first, second][..]),
        ("refresh_token_failed", &[second]),
    ] {
        let lines = log.named(name);
        assert!(
            lines
                .iter()
                .map(|line| line.field("flight"))
                .eq(flights.iter().copied())
        );
        for line in lines {
            assert_eq!(line.field("cache"), Some("billing"));
            assert_eq!(line.field("key"), Some("scope=read"));
        }
    }
    // Every session ends like this, so it is no warning.
    let ended = log.named("refresh_token_failed");
    assert!(ended.iter().all(|line| line.level == Level::DEBUG));
}

/// However it ends.
#[tokio::test(start_paused = true)]
async fn a_flights_span_has_its_outcome() {
    let (log, _guard) = Log::collect();
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    server.set(Answer::Fail(TokenError::terminal("no")));
    cache.get().await.unwrap_err();
    time::sleep(secs(6)).await;
    server.set(Answer::Fail(TokenError::transient("busy")));
    cache.get().await.unwrap_err();
    time::sleep(secs(6)).await;
    server.set(Answer::Grant(secs(1)));
    cache.get().await.unwrap();
    time::sleep(secs(2)).await;
    server.set(Answer::Fail(TokenError::transient("busy")));
    cache.get().await.unwrap_err();
    time::sleep(secs(2)).await;
    server.set(Answer::Hang);
    let waits = time::timeout(secs(1), cache.get()).await;
    assert!(waits.is_err());
    cache.shutdown();
    cache.shutdown();
    settle().await;

    let spans = log.spans("token_flight");
    let field = |name: &'static str| spans.iter().map(move |(_, span)| &span.fields[name]);
    let outcomes = ["failed", "failed", "granted", "failed", "shut_down"];
    assert!(field("outcome").eq(outcomes));
    // One attempt at a time after a failure.
    assert!(field("attempts").eq(["1", "1", "1", "3", "1"]));
    assert!(field("grant").all(|grant| grant == "custom"));
    assert!(spans.iter().all(|(_, span)| span.closed));
    assert_eq!(spans[0].1.fields["otel.status_code"], "ERROR");
    assert_eq!(spans[0].1.fields["error"], "the token source failed");
    // So do the events of the waits.
    let waited = log.named("waited");
    let outcomes = ["failed", "failed", "token", "failed", "dropped"].map(Some);
    assert!(waited.iter().map(|line| line.field("outcome")).eq(outcomes));
    let ends = log.named("shut_down");
    assert_eq!(ends.len(), 1);
    assert_eq!(ends[0].field("cache"), Some("default"));
}

/// The end of a runtime ends its flight.
#[test]
fn the_span_of_a_lost_flight_says_so() {
    let (log, _guard) = Log::collect();
    let server = AuthServer::new();
    server.set(Answer::Hang);
    let cache = TokenCache::new(server);
    let runtime = current_thread();
    let waits = runtime.block_on(async { time::timeout(millis(1), cache.get()).await });
    assert!(waits.is_err());
    drop(runtime);
    let [(id, flight)] = &log.spans("token_flight")[..] else {
        panic!("there is one flight");
    };
    assert_eq!(flight.fields["outcome"], "lost");
    let lost = log.named("flight_lost");
    assert_eq!(lost[0].span, Some(*id));
    assert_eq!(lost[0].field("failures"), Some("1"));
    assert!(flight.closed);
}

/// Others give up a flight whose runtime is parked, and their event is in its span.
#[test]
fn the_span_of_an_abandoned_flight_says_so() {
    let (log, _guard) = Log::collect();
    let server = AuthServer::new();
    server.set(Answer::Hang);
    let cache = TokenCache::new(server.clone());
    let parked = current_thread();
    let waits = parked.block_on(async { time::timeout(millis(1), cache.get()).await });
    assert!(waits.is_err());
    server.set(Answer::Grant(secs(300)));
    let other = paused();
    other.block_on(async {
        time::advance(secs(31)).await;
        cache.get().await.unwrap();
    });
    let spans = log.spans("token_flight");
    let outcomes: Vec<_> = spans
        .iter()
        .map(|(_, span)| &span.fields["outcome"])
        .collect();
    assert_eq!(outcomes, ["lost", "granted"]);
    let lost = log.named("flight_lost");
    assert_eq!(lost[0].span, Some(spans[0].0));
    assert_eq!(log.named("recovered")[0].span, Some(spans[1].0));
}

/// So does a log of INFO.
#[tokio::test(start_paused = true)]
async fn a_log_of_warnings_stays_empty_while_all_is_well() {
    let (log, _guard) = Log::collect();
    let server = AuthServer::new();
    let client = BearerAuthLayer::new(server.clone()).layer(Api::echoing());
    traffic(&client, secs(900)).await;
    assert!(server.requests() >= 4);
    assert!(log.lines(Level::INFO).is_empty());
}

/// In the span of the request that was refused.
#[tokio::test(start_paused = true)]
async fn a_refusal_is_logged_with_the_decision() {
    let (log, _guard) = Log::collect();
    let server = AuthServer::new();
    let api = Api::new(|_| unauthorized(INVALID_TOKEN));
    let client = BearerAuthLayer::new(server.clone())
        .replay(CloneBody)
        .layer(api.clone());
    client.cache().get().await.unwrap();
    time::sleep(secs(2)).await;
    // Two refusals at once, and those of their replays.
    api.hold();
    let tasks: Vec<_> = (0..2)
        .map(|_| {
            let request = client.clone().oneshot(get());
            tokio::spawn(request.instrument(info_span!("request")))
        })
        .collect();
    settle().await;
    server.hold();
    api.release();
    settle().await;
    server.release();
    all(tasks).await;

    let refused = log.named("token_refused");
    let decisions: Vec<_> = refused.iter().map(|line| line.field("decision")).collect();
    let expected = ["started", "joined", "passed", "passed"];
    assert_eq!(decisions, expected.map(Some));
    let levels: Vec<_> = refused.iter().map(|line| line.level).collect();
    assert_eq!(levels[0], Level::INFO);
    assert!(levels[1..].iter().all(|level| *level == Level::DEBUG));
    let requests = log.spans("request");
    for line in &refused {
        assert_eq!(line.field("complaint"), Some("invalid_token"));
        assert!(requests.iter().any(|(id, _)| Some(*id) == line.span));
    }
    assert_eq!(log.named("replayed").len(), 2);
    // `invalidate` is logged too; within the cooldown it starts nothing.
    let token = client.cache().get().await.unwrap();
    client.cache().invalidate(&token);
    assert_eq!(log.named("invalidated").len(), 1);
    let refused = log.named("token_refused");
    assert_eq!(refused.last().unwrap().field("decision"), Some("passed"));
}

/// A subscriber that uses the cache whenever it is called, unless that very use calls it.
struct Meddler {
    cache: Arc<Mutex<Option<TokenCache>>>,
    spans: AtomicU64,
    calls: Arc<AtomicU64>,
}

impl Meddler {
    fn meddle(&self) {
        thread_local!(static MEDDLES: Cell<bool> = const { Cell::new(false) });
        if MEDDLES.replace(true) {
            return;
        }
        let cache = self.cache.lock().unwrap().clone();
        if let Some(cache) = cache {
            self.calls.fetch_add(1, Ordering::SeqCst);
            drop((cache.statuses(9), cache.events()));
            let _ = poll_once(pin!(cache.get()));
            let _ = poll_once(pin!(cache.get_for(&TokenRequest::new().scope("a"))));
            if let Some(token) = cache.peek() {
                cache.invalidate(&token);
            }
        }
        MEDDLES.set(false);
    }
}

impl Subscriber for Meddler {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        self.meddle();
        Id::from_u64(self.spans.fetch_add(1, Ordering::SeqCst) + 1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {
        self.meddle();
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {
        self.meddle();
    }

    fn event(&self, _: &Event<'_>) {
        self.meddle();
    }

    fn enter(&self, _: &Id) {
        self.meddle();
    }

    fn exit(&self, _: &Id) {
        self.meddle();
    }

    fn clone_span(&self, id: &Id) -> Id {
        self.meddle();
        id.clone()
    }

    fn try_close(&self, _: Id) -> bool {
        self.meddle();
        false
    }
}

/// A subscriber is foreign code: no lock is held whenever it is called.
#[test]
fn a_subscriber_that_uses_the_cache_does_not_deadlock() {
    let calls = without_a_hang(|| {
        enable_tracing();
        let (slot, calls) = (Arc::default(), Arc::<AtomicU64>::default());
        let meddler = Meddler {
            cache: Arc::clone(&slot),
            spans: AtomicU64::new(0),
            calls: calls.clone(),
        };
        let _guard = tracing::subscriber::set_default(meddler);
        let runtime = paused();
        runtime.block_on(async {
            let server = AuthServer::new();
            let policy = RefreshPolicy::new().max_keys(1);
            let cache = TokenCache::with_policy(server.clone(), policy);
            *slot.lock().unwrap() = Some(cache.clone());
            for answer in [
                Answer::Grant(secs(20)),
                Answer::Fail(TokenError::transient("down")),
                Answer::Hang,
                Answer::Grant(secs(20)),
            ] {
                server.set(answer);
                let _ = time::timeout(secs(50), cache.get()).await;
                let _ = cache.get_for(&TokenRequest::new().scope("b")).await;
                time::sleep(secs(30)).await;
            }
            cache.shutdown();
            *slot.lock().unwrap() = None;
        });
        calls.load(Ordering::SeqCst)
    });
    assert!(calls > 20, "{calls}");
}

/// Panics at the event of a wait.
struct Panics;

impl<S: Subscriber> Layer<S> for Panics {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        assert_ne!(event.metadata().name(), "waited", "the subscriber panics");
    }
}

/// A subscriber that panics while a panic drops a request would end the process.
#[tokio::test(start_paused = true)]
async fn a_wait_that_a_panic_drops_is_not_logged() {
    enable_tracing();
    let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(Panics));
    let server = AuthServer::new();
    server.hold();
    let cache = TokenCache::new(server);
    let panicking = tokio::spawn(async move {
        let mut waits = pin!(cache.get());
        assert!(poll_once(waits.as_mut()).is_pending());
        panic!("the request panics while it waits");
    });
    assert!(panicking.await.unwrap_err().is_panic());
}
