//! Where an authorization server is, and what it supports.

use std::{sync::Arc, time::Duration};

use http::Uri;
use oauth2::{TokenUrl, url::Url};

use super::{
    discovery::{Discovery, MetadataGuard},
    transport::Transport,
};
use crate::{
    error::{ConfigError, TokenError},
    origin::is_loopback,
};

/// The authorization server, configured or to be discovered.
pub(super) enum Server {
    Configured(Arc<Endpoints>),
    Discovered(Box<Discovery>),
}

impl Server {
    /// Returns the endpoints that need no discovery.
    pub(super) fn configured(&self) -> Option<&Endpoints> {
        match self {
            Self::Configured(endpoints) => Some(endpoints),
            Self::Discovered(_) => None,
        }
    }

    /// Returns the known endpoints, or discovers them over `transport`, which presents no client certificate: metadata
    /// are public. `limit` bounds the search for newer ones.
    pub(super) async fn endpoints(
        &self,
        transport: &Transport,
        limit: Duration,
    ) -> Result<Arc<Endpoints>, TokenError> {
        match self {
            Self::Configured(endpoints) => Ok(endpoints.clone()),
            Self::Discovered(discovery) => discovery.endpoints(transport, limit).await,
        }
    }

    /// Has a discovered server's metadata fetched again before the next request.
    pub(super) fn mark_stale(&self) {
        if let Self::Discovered(discovery) = self {
            discovery.mark_stale();
        }
    }

    /// Guards one request to the endpoints.
    pub(super) fn guard(&self) -> MetadataGuard<'_> {
        match self {
            Self::Configured(_) => MetadataGuard(None),
            Self::Discovered(discovery) => MetadataGuard(Some(discovery)),
        }
    }

    /// The URL by which people know it, without its query.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Configured(endpoints) => {
                let mut url = endpoints.token_url.url().clone();
                // Some servers take a key there.
                url.set_query(None);
                url.into()
            }
            Self::Discovered(discovery) => discovery.issuer.identifier.clone(),
        }
    }
}

/// What is known about an authorization server.
#[derive(Debug)]
pub(super) struct Endpoints {
    pub(super) token_url: TokenUrl,
    pub(super) revocation_url: Option<Url>,
    #[cfg(feature = "jwt")]
    pub(super) issuer: Option<String>,
    /// The methods of client authentication by their registered names, if the server has named them.
    pub(super) auth_methods: Option<Vec<String>>,
    /// The algorithms of client assertions by their registered names, if the server has named them.
    #[cfg(feature = "jwt")]
    pub(super) algorithms: Option<Vec<String>>,
}

/// Reads a URL that secrets are sent to. `what` is its name in messages.
pub(super) fn parse_url(text: &str, what: &str, plain_http: bool) -> Result<Url, ConfigError> {
    let url = Url::parse(text).map_err(|error| {
        ConfigError::new(format!("the {what} URL cannot be parsed")).with_source(error)
    })?;
    check_url(&url, what, plain_http)?;
    Ok(url)
}

/// Checks a URL that secrets are sent to. `what` is its name in messages.
pub(super) fn check_url(url: &Url, what: &str, plain_http: bool) -> Result<(), ConfigError> {
    let secure = match url.scheme() {
        "https" => true,
        "http" => plain_http || url.host_str().is_some_and(is_loopback),
        _ => false,
    };
    let problem = if !secure {
        "must be https, or http on a loopback host; dangerous_plain_http(true) allows http on others"
    } else if !url.username().is_empty() || url.password().is_some() {
        "must not have credentials in it"
    } else if url.fragment().is_some() {
        // RFC 6749 section 3.2.
        "must not have a fragment"
    } else if url.as_str().parse::<Uri>().is_err() {
        "cannot be requested"
    } else {
        return Ok(());
    };
    Err(ConfigError::new(format!("the {what} URL {problem}")))
}
