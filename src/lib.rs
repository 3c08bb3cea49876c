//! A tower middleware that keeps requests supplied with OAuth 2.0 bearer tokens, with at most one token request
//! in flight.
//!
//! [`BearerAuthLayer`] wraps any `tower::Service<http::Request<B>>` of a client, or a `reqwest::Client`, and adds
//! `Authorization: Bearer ..` to each request. The token comes from an authorization server by the
//! client-credentials grant, is replaced in the background before it expires, and is shared by all requests: a
//! thousand that find no token cause one token request.
//!
//! # A first token
//!
//! To try it, start a Keycloak:
//!
//! ```sh
//! docker run -p 8080:8080 \
//!     -e KC_BOOTSTRAP_ADMIN_USERNAME=admin -e KC_BOOTSTRAP_ADMIN_PASSWORD=admin \
//!     quay.io/keycloak/keycloak start-dev
//! ```
//!
//! In its console at `http://localhost:8080`, create a client `my-client` with client authentication and service account
//! roles on, and put its secret into the environment variable `CLIENT_SECRET`. The API at port 8081 is one of your own.
//! Without one, the program prints what the token is for and then fails to connect.
//!
//! ```toml
//! [dependencies]
//! tower-bearer = "0.1"
//! bytes = "1"
//! http = "1"
//! http-body-util = "0.1"
//! hyper-util = { version = "0.1", features = ["client-legacy", "http1", "tokio"] }
//! tokio = { version = "1", features = ["full"] }
//! tower = { version = "0.5", features = ["timeout", "util"] }
//! ```
//!
//! ```no_run
//! # #[cfg(feature = "rustls")]
//! # mod program {
//! use std::time::Duration;
//!
//! use bytes::Bytes;
//! use http::Request;
//! use http_body_util::Full;
//! use hyper_util::{client::legacy::Client, rt::TokioExecutor};
//! use tower::{ServiceBuilder, ServiceExt};
//! use tower_bearer::{BearerAuthLayer, BoxError, ClientCredentials, CloneBody, TokenCache};
//!
//! #[tokio::main]
//! async fn main() -> Result<(), BoxError> {
//!     let issuer = "http://localhost:8080/realms/master";
//!     let source = ClientCredentials::discover(issuer, "my-client")
//!         .client_secret(std::env::var("CLIENT_SECRET")?)
//!         .build()?;
//!     let cache = TokenCache::new(source); // nothing has been sent yet
//!     let token = cache.get().await?;
//!     println!("a token for {:?}, until {:?}", token.scope(), token.usable_until());
//!
//!     // Requests to the API take it from the same cache. Each task has a clone of `api`.
//!     let api = ServiceBuilder::new()
//!         .timeout(Duration::from_secs(60)) // the wait for a token and both sends
//!         .layer(BearerAuthLayer::new(cache).replay(CloneBody))
//!         .service(Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>());
//!     let request = Request::get("http://localhost:8081/sims").body(Full::default())?;
//!     println!("{}", api.clone().oneshot(request).await?.status());
//!     Ok(())
//! }
//! # }
//! # fn main() {}
//! ```
//!
//! Anywhere but on your own machine, both sides need `https`, and the client needs TLS. The README has a client with
//! `hyper-rustls`, and a table of what to write for which authorization server. For a server without metadata, give its
//! token URL to [`ClientCredentials::builder`].
//!
//! # How it works
//!
//! A request that finds a token in the [`TokenCache`] leaves with it at once. One that finds none starts a *flight*, or
//! joins the one under way: a token request in a task of its own, whose result all waiting requests share. A flight makes
//! up to three attempts by default, each of which asks the token endpoint. A request that finds a token which is due for
//! refresh leaves with it, and starts a flight for those that come later.
//!
//! # When the API refuses a token
//!
//! A 401 about the current token makes the layer start or join a flight as well. What counts is the token that was sent:
//! a late 401 about an older one costs no token request. The request is sent once more with the new token if a copy of it
//! was kept, which depends on [`BearerAuthLayer::replay`]:
//!
//! - [`Never`], the default: the 401 comes back to the caller, and the token is replaced for the next request.
//! - [`CloneBody`]: every request whose body is `Clone` is copied and sent again.
//! - [`EmptyBody`]: requests with an empty body, whatever its type, are sent again. Others are sent once.
//!
//! ```
//! use tower::{ServiceBuilder, ServiceExt};
//! use tower_bearer::{BearerAuthLayer, CloneBody};
//! # use http::{Request, Response, StatusCode, header::AUTHORIZATION};
//! # use tower::service_fn;
//! # use tower_bearer::{BoxError, TokenResponse, source_fn};
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), BoxError> {
//! # let calls = std::sync::atomic::AtomicU32::new(1);
//! # let source = source_fn(move |_| {
//! #     let call = calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
//! #     async move { TokenResponse::new(format!("token-{call}")) }
//! # });
//! # let client = service_fn(|request: Request<&'static str>| async move {
//! #     assert_eq!(*request.body(), "on");
//! #     let mut response = Response::new(());
//! #     if request.headers()[AUTHORIZATION] == "Bearer token-1" {
//! #         *response.status_mut() = StatusCode::UNAUTHORIZED;
//! #     }
//! #     Ok::<_, BoxError>(response)
//! # });
//!
//! let api = ServiceBuilder::new()
//!     .layer(BearerAuthLayer::new(source).replay(CloneBody))
//!     .service(client); // which refuses the first token
//! let request = Request::put("https://api.example.com/sims/7").body("on")?;
//! assert_eq!(api.oneshot(request).await?.status(), 200);
//! # Ok(())
//! # }
//! ```
//!
//! A streaming body can be sent again if a [`CollectBodyLayer`] above has read it, up to a limit.
//!
//! # When there is no token
//!
//! When the token endpoint fails, requests go on with the token they have until it expires. After that they get a
//! [`TokenError`], without a wait unless the next attempt is due. How often the endpoint is asked is bounded, whatever the
//! traffic: see [`RefreshPolicy`]. The [guide to failures](guide::failures) says what a request gets in which situation,
//! what each error means, and what to alert on.
//!
//! # Where in the stack it goes
//!
//! Below retries and redirects, above limits and timeouts for single sends:
//!
//! - A *retry* above gives a request whose token could not be fetched another chance. See below for a policy.
//! - A *redirect follower* belongs above, so that the origin of each hop is judged. This layer does not see the hops
//!   of one below.
//! - A *timeout* above covers the wait for a token and both sends; one below covers each send.
//! - A *concurrency limit* below bounds what is being sent: a request that waits for a token holds no permit.
//!   To bound what waits, put a limit above, or set [`RefreshPolicy::max_waiters`].
//! - A *buffer* below queues requests that already carry their token.
//!
//! [`guide::placement`] goes through the layers of tower and tower-http, each above and below this one.
//!
//! This retry policy waits as long as the token endpoint asked for. It works with any boxed error, and needs tower's
//! feature `retry`:
//!
//! ```
//! use std::{error::Error, time::Duration};
//!
//! use tower::{ServiceBuilder, retry::Policy};
//! use tower_bearer::{BearerAuthLayer, TokenError};
//! # use http::{Request, Response};
//! # use tower_bearer::{BoxError, TokenResponse, source_fn};
//! # use tower::{ServiceExt, service_fn};
//!
//! #[derive(Clone)]
//! struct RetryTokens {
//!     left: u32,
//! }
//!
//! impl<Req, Res, E> Policy<Req, Res, E> for RetryTokens
//! where
//!     Req: Clone,
//!     E: AsRef<dyn Error + Send + Sync>,
//! {
//!     type Future = tokio::time::Sleep;
//!
//!     fn retry(&mut self, _: &mut Req, result: &mut Result<Res, E>) -> Option<Self::Future> {
//!         let error = result.as_ref().err()?.as_ref();
//!         let error = error.downcast_ref::<TokenError>()?;
//!         if !error.is_transient() || self.left == 0 {
//!             return None;
//!         }
//!         self.left -= 1;
//!         // The cache waits up to a tenth longer, so that many programs do not come back at once.
//!         let pause = error.retry_after().unwrap_or(Duration::from_secs(1));
//!         Some(tokio::time::sleep(pause.mul_f64(1.1)))
//!     }
//!
//!     fn clone_request(&mut self, request: &Req) -> Option<Req> {
//!         Some(request.clone())
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), BoxError> {
//! # let calls = std::sync::atomic::AtomicU32::new(0);
//! # let source = source_fn(move |fetch| {
//! #     let call = calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
//! #     async move {
//! #         match call {
//! #             0 => Err(TokenError::transient("busy").with_retry_after(Duration::from_secs(7))),
//! #             _ => TokenResponse::new("token"),
//! #         }
//! #     }
//! # });
//! # let client = service_fn(|_: Request<()>| async { Ok::<_, BoxError>(Response::new(())) });
//! let api = ServiceBuilder::new()
//!     .retry(RetryTokens { left: 3 })
//!     .layer(BearerAuthLayer::new(source))
//!     .service(client);
//! # assert!(api.oneshot(Request::new(())).await.is_ok());
//! # Ok(())
//! # }
//! ```
//!
//! It needs requests that are `Clone`. A `reqwest::Request` is not; the [guide to clients](guide::clients#reqwest) has a
//! policy for it. This one retries token failures only: both a send that the timeout below cuts off and a request that the
//! timeout above cuts off come back as `Elapsed`. The example `with_retry_and_timeout` has a policy that also retries the
//! former.
//!
//! # Tokens for different things
//!
//! A request can say what its token is for, by a [`TokenRequest`] among its extensions: scopes, resources,
//! parameters, or a source of its own, such as a tenant's ([`SharedSource`]). Each different one is a key of the cache,
//! with its own token, its own token request in flight and its own refresh token. A key whose token request hangs or is
//! refused does not hold up other keys. A server that is busy or unreachable, or refuses the client, is left alone by all
//! keys of the source. A request with [`WithoutToken`] among its extensions passes as it is.
//!
//! ```
//! use http::Request;
//! use tower_bearer::TokenRequest;
//!
//! # fn main() -> Result<(), http::Error> {
//! let request = Request::get("https://api.example.com/sims")
//!     .extension(TokenRequest::new().scope("sims:read"))
//!     .body(())?;
//! # let _ = request;
//! # Ok(())
//! # }
//! ```
//!
//! # Without tower
//!
//! A [`TokenCache`] also works by itself, and can serve layers at the same time: [`TokenCache::get`] returns a
//! token for a gRPC interceptor or a WebSocket handshake, and [`TokenCache::invalidate`] reports a refusal.
//!
//! # Errors, events and metrics
//!
//! The text of a [`TokenError`] says what failed; the cause, such as a certificate from an unknown authority, is in its
//! [`source`](std::error::Error::source). Print the whole chain to see both. No error, event or metric of this crate shows
//! a token or a secret.
//!
//! ## Events and spans
//!
//! Events go through `tracing`, under the target `tower_bearer`, with nothing at INFO or above while all is well. The name
//! of an event is in its metadata; most formatters show its message instead. The
//! [guide to failures](guide::failures#how-to-alert) has both.
//!
//! | event | level | fields | |
//! |---|---|---|---|
//! | `flight_started` | DEBUG | `flight`, `forced`, `delay`, `failures` | a token request starts, after this number of failures in a row |
//! | `attempt_failed` | DEBUG | `flight`, `attempt`, `error` | another attempt will follow |
//! | `token_received` | DEBUG | `flight`, `grant`, `took`, `usable_for` | |
//! | `flight_failed` | WARN | `cache`, `flight`, `key`, `error`, `failures`, `took`, `retry_in`, `usable_for` | requests go on for `usable_for`; without it, they fail |
//! | `requests_waiting` | WARN | `cache`, `flight`, `key`, `waiters`, `age` | a token request has taken a second, and requests wait for it; once for each flight |
//! | `requests_failing` | WARN | `cache`, `key`, `error`, `retry_in` | the token has expired in an outage, between two token requests; once per outage |
//! | `recovered` | INFO | `cache`, `flight`, `key`, `failures`, `outage` | the first success after failures, the first of which began an `outage` ago |
//! | `flight_lost` | WARN | `cache`, `flight`, `key`, `failures` | the runtime has ended, is parked, or has stood still |
//! | `gate_closed`, `gate_opened` | DEBUG | `failures`, `opens_in`, `shared`; `cause` | token requests are held back: for the key or, if `shared`, for all keys of the source |
//! | `refresh_token_failed` | DEBUG | `cache`, `flight`, `key`, `error` | a session has ended, and client credentials were tried next |
//! | `lifetime_assumed` | WARN | `cache`, `flight`, `key`, `lifetime` | the server named none |
//! | `scope_narrowed` | WARN | `cache`, `missing` | the server granted less than was asked for |
//! | `token_refused` | INFO, DEBUG | `cache`, `complaint`, `decision`, `flight` | by the API; INFO if that starts a token request, which is rate-limited |
//! | `replayed` | DEBUG | | the request is sent once more |
//! | `waited` | DEBUG | `flight`, `took`, `outcome` | by a request: `token`, `old_token`, `failed`, `lost` or `dropped` |
//! | `invalidated`, `shut_down` | DEBUG | ; `cache` | by the program |
//! | `keys_evicted`, `keys_full` | DEBUG, WARN | `cache`, `count`; `cache`, `limit` | |
//!
//! Each flight has a span `token_flight` at DEBUG, which contains its events and what its client logs. Its fields are
//! `cache` ([`RefreshPolicy::name`]), `flight` (a number, unique within the process), `key`, `grant`, `forced`, `attempts`,
//! `outcome` (`granted`, `failed`, `lost`, `shut_down`), `error` and `otel.status_code`. The `key` lists scopes, resources
//! and the names of parameters, and says `own source` if the [`TokenRequest`] names one; it is absent for requests without
//! a `TokenRequest`. It does not tell tenants apart: [`TokenEvent`]s do, by their `request`.
//!
//! The span is the root of a trace of its own, since it serves many requests and may outlive all of them. It follows from
//! the span that was current where it was started, and the current span of each request that waits follows from it. With
//! `tracing-opentelemetry` both are links, which lead from a slow request to the token request that it waited for.
//! `waited`, `token_refused` and `replayed` are in the request's own span: make one above the layer, with tower-http's
//! `TraceLayer` or [`Instrument`], and let `tower_bearer=debug` through the filter.
//!
//! [`Instrument`]: https://docs.rs/tracing/latest/tracing/trait.Instrument.html
//!
//! ## Metrics
//!
//! With the feature `metrics`, through the `metrics` facade. Each metric has the label `cache`
//! ([`RefreshPolicy::name`]); no label has more than a handful of values.
//!
//! | metric | type, unit | labels | |
//! |---|---|---|---|
//! | `tower_bearer_requests_total` | counter | `token`: `fresh`, `due`, `waited`, `failed`, `refused`, `bare` | requests through a layer, by the token that they found; `refused`: not sent because of their URI; `bare`: sent without a token of this crate |
//! | `tower_bearer_token_requests_total` | counter | `grant`; `outcome`: `granted`, `rejected`, `unavailable`, `transport`, `timeout`, `malformed`, `failed` | attempts; one that first tries a refresh token and then client credentials counts for both grants |
//! | `tower_bearer_flight_duration_seconds` | histogram, s | `outcome`: as in the span | all attempts together |
//! | `tower_bearer_token_remaining_seconds` | histogram, s | | how long the token of a request may still be used, for one request in 64 |
//! | `tower_bearer_token_refusals_total` | counter | `decision`: `started`, `joined`, `replay`, `passed` | each 401 about a token, and each call of [`TokenCache::invalidate`] |
//! | `tower_bearer_replays_total` | counter | | requests that were sent once more, with another token |
//! | `tower_bearer_waiting_requests` | gauge | | requests, and callers of [`TokenCache::get`], that wait for a token |
//! | `tower_bearer_closed_gates` | gauge | | keys whose last token request failed |
//! | `tower_bearer_keys` | gauge | | keys, not counting the one of requests without a [`TokenRequest`] |
//!
//! Install the recorder before the first request. A recorder that comes later takes effect with the next token request:
//! requests before that are not counted, and the gauges are right from then on. With the feature, a request that finds a
//! fresh token increments a counter that all requests of the cache share, and draws a random number for the histogram.
//! Prometheus exporters turn histograms into summaries unless they are given buckets: see the
//! [guide to failures](guide::failures#health-and-metrics). The example `health_and_metrics` has a `/metrics` endpoint and,
//! for it, a dashboard and alerts.
//!
//! ## For programs
//!
//! [`TokenCache::status`] is for a health endpoint: it says whether there is a token, for how long, and what failed last.
//! [`TokenCache::events`] is a stream of [`TokenEvent`]s.
//!
//! # Guides
//!
//! - [Placement](guide::placement): the layers of tower and tower-http, each above and below this one.
//! - [Clients](guide::clients): hyper, an axum gateway, tonic, reqwest, a library of your own, a command-line program.
//! - [Failures](guide::failures): what a request gets in which situation, how to retry, how to read the log, what to alert on.
//! - [Servers](guide::servers): where authorization servers and APIs deviate from the standards, and what to set.
//! - [Security](guide::security): where secrets and tokens are kept, where they are sent, and what is left to you.
//! - `guide::testing` (feature `test-util`): how to test your own code without a server.
//! - [Migration](guide::migration): from a mutex around a token, from `middle`, from `oauth2` and `reqwest`.
//!
//! # Limits
//!
//! The layer does not follow redirects, resends a request only after a refused token, and does not read the bodies of
//! responses. Fetching a token needs a tokio runtime with timers and, for the default client, IO (`enable_all`); a request
//! that finds a token needs none. Any executor may poll the futures within such a runtime's context, as long as the runtime
//! is driven: on a current-thread runtime that is entered but not driven nothing makes progress, not even a timeout.
//!
//! # Features
//!
//! - `rustls` (default): the default client for the token endpoint, hyper over rustls with ring and the system's
//!   roots. Without it, give [`ClientCredentialsBuilder::build_with`] any tower HTTP service, with TLS of your choice.
//! - `jwt`: clients that authenticate by a signed assertion, `private_key_jwt` and `client_secret_jwt`, with
//!   `jsonwebtoken` 10 over `aws-lc-rs`. It is a feature because that is a second cryptographic library, besides `ring`;
//!   both need a C compiler to build. The backend is used by name, and the process-wide one is neither read nor set. If
//!   your application uses the same `jsonwebtoken` with `rust_crypto`, both backends are compiled in, and it has to choose
//!   one by `CryptoProvider::install_default` before it uses the crate.
//! - `metrics`: counters, gauges and histograms through the `metrics` facade, for programs that install a recorder.
//! - `reqwest`: the layer over a `reqwest::Client` 0.13, without reqwest's default features; see [`HttpRequest`].
//! - `test-util`: for the tests of your own program, a scripted token source, caches that always or never have a token,
//!   and an error of each kind.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod cache;
mod challenge;
mod collect;
mod error;
mod future;
#[cfg(any(doc, doctest))]
pub mod guide;
mod layer;
mod message;
mod origin;
mod policy;
mod replay;
#[cfg(feature = "reqwest")]
mod reqwest;
mod service;
mod settings;
mod slot;
mod source;
mod sync;
mod telemetry;
#[cfg(feature = "test-util")]
#[cfg_attr(docsrs, doc(cfg(feature = "test-util")))]
pub mod test_util;
mod time;
mod token;

#[cfg(feature = "jwt")]
pub use crate::source::{AssertionAudience, SigningAlgorithm};
pub use crate::{
    cache::{Events, Status, TokenCache, TokenEvent, TokenState},
    challenge::Challenge,
    collect::{CollectBody, CollectBodyFuture, CollectBodyLayer, CollectedBody},
    error::{BoxError, ConfigError, TokenError},
    future::ResponseFuture,
    layer::BearerAuthLayer,
    message::{HttpRequest, HttpResponse},
    policy::RefreshPolicy,
    replay::{CloneBody, EmptyBody, Never, Replay},
    service::{BearerAuth, WithoutToken},
    source::{
        AuthMethod, ClientCredentials, ClientCredentialsBuilder, Credential, Fetch, RefreshToken,
        Revocation, SharedSource, SourceFn, TokenRequest, TokenResponse, TokenSource, source_fn,
    },
    token::AccessToken,
};

#[cfg(all(doctest, feature = "jwt", feature = "rustls"))]
#[doc = include_str!("../README.md")]
struct Readme;
