//! Streaming bodies that are read before the request is sent.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use tokio::{sync::mpsc, time};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_bearer::{
    BearerAuthLayer, BoxError, CloneBody, CollectBodyLayer, CollectedBody, TokenCache,
};

use crate::support::{
    AuthServer, INVALID_TOKEN, Upload, bearer, data, echo, now, poll_once, secs, unauthorized,
};

fn checksum() -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-checksum", "1".parse().unwrap());
    trailers
}

fn put<B>(body: B) -> Request<B> {
    let request = Request::put("https://api.example.com/sims/1").extension(Mark(7));
    request.header("x-key", "1").body(body).unwrap()
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Mark(u8);

/// What the API got, one chunk per frame.
#[derive(Debug, PartialEq)]
struct Received {
    token: String,
    /// The body's size hint before it is read.
    length: (u64, Option<u64>),
    chunks: Vec<Bytes>,
    trailers: HeaderMap,
}

type Log = Arc<Mutex<Vec<Received>>>;

/// An API that reads a body to its end and refuses the first token.
fn api<B>() -> (
    Log,
    impl Service<Request<CollectedBody<B>>, Response = Response<String>, Error = BoxError, Future: Send>
    + Clone,
)
where
    B: Body<Error: Into<BoxError>> + Send + 'static,
{
    let log = Log::default();
    let received = log.clone();
    let service = service_fn(move |request: Request<CollectedBody<B>>| {
        let log = log.clone();
        async move {
            assert_eq!(request.extensions().get(), Some(&Mark(7)));
            assert_eq!(request.headers()["x-key"], "1");
            let token = bearer(&request).unwrap_or_default().to_owned();
            let mut body = request.into_body();
            let hint = body.size_hint();
            let (mut chunks, mut trailers) = (Vec::new(), HeaderMap::new());
            while !body.is_end_stream() {
                let Some(frame) = body.frame().await else {
                    break;
                };
                match frame.map_err(Into::into)?.into_data() {
                    Ok(chunk) => chunks.push(chunk),
                    Err(frame) => trailers.extend(frame.into_trailers().unwrap()),
                }
            }
            let response = match &*token {
                "token-1" => unauthorized(INVALID_TOKEN),
                token => echo(Some(token)),
            };
            log.lock().unwrap().push(Received {
                token,
                length: (hint.lower(), hint.upper()),
                chunks,
                trailers,
            });
            Ok(response)
        }
    });
    (received, service)
}

fn received(
    token: &str,
    length: (u64, Option<u64>),
    chunks: &[&'static str],
    trailers: HeaderMap,
) -> Received {
    Received {
        token: token.to_owned(),
        length,
        chunks: chunks.iter().copied().map(Bytes::from).collect(),
        trailers,
    }
}

/// Law 8.
#[tokio::test(start_paused = true)]
async fn a_body_within_the_limit_is_sent_again_with_its_trailers() {
    for (chunks, trailers, length) in [
        (&["one", "", "two"][..], HeaderMap::new(), (6, Some(6))),
        // An exact length would make HTTP/1 drop the trailers.
        (&["onetwo"], checksum(), (6, None)),
    ] {
        let (log, api) = api();
        let server = AuthServer::new();
        let client = ServiceBuilder::new()
            .layer(CollectBodyLayer::new(6))
            .layer(BearerAuthLayer::new(server.clone()).replay(CloneBody))
            .service(api);
        let upload = Upload::with_trailers(chunks, trailers.clone());
        let response = client.oneshot(put(upload)).await.unwrap();
        assert_eq!(response.body(), "token-2");
        let of = |token| received(token, length, &["onetwo"], trailers.clone());
        assert_eq!(*log.lock().unwrap(), [of("token-1"), of("token-2")]);
        assert_eq!(server.requests(), 2);
    }
}

/// Law 8: it is sent whole, and its token is replaced all the same.
#[tokio::test(start_paused = true)]
async fn a_longer_body_is_sent_once_as_it_comes() {
    let (log, api) = api();
    let server = AuthServer::new();
    let client = ServiceBuilder::new()
        .layer(CollectBodyLayer::new(5))
        .layer(BearerAuthLayer::new(server.clone()).replay(CloneBody))
        .service(api);
    let upload = || Upload::with_trailers(&["one", "two", "three", "four"], checksum());
    let response = client.clone().oneshot(put(upload())).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    let chunks = &["onetwo", "three", "four"];
    let of = |token| received(token, (6, None), chunks, checksum());
    assert_eq!(*log.lock().unwrap(), [of("token-1")]);

    let response = client.oneshot(put(upload())).await.unwrap();
    assert_eq!(response.body(), "token-2");
    assert_eq!(*log.lock().unwrap(), [of("token-1"), of("token-2")]);
}

/// This bounds the memory: the rest is read when the client asks for it.
#[tokio::test(start_paused = true)]
async fn reading_stops_at_the_frame_that_exceeds_the_limit() {
    let (sender, mut bodies) = mpsc::unbounded_channel();
    let client = CollectBodyLayer::new(5).layer(service_fn(move |request: Request<_>| {
        sender.send(request.into_body()).unwrap();
        async { Ok::<_, Infallible>(()) }
    }));
    let (frames, mut upload) = Upload::new();
    for chunk in ["one", "two", "three"] {
        frames.send(data(chunk)).unwrap();
    }
    upload.length.0 = 3;
    client.clone().oneshot(put(upload)).await.unwrap();
    let mut body: CollectedBody<Upload> = bodies.recv().await.unwrap();
    let mut next = async || {
        let frame = body.frame().await.unwrap().unwrap();
        frame.into_data().unwrap()
    };
    assert_eq!(next().await, "onetwo");
    assert_eq!(next().await, "three");
    let mut more = Box::pin(next());
    assert!(poll_once(more.as_mut()).is_pending());
    frames.send(data("four")).unwrap();
    assert_eq!(more.await, "four");

    // A body known to be too long is not read at all, and its length is passed on.
    let (frames, mut upload) = Upload::new();
    upload.length = (6, Some(6));
    assert!(now(client.oneshot(put(upload))).is_ok());
    let mut body = bodies.recv().await.unwrap();
    assert_eq!(body.size_hint().exact(), Some(6));
    assert!(body.try_clone().is_none());
    frames.send(data("onetwo")).unwrap();
    drop(frames);
    assert_eq!(
        body.frame().await.unwrap().unwrap().into_data().unwrap(),
        "onetwo"
    );
    assert!(body.frame().await.is_none());
}

/// In a gateway the size hint comes from a peer, which must not exhaust the memory.
#[test]
fn a_huge_size_hint_allocates_nothing() {
    let client = CollectBodyLayer::new(usize::MAX).layer(service_fn(|request: Request<_>| async {
        let body: CollectedBody<Upload> = request.into_body();
        body.collect().await.map(|body| body.to_bytes())
    }));
    for least in [u64::MAX, u64::MAX / 2, 1 << 60] {
        let mut upload = Upload::of(&["short"]);
        upload.length.0 = least;
        assert_eq!(now(client.clone().oneshot(put(upload))).unwrap(), "short");
    }
}

/// They must not panic either.
#[test]
fn lengths_that_overflow_are_left_out() {
    let client = CollectBodyLayer::new(2).layer(service_fn(|request: Request<_>| async {
        let body: CollectedBody<Upload> = request.into_body();
        Ok::<_, Infallible>((body.size_hint().lower(), body.size_hint().upper()))
    }));
    for (said, passed_on) in [
        ((0, Some(u64::MAX)), (5, None)),
        ((0, Some(9)), (5, Some(14))),
    ] {
        let mut upload = Upload::of(&["short"]);
        upload.length = said;
        assert_eq!(now(client.clone().oneshot(put(upload))).unwrap(), passed_on);
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_body_is_the_error_of_the_request() {
    let (log, api) = api();
    let server = AuthServer::new();
    let client = ServiceBuilder::new()
        .layer(CollectBodyLayer::new(5))
        .layer(BearerAuthLayer::new(server.clone()))
        .service(api);
    for (first, sent) in [("one", 0), ("one-two", 1)] {
        let (frames, upload) = Upload::new();
        frames.send(data(first)).unwrap();
        frames.send(Err("the user went away".into())).unwrap();
        let error = client.clone().oneshot(put(upload)).await.unwrap_err();
        assert_eq!(error.to_string(), "the user went away");
        // The second error comes once the client has the request.
        assert_eq!(server.requests(), sent);
    }
    assert!(log.lock().unwrap().is_empty());
}

/// Law 10.
#[tokio::test(start_paused = true)]
async fn waiting_for_a_body_holds_no_permit() {
    let (log, api) = api();
    let mut client = ServiceBuilder::new()
        .layer(CollectBodyLayer::new(100))
        .concurrency_limit(1)
        .layer(BearerAuthLayer::new(TokenCache::new(AuthServer::new())).replay(CloneBody))
        .service(api);
    let (frames, upload) = Upload::new();
    frames.send(data("slow")).unwrap();
    let slow = client.ready().await.unwrap().call(put(upload));
    let mut slow = Box::pin(slow);
    assert!(poll_once(slow.as_mut()).is_pending());

    let upload = Upload::of(&["fast"]);
    let fast = async { client.ready().await?.call(put(upload)).await };
    let response = time::timeout(secs(1), fast).await.unwrap().unwrap();
    assert_eq!(response.body(), "token-2");
    drop(frames);
    assert_eq!(slow.await.unwrap().body(), "token-2");
    let received = |at: usize| log.lock().unwrap()[at].chunks.concat();
    assert_eq!(
        (received(1), received(2)),
        (b"fast".to_vec(), b"slow".to_vec())
    );
}

/// A service whose clones must each be made ready, and which answers whether it is a clone.
struct Original {
    is_clone: bool,
    is_ready: bool,
}

impl Clone for Original {
    fn clone(&self) -> Self {
        Self {
            is_clone: true,
            is_ready: false,
        }
    }
}

impl Service<Request<CollectedBody<Upload>>> for Original {
    type Response = bool;
    type Error = BoxError;
    type Future = Ready<Result<bool, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        if std::mem::replace(&mut self.is_ready, true) {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    }

    fn call(&mut self, _: Request<CollectedBody<Upload>>) -> Self::Future {
        assert!(self.is_ready, "called without being ready");
        ready(Ok(self.is_clone))
    }
}

/// Law 10.
#[test]
fn an_unread_body_goes_to_the_service_that_was_ready() {
    let (_sender, mut long) = Upload::new();
    long.length = (101, Some(101));
    let short = Upload::of(&["short"]);
    for (upload, is_read) in [(long, false), (Upload::default(), false), (short, true)] {
        let mut client = CollectBodyLayer::new(100).layer(Original {
            is_clone: false,
            is_ready: false,
        });
        let mut polled = Box::pin(client.ready());
        assert!(poll_once(polled.as_mut()).is_pending());
        let mut response = Box::pin(now(polled).unwrap().call(put(upload)));
        if is_read {
            assert!(poll_once(response.as_mut()).is_pending());
        }
        assert_eq!(now(response).unwrap(), is_read);
    }
}

#[test]
fn debug_shows_no_body() {
    let (frames, upload) = Upload::new();
    frames.send(data("secret")).unwrap();
    let shown = Arc::new(Mutex::new(String::new()));
    let log = shown.clone();
    let client = CollectBodyLayer::new(100).layer(service_fn(move |request: Request<_>| {
        let body: CollectedBody<Upload> = request.into_body();
        *log.lock().unwrap() += &format!("{body:?}");
        async { Ok::<_, Infallible>(()) }
    }));
    let mut future = Box::pin(client.clone().call(put(upload)));
    assert!(poll_once(future.as_mut()).is_pending());
    *shown.lock().unwrap() += &format!("{future:?}");
    drop(frames);
    assert!(poll_once(future.as_mut()).is_ready());
    let shown = shown.lock().unwrap();
    assert!(shown.contains("Collecting") && shown.contains("CollectedBody"));
    assert!(!shown.contains("secret"), "{shown}");
}

/// The request is not sent, and nothing leaks.
#[test]
fn an_empty_body_that_panics_on_drop_fails_only_its_request() {
    struct Empty;

    impl Body for Empty {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(None)
        }

        fn is_end_stream(&self) -> bool {
            true
        }
    }

    impl Drop for Empty {
        fn drop(&mut self) {
            panic!("the body panics");
        }
    }

    let place = Arc::new(());
    let taken = place.clone();
    let api = service_fn(move |_: Request<CollectedBody<Empty>>| {
        let taken = taken.clone();
        async move {
            let _taken = taken;
            Ok::<_, Infallible>(())
        }
    });
    let mut client = CollectBodyLayer::new(5).layer(api);
    let call = AssertUnwindSafe(|| drop(client.call(put(Empty))));
    assert!(catch_unwind(call).is_err());
    drop(client);
    assert_eq!(Arc::strong_count(&place), 1);
}
