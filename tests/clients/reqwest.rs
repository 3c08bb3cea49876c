//! Over a `reqwest::Client`.

use std::{
    convert::Infallible,
    fmt::Debug,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::State,
    routing::{any, post},
};
use bytes::Bytes;
use http::{
    HeaderMap, Method, StatusCode, Uri,
    header::{AUTHORIZATION, LOCATION, WWW_AUTHENTICATE},
};
use http_body::Frame;
use http_body_util::{Full, StreamBody};
use hyper_util::{client::legacy, rt::TokioExecutor};
use reqwest::{Body, Client, Proxy, Request, Response, Url, redirect};
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{self, Sleep},
};
use tower::{
    Layer, Service, ServiceBuilder, ServiceExt, retry::Policy, service_fn, timeout::error::Elapsed,
    util::BoxCloneSyncService,
};
use tower_bearer::{
    BearerAuth, BearerAuthLayer, BoxError, ClientCredentials, CloneBody, CollectBodyLayer,
    CollectedBody, EmptyBody, RefreshPolicy, Replay, TokenCache, TokenError, TokenRequest,
    WithoutToken,
};

use crate::{
    closed, serve,
    support::{INVALID_TOKEN, everything, token_error},
};

/// An authorization server and an API on one port of this machine; clones are one site.
#[derive(Clone)]
struct Site {
    address: SocketAddr,
    tables: Arc<Mutex<Tables>>,
}

#[derive(Default)]
struct Tables {
    /// The scope of each token request.
    asked: Vec<String>,
    /// How many of the next token requests fail.
    failing: usize,
    latency: Duration,
    /// The token that the API refuses.
    revoked: Option<&'static str>,
    arrivals: Vec<Arrival>,
}

/// A request as the API saw it.
#[derive(Clone, Debug, PartialEq)]
struct Arrival {
    path: String,
    token: Option<String>,
    body: Bytes,
}

impl Site {
    async fn start() -> Self {
        let tables = Arc::default();
        let router = Router::new()
            .route("/token", post(grant))
            .route("/{*path}", any(answer))
            .with_state(Arc::clone(&tables));
        let address = serve(router).await;
        Self { address, tables }
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap()
    }

    fn url(&self, path: &str) -> Url {
        format!("http://{}{path}", self.address).parse().unwrap()
    }

    /// A path that redirects to `target`.
    fn redirect_to(&self, target: &Url) -> Url {
        self.url(&format!("/redirect/{target}"))
    }

    fn source(&self) -> ClientCredentials {
        let http = legacy::Client::builder(TokioExecutor::new()).build_http();
        ClientCredentials::builder(self.url("/token"), "client-id")
            .client_secret("client-secret")
            .build_with(http)
            .unwrap()
    }

    fn layer(&self) -> BearerAuthLayer {
        BearerAuthLayer::new(self.source())
    }

    /// How many token requests there were.
    fn asked(&self) -> usize {
        self.lock().asked.len()
    }

    /// The path and the token of each request.
    fn seen(&self) -> Vec<(String, Option<String>)> {
        let arrivals = self.lock().arrivals.clone();
        let seen = arrivals.into_iter().map(|a| (a.path, a.token));
        seen.collect()
    }

    fn tokens(&self) -> Vec<Option<String>> {
        self.seen().into_iter().map(|(_, token)| token).collect()
    }
}

async fn grant(
    State(tables): State<Arc<Mutex<Tables>>>,
    form: String,
) -> (StatusCode, Json<Value>) {
    let (number, fails, latency) = {
        let mut tables = tables.lock().unwrap();
        let scope = form.split('&').find_map(|pair| pair.strip_prefix("scope="));
        tables.asked.push(scope.unwrap_or_default().to_owned());
        let fails = tables.failing > 0;
        tables.failing = tables.failing.saturating_sub(1);
        (tables.asked.len(), fails, tables.latency)
    };
    time::sleep(latency).await;
    if fails {
        return (StatusCode::SERVICE_UNAVAILABLE, Json(Value::Null));
    }
    let token = format!("token-{number}");
    let answer = json!({ "access_token": token, "token_type": "Bearer", "expires_in": 300 });
    (StatusCode::OK, Json(answer))
}

/// Answers with the token of the request.
async fn answer(
    State(tables): State<Arc<Mutex<Tables>>>,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> (StatusCode, HeaderMap, String) {
    let path = uri.path().to_owned();
    let value = headers.get(AUTHORIZATION);
    let token = value.map(|value| value.to_str().unwrap().replace("Bearer ", ""));
    let refused = {
        let mut tables = tables.lock().unwrap();
        tables.arrivals.push(Arrival {
            path: path.clone(),
            token: token.clone(),
            body,
        });
        token.is_some() && token.as_deref() == tables.revoked
    };
    let mut headers = HeaderMap::new();
    if let Some(target) = path.strip_prefix("/redirect/") {
        headers.insert(LOCATION, target.parse().unwrap());
        return (StatusCode::TEMPORARY_REDIRECT, headers, String::new());
    }
    if refused {
        headers.insert(WWW_AUTHENTICATE, INVALID_TOKEN.parse().unwrap());
        return (StatusCode::UNAUTHORIZED, headers, "refused".to_owned());
    }
    if path == "/hang" {
        std::future::pending::<()>().await;
    }
    (StatusCode::OK, headers, token.unwrap_or_default())
}

fn client() -> Client {
    // Whatever the environment says.
    Client::builder().no_proxy().build().unwrap()
}

fn get(url: Url) -> Request {
    Request::new(Method::GET, url)
}

fn put(url: Url, body: impl Into<Body>) -> Request {
    let mut request = Request::new(Method::PUT, url);
    *request.body_mut() = Some(body.into());
    request
}

/// A body that can be read only once.
fn streaming(chunks: [&'static str; 2]) -> Body {
    let frames = chunks.map(|chunk| Ok::<_, Infallible>(Frame::data(Bytes::from(chunk))));
    Body::wrap(StreamBody::new(tokio_stream::iter(frames)))
}

fn own(tokens: &[Option<&str>]) -> Vec<Option<String>> {
    let tokens = tokens.iter();
    tokens.map(|token| token.map(str::to_owned)).collect()
}

/// Law 1.
#[tokio::test]
async fn a_thousand_cold_requests_cause_one_token_request() {
    let site = Site::start().await;
    site.lock().latency = Duration::from_millis(100);
    let api = ServiceBuilder::new()
        .layer(site.layer())
        .concurrency_limit(50)
        .service(client());
    let mut requests = JoinSet::new();
    for _ in 0..1_000 {
        requests.spawn(api.clone().oneshot(get(site.url("/sims"))));
    }
    for response in requests.join_all().await {
        assert_eq!(response.unwrap().text().await.unwrap(), "token-1");
    }
    assert_eq!(site.asked(), 1);
}

/// Law 8.
#[tokio::test]
async fn a_refused_request_is_sent_again_with_its_whole_body() {
    let site = Site::start().await;
    site.lock().revoked = Some("token-1");
    let api = site.layer().replay(CloneBody).layer(client());
    let url = || site.url("/sims/1");
    let body = "x".repeat(100_000);
    let mut request = put(url(), body.clone());
    request.headers_mut().insert("x-key", "1".parse().unwrap());
    let response = api.oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.text().await.unwrap(), "token-2");
    let arrival = |token: &str| Arrival {
        path: "/sims/1".to_owned(),
        token: Some(token.to_owned()),
        body: body.clone().into(),
    };
    assert_eq!(
        site.lock().arrivals,
        [arrival("token-1"), arrival("token-2")]
    );
    assert_eq!(site.asked(), 2);
}

/// Asserts that the refusal comes back, and that the next request has another token.
async fn is_sent_once<R: Replay<Request> + Send + Sync + 'static>(
    replay: R,
    request: impl Fn(Url) -> Request,
) {
    let site = Site::start().await;
    site.lock().revoked = Some("token-1");
    let api = site.layer().replay(replay).layer(client());
    let response = api.clone().oneshot(request(site.url("/a"))).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(response.text().await.unwrap(), "refused");
    assert_eq!(site.tokens(), own(&[Some("token-1")]));
    let response = api.oneshot(request(site.url("/b"))).await.unwrap();
    assert_eq!(response.text().await.unwrap(), "token-2");
    assert_eq!(site.asked(), 2);
}

#[tokio::test]
async fn a_streaming_body_is_sent_once_and_its_token_replaced() {
    let site = Site::start().await;
    let api = site.layer().layer(client());
    let request = put(site.url("/a"), streaming(["first", "second"]));
    api.oneshot(request).await.unwrap();
    assert_eq!(site.lock().arrivals[0].body, "firstsecond");

    let request = |url| put(url, streaming(["first", "second"]));
    is_sent_once(CloneBody, request).await;
    is_sent_once(EmptyBody, request).await;
}

#[tokio::test]
async fn a_request_is_sent_once_by_default() {
    is_sent_once(tower_bearer::Never, get).await;
}

#[tokio::test]
async fn only_an_empty_body_is_sent_again() {
    let site = Site::start().await;
    site.lock().revoked = Some("token-1");
    let api = site.layer().replay(EmptyBody).layer(client());
    let response = api.oneshot(get(site.url("/a"))).await.unwrap();
    assert_eq!(response.text().await.unwrap(), "token-2");
    assert_eq!(site.tokens(), own(&[Some("token-1"), Some("token-2")]));

    is_sent_once(EmptyBody, |url| put(url, "body")).await;
}

/// Law 9.
#[tokio::test]
async fn plain_http_to_another_machine_is_refused_before_it_is_sent() {
    let site = Site::start().await;
    // It would arrive if sent.
    let client = Client::builder()
        .no_proxy()
        .resolve("api.example.com", site.address)
        .build()
        .unwrap();
    let mut url = site.url("/sims");
    url.set_host(Some("api.example.com")).unwrap();
    let api = site.layer().layer(client.clone());
    let error = api.oneshot(get(url.clone())).await.unwrap_err();
    assert!(token_error(&error).is_insecure_uri());
    assert_eq!((site.asked(), site.seen().len()), (0, 0));

    let api = site.layer().dangerous_plain_http(true).layer(client);
    api.oneshot(get(url)).await.unwrap();
    assert_eq!(site.tokens(), own(&[Some("token-1")]));
}

/// As the guide builds it, but for where the proxy comes from.
#[tokio::test]
async fn token_requests_go_through_the_proxy_of_their_client() {
    let source = |proxy: Url| {
        let client = Client::builder()
            .redirect(redirect::Policy::none())
            .pool_max_idle_per_host(0)
            .proxy(Proxy::http(proxy).unwrap());
        let client = client.build().unwrap();
        let client = service_fn(move |request: http::Request<Full<Bytes>>| {
            let client = client.clone();
            async move {
                let request = request.map(Body::wrap).try_into()?;
                client.execute(request).await.map(http::Response::from)
            }
        });
        // Only the proxy can be reached.
        ClientCredentials::builder("http://localhost:1/token", "client-id")
            .client_secret("client-secret")
            .scope("sims")
            .build_with(client)
            .unwrap()
    };
    let proxy = Site::start().await;
    let cache = TokenCache::new(source(proxy.url("/")));
    assert_eq!(cache.get().await.unwrap().expose_secret(), "token-1");
    assert_eq!(proxy.lock().asked, ["sims"]);

    let mut gone = proxy.url("/");
    gone.set_port(Some(closed().await.port())).unwrap();
    let error = TokenCache::new(source(gone)).get().await.unwrap_err();
    assert!(error.is_transport() && error.is_transient(), "{error}");
}

/// A proxy is below the layer: the documentation says so, and what to do.
#[tokio::test]
async fn a_proxy_reads_the_token_of_a_plain_request_to_loopback() {
    let (site, proxy) = (Site::start().await, Site::start().await);
    let through = Proxy::http(proxy.url("/")).unwrap();
    let client = Client::builder().proxy(through);
    for (client, tokens) in [
        (client.build().unwrap(), [0, 1]),
        (Client::builder().no_proxy().build().unwrap(), [1, 1]),
    ] {
        let api = site.layer().layer(client);
        api.oneshot(get(site.url("/a"))).await.unwrap();
        assert_eq!([site.tokens().len(), proxy.tokens().len()], tokens);
    }
    assert_eq!(proxy.tokens(), own(&[Some("token-1")]));
}

/// Law 9.
#[tokio::test]
async fn an_origin_that_is_not_pinned_gets_no_token() {
    let (site, foreign) = (Site::start().await, Site::start().await);
    let origin = site.url("/").origin().ascii_serialization();
    let layer = site.layer().origins([origin]).unwrap();
    let api = layer.layer(client());
    api.clone().oneshot(get(foreign.url("/a"))).await.unwrap();
    assert_eq!((site.asked(), foreign.tokens()), (0, own(&[None])));
    api.oneshot(get(site.url("/a"))).await.unwrap();
    assert_eq!(site.tokens(), own(&[Some("token-1")]));
}

/// reqwest follows redirects below the layer, and removes the token at the first hop to another origin.
#[tokio::test]
async fn a_redirect_to_a_foreign_origin_carries_no_token() {
    let (site, foreign) = (Site::start().await, Site::start().await);
    let api = site.layer().layer(client());
    let near = site.redirect_to(&site.url("/near"));
    let far = site.redirect_to(&foreign.url("/far"));
    api.clone().oneshot(get(near)).await.unwrap();
    assert_eq!(site.tokens(), own(&[Some("token-1"), Some("token-1")]));
    api.oneshot(get(far)).await.unwrap();
    assert_eq!(foreign.tokens(), own(&[None]));
}

/// The layer's documentation warns of it: reqwest adds the token again at the second hop.
#[tokio::test]
async fn a_second_redirect_by_a_foreign_origin_carries_the_token_unless_the_policy_forbids_it() {
    let (site, foreign) = (Site::start().await, Site::start().await);
    let url = site.redirect_to(&foreign.redirect_to(&foreign.url("/far")));
    let api = site.layer().layer(client());
    api.oneshot(get(url.clone())).await.unwrap();
    assert_eq!(foreign.tokens(), own(&[None, Some("token-1")]));

    foreign.lock().arrivals.clear();
    let near = site.redirect_to(&site.url("/near"));
    let same_origin = redirect::Policy::custom(|attempt| {
        let origin = attempt.previous().first().map(Url::origin);
        match origin == Some(attempt.url().origin()) {
            true if attempt.previous().len() < 10 => attempt.follow(),
            _ => attempt.stop(),
        }
    });
    let client = Client::builder()
        .no_proxy()
        .redirect(same_origin)
        .build()
        .unwrap();
    let api = site.layer().layer(client);
    let response = api.clone().oneshot(get(url)).await.unwrap();
    assert_eq!(response.status(), StatusCode::TEMPORARY_REDIRECT);
    assert_eq!(foreign.seen(), []);
    let response = api.oneshot(get(near)).await.unwrap();
    assert_eq!(response.text().await.unwrap(), "token-2");
}

/// A `reqwest::Request` has no readable extensions, but an `http::Request` above has.
#[tokio::test]
async fn an_http_request_above_says_what_its_token_is_for() {
    let site = Site::start().await;
    let api = ServiceBuilder::new()
        .layer(site.layer().replay(CloneBody))
        .filter(|request: http::Request<Bytes>| Request::try_from(request))
        .service(client());
    let request = || http::Request::put(site.url("/a").as_str());
    let of = |scope| TokenRequest::new().scope(scope);
    let read = request().extension(of("read"));
    let write = request().extension(of("write"));
    let again = request().extension(of("read"));
    let bare = request().extension(WithoutToken);
    for request in [read, write, again, bare] {
        let request = request.body(Bytes::from("body")).unwrap();
        api.clone().oneshot(request).await.unwrap();
    }
    let (first, second) = (Some("token-1"), Some("token-2"));
    assert_eq!(site.tokens(), own(&[first, second, first, None]));
    assert_eq!(site.lock().asked, ["read", "write"]);

    // A refusal replaces the token of its scope.
    site.lock().revoked = Some("token-2");
    let request = request().extension(of("write"));
    let request = request.body(Bytes::from("body")).unwrap();
    let response = api.oneshot(request).await.unwrap();
    assert_eq!(response.text().await.unwrap(), "token-3");
    assert_eq!(site.lock().asked, ["read", "write", "write"]);
    let arrivals = &site.lock().arrivals;
    assert!(arrivals.iter().all(|arrival| arrival.body == "body"));
}

/// Law 8: above, where requests are `http`'s, it can be read first.
#[tokio::test]
async fn a_collected_streaming_body_is_sent_again() {
    let site = Site::start().await;
    site.lock().revoked = Some("token-1");
    let api = ServiceBuilder::new()
        .layer(CollectBodyLayer::new(1_024))
        .layer(site.layer().replay(CloneBody))
        .filter(|request: http::Request<CollectedBody<Body>>| {
            Request::try_from(request.map(Body::wrap))
        })
        .service(client());
    let request = http::Request::put(site.url("/a").as_str());
    let request = request.body(streaming(["first", "second"])).unwrap();
    let response = api.oneshot(request).await.unwrap();
    assert_eq!(response.text().await.unwrap(), "token-2");
    let bodies = site.lock().arrivals.clone().into_iter().map(|a| a.body);
    assert!(bodies.eq(["firstsecond"; 2]));
}

#[tokio::test]
async fn errors_of_reqwest_pass_through() {
    let site = Site::start().await;
    let api = site.layer().layer(client());
    let mut hanging = get(site.url("/hang"));
    *hanging.timeout_mut() = Some(Duration::from_millis(50));
    let error = api.clone().oneshot(hanging).await.unwrap_err();
    assert!(error.downcast_ref::<reqwest::Error>().unwrap().is_timeout());

    let url = format!("http://{}/", closed().await).parse().unwrap();
    let error = api.clone().oneshot(get(url)).await.unwrap_err();
    assert!(error.downcast_ref::<reqwest::Error>().unwrap().is_connect());

    // The layer does not judge it: reqwest has no such requests.
    let error = api.oneshot(get("data:text/plain,a".parse().unwrap())).await;
    let error = error.unwrap_err();
    assert!(error.downcast_ref::<reqwest::Error>().unwrap().is_builder());
}

/// This URL is too long for an `http::Uri`: no token helps.
#[tokio::test]
async fn a_url_that_cannot_be_sent_waits_for_no_token() {
    let site = Site::start().await;
    let url = format!("https://api.example.com/{}", "a".repeat(70_000));
    let error = site
        .layer()
        .layer(client())
        .oneshot(get(url.parse().unwrap()));
    let error = error.await.unwrap_err();
    assert!(error.is::<reqwest::Error>(), "{error:?}");
    assert_eq!(site.asked(), 0);
}

/// reqwest's timeout starts anew with each send.
#[tokio::test]
async fn the_timeout_of_a_request_excludes_the_wait_for_a_token() {
    let send = async |path| {
        let site = Site::start().await;
        site.lock().latency = Duration::from_millis(700);
        site.lock().revoked = Some("token-1");
        let mut request = get(site.url(path));
        *request.timeout_mut() = Some(Duration::from_millis(500));
        let api = site.layer().replay(CloneBody).layer(client());
        let result = time::timeout(Duration::from_secs(10), api.oneshot(request)).await;
        assert_eq!(site.tokens(), own(&[Some("token-1"), Some("token-2")]));
        result.unwrap()
    };
    let response = send("/a").await.unwrap();
    assert_eq!(response.text().await.unwrap(), "token-2");
    // The copy has the timeout too.
    let error = send("/hang").await.unwrap_err();
    assert!(error.downcast_ref::<reqwest::Error>().unwrap().is_timeout());
}

/// Tries once more after a token failure that may pass.
#[derive(Clone)]
struct OnceMore {
    tried: bool,
}

impl Policy<Request, Response, BoxError> for OnceMore {
    type Future = Sleep;

    fn retry(&mut self, _: &mut Request, result: &mut Result<Response, BoxError>) -> Option<Sleep> {
        let error = result.as_ref().err()?.downcast_ref::<TokenError>()?;
        let again = error.is_transient() && !std::mem::replace(&mut self.tried, true);
        let pause = error.retry_after().unwrap_or(Duration::from_secs(1));
        again.then(|| time::sleep(pause.mul_f64(1.1)))
    }

    fn clone_request(&mut self, request: &Request) -> Option<Request> {
        request.try_clone()
    }
}

#[tokio::test]
async fn the_layer_works_boxed_between_a_retry_and_timeouts() {
    let site = Site::start().await;
    let cache = TokenCache::with_policy(site.source(), RefreshPolicy::new().attempts(1));
    let api = ServiceBuilder::new()
        .timeout(Duration::from_secs(10))
        .retry(OnceMore { tried: false })
        .layer(BearerAuthLayer::new(cache))
        .timeout(Duration::from_millis(500))
        .service(client());
    let mut api: BoxCloneSyncService<Request, Response, BoxError> = BoxCloneSyncService::new(api);
    site.lock().failing = 1;
    let ready = api.ready().await.unwrap();
    let response = ready.call(put(site.url("/a"), "body")).await.unwrap();
    assert_eq!(response.text().await.unwrap(), "token-2");
    assert_eq!(site.asked(), 2);

    let ready = api.ready().await.unwrap();
    let error = ready.call(get(site.url("/hang"))).await.unwrap_err();
    assert!(error.is::<Elapsed>());
}

/// Law 9.
#[tokio::test]
async fn nothing_shows_a_token_or_secret() {
    let site = Site::start().await;
    let shown = Arc::new(Mutex::new(String::new()));
    let show = |what: &dyn Debug| *shown.lock().unwrap() += &format!("{what:?} {what:#?}\n");
    let log = Arc::clone(&shown);
    let mut api: BearerAuth<_, _> = ServiceBuilder::new()
        .layer(site.layer().replay(CloneBody))
        .map_request(move |request: Request| {
            *log.lock().unwrap() += &format!("{request:?} {request:#?}\n");
            request
        })
        .service(client());
    let future = api.call(get(site.url("/a")));
    show(&future);
    show(&future.await.unwrap());
    site.lock().revoked = Some("token-1");
    show(&api.call(put(site.url("/a"), "body")).await.unwrap());
    let mut hanging = get(site.url("/hang"));
    *hanging.timeout_mut() = Some(Duration::from_millis(50));
    let error = api.call(hanging).await.unwrap_err();
    *shown.lock().unwrap() += &everything(&*error);
    show(api.cache());
    assert_eq!(site.tokens().last(), Some(&Some("token-2".to_owned())));
    let shown = shown.lock().unwrap();
    for secret in ["token-1", "token-2", "client-secret"] {
        assert!(!shown.contains(secret), "{secret}: {shown}");
    }
    assert!(shown.contains("authorization") && shown.contains("ResponseFuture"));
}
