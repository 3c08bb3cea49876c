//! What servers say besides the token: outage lifetimes, void tokens, narrower scopes, missing claims.

use std::sync::{
    Arc, Mutex, OnceLock,
    atomic::{AtomicUsize, Ordering},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use http::StatusCode;
use tokio::time;
use tower::{Layer, ServiceExt};
use tower_bearer::{
    BearerAuthLayer, CloneBody, Fetch, RefreshPolicy, RefreshToken, TokenCache, TokenError,
    TokenRequest, TokenResponse, TokenSource, source_fn,
};

use crate::support::{
    Answer, Api, AuthServer, current_thread, get, millis, now, secs, settle, timed, unauthorized,
    without_a_hang,
};

fn response(text: &str) -> TokenResponse {
    TokenResponse::new(text).unwrap().expires_in(secs(300))
}

fn down() -> Result<TokenResponse, TokenError> {
    Err(TokenError::transient("down"))
}

/// Entra ID: the token outlives its expiry while the endpoint fails, and nobody waits once that is known.
#[tokio::test(start_paused = true)]
async fn an_extended_lifetime_bridges_an_outage() {
    let token = || Ok(response("old").ext_expires_in(secs(3_600)));
    let server =
        AuthServer::scripted([token(), down(), down(), down(), down(), Ok(response("new"))]);
    let policy = RefreshPolicy::new().extended_lifetime(true);
    let cache = TokenCache::with_policy(server.clone(), policy);
    cache.get().await.unwrap();
    time::sleep(secs(400)).await;
    assert!(cache.peek().is_none());
    // The caller that discovers the outage gets the token instead of the error.
    assert_eq!(cache.get().await.unwrap().expose_secret(), "old");
    assert_eq!(server.requests(), 4);
    assert_eq!(now(cache.get()).unwrap().expose_secret(), "old");
    assert!(cache.peek().is_some());
    // The endpoint is asked in the background, at its gate's pace.
    let mut last = String::new();
    for _ in 0..100 {
        last = now(cache.get()).unwrap().expose_secret().to_owned();
        time::sleep(millis(100)).await;
    }
    assert_eq!(last, "new");
    assert_eq!(server.requests(), 6);
}

#[tokio::test(start_paused = true)]
async fn an_extended_lifetime_counts_only_if_allowed_and_ends() {
    let token = || Ok(response("old").ext_expires_in(secs(3_600)));
    let cache = TokenCache::new(AuthServer::scripted([token()]));
    cache.get().await.unwrap();
    time::sleep(secs(400)).await;
    cache.get().await.unwrap_err();

    let policy = RefreshPolicy::new().extended_lifetime(true);
    let cache = TokenCache::with_policy(AuthServer::scripted([token()]), policy.clone());
    cache.get().await.unwrap();
    time::sleep(secs(3_601)).await;
    cache.get().await.unwrap_err();

    // A refusal is no outage.
    let refusal = Err(TokenError::terminal("refused"));
    let cache = TokenCache::with_policy(AuthServer::scripted([token(), refusal]), policy);
    cache.get().await.unwrap();
    time::sleep(secs(400)).await;
    cache.get().await.unwrap_err();
}

/// Keycloak: for every key of the realm.
#[tokio::test(start_paused = true)]
async fn a_rise_of_not_before_voids_other_keys_older_tokens() {
    let server = AuthServer::scripted([
        Ok(response("a-1").not_before_policy(100)),
        Ok(response("b-1").not_before_policy(100)),
        Ok(response("c-1").not_before_policy(2_000_000_000)),
        Ok(response("a-2").not_before_policy(2_000_000_000)),
        Ok(response("b-2").not_before_policy(100)),
    ]);
    let cache = TokenCache::new(server.clone());
    let [a, b, c] = ["a", "b", "c"].map(|scope| TokenRequest::new().scope(scope));
    let text = async |key: &TokenRequest| {
        let token = cache.get_for(key).await.unwrap();
        token.expose_secret().to_owned()
    };
    assert_eq!(text(&a).await, "a-1");
    assert_eq!(text(&b).await, "b-1");
    assert_eq!(text(&a).await, "a-1");
    assert_eq!(text(&c).await, "c-1");
    assert!(cache.peek_for(&a).is_none());
    assert_eq!(text(&a).await, "a-2");
    assert_eq!(text(&c).await, "c-1");
    // It is never compared with our clock, and a node that does not know it yet voids nothing.
    assert_eq!(text(&b).await, "b-2");
    assert_eq!(text(&a).await, "a-2");
    assert_eq!(text(&b).await, "b-2");
    assert_eq!(server.requests(), 5);
}

/// Laws 2 and 4: an answer without one voids nothing, not even its own token.
#[tokio::test(start_paused = true)]
async fn a_token_without_not_before_is_not_void() {
    let server = AuthServer::scripted([
        Ok(response("a-1").not_before_policy(100)),
        Ok(response("b-1")),
        Ok(response("a-2").not_before_policy(200)),
        Ok(response("b-2")),
    ]);
    let cache = TokenCache::new(server.clone());
    let [a, b] = ["a", "b"].map(|scope| TokenRequest::new().scope(scope));
    cache.get_for(&a).await.unwrap();
    cache.get_for(&b).await.unwrap();
    assert_eq!(now(cache.get_for(&b)).unwrap().expose_secret(), "b-1");
    assert_eq!(now(cache.get_for(&a)).unwrap().expose_secret(), "a-1");
    assert_eq!(server.requests(), 2);
    // It counts as issued under the value that held then, so a later rise voids it.
    time::sleep(secs(291)).await;
    cache.get_for(&a).await.unwrap();
    assert!(cache.peek_for(&b).is_none());
    cache.get_for(&b).await.unwrap();
    assert_eq!(now(cache.get_for(&b)).unwrap().expose_secret(), "b-2");
    assert_eq!(server.requests(), 4);
}

#[tokio::test(start_paused = true)]
async fn scopes_that_were_not_granted_are_named() {
    let asked = |text| response(text).requested_scope("read write admin");
    for (granted, missing) in [
        (Some("write read"), vec!["admin"]),
        (Some("admin read write more"), vec![]),
        (Some(""), vec!["read", "write", "admin"]),
        // RFC 6749 section 5.1: without a `scope` all are granted.
        (None, vec![]),
    ] {
        let answer = match granted {
            Some(granted) => asked("token").scope(granted),
            None => asked("token"),
        };
        let cache = TokenCache::new(AuthServer::scripted([Ok(answer)]));
        let token = cache.get().await.unwrap();
        assert_eq!(
            token.missing_scopes().collect::<Vec<_>>(),
            missing,
            "{granted:?}"
        );
        assert_eq!(token.scope(), granted);
    }
}

/// An answer must not hold up the thread that serves others.
#[test]
fn huge_scopes_are_read_once() {
    let asked: Vec<_> = (0..20_000).map(|n| format!("asked-{n}")).collect();
    let granted = "other ".repeat(150_000) + &asked[1..].join(" ");
    let answer = response("token")
        .requested_scope(asked.join(" "))
        .scope(granted);
    let missing = without_a_hang(move || {
        let runtime = current_thread();
        let cache = TokenCache::new(AuthServer::scripted([Ok(answer)]));
        let token = runtime.block_on(cache.get()).unwrap();
        token
            .missing_scopes()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    });
    assert_eq!(missing, ["asked-0"]);
}

/// Entra ID: bypassing refresh token and cache.
#[tokio::test(start_paused = true)]
async fn missing_claims_are_requested() {
    let claims = r#"{"access_token":{"nbf":{"essential":true,"value":"1700000000"}}}"#;
    let first = response("old").refresh_token(RefreshToken::new("refresh"));
    let server = AuthServer::scripted([Ok(first), Ok(response("new"))]);
    let api = Api::refusing("old", move || {
        let claims = BASE64_STANDARD.encode(claims);
        unauthorized(&format!(
            r#"Bearer realm="", error="insufficient_claims", claims="{claims}""#
        ))
    });
    let service = BearerAuthLayer::new(server.clone())
        .replay(CloneBody)
        .layer(api.clone());
    let answer = service.clone().oneshot(get()).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(api.tokens(), ["old", "new"]);
    let seen = server.seen();
    assert_eq!(seen[0].claims, None);
    assert_eq!(seen[1].claims.as_deref(), Some(claims));
    assert!(seen[1].refresh_token.is_none());
}

/// The next token is requested as usual.
#[tokio::test(start_paused = true)]
async fn claims_are_requested_once() {
    let server = AuthServer::scripted([
        Ok(response("old")),
        Ok(response("new")),
        Ok(response("newest")),
    ]);
    let api = Api::refusing("old", || {
        unauthorized(r#"Bearer error="insufficient_claims", claims="e30=""#)
    });
    let service = BearerAuthLayer::new(server.clone())
        .replay(CloneBody)
        .layer(api);
    service.clone().oneshot(get()).await.unwrap();
    time::sleep(secs(400)).await;
    service.oneshot(get()).await.unwrap();
    let seen = server.seen();
    let claims: Vec<_> = seen.iter().map(|seen| seen.claims.as_deref()).collect();
    assert_eq!(claims, [None, Some("{}"), None]);
}

/// Law 3: other APIs accept the token without them.
#[tokio::test(start_paused = true)]
async fn unobtainable_claims_keep_nobody_from_a_token() {
    for (attempts, hangs, lifetime) in [
        (1, false, 60),
        (3, false, 60),
        // A hanging attempt takes 10 s.
        (1, true, 120),
        (3, true, 120),
    ] {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let source = source_fn({
            let seen = Arc::clone(&seen);
            move |fetch: Fetch| {
                let mut seen = seen.lock().unwrap();
                seen.push(fetch.claims.is_some());
                let number = seen.len();
                async move {
                    match fetch.claims {
                        Some(_) if hangs => std::future::pending().await,
                        Some(_) => Err(TokenError::terminal("what claims are these?")
                            .with_oauth_error("invalid_request")),
                        None => Ok(TokenResponse::new(format!("token-{number}"))?
                            .expires_in(secs(lifetime))),
                    }
                }
            }
        });
        let cache = TokenCache::with_policy(source, RefreshPolicy::new().attempts(attempts));
        let service = |api| BearerAuthLayer::new(cache.clone()).layer(api);
        let strict = service(Api::new(|_| {
            unauthorized(r#"Bearer error="insufficient_claims", claims="e30=""#)
        }));
        let other = service(Api::echoing());
        for _ in 0..6_000 {
            let refused = strict.clone().oneshot(get()).await.unwrap();
            assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
            let (answer, took) = timed(other.clone().oneshot(get())).await;
            assert_eq!(answer.unwrap().status(), StatusCode::OK);
            assert!(took <= secs(1), "{took:?}");
            time::sleep(millis(100)).await;
        }
        let seen = seen.lock().unwrap();
        // Claims are requested once each time, and a token without them right after.
        assert!(seen.windows(2).all(|pair| !(pair[0] && pair[1])));
        let claimed = seen.iter().filter(|&&claimed| claimed).count();
        assert!((5..=15).contains(&claimed), "{claimed}");
    }
}

/// The refusal is about the client, so there is no second request.
#[tokio::test(start_paused = true)]
async fn a_refused_client_does_not_renounce_its_claims() {
    let refused = TokenError::terminal("refused").with_oauth_error("invalid_client");
    let server = AuthServer::scripted([Ok(response("old")), Err(refused), Ok(response("new"))]);
    let api = Api::refusing("old", || {
        unauthorized(r#"Bearer error="insufficient_claims", claims="e30=""#)
    });
    let service = BearerAuthLayer::new(server.clone()).layer(api);
    service.clone().oneshot(get()).await.unwrap();
    time::sleep(secs(1)).await;
    assert_eq!(server.requests(), 2);
}

/// At once, for all keys.
#[tokio::test(start_paused = true)]
async fn a_new_secret_clears_a_refusal() {
    #[derive(Clone, Default)]
    struct Client {
        changed: Arc<Mutex<bool>>,
        requests: Arc<Mutex<usize>>,
    }

    impl TokenSource for Client {
        async fn fetch(&self, _: Fetch) -> Result<TokenResponse, TokenError> {
            *self.requests.lock().unwrap() += 1;
            match *self.changed.lock().unwrap() {
                true => Ok(response("token")),
                false => Err(refused()),
            }
        }

        fn has_new_credentials(&self) -> bool {
            *self.changed.lock().unwrap()
        }
    }

    let client = Client::default();
    let cache = TokenCache::new(client.clone());
    let key = TokenRequest::new().scope("a");
    let refused = cache.clone();
    let [plain, keyed] = [TokenRequest::new(), key].map(|key| {
        let cache = refused.clone();
        async move || cache.get_for(&key).await
    });
    // Both flights are under way when the refusal comes.
    let (first, second) = tokio::join!(plain(), keyed());
    assert!(first.is_err() && second.is_err());
    for _ in 0..100 {
        now(plain()).unwrap_err();
        now(keyed()).unwrap_err();
    }
    assert_eq!(*client.requests.lock().unwrap(), 2);
    *client.changed.lock().unwrap() = true;
    plain().await.unwrap();
    keyed().await.unwrap();
    settle().await;
    assert_eq!(*client.requests.lock().unwrap(), 4);
}

/// A source that fails, and says about its credentials what it is told to.
struct Failing<F> {
    error: TokenError,
    has_new_credentials: F,
    requests: AtomicUsize,
}

impl<F: Fn() -> bool> Failing<F> {
    fn new(error: TokenError, has_new_credentials: F) -> Arc<Self> {
        Arc::new(Self {
            error,
            has_new_credentials,
            requests: AtomicUsize::new(0),
        })
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

impl<F: Fn() -> bool + Send + Sync + 'static> TokenSource for Failing<F> {
    async fn fetch(&self, _: Fetch) -> Result<TokenResponse, TokenError> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        Err(self.error.clone())
    }

    fn has_new_credentials(&self) -> bool {
        (self.has_new_credentials)()
    }
}

fn refused() -> TokenError {
    TokenError::terminal("no").with_oauth_error("invalid_client")
}

/// New credentials only matter while the client is refused.
#[tokio::test(start_paused = true)]
async fn other_failures_wait_for_their_gate_whatever_the_source_says() {
    let source = Failing::new(TokenError::transient("down"), || true);
    let cache = TokenCache::new(Arc::clone(&source));
    cache.get().await.unwrap_err();
    for _ in 0..100 {
        now(cache.get()).unwrap_err();
    }
    assert_eq!(source.requests(), 3);
}

/// Law 2: each change gains one try, and ever fewer.
#[tokio::test(start_paused = true)]
async fn requests_are_bounded_however_often_a_refused_client_changes() {
    let source = Failing::new(refused(), || true);
    let cache = TokenCache::new(Arc::clone(&source));
    let (plain, key) = (TokenRequest::new(), TokenRequest::new().scope("a"));
    for _ in 0..6_000 {
        for request in [&plain, &key] {
            cache.get_for(request).await.unwrap_err();
        }
        time::sleep(millis(10)).await;
    }
    // One per change, at 0, 1, 3, 7, 15, 31 s, and one per gate: 9 to 13 by chance.
    let requests = source.requests();
    assert!((8..=16).contains(&requests), "{requests}");
}

/// Law 7: a panic counts as a no.
#[tokio::test(start_paused = true)]
async fn a_source_that_panics_over_its_credentials_has_no_new_ones() {
    let source = Failing::new(refused(), || panic!("the scripted source panics"));
    let cache = TokenCache::new(source);
    for _ in 0..2 {
        let error = cache.get().await.unwrap_err();
        assert_eq!(error.oauth_error(), Some("invalid_client"));
    }
}

/// Law 7: it is not asked again meanwhile, which would never end.
#[tokio::test(start_paused = true)]
async fn a_source_that_asks_its_own_cache_over_its_credentials_gets_an_answer() {
    let own = Arc::new(OnceLock::<TokenCache>::new());
    let asked = Arc::new(AtomicUsize::new(0));
    let source = Failing::new(refused(), {
        let (own, asked) = (Arc::clone(&own), Arc::clone(&asked));
        move || {
            // Deeper than any sensible source goes, but not too deep for the test.
            assert!(asked.fetch_add(1, Ordering::SeqCst) < 10);
            now(own.get().expect("it was set").get()).is_ok()
        }
    });
    let cache = TokenCache::new(source);
    assert!(own.set(cache.clone()).is_ok());
    for callers in 0..3 {
        let error = cache.get().await.unwrap_err();
        assert_eq!(error.oauth_error(), Some("invalid_client"));
        // Each caller looks for a token, and then for a flight to wait for.
        assert_eq!(asked.load(Ordering::SeqCst), 2 * callers);
    }
    cache.shutdown();
}

/// Even if it becomes void while its replacement is fetched.
#[tokio::test(start_paused = true)]
async fn a_void_token_is_no_last_resort() {
    for void in [false, true] {
        let first = response("void").not_before_policy(100);
        let server = AuthServer::scripted([Ok(first.ext_expires_in(secs(3_600)))]);
        let other = response("other").not_before_policy(200);
        server.set_for("raises", Answer::Give(other));
        let policy = RefreshPolicy::new().extended_lifetime(true);
        let cache = TokenCache::with_policy(server.clone(), policy);
        cache.get().await.unwrap();
        time::sleep(secs(400)).await;
        // So that the other answer comes in between.
        server.set_latency(secs(2));
        let (last, _) = tokio::join!(cache.get(), async {
            time::sleep(secs(1)).await;
            if void {
                let other = TokenRequest::new().scope("raises");
                cache.get_for(&other).await.unwrap();
            }
        });
        assert_eq!(last.is_err(), void);
    }
}
