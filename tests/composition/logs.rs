//! What is seen of requests and answers.

use std::convert::Infallible;

use bytes::Bytes;
use http::{
    HeaderValue, Request, Response, StatusCode,
    header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, WWW_AUTHENTICATE},
};
use http_body_util::{BodyExt, Full};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_bearer::{BearerAuthLayer, BoxError, CloneBody};
use tower_http::{
    classify::{ServerErrorsAsFailures, SharedClassifier},
    decompression::DecompressionLayer,
    sensitive_headers::SetSensitiveRequestHeadersLayer,
    trace::{DefaultMakeSpan, DefaultOnRequest, DefaultOnResponse, TraceLayer},
};

use crate::support::{Api, AuthServer, INVALID_TOKEN, Printed, bearer, get};

/// The statuses of the answers that were logged.
fn statuses(log: &str) -> Vec<String> {
    let answers = log
        .lines()
        .filter(|line| line.contains("finished processing"));
    answers
        .map(|line| {
            let (_, status) = line.split_once(" status=").unwrap();
            status.chars().take_while(char::is_ascii_digit).collect()
        })
        .collect()
}

/// Shows everything it can.
fn trace() -> TraceLayer<SharedClassifier<ServerErrorsAsFailures>> {
    TraceLayer::new_for_http()
        .make_span_with(DefaultMakeSpan::new().include_headers(true))
        .on_request(DefaultOnRequest::new())
        .on_response(DefaultOnResponse::new().include_headers(true))
}

/// Trace, above: One span holds the wait for a token and both sends; it shows no token. The shared token request is
/// logged outside it.
///
/// Law 9.
#[tokio::test(start_paused = true)]
async fn a_trace_above_spans_the_whole_request() {
    let (log, _guard) = Printed::collect();
    let client = ServiceBuilder::new()
        .layer(trace())
        .layer(BearerAuthLayer::new(AuthServer::new()).replay(CloneBody))
        .service(Api::refusing_the_first());
    client.oneshot(get()).await.unwrap();
    let text = log.text();
    assert_eq!(statuses(&text), ["200"]);
    assert!(!text.contains("authorization"), "{text}");
    assert!(!text.contains("token-"), "{text}");
    // The token request is shared, and so are its events.
    let told = text
        .lines()
        .find(|line| line.contains("token request started"));
    assert!(!told.unwrap().contains("request{"), "{text}");
}

/// Trace, below: A span for each send; the token's header shows as `Sensitive`.
///
/// Law 9.
#[tokio::test(start_paused = true)]
async fn a_trace_below_spans_each_send() {
    let (log, _guard) = Printed::collect();
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(AuthServer::new()).replay(CloneBody))
        .layer(trace())
        .service(Api::refusing_the_first());
    client.oneshot(get()).await.unwrap();
    let text = log.text();
    assert_eq!(statuses(&text), ["401", "200"]);
    assert!(text.contains(r#""authorization": Sensitive"#), "{text}");
    assert!(!text.contains("token-"), "{text}");
}

/// SetSensitiveRequestHeaders, above: It marks the caller's headers; the token is marked anyway.
#[tokio::test(start_paused = true)]
async fn a_header_marked_above_stays_marked() {
    let api = Api::echoing();
    let client = ServiceBuilder::new()
        .layer(SetSensitiveRequestHeadersLayer::new([AUTHORIZATION]))
        .layer(BearerAuthLayer::new(AuthServer::new()).keep_existing(true))
        .service(api.clone());
    let mut own = get();
    let credential = HeaderValue::from_static("Basic dXNlcjpwYXNz");
    own.headers_mut().insert(AUTHORIZATION, credential);
    for request in [own, get()] {
        client.clone().oneshot(request).await.unwrap();
    }
    let client = BearerAuthLayer::new(AuthServer::new());
    let client = tower::Layer::layer(&client, api.clone());
    client.oneshot(get()).await.unwrap();
    assert_eq!(api.tokens(), ["anonymous", "token-1", "token-1"]);
    for arrival in api.arrivals() {
        assert!(arrival.headers[AUTHORIZATION].is_sensitive());
    }
}

/// SetSensitiveRequestHeaders, below: It finds the token's header marked already.
#[tokio::test(start_paused = true)]
async fn a_layer_below_finds_the_token_marked() {
    let api = Api::echoing();
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(AuthServer::new()))
        .map_request(|request: Request<String>| {
            assert!(request.headers()[AUTHORIZATION].is_sensitive());
            request
        })
        .layer(SetSensitiveRequestHeadersLayer::new([AUTHORIZATION]))
        .service(api.clone());
    client.oneshot(get()).await.unwrap();
    assert!(api.arrivals()[0].headers[AUTHORIZATION].is_sensitive());
}

/// "refused" and "welcome", by `gzip -n`.
const REFUSED: &[u8] =
    b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03+JM+-NM\x01\x00|\xbe\xd3\xf0\x07\x00\x00\x00";
const WELCOME: &[u8] =
    b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03+O\xcdI\xce\xcfM\x05\x00\xb3a\xcb7\x07\x00\x00\x00";

type Compressed = Response<Full<Bytes>>;

/// An API that compresses its answers, and refuses `token-1`.
fn compressing()
-> impl Service<Request<String>, Response = Compressed, Error = Infallible, Future: Send> + Clone {
    service_fn(|request: Request<String>| async move {
        assert_eq!(request.headers()[ACCEPT_ENCODING], "gzip");
        let response = Response::builder().header(CONTENT_ENCODING, "gzip");
        let response = match bearer(&request) {
            Some("token-1") => response
                .status(StatusCode::UNAUTHORIZED)
                .header(WWW_AUTHENTICATE, INVALID_TOKEN)
                .body(Full::from(REFUSED)),
            _ => response.body(Full::from(WELCOME)),
        };
        Ok(response.unwrap())
    })
}

/// What the caller gets.
async fn read<S, B>(client: S) -> (StatusCode, Bytes)
where
    S: Service<Request<String>, Response = Response<B>, Error = BoxError>,
    B: http_body::Body<Data = Bytes, Error: std::fmt::Debug>,
{
    let response = client.oneshot(get()).await.unwrap();
    assert!(!response.headers().contains_key(CONTENT_ENCODING));
    let status = response.status();
    let body = response.into_body().collect().await.unwrap();
    (status, body.to_bytes())
}

const REFUSAL: (StatusCode, Bytes) = (StatusCode::UNAUTHORIZED, Bytes::from_static(b"refused"));
const ANSWER: (StatusCode, Bytes) = (StatusCode::OK, Bytes::from_static(b"welcome"));

/// Decompression, above: A compressed 401 is judged by its head, and the caller reads it if it is returned; both
/// sends accept what it accepts.
#[tokio::test(start_paused = true)]
async fn a_decompression_above_reads_the_returned_answer() {
    let layer = BearerAuthLayer::new(AuthServer::new());
    let stack = ServiceBuilder::new().layer(DecompressionLayer::new());
    let client = stack.clone().layer(layer).service(compressing());
    assert_eq!(read(client).await, REFUSAL);
    let layer = BearerAuthLayer::new(AuthServer::new()).replay(CloneBody);
    let client = stack.layer(layer).service(compressing());
    assert_eq!(read(client).await, ANSWER);
}

/// Decompression, below: The same: the layer reads no body, and a refusal that is replayed is not decompressed.
#[tokio::test(start_paused = true)]
async fn a_decompression_below_changes_nothing_for_the_layer() {
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(AuthServer::new()))
        .layer(DecompressionLayer::new())
        .service(compressing());
    assert_eq!(read(client).await, REFUSAL);
    let client = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(AuthServer::new()).replay(CloneBody))
        .layer(DecompressionLayer::new())
        .service(compressing());
    assert_eq!(read(client).await, ANSWER);
}
