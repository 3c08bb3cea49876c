//! Where an authorization server is, and what it understands.

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

/// The authorization server, by what the builder was told of it.
pub(super) enum Server {
    Configured(Arc<Endpoints>),
    Discovered(Box<Discovery>),
}

impl Server {
    /// Returns what is known without asking.
    pub(super) fn configured(&self) -> Option<&Endpoints> {
        match self {
            Self::Configured(endpoints) => Some(endpoints),
            Self::Discovered(_) => None,
        }
    }

    /// Returns what is known, or finds it out over `transport`, which presents no client certificate: metadata are
    /// public. `limit` bounds the search for something newer.
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

    /// Has a discovered server asked again before the next request to its endpoints.
    pub(super) fn mark_stale(&self) {
        if let Self::Discovered(discovery) = self {
            discovery.mark_stale();
        }
    }

    /// Watches one request to the endpoints.
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
                // Some servers want a key there.
                url.set_query(None);
                url.into()
            }
            Self::Discovered(discovery) => discovery.issuer.identifier.clone(),
        }
    }
}

/// What is known of an authorization server.
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

/// Reads a URL that secrets are sent to. `what` is how the message names it.
pub(super) fn parse_url(text: &str, what: &str, plain_http: bool) -> Result<Url, ConfigError> {
    let url = Url::parse(text).map_err(|error| {
        ConfigError::new(format!("the {what} URL cannot be parsed")).with_source(error)
    })?;
    check_url(&url, what, plain_http)?;
    Ok(url)
}

/// Checks a URL that secrets are sent to. `what` is how the message names it.
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
