//! The services that are measured side by side with a token at hand.

use std::sync::{
    LazyLock,
    atomic::{AtomicUsize, Ordering},
};

use http::Request;
use tokio::runtime::Runtime;
use tower::{Layer, Service, service_fn};
use tower_bearer::{BearerAuthLayer, CloneBody, TokenRequest};
use tower_http::auth::AddAuthorizationLayer;

use super::{
    Body,
    baselines::{ArcSwapCache, ByHand, Copied, Least, MutexCache, Nothing, RwLockCache},
    cached, inner, loopback_request, request,
};

/// A measurement to make of each service.
pub trait Measure {
    fn measure<S>(&mut self, name: &'static str, service: S, request: fn() -> Request<Body>)
    where
        S: Service<Request<Body>> + Clone + Send + Sync + 'static;
}

/// Measures every service, and returns the runtime that watches their token's expiry: once it is gone, requests read
/// the clocks themselves.
#[must_use = "the watch ends with the runtime"]
pub fn subjects(measure: &mut impl Measure) -> Runtime {
    let (cache, token, runtime) = cached();
    for key in &*KEYS {
        let token = runtime.block_on(cache.get_for(key));
        token.expect("the source gives a token");
    }
    let bare = service_fn(inner);
    let fixed = AddAuthorizationLayer::bearer(&token).layer(bare);
    let bearer = BearerAuthLayer::new(cache);
    let pinned = bearer.clone().origins(["https://api.example.com"]);
    let replayed = bearer.clone().replay(CloneBody).layer(bare);

    measure.measure("bare", bare, request);
    measure.measure(FLOOR, fixed.clone(), request);
    measure.measure(
        "least layer",
        Least::<_, Nothing>::new(bare, &token),
        request,
    );
    let copying = Least::<_, Copied>::new(bare, &token);
    measure.measure("least layer, copying", copying, request);
    let by_hand = runtime.block_on(ByHand::<_, MutexCache>::with_token(bare));
    measure.measure("mutex by hand", by_hand, request);
    let by_hand = runtime.block_on(ByHand::<_, RwLockCache>::with_token(bare));
    measure.measure("RwLock by hand", by_hand, request);
    let by_hand = runtime.block_on(ByHand::<_, ArcSwapCache>::with_token(bare));
    measure.measure("ArcSwap by hand", by_hand, request);
    measure.measure("bearer", bearer.layer(bare), request);
    let pinned = pinned.expect("it is an origin");
    measure.measure("bearer with origins", pinned.layer(bare), request);
    measure.measure("bearer to loopback", bearer.layer(bare), loopback_request);
    measure.measure("bearer with replay", replayed, request);
    measure.measure(KEYED_FLOOR, fixed, keyed_request);
    measure.measure("keyed bearer", bearer.layer(bare), keyed_request);
    measure.measure(
        "keyed bearer, a key per thread",
        bearer.layer(bare),
        own_keyed_request,
    );
    runtime
}

/// A request with a [`TokenRequest`] that was made once.
pub fn keyed_request() -> Request<Body> {
    request_for(&KEYS[0])
}

/// A request with another key than that of the thread that was started before this one.
fn own_keyed_request() -> Request<Body> {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static THREAD: usize = THREADS.fetch_add(1, Ordering::Relaxed);
    }
    request_for(&KEYS[THREAD.with(|thread| thread % KEYS.len())])
}

fn request_for(key: &TokenRequest) -> Request<Body> {
    let mut request = request();
    request.extensions_mut().insert(key.clone());
    request
}

pub static KEYS: LazyLock<[TokenRequest; 2]> =
    LazyLock::new(|| ["sims:read", "sims:write"].map(|scope| TokenRequest::new().scope(scope)));

/// The least that a layer must do to send a token.
pub const FLOOR: &str = "static header";
pub const KEYED_FLOOR: &str = "keyed, static header";
