//! A gRPC client whose calls carry a valid token, over a tonic channel.
//!
//! Runs on its own, in about a second: it starts an authorization server and a gRPC service that checks the token
//! of every call, and of every message of a stream, both on loopback ports.
//!
//! ```sh
//! cargo run --example tonic_channel
//! ```

use std::{error::Error, sync::Arc, time::Duration};

use http::Uri;
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{
    Code, Status,
    client::GrpcService,
    metadata::MetadataMap,
    transport::{Channel, Server},
};
use tower::ServiceBuilder;
use tower_bearer::{BearerAuthLayer, BoxError, ClientCredentials, TokenCache, TokenError};

use self::{
    echo::{EchoClient, EchoServer},
    support::Realm,
};

#[path = "support/echo.rs"]
#[allow(dead_code, reason = "it has calls of all kinds")]
mod echo;
#[allow(dead_code, reason = "shared with examples that use more of it")]
mod support;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let realm = Realm::new(Duration::from_secs(300));
    let (token_url, _) = realm.serve().await?;
    let api = serve(realm.clone()).await?;
    let source = || {
        ClientCredentials::builder(&*token_url, support::CLIENT_ID)
            .client_secret(support::CLIENT_SECRET)
            .build()
    };

    // One token for all calls of all clones.
    let tokens = TokenCache::new(source()?);
    let mut client = client(tokens.clone(), api.clone());
    client.say("hello".to_owned()).await?;
    let (sender, receiver) = mpsc::channel(1);
    let mut chat = client
        .chat(ReceiverStream::new(receiver))
        .await?
        .into_inner();
    sender.send("one".to_owned()).await?;
    assert_eq!(chat.message().await?.as_deref(), Some("one"));
    assert_eq!(realm.lock().granted(), 1);
    println!("a call and a stream      one token request, and the token on both");

    // The layer does not read the status at the end of a stream: the caller reports the token to the cache, and the
    // next call waits for another one.
    let used = tokens.peek().ok_or("there is a token")?;
    realm.lock().revoke();
    sender.send("two".to_owned()).await?;
    let status = chat.message().await.expect_err("the token was revoked");
    assert_eq!(status.code(), Code::Unauthenticated);
    assert_eq!(realm.lock().granted(), 1);
    tokens.invalidate(&used);
    client.say("hello".to_owned()).await?;
    assert_eq!(realm.lock().granted(), 2);
    println!(
        "revoked during a stream  the stream ends, the token is reported, and the next call has another"
    );

    // Without a token no call is sent, and its status says whether to try again.
    realm.lock().down = true;
    let mut early = self::client(TokenCache::new(source()?), api.clone());
    let status = early
        .say("hello".to_owned())
        .await
        .expect_err("there is no token");
    assert_eq!(status.code(), Code::Unavailable);
    let error = status
        .source()
        .and_then(|error| error.downcast_ref::<TokenError>());
    assert_eq!(
        error.and_then(TokenError::status),
        Some(http::StatusCode::SERVICE_UNAVAILABLE)
    );
    println!(
        "no token available       {:?}: {}",
        status.code(),
        status.message()
    );

    // A client that has a token goes on.
    client.say("hello".to_owned()).await?;
    realm.lock().down = false;

    // A refused call comes back to its caller, who reports the token and repeats the call.
    let tokens = TokenCache::new(source()?);
    let mut client = self::client(tokens.clone(), api);
    client.say("hello".to_owned()).await?;
    realm.lock().revoke();
    let granted = realm.lock().granted();
    repeat_if_refused(&tokens, async || client.say("hello".to_owned()).await).await?;
    assert_eq!(realm.lock().granted(), granted + 1);
    println!("revoked between calls    the call is refused, and repeated with another token");
    assert_eq!(realm.lock().anonymous, 0);
    Ok(())
}

/// Repeats a refused call. If its token were not reported, the second call might carry it, too, until another one
/// arrives.
async fn repeat_if_refused<T>(
    tokens: &TokenCache,
    mut call: impl AsyncFnMut() -> Result<T, Status>,
) -> Result<T, Status> {
    let used = tokens.peek();
    match call().await {
        Err(status) if status.code() == Code::Unauthenticated => {
            if let Some(used) = used {
                tokens.invalidate(&used);
            }
            call().await
        }
        result => result,
    }
}

/// The client: all that an application needs.
fn client(
    tokens: TokenCache,
    api: Uri,
) -> EchoClient<
    impl GrpcService<tonic::body::Body, Error = Status, ResponseBody = tonic::body::Body, Future: Send>
    + Clone,
> {
    let channel = ServiceBuilder::new()
        .map_err(to_status)
        .layer(BearerAuthLayer::new(tokens))
        .service(Channel::builder(api.clone()).connect_lazy());
    // The layer judges by the origin: without it, a channel over plain http would go unnoticed.
    EchoClient::with_origin(channel, api)
}

/// Tells errors that may pass from credentials that somebody has to correct. By itself, tonic makes both `Unknown`.
fn to_status(error: BoxError) -> Status {
    match error.downcast::<TokenError>() {
        Ok(error) => {
            let text = error.to_string();
            let mut status = match error.is_transient() {
                true => Status::unavailable(text),
                false => Status::unauthenticated(text),
            };
            status.set_source(Arc::new(*error));
            status
        }
        Err(error) => Status::from_error(error),
    }
}

/// Starts the gRPC service and returns its URI.
async fn serve(realm: Realm) -> Result<Uri, BoxError> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let uri = format!("http://{}", listener.local_addr()?).parse()?;
    let admit = move |metadata: &MetadataMap| {
        let checked = realm.lock().check(metadata.as_ref());
        checked.map_err(Status::unauthenticated)
    };
    let server = Server::builder()
        .add_service(EchoServer::new(admit))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    Ok(uri)
}
