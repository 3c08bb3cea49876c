//! axum: a gateway that forwards its users' requests with its own token, over hyper-util's client.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    error_handling::HandleErrorLayer,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{
    HeaderMap, Request, StatusCode, Uri,
    header::{AUTHORIZATION, HOST, RETRY_AFTER, WWW_AUTHENTICATE},
    uri::{Authority, PathAndQuery, Scheme},
};
use http_body_util::BodyExt;
use hyper::{body::Incoming, client::conn::http2, ext::Protocol};
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    time,
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tower::{ServiceBuilder, service_fn};
use tower_bearer::{
    BearerAuthLayer, BoxError, CloneBody, CollectBodyLayer, CollectedBody, EmptyBody, TokenCache,
    TokenError,
};

use crate::{
    serve,
    support::{Answer, AuthServer, INVALID_TOKEN, bearer_of, until},
};

/// An API that sends bodies back as they come, unless it refuses the token. Clones are one API.
#[derive(Clone, Default)]
struct Upstream {
    refused: Arc<Mutex<Option<&'static str>>>,
    seen: Arc<Mutex<Vec<HeaderMap>>>,
}

impl Upstream {
    async fn start(&self) -> SocketAddr {
        let upstream = self.clone();
        let answer = move |request: Request<Body>| async move { upstream.answer(request) };
        serve(Router::new().fallback(answer)).await
    }

    fn answer(&self, request: Request<Body>) -> Response {
        let (head, body) = request.into_parts();
        let refused = *self.refused.lock().unwrap();
        let refused = refused.is_some_and(|token| token == bearer(&head.headers));
        self.seen.lock().unwrap().push(head.headers);
        match refused {
            true => (
                StatusCode::UNAUTHORIZED,
                [(WWW_AUTHENTICATE, INVALID_TOKEN)],
            )
                .into_response(),
            false => body.into_response(),
        }
    }

    fn refuse(&self, token: &'static str) {
        *self.refused.lock().unwrap() = Some(token);
    }

    fn seen(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap();
        seen.iter().map(bearer).collect()
    }
}

fn bearer(headers: &HeaderMap) -> String {
    bearer_of(headers).unwrap_or("anonymous").to_owned()
}

/// A gateway whose only handler is the stack.
fn gateway(layer: BearerAuthLayer<EmptyBody>, upstream: SocketAddr) -> Router {
    let upstream: Authority = upstream.to_string().parse().unwrap();
    let cache = layer.cache().clone();
    let explain = move |error| explain(error, cache.status().retry_in());
    let stack = ServiceBuilder::new()
        .layer(HandleErrorLayer::new(explain))
        .map_response(conceal)
        .map_request(move |request| retarget(request, &upstream))
        .layer(layer)
        .service(Client::builder(TokioExecutor::new()).build_http::<Body>());
    Router::new().fallback_service(stack)
}

/// Makes a user's request ours, for the upstream.
fn retarget(mut request: Request<Body>, upstream: &Authority) -> Request<Body> {
    let mut parts = request.uri().clone().into_parts();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(upstream.clone());
    // A `CONNECT` has no path, and a URI with a scheme needs one.
    let root = PathAndQuery::from_static("/");
    parts.path_and_query.get_or_insert(root);
    *request.uri_mut() = Uri::from_parts(parts).unwrap();
    request.headers_mut().remove(HOST);
    request
}

/// A user would take a refusal of the gateway's token for one of its own.
fn conceal(response: http::Response<Incoming>) -> Response {
    match response.status() {
        StatusCode::UNAUTHORIZED => StatusCode::BAD_GATEWAY.into_response(),
        _ => response.into_response(),
    }
}

/// Tells a user that there is no token, which is not the user's fault.
async fn explain(error: BoxError, retry_in: Option<Duration>) -> Response {
    let Some(error) = error.downcast_ref::<TokenError>() else {
        return StatusCode::BAD_GATEWAY.into_response();
    };
    if !error.is_transient() {
        return StatusCode::BAD_GATEWAY.into_response();
    }
    let seconds = retry_in.map_or(1, |pause| pause.as_secs() + 1);
    let headers = [(RETRY_AFTER, seconds.to_string())];
    (StatusCode::SERVICE_UNAVAILABLE, headers).into_response()
}

/// A gateway, its cache, and its upstream.
struct World {
    gateway: SocketAddr,
    cache: TokenCache,
    upstream: Upstream,
}

impl World {
    async fn start(auth: &AuthServer) -> Self {
        Self::with(BearerAuthLayer::new(auth.clone())).await
    }

    async fn with(layer: BearerAuthLayer) -> Self {
        let upstream = Upstream::default();
        let cache = layer.cache().clone();
        let address = upstream.start().await;
        let gateway = serve(gateway(layer.replay(EmptyBody), address)).await;
        Self {
            gateway,
            cache,
            upstream,
        }
    }

    fn request(&self, method: &str) -> http::request::Builder {
        Request::builder()
            .method(method)
            .uri(format!("http://{}/sims?page=2", self.gateway))
            .header(AUTHORIZATION, "Bearer users-own")
    }

    async fn get(&self) -> http::Response<Incoming> {
        user(self.request("GET").body(Body::empty()).unwrap()).await
    }
}

/// Sends a request as a user with its own connection.
async fn user(request: Request<Body>) -> http::Response<Incoming> {
    let client = Client::builder(TokioExecutor::new()).build_http();
    client.request(request).await.unwrap()
}

#[tokio::test]
async fn a_gateway_sends_its_own_token_in_place_of_its_users() {
    let auth = AuthServer::new();
    let world = World::start(&auth).await;
    assert_eq!(world.get().await.status(), StatusCode::OK);
    assert_eq!(world.upstream.seen(), ["token-1"]);

    let world = World::with(BearerAuthLayer::new(auth.clone()).keep_existing(true)).await;
    assert_eq!(world.get().await.status(), StatusCode::OK);
    assert_eq!(world.upstream.seen(), ["users-own"]);
    assert_eq!(auth.requests(), 1);
}

/// Each part arrives before the next is sent.
#[tokio::test]
async fn bodies_stream_through_in_both_directions() {
    let world = World::start(&AuthServer::new()).await;
    let (sender, receiver) = mpsc::channel::<&str>(1);
    let parts = ReceiverStream::new(receiver).map(|part| Ok::<_, Infallible>(Bytes::from(part)));
    let request = world
        .request("POST")
        .body(Body::from_stream(parts))
        .unwrap();
    sender.send("one").await.unwrap();
    let response = time::timeout(Duration::from_secs(5), user(request)).await;
    let mut body = response.expect("the head comes before the end").into_body();
    for part in ["one", "two", "three"] {
        let frame = time::timeout(Duration::from_secs(5), body.frame()).await;
        let frame = frame.expect("each part comes by itself").unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), part);
        if let Some(next) = match part {
            "one" => Some("two"),
            "two" => Some("three"),
            _ => None,
        } {
            sender.send(next).await.unwrap();
        }
    }
    drop(sender);
    assert!(body.frame().await.is_none());
}

/// RFC 9112 section 3.2: a user may name any target, and `CONNECT` has no path.
#[tokio::test]
async fn the_api_answers_every_form_of_a_target() {
    let world = World::start(&AuthServer::new()).await;
    for line in [
        "GET /sims HTTP/1.1",
        "GET http://elsewhere.example HTTP/1.1",
        "OPTIONS * HTTP/1.1",
        "CONNECT elsewhere.example:443 HTTP/1.1",
    ] {
        let mut user = TcpStream::connect(world.gateway).await.unwrap();
        let request = format!("{line}\r\nhost: elsewhere.example\r\n\r\n");
        user.write_all(request.as_bytes()).await.unwrap();
        let mut status = [0; 15];
        let read = time::timeout(Duration::from_secs(5), user.read_exact(&mut status)).await;
        read.expect("it is answered").unwrap();
        assert_eq!(&status, b"HTTP/1.1 200 OK", "{line}");
    }
    assert_eq!(world.upstream.seen(), ["token-1"; 4]);
}

#[tokio::test]
async fn a_refused_token_is_replaced_and_an_empty_request_replayed() {
    let auth = AuthServer::new();
    let world = World::start(&auth).await;
    world.upstream.refuse("token-1");
    assert_eq!(world.get().await.status(), StatusCode::OK);
    assert_eq!(world.upstream.seen(), ["token-1", "token-2"]);
    assert_eq!(auth.requests(), 2);
}

/// A body under way cannot be sent again, and the next request has another token.
#[tokio::test]
async fn a_request_with_a_body_is_sent_once_and_the_token_is_replaced() {
    let auth = AuthServer::new();
    let world = World::start(&auth).await;
    world.upstream.refuse("token-1");
    let request = || world.request("POST").body(Body::from("order")).unwrap();
    assert_eq!(user(request()).await.status(), StatusCode::BAD_GATEWAY);
    assert_eq!(world.upstream.seen(), ["token-1"]);
    let response = user(request()).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(
        response.into_body().collect().await.unwrap().to_bytes(),
        "order"
    );
    assert_eq!(world.upstream.seen(), ["token-1", "token-2"]);
}

/// RFC 8441: hyper presents such a request without a body, and hands out its stream by an upgrade.
#[tokio::test]
async fn a_websocket_over_http_2_does_not_wait_for_a_body_to_be_collected() {
    let (sender, mut seen) = mpsc::unbounded_channel();
    let api = service_fn(move |request: Request<CollectedBody<Body>>| {
        let protocol = request.extensions().get::<Protocol>().cloned();
        let token = bearer(request.headers());
        let status = match &*token {
            "token-1" => StatusCode::UNAUTHORIZED,
            _ => StatusCode::OK,
        };
        sender.send((protocol, token)).unwrap();
        async move { Ok::<_, Infallible>(status.into_response()) }
    });
    let stack = ServiceBuilder::new()
        .layer(HandleErrorLayer::new(|_: BoxError| async {
            StatusCode::BAD_GATEWAY
        }))
        .layer(CollectBodyLayer::new(100))
        .layer(BearerAuthLayer::new(AuthServer::new()).replay(CloneBody))
        .service(api);
    let gateway = serve(Router::new().route_service("/chat", stack)).await;

    let stream = TokioIo::new(TcpStream::connect(gateway).await.unwrap());
    let (mut user, connection) = http2::handshake(TokioExecutor::new(), stream)
        .await
        .unwrap();
    tokio::spawn(connection);
    let target = |path| format!("http://{gateway}{path}");
    // The first answer brings the gateway's settings, which allow such requests.
    let request = Request::get(target("/")).body(Body::empty()).unwrap();
    user.send_request(request).await.unwrap();
    let websocket = Protocol::from_static("websocket");
    let request = Request::connect(target("/chat"))
        .extension(websocket.clone())
        .body(Body::empty())
        .unwrap();
    let response = time::timeout(Duration::from_secs(5), user.send_request(request)).await;
    assert_eq!(response.unwrap().unwrap().status(), StatusCode::OK);
    for token in ["token-1", "token-2"] {
        let sent = (Some(websocket.clone()), token.to_owned());
        assert_eq!(seen.recv().await.unwrap(), sent);
    }
}

#[tokio::test]
async fn users_are_told_when_to_come_back_while_there_is_no_token() {
    let auth = AuthServer::new();
    let busy = TokenError::transient("busy").with_retry_after(Duration::from_secs(20));
    auth.set(Answer::Fail(busy));
    let world = World::start(&auth).await;
    let response = world.get().await;
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    // Asked for 20 s, the cache waits up to 22 s.
    let pause: u64 = response.headers()[RETRY_AFTER]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((20..=22).contains(&pause), "{pause}");

    let auth = AuthServer::new();
    auth.set(Answer::Fail(TokenError::terminal("unknown client")));
    let world = World::start(&auth).await;
    let response = world.get().await;
    assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
    assert!(!response.headers().contains_key(RETRY_AFTER));
    assert!(world.upstream.seen().is_empty());
}

/// Law 5: axum drops a handler's future when its user hangs up.
#[tokio::test]
async fn a_user_who_hangs_up_leaves_the_token_request_running() {
    /// Tells when the gateway drops a request.
    struct Dropped(Arc<AtomicBool>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    let auth = AuthServer::new();
    auth.hold();
    let layer = BearerAuthLayer::new(auth.clone());
    let cache = layer.cache().clone();
    let upstream = Upstream::default();
    let address = upstream.start().await;
    let dropped = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&dropped);
    let watch = axum::middleware::from_fn(move |request, next: axum::middleware::Next| {
        let guard = Dropped(Arc::clone(&flag));
        async move {
            let response = next.run(request).await;
            std::mem::forget(guard);
            response
        }
    });
    let gateway = serve(gateway(layer.replay(EmptyBody), address).layer(watch)).await;
    let world = World {
        gateway,
        cache,
        upstream,
    };
    let request = world.request("GET").body(Body::empty()).unwrap();
    let hasty = tokio::spawn(user(request));
    until(|| auth.requests() == 1).await;
    hasty.abort();
    until(|| dropped.load(Ordering::SeqCst)).await;

    auth.release();
    until(|| world.cache.peek().is_some()).await;
    assert!(world.upstream.seen().is_empty());
    assert_eq!(world.get().await.status(), StatusCode::OK);
    assert_eq!(auth.requests(), 1);
}
