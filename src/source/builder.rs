//! The settings of [`ClientCredentials`], checked before anything is sent.

#[cfg(feature = "rustls")]
use std::time::Duration;
use std::{fmt, sync::Arc};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Full;
use oauth2::TokenUrl;
#[cfg(feature = "rustls")]
use oauth2::url::Url;
use tower_service::Service;

#[cfg(feature = "jwt")]
use super::assertion::{AssertionAudience, SigningAlgorithm};
use super::{
    AuthMethod, ClientCredentials, Credential,
    auth::{ClientAuth, OAuth2Auth},
    client_credentials::Inner,
    discovery::{Discovery, Issuer},
    params::{RequestParams, pairs, param_names},
    refused::Refused,
    server::{Endpoints, Server, check_url, parse_url},
    transport::Transport,
};
#[cfg(feature = "rustls")]
use super::{auth::Certificate, https};
use crate::error::{BoxError, ConfigError};

/// How to find the token endpoint.
pub(super) enum Target {
    TokenUrl(String),
    Issuer(String),
}

/// Builds [`ClientCredentials`].
///
/// Made by [`ClientCredentials::builder`], [`ClientCredentials::discover`] and
/// [`ClientCredentials::from_oauth2`]. Whatever is wrong with a setting is reported by `build` or
/// [`build_with`](Self::build_with).
#[must_use = "a builder does nothing until it is built"]
pub struct ClientCredentialsBuilder {
    client_id: String,
    target: Target,
    auth: ClientAuth,
    oauth2: Option<OAuth2Auth>,
    #[cfg(feature = "jwt")]
    issuer: Option<String>,
    scopes: Vec<String>,
    resources: Vec<String>,
    params: Vec<(String, String)>,
    revocation_url: Option<String>,
    plain_http: bool,
    #[cfg(feature = "rustls")]
    https: https::Settings,
}

impl ClientCredentialsBuilder {
    pub(super) fn new(client_id: String, target: Target) -> Self {
        Self {
            client_id,
            target,
            auth: ClientAuth::default(),
            oauth2: None,
            #[cfg(feature = "jwt")]
            issuer: None,
            scopes: Vec::new(),
            resources: Vec::new(),
            params: Vec::new(),
            revocation_url: None,
            plain_http: false,
            #[cfg(feature = "rustls")]
            https: https::Settings::default(),
        }
    }

    /// Sets how to authenticate unless the builder is given something else.
    pub(super) fn inherit(mut self, oauth2: OAuth2Auth) -> Self {
        self.oauth2 = Some(oauth2);
        self
    }

    /// Sets the client's secret: its text, or a [`Credential`] that says where it comes from.
    ///
    /// It is never printed. Text is held in memory for as long as the source lives.
    pub fn client_secret(mut self, secret: impl Into<Credential>) -> Self {
        self.auth.secret = Some(secret.into());
        self
    }

    /// Sets how the client authenticates.
    ///
    /// By default it depends on what the builder is given, see [`AuthMethod`], or is that of the client given to
    /// [`ClientCredentials::from_oauth2`].
    pub fn auth_method(mut self, method: AuthMethod) -> Self {
        self.auth.method = Some(method);
        self
    }

    /// Sends id and secret unencoded in [`AuthMethod::ClientSecretBasic`], for servers that do not decode them. Off by
    /// default.
    ///
    /// RFC 6749 section 2.3.1 wants them form-encoded, and most servers decode them. It makes no difference if they
    /// consist of letters, digits and `*-._~`.
    pub fn raw_basic_credentials(mut self, raw: bool) -> Self {
        self.auth.raw_basic = raw;
        self
    }

    /// Sets the private key that signs the client's assertions, for [`AuthMethod::PrivateKeyJwt`].
    ///
    /// RSA of 2048 to 8192 bits, P-256, P-384 or Ed25519; in PEM (PKCS#8, PKCS#1 or SEC 1, not encrypted) or as a
    /// private JWK (RFC 7517), whose `kid` and `alg` are used. A new assertion is signed for each token request, and is
    /// valid for 60 s.
    #[cfg(feature = "jwt")]
    pub fn private_key(mut self, key: impl Into<Credential>) -> Self {
        self.auth.private_key = Some(key.into());
        self
    }

    /// Sets the `kid` of client assertions, by which the server finds the public key. None by default, or that of
    /// the JWK.
    #[cfg(feature = "jwt")]
    pub fn key_id(mut self, kid: impl Into<String>) -> Self {
        self.auth.assertion.key_id = Some(kid.into());
        self
    }

    /// Sets the `x5t#S256` of client assertions, by which the server finds the certificate of the public key: the
    /// base64url-encoded SHA-256 hash of its DER form (RFC 7515 section 4.1.8). None by default.
    #[cfg(feature = "jwt")]
    pub fn certificate_thumbprint(mut self, x5t_s256: impl Into<String>) -> Self {
        self.auth.assertion.thumbprint = Some(x5t_s256.into());
        self
    }

    /// Sets the algorithm that client assertions are signed with. By default it follows from the key, see
    /// [`SigningAlgorithm`].
    #[cfg(feature = "jwt")]
    pub fn signing_algorithm(mut self, algorithm: SigningAlgorithm) -> Self {
        self.auth.assertion.algorithm = Some(algorithm);
        self
    }

    /// Sets whom client assertions are addressed to, the issuer by default.
    #[cfg(feature = "jwt")]
    pub fn assertion_audience(mut self, audience: AssertionAudience) -> Self {
        self.auth.assertion.audience = audience;
        self
    }

    /// Sets the issuer identifier of the authorization server (RFC 8414 section 2), which client assertions are
    /// addressed to. It is used exactly as given.
    #[cfg(feature = "jwt")]
    pub fn issuer(mut self, issuer: impl Into<String>) -> Self {
        self.issuer = Some(issuer.into());
        self
    }

    /// Sets the certificate that the default client presents to the server, for [`AuthMethod::TlsClientAuth`] or beside
    /// another method (RFC 8705): its chain, the certificate itself first, and its key, in PEM (PKCS#8, PKCS#1 or SEC
    /// 1, not encrypted).
    ///
    /// They are read for every token request, and have to match. If they do not, they are read once more, since they
    /// may have been replaced between the two reads. If they still do not match, because only one of them has been
    /// replaced so far, the attempt fails; the next one follows as soon as the files have changed, or when it is due.
    #[cfg(feature = "rustls")]
    pub fn client_certificate(
        mut self,
        certificates: impl Into<Credential>,
        key: impl Into<Credential>,
    ) -> Self {
        self.auth.certificate = Some(Certificate {
            chain: certificates.into(),
            key: key.into(),
        });
        self
    }

    /// Adds a scope to ask for, or several with a space between them (RFC 6749 section 3.3).
    ///
    /// Without any, the server chooses.
    pub fn scope(mut self, scope: impl Into<String>) -> Self {
        self.scopes.push(scope.into());
        self
    }

    /// Adds scopes to ask for, as [`scope`](Self::scope) does one by one.
    pub fn scopes<I>(mut self, scopes: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        self.scopes.extend(scopes.into_iter().map(Into::into));
        self
    }

    /// Adds a resource for which the token is to be valid, an absolute URI without a fragment (RFC 8707 section 2).
    ///
    /// Several may be added. Without any, the server chooses.
    pub fn resource(mut self, uri: impl Into<String>) -> Self {
        self.resources.push(uri.into());
        self
    }

    /// Adds a parameter to the body of every token request, such as `audience`.
    ///
    /// The same name may be added more than once, for servers that allow it. The value is never printed. The value
    /// of a parameter `resource` may be any text, since Entra ID's first endpoint and AD FS do not want a URI there.
    ///
    /// Claims that an API demands in a 401, as in continuous access evaluation, are requested in addition to those of a
    /// parameter `claims`. Entra ID demands claims only of clients that declare by this parameter that they can handle
    /// it: `.param("claims", r#"{"access_token":{"xms_cc":{"values":["cp1"]}}}"#)`.
    pub fn param(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.params.push((name.into(), value.into()));
        self
    }

    /// Sets where tokens are revoked (RFC 7009). By default it comes from the metadata of a
    /// [discovered](ClientCredentials::discover) server; without either, tokens cannot be revoked.
    pub fn revocation_url(mut self, url: impl Into<String>) -> Self {
        self.revocation_url = Some(url.into());
        self
    }

    /// Sets how long the default client tries to open a TCP connection: default 3 s.
    ///
    /// The addresses of a host are tried one after the other, each for an equal share of this time: six addresses for
    /// 500 ms each. IPv4 and IPv6 are tried in parallel, the second of them after 300 ms, and each has the whole time
    /// for its own addresses.
    ///
    /// The look-up of the name, the TLS handshake and the answer are bounded by the timeout of the whole attempt, 10 s
    /// in the cache. [`build_with`](Self::build_with) ignores this.
    #[cfg(feature = "rustls")]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.https.connect_timeout = timeout;
        self
    }

    /// Adds root certificates, in PEM, to those of the system that the default client trusts.
    ///
    /// All of them are read once, when the source is built. A self-signed certificate is accepted as a server's
    /// only if it is not marked as an authority's (`CA:TRUE`); `openssl req -x509` marks it so by default.
    /// [`build_with`](Self::build_with) ignores this.
    #[cfg(feature = "rustls")]
    pub fn root_certificates(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.https.roots.push(pem.into());
        self
    }

    /// Allows plain `http` on any host for the token URL, the revocation URL and the issuer, also if they come from a
    /// server's metadata: off by default.
    ///
    /// Anyone on the path can then read the client's secret and the tokens. On a loopback host `http` is
    /// always allowed.
    pub fn dangerous_plain_http(mut self, allowed: bool) -> Self {
        self.plain_http = allowed;
        self
    }

    /// Builds the source with the default client: hyper over rustls with ring.
    ///
    /// The client speaks HTTP/1.1, trusts the system's roots and those of
    /// [`root_certificates`](Self::root_certificates), keeps no connection open, follows no redirect, and sends
    /// `tower-bearer` with its version as its `User-Agent`. If `SSL_CERT_FILE` or `SSL_CERT_DIR` is set, it replaces
    /// the system's roots. The client connects directly, whatever `HTTPS_PROXY` and similar variables say; the
    /// [guide](crate::guide::clients#the-token-endpoint-behind-a-proxy) has a client that uses them. Building needs no
    /// runtime and sends nothing.
    ///
    /// # Errors
    ///
    /// As [`build_with`](Self::build_with), and if there is no root certificate to trust or one that was
    /// added cannot be used (the roots matter only if one of the URLs is `https`); if the client certificate
    /// cannot be used with its key, or the token URL is not `https` though the client is to present one.
    #[cfg(feature = "rustls")]
    pub fn build(self) -> Result<ClientCredentials, ConfigError> {
        let server = self.server()?;
        let (url, revocation_url, otherwise) = match &server {
            Server::Configured(endpoints) => {
                let url = endpoints.token_url.url();
                (url, &endpoints.revocation_url, https::Tls::Unused)
            }
            Server::Discovered(discovery) => {
                let issuer = &discovery.issuer;
                (issuer.url(), &issuer.revocation_url, https::Tls::Possible)
            }
        };
        let is_https = |url: &Url| url.scheme() == "https";
        let uses_tls = is_https(url);
        let tls = match uses_tls || revocation_url.as_ref().is_some_and(is_https) {
            true => https::Tls::Needed,
            false => otherwise,
        };
        let factory = self.https.factory(tls)?;
        let transport = factory.transport(None)?;
        let mutual_tls = match self.auth.certificate()? {
            None => None,
            Some(_) if !uses_tls => {
                return Err(ConfigError::new(
                    "a client_certificate can be presented to an https URL only",
                ));
            }
            Some(certificate) => Some(https::MutualTls::new(factory, certificate)?),
        };
        let inner = self.inner(server, transport)?;
        Ok(ClientCredentials::new(Inner {
            mutual_tls,
            ..inner
        }))
    }

    /// Builds the source with any HTTP service as the client for the token endpoint.
    ///
    /// The service gets requests with an absolute URI and the whole body in one piece. It is cloned for every request,
    /// and each clone is made ready before it is called. It should not follow redirects, which would carry the secret
    /// elsewhere, nor retry, which is for the cache to decide.
    ///
    /// # Errors
    ///
    /// If one of these is wrong:
    ///
    /// - The token URL, the revocation URL or the issuer to discover: it cannot be parsed, is neither `https` nor `http`
    ///   on a loopback host (but see [`dangerous_plain_http`](Self::dangerous_plain_http)), or has credentials or a
    ///   fragment; or the issuer has a query, or is set a second time.
    /// - The client's id: it is empty, or has a colon and is to be sent in
    ///   [`raw_basic_credentials`](Self::raw_basic_credentials).
    /// - A scope: it is empty, or has a character that RFC 6749 section 3.3 rules out.
    /// - A resource: it is not an absolute URI, or has a fragment.
    /// - A parameter: it has no name, or one that the request itself sets.
    /// - The [`auth_method`](Self::auth_method): its credential is missing, or it is [`AuthMethod::None`] although there
    ///   is a secret or a key; or there are both a secret and a private key, and no method chooses.
    /// - An assertion: its issuer is not known; or its key is known and cannot be used, or not with the algorithm that
    ///   was set.
    /// - A client certificate: it is up to the service to present one.
    pub fn build_with<S, B>(self, service: S) -> Result<ClientCredentials, ConfigError>
    where
        S: Service<Request<Full<Bytes>>, Response = Response<B>> + Clone + Send + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send + 'static,
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<BoxError>,
    {
        if self.auth.certificate.is_some() {
            return Err(ConfigError::new(
                "the service given to build_with would not present the client_certificate",
            ));
        }
        let server = self.server()?;
        let inner = self.inner(server, Transport::new(service))?;
        Ok(ClientCredentials::new(inner))
    }

    /// Checks the server's URLs.
    fn server(&self) -> Result<Server, ConfigError> {
        let plain_http = self.plain_http;
        let revocation_url = self.revocation_url.as_ref();
        let revocation_url = revocation_url
            .map(|url| parse_url(url, "revocation", plain_http))
            .transpose()?;
        match &self.target {
            Target::TokenUrl(url) => {
                let token_url = TokenUrl::new(url.clone()).map_err(|error| {
                    ConfigError::new("the token URL cannot be parsed").with_source(error)
                })?;
                check_url(token_url.url(), "token", plain_http)?;
                Ok(Server::Configured(Arc::new(Endpoints {
                    token_url,
                    revocation_url,
                    #[cfg(feature = "jwt")]
                    issuer: self.issuer.clone(),
                    auth_methods: None,
                    #[cfg(feature = "jwt")]
                    algorithms: None,
                })))
            }
            Target::Issuer(issuer) => {
                #[cfg(feature = "jwt")]
                if self.issuer.is_some() {
                    return Err(ConfigError::new("the issuer is set twice"));
                }
                let presents_certificate = self.auth.presents_certificate();
                let issuer = Issuer::new(issuer, plain_http, presents_certificate, revocation_url)?;
                Ok(Server::Discovered(Box::new(Discovery::new(issuer))))
            }
        }
    }

    /// Checks the client, and what it asks for.
    fn inner(self, server: Server, transport: Transport) -> Result<Inner, ConfigError> {
        let Self {
            client_id,
            mut auth,
            ..
        } = self;
        if client_id.is_empty() {
            return Err(ConfigError::new("the client id is empty"));
        }
        if auth.raw_basic && client_id.contains(':') {
            // RFC 7617 section 2: the first colon ends the id.
            return Err(ConfigError::new(
                "a client id with a colon cannot be sent in raw_basic_credentials",
            ));
        }
        if let Some(oauth2) = self.oauth2 {
            auth.inherit(oauth2);
        }
        auth.check(server.configured())?;
        let params = RequestParams::new(
            self.scopes.iter().map(String::as_str),
            self.resources.iter().map(String::as_str),
            pairs(&self.params),
        )?;
        Ok(Inner {
            client_id,
            server,
            params,
            auth,
            refused: Refused::new(),
            transport,
            #[cfg(feature = "rustls")]
            mutual_tls: None,
        })
    }
}

impl fmt::Debug for ClientCredentialsBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The token URL is not checked yet and may have a password in it.
        f.debug_struct("ClientCredentialsBuilder")
            .field("scopes", &self.scopes)
            .field("resources", &self.resources)
            .field("params", &param_names(pairs(&self.params)))
            .field("plain_http", &self.plain_http)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn build(builder: ClientCredentialsBuilder) -> Result<ClientCredentials, ConfigError> {
        builder.build_with(tower::service_fn(|_| async {
            Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
        }))
    }

    fn at(url: &str) -> ClientCredentialsBuilder {
        ClientCredentials::builder(url, "id").client_secret("CANARY")
    }

    /// Law 9: the secret leaves over https only, loopback excepted.
    #[test]
    fn the_token_url_is_https_or_loopback() {
        for (url, allowed, allowed_if_dangerous) in [
            ("https://as.example/token", true, true),
            ("https://as.example/token?realm=a", true, true),
            ("http://localhost:8080/token", true, true),
            ("http://LocalHost/token", true, true),
            ("http://127.0.0.1/token", true, true),
            ("http://127.255.0.9/token", true, true),
            ("http://[::1]:1/token", true, true),
            ("http://[::ffff:127.0.0.1]/token", true, true),
            ("http://as.example/token", false, true),
            ("http://localhost.example/token", false, true),
            ("http://127.0.0.1.example/token", false, true),
            ("http://[::ffff:10.0.0.1]/token", false, true),
            ("http://10.0.0.1/token", false, true),
            ("ftp://localhost/token", false, false),
            ("localhost:8080/token", false, false),
            ("/token", false, false),
            ("https://", false, false),
            ("", false, false),
            ("https://as.example/token#there", false, false),
            ("https://CANARY@as.example/token", false, false),
            ("https://a:CANARY@as.example/token", false, false),
        ] {
            assert_eq!(build(at(url)).is_ok(), allowed, "{url}");
            let dangerous = at(url).dangerous_plain_http(true);
            assert_eq!(build(dangerous).is_ok(), allowed_if_dangerous, "{url}");
        }
    }

    #[test]
    fn settings_that_cannot_work_are_refused() {
        let good = || at("https://as.example/token");
        for (case, builder) in [
            (
                "client id",
                ClientCredentials::builder("https://as.example", ""),
            ),
            ("empty scope", good().scope("")),
            ("empty scope token", good().scopes(["a  b"])),
            ("quote", good().scope("a\"b")),
            ("backslash", good().scope("a\\b")),
            ("control byte", good().scope("a\nb")),
            ("non-ASCII", good().scope("é")),
            ("no name", good().param("", "a")),
            ("grant_type", good().param("grant_type", "password")),
            ("scope", good().param("scope", "a")),
            ("client_id", good().param("client_id", "a")),
            ("client_secret", good().param("client_secret", "a")),
            ("client_assertion", good().param("client_assertion", "a")),
            ("refresh_token", good().param("refresh_token", "a")),
            ("fragment", good().resource("https://api.example/#a")),
            ("relative resource", good().resource("/api")),
        ] {
            assert!(build(builder).is_err(), "{case}");
        }
        assert!(build(good().scope("a b").param("audience", "")).is_ok());
    }

    #[test]
    fn contradictions_are_refused() {
        let bare = || ClientCredentials::builder("https://as.example/token", "id");
        let tls = bare().auth_method(AuthMethod::TlsClientAuth);
        assert!(build(tls).is_ok(), "the service may have a certificate");
        for (case, builder) in [
            (
                "basic without a secret",
                bare().auth_method(AuthMethod::ClientSecretBasic),
            ),
            (
                "post without a secret",
                bare().auth_method(AuthMethod::ClientSecretPost),
            ),
            (
                "none with a secret",
                bare().client_secret("s").auth_method(AuthMethod::None),
            ),
            (
                "raw with a colon in the id",
                ClientCredentials::builder("https://as.example/token", "i:d")
                    .client_secret("s")
                    .raw_basic_credentials(true),
            ),
            (
                "a revocation URL that is not secure",
                bare().revocation_url("http://as.example/revoke"),
            ),
            (
                "a revocation URL that is none",
                bare().revocation_url("/revoke"),
            ),
            #[cfg(feature = "jwt")]
            (
                "two issuers",
                ClientCredentials::discover("https://as.example", "id").issuer("i"),
            ),
            #[cfg(feature = "rustls")]
            (
                "a certificate that the service does not know",
                bare().client_certificate("c", "k"),
            ),
            #[cfg(feature = "jwt")]
            (
                "a secret and a key",
                bare()
                    .issuer("i")
                    .client_secret("s")
                    .private_key(Credential::env("K")),
            ),
            #[cfg(feature = "jwt")]
            (
                "an assertion for nobody",
                bare().private_key(Credential::env("K")),
            ),
            #[cfg(feature = "jwt")]
            ("a key that is none", bare().issuer("i").private_key("k")),
            #[cfg(feature = "jwt")]
            (
                "private_key_jwt without a key",
                bare().issuer("i").auth_method(AuthMethod::PrivateKeyJwt),
            ),
            #[cfg(feature = "jwt")]
            (
                "client_secret_jwt without a secret",
                bare().issuer("i").auth_method(AuthMethod::ClientSecretJwt),
            ),
        ] {
            assert!(build(builder).is_err(), "{case}");
        }
        #[cfg(feature = "rustls")]
        {
            let tls = bare().auth_method(AuthMethod::TlsClientAuth);
            assert!(tls.build().is_err(), "no certificate");
            let plain = ClientCredentials::builder("http://localhost/token", "id");
            let plain = plain.client_certificate(Credential::env("C"), Credential::env("K"));
            assert!(plain.build().is_err(), "no TLS");
            assert!(bare().client_certificate("c", "k").build().is_err());
        }
    }

    /// Law 9: settings are not printed.
    #[test]
    fn neither_settings_nor_their_errors_show_a_secret() {
        let mut text = String::new();
        for url in [
            "https://as.example/token?key=CANARY",
            "https://a:CANARY@as.example/token",
            "http://as.example/CANARY",
            "https://as.example:CANARY/",
        ] {
            let builder = at(url).param("api_key", "CANARY");
            text.push_str(&format!("{builder:?}"));
            match build(builder) {
                Ok(source) => text.push_str(&format!("{source:?}")),
                Err(error) => text.push_str(&format!("{error} {error:?}")),
            }
        }
        let misplaced = at("https://as.example").scope("CANARY\n");
        text.push_str(&format!("{:?}", build(misplaced).unwrap_err()));
        assert!(!text.contains("CANARY"), "{text}");
    }

    #[test]
    fn a_client_of_oauth2_is_checked_like_any_other() {
        use oauth2::{ClientId, TokenUrl, basic::BasicClient};
        let client = |url: &str| {
            BasicClient::new(ClientId::new("id".to_owned()))
                .set_token_uri(TokenUrl::new(url.to_owned()).unwrap())
        };
        let source = |url| build(ClientCredentials::from_oauth2(client(url)));
        assert!(source("https://as.example/token").is_ok());
        assert!(source("http://as.example/token").is_err());

        let from = ClientCredentials::from_oauth2;
        let https = || client("https://as.example/token");
        let post = from(https()).auth_method(AuthMethod::ClientSecretPost);
        assert!(build(post).is_err(), "there is no secret");
        #[cfg(feature = "jwt")]
        {
            let secret = oauth2::ClientSecret::new("s".to_owned());
            let key = from(https().set_client_secret(secret)).private_key(Credential::env("K"));
            assert!(
                build(key.issuer("i")).is_ok(),
                "the key takes the place of the secret"
            );
        }
    }
}
