//! A caller's wait for a token.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::runtime::Handle;

use super::{
    entry::{Entry, Found},
    flight::{End, Flight, Waiter},
};
use crate::{
    error::{Kind, TokenError},
    policy,
    telemetry::Wait,
    time::Now,
    token::AccessToken,
};

pin_project! {
    /// Waits for a token: for the flight that it finds, starts or has joined.
    ///
    /// A flight lost with its runtime is no answer, so a caller looks once for another one.
    #[derive(Debug)]
    pub(crate) struct Acquire {
        entry: Arc<Entry>,
        // A joined flight that is not waited for yet.
        joined: Option<Arc<Flight>>,
        // What to use when the wait times out or fails.
        fallback: Option<AccessToken>,
        #[pin]
        waiter: Option<Waiter>,
        wait: Option<Wait>,
        // How many more flights may be looked for.
        looks: u8,
    }
}

impl Acquire {
    pub(super) fn new(entry: Arc<Entry>) -> Self {
        Self {
            entry,
            joined: None,
            fallback: None,
            waiter: None,
            wait: None,
            looks: LOOKS,
        }
    }

    /// Waits for `flight` only.
    pub(super) fn joined(entry: Arc<Entry>, flight: Arc<Flight>) -> Self {
        Self {
            joined: Some(flight),
            looks: 0,
            ..Self::new(entry)
        }
    }
}

impl Future for Acquire {
    type Output = Result<AccessToken, TokenError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            if let Some(waiter) = this.waiter.as_mut().as_pin_mut() {
                let end = ready!(waiter.poll(cx));
                this.waiter.set(None);
                let (outcome, result) = match (end, this.fallback.take()) {
                    (Some(End::Done(token)), _) => ("token", Some(Ok(token))),
                    // Parts of the API may still accept it, and it is better than nothing.
                    (_, Some(fallback)) => ("old_token", Some(Ok(fallback))),
                    (Some(End::Failed(error)), None) => match this.entry.last_resort() {
                        Some(token) => ("old_token", Some(Ok(token))),
                        None => ("failed", Some(Err(error))),
                    },
                    (Some(End::Abandoned) | None, None) => ("lost", None),
                };
                if let Some(mut wait) = this.wait.take() {
                    wait.end(outcome);
                }
                if let Some(result) = result {
                    return Poll::Ready(result);
                }
            }
            let (flight, fallback) = match this.joined.take() {
                Some(flight) => (flight, None),
                None if *this.looks == 0 => {
                    return Poll::Ready(Err(TokenError::new(Kind::Abandoned)));
                }
                None => {
                    *this.looks -= 1;
                    match this.entry.find() {
                        Found::Token(token) => return Poll::Ready(Ok(token)),
                        Found::Error(error) => return Poll::Ready(Err(error)),
                        Found::Flight(flight, fallback) => (flight, fallback),
                    }
                }
            };
            match wait_for(&flight, fallback.is_some(), this.entry) {
                Ok(waiter) => {
                    this.waiter.set(Some(waiter));
                    *this.wait = Some(this.entry.reporter().wait_begins(&flight));
                }
                Err(error) => return Poll::Ready(fallback.ok_or(error)),
            }
            *this.fallback = fallback;
        }
    }
}

/// Takes a seat in `flight`, with a timer on this runtime: the flight's own may be parked (law 6).
fn wait_for(flight: &Arc<Flight>, has_fallback: bool, entry: &Entry) -> Result<Waiter, TokenError> {
    if Handle::try_current().is_err() {
        return Err(TokenError::new(Kind::NoRuntime));
    }
    let Some(seat) = flight.seat(entry.policy().waiter_limit()) else {
        return Err(TokenError::new(Kind::Overloaded));
    };
    let until = match has_fallback {
        true => flight
            .overdue()
            .min(Now::read().monotonic + policy::REPLACEMENT_WAIT),
        false => flight.overdue(),
    };
    Ok(Waiter::new(seat, until))
}

/// The current flight, and one more if that is lost.
const LOOKS: u8 = 2;
