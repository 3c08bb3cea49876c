//! What chooses among services, makes them or hides their types.

use std::{
    convert::Infallible,
    future, io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use http::{Request, Response, StatusCode};
use tower::{
    Layer, Service, ServiceBuilder, ServiceExt,
    balance::p2c::Balance,
    discover::ServiceList,
    limit::ConcurrencyLimit,
    load::{CompleteOnResponse, PendingRequests},
    reconnect::Reconnect,
    service_fn,
    steer::Steer,
    util::{BoxCloneService, BoxCloneSyncService, BoxService},
};
use tower_bearer::{BearerAuthLayer, BoxError, CloneBody, TokenError};

use crate::{
    is_clone::is_clone,
    support::{
        Answer, Api, AuthServer, INVALID_TOKEN, all, echo, get, get_path, now, ready, secs, settle,
        token_error, unauthorized,
    },
};

type Endpoints<S> = ServiceList<Vec<PendingRequests<S>>>;

fn endpoints<S: Service<Request<String>>>(services: impl IntoIterator<Item = S>) -> Endpoints<S> {
    let measured = services
        .into_iter()
        .map(|service| PendingRequests::new(service, CompleteOnResponse::default()));
    ServiceList::new::<Request<String>>(measured.collect())
}

/// Balance, above: One layer around all endpoints gives them one token, and a token failure evicts no endpoint.
///
/// Laws 1 and 10.
#[tokio::test(start_paused = true)]
async fn a_balance_above_keeps_its_endpoints_through_an_outage() {
    let server = AuthServer::new();
    server.set(Answer::Fail(TokenError::transient("down")));
    let layer = BearerAuthLayer::new(server.clone());
    let apis = [Api::echoing(), Api::echoing()];
    let services = apis.iter().map(|api| layer.layer(api.clone()));
    let mut client = Balance::<_, Request<String>>::new(endpoints(services));
    for _ in 0..10 {
        let error = ready(&mut client)
            .await
            .unwrap()
            .call(get())
            .await
            .unwrap_err();
        assert!(token_error(&error).is_transient());
    }
    assert_eq!(client.len(), 2);

    server.set(Answer::Grant(secs(300)));
    tokio::time::sleep(secs(20)).await;
    let failed = server.requests();
    for _ in 0..20 {
        ready(&mut client).await.unwrap().call(get()).await.unwrap();
    }
    assert_eq!(server.requests(), failed + 1);
    assert!(apis.iter().all(|api| !api.arrivals().is_empty()));
}

/// Balance, below: It sees only sends and their load. Not `Clone`: put a `Buffer` between.
#[tokio::test(start_paused = true)]
async fn a_balance_below_sees_only_signed_requests() {
    assert!(!is_clone!(Balance<Endpoints<Api>, Request<String>>));
    let server = AuthServer::new();
    server.hold();
    let apis = [(); 2].map(|()| Api::refusing_the_first());
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(server.clone()).replay(CloneBody))
        .buffer(8)
        .service(Balance::new(endpoints(apis.clone())));
    let sent = || apis.iter().flat_map(Api::tokens).collect::<Vec<_>>();
    let waiting: Vec<_> = (0..20)
        .map(|n| tokio::spawn(client.clone().oneshot(get_path(n))))
        .collect();
    settle().await;
    assert!(sent().is_empty());
    server.release();
    for response in all(waiting).await {
        assert_eq!(response.unwrap().body(), "token-2");
    }
    assert!(apis.iter().all(|api| !api.arrivals().is_empty()));
    assert!(sent().iter().all(|token| token.starts_with("token-")));
    assert_eq!(server.requests(), 2);
}

/// Steer, above: Each target may have its own layer, and with it its own token.
#[tokio::test(start_paused = true)]
async fn a_steer_above_gives_each_target_its_token() {
    let servers = [AuthServer::new(), AuthServer::new()];
    servers[1].set(Answer::token("other", secs(300)));
    let services = servers
        .clone()
        .map(|server| BearerAuthLayer::new(server).layer(Api::echoing()));
    let pick = |request: &Request<String>, _: &[_]| usize::from(request.uri().path() != "/sims");
    let mut client = Steer::new(services, pick);
    for (request, token) in [(get(), "token-1"), (get_path("other"), "other")] {
        let response = ready(&mut client).await.unwrap().call(request).await;
        assert_eq!(response.unwrap().body(), token);
    }
    assert!(servers.iter().all(|server| server.requests() == 1));
}

/// Steer, below: It sees only signed requests. A clone of a ready one takes itself for ready: over services whose
/// `poll_ready` reserves something, put a `Buffer` between.
#[tokio::test(start_paused = true)]
async fn a_steer_below_over_limits_needs_a_buffer() {
    let pick = |_: &Request<String>, _: &[_]| 1;
    let apis = [(); 2].map(|()| Api::refusing_the_first());
    let client = BearerAuthLayer::new(AuthServer::new())
        .replay(CloneBody)
        .layer(Steer::new(apis.clone(), pick));
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-2");
    assert_eq!(apis[1].tokens(), ["token-1", "token-2"]);

    // A limit whose only permit is taken.
    let pick = |_: &Request<String>, _: &[_]| 0;
    let steer = || Steer::new([ConcurrencyLimit::new(apis[1].clone(), 1)], pick);
    let mut steered = steer();
    ready(&mut steered).await.unwrap();
    assert!(now(ready(&mut steered.clone())).is_ok());

    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(AuthServer::new()).replay(CloneBody))
        .buffer(8)
        .service(steer());
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-2");
}

/// Reconnect, above: The token outlives the connections if one layer wraps them all; a token failure breaks none.
///
/// Law 10.
#[tokio::test(start_paused = true)]
async fn a_reconnect_above_keeps_connection_and_token() {
    let server = AuthServer::new();
    let layer = BearerAuthLayer::new(server.clone());
    let made = Arc::new(AtomicUsize::new(0));
    let (counter, wrap) = (made.clone(), layer.clone());
    let connect = service_fn(move |()| {
        counter.fetch_add(1, Ordering::SeqCst);
        // A connection that lasts for four requests.
        future::ready(Ok::<_, Infallible>(wrap.layer(Lasting { left: 4 })))
    });
    let mut client = Reconnect::new(connect, ());
    server.set(Answer::Fail(TokenError::terminal("refused")));
    for _ in 0..2 {
        let error = ready(&mut client)
            .await
            .unwrap()
            .call(get())
            .await
            .unwrap_err();
        assert!(!token_error(&error).is_transient());
    }
    server.set(Answer::Grant(secs(300)));
    tokio::time::sleep(secs(60)).await;
    for _ in 0..8 {
        let response: Response<String> =
            ready(&mut client).await.unwrap().call(get()).await.unwrap();
        assert_eq!(response.body(), "token-2");
    }
    assert_eq!(made.load(Ordering::SeqCst), 2);
    assert_eq!(server.requests(), 2);
}

/// A connection that breaks after some requests.
#[derive(Clone)]
struct Lasting {
    left: usize,
}

impl Service<Request<String>> for Lasting {
    type Response = Response<String>;
    type Error = io::Error;
    type Future = future::Ready<io::Result<Response<String>>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<io::Result<()>> {
        std::task::Poll::Ready(match self.left {
            0 => Err(io::ErrorKind::ConnectionReset.into()),
            _ => Ok(()),
        })
    }

    fn call(&mut self, request: Request<String>) -> Self::Future {
        self.left -= 1;
        future::ready(Ok(echo(crate::support::bearer(&request))))
    }
}

/// Reconnect, below: A connection that cannot be made is its own error, not a token failure. Not `Clone`: put a
/// `Buffer` between.
#[tokio::test(start_paused = true)]
async fn a_failed_reconnect_is_no_token_failure() {
    type Connect = BoxCloneService<(), Api, io::Error>;
    assert!(!is_clone!(Reconnect<Connect, ()>));
    let server = AuthServer::new();
    let tries = AtomicUsize::new(0);
    let connect = service_fn(move |()| {
        future::ready(match tries.fetch_add(1, Ordering::SeqCst) {
            0 => Err(io::Error::from(io::ErrorKind::ConnectionRefused)),
            _ => Ok(Api::echoing()),
        })
    });
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(server.clone()))
        .buffer(8)
        .service(Reconnect::new(connect, ()));
    let error = client.clone().oneshot(get()).await.unwrap_err();
    assert_eq!(
        error.downcast::<io::Error>().unwrap().kind(),
        io::ErrorKind::ConnectionRefused
    );
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-1");
    assert_eq!(server.requests(), 1);
}

/// BoxService, above: It boxes the layer with all below.
#[tokio::test(start_paused = true)]
async fn the_stack_is_boxed() {
    let api = Api::refusing_the_first();
    let client = BearerAuthLayer::new(AuthServer::new())
        .replay(CloneBody)
        .layer(api.clone());
    let client: BoxService<_, _, BoxError> = BoxService::new(client);
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-2");
}

/// BoxService, below: Not `Clone`: take `BoxCloneSyncService`, or put a `Buffer` between.
#[tokio::test(start_paused = true)]
async fn a_boxed_service_that_is_not_clone_needs_a_buffer() {
    type Boxed = BoxService<Request<String>, Response<String>, Infallible>;
    assert!(!is_clone!(Boxed));
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(AuthServer::new()).replay(CloneBody))
        .buffer(8)
        .service(Boxed::new(Api::refusing_the_first()));
    let response = client.oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.body(), "token-2");
}

/// BoxCloneService, BoxCloneSyncService, above: Its clones share the token, like those of what it boxes.
///
/// Law 1.
#[tokio::test(start_paused = true)]
async fn clones_of_a_boxed_stack_share_the_token() {
    let server = AuthServer::new();
    let client = BearerAuthLayer::new(server.clone()).layer(Api::echoing());
    let send: BoxCloneService<_, _, BoxError> = BoxCloneService::new(client.clone());
    let sync: BoxCloneSyncService<_, _, BoxError> = BoxCloneSyncService::new(client);
    for _ in 0..3 {
        assert_eq!(send.clone().oneshot(get()).await.unwrap().body(), "token-1");
        assert_eq!(sync.clone().oneshot(get()).await.unwrap().body(), "token-1");
    }
    assert_eq!(server.requests(), 1);
}

/// BoxCloneService, BoxCloneSyncService, below: It is cloned like any other.
#[tokio::test(start_paused = true)]
async fn a_boxed_inner_service_works() {
    let api = Api::refusing_the_first();
    type Boxed = BoxCloneService<Request<String>, Response<String>, Infallible>;
    assert!(is_clone!(Boxed));
    let layer = || BearerAuthLayer::new(AuthServer::new()).replay(CloneBody);
    let client = layer().layer(BoxCloneSyncService::new(api.clone()));
    // The futures are `Send`, though one of the boxes is not `Sync`.
    let response = tokio::spawn(client.oneshot(get())).await.unwrap();
    assert_eq!(response.unwrap().body(), "token-2");
    let client = layer().layer(BoxCloneService::new(api.clone()));
    let response = tokio::spawn(client.oneshot(get())).await.unwrap();
    assert_eq!(response.unwrap().body(), "token-2");
    assert_eq!(api.tokens(), ["token-1", "token-2"].repeat(2));
}

/// BearerAuth, above: With `.origins([..])` on both, each origin gets the token of its own layer, and a 401 counts
/// only against that token.
///
/// Laws 8 and 9.
#[tokio::test(start_paused = true)]
async fn two_layers_with_pinned_origins_keep_to_them() {
    let servers = [AuthServer::new(), AuthServer::new()];
    servers[0].set(Answer::token("other", secs(300)));
    let [above, below] = servers.clone().map(BearerAuthLayer::new);
    let client = ServiceBuilder::new()
        .layer(above.origins(["https://other.example"]).unwrap())
        .layer(below.origins(["https://api.example"]).unwrap())
        .service(Api::refusing_the_first());
    let ask = async |origin| {
        let request = Request::get(origin).body(String::new()).unwrap();
        client.clone().oneshot(request).await.unwrap()
    };
    assert_eq!(ask("https://other.example").await.body(), "other");
    assert_eq!(ask("https://evil.example").await.body(), "anonymous");
    let response = ask("https://api.example").await;
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(ask("https://api.example").await.body(), "token-2");
    assert_eq!(servers.map(|server| server.requests()), [1, 2]);
}

/// BearerAuth, below: Without origins of its own, its token replaces the one from above, and a 401 that it cannot
/// resolve counts against both.
///
/// Law 8.
#[tokio::test(start_paused = true)]
async fn a_second_layer_below_displaces_the_token() {
    let servers = [AuthServer::new(), AuthServer::new()];
    servers[0].set(Answer::token("displaced", secs(300)));
    let [above, below] = servers.clone().map(BearerAuthLayer::new);
    let api = Api::new(|_| unauthorized(INVALID_TOKEN));
    let client = ServiceBuilder::new()
        .layer(above.replay(CloneBody))
        .layer(below.replay(CloneBody))
        .service(api.clone());
    let response = client.oneshot(get()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(api.tokens(), ["token-1", "token-2"]);
    assert_eq!(servers.map(|server| server.requests()), [2, 2]);
}
