//! What a policy bounds: waiters, attempts, and their time.

use tokio::time::Instant;
use tower_bearer::{RefreshPolicy, TokenCache, TokenError};

use crate::support::{Answer, AuthServer, all, caller, millis, now, poll_once, secs, settle};

/// Law 6.
#[tokio::test(start_paused = true)]
async fn callers_beyond_the_limit_are_refused_at_once() {
    for limit in [0, 2] {
        let server = AuthServer::new();
        server.hold();
        let policy = RefreshPolicy::new().max_waiters(limit);
        let cache = TokenCache::with_policy(server.clone(), policy);
        let seated: Vec<_> = (0..limit).map(|_| caller(&cache)).collect();
        settle().await;
        for _ in 0..3 {
            let error = now(cache.get()).unwrap_err();
            assert!(error.is_overloaded() && error.is_transient(), "{error:?}");
        }
        server.release();
        for token in all(seated).await {
            assert!(token.is_ok());
        }
        // The flight goes on even if nobody may wait for it.
        settle().await;
        assert!(now(cache.get()).is_ok());
        assert_eq!(server.requests(), 1);
    }
}

/// Laws 3 and 4.
#[tokio::test(start_paused = true)]
async fn the_limit_keeps_nobody_from_a_valid_token() {
    let server = AuthServer::new();
    let cache = TokenCache::with_policy(server.clone(), RefreshPolicy::new().max_waiters(1));
    let token = cache.get().await.unwrap();
    server.hold();
    cache.invalidate(&token);
    let mut seated = Box::pin(cache.get());
    assert!(poll_once(seated.as_mut()).is_pending());
    // No place is left, but the refused token is better than an error.
    assert_eq!(now(cache.get()).unwrap().expose_secret(), "token-1");
    server.release();
    assert_eq!(seated.await.unwrap().expose_secret(), "token-2");
}

/// Law 2.
#[tokio::test(start_paused = true)]
async fn a_flight_makes_as_many_attempts_as_it_is_allowed() {
    for (allowed, made) in [(0, 1), (1, 1), (2, 2), (5, 5)] {
        let server = AuthServer::new();
        server.set(Answer::Fail(TokenError::transient("down")));
        let policy = RefreshPolicy::new().attempts(allowed);
        let cache = TokenCache::with_policy(server.clone(), policy);
        assert!(cache.get().await.is_err());
        let attempts: Vec<_> = server.seen().iter().map(|seen| seen.attempt).collect();
        assert_eq!(attempts, (1..=made).collect::<Vec<_>>());
    }
}

/// Law 2: another try would not help, or the server asks for none.
#[tokio::test(start_paused = true)]
async fn terminal_errors_and_retry_after_end_a_flight() {
    for error in [
        TokenError::terminal("invalid_client"),
        TokenError::transient("busy").with_retry_after(secs(1)),
    ] {
        let server = AuthServer::new();
        server.set(Answer::Fail(error));
        let cache = TokenCache::new(server.clone());
        assert!(cache.get().await.is_err());
        assert_eq!(server.requests(), 1);
    }
}

/// Law 6.
#[tokio::test(start_paused = true)]
async fn an_attempt_ends_at_its_timeout_and_the_next_one_follows() {
    let server = AuthServer::new();
    server.set(Answer::Hang);
    let policy = RefreshPolicy::new().attempt_timeout(secs(2));
    let cache = TokenCache::with_policy(server.clone(), policy);
    let asked = Instant::now();
    let error = cache.get().await.unwrap_err();
    assert!(error.is_timeout() && error.is_transient(), "{error:?}");
    assert!(asked.elapsed() >= secs(6) && asked.elapsed() <= millis(6_610));
    let sent: Vec<_> = server.seen().iter().map(|seen| seen.at).collect();
    assert_eq!(sent.len(), 3);
    let (second, third) = (sent[1] - sent[0], sent[2] - sent[1]);
    assert!(second >= secs(2) && second <= millis(2_205), "{second:?}");
    assert!(third >= secs(2) && third <= millis(2_405), "{third:?}");
    assert_eq!(server.in_flight(), 0);
    assert_eq!(server.most_at_once(), 1);
}

/// Law 6: one attempt's timeout does not fail the flight.
#[tokio::test(start_paused = true)]
async fn an_attempt_after_a_timeout_may_succeed() {
    let server = AuthServer::new();
    server.set_latency(secs(3));
    let policy = RefreshPolicy::new().attempt_timeout(secs(2));
    let cache = TokenCache::with_policy(server.clone(), policy);
    let waiting = caller(&cache);
    tokio::time::sleep(secs(1)).await;
    server.set_latency(secs(1));
    assert_eq!(waiting.await.unwrap().unwrap().expose_secret(), "token-2");
}

/// Law 6.
#[tokio::test(start_paused = true)]
async fn a_flight_ends_at_its_timeout_whatever_its_attempts_take() {
    let server = AuthServer::new();
    server.set(Answer::Hang);
    let policy = RefreshPolicy::new().flight_timeout(secs(5));
    let cache = TokenCache::with_policy(server.clone(), policy);
    let asked = Instant::now();
    assert!(cache.get().await.unwrap_err().is_timeout());
    assert!(asked.elapsed() >= secs(5) && asked.elapsed() <= millis(5_010));
    assert_eq!(server.requests(), 1);
    assert_eq!(server.in_flight(), 0);
}
