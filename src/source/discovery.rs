//! An authorization server's metadata: RFC 8414 and OpenID Connect Discovery.

use std::{sync::Arc, time::Duration};

use http::{Request, StatusCode, header::ACCEPT};
use oauth2::{TokenUrl, url::Url};
use serde_json::{Map, Value};

use super::{
    lease::LeasedLock,
    response::{Answer, malformed},
    server::{Endpoints, check_url, parse_url},
    transport::Transport,
    with_timeout,
};
use crate::{
    error::{ConfigError, Kind, RequestKind, TokenError},
    sync::Mutex,
};

/// The issuer of the server to discover.
pub(super) struct Issuer {
    /// As it was configured, to be compared exactly.
    pub(super) identifier: String,
    /// Where its metadata may be, in the order in which they are tried.
    documents: Vec<Url>,
    plain_http: bool,
    /// Some servers have other endpoints for clients with a certificate.
    presents_certificate: bool,
    /// As configured; takes precedence over the server's.
    pub(super) revocation_url: Option<Url>,
}

impl Issuer {
    pub(super) fn new(
        identifier: &str,
        plain_http: bool,
        presents_certificate: bool,
        revocation_url: Option<Url>,
    ) -> Result<Self, ConfigError> {
        let url = parse_url(identifier, "issuer", plain_http)?;
        if url.query().is_some() {
            // RFC 8414 section 2.
            return Err(ConfigError::new("the issuer URL must not have a query"));
        }
        let path = url.path().trim_end_matches('/').to_owned();
        let at = |path: String| {
            let mut url = url.clone();
            url.set_path(&path);
            url
        };
        let mut documents = vec![
            // RFC 8414 section 3.1: between host and path.
            at(format!("/.well-known/oauth-authorization-server{path}")),
            // OpenID Connect Discovery section 4: after the path.
            at(format!("{path}/.well-known/openid-configuration")),
            // A mix of both, as Databricks has it.
            at(format!("{path}/.well-known/oauth-authorization-server")),
        ];
        if path.is_empty() {
            documents.pop();
        }
        Ok(Self {
            identifier: identifier.to_owned(),
            documents,
            plain_http,
            presents_certificate,
            revocation_url,
        })
    }

    /// The URL that is tried first.
    #[cfg(feature = "rustls")]
    pub(super) fn url(&self) -> &Url {
        &self.documents[0]
    }

    async fn fetch(&self, transport: &Transport) -> Result<Endpoints, TokenError> {
        let mut refusal = None;
        let mut failure = None;
        for url in &self.documents {
            let request = Request::get(url.as_str())
                .header(ACCEPT, "application/json")
                .body(Vec::new())
                .expect("the URL was checked");
            let metadata = transport
                .send(request)
                .await
                .and_then(Answer::into_metadata);
            let endpoints = metadata.and_then(|metadata| self.read(&metadata));
            match endpoints.map_err(|error| error.with_request(RequestKind::Metadata)) {
                Ok(endpoints) => return Ok(endpoints),
                // The other documents are on the same host.
                Err(error)
                    if error.is_transport()
                        || error.is_timeout()
                        || error.retry_after().is_some() =>
                {
                    return Err(error);
                }
                // Some servers answer every path, so another document may still be the right one.
                Err(error) if error.is_transient() => {
                    let says_more = |failure: &TokenError| weight(failure) >= weight(&error);
                    failure = failure.filter(says_more).or(Some(error));
                }
                Err(error) => refusal = Some(error),
            }
        }
        Err(refusal.or(failure).expect("one of them failed"))
    }

    fn read(&self, metadata: &Map<String, Value>) -> Result<Endpoints, TokenError> {
        // RFC 8414 section 3.3: or anyone could have our secret sent to them.
        if text(metadata, "issuer") != Some(&*self.identifier) {
            return Err(TokenError::new(Kind::OtherIssuer));
        }
        let aliases = match metadata.get("mtls_endpoint_aliases") {
            Some(Value::Object(aliases)) if self.presents_certificate => Some(aliases),
            _ => None,
        };
        let endpoint = |name| {
            aliases
                .and_then(|aliases| text(aliases, name))
                .or_else(|| text(metadata, name))
        };
        let token_url = endpoint("token_endpoint")
            .ok_or_else(|| malformed("the metadata name no token_endpoint"))?;
        let token_url = TokenUrl::new(token_url.to_owned())
            .map_err(|_| malformed("the token_endpoint of the metadata is not a URL"))?;
        check_url(token_url.url(), "token", self.plain_http).map_err(TokenError::terminal)?;
        // Only revocation depends on this one.
        let revocation_url = endpoint("revocation_endpoint")
            .and_then(|url| parse_url(url, "revocation", self.plain_http).ok());
        Ok(Endpoints {
            token_url,
            revocation_url: self.revocation_url.clone().or(revocation_url),
            #[cfg(feature = "jwt")]
            issuer: Some(self.identifier.clone()),
            auth_methods: texts(metadata, "token_endpoint_auth_methods_supported"),
            #[cfg(feature = "jwt")]
            algorithms: texts(metadata, "token_endpoint_auth_signing_alg_values_supported"),
        })
    }
}

/// The metadata of an authorization server, cached until the endpoints fail.
pub(super) struct Discovery {
    pub(super) issuer: Issuer,
    state: Mutex<State>,
    /// Held during a fetch, so that the token requests of many keys share one.
    lock: LeasedLock,
}

#[derive(Default)]
struct State {
    /// The endpoints or an error, once there was a fetch.
    outcome: Option<Result<Arc<Endpoints>, TokenError>>,
    /// Whether the endpoints have failed, so that they may have moved.
    stale: bool,
    /// How many fetches there were.
    fetches: u64,
}

impl Discovery {
    pub(super) fn new(issuer: Issuer) -> Self {
        Self {
            issuer,
            state: Mutex::new(State::default()),
            lock: LeasedLock::new(),
        }
    }

    /// Has the metadata fetched again before the next request.
    pub(super) fn mark_stale(&self) {
        self.state.lock().stale = true;
    }

    /// Returns the cached endpoints, or fetches them over `transport`. `limit` bounds the search for newer ones.
    pub(super) async fn endpoints(
        &self,
        transport: &Transport,
        limit: Duration,
    ) -> Result<Arc<Endpoints>, TokenError> {
        let fetches = {
            let state = self.state.lock();
            if let (Some(Ok(endpoints)), false) = (&state.outcome, state.stale) {
                return Ok(endpoints.clone());
            }
            state.fetches
        };
        let _guard = self.lock.acquire().await;
        let has_endpoints = {
            let state = self.state.lock();
            match &state.outcome {
                // A failure is shared too, or all waiters would repeat it one after the other.
                Some(outcome) if state.fetches != fetches => return outcome.clone(),
                outcome => matches!(outcome, Some(Ok(_))),
            }
        };
        let fetching = self.issuer.fetch(transport);
        let found = match has_endpoints {
            true => with_timeout(limit, fetching).await,
            // The attempt can do nothing else.
            false => fetching.await,
        };
        let mut state = self.state.lock();
        state.fetches += 1;
        let outcome = match (found, &state.outcome) {
            (Ok(endpoints), _) => {
                state.stale = false;
                Ok(Arc::new(endpoints))
            }
            // Old endpoints are better than none.
            (Err(_), Some(Ok(endpoints))) => Ok(endpoints.clone()),
            (Err(error), _) => Err(error),
        };
        state.outcome.insert(outcome).clone()
    }
}

/// A request to the endpoints in flight. If it is dropped before its end, as by a timeout, the metadata are stale.
pub(super) struct MetadataGuard<'a>(pub(super) Option<&'a Discovery>);

impl MetadataGuard<'_> {
    /// Marks the metadata stale only if the outcome suggests it.
    pub(super) fn finish(mut self, failure: Option<&TokenError>) {
        if !failure.is_some_and(suggests_stale_metadata) {
            self.0 = None;
        }
    }
}

impl Drop for MetadataGuard<'_> {
    fn drop(&mut self) {
        if let Some(discovery) = self.0 {
            discovery.mark_stale();
        }
    }
}

/// Whether an error may mean that an endpoint has moved, or wants another authentication method than the metadata say.
/// A busy endpoint has done neither.
fn suggests_stale_metadata(error: &TokenError) -> bool {
    let unknown = error.is_of_unknown_client();
    let gone = matches!(
        error.status(),
        Some(StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::GONE)
    );
    let busy =
        error.status() == Some(StatusCode::TOO_MANY_REQUESTS) || error.retry_after().is_some();
    unknown
        || gone
        || error.is_transport()
        || error.is_timeout()
        || (error.is_unavailable() && !busy)
}

/// How much a document's failure says about the server: that it is not there, the least; that it may not be read is
/// often said of any other path than the one that is there.
fn weight(failure: &TokenError) -> u8 {
    match failure.status() {
        Some(StatusCode::NOT_FOUND) => 0,
        Some(status) if status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS => 1,
        _ => 2,
    }
}

fn text<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    object.get(name)?.as_str()
}

fn texts(object: &Map<String, Value>, name: &str) -> Option<Vec<String>> {
    let texts = object.get(name)?.as_array()?.iter();
    Some(
        texts
            .filter_map(|text| Some(text.as_str()?.to_owned()))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, convert::Infallible};

    use bytes::Bytes;
    use http::Response;
    use http_body_util::{BodyExt, Full};
    use serde_json::json;
    use tokio::time;

    use super::*;
    use crate::{
        AuthMethod, ClientCredentials, ClientCredentialsBuilder, Credential, Fetch, RefreshToken,
        Revocation, TokenSource,
    };

    const ISSUER: &str = "https://as.example/realms/a";
    const OAUTH: &str = "/.well-known/oauth-authorization-server/realms/a";
    const OPENID: &str = "/realms/a/.well-known/openid-configuration";
    const BEHIND: &str = "/realms/a/.well-known/oauth-authorization-server";

    /// A server that answers by path, with 404 for unknown ones, and records the requests.
    #[derive(Clone)]
    struct Server(Arc<Mutex<Inner>>);

    struct Inner {
        answers: HashMap<String, (u16, String)>,
        /// Path and body.
        asked: Vec<(String, String)>,
        headers: Vec<Option<String>>,
        hanging: bool,
    }

    impl Server {
        fn new() -> Self {
            let server = Self(Arc::new(Mutex::new(Inner {
                answers: HashMap::new(),
                asked: Vec::new(),
                headers: Vec::new(),
                hanging: false,
            })));
            server.answer("/token", 200, TOKEN);
            server
        }

        fn with(path: &str, metadata: &Value) -> Self {
            let server = Self::new();
            server.answer(path, 200, &metadata.to_string());
            server
        }

        fn answer(&self, path: &str, status: u16, body: &str) {
            let answer = (status, body.to_owned());
            self.0.lock().answers.insert(path.to_owned(), answer);
        }

        fn source(&self, builder: ClientCredentialsBuilder) -> ClientCredentials {
            let server = self.clone();
            let service = move |request: Request<Full<Bytes>>| {
                let server = server.clone();
                async move {
                    tokio::task::yield_now().await;
                    let path = request.uri().path().to_owned();
                    let header = request.headers().get("authorization").cloned();
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    let body = String::from_utf8(body.to_vec()).unwrap();
                    let (hanging, (status, answer)) = {
                        let mut inner = server.0.lock();
                        inner.asked.push((path.clone(), body));
                        let header = header.map(|value| value.to_str().unwrap().to_owned());
                        inner.headers.push(header);
                        let unknown = (404, String::new());
                        let answer = inner.answers.get(&path).cloned().unwrap_or(unknown);
                        (inner.hanging && path != "/token", answer)
                    };
                    if hanging {
                        std::future::pending::<()>().await;
                    }
                    let response = Response::builder().status(status);
                    Ok::<_, Infallible>(response.body(Full::<Bytes>::from(answer)).unwrap())
                }
            };
            builder.build_with(tower::service_fn(service)).unwrap()
        }

        /// The paths of the requests since the last call.
        fn paths(&self) -> Vec<String> {
            let asked = std::mem::take(&mut self.0.lock().asked);
            asked.into_iter().map(|(path, _)| path).collect()
        }

        fn bodies(&self) -> Vec<String> {
            let asked = std::mem::take(&mut self.0.lock().asked);
            asked.into_iter().map(|(_, body)| body).collect()
        }
    }

    const TOKEN: &str = r#"{"access_token":"token","token_type":"Bearer"}"#;

    fn metadata() -> Value {
        json!({"issuer": ISSUER, "token_endpoint": "https://as.example/token"})
    }

    fn builder() -> ClientCredentialsBuilder {
        ClientCredentials::discover(ISSUER, "id").client_secret("s")
    }

    async fn fetch(source: &ClientCredentials) -> Result<(), TokenError> {
        source.fetch(Fetch::new()).await.map(drop)
    }

    #[tokio::test]
    async fn metadata_are_looked_for_in_all_places_and_cached() {
        for (place, expected) in [
            (OAUTH, &[OAUTH, "/token", "/token"][..]),
            (OPENID, &[OAUTH, OPENID, "/token", "/token"]),
            (BEHIND, &[OAUTH, OPENID, BEHIND, "/token", "/token"]),
        ] {
            let server = Server::with(place, &metadata());
            let source = server.source(builder());
            assert!(server.paths().is_empty(), "nothing is sent at build");
            fetch(&source).await.unwrap();
            fetch(&source).await.unwrap();
            assert_eq!(server.paths(), expected);
        }
    }

    #[tokio::test]
    async fn a_slash_at_the_end_belongs_to_the_issuer_and_not_to_the_path() {
        for (issuer, oauth, openid) in [
            (
                "https://as.example",
                "/.well-known/oauth-authorization-server",
                "/.well-known/openid-configuration",
            ),
            (
                "https://as.example/",
                "/.well-known/oauth-authorization-server",
                "/.well-known/openid-configuration",
            ),
            (
                "https://as.example/a/",
                "/.well-known/oauth-authorization-server/a",
                "/a/.well-known/openid-configuration",
            ),
        ] {
            let mut metadata = metadata();
            metadata["issuer"] = issuer.into();
            let server = Server::with(openid, &metadata);
            fetch(&server.source(ClientCredentials::discover(issuer, "id")))
                .await
                .unwrap();
            assert_eq!(server.paths(), [oauth, openid, "/token"]);
        }
    }

    /// RFC 8414 section 3.3: the secret goes nowhere that another issuer names.
    #[tokio::test]
    async fn metadata_of_another_issuer_are_not_used() {
        for issuer in [
            json!("https://as.example/realms/a/"),
            json!("https://as.example/realms/A"),
            json!("https://AS.example/realms/a"),
            json!("https://other.example"),
            json!([ISSUER]),
            Value::Null,
        ] {
            for place in [OAUTH, OPENID, BEHIND] {
                let mut other = metadata();
                other["issuer"] = issuer.clone();
                let server = Server::with(place, &other);
                let error = fetch(&server.source(builder())).await.unwrap_err();
                assert!(!error.is_transient(), "{issuer}");
                // The message alone says so.
                assert_eq!(
                    error.to_string(),
                    "the authorization server's metadata are those of another issuer"
                );
                assert_eq!(server.paths(), [OAUTH, OPENID, BEHIND]);
            }
        }
        // The other document of a server that answers for its root everywhere is still right.
        let server = Server::with(OAUTH, &json!({"issuer": "https://as.example"}));
        server.answer(OPENID, 200, &metadata().to_string());
        fetch(&server.source(builder())).await.unwrap();
    }

    #[tokio::test]
    async fn metadata_that_cannot_be_fetched_or_read_are_transient() {
        let without_endpoint = json!({"issuer": ISSUER}).to_string();
        let large = format!("\"{}\"", "a".repeat(1024 * 1024));
        for (status, body) in [
            (404, ""),
            (302, ""),
            (500, ""),
            (403, "<html>"),
            (200, "<html>"),
            (200, "[]"),
            (200, &without_endpoint),
            (200, &large),
        ] {
            let server = Server::new();
            server.answer(OAUTH, status, body);
            server.answer(OPENID, status, body);
            let error = fetch(&server.source(builder())).await.unwrap_err();
            assert!(error.is_transient(), "{status} {error:?}");
            assert_eq!(server.paths(), [OAUTH, OPENID, BEHIND]);
        }
    }

    /// Or an operator would suspect an endpoint that was never asked.
    #[tokio::test]
    async fn a_metadata_error_does_not_name_the_token_endpoint() {
        let other = json!({"issuer": "https://other.example"}).to_string();
        for (status, body, expected) in [
            (
                404,
                "",
                "the metadata endpoint is not available (status 404)",
            ),
            (
                200,
                "<html>",
                "the authorization server's metadata cannot be used (status 200)",
            ),
            (
                200,
                &other,
                "the authorization server's metadata are those of another issuer",
            ),
        ] {
            let server = Server::new();
            server.answer(OAUTH, status, body);
            server.answer(OPENID, status, body);
            let error = fetch(&server.source(builder())).await.unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
        // Here the metadata were found.
        let server = Server::with(OAUTH, &metadata());
        server.answer("/token", 404, "");
        let error = fetch(&server.source(builder())).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "the token endpoint is not available (status 404)"
        );
    }

    /// A front end may answer 404 or 403 for all paths but the one of the server.
    #[tokio::test]
    async fn the_error_is_that_of_the_document_that_says_most() {
        for (oauth, openid, expected) in [
            (404, 503, 503),
            (403, 503, 503),
            (503, 403, 503),
            (403, 429, 429),
            (404, 403, 403),
            (403, 404, 403),
            (500, 503, 500),
        ] {
            let server = Server::new();
            server.answer(OAUTH, oauth, "");
            server.answer(OPENID, openid, "");
            let error = fetch(&server.source(builder())).await.unwrap_err();
            assert_eq!(error.status().unwrap(), expected, "{oauth} {openid}");
        }
    }

    /// Law 9: metadata make no exception to where the secret may go.
    #[tokio::test]
    async fn a_token_endpoint_that_is_not_secure_is_refused() {
        for url in [
            "http://as.example/token",
            "https://a:CANARY@as.example/",
            "ftp://as.example",
        ] {
            let mut insecure = metadata();
            insecure["token_endpoint"] = url.into();
            let server = Server::with(OAUTH, &insecure);
            let error = fetch(&server.source(builder())).await.unwrap_err();
            assert!(!error.is_transient());
            assert!(!format!("{error:?}").contains("CANARY"));
            assert!(!server.paths().contains(&"/token".to_owned()));
        }
        let bad = |issuer: &str| {
            let builder = ClientCredentials::discover(issuer, "id");
            let service = |_: Request<Full<Bytes>>| async {
                Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
            };
            builder.build_with(tower::service_fn(service)).is_err()
        };
        assert!(bad("http://as.example") && bad("as.example") && bad("https://as.example?a=b"));
    }

    #[tokio::test]
    async fn the_method_is_one_that_the_server_supports() {
        for (supported, header, body) in [
            (Value::Null, true, "grant_type=client_credentials"),
            (
                json!([
                    "private_key_jwt",
                    "client_secret_post",
                    "client_secret_basic"
                ]),
                true,
                "grant_type=client_credentials",
            ),
            // Mock servers say this, and accept anything.
            (json!(["none"]), true, "grant_type=client_credentials"),
            (
                json!(["client_secret_jwt", "client_secret_post"]),
                false,
                "grant_type=client_credentials&client_id=id&client_secret=s",
            ),
        ] {
            let mut metadata = metadata();
            metadata["token_endpoint_auth_methods_supported"] = supported;
            let server = Server::with(OAUTH, &metadata);
            fetch(&server.source(builder())).await.unwrap();
            assert_eq!(server.0.lock().headers[1].is_some(), header);
            assert_eq!(server.bodies()[1], body);
        }
        let mut metadata = metadata();
        metadata["token_endpoint_auth_methods_supported"] = json!(["private_key_jwt"]);
        let server = Server::with(OAUTH, &metadata);
        let source = server.source(builder());
        assert!(!fetch(&source).await.unwrap_err().is_transient());
        // Law 7: the server may support it later.
        server.answer(OAUTH, 200, &self::metadata().to_string());
        fetch(&source).await.unwrap();
        server.answer(OAUTH, 200, &metadata.to_string());
        // A configured method is not questioned.
        let set = builder().auth_method(AuthMethod::ClientSecretPost);
        fetch(&server.source(set)).await.unwrap();
    }

    #[cfg(feature = "jwt")]
    #[tokio::test]
    async fn assertions_are_addressed_to_the_issuer() {
        let mut metadata = metadata();
        metadata["token_endpoint_auth_methods_supported"] = json!(["client_secret_jwt"]);
        metadata["token_endpoint_auth_signing_alg_values_supported"] = json!(["HS384"]);
        let server = Server::with(OAUTH, &metadata);
        fetch(&server.source(builder())).await.unwrap();
        let body = &server.bodies()[1];
        let (_, assertion) = body.rsplit_once("&client_assertion=").unwrap();
        let mut validation = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::HS384);
        validation.set_audience(&[ISSUER]);
        let key = jsonwebtoken::DecodingKey::from_secret(b"s");
        jsonwebtoken::decode::<Value>(assertion, &key, &validation).unwrap();
    }

    /// RFC 8705 section 5.
    #[tokio::test]
    async fn a_client_with_a_certificate_goes_to_the_alias() {
        let mut metadata = metadata();
        metadata["mtls_endpoint_aliases"] = json!({"token_endpoint": "https://as.example/mtls"});
        let server = Server::with(OAUTH, &metadata);
        server.answer("/mtls", 200, TOKEN);
        fetch(&server.source(builder())).await.unwrap();
        assert_eq!(server.paths(), [OAUTH, "/token"]);
        let mutual =
            ClientCredentials::discover(ISSUER, "id").auth_method(AuthMethod::TlsClientAuth);
        fetch(&server.source(mutual)).await.unwrap();
        assert_eq!(server.paths(), [OAUTH, "/mtls"]);
    }

    #[tokio::test]
    async fn many_keys_fetch_metadata_once_and_share_a_failure() {
        for found in [true, false] {
            let server = Server::new();
            if found {
                server.answer(OAUTH, 200, &metadata().to_string());
            }
            let source = server.source(builder());
            let fetches: Vec<_> = (0..50)
                .map(|_| {
                    let source = source.clone();
                    tokio::spawn(async move { fetch(&source).await })
                })
                .collect();
            for fetch in fetches {
                assert_eq!(fetch.await.unwrap().is_ok(), found);
            }
            let paths = server.paths();
            let documents = paths.iter().filter(|path| *path != "/token").count();
            assert_eq!(documents, if found { 1 } else { 3 });
        }
    }

    /// Law 5: a request that is dropped during the fetch takes no other along.
    #[tokio::test(start_paused = true)]
    async fn a_dropped_discovery_does_not_block_the_next() {
        let server = Server::with(OAUTH, &metadata());
        let source = server.source(builder());
        server.0.lock().hanging = true;
        let first = time::timeout(Duration::from_secs(1), fetch(&source));
        assert!(first.await.is_err());
        server.0.lock().hanging = false;
        fetch(&source).await.unwrap();
    }

    /// Law 6: a parked runtime holds the lock for as long as an attempt, not forever.
    #[tokio::test(start_paused = true)]
    async fn a_discovery_on_a_parked_runtime_does_not_block_the_next() {
        let server = Server::with(OAUTH, &metadata());
        let source = server.source(builder());
        server.0.lock().hanging = true;
        let mut parked = std::pin::pin!(fetch(&source));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(parked.as_mut().poll(&mut context).is_pending());
        server.0.lock().hanging = false;
        let limit = Duration::from_secs(11);
        time::timeout(limit, fetch(&source)).await.unwrap().unwrap();
        time::timeout(limit, fetch(&source)).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn metadata_are_fetched_anew_when_the_endpoints_fail() {
        for (status, body, moved) in [
            (404, r#"{"error":"not_found"}"#, true),
            (405, "", true),
            (410, "", true),
            (500, "", true),
            (302, "", true),
            (429, "", false),
            (400, r#"{"error":"invalid_scope"}"#, false),
            (401, r#"{"error":"invalid_client"}"#, true),
            (401, r#"{"error":"unauthorized_client"}"#, true),
            (400, r#"{"error":"unauthorized_client"}"#, false),
            (200, "{}", false),
        ] {
            let server = Server::with(OAUTH, &metadata());
            let source = server.source(builder());
            server.answer("/token", status, body);
            fetch(&source).await.unwrap_err();
            let mut elsewhere = metadata();
            elsewhere["token_endpoint"] = "https://as.example/moved".into();
            server.answer(OAUTH, 200, &elsewhere.to_string());
            server.answer("/moved", 200, TOKEN);
            server.paths();
            assert_eq!(fetch(&source).await.is_ok(), moved, "{status}");
            let expected = if moved {
                &[OAUTH, "/moved"][..]
            } else {
                &["/token"]
            };
            assert_eq!(server.paths(), expected, "{status}");
        }
    }

    /// Law 7: if the metadata are gone, or hang, the old endpoints are still tried.
    #[tokio::test(start_paused = true)]
    async fn old_endpoints_are_better_than_none() {
        for hanging in [false, true] {
            let server = Server::with(OAUTH, &metadata());
            let source = server.source(builder());
            server.answer("/token", 503, "");
            fetch(&source).await.unwrap_err();
            server.answer("/token", 200, TOKEN);
            server.answer(OAUTH, 503, "");
            server.0.lock().hanging = hanging;
            let attempt = time::timeout(Fetch::new().timeout, fetch(&source));
            attempt.await.expect("it keeps to its time").unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_token_request_makes_the_metadata_stale() {
        let server = Server::with(OAUTH, &metadata());
        let mut slow = metadata();
        slow["token_endpoint"] = "https://as.example/slow".into();
        server.answer(OAUTH, 200, &slow.to_string());
        let source = server.source(builder());
        fetch(&source).await.unwrap_err();
        server.answer("/slow", 200, TOKEN);
        fetch(&source).await.unwrap();
        server.0.lock().hanging = true;
        let cut = time::timeout(Duration::from_secs(10), fetch(&source));
        assert!(cut.await.is_err());
        server.0.lock().hanging = false;
        server.paths();
        fetch(&source).await.unwrap();
        assert_eq!(server.paths(), [OAUTH, "/slow"]);
    }

    async fn revocation(refresh: bool) -> Revocation {
        let source = crate::source_fn(|_| async { crate::TokenResponse::new("access") });
        Revocation {
            refresh_token: refresh.then(|| RefreshToken::new("refresh")),
            access_token: Some(crate::TokenCache::new(source).get().await.unwrap()),
        }
    }

    #[tokio::test]
    async fn tokens_are_revoked_where_the_server_says_refresh_token_first() {
        let mut metadata = metadata();
        metadata["revocation_endpoint"] = "https://as.example/revoke".into();
        let server = Server::with(OAUTH, &metadata);
        server.answer("/revoke", 200, "");
        server.answer("/own", 200, "");
        for (builder, path) in [
            (builder().scope("a").resource("urn:a"), "/revoke"),
            (builder().revocation_url("https://as.example/own"), "/own"),
        ] {
            let source = server.source(builder);
            source.revoke(revocation(true).await).await.unwrap();
            let asked = std::mem::take(&mut server.0.lock().asked);
            let expected = [
                "token=refresh&token_type_hint=refresh_token",
                "token=access&token_type_hint=access_token",
            ];
            let expected = expected.map(|body| (path.to_owned(), body.to_owned()));
            assert_eq!(asked[1..], expected);
        }
        // base64 of "id:s"
        assert_eq!(
            server.0.lock().headers[1].as_deref(),
            Some("Basic aWQ6cw==")
        );
        let post = server.source(builder().auth_method(AuthMethod::ClientSecretPost));
        post.revoke(revocation(false).await).await.unwrap();
        let expected = "client_id=id&client_secret=s&token=access&token_type_hint=access_token";
        assert_eq!(server.bodies()[1], expected);
    }

    #[tokio::test]
    async fn a_failed_revocation_does_not_stop_the_other() {
        let builder = ClientCredentials::builder("https://as.example/token", "id");
        let server = Server::new();
        server.answer("/revoke", 400, r#"{"error":"unsupported_token_type"}"#);
        let source = server.source(builder.revocation_url("https://as.example/revoke"));
        let error = source.revoke(revocation(true).await).await.unwrap_err();
        assert_eq!(error.oauth_error(), Some("unsupported_token_type"));
        assert_eq!(server.paths(), ["/revoke", "/revoke"]);

        let builder = ClientCredentials::builder("https://as.example/token", "id");
        let source = server.source(builder);
        let error = source.revoke(revocation(true).await).await.unwrap_err();
        assert!(!error.is_transient());
        assert_eq!(error.to_string(), "tokens cannot be revoked");
        assert!(server.paths().is_empty());
    }

    /// By default, a cache allows 10 s for all of it.
    #[tokio::test(start_paused = true)]
    async fn a_server_that_hangs_leaves_time_to_revoke_both_tokens() {
        let mut metadata = metadata();
        metadata["revocation_endpoint"] = "https://as.example/revoke".into();
        let server = Server::with(OAUTH, &metadata);
        let source = server.source(builder());
        server.answer("/token", 404, "");
        fetch(&source).await.unwrap_err();
        server.paths();
        server.0.lock().hanging = true;
        let revoking = source.revoke(revocation(true).await);
        let revoked = time::timeout(Duration::from_secs(10), revoking).await;
        assert!(revoked.unwrap().unwrap_err().is_timeout());
        assert_eq!(server.paths(), [OAUTH, "/revoke", "/revoke"]);
    }

    /// A changed secret is noticed here too.
    #[tokio::test]
    async fn a_refused_revocation_obtains_a_new_secret() {
        let count = std::sync::atomic::AtomicUsize::new(0);
        let secret = Credential::from_fn(move || {
            let count = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            async move { Ok(count.to_string()) }
        });
        let server = Server::new();
        server.answer("/revoke", 401, r#"{"error":"invalid_client"}"#);
        let builder = ClientCredentials::builder("https://as.example/token", "id")
            .client_secret(secret)
            .revocation_url("https://as.example/revoke");
        let source = server.source(builder);
        source.revoke(revocation(false).await).await.unwrap_err();
        assert_eq!(server.paths().len(), 2);
    }
}
