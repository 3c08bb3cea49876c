//! The layer on the clients that people use, over real connections.
#![expect(
    clippy::unwrap_used,
    reason = "clippy allows it in test functions only, not in their helpers"
)]

#[path = "../../examples/support/echo.rs"]
mod echo;
mod gateway;
mod grpc;
mod hyper;
#[cfg(feature = "reqwest")]
mod reqwest;
#[path = "../support/mod.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "shared with `it`, which uses all of it"
)]
mod support;

/// Serves `app` on this machine until the test ends, and returns its address.
async fn serve(app: axum::Router) -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

/// An address of this machine where nobody listens any more.
async fn closed() -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}
