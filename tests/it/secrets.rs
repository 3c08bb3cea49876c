//! No secret and no token is printed or logged.

use std::{
    convert::Infallible,
    fmt,
    future::ready,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, Request, Response, StatusCode,
    header::{AUTHORIZATION, WWW_AUTHENTICATE},
};
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::time;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_bearer::{
    AccessToken, AuthMethod, BearerAuthLayer, ClientCredentials, ClientCredentialsBuilder,
    CloneBody, EmptyBody, Fetch, Never, RefreshPolicy, RefreshToken, TokenCache, TokenError,
    TokenResponse, TokenSource, source_fn,
};

use crate::support::{INVALID_TOKEN, Printed, TokenEndpoint, current_thread, get, settle};

/// Part of every secret of this module, and of nothing else.
const CANARY: &str = "CANARY";
const SECRET: &str = "CANARY-client-secret";
/// `client-id:CANARY-client-secret` in Base64, as in the header.
const BASIC: &str = "Y2xpZW50LWlkOkNBTkFSWS1jbGllbnQtc2VjcmV0";

#[track_caller]
fn assert_clean(printed: &Printed) {
    let text = printed.text();
    for secret in [CANARY, BASIC] {
        let line = text.lines().find(|line| line.contains(secret));
        assert_eq!(line, None, "{secret} was printed");
    }
}

/// What the token endpoint answers, by the number of the request.
type Script = fn(usize) -> (StatusCode, String);

fn grant(number: usize) -> (StatusCode, String) {
    let body = format!(
        r#"{{"access_token":"CANARY-access-{number}","token_type":"Bearer","expires_in":300,
            "refresh_token":"CANARY-refresh-{number}","refresh_expires_in":1800,"scope":"profile"}}"#
    );
    (StatusCode::OK, body)
}

fn refused(_: usize) -> (StatusCode, String) {
    let body = r#"{"error":"invalid_client","error_description":"not CANARY-client-secret"}"#;
    (StatusCode::UNAUTHORIZED, body.to_owned())
}

/// Secrets in the wrong place, or cut short.
const MISHAPS: &[Script] = &[
    |_| (StatusCode::BAD_GATEWAY, "CANARY-client-secret".to_owned()),
    refused,
    |_| {
        let body = r#"{"error":"CANARY","error_uri":"https://as.example/CANARY"}"#;
        (StatusCode::BAD_REQUEST, body.to_owned())
    },
    |_| {
        let body = "<html>CANARY-client-secret is blocked</html>";
        (StatusCode::FORBIDDEN, body.to_owned())
    },
    |_| (StatusCode::OK, "CANARY-access".to_owned()),
    |_| (StatusCode::OK, r#"{"access_token":"CANARY-acc"#.to_owned()),
    |_| {
        let body = r#"{"access_token":["CANARY-access"],"token_type":"Bearer"}"#;
        (StatusCode::OK, body.to_owned())
    },
    |_| {
        let body = r#"{"access_token":"CANARY access","token_type":"Bearer"}"#;
        (StatusCode::OK, body.to_owned())
    },
    |_| {
        let body = r#"{"access_token":"CANARY-access","token_type":"CANARY"}"#;
        (StatusCode::OK, body.to_owned())
    },
    |_| {
        let body =
            r#"{"access_token":"CANARY-access","token_type":"Bearer","expires_in":"CANARY"}"#;
        (StatusCode::OK, body.to_owned())
    },
    |_| (StatusCode::FOUND, String::new()),
];

/// A token endpoint that asserts that its requests print no secret on the way.
struct Endpoint {
    script: Arc<Mutex<Script>>,
    service: TokenEndpoint,
}

impl Endpoint {
    fn new(script: Script) -> Self {
        let script = Arc::new(Mutex::new(script));
        let current = script.clone();
        let requests = AtomicUsize::new(0);
        let service = TokenEndpoint::new(move |request| {
            if let Some(credentials) = request.headers().get(AUTHORIZATION) {
                assert_eq!(credentials, &format!("Basic {BASIC}"));
                assert!(credentials.is_sensitive());
            }
            // As a logging layer does.
            tracing::trace!(headers = ?request.headers(), "token request");
            let number = requests.fetch_add(1, Ordering::SeqCst) + 1;
            let script = *current.lock().unwrap();
            let (status, body) = script(number);
            let mut response = Response::builder().status(status);
            if status.is_redirection() {
                response = response.header("location", "https://elsewhere.example/CANARY");
            }
            ready(response.body(body).map_err(Into::into))
        });
        Self { script, service }
    }

    fn set(&self, script: Script) {
        *self.script.lock().unwrap() = script;
    }

    /// How many token requests it has seen.
    fn requests(&self) -> usize {
        self.service.bodies().len()
    }

    fn builder(&self, method: AuthMethod) -> ClientCredentialsBuilder {
        ClientCredentials::builder("https://as.example/token?key=CANARY", "client-id")
            .client_secret(SECRET)
            .auth_method(method)
            .scope("profile")
            .param("api_key", "CANARY-assertion")
    }

    fn source(&self, method: AuthMethod) -> ClientCredentials {
        self.builder(method)
            .build_with(self.service.clone())
            .unwrap()
    }
}

/// An API that refuses the first token, and asserts that none is printed on the way.
fn api()
-> impl Service<Request<String>, Response = Response<String>, Error = Infallible, Future: Send + 'static>
+ Clone
+ fmt::Debug
+ Send {
    service_fn(async |request: Request<String>| {
        let token = request.headers().get(AUTHORIZATION).unwrap();
        assert!(token.is_sensitive());
        tracing::trace!(?request, "request");
        let refused = token == "Bearer CANARY-access-1";
        let mut response = Response::new(String::new());
        if refused {
            *response.status_mut() = StatusCode::UNAUTHORIZED;
            let challenge = INVALID_TOKEN.parse().unwrap();
            response.headers_mut().insert("www-authenticate", challenge);
        }
        Ok(response)
    })
}

/// Law 9: through success, refusal, refresh, failure and recovery.
#[tokio::test(start_paused = true)]
async fn no_event_shows_a_secret() {
    for method in [AuthMethod::ClientSecretBasic, AuthMethod::ClientSecretPost] {
        let (printed, guard) = Printed::collect();
        // A first token request whose attempts all fail.
        let endpoint = Endpoint::new(MISHAPS[0]);
        let client = BearerAuthLayer::new(endpoint.source(method)).layer(api());
        let error = client.oneshot(get()).await.unwrap_err();
        printed.error(&*error);
        let endpoint = Endpoint::new(grant);
        let client = BearerAuthLayer::new(endpoint.source(method))
            .replay(CloneBody)
            .layer(api());
        let mut events = client.cache().events();
        // A token, a refusal, a forced refresh and a replay.
        let response = client.clone().oneshot(get()).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(endpoint.requests(), 2);
        // An early refresh that fails, first with the refresh token and then without.
        time::sleep(Duration::from_secs(240)).await;
        for (n, &mishap) in MISHAPS.iter().enumerate() {
            endpoint.set(mishap);
            let _ = client.clone().oneshot(get()).await;
            time::sleep(Duration::from_secs(70)).await;
            assert!(endpoint.requests() > 2 + n);
        }
        // An outage that outlives the last token.
        endpoint.set(refused);
        time::sleep(Duration::from_secs(300)).await;
        let error = client.clone().oneshot(get()).await.unwrap_err();
        printed.error(&*error);
        printed.debug(&client.cache().status());
        // A refresh by a refresh token that works.
        time::sleep(Duration::from_secs(300)).await;
        endpoint.set(grant);
        client.clone().oneshot(get()).await.unwrap();
        time::sleep(Duration::from_secs(230)).await;
        client.clone().oneshot(get()).await.unwrap();
        settle().await;
        printed.debug(&client.cache().status());
        client.cache().shutdown();
        while let Some(event) = events.next().await {
            printed.debug(&event);
        }

        // The secrets could have been printed, and the events were.
        let bodies = endpoint.service.bodies().join("\n");
        assert!(
            bodies.contains("refresh_token=CANARY-refresh-2"),
            "{bodies}"
        );
        assert!(bodies.contains("CANARY-assertion"));
        let text = printed.text();
        for event in [
            "token request started",
            "token received",
            "token request failed",
            "the refresh token brought no access token",
            "another one follows",
            "token requests succeed again",
            "the API refused the token",
            "waited for a token request",
            "token_flight",
            "Recovered {",
            "Status {",
            "token request headers=",
            "request=Request",
        ] {
            assert!(text.contains(event), "{event:?} is not in {text}");
        }
        drop(guard);
        assert_clean(&printed);
    }
}

/// Law 9: over sockets, with all that an HTTP/2 client logs of its frames.
#[tokio::test]
async fn no_event_of_the_http_client_shows_a_secret() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    // On its own thread, out of the collector's sight: a server may log what it gets.
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let server = std::thread::spawn(move || serve(listener, stopped));

    let (printed, guard) = Printed::collect();
    let client = Client::builder(TokioExecutor::new())
        .http2_only(true)
        .build_http::<Full<Bytes>>();
    let source = ClientCredentials::builder(format!("http://{address}/token"), "client-id")
        .client_secret(SECRET)
        .build_with(client.clone())
        .unwrap();
    let client = BearerAuthLayer::new(source).replay(CloneBody).layer(client);
    for _ in 0..2 {
        let request = Request::get(format!("http://{address}/sims"))
            .body(Full::default())
            .unwrap();
        let response = client.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        response.into_body().collect().await.unwrap();
    }
    drop(guard);
    stop.send(()).unwrap();
    server.join().unwrap();
    let text = printed.text();
    for target in ["tower_bearer: token received", "h2::"] {
        assert!(text.contains(target), "no event of {target} in {text}");
    }
    assert_clean(&printed);
}

/// Runs a token endpoint and an API that refuses the first token, over HTTP/2.
fn serve(listener: std::net::TcpListener, stopped: tokio::sync::oneshot::Receiver<()>) {
    let number = Arc::new(AtomicUsize::new(0));
    let token = move || {
        let number = number.fetch_add(1, Ordering::SeqCst) + 1;
        async move { grant(number).1 }
    };
    let sims = async |headers: HeaderMap| match headers[AUTHORIZATION].as_bytes() {
        b"Bearer CANARY-access-1" => Err((
            StatusCode::UNAUTHORIZED,
            [(WWW_AUTHENTICATE, INVALID_TOKEN)],
        )),
        _ => Ok("sims"),
    };
    let router = axum::Router::new()
        .route("/token", axum::routing::post(token))
        .route("/sims", axum::routing::get(sims));
    let runtime = current_thread();
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        tokio::select! {
            _ = axum::serve(listener, router) => {}
            _ = stopped => {}
        }
    });
}

/// Law 9: errors hold neither what was sent nor what came back.
#[tokio::test(start_paused = true)]
async fn no_error_of_a_token_request_shows_a_secret() {
    let printed = Printed::default();
    for method in [AuthMethod::ClientSecretBasic, AuthMethod::ClientSecretPost] {
        for &mishap in MISHAPS {
            let endpoint = Endpoint::new(mishap);
            let source = endpoint.source(method);
            match source.fetch(Fetch::new()).await {
                Ok(response) => printed.debug(&response),
                Err(error) => printed.error(&error),
            }
            let client = BearerAuthLayer::new(source).layer(api());
            if let Err(error) = client.oneshot(get()).await {
                assert!(error.is::<TokenError>());
                printed.error(&*error);
            }
        }
    }
    assert!(printed.text().contains("invalid_client"));
    assert_clean(&printed);
}

/// Law 9: in its `Debug`.
#[tokio::test(start_paused = true)]
async fn no_type_shows_a_secret() {
    let printed = Printed::default();
    let endpoint = Endpoint::new(grant);
    let method = AuthMethod::ClientSecretBasic;
    printed.debug(&method);
    printed.debug(&endpoint.builder(method));
    let source = endpoint.source(method);
    printed.debug(&source);

    let refresh_token = || RefreshToken::new("CANARY-refresh").expires_in(Duration::from_secs(9));
    printed.debug(&refresh_token());
    let response = TokenResponse::new("CANARY-access")
        .unwrap()
        .scope("profile")
        .refresh_token(refresh_token());
    printed.debug(&response);
    let mut fetch = Fetch::new();
    fetch.refresh_token = Some(refresh_token());
    printed.debug(&fetch);
    let held = SECRET.to_owned();
    printed.debug(&source_fn(move |_| {
        let token = TokenResponse::new(held.clone());
        async { token }
    }));

    let cache = TokenCache::with_policy(source, RefreshPolicy::new());
    printed.debug(&RefreshPolicy::new());
    let token: AccessToken = cache.get().await.unwrap();
    assert_eq!(token.expose_secret(), "CANARY-access-1");
    printed.debug(&token);
    printed.debug(&token.header_value());
    assert!(token.header_value().is_sensitive());
    printed.debug(&cache);

    let layer = BearerAuthLayer::new(cache);
    printed.debug(&layer);
    printed.debug(&layer.clone().replay(EmptyBody));
    let layer = layer.replay(CloneBody);
    printed.debug(&(Never, CloneBody, EmptyBody));
    let mut client = layer.layer(api());
    printed.debug(&client);
    let mut future = Box::pin(client.call(get()));
    printed.debug(&future);
    let first_poll = time::timeout(Duration::ZERO, future.as_mut()).await;
    printed.debug(&first_poll);
    printed.debug(&future);

    for name in [
        "AccessToken",
        "BearerAuth",
        "BearerAuthLayer",
        "ClientCredentials",
        "ClientCredentialsBuilder",
        "RefreshToken",
        "ResponseFuture",
        "SourceFn",
        "TokenCache",
        "TokenResponse",
    ] {
        assert!(printed.text().contains(&format!("{name} {{")), "{name}");
    }
    assert_clean(&printed);
}

/// Law 9: it may hold a secret.
#[tokio::test(start_paused = true)]
async fn the_panic_message_of_a_source_is_not_shown() {
    let (printed, guard) = Printed::collect();
    let held = SECRET.to_owned();
    let source = source_fn(move |_| {
        let held = held.clone();
        async move { panic!("{}", held.to_lowercase().replace("canary", "CANARY")) }
    });
    let client = BearerAuthLayer::new(source).layer(api());
    let error = client.oneshot(get()).await.unwrap_err();
    assert!(error.downcast_ref::<TokenError>().unwrap().is_interrupted());
    printed.error(&*error);
    drop(guard);
    assert!(printed.text().contains("the token source panicked"));
    assert_clean(&printed);
}

/// Law 9: not even of settings in the wrong place.
#[test]
fn no_error_of_the_configuration_shows_a_secret() {
    let printed = Printed::default();
    let layer = || BearerAuthLayer::new(source_fn(async |_| TokenResponse::new("token")));
    for origin in [
        "CANARY",
        "https://CANARY@api.example.com",
        "https://a/CANARY",
    ] {
        printed.error(&layer().origins([origin]).unwrap_err());
    }
    let endpoint = Endpoint::new(grant);
    for url in [
        "CANARY",
        "https://a:CANARY@as.example/",
        "http://as.example/CANARY",
    ] {
        let builder = ClientCredentials::builder(url, "client-id").client_secret(SECRET);
        printed.debug(&builder);
        printed.error(&builder.build_with(endpoint.service.clone()).unwrap_err());
    }
    for scope in ["CANARY\n", "CANARY\""] {
        let builder = endpoint.builder(AuthMethod::default()).scope(scope);
        printed.error(&builder.build_with(endpoint.service.clone()).unwrap_err());
    }
    assert_clean(&printed);
}
