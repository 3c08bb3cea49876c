//! [`TokenEndpoint`]: what [`ClientCredentials`](tower_bearer::ClientCredentials) use in place of a connection.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use tower::Service;
use tower_bearer::BoxError;

/// A token endpoint in memory that remembers what it was sent. Clones are one endpoint.
#[derive(Clone)]
pub struct TokenEndpoint {
    answer: Arc<dyn Fn(Request<String>) -> Answering + Send + Sync>,
    bodies: Arc<Mutex<Vec<String>>>,
}

type Answering = Pin<Box<dyn Future<Output = Result<Response<String>, BoxError>> + Send>>;

impl TokenEndpoint {
    /// An endpoint that reads a request and then gives this answer.
    pub fn new<F>(answer: impl Fn(Request<String>) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Response<String>, BoxError>> + Send + 'static,
    {
        Self {
            answer: Arc::new(move |request| Box::pin(answer(request))),
            bodies: Arc::default(),
        }
    }

    /// The bodies of all requests, in order.
    pub fn bodies(&self) -> Vec<String> {
        self.bodies.lock().unwrap().clone()
    }
}

impl Service<Request<Full<Bytes>>> for TokenEndpoint {
    type Response = Response<String>;
    type Error = BoxError;
    type Future = Answering;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Full<Bytes>>) -> Self::Future {
        let endpoint = self.clone();
        Box::pin(async move {
            let (head, body) = request.into_parts();
            let body = String::from_utf8(body.collect().await?.to_bytes().into())?;
            endpoint.bodies.lock().unwrap().push(body.clone());
            (endpoint.answer)(Request::from_parts(head, body)).await
        })
    }
}

/// An answer with this status and body.
pub fn reply(status: u16, body: impl Into<String>) -> Result<Response<String>, BoxError> {
    Ok(Response::builder().status(status).body(body.into())?)
}
