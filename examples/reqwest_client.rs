//! A `reqwest::Client` whose tokens are fetched once, and replaced under load when they are revoked.
//!
//! Runs on its own, in about a second: it starts an authorization server and an API on a loopback port, sends
//! requests through the layer, and revokes every token halfway. It asserts that no request failed.
//!
//! ```sh
//! cargo run --features reqwest --example reqwest_client
//! ```

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::State,
    routing::{post, put},
};
use http::{
    HeaderMap, StatusCode,
    header::{AUTHORIZATION, WWW_AUTHENTICATE},
};
use reqwest::{Client, redirect};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    task::JoinSet,
    time::{self, Instant},
};
use tower::{ServiceBuilder, ServiceExt};
use tower_bearer::{BearerAuthLayer, BoxError, ClientCredentials, CloneBody};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let (servers, base) = Servers::start().await?;
    // No redirects: reqwest would follow them below the layer, with the token among the headers.
    let client = Client::builder()
        .redirect(redirect::Policy::none())
        .no_proxy()
        .build()?;
    let source = ClientCredentials::builder(format!("{base}/token"), "client-id")
        .client_secret("client-secret")
        .build()?;
    let api = ServiceBuilder::new()
        .timeout(Duration::from_secs(5))
        // A body of bytes is cheap to copy; one that streams would be sent once.
        .layer(BearerAuthLayer::new(source).replay(CloneBody))
        .service(client.clone());

    let until = Instant::now() + Duration::from_secs(1);
    let mut callers = JoinSet::new();
    for caller in 0..20 {
        let (client, api) = (client.clone(), api.clone());
        let url = format!("{base}/sims/{caller}");
        callers.spawn(async move {
            let mut sent = 0;
            while Instant::now() < until {
                // The client builds the request, and the layer over it sends it.
                let body = format!("plan of {caller}");
                let request = client.put(&url).body(body.clone()).build()?;
                let response = api.clone().oneshot(request).await?.error_for_status()?;
                assert_eq!(response.text().await?, body);
                sent += 1;
                time::sleep(Duration::from_millis(1)).await;
            }
            Ok::<_, BoxError>(sent)
        });
    }
    time::sleep(Duration::from_millis(500)).await;
    servers.lock().revoked = true;
    let results = callers.join_all().await;
    let sent = results.into_iter().sum::<Result<usize, _>>()?;

    let seen = servers.lock();
    println!("{sent} requests of 20 callers, none failed");
    println!(
        "{} token requests: one at the start, one for the revocation",
        seen.granted
    );
    println!(
        "{} requests were refused, and sent again with the new token",
        seen.refused
    );
    assert_eq!(seen.granted, 2);
    assert!(seen.refused > 0, "no request met the revocation");
    assert_eq!(seen.served, sent, "each request is served once");
    Ok(())
}

/// An authorization server and an API; clones share their state.
#[derive(Clone, Default)]
struct Servers(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    /// How many tokens were granted; the API takes the last one.
    granted: usize,
    revoked: bool,
    refused: usize,
    served: usize,
}

impl Servers {
    /// Starts both on one free port of this machine, and returns the base of their URLs.
    async fn start() -> Result<(Self, String), BoxError> {
        let servers = Self::default();
        let router = Router::new()
            .route("/token", post(grant))
            .route("/sims/{id}", put(update))
            .with_state(servers.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let base = format!("http://{}", listener.local_addr()?);
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok((servers, base))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn grant(State(servers): State<Servers>) -> Json<Value> {
    // A real server takes time, too.
    time::sleep(Duration::from_millis(50)).await;
    let mut inner = servers.lock();
    inner.granted += 1;
    inner.revoked = false;
    let token = format!("token-{}", inner.granted);
    Json(json!({ "access_token": token, "token_type": "Bearer", "expires_in": 300 }))
}

async fn update(
    State(servers): State<Servers>,
    headers: HeaderMap,
    body: Bytes,
) -> (StatusCode, HeaderMap, Bytes) {
    let mut inner = servers.lock();
    let valid = format!("Bearer token-{}", inner.granted);
    let is_valid = headers
        .get(AUTHORIZATION)
        .is_some_and(|sent| *sent == *valid);
    if is_valid && !inner.revoked {
        inner.served += 1;
        return (StatusCode::OK, HeaderMap::new(), body);
    }
    inner.refused += 1;
    let mut headers = HeaderMap::new();
    let challenge = http::HeaderValue::from_static(r#"Bearer error="invalid_token""#);
    headers.insert(WWW_AUTHENTICATE, challenge);
    (StatusCode::UNAUTHORIZED, headers, Bytes::new())
}
