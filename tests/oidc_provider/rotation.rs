//! A secret that changes at the server and in a file, while requests flow.

use std::{fs, path::PathBuf};

use tower_bearer::Credential;

use super::*;

/// A secret's file, removed with the test.
struct SecretFile(PathBuf);

impl SecretFile {
    fn new(name: &str) -> Self {
        let name = format!("tower-bearer-{}-{name}", std::process::id());
        let file = Self(std::env::temp_dir().join(name));
        file.write(SECRET);
        file
    }

    /// Replaces the file, as Kubernetes does.
    fn write(&self, secret: &str) {
        let new = self.0.with_extension("new");
        fs::write(&new, secret).unwrap();
        fs::rename(&new, &self.0).unwrap();
    }

    fn source(&self, server: &Server) -> ClientCredentials {
        let source = ClientCredentials::discover(&server.at.issuer, ID);
        let source = source.client_secret(Credential::file(&self.0));
        source.build().unwrap()
    }
}

impl Drop for SecretFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

async fn change(server: &Server, secret: &str) {
    let order = json!({ "client_id": ID, "client_secret": secret });
    server.order(json!({ "secret": order })).await;
}

/// Law 3: a token request between the two changes is refused, and repeated before the token dies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_notices_a_secret_that_changes_under_load() {
    let Some(server) = server("client_secret_basic").await else {
        return;
    };
    // A token is due after at most 6 s, and lives for at least 7 s.
    server.order(json!({ "lifetime": 8 })).await;
    let file = SecretFile::new("load");
    let cache = TokenCache::new(file.source(&server));
    let load = Load::start(&server, &cache, 10);
    until(|| async { server.counts().await.granted == 1 }).await;

    change(&server, "second").await;
    until(|| async { server.counts().await.token_requests == 2 }).await;
    file.write("second");
    until(|| async { server.counts().await.granted == 2 }).await;

    change(&server, "third").await;
    file.write("third");
    until(|| async { server.counts().await.granted == 3 }).await;

    // Each token got only 200.
    assert_eq!(load.stop().await.len(), 3);
    assert_eq!(server.counts().await.token_requests, 4);
}

/// Law 7: a remembered refusal ends with the refused secret.
#[tokio::test]
async fn a_secret_whose_file_follows_seconds_later_is_used_at_once() {
    let Some(server) = server("client_secret_basic").await else {
        return;
    };
    let file = SecretFile::new("late");
    let cache = TokenCache::new(file.source(&server));
    change(&server, "second").await;
    // The second refusal comes when the pause after the first is over.
    until(|| async {
        let error = cache.get().await.unwrap_err();
        assert_eq!(error.oauth_error(), Some("invalid_client"));
        server.counts().await.token_requests == 2
    })
    .await;

    let refused = Instant::now();
    file.write("second");
    until(|| async { cache.get().await.is_ok() }).await;
    // The pause after the second refusal is twice as long, at least 5 s.
    let took = refused.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
    assert_eq!(server.counts().await.token_requests, 3);
}

/// Polls until it is so.
async fn until<F: Future<Output = bool>>(mut is_so: impl FnMut() -> F) {
    for _ in 0..1500 {
        if is_so().await {
            return;
        }
        time::sleep(Duration::from_millis(20)).await;
    }
    panic!("not so within half a minute");
}
