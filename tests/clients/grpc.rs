//! tonic: the layer as the transport of a client, over a `Channel`.

use std::{
    collections::HashSet,
    error::Error,
    net::SocketAddr,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    time::Duration,
};

use http::{StatusCode, header::AUTHORIZATION};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_stream::{
    Stream, StreamExt,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{
    Code, Request, Status,
    body::Body,
    metadata::MetadataMap,
    service::interceptor::{InterceptedService, InterceptorLayer},
    transport::{Channel, Endpoint, Server},
};
use tower::{
    BoxError, ServiceBuilder, service_fn, timeout::error::Elapsed, util::BoxCloneSyncService,
};
use tower_bearer::{
    BearerAuth, BearerAuthLayer, CloneBody, CollectBodyLayer, CollectedBody, EmptyBody, Never,
    TokenCache, TokenError, TokenRequest, WithoutToken,
};

use crate::{
    closed,
    echo::{EchoClient, EchoServer},
    serve,
    support::{Answer, AuthServer, INVALID_TOKEN, until},
};

/// A gRPC API that knows which tokens it refuses, and remembers the calls. Clones are one API.
#[derive(Clone)]
struct Api {
    address: SocketAddr,
    tables: Arc<Mutex<Tables>>,
}

#[derive(Default)]
struct Tables {
    refused: HashSet<&'static str>,
    /// Whether its refusals say why.
    explains: bool,
    seen: Vec<String>,
}

impl Api {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api = Self {
            address: listener.local_addr().unwrap(),
            tables: Arc::default(),
        };
        let tables = Arc::clone(&api.tables);
        let echo =
            EchoServer::new(move |metadata: &MetadataMap| tables.lock().unwrap().admit(metadata));
        tokio::spawn(async move {
            Server::builder()
                .add_service(echo)
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
        });
        api
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint::from_shared(format!("http://{}", self.address)).unwrap()
    }

    fn channel(&self) -> Channel {
        self.endpoint().connect_lazy()
    }

    /// A client whose calls can be replayed, since their messages are collected first.
    fn collecting_client(
        &self,
        auth: &AuthServer,
    ) -> EchoClient<BoxCloneSyncService<http::Request<Body>, http::Response<Body>, BoxError>> {
        let channel = ServiceBuilder::new()
            .layer(CollectBodyLayer::new(1 << 16))
            .layer(BearerAuthLayer::new(auth.clone()).replay(CloneBody))
            .map_request(|request: http::Request<CollectedBody<Body>>| request.map(Body::new))
            .service(self.channel());
        EchoClient::new(BoxCloneSyncService::new(channel))
    }

    /// A client whose calls are sent once, and the cache of its tokens.
    fn client(&self, auth: &AuthServer) -> (EchoClient<BearerAuth<Channel, Never>>, TokenCache) {
        let layer = BearerAuthLayer::new(auth.clone());
        let cache = layer.cache().clone();
        let channel = ServiceBuilder::new().layer(layer).service(self.channel());
        (EchoClient::new(channel), cache)
    }

    /// Refuses this token from now on, even in the middle of a stream.
    fn refuse(&self, token: &'static str) {
        self.tables.lock().unwrap().refused.insert(token);
    }

    /// Has its refusals carry the challenge of a 401 from now on.
    fn explain(&self) {
        self.tables.lock().unwrap().explains = true;
    }

    /// The tokens sent, in order, one more for each message of a chat.
    fn seen(&self) -> Vec<String> {
        self.tables.lock().unwrap().seen.clone()
    }
}

impl Tables {
    fn admit(&mut self, metadata: &MetadataMap) -> Result<(), Status> {
        let credential = metadata.get("authorization");
        let credential = credential.map_or("anonymous", |value| value.to_str().unwrap());
        let token = credential.strip_prefix("Bearer ").unwrap_or(credential);
        self.seen.push(token.to_owned());
        if !self.refused.contains(token) {
            return Ok(());
        }
        let mut status = Status::unauthenticated("the token is no longer valid");
        if self.explains {
            let challenge = INVALID_TOKEN.parse().unwrap();
            status.metadata_mut().insert("www-authenticate", challenge);
        }
        Err(status)
    }
}

/// The token failure that must be this status' source.
fn token_error(status: &Status) -> &TokenError {
    status.source().unwrap().downcast_ref().unwrap()
}

fn text(text: &str) -> String {
    text.to_owned()
}

/// The two ends of a stream of messages.
fn messages() -> (
    mpsc::Sender<String>,
    impl Stream<Item = String> + Send + 'static,
) {
    let (sender, receiver) = mpsc::channel(8);
    (sender, ReceiverStream::new(receiver))
}

/// Waits for a token that is not this one.
async fn another_token(cache: &TokenCache, token: &str) {
    until(|| {
        cache
            .peek()
            .is_some_and(|current| current.expose_secret() != token)
    })
    .await;
}

#[tokio::test]
async fn every_kind_of_call_carries_the_token() {
    let api = Api::start().await;
    let auth = AuthServer::new();
    let (mut client, _) = api.client(&auth);

    assert_eq!(client.say(text("one")).await.unwrap().into_inner(), "one");

    let letters = client.spell(text("two")).await.unwrap().into_inner();
    let letters: Vec<_> = letters.collect::<Result<_, _>>().await.unwrap();
    assert_eq!(letters, ["t", "w", "o"]);

    let parts = tokio_stream::iter([text("th"), text("ree")]);
    assert_eq!(client.join(parts).await.unwrap().into_inner(), "three");

    let (sender, receiver) = messages();
    sender.send(text("fo")).await.unwrap();
    let mut answers = client.chat(receiver).await.unwrap().into_inner();
    assert_eq!(answers.message().await.unwrap().unwrap(), "fo");
    sender.send(text("ur")).await.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap(), "ur");
    drop(sender);
    assert_eq!(answers.message().await.unwrap(), None);

    // One for each call, and for each message of the chat.
    assert_eq!(api.seen(), ["token-1"; 6]);
    assert_eq!(auth.requests(), 1);
}

/// A status gives no reason, so other calls keep the token until there is another.
#[tokio::test]
async fn a_refusal_by_status_replaces_the_token_once_for_all_calls() {
    let api = Api::start().await;
    let auth = AuthServer::new();
    let (mut client, cache) = api.client(&auth);
    client.say(text("hello")).await.unwrap();

    api.refuse("token-1");
    auth.hold();
    let calls: Vec<_> = (0..20)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { client.say(text("hello")).await })
        })
        .collect();
    for call in calls {
        // A message is sent once: the caller gets the API's own answer.
        let status = call.await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated);
        assert_eq!(status.message(), "the token is no longer valid");
    }
    auth.release();
    another_token(&cache, "token-1").await;

    client.say(text("hello")).await.unwrap();
    assert_eq!(api.seen().last().unwrap(), "token-2");
    assert_eq!(auth.requests(), 2);
}

/// A retry helps before the replacement comes only if the caller reports the refusal.
#[tokio::test]
async fn a_caller_that_reports_the_refusal_finds_another_token_at_once() {
    let api = Api::start().await;
    let auth = AuthServer::new();
    let (mut client, cache) = api.client(&auth);
    client.say(text("hello")).await.unwrap();
    api.refuse("token-1");
    auth.hold();

    let sent = cache.peek().unwrap();
    for _ in 0..2 {
        client.say(text("hello")).await.unwrap_err();
        assert_eq!(api.seen().last().unwrap(), "token-1");
        // The replacement is under way, and there is no other token yet.
        until(|| auth.requests() == 2).await;
    }
    cache.invalidate(&sent);
    let (answer, ()) = tokio::join!(client.say(text("hello")), async {
        tokio::task::yield_now().await;
        auth.release();
    });
    answer.unwrap();
    assert_eq!(api.seen().last().unwrap(), "token-2");
    assert_eq!(auth.requests(), 2);
}

/// The API gives the reason, so no caller has to report the refusal.
#[tokio::test]
async fn after_a_refusal_with_a_challenge_calls_wait() {
    let api = Api::start().await;
    let auth = AuthServer::new();
    let (mut client, _) = api.client(&auth);
    client.say(text("hello")).await.unwrap();
    api.explain();
    api.refuse("token-1");
    auth.hold();

    client.say(text("hello")).await.unwrap_err();
    until(|| auth.requests() == 2).await;
    let (answer, ()) = tokio::join!(client.say(text("hello")), async {
        tokio::task::yield_now().await;
        auth.release();
    });
    answer.unwrap();
    assert_eq!(api.seen(), ["token-1", "token-1", "token-2"]);
}

/// As from a gateway in front of the API.
#[tokio::test]
async fn a_401_in_place_of_a_grpc_answer_replaces_the_token() {
    let app = axum::Router::new().fallback(|headers: http::HeaderMap| async move {
        match headers[AUTHORIZATION] == "Bearer token-1" {
            true => (
                StatusCode::UNAUTHORIZED,
                [("www-authenticate", r#"Bearer error="invalid_token""#)],
            ),
            false => (StatusCode::FORBIDDEN, [("x-seen", "token-2")]),
        }
    });
    let endpoint = format!("http://{}", serve(app).await);
    let auth = AuthServer::new();
    let channel = Endpoint::from_shared(endpoint).unwrap().connect_lazy();
    let channel = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(auth.clone()))
        .service(channel);
    let mut client = EchoClient::new(channel);

    let status = client.say(text("hello")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    // The token was named invalid, so the next call waits for another.
    let status = client.say(text("hello")).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert_eq!(status.metadata().get("x-seen").unwrap(), "token-2");
    assert_eq!(auth.requests(), 2);
}

/// tonic encodes a body as it is sent, without a clone, and even an empty message has a frame.
#[tokio::test]
async fn empty_body_replays_no_call() {
    let api = Api::start().await;
    api.refuse("token-1");
    let auth = AuthServer::new();
    let layer = BearerAuthLayer::new(auth.clone()).replay(EmptyBody);
    let cache = layer.cache().clone();
    let channel = ServiceBuilder::new().layer(layer).service(api.channel());
    let mut client = EchoClient::new(channel);

    let status = client.say(String::new()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert_eq!(api.seen(), ["token-1"]);
    another_token(&cache, "token-1").await;
    client.say(String::new()).await.unwrap();
}

/// A layer above collects them.
#[tokio::test]
async fn a_call_whose_messages_are_collected_is_replayed() {
    let api = Api::start().await;
    api.refuse("token-1");
    let auth = AuthServer::new();
    let mut client = api.collecting_client(&auth);

    assert_eq!(
        client.say(text("hello")).await.unwrap().into_inner(),
        "hello"
    );
    assert_eq!(api.seen(), ["token-1", "token-2"]);
    assert_eq!(auth.requests(), 2);
}

/// Its request is one message, which ends.
#[tokio::test]
async fn a_call_answered_by_a_stream_is_replayed_too() {
    let api = Api::start().await;
    api.refuse("token-1");
    let auth = AuthServer::new();
    let mut client = api.collecting_client(&auth);

    let letters = client.spell(text("two")).await.unwrap().into_inner();
    let letters: Vec<_> = letters.collect::<Result<_, _>>().await.unwrap();
    assert_eq!(letters, ["t", "w", "o"]);
    assert_eq!(api.seen(), ["token-1", "token-2"]);
    assert_eq!(auth.requests(), 2);
}

/// The layer reads no bodies, and trailers are part of them.
#[tokio::test]
async fn the_caller_reports_a_refusal_at_the_end_of_a_stream() {
    let api = Api::start().await;
    let auth = AuthServer::new();
    let (mut client, cache) = api.client(&auth);
    let (sender, receiver) = messages();
    sender.send(text("one")).await.unwrap();
    let mut answers = client.chat(receiver).await.unwrap().into_inner();
    assert_eq!(answers.message().await.unwrap().unwrap(), "one");
    let sent = cache.peek().unwrap();

    api.refuse("token-1");
    sender.send(text("two")).await.unwrap();
    let status = answers.message().await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert_eq!(cache.peek().unwrap().expose_secret(), "token-1");
    assert_eq!(auth.requests(), 1);

    cache.invalidate(&sent);
    client.say(text("three")).await.unwrap();
    assert_eq!(api.seen().last().unwrap(), "token-2");
    assert_eq!(auth.requests(), 2);
}

/// Law 10: a channel has a buffer.
#[tokio::test]
async fn a_call_that_waits_for_a_token_holds_no_place_in_the_channel() {
    let api = Api::start().await;
    let auth = AuthServer::new();
    auth.hold();
    let channel = api.endpoint().buffer_size(1).connect_lazy();
    let layered = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(auth.clone()))
        .service(channel.clone());
    let waiting: Vec<_> = (0..5)
        .map(|_| {
            let mut client = EchoClient::new(layered.clone());
            tokio::spawn(async move { client.say(text("waited")).await })
        })
        .collect();
    until(|| auth.requests() == 1).await;

    let mut bare = EchoClient::new(channel);
    let answer = tokio::time::timeout(Duration::from_secs(5), bare.say(text("passed"))).await;
    answer.expect("there is a place").unwrap();
    assert_eq!(api.seen(), ["anonymous"]);
    auth.release();
    for call in waiting {
        assert_eq!(call.await.unwrap().unwrap().into_inner(), "waited");
    }
    assert_eq!(auth.requests(), 1);
}

/// The channel keeps it, anew for each send.
#[tokio::test]
async fn a_calls_deadline_excludes_the_wait_for_a_token() {
    let api = Api::start().await;
    api.refuse("token-1");
    let auth = AuthServer::new();
    auth.set_latency(Duration::from_millis(700));
    let mut client = api.collecting_client(&auth);
    let mut request = Request::new(text("hello"));
    request.set_timeout(Duration::from_millis(500));
    client.say(request).await.unwrap();
    assert_eq!(api.seen(), ["token-1", "token-2"]);
}

/// It covers the whole call.
#[tokio::test]
async fn a_timeout_above_covers_a_calls_wait_for_a_token() {
    let api = Api::start().await;
    let auth = AuthServer::new();
    auth.hold();
    let channel = ServiceBuilder::new()
        .map_err(to_status)
        .timeout(Duration::from_millis(100))
        .layer(BearerAuthLayer::new(auth))
        .service(api.channel());
    let call = EchoClient::new(channel).say(text("hello")).await;
    assert_eq!(call.unwrap_err().code(), Code::DeadlineExceeded);
    assert!(api.seen().is_empty());
}

/// A call's extensions are those of its request.
#[tokio::test]
async fn a_call_says_what_its_token_is_for() {
    let api = Api::start().await;
    let auth = AuthServer::new();
    let (mut client, cache) = api.client(&auth);
    let scope = TokenRequest::new().scope("sims:write");
    let mut request = Request::new(text("hello"));
    request.extensions_mut().insert(scope.clone());
    client.say(request).await.unwrap();
    let token = cache.peek_for(&scope).unwrap();
    assert_eq!(token.expose_secret(), "token-sims:write-1");
    assert!(cache.peek().is_none());

    let mut request = Request::new(text("hello"));
    request.extensions_mut().insert(WithoutToken);
    client.say(request).await.unwrap();
    assert_eq!(api.seen(), ["token-sims:write-1", "anonymous"]);
}

#[tokio::test]
async fn the_callers_authorization_is_kept_only_if_configured() {
    let api = Api::start().await;
    let auth = AuthServer::new();
    for (keep, token) in [(false, "token-1"), (true, "own")] {
        let layer = BearerAuthLayer::new(auth.clone()).keep_existing(keep);
        let channel = ServiceBuilder::new().layer(layer).service(api.channel());
        let mut request = Request::new(text("hello"));
        let own = "Bearer own".parse().unwrap();
        request.metadata_mut().insert("authorization", own);
        EchoClient::new(channel).say(request).await.unwrap();
        assert_eq!(api.seen().last().unwrap(), token);
    }
}

/// Law 9: the channel names the origin, below the layer.
#[tokio::test]
async fn the_layer_does_not_see_a_channels_address_unless_the_client_names_it() {
    let api = Api::start().await;
    let auth = AuthServer::new();
    let address = api.address;
    let channel = Endpoint::from_static("http://api.example.com").connect_with_connector_lazy(
        service_fn(move |_| async move { TcpStream::connect(address).await.map(TokioIo::new) }),
    );
    let origin = || http::Uri::from_static("http://api.example.com");

    let layer = BearerAuthLayer::new(auth.clone());
    let service = ServiceBuilder::new()
        .layer(layer.clone())
        .service(channel.clone());
    // The token goes over plain http, which the layer would refuse if it saw it.
    EchoClient::new(service.clone())
        .say(text("hello"))
        .await
        .unwrap();
    assert_eq!(api.seen(), ["token-1"]);

    let mut client = EchoClient::with_origin(service, origin());
    let status = client.say(text("hello")).await.unwrap_err();
    let error = token_error(&status);
    assert!(error.is_insecure_uri());
    assert_eq!(api.seen().len(), 1);

    let pinned = layer.origins(["https://api.example.com"]).unwrap();
    let service = ServiceBuilder::new().layer(pinned).service(channel);
    let mut client = EchoClient::with_origin(service, origin());
    client.say(text("hello")).await.unwrap();
    assert_eq!(api.seen(), ["token-1", "anonymous"]);
}

/// It may, even over plain http.
#[tokio::test]
async fn a_loopback_origin_that_the_client_names_carries_the_token() {
    let api = Api::start().await;
    let auth = AuthServer::new();
    let origin: http::Uri = format!("http://{}", api.address).parse().unwrap();
    let channel = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(auth))
        .service(api.channel());
    let mut client = EchoClient::with_origin(channel, origin);
    client.say(text("hello")).await.unwrap();
    assert_eq!(api.seen(), ["token-1"]);
}

/// This is tonic's own mapping.
#[cfg(feature = "rustls")]
#[tokio::test]
async fn a_token_failure_is_an_unknown_status_with_the_error_for_its_source() {
    let api = Api::start().await;
    let token_url = format!("http://{}/token", closed().await);
    let source = tower_bearer::ClientCredentials::builder(token_url, "id")
        .client_secret("secret")
        .build()
        .unwrap();
    let channel = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(source))
        .service(api.channel());

    let status = EchoClient::new(channel)
        .say(text("hello"))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unknown);
    assert_eq!(
        status.message(),
        "the token endpoint could not be reached (connection refused)"
    );
    let error = token_error(&status);
    assert!(error.is_transport());
    assert!(api.seen().is_empty());
}

/// tonic searches an error's sources for a status, and this one is not the API's.
#[tokio::test]
async fn a_status_in_the_sources_of_a_token_failure_becomes_the_calls() {
    let api = Api::start().await;
    let auth = AuthServer::new();
    let refusal = Status::permission_denied("the token service says no");
    auth.set(Answer::Fail(TokenError::terminal(refusal)));
    let (mut client, _) = api.client(&auth);
    let status = client.say(text("hello")).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert_eq!(status.message(), "the token service says no");
    assert!(status.source().unwrap().is::<TokenError>());
}

/// What gRPC's own credentials report: that a retry may help, or that the caller is not authenticated.
fn to_status(error: BoxError) -> Status {
    match error.downcast::<TokenError>() {
        Ok(error) => {
            let text = error.to_string();
            let mut status = match error.is_transient() {
                true => Status::unavailable(text),
                false => Status::unauthenticated(text),
            };
            status.set_source(Arc::new(*error));
            status
        }
        Err(error) if error.is::<Elapsed>() => Status::deadline_exceeded(error.to_string()),
        Err(error) => Status::from_error(error),
    }
}

#[tokio::test]
async fn a_mapped_token_failure_tells_whether_a_retry_may_help() {
    let api = Api::start().await;
    let pause = Some(Duration::from_secs(7));
    let busy = TokenError::transient("busy").with_retry_after(Duration::from_secs(7));
    let refused = TokenError::terminal(Status::permission_denied("no"));
    for (error, code, pause) in [
        (busy, Code::Unavailable, pause),
        (refused, Code::Unauthenticated, None),
    ] {
        let auth = AuthServer::new();
        auth.set(Answer::Fail(error));
        let channel = ServiceBuilder::new()
            .map_err(to_status)
            .layer(BearerAuthLayer::new(auth))
            .service(api.channel());
        let status = EchoClient::new(channel)
            .say(text("hello"))
            .await
            .unwrap_err();
        assert_eq!(status.code(), code);
        assert_eq!(status.message(), "the token source failed");
        let found = token_error(&status);
        assert_eq!(found.retry_after(), pause);
    }
}

/// The mapping keeps the channel's statuses.
#[tokio::test]
async fn an_api_that_is_down_is_unavailable_with_and_without_the_mapping() {
    let channel = Endpoint::from_shared(format!("http://{}", closed().await))
        .unwrap()
        .connect_lazy();
    let layer = BearerAuthLayer::new(AuthServer::new());
    let plain = ServiceBuilder::new()
        .layer(layer.clone())
        .service(channel.clone());
    let mapped = ServiceBuilder::new()
        .map_err(to_status)
        .layer(layer)
        .service(channel);
    let status = EchoClient::new(plain).say(text("hello")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let status = EchoClient::new(mapped)
        .say(text("hello"))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
}

/// An interceptor cannot wait, but it can start a token request, which goes on without it.
fn intercept(cache: TokenCache) -> impl FnMut(Request<()>) -> Result<Request<()>, Status> + Clone {
    move |mut request| {
        let asked = std::pin::pin!(cache.get()).poll(&mut Context::from_waker(Waker::noop()));
        match asked {
            Poll::Ready(Ok(token)) => {
                let headers = request.metadata_mut().as_mut();
                headers.insert(AUTHORIZATION, token.header_value().clone());
                Ok(request)
            }
            Poll::Ready(Err(error)) => Err(to_status(error.into())),
            Poll::Pending => Err(Status::unavailable("there is no token yet")),
        }
    }
}

#[tokio::test]
async fn an_interceptor_takes_its_token_from_the_cache() {
    let api = Api::start().await;
    let auth = AuthServer::new();
    let cache = TokenCache::new(auth.clone());
    let channel = InterceptedService::new(api.channel(), intercept(cache.clone()));
    let mut client = EchoClient::new(channel);

    // The first call comes too early, unless somebody waited for the token before.
    let status = client.say(text("hello")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(api.seen().is_empty());
    let sent = cache.get().await.unwrap();
    client.say(text("hello")).await.unwrap();
    assert_eq!(auth.requests(), 1);

    // An interceptor sees no answers: the caller reports the refusal and waits.
    api.refuse("token-1");
    client.say(text("hello")).await.unwrap_err();
    cache.invalidate(&sent);
    cache.get().await.unwrap();
    client.say(text("hello")).await.unwrap();
    assert_eq!(api.seen(), ["token-1", "token-1", "token-2"]);
}

/// An interceptor refuses with headers only, like the API.
#[tokio::test]
async fn a_refusal_of_an_interceptor_below_counts_against_the_token() {
    let api = Api::start().await;
    let refuse = |_: Request<()>| Err(Status::unauthenticated("not you"));
    let intercept = InterceptorLayer::new(refuse);

    let auth = AuthServer::new();
    let above = ServiceBuilder::new()
        .layer(intercept)
        .layer(BearerAuthLayer::new(auth.clone()))
        .service(api.channel());
    let status = EchoClient::new(above).say(text("hello")).await;
    assert_eq!(status.unwrap_err().message(), "not you");
    assert_eq!(auth.requests(), 0);

    let below = ServiceBuilder::new()
        .layer(BearerAuthLayer::new(auth.clone()))
        .layer(intercept)
        .service(api.channel());
    let status = EchoClient::new(below).say(text("hello")).await;
    assert_eq!(status.unwrap_err().message(), "not you");
    until(|| auth.requests() == 2).await;
    assert!(api.seen().is_empty());
}

/// Its metadata holds it, and here one can wait for it.
#[tokio::test]
async fn a_call_may_bring_its_token() {
    let api = Api::start().await;
    let cache = TokenCache::new(AuthServer::new());
    let mut request = Request::new(text("hello"));
    let token = cache.get().await.unwrap();
    let headers = request.metadata_mut().as_mut();
    headers.insert(AUTHORIZATION, token.header_value().clone());
    assert!(!format!("{request:?}").contains("token-1"));
    EchoClient::new(api.channel()).say(request).await.unwrap();
    assert_eq!(api.seen(), ["token-1"]);
}
