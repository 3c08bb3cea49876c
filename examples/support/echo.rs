//! A gRPC service written by hand as `tonic-build` would generate it, except that its messages are plain strings.
//!
//! It echoes messages in all four kinds of calls, to callers that it admits.

use std::{
    convert::Infallible,
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, BufMut};
use http::{Uri, uri::PathAndQuery};
use tokio_stream::{Stream, StreamExt};
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    client::GrpcService,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    metadata::MetadataMap,
    server::NamedService,
};
use tower::{Service, service_fn};

const SAY: &str = "/echo.Echo/Say";
const SPELL: &str = "/echo.Echo/Spell";
const JOIN: &str = "/echo.Echo/Join";
const CHAT: &str = "/echo.Echo/Chat";

/// The client's side.
#[derive(Clone)]
pub(crate) struct EchoClient<T> {
    inner: tonic::client::Grpc<T>,
}

impl<T> EchoClient<T>
where
    T: GrpcService<Body>,
    T::ResponseBody: http_body::Body + Send + 'static,
    <T::ResponseBody as http_body::Body>::Error: Into<tower::BoxError>,
{
    pub(crate) fn new(inner: T) -> Self {
        Self {
            inner: tonic::client::Grpc::new(inner),
        }
    }

    /// A client whose requests name this origin.
    pub(crate) fn with_origin(inner: T, origin: Uri) -> Self {
        Self {
            inner: tonic::client::Grpc::with_origin(inner, origin),
        }
    }

    /// Unary: one message, and the same one back.
    pub(crate) async fn say(
        &mut self,
        request: impl tonic::IntoRequest<String>,
    ) -> Result<Response<String>, Status> {
        self.ready().await?;
        let path = PathAndQuery::from_static(SAY);
        self.inner.unary(request.into_request(), path, Text).await
    }

    /// Server streaming: one message, and its characters back, one by one.
    pub(crate) async fn spell(
        &mut self,
        request: impl tonic::IntoRequest<String>,
    ) -> Result<Response<Streaming<String>>, Status> {
        self.ready().await?;
        let path = PathAndQuery::from_static(SPELL);
        let request = request.into_request();
        self.inner.server_streaming(request, path, Text).await
    }

    /// Client streaming: many messages, and all of them back in one.
    pub(crate) async fn join(
        &mut self,
        request: impl tonic::IntoStreamingRequest<Message = String>,
    ) -> Result<Response<String>, Status> {
        self.ready().await?;
        let path = PathAndQuery::from_static(JOIN);
        let request = request.into_streaming_request();
        self.inner.client_streaming(request, path, Text).await
    }

    /// Bidirectional streaming: each message comes back before the next is sent.
    pub(crate) async fn chat(
        &mut self,
        request: impl tonic::IntoStreamingRequest<Message = String>,
    ) -> Result<Response<Streaming<String>>, Status> {
        self.ready().await?;
        let path = PathAndQuery::from_static(CHAT);
        let request = request.into_streaming_request();
        self.inner.streaming(request, path, Text).await
    }

    async fn ready(&mut self) -> Result<(), Status> {
        let ready = self.inner.ready().await;
        ready.map_err(|error| Status::from_error(error.into()))
    }
}

/// The server's side; `admit` runs when a call begins, and again for each message of a chat.
#[derive(Clone)]
pub(crate) struct EchoServer<A> {
    admit: A,
}

impl<A> EchoServer<A>
where
    A: Fn(&MetadataMap) -> Result<(), Status> + Clone + Send + Sync + 'static,
{
    pub(crate) fn new(admit: A) -> Self {
        Self { admit }
    }

    async fn answer(self, request: http::Request<Body>) -> http::Response<Body> {
        let mut grpc = tonic::server::Grpc::new(Text);
        match request.uri().path() {
            SAY => {
                let say = service_fn(|request: Request<String>| self.say(request));
                grpc.unary(say, request).await
            }
            SPELL => {
                let spell = service_fn(|request: Request<String>| self.spell(request));
                grpc.server_streaming(spell, request).await
            }
            JOIN => {
                let join = service_fn(|request: Request<Streaming<String>>| self.join(request));
                grpc.client_streaming(join, request).await
            }
            CHAT => {
                let chat = service_fn(|request: Request<Streaming<String>>| self.chat(request));
                grpc.streaming(chat, request).await
            }
            _ => Status::unimplemented("no such method").into_http(),
        }
    }

    async fn say(&self, request: Request<String>) -> Result<Response<String>, Status> {
        (self.admit)(request.metadata())?;
        Ok(Response::new(request.into_inner()))
    }

    async fn spell(
        &self,
        request: Request<String>,
    ) -> Result<Response<impl Stream<Item = Result<String, Status>> + Send + use<A>>, Status> {
        let (metadata, _, message) = request.into_parts();
        (self.admit)(&metadata)?;
        let letters: Vec<_> = message
            .chars()
            .map(|letter| Ok(letter.to_string()))
            .collect();
        Ok(Response::new(tokio_stream::iter(letters)))
    }

    async fn join(&self, request: Request<Streaming<String>>) -> Result<Response<String>, Status> {
        (self.admit)(request.metadata())?;
        let parts = request.into_inner().collect::<Result<Vec<_>, _>>().await?;
        Ok(Response::new(parts.concat()))
    }

    async fn chat(
        &self,
        request: Request<Streaming<String>>,
    ) -> Result<Response<impl Stream<Item = Result<String, Status>> + Send + use<A>>, Status> {
        let (metadata, _, messages) = request.into_parts();
        (self.admit)(&metadata)?;
        let admit = self.admit.clone();
        let answers = messages.map(move |message| {
            admit(&metadata)?;
            message
        });
        Ok(Response::new(answers))
    }
}

impl<A> NamedService for EchoServer<A> {
    const NAME: &'static str = "echo.Echo";
}

impl<A> Service<http::Request<Body>> for EchoServer<A>
where
    A: Fn(&MetadataMap) -> Result<(), Status> + Clone + Send + Sync + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let server = self.clone();
        Box::pin(async move { Ok(server.answer(request).await) })
    }
}

/// Encodes messages as plain UTF-8.
#[derive(Clone, Copy)]
struct Text;

impl Codec for Text {
    type Encode = String;
    type Decode = String;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Text {
    type Item = String;
    type Error = Status;

    fn encode(&mut self, item: String, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(item.as_bytes());
        Ok(())
    }
}

impl Decoder for Text {
    type Item = String;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<String>, Status> {
        let bytes = buffer.copy_to_bytes(buffer.remaining());
        let text = String::from_utf8(bytes.into());
        text.map(Some)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error).into())
    }
}
