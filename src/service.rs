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
    error::{BoxError, TokenError},
    future::{ResponseFuture, Sent},
    message::{self, HttpRequest, HttpResponse},
    origin::{self, Disposition},
    replay::Replay,
    slot::{Mark, Prepared, Slot},
    source::TokenRequest,
};

/// Attaches a bearer token to each request before the inner service gets it.
///
/// Made by a [`BearerAuthLayer`](crate::BearerAuthLayer). Clones share one token.
///
/// # Readiness
///
/// The service is ready when the inner one is, whether or not there is a token. While a token is at hand, the service
/// that was polled ready is the one that is called. A request that has to wait for a token first gives its readiness
/// back, with any permit or place in a queue that goes with it, and makes a clone of the inner service ready once the
/// token is there. So a limit below bounds what is being sent; to bound what is waiting, put a limit above. A request
/// that may not be sent at all gives its readiness back too.
///
/// While a refused request waits for another token, its 401 is held with the body unread. Over HTTP/2 that occupies a
/// stream and a part of the connection's window until the body has ended, and a permit if a layer below keeps one in
/// the body. So the token endpoint should not share the API's connections. The default client has its own.
///
/// # Errors
///
/// The inner service's errors pass through as they are. A token failure is a [`TokenError`], found by a downcast; the
/// request was not sent.
///
/// # Panics
///
/// Its futures, if they have to wait for a token on a tokio runtime without timers.
#[derive(Clone)]
pub struct BearerAuth<S, R> {
    inner: S,
    /// Whether a [usual](HttpRequest::is_usual) request may carry the token.
    takes_usual: bool,
    slot: Slot,
    replay: R,
}

impl<S, R> BearerAuth<S, R> {
    pub(crate) fn new(inner: S, slot: Slot, replay: R) -> Self {
        Self {
            inner,
            takes_usual: slot.settings().take_usual(),
            slot,
            replay,
        }
    }

    /// Returns the cache that this service takes its tokens from.
    pub fn cache(&self) -> &TokenCache {
        &self.slot.settings().cache
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
    fn call(&mut self, mut request: Req) -> Self::Future {
        // First, so that the copy is made in place; wasted if the request waits or carries no token.
        let mut copy = self.replay.copy(&request);
        match self.sign(&mut request, &mut copy) {
            // The only call of the inner service without a wait, so that it can be inlined here.
            Ok(sent) => ResponseFuture::sending(self.inner.call(request), sent, copy),
            Err(obstacle) => {
                // The copy's drop is foreign code: a panic in it once the future exists would leak the future.
                discard(&mut copy);
                self.call_later(request, obstacle)
            }
        }
    }
}

/// Drops an unneeded copy; out of line, since most are kept.
#[cold]
#[inline(never)]
fn discard<T>(copy: &mut Option<T>) {
    *copy = None;
}

/// Why a request is not sent at once.
enum Obstacle {
    /// There is no token.
    NoToken,
    /// It may not be sent at all.
    Refused(TokenError),
}

impl<S, R> BearerAuth<S, R> {
    /// Attaches a token if the request is to carry one, and returns what its future has to know. Discards the `copy` of
    /// a request that carries none.
    #[inline]
    fn sign<Req>(
        &mut self,
        request: &mut Req,
        copy: &mut Option<R::Copied>,
    ) -> Result<Sent<S, R>, Obstacle>
    where
        S: Clone,
        R: Replay<Req>,
        Req: HttpRequest,
    {
        // The common case, which skips all other checks.
        let disposition = match self.takes_usual && request.is_usual() {
            true => Some(Disposition::Attach),
            false => self.judge(request),
        };
        let prepared = match disposition {
            Some(Disposition::Attach) => self.slot.held(),
            _ => None,
        };
        let Some(prepared) = prepared else {
            return self.sign_slow(request, copy, disposition);
        };
        let sent = Sent::new(prepared.mark, copy, || {
            (self.inner.clone(), Arc::clone(prepared))
        });
        request
            .headers_mut()
            .insert(AUTHORIZATION, prepared.header());
        Ok(sent)
    }

    /// The disposition of a request that only its URI decides; such a request carries the plain token, if any.
    #[inline(never)]
    fn judge<Req: HttpRequest>(&self, request: &Req) -> Option<Disposition> {
        let settings = self.slot.settings();
        if settings.keep_existing
            || request.extension::<TokenRequest>().is_some()
            || request.extension::<WithoutToken>().is_some()
        {
            return None;
        }
        request.uri().map(|uri| settings.origins.judge(&uri))
    }

    /// As [`sign`](Self::sign), with all that the request and the settings say.
    #[inline(never)]
    fn sign_slow<Req>(
        &mut self,
        request: &mut Req,
        copy: &mut Option<R::Copied>,
        disposition: Option<Disposition>,
    ) -> Result<Sent<S, R>, Obstacle>
    where
        S: Clone,
        R: Replay<Req>,
        Req: HttpRequest,
    {
        if !self.admits(request, disposition)? {
            discard(copy);
            return Ok(Sent::bare());
        }
        let sent = match request.extension() {
            None => {
                let prepared = self.slot.prepared().ok_or(Obstacle::NoToken)?;
                message::authorize(request.headers_mut(), prepared.header());
                Sent::new(prepared.mark, copy, || (self.inner.clone(), prepared))
            }
            key => {
                let settings = self.slot.settings();
                let token = settings.cache.attach(key).ok_or(Obstacle::NoToken)?;
                settings.cache.meters().requests().checked(&token);
                message::authorize(request.headers_mut(), token.header_value().clone());
                Sent::new(Mark::new(&token, settings), copy, || {
                    let prepared = Prepared::new(token, Arc::clone(settings));
                    (self.inner.clone(), prepared)
                })
            }
        };
        Ok(sent)
    }

    /// Whether a request is to carry our token; `disposition` is what its URI says, if known.
    fn admits<Req: HttpRequest>(
        &self,
        request: &Req,
        disposition: Option<Disposition>,
    ) -> Result<bool, Obstacle> {
        let settings = self.slot.settings();
        let requests = || settings.cache.meters().requests();
        let is_bare = || {
            request.extension::<WithoutToken>().is_some()
                || (settings.keep_existing && request.headers().contains_key(AUTHORIZATION))
        };
        let disposition = match disposition {
            None if is_bare() => Some(Disposition::Bare),
            None => request.uri().map(|uri| settings.origins.judge(&uri)),
            known => known,
        };
        match disposition {
            // Without a URI it cannot be sent: the inner service returns the error.
            Some(Disposition::Attach) => Ok(request.uri().is_some()),
            Some(Disposition::Bare) => {
                requests().bare();
                Ok(false)
            }
            Some(Disposition::Reject) => {
                requests().refused();
                let uri = request.uri().expect("it was judged by its URI");
                Err(Obstacle::Refused(origin::insecure_uri(&uri)))
            }
            None => Ok(false),
        }
    }

    #[cold]
    fn call_later<Req>(&mut self, request: Req, obstacle: Obstacle) -> ResponseFuture<S, R, Req>
    where
        S: Service<Req> + Clone,
        R: Replay<Req>,
        Req: HttpRequest,
    {
        // Dropping the ready service releases the permit or queue slot its readiness holds; the clones hold none.
        let service = self.inner.clone();
        drop(mem::replace(&mut self.inner, service.clone()));
        if let Obstacle::Refused(error) = obstacle {
            return ResponseFuture::refused(error);
        }
        let settings = Arc::clone(self.slot.settings());
        ResponseFuture::wait(service, request, self.replay.clone(), settings)
    }
}

/// Among the extensions of a request: sends it without a token.
///
/// Such a request passes as it is, with the `Authorization` that it may bring along, wherever it goes; a 401 to it
/// says nothing about a token.
///
/// A `FollowRedirect` above drops the extensions of a request on its way to another origin, and this one with them,
/// unless it is told to keep it; [`origins`](crate::BearerAuthLayer::origins) keep the token from there in any case. The
/// one of tower-http 0.6 drops them at every hop, within one origin too.
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
