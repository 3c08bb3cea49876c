//! What an outage costs the authorization server and those who want a token.

use std::{
    error::Error,
    future,
    ops::RangeInclusive,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::{self, Instant};
use tower_bearer::{ClientCredentials, TokenCache, TokenError};

use crate::support::{
    Answer, AuthServer, Crowd, TokenEndpoint, caller, millis, now, reply, secs, seed, settle,
};

fn down() -> Answer {
    Answer::Fail(TokenError::transient("down"))
}

/// A cache with a token of 300 s that has just died.
async fn expired(server: &AuthServer) -> TokenCache {
    let cache = TokenCache::new(server.clone());
    cache.get().await.unwrap();
    time::sleep(secs(290)).await;
    assert!(cache.peek().is_none());
    cache
}

/// The pauses between the requests that `server` saw, from index `from` on.
fn pauses(server: &AuthServer, from: usize) -> Vec<Duration> {
    let seen = server.seen();
    let pairs = seen[from..].windows(2);
    pairs.map(|pair| pair[1].at - pair[0].at).collect()
}

/// Asserts that pauses are within ranges in milliseconds, the last of which repeats; a caller comes every 100 ms.
#[track_caller]
fn assert_within(pauses: &[Duration], ranges: &[RangeInclusive<u64>]) {
    let last = ranges.last().unwrap();
    for (index, pause) in pauses.iter().enumerate() {
        let range = ranges.get(index).unwrap_or(last);
        let pause = pause.as_millis() as u64;
        let range = *range.start()..=range.end() + 110;
        assert!(range.contains(&pause), "{index}: {pauses:?}");
    }
}

/// The gate after the first, second, … failed flight, half to whole.
const BACKOFF: [RangeInclusive<u64>; 6] = [
    250..=500,
    500..=1_000,
    1_000..=2_000,
    2_000..=4_000,
    4_000..=8_000,
    5_000..=10_000,
];

/// Some servers allow one token request per second, and do not say so.
#[tokio::test(start_paused = true)]
async fn a_first_flight_outlasts_a_rate_limit_without_a_retry_after() {
    let sent = Arc::new(Mutex::new(Vec::new()));
    let endpoint = TokenEndpoint::new({
        let sent = Arc::clone(&sent);
        let started = Instant::now();
        move |_| {
            let at = started.elapsed();
            sent.lock().unwrap().push(at);
            let answer = match at < secs(1) {
                true => reply(429, ""),
                false => reply(200, r#"{"access_token":"token","token_type":"Bearer"}"#),
            };
            future::ready(answer)
        }
    });
    let source = ClientCredentials::builder("http://localhost/token", "client-id")
        .build_with(endpoint)
        .unwrap();
    TokenCache::new(source).get().await.unwrap();
    let sent = sent.lock().unwrap();
    assert!(sent[1] >= millis(500) && sent.len() <= 3, "{sent:?}");
}

/// Laws 2, 3 and 4.
#[tokio::test(start_paused = true)]
async fn failed_refreshes_leave_the_token_in_use_and_follow_the_gate() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let start = Instant::now();
    cache.get().await.unwrap();
    server.set(down());
    while start.elapsed() < secs(289) {
        assert_eq!(now(cache.get()).unwrap().expose_secret(), "token-1");
        time::sleep(millis(100)).await;
    }
    let seen = server.seen();
    let attempts: Vec<_> = seen.iter().map(|seen| seen.attempt).collect();
    // At first three, with long pauses since nobody waits; then one per flight while the server is known to be down.
    assert_eq!(attempts[..6], [1, 1, 2, 3, 1, 1]);
    assert!(attempts[4..].iter().all(|attempt| *attempt == 1));
    let all = pauses(&server, 1);
    assert_within(&all[..2], &[500..=1_000, 1_000..=2_000]);
    let pauses = &all[2..];
    assert_within(pauses, &BACKOFF);
    assert!(pauses.len() >= 8, "{pauses:?}");
}

/// Laws 3 and 7.
#[tokio::test(start_paused = true)]
async fn no_caller_notices_an_outage_within_a_lifetime() {
    for run in 0..10 {
        seed(run);
        let server = AuthServer::new();
        server.set_latency(millis(30));
        let cache = TokenCache::new(server.clone());
        let start = Instant::now();
        cache.get().await.unwrap();
        let mut before = None;
        while start.elapsed() < secs(600) {
            if start.elapsed() >= secs(104) && before.is_none() {
                server.set(down());
            }
            if start.elapsed() >= secs(277) && before.is_none() {
                before = Some(server.requests());
                server.set(Answer::Grant(secs(300)));
            }
            now(cache.get()).unwrap();
            time::sleep(millis(100)).await;
        }
        let before = before.unwrap();
        assert!(before >= 4, "there was no outage to notice");
        // For the next token, and for the one after it.
        assert_eq!(server.requests(), before + 2);
    }
}

/// Laws 2, 6 and 7: a thousand callers a second for ten minutes.
#[tokio::test(start_paused = true)]
async fn a_dead_server_is_asked_on_the_backoff_schedule_whatever_the_traffic() {
    let server = AuthServer::new();
    server.set_latency(millis(50));
    let cache = expired(&server).await;
    server.set(down());
    let crowd = Crowd::new(&cache);
    crowd.storm(10, millis(10), secs(600)).await;

    let seen = &server.seen()[1..];
    let flights = seen.iter().filter(|seen| seen.attempt == 1).count();
    // Law 2 with S' = 0, T = 600 s and G = 10 s.
    assert!(flights <= 7 + 1 + 120, "{flights}");
    assert!(seen.len() <= 3 * 2 + flights, "{}", seen.len());
    // Nor fewer.
    assert!(flights >= 5 + 580 / 10, "{flights}");
    let tally = crowd.tally();
    assert_eq!(tally.served, 0);
    assert!(tally.failed >= 599_000);
    assert!(tally.slowest <= secs(1), "{:?}", tally.slowest);

    server.set(Answer::Grant(secs(300)));
    let recovered = Instant::now();
    crowd.storm(10, millis(10), secs(12)).await;
    let took = crowd.tally().first_served.unwrap() - recovered;
    assert!(took <= millis(10_100), "{took:?}");
    assert_eq!(server.most_at_once(), 1);
}

/// Law 7: however long the outage was; half a gate on average.
#[tokio::test(start_paused = true)]
async fn recovery_takes_one_gate_at_most() {
    let mut sum = Duration::ZERO;
    for run in 0..20 {
        seed(run);
        let server = AuthServer::new();
        let cache = expired(&server).await;
        server.set(down());
        let crowd = Crowd::new(&cache);
        crowd
            .storm(1, millis(20), secs(60) + millis(run * 500))
            .await;
        server.set(Answer::Grant(secs(300)));
        let recovered = Instant::now();
        crowd.storm(1, millis(20), secs(12)).await;
        let took = crowd.tally().first_served.unwrap() - recovered;
        assert!(took <= millis(10_050), "{took:?}");
        sum += took;
    }
    assert!(sum / 20 <= secs(6), "{:?}", sum / 20);
}

/// Law 2: even without a token, for up to five minutes.
#[tokio::test(start_paused = true)]
async fn a_retry_after_is_respected() {
    for (asked, least, most) in [(40, 40, 44), (120, 120, 132), (86_400, 300, 330)] {
        let server = AuthServer::new();
        server.set(Answer::Grant(secs(60)));
        let cache = TokenCache::new(server.clone());
        cache.get().await.unwrap();
        let busy = TokenError::transient("busy").with_retry_after(secs(asked));
        server.set(Answer::Fail(busy));
        // Due by now, and dead 8 s later.
        time::sleep(secs(46)).await;
        let start = Instant::now();
        while start.elapsed() < secs(800) {
            match (start.elapsed() < millis(7_950), cache.get().await) {
                (true, got) => assert_eq!(got.unwrap().expose_secret(), "token-1"),
                (false, got) => {
                    let named = got.unwrap_err().retry_after();
                    assert_eq!(named, Some(secs(asked.min(300))));
                }
            }
            time::sleep(millis(100)).await;
        }
        let pauses = pauses(&server, 1);
        assert!(pauses.len() >= 2);
        assert_within(&pauses, &[least * 1_000..=most * 1_000]);
    }
}

/// Laws 2 and 7: secrets are rotated and servers repaired, so no refusal is final.
#[tokio::test(start_paused = true)]
async fn a_refused_client_waits_ever_longer_and_then_recovers() {
    let server = AuthServer::new();
    server.set(Answer::Fail(TokenError::terminal("invalid_client")));
    let cache = TokenCache::new(server.clone());
    let start = Instant::now();
    while start.elapsed() < secs(400) {
        let error = cache.get().await.unwrap_err();
        assert!(!error.is_transient());
        time::sleep(millis(100)).await;
    }
    let ranges = [
        2_500..=5_500,
        5_000..=11_000,
        10_000..=22_000,
        20_000..=44_000,
        30_000..=66_000,
    ];
    let pauses = pauses(&server, 0);
    assert!(pauses.len() >= 7, "{pauses:?}");
    assert_within(&pauses, &ranges);

    server.set(Answer::Grant(secs(300)));
    let mended = Instant::now();
    while cache.get().await.is_err() {
        time::sleep(millis(100)).await;
    }
    assert!(mended.elapsed() <= millis(66_100), "{:?}", mended.elapsed());
}

/// Law 2: a dying token does not bypass a terminal error.
#[tokio::test(start_paused = true)]
async fn a_refused_client_does_not_ask_again_when_its_token_dies() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    cache.get().await.unwrap();
    server.set(Answer::Fail(TokenError::terminal("invalid_client")));
    time::sleep(secs(289)).await;
    now(cache.get()).unwrap();
    settle().await;
    assert_eq!(server.requests(), 2);
    for _ in 0..24 {
        time::sleep(millis(100)).await;
        _ = cache.get().await;
    }
    assert!(cache.peek().is_none());
    assert_eq!(server.requests(), 2);
}

/// Laws 2 and 6.
#[tokio::test(start_paused = true)]
async fn after_a_failure_only_the_caller_that_starts_a_flight_waits_for_it() {
    let server = AuthServer::new();
    server.set(down());
    let cache = TokenCache::new(server.clone());
    cache.get().await.unwrap_err();
    time::sleep(millis(560)).await;
    server.set_latency(millis(500));
    let starter = caller(&cache);
    settle().await;
    assert_eq!(server.in_flight(), 1);
    for _ in 0..100 {
        let error = now(cache.get()).unwrap_err();
        assert_eq!(error.source().unwrap().to_string(), "down");
    }
    server.set(Answer::Grant(secs(300)));
    assert_eq!(starter.await.unwrap().unwrap().expose_secret(), "token-4");
    assert_eq!(now(cache.get()).unwrap().expose_secret(), "token-4");
}

/// Laws 1 and 2.
#[tokio::test(start_paused = true)]
async fn the_failure_of_a_first_flight_is_shared_by_its_waiters() {
    let server = AuthServer::new();
    server.set(Answer::Fail(TokenError::transient("the very first")));
    server.set_latency(millis(20));
    let cache = TokenCache::new(server.clone());
    let mut callers = Vec::new();
    for _ in 0..100 {
        callers.push(caller(&cache));
    }
    settle().await;
    for caller in callers {
        let error = caller.await.unwrap().unwrap_err();
        assert_eq!(error.source().unwrap().to_string(), "the very first");
    }
    let attempts: Vec<_> = server.seen().iter().map(|seen| seen.attempt).collect();
    assert_eq!(attempts, [1, 2, 3]);
    let pauses = pauses(&server, 0);
    assert!(
        pauses[0] <= millis(225) && pauses[1] <= millis(425),
        "{pauses:?}"
    );
    // Later callers get it without a request.
    assert!(now(cache.get()).is_err());
    assert_eq!(server.requests(), 3);
}

/// Law 2: one flight per token, through a gate that backoff has shut.
#[tokio::test(start_paused = true)]
async fn a_dying_token_passes_the_gate_once() {
    let mut passed = 0;
    for run in 0..20 {
        seed(run);
        let server = AuthServer::new();
        let cache = TokenCache::new(server.clone());
        let start = Instant::now();
        cache.get().await.unwrap();
        server.set(down());
        let crowd = Crowd::new(&cache);
        // Long enough for the gate to be shut for at least 5 s.
        time::sleep(secs(226)).await;
        crowd.storm(1, millis(100), secs(63)).await;
        crowd.storm(1, millis(10), secs(15)).await;

        let seen = server.seen();
        let death = start + secs(290);
        let next = seen.iter().position(|seen| seen.at >= death).unwrap();
        assert!(seen[next].at <= death + millis(15), "{:?}", seen[next]);
        let (before, after) = (
            seen[next].at - seen[next - 1].at,
            seen[next + 1].at - seen[next].at,
        );
        assert!(after >= secs(5), "{after:?}");
        if before < secs(5) {
            passed += 1;
        }
    }
    assert!(passed >= 5, "the gate was rarely shut: {passed}");
}

/// Laws 2, 6 and 7: with 10,000 callers a second.
#[tokio::test(start_paused = true)]
async fn a_cold_start_into_a_short_outage_recovers_soon_and_costs_little() {
    let mut sum = Duration::ZERO;
    for run in 0..20 {
        seed(run);
        let server = AuthServer::new();
        server.set_latency(millis(20));
        server.set(down());
        let cache = TokenCache::new(server.clone());
        let crowd = Crowd::new(&cache);
        crowd.storm(100, millis(10), secs(2)).await;
        server.set(Answer::Grant(secs(300)));
        let recovered = Instant::now();
        while crowd.tally().served == 0 {
            // The gate after a fourth failure, which happens on a machine that stalls: gates follow the wall clock too.
            assert!(recovered.elapsed() <= millis(4_050));
            crowd.storm(100, millis(10), millis(10)).await;
        }
        settle().await;

        let tally = crowd.tally();
        assert!(server.requests() <= 8, "{:?}", server.seen());
        assert!(tally.slowest <= secs(1), "{:?}", tally.slowest);
        assert_eq!(tally.waiting, 0);
        assert!(tally.failed > 0);
        sum += tally.first_served.unwrap() - recovered;
    }
    assert!(sum / 20 <= millis(1_200), "{:?}", sum / 20);
}
