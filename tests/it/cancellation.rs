//! Any caller may be dropped at any point: the token request goes on, and the others get its token.

use std::{
    future::Future,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
};

use http::{Request, Response};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time,
};
use tower::{Layer, Service, ServiceExt, limit::ConcurrencyLimit};
use tower_bearer::{BearerAuthLayer, BoxError, CloneBody, RefreshPolicy, TokenCache};

use crate::support::{Api, AuthServer, caller, get, millis, now, poll_once, ready, secs, settle};

const LIMIT: u32 = 8;

/// All that a request waits for, released step by step.
struct Course {
    server: AuthServer,
    /// How many requests the inner service is ready for.
    permits: Arc<Semaphore>,
    taken: Option<OwnedSemaphorePermit>,
    api: Api,
}

impl Course {
    /// How many times a request is pending.
    const STAGES: usize = 4;

    fn new() -> Self {
        let server = AuthServer::new();
        server.hold();
        let api = Api::echoing();
        api.hold();
        Self {
            server,
            api,
            permits: Arc::new(Semaphore::new(LIMIT as usize)),
            taken: None,
        }
    }

    fn client(
        &self,
    ) -> impl Service<
        Request<String>,
        Response = Response<String>,
        Error = BoxError,
        Future: Future<Output = Result<Response<String>, BoxError>> + Send,
    > + Clone
    + Send
    + 'static {
        let api = self.api.clone();
        let api = ConcurrencyLimit::with_semaphore(api, Arc::clone(&self.permits));
        BearerAuthLayer::new(self.server.clone()).layer(api)
    }

    /// Releases what a request waits for after so many polls.
    async fn pass(&mut self, stage: usize) {
        match stage {
            // The token request is out. Nobody who waits for it holds a permit (law 10).
            1 => {
                let permits = Arc::clone(&self.permits).try_acquire_many_owned(LIMIT);
                self.taken = Some(permits.unwrap());
            }
            2 => self.server.release(),
            3 => self.taken = None,
            4 => self.api.release(),
            _ => {}
        }
        settle().await;
    }
}

/// Sends a request through `client` and keeps `client` until the answer comes, like a connection's owner.
async fn request<S>(mut client: S) -> Result<Response<String>, BoxError>
where
    S: Service<Request<String>, Response = Response<String>, Error = BoxError>,
{
    client.ready().await?.call(get()).await
}

/// Polls `victim` so many times or until it finishes, with a `step` after each poll; drops it and returns whether
/// it finished.
async fn poll_and_drop(
    victim: impl Future,
    polls: usize,
    mut step: impl AsyncFnMut(usize),
) -> bool {
    let mut victim = pin!(victim);
    for stage in 1..=polls {
        if poll_once(victim.as_mut()).is_ready() {
            return true;
        }
        step(stage).await;
    }
    false
}

/// Releases the token once the polled caller has waited for it.
async fn release_at_stage_2(server: &AuthServer, stage: usize) {
    if stage == 2 {
        server.release();
    }
    settle().await;
}

/// Law 5: after any number of polls, as the first caller or one of many.
#[tokio::test(start_paused = true)]
async fn other_requests_get_their_token_whenever_one_is_dropped() {
    for first in [true, false] {
        for polls in 0.. {
            let mut course = Course::new();
            let client = course.client();
            let other = || tokio::spawn(request(client.clone()));
            let mut others = Vec::new();
            if !first {
                others.extend([other(), other(), other()]);
                settle().await;
            }

            let victim = request(client.clone());
            let pass = async |stage| course.pass(stage).await;
            let finished = poll_and_drop(victim, polls, pass).await;

            others.extend([other(), other(), other()]);
            settle().await;
            for stage in polls + 1..=Course::STAGES {
                course.pass(stage).await;
            }
            for other in others {
                let response = time::timeout(secs(1), other).await.expect("it hangs");
                assert_eq!(response.unwrap().unwrap().body(), "token-1", "{polls}");
            }
            assert_eq!(course.server.requests(), 1, "first: {first}, {polls} polls");
            assert_eq!(course.server.in_flight(), 0);
            assert_eq!(course.permits.available_permits(), LIMIT as usize);
            if finished {
                assert_eq!(polls, Course::STAGES + 1, "the sweep stops nowhere else");
                break;
            }
        }
    }
}

/// Law 5: the same for a refused request that waits for its replay.
#[tokio::test(start_paused = true)]
async fn others_get_the_replacement_whenever_a_refused_request_is_dropped() {
    for polls in 0.. {
        let server = AuthServer::new();
        let client = BearerAuthLayer::new(server.clone())
            .replay(CloneBody)
            .layer(Api::refusing_the_first());
        let cache = client.cache().clone();
        cache.get().await.unwrap();
        server.hold();

        let release = async |stage| release_at_stage_2(&server, stage).await;
        let finished = poll_and_drop(client.clone().oneshot(get()), polls, release).await;

        let others = [(); 3].map(|()| tokio::spawn(client.clone().oneshot(get())));
        settle().await;
        server.release();
        for other in others {
            assert_eq!(other.await.unwrap().unwrap().body(), "token-2", "{polls}");
        }
        assert_eq!(server.requests(), 2, "{polls} polls");
        if finished {
            assert_eq!(polls, 3, "the sweep stops nowhere else");
            break;
        }
    }
}

/// Law 5: the same without a layer.
#[tokio::test(start_paused = true)]
async fn other_gets_return_the_token_whenever_one_is_dropped() {
    for first in [true, false] {
        for polls in 0.. {
            let server = AuthServer::new();
            server.hold();
            let cache = TokenCache::new(server.clone());
            let mut others = Vec::new();
            if !first {
                others.extend([caller(&cache), caller(&cache)]);
                settle().await;
            }

            let release = async |stage| release_at_stage_2(&server, stage).await;
            let finished = poll_and_drop(cache.get(), polls, release).await;

            others.extend([caller(&cache), caller(&cache)]);
            settle().await;
            server.release();
            for other in others {
                let token = other.await.unwrap().unwrap();
                assert_eq!(token.expose_secret(), "token-1", "{polls}");
            }
            assert_eq!(server.requests(), 1, "first: {first}, {polls} polls");
            if finished {
                assert_eq!(polls, 3, "the sweep stops nowhere else");
                break;
            }
        }
    }
}

/// Law 5.
#[tokio::test(start_paused = true)]
async fn a_caller_dropped_before_its_first_poll_costs_no_token_request() {
    let server = AuthServer::new();
    let mut client = BearerAuthLayer::new(server.clone()).layer(Api::echoing());
    drop(client.cache().get());
    drop(ready(&mut client).await.unwrap().call(get()));
    time::sleep(secs(1)).await;
    assert_eq!(server.requests(), 0);
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-1");
}

/// Law 5.
#[tokio::test(start_paused = true)]
async fn a_token_request_outlives_its_callers_and_its_token_is_kept() {
    let server = AuthServer::new();
    server.hold();
    let cache = TokenCache::new(server.clone());
    let callers: Vec<_> = (0..5).map(|_| caller(&cache)).collect();
    settle().await;
    for caller in callers {
        caller.abort();
        assert!(caller.await.unwrap_err().is_cancelled());
    }
    assert_eq!(server.in_flight(), 1);
    server.release();
    settle().await;
    assert_eq!(now(cache.get()).unwrap().expose_secret(), "token-1");
    assert_eq!(server.requests(), 1);
}

/// Law 5: so do the retries.
#[tokio::test(start_paused = true)]
async fn a_flight_retries_without_its_callers() {
    let server = AuthServer::new();
    server.set(crate::support::Answer::Hang);
    let cache = TokenCache::new(server.clone());
    {
        let mut only = pin!(cache.get());
        assert!(poll_once(only.as_mut()).is_pending());
    }
    time::sleep(secs(5)).await;
    server.set(crate::support::Answer::Grant(secs(300)));
    time::sleep(secs(6)).await;
    assert_eq!(server.requests(), 2);
    assert_eq!(now(cache.get()).unwrap().expose_secret(), "token-2");
}

/// Law 5.
#[tokio::test(start_paused = true)]
async fn a_dropped_caller_frees_its_place() {
    let server = AuthServer::new();
    server.hold();
    let cache = TokenCache::with_policy(server.clone(), RefreshPolicy::new().max_waiters(1));
    for _ in 0..3 {
        let mut seated = Box::pin(cache.get());
        assert!(poll_once(seated.as_mut()).is_pending());
        assert!(cache.get().await.unwrap_err().is_overloaded());
    }
    let seated = caller(&cache);
    settle().await;
    server.release();
    assert!(seated.await.unwrap().is_ok());
    assert_eq!(server.requests(), 1);
}

/// A waker whose references are counted.
struct Counted;

impl Wake for Counted {
    fn wake(self: Arc<Self>) {
        drop(self);
    }
}

/// Law 5: a dropped caller leaks nothing.
#[tokio::test(start_paused = true)]
async fn a_dropped_caller_leaves_no_waker_behind() {
    let server = AuthServer::new();
    server.hold();
    let cache = TokenCache::new(server.clone());
    let counted = Arc::new(Counted);
    let waker = Waker::from(Arc::clone(&counted));
    for _ in 0..10 {
        let mut get = Box::pin(cache.get());
        let poll = get.as_mut().poll(&mut Context::from_waker(&waker));
        assert!(matches!(poll, Poll::Pending));
        assert!(Arc::strong_count(&counted) > 2, "the flight has the waker");
        drop(get);
        assert_eq!(Arc::strong_count(&counted), 2);
    }
    time::sleep(millis(10)).await;
    assert_eq!(server.requests(), 1);
}
