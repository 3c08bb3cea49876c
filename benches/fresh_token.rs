//! What it costs a request to find a valid token, beside the same request without one and with a static header.
//!
//! The inner service takes the request and is done, so that what is measured is the middleware. `kept` calls
//! one service again and again, `cloned` clones it for each request, as an HTTP client that hands out clones
//! does.
#![expect(
    missing_docs,
    reason = "the function is made by a macro of criterion's"
)]

mod support;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use http::Request;
use support::{Body, cached, call, inner, request};
use tower::{Layer, Service, service_fn};
use tower_bearer::{BearerAuthLayer, CloneBody};
use tower_http::auth::AddAuthorizationLayer;

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
    let (cache, token, _runtime) = cached();

    measure(c, "bare", service_fn(inner));
    let fixed = AddAuthorizationLayer::bearer(&token);
    measure(c, "static header", fixed.layer(service_fn(inner)));
    let bearer = BearerAuthLayer::new(cache);
    measure(c, "bearer", bearer.layer(service_fn(inner)));
    let replayed = bearer.replay(CloneBody);
    measure(c, "bearer with replay", replayed.layer(service_fn(inner)));
}

criterion_group!(benches, fresh_token);
criterion_main!(benches);
