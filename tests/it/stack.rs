//! The layer among others, above it and below.

use std::{convert::Infallible, error::Error, fmt, pin::Pin, sync::Arc, time::Duration};

use http::{Request, Response, StatusCode, header::LOCATION};
use tokio::{
    sync::Semaphore,
    time::{self, Sleep},
};
use tower::{
    Layer, Service, ServiceBuilder, ServiceExt,
    limit::GlobalConcurrencyLimitLayer,
    load_shed::error::Overloaded,
    retry::{Policy, RetryLayer},
    service_fn,
    timeout::error::Elapsed,
    util::BoxCloneSyncService,
};
use tower_bearer::{BearerAuthLayer, BoxError, CloneBody, TokenCache, TokenError};
use tower_http::follow_redirect::{
    FollowRedirectLayer,
    policy::{Action, redirect_fn},
};

use crate::support::{
    Answer, Api, AuthServer, INVALID_TOKEN, all, get, get_path, settle, timed, token_error,
    unauthorized,
};

const LIFETIME: Duration = Duration::from_secs(300);

/// Tries once more after a token failure that may heal and after a 401.
#[derive(Clone)]
struct OnceMore {
    tried: bool,
}

impl<B: Clone> Policy<Request<B>, Response<String>, BoxError> for OnceMore {
    type Future = Pin<Box<Sleep>>;

    fn retry(
        &mut self,
        _: &mut Request<B>,
        result: &mut Result<Response<String>, BoxError>,
    ) -> Option<Self::Future> {
        if std::mem::replace(&mut self.tried, true) {
            return None;
        }
        let pause = match result {
            Ok(response) if response.status() == StatusCode::UNAUTHORIZED => Duration::ZERO,
            Ok(_) => return None,
            Err(error) => {
                let error = error.downcast_ref::<TokenError>()?;
                if !error.is_transient() {
                    return None;
                }
                // The cache itself waits for up to a tenth longer, so that clients do not come all at once.
                let pause = error.retry_after().unwrap_or(Duration::from_secs(1));
                pause.mul_f64(1.1)
            }
        };
        Some(Box::pin(time::sleep(pause)))
    }

    fn clone_request(&mut self, request: &Request<B>) -> Option<Request<B>> {
        Some(request.clone())
    }
}

fn once_more() -> RetryLayer<OnceMore> {
    RetryLayer::new(OnceMore { tried: false })
}

/// Law 7: a retry above finds a token once the server is back, when the server has asked it to come back.
#[tokio::test(start_paused = true)]
async fn a_retry_above_gets_a_token_after_the_time_that_the_error_names() {
    let server = AuthServer::new();
    let busy = TokenError::transient("busy").with_retry_after(Duration::from_secs(7));
    server.set(Answer::Fail(busy));
    let api = Api::echoing();
    let client = ServiceBuilder::new()
        .layer(once_more())
        .layer(BearerAuthLayer::new(server.clone()))
        .service(api.clone());
    let request = tokio::spawn(timed(client.oneshot(get())));
    time::sleep(Duration::from_secs(1)).await;
    assert_eq!(server.requests(), 1);
    server.set(Answer::Grant(LIFETIME));
    let (response, took) = request.await.unwrap();
    assert_eq!(response.unwrap().body(), "token-2");
    assert!(took >= Duration::from_secs(7), "{took:?}");
    assert_eq!(api.tokens(), ["token-2"]);
    let seen = server.seen();
    assert!(seen[1].at - seen[0].at >= Duration::from_secs(7));
}

/// Law 7: the predicates tell what is not worth another try.
#[tokio::test(start_paused = true)]
async fn a_retry_above_leaves_a_terminal_failure_alone() {
    let server = AuthServer::new();
    server.set(Answer::Fail(TokenError::terminal("the client is unknown")));
    let client = ServiceBuilder::new()
        .layer(once_more())
        .layer(BearerAuthLayer::new(server.clone()))
        .service(Api::echoing());
    let (response, took) = timed(client.oneshot(get())).await;
    assert!(!token_error(&response.unwrap_err()).is_transient());
    assert_eq!(took, Duration::ZERO);
    assert_eq!(server.requests(), 1);
}

/// Law 8: without a replay of its own the layer has the next try use another token.
#[tokio::test(start_paused = true)]
async fn a_retry_above_gets_another_token_after_a_refusal() {
    let server = AuthServer::new();
    server.set_latency(Duration::from_millis(100));
    let api = Api::refusing("token-1", || unauthorized(INVALID_TOKEN));
    let client = ServiceBuilder::new()
        .layer(once_more())
        .layer(BearerAuthLayer::new(server.clone()))
        .service(api.clone());
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-2");
    assert_eq!(api.tokens(), ["token-1", "token-2"]);
    assert_eq!(server.requests(), 2);
}

/// Law 6: whoever bounds the whole puts the timeout above.
#[tokio::test(start_paused = true)]
async fn a_timeout_above_covers_the_wait_for_a_token() {
    let server = AuthServer::new();
    server.set_latency(Duration::from_secs(5));
    let client = ServiceBuilder::new()
        .timeout(Duration::from_secs(2))
        .layer(BearerAuthLayer::new(server.clone()))
        .service(Api::echoing());
    let (response, took) = timed(client.clone().oneshot(get())).await;
    assert!(response.unwrap_err().is::<Elapsed>());
    assert_eq!(took, Duration::from_secs(2));
    // Law 5: the token request has gone on, and the next one gets its token.
    let (response, took) = timed(client.oneshot(get_path("next"))).await;
    assert!(response.unwrap_err().is::<Elapsed>());
    assert_eq!(took, Duration::from_secs(2));
    time::sleep(Duration::from_secs(1)).await;
    assert_eq!(server.requests(), 1);
}

/// Law 10: a timeout below bounds each sending, and the wait for a token is none.
#[tokio::test(start_paused = true)]
async fn a_timeout_below_does_not_cover_the_wait_for_a_token() {
    let server = AuthServer::new();
    server.set_latency(Duration::from_secs(5));
    let slow = service_fn(|request: Request<String>| async move {
        time::sleep(Duration::from_millis(1_500)).await;
        Ok::<_, Infallible>(match crate::support::bearer(&request) {
            Some("token-1") => unauthorized(INVALID_TOKEN),
            token => crate::support::echo(token),
        })
    });
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(server.clone()).replay(CloneBody))
        .timeout(Duration::from_secs(2))
        .service(slow);
    // Two waits and two sendings, each of them shorter than its limit.
    let (response, took) = timed(client.oneshot(get())).await;
    assert_eq!(response.unwrap().body(), "token-2");
    assert_eq!(took, Duration::from_secs(13));
}

/// Law 10: the inner service's load is what is shed, and not the requests that wait for a token.
#[tokio::test(start_paused = true)]
async fn load_is_shed_above_by_the_inner_services_readiness_alone() {
    let server = AuthServer::new();
    server.hold();
    let permits = Arc::new(Semaphore::new(1));
    let api = Api::echoing();
    let client = ServiceBuilder::new()
        .load_shed()
        .layer(BearerAuthLayer::new(server.clone()))
        .layer(GlobalConcurrencyLimitLayer::with_semaphore(permits.clone()))
        .service(api.clone());
    let waiting: Vec<_> = (0..5)
        .map(|n| tokio::spawn(client.clone().oneshot(get_path(n))))
        .collect();
    settle().await;
    server.release();
    for response in all(waiting).await {
        assert_eq!(response.unwrap().body(), "token-1");
    }

    api.hold();
    let sending = tokio::spawn(client.clone().oneshot(get()));
    settle().await;
    let error = client.clone().oneshot(get()).await.unwrap_err();
    assert!(error.is::<Overloaded>(), "{error:?}");
    api.release();
    sending.await.unwrap().unwrap();
}

/// Law 10: an outage of the token endpoint is no load.
#[tokio::test(start_paused = true)]
async fn a_token_failure_is_not_shed_as_load() {
    let server = AuthServer::new();
    server.set(Answer::Fail(TokenError::transient("down")));
    let client = ServiceBuilder::new()
        .load_shed()
        .layer(BearerAuthLayer::new(server.clone()))
        .service(Api::echoing());
    for _ in 0..3 {
        let error = client.clone().oneshot(get()).await.unwrap_err();
        assert!(token_error(&error).is_transient());
    }
}

/// An API of which `/start` redirects to this place, and everything else echoes.
fn redirecting(to: &'static str) -> Api {
    Api::new(move |arrival| match arrival.uri.path() {
        "/start" => Response::builder()
            .status(StatusCode::TEMPORARY_REDIRECT)
            .header(LOCATION, to)
            .body(String::new())
            .unwrap(),
        _ => crate::support::echo(arrival.token()),
    })
}

fn start() -> Request<String> {
    Request::get("https://api.example.com/start")
        .body(String::new())
        .unwrap()
}

const FOREIGN: &str = "https://evil.example/steal";

/// Law 9: with redirects followed above, the layer judges every hop.
#[tokio::test(start_paused = true)]
async fn a_redirect_above_to_an_origin_that_is_not_pinned_carries_no_token() {
    for (place, token) in [
        (FOREIGN, "anonymous"),
        ("https://api.example.com:8443/", "anonymous"),
        ("http://api.example.com/", "anonymous"),
        ("/elsewhere", "token-1"),
        ("https://api.example.com/elsewhere", "token-1"),
    ] {
        let server = AuthServer::new();
        let api = redirecting(place);
        let client = ServiceBuilder::new()
            .layer(FollowRedirectLayer::new())
            .layer(
                BearerAuthLayer::new(server.clone())
                    .replay(CloneBody)
                    .origins(["https://api.example.com"])
                    .unwrap(),
            )
            .service(api.clone());
        let response = client.oneshot(start()).await.unwrap();
        assert_eq!(response.body(), token, "{place}");
        assert_eq!(api.tokens(), ["token-1", token], "{place}");
    }
}

/// Law 9: a redirect to plain http fails with the layer's error and is not sent.
#[tokio::test(start_paused = true)]
async fn a_redirect_above_to_plain_http_is_refused() {
    let api = redirecting("http://api.example.com/elsewhere");
    let client = ServiceBuilder::new()
        .layer(FollowRedirectLayer::new())
        .layer(BearerAuthLayer::new(AuthServer::new()))
        .service(api.clone());
    let error = client.oneshot(start()).await.unwrap_err();
    assert!(token_error(&error).is_insecure_uri());
    assert_eq!(api.arrivals().len(), 1);
}

/// Law 9 ends here: a redirect that is followed below is out of the layer's sight, pinned or not. What
/// becomes of the token is up to the policy there; tower-http's own strips it from requests to other origins.
#[tokio::test(start_paused = true)]
async fn a_redirect_below_is_out_of_the_layers_sight() {
    let layer = BearerAuthLayer::new(AuthServer::new())
        .origins(["https://api.example.com"])
        .unwrap();
    let api = redirecting(FOREIGN);
    let client = ServiceBuilder::new()
        .layer(layer.clone())
        .layer(FollowRedirectLayer::new())
        .service(api.clone());
    client.oneshot(start()).await.unwrap();
    assert_eq!(api.tokens(), ["token-1", "anonymous"]);

    let api = redirecting("/elsewhere");
    let client = ServiceBuilder::new()
        .layer(layer.clone())
        .layer(FollowRedirectLayer::new())
        .service(api.clone());
    client.oneshot(start()).await.unwrap();
    assert_eq!(api.tokens(), ["token-1", "token-1"]);

    // A policy that strips nothing gives the token away.
    let follow = redirect_fn(|_| Ok::<_, Infallible>(Action::Follow));
    let api = redirecting(FOREIGN);
    let client = ServiceBuilder::new()
        .layer(layer)
        .layer(FollowRedirectLayer::with_policy(follow))
        .service(api.clone());
    client.oneshot(start()).await.unwrap();
    assert_eq!(api.tokens(), ["token-1", "token-1"]);
}

/// Law 1: a boxed service is cloned like any other.
#[tokio::test(start_paused = true)]
async fn a_boxed_inner_service_works() {
    let server = AuthServer::new();
    let api = Api::refusing("token-1", || unauthorized(INVALID_TOKEN));
    let inner: BoxCloneSyncService<Request<String>, Response<String>, Infallible> =
        BoxCloneSyncService::new(api.clone());
    let client = BearerAuthLayer::new(server.clone())
        .replay(CloneBody)
        .layer(inner);
    // And the whole can be boxed.
    let client: BoxCloneSyncService<_, _, BoxError> = BoxCloneSyncService::new(client);
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-2");
    assert_eq!(api.tokens(), ["token-1", "token-2"]);
}

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

/// Law 1: layers of two caches share nothing.
#[tokio::test(start_paused = true)]
async fn layers_of_their_own_have_caches_of_their_own() {
    let server = AuthServer::new();
    let one = BearerAuthLayer::new(TokenCache::new(server.clone())).layer(Api::echoing());
    let other = BearerAuthLayer::new(TokenCache::new(server.clone())).layer(Api::echoing());
    assert_eq!(one.oneshot(get()).await.unwrap().body(), "token-1");
    assert_eq!(other.oneshot(get()).await.unwrap().body(), "token-2");
}

/// Law 9: a token failure is told apart from the inner service's errors, through any layers above.
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

/// Law 10: the inner service's errors pass through untouched, whether it boxes them or not.
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
