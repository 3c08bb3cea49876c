//! What the layer has to see of a request and of its answer: [`HttpRequest`], [`HttpResponse`].

use std::borrow::Cow;

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header::AUTHORIZATION};

/// A request that the layer can attach a token to: an [`http::Request`] with any body.
///
/// The trait is sealed, so that it may grow with what the layer has to know of a request.
pub trait HttpRequest: sealed::Request {
    /// Where the request goes, or `None` if that is no URI, so that no client can send it.
    #[doc(hidden)]
    fn uri(&self) -> Option<Cow<'_, Uri>>;

    /// Whether it goes by https and says nothing to the layer, as most requests do.
    #[doc(hidden)]
    fn is_usual(&self) -> bool;

    #[doc(hidden)]
    fn headers(&self) -> &HeaderMap;

    #[doc(hidden)]
    fn headers_mut(&mut self) -> &mut HeaderMap;

    /// What the caller says to the layer by an extension of this type.
    #[doc(hidden)]
    fn extension<T: Send + Sync + 'static>(&self) -> Option<&T>;
}

/// A response that the layer can judge: an [`http::Response`] with any body.
///
/// The trait is sealed, so that it may grow with what the layer has to know of a response.
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

/// Sets the `Authorization` of a request.
///
/// Compiled once and here, where it takes the insertion in.
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
