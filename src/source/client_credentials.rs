//! The client-credentials grant (RFC 6749 section 4.4), with the refresh token first if there is one.

use std::{fmt, sync::Arc, time::Duration};

use oauth2::{
    AuthType, EndpointSet, EndpointState, ErrorResponse, RevocableToken, TokenIntrospectionResponse,
};
use tokio::time::Instant;

#[cfg(feature = "rustls")]
use super::https;
use super::{
    AuthMethod, Fetch, RefreshToken, Revocation, TokenResponse, TokenSource,
    auth::{Authentication, ClientAuth, Credentials, OAuth2Auth},
    builder::{ClientCredentialsBuilder, Target},
    params::{RequestParams, param_names},
    refused::Refused,
    request::{Request, secret_in_body},
    response::Answer,
    server::{Endpoints, Server},
    transport::Transport,
    with_timeout,
};
use crate::{
    error::{ConfigError, Kind, RequestKind, TokenError},
    telemetry,
    token::AccessToken,
};

/// Fetches tokens by the OAuth 2.0 client-credentials grant (RFC 6749 section 4.4).
///
/// One attempt is one token request, or two: a refresh token that came with the last token is tried first
/// (RFC 6749 section 6), and if that fails, for whatever reason, the client's own credentials are sent
/// at once. A refresh token is sent at most once, since some servers end the session when they see it again.
///
/// When the server refuses the client (`invalid_client`, or what others say instead, such as `unauthorized_client` or
/// `access_denied` with status 401), the [`Credential`](crate::Credential) is obtained again within the same attempt,
/// and if it has changed, the request is sent once more with the new one.
///
/// Answers that differ from the standard are accepted where that is safe: lifetimes as text or fractions, statuses
/// other than 200, any `Content-Type`. At most 1 MiB of an answer is read. Redirects are not followed, since they would
/// carry the secret along.
///
/// Clones are cheap and share everything.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "rustls")]
/// # mod example {
/// use tower_bearer::{ClientCredentials, ConfigError};
///
/// fn source(client_secret: String) -> Result<ClientCredentials, ConfigError> {
///     ClientCredentials::builder("https://as.example/token", "client-id")
///         .client_secret(client_secret)
///         .scope("profile")
///         .param("audience", "https://api.example.com")
///         .build()
/// }
/// # }
/// ```
#[derive(Clone)]
pub struct ClientCredentials {
    inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) client_id: String,
    pub(super) server: Server,
    pub(super) params: RequestParams,
    pub(super) auth: ClientAuth,
    pub(super) refused: Refused,
    pub(super) transport: Transport,
    /// Replaces `transport` if the client presents a certificate.
    #[cfg(feature = "rustls")]
    pub(super) mutual_tls: Option<https::MutualTls>,
}

impl Inner {
    async fn endpoints(&self, limit: Duration) -> Result<Arc<Endpoints>, TokenError> {
        self.server.endpoints(&self.transport, limit).await
    }

    /// Sends a request, and once more if the server refuses the client and there are other credentials by now.
    /// Credentials that cannot be sent are obtained again in the same way.
    async fn exchange<T>(
        &self,
        request: Request<'_>,
        endpoints: &Endpoints,
        judge: fn(Answer) -> Result<T, TokenError>,
    ) -> Result<T, TokenError> {
        let supported = endpoints.auth_methods.as_deref();
        let method = self.auth.method(supported).map_err(|problem| {
            // The server may support more by the next attempt.
            self.server.mark_stale();
            TokenError::terminal(problem)
        })?;
        let first = self.auth.obtain(method).await?;
        let outcome = self.send(request, endpoints, method, &first, judge).await;
        // A refresh token is sent once: RFC 6749 does not say whether it survives a failed request.
        let is_sent_once = matches!(request, Request::RefreshToken(..));
        let are_refused = outcome.as_ref().is_err_and(TokenError::is_of_credentials);
        if is_sent_once || !are_refused {
            return outcome;
        }
        let newer = self.auth.obtain(method).await?;
        if newer.same_text(&first) {
            newer.refuse();
            return outcome;
        }
        self.send(request, endpoints, method, &newer, judge).await
    }

    /// Sends a request, and records its outcome.
    async fn send<T>(
        &self,
        request: Request<'_>,
        endpoints: &Endpoints,
        method: AuthMethod,
        credentials: &Credentials,
        judge: fn(Answer) -> Result<T, TokenError>,
    ) -> Result<T, TokenError> {
        let outcome = match self.prepare(method, credentials, endpoints) {
            Ok((authentication, transport)) => {
                let guard = self.server.guard();
                let request = request.build(&self.client_id, authentication, &endpoints.token_url);
                let answer = match request {
                    Ok(request) => transport.send(request).await,
                    Err(error) => Err(error),
                };
                let outcome = answer.and_then(judge);
                guard.finish(outcome.as_ref().err());
                outcome
            }
            // For example, a certificate and a key that were replaced between the two reads.
            Err(error) => Err(TokenError::new(Kind::Credentials).with_source(error)),
        };
        self.refused.record(credentials, outcome.as_ref().err());
        outcome
    }

    /// Makes the authentication of one request, and its transport.
    fn prepare(
        &self,
        method: AuthMethod,
        credentials: &Credentials,
        endpoints: &Endpoints,
    ) -> Result<(Authentication, Transport), ConfigError> {
        let authentication =
            self.auth
                .authenticate(method, &self.client_id, credentials, endpoints)?;
        #[cfg(feature = "rustls")]
        if let Some(mutual_tls) = &self.mutual_tls {
            let (chain, key) = credentials.certificate.as_ref().expect("it was obtained");
            let transport = mutual_tls.transport(chain.text(), key.text())?;
            return Ok((authentication, transport));
        }
        Ok((authentication, self.transport.clone()))
    }
}

impl ClientCredentials {
    /// Starts a source for the client `client_id` at the token endpoint `token_url`.
    ///
    /// Without a [secret](ClientCredentialsBuilder::client_secret) or other credentials, the client's id is sent in the
    /// body.
    pub fn builder(
        token_url: impl Into<String>,
        client_id: impl Into<String>,
    ) -> ClientCredentialsBuilder {
        ClientCredentialsBuilder::new(client_id.into(), Target::TokenUrl(token_url.into()))
    }

    /// Starts a source for the client `client_id` at the authorization server of this issuer, whose metadata say where
    /// its token endpoint is and what it supports.
    ///
    /// The metadata are fetched with the first token, without a client certificate, since they are public: those of RFC
    /// 8414, or else those of OpenID Connect Discovery 1.0, or else those of RFC 8414 behind the issuer's path. Their
    /// `issuer` must be exactly the one given here, or they are not used; so write it as the server does, with or
    /// without a slash at the end. They provide the token endpoint, or its alias for clients with a certificate (RFC
    /// 8705 section 5); the revocation endpoint; and, unless it is set, the method of client authentication: for a
    /// secret, the first that the server supports of `client_secret_basic`, `client_secret_post` and
    /// `client_secret_jwt`.
    ///
    /// All keys of a cache share the metadata. They are kept until a token request fails in a way that may be due to a
    /// wrong endpoint, such as a lost connection, a timeout or a 404, or the client is refused. Then the next attempt
    /// fetches them anew, within a quarter of its time, and uses the old ones if that fails.
    ///
    /// ```
    /// # #[cfg(feature = "rustls")]
    /// # fn main() -> Result<(), tower_bearer::ConfigError> {
    /// use tower_bearer::{ClientCredentials, Credential};
    ///
    /// let source = ClientCredentials::discover("http://localhost:8080/realms/sims", "client-id")
    ///     .client_secret(Credential::file("/var/run/secrets/client-secret"))
    ///     .build()?;
    /// # let _ = source;
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "rustls"))]
    /// # fn main() {}
    /// ```
    ///
    /// # Errors
    ///
    /// An attempt fails with a terminal [`TokenError`] if the metadata are those of another issuer, or name a token
    /// endpoint that is neither `https` nor on a loopback host, or no method that the client has credentials for.
    /// Metadata that cannot be fetched or read are a transient error.
    pub fn discover(
        issuer: impl Into<String>,
        client_id: impl Into<String>,
    ) -> ClientCredentialsBuilder {
        ClientCredentialsBuilder::new(client_id.into(), Target::Issuer(issuer.into()))
    }

    /// Starts a source from a client of the `oauth2` crate that has a token URL.
    ///
    /// Its token URL, its id, its secret and its authentication method are used, unless the builder is given others. In
    /// a header, a space is written as `%20`. Its response types are not used: the answers of most servers that differ
    /// from the standard would not fit them.
    ///
    /// The last type parameter must be `EndpointSet`, as `set_token_uri` makes it; a bare `BasicClient` in a
    /// function's signature stands for one without a token URL. To depend on `oauth2` for this, leave out its
    /// default features.
    ///
    /// ```
    /// # #[cfg(feature = "rustls")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use oauth2::{ClientId, ClientSecret, TokenUrl, basic::BasicClient};
    /// use tower_bearer::ClientCredentials;
    ///
    /// let client = BasicClient::new(ClientId::new("client-id".to_owned()))
    ///     .set_client_secret(ClientSecret::new("secret".to_owned()))
    ///     .set_token_uri(TokenUrl::new("http://localhost:8080/token".to_owned())?);
    /// let source = ClientCredentials::from_oauth2(client).scope("profile").build()?;
    /// # let _ = source;
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "rustls"))]
    /// # fn main() {}
    /// ```
    pub fn from_oauth2<TE, TR, TIR, RT, TRE, Auth, DeviceAuth, Introspection, Revocation>(
        client: oauth2::Client<
            TE,
            TR,
            TIR,
            RT,
            TRE,
            Auth,
            DeviceAuth,
            Introspection,
            Revocation,
            EndpointSet,
        >,
    ) -> ClientCredentialsBuilder
    where
        TE: ErrorResponse + 'static,
        TR: oauth2::TokenResponse,
        TIR: TokenIntrospectionResponse,
        RT: RevocableToken,
        TRE: ErrorResponse + 'static,
        Auth: EndpointState,
        DeviceAuth: EndpointState,
        Introspection: EndpointState,
        Revocation: EndpointState,
    {
        let in_body = matches!(client.auth_type(), AuthType::RequestBody);
        let token_url = Target::TokenUrl(client.token_uri().to_string());
        let client = client.set_auth_type(AuthType::RequestBody);
        let secret =
            secret_in_body(|capture| client.exchange_client_credentials().request(capture));
        ClientCredentialsBuilder::new(client.client_id().to_string(), token_url)
            .inherit(OAuth2Auth { secret, in_body })
    }

    pub(super) fn new(inner: Inner) -> Self {
        Self {
            inner: Arc::new(inner),
        }
    }
}

impl TokenSource for ClientCredentials {
    async fn fetch(&self, fetch: Fetch) -> Result<TokenResponse, TokenError> {
        let params = self
            .inner
            .params
            .for_request(&fetch.request, fetch.claims.as_deref())?;
        let limit = fetch.timeout / 4;
        let endpoints = &*self.inner.endpoints(limit).await?;
        let ask = |request| self.inner.exchange(request, endpoints, Answer::into_token);
        let response = match &fetch.refresh_token {
            // A refresh keeps to its session; claims that the API demands need a new one.
            Some(token) if fetch.claims.is_none() => {
                // Half of the time is left for the other grant, if this one hangs.
                let refreshing = ask(Request::RefreshToken(token, &params));
                match with_timeout(fetch.timeout / 2, refreshing).await {
                    Ok(response) => TokenResponse {
                        grant: Some(telemetry::REFRESH_TOKEN),
                        ..response
                    },
                    Err(error) => {
                        let _ = fetch.refresh_error.set(error);
                        ask(Request::ClientCredentials(&params)).await?
                    }
                }
            }
            _ => ask(Request::ClientCredentials(&params)).await?,
        };
        Ok(match params.scope() {
            Some(scope) => response.requested_scope(scope),
            None => response,
        })
    }

    async fn revoke(&self, revocation: Revocation) -> Result<(), TokenError> {
        let Revocation {
            refresh_token,
            access_token,
        } = revocation;
        let endpoints = &*self.inner.endpoints(DISCOVERY_LIMIT).await?;
        let Some(url) = &endpoints.revocation_url else {
            return Err(TokenError::no_revocation(
                "the revocation URL of the authorization server is not known",
            ));
        };
        let refresh_token = refresh_token.as_ref().map(RefreshToken::expose_secret);
        let access_token = access_token.as_ref().map(AccessToken::expose_secret);
        let mut outcome = Ok(());
        for (token, hint) in [
            // First, since many servers end its session, and the access tokens with it.
            (refresh_token, "refresh_token"),
            (access_token, "access_token"),
        ] {
            let Some(token) = token else { continue };
            let request = Request::Revocation { url, token, hint };
            let revoking = self
                .inner
                .exchange(request, endpoints, Answer::into_revoked);
            // A request that hangs leaves some of the caller's time for the other token.
            let revoked = with_timeout(REVOCATION_LIMIT, revoking).await;
            let revoked = revoked.map_err(|error| error.with_request(RequestKind::Revocation));
            outcome = outcome.and(revoked);
        }
        outcome
    }

    fn has_new_credentials(&self) -> bool {
        self.inner.refused.has_changed(Instant::now())
    }

    fn grant(&self) -> &'static str {
        telemetry::CLIENT_CREDENTIALS
    }
}

impl fmt::Debug for ClientCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner {
            client_id,
            server,
            params,
            ..
        } = &*self.inner;
        let kind = match server {
            Server::Configured(_) => "token_url",
            Server::Discovered(_) => "issuer",
        };
        f.debug_struct("ClientCredentials")
            .field(kind, &server.name())
            .field("client_id", client_id)
            .field("scopes", &params.scopes)
            .field("params", &param_names(params.extra_params()))
            .finish_non_exhaustive()
    }
}

/// How long a revocation looks for newer metadata. With the revocation of both tokens, it takes less than the time that
/// a cache allows by default.
const DISCOVERY_LIMIT: Duration = Duration::from_millis(1_500);

/// How long the revocation of one token may take.
const REVOCATION_LIMIT: Duration = Duration::from_secs(4);

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, convert::Infallible, sync::Mutex};

    use bytes::Bytes;
    use http::{Request, Response, header::AUTHORIZATION};
    use http_body_util::{BodyExt, Full};
    use oauth2::{ClientId, ClientSecret, TokenUrl, basic::BasicClient};
    use secrecy::ExposeSecret;
    use tokio::time;

    use super::*;
    use crate::TokenRequest;

    const TOKEN: &str = r#"{"access_token":"from-credentials","token_type":"Bearer"}"#;

    /// A token endpoint that gives its answers in order, and records the requests.
    #[derive(Clone, Default)]
    struct Endpoint {
        seen: Arc<Mutex<Vec<Seen>>>,
    }

    struct Seen {
        authorization: Option<String>,
        body: String,
    }

    impl Endpoint {
        /// An endpoint with these answers, and a source that uses it.
        fn with(
            builder: ClientCredentialsBuilder,
            answers: &[(u16, &'static str)],
        ) -> (Self, ClientCredentials) {
            let endpoint = Self::default();
            let seen = endpoint.seen.clone();
            let answers = Arc::new(Mutex::new(VecDeque::from(answers.to_vec())));
            let service = tower::service_fn(move |request: Request<Full<Bytes>>| {
                let (seen, answers) = (seen.clone(), answers.clone());
                async move {
                    let authorization = request.headers().get(AUTHORIZATION);
                    let authorization = authorization.map(|v| v.to_str().unwrap().to_owned());
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    let body = String::from_utf8(body.to_vec()).unwrap();
                    seen.lock().unwrap().push(Seen {
                        authorization,
                        body,
                    });
                    let (status, body) =
                        answers.lock().unwrap().pop_front().expect("another answer");
                    let response = Response::builder().status(status);
                    Ok::<_, Infallible>(response.body(Full::new(Bytes::from(body))).unwrap())
                }
            });
            (endpoint, builder.build_with(service).unwrap())
        }

        fn bodies(&self) -> Vec<String> {
            let seen = self.seen.lock().unwrap();
            seen.iter().map(|seen| seen.body.clone()).collect()
        }

        fn authorization(&self) -> Option<String> {
            self.seen.lock().unwrap()[0].authorization.clone()
        }
    }

    fn builder(client_id: &str) -> ClientCredentialsBuilder {
        ClientCredentials::builder("https://as.example/token", client_id)
    }

    fn post(secret: impl Into<crate::Credential>) -> ClientCredentialsBuilder {
        let builder = builder("id").client_secret(secret);
        builder.auth_method(AuthMethod::ClientSecretPost)
    }

    fn with_refresh_token(text: &str) -> Fetch {
        Fetch {
            refresh_token: Some(RefreshToken::new(text)),
            ..Fetch::new()
        }
    }

    #[tokio::test]
    async fn basic_credentials_are_form_encoded_before_base64() {
        for (id, secret, expected) in [
            // base64 of "id:secret"
            ("id", "secret", "Basic aWQ6c2VjcmV0"),
            // base64 of "a%3Ab:c%3Ad"
            ("a:b", "c:d", "Basic YSUzQWI6YyUzQWQ="),
            // base64 of "i%25d:s%2B%20%C3%A9"
            ("i%d", "s+ é", "Basic aSUyNWQ6cyUyQiUyMCVDMyVBOQ=="),
            // base64 of "a-._~:b%257E~", for servers that do not decode
            ("a-._~", "b%7E~", "Basic YS0uX346YiUyNTdFfg=="),
        ] {
            let (endpoint, source) =
                Endpoint::with(builder(id).client_secret(secret), &[(200, TOKEN)]);
            source.fetch(Fetch::new()).await.unwrap();
            assert_eq!(endpoint.authorization().as_deref(), Some(expected));
            assert_eq!(endpoint.bodies(), ["grant_type=client_credentials"]);
        }
    }

    /// Law 9: a service that logs its requests logs no secret.
    #[tokio::test]
    async fn the_authorization_header_is_marked_sensitive() {
        let service = tower::service_fn(|request: Request<Full<Bytes>>| async move {
            assert!(request.headers()[AUTHORIZATION].is_sensitive());
            Ok::<_, Infallible>(Response::new(Full::<Bytes>::from(TOKEN)))
        });
        let source = builder("id").client_secret("s").build_with(service);
        source.unwrap().fetch(Fetch::new()).await.unwrap();
    }

    #[tokio::test]
    async fn raw_basic_credentials_are_not_encoded() {
        let raw = builder("i%d")
            .client_secret("s+ é:")
            .raw_basic_credentials(true);
        let (endpoint, source) = Endpoint::with(raw, &[(200, TOKEN)]);
        source.fetch(Fetch::new()).await.unwrap();
        // base64 of "i%d:s+ é:"
        let expected = "Basic aSVkOnMrIMOpOg==";
        assert_eq!(endpoint.authorization().as_deref(), Some(expected));
    }

    /// It has no getter for the secret, but puts it into requests.
    #[tokio::test]
    async fn the_secret_of_an_oauth2_client_is_sent_like_any_other() {
        let client = || {
            BasicClient::new(ClientId::new("i%d".to_owned()))
                .set_client_secret(ClientSecret::new("s+ é".to_owned()))
                .set_token_uri(TokenUrl::new("https://as.example/token".to_owned()).unwrap())
        };
        let from = ClientCredentials::from_oauth2;
        let post = || client().set_auth_type(AuthType::RequestBody);
        let body = "grant_type=client_credentials";
        let in_body = "grant_type=client_credentials&client_id=i%25d&client_secret=";
        for (case, builder, header, body) in [
            (
                "as it is",
                from(client()),
                Some("Basic aSUyNWQ6cyUyQiUyMCVDMyVBOQ=="),
                body.to_owned(),
            ),
            (
                "raw",
                from(client()).raw_basic_credentials(true),
                Some("Basic aSVkOnMrIMOp"),
                body.to_owned(),
            ),
            (
                "another secret",
                from(client()).client_secret("t"),
                Some("Basic aSUyNWQ6dA=="),
                body.to_owned(),
            ),
            ("post", from(post()), None, format!("{in_body}s%2B+%C3%A9")),
            (
                "post, another secret",
                from(post()).client_secret("t"),
                None,
                format!("{in_body}t"),
            ),
            (
                "another method",
                from(client()).auth_method(AuthMethod::ClientSecretPost),
                None,
                format!("{in_body}s%2B+%C3%A9"),
            ),
            (
                "none",
                from(client()).auth_method(AuthMethod::None),
                None,
                "grant_type=client_credentials&client_id=i%25d".to_owned(),
            ),
        ] {
            let (endpoint, source) = Endpoint::with(builder, &[(200, TOKEN)]);
            source.fetch(Fetch::new()).await.unwrap();
            assert_eq!(endpoint.authorization().as_deref(), header, "{case}");
            assert_eq!(endpoint.bodies(), [body], "{case}");
        }
    }

    /// A function that returns `secrets`, and the last one forever.
    fn giving(secrets: &[&'static str]) -> crate::Credential {
        let secrets = Mutex::new(VecDeque::from(secrets.to_vec()));
        crate::Credential::from_fn(move || {
            let mut secrets = secrets.lock().unwrap();
            let secret = secrets.pop_front().unwrap();
            if secrets.is_empty() {
                secrets.push_back(secret);
            }
            async move { Ok(secret.to_owned()) }
        })
    }

    fn secrets(endpoint: &Endpoint) -> Vec<String> {
        let bodies = endpoint.bodies();
        let secret = |body: &String| body.rsplit_once("client_secret=").unwrap().1.to_owned();
        bodies.iter().map(secret).collect()
    }

    const REFUSED: (u16, &str) = (401, r#"{"error":"invalid_client"}"#);

    #[tokio::test]
    async fn a_changed_secret_is_sent_within_the_same_attempt() {
        let builder = post(giving(&["old", "new"]));
        let (endpoint, source) = Endpoint::with(
            builder,
            &[(200, TOKEN), REFUSED, (200, TOKEN), (200, TOKEN)],
        );
        for _ in 0..3 {
            source.fetch(Fetch::new()).await.unwrap();
        }
        assert_eq!(secrets(&endpoint), ["old", "old", "new", "new"]);
        assert!(!source.has_new_credentials());
    }

    /// Law 7: the codes of Keycloak, Auth0 and Cloud Foundry.
    #[tokio::test]
    async fn a_secret_is_obtained_again_whatever_a_401_calls_it() {
        for answer in [
            (401, r#"{"error":"unauthorized_client"}"#),
            (401, r#"{"error":"access_denied"}"#),
            (401, r#"{"error":"unauthorized"}"#),
        ] {
            let builder = post(giving(&["old", "new"]));
            let (endpoint, source) = Endpoint::with(builder, &[(200, TOKEN), answer, (200, TOKEN)]);
            for _ in 0..2 {
                source.fetch(Fetch::new()).await.unwrap();
            }
            assert_eq!(secrets(&endpoint), ["old", "old", "new"]);
        }
        // With another status, it is about what the client may do.
        let builder = builder("id").client_secret(giving(&["one"]));
        let answer = (400, r#"{"error":"unauthorized_client"}"#);
        let (_, source) = Endpoint::with(builder, &[answer]);
        source.fetch(Fetch::new()).await.unwrap_err();
        assert!(!source.has_new_credentials());
    }

    /// Law 7: the answers of FedEx, Twitch, a proxy, Zoho and ServiceNow, which are not OAuth's.
    /// Law 2: a transient refusal costs an attempt one request.
    #[tokio::test]
    async fn the_attempt_after_an_unusual_refusal_obtains_the_secret_again() {
        for answer in [
            (401, r#"{"errors":[{"code":"NOT.AUTHORIZED.ERROR"}]}"#),
            (403, r#"{"status":403,"message":"invalid client secret"}"#),
            (400, "<html>"),
            (200, r#"{"error":"invalid_client_secret"}"#),
            (200, r#"{"code":"10003","message":"invalid secret"}"#),
            (401, r#"{"error":"server_error"}"#),
            (429, r#"{"error":"invalid_client"}"#),
            (503, r#"{"error":"invalid_client"}"#),
        ] {
            let builder = post(giving(&["old", "new"]));
            let (endpoint, source) = Endpoint::with(builder, &[(200, TOKEN), answer, (200, TOKEN)]);
            source.fetch(Fetch::new()).await.unwrap();
            source.fetch(Fetch::new()).await.unwrap_err();
            assert_eq!(secrets(&endpoint).len(), 2, "{answer:?}");
            source.fetch(Fetch::new()).await.unwrap();
            assert_eq!(secrets(&endpoint), ["old", "old", "new"], "{answer:?}");
        }
        // An error about the server is not about the secret.
        let builder = post(giving(&["old", "new"]));
        let (endpoint, source) = Endpoint::with(builder, &[(503, ""), (200, TOKEN)]);
        source.fetch(Fetch::new()).await.unwrap_err();
        source.fetch(Fetch::new()).await.unwrap();
        assert_eq!(secrets(&endpoint), ["old", "old"]);
    }

    /// Law 7: neither do they tie this server's clients to a vault that is down.
    #[tokio::test]
    async fn a_secret_that_may_have_been_refused_is_sent_again_if_there_is_no_other() {
        let left = Mutex::new(Some("old".to_owned()));
        let builder = post(crate::Credential::from_fn(move || {
            let secret = left.lock().unwrap().take();
            async move { secret.ok_or_else(|| "the vault is down".into()) }
        }));
        let page = (403, "<html>");
        let answers = [page, (200, TOKEN), page, (200, TOKEN), REFUSED];
        let (endpoint, source) = Endpoint::with(builder, &answers);
        source.fetch(Fetch::new()).await.unwrap_err();
        source.fetch(Fetch::new()).await.unwrap();
        // A server that does not take its own refresh tokens says so with a page.
        source.fetch(with_refresh_token("r1")).await.unwrap();
        // One that was refused in so many words is not.
        for _ in 0..2 {
            source.fetch(Fetch::new()).await.unwrap_err();
        }
        assert_eq!(secrets(&endpoint), ["old"; 5]);
    }

    #[tokio::test]
    async fn an_unchanged_secret_is_not_sent_again() {
        let builder = post(giving(&["one", "one", "two", "two"]));
        let refused_with_400 = (400, REFUSED.1);
        let (endpoint, source) = Endpoint::with(builder, &[refused_with_400, REFUSED]);
        for _ in 0..2 {
            let error = source.fetch(Fetch::new()).await.unwrap_err();
            assert!(!error.is_transient());
            assert!(!source.has_new_credentials());
        }
        // The next attempt does not send again what was refused.
        assert_eq!(secrets(&endpoint), ["one", "two"]);
    }

    #[tokio::test]
    async fn a_constant_is_sent_once() {
        let (_, source) = Endpoint::with(builder("id").client_secret("s"), &[REFUSED]);
        let error = source.fetch(Fetch::new()).await.unwrap_err();
        assert!(!error.is_transient());
        assert!(!source.has_new_credentials());
    }

    /// A refresh token is sent at most once, so the new secret is sent with the other grant.
    #[tokio::test]
    async fn a_refresh_token_is_not_sent_again_with_another_secret() {
        let builder = post(giving(&["old", "new"]));
        let (endpoint, source) = Endpoint::with(builder, &[REFUSED, (200, TOKEN)]);
        source.fetch(with_refresh_token("r1")).await.unwrap();
        assert_eq!(secrets(&endpoint), ["old", "new"]);
        assert!(endpoint.bodies()[1].starts_with("grant_type=client_credentials"));
    }

    /// Law 7: once a refused secret has been changed, it is sent; until then, nothing is.
    #[tokio::test(start_paused = true)]
    async fn a_changed_file_is_noticed_within_a_tenth_of_a_second() {
        let path = std::env::temp_dir().join(format!("tower-bearer-{}", std::process::id()));
        std::fs::write(&path, "old\n").unwrap();
        let builder = post(crate::Credential::file(&path));
        let scopeless = (400, r#"{"error":"invalid_scope"}"#);
        let answers = [REFUSED, (503, ""), (200, TOKEN), REFUSED, scopeless];
        let (endpoint, source) = Endpoint::with(builder, &answers);
        source.fetch(Fetch::new()).await.unwrap_err();
        assert!(!source.has_new_credentials());
        std::fs::write(&path, "newer\n").unwrap();
        // It was checked just now.
        assert!(!source.has_new_credentials());
        time::advance(Duration::from_millis(100)).await;
        assert!(source.has_new_credentials());
        assert!(source.has_new_credentials());
        source.fetch(Fetch::new()).await.unwrap_err();
        assert!(
            source.has_new_credentials(),
            "nobody has refused the new one"
        );
        source.fetch(Fetch::new()).await.unwrap();
        assert!(!source.has_new_credentials());

        source.fetch(Fetch::new()).await.unwrap_err();
        std::fs::write(&path, "newest\n").unwrap();
        source.fetch(Fetch::new()).await.unwrap_err();
        assert!(
            !source.has_new_credentials(),
            "what was refused was not the secret"
        );
        assert_eq!(
            secrets(&endpoint),
            ["old", "newer", "newer", "newer", "newest"]
        );
        std::fs::remove_file(&path).unwrap();
    }

    #[tokio::test]
    async fn a_client_sends_its_credentials_in_one_place_only() {
        let builder = post("s e");
        let (endpoint, source) = Endpoint::with(builder, &[(200, TOKEN)]);
        source.fetch(Fetch::new()).await.unwrap();
        assert_eq!(endpoint.authorization(), None);
        let expected = "grant_type=client_credentials&client_id=id&client_secret=s+e";
        assert_eq!(endpoint.bodies(), [expected]);
    }

    #[tokio::test]
    async fn a_client_without_secret_sends_its_id_in_the_body() {
        let (endpoint, source) = Endpoint::with(builder("id"), &[(200, TOKEN)]);
        source.fetch(Fetch::new()).await.unwrap();
        assert_eq!(endpoint.authorization(), None);
        let expected = "grant_type=client_credentials&client_id=id";
        assert_eq!(endpoint.bodies(), [expected]);
    }

    #[tokio::test]
    async fn parameters_go_with_both_grants_and_scopes_with_one() {
        let builder = builder("id")
            .client_secret("s")
            .scope("a b")
            .scopes(["c"])
            .param("resource", "urn:1")
            .param("resource", "urn:2");
        let (endpoint, source) = Endpoint::with(builder, &[(500, ""), (200, TOKEN)]);
        source.fetch(with_refresh_token("r1")).await.unwrap();
        let shared = "resource=urn%3A1&resource=urn%3A2";
        assert_eq!(
            endpoint.bodies(),
            [
                format!("grant_type=refresh_token&refresh_token=r1&{shared}"),
                format!("grant_type=client_credentials&scope=a+b+c&{shared}"),
            ]
        );
    }

    #[tokio::test]
    async fn what_a_request_names_replaces_the_settings() {
        let builder = builder("id")
            .scope("s")
            .resource("urn:s1")
            .param("resource", "urn:s2")
            .param("audience", "s1")
            .param("audience", "s2")
            .param("kept", "s");
        let (endpoint, source) = Endpoint::with(builder, &[(200, TOKEN); 4]);
        let request = TokenRequest::new;
        for request in [
            request(),
            request().scope("b").scope("a"),
            request().resource("urn:r2").resource("urn:r1"),
            request().param("audience", "r1").param("new", "r"),
        ] {
            let fetch = Fetch {
                request,
                ..Fetch::new()
            };
            let scope = source.fetch(fetch).await.unwrap().requested_scope;
            assert!(matches!(scope.as_deref(), Some("s" | "a b")), "{scope:?}");
        }
        let start = "grant_type=client_credentials&scope=";
        let id = "&client_id=id&";
        let own = "resource=urn%3As1&resource=urn%3As2";
        let params = "audience=s1&audience=s2&kept=s";
        assert_eq!(
            endpoint.bodies(),
            [
                format!("{start}s{id}{own}&{params}"),
                format!("{start}a+b{id}{own}&{params}"),
                format!("{start}s{id}resource=urn%3Ar1&resource=urn%3Ar2&{params}"),
                format!("{start}s{id}{own}&kept=s&audience=r1&new=r"),
            ]
        );
    }

    #[tokio::test]
    async fn an_invalid_token_request_is_not_sent() {
        let (endpoint, source) = Endpoint::with(builder("id"), &[]);
        let request = TokenRequest::new;
        for request in [
            request().scope("a\"b"),
            request().resource("/CANARY"),
            request().param("", "CANARY"),
            request().param("grant_type", "CANARY"),
            request().param("client_assertion", "CANARY"),
            request().resource("https://api.example/#CANARY"),
        ] {
            let mut fetch = with_refresh_token("r1");
            fetch.request = request;
            let error = source.fetch(fetch).await.unwrap_err();
            assert!(!error.is_transient(), "{error:?}");
            let source = std::error::Error::source(&error).unwrap();
            assert!(source.is::<ConfigError>());
            assert!(!format!("{error:?}").contains("CANARY"), "{error:?}");
        }
        assert!(endpoint.bodies().is_empty());
    }

    #[tokio::test]
    async fn demanded_claims_need_a_new_session() {
        let (endpoint, source) =
            Endpoint::with(builder("id").param("claims", "{}"), &[(200, TOKEN)]);
        let mut fetch = with_refresh_token("r1");
        fetch.claims = Some("{\"a\":1}".to_owned());
        source.fetch(fetch).await.unwrap();
        let expected = "grant_type=client_credentials&client_id=id&claims=%7B%22a%22%3A1%7D";
        assert_eq!(endpoint.bodies(), [expected]);
    }

    #[tokio::test]
    async fn a_refreshed_token_has_the_same_requested_scope() {
        let (endpoint, source) = Endpoint::with(builder("id").scope("a b"), &[(200, TOKEN)]);
        let response = source.fetch(with_refresh_token("r1")).await.unwrap();
        assert_eq!(response.requested_scope.as_deref(), Some("a b"));
        assert!(!endpoint.bodies()[0].contains("scope"));
    }

    #[tokio::test]
    async fn a_refresh_token_that_works_needs_no_other_grant() {
        let refreshed = r#"{"access_token":"refreshed","token_type":"Bearer","expires_in":300,
            "refresh_token":"r2","refresh_expires_in":1800}"#;
        let (endpoint, source) =
            Endpoint::with(builder("id").client_secret("s"), &[(200, refreshed)]);
        let response = source.fetch(with_refresh_token("r1")).await.unwrap();
        assert_eq!(response.access_token.expose_secret(), "refreshed");
        assert_eq!(response.expires_in, Some(Duration::from_secs(300)));
        assert_eq!(response.refresh_token.unwrap().expose_secret(), "r2");
        let expected = "grant_type=refresh_token&refresh_token=r1";
        assert_eq!(endpoint.bodies(), [expected]);
        assert_eq!(endpoint.authorization().as_deref(), Some("Basic aWQ6cw=="));
    }

    /// Law 7: no failure of a refresh token keeps the client from using its own credentials.
    #[tokio::test]
    async fn any_failure_of_a_refresh_token_falls_back_to_client_credentials() {
        for failure in [
            (400, r#"{"error":"invalid_grant"}"#),
            (401, r#"{"error":"invalid_client"}"#),
            (429, ""),
            (503, ""),
            (307, ""),
            (200, "<html>"),
        ] {
            let (endpoint, source) = Endpoint::with(builder("id"), &[failure, (200, TOKEN)]);
            let response = source.fetch(with_refresh_token("r1")).await.unwrap();
            assert_eq!(response.access_token.expose_secret(), "from-credentials");
            assert_eq!(endpoint.bodies().len(), 2, "{failure:?}");
        }
    }

    #[tokio::test]
    async fn the_error_of_an_attempt_is_that_of_its_last_request() {
        let answers = [
            (400, r#"{"error":"invalid_grant"}"#),
            (401, r#"{"error":"invalid_client"}"#),
        ];
        let (_, source) = Endpoint::with(builder("id"), &answers);
        let error = source.fetch(with_refresh_token("r1")).await.unwrap_err();
        assert_eq!(error.oauth_error(), Some("invalid_client"));
    }

    /// A refresh request that hangs leaves half of the attempt for the other grant.
    #[tokio::test(start_paused = true)]
    async fn a_refresh_token_that_hangs_is_given_up_within_the_attempt() {
        let service = tower::service_fn(|request: Request<Full<Bytes>>| async move {
            let body = request.into_body().collect().await?.to_bytes();
            if body.starts_with(b"grant_type=refresh_token") {
                std::future::pending::<()>().await;
            }
            Ok::<_, Infallible>(Response::new(Full::<Bytes>::from(TOKEN)))
        });
        let source = builder("id").build_with(service).unwrap();
        let mut fetch = with_refresh_token("r1");
        fetch.timeout = Duration::from_secs(10);
        let start = Instant::now();
        let response = source.fetch(fetch).await.unwrap();
        assert_eq!(response.access_token.expose_secret(), "from-credentials");
        assert!(start.elapsed() < Duration::from_millis(5_100));
    }

    #[tokio::test]
    async fn lifetimes_count_from_just_before_the_request_that_succeeded() {
        let (_, source) = Endpoint::with(builder("id"), &[(200, TOKEN)]);
        let before = crate::time::Now::read();
        let response = source.fetch(Fetch::new()).await.unwrap();
        let sent = response.sent.unwrap();
        assert!(before.monotonic <= sent.monotonic);
        assert!(sent.monotonic <= crate::time::Now::read().monotonic);
    }

    #[tokio::test]
    async fn a_fetch_can_be_spawned_and_dropped() {
        let (endpoint, source) = Endpoint::with(builder("id"), &[(200, TOKEN)]);
        drop(source.fetch(Fetch::new()));
        let task = tokio::spawn(async move { source.fetch(Fetch::new()).await });
        assert!(task.await.unwrap().is_ok());
        assert_eq!(endpoint.bodies().len(), 1);
    }
}
