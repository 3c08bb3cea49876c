//! Where the token goes, and that no request leaves without it.

use std::{error::Error, time::Duration};

use http::{HeaderValue, Request, Uri, header::HOST};
use tokio::time;
use tower::{Layer, ServiceExt};
use tower_bearer::{BearerAuthLayer, CloneBody, TokenError};

use crate::support::{
    Answer, Api, AuthServer, INVALID_TOKEN, all, get, get_path, settle, token_error, unauthorized,
};

fn to(uri: &str) -> Request<String> {
    Request::get(uri).body(String::new()).unwrap()
}

/// Law 9: over https, loopback excepted.
#[tokio::test(start_paused = true)]
async fn https_loopback_and_bound_services_get_the_token() {
    for uri in [
        "https://api.example.com/sims",
        "https://10.0.0.1:8443/sims",
        "http://localhost/sims",
        "http://LOCALHOST:8080/sims",
        "http://127.0.0.1:8080/sims",
        "http://127.8.9.10/sims",
        "http://[::1]:8080/sims",
        // For tonic and services bound to one host.
        "/sims",
    ] {
        let server = AuthServer::new();
        let api = Api::echoing();
        let client = BearerAuthLayer::new(server.clone()).layer(api.clone());
        // The slow path and the fast one.
        for _ in 0..2 {
            let response = client.clone().oneshot(to(uri)).await.unwrap();
            assert_eq!(response.body(), "token-1", "{uri}");
        }
        let seen: Vec<Uri> = api.arrivals().into_iter().map(|a| a.uri).collect();
        assert_eq!(seen, [uri, uri], "the URI is not touched");
    }
}

/// Law 9: a token that could be read on the way is not even requested.
#[tokio::test(start_paused = true)]
async fn plain_http_to_another_host_is_an_error_and_costs_no_token_request() {
    for uri in [
        "http://api.example.com/sims",
        "http://10.0.0.1/sims",
        "http://localhost.example.com/sims",
        "http://127.0.0.1.example.com/sims",
        "http://localhost@example.com/sims",
        "ftp://localhost/sims",
        "api.example.com:443",
    ] {
        for warm in [false, true] {
            let server = AuthServer::new();
            let api = Api::echoing();
            let client = BearerAuthLayer::new(server.clone())
                .replay(CloneBody)
                .layer(api.clone());
            if warm {
                client.cache().get().await.unwrap();
            }
            let error = client.oneshot(to(uri)).await.unwrap_err();
            let error = token_error(&error);
            assert!(error.is_insecure_uri(), "{uri}: {error:?}");
            assert!(!error.is_transient());
            settle().await;
            assert_eq!(server.requests(), usize::from(warm), "{uri}");
            assert!(api.arrivals().is_empty(), "{uri} was sent");
        }
    }
}

/// Law 9: it shows only the URI's scheme and host.
#[tokio::test(start_paused = true)]
async fn the_error_names_the_setting_and_no_secret_of_the_uri() {
    let client = BearerAuthLayer::new(AuthServer::new()).layer(Api::echoing());
    let uri = "http://CANARY:CANARY@api.example.com/CANARY?key=CANARY";
    let error = client.oneshot(to(uri)).await.unwrap_err();
    let source = token_error(&error).source().unwrap();
    let text = format!("{error} {error:?} {source}");
    assert!(text.contains("dangerous_plain_http"), "{text}");
    assert!(text.contains("http://api.example.com"), "{text}");
    assert!(!text.contains("CANARY"), "{text}");
}

/// Law 9: the setting says that it is dangerous.
#[tokio::test(start_paused = true)]
async fn plain_http_carries_the_token_if_allowed() {
    let client = BearerAuthLayer::new(AuthServer::new())
        .dangerous_plain_http(true)
        .layer(Api::echoing());
    for uri in ["http://api.example.com/sims", "https://api.example.com/"] {
        let response = client.clone().oneshot(to(uri)).await.unwrap();
        assert_eq!(response.body(), "token-1", "{uri}");
    }
}

/// Law 9: only pinned origins get the token; requests to others need none.
#[tokio::test(start_paused = true)]
async fn requests_to_origins_that_are_not_pinned_pass_bare() {
    for uri in [
        "https://evil.example/sims",
        "https://api.example.com.evil.example/sims",
        "https://api.example.com@evil.example/sims",
        "https://api.example.com:8443/sims",
        "https://example.com/sims",
        "https://sub.api.example.com/sims",
        "http://api.example.com/sims",
        "http://localhost/sims",
    ] {
        let server = AuthServer::new();
        let api = Api::echoing();
        let client = BearerAuthLayer::new(server.clone())
            .replay(CloneBody)
            .origins(["https://api.example.com"])
            .unwrap()
            .layer(api.clone());
        let response = client.clone().oneshot(to(uri)).await.unwrap();
        assert_eq!(response.body(), "anonymous", "{uri}");
        settle().await;
        assert_eq!(server.requests(), 0, "{uri}");
        // The same once there is a token.
        client.cache().get().await.unwrap();
        let response = client.oneshot(to(uri)).await.unwrap();
        assert_eq!(response.body(), "anonymous", "{uri}");
    }
}

/// Law 9 is about the URI, to which a client connects. What a server does with a `Host` is its own business; whoever
/// forwards one from elsewhere has to drop it.
#[tokio::test(start_paused = true)]
async fn the_callers_host_header_is_sent_with_the_token() {
    let api = Api::echoing();
    let client = BearerAuthLayer::new(AuthServer::new())
        .origins(["https://api.example.com"])
        .unwrap()
        .layer(api.clone());
    let mut request = to("https://api.example.com/sims");
    let host = HeaderValue::from_static("evil.example");
    request.headers_mut().insert(HOST, host.clone());
    let response = client.oneshot(request).await.unwrap();
    assert_eq!(response.body(), "token-1");
    assert_eq!(api.arrivals()[0].headers[HOST], host);
}

/// Law 9: however the origin is spelt.
#[tokio::test(start_paused = true)]
async fn requests_to_pinned_origins_carry_the_token() {
    let client = BearerAuthLayer::new(AuthServer::new())
        .origins(["https://api.example.com", "https://other.example:8443/"])
        .unwrap()
        .layer(Api::echoing());
    for uri in [
        "https://api.example.com/sims",
        "https://API.Example.com:443/sims?a=b",
        "https://other.example:8443/",
        "/sims",
    ] {
        let response = client.clone().oneshot(to(uri)).await.unwrap();
        assert_eq!(response.body(), "token-1", "{uri}");
    }
}

/// Law 9: pinning does not make plain http safe, and allowing plain http does not unpin.
#[tokio::test(start_paused = true)]
async fn pinning_and_plain_http_are_separate_settings() {
    let pinned = |origin: &str| {
        BearerAuthLayer::new(AuthServer::new())
            .origins([origin])
            .unwrap()
    };
    let request = || to("http://api.example.com/sims");
    let client = pinned("http://api.example.com").layer(Api::echoing());
    let error = client.oneshot(request()).await.unwrap_err();
    assert!(token_error(&error).is_insecure_uri());

    let client = pinned("http://api.example.com")
        .dangerous_plain_http(true)
        .layer(Api::echoing());
    assert_eq!(client.oneshot(request()).await.unwrap().body(), "token-1");

    let client = pinned("https://api.example.com")
        .dangerous_plain_http(true)
        .layer(Api::echoing());
    assert_eq!(client.oneshot(request()).await.unwrap().body(), "anonymous");
}

/// Law 8: its request had no token of ours.
#[tokio::test(start_paused = true)]
async fn a_refusal_by_an_origin_not_pinned_leaves_the_token_alone() {
    let server = AuthServer::new();
    let api = Api::new(|_| unauthorized(INVALID_TOKEN));
    let client = BearerAuthLayer::new(server.clone())
        .replay(CloneBody)
        .origins(["https://api.example.com"])
        .unwrap()
        .layer(api.clone());
    client.cache().get().await.unwrap();
    let response = client.oneshot(to("https://evil.example/")).await.unwrap();
    assert_eq!(response.status(), 401);
    settle().await;
    assert_eq!(server.requests(), 1);
    assert_eq!(api.tokens(), ["anonymous"]);
}

/// Law 9: without a token it fails.
#[tokio::test(start_paused = true)]
async fn no_request_is_anonymous_in_an_outage() {
    for failure in [
        Answer::Fail(TokenError::transient("down")),
        Answer::Fail(TokenError::terminal("refused")),
        Answer::Hang,
        Answer::Panic,
    ] {
        let server = AuthServer::new();
        server.set(failure.clone());
        let api = Api::echoing();
        let client = BearerAuthLayer::new(server.clone())
            .replay(CloneBody)
            .layer(api.clone());
        let mut requests = Vec::new();
        for n in 0..600 {
            requests.push(tokio::spawn(client.clone().oneshot(get_path(n))));
            time::sleep(Duration::from_millis(100)).await;
        }
        for response in all(requests).await {
            token_error(&response.unwrap_err());
        }
        assert!(api.arrivals().is_empty(), "{failure:?}");
    }
}

/// Laws 3 and 9.
#[tokio::test(start_paused = true)]
async fn no_request_is_anonymous_when_the_token_dies_in_an_outage() {
    let server = AuthServer::new();
    server.set(Answer::Grant(Duration::from_secs(60)));
    let api = Api::echoing();
    let client = BearerAuthLayer::new(server.clone()).layer(api.clone());
    client.cache().get().await.unwrap();
    server.set(Answer::Fail(TokenError::transient("down")));
    let (mut sent, mut failed) = (0, 0);
    for _ in 0..1_200 {
        match client.clone().oneshot(get()).await {
            Ok(response) => {
                assert_eq!(response.body(), "token-1");
                assert_eq!(failed, 0, "the token came back to life");
                sent += 1;
            }
            Err(error) => {
                assert!(token_error(&error).is_transient());
                failed += 1;
            }
        }
        time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(api.tokens(), vec!["token-1"; sent]);
    // 60 s less a margin of 6 s.
    assert!((535..=540).contains(&sent), "{sent}");
    assert!(failed > 500);
}
