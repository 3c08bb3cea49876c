//! [`ScriptedSource`]: an authorization server that follows a script.

use std::{collections::VecDeque, fmt, future, sync::Arc, time::Duration};

use tokio::{
    sync::{Semaphore, watch},
    time::{self, Instant},
};

use crate::{
    error::TokenError,
    source::{Fetch, RefreshToken, Revocation, TokenRequest, TokenResponse, TokenSource},
    sync::Mutex,
};

/// A token source that gives the answers of a script, and remembers what it was asked.
///
/// Each call of [`fetch`](TokenSource::fetch), which is one attempt of a token request, takes the next answer of the
/// script. After the last one it gives a terminal error that says so, or what
/// [`then_always`](Self::then_always) has set.
///
/// Clones share everything, so a test keeps one and gives the other away. Making one and reading it needs no runtime.
/// Delays use tokio's clock, which a test may pause.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tower_bearer::{
///     TokenCache, TokenError,
///     test_util::{Answer, ScriptedSource, errors},
/// };
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), TokenError> {
/// let lifetime = Duration::from_secs(300);
/// let source = ScriptedSource::new([
///     Answer::error(errors::timeout()),
///     Answer::token("token-1", lifetime),
///     Answer::token("token-2", lifetime),
/// ]);
/// let cache = TokenCache::new(source.clone());
///
/// // The first attempt fails, and a second one follows within the same token request.
/// assert_eq!(cache.get().await?.expose_secret(), "token-1");
/// assert_eq!(source.asked()[1].attempt, 2);
///
/// tokio::time::sleep(lifetime).await;
/// assert_eq!(cache.get().await?.expose_secret(), "token-2");
/// assert_eq!(source.unused(), 0);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct ScriptedSource(Arc<Shared>);

struct Shared {
    made: Instant,
    script: Mutex<Script>,
    /// How many attempts there were, for tests that wait for one.
    count: watch::Sender<usize>,
    /// One permit for each held answer that is released.
    released: Semaphore,
}

#[derive(Default)]
struct Script {
    answers: VecDeque<Answer>,
    always: Option<Answer>,
    asked: Vec<Asked>,
    revoked: Vec<Revocation>,
}

impl ScriptedSource {
    /// Creates a source that gives these answers, in this order.
    #[must_use]
    pub fn new<I>(script: I) -> Self
    where
        I: IntoIterator<Item: Into<Answer>>,
    {
        let script = Script {
            answers: script.into_iter().map(Into::into).collect(),
            ..Script::default()
        };
        Self(Arc::new(Shared {
            made: Instant::now(),
            script: Mutex::new(script),
            count: watch::Sender::new(0),
            released: Semaphore::new(0),
        }))
    }

    /// Creates a source that grants `token-1`, `token-2` and so on, each with this lifetime, without end.
    #[must_use]
    pub fn numbered(lifetime: Duration) -> Self {
        Self::new([] as [Answer; 0]).then_always(Answer::numbered(lifetime))
    }

    /// Sets what it answers once the script has ended, again and again.
    #[must_use]
    pub fn then_always(self, answer: impl Into<Answer>) -> Self {
        self.0.script.lock().always = Some(answer.into());
        self
    }

    /// Adds an answer to the end of the script.
    pub fn push(&self, answer: impl Into<Answer>) {
        self.0.script.lock().answers.push_back(answer.into());
    }

    /// Releases one [held](Answer::held) answer: the one that has waited longest, or the next one if none waits.
    pub fn release(&self) {
        self.0.released.add_permits(1);
    }

    /// Returns what it was asked, one item for each attempt.
    #[must_use]
    pub fn asked(&self) -> Vec<Asked> {
        self.0.script.lock().asked.clone()
    }

    /// Returns how often it was asked: once for each attempt.
    #[must_use]
    pub fn count(&self) -> usize {
        *self.0.count.borrow()
    }

    /// Waits until it was asked this many times in total.
    ///
    /// Use it to wait until a token request is under way. It waits forever if the attempt does not come.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub async fn until_asked(&self, times: usize) {
        let mut count = self.0.count.subscribe();
        // It fails only once the sender is gone, which `self` holds.
        let _ = count.wait_for(|count| *count >= times).await;
    }

    /// Returns how many answers of the script were not given.
    #[must_use]
    pub fn unused(&self) -> usize {
        self.0.script.lock().answers.len()
    }

    /// Returns the tokens that it was asked to revoke. It always succeeds.
    #[must_use]
    pub fn revoked(&self) -> Vec<Revocation> {
        self.0.script.lock().revoked.clone()
    }

    /// Records an attempt, and returns its answer and its number.
    fn note(&self, fetch: Fetch) -> (Option<Answer>, usize) {
        let mut script = self.0.script.lock();
        script.asked.push(Asked {
            at: self.0.made.elapsed(),
            attempt: fetch.attempt,
            timeout: fetch.timeout,
            refresh_token: fetch.refresh_token,
            request: fetch.request,
            claims: fetch.claims,
        });
        let number = script.asked.len();
        let answer = script.answers.pop_front();
        let answer = answer.or_else(|| script.always.clone());
        drop(script);
        self.0.count.send_replace(number);
        (answer, number)
    }
}

impl TokenSource for ScriptedSource {
    async fn fetch(&self, fetch: Fetch) -> Result<TokenResponse, TokenError> {
        let (answer, number) = self.note(fetch);
        let Some(Answer { what, delay, held }) = answer else {
            return Err(TokenError::terminal(format!(
                "attempt {number} is not in the script of the token source"
            )));
        };
        if held {
            match self.0.released.acquire().await {
                Ok(permit) => permit.forget(),
                // It is never closed.
                Err(error) => return Err(TokenError::terminal(error)),
            }
        }
        if !delay.is_zero() {
            time::sleep(delay).await;
        }
        match what {
            What::Grant(response) => Ok(response),
            What::Numbered(lifetime) => {
                Ok(TokenResponse::new(format!("token-{number}"))?.expires_in(lifetime))
            }
            What::Fail(error) => Err(error),
            What::Hang => future::pending().await,
            What::Panic => panic!("the script of the token source says so"),
        }
    }

    async fn revoke(&self, revocation: Revocation) -> Result<(), TokenError> {
        self.0.script.lock().revoked.push(revocation);
        Ok(())
    }
}

impl fmt::Debug for ScriptedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let script = self.0.script.lock();
        f.debug_struct("ScriptedSource")
            .field("unused", &script.answers)
            .field("always", &script.always)
            .field("asked", &script.asked)
            .finish_non_exhaustive()
    }
}

/// What a [`ScriptedSource`] does with one attempt.
///
/// A [`TokenResponse`] and a [`TokenError`] are answers as they are.
#[derive(Clone, Debug)]
pub struct Answer {
    what: What,
    delay: Duration,
    held: bool,
}

#[derive(Clone, Debug)]
enum What {
    Grant(TokenResponse),
    Numbered(Duration),
    Fail(TokenError),
    Hang,
    Panic,
}

impl Answer {
    /// Grants a token of this text and lifetime.
    ///
    /// # Panics
    ///
    /// If the text is empty or has a byte outside of visible ASCII, which no header could carry (RFC 6750
    /// section 2.1).
    #[must_use]
    #[track_caller]
    pub fn token(text: impl Into<String>, lifetime: Duration) -> Self {
        match TokenResponse::new(text) {
            Ok(response) => response.expires_in(lifetime).into(),
            Err(error) => panic!("{error}: a header carries visible ASCII only"),
        }
    }

    /// Grants `token-N` to the Nth attempt that the source sees, with this lifetime.
    #[must_use]
    pub fn numbered(lifetime: Duration) -> Self {
        What::Numbered(lifetime).into()
    }

    /// Fails.
    ///
    /// [`errors`](super::errors) has an error of each kind.
    #[must_use]
    pub fn error(error: TokenError) -> Self {
        error.into()
    }

    /// Never answers; the cache drops the attempt after
    /// [`RefreshPolicy::attempt_timeout`](crate::RefreshPolicy::attempt_timeout).
    ///
    /// See [`held`](Self::held) for an answer that waits for the test.
    #[must_use]
    pub fn hang() -> Self {
        What::Hang.into()
    }

    /// Panics.
    #[must_use]
    pub fn panic() -> Self {
        What::Panic.into()
    }

    /// Holds the answer back until [`ScriptedSource::release`].
    ///
    /// The cache's timeouts keep running: under paused time, which advances when all tasks wait, a test that waits for
    /// the token before it releases the answer sees a timeout.
    #[must_use]
    pub fn held(mut self) -> Self {
        self.held = true;
        self
    }

    /// Sets how long the answer takes, from when it was asked for or released: default zero.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }
}

impl From<TokenResponse> for Answer {
    fn from(response: TokenResponse) -> Self {
        What::Grant(response).into()
    }
}

impl From<TokenError> for Answer {
    fn from(error: TokenError) -> Self {
        What::Fail(error).into()
    }
}

impl From<What> for Answer {
    fn from(what: What) -> Self {
        Self {
            what,
            delay: Duration::ZERO,
            held: false,
        }
    }
}

/// What a [`ScriptedSource`] was asked in one attempt: the [`Fetch`] and when it came.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Asked {
    /// When it was asked, counted from when the source was made, by tokio's clock.
    pub at: Duration,
    /// The number of the attempt within its token request, from 1.
    pub attempt: u32,
    /// How long the attempt might take before it is dropped.
    pub timeout: Duration,
    /// The refresh token that was handed to it.
    pub refresh_token: Option<RefreshToken>,
    /// What the token was for.
    pub request: TokenRequest,
    /// The claims that the API demanded in the token.
    pub claims: Option<String>,
}
