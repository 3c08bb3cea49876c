//! How a client authenticates to its authorization server.

use base64::{Engine, engine::general_purpose::STANDARD};
use http::HeaderValue;
use oauth2::url::form_urlencoded;
use secrecy::SecretString;
use zeroize::Zeroizing;

#[cfg(feature = "jwt")]
use super::assertion;
use super::{
    credential::{Credential, CredentialValue},
    server::Endpoints,
};
use crate::error::{ConfigError, TokenError};

/// How a client authenticates to the token endpoint, by the names of the registry that RFC 7591 section 2 and RFC 8414
/// section 2 share.
///
/// A token request uses one of them (RFC 6749 section 2.3). Without
/// [`auth_method`](crate::ClientCredentialsBuilder::auth_method), it depends on what the builder was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum AuthMethod {
    /// `client_secret_basic`: id and secret in an `Authorization: Basic` header, each form-encoded first
    /// (RFC 6749 section 2.3.1).
    ///
    /// The default for a secret, unless the server's metadata say otherwise. A space is encoded as `%20`, since some
    /// servers take a `+` literally, and a `~` not at all, since some do not decode.
    #[default]
    ClientSecretBasic,
    /// `client_secret_post`: id and secret in the body, for servers that support nothing better.
    ClientSecretPost,
    /// `client_secret_jwt`: an assertion signed with the secret (RFC 7523 section 2.2), so that the secret itself
    /// is not sent.
    #[cfg(feature = "jwt")]
    ClientSecretJwt,
    /// `private_key_jwt`: an assertion signed with a private key (RFC 7523 section 2.2).
    ///
    /// The default for a private key.
    #[cfg(feature = "jwt")]
    PrivateKeyJwt,
    /// `tls_client_auth`: a client certificate signed by a trusted authority, and the id in the body (RFC 8705
    /// section 2.1).
    ///
    /// The default for a client certificate alone, unless the server's metadata say otherwise.
    TlsClientAuth,
    /// `self_signed_tls_client_auth`: a client certificate registered with the server, and the id in the body (RFC 8705
    /// section 2.2).
    SelfSignedTlsClientAuth,
    /// `none`: just the id in the body. The default without any credentials.
    None,
}

impl AuthMethod {
    fn name(self) -> &'static str {
        match self {
            Self::ClientSecretBasic => "client_secret_basic",
            Self::ClientSecretPost => "client_secret_post",
            #[cfg(feature = "jwt")]
            Self::ClientSecretJwt => "client_secret_jwt",
            #[cfg(feature = "jwt")]
            Self::PrivateKeyJwt => "private_key_jwt",
            Self::TlsClientAuth => "tls_client_auth",
            Self::SelfSignedTlsClientAuth => "self_signed_tls_client_auth",
            Self::None => "none",
        }
    }
}

/// How a client authenticates, and with what.
#[derive(Debug, Default)]
pub(super) struct ClientAuth {
    pub(super) method: Option<AuthMethod>,
    pub(super) secret: Option<Credential>,
    pub(super) raw_basic: bool,
    pub(super) private_key: Option<Credential>,
    #[cfg(feature = "jwt")]
    pub(super) assertion: assertion::Settings,
    pub(super) certificate: Option<Certificate>,
}

/// How a client of `oauth2` authenticates.
pub(super) struct OAuth2Auth {
    pub(super) secret: Option<SecretString>,
    /// Whether id and secret go into the body.
    pub(super) in_body: bool,
}

/// A client certificate and its key.
#[derive(Debug)]
pub(super) struct Certificate {
    pub(super) chain: Credential,
    pub(super) key: Credential,
}

impl ClientAuth {
    /// Takes over how a client of `oauth2` authenticates, unless something else was set.
    pub(super) fn inherit(&mut self, oauth2: OAuth2Auth) {
        let own_method = !matches!(
            self.method,
            None | Some(AuthMethod::ClientSecretBasic | AuthMethod::ClientSecretPost)
        );
        if !own_method && self.secret.is_none() && self.private_key.is_none() {
            self.secret = oauth2.secret.map(Credential::new);
        }
        if oauth2.in_body && self.secret.is_some() {
            self.method = self.method.or(Some(AuthMethod::ClientSecretPost));
        }
    }

    /// Whether requests go over a connection with a client certificate.
    pub(super) fn presents_certificate(&self) -> bool {
        self.certificate.is_some()
            || matches!(
                self.method,
                Some(AuthMethod::TlsClientAuth | AuthMethod::SelfSignedTlsClientAuth)
            )
    }

    /// Rejects contradictions and unusable constants. Does not ask for a certificate, which the transport may have.
    pub(super) fn check(&self, endpoints: Option<&Endpoints>) -> Result<(), ConfigError> {
        if self.method.is_none() && self.secret.is_some() && self.private_key.is_some() {
            return Err(ConfigError::new(
                "the client has both a secret and a private key, without an auth_method to choose between them",
            ));
        }
        let supported = endpoints.and_then(|endpoints| endpoints.auth_methods.as_deref());
        let method = self.method(supported).map_err(ConfigError::new)?;
        let needs = |credential: &Option<Credential>, name| match credential {
            Some(_) => Ok(()),
            None => Err(missing_setting(method, name)),
        };
        match method {
            AuthMethod::ClientSecretBasic | AuthMethod::ClientSecretPost => {
                needs(&self.secret, "client_secret")
            }
            #[cfg(feature = "jwt")]
            AuthMethod::ClientSecretJwt => {
                needs(&self.secret, "client_secret")?;
                self.assertion.check(None, endpoints)
            }
            #[cfg(feature = "jwt")]
            AuthMethod::PrivateKeyJwt => {
                needs(&self.private_key, "private_key")?;
                self.assertion.check(self.private_key.as_ref(), endpoints)
            }
            AuthMethod::None if self.secret.is_some() || self.private_key.is_some() => {
                Err(ConfigError::new(
                    "the client has a secret or a private key that auth_method does not use",
                ))
            }
            AuthMethod::TlsClientAuth | AuthMethod::SelfSignedTlsClientAuth | AuthMethod::None => {
                Ok(())
            }
        }
    }

    /// The certificate for a transport that has none of its own.
    #[cfg(feature = "rustls")]
    pub(super) fn certificate(&self) -> Result<Option<&Certificate>, ConfigError> {
        match (&self.certificate, self.method) {
            (None, Some(method)) if self.presents_certificate() => {
                Err(missing_setting(method, "client_certificate"))
            }
            (certificate, _) => Ok(certificate.as_ref()),
        }
    }

    /// Chooses the method, by what the server supports if that is known.
    pub(super) fn method(&self, supported: Option<&[String]>) -> Result<AuthMethod, &'static str> {
        if let Some(method) = self.method {
            return Ok(method);
        }
        #[cfg(feature = "jwt")]
        if self.private_key.is_some() {
            return Ok(AuthMethod::PrivateKeyJwt);
        }
        let supports = |method: AuthMethod| {
            supported.is_some_and(|names| names.iter().any(|name| name == method.name()))
        };
        if self.secret.is_some() {
            // RFC 8414 section 2: a missing list means `client_secret_basic`. One that names at most `none` was not
            // written with clients that have a secret in mind.
            let names_a_method =
                supported.is_some_and(|names| names.iter().any(|name| name != "none"));
            if !names_a_method {
                return Ok(AuthMethod::ClientSecretBasic);
            }
            return SECRET_METHODS
                .iter()
                .copied()
                .find(|method| supports(*method))
                .ok_or("the server supports no way to authenticate by a client secret");
        }
        if self.certificate.is_none() {
            return Ok(AuthMethod::None);
        }
        if supports(AuthMethod::SelfSignedTlsClientAuth) && !supports(AuthMethod::TlsClientAuth) {
            return Ok(AuthMethod::SelfSignedTlsClientAuth);
        }
        Ok(AuthMethod::TlsClientAuth)
    }

    /// Obtains the credentials that `method` needs.
    pub(super) async fn obtain(&self, method: AuthMethod) -> Result<Credentials, TokenError> {
        let key = match method {
            AuthMethod::ClientSecretBasic | AuthMethod::ClientSecretPost => &self.secret,
            #[cfg(feature = "jwt")]
            AuthMethod::ClientSecretJwt => &self.secret,
            #[cfg(feature = "jwt")]
            AuthMethod::PrivateKeyJwt => &self.private_key,
            AuthMethod::TlsClientAuth | AuthMethod::SelfSignedTlsClientAuth | AuthMethod::None => {
                &None
            }
        };
        let mut credentials = Credentials::default();
        if let Some(credential) = key {
            credentials.key = Some(credential.get().await?);
        }
        // With any method, since tokens can be bound to it (RFC 8705 section 3).
        if let Some(Certificate { chain, key }) = &self.certificate {
            credentials.certificate = Some((chain.get().await?, key.get().await?));
        }
        Ok(credentials)
    }

    /// Makes the authentication of one request.
    pub(super) fn authenticate(
        &self,
        method: AuthMethod,
        client_id: &str,
        credentials: &Credentials,
        endpoints: &Endpoints,
    ) -> Result<Authentication, ConfigError> {
        let text = credentials.key.as_ref().map_or("", CredentialValue::text);
        Ok(match method {
            AuthMethod::ClientSecretBasic => {
                Authentication::Header(basic(client_id, text, self.raw_basic))
            }
            AuthMethod::ClientSecretPost => {
                Authentication::Params(vec![("client_secret", text.into())])
            }
            #[cfg(feature = "jwt")]
            AuthMethod::ClientSecretJwt | AuthMethod::PrivateKeyJwt => {
                let key = match method {
                    AuthMethod::PrivateKeyJwt => assertion::Key::parse(text)?,
                    _ => assertion::Key::from_secret(text),
                };
                let assertion = self.assertion.sign(&key, client_id, endpoints)?;
                Authentication::Params(vec![
                    ("client_assertion_type", assertion::TYPE.into()),
                    ("client_assertion", assertion),
                ])
            }
            AuthMethod::TlsClientAuth | AuthMethod::SelfSignedTlsClientAuth | AuthMethod::None => {
                // Only assertions need them, for their audience.
                let _ = endpoints;
                Authentication::Params(Vec::new())
            }
        })
    }
}

/// What authenticates the client in a request.
pub(super) enum Authentication {
    /// The `Authorization` header, which includes the client's id.
    Header(HeaderValue),
    /// Parameters besides the client's id.
    Params(Vec<(&'static str, SecretString)>),
}

/// The credentials of one token request.
#[derive(Clone, Default)]
pub(super) struct Credentials {
    /// The secret or the private key.
    key: Option<CredentialValue>,
    pub(super) certificate: Option<(CredentialValue, CredentialValue)>,
}

impl Credentials {
    /// Makes the next token request obtain others.
    pub(super) fn refuse(&self) {
        self.iter().for_each(CredentialValue::refuse);
    }

    /// Makes the next token request obtain others, if there are any.
    pub(super) fn doubt(&self) {
        self.iter().for_each(CredentialValue::doubt);
    }

    /// Makes the next token request obtain another certificate, if there is one.
    #[cfg(feature = "rustls")]
    pub(super) fn doubt_certificate(&self) {
        self.certificates().for_each(CredentialValue::doubt);
    }

    pub(super) fn same_text(&self, other: &Self) -> bool {
        self.iter()
            .map(CredentialValue::text)
            .eq(other.iter().map(CredentialValue::text))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &CredentialValue> {
        self.key.iter().chain(self.certificates())
    }

    /// The chain and its key.
    fn certificates(&self) -> impl Iterator<Item = &CredentialValue> {
        let pair = self.certificate.iter();
        pair.flat_map(|(chain, key)| [chain, key])
    }
}

fn missing_setting(method: AuthMethod, setting: &str) -> ConfigError {
    let method = method.name();
    ConfigError::new(format!("the auth_method {method} needs a {setting}"))
}

/// The header of RFC 6749 section 2.3.1.
fn basic(client_id: &str, secret: &str, raw: bool) -> HeaderValue {
    // Each string is made in its full size, since one that grows leaves copies behind.
    let pair = Zeroizing::new(if raw {
        [client_id, ":", secret].concat()
    } else {
        [&form_encoded(client_id), ":", &form_encoded(secret)].concat()
    });
    let pair = Zeroizing::new(STANDARD.encode(&*pair));
    let value = Zeroizing::new(["Basic ", &pair].concat());
    let mut value = HeaderValue::from_str(&value).expect("base64 fits into a header");
    value.set_sensitive(true);
    value
}

/// RFC 6749 appendix B, but for what all decoders read alike: a space as `%20`, since URL decoders take a `+` literally,
/// and a `~` as it is, so that servers that do not decode understand all of RFC 3986's unreserved characters.
fn form_encoded(text: &str) -> Zeroizing<String> {
    let parts = form_urlencoded::byte_serialize(text.as_bytes());
    let mut encoded = Zeroizing::new(String::with_capacity(3 * text.len()));
    encoded.extend(parts.map(|part| match part {
        "+" => "%20",
        "%7E" => "~",
        part => part,
    }));
    encoded
}

/// In order of preference.
const SECRET_METHODS: &[AuthMethod] = &[
    AuthMethod::ClientSecretBasic,
    AuthMethod::ClientSecretPost,
    #[cfg(feature = "jwt")]
    AuthMethod::ClientSecretJwt,
];
