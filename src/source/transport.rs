//! [`Transport`]: requests to the authorization server over any tower HTTP service.

use std::{error::Error, fmt, io, sync::Arc};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use tower::{ServiceExt, util::BoxCloneService};
use tower_service::Service;

use super::response::Answer;
use crate::{
    error::{BoxError, Kind, TokenError},
    sync::Mutex,
    time::Now,
};

/// Sends requests to the authorization server; clones share one prototype of the service.
#[derive(Clone)]
pub(super) struct Transport {
    // The lock spares users the need for a `Sync` service (tower's `BoxCloneService` is not). It is held only to clone
    // the service, never across an await.
    prototype: Arc<Mutex<Erased>>,
}

type Erased = BoxCloneService<Request<Full<Bytes>>, Response<Bytes>, TokenError>;

impl Transport {
    pub(super) fn new<S, B>(service: S) -> Self
    where
        S: Service<Request<Full<Bytes>>, Response = Response<B>> + Clone + Send + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send + 'static,
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<BoxError>,
    {
        let erased = service
            .map_err(|error: S::Error| broken(error.into()))
            .and_then(collect);
        Self {
            prototype: Arc::new(Mutex::new(BoxCloneService::new(erased))),
        }
    }

    /// Sends a request, and waits for the whole answer.
    pub(super) async fn send(&self, request: Request<Vec<u8>>) -> Result<Answer, TokenError> {
        let request = request.map(|body| Full::new(Bytes::from(body)));
        let mut service = self.prototype.lock().clone();
        let service = service.ready().await?;
        let sent = Now::read();
        let response = service.call(request).await?;
        Ok(Answer {
            response,
            sent,
            received: Now::read(),
        })
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").finish_non_exhaustive()
    }
}

async fn collect<B>(response: Response<B>) -> Result<Response<Bytes>, TokenError>
where
    B: Body,
    B::Error: Into<BoxError>,
{
    let (head, body) = response.into_parts();
    match Limited::new(body, BODY_LIMIT).collect().await {
        Ok(body) => Ok(Response::from_parts(head, body.to_bytes())),
        Err(error) if !error.is::<LengthLimitError>() => Err(broken(error)),
        // A page of this size is no RFC 6749 error; status and headers still tell what to do.
        Err(_) if !head.status.is_success() => Ok(Response::from_parts(head, Bytes::new())),
        Err(error) => Err(TokenError::new(Kind::Malformed)
            .with_status(head.status)
            .with_source(error)),
    }
}

/// The error for an exchange without a complete answer.
fn broken(error: BoxError) -> TokenError {
    let kind = if is_timeout(&*error) {
        Kind::Timeout
    } else {
        Kind::Transport
    };
    TokenError::new(kind).with_source(error)
}

fn is_timeout(error: &(dyn Error + 'static)) -> bool {
    std::iter::successors(Some(error), |&error| error.source()).any(|error| {
        error.is::<tower::timeout::error::Elapsed>()
            || error.is::<tokio::time::error::Elapsed>()
            || error
                .downcast_ref::<io::Error>()
                .is_some_and(|error| error.kind() == io::ErrorKind::TimedOut)
    })
}

/// How much of an answer is read. Tokens have no size limit, but a megabyte fits into no header.
const BODY_LIMIT: usize = 1024 * 1024;

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::atomic::{AtomicBool, Ordering},
    };

    use super::*;

    async fn answer_of(transport: &Transport) -> Result<Answer, TokenError> {
        transport.send(Request::new(Vec::new())).await
    }

    #[tokio::test]
    async fn an_oversized_error_page_keeps_its_status() {
        let transport = Transport::new(tower::service_fn(|_| async {
            let mut response = Response::new(Full::new(Bytes::from(vec![b' '; BODY_LIMIT + 1])));
            *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
            Ok::<_, Infallible>(response)
        }));
        let answer = answer_of(&transport).await.unwrap();
        assert_eq!(answer.response.status(), 503);
        assert!(answer.response.body().is_empty());
    }

    #[tokio::test]
    async fn a_body_at_the_limit_is_read_and_one_byte_more_is_malformed() {
        for (size, fits) in [(BODY_LIMIT, true), (BODY_LIMIT + 1, false)] {
            let transport = Transport::new(tower::service_fn(move |_| async move {
                let body = Full::new(Bytes::from(vec![b' '; size]));
                Ok::<_, Infallible>(Response::new(body))
            }));
            match answer_of(&transport).await {
                Ok(answer) => assert!(fits && answer.response.body().len() == size),
                Err(error) => assert!(!fits && error.is_malformed_response()),
            }
        }
    }

    #[tokio::test]
    async fn a_failed_service_is_a_transport_failure_and_a_late_one_a_timeout() {
        for (kind, timeout) in [
            (io::ErrorKind::ConnectionRefused, false),
            (io::ErrorKind::TimedOut, true),
        ] {
            let transport = Transport::new(tower::service_fn(move |_| async move {
                Err::<Response<Full<Bytes>>, _>(io::Error::from(kind))
            }));
            let error = answer_of(&transport).await.unwrap_err();
            assert_eq!(error.is_timeout(), timeout);
            assert_eq!(error.is_transport(), !timeout);
            assert!(error.is_transient());
        }
    }

    /// Law 7: a panic in a user's `Clone` costs one attempt.
    #[tokio::test]
    async fn a_service_whose_clone_panicked_is_cloned_again() {
        struct Fragile(Arc<AtomicBool>);
        impl Clone for Fragile {
            fn clone(&self) -> Self {
                assert!(!self.0.swap(false, Ordering::SeqCst), "clone fails once");
                Self(self.0.clone())
            }
        }
        impl Service<Request<Full<Bytes>>> for Fragile {
            type Response = Response<Full<Bytes>>;
            type Error = Infallible;
            type Future = std::future::Ready<Result<Self::Response, Infallible>>;
            fn poll_ready(
                &mut self,
                _: &mut std::task::Context<'_>,
            ) -> std::task::Poll<Result<(), Infallible>> {
                std::task::Poll::Ready(Ok(()))
            }
            fn call(&mut self, _: Request<Full<Bytes>>) -> Self::Future {
                std::future::ready(Ok(Response::new(Full::default())))
            }
        }
        let transport = Transport::new(Fragile(Arc::new(AtomicBool::new(true))));
        let first = tokio::spawn({
            let transport = transport.clone();
            async move { answer_of(&transport).await.map(drop) }
        });
        assert!(first.await.unwrap_err().is_panic());
        assert!(answer_of(&transport).await.is_ok());
    }
}
