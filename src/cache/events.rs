//! [`Events`]: what happens in a cache, for programs.

use std::{
    fmt,
    future::poll_fn,
    pin::Pin,
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};

use futures_core::Stream;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio_util::sync::ReusableBoxFuture;

use crate::{error::TokenError, source::TokenRequest};

/// Something that happened in a [`TokenCache`](crate::TokenCache), as [`Events`] reports it.
///
/// However many requests there are, events come only with token requests, and when the cache runs full. Each flight has
/// a number, which is unique in the process, and is the same in the events of `tracing`. No event holds a token. The
/// [`TokenRequest`] of an event equals the one that the program has made, so it can be used to find the tenant, for
/// example, as can its [source](TokenRequest::own_source). It holds the values of its parameters; its `Debug` leaves them
/// out.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum TokenEvent {
    /// A token request starts.
    #[non_exhaustive]
    FlightStarted {
        /// What the token is for.
        request: TokenRequest,
        /// The number of the flight.
        flight: u64,
        /// Whether a 401 or [`TokenCache::invalidate`](crate::TokenCache::invalidate) caused it.
        forced: bool,
        /// How long the first attempt is delayed.
        delay: Duration,
    },
    /// An attempt failed, and another one will follow, unless the server has to be left alone by then.
    #[non_exhaustive]
    AttemptFailed {
        /// What the token is for.
        request: TokenRequest,
        /// The number of the flight.
        flight: u64,
        /// The number of the attempt within its flight, from 1.
        attempt: u32,
        /// Why it failed.
        error: TokenError,
    },
    /// A token request brought a token.
    #[non_exhaustive]
    TokenReceived {
        /// What the token is for.
        request: TokenRequest,
        /// The number of the flight.
        flight: u64,
        /// How long the flight took from its first attempt on.
        took: Duration,
        /// Until when the token is handed out, by the wall clock; `None` past the clock's range.
        usable_until: Option<SystemTime>,
        /// The scopes that were asked for and not granted, if the server named what it granted.
        missing_scopes: Vec<String>,
    },
    /// A token request failed with all its attempts.
    #[non_exhaustive]
    FlightFailed {
        /// What the token is for.
        request: TokenRequest,
        /// The number of the flight.
        flight: u64,
        /// How long the flight took from its first attempt on.
        took: Duration,
        /// Why it failed.
        error: TokenError,
        /// How many flights of this key have failed in a row.
        failures: u32,
        /// How long it takes until another one may start.
        retry_in: Duration,
        /// How long requests can go on with the current token; `None` if there is none, and they fail.
        usable_for: Option<Duration>,
    },
    /// A token request ended with its runtime, was given up as overdue, or got no answer while its runtime stood still.
    #[non_exhaustive]
    FlightLost {
        /// What the token is for.
        request: TokenRequest,
        /// The number of the flight.
        flight: u64,
        /// How many flights of this key have failed in a row.
        failures: u32,
    },
    /// The token has expired while token requests fail: from here on, requests fail as well.
    #[non_exhaustive]
    RequestsFailing {
        /// What the token is for.
        request: TokenRequest,
        /// What they fail with.
        error: TokenError,
    },
    /// A token request succeeded after some that failed.
    #[non_exhaustive]
    Recovered {
        /// What the token is for.
        request: TokenRequest,
        /// The number of the flight.
        flight: u64,
        /// How many flights had failed.
        failures: u32,
        /// How long ago the first one of them began.
        outage: Duration,
    },
    /// The API refused the current token, and a token request starts for it.
    #[non_exhaustive]
    TokenRefused {
        /// What the token is for.
        request: TokenRequest,
        /// The number of the flight that brings another one.
        flight: u64,
    },
    /// Keys that were no longer in use were dropped to make room for others.
    #[non_exhaustive]
    KeysEvicted {
        /// How many.
        count: usize,
    },
    /// There is no room for another key, and its requests fail.
    #[non_exhaustive]
    KeysFull {
        /// How many keys there may be.
        limit: usize,
    },
    /// The cache was shut down. The last event.
    ShutDown,
    /// The listener was too slow and has missed this many events.
    #[non_exhaustive]
    Missed {
        /// How many.
        count: u64,
    },
}

impl TokenEvent {
    /// Returns what the event's token is for, if the event is about a token.
    pub fn request(&self) -> Option<&TokenRequest> {
        match self {
            Self::FlightStarted { request, .. }
            | Self::AttemptFailed { request, .. }
            | Self::TokenReceived { request, .. }
            | Self::FlightFailed { request, .. }
            | Self::FlightLost { request, .. }
            | Self::RequestsFailing { request, .. }
            | Self::Recovered { request, .. }
            | Self::TokenRefused { request, .. } => Some(request),
            Self::KeysEvicted { .. }
            | Self::KeysFull { .. }
            | Self::ShutDown
            | Self::Missed { .. } => None,
        }
    }
}

/// The events of a [`TokenCache`](crate::TokenCache), from [`TokenCache::events`](crate::TokenCache::events) on.
///
/// A listener does not keep the cache alive or slow it down. It may be up to 256 events behind; after that, it is told
/// how many it has [`Missed`](TokenEvent::Missed). The stream ends, once all events are read, when the last handle of
/// the cache is dropped, or after [`ShutDown`](TokenEvent::ShutDown).
#[must_use = "it does nothing unless polled, and misses events from before it was made"]
pub struct Events {
    next: ReusableBoxFuture<'static, Next>,
    done: bool,
}

/// What was received, and the receiver for the next event.
type Next = (
    Result<TokenEvent, RecvError>,
    broadcast::Receiver<TokenEvent>,
);

impl Events {
    fn new(receiver: broadcast::Receiver<TokenEvent>) -> Self {
        Self {
            next: ReusableBoxFuture::new(receive(receiver)),
            done: false,
        }
    }

    /// Waits for the next event; `None` if there are no more.
    ///
    /// # Cancel safety
    ///
    /// No event is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<TokenEvent> {
        poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }
}

impl Stream for Events {
    type Item = TokenEvent;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<TokenEvent>> {
        if self.done {
            return Poll::Ready(None);
        }
        let (event, receiver) = ready!(self.next.poll(cx));
        let event = match event {
            Ok(event) => event,
            Err(RecvError::Lagged(count)) => TokenEvent::Missed { count },
            Err(RecvError::Closed) => {
                self.done = true;
                return Poll::Ready(None);
            }
        };
        // A flight that ends during the shutdown may report it later.
        self.done = matches!(event, TokenEvent::ShutDown);
        if !self.done {
            self.next.set(receive(receiver));
        }
        Poll::Ready(Some(event))
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events")
            .field("done", &self.done)
            .finish_non_exhaustive()
    }
}

async fn receive(mut receiver: broadcast::Receiver<TokenEvent>) -> Next {
    let event = receiver.recv().await;
    (event, receiver)
}

/// Where a cache sends its events; free while nobody listens.
#[derive(Debug)]
pub(super) struct Bus {
    senders: Mutex<Senders>,
}

#[derive(Debug)]
enum Senders {
    /// There was no listener yet.
    Unused,
    Open(broadcast::Sender<TokenEvent>),
    /// The cache has ended.
    Closed,
}

impl Bus {
    pub(super) fn new() -> Self {
        Self {
            senders: Mutex::new(Senders::Unused),
        }
    }

    pub(super) fn listen(&self) -> Events {
        let mut senders = self.senders();
        let receiver = match &*senders {
            Senders::Unused => {
                let (sender, receiver) = broadcast::channel(BEHIND);
                *senders = Senders::Open(sender);
                receiver
            }
            Senders::Open(sender) => sender.subscribe(),
            Senders::Closed => broadcast::channel(1).1,
        };
        Events::new(receiver)
    }

    /// Sends the event that `make` makes, if anybody listens.
    pub(super) fn send(&self, make: impl FnOnce() -> TokenEvent) {
        let sender = match &*self.senders() {
            Senders::Open(sender) if sender.receiver_count() > 0 => sender.clone(),
            _ => return,
        };
        // No lock is held, since wakers and errors are foreign code. The last listener may be gone by now.
        let _ = sender.send(make());
    }

    /// Ends the stream of every listener.
    pub(super) fn close(&self) {
        let senders = std::mem::replace(&mut *self.senders(), Senders::Closed);
        drop(senders);
    }

    fn senders(&self) -> MutexGuard<'_, Senders> {
        self.senders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many events a listener may be behind.
const BEHIND: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    /// A sender that got its channel before the shutdown may send afterwards.
    #[tokio::test]
    async fn nothing_comes_after_the_shutdown() {
        let (sender, receiver) = broadcast::channel(BEHIND);
        let mut events = Events::new(receiver);
        for event in [TokenEvent::ShutDown, TokenEvent::KeysEvicted { count: 1 }] {
            sender.send(event).unwrap();
        }
        assert!(matches!(events.next().await, Some(TokenEvent::ShutDown)));
        assert!(events.next().await.is_none());
        assert!(events.next().await.is_none());
    }
}
