//! The layer over a [`reqwest::Client`]: what it needs of reqwest's requests and responses.
//!
//! A [`reqwest::Request`] has no public extensions, so it can say neither what its token is for nor that it wants none.

use std::borrow::Cow;

use http::{HeaderMap, StatusCode, Uri};
use reqwest::{Body, Request, Response};

use crate::{
    message::{HttpRequest, HttpResponse, sealed},
    replay::{CloneBody, EmptyBody, Replay},
};

impl sealed::Request for Request {}
impl sealed::Response for Response {}

impl HttpRequest for Request {
    /// The very URI that reqwest makes of the URL when it sends the request.
    #[inline]
    fn uri(&self) -> Option<Cow<'_, Uri>> {
        self.url().as_str().parse().ok().map(Cow::Owned)
    }

    /// Told without the URI, which costs an allocation.
    #[inline]
    fn is_usual(&self) -> bool {
        self.url().scheme() == "https"
    }

    #[inline]
    fn headers(&self) -> &HeaderMap {
        self.headers()
    }

    #[inline]
    fn headers_mut(&mut self) -> &mut HeaderMap {
        self.headers_mut()
    }

    #[inline]
    fn extension<T: Send + Sync + 'static>(&self) -> Option<&T> {
        None
    }
}

impl HttpResponse for Response {
    #[inline]
    fn status(&self) -> StatusCode {
        self.status()
    }

    #[inline]
    fn headers(&self) -> &HeaderMap {
        self.headers()
    }
}

/// Sends a request again if its body is there as bytes, which its copies share; one that streams is sent once.
impl Replay<Request> for CloneBody {
    type Copied = Request;

    #[inline]
    fn copy(&self, request: &Request) -> Option<Self::Copied> {
        request.try_clone()
    }

    #[inline]
    fn restore(copy: Self::Copied) -> Request {
        copy
    }
}

/// Sends a request again if it has no body, or one of no bytes.
impl Replay<Request> for EmptyBody {
    type Copied = Request;

    #[inline]
    fn copy(&self, request: &Request) -> Option<Self::Copied> {
        match request.body().map(Body::as_bytes) {
            None | Some(Some([])) => request.try_clone(),
            Some(_) => None,
        }
    }

    #[inline]
    fn restore(copy: Self::Copied) -> Request {
        copy
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::Empty;
    use reqwest::{Method, Url};

    use super::*;
    use crate::{
        origin::{Disposition, Origins},
        replay::Never,
    };

    fn request(url: &str, body: Option<Body>) -> Request {
        let mut request = Request::new(Method::PUT, Url::parse(url).unwrap());
        *request.body_mut() = body;
        request
    }

    #[test]
    fn a_url_is_judged_as_the_uri_that_it_is_sent_to() {
        let table = [
            ("https://API.example.com/a?b#c", Some(Disposition::Attach)),
            ("https://b\u{fc}cher.example", Some(Disposition::Attach)),
            ("http://localhost:1/", Some(Disposition::Attach)),
            // Unlike `Uri`, `Url` reads numbers as addresses.
            ("http://127.1/", Some(Disposition::Attach)),
            ("http://2130706433/", Some(Disposition::Attach)),
            ("http://[0:0::1]/", Some(Disposition::Attach)),
            (
                "http://127.0.0.1@api.example.com/",
                Some(Disposition::Reject),
            ),
            ("http:\\\\api.example.com", Some(Disposition::Reject)),
            ("http://10.0.0.1/", Some(Disposition::Reject)),
            ("wss://api.example.com/", Some(Disposition::Reject)),
            ("api.example.com:443", Some(Disposition::Reject)),
            ("data:text/plain,a", None),
            ("file:///etc/passwd", None),
        ];
        for (url, disposition) in table {
            let request = request(url, None);
            let uri = HttpRequest::uri(&request);
            let judged = uri.map(|uri| Origins::default().judge(&uri));
            assert_eq!(judged, disposition, "{url}");
        }
    }

    #[test]
    fn a_copy_is_made_of_what_can_be_sent_again() {
        fn copies<R: Replay<Request>>(replay: R, body: Option<Body>) -> bool {
            let request = request("https://api.example.com/", body);
            let copy = replay.copy(&request).map(R::restore);
            if let Some(copy) = &copy {
                assert_eq!(
                    (copy.method(), copy.url()),
                    (request.method(), request.url())
                );
                let bytes = |body: &Body| body.as_bytes().map(<[u8]>::to_vec);
                assert_eq!(copy.body().map(bytes), request.body().map(bytes));
            }
            copy.is_some()
        }
        type Make = fn() -> Option<Body>;
        let table: [(Make, bool, bool); 4] = [
            (|| None, true, true),
            (|| Some("".into()), true, true),
            (|| Some("bytes".into()), true, false),
            // It says that it is empty, but cannot be cloned.
            (
                || Some(Body::wrap(Empty::<bytes::Bytes>::new())),
                false,
                false,
            ),
        ];
        for (number, (body, clone, empty)) in table.into_iter().enumerate() {
            assert!(!copies(Never, body()));
            assert_eq!(copies(CloneBody, body()), clone, "{number}");
            assert_eq!(copies(EmptyBody, body()), empty, "{number}");
        }
    }
}
