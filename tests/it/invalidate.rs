//! What happens to a token that the API refused.

use tokio::time::{self, Instant};
use tower_bearer::{TokenCache, TokenError};

use crate::support::{Answer, AuthServer, caller, current_thread, millis, now, secs, settle};

/// Law 8.
#[tokio::test(start_paused = true)]
async fn a_hundred_refusals_of_one_token_cost_one_token_request() {
    let server = AuthServer::new();
    server.set_latency(millis(50));
    let cache = TokenCache::new(server.clone());
    let token = cache.get().await.unwrap();
    for _ in 0..100 {
        cache.invalidate(&token);
        time::sleep(millis(1)).await;
    }
    assert_eq!(cache.get().await.unwrap().expose_secret(), "token-2");
    assert_eq!(server.requests(), 2);
}

/// Law 8: nobody uses that token any more.
#[tokio::test(start_paused = true)]
async fn a_refusal_of_an_older_token_costs_nothing() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let older = cache.get().await.unwrap();
    cache.invalidate(&older);
    settle().await;
    // Past any cooldown.
    for _ in 0..10 {
        time::sleep(secs(6)).await;
        for _ in 0..100 {
            cache.invalidate(&older);
        }
        assert_eq!(now(cache.get()).unwrap().expose_secret(), "token-2");
    }
    settle().await;
    assert_eq!(server.requests(), 2);
}

/// Laws 2 and 8: the cooldown decides, not the number of refusals.
#[tokio::test(start_paused = true)]
async fn repeated_refusals_force_ever_fewer_refreshes() {
    let server = AuthServer::new();
    server.set(Answer::Grant(secs(36_000)));
    let cache = TokenCache::new(server.clone());
    let end = Instant::now() + secs(400);
    while Instant::now() < end {
        let token = cache.get().await.unwrap();
        cache.invalidate(&token);
        time::sleep(millis(100)).await;
    }
    let sent: Vec<_> = server.seen().iter().map(|seen| seen.at).collect();
    // No cooldown delays the first token and its replacement.
    let gaps: Vec<_> = sent[1..].windows(2).map(|pair| pair[1] - pair[0]).collect();
    let cooldowns = [5, 10, 20, 40, 60, 60, 60, 60, 60].map(secs);
    assert_eq!(gaps.len(), cooldowns.len(), "{gaps:?}");
    for (gap, cooldown) in gaps.iter().zip(cooldowns) {
        let expected = cooldown..=cooldown + millis(150);
        assert!(expected.contains(gap), "{gaps:?}");
    }
}

/// Law 7: after three cooldowns without refusals it is the shortest again.
#[tokio::test(start_paused = true)]
async fn the_cooldown_resets_when_refusals_stop() {
    let server = AuthServer::new();
    server.set(Answer::Grant(secs(36_000)));
    let cache = TokenCache::new(server.clone());
    for wait in [0, 6, 11, 61] {
        // Cooldowns of 5 s, 10 s, 20 s, and 5 s again.
        time::sleep(secs(wait)).await;
        cache.invalidate(&cache.get().await.unwrap());
        settle().await;
    }
    assert_eq!(server.requests(), 5);
    time::sleep(millis(4_900)).await;
    cache.invalidate(&cache.get().await.unwrap());
    settle().await;
    assert_eq!(server.requests(), 5);
    time::sleep(millis(200)).await;
    cache.invalidate(&cache.get().await.unwrap());
    settle().await;
    assert_eq!(server.requests(), 6);
}

/// Laws 3 and 8.
#[tokio::test(start_paused = true)]
async fn callers_wait_a_second_for_the_replacement_and_then_use_the_refused_token() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let token = cache.get().await.unwrap();
    server.hold();
    cache.invalidate(&token);
    for _ in 0..3 {
        let asked = Instant::now();
        assert_eq!(cache.get().await.unwrap().expose_secret(), "token-1");
        assert!(asked.elapsed() >= secs(1) && asked.elapsed() <= millis(1_005));
    }
    // `peek` still finds it too.
    assert_eq!(cache.peek().unwrap().expose_secret(), "token-1");
    let patient = caller(&cache);
    time::sleep(millis(500)).await;
    server.release();
    assert_eq!(patient.await.unwrap().unwrap().expose_secret(), "token-2");
    assert_eq!(server.requests(), 2);
}

/// Law 3.
#[tokio::test(start_paused = true)]
async fn a_failed_replacement_leaves_the_refused_token_in_use() {
    for error in [
        TokenError::transient("down"),
        TokenError::terminal("invalid_client"),
    ] {
        let server = AuthServer::new();
        let cache = TokenCache::new(server.clone());
        let token = cache.get().await.unwrap();
        server.set(Answer::Fail(error));
        server.set_latency(millis(100));
        cache.invalidate(&token);
        let asked = Instant::now();
        assert_eq!(cache.get().await.unwrap().expose_secret(), "token-1");
        assert!(asked.elapsed() >= millis(100) && asked.elapsed() <= secs(1));
        time::sleep(secs(1)).await;

        // From here on nothing is waited for: a refusal opens no gate and marks nothing.
        let requests = server.requests();
        for _ in 0..10 {
            cache.invalidate(&token);
            assert_eq!(now(cache.get()).unwrap().expose_secret(), "token-1");
            time::sleep(millis(10)).await;
        }
        assert_eq!(server.requests(), requests);
    }
}

/// Laws 2 and 8: not even when the cooldown is long over.
#[tokio::test(start_paused = true)]
async fn a_refusal_opens_no_gate() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let token = cache.get().await.unwrap();
    let busy = TokenError::transient("busy").with_retry_after(secs(60));
    server.set(Answer::Fail(busy));
    cache.invalidate(&token);
    settle().await;
    assert_eq!(server.requests(), 2);
    server.set(Answer::Grant(secs(300)));
    for _ in 0..590 {
        cache.invalidate(&token);
        time::sleep(millis(100)).await;
    }
    assert_eq!(server.requests(), 2);
    time::sleep(secs(8)).await;
    cache.invalidate(&token);
    settle().await;
    assert_eq!(server.requests(), 3);
    assert_eq!(now(cache.get()).unwrap().expose_secret(), "token-3");
}

/// Law 8: the next refusal of that text is about the current token.
#[tokio::test(start_paused = true)]
async fn a_server_that_repeats_the_refused_token_is_asked_once_a_cooldown() {
    let server = AuthServer::new();
    server.set(Answer::token("same", secs(36_000)));
    let cache = TokenCache::new(server.clone());
    for _ in 0..600 {
        let token = cache.get().await.unwrap();
        cache.invalidate(&token);
        settle().await;
        time::sleep(millis(100)).await;
    }
    // The first one, then at 0 s, 5 s, 15 s, 35 s.
    assert_eq!(server.requests(), 5);
}

/// Law 3: without a runtime nothing can replace it.
#[test]
fn a_refusal_outside_a_runtime_changes_nothing() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let runtime = current_thread();
    let token = runtime.block_on(cache.get()).unwrap();
    cache.invalidate(&token);
    assert_eq!(now(cache.get()).unwrap().expose_secret(), "token-1");
    runtime.block_on(settle());
    assert_eq!(server.requests(), 1);
}
