//! A service that can be monitored: `/healthz` for its orchestrator, `/metrics` for Prometheus, events for itself.
//!
//! Runs on its own, in about five seconds: it starts an authorization server, an API and the service's own endpoints on
//! loopback ports, sends requests to the API through the layer, and takes the authorization server down and up again. In
//! each phase it reads both endpoints as their users would, prints what they say, and fails if that is wrong.
//!
//! ```sh
//! cargo run --features metrics --example health_and_metrics [-- --linger SECONDS]
//! ```
//!
//! `health_and_metrics/` holds a Grafana dashboard, and a configuration and alerts for Prometheus. The example also checks
//! that the metrics which the dashboard draws exist.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    extract::State,
    routing::{get, post},
};
use bytes::Bytes;
use clap::Parser;
use http::{HeaderMap, HeaderName, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    time::{self, Instant},
};
use tower::{Layer, Service, ServiceExt};
use tower_bearer::{
    BearerAuth, BearerAuthLayer, BoxError, ClientCredentials, CloneBody, RefreshPolicy, Status,
    TokenCache, TokenEvent,
};

/// Shows what a service says of its tokens through an outage.
#[derive(Parser)]
struct Args {
    /// Goes on for so many seconds, with traffic, at a fixed port of the loopback for Prometheus
    #[arg(long)]
    linger: Option<u64>,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    // Before the cache is made, or the first token's requests are not counted.
    let recorder = PrometheusBuilder::new()
        // Without buckets, histograms are exported as summaries, which cannot be added up.
        .set_buckets_for_metric(Matcher::Suffix("flight_duration_seconds".into()), &TOOK)?
        .set_buckets_for_metric(Matcher::Suffix("token_remaining_seconds".into()), &REMAINS)?
        .install_recorder()?;
    // The exporter gathers the samples of histograms until they are counted: at a scrape, or by this.
    let upkeep = recorder.clone();
    tokio::spawn(async move {
        loop {
            time::sleep(UPKEEP).await;
            upkeep.run_upkeep();
        }
    });

    let realm = Arc::new(Realm::default());
    let client = Client::builder(TokioExecutor::new()).build_http();
    let (token_url, api) = realm.serve().await?;
    let source = ClientCredentials::builder(token_url, "client-id")
        .client_secret("client-secret")
        .build_with(client.clone())?;
    // One attempt at a time: with tokens of three seconds there is no time for more before they expire.
    let policy = RefreshPolicy::new().name("sims").attempts(1);
    let cache = TokenCache::with_policy(source, policy);
    let service = BearerAuthLayer::new(cache.clone())
        .replay(CloneBody)
        .layer(client.clone());

    let address = match args.linger {
        Some(_) => "127.0.0.1:9464",
        None => "127.0.0.1:0",
    };
    let watched = Watch {
        cache: cache.clone(),
        recorder,
    };
    let watch = Watcher {
        client,
        base: serve(address, endpoints(watched)).await?,
    };
    tokio::spawn(tell(cache.clone()));

    // Nobody has asked for a token yet, and the service may be sent requests.
    let health = watch.health("before").await?;
    expect(&health, "ok", "missing", 200)?;

    let traffic = tokio::spawn(traffic(service, api));
    time::sleep(Duration::from_millis(500)).await;
    let health = watch.health("steady load").await?;
    expect(&health, "ok", "fresh", 200)?;
    let metrics = watch.metrics().await?;
    assert!(metrics.sum("tower_bearer_requests_total", "token=\"fresh\"") > 10.0);
    assert_eq!(
        metrics.sum("tower_bearer_requests_total", "token=\"failed\""),
        0.0
    );
    assert_eq!(metrics.sum("tower_bearer_closed_gates", ""), 0.0);

    // The API forgets a token: it is replaced, and nobody notices.
    realm.revoked.store(realm.granted(), Ordering::SeqCst);
    time::sleep(Duration::from_millis(500)).await;
    let metrics = watch.metrics().await?;
    assert!(metrics.sum("tower_bearer_token_refusals_total", "decision=\"started\"") >= 1.0);
    assert!(metrics.sum("tower_bearer_replays_total", "") >= 1.0);

    // The authorization server is gone. Requests go on with the token that there is.
    realm.down.store(true, Ordering::SeqCst);
    let health = watch.until("outage", "degraded").await?;
    expect(&health, "degraded", "due", 200)?;
    let metrics = watch.metrics().await?;
    assert!(
        metrics.sum(
            "tower_bearer_token_requests_total",
            "outcome=\"unavailable\""
        ) >= 1.0
    );
    assert_eq!(metrics.sum("tower_bearer_closed_gates", ""), 1.0);
    assert_eq!(
        metrics.sum("tower_bearer_requests_total", "token=\"failed\""),
        0.0
    );
    // Until it has expired.
    let health = watch.until("outage, later", "failing").await?;
    expect(&health, "failing", "expired", 503)?;
    time::sleep(Duration::from_millis(200)).await;
    let metrics = watch.metrics().await?;
    assert!(metrics.sum("tower_bearer_requests_total", "token=\"failed\"") >= 1.0);

    // It is back.
    realm.down.store(false, Ordering::SeqCst);
    let health = watch.until("recovery", "ok").await?;
    expect(&health, "ok", "fresh", 200)?;
    let metrics = watch.metrics().await?;
    assert_eq!(metrics.sum("tower_bearer_closed_gates", ""), 0.0);

    // The dashboard draws all that there is, and nothing else.
    let dashboard: Value = serde_json::from_str(DASHBOARD)?;
    assert_eq!(drawn(&dashboard, &metrics), metrics.names());
    println!("the dashboard draws all {} metrics", metrics.names().len());

    if let Some(seconds) = args.linger {
        println!("serving {} for {seconds} s", watch.base);
        time::sleep(Duration::from_secs(seconds)).await;
    }
    traffic.abort();
    Ok(())
}

// The service's own endpoints.

#[derive(Clone)]
struct Watch {
    cache: TokenCache,
    recorder: PrometheusHandle,
}

fn endpoints(watch: Watch) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics))
        .with_state(watch)
}

/// Out of service while requests would fail, since others may do better; in service, if not well, during an outage
/// that the token outlives.
async fn healthz(State(watch): State<Watch>) -> (StatusCode, Json<Value>) {
    let status = watch.cache.status();
    let (code, text) = match (status.is_healthy(), status.consecutive_failures()) {
        (true, 0) => (StatusCode::OK, "ok"),
        (true, _) => (StatusCode::OK, "degraded"),
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "failing"),
    };
    (code, Json(report(text, &status)))
}

fn report(text: &str, status: &Status) -> Value {
    let seconds = |duration: Option<Duration>| duration.map(|duration| duration.as_secs_f64());
    json!({
        "status": text,
        "token": format!("{:?}", status.state()).to_lowercase(),
        "expires_in": seconds(status.expires_in()),
        "failures": status.consecutive_failures(),
        "failing_for": seconds(status.failing_for()),
        "last_error": status.last_error().map(ToString::to_string),
        "retry_in": seconds(status.retry_in()),
        "waiting": status.waiters(),
    })
}

async fn metrics(State(watch): State<Watch>) -> String {
    watch.recorder.render()
}

/// What a program can do with events: here it prints those that matter.
async fn tell(cache: TokenCache) {
    let mut events = cache.events();
    drop(cache);
    while let Some(event) = events.next().await {
        match event {
            TokenEvent::FlightFailed {
                error, failures, ..
            } => {
                println!("  event: failure {failures}: {error}");
            }
            TokenEvent::TokenRefused { .. } => println!("  event: the API refused the token"),
            TokenEvent::Recovered {
                failures, outage, ..
            } => {
                println!("  event: recovered after {failures} failures and {outage:.1?}");
            }
            _ => {}
        }
    }
}

// Those who watch it.

struct Watcher {
    client: Http,
    base: String,
}

type Http = Client<HttpConnector, Full<Bytes>>;

impl Watcher {
    async fn health(&self, phase: &str) -> Result<(u16, Value), BoxError> {
        let (code, body) = self.get("/healthz").await?;
        let health = serde_json::from_slice(&body)?;
        println!("{phase}: {code} {health}");
        Ok((code, health))
    }

    /// Asks until the status is this one.
    async fn until(&self, phase: &str, status: &str) -> Result<(u16, Value), BoxError> {
        let end = Instant::now() + Duration::from_secs(15);
        loop {
            let (_, body) = self.get("/healthz").await?;
            let health: Value = serde_json::from_slice(&body)?;
            if health["status"] == status {
                return self.health(phase).await;
            }
            if Instant::now() > end {
                return Err(format!("it is never {status}: {health}").into());
            }
            time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn metrics(&self) -> Result<Metrics, BoxError> {
        let (_, body) = self.get("/metrics").await?;
        Ok(Metrics(String::from_utf8(body.into())?))
    }

    async fn get(&self, path: &str) -> Result<(u16, Bytes), BoxError> {
        let uri: Uri = format!("{}{path}", self.base).parse()?;
        let response = self.client.get(uri).await?;
        let code = response.status().as_u16();
        Ok((code, response.into_body().collect().await?.to_bytes()))
    }
}

fn expect(
    (code, health): &(u16, Value),
    status: &str,
    token: &str,
    expected: u16,
) -> Result<(), BoxError> {
    let fits = *code == expected && health["status"] == status && health["token"] == token;
    let is_due = token == "fresh" && health["token"] == "due";
    if fits || (is_due && *code == expected && health["status"] == status) {
        return Ok(());
    }
    Err(format!("not {expected}, {status} and {token}").into())
}

/// What `/metrics` says, in the text format of Prometheus.
struct Metrics(String);

impl Metrics {
    /// The sum of all series of this name with this label.
    fn sum(&self, name: &str, label: &str) -> f64 {
        let series = self.0.lines().filter_map(|line| line.strip_prefix(name));
        series
            .filter(|rest| rest.starts_with('{') && rest.contains(label))
            .filter_map(|rest| rest.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// The names of this crate's metrics.
    fn names(&self) -> BTreeSet<&str> {
        let types = self
            .0
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE "));
        types
            .filter_map(|line| line.split(' ').next())
            .filter(|name| name.starts_with("tower_bearer_"))
            .collect()
    }
}

/// The metrics that the panels of a dashboard query.
fn drawn<'a>(dashboard: &'a Value, metrics: &'a Metrics) -> BTreeSet<&'a str> {
    let panels = dashboard["panels"].as_array().into_iter().flatten();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let words = targets
        .filter_map(|target| target["expr"].as_str())
        .flat_map(|expr| expr.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'));
    let names = words.filter(|word| word.starts_with("tower_bearer_"));
    // A histogram is queried by its parts.
    names
        .map(|name| {
            let whole = name.strip_suffix("_bucket").unwrap_or(name);
            metrics.names().get(whole).copied().unwrap_or(name)
        })
        .collect()
}

async fn traffic(mut service: BearerAuth<Http, CloneBody>, api: Uri) {
    loop {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = api.clone();
        if service.ready().await.is_ok() {
            // What fails is counted.
            let _ = service.call(request).await;
        }
        time::sleep(Duration::from_millis(5)).await;
    }
}

// The world around it: an authorization server whose tokens live for three seconds, and an API.

#[derive(Default)]
struct Realm {
    down: AtomicBool,
    granted: AtomicUsize,
    /// Tokens up to this one are void.
    revoked: AtomicUsize,
}

impl Realm {
    async fn serve(self: &Arc<Self>) -> Result<(String, Uri), BoxError> {
        let tokens = Router::new().route("/token", post(token_endpoint));
        let tokens = serve("127.0.0.1:0", tokens.with_state(Arc::clone(self))).await?;
        let sims = Router::new().route("/sims", get(list_sims));
        let sims = serve("127.0.0.1:0", sims.with_state(Arc::clone(self))).await?;
        Ok((format!("{tokens}/token"), format!("{sims}/sims").parse()?))
    }

    fn granted(&self) -> usize {
        self.granted.load(Ordering::SeqCst)
    }
}

async fn token_endpoint(State(realm): State<Arc<Realm>>) -> (StatusCode, Json<Value>) {
    if realm.down.load(Ordering::SeqCst) {
        return (StatusCode::SERVICE_UNAVAILABLE, Json(Value::Null));
    }
    let number = realm.granted.fetch_add(1, Ordering::SeqCst) + 1;
    let token = json!({
        "access_token": number.to_string(),
        "token_type": "Bearer",
        "expires_in": 3,
    });
    (StatusCode::OK, Json(token))
}

async fn list_sims(
    State(realm): State<Arc<Realm>>,
    headers: HeaderMap,
) -> (StatusCode, [(HeaderName, &'static str); 1]) {
    let token = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer ")?.parse().ok())
        .unwrap_or(0);
    if token <= realm.revoked.load(Ordering::SeqCst) {
        let challenge = "Bearer error=\"invalid_token\"";
        return (
            StatusCode::UNAUTHORIZED,
            [(header::WWW_AUTHENTICATE, challenge)],
        );
    }
    (StatusCode::OK, [(header::CACHE_CONTROL, "no-store")])
}

/// Serves until the program ends, and returns the base of its URIs.
async fn serve(address: &str, router: Router) -> Result<String, BoxError> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(format!("http://{address}"))
}

const DASHBOARD: &str = include_str!("health_and_metrics/dashboard.json");

/// The buckets of the histograms, in seconds. The second ones are for tokens of an hour at most.
const TOOK: [f64; 9] = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0];
const REMAINS: [f64; 9] = [0.0, 1.0, 5.0, 15.0, 30.0, 60.0, 300.0, 900.0, 3_600.0];

/// How often the samples of histograms are counted.
const UPKEEP: Duration = Duration::from_secs(5);
