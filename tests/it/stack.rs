//! Which layers and clones share a cache, and how errors pass through a stack.
//!
//! `tests/composition` combines the layer with each other one.

use std::{error::Error, fmt, time::Duration};

use http::{Request, Response};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_bearer::{BearerAuthLayer, BoxError, CloneBody, TokenCache, TokenError};

use crate::support::{Answer, Api, AuthServer, get};

/// Law 1: clones share one cache.
#[tokio::test(start_paused = true)]
async fn all_services_of_a_layer_and_their_clones_share_one_token_request() {
    let server = AuthServer::new();
    server.set_latency(Duration::from_millis(50));
    let layer = BearerAuthLayer::new(server.clone());
    let one = layer.layer(Api::echoing());
    let other = layer.layer(Api::echoing());
    let of_a_clone = layer.clone().replay(CloneBody).layer(Api::echoing());
    let (a, b, c, d) = tokio::join!(
        one.clone().oneshot(get()),
        one.oneshot(get()),
        other.oneshot(get()),
        of_a_clone.oneshot(get()),
    );
    for response in [a, b, c, d] {
        assert_eq!(response.unwrap().body(), "token-1");
    }
    assert_eq!(server.requests(), 1);
    assert!(layer.cache().peek().is_some());
}

/// Law 1.
#[tokio::test(start_paused = true)]
async fn layers_with_separate_caches_share_nothing() {
    let server = AuthServer::new();
    let one = BearerAuthLayer::new(TokenCache::new(server.clone())).layer(Api::echoing());
    let other = BearerAuthLayer::new(TokenCache::new(server.clone())).layer(Api::echoing());
    assert_eq!(one.oneshot(get()).await.unwrap().body(), "token-1");
    assert_eq!(other.oneshot(get()).await.unwrap().body(), "token-2");
}

/// Law 9: it can be told from the inner service's errors, through any layers above.
#[tokio::test(start_paused = true)]
async fn a_token_failure_is_found_by_a_downcast() {
    let server = AuthServer::new();
    server.set(Answer::Fail(TokenError::terminal("the client is unknown")));
    let client = ServiceBuilder::new()
        .load_shed()
        .timeout(Duration::from_secs(60))
        .layer(BearerAuthLayer::new(server))
        .service(Api::echoing());
    let error = client.oneshot(get()).await.unwrap_err();
    let error = error.downcast::<TokenError>().unwrap();
    assert!(!error.is_transient());
    assert_eq!(error.source().unwrap().to_string(), "the client is unknown");
}

#[derive(Debug)]
struct Broken(u32);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broken at {}", self.0)
    }
}

impl Error for Broken {}

/// Law 10: whether the service boxes it or not.
#[tokio::test(start_paused = true)]
async fn an_error_of_the_inner_service_passes_through_with_its_type() {
    let typed = service_fn(|_: Request<String>| async { Err::<Response<String>, _>(Broken(7)) });
    let boxed = service_fn(|_: Request<String>| async {
        Err::<Response<String>, BoxError>(Broken(7).into())
    });

    async fn error_of<S>(inner: S, warm: bool) -> BoxError
    where
        S: Service<Request<String>, Response = Response<String>> + Clone,
        S::Error: Into<BoxError>,
    {
        let client = BearerAuthLayer::new(AuthServer::new())
            .replay(CloneBody)
            .layer(inner);
        if warm {
            client.cache().get().await.unwrap();
        }
        client.oneshot(get()).await.unwrap_err()
    }

    for warm in [true, false] {
        let errors = [error_of(typed, warm).await, error_of(boxed, warm).await];
        for error in errors {
            assert!(!error.is::<TokenError>());
            assert_eq!(error.downcast::<Broken>().unwrap().0, 7);
        }
    }
}

/// In a spawned `async` block the compiler cannot tell that the `BoxError` of a service's type converts into a
/// `BoxError`, neither with tower's layers nor with this one: a box around the whole hides that.
#[tokio::test(start_paused = true)]
async fn a_stack_over_a_boxed_client_works_in_spawned_tasks() {
    type Client = BoxCloneSyncService<Request<String>, Response<String>, BoxError>;
    let client = ServiceBuilder::new()
        .map_err(BoxError::from)
        .service(Api::echoing());
    let client = Client::new(client);
    let api = BearerAuthLayer::new(AuthServer::new()).layer(client);
    let response = tokio::spawn(api.clone().oneshot(get())).await.unwrap();
    assert_eq!(response.unwrap().body(), "token-1");

    let api = Client::new(api);
    let response = tokio::spawn(async move { api.oneshot(get()).await });
    assert_eq!(response.await.unwrap().unwrap().body(), "token-1");
}
