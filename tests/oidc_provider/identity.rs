//! A client that finds its server by the issuer, and leaves it again.

use tower_bearer::Credential;

use super::*;

#[tokio::test]
async fn a_server_is_found_by_its_issuer_and_says_what_to_do_with_a_secret() {
    for method in ["client_secret_basic", "client_secret_post"] {
        let Some(server) = server(method).await else {
            return;
        };
        let source = ClientCredentials::discover(&server.at.issuer, ID).client_secret(SECRET);
        // The server supports both, and which of them this client is to use its metadata do not tell.
        let source = match method {
            "client_secret_post" => source.auth_method(AuthMethod::ClientSecretPost),
            _ => source,
        };
        let cache = TokenCache::new(source.build().unwrap());
        is_ours(&server, &cache).await;
    }
}

/// RFC 8414 section 3.3. Law 9: whoever says to be another gets no secret.
#[tokio::test]
async fn a_server_of_another_name_is_sent_nothing() {
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
async fn a_token_is_inactive_once_its_cache_was_shut_down() {
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
    // Without a word about where, they live on, and the caller learns of it.
    let cache = TokenCache::new(client(&server).build().unwrap());
    let token = is_ours(&server, &cache).await;
    cache.shutdown_and_revoke().await.unwrap_err();
    assert_eq!(server.introspect(&token).await["active"], true);
}

/// A secret that is wrong at first costs a request, and none of those that follow it.
#[tokio::test]
async fn a_secret_is_asked_for_again_within_the_attempt_that_was_refused() {
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
