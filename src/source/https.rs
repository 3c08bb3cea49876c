//! The default transport to the token endpoint: hyper over rustls.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request, header::USER_AGENT};
use http_body_util::Full;
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{
    client::legacy::{
        Client,
        connect::{HttpConnector, dns::GaiResolver},
    },
    rt::TokioExecutor,
};
use rustls::{ClientConfig, RootCertStore};
use rustls_native_certs::{CertificateResult, ErrorKind, load_native_certs};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use secrecy::{ExposeSecret, SecretString};
use tower::ServiceExt;

use super::{auth::Certificate, response::without_bom, transport::Transport};
use crate::{
    error::{ConfigError, Unresolved},
    sync::Mutex,
};

/// The settings of the default client.
pub(super) struct Settings {
    pub(super) connect_timeout: Duration,
    /// PEM files of roots to trust besides the system's.
    pub(super) roots: Vec<Vec<u8>>,
}

impl Settings {
    /// Reads the roots if there are `https` URLs, or may be.
    pub(super) fn factory(&self, tls: Tls) -> Result<TransportFactory, ConfigError> {
        // Plain http must work where there are no roots, and reading the system's takes a while.
        let roots = match tls {
            Tls::Needed | Tls::Possible => self.trusted_roots(tls, load_native_certs())?,
            Tls::Unused => RootCertStore::empty(),
        };
        Ok(TransportFactory {
            connect_timeout: self.connect_timeout,
            roots: Arc::new(roots),
        })
    }

    fn trusted_roots(
        &self,
        tls: Tls,
        native: CertificateResult,
    ) -> Result<RootCertStore, ConfigError> {
        let mut roots = RootCertStore::empty();
        // A broken file in the system's store must not spoil the others.
        roots.add_parsable_certificates(native.certs);
        for pem in &self.roots {
            add_pem(&mut roots, pem)?;
        }
        if roots.is_empty() && matches!(tls, Tls::Needed) {
            return Err(no_roots(native.errors));
        }
        Ok(roots)
    }
}

/// Whether there will be `https` URLs.
#[derive(Clone, Copy)]
pub(super) enum Tls {
    Needed,
    /// The server has yet to say where its endpoints are.
    Possible,
    Unused,
}

/// Makes transports that open a connection for each request.
///
/// A token every five minutes gains nothing from a pool, and a pooled connection hangs when the runtime that drives it
/// is parked.
#[derive(Clone)]
pub(super) struct TransportFactory {
    connect_timeout: Duration,
    roots: Arc<RootCertStore>,
}

impl TransportFactory {
    /// Makes a transport that presents `certificate`: a chain and its key, both in PEM.
    pub(super) fn transport(
        &self,
        certificate: Option<(&str, &str)>,
    ) -> Result<Transport, ConfigError> {
        let resolver = GaiResolver::new().map_err(Unresolved);
        let mut tcp = HttpConnector::new_with_resolver(resolver);
        tcp.set_connect_timeout(Some(self.connect_timeout));
        tcp.enforce_http(false);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(self.tls(certificate)?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(0)
            // Retries are up to the cache.
            .retry_canceled_requests(false)
            .build(connector);
        let named = client.map_request(|mut request: Request<Full<Bytes>>| {
            request.headers_mut().insert(USER_AGENT, AGENT);
            request
        });
        Ok(Transport::new(named))
    }

    fn tls(&self, certificate: Option<(&str, &str)>) -> Result<ClientConfig, ConfigError> {
        // By name: the process default may be unset, and asking for it panics.
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| ConfigError::new("TLS cannot be set up").with_source(error))?
            .with_root_certificates(self.roots.clone());
        let Some((chain, key)) = certificate else {
            return Ok(config.with_no_client_auth());
        };
        // PEM errors quote the text they fail on.
        let chain = CertificateDer::pem_slice_iter(chain.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .ok()
            .filter(|chain| !chain.is_empty())
            .ok_or_else(|| ConfigError::new("the client certificate is not valid PEM"))?;
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|_| {
            ConfigError::new("the client certificate's key is not valid PEM, or is encrypted")
        })?;
        config.with_client_auth_cert(chain, key).map_err(|error| {
            ConfigError::new("the client certificate cannot be used with its key")
                .with_source(error)
        })
    }
}

/// Firewalls refuse requests without a user agent: the core rules of AWS WAF, for example.
const AGENT: HeaderValue =
    HeaderValue::from_static(concat!("tower-bearer/", env!("CARGO_PKG_VERSION")));

/// The transport that presents a certificate, made anew when that has changed.
///
/// It keeps no connection, so a new transport is all that a new certificate needs.
pub(super) struct MutualTls {
    factory: TransportFactory,
    cached: Mutex<Option<CachedTransport>>,
}

struct CachedTransport {
    chain: SecretString,
    key: SecretString,
    transport: Transport,
}

impl MutualTls {
    /// Tries a constant certificate at once: it works now or never.
    pub(super) fn new(
        factory: TransportFactory,
        certificate: &Certificate,
    ) -> Result<Self, ConfigError> {
        let mutual_tls = Self {
            factory,
            cached: Mutex::new(None),
        };
        let Certificate { chain, key } = certificate;
        if let (Some(chain), Some(key)) = (chain.constant(), key.constant()) {
            mutual_tls.transport(chain.expose_secret(), key.expose_secret())?;
        }
        Ok(mutual_tls)
    }

    pub(super) fn transport(&self, chain: &str, key: &str) -> Result<Transport, ConfigError> {
        let mut cached = self.cached.lock();
        if let Some(cached) = &*cached {
            if cached.chain.expose_secret() == chain && cached.key.expose_secret() == key {
                return Ok(cached.transport.clone());
            }
        }
        let transport = self.factory.transport(Some((chain, key)))?;
        *cached = Some(CachedTransport {
            chain: chain.into(),
            key: key.into(),
            transport: transport.clone(),
        });
        Ok(transport)
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(3),
            roots: Vec::new(),
        }
    }
}

/// The system's store may be empty or unreadable: `SSL_CERT_FILE` may name a missing file.
fn no_roots(problems: Vec<rustls_native_certs::Error>) -> ConfigError {
    let error = ConfigError::new("the system trusts no root certificate and none was added");
    match problems.into_iter().next() {
        // PEM errors quote the text they fail on.
        Some(problem) if matches!(problem.kind, ErrorKind::Pem(_)) => {
            error.with_source(problem.context)
        }
        Some(problem) => error.with_source(problem),
        None => error,
    }
}

/// Unlike the system's roots, these were chosen one by one, so each has to be usable.
fn add_pem(roots: &mut RootCertStore, pem: &[u8]) -> Result<(), ConfigError> {
    let before = roots.len();
    for (certificate, number) in CertificateDer::pem_slice_iter(without_bom(pem)).zip(1..) {
        // PEM errors quote the text they fail on, which may be the key of a bundle.
        let certificate = certificate.map_err(|_| {
            ConfigError::new(format!("root certificate {number} of its PEM is malformed"))
        })?;
        roots.add(certificate).map_err(|error| {
            ConfigError::new(format!(
                "root certificate {number} of its PEM cannot be used"
            ))
            .with_source(error)
        })?;
    }
    if roots.len() == before {
        return Err(ConfigError::new(
            "the PEM that was added holds no root certificate",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{error::Error, path::Path};

    use rustls_native_certs::load_certs_from_paths;

    use super::*;

    #[test]
    fn roots_that_cannot_be_used_are_refused() {
        for pem in [
            "",
            "no pem at all",
            "-----BEGIN CERTIFICATE-----\n%%%\n-----END CERTIFICATE-----\n",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ] {
            let result = add_pem(&mut RootCertStore::empty(), pem.as_bytes());
            assert!(result.is_err(), "{pem}");
        }
    }

    /// Nobody finds one among hundreds by trial.
    #[test]
    fn a_root_that_cannot_be_used_is_named_by_its_number() {
        let good = rcgen::generate_simple_self_signed([]).unwrap().cert.pem();
        for bad in ["AAAA", "%%%"] {
            let pem =
                format!("{good}-----BEGIN CERTIFICATE-----\n{bad}\n-----END CERTIFICATE-----\n");
            let error = add_pem(&mut RootCertStore::empty(), pem.as_bytes()).unwrap_err();
            assert!(
                error.to_string().starts_with("root certificate 2 "),
                "{error}"
            );
        }
    }

    #[test]
    fn the_error_for_missing_system_roots_names_the_cause() {
        let native = |file| load_certs_from_paths(Some(Path::new(file)), None);
        let missing = native("/no/such/file");
        let trust = |native| Settings::default().trusted_roots(Tls::Needed, native);
        let error = trust(missing).unwrap_err();
        let source = error.source().unwrap().to_string();
        assert!(source.contains("/no/such/file"), "{source}");
        // This one can be read, and holds none.
        assert!(trust(native("Cargo.toml")).unwrap_err().source().is_none());

        let missing = native("/no/such/file");
        assert!(
            Settings::default()
                .trusted_roots(Tls::Possible, missing)
                .is_ok()
        );
    }

    /// The parser skips a certificate that does not begin its line.
    #[test]
    fn a_byte_order_mark_hides_no_root() {
        let certified = rcgen::generate_simple_self_signed([]).unwrap();
        let pem = format!("\u{feff}{}", certified.cert.pem());
        let mut roots = RootCertStore::empty();
        add_pem(&mut roots, pem.as_bytes()).unwrap();
        assert_eq!(roots.len(), 1);
    }

    #[test]
    fn plain_http_needs_no_roots() {
        let factory = Settings::default().factory(Tls::Unused).unwrap();
        assert!(factory.transport(None).is_ok());
    }
}
