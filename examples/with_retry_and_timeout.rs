//! A client with a retry and a timeout above the layer, and a timeout below it.
//!
//! Runs on its own, in about four seconds: it starts a token endpoint and an API on loopback ports that fail on
//! command. The retry is above the layer, so that a failed token request has another chance once the server allows
//! it, and each try takes the current token. One timeout is below, for each send; the other is above everything. The
//! exit status is 1 if a scene does not end as it should.
//!
//! ```sh
//! cargo run --example with_retry_and_timeout
//! ```

use std::{
    collections::VecDeque,
    error::Error,
    ops::Range,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::State,
    response::{IntoResponse, Response as Answer},
    routing::{get, post},
};
use bytes::Bytes;
use http::{Request, Response, StatusCode, header::RETRY_AFTER};
use http_body_util::Empty;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde_json::json;
use tokio::{
    net::TcpListener,
    time::{self, Instant, Sleep},
};
use tower::{ServiceBuilder, ServiceExt, retry::Policy, timeout::error::Elapsed};
use tower_bearer::{BearerAuthLayer, BoxError, ClientCredentials, CloneBody, TokenError};

/// All of a request: every try, the wait for a token, every send.
const IN_ALL: Duration = Duration::from_secs(2);
/// Each send to the API.
const PER_SEND: Duration = Duration::from_millis(500);

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    let servers = Servers::default();
    let (token_url, uri) = servers.serve().await?;
    let source = ClientCredentials::builder(token_url, "client-id")
        .client_secret("secret")
        .build()?;
    let api = ServiceBuilder::new()
        .timeout(IN_ALL)
        .retry(Heal { tries_left: 9 })
        .layer(BearerAuthLayer::new(source).replay(CloneBody))
        .timeout(PER_SEND)
        .service(Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>());

    let mut held = true;
    for scene in SCENES {
        println!("{}", scene.title);
        servers.script(scene);
        let request = Request::get(&uri).body(Empty::new())?;
        let start = Instant::now();
        let end = match api.clone().oneshot(request).await {
            Ok(response) => Ok(response.status()),
            Err(error) if error.is::<Elapsed>() => Err("timed out"),
            Err(error) => return Err(error),
        };
        let took = start.elapsed();
        let (token_requests, sends) = servers.seen();
        println!(
            "    {} after {} ms, {token_requests} token requests, {sends} sends",
            end.map_or_else(ToString::to_string, |status| status.to_string()),
            took.as_millis()
        );
        let is_so = (end.ok(), token_requests, sends)
            == (scene.answer, scene.token_requests, scene.sends)
            && scene.takes.contains(&took);
        if !is_so {
            println!("    BROKEN, expected {scene:?}");
            held = false;
        }
    }
    Ok(ExitCode::from(u8::from(!held)))
}

// The retry policy.

/// Tries again what may heal, whatever the error's type is.
#[derive(Clone)]
struct Heal {
    tries_left: u32,
}

impl<B, ResBody, E> Policy<Request<B>, Response<ResBody>, E> for Heal
where
    B: Clone,
    E: AsRef<dyn Error + Send + Sync>,
{
    type Future = Sleep;

    fn retry(
        &mut self,
        _: &mut Request<B>,
        result: &mut Result<Response<ResBody>, E>,
    ) -> Option<Sleep> {
        let pause = match result {
            Ok(response) if response.status().is_server_error() => PAUSE,
            Ok(_) => return None,
            Err(error) => pause_after((*error).as_ref())?,
        };
        self.tries_left = self.tries_left.checked_sub(1)?;
        match result {
            Ok(response) => print!("    {}", response.status()),
            Err(error) => print!("    {}", (*error).as_ref()),
        }
        println!(": another try in {} ms", pause.as_millis());
        Some(time::sleep(pause))
    }

    fn clone_request(&mut self, request: &Request<B>) -> Option<Request<B>> {
        // One that changes something may have done so before it was timed out.
        request.method().is_safe().then(|| request.clone())
    }
}

/// How long to wait before another try, if that may be of use.
fn pause_after(error: &(dyn Error + Send + Sync + 'static)) -> Option<Duration> {
    match error.downcast_ref::<TokenError>() {
        // The cache waits for up to a tenth longer than it was asked to.
        Some(error) if error.is_transient() => {
            let asked = error.retry_after();
            Some(asked.map_or(PAUSE, |asked| asked.mul_f64(1.1)))
        }
        Some(_) => None,
        None => error.is::<Elapsed>().then_some(PAUSE),
    }
}

const PAUSE: Duration = Duration::from_millis(100);

// The scenes.

#[derive(Debug)]
struct Scene {
    title: &'static str,
    /// What goes wrong, request by request; nothing afterwards.
    at_the_token_endpoint: &'static [Mishap],
    at_the_api: &'static [Mishap],
    /// The API's answer, or none in time.
    answer: Option<StatusCode>,
    token_requests: usize,
    sends: usize,
    takes: Range<Duration>,
}

#[derive(Clone, Copy, Debug)]
enum Mishap {
    /// 503, with a `Retry-After` of so many seconds.
    Unavailable { retry_after: Option<u32> },
    /// No answer for as long as anybody waits.
    Hang,
}

const SCENES: &[Scene] = &[
    Scene {
        title: "the token endpoint is not available and asks for a second",
        at_the_token_endpoint: &[Mishap::Unavailable {
            retry_after: Some(1),
        }],
        at_the_api: &[],
        answer: Some(StatusCode::OK),
        token_requests: 2,
        sends: 1,
        takes: millis(1_100)..IN_ALL,
    },
    Scene {
        title: "the API is not available",
        at_the_token_endpoint: &[],
        at_the_api: &[Mishap::Unavailable { retry_after: None }],
        answer: Some(StatusCode::OK),
        token_requests: 0,
        sends: 2,
        takes: PAUSE..IN_ALL,
    },
    Scene {
        title: "the API hangs",
        at_the_token_endpoint: &[],
        at_the_api: &[Mishap::Hang],
        answer: Some(StatusCode::OK),
        token_requests: 0,
        sends: 2,
        takes: millis(600)..IN_ALL,
    },
    Scene {
        title: "the API hangs and hangs",
        at_the_token_endpoint: &[],
        at_the_api: &[Mishap::Hang; 9],
        answer: None,
        token_requests: 0,
        sends: 4,
        takes: IN_ALL..millis(4_000),
    },
];

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

// The servers.

/// Both servers: what is still to go wrong, and what they have seen.
#[derive(Clone, Default)]
struct Servers(Arc<Mutex<[Script; 2]>>);

#[derive(Default)]
struct Script {
    mishaps: VecDeque<Mishap>,
    seen: usize,
}

const ENDPOINT: usize = 0;
const API: usize = 1;

impl Servers {
    /// Starts them, and returns the token URL and a URI of the API.
    async fn serve(&self) -> Result<(String, String), BoxError> {
        let router = Router::new()
            .route("/token", post(token))
            .route("/sims", get(list_sims))
            .with_state(self.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok((
            format!("http://{address}/token"),
            format!("http://{address}/sims"),
        ))
    }

    fn script(&self, scene: &Scene) {
        let mishaps = [scene.at_the_token_endpoint, scene.at_the_api];
        *self.lock() = mishaps.map(|mishaps| Script {
            mishaps: mishaps.iter().copied().collect(),
            seen: 0,
        });
    }

    /// How many token requests and how many API requests there were.
    fn seen(&self) -> (usize, usize) {
        let scripts = self.lock();
        (scripts[ENDPOINT].seen, scripts[API].seen)
    }

    /// Counts a request and lets go wrong what is to; `None` if nothing is.
    async fn mishap(&self, at: usize) -> Option<Answer> {
        let mishap = {
            let script = &mut self.lock()[at];
            script.seen += 1;
            script.mishaps.pop_front()?
        };
        match mishap {
            Mishap::Hang => std::future::pending().await,
            Mishap::Unavailable { retry_after: None } => {
                Some(StatusCode::SERVICE_UNAVAILABLE.into_response())
            }
            Mishap::Unavailable {
                retry_after: Some(seconds),
            } => {
                let header = [(RETRY_AFTER, seconds.to_string())];
                Some((StatusCode::SERVICE_UNAVAILABLE, header).into_response())
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, [Script; 2]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn token(State(servers): State<Servers>) -> Answer {
    match servers.mishap(ENDPOINT).await {
        Some(answer) => answer,
        None => Json(json!({
            "access_token": "mF_9.B5f-4.1JqM",
            "token_type": "Bearer",
            "expires_in": 300,
        }))
        .into_response(),
    }
}

async fn list_sims(State(servers): State<Servers>) -> Answer {
    match servers.mishap(API).await {
        Some(answer) => answer,
        None => "[]".into_response(),
    }
}
