//! [`Api`]: a service in place of the API and the way to it; what it sees and answers.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use http::{HeaderMap, Request, Response, StatusCode, Uri, header::AUTHORIZATION};
use tokio::sync::watch;
use tower::Service;

/// One request as the API saw it.
#[derive(Clone, Debug)]
pub struct Arrival {
    pub uri: Uri,
    pub headers: HeaderMap,
}

impl Arrival {
    /// The text of its bearer token.
    pub fn token(&self) -> Option<&str> {
        bearer_of(&self.headers)
    }
}

/// An API in memory that remembers what it was sent. Clones are one API.
///
/// It takes requests with any body, which it does not read. The answer is decided when a request arrives;
/// [`hold`](Self::hold) delays it.
#[derive(Clone)]
pub struct Api {
    shared: Arc<ApiShared>,
}

type Judge = dyn Fn(&Arrival) -> Response<String> + Send + Sync;

struct ApiShared {
    judge: Box<Judge>,
    open: watch::Sender<bool>,
    arrivals: Mutex<Vec<Arrival>>,
}

impl Api {
    pub fn new(judge: impl Fn(&Arrival) -> Response<String> + Send + Sync + 'static) -> Self {
        Self {
            shared: Arc::new(ApiShared {
                judge: Box::new(judge),
                open: watch::Sender::new(true),
                arrivals: Mutex::default(),
            }),
        }
    }

    /// 200 with the token's text for a body.
    pub fn echoing() -> Self {
        Self::new(|arrival| echo(arrival.token()))
    }

    /// Refuses the first token of each scope as invalid, and sends others' text as the body.
    pub fn refusing_the_first() -> Self {
        Self::new(|arrival| match arrival.token() {
            Some(token) if token.ends_with("-1") => unauthorized(INVALID_TOKEN),
            token => echo(token),
        })
    }

    /// `refusal` to requests with this token, and others' text as the body.
    pub fn refusing(
        token: &'static str,
        refusal: impl Fn() -> Response<String> + Send + Sync + 'static,
    ) -> Self {
        Self::new(move |arrival| match arrival.token() == Some(token) {
            true => refusal(),
            false => echo(arrival.token()),
        })
    }

    /// Holds all answers until [`release`](Self::release).
    pub fn hold(&self) {
        self.shared.open.send_replace(false);
    }

    pub fn release(&self) {
        self.shared.open.send_replace(true);
    }

    pub fn arrivals(&self) -> Vec<Arrival> {
        self.shared.arrivals.lock().unwrap().clone()
    }

    /// The tokens of all requests, in order.
    pub fn tokens(&self) -> Vec<String> {
        let arrivals = self.shared.arrivals.lock().unwrap();
        let tokens = arrivals.iter().map(Arrival::token);
        tokens
            .map(|token| token.unwrap_or("anonymous").to_owned())
            .collect()
    }

    /// The most requests to any one path.
    pub fn most_per_path(&self) -> usize {
        let arrivals = self.shared.arrivals.lock().unwrap();
        let mut counts = HashMap::<_, usize>::new();
        for arrival in &*arrivals {
            *counts.entry(arrival.uri.path()).or_default() += 1;
        }
        counts.into_values().max().unwrap_or_default()
    }
}

impl<B> Service<Request<B>> for Api {
    type Response = Response<String>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<String>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let arrival = Arrival {
            uri: request.uri().clone(),
            headers: request.headers().clone(),
        };
        let response = (self.shared.judge)(&arrival);
        self.shared.arrivals.lock().unwrap().push(arrival);
        let mut open = self.shared.open.subscribe();
        Box::pin(async move {
            open.wait_for(|open| *open).await.unwrap();
            Ok(response)
        })
    }
}

/// The text of the bearer token on a request.
pub fn bearer<B>(request: &Request<B>) -> Option<&str> {
    bearer_of(request.headers())
}

/// The same, of these headers.
pub fn bearer_of(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    value.strip_prefix("Bearer ")
}

/// 200 with the token's text for a body.
pub fn echo(token: Option<&str>) -> Response<String> {
    Response::new(token.unwrap_or("anonymous").to_owned())
}

/// A 401 with this challenge.
pub fn unauthorized(challenge: &str) -> Response<String> {
    Response::builder()
        .status(StatusCode::UNAUTHORIZED)
        .header("www-authenticate", challenge)
        .body(String::new())
        .unwrap()
}

pub const INVALID_TOKEN: &str = r#"Bearer error="invalid_token""#;
