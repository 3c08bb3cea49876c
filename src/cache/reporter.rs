//! [`Reporter`]: reports what happens to a key's token, to the log, the metrics and the listeners.

use std::{
    panic::{self, AssertUnwindSafe},
    sync::Arc,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use tokio::time::Instant;
use tracing::Span;

use super::{
    events::{Bus, TokenEvent},
    flight::{End, Flight},
    state::{Outage, Plan},
};
use crate::{
    error::TokenError,
    policy::RefreshPolicy,
    source::TokenRequest,
    telemetry::{self, FailureReport, Meters, RefusalOutcome, Subject, Wait},
    time::Now,
};

/// Where all keys of a cache report to.
#[derive(Debug)]
pub(super) struct Outlets {
    name: &'static str,
    meters: Meters,
    bus: Bus,
}

impl Outlets {
    pub(super) fn new(policy: &RefreshPolicy) -> Arc<Self> {
        let name = policy.name;
        Arc::new(Self {
            name,
            meters: Meters::new(name),
            bus: Bus::new(),
        })
    }

    pub(super) fn meters(&self) -> &Meters {
        &self.meters
    }

    pub(super) fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Reports that all `limit` keys are in use.
    pub(super) fn keys_full(&self, limit: usize) {
        telemetry::keys_full(self.name, limit);
        self.bus.send(|| TokenEvent::KeysFull { limit });
    }

    pub(super) fn keys_evicted(&self, count: usize) {
        telemetry::keys_evicted(self.name, count);
        self.bus.send(|| TokenEvent::KeysEvicted { count });
    }

    pub(super) fn shut_down(&self) {
        swallow_panics(|| telemetry::shut_down(self.name));
        swallow_panics(|| self.bus.send(|| TokenEvent::ShutDown));
        self.bus.close();
    }
}

/// Reports on one key. No lock may be held meanwhile: listeners are foreign code.
#[derive(Debug)]
pub(super) struct Reporter {
    outlets: Arc<Outlets>,
    request: TokenRequest,
    /// Whether the key counts among those with closed gates.
    closed: AtomicBool,
}

impl Reporter {
    pub(super) fn new(outlets: Arc<Outlets>, request: TokenRequest) -> Self {
        Self {
            outlets,
            request,
            closed: AtomicBool::new(false),
        }
    }

    pub(super) fn meters(&self) -> &Meters {
        &self.outlets.meters
    }

    fn subject(&self) -> Subject<'_> {
        Subject {
            cache: self.outlets.name,
            request: &self.request,
        }
    }

    pub(super) fn request(&self) -> &TokenRequest {
        &self.request
    }

    /// Opens the span of a flight that is about to start.
    pub(super) fn open_span(&self, flight: &Flight, plan: &Plan) -> Span {
        let starts = Now::read().monotonic + plan.delay;
        flight
            .span()
            .open(flight.number(), self.subject(), plan.forced, starts)
    }

    pub(super) fn started(&self, flight: &Flight, plan: &Plan) {
        self.meters().renew();
        let flight = flight.number();
        let Plan { forced, delay, .. } = *plan;
        telemetry::flight_started(flight, forced, delay, plan.failures);
        self.outlets.bus.send(|| TokenEvent::FlightStarted {
            request: self.request.clone(),
            flight,
            forced,
            delay,
        });
    }

    /// Reports that a request waits for a flight.
    pub(super) fn wait_begins(&self, flight: &Flight) -> Wait {
        let meters = self.meters().clone();
        Wait::begin(meters, flight.number(), flight.span(), Instant::now())
    }

    /// Reports that requests wait for a slow flight.
    pub(super) fn waiting(&self, flight: &Flight) {
        let age = flight.span().age(Now::read().monotonic);
        telemetry::requests_waiting(flight.number(), self.subject(), flight.waiters(), age);
    }

    /// Reports that the refresh token failed and the flight went on without it.
    pub(super) fn refresh_token_failed(&self, flight: &Flight, error: &TokenError) {
        telemetry::refresh_token_failed(flight.number(), self.subject(), error);
    }

    pub(super) fn lifetime_assumed(&self, flight: &Flight, lifetime: Duration) {
        telemetry::lifetime_assumed(flight.number(), self.subject(), lifetime);
    }

    pub(super) fn attempt_failed(&self, flight: &Flight, attempt: u32, error: &TokenError) {
        let flight = flight.number();
        telemetry::attempt_failed(flight, attempt, error);
        self.outlets.bus.send(|| TokenEvent::AttemptFailed {
            request: self.request.clone(),
            flight,
            attempt,
            error: error.clone(),
        });
    }

    /// Reports how a flight ended, with its failure or with the outage that it ends.
    pub(super) fn landed(&self, flight: &Flight, end: &End, landing: &Landing) {
        flight
            .span()
            .within(|| self.report_landed(flight, end, landing));
    }

    fn report_landed(&self, flight: &Flight, end: &End, landing: &Landing) {
        let number = flight.number();
        let now = landing.now.monotonic;
        match (end, &landing.failure) {
            (End::Done(token), _) => {
                let took = self.ended(flight, telemetry::GRANTED, None, landing);
                telemetry::token_received(number, token, landing.grant, took);
                let missing: Vec<_> = token.missing_scopes().map(str::to_owned).collect();
                if !missing.is_empty() {
                    telemetry::scope_narrowed(self.subject(), token);
                }
                self.outlets.bus.send(|| TokenEvent::TokenReceived {
                    request: self.request.clone(),
                    flight: number,
                    took,
                    usable_until: token.usable_until(),
                    missing_scopes: missing,
                });
                if let Some(outage) = &landing.before {
                    self.recovered(number, outage, now - outage.since);
                }
            }
            (End::Failed(error), Some(failure)) => {
                let took = self.ended(flight, telemetry::FAILED, Some(error), landing);
                telemetry::flight_failed(number, self.subject(), error, took, failure);
                self.closed(failure);
                self.outlets.bus.send(|| TokenEvent::FlightFailed {
                    request: self.request.clone(),
                    flight: number,
                    took,
                    error: error.clone(),
                    failures: failure.failures,
                    retry_in: failure.retry_in,
                    usable_for: failure.usable_for,
                });
            }
            (End::Abandoned, Some(failure)) => {
                self.ended(flight, telemetry::LOST, None, landing);
                telemetry::flight_lost(number, self.subject(), failure.failures);
                self.closed(failure);
                self.outlets.bus.send(|| TokenEvent::FlightLost {
                    request: self.request.clone(),
                    flight: number,
                    failures: failure.failures,
                });
            }
            // The cache was shut down.
            (End::Failed(error), None) => {
                self.ended(flight, telemetry::SHUT_DOWN, Some(error), landing);
            }
            (End::Abandoned, None) => {}
        }
    }

    fn ended(
        &self,
        flight: &Flight,
        outcome: &'static str,
        error: Option<&TokenError>,
        landing: &Landing,
    ) -> Duration {
        let now = landing.now.monotonic;
        let took = flight.span().close(outcome, landing.grant, error, now);
        self.meters().flight_ended(outcome, took);
        took
    }

    fn closed(&self, failure: &FailureReport) {
        telemetry::gate_closed(failure);
        if !self.closed.swap(true, Ordering::SeqCst) {
            self.meters().gates(1);
        }
    }

    fn recovered(&self, flight: u64, outage: &Outage, lasted: Duration) {
        let failures = outage.failures;
        telemetry::gate_opened("success");
        telemetry::recovered(flight, self.subject(), failures, lasted);
        self.opened();
        self.outlets.bus.send(|| TokenEvent::Recovered {
            request: self.request.clone(),
            flight,
            failures,
            outage: lasted,
        });
    }

    /// Notes that no gate of this key is closed any more.
    pub(super) fn opened(&self) {
        if self.closed.swap(false, Ordering::SeqCst) {
            self.meters().gates(-1);
        }
    }

    /// Reports that requests fail from here on, for the first time in this outage.
    pub(super) fn requests_failing(&self, error: &TokenError, retry_in: Duration) {
        telemetry::requests_failing(self.subject(), error, retry_in);
        self.outlets.bus.send(|| TokenEvent::RequestsFailing {
            request: self.request.clone(),
            error: error.clone(),
        });
    }

    pub(super) fn refused(
        &self,
        complaint: &'static str,
        outcome: RefusalOutcome,
        flight: Option<u64>,
    ) {
        self.meters().refused(outcome);
        telemetry::token_refused(self.subject(), complaint, outcome, flight);
        if let (RefusalOutcome::Started, Some(flight)) = (outcome, flight) {
            self.outlets.bus.send(|| TokenEvent::TokenRefused {
                request: self.request.clone(),
                flight,
            });
        }
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.opened();
    }
}

/// Calls foreign code and drops its panic, which the panic hook has reported: what is left to do matters more.
pub(super) fn swallow_panics(call: impl FnOnce()) {
    let _ = panic::catch_unwind(AssertUnwindSafe(call));
}

/// What to report of a flight that has landed, besides its end.
pub(super) struct Landing {
    pub(super) now: Now,
    /// The grant that brought the token.
    pub(super) grant: &'static str,
    /// The outage before it.
    pub(super) before: Option<Outage>,
    /// Present if the flight failed.
    pub(super) failure: Option<FailureReport>,
}
