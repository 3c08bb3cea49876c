//! What it costs a request to find a valid token, beside the same request without one and with a static header.
//!
//! The inner service takes the request and is done, so that what is measured is the middleware. `kept` calls
//! one service again and again, `cloned` clones it for each request, as an HTTP client that hands out clones
//! does.
#![expect(
    missing_docs,
    reason = "the function is made by a macro of criterion's"
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
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use http::{Request, Response};
use http_body_util::Full;
use tower::{Layer, Service, service_fn};
use tower_bearer::{BearerAuthLayer, CloneBody, TokenCache, TokenResponse, source_fn};
use tower_http::auth::AddAuthorizationLayer;

type Body = Full<Bytes>;

fn inner(request: Request<Body>) -> Ready<Result<Response<()>, Infallible>> {
    black_box(request);
    ready(Ok(Response::new(())))
}

fn request() -> Request<Body> {
    Request::get("https://api.example.com/sims")
        .body(Body::default())
        .expect("the request is well-formed")
}

/// Calls a service whose future is ready at once.
fn call<S>(service: &mut S, request: Request<Body>)
where
    S: Service<Request<Body>>,
{
    let mut cx = Context::from_waker(Waker::noop());
    let ready = service.poll_ready(&mut cx);
    assert!(matches!(ready, Poll::Ready(Ok(()))));
    let response = pin!(service.call(request)).poll(&mut cx);
    assert!(matches!(black_box(response), Poll::Ready(Ok(_))));
}

fn measure<S>(c: &mut Criterion, name: &str, service: S)
where
    S: Service<Request<Body>> + Clone,
{
    let mut kept = service.clone();
    c.bench_function(&format!("kept/{name}"), |b| {
        b.iter_batched(
            request,
            |request| call(&mut kept, request),
            BatchSize::SmallInput,
        );
    });
    c.bench_function(&format!("cloned/{name}"), |b| {
        b.iter_batched(
            request,
            |request| call(&mut service.clone(), request),
            BatchSize::SmallInput,
        );
    });
}

fn fresh_token(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime can be built");
    let cache = TokenCache::new(source_fn(|_| async {
        // As long as the access tokens of Keycloak.
        Ok(TokenResponse::new("t".repeat(1_200))?.expires_in(Duration::from_secs(24 * 3_600)))
    }));
    let token = runtime
        .block_on(cache.get())
        .expect("the source gives a token");

    measure(c, "bare", service_fn(inner));
    let fixed = AddAuthorizationLayer::bearer(token.expose_secret());
    measure(c, "static header", fixed.layer(service_fn(inner)));
    let bearer = BearerAuthLayer::new(cache);
    measure(c, "bearer", bearer.layer(service_fn(inner)));
    let replayed = bearer.replay(CloneBody);
    measure(c, "bearer with replay", replayed.layer(service_fn(inner)));
}

criterion_group!(benches, fresh_token);
criterion_main!(benches);
