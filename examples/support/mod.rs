//! The servers of the examples: an authorization server that answers as Keycloak does, and an API that
//! checks every token.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Form, Json, Router,
    extract::State,
    routing::{get, post},
};
use http::{
    HeaderMap, HeaderName, StatusCode, Uri,
    header::{AUTHORIZATION, WWW_AUTHENTICATE},
};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    time::{self, Instant},
};
use tower_bearer::BoxError;

pub(crate) const CLIENT_ID: &str = "quickstart";
pub(crate) const CLIENT_SECRET: &str = "quickstart-secret";
/// Both, encoded by RFC 6749 section 2.3.1.
const BASIC: &str = "Basic cXVpY2tzdGFydDpxdWlja3N0YXJ0LXNlY3JldA==";
const TOKEN_PATH: &str = "/auth/realms/tru-staff/protocol/openid-connect/token";

/// What both servers know; clones share it.
#[derive(Clone)]
pub(crate) struct Realm(Arc<Mutex<Tables>>);

impl Realm {
    /// A realm whose access tokens live for `lifetime`.
    pub(crate) fn new(lifetime: Duration) -> Self {
        let tables = Tables {
            lifetime,
            ..Tables::default()
        };
        Self(Arc::new(Mutex::new(tables)))
    }

    /// Starts both servers, and returns the token URL and a URI of the API.
    pub(crate) async fn serve(&self) -> Result<(String, Uri), BoxError> {
        let tokens = Router::new().route(TOKEN_PATH, post(token_endpoint));
        let tokens = serve(tokens.with_state(self.clone())).await?;
        let sims = Router::new().route("/sims", get(list_sims));
        let sims = serve(sims.with_state(self.clone())).await?;
        Ok((
            format!("{tokens}{TOKEN_PATH}"),
            format!("{sims}/sims").parse()?,
        ))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Tables> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The tokens, and the requests seen so far.
#[derive(Default)]
pub(crate) struct Tables {
    lifetime: Duration,
    /// Whether the token endpoint is down.
    pub(crate) down: bool,
    /// When each access token expires.
    access_tokens: HashMap<String, Instant>,
    /// Whether each refresh token has been used.
    refresh_tokens: HashMap<String, bool>,
    pub(crate) token_requests: Vec<Exchange>,
    /// How many refresh tokens came a second time.
    pub(crate) reused: usize,
    /// How many API requests had no token.
    pub(crate) anonymous: usize,
    /// How many API requests had an unknown or expired token.
    pub(crate) refused: usize,
}

/// A token request and its answer.
pub(crate) struct Exchange {
    at: Instant,
    grant: String,
    status: StatusCode,
}

impl Tables {
    pub(crate) fn token_requests_by(&self, grant: &str) -> usize {
        let requests = self.token_requests.iter();
        requests.filter(|request| request.grant == grant).count()
    }

    fn answered(&self, status: StatusCode) -> impl Iterator<Item = Instant> {
        let requests = self.token_requests.iter();
        requests
            .filter(move |request| request.status == status)
            .map(|request| request.at)
    }

    pub(crate) fn granted(&self) -> usize {
        self.answered(StatusCode::OK).count()
    }

    /// When the last granted token was requested.
    pub(crate) fn last_granted(&self) -> Instant {
        self.answered(StatusCode::OK)
            .last()
            .unwrap_or_else(Instant::now)
    }

    /// When each token request came that found the endpoint down.
    pub(crate) fn token_requests_while_down(&self) -> Vec<Instant> {
        self.answered(StatusCode::SERVICE_UNAVAILABLE).collect()
    }

    /// Ends every session, and returns how many tokens it revoked and how many token requests there were.
    pub(crate) fn revoke(&mut self) -> (usize, usize) {
        self.refresh_tokens.clear();
        let revoked = self.access_tokens.drain().count();
        (revoked, self.token_requests.len())
    }

    /// Accepts an API request, or returns the challenge to answer it with (RFC 6750 section 3).
    pub(crate) fn check(&mut self, headers: &HeaderMap) -> Result<(), &'static str> {
        let header = headers
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok());
        let Some(token) = header.and_then(|text| text.strip_prefix("Bearer ")) else {
            self.anonymous += 1;
            return Err(r#"Bearer realm="tru-staff""#);
        };
        match self.access_tokens.get(token) {
            Some(expiry) if Instant::now() < *expiry => Ok(()),
            _ => {
                self.refused += 1;
                Err(r#"Bearer realm="tru-staff", error="invalid_token""#)
            }
        }
    }

    /// Answers a token request (RFC 6749 sections 2.3.1, 4.4 and 6).
    fn answer(
        &mut self,
        headers: &HeaderMap,
        form: &HashMap<String, String>,
    ) -> (StatusCode, Value) {
        let parameter = |name| form.get(name).map_or("", String::as_str);
        let error = |status, code| (status, json!({ "error": code }));
        if self.down {
            return (StatusCode::SERVICE_UNAVAILABLE, Value::Null);
        }
        let credentials = headers.get(AUTHORIZATION);
        if credentials.is_none_or(|value| value != BASIC) {
            return error(StatusCode::UNAUTHORIZED, "invalid_client");
        }
        match parameter("grant_type") {
            "client_credentials" => (StatusCode::OK, self.issue()),
            "refresh_token" => match self.refresh_tokens.get_mut(parameter("refresh_token")) {
                Some(used) if !*used => {
                    *used = true;
                    (StatusCode::OK, self.issue())
                }
                known => {
                    self.reused += usize::from(known.is_some());
                    error(StatusCode::BAD_REQUEST, "invalid_grant")
                }
            },
            _ => error(StatusCode::BAD_REQUEST, "unsupported_grant_type"),
        }
    }

    fn issue(&mut self) -> Value {
        let text = || format!("{:032x}", fastrand::u128(..));
        let (access_token, refresh_token) = (text(), text());
        let expiry = Instant::now() + self.lifetime;
        self.access_tokens.insert(access_token.clone(), expiry);
        self.refresh_tokens.insert(refresh_token.clone(), false);
        json!({
            "access_token": access_token,
            "expires_in": self.lifetime.as_secs(),
            "refresh_expires_in": 1_800,
            "refresh_token": refresh_token,
            "token_type": "Bearer",
            "not-before-policy": 0,
            "scope": "profile",
        })
    }
}

async fn token_endpoint(
    State(realm): State<Realm>,
    headers: HeaderMap,
    Form(form): Form<HashMap<String, String>>,
) -> (StatusCode, Json<Value>) {
    let (status, answer) = {
        let mut tables = realm.lock();
        let (status, answer) = tables.answer(&headers, &form);
        let grant = form.get("grant_type").cloned().unwrap_or_default();
        let at = Instant::now();
        tables.token_requests.push(Exchange { at, grant, status });
        (status, answer)
    };
    if status.is_success() {
        // A real server takes time, too, and a request that waited for a refresh would show it.
        time::sleep(Duration::from_millis(100)).await;
    }
    (status, Json(answer))
}

async fn list_sims(
    State(realm): State<Realm>,
    headers: HeaderMap,
) -> Result<&'static str, (StatusCode, [(HeaderName, &'static str); 1])> {
    let checked = realm.lock().check(&headers);
    checked.map_err(|challenge| (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, challenge)]))?;
    Ok("[]")
}

/// Serves on a free loopback port, and returns the base of its URIs.
pub(crate) async fn serve(router: Router) -> Result<String, BoxError> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(format!("http://{address}"))
}
