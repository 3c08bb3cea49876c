//! Why a connection to the authorization server failed, in words known to hold no secret.
//!
//! A client's error messages may hold one, so its errors are told apart by type.

use std::{
    borrow::Cow,
    error::Error,
    io::{self, ErrorKind},
};

use super::{Kind, TokenError};

impl TokenError {
    pub(super) fn connection_cause(&self) -> Option<Cow<'static, str>> {
        match self.0.kind {
            Kind::Transport => self.sources().find_map(connection_cause),
            #[cfg(feature = "rustls")]
            Kind::Timeout => {
                let client = |error: &(dyn Error + 'static)| {
                    error
                        .downcast_ref::<hyper_util::client::legacy::Error>()
                        .is_some_and(|error| error.is_connect())
                };
                self.sources().any(client).then_some("no connection".into())
            }
            _ => None,
        }
    }

    /// Whether the server may not accept the client's certificate, or no longer: it ended the TLS connection with an
    /// alert (RFC 8446 section 6.2).
    #[cfg(feature = "rustls")]
    pub(crate) fn may_be_of_certificate(&self) -> bool {
        let alert = |error: &rustls::Error| matches!(error, rustls::Error::AlertReceived(_));
        let io_errors = self.sources().filter_map(|error| error.downcast_ref());
        self.is_transport() && io_errors.filter_map(tls_error).any(alert)
    }

    fn sources(&self) -> impl Iterator<Item = &(dyn Error + 'static)> {
        std::iter::successors(Error::source(self), |&error| error.source())
    }
}

fn connection_cause(error: &(dyn Error + 'static)) -> Option<Cow<'static, str>> {
    #[cfg(feature = "rustls")]
    if let Some(error) = error.downcast_ref::<hyper::Error>() {
        if error.is_incomplete_message() {
            return Some("connection closed".into());
        }
        if error.is_parse() {
            return Some("invalid HTTP".into());
        }
    }
    #[cfg(feature = "rustls")]
    if let Some(Unresolved(error)) = error.downcast_ref() {
        return io_cause(error).or(Some("host name not resolved".into()));
    }
    io_cause(error.downcast_ref()?)
}

fn io_cause(error: &io::Error) -> Option<Cow<'static, str>> {
    let words = match error.kind() {
        ErrorKind::ConnectionRefused => "connection refused",
        ErrorKind::ConnectionReset => "connection reset",
        ErrorKind::ConnectionAborted => "connection aborted",
        ErrorKind::HostUnreachable => "host unreachable",
        ErrorKind::NetworkUnreachable => "network unreachable",
        ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe => "connection closed",
        _ => {
            #[cfg(feature = "rustls")]
            if let Some(error) = tls_error(error) {
                return Some(tls_cause(error));
            }
            // An I/O error inside another is not among its sources.
            return match error.get_ref() {
                Some(inner) => io_cause(inner.downcast_ref()?),
                // The system's own message, such as for too many open files.
                None => error.raw_os_error().map(|_| error.to_string().into()),
            };
        }
    };
    Some(words.into())
}

/// Alert names are the registered ones, or numbers.
#[cfg(feature = "rustls")]
fn tls_cause(error: &rustls::Error) -> Cow<'static, str> {
    use rustls::{CertificateError as Bad, Error};
    let words = match error {
        Error::AlertReceived(alert) => return format!("TLS alert {alert:?}").into(),
        Error::InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. }) => {
            "certificate expired"
        }
        Error::InvalidCertificate(Bad::NotValidYet | Bad::NotValidYetContext { .. }) => {
            "certificate not valid yet"
        }
        Error::InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. }) => {
            "certificate of another host"
        }
        Error::InvalidCertificate(Bad::UnknownIssuer) => "certificate of an unknown issuer",
        Error::InvalidCertificate(_) => "certificate not accepted",
        _ => "no TLS connection",
    };
    words.into()
}

/// Marks a resolver's error, which does not say itself what it is about.
#[cfg(feature = "rustls")]
#[derive(Debug, thiserror::Error)]
#[error("the host name could not be resolved")]
pub(crate) struct Unresolved(#[source] pub(crate) io::Error);

#[cfg(feature = "rustls")]
fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    let inner = error.get_ref()?;
    inner
        .downcast_ref()
        .or_else(|| tls_error(inner.downcast_ref()?))
}

#[cfg(test)]
mod tests {
    #[cfg(feature = "rustls")]
    use std::sync::Arc;

    use super::*;

    fn shown(error: io::Error) -> String {
        let error = TokenError::new(Kind::Transport).with_source(error);
        let text = error.to_string();
        text.replace("the token endpoint could not be reached", "")
    }

    #[test]
    fn a_connection_failure_is_described_only_in_the_systems_words() {
        let of_system = shown(io::Error::from_raw_os_error(22));
        assert!(of_system.contains("22"), "{of_system}");
        assert_eq!(shown(io::Error::other("CANARY")), "");
        let inner = io::Error::from(ErrorKind::ConnectionReset);
        assert_eq!(shown(io::Error::other(inner)), " (connection reset)");
    }

    #[cfg(feature = "rustls")]
    #[test]
    fn a_certificate_failure_is_described() {
        use rustls::{AlertDescription, CertificateError as Bad, Error, OtherError};
        let canary = OtherError(Arc::new(io::Error::other("CANARY")));
        for (error, expected) in [
            (Bad::Expired.into(), " (certificate expired)"),
            (Bad::NotValidYet.into(), " (certificate not valid yet)"),
            (Bad::Other(canary).into(), " (certificate not accepted)"),
            (
                Error::AlertReceived(AlertDescription::CertificateRequired),
                " (TLS alert CertificateRequired)",
            ),
            (Error::General("CANARY".to_owned()), " (no TLS connection)"),
        ] {
            assert_eq!(shown(io::Error::other(error)), expected);
        }
    }
}
