//! The end of a cache: all work stops, and tokens are revoked on request.

use std::{
    future::Future,
    pin::pin,
    sync::{Arc, Mutex, atomic::Ordering},
    task::{Context, Wake, Waker},
};

use tokio::{
    runtime::Handle,
    time::{self, Instant},
};
use tower::{Layer, ServiceExt, limit::ConcurrencyLimitLayer};
use tower_bearer::{
    BearerAuthLayer, Fetch, RefreshPolicy, RefreshToken, Revocation, TokenCache, TokenError,
    TokenEvent, TokenRequest, TokenResponse, TokenSource,
};

use crate::support::{
    Answer, Api, AuthServer, PanickingLog, Told, caller, current_thread, get, millis, now,
    poll_once, secs, settle, timed, token_error,
};

/// A source that revokes slowly and remembers what.
#[derive(Clone, Default)]
struct Revoking {
    revoked: Arc<Mutex<Vec<Revoked>>>,
    at_once: Arc<Mutex<(usize, usize)>>,
}

/// The refresh token and the access token.
type Revoked = (Option<String>, Option<String>);

impl TokenSource for Revoking {
    async fn fetch(&self, fetch: Fetch) -> Result<TokenResponse, TokenError> {
        let scope = fetch.request.scopes().collect::<Vec<_>>().join("+");
        Ok(TokenResponse::new(format!("access-{scope}"))?
            .expires_in(secs(300))
            .refresh_token(RefreshToken::new(format!("refresh-{scope}")).expires_in(secs(600))))
    }

    async fn revoke(&self, revocation: Revocation) -> Result<(), TokenError> {
        {
            let mut at_once = self.at_once.lock().unwrap();
            at_once.0 += 1;
            at_once.1 = at_once.0.max(at_once.1);
        }
        time::sleep(millis(100)).await;
        self.at_once.lock().unwrap().0 -= 1;
        let refresh = revocation.refresh_token;
        let access = revocation.access_token;
        let texts = (
            refresh.map(|token| token.expose_secret().to_owned()),
            access.map(|token| token.expose_secret().to_owned()),
        );
        let fails = texts.1.as_deref() == Some("access-7");
        self.revoked.lock().unwrap().push(texts);
        match fails {
            true => Err(TokenError::terminal("unsupported_token_type")),
            false => Ok(()),
        }
    }
}

fn tasks() -> usize {
    Handle::current().metrics().num_alive_tasks()
}

#[tokio::test(start_paused = true)]
async fn waiters_learn_of_a_shutdown_at_once_and_no_task_is_left() {
    let server = AuthServer::new();
    server.set(Answer::Hang);
    let cache = TokenCache::new(server.clone());
    let service = BearerAuthLayer::new(cache.clone()).layer(Api::echoing());
    let waits: Vec<_> = (0..10).map(|_| caller(&cache)).collect();
    let request = tokio::spawn(service.clone().oneshot(get()));
    let keyed = tokio::spawn({
        let cache = cache.clone();
        async move { cache.get_for(&TokenRequest::new().scope("a")).await }
    });
    settle().await;
    assert_eq!(server.in_flight(), 2);
    let start = Instant::now();
    cache.shutdown();
    for wait in waits {
        assert!(wait.await.unwrap().unwrap_err().is_shut_down());
    }
    assert!(keyed.await.unwrap().unwrap_err().is_shut_down());
    let error = request.await.unwrap().unwrap_err();
    assert!(token_error(&error).is_shut_down());
    settle().await;
    assert_eq!((tasks(), server.in_flight()), (0, 0));
    assert_eq!(start.elapsed(), secs(0));

    // From here on nothing starts, for any clone and any key.
    server.set(Answer::Grant(secs(300)));
    for key in [TokenRequest::new(), TokenRequest::new().scope("b")] {
        assert!(now(cache.clone().get_for(&key)).unwrap_err().is_shut_down());
    }
    assert!(token_error(&service.oneshot(get()).await.unwrap_err()).is_shut_down());
    assert_eq!(server.requests(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_live_token_is_no_longer_returned() {
    let cache = TokenCache::new(AuthServer::new());
    let token = cache.get().await.unwrap();
    cache.shutdown();
    assert!(cache.peek().is_none());
    assert!(now(cache.get()).unwrap_err().is_shut_down());
    cache.invalidate(&token);
    cache.shutdown();
    settle().await;
    assert_eq!(tasks(), 0);
}

/// Though its token is there, and it waits only for the inner service.
#[tokio::test(start_paused = true)]
async fn a_request_about_to_leave_does_not() {
    let server = AuthServer::new();
    server.hold();
    let (api, cache) = (Api::echoing(), TokenCache::new(server.clone()));
    let limited = ConcurrencyLimitLayer::new(1).layer(api.clone());
    let service = BearerAuthLayer::new(cache.clone()).layer(limited.clone());
    let request = tokio::spawn(service.oneshot(get()));
    settle().await;
    // Another request has the only permit when the token comes.
    api.hold();
    let other = tokio::spawn(limited.oneshot(get()));
    settle().await;
    server.release();
    settle().await;
    assert!(cache.peek().is_some());
    cache.shutdown();
    api.release();
    other.await.unwrap().unwrap();
    let error = request.await.unwrap().unwrap_err();
    assert!(token_error(&error).is_shut_down());
    assert_eq!(api.arrivals().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_warm_cache_stops() {
    let server = AuthServer::new();
    let policy = RefreshPolicy::new().keep_warm(true);
    let cache = TokenCache::with_policy(server.clone(), policy);
    cache.get().await.unwrap();
    settle().await;
    assert_eq!(tasks(), 1);
    cache.shutdown();
    settle().await;
    assert_eq!(tasks(), 0);
    time::sleep(secs(1_000)).await;
    assert_eq!(server.requests(), 1);
}

/// Without a handle nobody needs the token.
#[tokio::test(start_paused = true)]
async fn no_task_outlives_the_last_handle() {
    for warm in [false, true] {
        let policy = RefreshPolicy::new().keep_warm(warm);
        let cache = TokenCache::with_policy(AuthServer::new(), policy);
        cache.get().await.unwrap();
        let service = BearerAuthLayer::new(cache.clone()).layer(Api::echoing());
        drop(cache);
        settle().await;
        assert_eq!(tasks(), 1);
        drop(service);
        settle().await;
        assert_eq!(tasks(), 0);
    }
}

/// RFC 7009: both tokens of each key, some at a time, although one revocation fails.
#[tokio::test(start_paused = true)]
async fn the_tokens_of_all_keys_are_revoked() {
    let source = Revoking::default();
    let cache = TokenCache::new(source.clone());
    for key in 0..100 {
        let key = TokenRequest::new().scope(key.to_string());
        cache.get_for(&key).await.unwrap();
    }
    cache.get().await.unwrap();
    let start = Instant::now();
    let error = cache.shutdown_and_revoke().await.unwrap_err();
    assert!(!error.is_transient());
    let mut revoked = source.revoked.lock().unwrap().clone();
    revoked.sort();
    revoked.dedup();
    assert_eq!(revoked.len(), 101);
    for (refresh, access) in &revoked {
        let scope = access.as_ref().unwrap().strip_prefix("access-").unwrap();
        assert_eq!(*refresh, Some(format!("refresh-{scope}")));
    }
    assert_eq!(source.at_once.lock().unwrap().1, 16);
    assert!(start.elapsed() <= millis(701), "{:?}", start.elapsed());
    // Nothing is left to revoke.
    cache.shutdown_and_revoke().await.unwrap();
    assert_eq!(source.revoked.lock().unwrap().len(), 101);
}

#[tokio::test(start_paused = true)]
async fn a_dead_token_is_not_revoked() {
    let source = Revoking::default();
    let cache = TokenCache::new(source.clone());
    cache.get().await.unwrap();
    time::sleep(secs(400)).await;
    cache.shutdown_and_revoke().await.unwrap();
    let revoked = source.revoked.lock().unwrap().clone();
    assert_eq!(revoked, [(Some("refresh-".to_owned()), None)]);

    let source = Revoking::default();
    let cache = TokenCache::new(source.clone());
    cache.shutdown_and_revoke().await.unwrap();
    cache.get().await.unwrap_err();
    assert!(source.revoked.lock().unwrap().is_empty());
}

/// All tokens are revoked, and listeners see the end.
#[tokio::test(start_paused = true)]
async fn a_log_that_panics_does_not_cut_a_shutdown_short() {
    let (panics, _guard) = PanickingLog::collect(&[Told::Event, Told::Record]);
    let source = Revoking::default();
    let cache = TokenCache::new(source.clone());
    let keys = ["1", "2"].map(|scope| TokenRequest::new().scope(scope));
    let mut tokens = Vec::new();
    for key in &keys {
        tokens.push(cache.get_for(key).await.unwrap());
    }
    // One of them has a flight, which is logged.
    cache.invalidate(&tokens[0]);
    let mut events = cache.events();
    panics.store(true, Ordering::SeqCst);
    let revoked = cache.shutdown_and_revoke().await;
    panics.store(false, Ordering::SeqCst);
    revoked.unwrap();
    assert_eq!(source.revoked.lock().unwrap().len(), 2);
    assert!(matches!(now(events.next()), Some(TokenEvent::ShutDown)));
}

/// Nobody waits forever.
#[tokio::test(start_paused = true)]
async fn a_hanging_revocation_is_given_up() {
    struct Hanging;

    impl TokenSource for Hanging {
        async fn fetch(&self, _: Fetch) -> Result<TokenResponse, TokenError> {
            Ok(TokenResponse::new("token")?.expires_in(secs(300)))
        }

        async fn revoke(&self, _: Revocation) -> Result<(), TokenError> {
            std::future::pending().await
        }
    }

    let cache = TokenCache::new(Hanging);
    cache.get().await.unwrap();
    let (revoked, took) = timed(cache.shutdown_and_revoke()).await;
    let error = revoked.unwrap_err();
    assert!(error.is_timeout());
    assert_eq!(error.to_string(), "the revocation request timed out");
    assert!(took <= secs(11), "{took:?}");
}

#[tokio::test]
async fn a_panic_during_a_revocation_is_an_interruption() {
    struct Panicking;

    impl TokenSource for Panicking {
        async fn fetch(&self, _: Fetch) -> Result<TokenResponse, TokenError> {
            TokenResponse::new("token")
        }

        async fn revoke(&self, _: Revocation) -> Result<(), TokenError> {
            panic!("as it revokes")
        }
    }

    let cache = TokenCache::new(Panicking);
    cache.get().await.unwrap();
    let error = cache.shutdown_and_revoke().await.unwrap_err();
    assert!(error.is_interrupted() && error.is_transient());
}

#[tokio::test(start_paused = true)]
async fn a_source_that_cannot_revoke_says_so() {
    let cache = TokenCache::new(AuthServer::new());
    cache.get().await.unwrap();
    let error = cache.shutdown_and_revoke().await.unwrap_err();
    assert!(!error.is_transient() && !error.is_shut_down());
}

/// A flight that its runtime loses while the cache ends is no outage.
#[test]
fn a_shutdown_reports_no_lost_flight() {
    /// Ends a runtime when woken.
    struct Ends(Mutex<Option<tokio::runtime::Runtime>>);

    impl Wake for Ends {
        fn wake(self: Arc<Self>) {
            drop(self.0.lock().unwrap().take());
        }
    }

    let server = AuthServer::new();
    server.hold();
    let cache = TokenCache::new(server);
    let mut events = cache.events();
    let (first, second) = (current_thread(), current_thread());
    second.block_on(async {
        let key = TokenRequest::new().scope("a");
        assert!(poll_once(pin!(cache.get_for(&key))).is_pending());
        settle().await;
    });
    let waker = Waker::from(Arc::new(Ends(Mutex::new(Some(second)))));
    let mut waits = pin!(cache.get());
    first.block_on(async {
        let polled = waits.as_mut().poll(&mut Context::from_waker(&waker));
        assert!(polled.is_pending());
        settle().await;
    });
    cache.shutdown();
    first.block_on(async {
        while let Some(event) = events.next().await {
            assert!(!matches!(event, TokenEvent::FlightLost { .. }), "{event:?}");
        }
    });
}
