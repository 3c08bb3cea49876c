//! What the layer needs of a request and of its answer: [`HttpRequest`], [`HttpResponse`].

use std::borrow::Cow;

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header::AUTHORIZATION};

/// A request that the layer can attach a token to: an [`http::Request`] with any body, or a `reqwest::Request`.
///
/// The trait is sealed, so that it may grow with what the layer needs to know about a request.
///
/// # reqwest
///
/// With the feature `reqwest`, the layer wraps a `reqwest::Client` like any other service, and reqwest's errors pass
/// through unchanged.
///
/// reqwest follows redirects by itself, below the layer, where no setting of the layer applies. It removes the token on
/// the way to another origin, but adds it again when that origin redirects to itself (as of 0.13.5). To keep the token
/// from other origins, set `redirect::Policy::none()`, or a policy that stays within one origin:
///
/// ```
/// # #[cfg(feature = "reqwest")]
/// # fn main() -> Result<(), tower_bearer::BoxError> {
/// use reqwest::{Url, redirect::Policy};
/// use tower::{ServiceBuilder, ServiceExt};
/// use tower_bearer::{BearerAuthLayer, CloneBody};
/// # let source = tower_bearer::source_fn(|_| async { tower_bearer::TokenResponse::new("token") });
///
/// let same_origin = Policy::custom(|attempt| {
///     let first = attempt.previous().first().map(Url::origin);
///     match first == Some(attempt.url().origin()) {
///         true if attempt.previous().len() < 10 => attempt.follow(),
///         _ => attempt.stop(),
///     }
/// });
/// let client = reqwest::Client::builder().redirect(same_origin).build()?;
/// let api = ServiceBuilder::new()
///     .layer(BearerAuthLayer::new(source).replay(CloneBody))
///     .service(client.clone());
///
/// let request = client.get("https://api.example.com/sims").build()?;
/// let response = api.oneshot(request); // .await?
/// # drop(response);
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "reqwest"))]
/// # fn main() {}
/// ```
///
/// reqwest sends requests through the proxy that the environment names. That includes plain http to a loopback address,
/// unless `NO_PROXY` lists it, and the proxy can then read the token. For such a client, as in a test, call
/// `no_proxy()`.
///
/// A 401 of an origin that a redirect led to counts against the token like any other.
///
/// reqwest's timeouts start anew each time a request is sent, and do not include the wait for a token. A tower
/// `Timeout` above covers everything.
///
/// A `reqwest::Request` has no extensions that the layer could read. To use a [`TokenRequest`] or [`WithoutToken`],
/// make an `http::Request` and convert it below the layer:
///
/// ```
/// # #[cfg(feature = "reqwest")]
/// # fn main() -> Result<(), tower_bearer::BoxError> {
/// use bytes::Bytes;
/// use tower::{ServiceBuilder, ServiceExt};
/// use tower_bearer::{BearerAuthLayer, CloneBody, TokenRequest};
/// # let source = tower_bearer::source_fn(|_| async { tower_bearer::TokenResponse::new("token") });
/// # let client = reqwest::Client::new();
///
/// let api = ServiceBuilder::new()
///     .layer(BearerAuthLayer::new(source).replay(CloneBody))
///     .filter(|request: http::Request<Bytes>| reqwest::Request::try_from(request))
///     .service(client);
///
/// let request = http::Request::get("https://api.example.com/sims")
///     .extension(TokenRequest::new().scope("sims:read"))
///     .body(Bytes::new())?;
/// let response = api.oneshot(request); // .await?
/// # drop(response);
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "reqwest"))]
/// # fn main() {}
/// ```
///
/// [`TokenRequest`]: crate::TokenRequest
/// [`WithoutToken`]: crate::WithoutToken
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a request that `tower-bearer` can attach a token to",
    note = "it takes an `http::Request`, or a `reqwest::Request` with the feature `reqwest` of `tower-bearer`"
)]
pub trait HttpRequest: sealed::Request {
    /// The request's URI, or `None` if it is not one, so that no client can send it.
    #[doc(hidden)]
    fn uri(&self) -> Option<Cow<'_, Uri>>;

    /// Whether it goes over https and has no extension for the layer, like most requests.
    #[doc(hidden)]
    fn is_usual(&self) -> bool;

    #[doc(hidden)]
    fn headers(&self) -> &HeaderMap;

    #[doc(hidden)]
    fn headers_mut(&mut self) -> &mut HeaderMap;

    /// The caller's extension of this type.
    #[doc(hidden)]
    fn extension<T: Send + Sync + 'static>(&self) -> Option<&T>;
}

/// A response that the layer can judge: an [`http::Response`] with any body, or a `reqwest::Response`.
///
/// The trait is sealed, so that it may grow with what the layer needs to know about a response.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a response that `tower-bearer` can judge",
    note = "it takes an `http::Response`, or a `reqwest::Response` with the feature `reqwest` of `tower-bearer`"
)]
pub trait HttpResponse: sealed::Response {
    #[doc(hidden)]
    fn status(&self) -> StatusCode;

    #[doc(hidden)]
    fn headers(&self) -> &HeaderMap;
}

impl<B> HttpRequest for Request<B> {
    #[inline]
    fn uri(&self) -> Option<Cow<'_, Uri>> {
        Some(Cow::Borrowed(self.uri()))
    }

    #[inline]
    fn is_usual(&self) -> bool {
        self.uri().scheme_str() == Some("https") && self.extensions().is_empty()
    }

    #[inline]
    fn headers(&self) -> &HeaderMap {
        self.headers()
    }

    #[inline]
    fn headers_mut(&mut self) -> &mut HeaderMap {
        self.headers_mut()
    }

    #[inline]
    fn extension<T: Send + Sync + 'static>(&self) -> Option<&T> {
        self.extensions().get()
    }
}

impl<B> HttpResponse for Response<B> {
    #[inline]
    fn status(&self) -> StatusCode {
        self.status()
    }

    #[inline]
    fn headers(&self) -> &HeaderMap {
        self.headers()
    }
}

/// Sets the `Authorization` of a request whose token the service does not hold.
///
/// Compiled here, so that only the insertion for requests whose token it holds is compiled with a user's types.
pub(crate) fn authorize(headers: &mut HeaderMap, value: HeaderValue) {
    headers.insert(AUTHORIZATION, value);
}

pub(crate) mod sealed {
    #[expect(
        unnameable_types,
        reason = "this is what keeps others from implementing `HttpRequest`"
    )]
    pub trait Request {}

    #[expect(
        unnameable_types,
        reason = "this is what keeps others from implementing `HttpResponse`"
    )]
    pub trait Response {}

    impl<B> Request for http::Request<B> {}
    impl<B> Response for http::Response<B> {}
}
