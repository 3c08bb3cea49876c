//! What comes of a token endpoint's answers, over real sockets.

use std::{
    io,
    pin::pin,
    task::Poll,
    time::{Duration, Instant, SystemTime},
};

use http::{StatusCode, Uri};
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinHandle,
};
use tower_bearer::{
    AccessToken, ClientCredentials, ClientCredentialsBuilder, Events, Fetch, RefreshPolicy,
    TokenCache, TokenError, TokenEvent, TokenResponse, TokenSource,
};

use crate::{
    hostile::{self, BASIC, Bystander, Case, End, Hostile, Outcome, Reply, SECRET},
    support::{all, everything, millis, poll_once, secs, until},
};

async fn fetch(reply: Reply) -> Result<TokenResponse, TokenError> {
    let server = Hostile::start(reply);
    let source = server.client().build().unwrap();
    source.fetch(Fetch::new()).await
}

/// Laws 7 and 9, and the transport's half of law 6.
#[tokio::test]
async fn every_hostile_answer_ends_as_it_should() {
    let elsewhere = Bystander::new();
    run_all(hostile::cases(elsewhere.address()), Hostile::start).await;
    assert_eq!(elsewhere.visitors(), 0);
    // A visitor would have been seen.
    TcpStream::connect(elsewhere.address()).await.unwrap();
    assert_eq!(elsewhere.visitors(), 1);
}

/// From TLS, http is a downgrade, and a close without notice is an attack.
#[tokio::test]
async fn every_broken_or_redirecting_answer_through_tls_ends_as_it_should() {
    let elsewhere = Bystander::new();
    let mut cases = hostile::cases(elsewhere.address());
    // Bodies are read the same way.
    cases.retain(|case| !matches!(case.outcome, Outcome::Token(_) | Outcome::Malformed(_)));
    let body = r#"{"access_token":"CANARY","token_type":"Bearer"}"#;
    cases.push(Case {
        name: "a body that ends with a connection that somebody else may have cut".to_owned(),
        reply: Reply::raw(format!("HTTP/1.1 200 x\r\n\r\n{body}")).end(End::Cut),
        outcome: Outcome::Transport,
    });
    run_all(cases, Hostile::start_tls).await;
    assert_eq!(elsewhere.visitors(), 0);
}

async fn run_all(cases: Vec<Case>, start: impl Fn(Reply) -> Hostile) {
    let mut runs = Vec::new();
    for case in cases {
        runs.push(spawn(start(case.reply.clone()), case));
    }
    all(runs).await;
}

/// Has a cache get the case's reply and then a good one.
fn spawn(server: Hostile, case: Case) -> JoinHandle<()> {
    let source = server.client().build().unwrap();
    // Only what never ends is given up soon: all else ends by itself, however slow the machine is.
    let patience = match case.outcome {
        Outcome::Timeout => secs(2),
        _ => secs(60),
    };
    let policy = RefreshPolicy::new()
        .attempts(1)
        .attempt_timeout(patience)
        .flight_timeout(secs(60));
    let cache = TokenCache::with_policy(source, policy);
    tokio::spawn(async move { run(&cache, &server, case).await })
}

async fn run(cache: &TokenCache, server: &Hostile, case: Case) {
    let name = format!("{} ({})", case.name, server.url());
    let asked = SystemTime::now();
    let mut events = cache.events();
    let result = cache.get().await;

    let shown = match &result {
        Ok(token) => format!("{cache:?}{token:?}{token:#?}"),
        Err(error) => format!("{cache:?}{}", everything(error)),
    };
    for secret in ["CANARY", BASIC] {
        assert!(!shown.contains(secret), "{name}: {shown}");
    }
    match (result, case.outcome) {
        (Ok(token), Outcome::Token(lifetime)) => assert_lives(&name, &token, asked, lifetime),
        (Err(error), outcome) => {
            assert_failed(&name, &error, outcome);
            assert_heals(&name, cache, server, &mut events).await;
        }
        (Ok(_), outcome) => panic!("{name}: a token, not {outcome:?}"),
    }
    until(|| server.open() == 0).await;
}

fn assert_lives(name: &str, token: &AccessToken, asked: SystemTime, lifetime: Duration) {
    let text = token.expose_secret();
    assert!(text.bytes().all(|byte| byte.is_ascii_graphic()), "{name}");
    assert_eq!(token.header_value(), &format!("Bearer {text}"), "{name}");
    let usable = lifetime - lifetime.mul_f64(0.1).min(secs(10));
    let until = token.usable_until().unwrap();
    assert!(until >= asked + usable, "{name}: {until:?}");
    assert!(until <= SystemTime::now() + usable, "{name}: {until:?}");
}

#[track_caller]
fn assert_failed(name: &str, error: &TokenError, outcome: Outcome) {
    let (is_it, status) = match outcome {
        Outcome::Malformed(status) => (error.is_malformed_response(), Some(status)),
        Outcome::Unavailable(status) => (error.is_unavailable(), Some(status)),
        Outcome::Transport => (error.is_transport(), None),
        Outcome::Timeout => (error.is_timeout(), None),
        Outcome::Token(_) => (false, None),
    };
    assert!(
        is_it,
        "{name}: {outcome:?} expected of {}",
        everything(error)
    );
    assert_eq!(
        error.status().map(|status| status.as_u16()),
        status,
        "{name}"
    );
    // None is the client's fault, so each may pass by itself.
    assert!(error.is_transient() && !error.is_rejected(), "{name}");
    assert_eq!(error.oauth_error(), None, "{name}");
}

/// Law 7: the next good answer is taken. Law 2: only the gate delays it, and it takes one request; one more where the
/// machine is so busy that a flight is lost.
async fn assert_heals(name: &str, cache: &TokenCache, server: &Hostile, events: &mut Events) {
    let mut lost = 0;
    let mut assert_asked = |times: usize| {
        while let Poll::Ready(Some(event)) = poll_once(pin!(events.next())) {
            lost += usize::from(matches!(event, TokenEvent::FlightLost { .. }));
        }
        let asked = server.requests().len();
        assert!((times..=times + lost).contains(&asked), "{name}: {asked}");
    };
    assert_asked(1);
    server.set(Reply::token("healed"));
    let start = Instant::now();
    let token = loop {
        match cache.get().await {
            Ok(token) => break token,
            Err(error) => assert!(start.elapsed() < secs(30), "{name}: {error:?}"),
        }
        tokio::time::sleep(millis(20)).await;
    };
    assert_eq!(token.expose_secret(), "healed", "{name}");
    assert_asked(2);
}

#[tokio::test]
async fn an_endpoint_where_nobody_listens_is_a_transport_failure() {
    let address = Bystander::new().address();
    let source = ClientCredentials::builder(format!("http://{address}/token"), "client-id");
    let error = source
        .build()
        .unwrap()
        .fetch(Fetch::new())
        .await
        .unwrap_err();
    assert!(error.is_transport() && error.is_transient(), "{error:?}");
    assert_eq!(error.status(), None);
}

/// Law 6, the transport's part. The clock jumps to the timeout, since nothing else is waited for.
#[tokio::test(start_paused = true)]
async fn a_connection_that_is_not_made_is_given_up_after_three_seconds() {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    // Nobody accepts them, so that soon there is no room for another, and no answer.
    let mut queue = Vec::new();
    while let Ok(stream) = std::net::TcpStream::connect_timeout(&address, millis(100)) {
        queue.push(stream);
    }
    let client = || ClientCredentials::builder(format!("http://{address}/token"), "client-id");
    for (client, patience) in [
        (client(), secs(3)),
        (client().connect_timeout(secs(7)), secs(7)),
    ] {
        let source = client.build().unwrap();
        let began = tokio::time::Instant::now();
        let error = source.fetch(Fetch::new()).await.unwrap_err();
        let took = began.elapsed();
        assert!(took >= patience && took < patience + millis(10), "{took:?}");
        assert!(error.is_timeout() && error.is_transient(), "{error:?}");
    }
}

#[tokio::test]
async fn a_refused_client_is_terminal() {
    let body = r#"{"error":"invalid_client","error_description":"CANARY"}"#;
    let challenge = "www-authenticate: Basic realm=\"CANARY\"\r\n";
    let error = fetch(Reply::new(401, challenge, body)).await.unwrap_err();
    assert!(error.is_rejected() && !error.is_transient());
    assert_eq!(error.status(), Some(StatusCode::UNAUTHORIZED));
    assert_eq!(error.oauth_error(), Some("invalid_client"));
    assert!(!everything(&error).contains("CANARY"));
}

#[tokio::test]
async fn retry_after_is_read_as_seconds_and_as_a_date() {
    let busy = |after: &str| Reply::new(503, &format!("retry-after: {after}\r\n"), "");
    let error = fetch(busy("7")).await.unwrap_err();
    assert!(error.is_transient());
    assert_eq!(error.retry_after(), Some(secs(7)));

    let date = httpdate::fmt_http_date(SystemTime::now() + secs(60));
    let error = fetch(busy(&date)).await.unwrap_err();
    let after = error.retry_after().unwrap();
    assert!(after <= secs(60));
    assert!(after > secs(30));
}

/// Law 9: not even in an error.
#[tokio::test]
async fn an_echoed_secret_shows_up_nowhere() {
    let echo = format!(r#"{{"error":"{SECRET}","error_description":"{SECRET}"}}"#);
    let location = format!("location: https://localhost/{SECRET}\r\n");
    for status in [200, 302, 400, 401, 500] {
        let server = Hostile::start(Reply::new(status, &location, &echo));
        let source = server.client().build().unwrap();
        let error = source.fetch(Fetch::new()).await.unwrap_err();
        assert!(server.requests()[0].contains(BASIC));
        let shown = format!("{source:?}{}", everything(&error));
        for secret in [SECRET, BASIC] {
            assert!(!shown.contains(secret), "{status}: {shown}");
        }
    }
}

/// Firewalls refuse requests without a user agent: the core rules of AWS WAF, for example.
#[tokio::test]
async fn the_default_client_sends_a_user_agent() {
    let server = Hostile::start(Reply::token("token"));
    let source = server.client().build().unwrap();
    source.fetch(Fetch::new()).await.unwrap();
    let agent = format!("user-agent: tower-bearer/{}", env!("CARGO_PKG_VERSION"));
    let request = &server.requests()[0];
    assert!(request.lines().any(|line| line == agent), "{request}");
}

#[tokio::test]
async fn no_connection_is_kept() {
    let server = Hostile::start(Reply::token("token").end(End::Keep));
    let source = server.client().build().unwrap();
    for number in 1..=2 {
        source.fetch(Fetch::new()).await.unwrap();
        assert_eq!(server.requests().len(), number);
        // The client closes it, although the answer left it open.
        until(|| server.open() == 0).await;
    }
}

/// Law 9: the default client talks to no server that it does not trust.
#[tokio::test]
async fn only_added_root_certificates_are_trusted() {
    let server = Hostile::start_tls(Reply::token("token"));
    let trusting = server.client().build().unwrap();
    assert!(trusting.fetch(Fetch::new()).await.is_ok());

    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let wary = ClientCredentials::builder(server.url(), "client-id")
        .client_secret(SECRET)
        .root_certificates(other.cert.pem())
        .build()
        .unwrap();
    let error = wary.fetch(Fetch::new()).await.unwrap_err();
    assert!(error.is_transport(), "{error:?}");
    assert!(!everything(&error).contains("CANARY"));
    assert_eq!(server.requests().len(), 1);
}

/// A proxy on this host may lead to the token endpoint, but not to the other.
#[tokio::test]
async fn tokens_are_revoked_over_https_though_they_come_over_http() {
    let (server, other) = (
        Hostile::start(Reply::token("token")),
        Hostile::start_tls(Reply::ok("")),
    );
    let source = server
        .client()
        .root_certificates(hostile::certificate().cert.pem())
        .revocation_url(other.url())
        .build()
        .unwrap();
    let cache = TokenCache::new(source);
    cache.get().await.unwrap();
    cache.shutdown_and_revoke().await.unwrap();
    assert!(other.requests()[0].contains("token=token"));
}

#[tokio::test]
async fn a_failed_revocation_is_not_blamed_on_the_token_endpoint() {
    let server = Hostile::start(Reply::token("token"));
    let other = Hostile::start(Reply::new(503, "", ""));
    let source = server.client().revocation_url(other.url()).build().unwrap();
    let cache = TokenCache::new(source);
    cache.get().await.unwrap();
    let error = cache.shutdown_and_revoke().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the revocation endpoint is not available (status 503)"
    );
}

/// From the log alone an operator learns where to look.
#[tokio::test]
async fn the_error_says_how_a_connection_failed() {
    async fn failure(builder: ClientCredentialsBuilder) -> String {
        let policy = RefreshPolicy::new().attempts(1);
        let cache = TokenCache::with_policy(builder.build().unwrap(), policy);
        cache.get().await.unwrap_err().to_string()
    }
    fn at(url: String) -> ClientCredentialsBuilder {
        ClientCredentials::builder(url, "client-id").client_secret(SECRET)
    }

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // A server that does not speak TLS.
    let plain = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    });
    let rude = Hostile::start(Reply::raw("220 CANARY ESMTP\r\n"));
    let silent = Hostile::start(Reply::raw(""));
    let tls = Hostile::start_tls(Reply::token("token"));
    let by_address = tls.url().replace("localhost", "127.0.0.1");
    let root = hostile::certificate().cert.pem();
    // No DNS label is that long, so no server is asked.
    let nameless = format!("http://{}/token", "a".repeat(64));
    let nobody = format!("http://{}/token", Bystander::new().address());
    let transport = "the token endpoint could not be reached";
    for (builder, expected) in [
        (at(nobody), format!("{transport} (connection refused)")),
        (
            at(nameless).dangerous_plain_http(true),
            format!("{transport} (host name not resolved)"),
        ),
        (
            at(format!("https://{address}/token")),
            format!("{transport} (no TLS connection)"),
        ),
        (
            at(tls.url().to_owned()),
            format!("{transport} (certificate of an unknown issuer)"),
        ),
        (
            at(by_address).root_certificates(root),
            format!("{transport} (certificate of another host)"),
        ),
        (rude.client(), format!("{transport} (invalid HTTP)")),
        (silent.client(), format!("{transport} (connection closed)")),
    ] {
        assert_eq!(failure(builder).await, expected);
    }
    plain.await.unwrap();
}

#[tokio::test]
async fn the_error_says_that_a_connection_took_too_long() {
    let connector = tower::service_fn(|_: Uri| {
        let late = io::Error::from(io::ErrorKind::TimedOut);
        std::future::ready(Err::<TokioIo<TcpStream>, _>(late))
    });
    let client = Client::builder(TokioExecutor::new()).build(connector);
    let source = ClientCredentials::builder("http://localhost/token", "client-id");
    let source = source.build_with(client).unwrap();
    let error = source.fetch(Fetch::new()).await.unwrap_err();
    assert!(error.is_timeout(), "{error:?}");
    assert_eq!(
        error.to_string(),
        "the token request timed out (no connection)"
    );
}
