//! [`ResponseFuture`]: acquire a token, make the service ready, send, judge the answer, maybe send once more.

use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tower_service::Service;

use crate::{
    cache::{self, Acquire, Complaint, Remedy, TokenCache},
    challenge::{self, Verdict},
    error::{BoxError, TokenError},
    message::{self, HttpRequest, HttpResponse},
    replay::{Replay, sealed::Sealed},
    settings::Settings,
    slot::{Mark, Prepared},
    telemetry,
    time::Now,
    token::AccessToken,
};

pin_project! {
    /// The response future of [`BearerAuth`](crate::BearerAuth).
    ///
    /// # Cancel safety
    ///
    /// It may be dropped at any point. A token request that it waits for goes on for the others, and its
    /// result is kept.
    ///
    /// # Panics
    ///
    /// If it has to wait for a token on a tokio runtime without timers. It may panic if it is polled once more after it
    /// has completed.
    #[must_use = "futures do nothing unless they are polled"]
    pub struct ResponseFuture<S, R, Req>
    where
        S: Service<Req>,
        R: Replay<Req>,
    {
        #[pin]
        state: State<S, R, Req>,
        // Of a request in `Sending`; separate fields outside the state, so that they are moved less often.
        sent: Sent<S, R>,
        copy: Option<R::Copied>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, R, Req>
    where
        S: Service<Req>,
        R: Replay<Req>,
    {
        // The request waits to be sent, or to be sent again; it holds no readiness of the inner service.
        Waiting { waiting: Pin<Box<Waiting<S, R, Req>>> },
        // The inner service has the request, with or without our token.
        Sending { #[pin] response: S::Future },
        // The request is not sent.
        Refused { error: TokenError },
        // The response was returned.
        Done,
    }
}

impl<S, R, Req> ResponseFuture<S, R, Req>
where
    S: Service<Req>,
    R: Replay<Req>,
{
    /// A request that the inner service has, with or without our token.
    #[inline]
    pub(crate) fn sending(response: S::Future, sent: Sent<S, R>, copy: Option<R::Copied>) -> Self {
        Self {
            state: State::Sending { response },
            sent,
            copy,
        }
    }

    /// A request that is not sent.
    pub(crate) fn refused(error: TokenError) -> Self {
        Self {
            state: State::Refused { error },
            sent: Sent::bare(),
            copy: None,
        }
    }

    /// A request that waits for a token; `service` need not be ready.
    pub(crate) fn wait(service: S, request: Req, replay: R, settings: Arc<Settings>) -> Self
    where
        Req: HttpRequest,
    {
        let acquire = match settings.cache.acquire(request.extension()) {
            Ok(acquire) => acquire,
            Err(error) => {
                settings.cache.meters().requests().failed();
                return Self::refused(error);
            }
        };
        let waiting = Box::pin(Waiting {
            request: Some(request),
            service,
            settings,
            attempt: SendAttempt::First { replay },
            rounds: ROUNDS,
            phase: Phase::Acquiring { acquire },
        });
        Self {
            state: State::Waiting { waiting },
            sent: Sent::bare(),
            copy: None,
        }
    }
}

impl<S, R, Req> ResponseFuture<S, R, Req>
where
    S: Service<Req> + Clone,
    R: Replay<Req>,
    Req: HttpRequest,
{
    /// Sends `request` with a token, and keeps what a replay needs if `replay` allows one.
    #[inline]
    fn send(
        service: &mut S,
        mut request: Req,
        token: AccessToken,
        settings: &Arc<Settings>,
        replay: Option<&R>,
    ) -> Self {
        let copy = replay.and_then(|replay| replay.copy(&request));
        message::authorize(request.headers_mut(), token.header_value().clone());
        let sent = Sent::new(Mark::new(&token, settings), &copy, || {
            let prepared = Prepared::new(token, Arc::clone(settings));
            (service.clone(), prepared)
        });
        Self::sending(service.call(request), sent, copy)
    }
}

impl<S, R, Req> Future for ResponseFuture<S, R, Req>
where
    S: Service<Req> + Clone,
    S::Response: HttpResponse,
    S::Error: Into<BoxError>,
    R: Replay<Req>,
    Req: HttpRequest,
{
    type Output = Result<S::Response, BoxError>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &self.state {
            State::Sending { .. } => self.poll_sending(cx),
            _ => self.poll_waiting(cx),
        }
    }
}

impl<S, R, Req> ResponseFuture<S, R, Req>
where
    S: Service<Req> + Clone,
    S::Response: HttpResponse,
    S::Error: Into<BoxError>,
    R: Replay<Req>,
    Req: HttpRequest,
{
    #[inline]
    fn poll_sending(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<S::Response, BoxError>> {
        let StateProj::Sending { response } = self.as_mut().project().state.project() else {
            unreachable!("the request has left");
        };
        match ready!(response.poll(cx)) {
            Ok(answer) if challenge::is_candidate(&answer) => self.poll_judged(answer, cx),
            // The common case; the remaining fields are dropped with this future.
            Ok(answer) => Poll::Ready(Ok(answer)),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }

    #[cold]
    fn poll_judged(
        mut self: Pin<&mut Self>,
        answer: S::Response,
        cx: &mut Context<'_>,
    ) -> Poll<Result<S::Response, BoxError>> {
        let mut this = self.as_mut().project();
        let sent = mem::replace(this.sent, Sent::bare());
        let copy = this.copy.take();
        // Dropped before any wait: the inner future may hold a permit of a limit below.
        this.state.set(State::Done);
        match sent.judge(answer, copy) {
            Judged::Answer(answer) => Poll::Ready(Ok(answer)),
            Judged::Resend(waiting) => {
                this.state.set(State::Waiting { waiting });
                self.poll_waiting(cx)
            }
        }
    }

    #[cold]
    fn poll_waiting(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<S::Response, BoxError>> {
        let mut this = self.as_mut().project();
        let left = match this.state.as_mut().project() {
            StateProj::Waiting { waiting } => ready!(waiting.as_mut().poll_wait(cx)),
            StateProj::Refused { error } => Err(error.clone().into()),
            StateProj::Sending { .. } | StateProj::Done => {
                panic!("`ResponseFuture` polled after completion")
            }
        };
        this.state.set(State::Done);
        match left? {
            WaitOutcome::Send(next) => {
                self.set(next);
                self.poll_sending(cx)
            }
            WaitOutcome::Answer(answer) => Poll::Ready(Ok(answer)),
        }
    }
}

impl<S, R, Req> fmt::Debug for ResponseFuture<S, R, Req>
where
    S: Service<Req>,
    R: Replay<Req>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            State::Waiting { .. } => "Waiting",
            State::Sending { .. } => "Sending",
            State::Refused { .. } => "Refused",
            State::Done => "Done",
        };
        f.debug_struct("ResponseFuture")
            .field("state", &format_args!("{state}"))
            .finish_non_exhaustive()
    }
}

/// What a replay needs besides the copy of the request.
type Resend<S, R> = <R as Sealed>::Kept<(S, Arc<Prepared>)>;

/// What is kept of a request that was sent.
pub(crate) struct Sent<S, R: Sealed> {
    /// Of our token, if the request carries it.
    mark: Option<Mark>,
    /// Only with a copy of the request.
    resend: Option<Resend<S, R>>,
}

/// What to do with an answer.
enum Judged<S, R, Req>
where
    S: Service<Req>,
    R: Replay<Req>,
{
    Answer(S::Response),
    Resend(Pin<Box<Waiting<S, R, Req>>>),
}

impl<S, R: Sealed> Sent<S, R> {
    /// Of a request with our token; `resend` makes what a replay needs, if there is a copy.
    #[inline]
    pub(crate) fn new<C>(
        mark: Mark,
        copy: &Option<C>,
        resend: impl FnOnce() -> (S, Arc<Prepared>),
    ) -> Self {
        Self {
            mark: Some(mark),
            resend: copy.as_ref().and_then(|_| R::keep(resend)),
        }
    }

    /// Of a request without our token.
    #[inline]
    pub(crate) fn bare() -> Self {
        Self {
            mark: None,
            resend: None,
        }
    }

    /// Reports to the cache if `answer` refuses the token, and decides whether to send the request again.
    fn judge<Req>(self, answer: S::Response, copy: Option<R::Copied>) -> Judged<S, R, Req>
    where
        S: Service<Req, Response: HttpResponse>,
        R: Replay<Req>,
    {
        let Some(mark) = self.mark else {
            return Judged::Answer(answer);
        };
        let complaint = match challenge::judge(answer.status(), answer.headers()) {
            Verdict::InvalidToken => Complaint::Invalid,
            Verdict::MissingClaims(claims) => Complaint::Claims(claims),
            Verdict::Unexplained if mark.refresh_on_unexplained_401() => Complaint::Unexplained,
            Verdict::Unexplained | Verdict::NotOurs => {
                // Dropped before the answer is returned: this drop is foreign code, and a later panic in it would
                // leak the answer with its connection.
                drop((copy, self.resend));
                return Judged::Answer(answer);
            }
        };
        let (Some(copy), Some(resend)) = (copy, self.resend) else {
            cache::refused(mark.token(), complaint);
            return Judged::Answer(answer);
        };
        let (request, (service, prepared)) = (R::restore(copy), R::release(resend));
        let Prepared {
            token, settings, ..
        } = &*prepared;
        let remedy = settings.cache.refused(token, complaint);
        let refused = token.clone();
        let phase = match remedy {
            Remedy::Nothing => {
                drop((request, service, prepared));
                return Judged::Answer(answer);
            }
            Remedy::Token(token) => {
                // The same in reverse: a panic here must not leak the request.
                drop(answer);
                Phase::Readying { token }
            }
            Remedy::Wait(joined) => Phase::Holding {
                acquire: joined.wait(),
                answer: Some(Box::new(answer)),
            },
        };
        Judged::Resend(Box::pin(Waiting {
            request: Some(request),
            service,
            settings: Arc::clone(settings),
            attempt: SendAttempt::Replay { refused },
            rounds: 0,
            phase,
        }))
    }
}

pin_project! {
    /// A request that waits for a token and then for the inner service.
    struct Waiting<S, R, Req>
    where
        S: Service<Req>,
    {
        // Present until sent.
        request: Option<Req>,
        // Polled for readiness only once there is a token.
        service: S,
        settings: Arc<Settings>,
        attempt: SendAttempt<R>,
        // How many more tokens may die while the service gets ready.
        rounds: u8,
        #[pin]
        phase: Phase<S::Response>,
    }
}

pin_project! {
    #[project = PhaseProj]
    enum Phase<Answer> {
        // Waits for a token, without readiness of the service.
        Acquiring { #[pin] acquire: Acquire },
        // Waits for another token; if none comes, the refusal is the answer. It is held rather than dropped, because
        // hyper keeps a connection if it had time to read a small body. Boxed, as most waits have none.
        Holding { #[pin] acquire: Acquire, answer: Option<Box<Answer>> },
        // Has a token, and makes the service ready.
        Readying { token: AccessToken },
    }
}

/// Whether a request is sent for the first or the second time.
enum SendAttempt<R> {
    First { replay: R },
    Replay { refused: AccessToken },
}

impl<R> SendAttempt<R> {
    /// Whether the request may be sent with `token`: a replay only with another one (law 8).
    fn allows(&self, token: &AccessToken) -> bool {
        match self {
            Self::First { .. } => true,
            Self::Replay { refused } => !token.same_text(refused),
        }
    }

    /// Counts a request that fails for lack of a token; a replay was counted before.
    fn failed(&self, cache: &TokenCache) {
        if let Self::First { .. } = self {
            cache.meters().requests().failed();
        }
    }

    fn replay(&self) -> Option<&R> {
        match self {
            Self::First { replay } => Some(replay),
            Self::Replay { .. } => None,
        }
    }
}

/// How a wait ends.
enum WaitOutcome<S, R, Req>
where
    S: Service<Req>,
    R: Replay<Req>,
{
    Send(ResponseFuture<S, R, Req>),
    Answer(S::Response),
}

impl<S, R, Req> Waiting<S, R, Req>
where
    S: Service<Req> + Clone,
    S::Error: Into<BoxError>,
    R: Replay<Req>,
    Req: HttpRequest,
{
    fn poll_wait(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<WaitOutcome<S, R, Req>, BoxError>> {
        let mut this = self.project();
        loop {
            let next = match this.phase.as_mut().project() {
                PhaseProj::Acquiring { acquire } => {
                    let token = ready!(acquire.poll(cx));
                    let token = token.inspect_err(|_| this.attempt.failed(&this.settings.cache))?;
                    Phase::Readying { token }
                }
                PhaseProj::Holding { acquire, answer } => {
                    let token = ready!(acquire.poll(cx)).ok();
                    let answer = answer
                        .take()
                        .expect("the refusal is held until the wait ends");
                    match token.filter(|token| this.attempt.allows(token)) {
                        Some(token) => {
                            drop(answer);
                            Phase::Readying { token }
                        }
                        None => return Poll::Ready(Ok(WaitOutcome::Answer(*answer))),
                    }
                }
                PhaseProj::Readying { token } => {
                    ready!(this.service.poll_ready(cx)).map_err(Into::into)?;
                    // Getting ready takes time: meanwhile the token may have been replaced or have died.
                    let cache = &this.settings.cache;
                    let current = cache.attach(Some(token.request()));
                    let current = current.filter(|current| this.attempt.allows(current));
                    let is_stale =
                        current.is_none() && (token.has_died(Now::read()) || cache.is_void(token));
                    // After a shutdown there is only an error, which `acquire` returns.
                    if cache.is_closed() || (is_stale && *this.rounds > 0) {
                        *this.rounds = this.rounds.saturating_sub(1);
                        // Gives the readiness back before the next wait.
                        *this.service = this.service.clone();
                        let acquire = cache.acquire(Some(token.request()));
                        let acquire = acquire.inspect_err(|_| this.attempt.failed(cache))?;
                        Phase::Acquiring { acquire }
                    } else {
                        let request = this
                            .request
                            .take()
                            .expect("the request is there until sent");
                        let token = current.unwrap_or_else(|| token.clone());
                        match this.attempt {
                            SendAttempt::First { .. } => cache.meters().requests().waited(&token),
                            SendAttempt::Replay { .. } => telemetry::replayed(cache.meters()),
                        }
                        return Poll::Ready(Ok(WaitOutcome::Send(ResponseFuture::send(
                            this.service,
                            request,
                            token,
                            this.settings,
                            this.attempt.replay(),
                        ))));
                    }
                }
            };
            this.phase.set(next);
        }
    }
}

/// How many tokens may die while a service gets ready before a request is sent with a dead one: a service that takes
/// longer than tokens live would keep its requests forever (law 6), and the API decides whether a token is valid.
const ROUNDS: u8 = 2;
