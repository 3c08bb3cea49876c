//! What checks, changes or redirects requests.

use std::convert::Infallible;

use http::{
    HeaderValue, Request, Response, StatusCode,
    header::{AUTHORIZATION, LOCATION},
};
use tower::{ServiceBuilder, ServiceExt, filter::FilterLayer};
use tower_bearer::{BearerAuthLayer, BoxError, CloneBody, WithoutToken};
use tower_http::{
    auth::AddAuthorizationLayer,
    follow_redirect::{
        FollowRedirectLayer,
        policy::{Action, FilterCredentials, Limited, PolicyExt, redirect_fn},
    },
    set_header::SetRequestHeaderLayer,
};

use crate::support::{
    Api, AuthServer, INVALID_TOKEN, echo, get, settle, token_error, unauthorized,
};

fn own() -> HeaderValue {
    HeaderValue::from_static("Basic dXNlcjpwYXNz")
}

/// Filter, above: What it rejects costs no token request.
#[tokio::test(start_paused = true)]
async fn a_filter_above_rejects_before_a_token_is_requested() {
    let server = AuthServer::new();
    let client = ServiceBuilder::new()
        .layer(FilterLayer::new(|request: Request<String>| {
            match request.headers().contains_key(AUTHORIZATION) {
                true => Ok(request),
                false => Err("no credential"),
            }
        }))
        .layer(BearerAuthLayer::new(server.clone()))
        .service(Api::echoing());
    let error = client.oneshot(get()).await.unwrap_err();
    assert_eq!(error.to_string(), "no credential");
    assert_eq!(server.requests(), 0);
}

/// Filter, below: It sees the token, and its error passes unchanged.
#[tokio::test(start_paused = true)]
async fn a_filter_below_sees_the_token() {
    #[derive(Debug, thiserror::Error)]
    #[error("rejected")]
    struct Rejected;

    let server = AuthServer::new();
    let api = Api::echoing();
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(server.clone()))
        .filter(
            |request: Request<String>| match request.headers().contains_key(AUTHORIZATION) {
                true => Err(Rejected),
                false => Ok(request),
            },
        )
        .service(api.clone());
    let error = client.oneshot(get()).await.unwrap_err();
    assert!(error.is::<Rejected>());
    assert_eq!(server.requests(), 1);
    assert!(api.arrivals().is_empty());
}

const HOME: &str = "https://api.example.com";
const FOREIGN: &str = "https://evil.example/steal";

fn pinned() -> BearerAuthLayer {
    BearerAuthLayer::new(AuthServer::new())
        .origins([HOME])
        .unwrap()
}

fn elsewhere(mut request: Request<String>) -> Request<String> {
    *request.uri_mut() = FOREIGN.parse().unwrap();
    request
}

/// MapRequest, above: The layer judges the mapped URI, headers and extensions.
///
/// Law 9.
#[tokio::test(start_paused = true)]
async fn a_request_mapped_above_is_judged() {
    let api = Api::echoing();
    let client = ServiceBuilder::new()
        .map_request(elsewhere)
        .layer(pinned())
        .service(api.clone());
    client.oneshot(start()).await.unwrap();
    let client = ServiceBuilder::new()
        .map_request(|mut request: Request<String>| {
            request.extensions_mut().insert(WithoutToken);
            request
        })
        .layer(pinned())
        .service(api.clone());
    client.oneshot(start()).await.unwrap();
    assert_eq!(api.tokens(), ["anonymous", "anonymous"]);
}

/// MapRequest, below: The layer does not see a changed URI: the token goes where it points.
#[tokio::test(start_paused = true)]
async fn a_request_mapped_below_is_not_judged() {
    let api = Api::echoing();
    let client = ServiceBuilder::new()
        .layer(pinned())
        .map_request(elsewhere)
        .service(api.clone());
    client.oneshot(start()).await.unwrap();
    assert_eq!(api.arrivals()[0].uri, FOREIGN);
    assert_eq!(api.tokens(), ["token-1"]);
}

/// SetRequestHeader, AddAuthorization, above: The token replaces its `Authorization`, unless `keep_existing` is set.
///
/// Law 9.
#[tokio::test(start_paused = true)]
async fn an_authorization_set_above_is_replaced() {
    for (keep, expected) in [
        (false, HeaderValue::from_static("Bearer token-1")),
        (true, own()),
    ] {
        let server = AuthServer::new();
        let api = Api::echoing();
        let layer = BearerAuthLayer::new(server.clone()).keep_existing(keep);
        let set = ServiceBuilder::new()
            .layer(SetRequestHeaderLayer::overriding(AUTHORIZATION, own()))
            .layer(layer.clone())
            .service(api.clone());
        set.oneshot(get()).await.unwrap();
        let added = ServiceBuilder::new()
            .layer(AddAuthorizationLayer::basic("user", "pass"))
            .layer(layer)
            .service(api.clone());
        added.oneshot(get()).await.unwrap();
        for arrival in api.arrivals() {
            assert_eq!(arrival.headers[AUTHORIZATION], expected);
        }
        assert_eq!(server.requests(), usize::from(!keep));
    }
}

/// SetRequestHeader, AddAuthorization, below: Its `Authorization` displaces the token, and a 401 to it counts against
/// the token; only `if_not_present` leaves the token alone.
#[tokio::test(start_paused = true)]
async fn an_authorization_set_below_displaces_the_token() {
    let server = AuthServer::new();
    let api = Api::new(|_| unauthorized(INVALID_TOKEN));
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(server.clone()))
        .layer(SetRequestHeaderLayer::overriding(AUTHORIZATION, own()))
        .service(api.clone());
    client.clone().oneshot(get()).await.unwrap();
    settle().await;
    // The first token, and a replacement for it, though it was never sent.
    assert_eq!(server.requests(), 2);
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(AuthServer::new()))
        .layer(AddAuthorizationLayer::basic("user", "pass"))
        .service(api.clone());
    client.oneshot(get()).await.unwrap();
    assert_eq!(api.tokens(), ["anonymous"; 2]);

    let api = Api::echoing();
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(AuthServer::new()))
        .layer(SetRequestHeaderLayer::if_not_present(AUTHORIZATION, own()))
        .service(api.clone());
    client.oneshot(get()).await.unwrap();
    assert_eq!(api.tokens(), ["token-1"]);
}

/// An API whose `/start` redirects to this place, and which echoes everything else.
fn redirecting(to: &'static str) -> Api {
    Api::new(move |arrival| match arrival.uri.path() {
        "/start" => Response::builder()
            .status(StatusCode::TEMPORARY_REDIRECT)
            .header(LOCATION, to)
            .body(String::new())
            .unwrap(),
        _ => echo(arrival.token()),
    })
}

fn start() -> Request<String> {
    Request::get("https://api.example.com/start")
        .body(String::new())
        .unwrap()
}

/// FollowRedirect, above: With `.origins([..])`, a hop to another origin carries no token.
///
/// Law 9: the layer judges every hop.
#[tokio::test(start_paused = true)]
async fn a_redirect_above_to_an_origin_not_pinned_carries_no_token() {
    for (place, token) in [
        (FOREIGN, "anonymous"),
        ("https://api.example.com:8443/", "anonymous"),
        ("http://api.example.com/", "anonymous"),
        ("/elsewhere", "token-1"),
        ("https://api.example.com/elsewhere", "token-1"),
    ] {
        let api = redirecting(place);
        let client = ServiceBuilder::new()
            .layer(FollowRedirectLayer::new())
            .layer(pinned().replay(CloneBody))
            .service(api.clone());
        let response = client.oneshot(start()).await.unwrap();
        assert_eq!(response.body(), token, "{place}");
        assert_eq!(api.tokens(), ["token-1", token], "{place}");
    }
}

/// FollowRedirect, above: Without, each https origin that the API redirects to gets the token: the follower neither
/// sees nor strips it.
///
/// Law 9 as far as it goes: every https origin is an allowed one by default.
#[tokio::test(start_paused = true)]
async fn a_redirect_above_carries_the_token_to_any_https_origin_by_default() {
    let api = redirecting(FOREIGN);
    let client = ServiceBuilder::new()
        .layer(FollowRedirectLayer::new())
        .layer(BearerAuthLayer::new(AuthServer::new()))
        .service(api.clone());
    client.oneshot(start()).await.unwrap();
    assert_eq!(api.arrivals()[1].uri, FOREIGN);
    assert_eq!(api.tokens(), ["token-1", "token-1"]);
}

/// FollowRedirect, above: A hop to plain http then fails.
///
/// Law 9: with the layer's error, unsent.
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

/// FollowRedirect, above: To another origin it drops a request's extensions and `Authorization`: a request with
/// `WithoutToken` or a kept credential goes on like any other.
///
/// Law 9: pinned origins help, or a policy that lets the mark through.
#[tokio::test(start_paused = true)]
async fn a_redirect_above_to_another_origin_drops_the_marks() {
    let bare = || {
        let mut request = start();
        request.extensions_mut().insert(WithoutToken);
        request
    };
    let kept = || {
        let mut request = start();
        request.headers_mut().insert(AUTHORIZATION, own());
        request
    };
    let open = BearerAuthLayer::new(AuthServer::new()).keep_existing(true);
    let pinned = pinned().keep_existing(true);
    for request in [bare, kept] {
        for (layer, token) in [(&open, "token-1"), (&pinned, "anonymous")] {
            let api = redirecting(FOREIGN);
            let client = ServiceBuilder::new()
                .layer(FollowRedirectLayer::new())
                .layer(layer.clone())
                .service(api.clone());
            client.oneshot(request()).await.unwrap();
            assert_eq!(api.tokens(), ["anonymous", token]);
            assert_ne!(api.arrivals()[1].headers.get(AUTHORIZATION), Some(&own()));
        }
    }

    let filter = FilterCredentials::new().allow_extension::<WithoutToken>();
    let policy = Limited::default().and::<_, String, BoxError>(filter);
    let api = redirecting(FOREIGN);
    let client = ServiceBuilder::new()
        .layer(FollowRedirectLayer::with_policy(policy))
        .layer(open)
        .service(api.clone());
    client.oneshot(bare()).await.unwrap();
    assert_eq!(api.tokens(), ["anonymous", "anonymous"]);
}

/// FollowRedirect, below: The layer does not see its hops: its default policy strips the token on the way to
/// another origin, but another policy may not.
///
/// Law 9 ends here, even with pinned origins.
#[tokio::test(start_paused = true)]
async fn the_layer_does_not_see_a_redirect_below() {
    let layer = pinned();
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

/// FollowRedirect, below: A 401 of that origin, which saw no token, counts against the token.
#[tokio::test(start_paused = true)]
async fn a_refusal_after_a_redirect_below_counts_against_the_token() {
    let server = AuthServer::new();
    let api = Api::new(|arrival| match arrival.token() {
        Some(_) => Response::builder()
            .status(StatusCode::TEMPORARY_REDIRECT)
            .header(LOCATION, FOREIGN)
            .body(String::new())
            .unwrap(),
        None => unauthorized("Bearer"),
    });
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(server.clone()).replay(CloneBody))
        .layer(FollowRedirectLayer::new())
        .service(api.clone());
    let response = client.oneshot(start()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(server.requests(), 2);
    assert_eq!(
        api.tokens(),
        ["token-1", "anonymous", "token-2", "anonymous"]
    );
}
