//! A tower middleware that keeps requests supplied with OAuth 2.0 bearer tokens, with at most one token request
//! in flight.
//!
//! [`BearerAuthLayer`] wraps any `tower::Service<http::Request<B>>` of a client and attaches
//! `Authorization: Bearer ..` to each request. The token comes from an authorization server by the
//! client-credentials grant, is replaced in the background before it expires, and is shared by all: a
//! thousand requests that find no token cause one token request.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod cache;
mod challenge;
mod error;
mod future;
mod layer;
mod origin;
mod policy;
mod replay;
mod service;
mod source;
mod sync;
mod telemetry;
mod time;
mod token;

pub use crate::{
    cache::TokenCache,
    error::{BoxError, ConfigError, TokenError},
    future::ResponseFuture,
    layer::BearerAuthLayer,
    policy::RefreshPolicy,
    replay::{CloneBody, EmptyBody, Never, Replay},
    service::BearerAuth,
    source::{
        AuthMethod, ClientCredentials, ClientCredentialsBuilder, Fetch, RefreshToken, SourceFn,
        TokenResponse, TokenSource, source_fn,
    },
    token::AccessToken,
};
