//! Clients that authenticate by a certificate (RFC 8705), at the server's endpoint for them.

use base64::{Engine, engine::general_purpose::STANDARD, engine::general_purpose::URL_SAFE_NO_PAD};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    IsCa, KeyPair, PublicKeyData,
};

use super::*;

/// Signs the certificates of the server and of clients.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    /// Each needs its own name: a server ends the handshake over a known name with another key.
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// A certificate for a host of this name, and its key.
    fn sign(&self, name: &str) -> (Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let certificate = params(name).signed_by(&key, &self.0).unwrap();
        (certificate, key)
    }

    /// Makes a server speak TLS.
    fn settings(&self) -> Value {
        let (certificate, key) = self.sign("localhost");
        json!({ "tls": {
            "key": key.serialize_pem(),
            "cert": certificate.pem(),
            "ca": self.0.pem(),
        }})
    }

    fn source(&self, server: &Server) -> ClientCredentialsBuilder {
        ClientCredentials::discover(&server.at.issuer, ID).root_certificates(self.0.pem())
    }
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new([name.to_owned()]).unwrap();
    params.distinguished_name = DistinguishedName::new();
    let subject = &mut params.distinguished_name;
    subject.push(DnType::OrganizationName, "Example");
    subject.push(DnType::CommonName, name);
    params
}

fn self_signed(name: &str) -> (Certificate, KeyPair) {
    let key = KeyPair::generate().unwrap();
    (params(name).self_signed(&key).unwrap(), key)
}

fn with(
    source: ClientCredentialsBuilder,
    (certificate, key): &(Certificate, KeyPair),
) -> ClientCredentials {
    let source = source.client_certificate(certificate.pem(), key.serialize_pem());
    source.build().unwrap()
}

/// RFC 8705 section 2.1.
#[tokio::test]
async fn a_certificate_with_the_registered_subject_proves_the_identity() {
    let (authority, stranger) = (Authority::new("ours"), Authority::new("another"));
    let right = authority.sign("client.example");
    for (property, subject) in [
        ("tls_client_auth_san_dns", "client.example"),
        ("tls_client_auth_subject_dn", "CN=client.example,O=Example"),
    ] {
        let client = json!({
            "token_endpoint_auth_method": "tls_client_auth",
            property: subject,
        });
        let Some(server) = start([client], authority.settings()).await else {
            return;
        };
        let source = || authority.source(&server);
        is_ours(&server, &TokenCache::new(with(source(), &right))).await;
        is_refused(with(source(), &authority.sign("another.example"))).await;
        is_refused(with(source(), &stranger.sign("client.example"))).await;
        is_refused(source().auth_method(AuthMethod::None).build().unwrap()).await;
    }
}

/// RFC 8705 section 2.2.
#[tokio::test]
async fn a_registered_certificate_proves_the_identity() {
    let authority = Authority::new("ours");
    let right = self_signed("client.example");
    // The uncompressed point of a P-256 key: SEC 1 section 2.3.3.
    let (x, y) = right.1.der_bytes()[1..].split_at(32);
    let client = json!({
        "token_endpoint_auth_method": "self_signed_tls_client_auth",
        "jwks": { "keys": [{
            "kty": "EC",
            "crv": "P-256",
            "x": URL_SAFE_NO_PAD.encode(x),
            "y": URL_SAFE_NO_PAD.encode(y),
            "x5c": [STANDARD.encode(right.0.der())],
        }]},
    });
    let Some(server) = start([client], authority.settings()).await else {
        return;
    };
    let source = || {
        let source = authority.source(&server);
        source.auth_method(AuthMethod::SelfSignedTlsClientAuth)
    };
    is_ours(&server, &TokenCache::new(with(source(), &right))).await;
    is_refused(with(source(), &self_signed("client.example"))).await;
}
