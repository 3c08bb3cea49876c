//! A gateway that calls an API for its users with a token of its own, which they never see.
//!
//! Runs on its own, in about two seconds: it starts an authorization server, an API that checks every token, and
//! the gateway in front of it, all on loopback ports. The gateway has no handlers: its fallback is the layer over
//! hyper-util's client. Bodies stream through it in both directions.
//!
//! ```sh
//! cargo run --example axum_gateway
//! ```

use std::time::Duration;

use axum::{
    Router,
    body::Body,
    error_handling::HandleErrorLayer,
    extract::Request,
    response::{IntoResponse, Response},
};
use http::{
    StatusCode, Uri, Version,
    header::{AUTHORIZATION, HOST, RETRY_AFTER},
    uri::PathAndQuery,
};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::time;
use tower::ServiceBuilder;
use tower_bearer::{
    BearerAuthLayer, BoxError, ClientCredentials, EmptyBody, TokenCache, TokenError,
};

use self::support::Realm;

#[allow(dead_code, reason = "shared with examples that use more of it")]
mod support;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let realm = Realm::new(Duration::from_secs(300));
    let (token_url, api) = realm.serve().await?;
    let gateway = support::serve(gateway(token_url, api)?).await?;

    // Whatever is wrong with the gateway's token, its users get a plain answer.
    realm.lock().down = true;
    let response = call_as_user(&gateway).await?;
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    let pause: u64 = response.headers()[RETRY_AFTER].to_str()?.parse()?;
    assert_eq!(realm.lock().refused, 0);
    assert_eq!(realm.lock().anonymous, 0);
    println!("token endpoint down    503, Retry-After: {pause}; the API saw no request");

    realm.lock().down = false;
    time::sleep(Duration::from_secs(pause)).await;
    let response = call_as_user(&gateway).await?;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(realm.lock().granted(), 1);
    println!("token endpoint up      200, with the gateway's token in place of the user's");

    realm.lock().revoke();
    let response = call_as_user(&gateway).await?;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(realm.lock().granted(), 2);
    assert_eq!(realm.lock().refused, 1);
    println!("all tokens revoked     200, the request was refused once and sent again");

    assert_eq!(realm.lock().anonymous, 0);
    Ok(())
}

/// The gateway: all that an application needs.
fn gateway(token_url: String, api: Uri) -> Result<Router, BoxError> {
    let source = ClientCredentials::builder(token_url, support::CLIENT_ID)
        .client_secret(support::CLIENT_SECRET)
        .build()?;
    let cache = TokenCache::new(source);
    let tokens = cache.clone();
    let handle_error = move |error| error_response(error, cache.status().retry_in());
    let stack = ServiceBuilder::new()
        .layer(HandleErrorLayer::new(handle_error))
        .map_response(hide_refusal)
        .map_request(move |request| retarget(request, &api))
        // A request without a body is sent again after a refusal; one with a body streams through, once.
        .layer(BearerAuthLayer::new(tokens).replay(EmptyBody))
        .service(Client::builder(TokioExecutor::new()).build_http::<Body>());
    Ok(Router::new().fallback_service(stack))
}

/// Directs a request to the API. A real gateway also drops hop-by-hop headers (RFC 9110 section 7.6.1).
fn retarget(mut request: Request, api: &Uri) -> Request {
    let mut parts = request.uri().clone().into_parts();
    parts.scheme = api.scheme().cloned();
    parts.authority = api.authority().cloned();
    // A `CONNECT` has no path, but a URI with a scheme needs one.
    let root = PathAndQuery::from_static("/");
    parts.path_and_query.get_or_insert(root);
    *request.uri_mut() = Uri::from_parts(parts).expect("the API's URI has scheme and authority");
    // The user's HTTP version and `Host` are meant for the gateway.
    *request.version_mut() = Version::default();
    request.headers_mut().remove(HOST);
    request
}

/// Hides a 401 that no replay could avert: it is about the gateway's token, not the user's.
fn hide_refusal(response: http::Response<Incoming>) -> Response {
    match response.status() {
        StatusCode::UNAUTHORIZED => StatusCode::BAD_GATEWAY.into_response(),
        _ => response.into_response(),
    }
}

/// Says why the API did not answer, and when the cache makes its next token request: it paces them, and waits for as
/// long as the token endpoint asks.
async fn error_response(error: BoxError, retry_in: Option<Duration>) -> Response {
    match error.downcast_ref::<TokenError>() {
        Some(error) if error.is_transient() => {
            let seconds = retry_in.map_or(1, |pause| pause.as_secs() + 1);
            let headers = [(RETRY_AFTER, seconds.to_string())];
            (StatusCode::SERVICE_UNAVAILABLE, headers).into_response()
        }
        // The server refuses the gateway's client, or the API cannot be reached.
        _ => StatusCode::BAD_GATEWAY.into_response(),
    }
}

/// Calls the gateway as a user does, with a credential that is of no use to the API.
async fn call_as_user(gateway: &str) -> Result<http::Response<Incoming>, BoxError> {
    let client: Client<HttpConnector, Body> = Client::builder(TokioExecutor::new()).build_http();
    let request = Request::get(format!("{gateway}/sims"))
        .header(AUTHORIZATION, "Bearer the-users-own")
        .body(Body::empty())?;
    Ok(client.request(request).await?)
}
