//! The default transport to the token endpoint: hyper over rustls.

use std::{sync::Arc, time::Duration};

use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, pem::PemObject};

use super::transport::Transport;
use crate::error::ConfigError;

/// What the default client is made of.
pub(super) struct Settings {
    pub(super) connect_timeout: Duration,
    /// PEM files of roots to trust beside the system's.
    pub(super) roots: Vec<Vec<u8>>,
}

impl Settings {
    /// Makes a client that opens a connection for each request.
    ///
    /// A token every five minutes gains nothing from a pool, and a pooled connection is wedged when the
    /// runtime that drives it is parked.
    pub(super) fn transport(&self, uses_tls: bool) -> Result<Transport, ConfigError> {
        let mut tcp = HttpConnector::new();
        tcp.set_connect_timeout(Some(self.connect_timeout));
        tcp.enforce_http(false);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(self.tls(uses_tls)?)
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

    fn tls(&self, uses_tls: bool) -> Result<ClientConfig, ConfigError> {
        // Plain http must work where there are no roots, and reading the system's takes a while.
        let roots = if uses_tls {
            self.trusted_roots()?
        } else {
            RootCertStore::empty()
        };
        // By name: the process default may be unset, and asking for it panics.
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| ConfigError::new("TLS cannot be set up").with_source(error))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(config)
    }

    fn trusted_roots(&self) -> Result<RootCertStore, ConfigError> {
        let mut roots = RootCertStore::empty();
        // One broken file in the system's store does not spoil the others.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        for pem in &self.roots {
            add_pem(&mut roots, pem)?;
        }
        if roots.is_empty() {
            return Err(ConfigError::new(
                "the system trusts no root certificate and none was added",
            ));
        }
        Ok(roots)
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

    #[test]
    fn plain_http_needs_no_roots() {
        assert!(Settings::default().transport(false).is_ok());
    }
}
