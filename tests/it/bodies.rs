//! A replay sends the same request, and only what can be replayed is.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, Method, Request, Response, Uri, Version,
    header::{ACCEPT, AUTHORIZATION},
    request::Parts,
};
use http_body::Body;
use http_body_util::{BodyExt, Empty, Full, combinators::UnsyncBoxBody};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_bearer::{BearerAuthLayer, BoxError, CloneBody, EmptyBody, Never, Replay};

use crate::support::{
    AuthServer, INVALID_TOKEN, Upload, bearer, data, echo, settle, timed, unauthorized,
};

/// A request as the API saw it.
#[derive(Clone, Debug)]
struct Received {
    head: Parts,
    body: Bytes,
}

impl Received {
    fn token(&self) -> &str {
        let value = self.head.headers[AUTHORIZATION].to_str().unwrap();
        value.strip_prefix("Bearer ").unwrap()
    }
}

type Log = Arc<Mutex<Vec<Received>>>;

/// An API that reads the first `frames` frames of a body, or all of them, and refuses the first token.
fn reading<B>(
    frames: usize,
) -> (
    Log,
    impl Service<Request<B>, Response = Response<String>, Error = Infallible> + Clone,
)
where
    B: Body<Data = Bytes, Error: std::fmt::Debug> + Send + 'static,
{
    let log = Log::default();
    let received = log.clone();
    let service = service_fn(move |request: Request<B>| {
        let log = log.clone();
        async move {
            let response = match bearer(&request) {
                Some("token-1") => unauthorized(INVALID_TOKEN),
                token => echo(token),
            };
            let (head, body) = request.into_parts();
            let mut body = std::pin::pin!(body);
            let mut bytes = BytesMut::new();
            for _ in 0..frames {
                let Some(frame) = body.frame().await else {
                    break;
                };
                bytes.extend_from_slice(&frame.unwrap().into_data().unwrap());
            }
            let body = bytes.freeze();
            log.lock().unwrap().push(Received { head, body });
            Ok(response)
        }
    });
    (received, service)
}

const ALL: usize = usize::MAX;
const URI: &str = "https://api.example.com/sims/8944?expand=plan&expand=usage";

#[derive(Clone, Debug, PartialEq)]
struct Deadline(u64);

fn request<B>(body: B) -> Request<B> {
    let mut request = Request::builder()
        .method(Method::PATCH)
        .uri(URI)
        .version(Version::HTTP_2)
        .header(ACCEPT, "text/plain")
        .header("idempotency-key", "7f3a")
        .header(ACCEPT, "application/json")
        .body(body)
        .unwrap();
    request.extensions_mut().insert(Deadline(7));
    request
}

/// Asserts that it is the request above, with this body and token.
fn assert_whole(received: &Received, body: &[u8], token: &str) {
    let Received { head, body: bytes } = received;
    assert_eq!(head.method, Method::PATCH);
    assert_eq!(head.uri, Uri::from_static(URI));
    assert_eq!(head.version, Version::HTTP_2);
    assert_eq!(head.extensions.get(), Some(&Deadline(7)));
    let mut headers = HeaderMap::new();
    headers.append(ACCEPT, "text/plain".parse().unwrap());
    headers.append("idempotency-key", "7f3a".parse().unwrap());
    headers.append(ACCEPT, "application/json".parse().unwrap());
    headers.insert(AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
    assert_eq!(head.headers, headers);
    assert_eq!(bytes, body);
    assert_eq!(received.token(), token);
}

/// Sends `body` through a layer that replays by `$replay`, and returns the response with what the API got.
macro_rules! send {
    ($replay:expr, $frames:expr, $body:expr) => {{
        let server = AuthServer::new();
        let (log, api) = reading($frames);
        let client = BearerAuthLayer::new(server.clone())
            .replay($replay)
            .layer(api);
        let response = client.clone().oneshot(request($body)).await.unwrap();
        settle().await;
        // The token is replaced whether or not the request is replayed.
        assert_eq!(server.requests(), 2);
        let token = client.cache().peek().unwrap();
        assert_eq!(token.expose_secret(), "token-2");
        let received = log.lock().unwrap().clone();
        (response, received)
    }};
}

fn assert_sent_twice((response, received): (Response<String>, Vec<Received>), body: &[u8]) {
    assert_eq!(response.body(), "token-2");
    let [first, second] = &received[..] else {
        panic!("not sent twice: {received:?}");
    };
    assert_whole(first, body, "token-1");
    assert_whole(second, body, "token-2");
}

fn assert_sent_once((response, received): (Response<String>, Vec<Received>), body: &[u8]) {
    assert_eq!(response.status(), 401);
    assert_eq!(response.headers()["www-authenticate"], INVALID_TOKEN);
    let [once] = &received[..] else {
        panic!("not sent once: {received:?}");
    };
    assert_whole(once, body, "token-1");
}

/// Law 8: the clone equals the request, to the byte.
#[tokio::test(start_paused = true)]
async fn cloned_bodies_are_sent_again_whole() {
    let large: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
    assert_sent_twice(send!(CloneBody, ALL, Empty::<Bytes>::new()), b"");
    assert_sent_twice(send!(CloneBody, ALL, Full::new(Bytes::new())), b"");
    assert_sent_twice(
        send!(CloneBody, ALL, Full::new(Bytes::from(large.clone()))),
        &large,
    );
    let text = "{\"imsi\":\"26201\"}".to_owned();
    assert_sent_twice(send!(CloneBody, ALL, text.clone()), text.as_bytes());
}

/// Law 8: the clone is taken before the body is read.
#[tokio::test(start_paused = true)]
async fn an_unread_cloned_body_is_sent_again_whole() {
    let server = AuthServer::new();
    let (log, api) = reading(0);
    let client = BearerAuthLayer::new(server).replay(CloneBody).layer(api);
    let body = Full::new(Bytes::from_static(b"whole"));
    let response = client.oneshot(request(body)).await.unwrap();
    assert_eq!(response.body(), "token-2");
    assert_eq!(log.lock().unwrap().len(), 2);
}

/// Law 8: the default sends nothing twice.
#[tokio::test(start_paused = true)]
async fn without_replay_every_body_is_sent_once() {
    assert_sent_once(send!(Never, ALL, Empty::<Bytes>::new()), b"");
    assert_sent_once(send!(Never, ALL, Full::new(Bytes::from("a"))), b"a");
    assert_sent_once(send!(Never, ALL, "b".to_owned()), b"b");
    assert_sent_once(send!(Never, ALL, boxed("c")), b"c");
    assert_sent_once(send!(Never, ALL, Upload::of(&["d", "e"])), b"de");
}

/// A body that can be neither cloned nor shared.
fn boxed(text: &'static str) -> UnsyncBoxBody<Bytes, BoxError> {
    Full::new(Bytes::from(text))
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// Law 8: even bodies that cannot be cloned.
#[tokio::test(start_paused = true)]
async fn empty_bodies_are_sent_again() {
    assert_sent_twice(send!(EmptyBody, ALL, Empty::<Bytes>::new()), b"");
    assert_sent_twice(send!(EmptyBody, ALL, Full::new(Bytes::new())), b"");
    assert_sent_twice(send!(EmptyBody, ALL, String::new()), b"");
    assert_sent_twice(send!(EmptyBody, ALL, boxed("")), b"");
    assert_sent_twice(send!(EmptyBody, ALL, Upload::default()), b"");
}

/// Law 8: the token is replaced all the same.
#[tokio::test(start_paused = true)]
async fn empty_body_sends_bodies_that_are_not_empty_once() {
    assert_sent_once(send!(EmptyBody, ALL, Full::new(Bytes::from("a"))), b"a");
    assert_sent_once(send!(EmptyBody, ALL, "b".to_owned()), b"b");
    assert_sent_once(send!(EmptyBody, ALL, boxed("c")), b"c");
    assert_sent_once(send!(EmptyBody, ALL, Upload::of(&["d", "e"])), b"de");
    // It turns out to be empty, which nobody could tell beforehand.
    assert_sent_once(send!(EmptyBody, ALL, Upload::of(&[])), b"");
}

/// Law 8: it is not restarted, and its caller does not wait.
#[tokio::test(start_paused = true)]
async fn a_refusal_of_a_half_sent_stream_is_returned_at_once() {
    let half = || {
        let (sender, upload) = Upload::new();
        sender.send(data("half")).unwrap();
        (sender, upload)
    };
    let (sender, upload) = half();
    assert_sent_once(send!(EmptyBody, 1, upload), b"half");
    assert!(sender.is_closed(), "the rest is not read");
    let (sender, upload) = half();
    assert_sent_once(send!(Never, 1, upload), b"half");
    assert!(sender.is_closed(), "the rest is not read");

    let server = AuthServer::new();
    let (_, api) = reading(1);
    let client = BearerAuthLayer::new(server.clone())
        .replay(EmptyBody)
        .layer(api);
    client.cache().get().await.unwrap();
    server.set_latency(Duration::from_secs(1));
    let (_sender, upload) = half();
    let (response, took) = timed(client.oneshot(request(upload))).await;
    assert_eq!(response.unwrap().status(), 401);
    assert_eq!(took, Duration::ZERO);
}

/// An API that counts its clones and takes any token.
#[derive(Default)]
struct Counted {
    clones: Arc<AtomicUsize>,
}

impl Clone for Counted {
    fn clone(&self) -> Self {
        self.clones.fetch_add(1, Ordering::Relaxed);
        Self {
            clones: Arc::clone(&self.clones),
        }
    }
}

impl<B> Service<Request<B>> for Counted {
    type Response = Response<String>;
    type Error = Infallible;
    type Future = Ready<Result<Response<String>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        ready(Ok(echo(bearer(&request))))
    }
}

/// A clone may cost a limit or a connection, so a request that is sent once takes none.
#[tokio::test(start_paused = true)]
async fn only_replayable_requests_clone_the_inner_service() {
    async fn clones<R: Replay<Request<String>>>(replay: R, body: &str) -> usize {
        let inner = Counted::default();
        let clones = Arc::clone(&inner.clones);
        let layer = BearerAuthLayer::new(AuthServer::new()).replay(replay);
        let mut client = layer.layer(inner);
        client.cache().get().await.unwrap();
        for _ in 0..10 {
            let response = client.call(request(body.to_owned())).await.unwrap();
            assert_eq!(response.body(), "token-1");
        }
        clones.load(Ordering::Relaxed)
    }

    assert_eq!(clones(Never, "").await, 0);
    assert_eq!(clones(EmptyBody, "body").await, 0);
    assert_eq!(clones(EmptyBody, "").await, 10);
    assert_eq!(clones(CloneBody, "body").await, 10);
}
