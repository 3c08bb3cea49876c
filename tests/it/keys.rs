//! Requests with keys, which name what their token is for, on one cache.

use std::time::Duration;

use http::{Request, StatusCode, header::AUTHORIZATION};
use tokio::{
    task::JoinSet,
    time::{self, Instant},
};
use tower::{Layer, Service, ServiceExt};
use tower_bearer::{
    BearerAuthLayer, CloneBody, RefreshPolicy, SharedSource, TokenCache, TokenError, TokenRequest,
    WithoutToken,
};

use crate::support::{
    Answer, Api, AuthServer, INVALID_TOKEN, all, get, millis, now, secs, seed, settle, timed,
    unauthorized,
};

fn for_scope(scope: &str) -> TokenRequest {
    TokenRequest::new().scope(scope)
}

fn request_for(key: &TokenRequest) -> Request<String> {
    let mut request = get();
    request.extensions_mut().insert(key.clone());
    request
}

async fn text(cache: &TokenCache, scope: &str) -> String {
    let token = cache.get_for(&for_scope(scope)).await.unwrap();
    token.expose_secret().to_owned()
}

fn refused() -> TokenError {
    TokenError::terminal("refused")
}

/// Law 1, per key: a thousand requests for ten keys cost ten token requests, each with its own token.
#[tokio::test(start_paused = true)]
async fn each_key_has_one_flight_and_one_token() {
    let server = AuthServer::new();
    server.set_latency(millis(50));
    let api = Api::echoing();
    let layer = BearerAuthLayer::new(server.clone());
    let service = layer.layer(api.clone());
    let start = Instant::now();
    let mut tasks = Vec::new();
    for number in 0..1_000 {
        let scope = format!("scope-{}", number % 10);
        let request = request_for(&for_scope(&scope));
        let service = service.clone();
        tasks.push(tokio::spawn(async move {
            let answer = service.oneshot(request).await.unwrap();
            assert_eq!(*answer.body(), format!("token-{scope}-1"));
        }));
    }
    all(tasks).await;
    assert_eq!(server.requests(), 10);
    // At once, not one after the other.
    assert!(start.elapsed() < millis(100), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn equal_keys_share_one_token() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    assert_eq!(text(&cache, "b a").await, "token-a+b-1");
    assert_eq!(text(&cache, "a b a").await, "token-a+b-1");
    // What may change the token makes another key.
    cache
        .get_for(&for_scope("a b").param("audience", "x"))
        .await
        .unwrap();
    cache
        .get_for(&for_scope("a b").resource("https://x.example"))
        .await
        .unwrap();
    assert_eq!(server.requests(), 3);
    // An empty request is no key.
    cache.get().await.unwrap();
    cache.get_for(&TokenRequest::new()).await.unwrap();
    assert_eq!(server.requests(), 4);
    assert!(cache.peek().is_some());
    assert!(cache.peek_for(&for_scope("a b")).is_some());
    assert!(cache.peek_for(&for_scope("c")).is_none());
    assert_eq!(server.requests(), 4);
}

#[tokio::test(start_paused = true)]
async fn each_key_has_its_own_refresh_token() {
    let server = AuthServer::new();
    server.set_refresh_tokens(true);
    let cache = TokenCache::new(server.clone());
    for scope in ["a", "b"] {
        text(&cache, scope).await;
    }
    time::sleep(secs(291)).await;
    for scope in ["a", "b"] {
        assert_eq!(text(&cache, scope).await, format!("token-{scope}-2"));
    }
    let seen = server.seen().into_iter();
    let sent = seen.filter_map(|seen| Some((seen.scope, seen.refresh_token?)));
    let expected = ["a", "b"].map(|scope| (scope.to_owned(), format!("refresh-{scope}-1")));
    assert_eq!(sent.collect::<Vec<_>>(), expected);
}

/// Not for a moment.
#[tokio::test(start_paused = true)]
async fn a_hanging_or_refused_key_never_delays_another() {
    let hang = Answer::Hang;
    let refusal = Answer::Fail(refused());
    let down = Answer::Fail(TokenError::transient("down"));
    for answer in [hang, refusal, down] {
        let server = AuthServer::new();
        let cache = TokenCache::new(server.clone());
        for bad in ["bad-1", "bad-2", "bad-3"] {
            server.set_for(bad, answer.clone());
        }
        for round in 0..100 {
            for bad in ["bad-1", "bad-2", "bad-3"] {
                let cache = cache.clone();
                tokio::spawn(async move { cache.get_for(&for_scope(bad)).await.map(drop) });
            }
            let good = format!("good-{round}");
            let (got, took) = timed(text(&cache, &good)).await;
            assert_eq!(got, format!("token-{good}-1"), "{answer:?}");
            assert_eq!(took, Duration::ZERO, "{answer:?}");
            time::sleep(secs(1)).await;
        }
        // Law 2, for each bad key: its requests are bounded whatever the others do.
        assert!(
            (3..=20).contains(&server.requests_for("bad-1")),
            "{answer:?}"
        );
    }
}

/// Law 2, across keys: one key at a time asks an endpoint that is down.
#[tokio::test(start_paused = true)]
async fn an_outage_is_shared_by_all_keys() {
    seed(1);
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let keys: Vec<_> = (0..500).map(|key| format!("key-{key}")).collect();
    server.set(Answer::Fail(TokenError::transient("503")));
    let call_all = async || {
        for key in &keys {
            let (cache, key) = (cache.clone(), for_scope(key));
            tokio::spawn(async move { cache.get_for(&key).await.map(drop) });
        }
        time::sleep(millis(500)).await;
    };
    // Each key finds out for itself, with up to three attempts.
    for _ in 0..4 {
        call_all().await;
    }
    let before = server.requests();
    assert!((500..=1_500 + 20).contains(&before), "{before}");
    // From then on they act as one.
    for _ in 0..120 {
        call_all().await;
    }
    let during = server.requests() - before;
    assert!((3..=30).contains(&during), "{during} in a minute");

    // After the outage one key goes first, and all follow.
    server.set(Answer::Grant(secs(300)));
    let recovery = Instant::now();
    while keys
        .iter()
        .any(|key| cache.peek_for(&for_scope(key)).is_none())
    {
        call_all().await;
        assert!(recovery.elapsed() < secs(25), "law 7");
    }
}

/// The server is busy for all keys: any other would hear the same.
#[tokio::test(start_paused = true)]
async fn a_retry_after_holds_for_every_key() {
    let server = AuthServer::new();
    let busy = TokenError::transient("busy").with_retry_after(secs(60));
    server.set_for("first", Answer::Fail(busy));
    let cache = TokenCache::new(server.clone());
    cache.get_for(&for_scope("first")).await.unwrap_err();
    for scope in ["second", "third"] {
        let error = now(cache.get_for(&for_scope(scope))).unwrap_err();
        assert_eq!(error.retry_after(), Some(secs(60)));
    }
    assert_eq!(server.requests(), 1);
    time::sleep(secs(67)).await;
    assert_eq!(text(&cache, "second").await, "token-second-1");
}

/// Law 2: the attempts that a flight has left are not made.
#[tokio::test(start_paused = true)]
async fn a_retry_after_for_one_key_stops_the_attempts_of_others() {
    let server = AuthServer::new();
    server.set_for("hangs", Answer::Hang);
    server.set_for("fails", Answer::Fail(TokenError::transient("down")));
    let busy = TokenError::transient("busy").with_retry_after(secs(60));
    server.set_for("busy", Answer::Fail(busy));
    let cache = TokenCache::new(server.clone());
    let started = Instant::now();
    let get = |scope: &str| {
        let (cache, request) = (cache.clone(), for_scope(scope));
        tokio::spawn(async move { (cache.get_for(&request).await, Instant::now()) })
    };
    // One waits for its answer, the other for its next attempt.
    seed(1);
    let callers = [get("hangs"), get("fails")];
    time::sleep(millis(1)).await;
    cache.get_for(&for_scope("busy")).await.unwrap_err();
    let [(hung, hung_at), (failed, failed_at)] = all(callers).await.try_into().unwrap();
    assert!(hung.unwrap_err().is_timeout());
    assert!(hung_at - started >= secs(10) && hung_at - started < millis(10_010));
    assert_eq!(failed.unwrap_err().retry_after(), None);
    assert!(failed_at - started < millis(205));
    time::sleep(secs(49)).await;
    for scope in ["hangs", "fails"] {
        let error = now(cache.get_for(&for_scope(scope))).unwrap_err();
        assert_eq!(error.retry_after(), Some(secs(60)));
        assert_eq!(server.requests_for(scope), 1);
    }
}

/// Law 7: that failure shuts the gate, but only to new flights.
#[tokio::test(start_paused = true)]
async fn a_flight_makes_its_further_attempts_though_another_key_failed() {
    let server = AuthServer::new();
    server.set_for("fails", Answer::Fail(TokenError::transient("down")));
    let busy = TokenError::transient("busy").with_retry_after(Duration::ZERO);
    server.set_for("busy", Answer::Fail(busy));
    let cache = TokenCache::new(server.clone());
    let failing = tokio::spawn({
        let cache = cache.clone();
        async move { cache.get_for(&for_scope("fails")).await }
    });
    seed(1);
    settle().await;
    cache.get_for(&for_scope("busy")).await.unwrap_err();
    assert!(now(cache.get_for(&for_scope("third"))).is_err());
    server.set_for("fails", Answer::Grant(secs(300)));
    assert_eq!(
        failing.await.unwrap().unwrap().expose_secret(),
        "token-fails-2"
    );
}

/// Law 8, per key: it replaces the token that was sent, and no other key's.
#[tokio::test(start_paused = true)]
async fn a_401_is_about_the_token_of_its_key() {
    let server = AuthServer::new();
    let api = Api::refusing("token-a-1", || unauthorized(INVALID_TOKEN));
    let layer = BearerAuthLayer::new(server.clone()).replay(CloneBody);
    let service = layer.layer(api.clone());
    let send = |scope: &str| service.clone().oneshot(request_for(&for_scope(scope)));
    // The token without a key is no use to requests with one.
    service.clone().oneshot(get()).await.unwrap();
    assert_eq!(send("b").await.unwrap().body(), "token-b-1");
    assert_eq!(send("a").await.unwrap().body(), "token-a-2");
    assert_eq!(send("b").await.unwrap().body(), "token-b-1");
    assert_eq!(
        api.tokens(),
        [
            "token-1",
            "token-b-1",
            "token-a-1",
            "token-a-2",
            "token-b-1"
        ]
    );
    let token = layer.cache().peek_for(&for_scope("b")).unwrap();
    layer.cache().invalidate(&token);
    settle().await;
    assert_eq!(send("b").await.unwrap().body(), "token-b-2");
    assert_eq!(server.requests(), 5);
}

/// The same for a request that finds its token at once.
#[tokio::test(start_paused = true)]
async fn a_401_without_a_wait_is_about_its_keys_token() {
    let server = AuthServer::new();
    let api = Api::refusing("token-a-1", || unauthorized(INVALID_TOKEN));
    let layer = BearerAuthLayer::new(server.clone());
    let key = for_scope("a");
    layer.cache().get_for(&key).await.unwrap();
    let replaying = layer.clone().replay(CloneBody).layer(api.clone());
    let response = replaying.oneshot(request_for(&key)).await.unwrap();
    assert_eq!(response.body(), "token-a-2");
    assert_eq!(api.tokens(), ["token-a-1", "token-a-2"]);

    let api = Api::refusing("token-a-2", || unauthorized(INVALID_TOKEN));
    let mut once = layer.layer(api.clone());
    // Past the cooldown of the first refusal.
    time::sleep(secs(6)).await;
    let response = once.call(request_for(&key)).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    settle().await;
    let response = once.call(request_for(&key)).await.unwrap();
    assert_eq!(response.body(), "token-a-3");
    assert_eq!(server.requests(), 3);
}

/// With its token, its credentials and its failures.
#[tokio::test(start_paused = true)]
async fn a_key_may_bring_its_own_source() {
    let ours = AuthServer::new();
    let cache = TokenCache::new(ours.clone());
    let tenants: Vec<_> = (0..2_000)
        .map(|_| {
            let server = AuthServer::new();
            let key = TokenRequest::new().source(SharedSource::new(server.clone()));
            (server, key)
        })
        .collect();
    let unreachable = TokenError::transient("busy").with_retry_after(secs(100));
    tenants[7].0.set(Answer::Fail(unreachable));
    let mut tasks = JoinSet::new();
    for _ in 0..3 {
        for (number, (_, key)) in tenants.iter().enumerate() {
            let (cache, key) = (cache.clone(), key.clone());
            tasks.spawn(async move { (number, cache.get_for(&key).await.is_ok()) });
        }
    }
    for (number, served) in tasks.join_all().await {
        assert_eq!(served, number != 7);
    }
    for (server, _) in &tenants {
        assert_eq!(server.requests(), 1);
    }
    assert_eq!(ours.requests(), 0);
    // A clone of a source is the same source, with the same gate.
    let other = tenants[7].1.clone().scope("other");
    assert!(
        now(cache.get_for(&other))
            .unwrap_err()
            .retry_after()
            .is_some()
    );
    assert_eq!(
        now(cache.get_for(&tenants[8].1)).unwrap().expose_secret(),
        "token-1"
    );
}

/// One key too many gets an error, and a place once a token has died.
#[tokio::test(start_paused = true)]
async fn the_number_of_keys_is_bounded() {
    let server = AuthServer::new();
    server.set(Answer::Grant(secs(300)));
    server.set_for("short", Answer::Grant(secs(20)));
    let cache = TokenCache::with_policy(server.clone(), RefreshPolicy::new().max_keys(3));
    for scope in ["short", "a", "b"] {
        text(&cache, scope).await;
    }
    let error = now(cache.get_for(&for_scope("c"))).unwrap_err();
    assert!(error.is_too_many_keys() && error.is_transient());
    // The token without a key takes no place, and keys that have a token keep it.
    cache.get().await.unwrap();
    assert_eq!(text(&cache, "short").await, "token-short-1");
    let service = BearerAuthLayer::new(cache.clone()).layer(Api::echoing());
    let error = service
        .oneshot(request_for(&for_scope("c")))
        .await
        .unwrap_err();
    assert!(
        error
            .downcast_ref::<TokenError>()
            .unwrap()
            .is_too_many_keys()
    );

    time::sleep(secs(30)).await;
    assert_eq!(text(&cache, "c").await, "token-c-1");
    assert_eq!(text(&cache, "a").await, "token-a-1");
    assert!(
        now(cache.get_for(&for_scope("short")))
            .unwrap_err()
            .is_too_many_keys()
    );
    assert_eq!(server.requests_for("short"), 1);
}

/// A key with waiters or a closed gate keeps its place and its failures.
#[tokio::test(start_paused = true)]
async fn a_key_in_use_is_not_evicted() {
    let server = AuthServer::new();
    server.set_for("hangs", Answer::Hang);
    server.set_for("refused", Answer::Fail(refused()));
    let cache = TokenCache::with_policy(server.clone(), RefreshPolicy::new().max_keys(2));
    let waits = tokio::spawn({
        let cache = cache.clone();
        async move { cache.get_for(&for_scope("hangs")).await.map(drop) }
    });
    cache.get_for(&for_scope("refused")).await.unwrap_err();
    time::sleep(secs(2)).await;
    assert!(
        now(cache.get_for(&for_scope("new")))
            .unwrap_err()
            .is_too_many_keys()
    );
    // The gate of one opens while the other's flight goes on.
    time::sleep(secs(6)).await;
    assert_eq!(text(&cache, "new").await, "token-new-1");
    assert_eq!(server.requests_for("hangs"), 1);
    waits.abort();
}

/// The first 16,384 keys are served, the others refused, and nothing is requested twice.
#[tokio::test(start_paused = true)]
async fn twenty_thousand_keys_are_served_while_there_is_room() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let keys: Vec<_> = (0..20_000)
        .map(|key| for_scope(&format!("key-{key}")))
        .collect();
    let mut served = 0;
    for key in &keys {
        match cache.get_for(key).await {
            Ok(_) => served += 1,
            Err(error) => assert!(error.is_too_many_keys()),
        }
    }
    assert_eq!(served, 16_384);
    assert_eq!(server.requests(), 16_384);
    let alive = tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks();
    assert_eq!(alive, 0, "a key leaks a task");
    // Once those tokens are dead, the others get theirs.
    time::sleep(secs(301)).await;
    for key in &keys[16_384..] {
        cache.get_for(key).await.unwrap();
    }
}

/// A key that nobody uses any more costs nothing.
#[tokio::test(start_paused = true)]
async fn keep_warm_applies_to_the_token_without_a_key() {
    let server = AuthServer::new();
    server.set(Answer::Grant(secs(60)));
    let cache = TokenCache::with_policy(server.clone(), RefreshPolicy::new().keep_warm(true));
    cache.get().await.unwrap();
    text(&cache, "a").await;
    time::sleep(secs(600)).await;
    assert!(server.requests_for("") > 5);
    assert_eq!(server.requests_for("a"), 1);
}

/// A token that falls due while another key goes first after an outage is refreshed later.
#[tokio::test(start_paused = true)]
async fn a_cache_stays_warm_while_another_key_probes_the_server() {
    let server = AuthServer::new();
    let policy = RefreshPolicy::new()
        .keep_warm(true)
        .attempt_timeout(secs(240))
        .flight_timeout(secs(240));
    let cache = TokenCache::with_policy(server.clone(), policy);
    cache.get().await.unwrap();
    let busy = TokenError::transient("busy").with_retry_after(secs(1));
    server.set_for("a", Answer::Fail(busy));
    cache.get_for(&for_scope("a")).await.unwrap_err();
    time::sleep(secs(2)).await;
    server.set_for("a", Answer::Hang);
    let (a, tries) = (for_scope("a"), cache.clone());
    let first = tokio::spawn(async move { tries.get_for(&a).await });
    // The token is due between 105 s and 225 s.
    time::sleep(secs(230)).await;
    assert_eq!(server.requests_for(""), 1);
    first.await.unwrap().unwrap_err();
    time::sleep(secs(2)).await;
    assert_eq!(server.requests_for(""), 2);
}

/// Law 9: never anonymous, unless the request says so.
#[tokio::test(start_paused = true)]
async fn a_request_marked_without_token_passes_as_it_is() {
    let server = AuthServer::new();
    server.set(Answer::Hang);
    let api = Api::new(|arrival| match arrival.uri.path() {
        "/sims" => unauthorized(INVALID_TOKEN),
        _ => unreachable!(),
    });
    let layer = BearerAuthLayer::new(server.clone()).replay(CloneBody);
    let service = layer.layer(api.clone());
    let mut bare = get();
    bare.extensions_mut().insert(WithoutToken);
    let mut own = bare.clone();
    own.headers_mut()
        .insert(AUTHORIZATION, "Bearer mine".parse().unwrap());
    for request in [bare, own] {
        let answer = now(service.clone().oneshot(request)).unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    }
    assert_eq!(api.tokens(), ["anonymous", "mine"]);
    settle().await;
    assert_eq!(server.requests(), 0);
}
