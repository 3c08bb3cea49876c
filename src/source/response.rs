//! The token endpoint's answer: lenient in, strict out.
//!
//! Servers differ in what they send, so whatever can be understood is accepted: lifetimes as text or as fractions, 201
//! for 200, a byte order mark, any `Content-Type`, no `token_type`. What comes out is a token that fits into a header,
//! or an error that tells whether another try is worth it. Everything here is a function of the answer and of the clock
//! readings that came with it.
//!
//! An answer may hold a token, and a hostile server's may echo our secret. So no error made here keeps a byte of the
//! body, except an error code of letters and underscores. That rules out the `Display` of serde's errors, which quotes
//! the value it fails on.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode, header::RETRY_AFTER};
use secrecy::{ExposeSecret, SecretString};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Value, error::Category, value::RawValue};

use super::{RefreshToken, TokenResponse};
use crate::{
    error::{Kind, TokenError},
    time::Now,
};

/// What the token endpoint answered, and when.
pub(super) struct Answer {
    pub(super) response: Response<Bytes>,
    /// Just before the request left: lifetimes count from here, since the server's clock starts later.
    pub(super) sent: Now,
    /// When the answer was complete: `Retry-After` counts from here.
    pub(super) received: Now,
}

impl Answer {
    /// Judges the answer by RFC 6749 sections 5.1 and 5.2.
    pub(super) fn into_token(self) -> Result<TokenResponse, TokenError> {
        let status = self.response.status();
        let document = Document::parse(self.response.body());
        let judged = match error_code(document.as_ref().ok()) {
            // Some servers report an error with status 200; by RFC 6749 section 5.2 the `error` member means the same
            // everywhere.
            Some(code) => Err(refused(status, code)),
            None if status.is_success() => document.and_then(Document::into_token),
            None => Err(unavailable(status)),
        };
        match judged {
            Ok(token) => Ok(TokenResponse {
                sent: Some(self.sent),
                ..token
            }),
            Err(error) => Err(self.describe(error)),
        }
    }

    /// Judges the answer to a revocation by RFC 7009 section 2.2. A success has no content.
    pub(super) fn into_revoked(self) -> Result<(), TokenError> {
        let status = self.response.status();
        if status.is_success() {
            return Ok(());
        }
        let document = Document::parse(self.response.body());
        let error = match error_code(document.as_ref().ok()) {
            Some(code) => refused(status, code),
            None => unavailable(status),
        };
        Err(self.describe(error))
    }

    /// Reads the metadata of an authorization server (RFC 8414 section 3.2).
    pub(super) fn into_metadata(self) -> Result<Map<String, Value>, TokenError> {
        let status = self.response.status();
        let metadata = if status.is_success() {
            let body = without_bom(self.response.body());
            serde_json::from_slice(body).map_err(|error| {
                let problem = describe_json_error(&error);
                malformed(format!("the metadata cannot be read: {problem}"))
            })
        } else {
            Err(unavailable(status).with_source("the metadata could not be fetched"))
        };
        metadata.map_err(|error| self.describe(error))
    }

    /// Adds what every error takes from the answer's head.
    fn describe(&self, error: TokenError) -> TokenError {
        let error = error.with_status(self.response.status());
        match retry_after(self.response.headers(), self.received.wall) {
            Some(after) => error.with_retry_after(after),
            None => error,
        }
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Neither body nor headers: both may hold secrets.
        f.debug_struct("Answer")
            .field("status", &self.response.status())
            .finish_non_exhaustive()
    }
}

/// The members that are read; others are ignored (RFC 6749 section 5.1).
#[derive(Default, Deserialize)]
#[serde(default)]
struct Document {
    access_token: Text,
    token_type: Option<Text>,
    expires_in: Option<Box<RawValue>>,
    refresh_token: Text,
    refresh_expires_in: Option<Box<RawValue>>,
    /// As Apigee, Azure AD B2C and GitHub call it. No alias, for which both would be one twice.
    refresh_token_expires_in: Option<Box<RawValue>>,
    refresh_in: Option<Box<RawValue>>,
    ext_expires_in: Option<Box<RawValue>>,
    #[serde(rename = "not-before-policy")]
    not_before_policy: Option<Box<RawValue>>,
    scope: Text,
    error: Text,
    /// Okta and Apigee use these, each its own, for a client that they do not know.
    #[serde(rename = "errorCode")]
    okta_error_code: Text,
    #[serde(rename = "ErrorCode")]
    apigee_error_code: Text,
}

impl Document {
    fn parse(body: &[u8]) -> Result<Self, TokenError> {
        let body = without_bom(body);
        // serde would fill a struct from an array as well.
        if !body.trim_ascii_start().starts_with(b"{") {
            return Err(malformed("the answer is not a JSON object"));
        }
        serde_json::from_slice(body).map_err(|error| malformed(describe_json_error(&error)))
    }

    fn into_token(self) -> Result<TokenResponse, TokenError> {
        let refresh_expires_in = self.refresh_expires_in.or(self.refresh_token_expires_in);
        let Some(access_token) = self.access_token.get() else {
            return Err(malformed("the answer has no access_token"));
        };
        // RFC 6749 section 7.1: a token of an unknown type must not be used. All clients take one of no type for Bearer.
        if !self.token_type.as_ref().is_none_or(is_bearer) {
            return Err(malformed("the answer's token_type is not Bearer"));
        }
        Ok(TokenResponse {
            expires_in: seconds(self.expires_in.as_deref()),
            refresh_in: seconds(self.refresh_in.as_deref()),
            ext_expires_in: seconds(self.ext_expires_in.as_deref()),
            not_before_policy: number(self.not_before_policy.as_deref())
                .map(|seconds| seconds as u64),
            refresh_token: refresh_token(&self.refresh_token, refresh_expires_in.as_deref()),
            scope: self.scope.get().map(str::to_owned),
            ..TokenResponse::new(access_token)?
        })
    }
}

/// Non-empty text, or nothing for any other JSON value. Wiped on drop, since it may be a token.
#[derive(Default)]
pub(super) struct Text(Option<SecretString>);

impl Text {
    pub(super) fn get(&self) -> Option<&str> {
        self.0.as_ref().map(ExposeSecret::expose_secret)
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextVisitor)
    }
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = Text;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_str<E>(self, text: &str) -> Result<Text, E> {
        Ok(Text((!text.is_empty()).then(|| SecretString::from(text))))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Text, E> {
        Ok(Text(None))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Text, E> {
        Ok(Text(None))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Text, E> {
        Ok(Text(None))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Text, E> {
        Ok(Text(None))
    }

    fn visit_unit<E>(self) -> Result<Text, E> {
        Ok(Text(None))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Text, A::Error> {
        IgnoredAny.visit_seq(seq).map(|_| Text(None))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Text, A::Error> {
        IgnoredAny.visit_map(map).map(|_| Text(None))
    }
}

/// The text of the `error` member, of any form, or else a code of RFC 6749 under its other name.
fn error_code(document: Option<&Document>) -> Option<&str> {
    let document = document?;
    let by_other_name = || {
        [&document.okta_error_code, &document.apigee_error_code]
            .into_iter()
            .filter_map(Text::get)
            .find(|code| CODES.contains(code))
    };
    document.error.get().or_else(by_other_name)
}

/// Whether a type is Bearer, as RFC 6750, Apigee or MTN's mobile money calls it.
fn is_bearer(token_type: &Text) -> bool {
    token_type.get().is_some_and(|token_type| {
        ["bearer", "bearertoken", "access_token"]
            .iter()
            .any(|name| token_type.eq_ignore_ascii_case(name))
    })
}

fn refresh_token(text: &Text, expires_in: Option<&RawValue>) -> Option<RefreshToken> {
    let token = RefreshToken::new(text.get()?);
    // Keycloak sends 0 for a token that does not expire.
    match seconds(expires_in).filter(|lifetime| !lifetime.is_zero()) {
        Some(lifetime) => Some(token.expires_in(lifetime)),
        None => Some(token),
    }
}

/// Reads a lifetime in seconds: a number or the text of one, and `None` if it makes no sense.
///
/// The raw text is read, since serde_json refuses a document with a number that fits into no `f64`.
fn seconds(value: Option<&RawValue>) -> Option<Duration> {
    number(value).map(|seconds| Duration::from_secs_f64(seconds.min(LONGEST_SECONDS)))
}

/// Reads a number or the text of one.
fn number(value: Option<&RawValue>) -> Option<f64> {
    let json = value?.get();
    let text: String = serde_json::from_str(json).unwrap_or_else(|_| json.to_owned());
    parse_number(&text)
}

/// Reads a number that is finite and not negative.
fn parse_number(text: &str) -> Option<f64> {
    let number: f64 = text.trim().parse().ok()?;
    // Also false for NaN.
    (number >= 0.0 && number.is_finite()).then_some(number)
}

/// The error for an answer with an `error` member.
pub(crate) fn refused(status: StatusCode, code: &str) -> TokenError {
    // Many frameworks and proxies write `{"error": "Not Found"}`, which is no OAuth error.
    if !is_error_code(code) {
        return unavailable(status);
    }
    // Such a status is about the server's state, and outweighs the body.
    let error = if status.is_redirection() || is_busy(status) {
        unavailable(status)
    } else {
        TokenError::new(Kind::Rejected {
            transient: TRANSIENT_CODES.contains(&code),
        })
    };
    error.with_oauth_error(code)
}

/// The error for a status that is not about our credentials, as far as one can tell.
///
/// A 4xx without an RFC 6749 body does not come from an authorization server: firewalls answer with pages. So it may
/// pass by itself.
fn unavailable(status: StatusCode) -> TokenError {
    let error = TokenError::new(Kind::Unavailable);
    if status.is_redirection() {
        // RFC 9700 section 4.12: a redirect would carry the secret to wherever it points. Not even its target is
        // shown, which may be secret too.
        error.with_source("redirects of a token request are not followed")
    } else {
        error
    }
}

/// A page that claims success may be a captive portal's, so the error may pass by itself.
pub(crate) fn malformed(reason: impl Into<String>) -> TokenError {
    TokenError::new(Kind::Malformed).with_source(reason.into())
}

fn is_busy(status: StatusCode) -> bool {
    // RFC 9110 section 15: a status above 599 is to be treated as a 5xx.
    status.as_u16() >= 500
        || matches!(
            status,
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS
        )
}

/// All registered codes have this form; anything else is not shown, since it may echo a secret.
fn is_error_code(code: &str) -> bool {
    (1..=40).contains(&code.len())
        && code
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

fn describe_json_error(error: &serde_json::Error) -> String {
    let problem = match error.classify() {
        Category::Eof => "ends early",
        Category::Syntax => "is not JSON",
        Category::Data | Category::Io => "has an unexpected form",
    };
    format!(
        "the answer {problem} (line {}, column {})",
        error.line(),
        error.column()
    )
}

/// Strips the byte order mark that some editors and servers put first.
pub(super) fn without_bom(text: &[u8]) -> &[u8] {
    text.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(text)
}

/// Reads `Retry-After` in both forms of RFC 9110 section 10.2.3, and with a fraction, as rate limiters write it.
///
/// Zero and a past date ask for nothing.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let after = if let Some(seconds) = parse_number(value) {
        Duration::from_secs_f64(seconds.min(LONGEST_SECONDS))
    } else {
        let date = httpdate::parse_http_date(value).ok()?;
        date.duration_since(now).ok()?
    };
    (!after.is_zero()).then_some(after)
}

/// Two years, which keeps sums in range; the cache has a lower limit of its own.
const LONGEST_SECONDS: f64 = 2.0 * 365.0 * 24.0 * 60.0 * 60.0;

/// The codes of RFC 6749 section 5.2.
const CODES: [&str; 6] = [
    "invalid_request",
    "invalid_client",
    "invalid_grant",
    "unauthorized_client",
    "unsupported_grant_type",
    "invalid_scope",
];

/// The codes about the server's state: RFC 6749 section 4.1.2.1, from which the token endpoint borrows the first two,
/// and RFC 8628 section 3.5.
const TRANSIENT_CODES: [&str; 3] = ["temporarily_unavailable", "server_error", "slow_down"];

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    fn answer(status: u16, headers: &[(&'static str, &str)], body: impl Into<Bytes>) -> Answer {
        let mut response = Response::builder().status(status);
        for (name, value) in headers {
            response = response.header(*name, *value);
        }
        let now = Now {
            wall: UNIX_EPOCH + Duration::from_secs(784_111_777),
            ..Now::read()
        };
        Answer {
            response: response.body(body.into()).unwrap(),
            sent: now,
            received: now,
        }
    }

    fn read(status: u16, body: &str) -> Result<TokenResponse, TokenError> {
        answer(status, &[], body.to_owned()).into_token()
    }

    fn with_member(member: &str) -> Result<TokenResponse, TokenError> {
        read(
            200,
            &format!(r#"{{"access_token":"abc","token_type":"Bearer",{member}}}"#),
        )
    }

    #[test]
    fn any_2xx_with_a_bearer_token_is_success() {
        let body = r#" {"access_token":"abc","token_type":"bEaReR","unknown":[{"a":null}]}"#;
        for (status, body) in [
            (200, body.to_owned()),
            (201, body.to_owned()),
            (203, body.to_owned()),
            (200, format!("\u{feff}{body}")),
        ] {
            let answer = answer(status, &[("content-type", "text/html")], body);
            let sent = answer.sent;
            let token = answer.into_token().unwrap();
            assert_eq!(token.access_token.expose_secret(), "abc");
            assert_eq!(token.sent, Some(sent));
            assert!(token.expires_in.is_none() && token.refresh_token.is_none());
        }
    }

    /// LinkedIn names none, Apigee calls it `BearerToken` by default, and MTN's mobile money `access_token`.
    #[test]
    fn a_token_of_no_type_is_a_bearer_token() {
        for body in [
            r#"{"access_token":"abc"}"#,
            r#"{"access_token":"abc","token_type":null}"#,
            r#"{"access_token":"abc","token_type":"BearerToken"}"#,
            r#"{"access_token":"abc","token_type":"access_token"}"#,
        ] {
            let token = read(200, body).unwrap();
            assert_eq!(token.access_token.expose_secret(), "abc", "{body}");
        }
    }

    #[test]
    fn a_success_without_a_token_is_malformed_and_transient() {
        let deep = format!(r#"{{"x":{}"#, "[".repeat(200_000));
        let deep_known = format!(r#"{{"access_token":{}"#, "[".repeat(200_000));
        for body in [
            "",
            "{",
            "null",
            "<html>log in</html>",
            r#"["abc","Bearer"]"#,
            r#"{"token_type":"Bearer"}"#,
            r#"{"access_token":"abc","token_type":"DPoP"}"#,
            r#"{"access_token":"abc","token_type":""}"#,
            r#"{"access_token":"abc","token_type":["Bearer"]}"#,
            r#"{"access_token":"abc","token_type":"N_A"}"#,
            r#"{"access_token":"abc","token_type":"refresh_token"}"#,
            r#"{"access_token":"","token_type":"Bearer"}"#,
            r#"{"access_token":7,"token_type":"Bearer"}"#,
            r#"{"access_token":{"a":1},"token_type":"Bearer"}"#,
            r#"{"access_token":"a\r\nb: c","token_type":"Bearer"}"#,
            r#"{"access_token":"a b","token_type":"Bearer"}"#,
            r#"{"access_token":"tök","token_type":"Bearer"}"#,
            r#"{"access_token":"a","access_token":"b","token_type":"Bearer"}"#,
            r#"{"access_token":"abc","token_type":"Bearer"} trailing"#,
            r#"{"access_token":"abc","token_type":"Bearer","expires_in":NaN}"#,
            &deep,
            &deep_known,
        ] {
            let error = read(200, body).unwrap_err();
            let shown: String = body.chars().take(70).collect();
            assert!(error.is_malformed_response(), "{shown}: {error:?}");
            assert!(error.is_transient(), "{shown}");
            assert_eq!(error.status(), Some(StatusCode::OK), "{shown}");
        }
        assert!(
            answer(200, &[], &b"{\"access_token\":\"\xff\""[..])
                .into_token()
                .is_err()
        );
    }

    #[test]
    fn lifetimes_are_read_in_every_form_and_dropped_when_they_make_no_sense() {
        let longest = Duration::from_secs(2 * 365 * 24 * 60 * 60);
        for (text, expected) in [
            ("300", Some(Duration::from_secs(300))),
            (r#""300""#, Some(Duration::from_secs(300))),
            (r#"" 300 ""#, Some(Duration::from_secs(300))),
            (r#""3.6e3""#, Some(Duration::from_secs(3600))),
            ("299.5", Some(Duration::from_millis(299_500))),
            ("0", Some(Duration::ZERO)),
            ("-0.0", Some(Duration::ZERO)),
            ("9223372036854775808", Some(longest)),
            ("18446744073709551616", Some(longest)),
            ("1e300", Some(longest)),
            ("1e400", None),
            (r#""1e300""#, Some(longest)),
            ("-1", None),
            (r#""-1""#, None),
            (r#""NaN""#, None),
            (r#""inf""#, None),
            (r#""1e999""#, None),
            (r#""""#, None),
            (r#""soon""#, None),
            ("null", None),
            ("true", None),
            ("[300]", None),
            (r#"{"seconds":300}"#, None),
        ] {
            let token = with_member(&format!(r#""expires_in":{text},"refresh_in":{text}"#))
                .unwrap_or_else(|error| panic!("{text}: {error:?}"));
            assert_eq!(token.expires_in, expected, "{text}");
            assert_eq!(token.refresh_in, expected, "{text}");
        }
    }

    #[test]
    fn a_refresh_token_with_no_or_zero_lifetime_does_not_expire() {
        for (member, lifetime) in [
            (r#""refresh_token":"r""#, None),
            (r#""refresh_token":"r","refresh_expires_in":0"#, None),
            (r#""refresh_token":"r","refresh_expires_in":"0""#, None),
            (r#""refresh_token":"r","refresh_expires_in":-1"#, None),
            (
                r#""refresh_token":"r","refresh_expires_in":1800"#,
                Some(Duration::from_secs(1800)),
            ),
            (
                r#""refresh_token":"r","refresh_token_expires_in":"1800""#,
                Some(Duration::from_secs(1800)),
            ),
            (
                r#""refresh_token":"r","refresh_token_expires_in":60,"refresh_expires_in":1800"#,
                Some(Duration::from_secs(1800)),
            ),
            (r#""refresh_token":"r","refresh_token_expires_in":0"#, None),
        ] {
            let token = with_member(member).unwrap().refresh_token.unwrap();
            assert_eq!(token.expose_secret(), "r");
            assert_eq!(token.expires_in, lifetime, "{member}");
        }
        for member in [
            r#""refresh_token":"""#,
            r#""refresh_token":null"#,
            r#""refresh_token":false"#,
            r#""refresh_token":["r"]"#,
            r#""refresh_expires_in":0"#,
        ] {
            assert!(
                with_member(member).unwrap().refresh_token.is_none(),
                "{member}"
            );
        }
    }

    #[test]
    fn the_granted_scope_is_kept_if_it_is_text() {
        let scope = |member| with_member(member).unwrap().scope;
        assert_eq!(scope(r#""scope":"a b""#).as_deref(), Some("a b"));
        assert_eq!(scope(r#""scope":["a"]"#), None);
        assert_eq!(scope(r#""scope":1.5"#), None);
        assert_eq!(scope(r#""scope":-1"#), None);
    }

    #[test]
    fn the_status_and_an_rfc_6749_body_decide_whether_to_try_again() {
        #[rustfmt::skip]
        let table = [
            // status, body, rejected, transient, code
            (400, r#"{"error":"invalid_scope"}"#, true, false, Some("invalid_scope")),
            (401, r#"{"error":"invalid_client","error_description":"no"}"#, true, false, Some("invalid_client")),
            (401, "\u{feff}{\"error\":\"invalid_client\"}", true, false, Some("invalid_client")),
            (403, r#"{"error":"unauthorized_client"}"#, true, false, Some("unauthorized_client")),
            (401, r#"{"ErrorCode":"invalid_client","Error":"ClientId is Invalid"}"#, true, false, Some("invalid_client")),
            (400, r#"{"errorCode":"invalid_client","errorSummary":"x"}"#, true, false, Some("invalid_client")),
            (404, r#"{"errorCode":"not_found"}"#, false, true, None),
            (400, r#"{"error":"invalid_scope","errorCode":7,"ErrorCode":"x"}"#, true, false, Some("invalid_scope")),
            (400, r#"{"error":"invalid_scope","errorCode":"invalid_client"}"#, true, false, Some("invalid_scope")),
            (404, r#"{"error":"Not Found"}"#, false, true, None),
            (400, r#"{"error":"temporarily_unavailable"}"#, true, true, Some("temporarily_unavailable")),
            (400, r#"{"error":"server_error"}"#, true, true, Some("server_error")),
            (400, r#"{"error":"slow_down"}"#, true, true, Some("slow_down")),
            (200, r#"{"error":"invalid_client"}"#, true, false, Some("invalid_client")),
            (200, r#"{"error":"server_error","access_token":"a","token_type":"bearer"}"#, true, true, Some("server_error")),
            (408, r#"{"error":"invalid_client"}"#, false, true, Some("invalid_client")),
            (425, "", false, true, None),
            (429, r#"{"error":"slow_down"}"#, false, true, Some("slow_down")),
            (500, r#"{"error":"Internal Server Error"}"#, false, true, None),
            (503, "<html>", false, true, None),
            (999, r#"{"error":"invalid_client"}"#, false, true, Some("invalid_client")),
            (400, "", false, true, None),
            (401, "", false, true, None),
            (403, "<html>blocked</html>", false, true, None),
            (400, r#"{"error":""}"#, false, true, None),
            (400, r#"{"error":{"code":7}}"#, false, true, None),
            (400, r#"["invalid_client"]"#, false, true, None),
            (304, "", false, true, None),
            (307, r#"{"error":"invalid_client"}"#, false, true, Some("invalid_client")),
        ];
        for (status, body, rejected, transient, code) in table {
            let error = read(status, body).unwrap_err();
            assert_eq!(error.is_rejected(), rejected, "{status} {body}");
            assert_eq!(error.is_transient(), transient, "{status} {body}");
            assert_eq!(error.oauth_error(), code, "{status} {body}");
            assert_eq!(error.status().unwrap().as_u16(), status);
        }
    }

    #[test]
    fn a_code_of_another_form_than_the_registered_ones_is_no_oauth_error() {
        let long = "a".repeat(41);
        for code in ["Invalid_client", "s3cr3t", "a b", "é", &long] {
            let error = read(401, &format!(r#"{{"error":"{code}"}}"#)).unwrap_err();
            assert!(!error.is_rejected() && error.is_transient());
            assert_eq!(error.oauth_error(), None, "{code}");
        }
    }

    #[test]
    fn retry_after_is_read_in_both_forms() {
        // The clock of the answers stands at "Sun, 06 Nov 1994 08:49:37 GMT".
        for (value, expected) in [
            ("7", Some(Duration::from_secs(7))),
            (" 7 ", Some(Duration::from_secs(7))),
            (
                "Sun, 06 Nov 1994 08:50:07 GMT",
                Some(Duration::from_secs(30)),
            ),
            (
                "Sunday, 06-Nov-94 08:50:07 GMT",
                Some(Duration::from_secs(30)),
            ),
            ("99999999999999999999999", Some(Duration::from_secs(300))),
            ("0", None),
            ("Sun, 06 Nov 1994 08:49:37 GMT", None),
            ("Sat, 05 Nov 1994 08:49:37 GMT", None),
            ("1.5", Some(Duration::from_millis(1_500))),
            ("299.25", Some(Duration::from_millis(299_250))),
            ("0.0", None),
            ("-7", None),
            ("-1.5", None),
            ("NaN", None),
            ("inf", None),
            ("", None),
            ("soon", None),
        ] {
            for (status, body) in [(503, ""), (429, "{}"), (400, r#"{"error":"slow_down"}"#)] {
                let error = answer(status, &[("retry-after", value)], body)
                    .into_token()
                    .unwrap_err();
                assert_eq!(error.retry_after(), expected, "{status} {value:?}");
            }
        }
    }

    /// Law 9: what the answer holds stays out of errors.
    #[test]
    fn no_error_shows_a_byte_of_the_body() {
        for (status, body) in [
            (
                200,
                r#"{"access_token":"CANARY","token_type":"CANARY","expires_in":"CANARY"}"#,
            ),
            (200, r#"{"access_token":"CANARY\n","token_type":"bearer"}"#),
            (200, r#"{"access_token":"CANARY"#),
            (200, r#"{"access_token":"CANARY" CANARY"#),
            (200, r#"{"CANARY":1,"scope":"CANARY","scope":"CANARY"}"#),
            (400, r#"{"error":"CANARY","error_description":"CANARY"}"#),
            (307, "CANARY"),
            (500, "CANARY"),
        ] {
            let answer = answer(status, &[("location", "https://CANARY.example/")], body);
            let mut text = format!("{answer:?}");
            let error = answer.into_token().unwrap_err();
            let mut next: Option<&dyn std::error::Error> = Some(&error);
            while let Some(error) = next {
                text.push_str(&format!("{error} {error:?}"));
                next = error.source();
            }
            assert!(!text.contains("CANARY"), "{body}: {text}");
        }
    }
}
