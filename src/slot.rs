//! [`Prepared`]: a token as services attach it, with no wait for a lock and no more than a coarse look at the wall clock;
//! and [`Slot`], by which each service gets to one.

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
pub(crate) struct Prepared {
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

impl Prepared {
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
        let word = (token.id().get() << 1) | u64::from(settings.refresh_on_unexplained_401);
        Self(NonZeroU64::new(word).expect("no token's number is 0"))
    }

    pub(crate) fn token(self) -> TokenId {
        TokenId::from(self.0.get() >> 1)
    }

    /// Whether a refusal counts that does not say what is wrong.
    pub(crate) fn refresh_on_unexplained_401(self) -> bool {
        self.0.get() & 1 == 1
    }
}

/// Where the clones of a service find the token.
///
/// On cache lines of its own, since each clone writes to it.
#[repr(align(128))]
struct SharedSlot {
    settings: Arc<Settings>,
    /// What was found last. Nobody waits for this lock: whoever finds it taken does without.
    last: TryLock<Option<Arc<Prepared>>>,
}

impl SharedSlot {
    fn new(settings: Arc<Settings>) -> Arc<Self> {
        Arc::new(Self {
            settings,
            last: TryLock::new(None),
        })
    }

    /// What was found last, unless it is known to be of no use by now.
    #[inline]
    fn watched(&self) -> Option<Arc<Prepared>> {
        let last = self.last.try_lock()?;
        let prepared = last.as_ref()?;
        prepared.is_watched().then(|| Arc::clone(prepared))
    }

    /// What was found last if it is fresh, or what the cache has.
    fn find(&self) -> Option<Arc<Prepared>> {
        let Some(last) = self.last.try_lock().map(|last| last.clone()) else {
            let token = self.settings.cache.attach(None)?;
            // Whoever looks for itself keeps it for as long as the token stands.
            return Some(self.prepare_copy(token));
        };
        if last.as_ref().is_some_and(|prepared| prepared.is_fresh()) {
            return last;
        }
        let token = self.settings.cache.attach(None)?;
        // Not by the id: what was kept for long enough may have that of another token.
        if let Some(last) = last.filter(|last| Arc::ptr_eq(&last.token.0, &token.0)) {
            return Some(last);
        }
        let prepared = self.prepare_copy(token);
        self.store(Arc::clone(&prepared));
        Some(prepared)
    }

    /// Makes a copy of the token that shares its count of references with nobody.
    fn prepare_copy(&self, token: AccessToken) -> Arc<Prepared> {
        Prepared::with_header(token.copy_header(), token, Arc::clone(&self.settings))
    }

    fn store(&self, prepared: Arc<Prepared>) {
        let replaced = self.last.try_lock();
        let replaced = replaced.and_then(|mut last| last.replace(prepared));
        // After the lock: with a token goes what its requests are counted by, which is code that is not ours.
        drop(replaced);
    }
}

/// One [`SharedSlot`] for each of some threads: a service that is cloned for each request may be cloned by all at once.
#[derive(Default)]
struct Stripes([OnceLock<Arc<SharedSlot>>; STRIPES]);

const STRIPES: usize = 16;

impl Stripes {
    /// The one of this thread, and of few others if there are many.
    #[inline]
    fn current(&self) -> &OnceLock<Arc<SharedSlot>> {
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
pub(crate) struct Slot {
    content: Content,
    /// How many more requests may leave with what others use as well, or [`OWN_COPY`].
    shared_uses: u8,
    /// For the clones of this service, from the second one on.
    stripes: OnceLock<Box<Stripes>>,
    cloned: AtomicBool,
}

enum Content {
    /// The token that the service has used last, or that it was made with.
    Token(Arc<Prepared>),
    Shared(Arc<SharedSlot>),
}

/// How often a service is called before it gets copies of its own.
///
/// A copy costs about what this many requests lose by counting references where another thread counts too, and many
/// clones are made for a few requests only.
const SHARED_USES: u8 = 8;

/// Of [`Slot::shared_uses`]: the service has copies of its own.
const OWN_COPY: u8 = u8::MAX;

impl Slot {
    pub(crate) fn new(settings: Settings) -> Self {
        Self::with(Content::Shared(SharedSlot::new(Arc::new(settings))))
    }

    #[inline]
    fn with(content: Content) -> Self {
        Self {
            content,
            shared_uses: SHARED_USES,
            stripes: OnceLock::new(),
            cloned: AtomicBool::new(false),
        }
    }

    pub(crate) fn settings(&self) -> &Arc<Settings> {
        match &self.content {
            Content::Token(prepared) => &prepared.settings,
            Content::Shared(shared) => &shared.settings,
        }
    }

    /// What the service has, if one more request may leave with it.
    #[inline]
    pub(crate) fn held(&mut self) -> Option<&Arc<Prepared>> {
        match &self.content {
            Content::Token(prepared) if self.shared_uses != 0 && prepared.is_fresh() => {
                if self.shared_uses != OWN_COPY {
                    self.shared_uses -= 1;
                }
                prepared.requests.fresh(&prepared.token);
                Some(prepared)
            }
            _ => None,
        }
    }

    /// The token for a request that has no time to wait.
    pub(crate) fn prepared(&mut self) -> Option<Arc<Prepared>> {
        if let Some(held) = self.held() {
            return Some(Arc::clone(held));
        }
        let prepared = match (&self.content, self.shared_uses) {
            (Content::Shared(shared), 1..=SHARED_USES) => {
                self.shared_uses -= 1;
                shared.find()?
            }
            _ => {
                let prepared = self.stripe().find()?;
                self.content = Content::Token(Arc::clone(&prepared));
                self.shared_uses = OWN_COPY;
                prepared
            }
        };
        prepared.requests.checked(&prepared.token);
        Some(prepared)
    }

    /// A service that finds its token by `shared`.
    #[inline]
    fn from_shared(shared: &Arc<SharedSlot>) -> Self {
        Self::with(match shared.watched() {
            Some(prepared) => Content::Token(prepared),
            None => Content::Shared(Arc::clone(shared)),
        })
    }

    /// Makes a clone while there is nothing for clones yet.
    fn clone_slow(&self) -> Self {
        if self.cloned.load(Ordering::Relaxed) {
            return Self::from_shared(self.stripe());
        }
        self.cloned.store(true, Ordering::Relaxed);
        match &self.content {
            Content::Token(prepared) if prepared.is_watched() => {
                Self::with(Content::Token(Arc::clone(prepared)))
            }
            // A clone may be the next to be cloned, and so on: each would have to make itself a copy of the next token.
            Content::Token(_) => Self::from_shared(self.stripe()),
            Content::Shared(shared) => Self::from_shared(shared),
        }
    }

    fn stripe(&self) -> &Arc<SharedSlot> {
        let shared = self.stripes.get_or_init(Box::default).current();
        shared.get_or_init(|| SharedSlot::new(Arc::clone(self.settings())))
    }
}

impl Clone for Slot {
    #[inline]
    fn clone(&self) -> Self {
        match self
            .stripes
            .get()
            .and_then(|stripes| stripes.current().get())
        {
            Some(shared) => Self::from_shared(shared),
            None => self.clone_slow(),
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
            refresh_on_unexplained_401: true,
        })
    }

    fn header(slot: &mut Slot) -> HeaderValue {
        slot.prepared().unwrap().header()
    }

    /// Where the text is that the service attaches: the same place is the same count of references.
    fn text(slot: &mut Slot) -> *const u8 {
        header(slot).as_bytes().as_ptr()
    }

    /// What is used often counts references where nobody else does.
    #[tokio::test]
    async fn a_service_that_is_called_often_or_cloned_again_has_a_copy_of_its_own() {
        let settings = settings();
        settings.cache.get().await.unwrap();
        // Somebody watches the token from here on.
        tokio::task::yield_now().await;
        let mut called = Slot::new((*settings).clone());
        let shared = [0; SHARED_USES as usize].map(|_| text(&mut called));
        assert_eq!(shared, [shared[0]; SHARED_USES as usize]);
        let own = text(&mut called);
        assert_ne!(shared[0], own);
        assert_eq!(own, text(&mut called));

        // The clones of one that is called share what it has, until they are called often.
        let mut clone = called.clone();
        let shared = [0; SHARED_USES as usize].map(|_| text(&mut clone));
        assert_eq!(shared, [own; SHARED_USES as usize]);
        let other = text(&mut clone);
        assert_ne!(other, own);
        assert_eq!(other, text(&mut clone));

        // The second clone of one that is not called and all after it share what is theirs.
        let cloned = Slot::new((*settings).clone());
        let [first, second, third] = [0; 3].map(|_| text(&mut cloned.clone()));
        assert_ne!(first, second);
        assert_eq!(second, third);
    }

    /// As in a middleware that calls the service which was polled ready, and keeps a clone in its place.
    #[tokio::test]
    async fn a_service_that_gives_way_to_its_clone_passes_on_each_token() {
        let settings = settings();
        let mut kept = Slot::new((*settings).clone());
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
        let slot = Slot::new((*settings).clone());
        let mut headers = vec![header(&mut slot.clone()), header(&mut slot.clone())];
        assert!(matches!(slot.clone().content, Content::Token(_)));
        // With the runtime goes the watch.
        drop(runtime);
        assert!(matches!(slot.clone().content, Content::Shared(_)));
        headers.extend([0; 3].map(|_| header(&mut slot.clone())));
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
        let parent = Slot::new((*settings).clone());
        drop(parent.clone());
        let texts = || {
            [0; 3].map(|_| {
                let prepared = parent.clone().prepared().unwrap();
                prepared.header.as_bytes().as_ptr() as usize
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
        let original = token.header_value();
        tokio::task::yield_now().await;
        let mut slot = Slot::new((*settings).clone());
        assert!(slot.prepared().is_some());
        let Content::Shared(shared) = &slot.content else {
            unreachable!("it was called once");
        };
        let last = shared.last.try_lock().unwrap();
        assert!(last.is_some());
        for _ in 0..3 {
            // It is a copy, since a service may keep it.
            assert_ne!(text(&mut slot.clone()), original.as_bytes().as_ptr());
        }
        drop(last);
        assert!(matches!(slot.clone().content, Content::Token(_)));
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
        let shared = SharedSlot::new(Arc::clone(&settings));
        shared.store(Prepared::new(old, settings));
        let found = shared.find().unwrap();
        assert_eq!(found.token.expose_secret(), token.expose_secret());
    }

    #[tokio::test]
    async fn a_mark_says_which_token_it_was_and_what_counts() {
        let mut settings = (*settings()).clone();
        let token = settings.cache.get().await.unwrap();
        for heeds in [true, false] {
            settings.refresh_on_unexplained_401 = heeds;
            let mark = Mark::new(&token, &settings);
            assert_eq!(mark.token(), token.id());
            assert_eq!(mark.refresh_on_unexplained_401(), heeds);
        }
        assert_eq!(size_of::<Option<Mark>>(), 8);
    }

    /// A runtime that is parked, and a machine that slept, stop the watch: the wall clock does not.
    #[tokio::test]
    async fn a_watched_token_is_dead_when_the_wall_clock_says_so() {
        let settings = settings();
        let token = settings.cache.get().await.unwrap();
        let mut prepared = Prepared::new(token, settings);
        assert!(prepared.is_fresh());
        let now = SystemTime::now();
        let second = Duration::from_secs(1);
        for (until, fresh) in [(now - second, false), (now + second * 60, true)] {
            Arc::get_mut(&mut prepared).unwrap().until = Coarse::of(until);
            assert_eq!(prepared.is_fresh(), fresh);
        }
        prepared.settings.cache.shutdown();
        assert!(!prepared.is_fresh());
    }
}
