//! The crate against `oidc-provider`, a certified authorization server; `tests/servers/README.md` says how to install it.

#![cfg(feature = "rustls")]
#![expect(
    clippy::unwrap_used,
    reason = "clippy allows it in test functions only, not in their helpers"
)]
#![expect(
    unreachable_pub,
    reason = "a test binary exports nothing; `pub` marks what modules share"
)]

#[path = "../servers/mod.rs"]
mod servers;

mod identity;
#[cfg(feature = "jwt")]
mod jwt;
mod mutual_tls;
mod rotation;

use std::{
    collections::BTreeSet,
    time::{Duration, Instant, UNIX_EPOCH},
};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};
use tokio::{task::JoinSet, time};
use tower::{Layer, ServiceExt};
use tower_bearer::{
    AuthMethod, BearerAuthLayer, ClientCredentials, ClientCredentialsBuilder, CloneBody, Fetch,
    TokenCache, TokenSource,
};

use crate::servers::{HttpClient, Server};

/// What must be escaped in a form, a URL or either; RFC 6749 appendix A allows only ASCII here.
const ID: &str = "client of a+b: 100%25 & more=/?#\"'";
const SECRET: &str = "s p+a:c%2Be%&=/?#\\\"~";
const RESOURCE: &str = "https://api.example.com/sims";
const READ_ONLY: &str = "https://api.example.com/bills";

/// A server that knows the client [`ID`], which authenticates by this method and may read and write.
async fn server(method: &str) -> Option<Server> {
    let client = json!({
        "client_secret": SECRET,
        "token_endpoint_auth_method": method,
        "scope": "read write",
    });
    let settings = json!({
        "scopes": ["read", "write", "admin"],
        "resources": { RESOURCE: "read write", READ_ONLY: "read" },
    });
    start([client], settings).await
}

/// A server with these clients, the first of which is [`ID`], and one that introspects.
async fn start<const N: usize>(mut clients: [Value; N], mut settings: Value) -> Option<Server> {
    clients[0]["client_id"] = ID.into();
    let mut clients = Vec::from(clients);
    clients.push(json!({
        "client_id": "inspector",
        "client_secret": "inspector",
        "token_endpoint_auth_method": "client_secret_post",
    }));
    settings["clients"] = clients.into();
    Server::start("oidc-provider", &settings).await
}

fn client(server: &Server) -> ClientCredentialsBuilder {
    ClientCredentials::builder(&server.at.token_endpoint, ID).client_secret(SECRET)
}

#[tokio::test]
async fn special_characters_survive_in_the_header_and_in_the_body() {
    for (name, method) in [
        ("client_secret_basic", AuthMethod::ClientSecretBasic),
        ("client_secret_post", AuthMethod::ClientSecretPost),
    ] {
        let Some(server) = server(name).await else {
            return;
        };
        let source = client(&server).auth_method(method).build().unwrap();
        let token = TokenCache::new(source).get().await.unwrap();
        let said = server.introspect(token.expose_secret()).await;
        assert_eq!(said["active"], true, "{name}");
        assert_eq!(said["client_id"], ID, "{name}");
    }
}

/// RFC 8707 section 2.2.
#[tokio::test]
async fn a_resource_is_the_tokens_audience() {
    let Some(server) = server("client_secret_basic").await else {
        return;
    };
    let cache = |resource| {
        let source = client(&server).param("resource", resource).scope("read");
        TokenCache::new(source.build().unwrap())
    };
    for resource in [RESOURCE, READ_ONLY] {
        let token = cache(resource).get().await.unwrap();
        let said = server.introspect(token.expose_secret()).await;
        assert_eq!(said["aud"], resource);
        assert_eq!(said["scope"], "read");
    }
    let unknown = cache("https://elsewhere.example").get().await.unwrap_err();
    assert_eq!(unknown.oauth_error(), Some("invalid_target"));
    assert!(unknown.is_rejected() && !unknown.is_transient());
}

#[tokio::test]
async fn a_token_has_the_granted_scope_though_more_was_requested() {
    let Some(server) = server("client_secret_basic").await else {
        return;
    };
    for (resource, granted) in [(RESOURCE, "read write"), (READ_ONLY, "read")] {
        let source = client(&server)
            .scopes(["read", "write"])
            .param("resource", resource);
        let cache = TokenCache::new(source.build().unwrap());
        assert_eq!(cache.get().await.unwrap().scope(), Some(granted));
    }
}

#[tokio::test]
async fn a_refused_scope_is_terminal_and_not_requested_again() {
    let Some(server) = server("client_secret_basic").await else {
        return;
    };
    let cache = TokenCache::new(client(&server).scope("admin").build().unwrap());
    for _ in 0..10 {
        let error = cache.get().await.unwrap_err();
        assert_eq!(error.oauth_error(), Some("invalid_scope"));
        assert!(error.is_rejected() && !error.is_transient());
    }
    assert_eq!(server.counts().await.token_requests, 1);
}

#[tokio::test]
async fn a_client_is_refused_until_the_server_knows_its_secret() {
    let Some(server) = server("client_secret_basic").await else {
        return;
    };
    let source = ClientCredentials::builder(&server.at.token_endpoint, ID)
        .client_secret("CANARY-new")
        .build()
        .unwrap();
    let error = source.fetch(Fetch::new()).await.unwrap_err();
    assert_eq!(error.status(), Some(StatusCode::UNAUTHORIZED));
    assert_eq!(error.oauth_error(), Some("invalid_client"));
    assert!(error.is_rejected() && !error.is_transient());
    assert!(!format!("{error} {error:?}").contains("CANARY"));

    let secret = json!({ "client_id": ID, "client_secret": "CANARY-new" });
    server.order(json!({ "secret": secret })).await;
    source.fetch(Fetch::new()).await.unwrap();
    let old = client(&server).build().unwrap();
    let error = old.fetch(Fetch::new()).await.unwrap_err();
    assert_eq!(error.oauth_error(), Some("invalid_client"));
}

/// Law 3: a token is given up before it expires at the server, and not much sooner.
#[tokio::test]
async fn a_token_is_what_introspection_says() {
    let Some(server) = server("client_secret_basic").await else {
        return;
    };
    let asked = Instant::now();
    let cache = TokenCache::new(client(&server).scope("write").build().unwrap());
    let token = cache.get().await.unwrap();
    let took = asked.elapsed().as_secs_f64();

    let said = server.introspect(token.expose_secret()).await;
    assert_eq!(token.scope(), Some("write"));
    assert_eq!(said["scope"], "write");
    assert_eq!(said["client_id"], ID);
    assert_eq!(said["token_type"], "Bearer");
    let until = token.usable_until().unwrap();
    let until = until.duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let margin = said["exp"].as_f64().unwrap() - until;
    // The server counts whole seconds.
    assert!((9.0..=10.0 + took).contains(&margin), "{margin}");
}

#[tokio::test]
async fn the_retry_after_of_a_busy_endpoint_is_read() {
    let Some(server) = server("client_secret_basic").await else {
        return;
    };
    let source = client(&server).build().unwrap();
    let busy = json!({ "status": 503, "headers": { "retry-after": "7" } });
    server.order(json!({ "fail": busy })).await;
    let error = source.fetch(Fetch::new()).await.unwrap_err();
    assert!(error.is_unavailable() && error.is_transient());
    assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));
    server.order(json!({ "fail": null })).await;
    source.fetch(Fetch::new()).await.unwrap();
}

/// Laws 1, 2 and 8: requests in flight when all tokens are revoked are still answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revocation_under_load_costs_one_token_request_and_fails_none() {
    let Some(server) = server("client_secret_basic").await else {
        return;
    };
    let cache = TokenCache::new(client(&server).build().unwrap());
    // Long enough for every caller to meet the revocation before the next token comes.
    server.order(json!({ "delay": 200 })).await;
    let load = Load::start(&server, &cache, 20);
    time::sleep(Duration::from_millis(500)).await;
    server.order(json!({ "revoke_all": true })).await;
    time::sleep(Duration::from_millis(800)).await;
    let tokens = load.stop().await;

    assert_eq!(tokens.len(), 2);
    let counts = server.counts().await;
    assert_eq!((counts.token_requests, counts.granted), (2, 2));
    assert!(counts.api_refused >= 1, "{counts:?}");
    assert!(counts.api_requests >= 100, "{counts:?}");
}

/// Law 2: they live for two to three seconds, since this server counts whole ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_of_seconds_are_replaced_before_anybody_notices() {
    let Some(server) = server("client_secret_basic").await else {
        return;
    };
    server.order(json!({ "lifetime": 3 })).await;
    let cache = TokenCache::new(client(&server).build().unwrap());
    let start = Instant::now();
    let load = Load::start(&server, &cache, 5);
    time::sleep(Duration::from_secs(6)).await;
    let tokens = load.stop().await;

    // The first token is due after at least 0.35 of its lifetime, the others after 0.65; and a 401 may force one every
    // five seconds.
    let elapsed = start.elapsed().as_secs_f64();
    let planned = 2 + ((elapsed - 3.0 * 0.35) / (3.0 * 0.65)) as usize;
    let forced = 1 + (elapsed / 5.0) as usize;
    let requests = server.counts().await.token_requests;
    assert!(requests <= planned + forced, "{requests} in {elapsed} s");
    assert!(tokens.len() >= 3, "{}", tokens.len());
}

/// Callers that send one request after another and accept only 200.
struct Load {
    callers: JoinSet<BTreeSet<String>>,
    stop: tokio::sync::watch::Sender<bool>,
}

impl Load {
    fn start(server: &Server, cache: &TokenCache, callers: usize) -> Self {
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let layer = BearerAuthLayer::new(cache.clone()).replay(CloneBody);
        let mut load = Self {
            callers: JoinSet::new(),
            stop,
        };
        for _ in 0..callers {
            let client = layer.layer(server.http());
            let (url, stopped) = (server.at.api.clone(), stopped.clone());
            load.callers.spawn(async move {
                let mut tokens = BTreeSet::new();
                while !*stopped.borrow() {
                    tokens.insert(call(client.clone(), &url).await);
                }
                tokens
            });
        }
        load
    }

    /// Returns all tokens that the API accepted.
    async fn stop(self) -> BTreeSet<String> {
        self.stop.send_replace(true);
        self.callers
            .join_all()
            .await
            .into_iter()
            .flatten()
            .collect()
    }
}

async fn call(client: tower_bearer::BearerAuth<HttpClient, CloneBody>, url: &str) -> String {
    let body = Full::new(Bytes::from_static(b"a body to send twice"));
    let request = Request::post(url).body(body).unwrap();
    let response = client.oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let seen: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(seen["client_id"], ID);
    seen["token"].as_str().unwrap().to_owned()
}

/// Gets a token and asks the server whose it is.
async fn is_ours(server: &Server, cache: &TokenCache) -> String {
    let token = cache.get().await.unwrap();
    let said = server.introspect(token.expose_secret()).await;
    assert_eq!(
        (&said["active"], &said["client_id"]),
        (&json!(true), &json!(ID))
    );
    token.expose_secret().to_owned()
}

/// Asks for a token as a client that the server does not know.
async fn is_refused(source: ClientCredentials) {
    let error = source.fetch(Fetch::new()).await.unwrap_err();
    assert_eq!(error.oauth_error(), Some("invalid_client"), "{error:?}");
    assert!(!error.is_transient());
}
