//! Any `WWW-Authenticate` of a 401, one value per line: the verdict is the same however the values are arranged.
#![no_main]

use std::{
    cell::RefCell,
    convert::Infallible,
    future::Future,
    pin::{Pin, pin},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use http::{HeaderValue, Request, Response, StatusCode, header::WWW_AUTHENTICATE};
use libfuzzer_sys::fuzz_target;
use regex::bytes::Regex;
use tokio::{runtime::Runtime, sync::Semaphore};
use tower::{Layer, Service, service_fn};
use tower_bearer::{BearerAuthLayer, CloneBody, TokenCache, TokenResponse, source_fn};

fuzz_target!(|input: &[u8]| {
    let values: Vec<&[u8]> = input
        .split(|&byte| byte == b'\n')
        .filter(|value| HeaderValue::from_bytes(value).is_ok())
        .take(4)
        .collect();
    WORLD.with_borrow(|world| {
        let verdict = world.judge(&values);
        if values.len() < 2 {
            return;
        }
        let reversed: Vec<_> = values.iter().rev().copied().collect();
        assert_eq!(world.judge(&reversed), verdict, "in reverse");
        // A syntax error discards only the rest of its value.
        if values
            .iter()
            .any(|value| world.judge(&[value]) == Verdict::InvalidToken)
        {
            assert_eq!(verdict, Verdict::InvalidToken);
        }
        // RFC 9110 section 5.3.
        if values.iter().all(|value| LIST.is_match(value)) {
            let joined = values.join(&b", "[..]);
            assert_eq!(world.judge(&[&joined]), verdict, "on one line");
        }
    });
});

thread_local! {
    static WORLD: RefCell<World> = RefCell::new(World::new());
}

/// How the layer judges an answer, as its users see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Others wait for the next token.
    InvalidToken,
    /// A new token is requested, and others go on with this one.
    Unexplained,
    /// The answer goes to the caller.
    NotOurs,
}

/// A value that is a list of challenges to the letter of RFC 9110 section 11.6.1.
static LIST: LazyLock<Regex> = LazyLock::new(|| {
    let token = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+";
    let token68 = r"[A-Za-z0-9\-._~+/]+=*";
    let quoted = r#""(?:[\t !\x23-\x5B\x5D-\x7E\x80-\xFF]|\\[\t -~\x80-\xFF])*""#;
    let param = format!(r"{token}[ \t]*=[ \t]*(?:{token}|{quoted})");
    let challenge = format!(r"{token}(?: +(?:{param}(?:[ \t]*,[ \t]*{param})*|{token68}))?");
    Regex::new(&format!(r"(?-u)^{challenge}(?:[ \t]*,[ \t]*{challenge})*$")).unwrap()
});

struct World {
    runtime: Runtime,
}

impl World {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        Self { runtime }
    }

    fn judge(&self, values: &[&[u8]]) -> Verdict {
        let mut refusal = Response::new(());
        *refusal.status_mut() = StatusCode::UNAUTHORIZED;
        for value in values {
            let value = HeaderValue::from_bytes(value).expect("it was checked");
            refusal.headers_mut().append(WWW_AUTHENTICATE, value);
        }
        self.runtime.block_on(judge(refusal))
    }
}

async fn judge(refusal: Response<()>) -> Verdict {
    let requests = Arc::new(AtomicUsize::new(0));
    let gate = Arc::new(Semaphore::new(1));
    let cache = TokenCache::new(source_fn({
        let (requests, gate) = (requests.clone(), gate.clone());
        move |_| {
            let number = requests.fetch_add(1, Ordering::Relaxed) + 1;
            let gate = gate.clone();
            async move {
                gate.acquire().await.expect("it stays open").forget();
                TokenResponse::new(format!("token-{number}"))
            }
        }
    }));
    cache.get().await.expect("there is a first token");

    // The first token is refused, and the next one is held back until the verdict has been seen.
    let api = service_fn(move |request: Request<()>| {
        let first = request.headers()["authorization"] == "Bearer token-1";
        let response = match first {
            true => refusal.clone(),
            false => Response::new(()),
        };
        async move { Ok::<_, Infallible>(response) }
    });
    let mut client = BearerAuthLayer::new(cache.clone())
        .replay(CloneBody)
        .layer(api);
    let mut request = Request::new(());
    *request.uri_mut() = http::Uri::from_static("https://api.example");
    let mut response = pin!(client.call(request));
    match poll(response.as_mut()) {
        Poll::Ready(response) => {
            let response = response.expect("the API answers");
            assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
            assert_eq!(requests.load(Ordering::Relaxed), 1);
            cache.shutdown();
            return Verdict::NotOurs;
        }
        Poll::Pending => {}
    }
    let verdict = match poll(pin!(cache.get())) {
        Poll::Ready(token) => {
            assert_eq!(token.expect("others go on").expose_secret(), "token-1");
            Verdict::Unexplained
        }
        Poll::Pending => Verdict::InvalidToken,
    };
    gate.add_permits(1);
    let response = response.await.expect("the API answers");
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(requests.load(Ordering::Relaxed), 2);
    // Otherwise the task that watches its token sleeps for up to 30 s, and a hundred thousand of them fill the memory.
    cache.shutdown();
    verdict
}

fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}
