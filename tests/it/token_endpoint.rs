//! What becomes of a token endpoint's answers, over real sockets.

#![cfg(feature = "rustls")]
use std::{
    error::Error,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use axum::{
    Router,
    body::Body,
    http::{Response, StatusCode, header},
    routing::post,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tower_bearer::{
    ClientCredentials, Fetch, RefreshPolicy, TokenCache, TokenError, TokenResponse, TokenSource,
};

const SECRET: &str = "CANARY-client-secret";

fn source(endpoint: SocketAddr) -> ClientCredentials {
    ClientCredentials::builder(format!("http://{endpoint}/token"), "client-id")
        .client_secret(SECRET)
        .build()
        .unwrap()
}

async fn fetch(endpoint: SocketAddr) -> Result<TokenResponse, TokenError> {
    source(endpoint).fetch(Fetch::new()).await
}

/// An endpoint that gives every request the same answer.
async fn answering(
    answer: impl Fn() -> Response<Body> + Clone + Send + Sync + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/token", post(move || async move { answer() }));
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

async fn answering_with(
    status: u16,
    headers: &[(header::HeaderName, String)],
    body: &'static str,
) -> SocketAddr {
    let headers = headers.to_vec();
    answering(move || {
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        for (name, value) in &headers {
            response.headers_mut().insert(name, value.parse().unwrap());
        }
        response
    })
    .await
}

/// An endpoint that has one connection handled by `serve`, below HTTP.
async fn raw<F, Fut>(serve: F) -> SocketAddr
where
    F: FnOnce(TcpStream) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        serve(stream).await;
    });
    address
}

/// Reads a whole token request, so that closing the connection does not reset it.
async fn read_request(stream: &mut (impl AsyncRead + Unpin)) {
    let mut request = Vec::new();
    // The last parameter of the only request that these tests send.
    while !request.ends_with(b"client_credentials") {
        assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0);
    }
}

/// Everything that an error says of itself, down to its last source.
fn everything(error: &(dyn Error + 'static)) -> String {
    std::iter::successors(Some(error), |&error| error.source())
        .map(|error| format!("{error}\n{error:?}\n{error:#?}\n"))
        .collect()
}

/// Law 9: a redirect takes the secret nowhere else.
#[tokio::test]
async fn redirects_are_not_followed() {
    for status in [301, 302, 303, 307, 308] {
        let elsewhere = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let location = format!("http://{}/CANARY", elsewhere.local_addr().unwrap());
        let endpoint = answering_with(status, &[(header::LOCATION, location)], "").await;

        let error = fetch(endpoint).await.unwrap_err();

        assert_eq!(error.status().unwrap().as_u16(), status);
        assert!(error.is_transient() && !error.is_rejected());
        assert!(!everything(&error).contains("CANARY"));
        // A connection would wait in the listener's queue by now.
        let knock = tokio::time::timeout(Duration::from_millis(20), elsewhere.accept());
        assert!(knock.await.is_err(), "{status} was followed");
    }
}

#[tokio::test]
async fn an_answer_beyond_the_limit_is_not_read_to_its_end() {
    const SIZE: usize = 10 * 1024 * 1024;
    let written = Arc::new(AtomicUsize::new(0));
    let (done, server_done) = tokio::sync::oneshot::channel();
    let count = written.clone();
    let endpoint = raw(|mut stream| async move {
        read_request(&mut stream).await;
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {SIZE}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        while count.load(Ordering::Relaxed) < SIZE {
            match stream.write(&[b' '; 16 * 1024]).await {
                Ok(size) => count.fetch_add(size, Ordering::Relaxed),
                Err(_) => break,
            };
        }
        let _ = done.send(());
    })
    .await;

    let error = fetch(endpoint).await.unwrap_err();

    assert!(error.is_malformed_response() && error.is_transient());
    assert_eq!(error.status(), Some(StatusCode::OK));
    // The client hung up, or the server would have written everything.
    server_done.await.unwrap();
    assert!(written.load(Ordering::Relaxed) < SIZE);
}

/// Law 6 (T12): each byte comes in time, and the answer never does.
#[tokio::test]
async fn an_answer_that_drips_is_cut_at_the_attempts_timeout() {
    let endpoint = raw(|mut stream| async move {
        read_request(&mut stream).await;
        let head = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n";
        let mut written = stream.write_all(head).await;
        while written.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
            written = stream.write_all(b" ").await;
        }
    })
    .await;
    let source = ClientCredentials::builder(format!("http://{endpoint}/token"), "id");
    let policy = RefreshPolicy::new()
        .attempts(1)
        .attempt_timeout(Duration::from_millis(200));
    let cache = TokenCache::with_policy(source.build().unwrap(), policy);

    let error = cache.get().await.unwrap_err();

    assert!(error.is_timeout() && error.is_transient(), "{error:?}");
}

/// T12: nobody asked for a coding, so none is undone and no bomb goes off.
#[tokio::test]
async fn a_compressed_answer_is_not_expanded() {
    let gzip = [(header::CONTENT_ENCODING, "gzip".to_owned())];
    let endpoint = answering_with(200, &gzip, "\u{1f}\u{8}\0\0\0").await;
    let error = fetch(endpoint).await.unwrap_err();
    assert!(error.is_malformed_response(), "{error:?}");
}

#[tokio::test]
async fn a_connection_that_breaks_within_the_answer_is_a_transport_failure() {
    let endpoint = raw(|mut stream| async move {
        read_request(&mut stream).await;
        let part = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"access_token\":\"CANARY";
        stream.write_all(part).await.unwrap();
    })
    .await;

    let error = fetch(endpoint).await.unwrap_err();

    assert!(error.is_transport() && error.is_transient(), "{error:?}");
    assert!(!everything(&error).contains("CANARY"));
}

#[tokio::test]
async fn an_endpoint_that_nobody_listens_at_is_a_transport_failure() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap();
    drop(listener);
    let error = fetch(endpoint).await.unwrap_err();
    assert!(error.is_transport() && error.is_transient(), "{error:?}");
    assert_eq!(error.status(), None);
}

#[tokio::test]
async fn a_firewalls_page_is_transient() {
    let html = [(header::CONTENT_TYPE, "text/html".to_owned())];
    let endpoint = answering_with(403, &html, "<html>blocked</html>").await;
    let error = fetch(endpoint).await.unwrap_err();
    assert!(error.is_transient() && !error.is_rejected());
    assert_eq!(error.status(), Some(StatusCode::FORBIDDEN));
}

#[tokio::test]
async fn a_refused_client_is_terminal() {
    let body = r#"{"error":"invalid_client","error_description":"CANARY"}"#;
    let challenge = [(
        header::WWW_AUTHENTICATE,
        "Basic realm=\"CANARY\"".to_owned(),
    )];
    let endpoint = answering_with(401, &challenge, body).await;
    let error = fetch(endpoint).await.unwrap_err();
    assert!(error.is_rejected() && !error.is_transient());
    assert_eq!(error.status(), Some(StatusCode::UNAUTHORIZED));
    assert_eq!(error.oauth_error(), Some("invalid_client"));
    assert!(!everything(&error).contains("CANARY"));
}

#[tokio::test]
async fn retry_after_is_read_as_seconds_and_as_a_date() {
    let seconds = [(header::RETRY_AFTER, "7".to_owned())];
    let endpoint = answering_with(503, &seconds, "").await;
    let error = fetch(endpoint).await.unwrap_err();
    assert!(error.is_transient());
    assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));

    let moment = SystemTime::now() + Duration::from_secs(60);
    let date = [(header::RETRY_AFTER, httpdate::fmt_http_date(moment))];
    let endpoint = answering_with(503, &date, "").await;
    let after = fetch(endpoint).await.unwrap_err().retry_after().unwrap();
    assert!(after <= Duration::from_secs(60));
    assert!(after > Duration::from_secs(30));
}

#[tokio::test]
async fn a_lifetime_in_quotes_is_understood() {
    let body = r#"{"access_token":"CANARY","token_type":"bearer","expires_in":"299"}"#;
    let endpoint = answering_with(200, &[], body).await;
    let response = fetch(endpoint).await.unwrap();
    let shown = format!("{response:?}");
    assert!(shown.contains("299s"), "{shown}");
    assert!(!shown.contains("CANARY"), "{shown}");
}

/// Law 9: a token that would split a header, or is of another type, ends here and shows up nowhere.
#[tokio::test]
async fn a_token_that_cannot_be_used_is_refused() {
    for body in [
        r#"{"access_token":"CANARY\r\nx: y","token_type":"Bearer"}"#,
        r#"{"access_token":"CANARY\u0000","token_type":"Bearer"}"#,
        r#"{"access_token":"CANARY","token_type":"DPoP"}"#,
        r#"{"access_token":"CANARY"}"#,
        r#"{"access_token":"CANARY","#,
    ] {
        let endpoint = answering_with(200, &[], body).await;
        let error = fetch(endpoint).await.unwrap_err();
        assert!(error.is_malformed_response(), "{body}: {error:?}");
        assert!(!everything(&error).contains("CANARY"), "{body}");
    }
}

/// Law 9: not even an endpoint that sends the secret back gets it into an error.
#[tokio::test]
async fn a_secret_that_is_echoed_shows_up_nowhere() {
    // What the header of the request holds as well as what it stands for.
    let echoes = [SECRET, "Basic Y2xpZW50LWlk"];
    for status in [200, 302, 400, 401, 500] {
        let echo = format!(r#"{{"error":"{SECRET}","error_description":"{SECRET}"}}"#);
        let endpoint = answering(move || {
            let mut response = Response::new(Body::from(echo.clone()));
            *response.status_mut() = StatusCode::from_u16(status).unwrap();
            response
        })
        .await;
        let source = source(endpoint);
        let error = source.fetch(Fetch::new()).await.unwrap_err();
        let shown = format!("{source:?}{}", everything(&error));
        for echo in echoes {
            assert!(!shown.contains(echo), "{status}: {shown}");
        }
    }
}

#[tokio::test]
async fn no_connection_is_kept() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let source = source(listener.local_addr().unwrap());
    for _ in 0..2 {
        let fetch = tokio::spawn({
            let source = source.clone();
            async move { source.fetch(Fetch::new()).await.map(drop) }
        });
        let (mut stream, _) = listener.accept().await.unwrap();
        answer_on(&mut stream).await.unwrap();
        fetch.await.unwrap().unwrap();
        // The client ends it, although the answer left it open.
        let mut byte = [0];
        let end = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut byte));
        assert_eq!(end.await.expect("the connection is still open").unwrap(), 0);
    }
}

/// Law 9: the default client speaks to nobody whose certificate it does not trust.
#[tokio::test]
async fn a_root_certificate_is_trusted_once_it_is_added() {
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let url = tls_endpoint(&certified).await;
    let builder = || ClientCredentials::builder(&url, "client-id").client_secret(SECRET);

    let trusting = builder()
        .root_certificates(certified.cert.pem())
        .build()
        .unwrap();
    assert!(trusting.fetch(Fetch::new()).await.is_ok());

    let wary = builder()
        .root_certificates(other.cert.pem())
        .build()
        .unwrap();
    let error = wary.fetch(Fetch::new()).await.unwrap_err();
    assert!(error.is_transport(), "{error:?}");
    assert!(!everything(&error).contains("CANARY"));
}

/// An endpoint that gives a token over TLS, to as many connections as come. Returns its URL.
async fn tls_endpoint(certified: &rcgen::CertifiedKey<rcgen::KeyPair>) -> String {
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key.into())
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // A client that does not trust us ends the handshake.
            if let Ok(mut stream) = acceptor.accept(stream).await {
                let _ = answer_on(&mut stream).await;
                let _ = stream.shutdown().await;
            }
        }
    });
    format!("https://localhost:{port}/token")
}

async fn answer_on(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<()> {
    read_request(stream).await;
    let body = r#"{"access_token":"CANARY","token_type":"Bearer"}"#;
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.flush().await
}
