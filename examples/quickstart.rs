//! A client whose requests all carry a valid token, whatever happens to the tokens.
//!
//! Runs on its own, in about fifteen seconds: it starts an authorization server that answers as Keycloak does
//! and an API that checks every token, both on loopback ports, and sends requests to the API through the
//! layer. Each scene is one line of a table, with a promise that is checked by what the servers saw. The exit
//! status is 1 if one was broken.
//!
//! ```sh
//! cargo run --release --example quickstart [-- --json]
//! ```

use std::{process::ExitCode, time::Duration};

use bytes::Bytes;
use clap::Parser;
use http::{Request, Uri};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::Serialize;
use serde_json::json;
use tokio::{
    sync::oneshot,
    task::{JoinHandle, JoinSet},
    time::{self, Instant},
};
use tower::{ServiceBuilder, ServiceExt, limit::ConcurrencyLimit};
use tower_bearer::{
    BearerAuth, BearerAuthLayer, BoxError, ClientCredentials, CloneBody, TokenError,
};

use self::support::{Realm, Tables};

mod support;

/// Shows a client whose tokens are fetched once, renewed in time and replaced when revoked.
#[derive(Parser)]
struct Args {
    /// Prints one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    let args = Args::parse();
    let mut rows = vec![
        cold_start().await?,
        steady_load().await?,
        revocation().await?,
    ];
    // The outages take the longest and disturb each other least.
    let (short, long) = tokio::try_join!(short_outage(), long_outage())?;
    rows.extend([short, long]);

    let held = rows.iter().all(|row| row.held);
    if args.json {
        println!("{}", json!({ "held": held, "scenes": rows }));
    } else {
        print_table(&rows);
    }
    Ok(ExitCode::from(u8::from(!held)))
}

// The client: all that an application needs.

type Api = BearerAuth<ConcurrencyLimit<Client<HttpConnector, Full<Bytes>>>, CloneBody>;

fn client(token_url: String) -> Result<Api, BoxError> {
    let source = ClientCredentials::builder(token_url, support::CLIENT_ID)
        .client_secret(support::CLIENT_SECRET)
        .scope("profile")
        .build()?;
    Ok(ServiceBuilder::new()
        .layer(BearerAuthLayer::new(source).replay(CloneBody))
        // Below the layer, so that it bounds the sockets: requests that wait for a token hold none.
        .concurrency_limit(100)
        .service(Client::builder(TokioExecutor::new()).build_http()))
}

/// Sends one request that was due at `due`, and reads the answer to its end.
async fn send(api: Api, uri: Uri, due: Instant) -> Outcome {
    let result = async {
        let request = Request::get(uri).body(Full::default())?;
        let response = api.oneshot(request).await?;
        let status = response.status();
        response.into_body().collect().await?;
        match status.is_success() {
            true => Ok(()),
            false => Err(BoxError::from(format!("status {status}"))),
        }
    };
    let error = result.await.err();
    let ended = Instant::now();
    Outcome { due, ended, error }
}

struct Outcome {
    due: Instant,
    ended: Instant,
    error: Option<BoxError>,
}

impl Outcome {
    fn latency(&self) -> Duration {
        self.ended - self.due
    }
}

// The scenes.

async fn cold_start() -> Result<Row, BoxError> {
    let world = World::start("cold start", Duration::from_secs(300)).await?;
    let mut requests = JoinSet::new();
    let now = Instant::now();
    for _ in 0..10_000 {
        requests.spawn(send(world.api.clone(), world.uri.clone(), now));
    }
    let outcomes = requests.join_all().await;

    let token_requests = world.realm.lock().token_requests.len();
    Ok(world
        .row(&outcomes, "one token request for all of them, 0 failed")
        .check("0 failed", failures(&outcomes).next().is_none())
        .check("1 token request", token_requests == 1))
}

async fn steady_load() -> Result<Row, BoxError> {
    let lifetime = Duration::from_secs(2);
    // The least time between two successful token requests, for tokens this short-lived.
    let least_gap = Duration::from_secs(1);

    let world = World::start("steady load", lifetime).await?;
    let load = Load::start(&world).await?;
    time::sleep(lifetime * 13 / 4).await;
    let outcomes = load.stop().await?;

    let count = world.realm.lock().token_requests.len();
    let took = world.started.elapsed().as_secs_f64();
    let gaps = took / least_gap.as_secs_f64();
    let bound = 1 + gaps as usize;
    let promise = format!(
        "0 failed over 3 lifetimes; {count} token requests, at most {bound}: the first, and one per second of {took:.1} s"
    );
    Ok(world
        .row(&outcomes, promise)
        .check("0 failed", failures(&outcomes).next().is_none())
        .check("a token request per lifetime", count > 3)
        .check("no more token requests than permitted", count <= bound))
}

async fn revocation() -> Result<Row, BoxError> {
    let world = World::start("revocation", Duration::from_secs(300)).await?;
    let load = Load::start(&world).await?;
    time::sleep(Duration::from_secs(1)).await;
    let (revoked, before) = world.realm.lock().revoke();
    time::sleep(Duration::from_millis(1_500)).await;
    let outcomes = load.stop().await?;

    let (after, refused) = {
        let tables = world.realm.lock();
        (tables.token_requests.len(), tables.refused)
    };
    let promise = format!("{refused} refused and sent again, 0 failed, one more token request");
    Ok(world
        .row(&outcomes, promise)
        .check("a token to revoke", revoked > 0)
        .check("a refused request", refused > 0)
        .check("0 failed", failures(&outcomes).next().is_none())
        .check("1 more token request", after == before + 1))
}

async fn short_outage() -> Result<Row, BoxError> {
    let lifetime = Duration::from_secs(8);
    let world = World::start("short outage", lifetime).await?;
    let load = Load::start(&world).await?;
    world.realm.lock().down = true;
    let since = Instant::now();
    // Until a refresh has met it, with the refresh token and with the client's credentials.
    let met = |tables: &Tables| tables.token_requests_while_down().len() >= 2;
    world.until(lifetime, met).await;
    world.realm.lock().down = false;
    let outage = since.elapsed().as_secs_f64();
    world.until(lifetime, |tables| tables.granted() == 2).await;
    time::sleep(Duration::from_millis(500)).await;
    let outcomes = load.stop().await?;

    let promise = format!("{outage:.1} s down, the token outlives it, 0 failed");
    let row = world.row(&outcomes, promise);
    let tables = world.realm.lock();
    Ok(row
        .check("0 failed", failures(&outcomes).next().is_none())
        .check("a refresh that meets the outage", met(&tables))
        .check("a token again", tables.granted() == 2))
}

async fn long_outage() -> Result<Row, BoxError> {
    let lifetime = Duration::from_secs(3);
    let world = World::start("long outage", lifetime).await?;
    let load = Load::start(&world).await?;
    world.realm.lock().down = true;
    time::sleep(Duration::from_millis(3_500)).await;
    world.realm.lock().down = false;
    let back = Instant::now();
    world.until(gate(5), |tables| tables.granted() == 2).await;
    time::sleep(SLACK * 3 / 2).await;
    let outcomes = load.stop().await?;

    let (requests, recovered) = {
        let tables = world.realm.lock();
        (tables.token_requests_while_down(), tables.last_granted())
    };
    let permitted = permitted(
        requests
            .first()
            .map_or(Duration::ZERO, |first| back - *first),
    );
    let gate = gate((requests.len() + 1).saturating_sub(FIRST_FLIGHT));
    let wait = recovered.saturating_duration_since(back);
    // A token is attached for nine tenths of its life, counted from its request. It may still expire on its way,
    // if the machine is so busy that a request takes longer than the last tenth.
    let margin = lifetime / 10;
    let died = world.started + lifetime - margin;
    let promise = format!(
        "a token {:.1} s after the outage, at most {:.1} s; {} token requests during it, at most {permitted}",
        wait.as_secs_f64(),
        gate.as_secs_f64(),
        requests.len(),
    );
    Ok(world
        .row(&outcomes, promise)
        .check("requests that fail", failures(&outcomes).next().is_some())
        .check(
            "token errors and no others",
            failures(&outcomes)
                .all(|(outcome, error)| error.is::<TokenError>() || outcome.latency() > margin),
        )
        .check(
            "only while there is no token",
            failures(&outcomes)
                .all(|(outcome, _)| outcome.ended >= died && outcome.due <= recovered + SLACK),
        )
        .check(
            "no more token requests than permitted",
            requests.len() <= permitted,
        )
        .check("a token again", recovered > back)
        .check("within one gate", wait <= gate + SLACK))
}

/// How long the gate stays closed at most after `failures` failed flights in a row.
fn gate(failures: usize) -> Duration {
    let doubled = BACKOFF * 2_u32.pow(failures.saturating_sub(1).min(8) as u32);
    doubled.min(BACKOFF_CAP).mul_f64(1.1)
}

/// How many token requests an outage of this length may see, counted from the first.
fn permitted(outage: Duration) -> usize {
    // A gate stays closed for at least half its length.
    let half = |failures| BACKOFF.mul_f64(0.5) * 2_u32.pow(failures);
    let mut gates = 0;
    let mut closed = half(0);
    while closed <= outage {
        gates += 1;
        closed += half(gates).min(BACKOFF_CAP / 2);
    }
    // Once per token, when it expires, a flight passes a closed gate.
    FIRST_FLIGHT + gates as usize + 1
}

const BACKOFF: Duration = Duration::from_millis(500);
const BACKOFF_CAP: Duration = Duration::from_secs(10);
/// The token requests of the first refresh that fails: the refresh token, and three times the client's credentials.
/// Every further refresh is one request, until one succeeds.
const FIRST_FLIGHT: usize = 4;
/// What a busy machine may add to a wait.
const SLACK: Duration = Duration::from_secs(1);

// The load.

/// Requests at a constant rate, each sent when it is due, however long the others take.
struct Load {
    stop: oneshot::Sender<()>,
    outcomes: JoinHandle<Vec<Outcome>>,
}

impl Load {
    async fn start(world: &World) -> Result<Self, BoxError> {
        // Otherwise the slowest request would always be one that waited for the first token.
        world.api.cache().get().await?;
        let (stop, mut stopped) = oneshot::channel();
        let (api, uri) = (world.api.clone(), world.uri.clone());
        let outcomes = tokio::spawn(async move {
            let mut requests = JoinSet::new();
            let mut ticks = time::interval(Duration::from_secs(1) / RATE);
            loop {
                tokio::select! {
                    due = ticks.tick() => requests.spawn(send(api.clone(), uri.clone(), due)),
                    _ = &mut stopped => break requests.join_all().await,
                };
            }
        });
        Ok(Self { stop, outcomes })
    }

    async fn stop(self) -> Result<Vec<Outcome>, BoxError> {
        drop(self.stop);
        Ok(self.outcomes.await?)
    }
}

fn failures(outcomes: &[Outcome]) -> impl Iterator<Item = (&Outcome, &BoxError)> {
    let all = outcomes.iter();
    all.filter_map(|outcome| Some((outcome, outcome.error.as_ref()?)))
}

/// Requests per second.
const RATE: u32 = 500;

// The servers.

/// A client with an empty cache, and the two servers it talks to.
struct World {
    scene: &'static str,
    started: Instant,
    realm: Realm,
    api: Api,
    uri: Uri,
}

impl World {
    /// Starts servers whose tokens live for `lifetime`.
    async fn start(scene: &'static str, lifetime: Duration) -> Result<Self, BoxError> {
        eprintln!("{scene} ..");
        let realm = Realm::new(lifetime);
        let (token_url, uri) = realm.serve().await?;
        Ok(Self {
            scene,
            started: Instant::now(),
            realm,
            api: client(token_url)?,
            uri,
        })
    }

    /// Waits until the servers have `seen` something, at most for `limit`.
    async fn until(&self, limit: Duration, seen: impl Fn(&Tables) -> bool) {
        let limit = Instant::now() + limit;
        while !seen(&self.realm.lock()) && Instant::now() < limit {
            time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The scene's line, with the promises that hold in all of them.
    fn row(&self, outcomes: &[Outcome], promise: impl Into<String>) -> Row {
        let slowest = outcomes.iter().map(Outcome::latency).max();
        let tables = self.realm.lock();
        let row = Row {
            scene: self.scene,
            requests: outcomes.len(),
            failed: failures(outcomes).count(),
            client_credentials: tables.token_requests_by("client_credentials"),
            refresh_token: tables.token_requests_by("refresh_token"),
            slowest_ms: (slowest.unwrap_or_default().as_secs_f64() * 1e3).round(),
            promise: promise.into(),
            held: true,
            broken: Vec::new(),
        };
        row.check("no request without a token", tables.anonymous == 0)
            .check("no refresh token sent twice", tables.reused == 0)
    }
}

// The table.

#[derive(Serialize)]
struct Row {
    scene: &'static str,
    requests: usize,
    failed: usize,
    /// Token requests that the server saw, by grant.
    client_credentials: usize,
    refresh_token: usize,
    slowest_ms: f64,
    promise: String,
    held: bool,
    /// What was expected and did not hold.
    broken: Vec<&'static str>,
}

impl Row {
    fn check(mut self, what: &'static str, holds: bool) -> Self {
        if !holds {
            self.held = false;
            self.broken.push(what);
        }
        self
    }
}

fn print_table(rows: &[Row]) {
    // Two of the columns share a heading.
    println!("{:>55}", "token requests by");
    println!(
        "{:<13} {:>8} {:>7} {:>18} {:>13} {:>8}  promise",
        "scene", "requests", "failed", "client_credentials", "refresh_token", "slowest"
    );
    for row in rows {
        let verdict = match row.held {
            true => "held".to_owned(),
            false => format!("BROKEN ({})", row.broken.join("; ")),
        };
        println!(
            "{:<13} {:>8} {:>7} {:>18} {:>13} {:>5} ms  {verdict}: {}",
            row.scene,
            row.requests,
            row.failed,
            row.client_credentials,
            row.refresh_token,
            row.slowest_ms,
            row.promise,
        );
    }
}
