//! A request that finds a token allocates nothing but what `http` needs to insert a header.
//!
//! The first two requests of a service are left out: with them it makes itself a copy of each new token.
//!
//! A binary of its own, with one test, because the allocator counts for the whole process.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    hint::black_box,
    time::Duration,
};

use http::{Request, Response};
use tower::{Layer, Service, service_fn};
use tower_bearer::{BearerAuthLayer, TokenCache, TokenResponse, source_fn};
use tower_http::auth::AddAuthorizationLayer;

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

fn answer(request: Request<()>) -> Ready<Result<Response<()>, Infallible>> {
    black_box(request);
    ready(Ok(Response::new(())))
}

/// How many blocks a thousand requests allocate, after two: the least of three times, since the harness has a thread
/// of its own that allocates too.
async fn blocks<S>(service: S) -> u64
where
    S: Service<Request<()>, Response = Response<()>> + Clone,
    S::Error: std::fmt::Debug,
{
    let mut least = u64::MAX;
    for _ in 0..3 {
        least = least.min(blocks_once(service.clone()).await);
    }
    least
}

async fn blocks_once<S>(mut service: S) -> u64
where
    S: Service<Request<()>, Response = Response<()>>,
    S::Error: std::fmt::Debug,
{
    let mut before = 0;
    for number in 0..1_002 {
        if number == 2 {
            before = dhat::HeapStats::get().total_blocks;
        }
        std::future::poll_fn(|cx| service.poll_ready(cx))
            .await
            .expect("the service is ready");
        let response = service.call(Request::new(())).await;
        response.expect("the service answers");
    }
    dhat::HeapStats::get().total_blocks - before
}

#[tokio::test]
async fn a_request_that_finds_a_token_allocates_no_more_than_a_static_header() {
    let _profiler = dhat::Profiler::builder().testing().build();
    let source = source_fn(|_| async {
        Ok(TokenResponse::new("token")?.expires_in(Duration::from_secs(300)))
    });
    let cache = TokenCache::new(source);
    cache.get().await.unwrap();
    // The origin of a relative URI is the service's own.
    let ours = BearerAuthLayer::new(cache).layer(service_fn(answer));
    let fixed = AddAuthorizationLayer::bearer("token").layer(service_fn(answer));
    let (ours, fixed) = (blocks(ours).await, blocks(fixed).await);
    assert!(fixed > 0, "the allocator does not count");
    assert_eq!(ours, fixed);
}
