//! When tokens are replaced, for any lifetime that a server names.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    runtime::Handle,
    time::{self, Instant},
};
use tower_bearer::{RefreshPolicy, TokenCache, TokenError, TokenRequest, TokenResponse, source_fn};

use crate::support::{Answer, AuthServer, Crowd, millis, now, secs, seed, settle};

const YEAR: Duration = secs(365 * 24 * 60 * 60);

/// Law 2 for a server that never fails: the most requests that callers may cause within `time`.
///
/// `1 + T/u`, with the least `u` that jitter allows: the first token is due after 0.35 of its lifetime, any
/// other after 0.65, and none within a second.
fn most_requests(lifetime: Duration, time: Duration) -> usize {
    let first = lifetime.mul_f64(0.35).max(secs(1));
    let other = lifetime.mul_f64(0.65).max(secs(1));
    match time.checked_sub(first) {
        None => 1,
        Some(rest) => 2 + rest.div_duration_f64(other).floor() as usize,
    }
}

/// Laws 2, 3 and 4.
#[tokio::test(start_paused = true)]
async fn token_requests_are_as_few_as_lifetimes_allow_and_nobody_waits_needlessly() {
    let named = [
        0,
        1,
        2,
        30,
        59,
        60,
        61,
        224,
        225,
        300,
        3_600,
        86_400,
        u64::from(u32::MAX),
        u64::MAX,
    ];
    for (index, named) in named.map(Some).into_iter().chain([None]).enumerate() {
        seed(index as u64);
        let server = AuthServer::new();
        server.set_latency(millis(20));
        server.set(match named {
            Some(seconds) => Answer::Grant(secs(seconds)),
            None => Answer::GrantUnnamed,
        });
        let lifetime = named.map_or(secs(300), secs).min(YEAR);
        let margin = lifetime.mul_f64(0.1).min(secs(10));
        let every = (lifetime / 3_000).clamp(millis(10), secs(3_600));
        let window = (lifetime * 3).clamp(secs(20), YEAR.mul_f64(1.2));

        let cache = TokenCache::new(server.clone());
        let start = Instant::now();
        while start.elapsed() < window {
            let alive = server.seen().last().is_some_and(|seen| {
                let answered = seen.at + millis(20) < Instant::now();
                answered && Instant::now() < seen.at + lifetime - margin
            });
            let asked = Instant::now();
            let got = match alive {
                true => now(cache.get()),
                false => cache.get().await,
            };
            got.unwrap();
            // One request a second, plus the time that the answer takes.
            assert!(asked.elapsed() <= millis(1_025), "{named:?}");
            time::sleep(every).await;
        }
        settle().await;

        let requests = server.requests();
        let most = most_requests(lifetime, start.elapsed());
        assert!(requests <= most, "{named:?}: {requests} > {most}");
        // Nor fewer: each token is due after at most 0.75 of its lifetime, and then a caller comes.
        let longest = lifetime.mul_f64(0.75).max(secs(1)) + every + millis(25);
        let least = 1 + start.elapsed().div_duration_f64(longest).floor() as usize;
        assert!(requests >= least, "{named:?}: {requests} < {least}");
        assert_eq!(server.most_at_once(), 1);
    }
}

/// Law 2: whatever the traffic.
#[tokio::test(start_paused = true)]
async fn a_token_dead_on_arrival_is_requested_once_a_second_and_served() {
    for lifetime in [Duration::ZERO, millis(500), secs(1)] {
        let server = AuthServer::new();
        server.set_latency(millis(20));
        server.set(Answer::token("same", lifetime));
        let cache = TokenCache::new(server.clone());
        let crowd = Crowd::new(&cache);
        crowd.storm(10, millis(10), secs(60)).await;
        let seen = server.seen();
        assert!((59..=61).contains(&seen.len()), "{}", seen.len());
        for pair in seen.windows(2) {
            assert!(pair[1].at - pair[0].at >= secs(1));
        }
        time::sleep(secs(2)).await;
        let tally = crowd.tally();
        assert_eq!((tally.failed, tally.waiting), (0, 0));
        assert!(tally.slowest <= millis(1_025), "{:?}", tally.slowest);
    }
}

/// Laws 2 and 4: after 195 s to 225 s, the first token after 105 s to 225 s.
#[tokio::test(start_paused = true)]
async fn tokens_are_replaced_in_the_background_in_their_window() {
    let (mut firsts, mut others) = (Vec::new(), Vec::new());
    for run in 0..30 {
        seed(run);
        let server = AuthServer::new();
        server.set_latency(secs(2));
        let cache = TokenCache::new(server.clone());
        let start = Instant::now();
        cache.get().await.unwrap();
        while start.elapsed() < secs(700) {
            now(cache.get()).unwrap();
            time::sleep(millis(500)).await;
        }
        let sent: Vec<_> = server.seen().iter().map(|seen| seen.at).collect();
        let ages: Vec<_> = sent.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(ages.len() >= 3, "{ages:?}");
        firsts.push(ages[0]);
        others.extend_from_slice(&ages[1..]);
    }
    firsts.sort();
    others.sort();
    let tick = millis(510);
    let (earliest, latest) = (firsts[0], firsts[firsts.len() - 1]);
    assert!(earliest >= secs(105) && latest <= secs(225) + tick);
    assert!(latest - earliest >= secs(60), "{firsts:?}");
    let (earliest, latest) = (others[0], others[others.len() - 1]);
    assert!(earliest >= secs(195) && latest <= secs(225) + tick);
    assert!(latest - earliest >= secs(15), "{others:?}");
}

/// Law 4: until its replacement comes, a token is used up to its margin.
#[tokio::test(start_paused = true)]
async fn nobody_waits_for_a_slow_refresh() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let start = Instant::now();
    cache.get().await.unwrap();
    server.set_latency(secs(9));
    while start.elapsed() < secs(234) {
        let got = now(cache.get()).unwrap();
        if server.requests() == 1 {
            assert_eq!(got.expose_secret(), "token-1");
        }
        time::sleep(millis(100)).await;
    }
    assert_eq!(now(cache.get()).unwrap().expose_secret(), "token-2");
}

/// Law 2: the first caller after that waits.
#[tokio::test(start_paused = true)]
async fn an_idle_cache_sends_nothing() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    cache.get().await.unwrap();
    time::sleep(secs(3_600)).await;
    assert!(cache.peek().is_none());
    settle().await;
    assert_eq!(server.requests(), 1);
    assert_eq!(cache.get().await.unwrap().expose_secret(), "token-2");
}

fn warm(server: &AuthServer) -> TokenCache {
    TokenCache::with_policy(server.clone(), RefreshPolicy::new().keep_warm(true))
}

/// Laws 2 and 4.
#[tokio::test(start_paused = true)]
async fn a_warm_cache_refreshes_by_itself_until_its_last_handle_is_dropped() {
    let server = AuthServer::new();
    let cache = warm(&server);
    time::sleep(secs(600)).await;
    assert_eq!(server.requests(), 0, "it starts with its first token");

    let start = Instant::now();
    cache.get().await.unwrap();
    while start.elapsed() < secs(3_600) {
        time::sleep(secs(1)).await;
        assert!(cache.peek().is_some());
    }
    let requests = server.requests();
    let least = 1 + 3_600 / 226;
    assert!((least..=most_requests(secs(300), secs(3_600))).contains(&requests));

    let other = cache.clone();
    drop(cache);
    time::sleep(secs(300)).await;
    assert!(now(other.get()).is_ok());
    assert!(server.requests() > requests);

    drop(other);
    let requests = server.requests();
    time::sleep(secs(3_600)).await;
    assert_eq!(server.requests(), requests);
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
}

/// Laws 2 and 7: the gate holds without callers too.
#[tokio::test(start_paused = true)]
async fn a_warm_cache_outlives_an_outage() {
    let server = AuthServer::new();
    let cache = warm(&server);
    cache.get().await.unwrap();
    let down = TokenError::transient("down");
    server.set(Answer::Fail(down));
    time::sleep(secs(3_600)).await;
    let failed = server.requests() - 1;
    assert!(failed <= 3 * 3 + 7 + 1 + 2 * 3_600 / 10, "{failed}");
    assert!(failed >= 3_300 / 12, "{failed}");
    server.set(Answer::Grant(secs(300)));
    time::sleep(secs(12)).await;
    assert!(cache.peek().is_some());
}

/// Laws 2 and 4: callers and the watch together cause no more requests than either.
#[tokio::test(start_paused = true)]
async fn a_warm_cache_with_callers_refreshes_no_more_often() {
    let server = AuthServer::new();
    server.set_latency(millis(20));
    let cache = warm(&server);
    let start = Instant::now();
    cache.get().await.unwrap();
    while start.elapsed() < secs(1_800) {
        now(cache.get()).unwrap();
        time::sleep(millis(100)).await;
    }
    let requests = server.requests();
    let most = most_requests(secs(300), secs(1_800));
    assert!(requests <= most, "{requests}");
    // There is one watch, whoever started the last flight.
    for _ in 0..3 {
        cache.invalidate(&now(cache.get()).unwrap());
        time::sleep(secs(65)).await;
    }
    assert!(server.requests() >= requests + 3);
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 1);
}

/// It becomes so with its first token.
#[tokio::test(start_paused = true)]
async fn a_cache_without_a_first_token_is_not_warm() {
    let server = AuthServer::new();
    let cache = warm(&server);
    server.set(Answer::Fail(TokenError::terminal("not yet")));
    cache.get().await.unwrap_err();
    time::sleep(secs(3_600)).await;
    assert_eq!(server.requests(), 1);
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
}

/// Keycloak: another key's answer voids all tokens before it.
#[tokio::test(start_paused = true)]
async fn a_warm_cache_replaces_a_void_token_without_a_request() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let source = source_fn(move |fetch| {
        let count = Arc::clone(&count);
        async move {
            let response = TokenResponse::new("token")?.expires_in(secs(3600));
            if fetch.request.scopes().len() > 0 {
                return Ok(response.not_before_policy(7));
            }
            match count.fetch_add(1, Ordering::SeqCst) {
                // An outage of one flight.
                1..=3 => Err(TokenError::transient("away")),
                _ => Ok(response),
            }
        }
    });
    let cache = TokenCache::with_policy(source, RefreshPolicy::new().keep_warm(true));
    cache.get().await.unwrap();
    time::sleep(secs(2)).await;
    cache
        .get_for(&TokenRequest::new().scope("a"))
        .await
        .unwrap();
    assert!(cache.peek().is_none());
    time::sleep(secs(60)).await;
    assert!(cache.peek().is_some(), "asked {asked:?}");
    assert_eq!(asked.load(Ordering::SeqCst), 5);
}
