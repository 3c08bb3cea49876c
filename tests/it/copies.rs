//! What happens to the copies for replays when bodies and services panic and requests are dropped.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use fastrand::Rng;
use http::{HeaderValue, Request, Response, header::AUTHORIZATION};
use tower::{Layer, Service, service_fn};
use tower_bearer::{
    BearerAuth, BearerAuthLayer, CloneBody, TokenError, TokenResponse, WithoutToken, source_fn,
};

use crate::support::{
    Api, AuthServer, INVALID_TOKEN, bearer, echo, poll_once, settle, unauthorized,
};

/// A body that counts its live instances, and panics on clone if told to.
struct Counted(Arc<Census>);

#[derive(Default)]
struct Census {
    alive: AtomicUsize,
    panics: AtomicBool,
}

impl Census {
    fn body(self: &Arc<Self>) -> Counted {
        self.alive.fetch_add(1, Ordering::Relaxed);
        Counted(Arc::clone(self))
    }

    fn alive(&self) -> usize {
        self.alive.load(Ordering::Relaxed)
    }

    fn panics(&self, yes: bool) {
        self.panics.store(yes, Ordering::Relaxed);
    }
}

impl Clone for Counted {
    fn clone(&self) -> Self {
        assert!(!self.0.panics.load(Ordering::Relaxed), "the body panics");
        self.0.body()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.alive.fetch_sub(1, Ordering::Relaxed);
    }
}

fn post<B>(body: B) -> Request<B> {
    Request::post("http://localhost/sims").body(body).unwrap()
}

fn replaying<S>(server: &AuthServer, api: &S) -> BearerAuth<S, CloneBody>
where
    S: Clone,
{
    BearerAuthLayer::new(server.clone())
        .replay(CloneBody)
        .layer(api.clone())
}

fn panics<T>(f: impl FnOnce() -> T) -> bool {
    catch_unwind(AssertUnwindSafe(f)).is_err()
}

/// A request that waits exists once, and so does one that passes bare.
#[tokio::test(start_paused = true)]
async fn only_requests_sent_with_a_token_are_copied() {
    let server = AuthServer::new();
    let api = Api::refusing_the_first();
    let mut client = BearerAuthLayer::new(server.clone())
        .origins(["http://localhost"])
        .unwrap()
        .keep_existing(true)
        .replay(CloneBody)
        .layer(api.clone());
    let census = Arc::new(Census::default());
    let signed = post(census.body());
    let mut without = signed.clone();
    without.extensions_mut().insert(WithoutToken);
    let mut own = signed.clone();
    let credential = HeaderValue::from_static("Basic c2ltczpzaW1z");
    own.headers_mut().insert(AUTHORIZATION, credential);
    let mut elsewhere = signed.clone();
    *elsewhere.uri_mut() = "https://elsewhere.example.com/".parse().unwrap();

    server.hold();
    api.hold();
    // The API drops the bodies at once.
    for bare in [without, own, elsewhere] {
        let before = census.alive();
        let mut sending = Box::pin(client.call(bare));
        assert!(poll_once(sending.as_mut()).is_pending());
        assert_eq!(census.alive(), before - 1);
    }
    assert_eq!(census.alive(), 1);
    let mut sending = Box::pin(client.call(signed));
    assert!(poll_once(sending.as_mut()).is_pending());
    assert_eq!(census.alive(), 1, "no copy yet");
    assert_eq!(api.arrivals().len(), 3);

    server.release();
    settle().await;
    assert!(poll_once(sending.as_mut()).is_pending());
    assert_eq!(api.arrivals().len(), 4);
    assert_eq!(census.alive(), 1, "the copy");
    api.release();
    assert_eq!(sending.await.unwrap().body(), "token-2");
    assert_eq!(census.alive(), 0);
}

/// Bodies are foreign code, in `call` and in a poll once the token has come.
#[tokio::test(start_paused = true)]
async fn a_body_that_panics_on_clone_fails_only_its_request() {
    let server = AuthServer::new();
    let api = Api::refusing_the_first();
    let mut client = replaying(&server, &api);
    let census = Arc::new(Census::default());
    server.hold();
    let mut waiting = Box::pin(client.call(post(census.body())));
    assert!(poll_once(waiting.as_mut()).is_pending());
    census.panics(true);
    assert!(panics(|| client.call(post(census.body()))));
    server.release();
    settle().await;
    assert!(panics(|| poll_once(waiting.as_mut())));
    drop(waiting);
    assert!(panics(|| client.call(post(census.body()))));
    assert_eq!(census.alive(), 0);
    assert!(api.arrivals().is_empty());

    census.panics(false);
    let response = client.call(post(census.body())).await.unwrap();
    assert_eq!(response.body(), "token-2");
    assert_eq!(api.tokens(), ["token-1", "token-2"]);
    assert_eq!(census.alive(), 0);
}

/// Neither the waiting request nor the cache that it holds.
#[tokio::test(start_paused = true)]
async fn a_copy_that_panics_on_drop_leaks_nothing() {
    enum Body {
        Original,
        Copy,
    }

    impl Clone for Body {
        fn clone(&self) -> Self {
            Self::Copy
        }
    }

    impl Drop for Body {
        fn drop(&mut self) {
            assert!(matches!(self, Self::Original), "the copy panics");
        }
    }

    let used = Arc::new(());
    let kept = Arc::downgrade(&used);
    let source = source_fn(move |_| {
        let _ = &used;
        async { TokenResponse::new("token") }
    });
    let api = Api::echoing();
    let mut client = BearerAuthLayer::new(source)
        .replay(CloneBody)
        .layer(api.clone());
    assert!(panics(|| client.call(post(Body::Original))));
    drop(client);
    assert!(kept.upgrade().is_none());
    assert!(api.arrivals().is_empty());
}

/// Whether another token is there at once or has to be waited for.
#[tokio::test(start_paused = true)]
async fn a_refusal_that_panics_on_drop_leaks_nothing() {
    struct Refusal;

    impl Drop for Refusal {
        fn drop(&mut self) {
            panic!("the refusal panics");
        }
    }

    for is_late in [true, false] {
        let used = Arc::new(());
        let kept = Arc::downgrade(&used);
        let number = AtomicUsize::new(0);
        let source = source_fn(move |_| {
            let _ = &used;
            let number = number.fetch_add(1, Ordering::Relaxed);
            async move { TokenResponse::new(format!("token-{number}")) }
        });
        let api = service_fn(|_: Request<Counted>| async {
            tokio::task::yield_now().await;
            Ok::<_, Infallible>(unauthorized(INVALID_TOKEN).map(|_| Refusal))
        });
        let mut client = BearerAuthLayer::new(source).replay(CloneBody).layer(api);
        let token = client.cache().get().await.unwrap();
        let census = Arc::new(Census::default());
        let mut sending = Box::pin(client.call(post(census.body())));
        assert!(poll_once(sending.as_mut()).is_pending());
        if is_late {
            client.cache().invalidate(&token);
        } else {
            assert!(poll_once(sending.as_mut()).is_pending());
        }
        settle().await;
        assert!(panics(|| poll_once(sending.as_mut())));
        drop((sending, client));
        settle().await;
        assert_eq!(census.alive(), 0, "late: {is_late}");
        assert!(kept.upgrade().is_none(), "late: {is_late}");
    }
}

/// Neither the answer, with its connection, nor the cache.
#[tokio::test(start_paused = true)]
async fn a_copy_that_panics_as_its_refusal_is_returned_leaks_nothing() {
    struct Body {
        is_copy: bool,
    }

    impl Clone for Body {
        fn clone(&self) -> Self {
            Self { is_copy: true }
        }
    }

    impl Drop for Body {
        fn drop(&mut self) {
            assert!(!self.is_copy, "the copy panics");
        }
    }

    // About something else; then about the token, with no other available.
    for challenge in ["Basic", INVALID_TOKEN] {
        let used = Arc::new(());
        let kept = Arc::downgrade(&used);
        let asked = AtomicUsize::new(0);
        let source = source_fn(move |_| {
            let _ = &used;
            let asked = asked.fetch_add(1, Ordering::Relaxed);
            async move {
                match asked {
                    0 => TokenResponse::new("token"),
                    _ => Err(TokenError::terminal("no more")),
                }
            }
        });
        let connection = Arc::new(());
        let taken = Arc::clone(&connection);
        let api = service_fn(move |_: Request<Body>| {
            let answer = unauthorized(challenge).map(|_| Arc::clone(&taken));
            async move { Ok::<_, Infallible>(answer) }
        });
        let mut client = BearerAuthLayer::new(source).replay(CloneBody).layer(api);
        let token = client.cache().get().await.unwrap();
        client.cache().invalidate(&token);
        settle().await;
        let mut sending = Box::pin(client.call(post(Body { is_copy: false })));
        assert!(panics(|| poll_once(sending.as_mut())));
        drop((sending, client));
        settle().await;
        assert_eq!(Arc::strong_count(&connection), 1, "{challenge}");
        assert!(kept.upgrade().is_none(), "{challenge}");
    }
}

/// Services are foreign code too, at either send.
#[tokio::test(start_paused = true)]
async fn a_service_that_panics_fails_only_its_request() {
    let server = AuthServer::new();
    let broken = Arc::new(AtomicUsize::new(1));
    let countdown = Arc::clone(&broken);
    let api = service_fn(move |request: Request<Counted>| {
        let left = countdown.fetch_sub(1, Ordering::Relaxed);
        assert_ne!(left, 1, "the service panics");
        let answer = match bearer(&request) {
            Some("token-1") => unauthorized(INVALID_TOKEN),
            token => echo(token),
        };
        async move { Ok::<_, Infallible>(answer) }
    });
    let mut client = replaying(&server, &api);
    client.cache().get().await.unwrap();
    let census = Arc::new(Census::default());
    assert!(panics(|| client.call(post(census.body()))));
    assert_eq!(census.alive(), 0);

    broken.store(2, Ordering::Relaxed);
    let mut sending = Box::pin(client.call(post(census.body())));
    assert!(poll_once(sending.as_mut()).is_pending());
    settle().await;
    assert!(panics(|| poll_once(sending.as_mut())));
    // Polling again does not send the request again.
    assert!(panics(|| poll_once(sending.as_mut())));
    drop(sending);
    assert_eq!(census.alive(), 0);

    broken.store(10, Ordering::Relaxed);
    let response = client.call(post(census.body())).await.unwrap();
    assert_eq!(response.body(), "token-2");
    assert_eq!(broken.load(Ordering::Relaxed), 9);
}

/// Law 8: the caller does not stop, and the inner future goes on refusing.
#[tokio::test(start_paused = true)]
async fn a_future_polled_after_its_answer_sends_nothing_more() {
    #[derive(Clone, Default)]
    struct Refusing(Arc<AtomicUsize>);

    impl Service<Request<String>> for Refusing {
        type Response = Response<String>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Response<String>, Infallible>>>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<String>) -> Self::Future {
            self.0.fetch_add(1, Ordering::Relaxed);
            Box::pin(poll_fn(|_| Poll::Ready(Ok(unauthorized(INVALID_TOKEN)))))
        }
    }

    let server = AuthServer::new();
    let api = Refusing::default();
    let mut client = replaying(&server, &api);
    client.cache().get().await.unwrap();
    let mut sending = Box::pin(client.call(post("body".to_owned())));
    let mut answers = 0;
    for _ in 0..10 {
        let poll = catch_unwind(AssertUnwindSafe(|| poll_once(sending.as_mut())));
        answers += usize::from(matches!(poll, Ok(Poll::Ready(_))));
        settle().await;
    }
    assert_eq!(answers, 1);
    assert_eq!(api.0.load(Ordering::Relaxed), 2);
    assert_eq!(server.requests(), 2);
}

/// Laws 5 and 8: twenty requests wait, are refused and are dropped in any order.
#[tokio::test(start_paused = true)]
async fn each_replay_sends_its_own_request_whatever_is_dropped() {
    for seed in 0..200 {
        let mut rng = Rng::with_seed(seed);
        let server = AuthServer::new();
        let sent = Arc::new(Mutex::new(HashMap::<_, Vec<_>>::new()));
        let log = Arc::clone(&sent);
        let api = service_fn(move |request: Request<String>| {
            let token = bearer(&request).expect("never anonymous").to_owned();
            let number = request.headers()["number"].to_str().unwrap().to_owned();
            assert_eq!(request.uri().path(), format!("/{number}"));
            assert_eq!(*request.body(), number);
            let answer = match &*token {
                "token-1" => unauthorized(INVALID_TOKEN),
                token => echo(Some(token)),
            };
            log.lock().unwrap().entry(number).or_default().push(token);
            async move {
                tokio::task::yield_now().await;
                Ok::<_, Infallible>(answer)
            }
        });
        let mut client = replaying(&server, &api);
        if rng.bool() {
            client.cache().get().await.unwrap();
        }
        let mut requests: Vec<_> = (0..20)
            .map(|number| {
                let request = Request::post(format!("http://localhost/{number}"))
                    .header("number", number)
                    .body(number.to_string())
                    .unwrap();
                let mut clone = client.clone();
                let client = if rng.bool() { &mut client } else { &mut clone };
                Some(Box::pin(client.call(request)))
            })
            .collect();
        for _ in 0..200 {
            let request = rng.choice(&mut requests).unwrap();
            match rng.u8(..8) {
                0 => *request = None,
                1 => tokio::task::yield_now().await,
                _ => {
                    let sending = request.as_mut();
                    if sending.is_some_and(|sending| poll_once(sending.as_mut()).is_ready()) {
                        *request = None;
                    }
                }
            }
        }
        for request in requests.into_iter().flatten() {
            assert_eq!(request.await.unwrap().body(), "token-2", "{seed}");
        }
        assert!(server.requests() <= 2, "{seed}");
        for tokens in sent.lock().unwrap().values() {
            let is_lawful = matches!(&tokens[..], [_]) || tokens[..] == ["token-1", "token-2"];
            assert!(is_lawful, "{seed}: {tokens:?}");
        }
    }
}
