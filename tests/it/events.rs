//! What a cache reports to programs: [`TokenCache::events`].

use std::{
    future::Future,
    pin::pin,
    sync::Arc,
    task::{Context, Wake, Waker},
};

use tokio::{task, time};
use tokio_stream::StreamExt;
use tower_bearer::{Events, RefreshPolicy, TokenCache, TokenError, TokenEvent, TokenRequest};

use crate::support::{Answer, AuthServer, millis, now, poll_once, secs, settle, stand_still};

/// The events in the stream now.
fn told(events: &mut Events) -> Vec<TokenEvent> {
    let mut told = Vec::new();
    while let std::task::Poll::Ready(Some(event)) =
        poll_once(pin!(task::unconstrained(events.next())))
    {
        told.push(event);
    }
    told
}

fn names(events: &[TokenEvent]) -> Vec<String> {
    let name = |event: &TokenEvent| {
        let text = format!("{event:?}");
        text.split([' ', '(']).next().unwrap().to_owned()
    };
    events.iter().map(name).collect()
}

#[tokio::test(start_paused = true)]
async fn a_listener_hears_of_an_outage_and_its_end() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let mut events = cache.events();
    server.set_latency(millis(40));
    cache.get().await.unwrap();
    settle().await;
    let started = told(&mut events);
    assert_eq!(names(&started), ["FlightStarted", "TokenReceived"]);
    let (
        TokenEvent::FlightStarted { flight, .. },
        TokenEvent::TokenReceived {
            flight: same, took, ..
        },
    ) = (&started[0], &started[1])
    else {
        panic!("{started:?}");
    };
    assert_eq!(flight, same);
    assert_eq!(*took, millis(40));

    server.set_latency(millis(0));
    server.set(Answer::Fail(TokenError::transient("down")));
    time::sleep(secs(280)).await;
    cache.get().await.unwrap();
    // Its attempts take 3 s at most.
    time::sleep(secs(4)).await;
    let failed = told(&mut events);
    assert_eq!(
        names(&failed),
        [
            "FlightStarted",
            "AttemptFailed",
            "AttemptFailed",
            "FlightFailed"
        ]
    );
    let Some(TokenEvent::FlightFailed {
        error,
        failures: 1,
        retry_in,
        usable_for: Some(_),
        ..
    }) = failed.last()
    else {
        panic!("{failed:?}");
    };
    assert!(error.is_transient() && !retry_in.is_zero());

    // The token dies; one flight may pass the gate, and the next caller fails at once.
    time::sleep(secs(6) - millis(100)).await;
    cache.get().await.unwrap();
    settle().await;
    told(&mut events);
    time::sleep(millis(200)).await;
    cache.get().await.unwrap_err();
    settle().await;
    let dead = told(&mut events);
    assert_eq!(names(&dead), ["FlightStarted", "FlightFailed"]);
    assert!(matches!(
        dead[1],
        TokenEvent::FlightFailed {
            usable_for: None,
            failures: 3,
            ..
        }
    ));
    // No event is sent twice.
    cache.get().await.unwrap_err();
    assert!(told(&mut events).is_empty());

    server.set(Answer::Grant(secs(300)));
    time::sleep(secs(5)).await;
    cache.get().await.unwrap();
    settle().await;
    let over = told(&mut events);
    assert_eq!(
        names(&over),
        ["FlightStarted", "TokenReceived", "Recovered"]
    );
    assert!(
        matches!(over[2], TokenEvent::Recovered { failures: 3, outage, .. } if outage > secs(12))
    );
}

#[tokio::test(start_paused = true)]
async fn a_listener_hears_of_refusals_and_keys() {
    let server = AuthServer::new();
    let cache = TokenCache::with_policy(server.clone(), RefreshPolicy::new().max_keys(1));
    let token = cache.get().await.unwrap();
    time::sleep(secs(2)).await;
    let mut events = cache.events();
    cache.invalidate(&token);
    cache.invalidate(&token);
    settle().await;
    let refused = told(&mut events);
    assert_eq!(
        names(&refused),
        ["TokenRefused", "FlightStarted", "TokenReceived"]
    );

    let key = |name: &str| TokenRequest::new().scope(name);
    cache.get_for(&key("a")).await.unwrap();
    cache.get_for(&key("b")).await.unwrap_err();
    settle().await;
    let full = told(&mut events);
    assert_eq!(names(&full), ["FlightStarted", "TokenReceived", "KeysFull"]);
    assert_eq!(full[1].request(), Some(&key("a")));
    assert!(matches!(full[2], TokenEvent::KeysFull { limit: 1, .. }));
    time::sleep(secs(300)).await;
    cache.get_for(&key("b")).await.unwrap();
    assert!(matches!(
        told(&mut events)[0],
        TokenEvent::KeysEvicted { count: 1, .. }
    ));
}

/// It holds nobody up.
#[tokio::test(start_paused = true)]
async fn a_slow_listener_misses_the_oldest_events_and_is_told_how_many() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    let mut events = cache.events();
    for n in 0..150 {
        cache
            .get_for(&TokenRequest::new().scope(n.to_string()))
            .await
            .unwrap();
    }
    let told = told(&mut events);
    assert!(
        matches!(told[0], TokenEvent::Missed { count: 44, .. }),
        "{:?}",
        told[0]
    );
    assert_eq!(told.len(), 1 + 256);
}

#[tokio::test(start_paused = true)]
async fn the_stream_ends_with_the_last_handle_of_the_cache() {
    let server = AuthServer::new();
    server.hold();
    let cache = TokenCache::new(server.clone());
    let events = cache.events();
    // Nor does a flight in progress keep the stream open.
    assert!(poll_once(pin!(cache.get())).is_pending());
    settle().await;
    drop(cache);
    let told = time::timeout(secs(1), events.collect::<Vec<_>>())
        .await
        .unwrap();
    assert_eq!(names(&told), ["FlightStarted"]);
}

/// An attempt that there is no time for is neither announced nor waited for.
#[tokio::test(start_paused = true)]
async fn a_flight_without_time_for_another_attempt_ends() {
    let down = || Answer::Fail(TokenError::transient("down"));
    for (answer, timeout, ends_after, attempts) in [
        // The second attempt is cut short.
        (Answer::Hang, secs(15), secs(15), 2),
        // While there is a token, the pause takes at least half a second.
        (down(), millis(400), millis(0), 1),
    ] {
        let server = AuthServer::new();
        let policy = RefreshPolicy::new().flight_timeout(timeout);
        let cache = TokenCache::with_policy(server.clone(), policy);
        cache.get().await.unwrap();
        time::sleep(secs(226)).await;
        server.set(answer);
        let mut events = cache.events();
        now(cache.get()).unwrap();
        time::sleep(secs(20)).await;
        let told = told(&mut events);
        let expected = ["FlightStarted", "AttemptFailed", "FlightFailed"];
        let left_out = 2 - attempts;
        assert_eq!(names(&told)[0], expected[0]);
        assert_eq!(names(&told)[1..], expected[1 + left_out..]);
        assert_eq!(server.requests(), 1 + attempts);
        let Some(TokenEvent::FlightFailed { took, error, .. }) = told.last() else {
            panic!("{told:?}");
        };
        assert_eq!(*took, ends_after);
        assert_eq!(error.is_timeout(), attempts == 2);
    }
}

/// It was not driven in time and sent nothing, so it says nothing about the server.
#[tokio::test(start_paused = true)]
async fn a_flight_that_oversleeps_its_first_attempt_is_lost() {
    let server = AuthServer::new();
    let cache = TokenCache::new(server.clone());
    cache.get().await.unwrap();
    time::sleep(secs(226)).await;
    let mut events = cache.events();
    now(cache.get()).unwrap();
    stand_still(secs(30));
    settle().await;
    assert_eq!(names(&told(&mut events)), ["FlightStarted", "FlightLost"]);
    assert_eq!(server.requests(), 1);

    // With no time at all, the policy is at fault.
    let policy = RefreshPolicy::new().flight_timeout(millis(0));
    let cache = TokenCache::with_policy(server.clone(), policy);
    assert!(cache.get().await.unwrap_err().is_timeout());
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_is_the_last_event() {
    let cache = TokenCache::new(AuthServer::new());
    let mut events = cache.events();
    let clone = cache.clone();
    cache.shutdown();
    clone.shutdown();
    assert_eq!(names(&told(&mut events)), ["ShutDown"]);
    assert!(now(events.next()).is_none());
    assert!(now(events.next()).is_none());
    assert!(now(cache.events().next()).is_none());
}

#[tokio::test(start_paused = true)]
async fn a_dropped_wait_for_an_event_loses_none() {
    let cache = TokenCache::new(AuthServer::new());
    let mut events = cache.events();
    for _ in 0..3 {
        assert!(poll_once(pin!(events.next())).is_pending());
    }
    cache.get().await.unwrap();
    assert_eq!(
        names(&told(&mut events)),
        ["FlightStarted", "TokenReceived"]
    );
}

/// The waker is foreign code.
#[tokio::test(start_paused = true)]
async fn a_panic_of_a_waker_loses_no_event() {
    struct Panics;

    impl Wake for Panics {
        fn wake(self: Arc<Self>) {
            panic!("the scripted waker panics");
        }
    }

    let server = AuthServer::new();
    for ends in ["TokenReceived", "ShutDown"] {
        server.hold();
        let cache = TokenCache::new(server.clone());
        let mut events = cache.events();
        let waker = Waker::from(Arc::new(Panics));
        let mut waits = [0; 2].map(|_| Box::pin(cache.get()));
        for wait in &mut waits {
            let polled = wait.as_mut().poll(&mut Context::from_waker(&waker));
            assert!(polled.is_pending());
        }
        settle().await;
        match ends {
            "ShutDown" => cache.shutdown(),
            _ => server.release(),
        }
        settle().await;
        assert_eq!(names(&told(&mut events)), ["FlightStarted", ends]);
    }
}
