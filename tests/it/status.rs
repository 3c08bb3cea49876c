//! The state of a cache at one moment: [`TokenCache::status`].

use std::{pin::pin, time::SystemTime};

use tokio::time;
use tower_bearer::{RefreshPolicy, TokenCache, TokenError, TokenRequest, TokenState};

use crate::support::{Answer, AuthServer, caller, millis, poll_once, secs, seed, settle};

#[tokio::test(start_paused = true)]
async fn a_status_follows_a_token_through_its_life() {
    seed(3);
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let status = cache.status();
    assert_eq!(status.state(), TokenState::Missing);
    assert!(status.is_healthy() && !status.has_token());
    assert_eq!(
        (status.expires_in(), status.age(), status.last_success()),
        (None, None, None)
    );

    server.hold();
    let waiting = caller(&cache);
    let mut second = pin!(cache.get());
    settle().await;
    assert!(poll_once(second.as_mut()).is_pending());
    let status = cache.status();
    assert!(status.flight().is_some());
    assert_eq!(status.waiters(), 2);
    server.release();
    waiting.await.unwrap().unwrap();
    second.await.unwrap();

    time::sleep(secs(100)).await;
    let status = cache.status();
    assert_eq!(status.state(), TokenState::Fresh);
    assert_eq!((status.flight(), status.waiters()), (None, 0));
    assert_eq!(status.age(), Some(secs(100)));
    assert_eq!(status.expires_in(), Some(secs(190)));
    assert!(status.due_in().unwrap() <= secs(125));
    assert!(status.usable_until().unwrap() > SystemTime::now());
    assert!(status.last_success().is_some());

    server.set(Answer::Fail(TokenError::transient("down")));
    time::sleep(secs(180)).await;
    assert_eq!(cache.status().state(), TokenState::Due);
    assert_eq!(cache.status().due_in(), Some(secs(0)));
    cache.get().await.unwrap();
    // Its attempts take 3 s at most.
    time::sleep(secs(5)).await;
    let status = cache.status();
    assert!(status.is_healthy());
    assert_eq!(status.consecutive_failures(), 1);
    assert!(status.last_error().unwrap().is_transient());
    assert!(status.failing_for().unwrap() > secs(1));
    // The gate was shut for at most half a second, and no request came since.
    assert_eq!(status.retry_in(), None);

    time::sleep(secs(7)).await;
    cache.get().await.unwrap_err();
    let status = cache.status();
    assert_eq!(status.state(), TokenState::Expired);
    assert!(!status.is_healthy());
    assert_eq!(status.expires_in(), Some(secs(0)));
    assert_eq!(status.consecutive_failures(), 2);
    assert!(status.retry_in().unwrap() <= millis(1_100));

    server.set(Answer::Grant(secs(300)));
    time::sleep(secs(5)).await;
    cache.get().await.unwrap();
    let status = cache.status();
    assert_eq!(status.state(), TokenState::Fresh);
    assert!(status.is_healthy() && status.last_error().is_none());
    assert_eq!(
        (status.consecutive_failures(), status.failing_for()),
        (0, None)
    );

    cache.shutdown();
    let status = cache.status();
    assert_eq!(status.state(), TokenState::ShutDown);
    assert!(!status.is_healthy() && !status.has_token());
}

#[tokio::test(start_paused = true)]
async fn a_status_shows_a_refused_token_while_its_replacement_is_fetched() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let token = cache.get().await.unwrap();
    server.hold();
    cache.invalidate(&token);
    settle().await;
    let status = cache.status();
    assert_eq!(status.state(), TokenState::Refused);
    assert!(status.has_token() && status.flight().is_some());
    server.release();
    settle().await;
    assert_eq!(cache.status().state(), TokenState::Fresh);
}

/// It is still sent, since there is no other, and the API does not take it.
#[tokio::test(start_paused = true)]
async fn a_refused_token_that_cannot_be_replaced_is_not_healthy() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let token = cache.get().await.unwrap();
    server.set(Answer::Fail(TokenError::transient("down")));
    cache.invalidate(&token);
    time::sleep(secs(1)).await;
    let status = cache.status();
    assert_eq!(status.state(), TokenState::Refused);
    assert!(status.has_token() && !status.is_healthy());
    assert!(cache.get().await.is_ok());

    server.set(Answer::Grant(secs(300)));
    time::sleep(secs(10)).await;
    cache.invalidate(&token);
    settle().await;
    let status = cache.status();
    assert_eq!(status.state(), TokenState::Fresh);
    assert!(status.is_healthy());
}

/// The refusal joins the refresh that is under way.
#[tokio::test(start_paused = true)]
async fn a_token_refused_during_a_failing_refresh_is_not_healthy() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let token = cache.get().await.unwrap();
    time::sleep(secs(230)).await;
    server.set(Answer::Fail(TokenError::transient("down")));
    server.hold();
    cache.get().await.unwrap();
    settle().await;
    cache.invalidate(&token);
    server.release();
    time::sleep(secs(5)).await;
    let status = cache.status();
    assert_eq!(status.state(), TokenState::Refused);
    assert!(status.has_token() && !status.is_healthy());
    assert_eq!(
        server
            .seen()
            .iter()
            .filter(|seen| seen.attempt == 1)
            .count(),
        2
    );
}

#[tokio::test(start_paused = true)]
async fn a_cache_whose_first_token_does_not_come_is_not_healthy() {
    let server = AuthServer::new();
    server.set(Answer::Hang);
    let cache = TokenCache::new(server.clone());
    let waits = caller(&cache);
    for (wait, age, healthy) in [
        (millis(1), millis(1), true),
        (secs(10), millis(10_001), false),
    ] {
        time::sleep(wait).await;
        let status = cache.status();
        assert_eq!(status.flight_age(), Some(age));
        assert_eq!(status.is_healthy(), healthy);
    }
    waits.await.unwrap().unwrap_err();
    assert_eq!(cache.status().flight_age(), None);
}

#[tokio::test(start_paused = true)]
async fn each_key_has_a_status_and_asking_adds_no_key() {
    let cache = TokenCache::with_policy(AuthServer::new(), RefreshPolicy::new().max_keys(9));
    let key = |name: &str| TokenRequest::new().scope(name).param("k", "CANARY");
    assert!(cache.status_for(&key("a")).is_none());
    assert_eq!(cache.statuses(9).len(), 1);
    for name in ["a", "b", "c"] {
        cache.get_for(&key(name)).await.unwrap();
    }
    let status = cache.status_for(&key("a")).unwrap();
    assert_eq!(status.state(), TokenState::Fresh);
    assert_eq!(status.request(), &key("a"));
    assert_eq!(
        cache.status_for(&TokenRequest::new()).unwrap().state(),
        TokenState::Missing
    );
    let all = cache.statuses(9);
    assert_eq!(all.len(), 4);
    assert_eq!(all[0].request(), &TokenRequest::new());
    assert_eq!(cache.statuses(2).len(), 3);
    // `Debug` shows neither token nor parameter.
    let text = format!("{all:?}");
    assert!(
        !text.contains("token-") && !text.contains("CANARY"),
        "{text}"
    );
}
