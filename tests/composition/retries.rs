//! What sends a request again, or twice at once.

use std::{pin::Pin, time::Duration};

use http::{Request, Response, StatusCode};
use tokio::time::{self, Sleep};
use tower::{
    Layer, Service, ServiceBuilder, ServiceExt,
    hedge::{self, Hedge},
    retry::{Policy, RetryLayer},
};
use tower_bearer::{BearerAuthLayer, BoxError, CloneBody, TokenError};

use crate::{
    is_clone::is_clone,
    support::{
        Answer, Api, AuthServer, INVALID_TOKEN, echo, get, millis, secs, settle, timed,
        token_error, unauthorized,
    },
};

const LIFETIME: Duration = Duration::from_secs(300);

/// Tries once more after a token failure that may pass and after a 401.
#[derive(Clone)]
struct OnceMore {
    tried: bool,
}

impl<B: Clone> Policy<Request<B>, Response<String>, BoxError> for OnceMore {
    type Future = Pin<Box<Sleep>>;

    fn retry(
        &mut self,
        _: &mut Request<B>,
        result: &mut Result<Response<String>, BoxError>,
    ) -> Option<Self::Future> {
        if std::mem::replace(&mut self.tried, true) {
            return None;
        }
        let pause = match result {
            Ok(response) if response.status() == StatusCode::UNAUTHORIZED => Duration::ZERO,
            Ok(_) => return None,
            Err(error) => {
                let error = error.downcast_ref::<TokenError>()?;
                if !error.is_transient() {
                    return None;
                }
                // The cache itself waits up to a tenth longer, so that clients do not all come at once.
                let pause = error.retry_after().unwrap_or(Duration::from_secs(1));
                pause.mul_f64(1.1)
            }
        };
        Some(Box::pin(time::sleep(pause)))
    }

    fn clone_request(&mut self, request: &Request<B>) -> Option<Request<B>> {
        Some(request.clone())
    }
}

fn once_more() -> RetryLayer<OnceMore> {
    RetryLayer::new(OnceMore { tried: false })
}

/// Tries once more after an answer of this status, and a pause.
#[derive(Clone)]
struct OnStatus {
    status: StatusCode,
    pause: Duration,
    tried: bool,
}

impl<E> Policy<Request<String>, Response<String>, E> for OnStatus {
    type Future = Pin<Box<Sleep>>;

    fn retry(
        &mut self,
        _: &mut Request<String>,
        result: &mut Result<Response<String>, E>,
    ) -> Option<Self::Future> {
        let response = result.as_ref().ok()?;
        if response.status() != self.status || std::mem::replace(&mut self.tried, true) {
            return None;
        }
        Some(Box::pin(time::sleep(self.pause)))
    }

    fn clone_request(&mut self, request: &Request<String>) -> Option<Request<String>> {
        Some(request.clone())
    }
}

fn on(status: StatusCode, pause: Duration) -> RetryLayer<OnStatus> {
    let tried = false;
    RetryLayer::new(OnStatus {
        status,
        pause,
        tried,
    })
}

/// An API that is unavailable to the first request and then refuses `token-1`.
fn unavailable_once() -> Api {
    let first = std::sync::atomic::AtomicBool::new(true);
    Api::new(move |arrival| {
        if first.swap(false, std::sync::atomic::Ordering::SeqCst) {
            let mut response = Response::new(String::new());
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            return response;
        }
        match arrival.token() {
            Some("token-1") => unauthorized(INVALID_TOKEN),
            token => echo(token),
        }
    })
}

/// Retry, above: Each try takes the current token.
#[tokio::test(start_paused = true)]
async fn a_retry_above_takes_the_current_token() {
    let server = AuthServer::new();
    server.set(Answer::Grant(secs(60)));
    let api = unavailable_once();
    let client = ServiceBuilder::new()
        .layer(on(StatusCode::SERVICE_UNAVAILABLE, secs(100)))
        .layer(BearerAuthLayer::new(server.clone()))
        .service(api.clone());
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-2");
    assert_eq!(api.tokens(), ["token-1", "token-2"]);
}

/// Retry, above: A failed token request is tried again, after `TokenError::retry_after`.
///
/// Law 7: once the server is back, at the time that it named.
#[tokio::test(start_paused = true)]
async fn a_retry_above_gets_a_token_after_the_errors_retry_after() {
    let server = AuthServer::new();
    let busy = TokenError::transient("busy").with_retry_after(Duration::from_secs(7));
    server.set(Answer::Fail(busy));
    let api = Api::echoing();
    let client = ServiceBuilder::new()
        .layer(once_more())
        .layer(BearerAuthLayer::new(server.clone()))
        .service(api.clone());
    let request = tokio::spawn(timed(client.oneshot(get())));
    time::sleep(Duration::from_secs(1)).await;
    assert_eq!(server.requests(), 1);
    server.set(Answer::Grant(LIFETIME));
    let (response, took) = request.await.unwrap();
    assert_eq!(response.unwrap().body(), "token-2");
    assert!(took >= Duration::from_secs(7), "{took:?}");
    assert_eq!(api.tokens(), ["token-2"]);
    let seen = server.seen();
    assert!(seen[1].at - seen[0].at >= Duration::from_secs(7));
}

/// Retry, above: `is_transient` tells whether that is worth it.
///
/// Law 7.
#[tokio::test(start_paused = true)]
async fn a_retry_above_leaves_a_terminal_failure_alone() {
    let server = AuthServer::new();
    server.set(Answer::Fail(TokenError::terminal("the client is unknown")));
    let client = ServiceBuilder::new()
        .layer(once_more())
        .layer(BearerAuthLayer::new(server.clone()))
        .service(Api::echoing());
    let (response, took) = timed(client.oneshot(get())).await;
    assert!(!token_error(&response.unwrap_err()).is_transient());
    assert_eq!(took, Duration::ZERO);
    assert_eq!(server.requests(), 1);
}

/// Retry, above: After a 401 with `invalid_token` that was not replayed, the next try takes another token, if that
/// comes within a second.
///
/// Law 8.
#[tokio::test(start_paused = true)]
async fn a_retry_above_gets_another_token_after_a_refusal() {
    let server = AuthServer::new();
    server.set_latency(Duration::from_millis(100));
    let api = Api::refusing_the_first();
    let client = ServiceBuilder::new()
        .layer(once_more())
        .layer(BearerAuthLayer::new(server.clone()))
        .service(api.clone());
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-2");
    assert_eq!(api.tokens(), ["token-1", "token-2"]);
    assert_eq!(server.requests(), 2);
}

/// Retry, above: After one without a reason the old token is used until there is another, so let the try come after a
/// pause, or leave it to the layer's replay.
///
/// Law 4.
#[tokio::test(start_paused = true)]
async fn a_retry_above_comes_too_early_after_a_refusal_without_a_reason() {
    let refused = StatusCode::UNAUTHORIZED;
    for (pause, status, second) in [
        (Duration::ZERO, refused, "token-1"),
        (secs(1), StatusCode::OK, "token-2"),
    ] {
        let server = AuthServer::new();
        server.set_latency(Duration::from_millis(100));
        let api = Api::refusing("token-1", || unauthorized("Bearer"));
        let client = ServiceBuilder::new()
            .layer(on(refused, pause))
            .layer(BearerAuthLayer::new(server.clone()))
            .service(api.clone());
        assert_eq!(client.oneshot(get()).await.unwrap().status(), status);
        assert_eq!(api.tokens(), ["token-1", second]);
        settle().await;
        assert_eq!(server.requests(), 2);
    }
}

/// Retry, below: It resends the signed request, with its old token even if that has died.
#[tokio::test(start_paused = true)]
async fn a_retry_below_resends_the_signed_request() {
    let server = AuthServer::new();
    server.set(Answer::Grant(secs(60)));
    let api = unavailable_once();
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(server.clone()).replay(CloneBody))
        .layer(on(StatusCode::SERVICE_UNAVAILABLE, secs(100)))
        .service(api.clone());
    // The layer then replays it.
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-2");
    assert_eq!(api.tokens(), ["token-1", "token-1", "token-2"]);
}

/// Retry, below: After a 401 this is useless, so do not let it retry one.
#[tokio::test(start_paused = true)]
async fn a_retry_below_after_a_refusal_sends_the_same_token() {
    let api = Api::refusing_the_first();
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(AuthServer::new()))
        .layer(on(StatusCode::UNAUTHORIZED, Duration::ZERO))
        .service(api.clone());
    let response = client.oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(api.tokens(), ["token-1", "token-1"]);
}

/// Hedges whatever takes longer than 10 ms.
#[derive(Clone)]
struct Always;

impl hedge::Policy<Request<String>> for Always {
    fn clone_request(&self, request: &Request<String>) -> Option<Request<String>> {
        Some(request.clone())
    }

    fn can_retry(&self, _: &Request<String>) -> bool {
        true
    }
}

fn hedged<S>(inner: S) -> Hedge<S, Always>
where
    S: Service<Request<String>, Error: Into<BoxError>> + Clone,
{
    Hedge::new_with_mock_latencies(inner, Always, 10, 0.9, secs(60), &[10; 10])
}

/// Hedge, above: Both copies wait for one token request and leave with its token; a wait for a token is hedged
/// like a slow API.
///
/// Law 1.
#[tokio::test(start_paused = true)]
async fn a_hedge_above_shares_one_token_request() {
    let server = AuthServer::new();
    server.set_latency(millis(100));
    let api = Api::echoing();
    api.hold();
    let client = hedged(BearerAuthLayer::new(server.clone()).layer(api.clone()));
    let response = tokio::spawn(client.oneshot(get()));
    time::sleep(millis(101)).await;
    assert_eq!(api.tokens(), ["token-1", "token-1"]);
    assert_eq!(server.requests(), 1);
    api.release();
    assert_eq!(response.await.unwrap().unwrap().body(), "token-1");
}

/// Hedge, below: Only sends are hedged, and both copies carry the same token. Not `Clone`: put a `Buffer` between.
#[tokio::test(start_paused = true)]
async fn a_hedge_below_sends_the_same_token_twice() {
    assert!(!is_clone!(Hedge<Api, Always>));
    let server = AuthServer::new();
    server.set_latency(millis(100));
    let api = Api::echoing();
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(server.clone()))
        .buffer(8)
        .service(hedged(api.clone()));
    client.clone().oneshot(get()).await.unwrap();
    assert_eq!(api.tokens(), ["token-1"]);
    api.hold();
    let response = tokio::spawn(client.oneshot(get()));
    time::sleep(millis(50)).await;
    assert_eq!(api.tokens(), ["token-1"; 3]);
    api.release();
    response.await.unwrap().unwrap();
}
