//! [`Settings`]: what a layer was told, for its services and their futures.

use crate::{cache::TokenCache, origin::Origins};

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) cache: TokenCache,
    pub(crate) origins: Origins,
    /// Whether a request keeps the `Authorization` that it brings along.
    pub(crate) keep_existing: bool,
    /// Whether a 401 counts that does not say what is wrong.
    pub(crate) heed_unexplained: bool,
}
