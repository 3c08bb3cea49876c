//! Readiness is honest: what a ready service reserves is used or given back.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::Full;
use tokio::{
    sync::Semaphore,
    time::{self, Sleep},
};
use tower::{Layer, Service, ServiceExt, limit::GlobalConcurrencyLimitLayer, service_fn};
use tower_bearer::{BearerAuthLayer, BoxError, ClientCredentials, CloneBody, TokenError};
use tower_test::mock;

use crate::support::{
    Answer, Api, AuthServer, INVALID_TOKEN, echo, get, get_path, ready, settle, timed, token_error,
    unauthorized,
};

type Mock = mock::Mock<Request<String>, Response<String>>;
type Handle = mock::Handle<Request<String>, Response<String>>;

/// An inner service that takes only as many requests as its handle allows, and panics if called without being
/// ready.
fn mock() -> (Mock, Handle) {
    let (mock, mut handle) = mock::pair();
    handle.allow(0);
    (mock, handle)
}

/// Answers the next request, which must be there, and returns its `Authorization`.
async fn answer(handle: &mut Handle, response: Response<String>) -> String {
    let (request, send) = handle.next_request().await.unwrap();
    send.send_response(response);
    request.headers()[AUTHORIZATION]
        .to_str()
        .unwrap()
        .to_owned()
}

/// A request that brings its own credential.
fn own() -> Request<String> {
    let mut request = get_path("own");
    let own = "Basic dXNlcjpwYXNz".parse().unwrap();
    request.headers_mut().insert(AUTHORIZATION, own);
    request
}

fn is_ready<S>(service: &mut mock::Spawn<S>) -> bool
where
    S: Service<Request<String>, Error: Into<BoxError>>,
{
    match service.poll_ready() {
        Poll::Ready(result) => {
            assert!(result.is_ok(), "readiness failed");
            true
        }
        Poll::Pending => false,
    }
}

/// Law 10.
#[tokio::test(start_paused = true)]
async fn the_service_that_was_polled_ready_is_the_one_that_is_called() {
    let (inner, mut handle) = mock();
    let layer = BearerAuthLayer::new(AuthServer::new()).replay(CloneBody);
    layer.cache().get().await.unwrap();
    let mut client = mock::Spawn::new(layer.layer(inner));
    assert!(!is_ready(&mut client));
    handle.allow(1);
    assert!(is_ready(&mut client));
    // From here on no other service becomes ready.
    let mut other = client.get_ref().clone();
    handle.allow(0);
    let pending = time::timeout(Duration::from_secs(1), other.ready()).await;
    assert!(pending.is_err());

    let response = tokio::spawn(client.call(get()));
    let sent = answer(&mut handle, echo(None)).await;
    assert_eq!(sent, "Bearer token-1");
    response.await.unwrap().unwrap();
}

/// Law 10: and so does one with its own credential.
#[tokio::test(start_paused = true)]
async fn a_bare_request_calls_the_ready_service() {
    let (inner, mut handle) = mock();
    let layer = BearerAuthLayer::new(AuthServer::new())
        .keep_existing(true)
        .origins(["https://api.example.com"])
        .unwrap();
    let mut client = mock::Spawn::new(layer.layer(inner));
    for request in [own(), get()] {
        handle.allow(1);
        assert!(is_ready(&mut client));
        let response = tokio::spawn(client.call(request));
        let (_, send) = handle.next_request().await.unwrap();
        send.send_response(echo(None));
        response.await.unwrap().unwrap();
    }
}

/// Law 10: on the slow path, once the token is there.
#[tokio::test(start_paused = true)]
async fn a_request_that_waited_makes_its_service_ready() {
    let (inner, mut handle) = mock();
    let server = AuthServer::new();
    server.hold();
    let mut client = mock::Spawn::new(BearerAuthLayer::new(server.clone()).layer(inner));
    handle.allow(1);
    assert!(is_ready(&mut client));
    let response = tokio::spawn(client.call(get()));
    // Another request takes the place given back.
    handle.allow(0);
    settle().await;
    server.release();
    settle().await;
    assert!(handle.poll_request().is_pending());
    handle.allow(1);
    assert_eq!(
        answer(&mut handle, echo(None)).await,
        "Bearer token-1".to_owned()
    );
    response.await.unwrap().unwrap();
}

/// Law 10: it gets the one permit that the waiting request gave back.
#[tokio::test(start_paused = true)]
async fn a_token_request_through_the_same_limit_does_not_deadlock() {
    let host = service_fn(|request: Request<Full<Bytes>>| async move {
        let (status, text) = match request.uri().path() {
            "/token" => {
                static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
                let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                let text = format!(r#"{{"access_token":"token-{number}","token_type":"Bearer"}}"#);
                (StatusCode::OK, text)
            }
            _ => match request.headers()[AUTHORIZATION].to_str().unwrap() {
                "Bearer token-1" => (StatusCode::UNAUTHORIZED, String::new()),
                token => (StatusCode::OK, token.to_owned()),
            },
        };
        time::sleep(Duration::from_millis(10)).await;
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        Ok::<_, BoxError>(response)
    });
    let permits = Arc::new(Semaphore::new(1));
    let limited = GlobalConcurrencyLimitLayer::with_semaphore(permits.clone()).layer(host);
    let source = ClientCredentials::builder("http://localhost/token", "client-id")
        .client_secret("secret")
        .build_with(limited.clone())
        .unwrap();
    let client = BearerAuthLayer::new(source)
        .replay(CloneBody)
        .layer(limited);
    let request = Request::get("http://localhost/sims")
        .body(Full::<Bytes>::default())
        .unwrap();
    // A token, the request, another token while the refusal is held, and the replay.
    let (response, took) = timed(client.oneshot(request)).await;
    let response = response.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(took, Duration::from_millis(40));
    assert_eq!(permits.available_permits(), 1);
}

/// Law 10: others can use the inner service.
#[tokio::test(start_paused = true)]
async fn a_request_that_waits_for_a_token_holds_no_permit() {
    let server = AuthServer::new();
    server.hold();
    let permits = Arc::new(Semaphore::new(1));
    let inner = GlobalConcurrencyLimitLayer::with_semaphore(permits.clone()).layer(Api::echoing());
    let mut client = BearerAuthLayer::new(server.clone())
        .keep_existing(true)
        .layer(inner);
    let ready = ready(&mut client).await;
    let waiting = ready.unwrap().call(get());
    // The call itself gives it back, before its future is polled.
    assert_eq!(permits.available_permits(), 1);
    let waiting = tokio::spawn(waiting);
    settle().await;
    assert_eq!(permits.available_permits(), 1);
    let (response, took) = timed(client.clone().oneshot(own())).await;
    assert_eq!(response.unwrap().body(), "anonymous");
    assert_eq!(took, Duration::ZERO);
    server.release();
    assert_eq!(waiting.await.unwrap().unwrap().body(), "token-1");
}

/// Law 10: it needs no readiness and keeps it from nobody.
#[tokio::test(start_paused = true)]
async fn a_request_that_may_not_leave_holds_no_permit() {
    let server = AuthServer::new();
    let permits = Arc::new(Semaphore::new(1));
    let inner = GlobalConcurrencyLimitLayer::with_semaphore(permits.clone()).layer(Api::echoing());
    let mut client = BearerAuthLayer::new(server.clone()).layer(inner);
    let plain = Request::get("http://api.example.com/")
        .body(String::new())
        .unwrap();
    let ready = ready(&mut client).await;
    let refused = ready.unwrap().call(plain);
    assert_eq!(permits.available_permits(), 1);
    let error = refused.await.unwrap_err();
    assert!(token_error(&error).is_insecure_uri());
    // The service still works once it is ready again.
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-1");
}

/// Law 10: nor does its refusal.
#[tokio::test(start_paused = true)]
async fn a_request_that_waits_for_another_token_holds_no_permit() {
    let server = AuthServer::new();
    let api = Api::refusing_the_first();
    let permits = Arc::new(Semaphore::new(1));
    let inner = GlobalConcurrencyLimitLayer::with_semaphore(permits.clone()).layer(api.clone());
    let client = BearerAuthLayer::new(server.clone())
        .replay(CloneBody)
        .keep_existing(true)
        .layer(inner);
    client.cache().get().await.unwrap();
    server.hold();
    let refused = tokio::spawn(client.clone().oneshot(get()));
    settle().await;
    assert_eq!(server.requests(), 2);
    assert_eq!(permits.available_permits(), 1);
    let (response, took) = timed(client.clone().oneshot(own())).await;
    assert_eq!(response.unwrap().body(), "anonymous");
    assert_eq!(took, Duration::ZERO);
    server.release();
    assert_eq!(refused.await.unwrap().unwrap().body(), "token-2");
    assert_eq!(permits.available_permits(), 1);
}

/// Law 10: the second wait holds no readiness either.
#[tokio::test(start_paused = true)]
async fn replacing_a_token_that_died_before_the_service_was_ready_holds_no_permit() {
    let server = AuthServer::new();
    server.set(Answer::Grant(Duration::from_secs(5)));
    let permits = Arc::new(Semaphore::new(1));
    let api = Api::echoing();
    let inner = GlobalConcurrencyLimitLayer::with_semaphore(permits.clone()).layer(api.clone());
    let client = BearerAuthLayer::new(server.clone()).layer(inner);
    server.hold();
    let waiting = tokio::spawn(client.oneshot(get()));
    settle().await;
    let place = permits.clone().try_acquire_owned().unwrap();
    server.release();
    settle().await;
    time::sleep(Duration::from_secs(6)).await;

    server.hold();
    drop(place);
    settle().await;
    assert_eq!(server.requests(), 2);
    assert!(api.arrivals().is_empty());
    assert_eq!(permits.available_permits(), 1);
    server.release();
    assert_eq!(waiting.await.unwrap().unwrap().body(), "token-2");
}

/// Each clone takes 3 s to become ready.
struct Slow<S> {
    inner: S,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<S: Clone> Clone for Slow<S> {
    fn clone(&self) -> Self {
        let inner = self.inner.clone();
        Self { inner, timer: None }
    }
}

impl<S: Service<Request<String>>> Service<Request<String>> for Slow<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(time::sleep(Duration::from_secs(3))));
        ready!(timer.as_mut().poll(cx));
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<String>) -> S::Future {
        let timer = self.timer.take();
        assert!(timer.is_some_and(|timer| timer.is_elapsed()), "not ready");
        self.inner.call(request)
    }
}

/// Law 6: no request waits forever.
#[tokio::test(start_paused = true)]
async fn a_service_that_gets_ready_slower_than_tokens_die_is_called() {
    let server = AuthServer::new();
    server.set(Answer::Grant(Duration::from_secs(2)));
    let api = Api::echoing();
    let inner = Slow {
        inner: api.clone(),
        timer: None,
    };
    let client = BearerAuthLayer::new(server.clone()).layer(inner);
    let limit = Duration::from_secs(30);
    let response = time::timeout(limit, client.oneshot(get())).await;
    assert_eq!(response.unwrap().unwrap().status(), StatusCode::OK);
    // Never anonymous, and after a fair try for a live token.
    assert_eq!(api.tokens(), ["token-3"]);
    assert_eq!(server.requests(), 3);
}

/// Law 10.
#[tokio::test(start_paused = true)]
async fn a_replay_makes_its_service_ready() {
    let (inner, mut handle) = mock();
    let server = AuthServer::new();
    let layer = BearerAuthLayer::new(server.clone()).replay(CloneBody);
    layer.cache().get().await.unwrap();
    let mut client = mock::Spawn::new(layer.layer(inner));
    handle.allow(1);
    assert!(is_ready(&mut client));
    let response = tokio::spawn(client.call(get()));
    let sent = answer(&mut handle, unauthorized(INVALID_TOKEN)).await;
    assert_eq!(sent, "Bearer token-1");
    settle().await;
    assert_eq!(server.requests(), 2);
    assert!(handle.poll_request().is_pending());
    handle.allow(1);
    let sent = answer(&mut handle, echo(Some("done"))).await;
    assert_eq!(sent, "Bearer token-2");
    assert_eq!(response.await.unwrap().unwrap().body(), "done");
}

/// Law 10: `poll_ready` never reports one.
#[tokio::test(start_paused = true)]
async fn a_token_failure_is_the_error_of_a_call_not_of_readiness() {
    for error in [
        TokenError::terminal("refused"),
        TokenError::transient("down"),
    ] {
        let (inner, mut handle) = mock();
        let server = AuthServer::new();
        server.set(Answer::Fail(error));
        let mut client = mock::Spawn::new(BearerAuthLayer::new(server.clone()).layer(inner));
        for _ in 0..3 {
            handle.allow(1);
            assert!(is_ready(&mut client));
            let error = client.call(get()).await.unwrap_err();
            assert_eq!(token_error(&error).to_string(), "the token source failed");
        }
        assert!(handle.poll_request().is_pending());
    }
}

/// Law 10.
#[tokio::test(start_paused = true)]
async fn a_readiness_error_of_the_inner_service_passes_through() {
    let (inner, mut handle) = mock();
    let mut client = mock::Spawn::new(BearerAuthLayer::new(AuthServer::new()).layer(inner));
    handle.send_error("the connection is gone");
    let Poll::Ready(Err(error)) = client.poll_ready::<Request<String>>() else {
        panic!("no error");
    };
    assert_eq!(error.to_string(), "the connection is gone");
    assert!(error.source().is_none());
}

/// Law 10: on the slow path the call has been made already.
#[tokio::test(start_paused = true)]
async fn a_readiness_error_after_the_wait_is_the_calls_error() {
    let (inner, mut handle) = mock();
    let mut client = mock::Spawn::new(BearerAuthLayer::new(AuthServer::new()).layer(inner));
    handle.allow(1);
    assert!(is_ready(&mut client));
    handle.allow(0);
    let response = tokio::spawn(client.call(get()));
    settle().await;
    handle.send_error("the connection is gone");
    let error = response.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "the connection is gone");
}
