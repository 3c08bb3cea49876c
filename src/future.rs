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
        // Of a request that the inner service has; beside the state and each by itself, to be moved less often.
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
        // The request has not left, or is to leave once more; it holds nothing of the inner service.
        Waiting { waiting: Pin<Box<Waiting<S, R, Req>>> },
        // The inner service has the request; with a token of ours, or without one.
        Sending { #[pin] response: S::Future },
        // The request may not be sent.
        Refused { error: TokenError },
        // The response was handed out.
        Done,
    }
}

impl<S, R, Req> ResponseFuture<S, R, Req>
where
    S: Service<Req>,
    R: Replay<Req>,
{
    /// A request that the inner service has; with a token of ours, or without one.
    #[inline]
    pub(crate) fn sending(response: S::Future, sent: Sent<S, R>, copy: Option<R::Copied>) -> Self {
        Self {
            state: State::Sending { response },
            sent,
            copy,
        }
    }

    /// A request that may not go at all.
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
    /// Sends `request` with a token, and keeps what it takes to send it once more if `replay` says how.
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
        let StateProj::Sending { response, .. } = self.as_mut().project().state.project() else {
            unreachable!("the request has left");
        };
        match ready!(response.poll(cx)) {
            Ok(answer) if challenge::is_candidate(&answer) => self.poll_judged(answer, cx),
            // What most requests come to; what is left of them goes with this future.
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
        // The inner future goes before anything waits: it may hold a permit of a limit below.
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

/// What it takes to send a request once more, beside its copy.
type Resend<S, R> = <R as Sealed>::Kept<(S, Arc<Prepared>)>;

/// What is known of a request that has left.
pub(crate) struct Sent<S, R: Sealed> {
    /// Of the token, if there is one of ours on it.
    mark: Option<Mark>,
    /// There is none without a copy of the request.
    resend: Option<Resend<S, R>>,
}

/// What an answer comes to.
enum Judged<S, R, Req>
where
    S: Service<Req>,
    R: Replay<Req>,
{
    Answer(S::Response),
    Resend(Pin<Box<Waiting<S, R, Req>>>),
}

impl<S, R: Sealed> Sent<S, R> {
    /// Of a request with a token of ours; `resend` makes what it takes to send it once more, if there is a copy of it.
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

    /// Of a request without a token of ours.
    #[inline]
    pub(crate) fn bare() -> Self {
        Self {
            mark: None,
            resend: None,
        }
    }

    /// Tells the cache if `answer` is a refusal of the token, and whether the request is to go once more.
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
                // What is left of a request goes before its answer is returned: its drop is foreign code, and if that
                // panicked later, the answer would never be dropped, and keep its connection.
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
                // The other way round, for the same reason.
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
    /// A request that waits for a token, and then for the inner service.
    struct Waiting<S, R, Req>
    where
        S: Service<Req>,
    {
        // Present until sent.
        request: Option<Req>,
        // Polled for readiness only while a token is at hand.
        service: S,
        settings: Arc<Settings>,
        attempt: SendAttempt<R>,
        // How many tokens may yet die while the service gets ready.
        rounds: u8,
        #[pin]
        phase: Phase<S::Response>,
    }
}

pin_project! {
    #[project = PhaseProj]
    enum Phase<Answer> {
        // There is no token, and nothing is held of the service.
        Acquiring { #[pin] acquire: Acquire },
        // There is a refusal, which is the answer if no other token comes. It is held and not dropped, because
        // hyper keeps a connection if it has had the time to read a small body. Boxed, as most waits have none.
        Holding { #[pin] acquire: Acquire, answer: Option<Box<Answer>> },
        // There is a token; the service is being made ready.
        Readying { token: AccessToken },
    }
}

/// Which of its two times a request is about to leave.
enum SendAttempt<R> {
    First { replay: R },
    Replay { refused: AccessToken },
}

impl<R> SendAttempt<R> {
    /// Whether the request may leave with `token`: the second time only with another one (law 8).
    fn allows(&self, token: &AccessToken) -> bool {
        match self {
            Self::First { .. } => true,
            Self::Replay { refused } => !token.same_text(refused),
        }
    }

    /// Counts a request that fails for want of a token; by its second time it is counted already.
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
                    // Getting ready takes its time: the token may have been replaced, or have died.
                    let cache = &this.settings.cache;
                    let current = cache.attach(Some(token.request()));
                    let current = current.filter(|current| this.attempt.allows(current));
                    let is_stale =
                        current.is_none() && (token.has_died(Now::read()) || cache.is_void(token));
                    // Of a cache that was shut down there is an error to be had, and nothing else.
                    if cache.is_closed() || (is_stale && *this.rounds > 0) {
                        *this.rounds = this.rounds.saturating_sub(1);
                        // The next wait is one without readiness again.
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

/// So many tokens may die while a service gets ready before a request leaves with one that has: a service
/// that takes longer than tokens live would keep its requests for ever (law 6), and the API has the last
/// word on a token's life.
const ROUNDS: u8 = 2;
