//! [`Credential`]: where a secret, a key or a certificate comes from, and whether it has changed.

use std::{
    env,
    ffi::{OsStr, OsString},
    fmt,
    fs::{self, File, Metadata},
    future::Future,
    io::{self, Read},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::SystemTime,
};

use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::{lease::LeasedLock, response::without_bom};
use crate::{
    error::{BoxError, Kind, NoCredential, TokenError},
    sync::Mutex,
};

/// Where a secret, a private key or a certificate comes from: a constant, a file, an environment variable or a
/// function.
///
/// All but constants may change while the program runs. A file and a variable are read for every token request. A
/// function is called once, and its result is kept until the server refuses it. When the server answers
/// `invalid_client`, or with status 401 an error that is not about what was asked for, such as `unauthorized_client`, the
/// credential is obtained again within the same attempt, and if it has changed, the token request is sent once more. A
/// status of 400, 401 or 403 without an OAuth error, an error with status 200, a transient one with status 401, such as
/// `server_error`, or a TLS alert if there is a client certificate, may be a refusal too: then the next attempt obtains
/// the credential again, and if a function fails then, its last result is used.
///
/// A constant is used as it is, line breaks included. No text is ever printed, and it is wiped from memory on drop.
///
/// ```
/// use tower_bearer::{BoxError, Credential};
///
/// # async fn read_from_vault() -> Result<String, BoxError> { Ok("secret".to_owned()) }
/// let constant = Credential::from("secret");
/// let mounted = Credential::file("/var/run/secrets/client-secret");
/// let variable = Credential::env("CLIENT_SECRET");
/// let vault = Credential::from_fn(|| async { read_from_vault().await });
/// # let _ = (constant, mounted, variable, vault);
/// ```
///
/// Clones are cheap, and share the result of a function.
///
/// # Errors
///
/// A credential that cannot be obtained, such as a file that is missing or empty, fails the attempt with a transient
/// [`TokenError`]: the cache tries again with backoff.
#[derive(Clone)]
pub struct Credential(Arc<Origin>);

enum Origin {
    Constant(Text),
    File(PathBuf),
    Env(OsString),
    Function(Function),
}

struct Function {
    call: Box<dyn Fn() -> Call + Send + Sync>,
    cached: Mutex<Cached>,
    /// Held during a call, so that many token requests share one.
    lock: LeasedLock,
}

/// The last result of a function.
#[derive(Clone, Default)]
struct Cached {
    text: Option<Text>,
    /// Whether the server has refused it, so that the next token request calls the function again.
    refused: bool,
    /// Whether the server may have refused it, so that the next token request calls the function again, and uses this
    /// one if that fails.
    doubted: bool,
}

type Text = Arc<SecretString>;

type Call = Pin<Box<dyn Future<Output = Result<String, BoxError>> + Send>>;

impl Credential {
    /// Creates a credential that is read from a file for every token request: a Kubernetes mount, for example.
    ///
    /// A byte order mark at its start and line breaks at its end are removed. It is read off the runtime's own
    /// threads, up to 1 MiB.
    #[must_use]
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self(Arc::new(Origin::File(path.into())))
    }

    /// Creates a credential that is read from an environment variable for every token request.
    ///
    /// Line breaks at its end are removed.
    #[must_use]
    pub fn env(name: impl Into<OsString>) -> Self {
        Self(Arc::new(Origin::Env(name.into())))
    }

    /// Creates a credential that an async function returns: one that asks Vault, for example.
    ///
    /// It is called for the first token request, and again after the server has refused its result, or may have. Calls
    /// do not overlap, unless one has not returned for 10 s. Its future is dropped with the attempt, after 10 s by
    /// default, so it needs no timeout of its own. Its error becomes the source of a [`TokenError`], so it should hold
    /// no secret.
    #[must_use]
    pub fn from_fn<F, Fut>(f: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<String, BoxError>> + Send + 'static,
    {
        Self(Arc::new(Origin::Function(Function {
            call: Box::new(move || Box::pin(f())),
            cached: Mutex::new(Cached::default()),
            lock: LeasedLock::new(),
        })))
    }

    pub(super) fn new(text: SecretString) -> Self {
        Self(Arc::new(Origin::Constant(Arc::new(text))))
    }

    /// The text, if it is known at build time.
    #[cfg(any(feature = "jwt", feature = "rustls"))]
    pub(super) fn constant(&self) -> Option<&SecretString> {
        match &*self.0 {
            Origin::Constant(text) => Some(text),
            _ => None,
        }
    }

    /// Obtains the text for a token request.
    pub(super) async fn get(&self) -> Result<CredentialValue, TokenError> {
        let (text, version) = match &*self.0 {
            Origin::Constant(text) => (text.clone(), None),
            Origin::File(path) => {
                let (text, version) = read_off_runtime(path.clone()).await?;
                (Arc::new(text), Some(version))
            }
            Origin::Env(name) => (Arc::new(of_variable(name, env::var(name))?), None),
            Origin::Function(function) => (function.get().await?, None),
        };
        Ok(CredentialValue {
            credential: self.clone(),
            text,
            version,
        })
    }
}

impl From<String> for Credential {
    fn from(text: String) -> Self {
        Self::new(text.into())
    }
}

impl From<&str> for Credential {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut tuple = f.debug_tuple("Credential");
        match &*self.0 {
            Origin::Constant(_) => tuple.field(&format_args!("constant")),
            Origin::File(path) => tuple.field(path),
            Origin::Env(name) => tuple.field(name),
            Origin::Function(_) => tuple.field(&format_args!("function")),
        };
        tuple.finish()
    }
}

/// The text of a credential for one token request.
#[derive(Clone)]
pub(super) struct CredentialValue {
    credential: Credential,
    text: Text,
    version: Option<FileVersion>,
}

impl CredentialValue {
    pub(super) fn text(&self) -> &str {
        self.text.expose_secret()
    }

    pub(super) fn is_of_file(&self) -> bool {
        matches!(&*self.credential.0, Origin::File(_))
    }

    /// Makes the next token request obtain another one, since the server refused this one.
    pub(super) fn refuse(&self) {
        self.judge(|cached| cached.refused = true);
    }

    /// Makes the next token request obtain another one, since the server may have refused this one.
    pub(super) fn doubt(&self) {
        self.judge(|cached| cached.doubted = true);
    }

    fn judge(&self, judge: impl FnOnce(&mut Cached)) {
        if let Origin::Function(function) = &*self.credential.0 {
            let mut cached = function.cached.lock();
            if cached.holds(&self.text) {
                judge(&mut cached);
            }
        }
    }

    /// Whether the next token request would be sent with another one, as far as can be told at once.
    pub(super) fn is_outdated(&self) -> bool {
        match &*self.credential.0 {
            Origin::Constant(_) => false,
            Origin::File(path) => FileVersion::of(fs::metadata(path)) != self.version,
            Origin::Env(name) => env::var_os(name)
                .is_some_and(|value| value.as_encoded_bytes() != self.text().as_bytes()),
            // The same text again is no change, and one that was refused too is of no use.
            Origin::Function(function) => {
                let cached = function.cached.lock().usable();
                cached.is_some_and(|cached| cached.expose_secret() != self.text())
            }
        }
    }
}

impl fmt::Debug for CredentialValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.credential.fmt(f)
    }
}

impl Cached {
    fn holds(&self, text: &Text) -> bool {
        self.text
            .as_ref()
            .is_some_and(|cached| Arc::ptr_eq(cached, text))
    }

    fn usable(&self) -> Option<Text> {
        self.not_refused().filter(|_| !self.doubted)
    }

    fn not_refused(&self) -> Option<Text> {
        self.text.clone().filter(|_| !self.refused)
    }
}

impl Function {
    async fn get(&self) -> Result<Text, TokenError> {
        let cached = self.cached.lock().usable();
        if let Some(text) = cached {
            return Ok(text);
        }
        let _guard = self.lock.acquire().await;
        // The previous holder may have obtained it.
        let cached = self.cached.lock().usable();
        if let Some(text) = cached {
            return Ok(text);
        }
        let problem = match (self.call)().await {
            Ok(text) if !text.is_empty() => {
                let text = Arc::new(SecretString::from(text));
                *self.cached.lock() = Cached {
                    text: Some(text.clone()),
                    ..Cached::default()
                };
                return Ok(text);
            }
            Ok(_) => {
                let problem = "the function gave an empty text".to_owned();
                NoCredential {
                    problem,
                    error: None,
                }
                .into()
            }
            Err(error) => error,
        };
        // Not cached, so the next token request calls again.
        let doubted = self.cached.lock().not_refused();
        doubted.ok_or_else(|| missing(problem))
    }
}

/// Tells whether a file has changed without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FileVersion {
    modified: Option<SystemTime>,
    length: u64,
    /// Tells a file from its replacement, whatever the resolution of the clock.
    #[cfg(unix)]
    inode: u64,
}

impl FileVersion {
    fn new(metadata: &Metadata) -> Self {
        Self {
            modified: metadata.modified().ok(),
            length: metadata.len(),
            #[cfg(unix)]
            inode: std::os::unix::fs::MetadataExt::ino(metadata),
        }
    }

    fn of(metadata: io::Result<Metadata>) -> Option<Self> {
        metadata.ok().as_ref().map(Self::new)
    }
}

async fn read_off_runtime(path: PathBuf) -> Result<(SecretString, FileVersion), TokenError> {
    let reading = tokio::task::spawn_blocking(move || {
        read_file(&path).map_err(|error| {
            let problem = format!("the file {path:?} cannot be read");
            let error = Some(error);
            missing(NoCredential { problem, error })
        })
    });
    match reading.await {
        Ok(read) => read,
        // The runtime is shutting down.
        Err(error) => Err(missing(error)),
    }
}

fn read_file(path: &Path) -> io::Result<(SecretString, FileVersion)> {
    let file = File::open(path)?;
    // Before the content, so that a change in between is noticed.
    let version = FileVersion::new(&file.metadata()?);
    // Large enough from the start, since a buffer that grows leaves copies behind.
    let capacity = version.length.min(FILE_LIMIT) as usize + 1;
    let mut text = Zeroizing::new(Vec::with_capacity(capacity));
    file.take(FILE_LIMIT + 1).read_to_end(&mut text)?;
    if text.len() as u64 > FILE_LIMIT {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    let text = std::str::from_utf8(without_bom(&text));
    let text = text.map_err(|_| io::Error::other("it is not UTF-8"))?;
    let text = without_line_breaks(text);
    if text.is_empty() {
        // Perhaps it is still being written.
        return Err(io::Error::other("it is empty"));
    }
    Ok((SecretString::from(text), version))
}

/// A secret ends with none, but `echo` and editors add one.
fn without_line_breaks(text: &str) -> &str {
    text.trim_end_matches(['\r', '\n'])
}

/// The credential in an environment variable of this name and value.
fn of_variable(
    name: &OsStr,
    value: Result<String, env::VarError>,
) -> Result<SecretString, TokenError> {
    let problem = match value.map(Zeroizing::new) {
        Ok(text) => match without_line_breaks(&text) {
            "" => "is empty",
            text => return Ok(text.into()),
        },
        Err(env::VarError::NotPresent) => "is not set",
        Err(env::VarError::NotUnicode(_)) => "is not UTF-8",
    };
    let problem = format!("the environment variable {name:?} {problem}");
    let error = None;
    Err(missing(NoCredential { problem, error }))
}

/// The error of a credential that cannot be obtained because of `source`.
fn missing(source: impl Into<BoxError>) -> TokenError {
    TokenError::new(Kind::NoCredential).with_source(source)
}

/// Far more than a certificate chain needs.
const FILE_LIMIT: u64 = 1024 * 1024;

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    async fn text(credential: &Credential) -> String {
        credential.get().await.unwrap().text().to_owned()
    }

    /// A function whose first call hangs.
    fn hanging_at_first() -> Credential {
        let calls = AtomicUsize::new(0);
        Credential::from_fn(move || {
            let first = calls.fetch_add(1, Ordering::Relaxed) == 0;
            async move {
                if first {
                    std::future::pending::<()>().await;
                }
                Ok("secret".to_owned())
            }
        })
    }

    /// A file that is removed with the test.
    struct Temporary(PathBuf);

    impl Temporary {
        fn new(name: &str) -> Self {
            let name = format!("tower-bearer-{}-{name}", std::process::id());
            Self(env::temp_dir().join(name))
        }

        fn write(&self, text: &str) {
            fs::write(&self.0, text).unwrap();
        }
    }

    impl Drop for Temporary {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    #[tokio::test]
    async fn a_file_is_read_each_time_without_its_last_line_breaks() {
        let file = Temporary::new("read");
        let credential = Credential::file(&file.0);
        for (written, read) in [
            ("one", "one"),
            (" two \r\n", " two "),
            ("a\nb\n\n", "a\nb"),
            ("\u{feff}three\r\n", "three"),
        ] {
            file.write(written);
            assert_eq!(text(&credential).await, read);
        }
        let value = credential.get().await.unwrap();
        assert!(!value.is_outdated());
        file.write("another length");
        assert!(value.is_outdated());
    }

    #[tokio::test]
    async fn an_unreadable_credential_is_transient_and_its_content_is_not_shown() {
        let file = Temporary::new("broken");
        for broken in [None, Some(&b""[..]), Some(b"\n"), Some(b"CANARY\xFF")] {
            if let Some(content) = broken {
                fs::write(&file.0, content).unwrap();
            }
            let error = Credential::file(&file.0).get().await.unwrap_err();
            assert!(error.is_transient());
            // The message alone says that it is not the server, and which file it is.
            assert_eq!(
                error.to_string(),
                format!(
                    "the client's credential could not be obtained (the file {:?} cannot be read)",
                    file.0
                )
            );
            assert!(!format!("{error:?}").contains("CANARY"), "{error:?}");
        }
        let large = Temporary::new("large");
        large.write(&"a".repeat(FILE_LIMIT as usize + 1));
        assert!(Credential::file(&large.0).get().await.is_err());
        let missing = Credential::env("TOWER_BEARER_IS_NOT_SET");
        let missing = missing.get().await.unwrap_err();
        assert!(missing.is_transient());
        assert_eq!(
            missing.to_string(),
            "the client's credential could not be obtained \
             (the environment variable \"TOWER_BEARER_IS_NOT_SET\" is not set)"
        );
        let foreign = Credential::from_fn(|| async { Err("CANARY".into()) });
        assert_eq!(
            foreign.get().await.err().unwrap().to_string(),
            "the client's credential could not be obtained"
        );
    }

    #[test]
    fn line_breaks_at_the_end_of_a_variable_are_no_part_of_the_secret() {
        let of = |value: &str| of_variable(OsStr::new("SECRET"), Ok(value.to_owned()));
        for (value, secret) in [
            ("se cret", "se cret"),
            ("se cret\n", "se cret"),
            ("se cret\r\n\n", "se cret"),
            ("\nse\ncret ", "\nse\ncret "),
        ] {
            assert_eq!(of(value).unwrap().expose_secret(), secret);
        }
        for empty in ["", "\n"] {
            let error = of(empty).unwrap_err().to_string();
            assert!(error.contains("\"SECRET\" is empty"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_variable_is_read() {
        // Cargo sets it for every test.
        let credential = Credential::env("CARGO_PKG_NAME");
        let value = credential.get().await.unwrap();
        assert_eq!(value.text(), "tower-bearer");
        assert!(!value.is_outdated());
    }

    #[tokio::test]
    async fn a_function_is_called_once_until_its_result_is_refused() {
        let calls = Arc::new(AtomicUsize::new(0));
        let count = calls.clone();
        let credential = Credential::from_fn(move || {
            let count = count.clone();
            async move {
                tokio::task::yield_now().await;
                Ok(format!("secret-{}", count.fetch_add(1, Ordering::Relaxed)))
            }
        });
        let (one, other) = tokio::join!(text(&credential), text(&credential));
        assert_eq!((&*one, &*other), ("secret-0", "secret-0"));

        let (first, also_first) = (
            credential.get().await.unwrap(),
            credential.get().await.unwrap(),
        );
        assert!(!first.is_outdated());
        first.refuse();
        assert_eq!(text(&credential).await, "secret-1");
        assert!(first.is_outdated());
        // Another token request that was sent with the old one keeps the new one.
        also_first.refuse();
        assert_eq!(text(&credential).await, "secret-1");
        assert_eq!(calls.load(Ordering::Relaxed), 2);
    }

    /// Law 7: a page of a firewall does not tie the server's clients to the health of their vault.
    #[tokio::test]
    async fn what_may_have_been_refused_is_used_if_there_is_nothing_else() {
        let asked = AtomicUsize::new(0);
        let credential = Credential::from_fn(move || {
            let count = asked.fetch_add(1, Ordering::Relaxed);
            async move {
                match count {
                    0 | 3 => Ok(format!("secret-{count}")),
                    1 => Ok(String::new()),
                    _ => Err("sealed".into()),
                }
            }
        });
        let first = credential.get().await.unwrap();
        first.doubt();
        for expected in ["secret-0", "secret-0", "secret-3", "secret-3"] {
            assert_eq!(text(&credential).await, expected);
        }
        // A doubt of it before or after makes a refusal no less of one.
        let second = credential.get().await.unwrap();
        second.doubt();
        second.refuse();
        second.doubt();
        assert!(credential.get().await.is_err());
    }

    #[tokio::test]
    async fn an_empty_text_is_not_cached() {
        let calls = AtomicUsize::new(0);
        let credential = Credential::from_fn(move || {
            let first = calls.fetch_add(1, Ordering::Relaxed) == 0;
            async move { Ok(if first { "" } else { "secret" }.to_owned()) }
        });
        assert!(credential.get().await.unwrap_err().is_transient());
        assert_eq!(text(&credential).await, "secret");
    }

    /// Law 5: a request that is dropped during a call does not block the next.
    #[tokio::test(start_paused = true)]
    async fn a_function_that_hangs_is_called_again_by_the_next_request() {
        let credential = hanging_at_first();
        let limit = std::time::Duration::from_secs(1);
        assert!(tokio::time::timeout(limit, credential.get()).await.is_err());
        assert_eq!(text(&credential).await, "secret");
    }

    /// Law 2: one that was refused too is no reason to ask the server again.
    #[tokio::test]
    async fn a_new_result_that_was_refused_too_is_no_change() {
        let count = AtomicUsize::new(0);
        let credential = Credential::from_fn(move || {
            let count = count.fetch_add(1, Ordering::Relaxed);
            async move { Ok(format!("secret-{count}")) }
        });
        let first = credential.get().await.unwrap();
        first.refuse();
        let second = credential.get().await.unwrap();
        assert!(first.is_outdated());
        second.refuse();
        assert!(!first.is_outdated());
    }

    /// Law 6: a parked runtime holds the lock for as long as an attempt, not forever.
    #[tokio::test(start_paused = true)]
    async fn a_function_that_hangs_on_a_parked_runtime_is_called_again() {
        let credential = hanging_at_first();
        let mut parked = std::pin::pin!(credential.get());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(parked.as_mut().poll(&mut context).is_pending());
        // One that waits for the lock may be parked too.
        let mut next = std::pin::pin!(credential.get());
        assert!(next.as_mut().poll(&mut context).is_pending());
        let limit = std::time::Duration::from_secs(11);
        let (one, other) = tokio::join!(
            tokio::time::timeout(limit, text(&credential)),
            tokio::time::timeout(limit, text(&credential)),
        );
        assert_eq!(
            (one.as_deref(), other.as_deref()),
            (Ok("secret"), Ok("secret"))
        );
    }

    /// Law 9.
    #[tokio::test]
    async fn debug_shows_no_secret() {
        let credential = Credential::from("CANARY");
        let value = credential.get().await.unwrap();
        assert!(!format!("{credential:?} {value:?}").contains("CANARY"));
        let file = format!("{:?}", Credential::file("/a/b"));
        assert_eq!(file, "Credential(\"/a/b\")");
    }
}
