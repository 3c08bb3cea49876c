//! A token source of your own: a vendor's login that is not OAuth.
//!
//! The vendor's server takes a name and a password as JSON and answers with a ticket, its lifetime in milliseconds, and
//! a renewal code that can be used once. When it is busy, it says for how long; when it locks the account, only a
//! person can help. [`Login`] implements that in some fifty lines, and the crate does the rest: one login for any number
//! of requests, renewal before the ticket expires, and backoff.
//!
//! Runs on its own on a loopback port in about five seconds, and exits with an error if it does not go as described.
//!
//! ```sh
//! cargo run --example custom_source
//! ```

use std::{
    error::Error,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::{Json, Router, extract::State, response::IntoResponse, routing::post};
use bytes::Bytes;
use http::{Request, Response, StatusCode, header::RETRY_AFTER};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet, time};
use tower_bearer::{
    BoxError, Fetch, RefreshToken, TokenCache, TokenError, TokenResponse, TokenSource,
};

// The source.

/// The vendor's login.
#[derive(Clone)]
struct Login {
    http: Client<HttpConnector, Full<Bytes>>,
    base: String,
    name: &'static str,
    password: &'static str,
}

#[derive(Deserialize)]
struct Ticket {
    ticket: String,
    lifetime_ms: u64,
    renewal: String,
}

impl TokenSource for Login {
    async fn fetch(&self, fetch: Fetch) -> Result<TokenResponse, TokenError> {
        if let Some(renewal) = fetch.refresh_token {
            let renewal = json!({ "renewal": renewal.expose_secret() });
            // Whatever the reason for a failure, the same attempt goes on to the password.
            if let Ok(response) = self.post("/renew", &renewal).await {
                return Ok(response);
            }
        }
        let credentials = json!({ "name": self.name, "password": self.password });
        self.post("/login", &credentials).await
    }
}

impl Login {
    async fn post(&self, path: &str, body: &Value) -> Result<TokenResponse, TokenError> {
        // A request that cannot be built now never can.
        let request = Request::post(format!("{}{path}", self.base))
            .header("content-type", "application/json")
            .body(Full::from(body.to_string()))
            .map_err(TokenError::terminal)?;
        // A failed connection may succeed later.
        let response = self
            .http
            .request(request)
            .await
            .map_err(TokenError::transient)?;
        if response.status() != StatusCode::OK {
            return Err(refusal(&response));
        }
        // An unbounded body could fill the memory.
        let body = Limited::new(response.into_body(), 64 * 1024)
            .collect()
            .await;
        let body = body.map_err(TokenError::transient)?.to_bytes();
        // Without the parser's error, which might quote the ticket.
        let ticket: Ticket = serde_json::from_slice(&body)
            .map_err(|_| TokenError::transient("the answer is not a ticket"))?;
        Ok(TokenResponse::new(ticket.ticket)?
            .expires_in(Duration::from_millis(ticket.lifetime_ms))
            .refresh_token(RefreshToken::new(ticket.renewal)))
    }
}

/// Says whether a refusal passes by itself, and when.
fn refusal<B>(response: &Response<B>) -> TokenError {
    let status = response.status();
    let error = format!("the login answered with status {}", status.as_u16());
    let seconds = response.headers().get(RETRY_AFTER);
    let seconds = seconds.and_then(|value| value.to_str().ok()?.parse().ok());
    if status != StatusCode::TOO_MANY_REQUESTS && !status.is_server_error() {
        return TokenError::terminal(error);
    }
    let error = TokenError::transient(error);
    match seconds {
        Some(seconds) => error.with_retry_after(Duration::from_secs(seconds)),
        None => error,
    }
}

// The demonstration.

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let vendor = Vendor::default();
    let login = Login {
        http: Client::builder(TokioExecutor::new()).build_http(),
        base: vendor.serve().await?,
        name: "gateway",
        password: "correct horse",
    };

    // All that a layer needs is a cache: `BearerAuthLayer::new(cache.clone())`.
    let cache = TokenCache::new(login.clone());
    let mut callers = JoinSet::new();
    for _ in 0..100 {
        let cache = cache.clone();
        callers.spawn(async move { cache.get().await });
    }
    for token in callers.join_all().await {
        token?;
    }
    println!("100 callers      {}", vendor.summary());
    assert_eq!(vendor.lock().requests, ["/login"]);

    // The ticket lives for two seconds.
    let first = cache.get().await?;
    time::sleep(Duration::from_secs(2)).await;
    let second = cache.get().await?;
    println!("a lifetime later {}", vendor.summary());
    assert_eq!(vendor.lock().requests, ["/login", "/renew"]);
    assert_ne!(first.expose_secret(), second.expose_secret());

    // The session is gone, and its renewal code with it.
    vendor.lock().renewals.clear();
    time::sleep(Duration::from_secs(2)).await;
    cache.get().await?;
    println!("session lost     {}", vendor.summary());
    assert_eq!(vendor.lock().requests[2..], ["/renew", "/login"]);

    // A busy server gets no requests for as long as it asks. Meanwhile, callers get its error at once.
    vendor.clear();
    vendor.lock().mode = Mode::Busy;
    let cache = TokenCache::new(login.clone());
    let error = cache.get().await.err().ok_or("a ticket while busy")?;
    assert!(error.is_transient() && error.retry_after() == Some(Duration::from_secs(1)));
    let since = Instant::now();
    while since.elapsed() < Duration::from_millis(900) {
        assert!(cache.get().await.is_err());
        time::sleep(Duration::from_millis(10)).await;
    }
    // The error of the token source is the source of the cache's error.
    let reason = error.source().ok_or("an error without a reason")?;
    println!("busy             {} ({reason})", vendor.summary());
    assert_eq!(vendor.lock().requests.len(), 1);
    vendor.lock().mode = Mode::Normal;
    time::sleep(Duration::from_millis(400)).await;
    cache.get().await?;
    println!("no longer busy   {}", vendor.summary());

    // A locked account gets no further attempts, since some vendors count them.
    vendor.clear();
    vendor.lock().mode = Mode::Locked;
    let cache = TokenCache::new(login);
    let error = cache.get().await.err().ok_or("a ticket while locked")?;
    for _ in 0..100 {
        assert!(!error.is_transient() && cache.get().await.is_err());
    }
    let reason = error.source().ok_or("an error without a reason")?;
    println!("locked           {} ({reason})", vendor.summary());
    assert_eq!(vendor.lock().requests.len(), 1);
    Ok(())
}

// The vendor.

/// The vendor's server; clones share its state.
#[derive(Clone, Default)]
struct Vendor(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    mode: Mode,
    tickets: u32,
    /// The valid renewal codes.
    renewals: Vec<String>,
    /// The paths of the requests so far.
    requests: Vec<&'static str>,
}

#[derive(Clone, Copy, Default)]
enum Mode {
    #[default]
    Normal,
    Busy,
    Locked,
}

impl Vendor {
    async fn serve(&self) -> Result<String, BoxError> {
        let login = |State(vendor): State<Self>, Json(body): Json<Value>| async move {
            let known = body["name"] == "gateway" && body["password"] == "correct horse";
            vendor.lock().answer("/login", known)
        };
        let renew = |State(vendor): State<Self>, Json(body): Json<Value>| async move {
            let mut inner = vendor.lock();
            let code = body["renewal"].as_str().unwrap_or_default();
            let index = inner.renewals.iter().position(|known| known == code);
            let known = index.map(|index| inner.renewals.remove(index));
            inner.answer("/renew", known.is_some())
        };
        let router = Router::new()
            .route("/login", post(login))
            .route("/renew", post(renew))
            .with_state(self.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(format!("http://{address}"))
    }

    fn summary(&self) -> String {
        format!("requests to {}", self.lock().requests.join(", "))
    }

    fn clear(&self) {
        self.lock().requests.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn answer(&mut self, path: &'static str, known: bool) -> axum::response::Response {
        self.requests.push(path);
        match self.mode {
            Mode::Busy => (StatusCode::TOO_MANY_REQUESTS, [(RETRY_AFTER, "1")]).into_response(),
            Mode::Locked => (StatusCode::FORBIDDEN, "account locked").into_response(),
            Mode::Normal if !known => StatusCode::UNAUTHORIZED.into_response(),
            Mode::Normal => {
                self.tickets += 1;
                let renewal = format!("renewal-{}", self.tickets);
                self.renewals.push(renewal.clone());
                let ticket = format!("ticket-{}", self.tickets);
                let lifetime_ms = 2_000;
                Json(json!({ "ticket": ticket, "lifetime_ms": lifetime_ms, "renewal": renewal }))
                    .into_response()
            }
        }
    }
}
