//! [`BearerAuthLayer`]: the configuration, and the [`Layer`] that applies it.

use std::fmt;

use tower_layer::Layer;

use crate::{
    cache::TokenCache, error::ConfigError, origin::Origins, replay::Never, service::BearerAuth,
    settings::Settings, slot::Slot,
};

/// Attaches an `Authorization: Bearer` header to each request, and keeps its token valid.
///
/// It is made from a [`TokenSource`](crate::TokenSource), or from a [`TokenCache`] that others may share. All services
/// that one layer and its clones make share its cache, so that a burst of requests through any of them causes one token
/// request.
///
/// By default a request is sent once: when the API refuses its token, the 401 comes back to the caller and the
/// token is replaced for the next one. With [`replay`](Self::replay) the request is sent once more, with the
/// new token.
///
/// # Examples
///
/// ```
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
/// use tower_bearer::{BearerAuthLayer, CloneBody, TokenResponse, source_fn};
/// # use http::{Request, Response};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), tower_bearer::BoxError> {
/// let source = source_fn(|_fetch| async { TokenResponse::new("mF_9.B5f-4.1JqM") });
/// let client = ServiceBuilder::new()
///     .layer(BearerAuthLayer::new(source).replay(CloneBody))
///     .service(service_fn(|request: Request<String>| async move {
///         let header = request.headers()["authorization"].to_str()?;
///         Ok::<_, tower_bearer::BoxError>(Response::new(header.to_owned()))
///     }));
///
/// let request = Request::get("https://api.example.com/sims").body(String::new())?;
/// let response = client.oneshot(request).await?;
/// assert_eq!(response.body(), "Bearer mF_9.B5f-4.1JqM");
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct BearerAuthLayer<R = Never> {
    /// Cloned into each service like the clones of one service, since some programs apply the layer for each request.
    slot: Slot,
    replay: R,
}

impl BearerAuthLayer<Never> {
    /// Creates a layer over a token source or a shared cache.
    ///
    /// Needs no runtime and sends nothing: the first request does.
    #[must_use]
    pub fn new(cache: impl Into<TokenCache>) -> Self {
        Self {
            slot: Slot::new(Settings {
                cache: cache.into(),
                origins: Origins::default(),
                keep_existing: false,
                refresh_on_unexplained_401: true,
            }),
            replay: Never,
        }
    }
}

impl<R> BearerAuthLayer<R> {
    /// Sets which requests may be sent a second time, when the API refuses their token with a 401: default
    /// [`Never`].
    ///
    /// See [`CloneBody`](crate::CloneBody) and [`EmptyBody`](crate::EmptyBody). A request is sent at most
    /// twice, and the second time only with another token than the first.
    #[must_use]
    pub fn replay<R2>(self, replay: R2) -> BearerAuthLayer<R2> {
        BearerAuthLayer {
            slot: self.slot,
            replay,
        }
    }

    /// Limits the token to these origins (RFC 6454), such as `https://api.example.com`.
    ///
    /// Requests to other origins then pass as they are, without the token. Without this setting, every https origin and
    /// every loopback address gets the token. A request whose URI has no authority, for a service that is bound to one
    /// host, gets it in either case. An entry of plain http, other than loopback, needs
    /// [`dangerous_plain_http`](Self::dangerous_plain_http) as well.
    ///
    /// # Errors
    ///
    /// If an entry is not an origin, or there is none.
    pub fn origins<I>(self, origins: I) -> Result<Self, ConfigError>
    where
        I: IntoIterator<Item: AsRef<str>>,
    {
        let origins = self.slot.settings().origins.clone().pin(origins)?;
        Ok(self.with(|settings| settings.origins = origins))
    }

    /// Lets the token go over plain http to other hosts than this one: default `false`.
    ///
    /// Anyone on the path can read and use it (RFC 6750 section 5.3). Without this setting such a request
    /// fails with [`TokenError::is_insecure_uri`](crate::TokenError::is_insecure_uri) before it is sent.
    #[must_use]
    pub fn dangerous_plain_http(self, allow: bool) -> Self {
        self.with(|settings| settings.origins = settings.origins.clone().plain_http(allow))
    }

    /// Lets requests keep an `Authorization` header that they bring along: default `false`, which replaces it.
    ///
    /// The default is for gateways, which must not pass on their users' credentials. A request that keeps its own
    /// credential does not wait for a token, and a 401 to it does not count against the cached one.
    #[must_use]
    pub fn keep_existing(self, keep: bool) -> Self {
        self.with(|settings| settings.keep_existing = keep)
    }

    /// Sets whether a 401 that does not say what is wrong counts against the token: default `true`.
    ///
    /// That is one without a challenge, or with a challenge for tokens that names no error or none of RFC 6750: of the
    /// scheme `Bearer`, or of `OAuth2`, `OAuth`, `Token` or `JWT`, as some servers call it. gRPC's status 16
    /// (unauthenticated) is treated as a 401, and mostly comes without a challenge. RFC 6750 section 3.1 wants
    /// `invalid_token` for a token that has expired or was revoked, but many servers do not send it.
    #[must_use]
    pub fn refresh_on_unexplained_401(self, refresh: bool) -> Self {
        self.with(|settings| settings.refresh_on_unexplained_401 = refresh)
    }

    /// Returns the cache that this layer takes its tokens from.
    pub fn cache(&self) -> &TokenCache {
        &self.slot.settings().cache
    }

    fn with(self, change: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = Settings::clone(self.slot.settings());
        change(&mut settings);
        Self {
            slot: Slot::new(settings),
            replay: self.replay,
        }
    }
}

impl<S, R: Clone> Layer<S> for BearerAuthLayer<R> {
    type Service = BearerAuth<S, R>;

    fn layer(&self, inner: S) -> Self::Service {
        BearerAuth::new(inner, self.slot.clone(), self.replay.clone())
    }
}

impl<R: fmt::Debug> fmt::Debug for BearerAuthLayer<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BearerAuthLayer")
            .field("settings", self.slot.settings())
            .field("replay", &self.replay)
            .finish()
    }
}
