//! What a timeout covers.

use std::{convert::Infallible, future::Future, sync::Arc, time::Duration};

use http::{Request, Response, StatusCode};
use tokio::{sync::Semaphore, time};
use tower::{
    Service, ServiceBuilder, ServiceExt, limit::GlobalConcurrencyLimitLayer,
    timeout::error::Elapsed,
};
use tower_bearer::{BearerAuthLayer, CloneBody};
use tower_http::timeout::TimeoutLayer;

use crate::support::{Api, AuthServer, get, get_path, millis, ready, secs, settle, timed};

/// An API that refuses `token-1` and takes 1.5 s for each answer.
fn slow() -> impl Service<
    Request<String>,
    Response = Response<String>,
    Error = Infallible,
    Future: Future<Output = Result<Response<String>, Infallible>> + Send,
> + Clone {
    ServiceBuilder::new()
        .map_future(|answer| async {
            time::sleep(millis(1_500)).await;
            answer.await
        })
        .service(Api::refusing_the_first())
}

/// Timeout, above: It covers the wait for a token; the token request survives the callers that it times out.
///
/// Laws 5 and 6.
#[tokio::test(start_paused = true)]
async fn a_timeout_above_covers_the_wait_for_a_token() {
    let server = AuthServer::new();
    server.set_latency(Duration::from_secs(5));
    let client = ServiceBuilder::new()
        .timeout(Duration::from_secs(2))
        .layer(BearerAuthLayer::new(server.clone()))
        .service(Api::echoing());
    let (response, took) = timed(client.clone().oneshot(get())).await;
    assert!(response.unwrap_err().is::<Elapsed>());
    assert_eq!(took, Duration::from_secs(2));
    // The token request goes on, and the next request joins it.
    let (response, took) = timed(client.clone().oneshot(get_path("next"))).await;
    assert!(response.unwrap_err().is::<Elapsed>());
    assert_eq!(took, Duration::from_secs(2));
    time::sleep(Duration::from_secs(1)).await;
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-1");
    assert_eq!(server.requests(), 1);
}

/// Timeout, above: It covers both sends of a replayed request together.
#[tokio::test(start_paused = true)]
async fn a_timeout_above_covers_both_sends() {
    let client = |limit| {
        ServiceBuilder::new()
            .timeout(secs(limit))
            .layer(BearerAuthLayer::new(AuthServer::new()).replay(CloneBody))
            .service(slow())
    };
    let (response, took) = timed(client(2).oneshot(get())).await;
    assert!(response.unwrap_err().is::<Elapsed>());
    assert_eq!(took, secs(2));
    let (response, took) = timed(client(4).oneshot(get())).await;
    assert_eq!(response.unwrap().body(), "token-2");
    assert_eq!(took, secs(3));
}

/// Timeout, above: It does not cover the wait of `poll_ready` for a limit below, unless the request has waited for
/// a token first.
///
/// Law 10.
#[tokio::test(start_paused = true)]
async fn a_timeout_above_does_not_cover_readiness() {
    let permits = Arc::new(Semaphore::new(0));
    let server = AuthServer::new();
    let layer = BearerAuthLayer::new(server.clone());
    let client = ServiceBuilder::new()
        .timeout(secs(2))
        .layer(layer.clone())
        .layer(GlobalConcurrencyLimitLayer::with_semaphore(permits.clone()))
        .service(Api::echoing());

    permits.add_permits(1);
    server.set_latency(secs(1));
    let mut early = client.clone();
    let waiting = ready(&mut early).await.unwrap().call(get());
    let place = permits.clone().try_acquire_owned().unwrap();
    let (response, took) = timed(waiting).await;
    assert!(response.unwrap_err().is::<Elapsed>());
    assert_eq!(took, secs(2));

    assert!(layer.cache().peek().is_some());
    let late = time::timeout(secs(60), client.oneshot(get())).await;
    assert!(late.is_err(), "the layer above timed it out");
    drop(place);
}

/// Timeout, below: It covers each send, and no wait for a token.
///
/// Law 10.
#[tokio::test(start_paused = true)]
async fn a_timeout_below_does_not_cover_the_wait_for_a_token() {
    let server = AuthServer::new();
    server.set_latency(Duration::from_secs(5));
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(server.clone()).replay(CloneBody))
        .timeout(Duration::from_secs(2))
        .service(slow());
    // Two waits and two sends, each shorter than its limit.
    let (response, took) = timed(client.oneshot(get())).await;
    assert_eq!(response.unwrap().body(), "token-2");
    assert_eq!(took, Duration::from_secs(13));

    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(server))
        .timeout(Duration::from_secs(1))
        .service(slow());
    let (response, took) = timed(client.oneshot(get())).await;
    assert!(response.unwrap_err().is::<Elapsed>());
    assert_eq!(took, Duration::from_secs(6));
}

const LATE: StatusCode = StatusCode::GATEWAY_TIMEOUT;

/// tower_http::Timeout, above: It covers what `Timeout` does, and answers with a status instead of an error.
#[tokio::test(start_paused = true)]
async fn a_tower_http_timeout_above_covers_the_wait_for_a_token() {
    let server = AuthServer::new();
    server.set_latency(secs(5));
    let client = ServiceBuilder::new()
        .layer(TimeoutLayer::with_status_code(LATE, secs(2)))
        .layer(BearerAuthLayer::new(server.clone()))
        .service(Api::echoing());
    let (response, took) = timed(client.clone().oneshot(get())).await;
    assert_eq!(response.unwrap().status(), LATE);
    assert_eq!(took, secs(2));
    time::sleep(secs(3)).await;
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-1");
    assert_eq!(server.requests(), 1);
}

/// tower_http::Timeout, below: Its status passes like an answer of the API, so do not choose 401.
#[tokio::test(start_paused = true)]
async fn a_tower_http_timeout_below_answers_for_the_api() {
    for (status, token_requests) in [(LATE, 1), (StatusCode::UNAUTHORIZED, 2)] {
        let server = AuthServer::new();
        let client = ServiceBuilder::new()
            .layer(BearerAuthLayer::new(server.clone()))
            .layer(TimeoutLayer::with_status_code(status, secs(1)))
            .service(slow());
        let response = client.clone().oneshot(get()).await.unwrap();
        assert_eq!(response.status(), status);
        settle().await;
        assert_eq!(server.requests(), token_requests, "{status}");
    }
}
