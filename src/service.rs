//! [`BearerAuth`]: the service that the layer makes.

use std::{
    fmt, mem,
    sync::Arc,
    task::{Context, Poll},
};

use http::header::AUTHORIZATION;
use tower_service::Service;

use crate::{
    cache::TokenCache,
    error::BoxError,
    future::ResponseFuture,
    message::{HttpRequest, HttpResponse},
    origin::{self, Passage},
    ready::Door,
    replay::Replay,
    settings::Settings,
};

/// Attaches a bearer token to each request before the inner service gets it.
///
/// Made by a [`BearerAuthLayer`](crate::BearerAuthLayer). Clones share one token.
///
/// # Readiness
///
/// The service is ready when the inner one is, and never says no for want of a token. While a token is at
/// hand, the service that was polled ready is the one that is called. A request that has to wait for a token
/// gives its readiness back first, with any permit or place in a queue that it stands for, and makes a clone
/// of the inner service ready once the token is there: a limit below bounds what is being sent, and whoever
/// wants to bound what is waiting puts a limit above.
///
/// # Errors
///
/// The inner service's errors pass through as they are. A token failure is a
/// [`TokenError`](crate::TokenError), found by a downcast; the request was not sent.
///
/// # Panics
///
/// Its futures, if they have to wait for a token on a tokio runtime without timers.
#[derive(Clone)]
pub struct BearerAuth<S, R> {
    inner: S,
    door: Door,
    replay: R,
}

impl<S, R> BearerAuth<S, R> {
    pub(crate) fn new(inner: S, settings: Settings, replay: R) -> Self {
        Self {
            inner,
            door: Door::new(settings),
            replay,
        }
    }

    /// Returns the cache that feeds this service.
    pub fn cache(&self) -> &TokenCache {
        &self.door.settings().cache
    }

    /// Returns the inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns the inner service, mutable.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Unwraps the inner service.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S, R, Req> Service<Req> for BearerAuth<S, R>
where
    S: Service<Req> + Clone,
    S::Response: HttpResponse,
    S::Error: Into<BoxError>,
    R: Replay<Req>,
    Req: HttpRequest,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ResponseFuture<S, R, Req>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    #[inline]
    fn call(&mut self, request: Req) -> Self::Future {
        let settings = self.door.settings();
        if request.extension::<WithoutToken>().is_some()
            || (settings.keep_existing && request.headers().contains_key(AUTHORIZATION))
        {
            return ResponseFuture::bare(self.inner.call(request));
        }
        let passage = match request.uri() {
            Some(uri) => match settings.origins.judge(&uri) {
                Passage::Refuse => return ResponseFuture::refused(origin::refusal(&uri)),
                passage => passage,
            },
            // It cannot be sent: the error is the inner service's.
            None => Passage::Bare,
        };
        if passage == Passage::Bare {
            return ResponseFuture::bare(self.inner.call(request));
        }
        match self.door.ready(request.extension()) {
            Some(ready) => ResponseFuture::send(&mut self.inner, request, ready, &self.replay),
            None => {
                // Dropping the ready service gives back what its readiness holds, a permit or a place; the
                // clones hold none.
                let service = self.inner.clone();
                drop(mem::replace(&mut self.inner, service.clone()));
                let settings = Arc::clone(self.door.settings());
                ResponseFuture::wait(service, request, self.replay.clone(), settings)
            }
        }
    }
}

/// Sends a request without a token of ours, when it is among the request's extensions.
///
/// Such a request passes as it is, with the `Authorization` that it may bring along, wherever it goes; a 401 to it
/// says nothing about a token.
///
/// ```
/// use tower_bearer::WithoutToken;
///
/// let mut request = http::Request::new(());
/// request.extensions_mut().insert(WithoutToken);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WithoutToken;

impl<S: fmt::Debug, R: fmt::Debug> fmt::Debug for BearerAuth<S, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BearerAuth")
            .field("inner", &self.inner)
            .field("replay", &self.replay)
            .finish_non_exhaustive()
    }
}
