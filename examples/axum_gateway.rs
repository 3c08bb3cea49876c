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

#[allow(dead_code, reason = "shared with examples that look at more of it")]
mod support;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let realm = Realm::new(Duration::from_secs(300));
    let (token_url, api) = realm.serve().await?;
    let gateway = support::serve(gateway(token_url, api)?).await?;

    // Whatever the gateway's trouble with its token is, its users get a plain answer.
    realm.lock().down = true;
    let response = user(&gateway).await?;
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    let pause: u64 = response.headers()[RETRY_AFTER].to_str()?.parse()?;
    assert_eq!(realm.lock().refused, 0);
    assert_eq!(realm.lock().anonymous, 0);
    println!("token endpoint down    503, Retry-After: {pause}; the API saw no request");

    realm.lock().down = false;
    time::sleep(Duration::from_secs(pause)).await;
    let response = user(&gateway).await?;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(realm.lock().granted(), 1);
    println!("token endpoint up      200, with the gateway's token in place of the user's");

    realm.lock().revoke();
    let response = user(&gateway).await?;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(realm.lock().granted(), 2);
    assert_eq!(realm.lock().refused, 1);
    println!("all tokens revoked     200, the request was refused once and sent again");

    assert_eq!(realm.lock().anonymous, 0);
    Ok(())
}

/// The gateway, which is all that an application needs.
fn gateway(token_url: String, api: Uri) -> Result<Router, BoxError> {
    let source = ClientCredentials::builder(token_url, support::CLIENT_ID)
        .client_secret(support::CLIENT_SECRET)
        .build()?;
    let cache = TokenCache::new(source);
    let tokens = cache.clone();
    let explain = move |error| explain(error, cache.status().retry_in());
    let stack = ServiceBuilder::new()
        .layer(HandleErrorLayer::new(explain))
        .map_response(conceal)
        .map_request(move |request| retarget(request, &api))
        // What has no body is sent again after a refusal; a body goes through as it comes, and once.
        .layer(BearerAuthLayer::new(tokens).replay(EmptyBody))
        .service(Client::builder(TokioExecutor::new()).build_http::<Body>());
    Ok(Router::new().fallback_service(stack))
}

/// Sends the request to the API. A gateway proper also drops hop-by-hop headers (RFC 9110 section 7.6.1).
fn retarget(mut request: Request, api: &Uri) -> Request {
    let mut parts = request.uri().clone().into_parts();
    parts.scheme = api.scheme().cloned();
    parts.authority = api.authority().cloned();
    // A `CONNECT` names no path, and a URI with a scheme has one.
    let root = PathAndQuery::from_static("/");
    parts.path_and_query.get_or_insert(root);
    *request.uri_mut() = Uri::from_parts(parts).expect("the API's URI has scheme and authority");
    // The users' version of HTTP and their name for the gateway are none of the API's.
    *request.version_mut() = Version::default();
    request.headers_mut().remove(HOST);
    request
}

/// A refusal of the gateway's token that could not be mended tells users nothing of their own.
fn conceal(response: http::Response<Incoming>) -> Response {
    match response.status() {
        StatusCode::UNAUTHORIZED => StatusCode::BAD_GATEWAY.into_response(),
        _ => response.into_response(),
    }
}

/// Why there is no answer of the API, and when the next token request may be made: the cache paces them, and waits
/// for as long as the token endpoint has asked for, if it has.
async fn explain(error: BoxError, retry_in: Option<Duration>) -> Response {
    match error.downcast_ref::<TokenError>() {
        Some(error) if error.is_transient() => {
            let seconds = retry_in.map_or(1, |pause| pause.as_secs() + 1);
            let headers = [(RETRY_AFTER, seconds.to_string())];
            (StatusCode::SERVICE_UNAVAILABLE, headers).into_response()
        }
        // The gateway's own client is refused, or the API cannot be reached.
        _ => StatusCode::BAD_GATEWAY.into_response(),
    }
}

/// Asks the gateway as a user does, with a credential that is of no use to the API.
async fn user(gateway: &str) -> Result<http::Response<Incoming>, BoxError> {
    let client: Client<HttpConnector, Body> = Client::builder(TokioExecutor::new()).build_http();
    let request = Request::get(format!("{gateway}/sims"))
        .header(AUTHORIZATION, "Bearer the-users-own")
        .body(Body::empty())?;
    Ok(client.request(request).await?)
}
