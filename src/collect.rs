//! [`CollectBody`]: reads a request's body before the request goes on, so that it can be sent again.

use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request, request};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower::util::Oneshot;
use tower_layer::Layer;
use tower_service::Service;

use crate::{
    error::BoxError,
    replay::{CloneBody, Replay, RequestCopy},
};

/// Reads the bodies of requests up to a limit, so that [`CloneBody`] can send streaming ones again.
///
/// It goes directly above a [`BearerAuthLayer`](crate::BearerAuthLayer). A body that ends within the limit becomes a
/// [`CollectedBody`] of one piece and its trailers, which is cheap to copy. A longer body is sent once, as a stream:
/// first what was read of it, then the rest as the client below asks for it. Its 401 comes back to the caller, and the
/// token is replaced all the same.
///
/// A body is not read here if its [size hint](Body::size_hint) says that it is longer than the limit, or if it is
/// empty.
///
/// Nothing is sent until the body has been read, however long that takes; use a timeout above to bound it. A body that
/// waits for the answer before it ends, such as that of a gRPC call that streams in both directions, is never sent, so
/// keep such requests away from this layer. WebSocket requests from hyper pass, over HTTP/2 (RFC 8441) as well: their
/// stream is an upgrade, and the body is empty.
///
/// # Memory
///
/// Per request, at most `limit` bytes and the one frame that exceeds them are kept, in a buffer of at most twice that
/// size; trailers do not count. Use a limit above to bound the number of requests at a time.
///
/// # Examples
///
/// ```
/// use bytes::Bytes;
/// use http::{Request, Response, StatusCode};
/// use http_body_util::BodyExt;
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
/// use tower_bearer::{
///     BearerAuthLayer, BoxError, CloneBody, CollectBodyLayer, CollectedBody, TokenResponse, source_fn,
/// };
/// # use http_body::Frame;
/// # use http_body_util::StreamBody;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), BoxError> {
/// # let tokens = std::sync::atomic::AtomicU32::new(1);
/// # let source = source_fn(move |_| {
/// #     let number = tokens.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
/// #     async move { TokenResponse::new(format!("token-{number}")) }
/// # });
/// # let frames = ["one ", "two"].map(|data| Ok::<_, BoxError>(Frame::data(Bytes::from(data))));
/// # let streaming = StreamBody::new(tokio_stream::iter(frames));
/// let api = ServiceBuilder::new()
///     .layer(CollectBodyLayer::new(64 * 1024))
///     .layer(BearerAuthLayer::new(source).replay(CloneBody))
///     .service(service_fn(|request: Request<CollectedBody<_>>| async {
///         // The first token was revoked.
///         let revoked = request.headers()["authorization"] == "Bearer token-1";
///         let body = request.into_body().collect().await?.to_bytes();
///         let mut response = Response::new(body);
///         if revoked {
///             *response.status_mut() = StatusCode::UNAUTHORIZED;
///         }
///         Ok::<_, BoxError>(response)
///     }));
///
/// let request = Request::put("https://api.example.com/sims/1").body(streaming)?;
/// let response = api.oneshot(request).await?;
/// assert_eq!(response.status(), StatusCode::OK);
/// assert_eq!(response.body(), "one two");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct CollectBodyLayer {
    limit: usize,
}

impl CollectBodyLayer {
    /// Creates a layer that reads up to `limit` bytes of each body.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { limit }
    }
}

impl<S> Layer<S> for CollectBodyLayer {
    type Service = CollectBody<S>;

    fn layer(&self, inner: S) -> CollectBody<S> {
        CollectBody {
            inner,
            limit: self.limit,
        }
    }
}

/// Reads the body of each request up to a limit before the inner service gets it.
///
/// Made by a [`CollectBodyLayer`].
///
/// # Readiness
///
/// The service is ready when the inner one is. A request whose body has to be read gives that readiness back first,
/// with any permit or place in a queue that it stands for, and makes a clone of the inner service ready once the
/// body is there.
///
/// # Errors
///
/// The inner service's errors pass through as they are. An error of the body, while it is read here, is the
/// request's error, and the request is not sent.
#[derive(Clone, Debug)]
pub struct CollectBody<S> {
    inner: S,
    limit: usize,
}

impl<S, B> Service<Request<B>> for CollectBody<S>
where
    S: Service<Request<CollectedBody<B>>> + Clone,
    S::Error: Into<BoxError>,
    B: Body,
    B::Error: Into<BoxError>,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = CollectBodyFuture<S, B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (head, body) = request.into_parts();
        let least = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        let body = if body.is_end_stream() {
            // The body's drop is foreign code: a panic in it once the future exists would leak the future.
            drop(body);
            CollectedBody::default()
        } else if least > self.limit {
            CollectedBody::streaming(Bytes::new(), Box::pin(body))
        } else {
            // Dropping the ready service releases what its readiness holds; the clones hold nothing.
            let service = self.inner.clone();
            drop(mem::replace(&mut self.inner, service.clone()));
            let collecting = Box::new(Collecting {
                pending: Some((service, head)),
                body: Some(Box::pin(body)),
                limit: self.limit,
                read: BytesMut::with_capacity(least.min(INITIAL_CAPACITY)),
                trailers: None,
            });
            return CollectBodyFuture {
                state: State::Collecting { collecting },
            };
        };
        let response = self.inner.call(Request::from_parts(head, body));
        CollectBodyFuture {
            state: State::Sending { response },
        }
    }
}

pin_project! {
    /// The response future of [`CollectBody`].
    ///
    /// # Cancel safety
    ///
    /// It may be dropped at any point; what was read of the body goes with it.
    #[must_use = "futures do nothing unless they are polled"]
    pub struct CollectBodyFuture<S, B>
    where
        S: Service<Request<CollectedBody<B>>>,
    {
        #[pin]
        state: State<S, B>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, B>
    where
        S: Service<Request<CollectedBody<B>>>,
    {
        // Reads the body, without readiness of the inner service.
        Collecting { collecting: Box<Collecting<S, B>> },
        // Makes a clone of the inner service ready and sends the request.
        Readying { #[pin] response: Oneshot<S, Request<CollectedBody<B>>> },
        // The inner service that was ready has the request.
        Sending { #[pin] response: S::Future },
    }
}

impl<S, B> Future for CollectBodyFuture<S, B>
where
    S: Service<Request<CollectedBody<B>>>,
    S::Error: Into<BoxError>,
    B: Body,
    B::Error: Into<BoxError>,
{
    type Output = Result<S::Response, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            let response = match state.as_mut().project() {
                StateProj::Collecting { collecting } => {
                    let body = ready!(collecting.poll_body(cx)).map_err(Into::into)?;
                    let (service, head) = collecting.pending.take().expect("it waits for its body");
                    Oneshot::new(service, Request::from_parts(head, body))
                }
                StateProj::Readying { response } => return response.poll(cx).map_err(Into::into),
                StateProj::Sending { response } => return response.poll(cx).map_err(Into::into),
            };
            state.set(State::Readying { response });
        }
    }
}

impl<S, B> fmt::Debug for CollectBodyFuture<S, B>
where
    S: Service<Request<CollectedBody<B>>>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            State::Collecting { .. } => "Collecting",
            State::Readying { .. } => "Readying",
            State::Sending { .. } => "Sending",
        };
        f.debug_struct("CollectBodyFuture")
            .field("state", &format_args!("{state}"))
            .finish_non_exhaustive()
    }
}

/// How much to allocate on a body's own size hint, which may come from a peer: beyond that, data must arrive first.
const INITIAL_CAPACITY: usize = 64 * 1024;

/// A request whose body is being read.
struct Collecting<S, B> {
    /// Present until the body has been read, like the body.
    pending: Option<(S, request::Parts)>,
    body: Option<Pin<Box<B>>>,
    limit: usize,
    read: BytesMut,
    trailers: Option<HeaderMap>,
}

impl<S, B: Body> Collecting<S, B> {
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<CollectedBody<B>, B::Error>> {
        let body = self.body.as_mut().expect("the body is there until read");
        while let Some(frame) = ready!(body.as_mut().poll_frame(cx)?) {
            match frame.into_data() {
                Ok(data) => self.read.put(data),
                Err(frame) => self.trailers = frame.into_trailers().ok(),
            }
            if self.read.len() > self.limit {
                let body = self.body.take().expect("it was there");
                let read = mem::take(&mut self.read).freeze();
                return Poll::Ready(Ok(CollectedBody::streaming(read, body)));
            }
        }
        Poll::Ready(Ok(CollectedBody {
            read: mem::take(&mut self.read).freeze(),
            tail: Tail::Trailers(self.trailers.take()),
        }))
    }
}

/// The body of a request that a [`CollectBody`] hands on: whole, or begun and still streaming.
pub struct CollectedBody<B> {
    read: Bytes,
    tail: Tail<B>,
}

enum Tail<B> {
    /// The body was read to its end.
    Trailers(Option<HeaderMap>),
    /// There is more to come.
    Streaming(Pin<Box<B>>),
}

impl<B> CollectedBody<B> {
    fn streaming(read: Bytes, rest: Pin<Box<B>>) -> Self {
        let tail = Tail::Streaming(rest);
        Self { read, tail }
    }

    /// Copies the body with its trailers, if it was read to its end within the limit.
    ///
    /// The copies share the data.
    pub fn try_clone(&self) -> Option<Self> {
        match &self.tail {
            Tail::Trailers(trailers) => Some(Self {
                read: self.read.clone(),
                tail: Tail::Trailers(trailers.clone()),
            }),
            Tail::Streaming(_) => None,
        }
    }
}

impl<B> Default for CollectedBody<B> {
    /// Makes an empty body.
    fn default() -> Self {
        Self {
            read: Bytes::new(),
            tail: Tail::Trailers(None),
        }
    }
}

impl<B> fmt::Debug for CollectedBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CollectedBody")
            .field("read", &self.read.len())
            .field("whole", &matches!(self.tail, Tail::Trailers(_)))
            .finish_non_exhaustive()
    }
}

impl<B: Body> Body for CollectedBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if !self.read.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(mem::take(&mut self.read)))));
        }
        match &mut self.tail {
            Tail::Trailers(trailers) => Poll::Ready(trailers.take().map(Frame::trailers).map(Ok)),
            Tail::Streaming(rest) => {
                let frame = ready!(rest.as_mut().poll_frame(cx)?);
                let bytes = |mut data: B::Data| data.copy_to_bytes(data.remaining());
                Poll::Ready(frame.map(|frame| Ok(frame.map_data(bytes))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let ended = match &self.tail {
            Tail::Trailers(trailers) => trailers.is_none(),
            Tail::Streaming(rest) => rest.is_end_stream(),
        };
        ended && self.read.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        let read = self.read.len() as u64;
        match &self.tail {
            Tail::Trailers(None) => SizeHint::with_exact(read),
            Tail::Trailers(Some(_)) => {
                // An exact hint would make HTTP/1 send a `Content-Length` and no trailers.
                let mut hint = SizeHint::new();
                hint.set_lower(read);
                hint
            }
            Tail::Streaming(rest) => {
                let rest = rest.size_hint();
                let mut hint = SizeHint::new();
                hint.set_lower(rest.lower().saturating_add(read));
                if let Some(upper) = rest.upper().and_then(|upper| upper.checked_add(read)) {
                    hint.set_upper(upper);
                }
                hint
            }
        }
    }
}

/// Sends a request again if its body was read to its end within the limit.
impl<B> Replay<Request<CollectedBody<B>>> for CloneBody {
    type Copied = RequestCopy<CollectedBody<B>>;

    fn copy(&self, request: &Request<CollectedBody<B>>) -> Option<Self::Copied> {
        let body = request.body().try_clone()?;
        Some(RequestCopy::new(request, body))
    }

    fn restore(copy: Self::Copied) -> Request<CollectedBody<B>> {
        copy.restore()
    }
}
