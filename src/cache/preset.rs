//! Caches with a preset answer: for tests, without a clock or a runtime.

use std::fmt;

use super::{TokenCache, endpoint::Endpoint, entry::Entry};
use crate::{
    error::TokenError,
    policy::RefreshPolicy,
    source::{Fetch, Revocation, SharedSource, TokenResponse, TokenSource},
};

/// What a cache answers to every request.
#[derive(Clone)]
pub(super) enum Preset {
    Token(TokenResponse),
    Error(TokenError),
}

#[cfg_attr(docsrs, doc(cfg(feature = "test-util")))]
impl TokenCache {
    /// Creates a cache that holds this token forever, for tests of the code around it.
    ///
    /// No token request is sent, and the token does not expire, whatever the clocks say. Every
    /// [`TokenRequest`](crate::TokenRequest) gets it, even one with a source of its own. Neither
    /// [`get`](Self::get) nor a request through a layer needs a runtime.
    ///
    /// There is no other token: [`invalidate`](Self::invalidate) leaves it in place, and a 401 goes to the caller.
    /// [`shutdown`](Self::shutdown) works as it does elsewhere.
    ///
    /// # Panics
    ///
    /// If the token is empty or has a byte outside of visible ASCII, which no header could carry (RFC 6750
    /// section 2.1).
    ///
    /// # Examples
    ///
    /// ```
    /// use tower_bearer::TokenCache;
    ///
    /// let cache = TokenCache::fixed("secret-for-tests");
    /// assert_eq!(cache.peek().unwrap().expose_secret(), "secret-for-tests");
    /// ```
    #[must_use]
    #[track_caller]
    pub fn fixed(token: impl Into<String>) -> Self {
        match TokenResponse::new(token) {
            Ok(response) => Self::preset(Preset::Token(response)),
            Err(error) => panic!("{error}: a header carries visible ASCII only"),
        }
    }

    /// Creates a cache that has no token and always returns this error, for tests of code that handles it.
    ///
    /// It sends no token request and never waits, so it needs no runtime.
    /// [`test_util::errors`](crate::test_util::errors) has an error of each kind.
    ///
    /// # Examples
    ///
    /// ```
    /// use tower_bearer::{TokenCache, TokenError};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let cache = TokenCache::failing(TokenError::terminal("no token today"));
    /// assert!(!cache.get().await.unwrap_err().is_transient());
    /// # }
    /// ```
    #[must_use]
    pub fn failing(error: TokenError) -> Self {
        Self::preset(Preset::Error(error))
    }

    fn preset(preset: Preset) -> Self {
        let mut endpoint = Endpoint::new(SharedSource::new(PresetSource));
        endpoint.preset = Some(preset);
        Self::over(endpoint, RefreshPolicy::new())
    }
}

impl Entry {
    /// Sets the preset token, if there is one.
    pub(super) fn apply_preset(&self) {
        if let Some(Preset::Token(response)) = &self.endpoint().preset {
            let mut state = self.state.lock();
            state.set_fixed_token(response.clone());
            self.publish(&state, None);
        }
    }

    /// The preset error, if there is one.
    pub(super) fn preset_error(&self) -> Option<TokenError> {
        match &self.endpoint().preset {
            Some(Preset::Error(error)) if !self.closing().is_cancelled() => Some(error.clone()),
            _ => None,
        }
    }
}

/// The source of a preset cache: asked only after a 401.
struct PresetSource;

impl TokenSource for PresetSource {
    async fn fetch(&self, _: Fetch) -> Result<TokenResponse, TokenError> {
        Err(TokenError::terminal("there is no token but the fixed one"))
    }

    async fn revoke(&self, _: Revocation) -> Result<(), TokenError> {
        Ok(())
    }
}

impl fmt::Debug for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(_) => f.write_str("Token"),
            Self::Error(error) => f.debug_tuple("Error").field(error).finish(),
        }
    }
}
