//! Where an authorization server is, and what it understands.

use http::Uri;
use oauth2::{TokenUrl, url::Url};

use crate::{error::ConfigError, origin::is_loopback};

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
