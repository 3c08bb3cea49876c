//! The one fetch in progress: its task, its attempts, its waiters and its ends.
//!
//! A flight runs in its own task, so that dropping a caller does not stop it. The task holds an [`Ending`], which ends
//! the flight in any case: with the source's answer, with a panic, or as abandoned if a runtime that shuts down drops
//! the task. A parked runtime ends nothing: for that case each waiter has a timer on its own runtime, and gives the
//! flight up when it is overdue.
//!
//! # Invariants
//!
//! 1. A flight ends once; later ends are dropped.
//! 2. Every waiter present when the flight ends is woken, after the lock is released: a waker runs foreign code, which
//!    may drop other waiters.
//! 3. A waiter holds its slot from its creation to its drop or the flight's end.
//! 4. A flight that has ended sends nothing more (the fence).
//!
//! The mutex orders everything: a waiter polled after the end sees it, one polled before has its waker in the slab.

use std::{
    future::{Future, poll_fn},
    mem,
    panic::{self, AssertUnwindSafe},
    pin::{Pin, pin},
    ptr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use fastrand::Rng;
use http::StatusCode;
use pin_project_lite::pin_project;
use slab::Slab;
use tokio::{
    runtime::Handle,
    time::{self, Instant, Sleep},
};
use tracing::{Instrument, Span};

use super::{entry::Entry, reporter::swallow_panics, state::Plan, watch};
use crate::{
    error::{Kind, TokenError},
    policy,
    source::{Fetch, TokenResponse},
    sync::Mutex,
    telemetry::FlightSpan,
    time::Now,
    token::AccessToken,
};

/// One fetch in progress, or ended.
#[derive(Debug)]
pub(crate) struct Flight {
    /// Unique within the process.
    number: u64,
    /// When its waiters give it up.
    overdue: Instant,
    span: FlightSpan,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    end: Option<End>,
    waiters: Slab<Waker>,
}

/// How a flight ended.
#[derive(Clone, Debug)]
pub(crate) enum End {
    /// With a token, which is published.
    Done(AccessToken),
    /// With an error that all waiters share, such as a panic of the source.
    Failed(TokenError),
    /// Without a result: its runtime ended or stood still, or it was overdue. Its waiters look for a new flight.
    Abandoned,
}

/// The outcome of a flight's attempts.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "there is one per flight, and it moves twice"
)]
pub(crate) enum Outcome {
    /// A token, asked for at this time.
    Granted(TokenResponse, Now),
    Failed(TokenError),
    /// None: the task was dropped, or stood still for too long.
    Lost,
}

impl Flight {
    pub(crate) fn new(overdue: Instant) -> Arc<Self> {
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            overdue,
            span: FlightSpan::new(),
            inner: Mutex::new(Inner::default()),
        })
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn span(&self) -> &FlightSpan {
        &self.span
    }

    /// How many waiters it has.
    pub(crate) fn waiters(&self) -> usize {
        self.inner.lock().waiters.len()
    }

    /// Ends the flight and wakes its waiters, unless it has ended before.
    pub(crate) fn end(&self, end: End) {
        let mut inner = self.inner.lock();
        if inner.end.is_some() {
            return;
        }
        inner.end = Some(end);
        let waiters = mem::take(&mut inner.waiters);
        drop(inner);
        for (_, waker) in waiters {
            // A waker is foreign code: its panic must stop neither the other wakers nor the caller.
            swallow_panics(|| waker.wake());
        }
    }

    pub(crate) fn overdue(&self) -> Instant {
        self.overdue
    }

    fn has_ended(&self) -> bool {
        self.inner.lock().end.is_some()
    }

    /// Takes a seat, if there are fewer than `limit` waiters or the flight has ended.
    pub(crate) fn seat(self: &Arc<Self>, limit: usize) -> Option<Seat> {
        let mut inner = self.inner.lock();
        let slot = match inner.end {
            Some(_) => None,
            None if inner.waiters.len() >= limit => return None,
            None => Some(inner.waiters.insert(Waker::noop().clone())),
        };
        drop(inner);
        Some(Seat {
            flight: Arc::clone(self),
            slot,
        })
    }
}

/// Flights are compared by identity.
impl PartialEq for Flight {
    fn eq(&self, other: &Self) -> bool {
        ptr::eq(self, other)
    }
}

/// A waiter's place, freed on drop.
#[derive(Debug)]
pub(crate) struct Seat {
    flight: Arc<Flight>,
    /// Absent if the flight had ended before.
    slot: Option<usize>,
}

impl Seat {
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        // Foreign code: cloned and dropped outside the lock.
        let mut waker = cx.waker().clone();
        let mut inner = self.flight.inner.lock();
        if let Some(end) = &inner.end {
            return Poll::Ready(end.clone());
        }
        if let Some(seated) = self.slot.and_then(|slot| inner.waiters.get_mut(slot)) {
            mem::swap(seated, &mut waker);
        }
        drop(inner);
        Poll::Pending
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let Some(slot) = self.slot else {
            return;
        };
        let mut inner = self.flight.inner.lock();
        // The slab is empty once the flight has ended.
        let waker = inner.waiters.try_remove(slot);
        drop(inner);
        drop(waker);
    }
}

pin_project! {
    /// Waits for a flight's end or for a deadline on this runtime, whichever comes first.
    #[derive(Debug)]
    pub(crate) struct Waiter {
        seat: Seat,
        // On the runtime that polled it last.
        #[pin]
        timer: Sleep,
    }
}

impl Waiter {
    /// # Panics
    ///
    /// If there is no tokio runtime, or one without timers.
    pub(crate) fn new(seat: Seat, until: Instant) -> Self {
        Self {
            seat,
            timer: time::sleep_until(until),
        }
    }
}

impl Future for Waiter {
    /// `None` if the deadline came first.
    type Output = Option<End>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        if let Poll::Ready(end) = this.seat.poll_end(cx) {
            return Poll::Ready(Some(end));
        }
        // Anew on each poll: the waiter may have moved here from a runtime that is parked or gone by now.
        if Handle::try_current().is_ok() {
            let until = this.timer.deadline();
            this.timer.set(time::sleep_until(until));
        }
        ready!(this.timer.poll(cx));
        Poll::Ready(None)
    }
}

/// Runs a flight in its own task.
///
/// Must not be called with the state locked: a runtime that is shutting down drops the task right here, and with it
/// the [`Ending`], which takes that lock.
pub(crate) fn launch(runtime: &Handle, entry: Arc<Entry>, flight: Arc<Flight>, plan: Plan) {
    let ending = Ending { entry, flight };
    let closing = ending.entry.closing().clone();
    // Within the caller's span, and with the `Ending` in place: a subscriber may panic.
    let open_span = || ending.entry.reporter().open_span(&ending.flight, &plan);
    let span = panic::catch_unwind(AssertUnwindSafe(open_span)).unwrap_or_else(|_| Span::none());
    runtime.spawn(closing.run_until_cancelled_owned(async move {
        let entry = Arc::clone(&ending.entry);
        let flown = async {
            entry.reporter().started(&ending.flight, &plan);
            let outcome = fly(&ending, plan).await;
            entry.land(&ending.flight, outcome);
            drop(ending);
        };
        {
            // Listeners, and what is dropped with the flight, are foreign code: their panics must not end the watch.
            let mut flown = pin!(flown.instrument(span));
            poll_fn(|cx| {
                // Otherwise a shutdown would look like a timed-out attempt.
                if entry.closing().is_cancelled() {
                    return Poll::Ready(());
                }
                panic::catch_unwind(AssertUnwindSafe(|| flown.as_mut().poll(cx)))
                    .unwrap_or(Poll::Ready(()))
            })
            .await;
        }
        if entry.is_plain() {
            let watching = entry.watching().clone();
            watching.run_until_cancelled(watch::run(entry)).await;
        }
    }));
}

/// Ends a flight whose task is dropped or panics before it has landed.
struct Ending {
    entry: Arc<Entry>,
    flight: Arc<Flight>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        if self.flight.has_ended() {
            return;
        }
        // A subscriber is foreign code: its panic during an unwind would abort the process.
        swallow_panics(|| self.entry.land(&self.flight, Outcome::Lost));
        // In case landing panicked after the flight was off the record.
        self.flight.end(End::Abandoned);
    }
}

impl Ending {
    /// Asks the source once, and also returns whether the runtime stood still for most of that time: parked, or with
    /// its process frozen.
    ///
    /// Every poll is fenced: a parked runtime that is driven again is late, and neither its timers nor the source know
    /// that the flight was given up. A panic of the source becomes an error.
    async fn ask(
        &self,
        fetch: Fetch,
        deadline: Instant,
    ) -> (Result<TokenResponse, TokenError>, bool) {
        let began = Instant::now();
        let limit = fetch.timeout.min(deadline.saturating_duration_since(began));
        let (mut left, mut stood_still) = (began, Duration::ZERO);
        // Fences the source's code before its first await too.
        let mut asked = pin!(async { self.entry.source().fetch(fetch).await });
        let answer = {
            let fenced = poll_fn(|cx| {
                let now = Instant::now();
                // Not counted if the source itself blocked the thread.
                if now > left + POLL_INTERVAL + policy::GRACE {
                    stood_still += now - left;
                }
                if self.flight.has_ended() || now >= deadline {
                    return Poll::Ready(Err(TokenError::new(Kind::Timeout)));
                }
                // Unwind safe, since a future that panicked is not polled again.
                let polled = panic::catch_unwind(AssertUnwindSafe(|| asked.as_mut().poll(cx)));
                left = Instant::now();
                polled.unwrap_or_else(|_| Poll::Ready(Err(TokenError::new(Kind::Panicked))))
            });
            let mut fenced = pin!(time::timeout(limit, fenced));
            loop {
                // Polls it at this interval for as long as the runtime drives timers.
                if let Ok(answer) = time::timeout(POLL_INTERVAL, fenced.as_mut()).await {
                    break answer;
                }
            }
        };
        let answer = answer.unwrap_or_else(|_| Err(TokenError::new(Kind::Timeout)));
        (answer, stood_still > began.elapsed() / 2)
    }
}

/// How often to check that the runtime is driven.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

async fn fly(ending: &Ending, plan: Plan) -> Outcome {
    // A sleep of zero takes up to a millisecond.
    if !plan.delay.is_zero() {
        time::sleep(plan.delay).await;
    }
    let deadline = plan.deadline;
    // If the runtime stood still until now, nobody was asked.
    let starts = deadline - ending.entry.policy().flight_limit();
    if Now::read().monotonic >= deadline.max(starts + policy::GRACE) {
        return Outcome::Lost;
    }
    ending.entry.asks(&ending.flight);
    report_if_slow(ending, attempts(ending, plan)).await
}

/// Reports once if requests wait for a slow `flown`: its failure is reported only at its end, which may be half a
/// minute away.
async fn report_if_slow<T>(ending: &Ending, flown: impl Future<Output = T>) -> T {
    let mut flown = pin!(flown);
    loop {
        if let Ok(flown) = time::timeout(SLOW_AFTER, flown.as_mut()).await {
            return flown;
        }
        if ending.flight.waiters() > 0 {
            ending.entry.reporter().waiting(&ending.flight);
            return flown.await;
        }
    }
}

/// The outcome of a flight whose last attempt failed with `error`.
fn failed(error: TokenError, stood_still: bool) -> Outcome {
    // A timeout, ours or the peer's, then says nothing about the server.
    match stood_still && is_unanswered(&error) {
        true => Outcome::Lost,
        false => Outcome::Failed(error),
    }
}

/// A flight that requests wait for longer than this is slow.
const SLOW_AFTER: Duration = Duration::from_secs(1);

/// Asks the source until it answers, says that a retry is of no use, or has used up the plan's attempts.
async fn attempts(ending: &Ending, mut plan: Plan) -> Outcome {
    let policy = ending.entry.policy();
    let mut attempt = 1;
    loop {
        let sent = Now::read();
        let fetch = Fetch {
            attempt,
            timeout: policy.attempt_timeout,
            refresh_token: plan.refresh_token.take(),
            request: plan.request.clone(),
            claims: plan.claims.clone(),
            refresh_error: Arc::default(),
        };
        let refresh_error = Arc::clone(&fetch.refresh_error);
        ending.flight.span().attempt();
        let (answer, stood_still) = ending.ask(fetch, plan.deadline).await;
        let refresh_error = refresh_error.get();
        ending
            .entry
            .attempt_ended(&ending.flight, refresh_error, &answer);
        let error = match answer {
            Ok(response) => {
                if response.expires_in.is_none() {
                    let reporter = ending.entry.reporter();
                    reporter.lifetime_assumed(&ending.flight, policy.default_lifetime);
                }
                let sent = response.sent.unwrap_or(sent);
                return Outcome::Granted(response, sent);
            }
            Err(error) => error,
        };
        // A server that sent a `Retry-After` and a source that panicked are left alone for a while, which the gate
        // enforces.
        let retry =
            error.is_transient() && error.retry_after().is_none() && !error.is_interrupted();
        // The claims are the API's wish: better a token without them than none.
        let without_claims = may_be_of_claims(&error) && plan.claims.take().is_some();
        let is_last = !without_claims && (!retry || attempt >= plan.attempts);
        let is_limited = error.status() == Some(StatusCode::TOO_MANY_REQUESTS);
        let is_patient = plan.in_background || is_limited;
        let pause = policy::pause(attempt, is_patient, &mut Rng::new());
        let is_late = Now::read().monotonic + pause >= plan.deadline;
        if is_last || is_late || ending.entry.is_held_back() {
            return failed(error, stood_still);
        }
        ending
            .entry
            .reporter()
            .attempt_failed(&ending.flight, attempt, &error);
        time::sleep(pause).await;
        // Meanwhile another key may have been told to back off, and the runtime may have overslept.
        if Now::read().monotonic >= plan.deadline || ending.entry.is_held_back() {
            return failed(error, stood_still);
        }
        attempt += 1;
    }
}

/// Whether an error may come from the connection alone: nothing in it is from an answer.
fn is_unanswered(error: &TokenError) -> bool {
    let is_answer = error.status().is_some()
        || error.oauth_error().is_some()
        || error.retry_after().is_some()
        || error.is_malformed_response();
    error.is_transient() && !is_answer && !error.is_interrupted()
}

/// Whether an error may be about the claims asked for, and is not about the client.
fn may_be_of_claims(error: &TokenError) -> bool {
    // A server may also hang on them.
    error.is_timeout() || (!error.is_transient() && !error.is_of_client())
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        task::Wake,
    };

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flight() -> Arc<Flight> {
        Flight::new(Instant::now())
    }

    #[test]
    fn an_end_wakes_every_waiter_once_and_stands() {
        let flight = flight();
        let counts: Vec<_> = (0..3).map(|_| Arc::new(Count::default())).collect();
        let mut seats = Vec::new();
        for count in &counts {
            let waker = Waker::from(Arc::clone(count));
            let mut seat = flight.seat(usize::MAX).unwrap();
            assert!(seat.poll_end(&mut Context::from_waker(&waker)).is_pending());
            seats.push(seat);
        }
        flight.end(End::Abandoned);
        flight.end(End::Failed(TokenError::transient("late")));
        assert!(
            counts
                .iter()
                .all(|count| count.0.load(Ordering::Relaxed) == 1)
        );
        for mut seat in seats {
            let end = seat.poll_end(&mut Context::from_waker(Waker::noop()));
            assert!(matches!(end, Poll::Ready(End::Abandoned)));
        }
    }

    #[test]
    fn dropping_a_waiter_frees_its_seat() {
        let flight = flight();
        let seat = flight.seat(1).unwrap();
        assert!(flight.seat(1).is_none());
        drop(seat);
        let seat = flight.seat(1);
        flight.end(End::Abandoned);
        // Late waiters take no place.
        let late = [flight.seat(1).unwrap(), flight.seat(1).unwrap()];
        assert!(flight.inner.lock().waiters.is_empty());
        drop((seat, late));
        assert!(flight.inner.lock().waiters.is_empty());
    }

    #[test]
    fn a_panicking_waker_leaves_no_waiter_asleep() {
        struct Panics;

        impl Wake for Panics {
            fn wake(self: Arc<Self>) {
                panic!("the scripted waker panics");
            }
        }

        let flight = flight();
        let count = Arc::new(Count::default());
        let mut seats = Vec::new();
        for waker in [
            Waker::from(Arc::new(Panics)),
            Waker::from(Arc::new(Panics)),
            Waker::from(Arc::clone(&count)),
        ] {
            let mut seat = flight.seat(usize::MAX).unwrap();
            assert!(seat.poll_end(&mut Context::from_waker(&waker)).is_pending());
            seats.push(seat);
        }
        flight.end(End::Abandoned);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_waker_may_drop_another_waiter() {
        /// Drops its seat when woken, as an executor that was shut down does.
        struct Dropper(Mutex<Option<Seat>>);

        impl Wake for Dropper {
            fn wake(self: Arc<Self>) {
                let seat = self.0.lock().take();
                drop(seat);
            }
        }

        let flight = flight();
        let other = flight.seat(usize::MAX).unwrap();
        let waker = Waker::from(Arc::new(Dropper(Mutex::new(Some(other)))));
        let mut seat = flight.seat(usize::MAX).unwrap();
        assert!(seat.poll_end(&mut Context::from_waker(&waker)).is_pending());
        flight.end(End::Abandoned);
    }
}

/// Loom models of the races.
#[cfg(all(test, tower_bearer_loom))]
mod models {
    use std::time::Duration;

    use loom::{future::block_on, thread};

    use super::*;
    use crate::{
        cache::{common::Common, endpoint::Endpoint, gate::SharedGate, state::Decision},
        policy::RefreshPolicy,
        source::{SharedSource, TokenRequest, source_fn},
    };

    fn entry() -> Arc<Entry> {
        let source = source_fn(|_| async { Err(TokenError::transient("not asked")) });
        let endpoint = Arc::new(Endpoint::new(SharedSource::new(source)));
        let common = Common::new(RefreshPolicy::new());
        Entry::new(TokenRequest::new(), endpoint, common)
    }

    /// An entry with a flight on record.
    fn in_flight() -> (Arc<Entry>, Arc<Flight>) {
        let entry = entry();
        let (flight, _) =
            entry
                .state
                .lock()
                .begin(&mut SharedGate::default(), Flight::new, Now::read());
        (entry, flight)
    }

    fn granted() -> Outcome {
        let response = TokenResponse::new("token").unwrap();
        Outcome::Granted(response, Now::read())
    }

    fn wait(mut seat: Seat) -> End {
        block_on(poll_fn(move |cx| seat.poll_end(cx)))
    }

    /// Law 1: a waiter sees the end of the flight it joined, in every interleaving.
    #[test]
    fn a_waiter_never_misses_the_end() {
        loom::model(|| {
            let (entry, flight) = in_flight();
            let seat = flight.seat(usize::MAX).unwrap();
            let task = thread::spawn(move || entry.land(&flight, granted()));
            assert!(matches!(wait(seat), End::Done(_)));
            task.join().unwrap();
        });
    }

    /// Law 5: a dropped waiter affects no other and leaves nothing behind.
    #[test]
    fn a_dropped_waiter_leaves_the_other_and_no_seat() {
        loom::model(|| {
            let (entry, flight) = in_flight();
            let (first, second) = (flight.seat(usize::MAX).unwrap(), flight.seat(2).unwrap());
            let task = {
                let flight = Arc::clone(&flight);
                thread::spawn(move || entry.land(&flight, granted()))
            };
            let dropper = thread::spawn(move || {
                let mut first = first;
                let polled = first.poll_end(&mut Context::from_waker(Waker::noop()));
                drop((first, polled));
            });
            assert!(matches!(wait(second), End::Done(_)));
            task.join().unwrap();
            dropper.join().unwrap();
            assert!(flight.inner.lock().waiters.is_empty());
        });
    }

    /// Law 6: a task dropped before it lands wakes its waiters, and the next flight may start.
    #[test]
    fn a_task_that_ends_early_abandons_its_flight() {
        loom::model(|| {
            let (entry, flight) = in_flight();
            let seat = flight.seat(usize::MAX).unwrap();
            let ending = Ending {
                entry: Arc::clone(&entry),
                flight,
            };
            let runtime = thread::spawn(move || drop(ending));
            assert!(matches!(wait(seat), End::Abandoned));
            runtime.join().unwrap();
            let later = Now {
                monotonic: Instant::now() + Duration::from_secs(1),
                ..Now::read()
            };
            let decision = entry.state.lock().acquire(&SharedGate::default(), later);
            assert!(matches!(decision, Decision::Start));
        });
    }

    /// Laws 1 and 6: a flight that is given up while it lands either has landed or has not.
    #[test]
    fn a_late_result_stops_at_the_fence() {
        loom::model(|| {
            let (entry, flight) = in_flight();
            let seat = flight.seat(usize::MAX).unwrap();
            let task = {
                let (entry, flight) = (Arc::clone(&entry), Arc::clone(&flight));
                thread::spawn(move || entry.land(&flight, granted()))
            };
            let overdue = Now {
                monotonic: flight.overdue(),
                ..Now::read()
            };
            let given_up = entry
                .state
                .lock()
                .give_up_overdue(&mut SharedGate::default(), overdue);
            if let Some(flight) = &given_up {
                // The fence is up: the next flight is on record when the late result comes.
                entry
                    .state
                    .lock()
                    .begin(&mut SharedGate::default(), Flight::new, overdue);
                flight.end(End::Abandoned);
            }
            let end = wait(seat);
            task.join().unwrap();
            let published = entry.fresh().is_some();
            match given_up {
                Some(_) => assert!(matches!(end, End::Abandoned) && !published),
                None => assert!(matches!(end, End::Done(_)) && published),
            }
        });
    }
}
