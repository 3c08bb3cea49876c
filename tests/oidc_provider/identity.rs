//! A client that finds its server by the issuer, and revokes its tokens.

use tower_bearer::Credential;

use super::*;

#[tokio::test]
async fn a_server_is_found_by_its_issuer() {
    for method in ["client_secret_basic", "client_secret_post"] {
        let Some(server) = server(method).await else {
            return;
        };
        let source = ClientCredentials::discover(&server.at.issuer, ID).client_secret(SECRET);
        // The server supports both, and its metadata do not say which this client should use.
        let source = match method {
            "client_secret_post" => source.auth_method(AuthMethod::ClientSecretPost),
            _ => source,
        };
        let cache = TokenCache::new(source.build().unwrap());
        is_ours(&server, &cache).await;
    }
}

/// RFC 8414 section 3.3. Law 9: a server that calls itself another gets no secret.
#[tokio::test]
async fn a_server_with_another_name_is_sent_nothing() {
    let Some(server) = server("client_secret_basic").await else {
        return;
    };
    let issuer = server.at.issuer.clone();
    for other in [
        issuer.replace("127.0.0.1", "localhost"),
        format!("{issuer}/"),
    ] {
        let source = ClientCredentials::discover(&other, ID).client_secret(SECRET);
        let error = source.build().unwrap().fetch(Fetch::new()).await;
        let error = error.unwrap_err();
        assert!(!error.is_transient(), "{other}: {error:?}");
        assert!(!error.is_transport(), "{other}: {error:?}");
    }
    assert_eq!(server.counts().await.token_requests, 0);
}

/// RFC 7009 section 2.
#[tokio::test]
async fn a_token_is_inactive_once_its_cache_is_shut_down() {
    let Some(server) = server("client_secret_basic").await else {
        return;
    };
    let told = client(&server).revocation_url(&server.at.revocation_endpoint);
    let found = ClientCredentials::discover(&server.at.issuer, ID).client_secret(SECRET);
    for source in [told, found] {
        let cache = TokenCache::new(source.build().unwrap());
        let token = is_ours(&server, &cache).await;
        cache.shutdown_and_revoke().await.unwrap();
        assert_eq!(server.introspect(&token).await["active"], false);
    }
    // Without a revocation endpoint they live on, and the caller gets an error.
    let cache = TokenCache::new(client(&server).build().unwrap());
    let token = is_ours(&server, &cache).await;
    cache.shutdown_and_revoke().await.unwrap_err();
    assert_eq!(server.introspect(&token).await["active"], true);
}

/// A secret that is wrong at first costs one request only.
#[tokio::test]
async fn a_secret_is_asked_for_again_within_the_refused_attempt() {
    let Some(server) = server("client_secret_basic").await else {
        return;
    };
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let secret = Credential::from_fn(move || {
        let first = asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 0;
        async move { Ok(if first { "old" } else { SECRET }.to_owned()) }
    });
    let source = ClientCredentials::discover(&server.at.issuer, ID).client_secret(secret);
    let source = source.build().unwrap();
    for requests in [2, 3] {
        source.fetch(Fetch::new()).await.unwrap();
        assert_eq!(server.counts().await.token_requests, requests);
    }
}
