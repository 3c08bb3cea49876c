//! [`Ready`]: a token as services attach it, with no wait for a lock and no more than a coarse look at the wall clock;
//! and [`Door`], by which each service gets to one.

use std::{
    num::NonZeroU64,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use http::HeaderValue;
use try_lock::TryLock;

use crate::{
    cache::Watched,
    settings::Settings,
    telemetry::Requests,
    time::Coarse,
    token::{AccessToken, TokenId},
};

/// A token with all that a request takes of it, and all that is needed if the API refuses it.
pub(crate) struct Ready {
    pub(crate) token: AccessToken,
    /// The token's header value, or a copy of it with a reference count of its own.
    header: HeaderValue,
    id: TokenId,
    pub(crate) mark: Mark,
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
            id: token.id(),
            mark: Mark::new(&token, &settings),
            watched: settings.cache.watched().clone(),
            until: token.coarsely_until(),
            requests: settings.cache.meters().requests(),
            token,
            settings,
        })
    }

    /// The header value for one request.
    ///
    /// Out of line, so that it is written where it is to go: in line it is moved once more, by wider loads than it was
    /// just written by, and a processor waits for those.
    #[inline(never)]
    pub(crate) fn header(&self) -> HeaderValue {
        self.header.clone()
    }

    /// Whether a request may leave with the token as it stands.
    #[inline]
    fn is_fresh(&self) -> bool {
        self.is_watched() && Coarse::read() < self.until
    }

    #[inline]
    fn is_watched(&self) -> bool {
        self.watched.is(self.id)
    }
}

/// What a request in flight knows of its token, to say if it is refused.
///
/// A word and no more: to count references would cost every request what the rare one makes use of that is refused,
/// and a future that is larger is moved more slowly.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark(NonZeroU64);

impl Mark {
    pub(crate) fn new(token: &AccessToken, settings: &Settings) -> Self {
        let word = (token.id().get() << 1) | u64::from(settings.heed_unexplained);
        Self(NonZeroU64::new(word).expect("no token's number is 0"))
    }

    pub(crate) fn token(self) -> TokenId {
        TokenId::from(self.0.get() >> 1)
    }

    /// Whether a refusal counts that does not say what is wrong.
    pub(crate) fn heeds_unexplained(self) -> bool {
        self.0.get() & 1 == 1
    }
}

/// Where the clones of a service find the token.
///
/// On cache lines of its own, since each clone writes to it.
#[repr(align(128))]
struct Front {
    settings: Arc<Settings>,
    /// What was found last. Nobody waits for this lock: whoever finds it taken does without.
    last: TryLock<Option<Arc<Ready>>>,
}

impl Front {
    fn new(settings: Arc<Settings>) -> Arc<Self> {
        Arc::new(Self {
            settings,
            last: TryLock::new(None),
        })
    }

    /// What was found last, unless it is known to be of no use by now.
    #[inline]
    fn known(&self) -> Option<Arc<Ready>> {
        let last = self.last.try_lock()?;
        let ready = last.as_ref()?;
        ready.is_watched().then(|| Arc::clone(ready))
    }

    /// What was found last if it is fresh, or what the cache has.
    fn find(&self) -> Option<Arc<Ready>> {
        let Some(last) = self.last.try_lock().map(|last| last.clone()) else {
            let token = self.settings.cache.attach(None)?;
            // Whoever looks for itself keeps it for as long as the token stands.
            return Some(self.copy(token));
        };
        if last.as_ref().is_some_and(|ready| ready.is_fresh()) {
            return last;
        }
        let token = self.settings.cache.attach(None)?;
        // Not by the id: what was kept for long enough may have that of another token.
        if let Some(last) = last.filter(|last| Arc::ptr_eq(&last.token.0, &token.0)) {
            return Some(last);
        }
        let ready = self.copy(token);
        self.keep(Arc::clone(&ready));
        Some(ready)
    }

    /// Makes a copy of the token that shares its count of references with nobody.
    fn copy(&self, token: AccessToken) -> Arc<Ready> {
        Ready::with_header(token.copy_header(), token, Arc::clone(&self.settings))
    }

    fn keep(&self, ready: Arc<Ready>) {
        let replaced = self.last.try_lock();
        let replaced = replaced.and_then(|mut last| last.replace(ready));
        // After the lock: with a token goes what its requests are counted by, which is code that is not ours.
        drop(replaced);
    }
}

/// One [`Front`] for each of some threads: a service that is cloned for each request may be cloned by all at once.
#[derive(Default)]
struct Fronts([OnceLock<Arc<Front>>; STRIPES]);

const STRIPES: usize = 16;

impl Fronts {
    /// The one of this thread, and of few others if there are many.
    #[inline]
    fn here(&self) -> &OnceLock<Arc<Front>> {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static STRIPE: usize = THREADS.fetch_add(1, Ordering::Relaxed) % STRIPES;
        }
        &self.0[STRIPE.with(|stripe| *stripe)]
    }
}

/// A service's way to the token.
///
/// What requests count themselves in and out of, above all the header's text, is on cache lines that are slow if
/// several threads write them. So whatever is used often gets copies of its own: a service that is called for more than
/// a few requests, and one that is cloned again, one per thread for all the clones to come, which may each be for one.
pub(crate) struct Door {
    way: Way,
    /// How many more requests may leave with what others use as well, or [`OWN`].
    shared: u8,
    /// For the clones of this service, from the second one on.
    own: OnceLock<Box<Fronts>>,
    cloned: AtomicBool,
}

enum Way {
    /// The token that the service has used last, or that it was made with.
    Ready(Arc<Ready>),
    Front(Arc<Front>),
}

/// How often a service is called before it gets copies of its own.
///
/// A copy costs about what this many requests lose by counting references where another thread counts too, and many
/// clones are made for a few requests only.
const SHARED: u8 = 8;

/// Of [`Door::shared`]: the service has copies of its own.
const OWN: u8 = u8::MAX;

impl Door {
    pub(crate) fn new(settings: Settings) -> Self {
        Self::to(Way::Front(Front::new(Arc::new(settings))))
    }

    #[inline]
    fn to(way: Way) -> Self {
        Self {
            way,
            shared: SHARED,
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
            Way::Ready(ready) if self.shared != 0 && ready.is_fresh() => {
                if self.shared != OWN {
                    self.shared -= 1;
                }
                ready.requests.fresh(&ready.token);
                Some(ready)
            }
            _ => None,
        }
    }

    /// The token for a request that has no time to wait.
    pub(crate) fn ready(&mut self) -> Option<Arc<Ready>> {
        if let Some(last) = self.last() {
            return Some(Arc::clone(last));
        }
        let ready = match (&self.way, self.shared) {
            (Way::Front(front), 1..=SHARED) => {
                self.shared -= 1;
                front.find()?
            }
            _ => {
                let ready = self.own().find()?;
                self.way = Way::Ready(Arc::clone(&ready));
                self.shared = OWN;
                ready
            }
        };
        ready.requests.looked(&ready.token);
        Some(ready)
    }

    /// A service that finds its token by `front`.
    #[inline]
    fn by(front: &Arc<Front>) -> Self {
        Self::to(match front.known() {
            Some(ready) => Way::Ready(ready),
            None => Way::Front(Arc::clone(front)),
        })
    }

    /// Makes a clone while there is nothing for clones yet.
    fn clone_first(&self) -> Self {
        if self.cloned.load(Ordering::Relaxed) {
            return Self::by(self.own());
        }
        self.cloned.store(true, Ordering::Relaxed);
        match &self.way {
            Way::Ready(ready) if ready.is_watched() => Self::to(Way::Ready(Arc::clone(ready))),
            // A clone may be the next to be cloned, and so on: each would have to make itself a copy of the next token.
            Way::Ready(_) => Self::by(self.own()),
            Way::Front(front) => Self::by(front),
        }
    }

    fn own(&self) -> &Arc<Front> {
        let front = self.own.get_or_init(Box::default).here();
        front.get_or_init(|| Front::new(Arc::clone(self.settings())))
    }
}

impl Clone for Door {
    #[inline]
    fn clone(&self) -> Self {
        match self.own.get().and_then(|own| own.here().get()) {
            Some(own) => Self::by(own),
            None => self.clone_first(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashSet,
        mem, thread,
        time::{Duration, SystemTime},
    };

    use tokio::runtime::Builder;

    use super::*;
    use crate::{
        cache::TokenCache,
        origin::Origins,
        policy::Schedule,
        source::{TokenRequest, TokenResponse, source_fn},
        time::Now,
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

    fn header(door: &mut Door) -> HeaderValue {
        door.ready().unwrap().header()
    }

    /// Where the text is that the service attaches: the same place is the same count of references.
    fn text(door: &mut Door) -> *const u8 {
        header(door).as_bytes().as_ptr()
    }

    /// What is used often counts references where nobody else does.
    #[tokio::test]
    async fn a_service_that_is_called_often_or_cloned_again_has_a_copy_of_its_own() {
        let settings = settings();
        settings.cache.get().await.unwrap();
        // Somebody watches the token from here on.
        tokio::task::yield_now().await;
        let mut called = Door::new((*settings).clone());
        let shared = [0; SHARED as usize].map(|_| text(&mut called));
        assert_eq!(shared, [shared[0]; SHARED as usize]);
        let own = text(&mut called);
        assert_ne!(shared[0], own);
        assert_eq!(own, text(&mut called));

        // The clones of one that is called share what it has, until they are called often.
        let mut clone = called.clone();
        let shared = [0; SHARED as usize].map(|_| text(&mut clone));
        assert_eq!(shared, [own; SHARED as usize]);
        let other = text(&mut clone);
        assert_ne!(other, own);
        assert_eq!(other, text(&mut clone));

        // The second clone of one that is not called and all after it share what is theirs.
        let cloned = Door::new((*settings).clone());
        let [first, second, third] = [0; 3].map(|_| text(&mut cloned.clone()));
        assert_ne!(first, second);
        assert_eq!(second, third);
    }

    /// As in a middleware that calls the service which was polled ready, and keeps a clone in its place.
    #[tokio::test]
    async fn a_service_that_gives_way_to_its_clone_passes_on_each_token() {
        let settings = settings();
        let mut kept = Door::new((*settings).clone());
        for _ in 0..2 {
            let token = settings.cache.get().await.unwrap();
            tokio::task::yield_now().await;
            // Held on to, so that each one has a place of its own.
            let headers = [0; 6].map(|_| {
                let clone = kept.clone();
                header(&mut mem::replace(&mut kept, clone))
            });
            let [.., third, _, _, last] = headers.each_ref().map(|h| h.as_bytes().as_ptr());
            assert_eq!(third, last);
            settings.cache.invalidate(&token);
        }
    }

    /// A token that has to be looked at each time is no reason to make a copy each time.
    #[test]
    fn clones_share_a_token_that_nobody_watches() {
        let settings = settings();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(settings.cache.get()).unwrap();
        let door = Door::new((*settings).clone());
        let mut headers = vec![header(&mut door.clone()), header(&mut door.clone())];
        assert!(matches!(door.clone().way, Way::Ready(_)));
        // With the runtime goes the watch.
        drop(runtime);
        assert!(matches!(door.clone().way, Way::Front(_)));
        headers.extend([0; 3].map(|_| header(&mut door.clone())));
        let places: Vec<_> = headers.iter().map(|h| h.as_bytes().as_ptr()).collect();
        assert_ne!(places[0], places[1]);
        assert_eq!(places[1..], [places[1]; 4]);
    }

    /// A service that all threads clone for each request would otherwise be slower than one thread.
    #[tokio::test]
    async fn the_clones_that_threads_make_of_one_service_share_nothing_with_those_of_others() {
        let settings = settings();
        settings.cache.get().await.unwrap();
        tokio::task::yield_now().await;
        let parent = Door::new((*settings).clone());
        drop(parent.clone());
        let texts = || {
            [0; 3].map(|_| {
                let ready = parent.clone().ready().unwrap();
                ready.header.as_bytes().as_ptr() as usize
            })
        };
        let threads = thread::scope(|scope| {
            let threads: Vec<_> = (0..STRIPES).map(|_| scope.spawn(texts)).collect();
            let threads = threads.into_iter().map(|thread| thread.join().unwrap());
            threads.collect::<Vec<_>>()
        });
        let mut copies = HashSet::new();
        for [first, second, third] in threads {
            assert_eq!([first, first], [second, third]);
            copies.insert(first);
        }
        // Other tests count threads too, so that two of these may have got the same stripe.
        assert!(copies.len() > STRIPES / 4, "{}", copies.len());
    }

    /// Nobody waits for another clone that is being made.
    #[tokio::test]
    async fn a_service_whose_token_is_in_use_elsewhere_finds_one_all_the_same() {
        let settings = settings();
        let token = settings.cache.get().await.unwrap();
        let shared = token.header_value();
        tokio::task::yield_now().await;
        let mut door = Door::new((*settings).clone());
        assert!(door.ready().is_some());
        let Way::Front(front) = &door.way else {
            unreachable!("it was called once");
        };
        let last = front.last.try_lock().unwrap();
        assert!(last.is_some());
        for _ in 0..3 {
            // It is a copy, since a service may keep it.
            assert_ne!(text(&mut door.clone()), shared.as_bytes().as_ptr());
        }
        drop(last);
        assert!(matches!(door.clone().way, Way::Ready(_)));
    }

    /// Ids start over after so many flights: one that a service has kept for that long is another token's by then.
    #[tokio::test]
    async fn a_token_that_was_kept_is_not_taken_for_one_of_the_same_id() {
        let settings = settings();
        let token = settings.cache.get().await.unwrap();
        tokio::task::yield_now().await;
        let mut now = Now::read();
        // A coarse reading is behind by some milliseconds.
        now.wall -= Duration::from_secs(1);
        let schedule = Schedule {
            refresh_after: Duration::ZERO,
            expires_after: Duration::ZERO,
            extended_after: None,
        };
        let old = TokenResponse::new("old").unwrap();
        let old = AccessToken::new(old, token.id(), TokenRequest::new(), schedule, now, now);
        let front = Front::new(Arc::clone(&settings));
        front.keep(Ready::new(old, settings));
        let found = front.find().unwrap();
        assert_eq!(found.token.expose_secret(), token.expose_secret());
    }

    #[tokio::test]
    async fn a_mark_says_which_token_it_was_and_what_counts() {
        let mut settings = (*settings()).clone();
        let token = settings.cache.get().await.unwrap();
        for heeds in [true, false] {
            settings.heed_unexplained = heeds;
            let mark = Mark::new(&token, &settings);
            assert_eq!(mark.token(), token.id());
            assert_eq!(mark.heeds_unexplained(), heeds);
        }
        assert_eq!(size_of::<Option<Mark>>(), 8);
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
