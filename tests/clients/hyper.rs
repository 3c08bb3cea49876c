//! hyper-util: its client with its pool, and hand-made pools.

use std::{
    convert::Infallible,
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header::WWW_AUTHENTICATE};
use http_body_util::{BodyExt, Either, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    client::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::{
    client::{legacy::Client, pool},
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::net::{TcpListener, TcpStream};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, reconnect::Reconnect};
use tower_bearer::{BearerAuthLayer, BoxError, CloneBody};

use crate::support::{AuthServer, INVALID_TOKEN, bearer};

/// The body of a refusal.
#[derive(Clone, Copy)]
enum Refusal {
    Small,
    Endless,
}

/// An API that counts its connections. Clones are one API.
#[derive(Clone)]
struct Api {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    seen: Arc<Mutex<Vec<String>>>,
}

type Answer = Response<Either<Full<Bytes>, BoxBody<Bytes, Infallible>>>;

impl Api {
    /// Speaks HTTP/1 and HTTP/2, and refuses the first token.
    async fn start(refusal: Refusal) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api = Self {
            address: listener.local_addr().unwrap(),
            connections: Arc::default(),
            seen: Arc::default(),
        };
        let server = api.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                server.connections.fetch_add(1, Ordering::SeqCst);
                let api = server.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let answer = api.answer(&request, refusal);
                        async move { Ok::<_, Infallible>(answer) }
                    });
                    auto::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service)
                        .await
                });
            }
        });
        api
    }

    fn answer(&self, request: &Request<Incoming>, refusal: Refusal) -> Answer {
        let token = bearer(request).unwrap_or("anonymous").to_owned();
        self.seen.lock().unwrap().push(token.clone());
        if token != "token-1" {
            return Response::new(Either::Left(token.into()));
        }
        let body = match refusal {
            Refusal::Small => Either::Left("no".into()),
            Refusal::Endless => {
                let part = || Ok(Frame::data(Bytes::from_static(&[0; 4_096])));
                let parts = tokio_stream::iter(std::iter::repeat_with(part));
                Either::Right(BodyExt::boxed(StreamBody::new(parts)))
            }
        };
        Response::builder()
            .status(StatusCode::UNAUTHORIZED)
            .header(WWW_AUTHENTICATE, INVALID_TOKEN)
            .body(body)
            .unwrap()
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }

    fn request(&self) -> Request<Full<Bytes>> {
        let uri = format!("http://{}/sims", self.address);
        Request::post(uri).body("order".into()).unwrap()
    }
}

fn layer() -> BearerAuthLayer<CloneBody> {
    BearerAuthLayer::new(AuthServer::new()).replay(CloneBody)
}

/// Sends requests, the first with a token that is refused, and counts the connections.
async fn connections_for<S>(inner: impl FnOnce(&Api) -> S, refusal: Refusal) -> usize
where
    S: Service<Request<Full<Bytes>>, Response = Response<Incoming>> + Clone,
    S::Error: Into<BoxError>,
{
    let api = Api::start(refusal).await;
    let client = layer().layer(inner(&api));
    for _ in 0..2 {
        let response = client.clone().oneshot(api.request()).await.unwrap();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, "token-2");
    }
    assert_eq!(api.seen(), ["token-1", "token-2", "token-2"]);
    api.connections()
}

/// It is held while its token is replaced, long enough to read a small body.
#[tokio::test]
async fn a_small_refusal_over_http_1_leaves_its_connection_for_the_replay() {
    let client = |_: &Api| Client::builder(TokioExecutor::new()).build_http();
    assert_eq!(connections_for(client, Refusal::Small).await, 1);
}

/// Nobody reads its body to the end.
#[tokio::test]
async fn an_endless_refusal_over_http_1_costs_its_connection() {
    let client = |_: &Api| Client::builder(TokioExecutor::new()).build_http();
    assert_eq!(connections_for(client, Refusal::Endless).await, 2);
}

#[tokio::test]
async fn any_refusal_over_http_2_leaves_its_connection() {
    for refusal in [Refusal::Small, Refusal::Endless] {
        let client = |_: &Api| {
            Client::builder(TokioExecutor::new())
                .http2_only(true)
                .build_http()
        };
        assert_eq!(connections_for(client, refusal).await, 1);
    }
}

#[tokio::test]
async fn many_refused_requests_share_one_token_request_and_one_connection() {
    let api = Api::start(Refusal::Small).await;
    let auth = AuthServer::new();
    let client = BearerAuthLayer::new(auth.clone()).replay(CloneBody).layer(
        Client::builder(TokioExecutor::new())
            .http2_only(true)
            .build_http(),
    );
    let requests: Vec<_> = (0..32)
        .map(|_| tokio::spawn(client.clone().oneshot(api.request())))
        .collect();
    for request in requests {
        assert_eq!(request.await.unwrap().unwrap().status(), StatusCode::OK);
    }
    assert_eq!(auth.requests(), 2);
    assert_eq!(api.connections(), 1);
}

// Hand-made clients.

type BoxFuture<T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send>>;

/// hyper's end of a connection as a tower service: for HTTP/2 it is `Clone`, for HTTP/1 it is not.
#[derive(Clone)]
struct Connection<T>(T);

impl Service<Request<Full<Bytes>>> for Connection<http1::SendRequest<Full<Bytes>>> {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<Response<Incoming>, hyper::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Full<Bytes>>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

impl Service<Request<Full<Bytes>>> for Connection<http2::SendRequest<Full<Bytes>>> {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<Response<Incoming>, hyper::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Full<Bytes>>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

async fn connect_1(
    address: SocketAddr,
) -> Result<Connection<http1::SendRequest<Full<Bytes>>>, BoxError> {
    let stream = TokioIo::new(TcpStream::connect(address).await?);
    let (sender, connection) = http1::handshake(stream).await?;
    tokio::spawn(connection);
    Ok(Connection(sender))
}

async fn connect_2(
    address: SocketAddr,
) -> Result<Connection<http2::SendRequest<Full<Bytes>>>, BoxError> {
    let stream = TokioIo::new(TcpStream::connect(address).await?);
    let (sender, connection) = http2::handshake(TokioExecutor::new(), stream).await?;
    tokio::spawn(connection);
    Ok(Connection(sender))
}

/// A client that takes a service from a pool for each request.
fn pooled<P, S>(
    pool: P,
) -> impl Service<Request<Full<Bytes>>, Response = Response<Incoming>, Error = BoxError, Future: Send>
+ Clone
where
    P: Service<SocketAddr, Response = S, Error: Into<BoxError>, Future: Send>,
    P: Clone + Send + 'static,
    S: Service<Request<Full<Bytes>>, Response = Response<Incoming>, Error: Into<BoxError>>,
    S: Send,
    S::Future: Send,
{
    tower::service_fn(move |request: Request<Full<Bytes>>| {
        let pool = pool.clone();
        async move {
            let authority = request.uri().authority().ok_or("no authority")?;
            let address = authority.as_str().parse()?;
            let mut service = pool.oneshot(address).await.map_err(Into::into)?;
            let service = service.ready().await.map_err(Into::into)?;
            service.call(request).await.map_err(Into::into)
        }
    })
}

/// One HTTP/2 connection for all requests.
#[tokio::test]
async fn the_layer_works_over_a_singleton_pool() {
    for refusal in [Refusal::Small, Refusal::Endless] {
        let client = |_: &Api| {
            let connect = tower::service_fn(|address| Box::pin(connect_2(address)));
            pooled(pool::singleton::Singleton::new(connect))
        };
        assert_eq!(connections_for(client, refusal).await, 1);
    }
}

/// HTTP/1 connections, each for one request at a time. The answer is held, not the connection.
#[tokio::test]
async fn the_layer_works_over_a_cache_pool() {
    let client = |_: &Api| {
        let connect = tower::service_fn(|address| Box::pin(connect_1(address)));
        let cache = pool::cache::builder().executor(TokioExecutor::new());
        pooled(cache.build(connect))
    };
    assert_eq!(connections_for(client, Refusal::Small).await, 1);
}

#[tokio::test]
async fn the_layer_works_over_an_http_2_connection() {
    let api = Api::start(Refusal::Small).await;
    let client = layer().layer(connect_2(api.address).await.unwrap());
    let response = client.oneshot(api.request()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(api.seen(), ["token-1", "token-2"]);
}

/// The connection is not `Clone`, as the layer needs it to be; a buffer is.
#[tokio::test]
async fn the_layer_works_over_a_buffered_http_1_connection() {
    let api = Api::start(Refusal::Small).await;
    let client = ServiceBuilder::new()
        .layer(layer())
        .buffer(8)
        .service(connect_1(api.address).await.unwrap());
    let response = client.oneshot(api.request()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(api.seen(), ["token-1", "token-2"]);
}

/// hyper closes a connection whose answer is left unread: a client with only one has none for the replay.
#[tokio::test]
async fn a_long_refusal_ends_a_single_http_1_connection_unless_it_reconnects() {
    let api = Api::start(Refusal::Endless).await;
    let connection = connect_1(api.address).await.unwrap();
    let client = layer().layer(ServiceBuilder::new().buffer(8).service(connection));
    let error = client.oneshot(api.request()).await.unwrap_err();
    let error = error
        .source()
        .and_then(|error| error.downcast_ref::<hyper::Error>());
    assert!(error.is_some_and(hyper::Error::is_closed), "{error:?}");
    assert_eq!(api.seen(), ["token-1"]);

    let client = |api: &Api| {
        let connect = tower::service_fn(|address| Box::pin(connect_1(address)));
        ServiceBuilder::new()
            .buffer(8)
            .service(Reconnect::<_, SocketAddr>::new(connect, api.address))
    };
    assert_eq!(connections_for(client, Refusal::Endless).await, 2);
}
