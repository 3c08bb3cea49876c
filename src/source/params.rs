//! The parameters of a token request: those of its source, and those of the [`TokenRequest`].

use std::borrow::Cow;

use oauth2::{Scope, url::Url};
use serde_json::{Map, Value};

use super::TokenRequest;
use crate::error::{ConfigError, TokenError};

/// What a token request asks for, once checked.
#[derive(Clone, Debug, Default)]
pub(super) struct RequestParams {
    pub(super) scopes: Vec<Scope>,
    resources: Vec<String>,
    params: Vec<(String, String)>,
}

impl RequestParams {
    /// Checks what a source or a request asks for.
    ///
    /// A parameter `resource` is a resource too, but may be any text: that of Entra ID's first endpoint and of AD FS is
    /// older than RFC 8707, and often a GUID.
    pub(super) fn new<'a>(
        scopes: impl Iterator<Item = &'a str>,
        resources: impl Iterator<Item = &'a str>,
        params: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, ConfigError> {
        let mut checked = Self {
            scopes: scopes
                .flat_map(|scope| scope.split(' '))
                .map(scope_token)
                .collect::<Result<_, _>>()?,
            resources: resources.map(resource).collect::<Result<_, _>>()?,
            params: Vec::new(),
        };
        for (name, value) in params {
            check_param(name)?;
            if name == "resource" {
                checked.resources.push(value.to_owned());
            } else {
                checked.params.push((name.to_owned(), value.to_owned()));
            }
        }
        Ok(checked)
    }

    /// The parameters for `request`: what it names replaces the source's.
    ///
    /// # Errors
    ///
    /// A terminal one if the request names something invalid.
    pub(super) fn for_request(
        &self,
        request: &TokenRequest,
        claims: Option<&str>,
    ) -> Result<Cow<'_, Self>, TokenError> {
        // Most requests name nothing.
        if claims.is_none()
            && request.scopes().len() + request.resources().len() + request.params().len() == 0
        {
            return Ok(Cow::Borrowed(self));
        }
        let own = Self::new(request.scopes(), request.resources(), request.params())
            .map_err(TokenError::terminal)?;
        let mut params = self.clone();
        if !own.scopes.is_empty() {
            params.scopes = own.scopes;
        }
        if !own.resources.is_empty() {
            params.resources = own.resources;
        }
        // RFC 6749 section 3.2: none twice, so a name's values are either the source's or the request's.
        params
            .params
            .retain(|(name, _)| !own.params.iter().any(|(other, _)| other == name));
        params.params.extend(own.params);
        if let Some(claims) = claims {
            params.add_claims(claims);
        }
        Ok(Cow::Owned(params))
    }

    /// Adds claims that the API demands to the configured ones.
    ///
    /// The latter name the client's capabilities, without which the server would not meet the demand. Anything but a
    /// JSON object is left out: no API that knows the protocol sends it.
    fn add_claims(&mut self, claims: &str) {
        let Ok(demanded) = serde_json::from_str::<Map<String, Value>>(claims) else {
            return;
        };
        let configured = self
            .params
            .iter()
            .find(|(name, _)| name == CLAIMS)
            .and_then(|(_, value)| serde_json::from_str::<Map<String, Value>>(value).ok());
        let claims = match configured {
            Some(mut configured) => {
                merge(&mut configured, demanded);
                Value::Object(configured).to_string()
            }
            None => claims.to_owned(),
        };
        self.params.retain(|(name, _)| name != CLAIMS);
        self.params.push((CLAIMS.to_owned(), claims));
    }

    /// The scopes in the form of RFC 6749 section 3.3, if there are any.
    pub(super) fn scope(&self) -> Option<String> {
        let scopes: Vec<&str> = self.scopes.iter().map(|scope| scope.as_str()).collect();
        (!scopes.is_empty()).then(|| scopes.join(" "))
    }

    /// The parameters of both grants.
    pub(super) fn extra_params(&self) -> impl Iterator<Item = (&str, &str)> {
        let resources = self.resources.iter().map(|uri| ("resource", uri.as_str()));
        resources.chain(pairs(&self.params))
    }
}

/// Puts each member of `other` into `object`, and merges members that are objects in both.
fn merge(object: &mut Map<String, Value>, other: Map<String, Value>) {
    for (name, value) in other {
        match (object.get_mut(&name), value) {
            (Some(Value::Object(inner)), Value::Object(value)) => merge(inner, value),
            (_, value) => {
                object.insert(name, value);
            }
        }
    }
}

// No message repeats a value: a misplaced one may be the secret.

/// Reads a `scope-token` of RFC 6749 section 3.3.
fn scope_token(token: &str) -> Result<Scope, ConfigError> {
    let is_allowed = |byte| matches!(byte, 0x21 | 0x23..=0x5B | 0x5D..=0x7E);
    if token.is_empty() || !token.bytes().all(is_allowed) {
        return Err(ConfigError::new(
            "a scope is empty or has a character that RFC 6749 section 3.3 rules out",
        ));
    }
    Ok(Scope::new(token.to_owned()))
}

/// Reads a resource indicator of RFC 8707 section 2, which is sent as it was written.
fn resource(uri: &str) -> Result<String, ConfigError> {
    let is_uri = uri.bytes().all(|byte| byte.is_ascii_graphic()) && !uri.contains('#');
    if !is_uri || Url::parse(uri).is_err() {
        return Err(ConfigError::new(
            "a resource is not an absolute URI without a fragment (RFC 8707 section 2)",
        ));
    }
    Ok(uri.to_owned())
}

/// RFC 6749 section 3.2: no parameter twice, so those that the request itself sets are refused.
fn check_param(name: &str) -> Result<(), ConfigError> {
    if name.is_empty() {
        return Err(ConfigError::new("a parameter has no name"));
    }
    match OWN_PARAMS.iter().find(|own| **own == name) {
        Some(own) => Err(ConfigError::new(format!(
            "the parameter {own} is set by the token request itself"
        ))),
        None => Ok(()),
    }
}

pub(super) fn pairs(params: &[(String, String)]) -> impl ExactSizeIterator<Item = (&str, &str)> {
    params.iter().map(|(name, value)| (&**name, &**value))
}

/// The names of parameters, whose values may be secret.
pub(super) fn param_names<'a>(
    params: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Vec<&'a str> {
    params.into_iter().map(|(name, _)| name).collect()
}

/// OpenID Connect Core section 5.5.
const CLAIMS: &str = "claims";

const OWN_PARAMS: [&str; 7] = [
    "grant_type",
    "scope",
    "client_id",
    "client_secret",
    "client_assertion",
    "client_assertion_type",
    "refresh_token",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(resources: &[&str], params: &[(&str, &str)]) -> Result<RequestParams, ConfigError> {
        RequestParams::new(
            ["configured"].into_iter(),
            resources.iter().copied(),
            params.iter().copied(),
        )
    }

    #[test]
    fn a_resource_is_an_absolute_uri_without_a_fragment() {
        for (uri, good) in [
            ("https://api.example.com/", true),
            ("https://api.example.com/a?b=c", true),
            ("urn:example:api", true),
            ("api://0000-1111", true),
            ("https://api.example.com/#a", false),
            ("https://api.example.com/#", false),
            ("/api", false),
            ("api.example.com", false),
            ("", false),
            (" https://api.example.com", false),
            ("https://api.example.com/\n", false),
        ] {
            assert_eq!(checked(&[uri], &[]).is_ok(), good, "{uri:?}");
        }
    }

    #[test]
    fn a_parameter_named_resource_may_be_any_text() {
        let guid = "2ff814a6-3304-4ab8-85cb-cd0e6f879c1d";
        let of_source = checked(&[], &[("resource", guid)]).unwrap();
        let of = |request| {
            let params = of_source.for_request(&request, None).unwrap();
            let params: Vec<_> = params
                .extra_params()
                .map(|(n, v)| format!("{n}={v}"))
                .collect();
            params.join("&")
        };
        assert_eq!(of(TokenRequest::new()), format!("resource={guid}"));
        // One that a request names replaces it, either way.
        let other = TokenRequest::new().resource("urn:b");
        assert_eq!(of(other), "resource=urn:b");
        let other = TokenRequest::new().param("resource", "b");
        assert_eq!(of(other), "resource=b");
    }

    #[test]
    fn demanded_claims_join_the_configured_ones() {
        let capabilities = r#"{"access_token":{"xms_cc":{"values":["CP1"]}}}"#;
        let demanded = r#"{"access_token":{"nbf":{"essential":true,"value":"1"}}}"#;
        let both = r#"{"access_token":{"nbf":{"essential":true,"value":"1"},"xms_cc":{"values":["CP1"]}}}"#;
        for (configured, demanded, expected) in [
            (None, demanded, Some(demanded)),
            (Some(capabilities), demanded, Some(both)),
            (
                Some(r#"{"a":{"b":1,"c":2}}"#),
                r#"{"a":{"b":3}}"#,
                Some(r#"{"a":{"b":3,"c":2}}"#),
            ),
            (Some("no JSON"), demanded, Some(demanded)),
            (Some(capabilities), "no JSON", Some(capabilities)),
            (Some(capabilities), "[1]", Some(capabilities)),
            (None, "no JSON", None),
        ] {
            let params: Vec<_> = configured
                .map(|claims| (CLAIMS, claims))
                .into_iter()
                .collect();
            // From the source, and from the request.
            let of_source = checked(&[], &params).unwrap();
            let plain = TokenRequest::new();
            let request = params
                .iter()
                .fold(plain.clone(), |request, (n, v)| request.param(*n, *v));
            let of_request = checked(&[], &[]).unwrap();
            for params in [
                of_source.for_request(&plain, Some(demanded)).unwrap(),
                of_request.for_request(&request, Some(demanded)).unwrap(),
            ] {
                let claims: Vec<_> = params.extra_params().map(|(_, value)| value).collect();
                assert_eq!(claims, expected.into_iter().collect::<Vec<_>>());
            }
        }
    }
}
