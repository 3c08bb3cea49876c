//! Clients that authenticate by signed assertions.

use std::process::Command;

use tower_bearer::{AssertionAudience, SigningAlgorithm};

use super::*;

/// A private key in both forms, and the public one as a JWK.
struct Key {
    pem: String,
    jwk: String,
    public: Value,
}

impl Key {
    /// Has Node's `crypto.generateKeyPairSync` make one of this kind: keys made by others must be readable.
    fn new(kind: &str) -> Self {
        let script = format!(
            "const {{ privateKey, publicKey }} = require('crypto').generateKeyPairSync({kind});
             const pem = privateKey.export({{ format: 'pem', type: 'pkcs8' }});
             const [jwk, open] = [privateKey, publicKey].map((key) => key.export({{ format: 'jwk' }}));
             console.log(JSON.stringify([pem, JSON.stringify(jwk), open]));"
        );
        let made = Command::new("node").args(["-e", &script]).output().unwrap();
        let made: (String, String, Value) = serde_json::from_slice(&made.stdout).unwrap();
        let (pem, jwk, mut public) = made;
        public["kid"] = "the key".into();
        Self { pem, jwk, public }
    }

    fn client(&self) -> Value {
        json!({
            "client_id": ID,
            "token_endpoint_auth_method": "private_key_jwt",
            "jwks": { "keys": [self.public] },
        })
    }

    fn source(&self, server: &Server) -> ClientCredentialsBuilder {
        ClientCredentials::builder(&server.at.token_endpoint, ID)
            .issuer(&server.at.issuer)
            .private_key(&*self.pem)
    }
}

const P256: &str = "'ec', { namedCurve: 'P-256' }";

/// RFC 7523 section 2.2, and RFC 10070 for the audience and the type.
#[tokio::test]
async fn a_private_key_of_every_kind_proves_the_identity() {
    if servers::installed("oidc-provider").is_none() {
        return;
    }
    let rsa = Key::new("'rsa', { modulusLength: 2048 }");
    let p256 = Key::new(P256);
    let ed = Key::new("'ed25519'");
    for (key, name, algorithm) in [
        (&rsa, "RS256", SigningAlgorithm::Rs256),
        (&rsa, "PS256", SigningAlgorithm::Ps256),
        (&p256, "ES256", SigningAlgorithm::Es256),
        (&ed, "EdDSA", SigningAlgorithm::EdDsa),
    ] {
        let mut client = key.client();
        // The server accepts only this algorithm from this client.
        client["token_endpoint_auth_signing_alg"] = name.into();
        let Some(server) = start([client], json!({ "assertions": "issuer" })).await else {
            return;
        };
        for text in [&key.pem, &key.jwk] {
            let source = key.source(&server).private_key(&**text);
            let source = source.signing_algorithm(algorithm).key_id("the key");
            let cache = TokenCache::new(source.build().unwrap());
            is_ours(&server, &cache).await;
        }
        let source = key.source(&server).signing_algorithm(algorithm);
        let source = source.key_id("another key").build().unwrap();
        is_refused(source).await;
    }
}

#[tokio::test]
async fn an_assertion_has_the_audience_the_server_wants() {
    if servers::installed("oidc-provider").is_none() {
        return;
    }
    let (key, other) = (Key::new(P256), Key::new(P256));
    for (wanted, right, wrong) in [
        (
            "issuer",
            AssertionAudience::Issuer,
            AssertionAudience::TokenEndpoint,
        ),
        (
            "token_endpoint",
            AssertionAudience::TokenEndpoint,
            AssertionAudience::Issuer,
        ),
    ] {
        let settings = json!({ "assertions": wanted });
        let Some(server) = start([key.client()], settings).await else {
            return;
        };
        let source = |audience| key.source(&server).assertion_audience(audience);
        let cache = TokenCache::new(source(right).build().unwrap());
        is_ours(&server, &cache).await;
        is_refused(source(wrong).build().unwrap()).await;
        is_refused(source(right).private_key(&*other.pem).build().unwrap()).await;
    }
}

/// The server accepts an assertion only once.
#[tokio::test]
async fn a_discovered_server_gets_an_assertion_for_every_token_request() {
    if servers::installed("oidc-provider").is_none() {
        return;
    }
    let key = Key::new(P256);
    let Some(server) = start([key.client()], json!({ "assertions": "issuer" })).await else {
        return;
    };
    let source = ClientCredentials::discover(&server.at.issuer, ID).private_key(&*key.jwk);
    let source = source.build().unwrap();
    for _ in 0..3 {
        source.fetch(Fetch::new()).await.unwrap();
    }
    let cache = TokenCache::new(source);
    let token = is_ours(&server, &cache).await;
    cache.shutdown_and_revoke().await.unwrap();
    assert_eq!(server.introspect(&token).await["active"], false);
}

#[tokio::test]
async fn a_secret_signs_an_assertion() {
    let client = json!({
        "client_secret": SECRET,
        "token_endpoint_auth_method": "client_secret_jwt",
    });
    let Some(server) = start([client], json!({ "assertions": "issuer" })).await else {
        return;
    };
    let source = |secret: &str| {
        let source = ClientCredentials::discover(&server.at.issuer, ID).client_secret(secret);
        source.auth_method(AuthMethod::ClientSecretJwt)
    };
    let cache = TokenCache::new(source(SECRET).build().unwrap());
    is_ours(&server, &cache).await;
    is_refused(source("another secret").build().unwrap()).await;
}
