//! A request that finds a token allocates nothing but what `http` needs to insert a header.
//!
//! The first requests are left out: with them a service copies each new token, once for its clones and, if it is called
//! often, once for itself.
//!
//! A binary with one test, because the allocator counts for the whole process.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    hint::black_box,
    mem,
    sync::LazyLock,
    time::Duration,
};

use http::{Request, Response};
use tower::{Layer, Service, service_fn, util::ServiceFn};
use tower_bearer::{
    BearerAuthLayer, TokenCache, TokenEvent, TokenRequest, TokenResponse, source_fn,
};
use tower_http::auth::AddAuthorizationLayer;

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

type Answer = Ready<Result<Response<()>, Infallible>>;

fn answer(request: Request<()>) -> Answer {
    black_box(request);
    ready(Ok(Response::new(())))
}

/// What a thousand requests allocate.
#[derive(Debug, PartialEq, Eq)]
struct Blocks {
    kept: u64,
    cloned: u64,
    /// By clones that are each called a few times.
    few: u64,
    keyed: u64,
}

async fn blocks<S>(service: S) -> Blocks
where
    S: Service<Request<()>, Response = Response<()>> + Clone,
    S::Error: std::fmt::Debug,
{
    let plain = || Request::new(());
    let keyed = || {
        let mut request = plain();
        request.extensions_mut().insert(KEY.clone());
        request
    };
    Blocks {
        kept: by_clones(&service, plain, usize::MAX).await,
        cloned: by_clones(&service, plain, 1).await,
        few: by_clones(&service, plain, 5).await,
        keyed: by_clones(&service, keyed, usize::MAX).await,
    }
}

/// What a thousand requests allocate after some others; the least of three times, since the harness has a thread that
/// allocates too.
async fn least(mut request: impl AsyncFnMut(usize)) -> u64 {
    let mut least = u64::MAX;
    for _ in 0..3 {
        let mut before = 0;
        for number in 0..WARM_UP + 1_000 {
            if number == WARM_UP {
                before = dhat::HeapStats::get().total_blocks;
            }
            request(number).await;
        }
        least = least.min(dhat::HeapStats::get().total_blocks - before);
    }
    least
}

/// By clones of the service, the next one after so many calls.
async fn by_clones<S>(service: &S, request: impl Fn() -> Request<()>, calls: usize) -> u64
where
    S: Service<Request<()>, Response = Response<()>> + Clone,
    S::Error: std::fmt::Debug,
{
    let mut kept = service.clone();
    least(async |number| {
        if number % calls == 0 {
            kept = service.clone();
        }
        once(&mut kept, request()).await;
    })
    .await
}

/// By a service that leaves a clone in its place each time, like a middleware that calls the service that was ready.
async fn gives_way<S>(service: &mut S) -> u64
where
    S: Service<Request<()>, Response = Response<()>> + Clone,
    S::Error: std::fmt::Debug,
{
    least(async |_| {
        let clone = service.clone();
        once(&mut mem::replace(service, clone), Request::new(())).await;
    })
    .await
}

/// By a service that is made for each request.
async fn layered<L, S>(layer: &L) -> u64
where
    L: Layer<ServiceFn<fn(Request<()>) -> Answer>, Service = S>,
    S: Service<Request<()>, Response = Response<()>>,
    S::Error: std::fmt::Debug,
{
    least(async |_| {
        let client = service_fn(answer as fn(_) -> _);
        once(&mut layer.layer(client), Request::new(())).await;
    })
    .await
}

async fn once<S>(service: &mut S, request: Request<()>)
where
    S: Service<Request<()>, Response = Response<()>>,
    S::Error: std::fmt::Debug,
{
    std::future::poll_fn(|cx| service.poll_ready(cx))
        .await
        .expect("the service is ready");
    let response = service.call(request).await;
    response.expect("the service answers");
}

const WARM_UP: usize = 20;

static KEY: LazyLock<TokenRequest> = LazyLock::new(|| TokenRequest::new().scope("sims:read"));

#[tokio::test]
async fn a_request_that_finds_a_token_allocates_no_more_than_a_static_header() {
    let _profiler = dhat::Profiler::builder().testing().build();
    let source = source_fn(|_| async {
        Ok(TokenResponse::new("token")?.expires_in(Duration::from_secs(300)))
    });
    let cache = TokenCache::new(source);
    cache.get().await.unwrap();
    cache.get_for(&KEY).await.unwrap();
    // The origin of a relative URI is the service's own.
    let layers = (
        BearerAuthLayer::new(cache.clone()),
        AddAuthorizationLayer::bearer("token"),
    );
    let ours = layers.0.layer(service_fn(answer));
    let fixed = layers.1.layer(service_fn(answer));
    let mut giving_way = (ours.clone(), fixed.clone());
    let (ours, fixed) = (blocks(ours).await, blocks(fixed).await);
    assert!(fixed.kept > 0, "the allocator does not count");
    assert_eq!(ours, fixed);
    assert_eq!(layered(&layers.0).await, layered(&layers.1).await);

    assert_eq!(gives_way(&mut giving_way.0).await, fixed.kept);
    assert_eq!(gives_way(&mut giving_way.1).await, fixed.kept);
    // The same with the next token.
    let (first, mut events) = (cache.peek().unwrap(), cache.events());
    cache.invalidate(&first);
    while !matches!(events.next().await, Some(TokenEvent::TokenReceived { .. })) {}
    assert_eq!(gives_way(&mut giving_way.0).await, fixed.kept);
}
