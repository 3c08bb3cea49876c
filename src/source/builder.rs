//! What [`ClientCredentials`] are made of, checked before anything is sent.

use std::fmt;
#[cfg(feature = "rustls")]
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body::Body;
use http_body_util::Full;
use oauth2::{AuthType, ClientSecret, url::Url};
use tower_service::Service;

#[cfg(feature = "rustls")]
use super::https;
use super::{
    ClientCredentials,
    asked::{Asked, names},
    grant::Grant,
    transport::Transport,
};
use crate::{
    error::{BoxError, ConfigError},
    origin::is_loopback,
};

/// How a client proves its identity to the token endpoint, by the names of the registry that RFC 7591
/// section 2 and RFC 8414 section 2 share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum AuthMethod {
    /// `client_secret_basic`: id and secret in an `Authorization: Basic` header, each form-encoded first
    /// (RFC 6749 section 2.3.1).
    #[default]
    ClientSecretBasic,
    /// `client_secret_post`: id and secret in the body, for servers that support nothing better.
    ClientSecretPost,
}

impl AuthMethod {
    fn auth_type(self) -> AuthType {
        match self {
            Self::ClientSecretBasic => AuthType::BasicAuth,
            Self::ClientSecretPost => AuthType::RequestBody,
        }
    }
}

/// Builds [`ClientCredentials`].
///
/// Made by [`ClientCredentials::builder`] and [`ClientCredentials::from_oauth2`]. Whatever is wrong with a
/// setting is reported by `build` or [`build_with`](Self::build_with).
#[must_use = "a builder does nothing until it is built"]
pub struct ClientCredentialsBuilder {
    client: Result<Box<dyn Grant>, ConfigError>,
    scopes: Vec<String>,
    resources: Vec<String>,
    params: Vec<(String, String)>,
    plain_http: bool,
    #[cfg(feature = "rustls")]
    https: https::Settings,
}

impl ClientCredentialsBuilder {
    pub(super) fn new(client: Result<Box<dyn Grant>, ConfigError>) -> Self {
        Self {
            client,
            scopes: Vec::new(),
            resources: Vec::new(),
            params: Vec::new(),
            plain_http: false,
            #[cfg(feature = "rustls")]
            https: https::Settings::default(),
        }
    }

    /// Sets the client's secret.
    ///
    /// It is held in memory for as long as the source lives, and never printed.
    pub fn client_secret(mut self, secret: impl Into<String>) -> Self {
        let secret = ClientSecret::new(secret.into());
        self.client = self.client.map(|client| client.with_client_secret(secret));
        self
    }

    /// Sets where the client's secret is sent.
    ///
    /// The default is [`AuthMethod::ClientSecretBasic`], or what the client given to
    /// [`ClientCredentials::from_oauth2`] says.
    pub fn auth_method(mut self, method: AuthMethod) -> Self {
        self.client = self
            .client
            .map(|client| client.with_auth_type(method.auth_type()));
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

    /// Adds a resource that the token is to be good for, an absolute URI without a fragment (RFC 8707
    /// section 2).
    ///
    /// Several may be added. Without any, the server chooses.
    pub fn resource(mut self, uri: impl Into<String>) -> Self {
        self.resources.push(uri.into());
        self
    }

    /// Adds a parameter to the body of every token request, such as `audience`.
    ///
    /// The same name may be added more than once, for servers that allow it. The value is never printed.
    pub fn param(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.params.push((name.into(), value.into()));
        self
    }

    /// Sets for how long the default client tries to open a TCP connection, 3 s by default.
    ///
    /// The TLS handshake and the answer are bounded by the timeout of the whole attempt, 10 s in the cache.
    /// [`build_with`](Self::build_with) ignores this.
    #[cfg(feature = "rustls")]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.https.connect_timeout = timeout;
        self
    }

    /// Adds root certificates, in PEM, to those of the system that the default client trusts.
    ///
    /// [`build_with`](Self::build_with) ignores this.
    #[cfg(feature = "rustls")]
    pub fn root_certificates(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.https.roots.push(pem.into());
        self
    }

    /// Allows a token URL of plain `http` on any host, off by default.
    ///
    /// Everybody on the way can then read the client's secret and the tokens. On a loopback host `http` is
    /// always allowed.
    pub fn dangerous_plain_http(mut self, allowed: bool) -> Self {
        self.plain_http = allowed;
        self
    }

    /// Builds the source with the default client: hyper over rustls with ring.
    ///
    /// The client speaks HTTP/1.1, trusts the system's roots and those of
    /// [`root_certificates`](Self::root_certificates), keeps no connection open and follows no redirect.
    /// Building needs no runtime and sends nothing.
    ///
    /// # Errors
    ///
    /// As [`build_with`](Self::build_with), and if there is no root certificate to trust or one that was
    /// added cannot be used. The roots matter only if the token URL is `https`.
    #[cfg(feature = "rustls")]
    pub fn build(self) -> Result<ClientCredentials, ConfigError> {
        let asked = self.asked();
        let (client, asked) = checked(self.client, asked, self.plain_http)?;
        let transport = self
            .https
            .transport(client.token_url().scheme() == "https")?;
        Ok(ClientCredentials::new(client, asked, transport))
    }

    /// Builds the source with any HTTP service as the way to the token endpoint.
    ///
    /// The service gets requests with an absolute URI and a body of one piece. It is cloned for every
    /// request, and each clone is made ready before it is called. It should neither follow redirects nor try
    /// again: the one would carry the secret elsewhere and the other is for the cache to decide.
    ///
    /// # Errors
    ///
    /// If the token URL cannot be parsed, is neither `https` nor `http` on a loopback host (but see
    /// [`dangerous_plain_http`](Self::dangerous_plain_http)), or has credentials or a fragment; if the
    /// client's id is empty; if a scope is empty or has a character that RFC 6749 section 3.3 rules out; if a
    /// resource is not an absolute URI or has a fragment; if a parameter has no name or one that the request
    /// sets by itself.
    pub fn build_with<S, B>(self, service: S) -> Result<ClientCredentials, ConfigError>
    where
        S: Service<Request<Full<Bytes>>, Response = Response<B>> + Clone + Send + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send + 'static,
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<BoxError>,
    {
        let asked = self.asked();
        let (client, asked) = checked(self.client, asked, self.plain_http)?;
        Ok(ClientCredentials::new(
            client,
            asked,
            Transport::new(service),
        ))
    }
}

impl ClientCredentialsBuilder {
    fn asked(&self) -> Result<Asked, ConfigError> {
        Asked::new(
            self.scopes.iter().map(String::as_str),
            self.resources.iter().map(String::as_str),
            pairs(&self.params),
        )
    }
}

impl fmt::Debug for ClientCredentialsBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The token URL is not checked yet and may have a password in it.
        f.debug_struct("ClientCredentialsBuilder")
            .field("scopes", &self.scopes)
            .field("resources", &self.resources)
            .field("params", &names(pairs(&self.params)))
            .field("plain_http", &self.plain_http)
            .finish_non_exhaustive()
    }
}

// The checks of all settings. No message repeats a value: what stands in the wrong place may be the secret.

fn checked(
    client: Result<Box<dyn Grant>, ConfigError>,
    asked: Result<Asked, ConfigError>,
    plain_http: bool,
) -> Result<(Box<dyn Grant>, Asked), ConfigError> {
    let client = client?;
    check_token_url(client.token_url(), plain_http)?;
    if client.client_id().is_empty() {
        return Err(ConfigError::new("the client id is empty"));
    }
    Ok((client, asked?))
}

fn check_token_url(url: &Url, plain_http: bool) -> Result<(), ConfigError> {
    let secure = match url.scheme() {
        "https" => true,
        "http" => plain_http || url.host_str().is_some_and(is_loopback),
        _ => false,
    };
    let problem = if !secure {
        "the token URL must be https, or http on a loopback host; \
        dangerous_plain_http(true) allows http on others"
    } else if !url.username().is_empty() || url.password().is_some() {
        "the token URL must not have credentials in it"
    } else if url.fragment().is_some() {
        // RFC 6749 section 3.2.
        "the token URL must not have a fragment"
    } else if url.as_str().parse::<Uri>().is_err() {
        "the token URL cannot be requested"
    } else {
        return Ok(());
    };
    Err(ConfigError::new(problem))
}

fn pairs(params: &[(String, String)]) -> impl Iterator<Item = (&str, &str)> {
    params.iter().map(|(name, value)| (&**name, &**value))
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

    /// Law 9: what is set is not printed.
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
    }
}
