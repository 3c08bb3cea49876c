//! Who asks for tokens: a client of our own, or one of `oauth2`, whatever its type state.

use oauth2::{
    AuthType, EndpointSet, EndpointState, ErrorResponse, RequestTokenError, RevocableToken, Scope,
    TokenIntrospectionResponse, TokenResponse, TokenUrl,
};

use super::{
    RefreshToken,
    response::Answer,
    shared::BoxFuture,
    transport::{Answered, Channel},
};
use crate::error::TokenError;

/// Whoever asks for tokens.
pub(super) enum Client {
    /// The client of this id, whose proof is made here.
    Own(String),
    /// A client of `oauth2` that proves its identity by itself.
    OAuth2(Box<dyn ErasedClient>),
}

impl Client {
    pub(super) fn id(&self) -> &str {
        match self {
            Self::Own(id) => id,
            Self::OAuth2(client) => client.client_id(),
        }
    }
}

/// An `oauth2::Client` with a token URL, its ten type parameters erased.
pub(super) trait ErasedClient: Send + Sync {
    fn with_auth_type(self: Box<Self>, auth_type: AuthType) -> Box<dyn ErasedClient>;

    fn auth_type(&self) -> &AuthType;

    fn client_id(&self) -> &str;

    fn token_url(&self) -> &TokenUrl;

    /// Sends the request of RFC 6749 section 4.4.2.
    fn client_credentials<'a>(&'a self, sent: Sent<'a>) -> BoxFuture<'a, Answer>;

    /// Sends the request of RFC 6749 section 6.
    fn refresh_token<'a>(
        &'a self,
        token: &'a RefreshToken,
        sent: Sent<'a>,
    ) -> BoxFuture<'a, Answer>;
}

/// What goes out beside the grant itself, and how.
pub(super) struct Sent<'a> {
    pub(super) scopes: &'a [Scope],
    pub(super) params: Vec<(&'a str, &'a str)>,
    pub(super) channel: Channel,
}

impl<TE, TR, TIR, RT, TRE, Auth, DeviceAuth, Introspection, Revocation> ErasedClient
    for oauth2::Client<
        TE,
        TR,
        TIR,
        RT,
        TRE,
        Auth,
        DeviceAuth,
        Introspection,
        Revocation,
        EndpointSet,
    >
where
    TE: ErrorResponse + Send + Sync + 'static,
    TR: TokenResponse + Send + Sync + 'static,
    TIR: TokenIntrospectionResponse + Send + Sync + 'static,
    RT: RevocableToken + Send + Sync + 'static,
    TRE: ErrorResponse + Send + Sync + 'static,
    Auth: EndpointState + Send + Sync + 'static,
    DeviceAuth: EndpointState + Send + Sync + 'static,
    Introspection: EndpointState + Send + Sync + 'static,
    Revocation: EndpointState + Send + Sync + 'static,
{
    fn with_auth_type(self: Box<Self>, auth_type: AuthType) -> Box<dyn ErasedClient> {
        Box::new(self.set_auth_type(auth_type))
    }

    fn auth_type(&self) -> &AuthType {
        Self::auth_type(self)
    }

    fn client_id(&self) -> &str {
        Self::client_id(self)
    }

    fn token_url(&self) -> &TokenUrl {
        self.token_uri()
    }

    fn client_credentials<'a>(&'a self, sent: Sent<'a>) -> BoxFuture<'a, Answer> {
        Box::pin(async move {
            let mut request = self
                .exchange_client_credentials()
                .add_scopes(sent.scopes.iter().cloned());
            for (name, value) in sent.params {
                request = request.add_extra_param(name, value);
            }
            answer(request.request_async(&sent.channel).await)
        })
    }

    fn refresh_token<'a>(
        &'a self,
        token: &'a RefreshToken,
        sent: Sent<'a>,
    ) -> BoxFuture<'a, Answer> {
        Box::pin(async move {
            let token = oauth2::RefreshToken::new(token.expose_secret().to_owned());
            // Without a scope, which means the one that was granted: to ask for more is an error.
            let mut request = self.exchange_refresh_token(&token);
            for (name, value) in sent.params {
                request = request.add_extra_param(name, value);
            }
            answer(request.request_async(&sent.channel).await)
        })
    }
}

/// Takes the answer out of the error as which it passed through `oauth2`.
fn answer<T, TE: ErrorResponse + 'static>(
    outcome: Result<T, RequestTokenError<Answered, TE>>,
) -> Result<Answer, TokenError> {
    match outcome {
        Err(RequestTokenError::Request(Answered(answer))) => answer,
        // The transport succeeds at nothing, so all that is left is a request that could not be built. The
        // error is not passed on: its other variants hold bodies.
        _ => Err(TokenError::terminal("the token request could not be built")),
    }
}
