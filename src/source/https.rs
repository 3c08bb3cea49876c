//! The default transport to the token endpoint: hyper over rustls.

use std::{sync::Arc, time::Duration};

use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use secrecy::{ExposeSecret, SecretString};

use super::{response::BYTE_ORDER_MARK, transport::Transport};
use crate::{error::ConfigError, sync::Mutex};

/// What the default client is made of.
pub(super) struct Settings {
    pub(super) connect_timeout: Duration,
    /// PEM files of roots to trust beside the system's.
    pub(super) roots: Vec<Vec<u8>>,
}

impl Settings {
    /// Makes what makes clients; with TLS if they are to speak to an `https` URL, or may come to.
    pub(super) fn dialer(&self, tls: Tls) -> Result<Dialer, ConfigError> {
        // Plain http must work where there are no roots, and reading the system's takes a while.
        let roots = match tls {
            Tls::Needed | Tls::Possible => self.trusted_roots()?,
            Tls::Unused => RootCertStore::empty(),
        };
        if roots.is_empty() && matches!(tls, Tls::Needed) {
            return Err(ConfigError::new(
                "the system trusts no root certificate and none was added",
            ));
        }
        Ok(Dialer {
            connect_timeout: self.connect_timeout,
            roots: Arc::new(roots),
        })
    }

    fn trusted_roots(&self) -> Result<RootCertStore, ConfigError> {
        let mut roots = RootCertStore::empty();
        // One broken file in the system's store does not spoil the others.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        for pem in &self.roots {
            add_pem(&mut roots, pem)?;
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

/// Makes clients that open a connection for each request.
///
/// A token every five minutes gains nothing from a pool, and a pooled connection is wedged when the
/// runtime that drives it is parked.
#[derive(Clone)]
pub(super) struct Dialer {
    connect_timeout: Duration,
    roots: Arc<RootCertStore>,
}

impl Dialer {
    /// Makes a client that presents `certificate`: a chain and its key, both in PEM.
    pub(super) fn transport(
        &self,
        certificate: Option<(&str, &str)>,
    ) -> Result<Transport, ConfigError> {
        let mut tcp = HttpConnector::new();
        tcp.set_connect_timeout(Some(self.connect_timeout));
        tcp.enforce_http(false);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(self.tls(certificate)?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(0)
            // How often to try is for the cache to decide.
            .retry_canceled_requests(false)
            .build(connector);
        Ok(Transport::new(client))
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
        // PEM errors quote the text they stumbled over.
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

/// The client that presents a certificate, made anew when that has changed.
///
/// It keeps no connection, so a new client is all that a new certificate takes.
pub(super) struct Mutual {
    dialer: Dialer,
    last: Mutex<Option<Presenting>>,
}

struct Presenting {
    chain: SecretString,
    key: SecretString,
    transport: Transport,
}

impl Mutual {
    pub(super) fn new(dialer: Dialer) -> Self {
        Self {
            dialer,
            last: Mutex::new(None),
        }
    }

    pub(super) fn transport(&self, chain: &str, key: &str) -> Result<Transport, ConfigError> {
        let mut last = self.last.lock();
        if let Some(last) = &*last {
            if last.chain.expose_secret() == chain && last.key.expose_secret() == key {
                return Ok(last.transport.clone());
            }
        }
        let transport = self.dialer.transport(Some((chain, key)))?;
        *last = Some(Presenting {
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

/// Unlike the system's roots these were named one by one, so each has to be good.
fn add_pem(roots: &mut RootCertStore, pem: &[u8]) -> Result<(), ConfigError> {
    let before = roots.len();
    let pem = pem.strip_prefix(BYTE_ORDER_MARK).unwrap_or(pem);
    for certificate in CertificateDer::pem_slice_iter(pem) {
        // PEM errors quote the text they stumbled over, which may be the key of a bundle.
        let certificate =
            certificate.map_err(|_| ConfigError::new("a root certificate is not valid PEM"))?;
        roots.add(certificate).map_err(|error| {
            ConfigError::new("a root certificate cannot be used").with_source(error)
        })?;
    }
    if roots.len() == before {
        return Err(ConfigError::new("a root certificate file holds none"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
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

    /// A parser passes over a certificate that does not begin its line.
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
        let dialer = Settings::default().dialer(Tls::Unused).unwrap();
        assert!(dialer.transport(None).is_ok());
    }
}
