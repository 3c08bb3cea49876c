//! What callers see when a token request is lost, with its task or its runtime, or has no runtime.

use std::{
    convert::Infallible,
    future::Future,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
        mpsc,
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use http::{Request, Response};
use tokio::{
    runtime::{Builder, Runtime},
    sync::Semaphore,
    time::{self, Instant},
};
use tower::{Layer, ServiceExt, service_fn};
use tower_bearer::{
    BearerAuthLayer, ClientCredentials, CloneBody, Fetch, RefreshPolicy, TokenCache, TokenError,
    TokenResponse, TokenSource, source_fn,
};

use crate::support::{
    Answer, Api, AuthServer, INVALID_TOKEN, PanickingLog, TokenEndpoint, Told, caller,
    current_thread, get, millis, now, paused, poll_once, reply, secs, seed, settle, stand_still,
    timed, unauthorized, until, without_a_hang,
};

fn multi_thread() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

/// Waits for all of `callers` and asserts that they got the same interruption.
async fn assert_share_an_interruption(
    callers: Vec<tokio::task::JoinHandle<Result<tower_bearer::AccessToken, TokenError>>>,
) {
    let mut texts = Vec::new();
    for caller in callers {
        let error = time::timeout(secs(1), caller).await.expect("it hangs");
        let error = error.unwrap().unwrap_err();
        assert!(error.is_interrupted() && error.is_transient(), "{error:?}");
        texts.push(format!("{error:?} {error}"));
    }
    texts.dedup();
    assert_eq!(texts, [&*texts[0]]);
}

/// Laws 6 and 7.
#[tokio::test(start_paused = true)]
async fn a_panic_in_the_sources_future_is_shared_and_the_next_flight_succeeds() {
    let server = AuthServer::new();
    server.set(Answer::Panic);
    server.hold();
    let cache = TokenCache::new(server.clone());
    let callers: Vec<_> = (0..5).map(|_| caller(&cache)).collect();
    settle().await;
    server.release();
    assert_share_an_interruption(callers).await;
    assert_eq!(server.requests(), 1);

    // The gate is still shut.
    server.set(Answer::Grant(secs(300)));
    assert!(now(cache.get()).unwrap_err().is_interrupted());
    time::sleep(millis(560)).await;
    assert_eq!(cache.get().await.unwrap().expose_secret(), "token-2");
}

/// Laws 6 and 7: `fetch` is foreign code even before it returns its future.
#[tokio::test(start_paused = true)]
async fn a_panic_in_fetch_itself_is_shared_and_the_next_flight_succeeds() {
    let broken = Arc::new(AtomicBool::new(true));
    let source = source_fn({
        let broken = Arc::clone(&broken);
        move |_| {
            assert!(!broken.load(Ordering::SeqCst), "the source panics");
            std::future::ready(TokenResponse::new("mended"))
        }
    });
    let cache = TokenCache::new(source);
    let callers = (0..5).map(|_| caller(&cache)).collect();
    assert_share_an_interruption(callers).await;

    broken.store(false, Ordering::SeqCst);
    time::sleep(millis(560)).await;
    assert_eq!(cache.get().await.unwrap().expose_secret(), "mended");
}

/// Law 7: it panics at each event, even the one that reports its panic, and ends neither process nor cache.
#[tokio::test(start_paused = true)]
async fn a_log_that_panics_only_loses_a_flight() {
    let (panics, _guard) = PanickingLog::collect(&[Told::Event]);
    panics.store(true, Ordering::SeqCst);
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let waiting = caller(&cache);
    settle().await;
    // Its wait is logged too.
    assert!(waiting.await.unwrap_err().is_panic());
    assert_eq!(server.requests(), 0);

    panics.store(false, Ordering::SeqCst);
    time::sleep(millis(560)).await;
    assert_eq!(cache.get().await.unwrap().expose_secret(), "token-1");
}

/// Laws 3 and 7: nor does it end the refreshes that follow.
#[tokio::test(start_paused = true)]
async fn a_panic_during_a_refresh_leaves_the_token_in_use() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    cache.get().await.unwrap();
    server.set(Answer::Panic);
    time::sleep(secs(226)).await;
    assert_eq!(now(cache.get()).unwrap().expose_secret(), "token-1");
    settle().await;
    assert_eq!(server.requests(), 2);
    server.set(Answer::Grant(secs(300)));
    time::sleep(millis(560)).await;
    assert_eq!(now(cache.get()).unwrap().expose_secret(), "token-1");
    settle().await;
    assert_eq!(now(cache.get()).unwrap().expose_secret(), "token-3");
}

/// Laws 1 and 6: callers on another runtime start the next flight.
#[test]
fn callers_are_served_when_the_flights_runtime_is_dropped() {
    let server = AuthServer::new();
    server.hold();
    let cache = TokenCache::new(server.clone());
    let first = multi_thread();
    first.block_on(async {
        caller(&cache);
        until(|| server.in_flight() == 1).await;
    });
    current_thread().block_on(async {
        let callers: Vec<_> = (0..5).map(|_| caller(&cache)).collect();
        settle().await;
        assert_eq!(server.requests(), 1);

        first.shutdown_background();
        // The next flight waits for the gate, at least a quarter of a second.
        until(|| server.in_flight() == 0).await;
        server.release();
        for caller in callers {
            let token = time::timeout(secs(5), caller).await.expect("it is served");
            assert_eq!(token.unwrap().unwrap().expose_secret(), "token-2");
        }
    });
    assert_eq!(server.requests(), 2);
    assert_eq!(server.most_at_once(), 1);
}

/// Laws 1 and 6: a runtime that nobody drives stops the flight and its timers, but no others; driven again,
/// its flight does no harm.
#[test]
fn callers_are_served_when_the_flights_runtime_is_parked_and_its_late_result_is_ignored() {
    for late in [
        Answer::Grant(secs(300)),
        Answer::Fail(TokenError::transient("late")),
    ] {
        let server = AuthServer::new();
        server.hold();
        let policy = RefreshPolicy::new().flight_timeout(millis(200));
        let cache = TokenCache::with_policy(server.clone(), policy);
        let parked = current_thread();
        let stuck = {
            let _context = parked.enter();
            caller(&cache)
        };
        parked.block_on(until(|| server.in_flight() == 1));
        server.release();

        let driven = current_thread();
        driven.block_on(async {
            let asked = Instant::now();
            let token = time::timeout(secs(5), cache.get()).await;
            let token = token.expect("it is served").unwrap();
            assert_eq!(token.expose_secret(), "token-2");
            assert!(asked.elapsed() >= millis(200), "{:?}", asked.elapsed());
        });

        server.set(late);
        let stuck = parked.block_on(async {
            let stuck = time::timeout(secs(5), stuck).await;
            time::sleep(millis(500)).await;
            stuck
        });
        // Its caller finds the newer token.
        let stuck = stuck.expect("it is served").unwrap().unwrap();
        assert_eq!(stuck.expose_secret(), "token-2");
        assert_eq!(now(cache.get()).unwrap().expose_secret(), "token-2");
        assert_eq!(server.requests(), 2);
    }
}

/// Law 6: the first runtime's clock no longer ticks.
#[test]
fn a_callers_deadline_holds_when_it_moves_to_another_runtime() {
    for dropped in [true, false] {
        let server = AuthServer::new();
        server.hold();
        let policy = RefreshPolicy::new().flight_timeout(millis(200));
        let cache = TokenCache::with_policy(server.clone(), policy);
        let parked = current_thread();
        parked.block_on(async {
            caller(&cache);
            until(|| server.in_flight() == 1).await;
        });
        let mut moves = Box::pin(async move { cache.get().await });
        let first = current_thread();
        first.block_on(async { assert!(poll_once(moves.as_mut()).is_pending()) });
        let first = (!dropped).then_some(first);
        server.release();
        let token = current_thread().block_on(async { time::timeout(secs(5), moves).await });
        let token = token.expect("it is served").unwrap();
        assert_eq!(token.expose_secret(), "token-2");
        drop(first);
    }
}

/// Laws 6 and 7: a program that blocks on one request after another drives no token request in between; nor does
/// a frozen process. The token request times out, or the server gives up.
#[test]
fn no_request_fails_on_a_runtime_that_stands_still_between_requests() {
    let never = secs(3_600);
    for (pause, patience) in [
        (5, never),
        (15, never),
        (30, never),
        (3, secs(8)),
        (11, secs(8)),
    ] {
        seed(pause);
        let runtime = paused();
        // It takes longer than a request to the API, and waits at each of its steps.
        let source = source_fn(move |_| async move {
            let began = Instant::now();
            for _ in 0..3 {
                time::sleep(millis(30)).await;
                if began.elapsed() > patience {
                    return Err(TokenError::transient("the connection was closed"));
                }
            }
            Ok(TokenResponse::new("token")?.expires_in(secs(300)))
        });
        let api = service_fn(|_: Request<String>| async {
            time::sleep(millis(20)).await;
            Ok::<_, Infallible>(Response::new(()))
        });
        let client = BearerAuthLayer::new(source).layer(api);
        for _ in 0..(3_600 / pause) {
            let (answer, took) = runtime.block_on(async {
                stand_still(secs(pause));
                timed(client.clone().oneshot(get())).await
            });
            assert!(answer.is_ok(), "every {pause} s: {answer:?}");
            assert!(took < secs(2), "every {pause} s: {took:?}");
        }
    }
}

/// Has a caller wait while its runtime stands still for so long within each attempt, of which the policy allows
/// two; returns its error and how many attempts were made.
async fn stopped_within_each_attempt(
    stop: Duration,
    answer: impl Fn() -> TokenError + Send + Sync + 'static,
) -> (TokenError, u32) {
    let asked = Arc::new(AtomicU32::new(0));
    let source = source_fn({
        let (asked, answer) = (Arc::clone(&asked), Arc::new(answer));
        move |_| {
            let (asked, answer) = (Arc::clone(&asked), Arc::clone(&answer));
            async move {
                asked.fetch_add(1, Ordering::SeqCst);
                time::sleep(millis(30)).await;
                Err(answer())
            }
        }
    });
    let policy = RefreshPolicy::new().attempts(2);
    let waiting = caller(&TokenCache::with_policy(source, policy));
    for attempt in 1..=4 {
        while asked.load(Ordering::SeqCst) < attempt && !waiting.is_finished() {
            time::sleep(millis(1)).await;
        }
        stand_still(stop);
    }
    let error = waiting.await.unwrap().unwrap_err();
    (error, asked.load(Ordering::SeqCst))
}

/// Silence is none.
#[tokio::test(start_paused = true)]
async fn an_answer_counts_though_the_runtime_stood_still() {
    let malformed = || TokenResponse::new("no header\n").unwrap_err();
    let (error, attempts) = stopped_within_each_attempt(secs(5), malformed).await;
    assert!(error.is_malformed_response(), "{error:?}");
    assert_eq!(attempts, 2);

    let busy = || TokenError::transient("busy").with_oauth_error("temporarily_unavailable");
    let (error, attempts) = stopped_within_each_attempt(secs(5), busy).await;
    assert_eq!(error.oauth_error(), Some("temporarily_unavailable"));
    assert_eq!(attempts, 2);

    let told = || TokenError::transient("busy").with_retry_after(secs(60));
    let (error, attempts) = stopped_within_each_attempt(secs(5), told).await;
    assert_eq!(error.retry_after(), Some(secs(60)));
    assert_eq!(attempts, 1);

    let down = TokenEndpoint::new(|_| async { reply(503, "") });
    let source = ClientCredentials::builder("https://localhost/token", "id").build_with(down);
    let down = source.unwrap().fetch(Fetch::new()).await.unwrap_err();
    let down = move || down.clone();
    let (error, attempts) = stopped_within_each_attempt(secs(5), down).await;
    assert!(error.is_unavailable(), "{error:?}");
    assert_eq!(attempts, 2);

    let terminal = || TokenError::terminal("no");
    let (error, attempts) = stopped_within_each_attempt(secs(5), terminal).await;
    assert!(!error.is_transient(), "{error:?}");
    assert_eq!(attempts, 1);

    let closed = || TokenError::transient("the connection was closed");
    // Its caller waits for a second token request.
    let (error, attempts) = stopped_within_each_attempt(secs(5), closed).await;
    assert!(error.is_interrupted(), "{error:?}");
    assert_eq!(attempts, 4);

    // A runtime that is busy for a while is not standing still.
    let (error, attempts) = stopped_within_each_attempt(millis(600), closed).await;
    assert!(!error.is_interrupted(), "{error:?}");
    assert_eq!(attempts, 2);

    // A panic is the source's own.
    let panics = || panic!("the source panics");
    let (error, attempts) = stopped_within_each_attempt(secs(5), panics).await;
    assert!(error.is_interrupted(), "{error:?}");
    assert_eq!(attempts, 1);
}

/// A source that blocks its thread stops only itself, and a stop does not explain the failure of an attempt that it
/// did not fall into.
#[tokio::test(start_paused = true)]
async fn a_runtime_is_not_blamed_for_other_failures() {
    // Each attempt blocks; the first one is stopped; the pause after it is, until time is up.
    for (blocks, takes, stop, attempts) in [(2, 0, 0, 2), (0, 30, 5, 2), (0, 0, 30, 1)] {
        seed(1);
        let asked = Arc::new(AtomicU32::new(0));
        let source = source_fn({
            let asked = Arc::clone(&asked);
            move |_| {
                let attempt = asked.fetch_add(1, Ordering::SeqCst) + 1;
                async move {
                    stand_still(secs(blocks));
                    if takes > 0 && attempt == 1 {
                        time::sleep(millis(takes)).await;
                    }
                    Err(TokenError::transient("down"))
                }
            }
        });
        let policy = RefreshPolicy::new().attempts(2);
        let waiting = caller(&TokenCache::with_policy(source, policy));
        settle().await;
        stand_still(secs(stop));
        let error = waiting.await.unwrap().unwrap_err();
        assert!(!error.is_interrupted() && !error.is_timeout(), "{error:?}");
        assert_eq!(asked.load(Ordering::SeqCst), attempts);
    }
}

/// Law 6: a refused request waits only for the token request that it joined, though the token has died by then and
/// the next token request would bring another.
#[tokio::test(start_paused = true)]
async fn a_refusal_is_the_answer_if_the_token_request_for_it_is_lost() {
    let server = AuthServer::new();
    server.set(Answer::Grant(secs(20)));
    let refusal = || unauthorized(INVALID_TOKEN);
    let client = BearerAuthLayer::new(server.clone())
        .replay(CloneBody)
        .layer(Api::refusing("token-1", refusal));
    client.cache().get().await.unwrap();
    server.hold();
    let refused = tokio::spawn(client.oneshot(get()));
    settle().await;
    assert_eq!(server.in_flight(), 1);
    stand_still(secs(60));
    server.release();
    let (answer, took) = timed(refused).await;
    assert_eq!(answer.unwrap().unwrap().status(), 401);
    assert_eq!(took, secs(0));
    assert_eq!(server.requests(), 2);
}

/// Laws 6 and 7: before it starts, or while it waits for its turn.
#[tokio::test(start_paused = true)]
async fn no_request_fails_if_the_runtime_stands_still_before_a_token_request() {
    for waits in [false, true] {
        let server = AuthServer::new();
        let cache = TokenCache::new(server.clone());
        if waits {
            // It dies at once, and no other is requested within a second.
            server.set(Answer::Grant(secs(0)));
            cache.get().await.unwrap();
            server.set(Answer::Grant(secs(300)));
        }
        let mut waiting = pin!(cache.get());
        assert!(poll_once(waiting.as_mut()).is_pending());
        if waits {
            settle().await;
        }
        // The flight's task runs first then.
        stand_still(secs(60));
        settle().await;
        assert!(waiting.await.is_ok(), "waits: {waits}");
        assert_eq!(server.requests(), 1 + usize::from(waits));
    }
}

/// Law 7: calls that are shorter than the pause after a failure, with the process frozen in between, still reach the
/// server when it is well; and law 2, not before.
#[test]
fn a_frozen_function_gets_a_token_after_an_outage_that_outlasted_its_calls() {
    let runtime = paused();
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let call = || {
        let got = runtime.block_on(async { time::timeout(secs(1), cache.get()).await });
        runtime.block_on(async { stand_still(secs(60)) });
        got.is_ok_and(|got| got.is_ok())
    };
    server.hold();
    for requests in 1..=2 {
        assert!(!call());
        assert_eq!(server.requests(), requests);
    }
    // The second one was sent after its pause, and its loss calls for another one.
    runtime.block_on(async {
        let waiting = caller(&cache);
        settle().await;
        waiting.abort();
    });
    assert_eq!(server.requests(), 2);
    // After these the pauses are longer than a call.
    for _ in 0..20 {
        assert!(!call());
    }
    server.release();
    assert!((0..3).any(|_| call()));
}

/// The network of a machine that has just woken up may need a moment.
#[tokio::test(start_paused = true)]
async fn a_hiccup_after_a_lost_token_request_fails_no_caller() {
    let grant = |text: &str| TokenResponse::new(text).map(|token| token.expires_in(secs(300)));
    let hiccup = Err(TokenError::transient("no route to host"));
    let server = AuthServer::scripted([grant("token-1"), hiccup, grant("token-2")]);
    let cache = TokenCache::new(server.clone());
    cache.get().await.unwrap();
    time::sleep(secs(226)).await;
    now(cache.get()).unwrap();
    // The refresh is lost, and the token dies.
    stand_still(secs(3_600));
    assert_eq!(cache.get().await.unwrap().expose_secret(), "token-2");
    let attempts: Vec<_> = server.seen().iter().map(|seen| seen.attempt).collect();
    assert_eq!(attempts, [1, 1, 2]);
}

/// Law 2 and the guide: in an outage requests learn at once that there is no token.
#[tokio::test(start_paused = true)]
async fn a_runtime_that_stands_still_at_times_hides_no_outage() {
    let server = AuthServer::new();
    server.hold();
    let cache = TokenCache::new(server.clone());
    let waiting = caller(&cache);
    for _ in 0..5 {
        time::sleep(secs(5)).await;
        stand_still(secs(2));
    }
    assert!(waiting.await.unwrap().unwrap_err().is_timeout());
    assert_eq!(server.requests(), 3);
    // Only the caller that starts the next flight waits for it.
    caller(&cache);
    until(|| server.in_flight() == 1).await;
    assert!(now(cache.get()).unwrap_err().is_timeout());
}

/// Starts a flight on `parked` and parks it once `begun` is one, serves a caller on another runtime, opens the
/// gate that holds the flight, and drives it again.
fn park_and_drive_again(parked: &Runtime, cache: &TokenCache, begun: &AtomicU32, gate: &Semaphore) {
    let stuck = {
        let _context = parked.enter();
        caller(cache)
    };
    parked.block_on(until(|| begun.load(Ordering::SeqCst) == 1));

    current_thread()
        .block_on(async { time::timeout(secs(5), cache.get()).await })
        .expect("it is served")
        .unwrap();
    gate.add_permits(1);
    let stuck = parked.block_on(async { time::timeout(secs(5), stuck).await });
    assert!(stuck.expect("it is served").unwrap().is_ok());
}

/// Law 1: an attempt is fenced at each of its steps, not only between attempts.
#[test]
fn an_abandoned_attempt_that_is_driven_again_sends_nothing_more() {
    let (begun, sent) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let gate = Arc::new(Semaphore::new(0));
    let source = source_fn({
        let (begun, sent, gate) = (begun.clone(), sent.clone(), gate.clone());
        move |_| {
            let (begun, sent, gate) = (begun.clone(), sent.clone(), gate.clone());
            async move {
                // The first attempt stops where a connection would be made.
                if begun.fetch_add(1, Ordering::SeqCst) == 0 {
                    gate.acquire().await.unwrap().forget();
                }
                sent.fetch_add(1, Ordering::SeqCst);
                TokenResponse::new("token")
            }
        }
    });
    let policy = RefreshPolicy::new().flight_timeout(millis(200));
    let cache = TokenCache::with_policy(source, policy);
    let parked = current_thread();
    park_and_drive_again(&parked, &cache, &begun, &gate);
    assert_eq!(sent.load(Ordering::SeqCst), 1);
}

/// Law 1: the next request of the refresh ladder.
#[test]
fn an_abandoned_refresh_does_not_go_on_to_client_credentials() {
    let (refreshes, grants) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let gate = Arc::new(Semaphore::new(0));
    let endpoint = TokenEndpoint::new({
        let (refreshes, grants, gate) = (refreshes.clone(), grants.clone(), gate.clone());
        move |request| {
            let (refreshes, grants, gate) = (refreshes.clone(), grants.clone(), gate.clone());
            async move {
                if request.body().starts_with("grant_type=refresh_token") {
                    refreshes.fetch_add(1, Ordering::SeqCst);
                    gate.acquire().await.unwrap().forget();
                    return reply(200, "{}");
                }
                let number = grants.fetch_add(1, Ordering::SeqCst);
                // The first token is dead on arrival, and the next is requested a second later.
                let lifetime = if number == 0 { 0 } else { 300 };
                reply(
                    200,
                    format!(
                        r#"{{"access_token":"t{number}","token_type":"Bearer","expires_in":{lifetime},
                            "refresh_token":"r{number}"}}"#
                    ),
                )
            }
        }
    });
    let source = ClientCredentials::builder("https://localhost/token", "id").build_with(endpoint);
    let policy = RefreshPolicy::new().flight_timeout(millis(300));
    let cache = TokenCache::with_policy(source.unwrap(), policy);
    let parked = current_thread();
    parked.block_on(cache.get()).unwrap();
    park_and_drive_again(&parked, &cache, &refreshes, &gate);
    assert_eq!(grants.load(Ordering::SeqCst), 2);
}

/// Law 3: the last resort also serves callers that cannot wait.
#[tokio::test(start_paused = true)]
async fn outside_a_runtime_a_refused_token_is_served_during_its_replacement() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let token = cache.get().await.unwrap();
    server.hold();
    cache.invalidate(&token);
    settle().await;
    let elsewhere = std::thread::spawn(move || now(cache.get()));
    let token = elsewhere.join().unwrap().unwrap();
    assert_eq!(token.expose_secret(), "token-1");
}

/// Law 7.
#[tokio::test(start_paused = true)]
async fn a_cache_stays_warm_after_a_panic_of_the_source() {
    let server = AuthServer::new();
    let policy = RefreshPolicy::new().keep_warm(true);
    let cache = TokenCache::with_policy(server.clone(), policy);
    cache.get().await.unwrap();
    server.set(Answer::Panic);
    time::sleep(secs(230)).await;
    assert!(server.requests() >= 2);
    server.set(Answer::Grant(secs(300)));
    time::sleep(secs(3_600)).await;
    assert!(cache.peek().is_some());
}

/// Law 7.
#[tokio::test(start_paused = true)]
async fn a_cache_stays_warm_after_a_panic_of_the_log() {
    for at in [&[Told::Event], &[Told::NewSpan]] {
        let (panics, _guard) = PanickingLog::collect(at);
        let server = AuthServer::new();
        let cache = TokenCache::with_policy(server, RefreshPolicy::new().keep_warm(true));
        cache.get().await.unwrap();
        panics.store(true, Ordering::SeqCst);
        time::sleep(secs(250)).await;
        panics.store(false, Ordering::SeqCst);
        time::sleep(secs(3_600)).await;
        assert!(cache.peek().is_some(), "{at:?}");
    }
}

/// Panics on drop while told to.
#[derive(Debug, thiserror::Error)]
#[error("it panics on drop")]
struct Fragile(Arc<AtomicBool>);

impl Drop for Fragile {
    fn drop(&mut self) {
        let panics = self.0.load(Ordering::SeqCst) && !std::thread::panicking();
        assert!(!panics, "it is dropped");
    }
}

/// Law 7: what a source returns is foreign code until dropped.
#[tokio::test(start_paused = true)]
async fn a_cache_stays_warm_after_a_panic_on_drop() {
    for hangs in [false, true] {
        let panics = Arc::new(AtomicBool::new(false));
        let source = source_fn({
            let panics = Arc::clone(&panics);
            move |_| {
                let fragile = Fragile(Arc::clone(&panics));
                async move {
                    match fragile.0.load(Ordering::SeqCst) {
                        false => Ok(TokenResponse::new("token")?.expires_in(secs(300))),
                        true if hangs => std::future::pending().await,
                        true => Err(TokenError::terminal(fragile)),
                    }
                }
            }
        });
        let cache = TokenCache::with_policy(source, RefreshPolicy::new().keep_warm(true));
        cache.get().await.unwrap();
        panics.store(true, Ordering::SeqCst);
        time::sleep(secs(260)).await;
        panics.store(false, Ordering::SeqCst);
        time::sleep(secs(3_600)).await;
        assert!(cache.peek().is_some(), "hangs: {hangs}");
    }
}

/// Law 6.
#[tokio::test(start_paused = true)]
async fn a_hanging_source_is_given_up_at_the_flights_deadline() {
    let server = AuthServer::new();
    server.set(Answer::Hang);
    let cache = TokenCache::new(server.clone());
    let start = Instant::now();
    let mut callers = Vec::new();
    for _ in 0..29 {
        callers.push(caller(&cache));
        time::sleep(secs(1)).await;
    }
    for caller in callers {
        let error = caller.await.unwrap().unwrap_err();
        assert!(error.is_timeout() && error.is_transient(), "{error:?}");
        assert!(start.elapsed() >= secs(30) && start.elapsed() <= millis(30_010));
    }
    assert_eq!(server.requests(), 3);
    let sent = server.seen();
    for (pair, pause) in sent.windows(2).zip([200, 400]) {
        let gap = pair[1].at - pair[0].at;
        assert!(gap >= secs(10) && gap <= millis(10_005 + pause), "{gap:?}");
    }
    assert_eq!(server.in_flight(), 0);
}

/// Law 6: an error, not a panic, and no lasting harm.
#[test]
fn outside_a_runtime_a_get_is_an_error_unless_there_is_a_token() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let error = now(cache.get()).unwrap_err();
    assert!(error.is_no_runtime() && !error.is_transient(), "{error:?}");
    assert!(cache.peek().is_none());
    assert_eq!(server.requests(), 0);

    // The error is not remembered.
    let runtime = current_thread();
    runtime.block_on(cache.get()).unwrap();
    drop(runtime);
    assert_eq!(cache.peek().unwrap().expose_secret(), "token-1");
    assert_eq!(now(cache.get()).unwrap().expose_secret(), "token-1");
    assert_eq!(server.requests(), 1);
}

/// The crate's documentation promises it for other executors, but not on a runtime that nobody drives.
#[test]
fn any_executor_is_served_in_the_context_of_a_driven_runtime() {
    struct Unparks(std::thread::Thread);

    impl Wake for Unparks {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    let get_within = |runtime: Runtime, limit: Duration| {
        without_a_hang(move || {
            let _context = runtime.enter();
            let cache = TokenCache::new(AuthServer::new());
            let waker = Waker::from(Arc::new(Unparks(std::thread::current())));
            let mut token = pin!(cache.get());
            let until = std::time::Instant::now() + limit;
            while std::time::Instant::now() < until {
                match token.as_mut().poll(&mut Context::from_waker(&waker)) {
                    Poll::Ready(token) => return Some(token.unwrap()),
                    Poll::Pending => std::thread::park_timeout(limit),
                }
            }
            None
        })
    };
    let token = get_within(multi_thread(), secs(5)).expect("it is driven");
    assert_eq!(token.expose_secret(), "token-1");
    assert!(get_within(current_thread(), millis(100)).is_none());
}

/// Law 6: not even one that others started.
#[test]
fn outside_a_runtime_a_flight_cannot_be_joined() {
    let server = AuthServer::new();
    server.hold();
    let cache = TokenCache::new(server.clone());
    let runtime = current_thread();
    let first = {
        let _context = runtime.enter();
        caller(&cache)
    };
    runtime.block_on(settle());
    assert!(now(cache.get()).unwrap_err().is_no_runtime());
    server.release();
    let token = runtime.block_on(first).unwrap().unwrap();
    assert_eq!(token.expose_secret(), "token-1");
}

/// Laws 6 and 7: spawning drops the task, and the next runtime works.
#[test]
fn on_a_runtime_that_was_shut_down_a_get_is_an_error() {
    for runtime in [current_thread, multi_thread] {
        let server = AuthServer::new();
        let cache = TokenCache::new(server.clone());
        let result = without_a_hang({
            let cache = cache.clone();
            move || {
                let handle = runtime().handle().clone();
                let _context = handle.enter();
                poll_once(pin!(cache.get()))
            }
        });
        let Poll::Ready(Err(error)) = result else {
            panic!("{result:?}");
        };
        assert!(error.is_interrupted(), "{error:?}");
        assert_eq!(server.requests(), 0);

        let token = without_a_hang(move || current_thread().block_on(cache.get()));
        assert_eq!(token.unwrap().expose_secret(), "token-1");
    }
}

/// Asks for a token on drop, and reports the result.
struct LastWords {
    cache: TokenCache,
    report: mpsc::Sender<Result<(), TokenError>>,
}

impl Drop for LastWords {
    fn drop(&mut self) {
        if let Some(token) = self.cache.peek() {
            self.cache.invalidate(&token);
        }
        let result = poll_once(pin!(self.cache.get()));
        if let Poll::Ready(result) = result {
            self.report.send(result.map(drop)).unwrap();
        }
    }
}

/// Laws 6 and 7: a task's destructor asks for the token.
#[test]
fn while_a_runtime_shuts_down_a_get_is_an_error() {
    for runtime in [current_thread, multi_thread] {
        let server = AuthServer::new();
        let cache = TokenCache::new(server.clone());
        let (report, reports) = mpsc::channel();
        without_a_hang({
            let last_words = LastWords {
                cache: cache.clone(),
                report,
            };
            move || {
                let runtime = runtime();
                runtime.block_on(async {
                    tokio::spawn(async move {
                        let _last_words = last_words;
                        std::future::pending::<()>().await;
                    });
                    settle().await;
                });
                drop(runtime);
            }
        });
        let error = reports.recv_timeout(secs(5)).unwrap().unwrap_err();
        assert!(error.is_interrupted(), "{error:?}");
        assert_eq!(server.requests(), 0);

        let token = without_a_hang(move || current_thread().block_on(cache.get()));
        assert_eq!(token.unwrap().expose_secret(), "token-1");
    }
}

/// Laws 3, 6 and 7: the same with a token that is refused during the shutdown.
#[test]
fn while_a_runtime_shuts_down_a_refused_token_stays_in_use() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let (report, reports) = mpsc::channel();
    without_a_hang({
        let cache = cache.clone();
        move || {
            let runtime = current_thread();
            runtime.block_on(async {
                cache.get().await.unwrap();
                tokio::spawn(async move {
                    let _last_words = LastWords { cache, report };
                    std::future::pending::<()>().await;
                });
                settle().await;
            });
            drop(runtime);
        }
    });
    assert!(reports.recv_timeout(secs(5)).unwrap().is_ok());
    assert_eq!(now(cache.get()).unwrap().expose_secret(), "token-1");
    assert_eq!(server.requests(), 1);
}

/// A source whose future uses the cache on drop.
struct Touchy {
    server: AuthServer,
    cache: std::sync::OnceLock<TokenCache>,
}

struct Touch<'a>(&'a Touchy);

impl Drop for Touch<'_> {
    fn drop(&mut self) {
        if let Some(cache) = self.0.cache.get() {
            cache.peek();
            drop(poll_once(pin!(cache.get())));
        }
    }
}

impl TokenSource for Touchy {
    async fn fetch(&self, fetch: Fetch) -> Result<TokenResponse, TokenError> {
        let _touch = Touch(self);
        self.server.fetch(fetch).await
    }
}

/// Law 6: no lock is held where foreign code runs.
#[test]
fn a_source_that_asks_its_own_cache_on_drop_does_not_deadlock() {
    let source = Arc::new(Touchy {
        server: AuthServer::new(),
        cache: std::sync::OnceLock::new(),
    });
    let server = source.server.clone();
    server.hold();
    let cache = TokenCache::new(Arc::clone(&source));
    assert!(source.cache.set(cache.clone()).is_ok());
    without_a_hang(move || {
        let runtime = current_thread();
        runtime.block_on(async {
            caller(&cache);
            until(|| server.in_flight() == 1).await;
        });
        drop(runtime);
    });
}

/// When the cache is built, so that its panic harms no flight.
#[tokio::test(start_paused = true)]
async fn a_source_is_asked_for_its_grant_once() {
    #[derive(Default)]
    struct Touchy {
        fetched: AtomicU32,
        asked: AtomicU32,
    }

    impl TokenSource for Touchy {
        async fn fetch(&self, _: Fetch) -> Result<TokenResponse, TokenError> {
            match self.fetched.fetch_add(1, Ordering::SeqCst) {
                0 => Err(TokenError::terminal("refused")),
                _ => TokenResponse::new("token"),
            }
        }

        fn grant(&self) -> &'static str {
            assert_eq!(self.asked.fetch_add(1, Ordering::SeqCst), 0);
            "touchy"
        }
    }

    let source = Arc::new(Touchy::default());
    let cache = TokenCache::new(Arc::clone(&source));
    assert!(cache.get().await.is_err());
    time::sleep(secs(10)).await;
    assert_eq!(cache.get().await.unwrap().expose_secret(), "token");
    cache.shutdown();
    assert_eq!(source.asked.load(Ordering::SeqCst), 1);
}
