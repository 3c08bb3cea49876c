//! A token endpoint in memory, with a log of its token requests.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::{self, Instant};
use tower_bearer::{TokenError, TokenResponse, TokenSource, source_fn};

use super::token_text;

/// Grants, after `takes`, a token that lives for `lifetime` and is to be refreshed after half of it.
pub struct Endpoint {
    pub takes: Duration,
    pub lifetime: Duration,
    down: AtomicBool,
    /// Token requests are answered once this many callers have arrived.
    crowd: AtomicUsize,
    callers: AtomicUsize,
    requests: Mutex<Vec<Seen>>,
}

/// One token request.
#[derive(Clone, Copy)]
pub struct Seen {
    pub sent: Instant,
    /// Absent while it is in flight.
    pub answered: Option<Instant>,
}

impl Endpoint {
    pub fn new(takes: Duration, lifetime: Duration) -> Arc<Self> {
        Arc::new(Self {
            takes,
            lifetime,
            down: AtomicBool::new(false),
            crowd: AtomicUsize::new(0),
            callers: AtomicUsize::new(0),
            requests: Mutex::default(),
        })
    }

    /// Makes token requests fail as by a 503, or succeed again.
    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::Relaxed);
    }

    /// Holds the token back until this many callers have [arrived](Self::arrive).
    pub fn wait_for(&self, callers: usize) {
        self.crowd.store(callers, Ordering::Relaxed);
    }

    pub fn arrive(&self) {
        self.callers.fetch_add(1, Ordering::Relaxed);
    }

    /// The token requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.log().clone()
    }

    /// When the last token request was answered.
    pub fn answered(&self) -> Instant {
        let answered = self.log().last().and_then(|seen| seen.answered);
        answered.expect("a token request was answered")
    }

    /// Answers a token request.
    pub async fn grant(&self) -> Result<String, TokenError> {
        let number = {
            let mut log = self.log();
            log.push(Seen {
                sent: Instant::now(),
                answered: None,
            });
            log.len() - 1
        };
        time::sleep(self.takes).await;
        while self.callers.load(Ordering::Relaxed) < self.crowd.load(Ordering::Relaxed) {
            time::sleep(Duration::from_millis(1)).await;
        }
        self.log()[number].answered = Some(Instant::now());
        match self.down.load(Ordering::Relaxed) {
            true => Err(TokenError::transient("503 Service Unavailable")),
            false => Ok(format!("{number}-{}", token_text())),
        }
    }

    pub fn source(self: &Arc<Self>) -> impl TokenSource + use<> {
        let endpoint = Arc::clone(self);
        source_fn(move |_| {
            let endpoint = Arc::clone(&endpoint);
            async move {
                let response = TokenResponse::new(endpoint.grant().await?)?;
                Ok(response
                    .expires_in(endpoint.lifetime)
                    .refresh_in(endpoint.lifetime / 2))
            }
        })
    }

    fn log(&self) -> std::sync::MutexGuard<'_, Vec<Seen>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
