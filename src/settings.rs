//! [`Settings`]: what a layer was told, for its services and their futures.

use crate::{cache::TokenCache, origin::Origins};

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) cache: TokenCache,
    pub(crate) origins: Origins,
    /// Whether a request keeps the `Authorization` that it brings along.
    pub(crate) keep_existing: bool,
    /// Whether a 401 counts that does not say what is wrong.
    pub(crate) refresh_on_unexplained_401: bool,
}

impl Settings {
    /// Whether a request may carry the token that goes by https and says nothing to the layer.
    pub(crate) fn take_usual(&self) -> bool {
        !self.keep_existing && !self.origins.are_pinned()
    }
}
