//! Calls a protected API through the layer, and reports the outcome.
//!
//! It sends one request by default; `--requests`, `--concurrency`, `--duration` and `--rate` make it a load test. The
//! client's secret comes from an environment variable or a file, so that no process list shows it:
//!
//! ```sh
//! export CLIENT_SECRET=..
//! cargo run --release --features jwt --example call -- \
//!     --issuer https://HOST/realms/REALM \
//!     --client-id ID --client-secret-env CLIENT_SECRET --url https://HOST/sims
//! ```
//!
//! The token endpoint comes from the authorization server's metadata; for a server without any, use `--token-url`.
//! The method of client authentication follows from the credentials given, or from `--auth`:
//!
//! ```sh
//! --client-secret-file secret.txt          # client_secret_basic, or what the issuer supports
//! --auth client-secret-jwt --client-secret-env CLIENT_SECRET
//! --key key.pem --kid 2026-11              # private_key_jwt; PEM or JWK
//! --cert client.pem --key client-key.pem   # tls_client_auth and self_signed_tls_client_auth
//! ```
//!
//! The certificate is presented to the API as well, as tokens that are bound to it require (RFC 8705 section 3).
//! It is read once; the file of the secret and the key for assertions are read for every token request.
//!
//! A request counts as failed if there is no answer, or one other than a 2xx; redirects are not followed. The exit
//! status is 1 if a request failed, and 2 if the calls could not start. TLS trusts the system's roots, or those in
//! the PEM file that `SSL_CERT_FILE` names, and those of `--ca`.

use std::{
    collections::BTreeMap,
    env,
    error::Error,
    fs, iter,
    num::{NonZeroU64, NonZeroUsize},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use clap::{ArgGroup, Parser, ValueEnum};
use hdrhistogram::Histogram;
use http::{Method, Request, Response, Uri, uri::Scheme};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{self, Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use oauth2::url::form_urlencoded;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use serde_json::{Value, json};
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{self, Instant},
};
use tower::{ServiceBuilder, ServiceExt, service_fn, util::BoxCloneService};
use tower_bearer::{
    AssertionAudience, AuthMethod, BearerAuthLayer, BoxError, ClientCredentials,
    ClientCredentialsBuilder, CloneBody, Credential, TokenError,
};

/// Calls an API with OAuth 2.0 client-credentials tokens and reports statuses, token requests and latencies.
#[derive(Parser)]
#[command(group(ArgGroup::new("server").required(true)))]
#[command(group(ArgGroup::new("secret")))]
#[command(group(ArgGroup::new("proof").required(true).multiple(true)))]
struct Args {
    /// The authorization server's issuer, whose metadata name the token endpoint
    #[arg(long, value_name = "URL", group = "server")]
    issuer: Option<String>,
    /// The token endpoint, instead of the issuer
    #[arg(long, value_name = "URL", group = "server")]
    token_url: Option<String>,
    /// The client's id at the authorization server
    #[arg(long, value_name = "ID")]
    client_id: String,
    /// How the client authenticates [default: by the credentials given]
    #[arg(
        long,
        value_enum,
        requires_ifs = [
            ("basic", "secret"),
            ("post", "secret"),
            ("client-secret-jwt", "secret"),
            ("private-key-jwt", "key"),
            ("tls", "cert"),
        ]
    )]
    auth: Option<Auth>,
    /// The environment variable that holds the client's secret
    #[arg(long, value_name = "VAR", groups = ["secret", "proof"])]
    client_secret_env: Option<String>,
    /// The file that holds the client's secret, read for every token request
    #[arg(long, value_name = "FILE", groups = ["secret", "proof"])]
    client_secret_file: Option<PathBuf>,
    /// The private key that signs the client's assertions, in PEM or as a JWK, read for every token request; with
    /// --cert, the certificate's key
    #[arg(long, value_name = "FILE", group = "proof")]
    key: Option<PathBuf>,
    /// The key's id at the authorization server
    #[arg(long, value_name = "ID", requires = "key")]
    kid: Option<String>,
    /// The audience of assertions [default: the issuer, or the token endpoint with --token-url]
    #[arg(long, value_enum)]
    assertion_audience: Option<Audience>,
    /// The client's certificate and its chain in PEM, optionally with its key, presented to both servers
    #[arg(long, value_name = "FILE", group = "proof")]
    cert: Option<PathBuf>,
    /// Root certificates in PEM to trust in addition to the system's
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// A scope to request; may be repeated
    #[arg(long)]
    scope: Vec<String>,
    /// A resource that the token is for (RFC 8707); may be repeated
    #[arg(long, value_name = "URI")]
    resource: Vec<String>,
    /// An extra parameter of every token request, such as audience=..; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = parameter)]
    param: Vec<(String, String)>,
    /// The URL to call
    #[arg(long)]
    url: Uri,
    /// The method to call it with
    #[arg(long, default_value_t = Method::GET)]
    method: Method,
    /// How many requests to send [default: 1, or as many as fit into --duration]
    #[arg(long, value_name = "N")]
    requests: Option<NonZeroU64>,
    /// How many requests may be in flight at a time [default: 1, or no limit with --rate]
    #[arg(long, value_name = "N")]
    concurrency: Option<NonZeroUsize>,
    /// For how many seconds to send requests
    #[arg(long, value_name = "SECONDS", value_parser = amount)]
    duration: Option<f64>,
    /// Requests per second, each sent when it is due, however long the others take; latencies count from then
    #[arg(long, value_name = "PER_SECOND", value_parser = amount)]
    rate: Option<f64>,
    /// How many requests may be out on the network at a time
    #[arg(long, value_name = "N", default_value = "256")]
    connections: NonZeroUsize,
    /// How many seconds a request may take, including all waits
    #[arg(long, value_name = "SECONDS", value_parser = amount, default_value = "60")]
    timeout: f64,
    /// Lets secrets and tokens go over plain http to other machines, where anybody on the way can read them
    #[arg(long)]
    dangerous_plain_http: bool,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Auth {
    Basic,
    Post,
    ClientSecretJwt,
    PrivateKeyJwt,
    Tls,
}

#[derive(Clone, Copy, ValueEnum)]
enum Audience {
    Issuer,
    TokenEndpoint,
}

fn parameter(text: &str) -> Result<(String, String), &'static str> {
    let (name, value) = text.split_once('=').ok_or("it contains no =")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn amount(text: &str) -> Result<f64, &'static str> {
    match text.parse() {
        Ok(number) if (1e-3..=1e9).contains(&number) => Ok(number),
        _ => Err("not a number from 0.001 to 1e9"),
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let report = Report::new();
    let api = match client(&args, &report) {
        Ok(api) => api,
        Err(error) => {
            eprintln!("error: {}", chain(&*error));
            return ExitCode::from(2);
        }
    };
    let started = Instant::now();
    match args.rate {
        Some(rate) => open_loop(&args, rate, &api, &report).await,
        None => closed_loop(&args, &api, &report).await,
    }
    let took = started.elapsed();
    let report = report.lock();
    if args.json {
        println!("{}", report.json(took));
    } else {
        report.print(took);
    }
    ExitCode::from(u8::from(report.failed > 0))
}

// The client.

/// Its answers come without their bodies, which it reads and drops.
type Api = BoxCloneService<Request<Full<Bytes>>, Response<()>, BoxError>;
type Http = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

fn client(args: &Args, report: &Report) -> Result<Api, BoxError> {
    let connector = connector(args)?;
    let report = report.clone();
    // Like the library's own client: occasional token requests need no pool, and the cache decides how often to try.
    let tokens: Http = Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(0)
        .retry_canceled_requests(false)
        .build(connector.clone());
    let source = source(args)?.build_with(service_fn(move |request| {
        send_counted(tokens.clone(), report.clone(), request)
    }))?;
    let http: Http = Client::builder(TokioExecutor::new()).build(connector);

    let api = ServiceBuilder::new()
        .layer(
            BearerAuthLayer::new(source)
                .replay(CloneBody)
                .dangerous_plain_http(args.dangerous_plain_http),
        )
        // Below the layer: it bounds the sockets, and requests that wait for a token hold none.
        .concurrency_limit(args.connections.get())
        .service_fn(move |request| read_whole(http.clone(), request));
    Ok(BoxCloneService::new(api))
}

fn source(args: &Args) -> Result<ClientCredentialsBuilder, BoxError> {
    let mut source = match (&args.issuer, &args.token_url) {
        (Some(issuer), _) => ClientCredentials::discover(issuer, &args.client_id),
        (None, url) => {
            let url = url.as_deref().expect("clap requires one of them");
            // The only audience for assertions that is known.
            ClientCredentials::builder(url, &args.client_id)
                .assertion_audience(AssertionAudience::TokenEndpoint)
        }
    };
    if let Some(audience) = args.assertion_audience {
        source = source.assertion_audience(match audience {
            Audience::Issuer => AssertionAudience::Issuer,
            Audience::TokenEndpoint => AssertionAudience::TokenEndpoint,
        });
    }
    if let Some(name) = &args.client_secret_env {
        source = source.client_secret(secret(name)?);
    }
    if let Some(path) = &args.client_secret_file {
        source = source.client_secret(file(path)?);
    }
    let method = args.auth.map(|auth| match auth {
        Auth::Basic => AuthMethod::ClientSecretBasic,
        Auth::Post => AuthMethod::ClientSecretPost,
        Auth::ClientSecretJwt => AuthMethod::ClientSecretJwt,
        Auth::PrivateKeyJwt => AuthMethod::PrivateKeyJwt,
        Auth::Tls => AuthMethod::TlsClientAuth,
    });
    let has_secret = args.client_secret_env.is_some() || args.client_secret_file.is_some();
    // The library cannot see that the connector presents a certificate.
    let by_certificate = (args.cert.is_some() && !has_secret).then_some(AuthMethod::TlsClientAuth);
    if let Some(method) = method.or(by_certificate) {
        source = source.auth_method(method);
    }
    match &args.key {
        Some(path) if args.auth == Some(Auth::PrivateKeyJwt) || args.cert.is_none() => {
            source = source.private_key(file(path)?);
        }
        _ => {}
    }
    if let Some(kid) = &args.kid {
        source = source.key_id(kid);
    }
    for resource in &args.resource {
        source = source.resource(resource);
    }
    for (name, value) in &args.param {
        source = source.param(name, value);
    }
    Ok(source
        .scopes(&args.scope)
        .dangerous_plain_http(args.dangerous_plain_http))
}

fn secret(name: &str) -> Result<String, String> {
    // An error of `env::var` may quote the value.
    let problem = match env::var(name) {
        Ok(secret) if !secret.is_empty() => return Ok(secret),
        Ok(_) => "is empty",
        Err(env::VarError::NotPresent) => "is not set",
        Err(env::VarError::NotUnicode(_)) => "is not UTF-8",
    };
    Err(format!(
        "the environment variable {name} for the client's secret {problem}"
    ))
}

/// A credential that is read whenever it is needed. A missing file is reported before anything is sent.
fn file(path: &Path) -> Result<Credential, String> {
    read(path).map(|_| Credential::file(path))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("the file {} cannot be read: {error}", path.display()))
}

fn connector(args: &Args) -> Result<HttpsConnector<HttpConnector>, BoxError> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(Duration::from_secs(3)));
    let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots(args)?);
    let tls = match &args.cert {
        None => tls.with_no_client_auth(),
        Some(path) => {
            let (chain, key) = certificate(path, args.key.as_deref())?;
            tls.with_client_auth_cert(chain, key)?
        }
    };
    Ok(HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_or_http()
        .enable_all_versions()
        .wrap_connector(tcp))
}

fn roots(args: &Args) -> Result<RootCertStore, BoxError> {
    let mut roots = RootCertStore::empty();
    let server = args.issuer.as_ref().or(args.token_url.as_ref());
    // Plain http has to work on a machine without roots.
    let https = args.url.scheme() == Some(&Scheme::HTTPS)
        || server.is_some_and(|url| !url.starts_with("http:"));
    if https {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    if let Some(path) = &args.ca {
        for certificate in certificates(path)? {
            roots.add(certificate)?;
        }
    }
    if https && roots.is_empty() {
        return Err("the system trusts no root certificate, and there is no --ca".into());
    }
    Ok(roots)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    // PEM errors quote the text that caused them, which may be a key.
    CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<Vec<_>, _>>()
        .ok()
        .filter(|certificates| !certificates.is_empty())
        .ok_or_else(|| format!("the file {} holds no certificate in PEM", path.display()))
}

/// The client's certificate with its chain, and its key, which may be in the same file.
fn certificate(
    path: &Path,
    key: Option<&Path>,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), String> {
    let chain = certificates(path)?;
    for path in iter::once(path).chain(key) {
        if let Ok(key) = PrivateKeyDer::from_pem_slice(&read(path)?) {
            return Ok((chain, key));
        }
    }
    Err("neither --cert nor --key holds a private key in PEM".to_owned())
}

/// Reads the body below the limit, which thus counts connections and not only requests without an answer.
async fn read_whole(http: Http, request: Request<Full<Bytes>>) -> Result<Response<()>, BoxError> {
    let (head, mut body) = http.request(request).await?.into_parts();
    while let Some(frame) = body.frame().await {
        frame?;
    }
    Ok(Response::from_parts(head, ()))
}

/// Sends a request to the authorization server. Counts token requests by their grant, but no others, such as for
/// metadata.
async fn send_counted(
    http: Http,
    report: Report,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, legacy::Error> {
    let (head, body) = request.into_parts();
    let Ok(body) = body.collect().await;
    let body = body.to_bytes();
    let request = Request::from_parts(head, Full::new(body.clone()));
    let grant = form_urlencoded::parse(&body).find(|(name, _)| name == "grant_type");
    let Some((_, grant)) = grant else {
        return http.request(request).await;
    };
    match &*grant {
        "refresh_token" => report.lock().refresh_token += 1,
        _ => report.lock().client_credentials += 1,
    }
    let answer = http.request(request).await;
    let granted = matches!(&answer, Ok(answer) if answer.status().is_success());
    report.lock().failed_token_requests += u64::from(!granted);
    answer
}

// The load.

/// How many requests to send, and until when.
#[derive(Clone, Copy)]
struct Plan {
    requests: u64,
    until: Option<Instant>,
}

impl Plan {
    fn new(args: &Args) -> Self {
        let default = if args.duration.is_some() { u64::MAX } else { 1 };
        let length = args.duration.map(Duration::from_secs_f64);
        Self {
            requests: args.requests.map_or(default, NonZeroU64::get),
            until: length.map(|length| Instant::now() + length),
        }
    }

    /// Whether to send this request at `due`; numbers start at 0.
    fn allows(&self, number: u64, due: Instant) -> bool {
        number < self.requests && self.until.is_none_or(|until| due < until)
    }
}

/// Sends each request when an earlier one is done.
async fn closed_loop(args: &Args, api: &Api, report: &Report) {
    let plan = Plan::new(args);
    let call = Call::new(args, api, report);
    let numbers = Arc::new(AtomicU64::new(0));
    let mut workers = JoinSet::new();
    for _ in 0..args.concurrency.map_or(1, NonZeroUsize::get) {
        let (call, numbers) = (call.clone(), Arc::clone(&numbers));
        workers.spawn(async move {
            loop {
                let now = Instant::now();
                if !plan.allows(numbers.fetch_add(1, Ordering::Relaxed), now) {
                    break;
                }
                call.clone().run(now).await;
            }
        });
    }
    workers.join_all().await;
}

/// Sends each request when it is due.
async fn open_loop(args: &Args, rate: f64, api: &Api, report: &Report) {
    let plan = Plan::new(args);
    let call = Call::new(args, api, report);
    let limit = args
        .concurrency
        .map_or(Semaphore::MAX_PERMITS, NonZeroUsize::get);
    let permits = Arc::new(Semaphore::new(limit.min(Semaphore::MAX_PERMITS)));
    let started = Instant::now();
    let mut calls = JoinSet::new();
    for number in 0.. {
        let due = started + Duration::from_secs_f64(number as f64 / rate);
        if !plan.allows(number, due) {
            break;
        }
        time::sleep_until(due).await;
        let permit = Arc::clone(&permits).acquire_owned().await;
        let call = call.clone();
        calls.spawn(async move {
            call.run(due).await;
            drop(permit);
        });
        while calls.try_join_next().is_some() {}
    }
    calls.join_all().await;
}

/// One request, and where its outcome goes.
#[derive(Clone)]
struct Call {
    api: Api,
    method: Method,
    url: Uri,
    timeout: Duration,
    report: Report,
}

impl Call {
    fn new(args: &Args, api: &Api, report: &Report) -> Self {
        Self {
            api: api.clone(),
            method: args.method.clone(),
            url: args.url.clone(),
            timeout: Duration::from_secs_f64(args.timeout),
            report: report.clone(),
        }
    }

    async fn run(self, due: Instant) {
        let mut request = Request::new(Full::default());
        *request.method_mut() = self.method;
        *request.uri_mut() = self.url;
        let answer = time::timeout(self.timeout, self.api.oneshot(request)).await;
        let answer = answer.unwrap_or_else(|elapsed| Err(elapsed.into()));
        self.report.lock().add(answer, due.elapsed());
    }
}

// The report.

/// The outcomes of all requests; clones share them.
#[derive(Clone)]
struct Report(Arc<Mutex<Tally>>);

struct Tally {
    failed: u64,
    statuses: BTreeMap<u16, u64>,
    errors: BTreeMap<&'static str, Failure>,
    /// In microseconds; anything longer than an hour counts as one.
    latencies: Histogram<u64>,
    client_credentials: u64,
    refresh_token: u64,
    failed_token_requests: u64,
}

/// Errors of one kind.
struct Failure {
    count: u64,
    example: String,
}

impl Report {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Tally {
            failed: 0,
            statuses: BTreeMap::new(),
            errors: BTreeMap::new(),
            latencies: Histogram::new_with_max(HOUR, 3)
                .expect("3 digits up to an hour make a histogram"),
            client_credentials: 0,
            refresh_token: 0,
            failed_token_requests: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Tally> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tally {
    fn add(&mut self, answer: Result<Response<()>, BoxError>, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.latencies.saturating_record(micros);
        match answer {
            Ok(answer) => {
                self.failed += u64::from(!answer.status().is_success());
                *self.statuses.entry(answer.status().as_u16()).or_default() += 1;
            }
            Err(error) => {
                self.failed += 1;
                let failure = self.errors.entry(kind(&error)).or_insert_with(|| Failure {
                    count: 0,
                    example: chain(&*error),
                });
                failure.count += 1;
            }
        }
    }

    fn json(&self, took: Duration) -> Value {
        let errors: BTreeMap<_, _> = self
            .errors
            .iter()
            .map(|(kind, e)| (kind, e.count))
            .collect();
        let examples: BTreeMap<_, _> = self
            .errors
            .iter()
            .map(|(kind, e)| (kind, &e.example))
            .collect();
        json!({
            "requests": self.latencies.len(),
            "failed": self.failed,
            "elapsed_seconds": took.as_secs_f64(),
            "statuses": self.statuses,
            "token_requests": {
                "client_credentials": self.client_credentials,
                "refresh_token": self.refresh_token,
                "failed": self.failed_token_requests,
            },
            "errors": errors,
            "error_examples": examples,
            "latency_ms": {
                "p50": self.millis(0.5),
                "p99": self.millis(0.99),
                "p99_9": self.millis(0.999),
                "max": self.millis(1.0),
            },
        })
    }

    fn print(&self, took: Duration) {
        let (requests, seconds) = (self.latencies.len(), took.as_secs_f64());
        println!(
            "requests        {requests} in {seconds:.2} s ({:.0}/s), {} failed",
            requests as f64 / seconds,
            self.failed,
        );
        for (status, count) in &self.statuses {
            println!("status {status}      {count}");
        }
        for (kind, Failure { count, example }) in &self.errors {
            println!("error           {count} {kind}, such as: {example}");
        }
        println!(
            "token requests  {} client_credentials, {} refresh_token; {} of these failed",
            self.client_credentials, self.refresh_token, self.failed_token_requests,
        );
        println!(
            "latency         p50 {:.2} ms, p99 {:.2} ms, p99.9 {:.2} ms, max {:.2} ms",
            self.millis(0.5),
            self.millis(0.99),
            self.millis(0.999),
            self.millis(1.0),
        );
    }

    fn millis(&self, quantile: f64) -> f64 {
        self.latencies.value_at_quantile(quantile) as f64 / 1e3
    }
}

const HOUR: u64 = 3_600_000_000;

/// A short name for what went wrong.
fn kind(error: &BoxError) -> &'static str {
    if let Some(error) = error.downcast_ref::<TokenError>() {
        return token_error_kind(error);
    }
    if error.is::<time::error::Elapsed>() {
        return "timeout";
    }
    match error.downcast_ref::<legacy::Error>() {
        Some(error) if error.is_connect() => "api_connect",
        _ => "api_transport",
    }
}

fn token_error_kind(error: &TokenError) -> &'static str {
    let kinds = [
        (error.is_insecure_uri(), "token_insecure_uri"),
        (error.is_rejected(), "token_rejected"),
        (error.is_transport(), "token_transport"),
        (error.is_timeout(), "token_timeout"),
        (error.is_malformed_response(), "token_malformed_response"),
        (error.is_interrupted(), "token_interrupted"),
        (error.is_overloaded(), "token_overloaded"),
        (error.is_no_runtime(), "token_no_runtime"),
        (error.is_unavailable(), "token_unavailable"),
    ];
    let kind = kinds.into_iter().find(|(matches, _)| *matches);
    kind.map_or("token_other", |(_, kind)| kind)
}

/// The messages of an error and of its sources.
fn chain(error: &(dyn Error + 'static)) -> String {
    let levels = iter::successors(Some(error), |&error| error.source());
    levels
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}
