//! [`Ready`]: a token as services attach it, without a lock and without a clock.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use http::HeaderValue;

use crate::{
    cache::Watched, settings::Settings, source::TokenRequest, time::Coarse, token::AccessToken,
};

/// A token with all that a request takes of it, and all that is needed if the API refuses it.
///
/// A request counts itself in and out of this one thing, so it should be on a cache line that few others write.
pub(crate) struct Ready {
    pub(crate) token: AccessToken,
    /// The token's header value, or a copy of it with a reference count of its own.
    header: HeaderValue,
    /// The token's number, and where to see whether it still stands.
    number: u64,
    watched: Watched,
    /// When the token is due or dead by the wall clock.
    until: Coarse,
    pub(crate) settings: Arc<Settings>,
}

impl Ready {
    pub(crate) fn new(token: AccessToken, settings: Arc<Settings>) -> Arc<Self> {
        Arc::new(Self {
            header: token.header_value().clone(),
            number: token.number(),
            watched: settings.cache.watched().clone(),
            until: token.fresh_until().wall().map_or(Coarse::MAX, Coarse::of),
            token,
            settings,
        })
    }

    #[inline]
    pub(crate) fn header(&self) -> HeaderValue {
        self.header.clone()
    }

    /// Whether a request may leave with the token as it stands.
    #[inline]
    fn is_fresh(&self) -> bool {
        self.watched.is(self.number) && Coarse::read() < self.until
    }

    /// The same with reference counts that nobody else writes.
    fn copy(&self) -> Arc<Self> {
        Arc::new(Self {
            token: self.token.clone(),
            header: self.token.copy_header(),
            number: self.number,
            watched: self.watched.clone(),
            until: self.until,
            settings: Arc::clone(&self.settings),
        })
    }
}

/// Where the services of one layer find the token.
struct Front {
    settings: Arc<Settings>,
    ready: ArcSwapOption<Ready>,
}

impl Front {
    fn new(settings: Settings) -> Self {
        Self {
            settings: Arc::new(settings),
            ready: ArcSwapOption::empty(),
        }
    }
}

/// A service's way to the token: what it has used last, if it is one that is used more than once.
pub(crate) struct Door {
    front: Arc<Front>,
    own: Option<Arc<Ready>>,
    used: bool,
}

impl Door {
    pub(crate) fn new(settings: Settings) -> Self {
        Self::to(Arc::new(Front::new(settings)))
    }

    fn to(front: Arc<Front>) -> Self {
        Self {
            front,
            own: None,
            used: false,
        }
    }

    pub(crate) fn settings(&self) -> &Arc<Settings> {
        &self.front.settings
    }

    /// The token for a request that has no time to wait.
    #[inline]
    pub(crate) fn ready(&mut self, request: Option<&TokenRequest>) -> Option<Arc<Ready>> {
        match (&self.own, request) {
            (Some(own), None) if own.is_fresh() => Some(Arc::clone(own)),
            _ => self.look(request),
        }
    }

    /// What other services of the layer have found, or the cache has.
    #[inline(never)]
    fn look(&mut self, request: Option<&TokenRequest>) -> Option<Arc<Ready>> {
        if request.is_some() {
            let settings = &self.front.settings;
            let token = settings.cache.attach(request)?;
            return Some(Ready::new(token, Arc::clone(settings)));
        }
        let shared = self.front.ready.load();
        let shared = shared.as_ref().filter(|ready| ready.is_fresh());
        let used = std::mem::replace(&mut self.used, true);
        if let Some(ready) = shared {
            if !used {
                return Some(Arc::clone(ready));
            }
            let own = ready.copy();
            self.own = Some(Arc::clone(&own));
            return Some(own);
        }
        self.own = None;
        let settings = &self.front.settings;
        let token = settings.cache.attach(None)?;
        let shared = self.front.ready.load();
        let known = shared.as_ref();
        if let Some(ready) = known.filter(|ready| ready.number == token.number()) {
            return Some(Arc::clone(ready));
        }
        let ready = Ready::new(token, Arc::clone(settings));
        self.front.ready.store(Some(Arc::clone(&ready)));
        Some(ready)
    }
}

/// A clone starts with nothing of its own: it may be for one request.
impl Clone for Door {
    fn clone(&self) -> Self {
        Self::to(Arc::clone(&self.front))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::{
        cache::TokenCache,
        origin::Origins,
        source::{TokenResponse, source_fn},
    };

    /// A runtime that is parked, and a machine that slept, stop the watch: the wall clock does not.
    #[tokio::test]
    async fn a_watched_token_is_dead_when_the_wall_clock_says_so() {
        let source = source_fn(|_| async {
            Ok(TokenResponse::new("token")?.expires_in(Duration::from_secs(300)))
        });
        let settings = Arc::new(Settings {
            cache: TokenCache::new(source),
            origins: Origins::default(),
            keep_existing: false,
            heed_unexplained: true,
        });
        let token = settings.cache.get().await.unwrap();
        let mut ready = Ready::new(token, settings);
        assert!(ready.is_fresh());
        let now = SystemTime::now();
        let second = Duration::from_secs(1);
        for (until, fresh) in [(now - second, false), (now + second * 60, true)] {
            Arc::get_mut(&mut ready).unwrap().until = Coarse::of(until);
            assert_eq!(ready.is_fresh(), fresh);
        }
        ready.settings.cache.shutdown();
        assert!(!ready.is_fresh());
    }
}
