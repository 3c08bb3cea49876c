//! What the benchmarks of the hot path measure: one request, in a service that is done with it at once.
#![expect(
    unreachable_pub,
    reason = "a benchmark exports nothing; `pub` marks what they share"
)]

use std::{
    convert::Infallible,
    future::{Future, Ready, ready},
    hint::black_box,
    pin::pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tokio::runtime::{Builder, Runtime};
use tower::Service;
use tower_bearer::{TokenCache, TokenResponse, source_fn};

pub type Body = Full<Bytes>;

/// The inner service: it takes the request and is done, so that what is measured is the middleware.
pub fn inner(request: Request<Body>) -> Ready<Result<Response<()>, Infallible>> {
    black_box(request);
    ready(Ok(Response::new(())))
}

pub fn request() -> Request<Body> {
    Request::get("https://api.example.com/sims")
        .body(Body::default())
        .expect("the request is well-formed")
}

/// Calls a service whose future is ready at once.
pub fn call<S>(service: &mut S, request: Request<Body>)
where
    S: Service<Request<Body>>,
{
    let mut cx = Context::from_waker(Waker::noop());
    let ready = service.poll_ready(&mut cx);
    assert!(matches!(ready, Poll::Ready(Ok(()))));
    let response = pin!(service.call(request)).poll(&mut cx);
    assert!(matches!(black_box(response), Poll::Ready(Ok(_))));
}

/// A cache that holds a token as long as Keycloak's, that text, and the runtime that watches over it.
pub fn cached() -> (TokenCache, String, Runtime) {
    let cache = TokenCache::new(source_fn(|_| async {
        Ok(TokenResponse::new("t".repeat(1_200))?.expires_in(Duration::from_secs(24 * 3_600)))
    }));
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_time()
        .build()
        .expect("a runtime can be built");
    let token = runtime
        .block_on(cache.get())
        .expect("the source gives a token");
    // The flight's task goes on to watch the token once it has told its waiters.
    std::thread::sleep(Duration::from_millis(50));
    (cache, token.expose_secret().to_owned(), runtime)
}
