//! What the benchmarks share: the work that they measure, its baselines, and the reports.
#![expect(
    unreachable_pub,
    reason = "a benchmark exports nothing; `pub` marks what they share"
)]
#![allow(dead_code, reason = "each benchmark uses a part of it")]

pub mod baselines;
pub mod endpoint;
pub mod plot;
pub mod report;
pub mod subjects;

use std::{
    convert::Infallible,
    env,
    future::{Future, Ready, ready},
    hint::black_box,
    pin::pin,
    sync::LazyLock,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::Full;
use tokio::runtime::{Builder, Runtime};
use tower::Service;
use tower_bearer::{TokenCache, TokenResponse, source_fn};

pub type Body = Full<Bytes>;

/// Whether each benchmark is to run once, briefly, for its assertions and not for its figures.
///
/// Cargo passes `--bench` to a benchmark that is to measure.
pub fn short() -> bool {
    let has = |flag: &str| env::args().any(|argument| argument == flag);
    env::var_os("TOWER_BEARER_BENCH_SHORT").is_some() || has("--test") || !has("--bench")
}

/// The inner service. It only takes the request, so that the middleware is measured.
pub fn inner(request: Request<Body>) -> Ready<Result<Response<()>, Infallible>> {
    black_box(request);
    ready(Ok(Response::new(())))
}

/// A request whose URI was parsed before, so that the middleware is measured and not the parser.
pub fn request() -> Request<Body> {
    static URI: LazyLock<Uri> = LazyLock::new(|| Uri::from_static("https://api.example.com/sims"));
    request_to(&URI)
}

/// The same to this machine, over plain http.
pub fn loopback_request() -> Request<Body> {
    static URI: LazyLock<Uri> = LazyLock::new(|| Uri::from_static("http://127.0.0.1:8080/sims"));
    request_to(&URI)
}

fn request_to(uri: &Uri) -> Request<Body> {
    let mut request = Request::new(Body::default());
    *request.uri_mut() = uri.clone();
    request
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

/// A cache that holds a token as long as Keycloak's, the token's text, and the runtime that watches its expiry.
pub fn cached() -> (TokenCache, String, Runtime) {
    let cache = TokenCache::new(source_fn(|_| async {
        Ok(TokenResponse::new(token_text())?.expires_in(DAY))
    }));
    let runtime = runtime(1);
    let token = runtime
        .block_on(cache.get())
        .expect("the source gives a token");
    // The flight's task wakes its waiters first, and then watches the token.
    std::thread::sleep(Duration::from_millis(50));
    (cache, token.expose_secret().to_owned(), runtime)
}

/// The lifetime of a token that is to outlive the benchmark.
pub const DAY: Duration = Duration::from_secs(24 * 3_600);

/// A token as long as Keycloak's.
pub fn token_text() -> String {
    "t".repeat(1_200)
}

pub fn runtime(workers: usize) -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_time()
        .build()
        .expect("a runtime can be built")
}
