//! A client with a retry and a timeout above the layer, and a timeout below it.
//!
//! Runs on its own, in about four seconds: it starts a token endpoint and an API on a loopback port that fail on
//! command. The retry is above the layer, so that it repeats a failed token request once the server allows it, and each
//! try takes the current token. One timeout is below, for each send; the other is above everything. The exit status is 1
//! if a scene does not end as it should.
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

/// For a whole request: every try, the wait for a token, every send.
const TOTAL_TIMEOUT: Duration = Duration::from_secs(2);
/// For each send to the API.
const SEND_TIMEOUT: Duration = Duration::from_millis(500);

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    let servers = Servers::default();
    let (token_url, uri) = servers.serve().await?;
    let source = ClientCredentials::builder(token_url, "client-id")
        .client_secret("secret")
        .build()?;
    let api = ServiceBuilder::new()
        .timeout(TOTAL_TIMEOUT)
        .retry(RetryTransient { tries_left: 9 })
        .layer(BearerAuthLayer::new(source).replay(CloneBody))
        .timeout(SEND_TIMEOUT)
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
        let as_expected = (end.ok(), token_requests, sends)
            == (scene.answer, scene.token_requests, scene.sends)
            && scene.takes.contains(&took);
        if !as_expected {
            println!("    BROKEN, expected {scene:?}");
            held = false;
        }
    }
    Ok(ExitCode::from(u8::from(!held)))
}

// The retry policy.

/// Retries what may pass by itself, whatever the error's type.
#[derive(Clone)]
struct RetryTransient {
    tries_left: u32,
}

impl<B, ResBody, E> Policy<Request<B>, Response<ResBody>, E> for RetryTransient
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
        println!(": next try in {} ms", pause.as_millis());
        Some(time::sleep(pause))
    }

    fn clone_request(&mut self, request: &Request<B>) -> Option<Request<B>> {
        // A request that changes something may have done so before it timed out.
        request.method().is_safe().then(|| request.clone())
    }
}

/// How long to wait before the next try, if one may help.
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
    token_endpoint_faults: &'static [Fault],
    api_faults: &'static [Fault],
    /// The API's answer; none if the request times out.
    answer: Option<StatusCode>,
    token_requests: usize,
    sends: usize,
    takes: Range<Duration>,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    /// 503, with a `Retry-After` in seconds.
    Unavailable { retry_after: Option<u32> },
    /// No answer, ever.
    Hang,
}

const SCENES: &[Scene] = &[
    Scene {
        title: "the token endpoint is unavailable and asks for a pause of one second",
        token_endpoint_faults: &[Fault::Unavailable {
            retry_after: Some(1),
        }],
        api_faults: &[],
        answer: Some(StatusCode::OK),
        token_requests: 2,
        sends: 1,
        takes: millis(1_100)..TOTAL_TIMEOUT,
    },
    Scene {
        title: "the API is unavailable",
        token_endpoint_faults: &[],
        api_faults: &[Fault::Unavailable { retry_after: None }],
        answer: Some(StatusCode::OK),
        token_requests: 0,
        sends: 2,
        takes: PAUSE..TOTAL_TIMEOUT,
    },
    Scene {
        title: "the API hangs once",
        token_endpoint_faults: &[],
        api_faults: &[Fault::Hang],
        answer: Some(StatusCode::OK),
        token_requests: 0,
        sends: 2,
        takes: millis(600)..TOTAL_TIMEOUT,
    },
    Scene {
        title: "the API hangs every time",
        token_endpoint_faults: &[],
        api_faults: &[Fault::Hang; 9],
        answer: None,
        token_requests: 0,
        sends: 4,
        takes: TOTAL_TIMEOUT..millis(4_000),
    },
];

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

// The servers.

/// Both servers: the faults to come, and how many requests they have seen.
#[derive(Clone, Default)]
struct Servers(Arc<Mutex<[Script; 2]>>);

#[derive(Default)]
struct Script {
    faults: VecDeque<Fault>,
    seen: usize,
}

const ENDPOINT: usize = 0;
const API: usize = 1;

impl Servers {
    /// Starts both, and returns the token URL and a URI of the API.
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
        let faults = [scene.token_endpoint_faults, scene.api_faults];
        *self.lock() = faults.map(|faults| Script {
            faults: faults.iter().copied().collect(),
            seen: 0,
        });
    }

    /// How many token requests and how many API requests there were.
    fn seen(&self) -> (usize, usize) {
        let scripts = self.lock();
        (scripts[ENDPOINT].seen, scripts[API].seen)
    }

    /// Counts a request, and answers it if a fault is next.
    async fn fault(&self, server: usize) -> Option<Answer> {
        let fault = {
            let script = &mut self.lock()[server];
            script.seen += 1;
            script.faults.pop_front()?
        };
        match fault {
            Fault::Hang => std::future::pending().await,
            Fault::Unavailable { retry_after: None } => {
                Some(StatusCode::SERVICE_UNAVAILABLE.into_response())
            }
            Fault::Unavailable {
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
    match servers.fault(ENDPOINT).await {
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
    match servers.fault(API).await {
        Some(answer) => answer,
        None => "[]".into_response(),
    }
}
