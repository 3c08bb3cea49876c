//! [`AuthServer`]: a token source in place of the authorization server.

use std::{
    collections::{HashMap, VecDeque},
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
    /// Grants a new token with this lifetime: `token-N` for the Nth request without a scope, and `token-SCOPE-N` for
    /// the Nth one with this scope.
    Grant(Duration),
    /// The same, without a lifetime.
    GrantUnnamed,
    /// Grants this.
    Give(TokenResponse),
    /// Refuses.
    Fail(TokenError),
    /// Never answers.
    Hang,
    /// Panics.
    Panic,
}

impl Answer {
    /// Grants this text with this lifetime.
    pub fn token(text: &str, lifetime: Duration) -> Self {
        Self::Give(TokenResponse::new(text).unwrap().expires_in(lifetime))
    }
}

/// One token request as the server saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub at: Instant,
    pub attempt: u32,
    /// All scopes in order, joined by `+`; empty without any.
    pub scope: String,
    pub refresh_token: Option<String>,
    pub claims: Option<String>,
}

/// An authorization server in memory. Clones are one server.
#[derive(Clone)]
pub struct AuthServer {
    state: Arc<Mutex<State>>,
    open: watch::Sender<bool>,
}

struct State {
    answer: Answer,
    /// Its first answers, in order.
    script: VecDeque<Answer>,
    /// Its answer to requests for this scope, whatever the others get.
    by_scope: HashMap<String, Answer>,
    latency: Duration,
    refresh_tokens: bool,
    refresh_lifetime: Option<Duration>,
    seen: Vec<Seen>,
    seen_by_scope: HashMap<String, usize>,
    in_flight: usize,
    most_at_once: usize,
}

impl AuthServer {
    /// A server that answers at once with tokens of 300 s.
    pub fn new() -> Self {
        let state = State {
            answer: Answer::Grant(Duration::from_secs(300)),
            script: VecDeque::new(),
            by_scope: HashMap::new(),
            latency: Duration::ZERO,
            refresh_tokens: false,
            refresh_lifetime: None,
            seen: Vec::new(),
            seen_by_scope: HashMap::new(),
            in_flight: 0,
            most_at_once: 0,
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            open: watch::Sender::new(true),
        }
    }

    /// A server that gives these answers in order and then fails.
    pub fn scripted<const N: usize>(script: [Result<TokenResponse, TokenError>; N]) -> Self {
        let server = Self::new();
        server.set(Answer::Fail(TokenError::transient("the script is over")));
        let answers = script.map(|result| result.map_or_else(Answer::Fail, Answer::Give));
        server.lock().script = answers.into();
        server
    }

    /// Sets its answer from now on, even to requests that it holds.
    pub fn set(&self, answer: Answer) {
        self.lock().answer = answer;
    }

    /// Sets the same for requests that ask for this scope.
    pub fn set_for(&self, scope: &str, answer: Answer) {
        self.lock().by_scope.insert(scope.to_owned(), answer);
    }

    /// Sets how long an answer takes.
    pub fn set_latency(&self, latency: Duration) {
        self.lock().latency = latency;
    }

    /// Sets whether it sends a new refresh token, `refresh-N` or `refresh-SCOPE-N`, with each new token.
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

    /// How many of them asked for this scope, or for none if it is empty.
    pub fn requests_for(&self, scope: &str) -> usize {
        let state = self.lock();
        state.seen_by_scope.get(scope).copied().unwrap_or_default()
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.lock().seen.clone()
    }

    /// How many token requests are neither answered nor given up.
    pub fn in_flight(&self) -> usize {
        self.lock().in_flight
    }

    /// The most token requests it has had at once: law 1 wants one.
    pub fn most_at_once(&self) -> usize {
        self.lock().most_at_once
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl State {
    fn answer(&mut self, scope: &str) -> Answer {
        if let Some(answer) = self.by_scope.get(scope) {
            return answer.clone();
        }
        let next = self.script.pop_front();
        next.unwrap_or_else(|| self.answer.clone())
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
        let answer = self.lock().answer(&guest.scope);
        let response = match answer {
            Answer::Grant(lifetime) => {
                TokenResponse::new(guest.new_token("token"))?.expires_in(lifetime)
            }
            Answer::GrantUnnamed => TokenResponse::new(guest.new_token("token"))?,
            Answer::Give(response) => return Ok(response),
            Answer::Fail(error) => return Err(error),
            Answer::Hang => std::future::pending().await,
            Answer::Panic => panic!("the scripted server panics"),
        };
        let state = self.lock();
        if !state.refresh_tokens {
            return Ok(response);
        }
        let token = RefreshToken::new(guest.new_token("refresh"));
        Ok(response.refresh_token(match state.refresh_lifetime {
            Some(lifetime) => token.expires_in(lifetime),
            None => token,
        }))
    }
}

/// A token request while the server has it.
struct Guest<'a> {
    server: &'a AuthServer,
    scope: String,
    /// The request's number among those for its scope.
    number: usize,
    latency: Duration,
}

impl<'a> Guest<'a> {
    fn enter(server: &'a AuthServer, fetch: Fetch) -> Self {
        let mut state = server.lock();
        let scope = fetch.request.scopes().collect::<Vec<_>>().join("+");
        let refresh_token = fetch.refresh_token;
        state.seen.push(Seen {
            at: Instant::now(),
            attempt: fetch.attempt,
            scope: scope.clone(),
            refresh_token: refresh_token.map(|token| token.expose_secret().to_owned()),
            claims: fetch.claims,
        });
        let number = state.seen_by_scope.entry(scope.clone()).or_default();
        *number += 1;
        let number = *number;
        state.in_flight += 1;
        state.most_at_once = state.most_at_once.max(state.in_flight);
        Self {
            server,
            scope,
            number,
            latency: state.latency,
        }
    }

    fn new_token(&self, kind: &str) -> String {
        let number = self.number;
        match &*self.scope {
            "" => format!("{kind}-{number}"),
            scope => format!("{kind}-{scope}-{number}"),
        }
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        self.server.lock().in_flight -= 1;
    }
}
