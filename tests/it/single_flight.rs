//! However many callers want a token, one is fetched.

use std::time::Duration;

use tokio::time;
use tower::{Layer, Service, ServiceExt};
use tower_bearer::{BearerAuthLayer, TokenCache};

use crate::support::{Api, AuthServer, get};

/// Law 1.
#[tokio::test(start_paused = true)]
async fn ten_thousand_cold_requests_share_one_token_request() {
    let server = AuthServer::new();
    server.set_latency(Duration::from_millis(50));
    let client = BearerAuthLayer::new(server.clone()).layer(Api::echoing());
    let requests: Vec<_> = (0..10_000)
        .map(|_| tokio::spawn(client.clone().oneshot(get())))
        .collect();
    for request in requests {
        assert_eq!(request.await.unwrap().unwrap().body(), "token-1");
    }
    assert_eq!(server.requests(), 1);
}

/// Law 1: all have sent that token before.
#[tokio::test(start_paused = true)]
async fn ten_thousand_requests_after_a_tokens_death_share_one_token_request() {
    let server = AuthServer::new();
    server.set_latency(Duration::from_millis(50));
    let client = BearerAuthLayer::new(server.clone()).layer(Api::echoing());
    let mut clients = vec![client; 10_000];
    for client in &mut clients[..100] {
        assert_eq!(client.call(get()).await.unwrap().body(), "token-1");
    }
    time::sleep(Duration::from_secs(290)).await;
    let requests: Vec<_> = clients
        .into_iter()
        .map(|client| tokio::spawn(client.oneshot(get())))
        .collect();
    for request in requests {
        assert_eq!(request.await.unwrap().unwrap().body(), "token-2");
    }
    assert_eq!(server.requests(), 2);
}

/// Law 1: layers that share a cache share its flight, and so do callers without a layer.
#[tokio::test(start_paused = true)]
async fn layers_and_direct_callers_share_the_flight_of_their_cache() {
    let server = AuthServer::new();
    server.set_latency(Duration::from_millis(50));
    let cache = TokenCache::new(server.clone());
    let one = BearerAuthLayer::new(cache.clone()).layer(Api::echoing());
    let other = BearerAuthLayer::new(cache.clone()).layer(Api::echoing());
    let (one, other, direct) = tokio::join!(one.oneshot(get()), other.oneshot(get()), cache.get());
    assert_eq!(one.unwrap().body(), "token-1");
    assert_eq!(other.unwrap().body(), "token-1");
    assert_eq!(direct.unwrap().expose_secret(), "token-1");
    assert_eq!(server.requests(), 1);
}
