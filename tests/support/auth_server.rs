//! [`AuthServer`]: a token source that stands in for the authorization server.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{self, Instant},
};
use tower_bearer::{Fetch, RefreshToken, TokenError, TokenResponse, TokenSource};

/// What the authorization server does with a token request.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Grants a new token, `token-N` for the Nth request, with this lifetime.
    Grant(Duration),
    /// Grants a new token and names no lifetime.
    GrantUnnamed,
    /// Grants this text with this lifetime.
    Text(&'static str, Duration),
    /// Refuses.
    Fail(TokenError),
    /// Never answers.
    Hang,
    /// Panics.
    Panic,
}

/// One token request as the server saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub at: Instant,
    pub attempt: u32,
    pub refresh_token: Option<String>,
}

/// An authorization server in memory. Clones are one server.
#[derive(Clone)]
pub struct AuthServer {
    state: Arc<Mutex<State>>,
    open: watch::Sender<bool>,
}

struct State {
    answer: Answer,
    latency: Duration,
    refresh_tokens: bool,
    refresh_lifetime: Option<Duration>,
    seen: Vec<Seen>,
    in_flight: usize,
    most_at_once: usize,
}

impl AuthServer {
    /// A server that answers at once with tokens of 300 s.
    pub fn new() -> Self {
        let state = State {
            answer: Answer::Grant(Duration::from_secs(300)),
            latency: Duration::ZERO,
            refresh_tokens: false,
            refresh_lifetime: None,
            seen: Vec::new(),
            in_flight: 0,
            most_at_once: 0,
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            open: watch::Sender::new(true),
        }
    }

    /// Sets what it does from now on, with the requests that it holds as well.
    pub fn set(&self, answer: Answer) {
        self.lock().answer = answer;
    }

    /// Sets how long an answer takes.
    pub fn set_latency(&self, latency: Duration) {
        self.lock().latency = latency;
    }

    /// Sets whether it sends a new refresh token, `refresh-N`, with each answer.
    pub fn set_refresh_tokens(&self, yes: bool) {
        self.lock().refresh_tokens = yes;
    }

    /// Sets the lifetime that it names for its refresh tokens; by default it names none.
    pub fn set_refresh_lifetime(&self, lifetime: Duration) {
        self.lock().refresh_lifetime = Some(lifetime);
    }

    /// Holds all requests until [`release`](Self::release).
    pub fn hold(&self) {
        self.open.send_replace(false);
    }

    pub fn release(&self) {
        self.open.send_replace(true);
    }

    /// How many token requests it has seen.
    pub fn requests(&self) -> usize {
        self.lock().seen.len()
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.lock().seen.clone()
    }

    /// How many token requests it has not answered and nobody has given up.
    pub fn in_flight(&self) -> usize {
        self.lock().in_flight
    }

    /// How many token requests it has had at once, at most: law 1 wants one.
    pub fn most_at_once(&self) -> usize {
        self.lock().most_at_once
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl TokenSource for AuthServer {
    async fn fetch(&self, fetch: Fetch) -> Result<TokenResponse, TokenError> {
        let guest = Guest::enter(self, fetch);
        if !guest.latency.is_zero() {
            time::sleep(guest.latency).await;
        }
        let mut open = self.open.subscribe();
        open.wait_for(|open| *open).await.unwrap();
        let answer = self.lock().answer.clone();
        let number = guest.number;
        let response = match answer {
            Answer::Grant(lifetime) => {
                TokenResponse::new(format!("token-{number}"))?.expires_in(lifetime)
            }
            Answer::GrantUnnamed => TokenResponse::new(format!("token-{number}"))?,
            Answer::Text(text, lifetime) => TokenResponse::new(text)?.expires_in(lifetime),
            Answer::Fail(error) => return Err(error),
            Answer::Hang => std::future::pending().await,
            Answer::Panic => panic!("the scripted server panics"),
        };
        let state = self.lock();
        if !state.refresh_tokens {
            return Ok(response);
        }
        let token = RefreshToken::new(format!("refresh-{number}"));
        Ok(response.refresh_token(match state.refresh_lifetime {
            Some(lifetime) => token.expires_in(lifetime),
            None => token,
        }))
    }
}

/// A token request while the server has it.
struct Guest<'a> {
    server: &'a AuthServer,
    /// The number of the request.
    number: usize,
    latency: Duration,
}

impl<'a> Guest<'a> {
    fn enter(server: &'a AuthServer, fetch: Fetch) -> Self {
        let mut state = server.lock();
        let refresh_token = fetch.refresh_token;
        state.seen.push(Seen {
            at: Instant::now(),
            attempt: fetch.attempt,
            refresh_token: refresh_token.map(|token| token.expose_secret().to_owned()),
        });
        state.in_flight += 1;
        state.most_at_once = state.most_at_once.max(state.in_flight);
        Self {
            server,
            number: state.seen.len(),
            latency: state.latency,
        }
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        self.server.lock().in_flight -= 1;
    }
}
