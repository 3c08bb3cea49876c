//! A service that is called again and again keeps the token, and drops it in time.

use http::Request;
use tokio::time;
use tower::{Layer, Service};
use tower_bearer::{
    BearerAuth, BearerAuthLayer, Never, TokenCache, TokenRequest, TokenResponse, source_fn,
};

use crate::support::{
    Answer, Api, AuthServer, get, millis, now, paused, ready, secs, settle, token_error,
};

type Kept = BearerAuth<Api, Never>;

/// A service that keeps the token, as it does from the second request on.
async fn kept(cache: &TokenCache) -> Kept {
    let mut service = BearerAuthLayer::new(cache.clone()).layer(Api::echoing());
    for _ in 0..4 {
        send(&mut service).await;
    }
    service
}

async fn send(service: &mut Kept) -> String {
    send_this(service, get()).await
}

async fn send_this(service: &mut Kept, request: Request<String>) -> String {
    let service = ready(service).await.unwrap();
    service.call(request).await.unwrap().into_body()
}

/// Fails if it waits.
fn send_now(service: &mut Kept) -> String {
    now(send(service))
}

#[tokio::test(start_paused = true)]
async fn it_refreshes_a_due_token_and_sends_no_dead_one() {
    let server = AuthServer::new();
    let mut service = kept(&TokenCache::new(server.clone())).await;
    // Each token is due by then.
    for number in 1..10 {
        time::sleep(secs(230)).await;
        assert_eq!(send_now(&mut service), format!("token-{number}"));
        settle().await;
        assert_eq!(send_now(&mut service), format!("token-{}", number + 1));
    }
    let before = server.requests();
    time::sleep(secs(291)).await;
    assert_eq!(send(&mut service).await, format!("token-{}", before + 1));
}

/// A token that lives for a second is dead before it is due.
#[tokio::test(start_paused = true)]
async fn it_sends_no_token_that_died_before_it_was_due() {
    let server = AuthServer::new();
    server.set(Answer::Grant(secs(1)));
    let mut service = kept(&TokenCache::new(server)).await;
    time::sleep(millis(899)).await;
    assert_eq!(send_now(&mut service), "token-1");
    time::sleep(millis(2)).await;
    assert_eq!(send(&mut service).await, "token-2");
}

#[tokio::test(start_paused = true)]
async fn it_drops_a_refused_token() {
    let server = AuthServer::new();
    server.set_latency(millis(10));
    let cache = TokenCache::new(server);
    let mut service = kept(&cache).await;
    cache.invalidate(&cache.peek().unwrap());
    assert_eq!(send(&mut service).await, "token-2");
}

#[tokio::test(start_paused = true)]
async fn it_drops_the_token_when_the_cache_is_shut_down() {
    let cache = TokenCache::new(AuthServer::new());
    let mut service = kept(&cache).await;
    cache.shutdown();
    let error = now(service.call(get())).unwrap_err();
    assert!(token_error(&error).is_shut_down());
}

/// Keycloak: another key's answer voids all tokens before it.
#[tokio::test(start_paused = true)]
async fn it_drops_a_void_token() {
    let source = source_fn(|fetch| async move {
        let key = fetch.request.scopes().next().map(str::to_owned);
        let response = TokenResponse::new(key.clone().unwrap_or("plain".to_owned()))?;
        let response = response.expires_in(secs(300));
        Ok(match key {
            Some(_) => response.not_before_policy(7),
            None => response.scope(format!("{:?}", time::Instant::now())),
        })
    });
    let cache = TokenCache::new(source);
    let mut service = kept(&cache).await;
    let before = cache.peek().unwrap();
    time::sleep(secs(2)).await;
    cache
        .get_for(&TokenRequest::new().scope("a"))
        .await
        .unwrap();
    assert!(cache.peek().is_none());
    send(&mut service).await;
    assert_ne!(cache.peek().unwrap().scope(), before.scope());
}

/// The runtime that watched it is gone, so the service reads it itself.
#[test]
fn it_reads_the_clock_when_nobody_watches_it() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server);
    let first = paused();
    let mut service = first.block_on(kept(&cache));
    drop(first);
    let second = paused();
    second.block_on(async {
        assert_eq!(send_now(&mut service), "token-1");
        time::sleep(secs(310)).await;
        assert_eq!(send(&mut service).await, "token-2");
    });
}

/// A request with a key gets that key's token, and the service keeps its own.
#[tokio::test(start_paused = true)]
async fn it_keeps_keys_apart() {
    let server = AuthServer::new();
    let mut service = kept(&TokenCache::new(server)).await;
    for _ in 0..3 {
        let mut request = get();
        request
            .extensions_mut()
            .insert(TokenRequest::new().scope("a"));
        assert_eq!(send_this(&mut service, request).await, "token-a-1");
        assert_eq!(send_now(&mut service), "token-1");
    }
}
