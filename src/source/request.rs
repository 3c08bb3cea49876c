//! Requests to the authorization server, built by `oauth2`.
//!
//! `oauth2` could send them too. But it reads answers strictly, loses status and headers, and keeps the body of what it
//! cannot read in its error, where `Debug` shows the token. So it gets an HTTP client that sends nothing, [`Capture`];
//! [`transport`](super::transport) and [`response`](super::response) do the rest.

use std::{cell::Cell, fmt};

use http::header::AUTHORIZATION;
use oauth2::{
    AuthType, ClientId, ClientSecret, EndpointNotSet, EndpointSet, HttpRequest, HttpResponse,
    Scope, SyncHttpClient, TokenUrl,
    basic::BasicClient,
    url::{Url, form_urlencoded},
};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::{RefreshToken, auth::Authentication, params::RequestParams};
use crate::error::TokenError;

/// A client's request to the authorization server.
#[derive(Clone, Copy)]
pub(super) enum Request<'a> {
    /// RFC 6749 section 4.4.2.
    ClientCredentials(&'a RequestParams),
    /// RFC 6749 section 6.
    RefreshToken(&'a RefreshToken, &'a RequestParams),
    /// RFC 7009 section 2.1.
    Revocation {
        url: &'a Url,
        token: &'a str,
        hint: &'static str,
    },
}

impl Request<'_> {
    /// Builds the request of this client with this authentication.
    pub(super) fn build(
        self,
        client_id: &str,
        authentication: Authentication,
        token_url: &TokenUrl,
    ) -> Result<HttpRequest, TokenError> {
        let client = BasicClient::new(ClientId::new(client_id.to_owned()))
            .set_token_uri(token_url.clone())
            .set_auth_type(AuthType::RequestBody);
        let (client, header, auth) = match authentication {
            Authentication::Params(params) => (client, None, params),
            Authentication::Header(header) => {
                // Keeps the id out of the body. The resulting header is replaced.
                let client = client
                    .set_auth_type(AuthType::BasicAuth)
                    .set_client_secret(ClientSecret::new(String::new()));
                (client, Some(header), Vec::new())
            }
        };
        let auth = auth
            .iter()
            .map(|(name, value)| (*name, value.expose_secret()));
        let mut request = match self {
            Self::ClientCredentials(params) => {
                client_credentials(&client, &params.scopes, auth.chain(params.extra_params()))
            }
            Self::RefreshToken(token, params) => {
                refresh_token(&client, token, auth.chain(params.extra_params()))
            }
            Self::Revocation { url, token, hint } => {
                let params = [("token", token), ("token_type_hint", hint)];
                client_credentials(&client, &[], auth.chain(params))
                    .map(|request| divert(request, url))
            }
        }?;
        if let Some(header) = header {
            request.headers_mut().insert(AUTHORIZATION, header);
        }
        Ok(request)
    }
}

type Client =
    BasicClient<EndpointNotSet, EndpointNotSet, EndpointNotSet, EndpointNotSet, EndpointSet>;

fn client_credentials<'a>(
    client: &Client,
    scopes: &[Scope],
    params: impl Iterator<Item = (&'a str, &'a str)>,
) -> Result<HttpRequest, TokenError> {
    let mut request = client
        .exchange_client_credentials()
        .add_scopes(scopes.iter().cloned());
    for (name, value) in params {
        request = request.add_extra_param(name, value);
    }
    captured(|capture| request.request(capture))
}

/// Without a scope, which means the granted one: asking for more is an error.
fn refresh_token<'a>(
    client: &Client,
    token: &RefreshToken,
    params: impl Iterator<Item = (&'a str, &'a str)>,
) -> Result<HttpRequest, TokenError> {
    let token = oauth2::RefreshToken::new(token.expose_secret().to_owned());
    let mut request = client.exchange_refresh_token(&token);
    for (name, value) in params {
        request = request.add_extra_param(name, value);
    }
    captured(|capture| request.request(capture))
}

/// Turns a token request into one to another endpoint, without a grant.
///
/// `oauth2` builds revocations too, but only for `https`.
fn divert(mut request: HttpRequest, url: &Url) -> HttpRequest {
    *request.uri_mut() = url.as_str().parse().expect("the URL was checked");
    let params = form_urlencoded::parse(request.body()).filter(|(name, _)| name != "grant_type");
    let body = form_urlencoded::Serializer::new(String::new())
        .extend_pairs(params)
        .finish();
    *request.body_mut() = body.into_bytes();
    request
}

/// Keeps its request instead of sending it.
#[derive(Default)]
pub(super) struct Capture(Cell<Option<HttpRequest>>);

impl SyncHttpClient for Capture {
    type Error = fmt::Error;

    fn call(&self, request: HttpRequest) -> Result<HttpResponse, fmt::Error> {
        self.0.set(Some(request));
        Err(fmt::Error)
    }
}

/// Returns the request that `send` tries to send.
fn captured<T>(send: impl FnOnce(&Capture) -> T) -> Result<HttpRequest, TokenError> {
    let capture = Capture::default();
    send(&capture);
    let request = capture.0.take();
    request.ok_or_else(|| TokenError::terminal("the token request could not be built"))
}

/// Returns the secret in the body of the request that `send` tries to send. A client of `oauth2` has no getter for it.
pub(super) fn secret_in_body<T>(send: impl FnOnce(&Capture) -> T) -> Option<SecretString> {
    let body = Zeroizing::new(captured(send).ok()?.into_body());
    let secret = form_urlencoded::parse(&body).find(|(name, _)| name == "client_secret");
    secret.map(|(_, secret)| secret.into_owned().into())
}
