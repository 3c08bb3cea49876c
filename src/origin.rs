//! Which URIs may carry the token.
//!
//! A token sent over plain http, or to the wrong host, is given away (RFC 6750 section 5.3). So this is decided from
//! each request's own URI, before a token is requested.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use http::{
    Uri,
    uri::{Authority, Scheme},
};

use crate::error::{ConfigError, Kind, TokenError};

/// The rule that a layer applies to the URIs of its requests.
///
/// By default every https and every loopback origin carries the token.
#[derive(Clone, Debug, Default)]
pub(crate) struct Origins {
    pinned: Option<Arc<[Origin]>>,
    plain_http: bool,
}

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disposition {
    /// Attach the token.
    Attach,
    /// Send it without a token: its origin is not pinned.
    Bare,
    /// Do not send it: the token could be read on the way.
    Reject,
}

impl Origins {
    /// Lets only these origins carry the token, each written as `https://api.example.com`.
    pub(crate) fn pin<I>(self, origins: I) -> Result<Self, ConfigError>
    where
        I: IntoIterator<Item: AsRef<str>>,
    {
        let pinned = (1..)
            .zip(origins)
            .map(|(position, origin)| {
                // The text is not shown: it may hold a password.
                Origin::parse(origin.as_ref())
                    .map_err(|fault| ConfigError::new(format!("origin {position} {fault}")))
            })
            .collect::<Result<Arc<[_]>, _>>()?;
        if pinned.is_empty() {
            return Err(ConfigError::new(
                "no origin is pinned, so that no request would carry the token",
            ));
        }
        Ok(Self {
            pinned: Some(pinned),
            ..self
        })
    }

    /// Lets the token go over plain http to any host that may otherwise get it.
    pub(crate) fn plain_http(self, plain_http: bool) -> Self {
        Self { plain_http, ..self }
    }

    pub(crate) fn are_pinned(&self) -> bool {
        self.pinned.is_some()
    }

    /// Judges a request by its URI. Runs on every request, before the cache is used.
    #[inline]
    pub(crate) fn judge(&self, uri: &Uri) -> Disposition {
        // The common case.
        if self.pinned.is_none() && uri.scheme_str() == Some("https") {
            return Disposition::Attach;
        }
        self.judge_slow(uri)
    }

    fn judge_slow(&self, uri: &Uri) -> Disposition {
        // Such a request goes only to the host that the service below is bound to.
        let Some(authority) = uri.authority() else {
            return Disposition::Attach;
        };
        let is_safe = match &self.pinned {
            Some(pinned) => match Origin::find(pinned, uri, authority) {
                Some(origin) => origin.is_safe || self.plain_http,
                None => return Disposition::Bare,
            },
            // `Uri` parses a scheme of any case to these two. One built from the part "HTTPS" equals neither, and a
            // connector that compares the same way may send it in the clear.
            None => match uri.scheme_str() {
                Some("https") => true,
                Some("http") => self.plain_http || is_loopback_authority(authority),
                _ => false,
            },
        };
        if is_safe {
            Disposition::Attach
        } else {
            Disposition::Reject
        }
    }
}

/// The error of a request whose [`Disposition`] is [`Reject`](Disposition::Reject).
pub(crate) fn insecure_uri(uri: &Uri) -> TokenError {
    // Shows only what the rule used: userinfo, path and query may be secrets.
    let scheme = uri.scheme_str().unwrap_or("(no scheme)");
    let host = uri.host().unwrap_or_default();
    TokenError::new(Kind::Insecure).with_source(format!(
        "{scheme}://{host} is not known to be safe from being read on the way"
    ))
}

/// Whether an authority is this machine's.
///
/// Nothing but a port may follow the host: a connector that reads `[::1]evil.example` in another way than [`Uri::host`]
/// would connect elsewhere.
fn is_loopback_authority(authority: &Authority) -> bool {
    let is_host_and_port = |text: &str, host: &str| {
        let port = text.strip_prefix(host);
        port.is_some_and(|port| match port.as_bytes() {
            [] => true,
            // Anything else may be a password, with the host still to come.
            [b':', port @ ..] => port.iter().all(u8::is_ascii_digit),
            _ => false,
        })
    };
    let text = authority.as_str();
    // The usual spellings are recognized without searching for the host's bounds, which takes half as long as the
    // header does.
    if LOOPBACK.iter().any(|host| is_host_and_port(text, host)) {
        return true;
    }
    let host = authority.host();
    let userinfo = text.rfind('@').map_or(0, |at| at + 1);
    is_loopback(host) && is_host_and_port(&text[userinfo..], host)
}

/// The usual spellings of this machine.
const LOOPBACK: [&str; 3] = ["127.0.0.1", "localhost", "[::1]"];

/// Whether a URI's host is this machine, so that nobody can listen on the way.
///
/// Names are not resolved, and only `localhost` is trusted: whoever runs the resolver could make any other name a
/// loopback one today and not tomorrow.
pub(crate) fn is_loopback(host: &str) -> bool {
    if let Some(address) = ipv6(host) {
        // Canonical, since the operating system takes `[::ffff:127.0.0.1]` for 127.0.0.1.
        return address.to_canonical().is_loopback();
    }
    match host.parse::<Ipv4Addr>() {
        Ok(address) => address.is_loopback(),
        Err(_) => host.eq_ignore_ascii_case("localhost"),
    }
}

/// A scheme, a host and an explicit port (RFC 6454 section 4).
#[derive(Clone, Debug)]
struct Origin {
    scheme: Scheme,
    /// As written in the entry, for a quick comparison.
    authority: Box<str>,
    host: Box<str>,
    port: u16,
    /// Whether nobody can read on the way what is sent to it.
    is_safe: bool,
}

impl Origin {
    /// Parses an entry of the pinned list, or says what is wrong with it.
    fn parse(text: &str) -> Result<Self, &'static str> {
        let uri: Uri = text
            .parse()
            .map_err(|_| "is not a URI with a scheme and a host")?;
        let authority = uri.authority().ok_or("has no host")?;
        let scheme = uri.scheme().ok_or("has no scheme")?;
        let default_port = default_port(scheme).ok_or("is neither https nor http")?;
        let host = authority.host();
        if authority.as_str().contains('@') {
            return Err("has userinfo");
        }
        if host.is_empty() {
            return Err("has no host");
        }
        if host.contains('*') {
            return Err("has a wildcard, and there are none");
        }
        // `Uri` drops a fragment silently.
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() || text.contains('#') {
            return Err("has a path, a query or a fragment");
        }
        let port = port(authority, host, default_port).ok_or("has no valid port after its host")?;
        Ok(Self {
            scheme: scheme.clone(),
            authority: authority.as_str().into(),
            host: host.into(),
            port,
            is_safe: *scheme == Scheme::HTTPS || is_loopback(host),
        })
    }

    /// The pinned origin of a URI with this authority, if any.
    fn find<'a>(pinned: &'a [Self], uri: &Uri, authority: &Authority) -> Option<&'a Self> {
        let scheme = uri.scheme()?;
        // First by spelling: splitting an authority costs as much as the header does, so it is done once and not for
        // each origin. The scheme is compared last, since it differs least often.
        let same_spelling =
            |origin: &&Self| *origin.authority == *authority.as_str() && origin.scheme == *scheme;
        pinned.iter().find(same_spelling).or_else(|| {
            let host = authority.host();
            let port = port(authority, host, default_port(scheme)?)?;
            pinned.iter().find(|origin| {
                origin.port == port && is_same_host(&origin.host, host) && origin.scheme == *scheme
            })
        })
    }
}

fn is_same_host(a: &str, b: &str) -> bool {
    // An IPv6 address has many spellings.
    a.eq_ignore_ascii_case(b) || ipv6(a).is_some_and(|a| ipv6(b) == Some(a))
}

/// Reads an IPv6 literal in brackets, as in a URI.
fn ipv6(host: &str) -> Option<Ipv6Addr> {
    host.strip_prefix('[')?.strip_suffix(']')?.parse().ok()
}

fn default_port(scheme: &Scheme) -> Option<u16> {
    if *scheme == Scheme::HTTPS {
        Some(443)
    } else if *scheme == Scheme::HTTP {
        Some(80)
    } else {
        None
    }
}

/// The port of an authority with this host, or `None` if no valid port follows the host.
fn port(authority: &Authority, host: &str, default: u16) -> Option<u16> {
    // `port_u16` does not tell an absent port from one out of range, and a connector may take the latter for anything.
    let host_and_port = authority.as_str().rsplit('@').next()?;
    match host_and_port.strip_prefix(host)? {
        "" => Some(default),
        rest => rest.strip_prefix(':')?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use proptest::prelude::*;

    use super::{Disposition::*, *};

    fn pin(origins: &[&str]) -> Origins {
        Origins::default().pin(origins).unwrap()
    }

    fn assert_all(origins: &Origins, table: &[(&str, Disposition)]) {
        for (uri, disposition) in table {
            let parsed: Uri = uri.parse().unwrap();
            assert_eq!(origins.judge(&parsed), *disposition, "{uri} by {origins:?}");
        }
    }

    // Law 9: never elsewhere. The token goes only to allowed origins, over https, loopback excepted.
    #[test]
    fn https_loopback_and_bound_services_carry_the_token() {
        let table = [
            ("https://api.example.com/a?b=c", Attach),
            ("HTTPS://API.EXAMPLE.COM/", Attach),
            ("https://api.example.com:8443/", Attach),
            ("https://user:password@api.example.com/", Attach),
            ("https://[2001:db8::1]/", Attach),
            ("/a?b=c", Attach),
            ("*", Attach),
            ("//evil.example/a", Attach), // A path, to `Uri`.
            ("http://localhost/", Attach),
            ("http://LocalHost:8080/", Attach),
            ("HTTP://localhost/", Attach),
            ("http://127.0.0.1/", Attach),
            ("http://127.255.255.254:1/", Attach),
            ("http://[::1]:80/", Attach),
            ("http://[0:0:0:0:0:0:0:1]/", Attach),
            ("http://[::ffff:127.0.0.1]/", Attach),
            ("http://[::FFFF:7f00:1]/", Attach),
            ("http://user@[::1]/", Attach),
            ("http://user:password@LOCALHOST:80/", Attach),
            ("http://LOCALHOST:/", Attach),
        ];
        assert_all(&Origins::default(), &table);
    }

    #[test]
    fn everything_else_is_refused() {
        let table = [
            ("http://api.example.com/", Reject),
            ("http://api.example.com:443/", Reject),
            ("http://10.0.0.1/", Reject),
            ("http://0.0.0.0/", Reject),
            ("http://[::]/", Reject),
            ("http://[::ffff:10.0.0.1]/", Reject),
            // Not what it looks like.
            ("http://localhost@evil.example/", Reject),
            ("http://localhost:80@evil.example/", Reject),
            ("http://[::1]@evil.example/", Reject),
            ("http://a@localhost@evil.example/", Reject),
            ("http://localhost.evil.example/", Reject),
            ("http://evil.example.localhost.", Reject),
            ("http://notlocalhost/", Reject),
            ("http://127.0.0.1.evil.example/", Reject),
            ("http://127.evil.example/", Reject),
            ("http://[::1]evil.example/", Reject),
            ("http://[::1].evil.example/", Reject),
            ("http://user@[::1]evil.example/", Reject),
            ("http://localhost:evil.example/", Reject),
            // What some resolver may call this machine.
            ("http://localhost./", Reject),
            ("http://127.0.0.1./", Reject),
            ("http://127.1/", Reject),
            ("http://2130706433/", Reject),
            ("http://0177.0.0.1/", Reject),
            ("http://[127.0.0.1]/", Reject),
            ("http://[::1%25lo]/", Reject),
            // Other schemes, or none.
            ("ws://localhost/", Reject),
            ("wss://api.example.com/", Reject),
            ("ftp://localhost/", Reject),
            ("api.example.com:443", Reject),
        ];
        assert_all(&Origins::default(), &table);
    }

    #[test]
    fn a_scheme_that_only_looks_like_https_is_refused() {
        let uri = Uri::builder()
            .scheme("HTTPS")
            .authority("api.example.com")
            .path_and_query("/")
            .build()
            .unwrap();
        assert_eq!(Origins::default().judge(&uri), Reject);
        assert_eq!(pin(&["https://api.example.com"]).judge(&uri), Bare);
    }

    #[test]
    fn plain_http_opens_http_and_nothing_else() {
        let table = [
            ("http://api.example.com/", Attach),
            ("http://localhost@evil.example/", Attach),
            ("ws://api.example.com/", Reject),
            ("api.example.com:80", Reject),
        ];
        assert_all(&Origins::default().plain_http(true), &table);
        let shut_again = Origins::default().plain_http(true).plain_http(false);
        assert_all(&shut_again, &[("http://api.example.com/", Reject)]);
    }

    #[test]
    fn other_than_pinned_origins_pass_bare() {
        let origins = pin(&[
            "https://api.example.com",
            "HTTPS://Upper.Example:8443/",
            "https://[2001:DB8::1]:444",
            "http://localhost:8080",
        ]);
        let table = [
            ("https://api.example.com/a?b", Attach),
            ("https://API.example.COM:443/", Attach),
            ("https://api.example.com:0443/", Attach),
            ("https://user@api.example.com/", Attach),
            ("https://upper.example:8443/", Attach),
            ("https://[2001:db8:0::1]:444/", Attach),
            ("http://localhost:8080/", Attach),
            ("/a", Attach),
            ("http://api.example.com/", Bare),
            ("http://api.example.com:443/", Bare),
            ("https://api.example.com:444/", Bare),
            ("https://api.example.com./", Bare),
            ("https://api.example.com.evil.example/", Bare),
            ("https://api.example.com@evil.example/", Bare),
            ("https://api.example.com:443@evil.example/", Bare),
            ("https://a.api.example.com/", Bare),
            ("https://upper.example/", Bare),
            ("https://[2001:db8::1]/", Bare),
            ("https://[2001:db8::2]:444/", Bare),
            ("http://localhost/", Bare),
            ("https://localhost:8080/", Bare),
            ("http://evil.example/", Bare),
            ("wss://api.example.com/", Bare),
            ("api.example.com:443", Bare),
            // Invalid ports.
            ("https://api.example.com:/", Bare),
            ("https://api.example.com:65979/", Bare),
            ("https://api.example.com:x/", Bare),
        ];
        assert_all(&origins, &table);
    }

    #[test]
    fn pinning_does_not_make_http_safe() {
        let table = [("http://api.example.com/", Reject), ("http://b/", Bare)];
        let origins = pin(&["http://api.example.com"]);
        assert_all(&origins, &table);
        let table = [("http://api.example.com/", Attach), ("http://b/", Bare)];
        assert_all(&origins.plain_http(true), &table);
    }

    #[test]
    fn entries_that_name_no_origin_are_config_errors() {
        let table = [
            ("", "is not a URI"),
            ("api.example.com/path", "is not a URI"),
            ("https:///path", "is not a URI"),
            ("https://user@", "is not a URI"),
            ("https://b\u{fc}cher.example", "is not a URI"),
            ("api.example.com", "has no scheme"),
            ("api.example.com:443", "has no scheme"),
            ("/path", "has no host"),
            ("https://:443", "has no host"),
            ("wss://api.example.com", "is neither https nor http"),
            ("https://user:hunter2@api.example.com", "has userinfo"),
            ("https://*.example.com", "has a wildcard"),
            ("https://api.example.com/v1", "has a path"),
            ("https://api.example.com?hunter2", "has a path"),
            ("https://api.example.com#a", "has a path"),
            ("https://api.example.com:65979", "has no valid port"),
            ("https://api.example.com:", "has no valid port"),
        ];
        for (entry, fault) in table {
            let error = Origins::default()
                .pin(["https://good.example", entry])
                .unwrap_err()
                .to_string();
            assert!(
                error.starts_with(&format!("origin 2 {fault}")),
                "{entry}: {error}"
            );
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn an_empty_list_is_a_config_error() {
        assert!(Origins::default().pin([] as [&str; 0]).is_err());
    }

    #[test]
    fn a_refusal_names_the_setting_and_no_secret() {
        let uri = "http://user:hunter2@api.example.com/hunter2?token=hunter2";
        let error = insecure_uri(&uri.parse().unwrap());
        assert!(error.is_insecure_uri());
        assert!(!error.is_transient());
        assert!(error.to_string().contains("`dangerous_plain_http`"));
        let source = error.source().unwrap().to_string();
        assert!(source.contains("http://api.example.com is"), "{source}");
        assert!(!format!("{error} {error:?} {source}").contains("hunter2"));
    }

    /// Who reads that a setting is off turns it on, which opens all of http and helps no other scheme.
    #[test]
    fn a_refusal_of_another_scheme_says_nothing_of_how_the_setting_stands() {
        for text in ["wss://api.example.com/", "api.example.com:443"] {
            let uri = text.parse().unwrap();
            assert_eq!(Origins::default().plain_http(true).judge(&uri), Reject);
            let error = insecure_uri(&uri).to_string();
            assert!(!error.contains("is off"), "{text}: {error}");
            assert!(error.contains("neither https, nor http"), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn only_safe_uris_carry(
            text in r"((https?|wss?)://)?([a-z:@\[\].]|localhost|127\.0\.0\.1|\[::1\]){0,8}(:[0-9]{0,6})?(/[a-z]?)?",
        ) {
            let Ok(uri) = text.parse::<Uri>() else {
                return Ok(());
            };
            // The same rule, restated by what there may be in the place of a host and port.
            let is_this_machine = |text: &str| {
                let text = text.rsplit('@').next().unwrap();
                let host = match text.rsplit_once(':') {
                    Some((host, port)) if port.chars().all(char::is_numeric) => host,
                    _ => text,
                };
                matches!(host, "localhost" | "127.0.0.1" | "[::1]")
            };
            let safe = uri.authority().is_none_or(|authority| {
                uri.scheme_str() == Some("https")
                    || (uri.scheme_str() == Some("http") && is_this_machine(authority.as_str()))
            });
            let carries = Origins::default().judge(&uri) == Attach;
            prop_assert_eq!(carries, safe);

            let pinned = pin(&["https://localhost", "http://127.0.0.1:1"]).judge(&uri);
            prop_assert!(pinned != Attach || carries);
            insecure_uri(&uri);
        }

        #[test]
        fn no_uri_makes_it_panic(text in ".{0,40}") {
            let _ = Origins::default().pin([&text]);
            is_loopback(&text);
            if let Ok(uri) = text.parse() {
                Origins::default().judge(&uri);
            }
        }
    }
}
