//! [`Ready`]: a token as services attach it, without a lock and with no more than a coarse look at the wall clock;
//! and [`Door`], by which each service gets to one.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};

use arc_swap::{ArcSwapOption, Guard};
use http::HeaderValue;

use crate::{
    cache::Watched,
    settings::Settings,
    source::TokenRequest,
    telemetry::Requests,
    time::Coarse,
    token::{AccessToken, TokenId},
};

/// A token with all that a request takes of it, and all that is needed if the API refuses it.
pub(crate) struct Ready {
    pub(crate) token: AccessToken,
    /// The token's header value, or a copy of it with a reference count of its own.
    header: HeaderValue,
    mark: Mark,
    /// Where to see whether the token still stands.
    watched: Watched,
    /// When the token is due or dead by the wall clock.
    until: Coarse,
    pub(crate) requests: Requests,
    pub(crate) settings: Arc<Settings>,
}

impl Ready {
    pub(crate) fn new(token: AccessToken, settings: Arc<Settings>) -> Arc<Self> {
        let header = token.header_value().clone();
        Self::with_header(header, token, settings)
    }

    fn with_header(header: HeaderValue, token: AccessToken, settings: Arc<Settings>) -> Arc<Self> {
        Arc::new(Self {
            header,
            mark: Mark::new(&token, &settings),
            watched: settings.cache.watched().clone(),
            until: token.coarsely_until(),
            requests: settings.cache.meters().requests(),
            token,
            settings,
        })
    }

    /// The token for one request, which is to `keep` what it takes to send it once more.
    #[inline]
    pub(crate) fn pass(self: &Arc<Self>, keep: bool) -> Pass {
        Pass {
            header: self.header.clone(),
            mark: self.mark,
            ready: keep.then(|| Arc::clone(self)),
        }
    }

    /// Whether a request may leave with the token as it stands.
    #[inline]
    fn is_fresh(&self) -> bool {
        self.is_watched() && Coarse::read() < self.until
    }

    #[inline]
    fn is_watched(&self) -> bool {
        self.watched.is(self.mark.token)
    }
}

/// What a request in flight knows of its token, to say if it is refused.
///
/// A number and no more: to count references would cost every request what the rare one makes use of that is
/// refused.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    pub(crate) token: TokenId,
    pub(crate) heeds_unexplained: bool,
}

impl Mark {
    pub(crate) fn new(token: &AccessToken, settings: &Settings) -> Self {
        Self {
            token: token.id(),
            heeds_unexplained: settings.heed_unexplained,
        }
    }
}

/// A token for one request.
pub(crate) struct Pass {
    pub(crate) header: HeaderValue,
    pub(crate) mark: Mark,
    /// What a request holds on to that may be sent once more.
    pub(crate) ready: Option<Arc<Ready>>,
}

/// Where the clones of a service find the token.
struct Front {
    settings: Arc<Settings>,
    ready: ArcSwapOption<Ready>,
}

impl Front {
    fn new(settings: Arc<Settings>) -> Arc<Self> {
        Arc::new(Self {
            settings,
            ready: ArcSwapOption::empty(),
        })
    }

    /// What was found last, unless it is known to be of no use by now.
    #[inline]
    fn known(&self) -> Option<Arc<Ready>> {
        let ready = self.ready.load();
        let is_watched = ready.as_ref().is_some_and(|ready| ready.is_watched());
        if is_watched {
            Guard::into_inner(ready)
        } else {
            None
        }
    }

    /// What was found last if it is fresh, or what the cache has.
    fn find(&self) -> Option<Arc<Ready>> {
        let last = self.ready.load_full();
        if last.as_ref().is_some_and(|ready| ready.is_fresh()) {
            return last;
        }
        let token = self.settings.cache.attach(None)?;
        if let Some(last) = last.filter(|last| last.mark.token == token.id()) {
            return Some(last);
        }
        let header = token.copy_header();
        let ready = Ready::with_header(header, token, Arc::clone(&self.settings));
        self.ready.store(Some(Arc::clone(&ready)));
        Some(ready)
    }
}

/// A service's way to the token.
///
/// What requests count themselves in and out of, above all the header's text, is on cache lines that are slow if
/// several threads write them. So whatever is used more than once gets copies of its own: a service that is called
/// again, and one that is cloned again, for all the clones to come, which may each be for one request.
pub(crate) struct Door {
    way: Way,
    sharing: Sharing,
    /// For the clones of this service, from the second one on.
    own: OnceLock<Arc<Front>>,
    cloned: AtomicBool,
}

enum Way {
    /// The token that the service has used last, or that it was made with.
    Ready(Arc<Ready>),
    Front(Arc<Front>),
}

/// Whether a service shares its [`Way`] with others.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sharing {
    /// It does, and has not been called.
    Uncalled,
    /// It does, and has been called.
    Called,
    /// It has its own.
    Ended,
}

impl Door {
    pub(crate) fn new(settings: Settings) -> Self {
        Self::to(Way::Front(Front::new(Arc::new(settings))))
    }

    #[inline]
    fn to(way: Way) -> Self {
        Self {
            way,
            sharing: Sharing::Uncalled,
            own: OnceLock::new(),
            cloned: AtomicBool::new(false),
        }
    }

    pub(crate) fn settings(&self) -> &Arc<Settings> {
        match &self.way {
            Way::Ready(ready) => &ready.settings,
            Way::Front(front) => &front.settings,
        }
    }

    /// What the service has, if one more request may leave with it.
    #[inline]
    pub(crate) fn last(&mut self) -> Option<&Arc<Ready>> {
        match &self.way {
            Way::Ready(ready) if self.sharing != Sharing::Called && ready.is_fresh() => {
                if self.sharing == Sharing::Uncalled {
                    self.sharing = Sharing::Called;
                }
                ready.requests.fresh(&ready.token);
                Some(ready)
            }
            _ => None,
        }
    }

    /// The token for a request that has no time to wait, and is to `keep` what it takes to send it once more.
    pub(crate) fn pass(&mut self, request: Option<&TokenRequest>, keep: bool) -> Option<Pass> {
        if request.is_some() {
            let settings = self.settings();
            let token = settings.cache.attach(request)?;
            settings.cache.meters().requests().looked(&token);
            return Some(Pass {
                header: token.header_value().clone(),
                mark: Mark::new(&token, settings),
                ready: keep.then(|| Ready::new(token, Arc::clone(settings))),
            });
        }
        if let Some(last) = self.last() {
            return Some(last.pass(keep));
        }
        let ready = match (&self.way, self.sharing) {
            (Way::Front(front), Sharing::Uncalled) => {
                self.sharing = Sharing::Called;
                front.find()?
            }
            _ => {
                let ready = self.own().find()?;
                self.way = Way::Ready(Arc::clone(&ready));
                self.sharing = Sharing::Ended;
                ready
            }
        };
        ready.requests.looked(&ready.token);
        Some(ready.pass(keep))
    }

    fn own(&self) -> &Arc<Front> {
        self.own
            .get_or_init(|| Front::new(Arc::clone(self.settings())))
    }
}

impl Clone for Door {
    fn clone(&self) -> Self {
        let front = match (self.own.get(), &self.way) {
            (Some(own), _) => own,
            (None, _) if self.cloned.load(Ordering::Relaxed) => self.own(),
            (None, way) => {
                self.cloned.store(true, Ordering::Relaxed);
                match way {
                    Way::Ready(ready) => return Self::to(Way::Ready(Arc::clone(ready))),
                    Way::Front(front) => front,
                }
            }
        };
        Self::to(match front.known() {
            Some(ready) => Way::Ready(ready),
            None => Way::Front(Arc::clone(front)),
        })
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

    fn settings() -> Arc<Settings> {
        let source = source_fn(|_| async {
            Ok(TokenResponse::new("token")?.expires_in(Duration::from_secs(300)))
        });
        Arc::new(Settings {
            cache: TokenCache::new(source),
            origins: Origins::default(),
            keep_existing: false,
            heed_unexplained: true,
        })
    }

    /// What is used more than once counts references where nobody else does.
    #[tokio::test]
    async fn a_service_that_is_called_again_or_cloned_again_has_a_copy_of_its_own() {
        fn text(door: &mut Door) -> *const u8 {
            let pass = door.pass(None, false).unwrap();
            pass.header.as_bytes().as_ptr()
        }

        let settings = settings();
        settings.cache.get().await.unwrap();
        // Somebody watches the token from here on.
        tokio::task::yield_now().await;
        let mut called = Door::new((*settings).clone());
        let shared = text(&mut called);
        let own = text(&mut called);
        assert_ne!(shared, own);
        assert_eq!(own, text(&mut called));

        // The clones of one that is called share what it has, until they are called again.
        let mut clone = called.clone();
        assert_eq!(text(&mut clone), own);
        let other = text(&mut clone);
        assert_ne!(other, own);
        assert_eq!(other, text(&mut clone));

        // The second clone of one that is not called and all after it share what is theirs.
        let cloned = Door::new((*settings).clone());
        let [first, second, third] = [0; 3].map(|_| text(&mut cloned.clone()));
        assert_ne!(first, second);
        assert_eq!(second, third);
    }

    /// A runtime that is parked, and a machine that slept, stop the watch: the wall clock does not.
    #[tokio::test]
    async fn a_watched_token_is_dead_when_the_wall_clock_says_so() {
        let settings = settings();
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
