//! Any answer of a token endpoint: a token that fits into a header, or an error that reveals nothing of the body.
//!
//! The first line of the input is the status and the value of `Retry-After`; the rest is the body.
#![no_main]

use std::{
    cell::RefCell,
    collections::HashSet,
    convert::Infallible,
    error::Error,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header::RETRY_AFTER};
use http_body_util::Full;
use libfuzzer_sys::fuzz_target;
use serde::Deserialize;
use tokio::runtime::Runtime;
use tower::service_fn;
use tower_bearer::{AccessToken, ClientCredentials, RefreshPolicy, TokenCache, TokenError};

fuzz_target!(|input: &[u8]| {
    WORLD.with_borrow_mut(|world| {
        let answer = Answer::read(input);
        match world.get(&answer) {
            Ok(token) => check_token(&token, &answer),
            Err(error) => world.check_error(&error, &answer),
        }
    });
});

thread_local! {
    static WORLD: RefCell<World> = RefCell::new(World::new());
}

#[derive(Clone)]
struct Answer {
    status: StatusCode,
    retry_after: Option<HeaderValue>,
    body: Bytes,
}

impl Answer {
    fn read(input: &[u8]) -> Self {
        let (line, body) = match input.iter().position(|&byte| byte == b'\n') {
            Some(end) => (&input[..end], &input[end + 1..]),
            None => (&b"200"[..], input),
        };
        let (status, after) = line.split_at(line.len().min(3));
        Self {
            status: StatusCode::from_bytes(status).unwrap_or_default(),
            retry_after: after
                .strip_prefix(b" ")
                .and_then(|after| HeaderValue::from_bytes(after).ok()),
            body: Bytes::copy_from_slice(body),
        }
    }

    fn response(&self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(self.body.clone()));
        *response.status_mut() = self.status;
        if let Some(after) = &self.retry_after {
            response.headers_mut().insert(RETRY_AFTER, after.clone());
        }
        response
    }
}

/// The members that a token must come from, read independently of the crate.
#[derive(Deserialize)]
struct Document {
    access_token: String,
    token_type: Option<String>,
}

fn check_token(token: &AccessToken, answer: &Answer) {
    let text = token.expose_secret();
    assert!(!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic()));
    let header = token.header_value();
    assert!(header.is_sensitive());
    assert_eq!(header.as_bytes(), [b"Bearer ", text.as_bytes()].concat());
    assert!(answer.status.is_success());

    let body = &answer.body[..];
    let body = body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body);
    let document: Document = serde_json::from_slice(body).expect("it is the answer of RFC 6749");
    assert_eq!(document.access_token, text);
    let token_type = document.token_type.map(|text| text.to_ascii_lowercase());
    assert!(matches!(
        token_type.as_deref(),
        None | Some("bearer" | "bearertoken" | "access_token")
    ));

    let until = token.usable_until().expect("a year from now has a date");
    assert!(until <= SystemTime::now() + YEAR);
    assert!(until + Duration::from_secs(60) >= SystemTime::now());
    let printed = format!("{token:?}");
    assert!(text.len() < 12 || !printed.contains(text), "{printed}");
}

/// The longest lifetime.
const YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);

struct World {
    runtime: Runtime,
    source: Arc<ClientCredentials>,
    answer: Arc<std::sync::Mutex<Option<Response<Full<Bytes>>>>>,
    /// All that errors say for any body, in pieces.
    words: HashSet<[u8; PIECE]>,
}

/// A body and an error hardly share this many bytes by chance.
const PIECE: usize = 8;

impl World {
    fn new() -> Self {
        let answer = Arc::new(std::sync::Mutex::new(None));
        let service = service_fn({
            let answer = answer.clone();
            move |_: Request<Full<Bytes>>| {
                let response = answer.lock().unwrap().take();
                async move { Ok::<_, Infallible>(response.expect("there is one request")) }
            }
        });
        let source = ClientCredentials::builder("https://as.example/token", "id")
            .client_secret("secret")
            .build_with(service)
            .unwrap();
        let mut world = Self {
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .build()
                .unwrap(),
            source: Arc::new(source),
            answer,
            words: HashSet::new(),
        };
        world.learn();
        world
    }

    fn get(&self, answer: &Answer) -> Result<AccessToken, TokenError> {
        *self.answer.lock().unwrap() = Some(answer.response());
        let policy = RefreshPolicy::new().attempts(1);
        let cache = TokenCache::with_policy(self.source.clone(), policy);
        let result = self.runtime.block_on(cache.get());
        assert!(self.answer.lock().unwrap().is_none());
        result
    }

    /// Learns the words from errors of each kind.
    fn learn(&mut self) {
        for status in ["200", "307", "401", "503"] {
            for after in ["", " 7", " 500"] {
                for body in [
                    "",
                    "{",
                    "{?",
                    "{\"access_token\":1,\"access_token\":1}",
                    "{}",
                    "{\"access_token\":\"a\",\"token_type\":\"a\"}",
                    "{\"access_token\":\" \",\"token_type\":\"Bearer\"}",
                    "{\"error\":\"a\"}",
                    "{\"error\":\"slow_down\"}",
                ] {
                    let answer = Answer::read(format!("{status}{after}\n{body}").as_bytes());
                    let error = self.get(&answer).expect_err("it is no token");
                    self.words.extend(pieces(&shown(&error)));
                }
            }
        }
    }

    fn check_error(&self, error: &TokenError, answer: &Answer) {
        let kinds = [
            error.is_rejected(),
            error.is_unavailable(),
            error.is_malformed_response(),
        ];
        assert_eq!(kinds.iter().filter(|kind| **kind).count(), 1, "{error:?}");
        assert_eq!(error.status(), Some(answer.status));
        assert!(error.is_transient() || error.is_rejected());
        assert!(!error.is_malformed_response() || answer.status.is_success());
        if let Some(code) = error.oauth_error() {
            assert!((1..=40).contains(&code.len()));
            assert!(
                code.bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
            );
        }
        let cap = Duration::from_secs(300);
        assert!(
            error
                .retry_after()
                .is_none_or(|after| !after.is_zero() && after <= cap)
        );

        // What it says beyond the words of all errors does not come from the body.
        let body = collapse(&String::from_utf8_lossy(&answer.body));
        for piece in pieces(&shown(error)) {
            if !self.words.contains(&piece) {
                let piece = String::from_utf8_lossy(&piece);
                assert!(!body.contains(&*piece), "{piece:?} in {error:?}");
            }
        }
    }
}

/// All that an error says, without its code, and with each number and time replaced by 0.
fn shown(error: &TokenError) -> String {
    let mut text = String::new();
    let mut next: Option<&dyn Error> = Some(error);
    while let Some(error) = next {
        text.push_str(&format!("{error}\n{error:?}\n"));
        next = error.source();
    }
    if let Some(code) = error.oauth_error() {
        text = text.replace(&format!("({code}, "), "(");
        text = text.replace(&format!("Some({code:?})"), "None");
    }
    if let Some(after) = error.retry_after() {
        // Its unit depends on its size.
        text = text.replace(&format!("{after:?}"), "0s");
    }
    collapse(&text)
}

fn collapse(text: &str) -> String {
    let mut collapsed = String::with_capacity(text.len());
    for character in text.chars() {
        match character.is_ascii_digit() {
            true if collapsed.ends_with('0') => {}
            true => collapsed.push('0'),
            false => collapsed.push(character),
        }
    }
    collapsed
}

fn pieces(text: &str) -> impl Iterator<Item = [u8; PIECE]> {
    text.as_bytes()
        .windows(PIECE)
        .map(|piece| piece.try_into().expect("the pieces are of this size"))
}
