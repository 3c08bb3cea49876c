//! Real authorization servers in their own processes, by the contract in `README.md`.

use std::{
    env,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt, Full};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, pem::PemObject},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

pub type HttpClient = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// A running server; it ends when dropped.
pub struct Server {
    child: Child,
    pub at: Endpoints,
    http: HttpClient,
}

/// The line that the server prints.
#[derive(Clone, Deserialize)]
pub struct Endpoints {
    pub issuer: String,
    pub token_endpoint: String,
    pub introspection_endpoint: String,
    pub revocation_endpoint: String,
    pub api: String,
    admin: String,
}

/// What the server has counted since it started.
#[derive(Debug, Deserialize)]
pub struct Counts {
    pub token_requests: usize,
    pub granted: usize,
    pub api_requests: usize,
    pub api_refused: usize,
}

impl Server {
    /// Starts the server of this folder, if it is [installed].
    pub async fn start(folder: &str, config: &Value) -> Option<Self> {
        let folder = installed(folder)?;
        let http = http_client(config["tls"]["ca"].as_str());
        let config = config.to_string();
        let started = tokio::task::spawn_blocking(move || launch(&folder, &config));
        let (child, at) = started.await.expect("the server starts");
        Some(Self { child, at, http })
    }

    pub fn http(&self) -> HttpClient {
        self.http.clone()
    }

    pub async fn counts(&self) -> Counts {
        self.send(Method::GET, &self.at.admin, "application/json", "")
            .await
    }

    /// Has the server do what the contract calls `orders`.
    pub async fn order(&self, orders: Value) -> Counts {
        let body = orders.to_string();
        self.send(Method::POST, &self.at.admin, "application/json", body)
            .await
    }

    /// What the server says about a token (RFC 7662) to a client with the name and secret `inspector`.
    pub async fn introspect(&self, token: &str) -> Value {
        let body = format!("client_id=inspector&client_secret=inspector&token={token}");
        let form = "application/x-www-form-urlencoded";
        self.send(Method::POST, &self.at.introspection_endpoint, form, body)
            .await
    }

    async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        url: &str,
        content_type: &str,
        body: impl Into<Bytes>,
    ) -> T {
        let request = Request::builder()
            .method(method)
            .uri(url)
            .header(CONTENT_TYPE, content_type)
            .body(Full::new(body.into()))
            .unwrap();
        let response = self.http.request(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{url}");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        serde_json::from_slice(&body).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It would also end with its input.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client that trusts `ca`, by which the server verifies its clients.
fn http_client(ca: Option<&str>) -> HttpClient {
    let mut roots = RootCertStore::empty();
    if let Some(ca) = ca {
        let ca = CertificateDer::from_pem_slice(ca.as_bytes()).unwrap();
        roots.add(ca).unwrap();
    }
    let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_or_http()
        .enable_http1()
        .build();
    Client::builder(TokioExecutor::new()).build(connector)
}

/// Returns where this folder's server is, or prints that the test is skipped, and why.
pub fn installed(folder: &str) -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/servers")
        .join(folder);
    let Err(why) = is_installed(&folder) else {
        return Some(folder);
    };
    let name = thread::current().name().unwrap_or("?").to_owned();
    println!("skipped: {name}: {why}");
    let required = env::var_os("TOWER_BEARER_REQUIRE_SERVERS").is_some();
    assert!(!required, "{name} must not be skipped: {why}");
    None
}

fn is_installed(folder: &Path) -> Result<(), &'static str> {
    let node = Command::new("node")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !node.is_ok_and(|status| status.success()) {
        return Err("no Node");
    }
    match folder.join("node_modules").is_dir() {
        true => Ok(()),
        false => Err("no node_modules, see tests/servers/README.md"),
    }
}

fn launch(folder: &PathBuf, config: &str) -> (Child, Endpoints) {
    let mut child = Command::new("node")
        .arg("server.mjs")
        .arg(config)
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // Servers warn of what is intended here, such as plain http.
        .stderr(Stdio::null())
        .spawn()
        .expect("Node is there");
    let output = child.stdout.take().expect("it was piped");
    match first_line(output) {
        Some(line) => {
            let at = serde_json::from_str(&line).expect("it follows the contract");
            (child, at)
        }
        None => {
            let _ = child.kill();
            let _ = child.wait();
            panic!("`node server.mjs '{config}'` in {folder:?} does not start");
        }
    }
}

/// Waits for the first line, and discards the others so that the server never blocks on them.
fn first_line(output: ChildStdout) -> Option<String> {
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            // Only the first one is waited for.
            let _ = sender.send(line);
        }
    });
    receiver.recv_timeout(Duration::from_secs(30)).ok()
}
