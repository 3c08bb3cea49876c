//! How a client authenticates, and what happens when its credentials change.

use std::{
    fs,
    future::ready,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use tower_bearer::{
    AuthMethod, ClientCredentials, ClientCredentialsBuilder, Credential, Fetch, TokenCache,
    TokenSource,
};

use crate::support::{TokenEndpoint, reply};

const URL: &str = "https://as.example/token";

/// An authorization server that knows one secret at a time.
struct Server {
    secret: Arc<Mutex<String>>,
    endpoint: TokenEndpoint,
}

impl Server {
    fn new(secret: &str) -> Self {
        let secret = Arc::new(Mutex::new(secret.to_owned()));
        let known = secret.clone();
        let endpoint = TokenEndpoint::new(move |request| {
            let known = format!("&client_secret={}", known.lock().unwrap());
            ready(match request.body().ends_with(&known) {
                true => reply(200, r#"{"access_token":"token","token_type":"Bearer"}"#),
                false => reply(401, r#"{"error":"invalid_client"}"#),
            })
        });
        Self { secret, endpoint }
    }

    fn set_secret(&self, secret: &str) {
        *self.secret.lock().unwrap() = secret.to_owned();
    }

    fn bodies(&self) -> Vec<String> {
        self.endpoint.bodies()
    }

    fn source(&self, secret: impl Into<Credential>) -> ClientCredentials {
        builder()
            .client_secret(secret)
            .auth_method(AuthMethod::ClientSecretPost)
            .build_with(self.endpoint.clone())
            .unwrap()
    }
}

fn builder() -> ClientCredentialsBuilder {
    ClientCredentials::builder(URL, "id")
}

/// A directory that is removed with the test.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let name = format!("tower-bearer-it-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        // Atomically, as Kubernetes does.
        fs::write(path.with_extension("new"), text).unwrap();
        fs::rename(path.with_extension("new"), &path).unwrap();
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[tokio::test]
async fn a_replaced_file_is_read_for_the_next_token() {
    let directory = Directory::new("replaced");
    let server = Server::new("one");
    let source = server.source(Credential::file(directory.write("secret", "one\n")));
    source.fetch(Fetch::new()).await.unwrap();
    directory.write("secret", "two\n");
    server.set_secret("two");
    source.fetch(Fetch::new()).await.unwrap();
    assert_eq!(server.bodies().len(), 2);
}

/// Concurrent fetches call the function once.
#[tokio::test]
async fn concurrent_refusals_ask_for_a_new_secret_once() {
    let asked = Arc::new(AtomicUsize::new(0));
    let server = Server::new("0");
    let count = asked.clone();
    let source = server.source(Credential::from_fn(move || {
        let count = count.clone();
        async move { Ok(count.fetch_add(1, Ordering::SeqCst).to_string()) }
    }));
    source.fetch(Fetch::new()).await.unwrap();

    server.set_secret("1");
    let fetches: Vec<_> = (0..20)
        .map(|_| {
            let source = source.clone();
            tokio::spawn(async move { source.fetch(Fetch::new()).await.map(drop) })
        })
        .collect();
    for fetch in fetches {
        fetch.await.unwrap().unwrap();
    }
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

/// Law 7: a cache that remembers the refusal learns that there is another secret.
#[tokio::test]
async fn a_source_reports_a_replaced_secret() {
    let directory = Directory::new("wrong");
    let server = Server::new("right");
    let source = server.source(Credential::file(directory.write("secret", "wrong")));
    let error = source.fetch(Fetch::new()).await.unwrap_err();
    assert_eq!(error.oauth_error(), Some("invalid_client"));
    assert_eq!(server.bodies().len(), 1);
    directory.write("secret", "right");
    assert!(source.has_new_credentials());
    source.fetch(Fetch::new()).await.unwrap();
    assert!(!source.has_new_credentials());
}

#[tokio::test]
async fn an_unavailable_credential_sends_nothing() {
    let server = Server::new("secret");
    for credential in [
        Credential::file("/nonexistent/secret"),
        Credential::env("TOWER_BEARER_IS_NOT_SET"),
        Credential::from_fn(|| async { Err("sealed".into()) }),
    ] {
        let source = server.source(credential);
        let error = source.fetch(Fetch::new()).await.unwrap_err();
        assert!(error.is_transient(), "{error:?}");
        assert_eq!(error.status(), None);
    }
    assert!(server.bodies().is_empty());
}

/// RFC 7009: the server hangs on one token, and is still asked to revoke the other.
#[tokio::test(start_paused = true)]
async fn a_revocation_is_sent_though_the_other_hangs() {
    let endpoint = TokenEndpoint::new(|request| async move {
        if request.body().contains("token=refresh") {
            std::future::pending::<()>().await;
        }
        let answer = r#"{"access_token":"access","token_type":"Bearer","refresh_token":"refresh"}"#;
        reply(200, answer)
    });
    let source = builder()
        .revocation_url("https://as.example/revoke")
        .build_with(endpoint.clone())
        .unwrap();
    let cache = TokenCache::new(source);
    cache.get().await.unwrap();
    let error = cache.shutdown_and_revoke().await.unwrap_err();
    assert!(error.is_timeout());
    let bodies = endpoint.bodies();
    assert_eq!(bodies.len(), 3);
    assert!(bodies[1].contains("token=refresh"));
    assert!(bodies[2].contains("token=access&"));
}

/// The default client finds the server and follows no redirect.
#[cfg(feature = "rustls")]
#[tokio::test]
async fn a_server_is_discovered_over_a_socket() {
    use axum::{Json, Router, response::Redirect, routing::get};

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = format!("http://{}", listener.local_addr().unwrap());
    let elsewhere = Arc::new(AtomicUsize::new(0));
    let visits = elsewhere.clone();
    let metadata = serde_json::json!({
        "issuer": format!("{host}/realms/a"),
        "token_endpoint": format!("{host}/token"),
    });
    let token = serde_json::json!({"access_token": "token", "token_type": "Bearer"});
    let router = Router::new()
        .route(
            "/.well-known/oauth-authorization-server/realms/a",
            get(|| async { Redirect::temporary("/elsewhere") }),
        )
        .route(
            "/elsewhere",
            get(move || async move {
                visits.fetch_add(1, Ordering::SeqCst);
            }),
        )
        .route(
            "/realms/a/.well-known/openid-configuration",
            get(move || async move { Json(metadata) }),
        )
        .route(
            "/token",
            axum::routing::post(move || async move { Json(token) }),
        );
    tokio::spawn(async move { axum::serve(listener, router).await });

    let source = ClientCredentials::discover(format!("{host}/realms/a"), "id")
        .client_secret("secret")
        .build()
        .unwrap();
    source.fetch(Fetch::new()).await.unwrap();
    assert_eq!(elsewhere.load(Ordering::SeqCst), 0);
}

#[cfg(feature = "jwt")]
mod jwt {
    use jsonwebtoken::{Algorithm, DecodingKey, Validation};
    use tower_bearer::AssertionAudience;

    use tower_bearer::TokenRequest;

    use super::*;

    fn param(body: &str, name: &str) -> String {
        let mut pairs = oauth2::url::form_urlencoded::parse(body.as_bytes());
        let (_, value) = pairs.find(|(other, _)| other == name).expect(name);
        value.into_owned()
    }

    /// The token requests that a server refuses and the test judges.
    async fn bodies(builder: ClientCredentialsBuilder, fetches: usize) -> Vec<String> {
        let server = Server::new("secret");
        let source = builder.build_with(server.endpoint.clone()).unwrap();
        for _ in 0..fetches {
            source.fetch(Fetch::new()).await.unwrap_err();
        }
        server.bodies()
    }

    #[tokio::test]
    async fn every_token_request_has_its_own_assertion() {
        let key = rcgen::KeyPair::generate().unwrap();
        let builder = builder()
            .issuer("https://as.example/")
            .private_key(key.serialize_pem())
            .key_id("k1");
        let bodies = bodies(builder, 2).await;
        let mut ids = Vec::new();
        for body in bodies {
            assert_eq!(
                param(&body, "client_assertion_type"),
                "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
            );
            assert_eq!(param(&body, "client_id"), "id");
            assert!(!body.contains("client_secret"));
            let mut validation = Validation::new(Algorithm::ES256);
            validation.set_audience(&["https://as.example/"]);
            validation.set_issuer(&["id"]);
            let data = jsonwebtoken::decode::<serde_json::Value>(
                param(&body, "client_assertion"),
                &DecodingKey::from_ec_der(rcgen::PublicKeyData::der_bytes(&key)),
                &validation,
            )
            .unwrap();
            assert_eq!(
                data.header.typ.as_deref(),
                Some("client-authentication+jwt")
            );
            assert_eq!(data.header.kid.as_deref(), Some("k1"));
            ids.push(data.claims["jti"].as_str().unwrap().to_owned());
        }
        assert_ne!(ids[0], ids[1]);
    }

    #[tokio::test]
    async fn a_signing_secret_is_not_sent() {
        let builder = builder()
            .client_secret("CANARY")
            .auth_method(AuthMethod::ClientSecretJwt)
            .assertion_audience(AssertionAudience::TokenEndpoint);
        let bodies = bodies(builder, 1).await;
        assert!(!bodies[0].contains("CANARY"));
        let mut validation = Validation::new(Algorithm::HS256);
        validation.set_audience(&[URL]);
        let assertion = param(&bodies[0], "client_assertion");
        let key = DecodingKey::from_secret(b"CANARY");
        let data = jsonwebtoken::decode::<serde_json::Value>(&assertion, &key, &validation);
        assert_eq!(data.unwrap().header.typ.as_deref(), Some("JWT"));
    }

    fn with_broken_key(directory: &Directory, server: &Server) -> ClientCredentials {
        let path = directory.write("key", "CANARY");
        let builder = builder()
            .issuer("https://as.example")
            .private_key(Credential::file(path));
        builder.build_with(server.endpoint.clone()).unwrap()
    }

    /// Law 7: a broken key does not panic, and is forgotten once replaced.
    #[tokio::test]
    async fn a_broken_key_is_terminal_until_it_is_replaced() {
        let directory = Directory::new("key");
        let server = Server::new("secret");
        let source = with_broken_key(&directory, &server);
        let error = source.fetch(Fetch::new()).await.unwrap_err();
        assert!(!error.is_transient());
        assert!(!format!("{error:?}").contains("CANARY"));
        assert!(server.bodies().is_empty());
        let key = rcgen::KeyPair::generate().unwrap();
        directory.write("key", &key.serialize_pem());
        assert!(source.has_new_credentials());
        let error = source.fetch(Fetch::new()).await.unwrap_err();
        assert_eq!(error.oauth_error(), Some("invalid_client"));
    }

    /// All keys of the cache share the credentials, so all wait, and none longer than needed.
    #[tokio::test(start_paused = true)]
    async fn a_cache_asks_as_soon_as_a_broken_key_is_replaced() {
        let directory = Directory::new("cache");
        let server = Server::new("secret");
        let source = with_broken_key(&directory, &server);
        let cache = TokenCache::new(source);
        let key = TokenRequest::new().scope("a");
        let error = cache.get().await.unwrap_err();
        assert!(!format!("{error} {error:?}").contains("CANARY"));
        cache.get_for(&key).await.unwrap_err();
        assert!(server.bodies().is_empty());
        let new = rcgen::KeyPair::generate().unwrap();
        directory.write("key", &new.serialize_pem());
        // The files are checked ten times a second.
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        let error = cache.get_for(&key).await.unwrap_err();
        assert_eq!(error.oauth_error(), Some("invalid_client"));
    }
}

#[cfg(feature = "rustls")]
mod mutual_tls {
    use rcgen::{CertifiedKey, KeyPair};
    use rustls::{
        RootCertStore, ServerConfig,
        pki_types::{CertificateDer, PrivatePkcs8KeyDer},
        server::WebPkiClientVerifier,
    };
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;
    use crate::{
        hostile::{End, Hostile, Reply},
        support::everything,
    };

    /// A server that gives a token to clients whose certificate it knows, and tells which it was.
    async fn endpoint(
        own: &CertifiedKey<KeyPair>,
        clients: &[&CertifiedKey<KeyPair>],
    ) -> (String, Arc<Mutex<Vec<(CertificateDer<'static>, String)>>>) {
        let mut roots = RootCertStore::empty();
        for client in clients {
            roots.add(client.cert.der().clone()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone()).build();
        let key = PrivatePkcs8KeyDer::from(own.signing_key.serialize_der());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier.unwrap())
            .with_single_cert(vec![own.cert.der().clone()], key.into())
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let presented = seen.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    continue;
                };
                let certificates = stream.get_ref().1.peer_certificates().unwrap();
                let certificate = certificates[0].clone().into_owned();
                let mut request = Vec::new();
                while !request.ends_with(b"client_id=id") {
                    assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0);
                }
                let request = String::from_utf8(request).unwrap();
                presented.lock().unwrap().push((certificate, request));
                let body = r#"{"access_token":"token","token_type":"Bearer"}"#;
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
                let _ = stream.write_all((head + body).as_bytes()).await;
                let _ = stream.shutdown().await;
            }
        });
        (format!("https://localhost:{port}/token"), seen)
    }

    fn certified() -> CertifiedKey<KeyPair> {
        rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap()
    }

    /// RFC 8705 section 2: the body names the client, and the certificate proves it.
    #[tokio::test]
    async fn the_current_certificate_is_presented() {
        let (own, one, other) = (certified(), certified(), certified());
        let (url, seen) = endpoint(&own, &[&one, &other]).await;
        let directory = Directory::new("tls");
        let source = ClientCredentials::builder(url, "id")
            .client_certificate(
                Credential::file(directory.write("tls.crt", &one.cert.pem())),
                Credential::file(directory.write("tls.key", &one.signing_key.serialize_pem())),
            )
            .root_certificates(own.cert.pem())
            .build()
            .unwrap();
        source.fetch(Fetch::new()).await.unwrap();

        // Only half of the pair is replaced: they do not match, and nothing is sent.
        directory.write("tls.crt", &other.cert.pem());
        let error = source.fetch(Fetch::new()).await.unwrap_err();
        assert!(!error.is_transient(), "{error:?}");
        directory.write("tls.key", &other.signing_key.serialize_pem());
        assert!(source.has_new_credentials());
        source.fetch(Fetch::new()).await.unwrap();

        let seen = seen.lock().unwrap();
        let presented: Vec<_> = seen.iter().map(|(certificate, _)| certificate).collect();
        assert_eq!(presented, [one.cert.der(), other.cert.der()]);
        for (_, request) in &*seen {
            assert!(request.ends_with("\r\n\r\ngrant_type=client_credentials&client_id=id"));
            assert!(!request.to_lowercase().contains("authorization"));
        }
    }

    /// Law 7: both files are replaced after one was read.
    #[tokio::test]
    async fn replacing_a_pair_while_it_is_read_fails_no_request() {
        let (own, one, other) = (certified(), certified(), certified());
        let (url, seen) = endpoint(&own, &[&one, &other]).await;
        let directory = Directory::new("tls-between");
        let file = directory.write("tls.crt", &one.cert.pem());
        let asked = Arc::new(AtomicUsize::new(0));
        let (path, count) = (file.clone(), asked.clone());
        let (certificate, key) = (other.cert.pem(), other.signing_key.serialize_pem());
        let replacing = Credential::from_fn(move || {
            count.fetch_add(1, Ordering::SeqCst);
            fs::write(&path, &certificate).unwrap();
            let key = key.clone();
            async move { Ok(key) }
        });
        let source = ClientCredentials::builder(url, "id")
            .client_certificate(Credential::file(&file), replacing)
            .root_certificates(own.cert.pem())
            .build()
            .unwrap();
        source.fetch(Fetch::new()).await.unwrap();
        assert!(!source.has_new_credentials());
        assert_eq!(seen.lock().unwrap()[0].0, *other.cert.der());
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }

    /// A mismatched pair is read twice and no more.
    #[tokio::test]
    async fn a_pair_that_never_matches_is_read_twice() {
        let (own, one, other) = (certified(), certified(), certified());
        let (url, seen) = endpoint(&own, &[&one, &other]).await;
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        // A different wrong one each time.
        let keys = [&own, &other].map(|certified| certified.signing_key.serialize_pem());
        let wrong = Credential::from_fn(move || {
            let key = keys[count.fetch_add(1, Ordering::SeqCst) % 2].clone();
            async move { Ok(key) }
        });
        let source = ClientCredentials::builder(url, "id")
            .client_certificate(one.cert.pem(), wrong)
            .root_certificates(own.cert.pem())
            .build()
            .unwrap();
        let error = source.fetch(Fetch::new()).await.unwrap_err();
        assert!(!error.is_transient() && !error.is_rejected(), "{error:?}");
        assert_eq!(asked.load(Ordering::SeqCst), 2);
        assert!(seen.lock().unwrap().is_empty());
    }

    /// Law 7: it may have expired, for example. The refusal is not an OAuth error.
    #[tokio::test]
    async fn a_refused_certificate_is_asked_for_again() {
        let (own, one, other) = (certified(), certified(), certified());
        let (url, seen) = endpoint(&own, &[&other]).await;
        let giving = |texts: [String; 2]| {
            let asked = AtomicUsize::new(0);
            Credential::from_fn(move || {
                let text = texts[asked.fetch_add(1, Ordering::SeqCst).min(1)].clone();
                async move { Ok(text) }
            })
        };
        let source = ClientCredentials::builder(url, "id")
            .client_certificate(
                giving([one.cert.pem(), other.cert.pem()]),
                giving([&one, &other].map(|certified| certified.signing_key.serialize_pem())),
            )
            .root_certificates(own.cert.pem())
            .build()
            .unwrap();
        let cache = TokenCache::new(source);
        cache.get().await.unwrap();
        assert_eq!(seen.lock().unwrap()[0].0, *other.cert.der());
    }

    #[tokio::test]
    async fn an_unknown_certificate_gets_no_token() {
        let (own, one, other) = (certified(), certified(), certified());
        let (url, seen) = endpoint(&own, &[&one]).await;
        let source = ClientCredentials::builder(url, "id")
            .client_certificate(other.cert.pem(), other.signing_key.serialize_pem())
            .root_certificates(own.cert.pem())
            .build()
            .unwrap();
        let error = source.fetch(Fetch::new()).await.unwrap_err();
        assert!(error.is_transport(), "{error:?}");
        assert!(seen.lock().unwrap().is_empty());
    }

    /// nginx answers a bad certificate with a page and keeps the connection. No other failure is about it.
    #[tokio::test]
    async fn an_error_page_may_be_about_the_certificate() {
        for (reply, asked_again) in [
            (
                Reply::new(400, "", "<h1>The SSL certificate error</h1>"),
                true,
            ),
            (Reply::new(401, "", ""), true),
            (Reply::new(403, "", ""), true),
            (Reply::new(400, "", r#"{"error":"invalid_scope"}"#), false),
            (Reply::new(404, "", ""), false),
            (Reply::new(503, "", ""), false),
            (Reply::raw("").end(End::Reset), false),
        ] {
            let server = Hostile::start_tls(reply);
            let one = certified();
            let asked = Arc::new(AtomicUsize::new(0));
            let (count, chain) = (asked.clone(), one.cert.pem());
            let certificate = Credential::from_fn(move || {
                count.fetch_add(1, Ordering::SeqCst);
                let chain = chain.clone();
                async move { Ok(chain) }
            });
            let source = server
                .client()
                .client_certificate(certificate, one.signing_key.serialize_pem())
                .build()
                .unwrap();
            let error = source.fetch(Fetch::new()).await.unwrap_err();
            server.set(Reply::token("token"));
            source.fetch(Fetch::new()).await.unwrap();
            let times = 1 + usize::from(asked_again);
            assert_eq!(asked.load(Ordering::SeqCst), times, "{error:?}");
        }
    }

    /// Its PEM is valid, so the error says what else is wrong.
    #[test]
    fn an_encrypted_key_is_reported_but_not_shown() {
        let one = certified();
        let key = one.signing_key.serialize_pem();
        let key = key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
        let builder = builder()
            .client_certificate(one.cert.pem(), key.clone())
            .root_certificates(one.cert.pem());
        let error = builder.build().unwrap_err();
        assert!(error.to_string().ends_with("or is encrypted"), "{error}");
        let shown = everything(&error);
        assert!(!key.lines().any(|line| shown.contains(line)), "{shown}");
    }

    #[test]
    fn a_key_of_another_certificate_is_a_config_error() {
        let (one, other) = (certified(), certified());
        let builder = builder()
            .client_certificate(one.cert.pem(), other.signing_key.serialize_pem())
            .root_certificates(one.cert.pem());
        assert!(builder.build().is_err());
    }
}
