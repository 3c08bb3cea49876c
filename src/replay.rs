//! May a request be sent twice: [`Never`], [`CloneBody`], [`EmptyBody`].
//!
//! A request whose token got a 401 may succeed with another token, but can be sent again only if a copy was kept.
//! Which copies are kept, and at what cost, is the user's choice, made with
//! [`BearerAuthLayer::replay`](crate::BearerAuthLayer::replay).

use std::convert::Infallible;

use http::{Extensions, HeaderMap, Method, Request, Uri, Version};
use http_body::Body;

/// Decides which requests of type `Req` may be sent a second time.
///
/// The implementations are [`Never`], which is the default, [`CloneBody`] and [`EmptyBody`]. The trait is sealed: an
/// implementation that copied half a body would corrupt requests, and only when a token is refused.
///
/// A request is sent again at most once, only after a 401 (or its gRPC counterpart) that is about its token,
/// and only with a different token. That is safe for a `POST` as well: a 401 says that the request was not
/// applied (RFC 9110 section 15.5.2), whatever its method.
///
/// For a request that may not be sent again, such as one with a streaming body, the 401 comes back to the caller, and
/// the token is replaced all the same.
pub trait Replay<Req>: sealed::Sealed + Clone {
    /// What a response future stores of a request that may be sent again.
    ///
    /// A type without values if there is never a replay: an `Option` of it takes no space.
    #[doc(hidden)]
    type Copied;

    /// Copies the request, if it may be sent again.
    #[doc(hidden)]
    fn copy(&self, request: &Req) -> Option<Self::Copied>;

    /// Makes the request of its copy.
    #[doc(hidden)]
    fn restore(copy: Self::Copied) -> Req;
}

/// Sends every request once: the default.
///
/// It works with every body and costs nothing. A 401 comes back to the caller; the token is replaced all the same. If
/// the caller retries after a 401 with `invalid_token`, the retry waits up to 1 s for the new token, and then takes the
/// old one. After a 401 without a reason, a retry takes the old token at once, so it should pause first.
///
/// A request in flight does not keep the cache alive. If all services and other handles of the cache are gone when the
/// 401 comes, no other token is requested, since nothing is left to use it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Never;

/// Sends a request again with a clone of its body.
///
/// Use it for bodies that are cheap to clone, such as `Full<Bytes>` or `String`s of moderate size, and not for a body
/// whose clones share one stream. A streaming body can be read first, by a
/// [`CollectBodyLayer`](crate::CollectBodyLayer) above.
///
/// Every request pays for the copy, whether it is needed or not: its headers, URI, extensions and body are cloned, and
/// so is the inner service, and held until the answer is there. A request that has to wait for a token is cloned again
/// when it leaves; one that carries no token is not copied.
#[derive(Clone, Copy, Debug, Default)]
pub struct CloneBody;

/// Sends a request again if its body is empty.
///
/// For bodies that cannot be cloned, such as boxed and streaming ones: most `GET`s and `DELETE`s are covered.
/// A body counts as empty if [`Body::is_end_stream`] says so before it is sent, and the second request then
/// gets `B::default()`. All others are sent once.
///
/// Every request with an empty body pays for the copy, whether it is needed or not: its headers, URI and
/// extensions are cloned, and the inner service too, and held until the answer is there.
#[derive(Clone, Copy, Debug, Default)]
pub struct EmptyBody;

impl<Req> Replay<Req> for Never {
    type Copied = Infallible;

    #[inline]
    fn copy(&self, _: &Req) -> Option<Self::Copied> {
        None
    }

    #[inline]
    fn restore(copy: Self::Copied) -> Req {
        match copy {}
    }
}

impl<B: Clone> Replay<Request<B>> for CloneBody {
    type Copied = RequestCopy<B>;

    #[inline]
    fn copy(&self, request: &Request<B>) -> Option<Self::Copied> {
        Some(RequestCopy::new(request, request.body().clone()))
    }

    #[inline]
    fn restore(copy: Self::Copied) -> Request<B> {
        copy.restore()
    }
}

impl<B: Body + Default> Replay<Request<B>> for EmptyBody {
    type Copied = RequestCopy<B>;

    #[inline]
    fn copy(&self, request: &Request<B>) -> Option<Self::Copied> {
        if !request.body().is_end_stream() {
            return None;
        }
        let body = B::default();
        // Nothing obliges a default to be empty.
        body.is_end_stream()
            .then(|| RequestCopy::new(request, body))
    }

    #[inline]
    fn restore(copy: Self::Copied) -> Request<B> {
        copy.restore()
    }
}

/// A copy of a request.
///
/// Not a [`Request`], since most copies are dropped unused, and cloning and dropping an empty header map costs a fifth
/// of what the token's header costs.
#[expect(
    unnameable_types,
    reason = "nobody has a use for one but the layer's futures"
)]
#[derive(Debug)]
pub struct RequestCopy<B> {
    method: Method,
    uri: Uri,
    version: Version,
    /// If there are any.
    headers: Option<HeaderMap>,
    extensions: Extensions,
    body: B,
}

impl<B> RequestCopy<B> {
    /// Out of line, so that the copy is written in place: inlined, each part is moved several times.
    #[inline(never)]
    pub(crate) fn new(request: &Request<B>, body: B) -> Self {
        let headers = request.headers();
        Self {
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            headers: (!headers.is_empty()).then(|| headers.clone()),
            extensions: request.extensions().clone(),
            body,
        }
    }

    pub(crate) fn restore(self) -> Request<B> {
        let mut request = Request::new(self.body);
        *request.method_mut() = self.method;
        *request.uri_mut() = self.uri;
        *request.version_mut() = self.version;
        *request.headers_mut() = self.headers.unwrap_or_default();
        *request.extensions_mut() = self.extensions;
        request
    }
}

pub(crate) mod sealed {
    use std::convert::Infallible;

    /// What a replay needs besides the copy of the request, for requests of any type.
    #[expect(
        unnameable_types,
        reason = "this is what keeps others from implementing `Replay`"
    )]
    pub trait Sealed {
        /// What a response future stores of a `T` that only a replay uses.
        ///
        /// Like `Replay::Copied`, a type without values if there is never a replay.
        type Kept<T>;

        fn keep<T>(make: impl FnOnce() -> T) -> Option<Self::Kept<T>>;

        /// Takes out what was kept.
        fn release<T>(kept: Self::Kept<T>) -> T;
    }

    impl Sealed for super::Never {
        type Kept<T> = Infallible;

        #[inline]
        fn keep<T>(_: impl FnOnce() -> T) -> Option<Self::Kept<T>> {
            None
        }

        #[inline]
        fn release<T>(kept: Self::Kept<T>) -> T {
            match kept {}
        }
    }

    macro_rules! keeps {
        ($replay:ty) => {
            impl Sealed for $replay {
                type Kept<T> = T;

                #[inline]
                fn keep<T>(make: impl FnOnce() -> T) -> Option<Self::Kept<T>> {
                    Some(make())
                }

                #[inline]
                fn release<T>(kept: Self::Kept<T>) -> T {
                    kept
                }
            }
        };
    }

    keeps!(super::CloneBody);
    keeps!(super::EmptyBody);
}

#[cfg(test)]
mod tests {
    use std::{
        pin::Pin,
        task::{Context, Poll},
    };

    use bytes::Bytes;
    use http_body::Frame;
    use http_body_util::Full;

    use super::{sealed::Sealed, *};

    /// A body that can be sent once: no `Clone`.
    #[derive(Debug, Default)]
    struct Streaming {
        chunks: usize,
    }

    impl Body for Streaming {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            let frame = self.chunks.checked_sub(1).map(|left| {
                self.chunks = left;
                Ok(Frame::data(Bytes::from_static(b"chunk")))
            });
            Poll::Ready(frame)
        }

        fn is_end_stream(&self) -> bool {
            self.chunks == 0
        }
    }

    /// A body whose default is not empty.
    struct Greeting(&'static str);

    impl Default for Greeting {
        fn default() -> Self {
            Self("hello")
        }
    }

    impl Body for Greeting {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(None)
        }

        fn is_end_stream(&self) -> bool {
            self.0.is_empty()
        }
    }

    #[derive(Clone, Debug, PartialEq)]
    struct Deadline(u64);

    fn request<B>(body: B) -> Request<B> {
        Request::builder()
            .method(Method::DELETE)
            .uri("https://api.example.com/things/1?force=true")
            .version(Version::HTTP_2)
            .header("accept", "text/plain")
            .header("accept", "text/html")
            .extension(Deadline(7))
            .body(body)
            .unwrap()
    }

    fn copy<R: Replay<Request<B>>, B>(replay: R, request: &Request<B>) -> Option<Request<B>> {
        replay.copy(request).map(R::restore)
    }

    fn assert_same_head<B>(copy: &Request<B>, original: &Request<B>) {
        assert_eq!(copy.method(), original.method());
        assert_eq!(copy.uri(), original.uri());
        assert_eq!(copy.version(), original.version());
        assert_eq!(copy.headers(), original.headers());
        assert_eq!(
            copy.extensions().get::<Deadline>(),
            original.extensions().get::<Deadline>()
        );
    }

    #[test]
    fn never_keeps_nothing_of_any_request() {
        assert!(copy(Never, &request(Streaming::default())).is_none());
        assert!(copy(Never, &request(String::new())).is_none());
        // Not even a body is needed.
        struct Opaque;
        assert!(copy(Never, &request(Opaque)).is_none());
        let kept = Never::keep::<()>(|| unreachable!("it is of no use"));
        assert!(kept.is_none());
    }

    #[test]
    fn what_never_keeps_takes_no_space() {
        type Copied<R> = Option<<R as Replay<Request<String>>>::Copied>;
        type Kept<R> = Option<<R as Sealed>::Kept<[u64; 32]>>;
        assert_eq!(size_of::<(Copied<Never>, Kept<Never>)>(), 0);
        assert!(size_of::<Kept<CloneBody>>() >= 256);
    }

    #[test]
    fn clone_body_copies_the_whole_request() {
        let original = request(Full::new(Bytes::from_static(b"body")));
        let copy = copy(CloneBody, &original).unwrap();
        assert_same_head(&copy, &original);
        assert_eq!(
            format!("{:?}", copy.body()),
            format!("{:?}", original.body())
        );
    }

    #[test]
    fn empty_body_copies_a_request_without_a_body() {
        let original = request(Streaming::default());
        let copy = copy(EmptyBody, &original).unwrap();
        assert_same_head(&copy, &original);
        assert!(copy.body().is_end_stream());
    }

    #[test]
    fn empty_body_sends_a_streaming_body_once() {
        assert!(copy(EmptyBody, &request(Streaming { chunks: 1 })).is_none());
    }

    #[test]
    fn empty_body_makes_up_no_body() {
        assert!(copy(EmptyBody, &request(Greeting(""))).is_none());
    }
}
