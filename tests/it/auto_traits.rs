//! Which of the public types are `Send`, `Sync` and `Unpin`.
//!
//! The tables hold plain values, so they fail whichever way a type changes.

use std::{
    cell::Cell,
    convert::Infallible,
    fmt,
    future::{Future, Ready},
    marker::{PhantomData, PhantomPinned},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use http::{Request, Response};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_bearer::{
    AccessToken, AuthMethod, BearerAuth, BearerAuthLayer, BoxError, ClientCredentials,
    ClientCredentialsBuilder, CloneBody, CollectBody, CollectBodyFuture, CollectBodyLayer,
    CollectedBody, ConfigError, Credential, EmptyBody, Events, Fetch, Never, RefreshPolicy,
    RefreshToken, ResponseFuture, SourceFn, Status, TokenCache, TokenError, TokenEvent,
    TokenResponse, TokenSource, TokenState,
};

use crate::support::AuthServer;

/// Tells at compile time whether a concrete type has a trait: if so, it has an inherent constant, which wins over
/// the trait's.
struct Probe<T: ?Sized>(PhantomData<T>);

macro_rules! probe {
    ($trait:ident, $otherwise:ident, $name:ident) => {
        trait $otherwise {
            const $name: bool = false;
        }
        impl<T: ?Sized> $otherwise for Probe<T> {}
        impl<T: ?Sized + $trait> Probe<T> {
            const $name: bool = true;
        }
    };
}

probe!(Send, NotSend, IS_SEND);
probe!(Sync, NotSync, IS_SYNC);
probe!(Unpin, NotUnpin, IS_UNPIN);

/// `[Send, Sync, Unpin]`, by type.
macro_rules! assert_table {
    ($($type:ty => $expected:expr,)*) => {$(
        assert_eq!(
            [Probe::<$type>::IS_SEND, Probe::<$type>::IS_SYNC, Probe::<$type>::IS_UNPIN],
            $expected,
            stringify!($type),
        );
    )*};
}

const ALL: [bool; 3] = [true, true, true];

/// A service that is `Clone + Send + Sync`, whose future is `F`.
struct Inner<F>(PhantomData<fn() -> F>);

impl<F> Clone for Inner<F> {
    fn clone(&self) -> Self {
        Self(PhantomData)
    }
}

impl<B, F> Service<Request<B>> for Inner<F>
where
    F: Future<Output = Result<Response<String>, Infallible>>,
{
    type Response = Response<String>;
    type Error = Infallible;
    type Future = F;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<B>) -> F {
        unreachable!("only its type is of interest")
    }
}

type Answer = Result<Response<String>, Infallible>;
type SendFuture = Pin<Box<dyn Future<Output = Answer> + Send>>;
type LocalFuture = Pin<Box<dyn Future<Output = Answer>>>;

/// A future that is not `Unpin`, like an `async` block's.
struct Pinned(PhantomPinned);

impl Future for Pinned {
    type Output = Answer;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Answer> {
        let Self(_) = *self;
        unreachable!("only its type is of interest")
    }
}

/// Neither `Send` nor `Sync`, but `Clone`.
type Local = Rc<str>;

/// Law 5: what a task of any runtime may hold.
#[test]
fn plain_types_are_send_and_sync() {
    assert_table! {
        AccessToken => ALL,
        AuthMethod => ALL,
        BearerAuthLayer => ALL,
        BearerAuthLayer<CloneBody> => ALL,
        BearerAuthLayer<EmptyBody> => ALL,
        ClientCredentials => ALL,
        CloneBody => ALL,
        CollectBodyLayer => ALL,
        ConfigError => ALL,
        Credential => ALL,
        EmptyBody => ALL,
        Events => ALL,
        Fetch => ALL,
        Never => ALL,
        RefreshPolicy => ALL,
        RefreshToken => ALL,
        Status => ALL,
        TokenCache => ALL,
        TokenError => ALL,
        TokenEvent => ALL,
        TokenResponse => ALL,
        TokenState => ALL,
        SourceFn<fn()> => ALL,
        SourceFn<Local> => [false, false, true],
        // It holds whatever the user passed to its setters.
        ClientCredentialsBuilder => ALL,
    }
}

/// Law 5: the service has its inner service's auto traits, whatever the body.
#[test]
fn auto_traits_follow_the_inner_service() {
    assert_table! {
        BearerAuth<Inner<SendFuture>, Never> => ALL,
        BearerAuth<Inner<SendFuture>, CloneBody> => ALL,
        BearerAuth<Inner<SendFuture>, EmptyBody> => ALL,
        BearerAuth<Inner<LocalFuture>, CloneBody> => ALL,
        CollectBody<Inner<LocalFuture>> => ALL,
        BearerAuth<Cell<u8>, Never> => [true, false, true],
        BearerAuth<Local, Never> => [false, false, true],
    }
}

/// Law 5: a response may be awaited in a spawned task if body and inner service allow it.
#[test]
fn a_response_future_is_send_if_inner_service_and_body_are() {
    assert_table! {
        ResponseFuture<Inner<SendFuture>, Never, Request<String>> => [true, false, true],
        ResponseFuture<Inner<SendFuture>, CloneBody, Request<String>> => [true, false, true],
        ResponseFuture<Inner<SendFuture>, EmptyBody, Request<String>> => [true, false, true],
        // `Sync` comes for free where the inner future is.
        ResponseFuture<Inner<Ready<Answer>>, CloneBody, Request<String>> => ALL,
        // Bodies that threads cannot share, like many streaming ones.
        ResponseFuture<Inner<SendFuture>, Never, Request<Cell<u8>>> => [true, false, true],
        // Local services and bodies work in a `LocalSet`.
        ResponseFuture<Inner<LocalFuture>, Never, Request<String>> => [false, false, true],
        ResponseFuture<Inner<SendFuture>, CloneBody, Request<Local>> => [false, false, true],
        ResponseFuture<Inner<SendFuture>, Never, Request<Local>> => [false, false, true],
        // The inner future is pinned in place, not boxed.
        ResponseFuture<Inner<Pinned>, Never, Request<String>> => [true, true, false],
    }
}

/// Law 5: the same holds if the body is read first, and for the collected body.
#[test]
fn collecting_a_body_keeps_its_auto_traits() {
    assert_table! {
        CollectedBody<String> => ALL,
        CollectedBody<Cell<u8>> => [true, false, true],
        CollectedBody<Pinned> => ALL,
        CollectedBody<Local> => [false, false, true],
        CollectBodyFuture<Inner<SendFuture>, Cell<u8>> => [true, false, true],
        CollectBodyFuture<Inner<LocalFuture>, String> => [false, false, true],
    }
}

/// Law 5: what the crate's own `async fn`s return can be spawned.
#[test]
fn the_futures_of_caches_and_sources_are_send() {
    fn assert_send<T: Send>(_: impl FnOnce() -> T) {}

    assert_send(|| async { TokenCache::new(AuthServer::new()).get().await });
    fn of_any_source<T: TokenSource>(source: &T) {
        assert_send(|| source.fetch(Fetch::new()));
    }
    let _ = of_any_source::<ClientCredentials>;
}

/// Law 5: a body that is not `Send` only needs a task that stays on one thread.
#[tokio::test(start_paused = true)]
async fn a_body_that_is_not_send_works() {
    fn assert_service<B, S: Service<Request<B>, Error = BoxError, Future: fmt::Debug>>(_: &S) {}

    let inner = service_fn(|request: Request<Local>| async move {
        Ok::<_, Infallible>(Response::new(request.into_body()))
    });
    let once = BearerAuthLayer::new(AuthServer::new()).layer(inner);
    let again = BearerAuthLayer::new(AuthServer::new())
        .replay(CloneBody)
        .layer(inner);
    assert_service::<Local, _>(&once);
    assert_service::<Local, _>(&again);
    for _ in 0..2 {
        let request = || {
            Request::get("http://localhost/")
                .body(Rc::from("local"))
                .unwrap()
        };
        let response = once.clone().oneshot(request()).await.unwrap();
        assert_eq!(&**response.body(), "local");
        let response = again.clone().oneshot(request()).await.unwrap();
        assert_eq!(&**response.body(), "local");
    }
}
