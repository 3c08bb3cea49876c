//! Callers of a cache: one, or a [`Crowd`].

use std::{
    sync::{Arc, Mutex},
    task::Poll,
    time::Duration,
};

use tokio::{
    task::JoinHandle,
    time::{self, Instant},
};
use tower_bearer::{AccessToken, TokenCache, TokenError};

use super::poll_once;

/// Callers of [`TokenCache::get`] that do not wait for each other, and their results.
#[derive(Clone)]
pub struct Crowd {
    cache: TokenCache,
    tally: Arc<Mutex<Tally>>,
}

#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub served: usize,
    pub failed: usize,
    pub waiting: usize,
    /// The longest wait of a caller.
    pub slowest: Duration,
    pub first_served: Option<Instant>,
}

impl Crowd {
    pub fn new(cache: &TokenCache) -> Self {
        Self {
            cache: cache.clone(),
            tally: Arc::default(),
        }
    }

    /// One more caller.
    pub fn call(&self) {
        let asked = Instant::now();
        let cache = self.cache.clone();
        let mut get = Box::pin(async move { cache.get().await });
        match poll_once(get.as_mut()) {
            Poll::Ready(result) => self.count(asked, &result),
            Poll::Pending => {
                self.tally.lock().unwrap().waiting += 1;
                let crowd = self.clone();
                tokio::spawn(async move {
                    let result = get.await;
                    crowd.tally.lock().unwrap().waiting -= 1;
                    crowd.count(asked, &result);
                });
            }
        }
    }

    /// So many callers at once, again and again until `duration` is over.
    pub async fn storm(&self, callers: usize, every: Duration, duration: Duration) {
        let end = Instant::now() + duration;
        while Instant::now() < end {
            for _ in 0..callers {
                self.call();
            }
            time::sleep(every).await;
        }
    }

    pub fn tally(&self) -> Tally {
        self.tally.lock().unwrap().clone()
    }

    fn count(&self, asked: Instant, result: &Result<AccessToken, TokenError>) {
        let mut tally = self.tally.lock().unwrap();
        tally.slowest = tally.slowest.max(asked.elapsed());
        match result {
            Ok(_) => {
                tally.served += 1;
                tally.first_served.get_or_insert_with(Instant::now);
            }
            Err(_) => tally.failed += 1,
        }
    }
}
/// Starts a caller of [`TokenCache::get`] in its own task.
pub fn caller(cache: &TokenCache) -> JoinHandle<Result<AccessToken, TokenError>> {
    let cache = cache.clone();
    tokio::spawn(async move { cache.get().await })
}

/// Waits for all tasks; fails if one fails or never ends.
pub async fn all<T: 'static>(tasks: impl IntoIterator<Item = JoinHandle<T>>) -> Vec<T> {
    let mut results = Vec::new();
    for task in tasks {
        let result = time::timeout(Duration::from_secs(3_600), task).await;
        results.push(result.expect("it ends").unwrap());
    }
    results
}
