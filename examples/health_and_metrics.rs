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
//! that the dashboard draws the metrics that exist.

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

/// Shows what a service reports about its tokens during an outage.
#[derive(Parser)]
struct Args {
    /// Goes on for this many seconds, with traffic, on a fixed loopback port for Prometheus
    #[arg(long)]
    linger: Option<u64>,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    // Before the cache is made, or the first token requests would not be counted.
    let recorder = PrometheusBuilder::new()
        // Without buckets, histograms are exported as summaries, which cannot be aggregated.
        .set_buckets_for_metric(
            Matcher::Suffix("flight_duration_seconds".into()),
            &DURATION_BUCKETS,
        )?
        .set_buckets_for_metric(
            Matcher::Suffix("token_remaining_seconds".into()),
            &REMAINING_BUCKETS,
        )?
        .install_recorder()?;
    // The exporter collects histogram samples until a scrape, or this, counts them.
    let upkeep = recorder.clone();
    tokio::spawn(async move {
        loop {
            time::sleep(UPKEEP_PERIOD).await;
            upkeep.run_upkeep();
        }
    });

    let realm = Arc::new(Realm::default());
    let client = Client::builder(TokioExecutor::new()).build_http();
    let (token_url, api) = realm.serve().await?;
    let source = ClientCredentials::builder(token_url, "client-id")
        .client_secret("client-secret")
        .build_with(client.clone())?;
    // One attempt per flight: tokens of three seconds leave no time for more before they expire.
    let policy = RefreshPolicy::new().name("sims").attempts(1);
    let cache = TokenCache::with_policy(source, policy);
    let service = BearerAuthLayer::new(cache.clone())
        .replay(CloneBody)
        .layer(client.clone());

    let address = match args.linger {
        Some(_) => "127.0.0.1:9464",
        None => "127.0.0.1:0",
    };
    let state = AppState {
        cache: cache.clone(),
        recorder,
    };
    let monitor = Monitor {
        client,
        base: serve(address, endpoints(state)).await?,
    };
    tokio::spawn(print_events(cache.clone()));

    // No token has been requested yet, and the service takes requests.
    let health = monitor.health("before").await?;
    expect(&health, "ok", "missing", 200)?;

    let traffic = tokio::spawn(traffic(service, api));
    time::sleep(Duration::from_millis(500)).await;
    let health = monitor.health("steady load").await?;
    expect(&health, "ok", "fresh", 200)?;
    let metrics = monitor.metrics().await?;
    assert!(metrics.sum("tower_bearer_requests_total", "token=\"fresh\"") > 10.0);
    assert_eq!(
        metrics.sum("tower_bearer_requests_total", "token=\"failed\""),
        0.0
    );
    assert_eq!(metrics.sum("tower_bearer_closed_gates", ""), 0.0);

    // The API revokes a token: it is replaced, and nobody notices.
    realm.revoked.store(realm.granted(), Ordering::SeqCst);
    time::sleep(Duration::from_millis(500)).await;
    let metrics = monitor.metrics().await?;
    assert!(metrics.sum("tower_bearer_token_refusals_total", "decision=\"started\"") >= 1.0);
    assert!(metrics.sum("tower_bearer_replays_total", "") >= 1.0);

    // The authorization server goes down. Requests go on with the token at hand ..
    realm.down.store(true, Ordering::SeqCst);
    let health = monitor.until("outage", "degraded").await?;
    expect(&health, "degraded", "due", 200)?;
    let metrics = monitor.metrics().await?;
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
    // .. until it expires.
    let health = monitor.until("outage, later", "failing").await?;
    expect(&health, "failing", "expired", 503)?;
    time::sleep(Duration::from_millis(200)).await;
    let metrics = monitor.metrics().await?;
    assert!(metrics.sum("tower_bearer_requests_total", "token=\"failed\"") >= 1.0);

    // The server comes back.
    realm.down.store(false, Ordering::SeqCst);
    let health = monitor.until("recovery", "ok").await?;
    expect(&health, "ok", "fresh", 200)?;
    let metrics = monitor.metrics().await?;
    assert_eq!(metrics.sum("tower_bearer_closed_gates", ""), 0.0);

    // The dashboard draws every metric, and nothing else.
    let dashboard: Value = serde_json::from_str(DASHBOARD)?;
    assert_eq!(drawn(&dashboard, &metrics), metrics.names());
    println!("the dashboard draws all {} metrics", metrics.names().len());

    if let Some(seconds) = args.linger {
        println!("serving {} for {seconds} s", monitor.base);
        time::sleep(Duration::from_secs(seconds)).await;
    }
    traffic.abort();
    Ok(())
}

// The service's own endpoints.

#[derive(Clone)]
struct AppState {
    cache: TokenCache,
    recorder: PrometheusHandle,
}

fn endpoints(state: AppState) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics))
        .with_state(state)
}

/// Out of service while requests would fail, since other instances may do better; in service, though degraded, during
/// an outage that the token outlives.
async fn healthz(State(state): State<AppState>) -> (StatusCode, Json<Value>) {
    let status = state.cache.status();
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

async fn metrics(State(state): State<AppState>) -> String {
    state.recorder.render()
}

/// Prints the events that matter, as an example of what to do with them.
async fn print_events(cache: TokenCache) {
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

// The monitoring.

struct Monitor {
    client: Http,
    base: String,
}

type Http = Client<HttpConnector, Full<Bytes>>;

impl Monitor {
    async fn health(&self, phase: &str) -> Result<(u16, Value), BoxError> {
        let (code, body) = self.get("/healthz").await?;
        let health = serde_json::from_slice(&body)?;
        println!("{phase}: {code} {health}");
        Ok((code, health))
    }

    /// Polls until the status is this one.
    async fn until(&self, phase: &str, status: &str) -> Result<(u16, Value), BoxError> {
        let end = Instant::now() + Duration::from_secs(15);
        loop {
            let (_, body) = self.get("/healthz").await?;
            let health: Value = serde_json::from_slice(&body)?;
            if health["status"] == status {
                return self.health(phase).await;
            }
            if Instant::now() > end {
                return Err(format!("the status does not become {status}: {health}").into());
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
    // A fresh token may have become due meanwhile.
    let token_fits = health["token"] == token || (token == "fresh" && health["token"] == "due");
    if *code == expected && health["status"] == status && token_fits {
        return Ok(());
    }
    Err(format!("not {expected}, {status} and {token}").into())
}

/// The answer of `/metrics`, in Prometheus's text format.
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
            // The metrics count failures.
            let _ = service.call(request).await;
        }
        time::sleep(Duration::from_millis(5)).await;
    }
}

// The servers: an authorization server whose tokens live for three seconds, and an API.

#[derive(Default)]
struct Realm {
    down: AtomicBool,
    granted: AtomicUsize,
    /// Tokens up to this number are revoked.
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

/// The histograms' buckets, in seconds. The latter are for tokens of an hour at most.
const DURATION_BUCKETS: [f64; 9] = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0];
const REMAINING_BUCKETS: [f64; 9] = [0.0, 1.0, 5.0, 15.0, 30.0, 60.0, 300.0, 900.0, 3_600.0];

/// How often histogram samples are counted.
const UPKEEP_PERIOD: Duration = Duration::from_secs(5);
