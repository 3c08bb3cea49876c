//! What holds requests back, and which.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::{Request, header::AUTHORIZATION};
use tokio::{
    sync::Semaphore,
    time::{self, Instant},
};
use tower::{
    Layer, Service, ServiceBuilder, ServiceExt,
    buffer::Buffer,
    limit::{ConcurrencyLimit, GlobalConcurrencyLimitLayer, RateLimit},
    load_shed::error::Overloaded,
    spawn_ready::SpawnReady,
};
use tower_bearer::{BearerAuthLayer, BoxError, CloneBody, TokenError, WithoutToken};

use crate::{
    is_clone::is_clone,
    support::{
        Answer, Api, AuthServer, INVALID_TOKEN, all, echo, get, get_path, ready, secs, settle,
        timed, token_error, unauthorized,
    },
};

/// A request that needs no token.
fn free() -> Request<String> {
    let mut request = get_path("free");
    request.extensions_mut().insert(WithoutToken);
    request
}

/// Buffer, above: It outlives every outage of the token endpoint, since `poll_ready` reports none.
///
/// Laws 7 and 10: a `Buffer` dies with the first error of readiness.
#[tokio::test(start_paused = true)]
async fn a_buffer_above_outlives_an_outage_of_the_token_endpoint() {
    let server = AuthServer::new();
    server.set(Answer::Fail(TokenError::transient("down")));
    let client = BearerAuthLayer::new(server.clone()).layer(Api::echoing());
    let client = Buffer::<Request<String>, _>::new(client, 1);
    let error = client.clone().oneshot(get()).await.unwrap_err();
    assert!(token_error(&error).is_transient());
    server.set(Answer::Grant(Duration::from_secs(300)));
    time::sleep(Duration::from_secs(10)).await;
    let response = client.oneshot(get()).await.unwrap();
    assert!(response.body().starts_with("token-"));
}

/// Buffer, above: A request that waits for a token has left it.
///
/// Law 10.
#[tokio::test(start_paused = true)]
async fn a_buffer_above_is_not_blocked_by_a_wait_for_a_token() {
    let server = AuthServer::new();
    server.hold();
    let client =
        BearerAuthLayer::new(server.clone()).layer(ConcurrencyLimit::new(Api::echoing(), 1));
    let client = Buffer::<Request<String>, _>::new(client, 1);
    let waiting: Vec<_> = (0..10)
        .map(|_| tokio::spawn(client.clone().oneshot(get())))
        .collect();
    settle().await;
    let (response, took) = timed(client.oneshot(free())).await;
    assert_eq!(response.unwrap().body(), "anonymous");
    assert_eq!(took, Duration::ZERO);
    server.release();
    for response in all(waiting).await {
        assert_eq!(response.unwrap().body(), "token-1");
    }
}

/// Buffer, below: A request that waits for a token holds no place in it.
///
/// Law 10.
#[tokio::test(start_paused = true)]
async fn a_wait_for_a_token_holds_no_place_in_a_buffer_below() {
    let server = AuthServer::new();
    server.hold();
    let inner = Buffer::<Request<String>, _>::new(Api::echoing(), 1);
    let client = BearerAuthLayer::new(server.clone()).layer(inner);
    let waiting: Vec<_> = (0..10)
        .map(|_| tokio::spawn(client.clone().oneshot(get())))
        .collect();
    settle().await;
    let start = Instant::now();
    let response = client.clone().oneshot(free()).await.unwrap();
    assert_eq!(response.body(), "anonymous");
    assert_eq!(start.elapsed(), Duration::ZERO);
    server.release();
    for response in all(waiting).await {
        assert_eq!(response.unwrap().body(), "token-1");
    }
    assert_eq!(server.requests(), 1);
}

/// Buffer, below: It queues signed requests: one that waits there longer than its token lives is refused and
/// replayed through it.
#[tokio::test(start_paused = true)]
async fn a_buffer_below_queues_signed_requests() {
    let server = AuthServer::new();
    server.set(Answer::Grant(secs(60)));
    let start = Instant::now();
    let api = Api::new(move |arrival| match arrival.token() {
        Some("token-1") if start.elapsed() > secs(60) => unauthorized(INVALID_TOKEN),
        token => echo(token),
    });
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(server.clone()).replay(CloneBody))
        .buffer(8)
        .rate_limit(1, secs(100))
        .service(api.clone());
    let first = client.clone().oneshot(get()).await.unwrap();
    assert_eq!(first.body(), "token-1");
    let (second, took) = timed(client.oneshot(get())).await;
    assert_eq!(second.unwrap().body(), "token-2");
    assert_eq!(api.tokens(), ["token-1", "token-1", "token-2"]);
    assert_eq!(took, secs(200));
}

/// ConcurrencyLimit, GlobalConcurrencyLimit, above: It also bounds requests that wait for a token.
#[tokio::test(start_paused = true)]
async fn a_limit_above_bounds_waiting_requests() {
    let permits = Arc::new(Semaphore::new(2));
    for global in [false, true] {
        let server = AuthServer::new();
        server.hold();
        let entered = Arc::new(AtomicUsize::new(0));
        let counter = entered.clone();
        let client = ServiceBuilder::new()
            .map_request(move |request: Request<String>| {
                counter.fetch_add(1, Ordering::SeqCst);
                request
            })
            .layer(BearerAuthLayer::new(server.clone()))
            .service(Api::echoing());
        let client = match global {
            true => ConcurrencyLimit::with_semaphore(client, permits.clone()),
            false => ConcurrencyLimit::new(client, 2),
        };
        let waiting: Vec<_> = (0..5)
            .map(|n| tokio::spawn(client.clone().oneshot(get_path(n))))
            .collect();
        settle().await;
        assert_eq!(entered.load(Ordering::SeqCst), 2);
        server.release();
        for response in all(waiting).await {
            assert_eq!(response.unwrap().body(), "token-1");
        }
    }
}

/// ConcurrencyLimit, GlobalConcurrencyLimit, below: A request that waits for a token holds no permit, and one whose
/// 401 waits for another token has given it back.
///
/// Law 10.
#[tokio::test(start_paused = true)]
async fn a_wait_for_a_token_holds_no_permit_of_a_limit_below() {
    let permits = Arc::new(Semaphore::new(1));
    for global in [false, true] {
        let server = AuthServer::new();
        let refused = Arc::new(AtomicBool::new(false));
        let is_refused = refused.clone();
        let api = Api::new(move |arrival| match arrival.token() {
            Some("token-1") if is_refused.load(Ordering::SeqCst) => unauthorized(INVALID_TOKEN),
            token => echo(token),
        });
        let limited = match global {
            true => ConcurrencyLimit::with_semaphore(api, permits.clone()),
            false => ConcurrencyLimit::new(api, 1),
        };
        let client = BearerAuthLayer::new(server.clone())
            .replay(CloneBody)
            .layer(limited);
        // Without a token, then with a refused one.
        for token_requests in [1, 2] {
            server.hold();
            let waiting: Vec<_> = (0..5)
                .map(|n| tokio::spawn(client.clone().oneshot(get_path(n))))
                .collect();
            settle().await;
            assert_eq!(server.requests(), token_requests);
            let (response, took) = timed(client.clone().oneshot(free())).await;
            assert_eq!(response.unwrap().body(), "anonymous");
            assert_eq!(took, Duration::ZERO);
            server.release();
            for response in all(waiting).await {
                let token = format!("token-{token_requests}");
                assert_eq!(*response.unwrap().body(), token);
            }
            refused.store(true, Ordering::SeqCst);
        }
    }
}

/// RateLimit, above: It counts requests: a replay costs nothing.
#[tokio::test(start_paused = true)]
async fn a_rate_limit_above_counts_requests() {
    let api = Api::refusing_the_first();
    let mut client = ServiceBuilder::new()
        .rate_limit(1, secs(60))
        .layer(BearerAuthLayer::new(AuthServer::new()).replay(CloneBody))
        .service(api.clone());
    let (response, took) = timed(ready(&mut client).await.unwrap().call(get())).await;
    assert_eq!(response.unwrap().body(), "token-2");
    assert_eq!(took, Duration::ZERO);
    let (_, took) = timed(ready(&mut client)).await;
    assert_eq!(took, secs(60));
}

/// RateLimit, below: It counts sends: a replay waits for its turn. Not `Clone`: put a `Buffer` between.
#[tokio::test(start_paused = true)]
async fn a_rate_limit_below_counts_sends() {
    assert!(!is_clone!(RateLimit<Api>));
    let api = Api::refusing_the_first();
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(AuthServer::new()).replay(CloneBody))
        .buffer(8)
        .rate_limit(1, secs(60))
        .service(api.clone());
    let (response, took) = timed(client.oneshot(get())).await;
    assert_eq!(response.unwrap().body(), "token-2");
    assert_eq!(took, secs(60));
}

/// LoadShed, above: It sheds by the readiness below: a request that waits for a token is no load.
///
/// Law 10.
#[tokio::test(start_paused = true)]
async fn load_is_shed_above_only_by_the_inner_services_readiness() {
    let server = AuthServer::new();
    server.hold();
    let permits = Arc::new(Semaphore::new(1));
    let api = Api::echoing();
    let client = ServiceBuilder::new()
        .load_shed()
        .layer(BearerAuthLayer::new(server.clone()))
        .layer(GlobalConcurrencyLimitLayer::with_semaphore(permits.clone()))
        .service(api.clone());
    let waiting: Vec<_> = (0..5)
        .map(|n| tokio::spawn(client.clone().oneshot(get_path(n))))
        .collect();
    settle().await;
    server.release();
    for response in all(waiting).await {
        assert_eq!(response.unwrap().body(), "token-1");
    }

    api.hold();
    let sending = tokio::spawn(client.clone().oneshot(get()));
    settle().await;
    let error = client.clone().oneshot(get()).await.unwrap_err();
    assert!(error.is::<Overloaded>(), "{error:?}");
    api.release();
    sending.await.unwrap().unwrap();
}

/// LoadShed, above: Nor is an outage of the token endpoint.
///
/// Law 10.
#[tokio::test(start_paused = true)]
async fn a_token_failure_is_not_shed_as_load() {
    let server = AuthServer::new();
    server.set(Answer::Fail(TokenError::transient("down")));
    let client = ServiceBuilder::new()
        .load_shed()
        .layer(BearerAuthLayer::new(server.clone()))
        .service(Api::echoing());
    for _ in 0..3 {
        let error = client.clone().oneshot(get()).await.unwrap_err();
        assert!(token_error(&error).is_transient());
    }
}

/// LoadShed, below: It sheds sends: a request that has waited for its token may be shed then, and so may a replay.
#[tokio::test(start_paused = true)]
async fn load_is_shed_below_after_the_wait_for_a_token() {
    let server = AuthServer::new();
    let permits = Arc::new(Semaphore::new(1));
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(server.clone()).replay(CloneBody))
        .load_shed()
        .layer(GlobalConcurrencyLimitLayer::with_semaphore(permits.clone()))
        .service(Api::refusing_the_first());
    for shed in ["the first send", "the replay"] {
        server.hold();
        let waiting = tokio::spawn(client.clone().oneshot(get()));
        settle().await;
        let place = permits.clone().try_acquire_owned().unwrap();
        server.release();
        let error = waiting.await.unwrap().unwrap_err();
        assert!(error.is::<Overloaded>(), "{shed}: {error:?}");
        drop(place);
    }
    assert_eq!(server.requests(), 2);
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-2");
}

/// SpawnReady, above: Its task waits for what is below, never for a token: the call does that.
///
/// Law 10.
#[tokio::test(start_paused = true)]
async fn spawn_ready_above_does_not_wait_for_a_token() {
    let server = AuthServer::new();
    server.set(Answer::Fail(TokenError::terminal("refused")));
    let permits = Arc::new(Semaphore::new(0));
    let limited =
        GlobalConcurrencyLimitLayer::with_semaphore(permits.clone()).layer(Api::echoing());
    let mut client = SpawnReady::new(BearerAuthLayer::new(server.clone()).layer(limited));
    let early = time::timeout(secs(1), ready(&mut client)).await;
    assert!(early.is_err());
    permits.add_permits(1);
    let client = ready(&mut client).await.unwrap();
    assert_eq!(server.requests(), 0);
    let error = client.call(get()).await.unwrap_err();
    assert!(!token_error(&error).is_transient());
    assert_eq!(permits.available_permits(), 1);
    server.set(Answer::Grant(secs(300)));
    time::sleep(secs(60)).await;
    let response = ready(client).await.unwrap().call(get()).await.unwrap();
    assert_eq!(response.body(), "token-2");
}

/// SpawnReady, below: Not `Clone`: put a `Buffer` between.
#[tokio::test(start_paused = true)]
async fn spawn_ready_below_needs_a_buffer() {
    assert!(!is_clone!(SpawnReady<Api>));
    let api = Api::refusing_the_first();
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(AuthServer::new()).replay(CloneBody))
        .buffer(8)
        .layer(SpawnReady::<Infallible>::layer())
        .concurrency_limit(1)
        .service(api.clone());
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-2");
    assert_eq!(api.arrivals()[1].headers[AUTHORIZATION], "Bearer token-2");
}

/// AsyncFilter, above: While it decides, it keeps what is below ready and so holds a permit of a limit below. What it
/// rejects costs no token request.
#[tokio::test(start_paused = true)]
async fn an_async_filter_above_holds_readiness_but_no_token() {
    let server = AuthServer::new();
    let permits = Arc::new(Semaphore::new(1));
    let mut client = ServiceBuilder::new()
        .filter_async(|_| async {
            time::sleep(secs(1)).await;
            Err::<Request<String>, _>("rejected")
        })
        .layer(BearerAuthLayer::new(server.clone()))
        .layer(GlobalConcurrencyLimitLayer::with_semaphore(permits.clone()))
        .service(Api::echoing());
    let waiting = tokio::spawn(ready(&mut client).await.unwrap().call(get()));
    settle().await;
    assert_eq!(permits.available_permits(), 0);
    let error = waiting.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "rejected");
    assert_eq!(permits.available_permits(), 1);
    assert_eq!(server.requests(), 0);
}

/// AsyncFilter, below: It does the same with a signed request, whose token may die meanwhile.
#[tokio::test(start_paused = true)]
async fn an_async_filter_below_holds_a_signed_request_and_a_permit() {
    let server = AuthServer::new();
    server.set(Answer::Grant(secs(60)));
    let permits = Arc::new(Semaphore::new(1));
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(server.clone()))
        .filter_async(|request: Request<String>| async {
            time::sleep(secs(100)).await;
            Ok::<_, BoxError>(request)
        })
        .layer(GlobalConcurrencyLimitLayer::with_semaphore(permits.clone()))
        .service(Api::echoing());
    let waiting = tokio::spawn(client.oneshot(get()));
    time::sleep(secs(99)).await;
    assert_eq!(permits.available_permits(), 0);
    assert_eq!(waiting.await.unwrap().unwrap().body(), "token-1");
    assert_eq!(server.requests(), 1);
}
