//! [`Settings`]: a layer's configuration, as its services and their futures use it.

use crate::{cache::TokenCache, origin::Origins};

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) cache: TokenCache,
    pub(crate) origins: Origins,
    /// Whether a request keeps an `Authorization` header it already has.
    pub(crate) keep_existing: bool,
    /// Whether a 401 that does not say what is wrong counts.
    pub(crate) refresh_on_unexplained_401: bool,
}

impl Settings {
    /// Whether an https request without extensions may carry the token.
    pub(crate) fn take_usual(&self) -> bool {
        !self.keep_existing && !self.origins.are_pinned()
    }
}
