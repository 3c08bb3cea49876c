//! The baselines: token caches as users write them by hand, and the least that a layer does.
//!
//! The caches are tower services as async code shapes them. They are written with care: the header value is made once
//! per token, the token is checked again after a wait for the lock, and one caller at a time requests a token. They
//! differ only in the lock.

use std::{
    future::Future,
    marker::PhantomData,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use arc_swap::ArcSwapOption;
use http::{HeaderValue, Request, Response, StatusCode, header::AUTHORIZATION};
use pin_project_lite::pin_project;
use tokio::{
    sync::{Mutex, RwLock},
    time::Instant,
};
use tower::Service;
use tower_bearer::BoxError;

use super::{DAY, endpoint::Endpoint};

/// Provides the header value.
pub trait Cache: Send + Sync + 'static {
    fn new(endpoint: Arc<Endpoint>) -> Self;

    fn header(&self) -> impl Future<Output = Result<HeaderValue, BoxError>> + Send;
}

struct Held {
    header: HeaderValue,
    refresh_at: Instant,
}

impl Held {
    fn is_fresh(&self) -> bool {
        Instant::now() < self.refresh_at
    }

    async fn fetch(endpoint: &Endpoint) -> Result<Self, BoxError> {
        let sent = Instant::now();
        let mut header = HeaderValue::try_from(format!("Bearer {}", endpoint.grant().await?))?;
        header.set_sensitive(true);
        Ok(Self {
            header,
            refresh_at: sent + endpoint.lifetime / 2,
        })
    }
}

/// A mutex that is held during the token request.
pub struct MutexCache {
    endpoint: Arc<Endpoint>,
    held: Mutex<Option<Held>>,
}

impl Cache for MutexCache {
    fn new(endpoint: Arc<Endpoint>) -> Self {
        let held = Mutex::default();
        Self { endpoint, held }
    }

    async fn header(&self) -> Result<HeaderValue, BoxError> {
        let mut held = self.held.lock().await;
        if let Some(held) = held.as_ref().filter(|held| held.is_fresh()) {
            return Ok(held.header.clone());
        }
        let fetched = Held::fetch(&self.endpoint).await?;
        let header = fetched.header.clone();
        *held = Some(fetched);
        Ok(header)
    }
}

/// A read-write lock that is held for writing during the token request.
pub struct RwLockCache {
    endpoint: Arc<Endpoint>,
    held: RwLock<Option<Held>>,
}

impl Cache for RwLockCache {
    fn new(endpoint: Arc<Endpoint>) -> Self {
        let held = RwLock::default();
        Self { endpoint, held }
    }

    async fn header(&self) -> Result<HeaderValue, BoxError> {
        if let Some(held) = self.held.read().await.as_ref().filter(|h| h.is_fresh()) {
            return Ok(held.header.clone());
        }
        let mut held = self.held.write().await;
        if let Some(held) = held.as_ref().filter(|held| held.is_fresh()) {
            return Ok(held.header.clone());
        }
        let fetched = Held::fetch(&self.endpoint).await?;
        let header = fetched.header.clone();
        *held = Some(fetched);
        Ok(header)
    }
}

/// A pointer that is read without a lock, and a mutex that is held during the token request.
pub struct ArcSwapCache {
    endpoint: Arc<Endpoint>,
    held: ArcSwapOption<Held>,
    refresh: Mutex<()>,
}

impl ArcSwapCache {
    fn fresh(&self) -> Option<HeaderValue> {
        let held = self.held.load();
        let held = held.as_ref().filter(|held| held.is_fresh())?;
        Some(held.header.clone())
    }
}

impl Cache for ArcSwapCache {
    fn new(endpoint: Arc<Endpoint>) -> Self {
        Self {
            endpoint,
            held: ArcSwapOption::empty(),
            refresh: Mutex::default(),
        }
    }

    async fn header(&self) -> Result<HeaderValue, BoxError> {
        if let Some(header) = self.fresh() {
            return Ok(header);
        }
        let _refreshing = self.refresh.lock().await;
        if let Some(header) = self.fresh() {
            return Ok(header);
        }
        let fetched = Held::fetch(&self.endpoint).await?;
        let header = fetched.header.clone();
        self.held.store(Some(Arc::new(fetched)));
        Ok(header)
    }
}

/// Attaches a cache's header to each request.
pub struct ByHand<S, C> {
    inner: S,
    cache: Arc<C>,
}

impl<S, C: Cache> ByHand<S, C> {
    pub fn new(inner: S, endpoint: &Arc<Endpoint>) -> Self {
        Self {
            inner,
            cache: Arc::new(C::new(Arc::clone(endpoint))),
        }
    }

    /// A service over a cache that holds a token for a day.
    pub async fn with_token(inner: S) -> Self {
        let service = Self::new(inner, &Endpoint::new(Duration::ZERO, DAY));
        let token = service.cache.header().await;
        token.expect("the endpoint grants a token");
        service
    }
}

/// Clones share the cache.
impl<S: Clone, C> Clone for ByHand<S, C> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            cache: Arc::clone(&self.cache),
        }
    }
}

impl<S, C, B, ResBody> Service<Request<B>> for ByHand<S, C>
where
    S: Service<Request<B>, Response = Response<ResBody>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
    C: Cache,
    B: Send + 'static,
{
    type Response = Response<ResBody>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let clone = self.inner.clone();
        let mut inner = mem::replace(&mut self.inner, clone);
        let cache = Arc::clone(&self.cache);
        Box::pin(async move {
            let header = cache.header().await?;
            request.headers_mut().insert(AUTHORIZATION, header);
            inner.call(request).await.map_err(Into::into)
        })
    }
}

/// What any layer must do that looks at answers and has its own errors: a static header with a future around the inner
/// service's, and no token to manage.
///
/// `K` says what it keeps of a request until the answer arrives: [`Nothing`], or a [`Copied`] one for a replay.
#[derive(Clone)]
pub struct Least<S, K> {
    inner: S,
    header: HeaderValue,
    keep: PhantomData<K>,
}

pub trait Keep<Req> {
    type Kept;

    fn keep(request: &Req) -> Self::Kept;
}

#[derive(Clone)]
pub struct Nothing;

#[derive(Clone)]
pub struct Copied;

impl<Req> Keep<Req> for Nothing {
    // Not an `Option`, whose space for a request would be moved with the future.
    type Kept = ();

    #[inline]
    fn keep(_: &Req) {}
}

impl<Req: Clone> Keep<Req> for Copied {
    type Kept = Option<Req>;

    #[inline]
    fn keep(request: &Req) -> Option<Req> {
        Some(request.clone())
    }
}

impl<S, K> Least<S, K> {
    pub fn new(inner: S, token: &str) -> Self {
        let header = HeaderValue::try_from(format!("Bearer {token}"));
        let mut header = header.expect("a token can be sent");
        header.set_sensitive(true);
        Self {
            inner,
            header,
            keep: PhantomData,
        }
    }
}

impl<S, B, ResBody, K> Service<Request<B>> for Least<S, K>
where
    S: Service<Request<B>, Response = Response<ResBody>>,
    S::Error: Into<BoxError>,
    K: Keep<Request<B>, Kept: Default>,
{
    type Response = Response<ResBody>;
    type Error = BoxError;
    type Future = LeastFuture<S::Future, K::Kept>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    #[inline]
    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let kept = K::keep(&request);
        let header = self.header.clone();
        request.headers_mut().insert(AUTHORIZATION, header);
        LeastFuture {
            response: self.inner.call(request),
            kept,
        }
    }
}

pin_project! {
    pub struct LeastFuture<F, Kept> {
        #[pin]
        response: F,
        kept: Kept,
    }
}

impl<F, Kept, ResBody, E> Future for LeastFuture<F, Kept>
where
    F: Future<Output = Result<Response<ResBody>, E>>,
    E: Into<BoxError>,
    Kept: Default,
{
    type Output = Result<Response<ResBody>, BoxError>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        match ready!(this.response.poll(cx)) {
            Ok(answer) => {
                if answer.status() == StatusCode::UNAUTHORIZED {
                    refused(this.kept);
                }
                Poll::Ready(Ok(answer))
            }
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}

/// Where a real layer would replace the token.
#[cold]
#[inline(never)]
fn refused<Kept: Default>(kept: &mut Kept) {
    drop(mem::take(kept));
}
