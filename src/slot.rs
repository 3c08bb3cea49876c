//! [`Prepared`]: a token that services attach without waiting for a lock, after one coarse read of the wall clock; and
//! [`Slot`]: where each service keeps one.

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

/// A token with all that a request needs of it, also if the API refuses it.
pub(crate) struct Prepared {
    pub(crate) token: AccessToken,
    /// The token's header value, or a copy of it with its own reference count.
    header: HeaderValue,
    id: TokenId,
    pub(crate) mark: Mark,
    /// Says whether the token is still valid.
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
    /// Out of line, so that the value is written in place: inlined, it is moved once more, by loads wider than the
    /// stores that just wrote it, which stall the processor.
    #[inline(never)]
    pub(crate) fn header(&self) -> HeaderValue {
        self.header.clone()
    }

    /// Whether a request may use the token as it is.
    #[inline]
    fn is_fresh(&self) -> bool {
        self.is_watched() && Coarse::read() < self.until
    }

    #[inline]
    fn is_watched(&self) -> bool {
        self.watched.is(self.id)
    }
}

/// What a request in flight keeps of its token, to report a refusal.
///
/// A single word: with a reference count every request would pay for what only the rare refused one uses, and a
/// larger future is slower to move.
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

    /// Whether a refusal that does not say what is wrong counts.
    pub(crate) fn refresh_on_unexplained_401(self) -> bool {
        self.0.get() & 1 == 1
    }
}

/// Where the clones of a service find the token.
///
/// On its own cache lines, since each clone writes to it.
#[repr(align(128))]
struct SharedSlot {
    settings: Arc<Settings>,
    /// The token found last. Nobody waits for this lock: a service that finds it taken does without.
    last: TryLock<Option<Arc<Prepared>>>,
}

impl SharedSlot {
    fn new(settings: Arc<Settings>) -> Arc<Self> {
        Arc::new(Self {
            settings,
            last: TryLock::new(None),
        })
    }

    /// The token found last, while it is watched.
    #[inline]
    fn watched(&self) -> Option<Arc<Prepared>> {
        let last = self.last.try_lock()?;
        let prepared = last.as_ref()?;
        prepared.is_watched().then(|| Arc::clone(prepared))
    }

    /// The token found last if it is fresh, or else the cache's.
    fn find(&self) -> Option<Arc<Prepared>> {
        let Some(last) = self.last.try_lock().map(|last| last.clone()) else {
            let token = self.settings.cache.attach(None)?;
            // A copy, since the service may keep it for as long as the token is valid.
            return Some(self.prepare_copy(token));
        };
        if last.as_ref().is_some_and(|prepared| prepared.is_fresh()) {
            return last;
        }
        let token = self.settings.cache.attach(None)?;
        // Not by id: ids repeat, and one kept for long enough may be another token's.
        if let Some(last) = last.filter(|last| Arc::ptr_eq(&last.token.0, &token.0)) {
            return Some(last);
        }
        let prepared = self.prepare_copy(token);
        self.store(Arc::clone(&prepared));
        Some(prepared)
    }

    /// Prepares a copy of the token with its own reference count.
    fn prepare_copy(&self, token: AccessToken) -> Arc<Prepared> {
        Prepared::with_header(token.copy_header(), token, Arc::clone(&self.settings))
    }

    fn store(&self, prepared: Arc<Prepared>) {
        let replaced = self.last.try_lock();
        let replaced = replaced.and_then(|mut last| last.replace(prepared));
        // After the lock: dropping a token drops its metrics handles, which is foreign code.
        drop(replaced);
    }
}

/// [`SharedSlot`]s by thread: a service that is cloned for each request may be cloned by all threads at once.
#[derive(Default)]
struct Stripes([OnceLock<Arc<SharedSlot>>; STRIPES]);

const STRIPES: usize = 16;

impl Stripes {
    /// This thread's stripe; if there are many threads, a few share one.
    #[inline]
    fn current(&self) -> &OnceLock<Arc<SharedSlot>> {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static STRIPE: usize = THREADS.fetch_add(1, Ordering::Relaxed) % STRIPES;
        }
        &self.0[STRIPE.with(|stripe| *stripe)]
    }
}

/// Where a service keeps the token it uses.
///
/// Requests count references, above all to the header's text, on cache lines that are slow when several threads write
/// them. So what is used often gets its own copies: a service that is called more than a few times gets one, and a
/// service that is cloned again gets one per thread for all later clones, each of which may serve a single request.
pub(crate) struct Slot {
    content: Content,
    /// How many more requests may use a copy shared with others, or [`OWN_COPY`].
    shared_uses: u8,
    /// For the clones of this service, from the second one on.
    stripes: OnceLock<Box<Stripes>>,
    cloned: AtomicBool,
}

enum Content {
    /// The token that the service used last or was made with.
    Token(Arc<Prepared>),
    Shared(Arc<SharedSlot>),
}

/// How often a service is called before it gets its own copy.
///
/// A copy costs about as much as this many requests lose to a reference count contended by another thread, and many
/// clones serve only a few requests.
const SHARED_USES: u8 = 8;

/// [`Slot::shared_uses`] of a service that has its own copy.
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

    /// The token that the service holds, if one more request may use it.
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

    /// The token for a request that cannot wait.
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

    /// A clone that finds its token in `shared`.
    #[inline]
    fn from_shared(shared: &Arc<SharedSlot>) -> Self {
        Self::with(match shared.watched() {
            Some(prepared) => Content::Token(prepared),
            None => Content::Shared(Arc::clone(shared)),
        })
    }

    /// Clones while this thread has no stripe yet.
    fn clone_slow(&self) -> Self {
        if self.cloned.load(Ordering::Relaxed) {
            return Self::from_shared(self.stripe());
        }
        self.cloned.store(true, Ordering::Relaxed);
        match &self.content {
            Content::Token(prepared) if prepared.is_watched() => {
                Self::with(Content::Token(Arc::clone(prepared)))
            }
            // In a chain of clones, each clone would otherwise make its own copy of the next token.
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

    /// Where the attached text is in memory: the same place means the same reference count.
    fn text(slot: &mut Slot) -> *const u8 {
        header(slot).as_bytes().as_ptr()
    }

    /// What is used often has an uncontended reference count.
    #[tokio::test]
    async fn a_service_that_is_called_often_or_cloned_again_has_its_own_copy() {
        let settings = settings();
        settings.cache.get().await.unwrap();
        // The token is watched from here on.
        tokio::task::yield_now().await;
        let mut called = Slot::new((*settings).clone());
        let shared = [0; SHARED_USES as usize].map(|_| text(&mut called));
        assert_eq!(shared, [shared[0]; SHARED_USES as usize]);
        let own = text(&mut called);
        assert_ne!(shared[0], own);
        assert_eq!(own, text(&mut called));

        // The clones of a called service share its copy until they are called often.
        let mut clone = called.clone();
        let shared = [0; SHARED_USES as usize].map(|_| text(&mut clone));
        assert_eq!(shared, [own; SHARED_USES as usize]);
        let other = text(&mut clone);
        assert_ne!(other, own);
        assert_eq!(other, text(&mut clone));

        // The second and later clones of an uncalled service share one copy.
        let cloned = Slot::new((*settings).clone());
        let [first, second, third] = [0; 3].map(|_| text(&mut cloned.clone()));
        assert_ne!(first, second);
        assert_eq!(second, third);
    }

    /// As in a middleware that calls the service that was polled ready and keeps a clone in its place.
    #[tokio::test]
    async fn a_service_replaced_by_its_clone_passes_on_each_token() {
        let settings = settings();
        let mut kept = Slot::new((*settings).clone());
        for _ in 0..2 {
            let token = settings.cache.get().await.unwrap();
            tokio::task::yield_now().await;
            // Kept alive, so that each has its own place.
            let headers = [0; 6].map(|_| {
                let clone = kept.clone();
                header(&mut mem::replace(&mut kept, clone))
            });
            let [.., third, _, _, last] = headers.each_ref().map(|h| h.as_bytes().as_ptr());
            assert_eq!(third, last);
            settings.cache.invalidate(&token);
        }
    }

    /// An unwatched token has to be checked each time, but not copied each time.
    #[test]
    fn clones_share_a_token_that_nobody_watches() {
        let settings = settings();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(settings.cache.get()).unwrap();
        let slot = Slot::new((*settings).clone());
        let mut headers = vec![header(&mut slot.clone()), header(&mut slot.clone())];
        assert!(matches!(slot.clone().content, Content::Token(_)));
        // The watch ends with the runtime.
        drop(runtime);
        assert!(matches!(slot.clone().content, Content::Shared(_)));
        headers.extend([0; 3].map(|_| header(&mut slot.clone())));
        let places: Vec<_> = headers.iter().map(|h| h.as_bytes().as_ptr()).collect();
        assert_ne!(places[0], places[1]);
        assert_eq!(places[1..], [places[1]; 4]);
    }

    /// A service that all threads clone for each request would otherwise be slower than one thread.
    #[tokio::test]
    async fn clones_made_by_different_threads_share_nothing() {
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
        // Other tests count threads too, so two of these may share a stripe.
        assert!(copies.len() > STRIPES / 4, "{}", copies.len());
    }

    /// Nobody waits while another clone is being made.
    #[tokio::test]
    async fn a_service_finds_a_token_while_its_shared_slot_is_locked() {
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
            // A copy, since a service may keep it.
            assert_ne!(text(&mut slot.clone()), original.as_bytes().as_ptr());
        }
        drop(last);
        assert!(matches!(slot.clone().content, Content::Token(_)));
    }

    /// Ids start over after enough flights: one that a service kept for that long may be another token's.
    #[tokio::test]
    async fn a_kept_token_is_not_mistaken_for_one_with_the_same_id() {
        let settings = settings();
        let token = settings.cache.get().await.unwrap();
        tokio::task::yield_now().await;
        let mut now = Now::read();
        // A coarse reading lags by a few milliseconds.
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
        for refresh in [true, false] {
            settings.refresh_on_unexplained_401 = refresh;
            let mark = Mark::new(&token, &settings);
            assert_eq!(mark.token(), token.id());
            assert_eq!(mark.refresh_on_unexplained_401(), refresh);
        }
        assert_eq!(size_of::<Option<Mark>>(), 8);
    }

    /// A parked runtime or a sleeping machine stops the watch, but not the wall clock.
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
