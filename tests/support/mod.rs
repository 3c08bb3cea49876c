//! What the tests share: fakes of both servers, in memory so that time can be paused, and ways to wait and look.

mod api;
mod auth_server;
mod crowd;
mod log;
mod token_endpoint;
mod upload;

use std::{
    error::Error,
    fmt,
    future::Future,
    pin::{Pin, pin},
    sync::mpsc,
    task::{Context, Poll, Waker},
    thread,
    time::Duration,
};

use http::Request;
use tokio::{
    runtime::{Builder, Runtime},
    time::{self, Instant},
};
use tower::{Service, ServiceExt};
use tower_bearer::{BoxError, TokenError};

pub use self::{api::*, auth_server::*, crowd::*, log::*, token_endpoint::*, upload::*};

/// A request to a loopback origin.
pub fn get() -> Request<String> {
    Request::get("http://localhost/sims")
        .body(String::new())
        .unwrap()
}

/// A request to this path of a loopback origin.
pub fn get_path(path: impl fmt::Display) -> Request<String> {
    Request::get(format!("http://localhost/{path}"))
        .body(String::new())
        .unwrap()
}

/// Waits until a service is ready, naming the request type where it takes several.
pub async fn ready<S: Service<Request<String>>>(service: &mut S) -> Result<&mut S, S::Error> {
    service.ready().await
}

/// Runs every task until all are idle, without time passing.
pub async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

/// Runs a future and measures its time; fails if it never ends.
pub async fn timed<F: Future>(future: F) -> (F::Output, Duration) {
    let start = Instant::now();
    let output = time::timeout(Duration::from_secs(3_600), future).await;
    (output.expect("it ends"), start.elapsed())
}

/// The token failure that this error must be.
pub fn token_error(error: &BoxError) -> &TokenError {
    error
        .downcast_ref()
        .unwrap_or_else(|| panic!("not a token failure: {error:?}"))
}

/// All that an error shows, down to its last source.
pub fn everything(error: &(dyn Error + 'static)) -> String {
    std::iter::successors(Some(error), |&error| error.source())
        .map(|error| format!("{error}\n{error:#}\n{error:?}\n{error:#?}\n"))
        .collect()
}

/// Makes this thread's caches draw the same random numbers in every run.
pub fn seed(seed: u64) {
    fastrand::seed(seed);
}

pub const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Advances the paused clock without running tasks, as on a runtime that stands still.
pub fn stand_still(duration: Duration) {
    let _ = poll_once(pin!(time::advance(duration)));
}

/// Polls once, with a waker that does nothing.
pub fn poll_once<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// The output of a future that is ready at its first poll.
#[track_caller]
pub fn now<F: Future>(future: F) -> F::Output {
    match poll_once(pin!(future)) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("it waits"),
    }
}

/// A runtime on one thread.
pub fn current_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// The same, with its clock paused.
pub fn paused() -> Runtime {
    Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap()
}

/// Waits until `condition` holds, for at most some seconds of a real clock.
pub async fn until(condition: impl Fn() -> bool) {
    for _ in 0..5_000 {
        if condition() {
            return;
        }
        time::sleep(millis(1)).await;
    }
    panic!("the condition never holds");
}

/// Runs `f` in its own thread, and fails if it hangs.
pub fn without_a_hang<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(f()));
    receiver
        .recv_timeout(secs(10))
        .expect("it neither hangs nor panics")
}
