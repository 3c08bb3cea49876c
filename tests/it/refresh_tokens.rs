//! Each refresh token is sent at most once, whatever comes of it, and its failure costs nobody a token.

use std::{
    collections::HashSet,
    future::ready,
    io,
    sync::{Arc, Mutex},
};

use http::Response;
use tokio::time::{self, Instant};
use tower_bearer::{BoxError, ClientCredentials, TokenCache, TokenError};

use crate::support::{Answer, AuthServer, TokenEndpoint, millis, now, reply, secs, settle};

/// The attempt and the refresh token of each token request.
fn carried(server: &AuthServer) -> Vec<(u32, Option<String>)> {
    let seen = server.seen().into_iter();
    seen.map(|seen| (seen.attempt, seen.refresh_token))
        .collect()
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

/// Lets the token of `cache` fall due and be refreshed.
async fn refresh(cache: &TokenCache) {
    time::sleep(secs(226)).await;
    now(cache.get()).unwrap();
    settle().await;
}

#[tokio::test(start_paused = true)]
async fn each_refresh_token_is_used_once_by_the_next_flight() {
    let server = AuthServer::new();
    server.set_refresh_tokens(true);
    let cache = TokenCache::new(server.clone());
    let start = Instant::now();
    cache.get().await.unwrap();
    while start.elapsed() < secs(1_800) {
        now(cache.get()).unwrap();
        time::sleep(millis(100)).await;
    }
    let carried = carried(&server);
    assert!(carried.len() >= 8);
    for (index, (attempt, token)) in carried.into_iter().enumerate() {
        let expected = (index > 0).then(|| format!("refresh-{index}"));
        assert_eq!((attempt, token), (1, expected));
    }
}

/// A lost answer cannot be told from a lost request.
#[tokio::test(start_paused = true)]
async fn only_the_first_attempt_of_a_flight_carries_the_refresh_token() {
    let server = AuthServer::new();
    server.set_refresh_tokens(true);
    let cache = TokenCache::new(server.clone());
    cache.get().await.unwrap();
    server.set(Answer::Fail(TokenError::transient("down")));
    time::sleep(secs(226)).await;
    for _ in 0..20 {
        now(cache.get()).unwrap();
        time::sleep(millis(500)).await;
    }
    server.set(Answer::Grant(secs(300)));
    while server.seen().last().unwrap().refresh_token.is_none() {
        time::sleep(secs(1)).await;
        now(cache.get()).unwrap();
        settle().await;
    }
    let carried = carried(&server);
    let last = carried.len() - 1;
    assert!(last >= 6, "{carried:?}");
    assert_eq!(carried[1], (1, some("refresh-1")));
    for (attempt, token) in &carried[2..last] {
        assert_eq!(*token, None, "attempt {attempt} of {carried:?}");
    }
    // The one that came with the last answer.
    assert_eq!(carried[last], (1, some(&format!("refresh-{last}"))));
}

/// The panic used it up.
#[tokio::test(start_paused = true)]
async fn a_refresh_token_is_not_used_again_after_a_panic() {
    let server = AuthServer::new();
    server.set_refresh_tokens(true);
    let cache = TokenCache::new(server.clone());
    cache.get().await.unwrap();
    server.set(Answer::Panic);
    refresh(&cache).await;
    server.set(Answer::Grant(secs(300)));
    time::sleep(secs(1)).await;
    now(cache.get()).unwrap();
    settle().await;
    let expected = [(1, None), (1, some("refresh-1")), (1, None)];
    assert_eq!(carried(&server), expected);
}

#[tokio::test(start_paused = true)]
async fn a_refresh_token_past_its_lifetime_is_not_used() {
    // The refresh comes after 226 s.
    for (lifetime, expected) in [
        (225, None),
        (228, some("refresh-1")),
        (1_800, some("refresh-1")),
    ] {
        let server = AuthServer::new();
        server.set_refresh_tokens(true);
        server.set_refresh_lifetime(secs(lifetime));
        let cache = TokenCache::new(server.clone());
        cache.get().await.unwrap();
        refresh(&cache).await;
        assert_eq!(carried(&server), [(1, None), (1, expected)], "{lifetime}");
    }
}

/// Law 8: a revoked session takes its refresh token with it.
#[tokio::test(start_paused = true)]
async fn a_refresh_forced_by_a_refusal_uses_no_refresh_token() {
    let server = AuthServer::new();
    server.set_refresh_tokens(true);
    let cache = TokenCache::new(server.clone());
    let token = cache.get().await.unwrap();
    cache.invalidate(&token);
    settle().await;
    refresh(&cache).await;
    // The refused session's one is gone once its successor comes.
    let expected = [(1, None), (1, None), (1, some("refresh-2"))];
    assert_eq!(carried(&server), expected);
}

/// How the realm treats a refresh token.
#[derive(Clone, Copy, Debug)]
enum Mode {
    /// Takes it and sends another.
    Rotates,
    /// Takes it and sends none.
    Omits,
    /// Takes it and sends the same one.
    Repeats,
    /// 400 `invalid_grant`.
    Refuses,
    /// 503.
    Breaks,
    /// Takes it, and its answer is lost.
    Loses,
}

/// A token endpoint that takes the reuse of a refresh token for theft.
#[derive(Default)]
struct Realm {
    issued: usize,
    used: HashSet<String>,
    stolen: Vec<String>,
    /// The grant and the time of each request.
    grants: Vec<(&'static str, Instant)>,
}

impl Realm {
    fn answer(&mut self, mode: Mode, body: &str) -> Result<Response<String>, BoxError> {
        let field = |name| {
            let fields = body.split('&').filter_map(|field| field.split_once('='));
            fields.into_iter().find(|field| field.0 == name)
        };
        let (_, grant) = field("grant_type").expect("a grant type");
        let sent = field("refresh_token").map(|(_, value)| value.to_owned());
        self.issued += 1;
        let number = self.issued;
        if grant == "client_credentials" {
            assert_eq!(sent, None);
            self.grants.push(("client_credentials", Instant::now()));
            return granted(number, Some(format!("R{number}")));
        }
        assert_eq!(grant, "refresh_token");
        self.grants.push(("refresh_token", Instant::now()));
        let sent = sent.expect("a refresh token");
        if !self.used.insert(sent.clone()) {
            self.stolen.push(sent.clone());
        }
        match mode {
            Mode::Rotates => granted(number, Some(format!("R{number}"))),
            Mode::Omits => granted(number, None),
            Mode::Repeats => granted(number, Some(sent)),
            Mode::Refuses => reply(400, r#"{"error":"invalid_grant"}"#),
            Mode::Breaks => reply(503, ""),
            Mode::Loses => Err(io::Error::from(io::ErrorKind::ConnectionReset).into()),
        }
    }

    fn count(&self, grant: &str) -> usize {
        let grants = self.grants.iter();
        grants.filter(|(other, _)| *other == grant).count()
    }
}

fn granted(number: usize, refresh_token: Option<String>) -> Result<Response<String>, BoxError> {
    let refresh_token = refresh_token.map_or_else(String::new, |token| {
        format!(r#","refresh_token":"{token}","refresh_expires_in":1800"#)
    });
    let token = format!(r#""access_token":"A{number}","token_type":"Bearer","expires_in":300"#);
    reply(200, format!("{{{token}{refresh_token}}}"))
}

/// Over HTTP: the whole ladder, in one attempt.
#[tokio::test(start_paused = true)]
async fn an_attempt_brings_a_token_whatever_becomes_of_its_refresh_token() {
    // How many of ten refreshes send a refresh token, and how many client credentials.
    for (mode, refreshes, grants) in [
        (Mode::Rotates, 10, 0),
        (Mode::Omits, 5, 5),
        (Mode::Repeats, 5, 5),
        (Mode::Refuses, 10, 10),
        (Mode::Breaks, 10, 10),
        (Mode::Loses, 10, 10),
    ] {
        let realm = Arc::new(Mutex::new(Realm::default()));
        let endpoint = TokenEndpoint::new({
            let realm = Arc::clone(&realm);
            move |request| ready(realm.lock().unwrap().answer(mode, request.body()))
        });
        let source = ClientCredentials::builder("http://localhost/token", "client-id")
            .client_secret("secret")
            .build_with(endpoint)
            .unwrap();
        let cache = TokenCache::new(source);
        let mut held = cache.get().await.unwrap();
        for _ in 0..10 {
            let before = realm.lock().unwrap().grants.len();
            refresh(&cache).await;
            let token = now(cache.get()).unwrap();
            assert_ne!(token.expose_secret(), held.expose_secret(), "{mode:?}");
            held = token;

            let realm = realm.lock().unwrap();
            let latest = format!("A{}", realm.issued);
            assert_eq!(held.expose_secret(), latest, "{mode:?}");
            // All within one attempt: no pause, no gate.
            let ladder = &realm.grants[before..];
            assert!(ladder.iter().all(|(_, at)| *at == ladder[0].1), "{mode:?}");
        }
        let realm = realm.lock().unwrap();
        assert_eq!(realm.stolen, [""; 0], "{mode:?}");
        assert_eq!(realm.count("refresh_token"), refreshes, "{mode:?}");
        assert_eq!(realm.count("client_credentials"), 1 + grants, "{mode:?}");
    }
}
