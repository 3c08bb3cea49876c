//! A token endpoint below HTTP that does what no honest one does, and test cases for it.
//!
//! [`Hostile`] gives every connection the same [`Reply`], byte for byte, over plain http or TLS.
//! [`cases`] pairs replies with the outcome at the client; each holds a canary that must show up nowhere.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time,
};
use tokio_rustls::TlsAcceptor;
use tower_bearer::{ClientCredentials, ClientCredentialsBuilder};

use crate::support::{millis, secs};

pub const SECRET: &str = "CANARY-client-secret";
/// The secret in the request's header: `client-id:` and its first half in Base64.
pub const BASIC: &str = "Y2xpZW50LWlkOkNBTkFSWS";

/// What a connection gets once its request is read: `head`, then `piece` over and over.
#[derive(Clone)]
pub struct Reply {
    head: Vec<u8>,
    piece: Vec<u8>,
    times: usize,
    pause: Duration,
    end: End,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The connection is closed.
    Close,
    /// It is reset, as by a server that dies.
    Reset,
    /// Over TLS it is closed without `close_notify`, as by a man in the middle.
    Cut,
    /// It is left open until the client closes it.
    Keep,
}

impl Reply {
    /// Exactly these bytes.
    pub fn raw(head: impl Into<Vec<u8>>) -> Self {
        Self {
            head: head.into(),
            piece: Vec::new(),
            times: 0,
            pause: Duration::ZERO,
            end: End::Close,
        }
    }

    /// A proper answer, with header lines that each end in CRLF.
    pub fn new(status: u16, headers: &str, body: impl AsRef<[u8]>) -> Self {
        let body = body.as_ref();
        let length = body.len();
        let head = format!("HTTP/1.1 {status} x\r\n{headers}content-length: {length}\r\n\r\n");
        Self::raw([head.as_bytes(), body].concat())
    }

    pub fn ok(body: impl AsRef<[u8]>) -> Self {
        Self::new(200, "content-type: application/json\r\n", body)
    }

    /// A token of 300 s.
    pub fn token(text: &str) -> Self {
        Self::ok(format!(
            r#"{{"access_token":"{text}","token_type":"Bearer","expires_in":300}}"#
        ))
    }

    /// Adds this piece, so many times.
    pub fn then(mut self, piece: impl Into<Vec<u8>>, times: usize) -> Self {
        self.piece = piece.into();
        self.times = times;
        self
    }

    /// Waits this long before each piece.
    pub const fn every(mut self, pause: Duration) -> Self {
        self.pause = pause;
        self
    }

    pub const fn end(mut self, end: End) -> Self {
        self.end = end;
        self
    }

    /// Writes it all, or fails when the client hangs up.
    async fn write(&self, stream: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        stream.write_all(&self.head).await?;
        stream.flush().await?;
        for _ in 0..self.times {
            if !self.pause.is_zero() {
                time::sleep(self.pause).await;
            }
            stream.write_all(&self.piece).await?;
            stream.flush().await?;
        }
        Ok(())
    }
}

/// A token endpoint that gives every request the same reply. It ends when dropped.
pub struct Hostile {
    url: String,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    reply: Mutex<Reply>,
    requests: Mutex<Vec<String>>,
    open: AtomicUsize,
}

impl Hostile {
    /// Starts one on `http://127.0.0.1`.
    pub fn start(reply: Reply) -> Self {
        Self::listen(reply, None)
    }

    /// Starts one on `https://localhost`, with the certificate of [`certificate`].
    pub fn start_tls(reply: Reply) -> Self {
        Self::listen(reply, Some(acceptor()))
    }

    fn listen(reply: Reply, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            reply: Mutex::new(reply),
            requests: Mutex::default(),
            open: AtomicUsize::new(0),
        });
        let url = match tls {
            Some(_) => format!("https://localhost:{}/token", address.port()),
            None => format!("http://{address}/token"),
        };
        let task = tokio::spawn(accept(listener, tls, shared.clone()));
        Self { url, shared, task }
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// A client of this endpoint whose secret is a canary.
    pub fn client(&self) -> ClientCredentialsBuilder {
        let builder = ClientCredentials::builder(&self.url, "client-id").client_secret(SECRET);
        match self.url.starts_with("https") {
            true => builder.root_certificates(certificate().cert.pem()),
            false => builder,
        }
    }

    /// Sets what the next connection gets.
    pub fn set(&self, reply: Reply) {
        *self.shared.reply.lock().unwrap() = reply;
    }

    /// All requests that it has read in full.
    pub fn requests(&self) -> Vec<String> {
        self.shared.requests.lock().unwrap().clone()
    }

    /// How many connections neither side has closed.
    pub fn open(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, tls: Option<TlsAcceptor>, shared: Arc<Shared>) {
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        shared.open.fetch_add(1, Ordering::SeqCst);
        let (tls, shared) = (tls.clone(), shared.clone());
        connections.spawn(async move {
            // An error means that the client hung up, which it may.
            let _ = serve(stream, tls, &shared).await;
            shared.open.fetch_sub(1, Ordering::SeqCst);
        });
    }
}

async fn serve(tcp: TcpStream, tls: Option<TlsAcceptor>, shared: &Shared) -> io::Result<()> {
    match tls {
        Some(acceptor) => {
            let mut stream = acceptor.accept(tcp).await?;
            let end = answer(&mut stream, shared).await?;
            finish(end, stream.get_ref().0)?;
            match end {
                End::Close => stream.shutdown().await,
                End::Cut | End::Reset | End::Keep => Ok(()),
            }
        }
        None => {
            let mut stream = tcp;
            let end = answer(&mut stream, shared).await?;
            finish(end, &stream)
        }
    }
}

fn finish(end: End, tcp: &TcpStream) -> io::Result<()> {
    match end {
        End::Reset => tcp.set_zero_linger(),
        End::Close | End::Cut | End::Keep => Ok(()),
    }
}

async fn answer<S>(stream: &mut S, shared: &Shared) -> io::Result<End>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // In full, or closing the connection would reset it.
    let request = read_request(stream).await?;
    shared.requests.lock().unwrap().push(request);
    let reply = shared.reply.lock().unwrap().clone();
    reply.write(stream).await?;
    if reply.end == End::Keep {
        stream.read_to_end(&mut Vec::new()).await?;
    }
    Ok(reply.end)
}

async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<String> {
    let mut request = Vec::new();
    loop {
        if stream.read_buf(&mut request).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let text = String::from_utf8_lossy(&request);
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("content-length").then_some(value)
        });
        if body.len() >= length.map_or(0, |length| length.parse().unwrap()) {
            return Ok(text.into_owned());
        }
    }
}

/// The self-signed certificate of all these endpoints.
pub fn certificate() -> &'static rcgen::CertifiedKey<rcgen::KeyPair> {
    static CERTIFICATE: OnceLock<rcgen::CertifiedKey<rcgen::KeyPair>> = OnceLock::new();
    CERTIFICATE
        .get_or_init(|| rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap())
}

fn acceptor() -> TlsAcceptor {
    let certified = certificate();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key.into())
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}

/// Another host, which nobody should connect to.
pub struct Bystander(TcpListener);

impl Bystander {
    pub fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        Self(listener)
    }

    pub fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    /// Connections made to it since the last call. They wait in the listener's queue, so there is no need to wait.
    pub fn visitors(&self) -> usize {
        std::iter::from_fn(|| self.0.accept().ok()).count()
    }
}

/// What a client must make of a reply.
#[derive(Clone, Copy, Debug)]
pub enum Outcome {
    /// A token of this lifetime.
    Token(Duration),
    /// No usable token response, with this status.
    Malformed(u16),
    /// This status, which says nothing about the client.
    Unavailable(u16),
    /// No complete answer.
    Transport,
    /// No answer in time.
    Timeout,
}

pub struct Case {
    pub name: String,
    pub reply: Reply,
    pub outcome: Outcome,
}

/// All replies; those that point anywhere point to `elsewhere`.
pub fn cases(elsewhere: SocketAddr) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: &str, reply, outcome| {
        cases.push(Case {
            name: name.to_owned(),
            reply,
            outcome,
        });
    };
    pointing_elsewhere(elsewhere, &mut add);
    too_much(&mut add);
    cut_short(&mut add);
    bad_http(&mut add);
    pages(&mut add);
    bad_json(&mut add);
    bad_tokens(&mut add);
    lifetimes(&mut add);
    cases
}

type Add<'a> = &'a mut dyn FnMut(&str, Reply, Outcome);

/// The lifetime of a token whose server names none that makes sense.
const UNNAMED: Duration = secs(300);

const TOKEN: &str = r#"{"access_token":"CANARY-access","token_type":"Bearer","expires_in":300}"#;

fn pointing_elsewhere(elsewhere: SocketAddr, add: Add<'_>) {
    for status in [300, 301, 302, 303, 305, 307, 308] {
        for scheme in ["http", "https"] {
            let port = elsewhere.port();
            let location = format!("location: {scheme}://localhost:{port}/CANARY\r\n");
            add(
                &format!("{status} to another host over {scheme}"),
                Reply::new(status, &location, TOKEN),
                Outcome::Unavailable(status),
            );
        }
    }
    add(
        "a redirect that names no scheme",
        Reply::new(307, &format!("location: //{elsewhere}/CANARY\r\n"), ""),
        Outcome::Unavailable(307),
    );
    // These headers mean nothing in an answer of this status.
    for header in [
        format!("location: http://{elsewhere}/"),
        format!("content-location: http://{elsewhere}/"),
        format!("refresh: 0; url=http://{elsewhere}/"),
        format!("alt-svc: h2=\"{elsewhere}\", h3=\"{elsewhere}\""),
        format!("link: <http://{elsewhere}/>; rel=preload"),
    ] {
        let name = header.split(':').next().unwrap();
        add(
            &format!("a token with the header {name}"),
            Reply::new(200, &format!("{header}\r\n"), TOKEN),
            Outcome::Token(secs(300)),
        );
    }
    add(
        "a page that leads elsewhere",
        Reply::ok(format!(
            r#"<meta http-equiv="refresh" content="0; url=http://{elsewhere}/CANARY">"#
        )),
        Outcome::Malformed(200),
    );
}

const MEGABYTE: usize = 1024 * 1024;

fn too_much(add: Add<'_>) {
    let declared = format!(
        "HTTP/1.1 200 x\r\ncontent-length: {}\r\n\r\n",
        10 * MEGABYTE
    );
    let chunked = "HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\n";
    let block = vec![b' '; 16 * 1024];
    let chunk = [b"4000\r\n", &block[..], b"\r\n"].concat();
    add(
        "10 MB, declared",
        Reply::raw(declared).then(block.clone(), 640),
        Outcome::Malformed(200),
    );
    add(
        "10 MB in chunks",
        Reply::raw(chunked).then(chunk.clone(), 640),
        Outcome::Malformed(200),
    );
    // Reading these to their end takes forever.
    add(
        "chunks without end",
        Reply::raw(chunked).then(chunk, usize::MAX),
        Outcome::Malformed(200),
    );
    add(
        "a body without length and end",
        Reply::raw("HTTP/1.1 200 x\r\n\r\n").then(block.clone(), usize::MAX),
        Outcome::Malformed(200),
    );
    add(
        "an error page without end",
        Reply::raw("HTTP/1.1 403 x\r\n\r\n").then(block.clone(), usize::MAX),
        Outcome::Unavailable(403),
    );
    add(
        "a token behind more than 1 MiB of blanks",
        Reply::ok([vec![b' '; MEGABYTE], TOKEN.into()].concat()),
        Outcome::Malformed(200),
    );
    add(
        "a token of nearly 1 MiB",
        Reply::token(&"a".repeat(MEGABYTE - 100)),
        Outcome::Token(secs(300)),
    );
    add(
        "a drip that never ends",
        Reply::raw("HTTP/1.1 200 x\r\ncontent-length: 1000\r\n\r\n")
            .then(" ", usize::MAX)
            .every(millis(5)),
        Outcome::Timeout,
    );
    add(
        "headers that drip",
        Reply::raw("HTTP/1.1 200 x\r\nx-long: ")
            .then("a", usize::MAX)
            .every(millis(5)),
        Outcome::Timeout,
    );
    add("silence", Reply::raw("").end(End::Keep), Outcome::Timeout);
    add(
        "half a body and then silence",
        Reply::raw("HTTP/1.1 200 x\r\ncontent-length: 1000\r\n\r\n{\"access_token\":\"CANARY")
            .end(End::Keep),
        Outcome::Timeout,
    );
    add(
        "a header of 1 MB",
        Reply::raw("HTTP/1.1 200 x\r\nx-long: ").then(vec![b'a'; 16 * 1024], 64),
        Outcome::Transport,
    );
    add(
        "10,000 headers",
        Reply::raw("HTTP/1.1 200 x\r\n").then("x-canary: CANARY\r\n", 10_000),
        Outcome::Transport,
    );
    add(
        "a thousand interim answers before the token",
        Reply::raw(
            [
                &b"HTTP/1.1 100 x\r\n\r\n".repeat(1_000),
                &answer_of(TOKEN)[..],
            ]
            .concat(),
        ),
        Outcome::Token(secs(300)),
    );
    add(
        "interim answers without end",
        Reply::raw("").then(b"HTTP/1.1 100 x\r\n\r\n".repeat(100), usize::MAX),
        Outcome::Timeout,
    );
    // No coding was requested, so none is undone: these would be a token, and 10 MB with one in them.
    let gzip = "content-type: application/json\r\ncontent-encoding: gzip\r\n";
    add(
        "a token in gzip",
        Reply::new(200, gzip, GZIP_TOKEN),
        Outcome::Malformed(200),
    );
    add(
        "a gzip bomb",
        Reply::new(200, gzip, include_bytes!("bomb.gz")),
        Outcome::Malformed(200),
    );
}

fn answer_of(body: &str) -> Vec<u8> {
    Reply::ok(body).head
}

fn cut_short(add: Add<'_>) {
    let long = "HTTP/1.1 200 x\r\ncontent-length: 1000\r\n\r\n";
    let chunked = "HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\n";
    let length = TOKEN.len();
    for (name, bytes) in [
        ("nothing", String::new()),
        ("half a head", "HTTP/1.1 200 x\r\ncontent-le".to_owned()),
        ("a head and no body", long.to_owned()),
        ("a length that is too long", format!("{long}{TOKEN}")),
        ("half a token", format!("{long}{{\"access_token\":\"CANARY")),
        (
            "a chunk that is cut",
            format!("{chunked}{:x}\r\n{{\"access_token\":\"CANARY", 1000),
        ),
        (
            "chunks without the last one",
            format!("{chunked}{length:x}\r\n{TOKEN}\r\n"),
        ),
    ] {
        for (how, end) in [
            ("closed", End::Close),
            ("reset", End::Reset),
            ("cut", End::Cut),
        ] {
            add(
                &format!("{name}, then {how}"),
                Reply::raw(bytes.clone()).end(end),
                Outcome::Transport,
            );
        }
    }
    add(
        "a body that ends with the connection in half a token",
        Reply::raw("HTTP/1.0 200 x\r\n\r\n{\"access_token\":\"CANARY"),
        Outcome::Malformed(200),
    );
    add(
        "a body that ends with the connection",
        Reply::raw(format!("HTTP/1.0 200 x\r\n\r\n{TOKEN}")),
        Outcome::Token(secs(300)),
    );
}

fn bad_http(add: Add<'_>) {
    for (name, bytes) in [
        ("no HTTP at all", TOKEN.to_owned()),
        (
            "TLS in the clear",
            "\u{15}\u{3}\u{1}\0\u{2}\u{2}\u{28}".to_owned(),
        ),
        (
            "a status of four digits",
            format!("HTTP/1.1 2000 x\r\n\r\n{TOKEN}"),
        ),
        ("another version", format!("HTTP/4.2 200 x\r\n\r\n{TOKEN}")),
        (
            "two lengths that differ",
            format!("HTTP/1.1 200 x\r\ncontent-length: 1\r\ncontent-length: 71\r\n\r\n{TOKEN}"),
        ),
        (
            "a length that is negative",
            format!("HTTP/1.1 200 x\r\ncontent-length: -1\r\n\r\n{TOKEN}"),
        ),
        (
            "a chunk size beyond 64 bits",
            format!(
                "HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n{TOKEN}"
            ),
        ),
        (
            "a NUL in a header",
            format!("HTTP/1.1 200 x\r\nx: CANARY\0\r\ncontent-length: 71\r\n\r\n{TOKEN}"),
        ),
    ] {
        add(name, Reply::raw(bytes), Outcome::Transport);
    }
    add(
        "a length beyond all bounds",
        Reply::raw(format!(
            "HTTP/1.1 200 x\r\ncontent-length: 18446744073709551613\r\n\r\n{TOKEN}"
        )),
        Outcome::Transport,
    );
    add(
        "a protocol that nobody asked for",
        Reply::raw(format!(
            "HTTP/1.1 101 x\r\nupgrade: CANARY\r\nconnection: upgrade\r\n\r\n{TOKEN}"
        )),
        Outcome::Unavailable(101),
    );
    add(
        "a second answer behind the first",
        Reply::raw([answer_of(TOKEN), answer_of(r#"{"error":"invalid_client"}"#)].concat()),
        Outcome::Token(secs(300)),
    );
    add(
        "a canary for a reason",
        Reply::raw("HTTP/1.1 503 CANARY\r\nretry-after: CANARY\r\ncontent-length: 0\r\n\r\n"),
        Outcome::Unavailable(503),
    );
}

fn pages(add: Add<'_>) {
    let html = "content-type: text/html\r\n";
    let page = "<html><title>Log in, CANARY</title></html>";
    add(
        "a captive portal's page",
        Reply::new(200, html, page),
        Outcome::Malformed(200),
    );
    add(
        "a firewall's page",
        Reply::new(403, html, page),
        Outcome::Unavailable(403),
    );
    add(
        "a page that asks for a login",
        Reply::new(401, "www-authenticate: Basic realm=\"CANARY\"\r\n", page),
        Outcome::Unavailable(401),
    );
    add(
        "a proxy's error",
        Reply::new(502, html, page),
        Outcome::Unavailable(502),
    );
    add("an empty 200", Reply::ok(""), Outcome::Malformed(200));
    add(
        "no content",
        Reply::raw("HTTP/1.1 204 x\r\n\r\n"),
        Outcome::Malformed(204),
    );
    add(
        "an empty 400",
        Reply::new(400, "", ""),
        Outcome::Unavailable(400),
    );
    // Codes that a server made up, or took from the request.
    for code in [
        "CANARY",
        "Not Found",
        r"invalid_client\r\nCANARY",
        r"invalid_client\u0000",
    ] {
        add(
            &format!("the error code {code}"),
            Reply::new(
                400,
                "",
                format!(r#"{{"error":"{code}","error_description":"CANARY"}}"#),
            ),
            Outcome::Unavailable(400),
        );
    }
}

fn bad_json(add: Add<'_>) {
    add(
        "a byte order mark",
        Reply::ok(format!("\u{feff}{TOKEN}")),
        Outcome::Token(secs(300)),
    );
    let utf_16: Vec<u8> = "\u{feff}"
        .encode_utf16()
        .chain(TOKEN.encode_utf16())
        .flat_map(u16::to_le_bytes)
        .collect();
    add("UTF-16", Reply::ok(utf_16), Outcome::Malformed(200));
    add(
        "bytes that are no UTF-8",
        Reply::ok(b"{\"access_token\":\"CANARY\xff\",\"token_type\":\"Bearer\"}"),
        Outcome::Malformed(200),
    );
    let deep = "[".repeat(100_000);
    for (name, body) in [
        (
            "an unfinished object",
            r#"{"access_token":"CANARY","#.to_owned(),
        ),
        ("an array", r#"["CANARY","Bearer",300]"#.to_owned()),
        ("a text", r#""CANARY""#.to_owned()),
        ("null", "null".to_owned()),
        ("two objects", format!("{TOKEN}{TOKEN}")),
        (
            "a token twice",
            r#"{"access_token":"CANARY","access_token":"other","token_type":"Bearer"}"#.to_owned(),
        ),
        (
            "a type twice",
            r#"{"access_token":"CANARY","token_type":"DPoP","token_type":"Bearer"}"#.to_owned(),
        ),
        ("brackets alone", deep.clone()),
        ("brackets in an unknown member", format!(r#"{{"x":{deep}"#)),
        (
            "brackets for a token",
            format!(r#"{{"access_token":{deep}"#),
        ),
        (
            "brackets for a lifetime",
            format!(r#"{{"expires_in":{deep}"#),
        ),
        (
            "braces in each other",
            r#"{"access_token":"#.repeat(100_000),
        ),
        (
            "a number for a token",
            r#"{"access_token":12345,"token_type":"Bearer"}"#.to_owned(),
        ),
        (
            "NaN",
            r#"{"access_token":"CANARY","token_type":"Bearer","expires_in":NaN}"#.to_owned(),
        ),
    ] {
        add(name, Reply::ok(body), Outcome::Malformed(200));
    }
}

fn bad_tokens(add: Add<'_>) {
    for (name, token) in [
        ("CR and LF", r"CANARY\r\nx-evil: y"),
        ("LF", r"CANARY\n"),
        ("NUL", r"CANARY\u0000"),
        ("a space", "CANARY access"),
        ("DEL", r"CANARY\u007f"),
        ("an umlaut", "CANARÜ"),
        ("an escaped surrogate pair", r"CANARY\ud83d\ude00"),
        ("half a surrogate pair", r"CANARY\ud83d"),
        ("nothing", ""),
    ] {
        add(
            &format!("a token with {name} in it"),
            Reply::token(token),
            Outcome::Malformed(200),
        );
    }
    for token_type in [
        r#""DPoP""#,
        r#""N_A""#,
        r#""mac""#,
        r#""Bearer ""#,
        r#""""#,
        r#"["Bearer"]"#,
    ] {
        add(
            &format!("the type {token_type}"),
            Reply::ok(format!(
                r#"{{"access_token":"CANARY","token_type":{token_type}}}"#
            )),
            Outcome::Malformed(200),
        );
    }
    add(
        "no token",
        Reply::ok(r#"{"token_type":"Bearer","CANARY":1}"#),
        Outcome::Malformed(200),
    );
    for (name, member) in [
        ("no type", ""),
        ("the type null", r#","token_type":null"#),
        ("a type in capitals", r#","token_type":"BEARER""#),
        ("the type BearerToken", r#","token_type":"BearerToken""#),
        ("the type access_token", r#","token_type":"access_token""#),
    ] {
        add(
            name,
            Reply::ok(format!(r#"{{"access_token":"CANARY"{member}}}"#)),
            Outcome::Token(UNNAMED),
        );
    }
}

fn lifetimes(add: Add<'_>) {
    const YEAR: Duration = secs(365 * 24 * 60 * 60);
    for (text, lifetime) in [
        (r#""299""#, secs(299)),
        (r#""CANARY""#, UNNAMED),
        ("299.5", millis(299_500)),
        ("-1", UNNAMED),
        (r#""NaN""#, UNNAMED),
        (r#""Infinity""#, UNNAMED),
        ("null", UNNAMED),
        ("1e400", UNNAMED),
        ("-1e400", UNNAMED),
        ("0", Duration::ZERO),
        ("1e-400", Duration::ZERO),
        ("9223372036854775808", YEAR),
        ("1e308", YEAR),
        ("[300]", UNNAMED),
    ] {
        add(
            &format!("the lifetime {text}"),
            Reply::ok(format!(
                r#"{{"access_token":"CANARY-access","token_type":"Bearer","expires_in":{text}}}"#
            )),
            Outcome::Token(lifetime),
        );
    }
    add(
        "no lifetime",
        Reply::ok(r#"{"access_token":"CANARY-access","token_type":"Bearer"}"#),
        Outcome::Token(UNNAMED),
    );
}

/// `TOKEN` as `gzip` packs it.
const GZIP_TOKEN: &[u8] = include_bytes!("token.gz");
