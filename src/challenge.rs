//! [`Challenge`]: `WWW-Authenticate` (RFC 9110 section 11.6.1), which says whether an answer is about our token.
//!
//! The parser reads the whole grammar of RFC 9110 sections 11.2 and 11.3, since the challenge that matters may follow
//! others of any form. `http-auth` 0.1.10 is no substitute: it rejects token68, so a `Negotiate` continuation hides the
//! Bearer challenge after it.
//!
//! A syntax error discards only the rest of its header value: what was read before stays, and so do the other values.
//! Five things are read that the grammar does not allow but servers send: tabs for spaces, parameters after a token68,
//! parameters with no comma between them (Kong and AWS API Gateway), repeated parameter names (the first one counts),
//! and words before a scheme, such as the `null Bearer` of WSO2.

use std::{borrow::Cow, fmt, iter};

use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::{
    HeaderMap, StatusCode,
    header::{HeaderName, WWW_AUTHENTICATE},
};

use crate::message::HttpResponse;

/// What an answer says about the token that was sent with its request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The server says that the token is invalid.
    InvalidToken,
    /// The token lacks these claims, a JSON object; the next token request has to name them.
    MissingClaims(String),
    /// The request was not authenticated, and the server does not say why.
    Unexplained,
    /// Another token would not change the answer.
    NotOurs,
}

/// Whether an answer has to be judged at all. Most answers cost only this check.
#[inline]
pub(crate) fn is_candidate(answer: &impl HttpResponse) -> bool {
    let status = answer.status();
    status == StatusCode::UNAUTHORIZED
        || (status == StatusCode::OK
            && !answer.headers().is_empty()
            && has_grpc_status(answer.headers()))
}

/// Judges an answer by its status and headers.
pub(crate) fn judge(status: StatusCode, headers: &HeaderMap) -> Verdict {
    let is_grpc = status == StatusCode::OK && is_grpc_unauthenticated(headers);
    if status == StatusCode::UNAUTHORIZED || is_grpc {
        judge_unauthorized(headers)
    } else {
        Verdict::NotOurs
    }
}

fn has_grpc_status(headers: &HeaderMap) -> bool {
    headers.contains_key(&GRPC_STATUS)
}

fn judge_unauthorized(headers: &HeaderMap) -> Verdict {
    match Challenge::all(headers).map(Claim::of).max() {
        Some(Claim::InvalidToken) => Verdict::InvalidToken,
        Some(Claim::MissingClaims(claims)) => Verdict::MissingClaims(claims),
        Some(Claim::Unexplained) | None => Verdict::Unexplained,
        Some(Claim::OtherFault | Claim::OtherScheme) => Verdict::NotOurs,
    }
}

/// A gRPC reply without a message carries its status among the headers ("Trailers-Only").
///
/// It stands for a 401, and carries its challenges if a proxy translated one: Envoy's JWT filter says `invalid_token`
/// to a gRPC client this way.
fn is_grpc_unauthenticated(headers: &HeaderMap) -> bool {
    headers
        .get(&GRPC_STATUS)
        .is_some_and(|status| status == GRPC_UNAUTHENTICATED)
}

/// What one challenge claims. The greatest of several counts: a server that names a fault has explained itself,
/// whatever else it asks for.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Claim {
    OtherScheme,
    /// One for tokens without an `error`, or with one that RFC 6750 does not know.
    Unexplained,
    /// The request is at fault, or the token is good and grants too little.
    OtherFault,
    /// Continuous access evaluation of Entra ID: the next token must have these claims.
    MissingClaims(String),
    InvalidToken,
}

impl Claim {
    fn of(challenge: Challenge<'_>) -> Self {
        if !challenge.is_of_tokens() {
            return Self::OtherScheme;
        }
        match challenge.raw_param("error").as_deref() {
            // With the reason for it, if there are claims: Entra ID says so of a session that was revoked.
            Some(b"invalid_token") => challenge
                .claims()
                .map_or(Self::InvalidToken, Self::MissingClaims),
            Some(b"insufficient_scope" | b"invalid_request") => Self::OtherFault,
            Some(b"insufficient_claims") => challenge
                .claims()
                .map_or(Self::Unexplained, Self::MissingClaims),
            _ => Self::Unexplained,
        }
    }
}

/// A challenge of a `WWW-Authenticate` header (RFC 9110 section 11.3): what a server wants to see.
///
/// The layer reads the challenges of a 401 by itself. This is for those that it passes on, such as a 403 with
/// `insufficient_scope` (RFC 6750 section 3.1):
///
/// ```
/// use http::{HeaderMap, HeaderValue, header::WWW_AUTHENTICATE};
/// use tower_bearer::Challenge;
///
/// let mut headers = HeaderMap::new();
/// headers.insert(
///     WWW_AUTHENTICATE,
///     HeaderValue::from_static(r#"Basic realm="a", Bearer error="insufficient_scope", scope="sims:write""#),
/// );
/// let challenge = Challenge::all(&headers).find(Challenge::is_bearer);
/// let challenge = challenge.expect("there is one");
/// assert_eq!(challenge.error().as_deref(), Some("insufficient_scope"));
/// assert_eq!(challenge.scope().as_deref(), Some("sims:write"));
/// ```
#[derive(Clone, Copy)]
pub struct Challenge<'a> {
    // `challenge = auth-scheme [ 1*SP ( token68 / #auth-param ) ]`, without the token68, which nobody needs.
    scheme: &'a [u8],
    params: Params<'a>,
}

impl<'a> Challenge<'a> {
    /// Reads the challenges of all `WWW-Authenticate` values, in their order.
    ///
    /// A syntax error ends the reading of its value, and of no other.
    pub fn all(headers: &'a HeaderMap) -> impl Iterator<Item = Self> {
        headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .flat_map(|value| Challenges::new(value.as_bytes()))
    }

    /// Returns the authentication scheme as the server spells it.
    pub fn scheme(&self) -> &'a str {
        // A token is ASCII.
        std::str::from_utf8(self.scheme).unwrap_or_default()
    }

    /// Returns whether the scheme is `Bearer`, in any case.
    pub fn is_bearer(&self) -> bool {
        self.scheme.eq_ignore_ascii_case(b"Bearer")
    }

    /// Returns the value of the first parameter of this name, in any case, without quotes and escapes.
    ///
    /// Bytes that are no UTF-8 are replaced.
    pub fn param(&self, name: &str) -> Option<Cow<'a, str>> {
        Some(match self.raw_param(name)? {
            Cow::Borrowed(value) => String::from_utf8_lossy(value),
            Cow::Owned(value) => Cow::Owned(String::from_utf8_lossy(&value).into_owned()),
        })
    }

    /// Returns the `error` of a Bearer challenge (RFC 6750 section 3), such as `insufficient_scope`.
    pub fn error(&self) -> Option<Cow<'a, str>> {
        self.param("error")
    }

    /// Returns the `scope` that a Bearer challenge wants to see (RFC 6750 section 3).
    pub fn scope(&self) -> Option<Cow<'a, str>> {
        self.param("scope")
    }

    /// Whether the scheme is `Bearer`, or a name for it that APIs had before RFC 6750 or in spite of it.
    fn is_of_tokens(&self) -> bool {
        OF_TOKENS
            .iter()
            .any(|name| self.scheme.eq_ignore_ascii_case(name.as_bytes()))
    }

    fn raw_param(mut self, name: &str) -> Option<Cow<'a, [u8]>> {
        self.params
            .find(|param| param.name.eq_ignore_ascii_case(name.as_bytes()))
            .map(|param| param.value())
    }

    /// The claims of a claims challenge: a JSON object, in base64 of either alphabet.
    fn claims(self) -> Option<String> {
        let encoded = self.raw_param("claims")?;
        let url_safe = encoded.iter().any(|byte| b"-_".contains(byte));
        let alphabet = match url_safe {
            true => &alphabet::URL_SAFE,
            false => &alphabet::STANDARD,
        };
        let config =
            GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
        let json = GeneralPurpose::new(alphabet, config).decode(encoded).ok()?;
        let object: serde_json::Map<_, _> = serde_json::from_slice(&json).ok()?;
        serde_json::to_string(&object).ok()
    }
}

impl fmt::Debug for Challenge<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut map = f.debug_struct("Challenge");
        map.field("scheme", &self.scheme());
        for param in self.params {
            let name = std::str::from_utf8(param.name).unwrap_or_default();
            map.field(name, &String::from_utf8_lossy(&param.value()));
        }
        map.finish()
    }
}

/// `auth-param = token BWS "=" BWS ( token / quoted-string )`
#[derive(Clone, Copy, Debug)]
struct Param<'a> {
    name: &'a [u8],
    /// The token, or the text between the quotes, escapes included.
    raw: &'a [u8],
}

impl<'a> Param<'a> {
    fn value(&self) -> Cow<'a, [u8]> {
        // A token holds no backslash, so both forms can be treated alike.
        if !self.raw.contains(&b'\\') {
            return Cow::Borrowed(self.raw);
        }
        let mut bytes = self.raw.iter();
        let unescape = || match bytes.next() {
            Some(b'\\') => bytes.next().copied(),
            byte => byte.copied(),
        };
        Cow::Owned(iter::from_fn(unescape).collect())
    }
}

/// The challenges of one header value.
#[derive(Debug)]
struct Challenges<'a>(Cursor<'a>);

impl<'a> Challenges<'a> {
    fn new(value: &'a [u8]) -> Self {
        let mut cursor = Cursor { rest: value };
        cursor.skip_empty_elements();
        Self(cursor)
    }
}

impl<'a> Iterator for Challenges<'a> {
    type Item = Challenge<'a>;

    fn next(&mut self) -> Option<Challenge<'a>> {
        let scheme = self.0.scheme()?;
        self.0.skip_token68();
        let challenge = Challenge {
            scheme,
            params: Params(self.0),
        };
        // Moves on to the next challenge. Only the parameters of a challenge for tokens are read again.
        while self.0.param().is_some() {}
        Some(challenge)
    }
}

/// The parameters of one challenge: those before the next scheme.
#[derive(Clone, Copy, Debug)]
struct Params<'a>(Cursor<'a>);

impl<'a> Iterator for Params<'a> {
    type Item = Param<'a>;

    fn next(&mut self) -> Option<Param<'a>> {
        self.0.param()
    }
}

/// What is left of a header value.
///
/// Between two calls it is empty or begins with an element of the list. A syntax error ends the iterations above by
/// emptying it, or by leaving it before an element that is neither parameter nor scheme.
#[derive(Clone, Copy, Debug)]
struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// Reads an auth-scheme and the space after it.
    fn scheme(&mut self) -> Option<&'a [u8]> {
        let mut ahead = *self;
        let scheme = ahead.token()?;
        let spaced = ahead.skip_blanks();
        // `realm = "x"` begins like a scheme too, but is a parameter without a challenge.
        if ahead.rest.starts_with(b"=") || !(spaced || ahead.at_end_of_element()) {
            return None;
        }
        *self = ahead;
        Some(scheme)
    }

    /// Moves from the end of a scheme to the first element that may be its parameter.
    fn skip_token68(&mut self) {
        let mut ahead = *self;
        ahead.take_while(is_token68_char);
        ahead.take_while(|byte| byte == b'=');
        ahead.skip_blanks();
        if ahead.at_end_of_element() {
            ahead.end_element();
            *self = ahead;
        } else if !(self.at_param() || self.at_scheme()) {
            self.rest = &[];
        }
    }

    fn at_scheme(mut self) -> bool {
        self.scheme().is_some()
    }

    fn at_param(mut self) -> bool {
        self.param_name().is_some()
    }

    /// Reads a parameter.
    ///
    /// Does not move if the next element is none. One with an invalid value is not taken for a scheme either.
    fn param(&mut self) -> Option<Param<'a>> {
        let mut ahead = *self;
        let name = ahead.param_name()?;
        let raw = if ahead.skip(b'"') {
            ahead.quoted_string()?
        } else {
            ahead.token()?
        };
        ahead.end_element();
        *self = ahead;
        Some(Param { name, raw })
    }

    /// Reads `token BWS "=" BWS`.
    fn param_name(&mut self) -> Option<&'a [u8]> {
        let name = self.token()?;
        self.skip_blanks();
        if !self.skip(b'=') {
            return None;
        }
        self.skip_blanks();
        Some(name)
    }

    fn token(&mut self) -> Option<&'a [u8]> {
        let token = self.take_while(is_token_char);
        (!token.is_empty()).then_some(token)
    }

    /// Reads from after the opening quote to after the closing one.
    ///
    /// The bytes between are not checked: a `HeaderValue` admits no more than the grammar does.
    fn quoted_string(&mut self) -> Option<&'a [u8]> {
        let mut escaped = false;
        let raw = self.take_while(|byte| {
            let inside = escaped || byte != b'"';
            escaped = !escaped && byte == b'\\';
            inside
        });
        self.skip(b'"').then_some(raw)
    }

    /// Moves from the end of an element to the next one, which is a parameter if there is no comma between.
    fn end_element(&mut self) {
        let spaced = self.skip_blanks();
        if !(self.at_end_of_element() || (spaced && self.at_param())) {
            self.rest = &[];
        }
        self.skip_empty_elements();
    }

    fn at_end_of_element(&self) -> bool {
        matches!(self.rest.first(), None | Some(b','))
    }

    fn skip_empty_elements(&mut self) {
        self.take_while(|byte| is_blank(byte) || byte == b',');
    }

    fn skip_blanks(&mut self) -> bool {
        !self.take_while(is_blank).is_empty()
    }

    fn skip(&mut self, byte: u8) -> bool {
        let Some(rest) = self.rest.strip_prefix(&[byte]) else {
            return false;
        };
        self.rest = rest;
        true
    }

    fn take_while(&mut self, mut belongs: impl FnMut(u8) -> bool) -> &'a [u8] {
        let end = self.rest.iter().position(|&byte| !belongs(byte));
        let (taken, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        self.rest = rest;
        taken
    }
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

fn is_token_char(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn is_token68_char(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~+/".contains(&byte)
}

/// WSO2 says `OAuth2`, Rack's libraries `OAuth`, Rails `Token` and gin-jwt `JWT`, and all of them take `Bearer`.
const OF_TOKENS: [&str; 5] = ["Bearer", "OAuth2", "OAuth", "Token", "JWT"];

static GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// The code `UNAUTHENTICATED`.
const GRPC_UNAUTHENTICATED: &str = "16";

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn headers<V: AsRef<[u8]>>(values: &[V]) -> HeaderMap {
        values
            .iter()
            .map(|value| HeaderValue::from_bytes(value.as_ref()).unwrap())
            .map(|value| (WWW_AUTHENTICATE, value))
            .collect()
    }

    /// Judges 401 answers, each given as its `WWW-Authenticate` values.
    #[track_caller]
    fn assert_all(expected: Verdict, answers: &[&[&str]]) {
        for values in answers {
            let verdict = judge(StatusCode::UNAUTHORIZED, &headers(values));
            assert_eq!(verdict, expected, "{values:?}");
        }
    }

    // Law 8: a 401 counts against the token that was sent, and this is what decides whether it does.
    #[test]
    fn invalid_token_is_found_wherever_it_stands() {
        let answers: &[&[&str]] = &[
            // In any spelling.
            &[r#"Bearer realm="a", error="invalid_token", error_description="expired""#],
            &[r#"BEARER ERROR="invalid_token""#],
            &["bearer error=invalid_token"],
            &["Bearer error = \t\"invalid_token\"\t"],
            &["\tBearer\terror=invalid_token"],
            &[r#"Bearer error="invalid\_to\ken""#],
            &[r#",, Bearer ,,error="invalid_token" ,, ,"#],
            // Behind challenges of every form.
            &[r#"Basic realm="a", Bearer error="invalid_token""#],
            &[r#"Basic realm="\"a\", b", Bearer error="invalid_token""#],
            &["Negotiate, Bearer error=invalid_token"],
            &["Negotiate oRQwEqAD+/Az==, Bearer error=invalid_token"],
            &["Negotiate", "Bearer error=invalid_token", "Basic"],
            // A token68 first, which is what `realm=` is by the grammar.
            &["Bearer abc==, error=invalid_token"],
            &["Bearer realm=, error=invalid_token"],
            // Among other Bearer challenges.
            &["Bearer realm=a, Bearer realm=b, error=invalid_token"],
            &["Bearer error=insufficient_scope, Bearer error=invalid_token"],
            &["Bearer error=invalid_token", "Bearer error=invalid_request"],
            // As it comes from AWS API Gateway and from Kong, with no comma between.
            &[r#"Bearer scope="" error="invalid_token" error_description="the token has expired""#],
            &["Bearer realm=service error=invalid_token, Basic realm=a"],
            // As the first of several errors of one challenge.
            &["Bearer error=invalid_token, error=invalid_request"],
            // As it comes from WSO2 4.0 and 4.1, which put words before the scheme.
            &[r#"Internal API Key realm="a", Bearer realm="a", error="invalid_token""#],
            &[r#"null Bearer realm="a", error="invalid_token""#],
            &["Basic Bearer error=invalid_token"],
        ];
        assert_all(Verdict::InvalidToken, answers);
    }

    #[test]
    fn a_scheme_of_another_name_may_be_about_the_token() {
        // WSO2 3.2, for one.
        let value = r#"OAuth2 realm="WSO2 API Manager", error="invalid_token", error_description="The access token expired""#;
        assert_all(Verdict::InvalidToken, &[&[value]]);
        let unexplained: &[&[&str]] = &[
            &[r#"Token realm="Application""#],
            &["token"],
            &["JWT realm=gin jwt"],
            &["Basic realm=a, OAuth realm='OAuth API', error='invalid_token'"],
        ];
        assert_all(Verdict::Unexplained, unexplained);
    }

    /// Continuous access evaluation: the claims come in base64, padded or not, of either alphabet.
    #[test]
    fn missing_claims_are_read() {
        let claims = r#"{"access_token":{"nbf":{"essential":true,"value":"1>?~"}}}"#;
        let standard =
            "eyJhY2Nlc3NfdG9rZW4iOnsibmJmIjp7ImVzc2VudGlhbCI6dHJ1ZSwidmFsdWUiOiIxPj9+In19fQ==";
        for encoded in [
            standard.to_owned(),
            standard.replace('+', "-"),
            standard.replace('=', ""),
        ] {
            let value = format!(
                r#"Bearer realm="", error="insufficient_claims", claims="{encoded}", Basic"#
            );
            assert_all(Verdict::MissingClaims(claims.to_owned()), &[&[&value]]);
            // Azure Resource Manager says it so of a session that was revoked.
            let revoked = value.replace("insufficient_claims", "invalid_token");
            assert_all(Verdict::MissingClaims(claims.to_owned()), &[&[&revoked]]);
            let invalid = format!("{value}, Bearer error=invalid_token");
            assert_all(Verdict::InvalidToken, &[&[&invalid]]);
        }
    }

    #[test]
    fn a_caller_reads_what_is_passed_on() {
        let headers = headers(&[
            r#"Basic realm="a \"b\"", Bearer scope="c d", ERROR=insufficient_scope"#,
            "Negotiate abc==",
        ]);
        let all: Vec<_> = Challenge::all(&headers).collect();
        assert_eq!(all.len(), 3);
        assert_eq!(all[0].param("Realm").as_deref(), Some(r#"a "b""#));
        assert_eq!(all[0].error(), None);
        assert!(all[1].is_bearer());
        assert_eq!(all[1].error().as_deref(), Some("insufficient_scope"));
        assert_eq!(all[1].scope().as_deref(), Some("c d"));
        assert_eq!(all[2].scheme(), "Negotiate");
        assert!(format!("{:?}", all[1]).contains(r#"scope: "c d""#));
    }

    #[test]
    fn a_401_without_a_known_reason_is_unexplained() {
        let answers: &[&[&str]] = &[
            &["Bearer"],
            &[r#"Bearer realm="a", Basic realm="b""#],
            &["Basic", "Bearer"],
            // Invalid claims: absent, no base64, no JSON, no object.
            &["Bearer error=insufficient_claims"],
            &[r#"Bearer error=insufficient_claims, claims="e""#],
            &["Bearer error=insufficient_claims, claims=Z3Jt"],
            &["Bearer error=insufficient_claims, claims=W10"],
            &["Bearer claims=e30"],
            &["Bearer error='invalid_token'"],
            &[r#"Bearer error="""#],
            &[r#"Bearer error_description="invalid_token""#],
            // No challenge at all, or nothing that could be one.
            &[],
            &[""],
            &[" , ,"],
            &["error=invalid_request"],
            &[r#"error = "invalid_request""#],
            &[r#""Basic" realm=a"#],
            &["Basic: realm=a"],
            &["{}", "<html>"],
        ];
        assert_all(Verdict::Unexplained, answers);
    }

    #[test]
    fn other_schemes_and_other_faults_are_not_ours() {
        let answers: &[&[&str]] = &[
            &[r#"Basic realm="a", charset="UTF-8""#],
            &["Negotiate", "NTLM"],
            &["Negotiate YII="],
            &[r#"DPoP error="invalid_token""#],
            &["Bearer2 error=invalid_token"],
            &[r#"Bearer error="insufficient_scope", scope="a b""#],
            &["Bearer error=invalid_request"],
            &["Bearer error=invalid_request, error=invalid_token"],
            &["Bearer", "Bearer error=insufficient_scope"],
            // The word is quoted, not said.
            &[r#"Basic realm="a, Bearer error=\"invalid_token\"""#],
            &[r#"Basic realm=", Bearer error=invalid_token""#],
            &[r#"Basic realm="\\\", Bearer error=invalid_token""#],
        ];
        assert_all(Verdict::NotOurs, answers);
    }

    #[test]
    fn a_syntax_error_costs_the_rest_of_its_value_only() {
        let unharmed: &[&[&str]] = &[
            &[r#"Bearer error="invalid_token", realm="open"#],
            &[r#"Bearer error="invalid_token" "realm"=a"#],
            &[r#"Basic realm="open"#, "Bearer error=invalid_token"],
        ];
        assert_all(Verdict::InvalidToken, unharmed);

        let word_lost: &[&[&str]] = &[
            &[r#"Bearer realm="open, error="invalid_token""#],
            &[r#"Bearer error="invalid_token"#],
            &["Bearer realm=a, title=, error=invalid_token"],
            &["Bearer realm=a@ error=invalid_token"],
            &["Bearer realm=a Bearer error=invalid_token"],
            &["Bearer @ error=invalid_token"],
            &["Bearer realm error=invalid_token"],
        ];
        assert_all(Verdict::Unexplained, word_lost);

        let challenge_lost: &[&[&str]] = &[
            &[r#"Basic realm="open, Bearer error=invalid_token"#],
            &["Negotiate YII== x, Bearer error=invalid_token"],
        ];
        assert_all(Verdict::NotOurs, challenge_lost);
    }

    #[test]
    fn bytes_beyond_ascii_may_stand_in_a_quoted_string() {
        let quoted: &[u8] = b"Bearer realm=\"caf\xe9 \\\xff\", error=\"invalid_token\"";
        let bare: &[u8] = b"Bearer realm=caf\xe9, error=\"invalid_token\"";
        let judge = |value| judge(StatusCode::UNAUTHORIZED, &headers(&[value]));
        assert_eq!(judge(quoted), Verdict::InvalidToken);
        assert_eq!(judge(bare), Verdict::Unexplained);
    }

    #[test]
    fn other_statuses_are_not_ours_whatever_they_say() {
        let headers = headers(&["Bearer error=invalid_token"]);
        for status in [200, 400, 403, 407, 429, 500, 503] {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(judge(status, &headers), Verdict::NotOurs, "{status}");
        }
    }

    #[test]
    fn grpc_status_16_among_the_headers_is_a_401_without_a_reason() {
        let table = [
            (200, "16", Verdict::Unexplained),
            (403, "16", Verdict::NotOurs),
            (200, "0", Verdict::NotOurs),
            (200, "7", Verdict::NotOurs),
            (200, "160", Verdict::NotOurs),
        ];
        for (status, grpc_status, verdict) in table {
            let status = StatusCode::from_u16(status).unwrap();
            let mut headers = HeaderMap::new();
            headers.insert(&GRPC_STATUS, HeaderValue::from_static(grpc_status));
            assert_eq!(judge(status, &headers), verdict, "{status} {grpc_status}");
        }
    }

    #[test]
    fn challenges_beside_grpc_status_16_are_read_as_those_of_a_401() {
        let table = [
            (
                r#"Bearer realm="a", error="invalid_token""#,
                Verdict::InvalidToken,
            ),
            (r#"Bearer realm="a""#, Verdict::Unexplained),
            (r#"Bearer error="insufficient_scope""#, Verdict::NotOurs),
            ("Negotiate", Verdict::NotOurs),
        ];
        for (challenge, verdict) in table {
            let mut headers = headers(&[challenge]);
            headers.insert(&GRPC_STATUS, HeaderValue::from_static("16"));
            assert_eq!(judge(StatusCode::OK, &headers), verdict, "{challenge}");
            headers.insert(&GRPC_STATUS, HeaderValue::from_static("7"));
            assert_eq!(judge(StatusCode::OK, &headers), Verdict::NotOurs);
        }
    }

    #[test]
    fn only_an_escaped_value_is_copied() {
        let plain = Param {
            name: b"realm",
            raw: b"a b",
        };
        assert!(matches!(plain.value(), Cow::Borrowed(b"a b")));
        let escaped = Param {
            name: b"realm",
            raw: br#"a\"b\\"#,
        };
        assert_eq!(*escaped.value(), *br#"a"b\"#);
    }

    type Parsed = (String, Vec<(String, Vec<u8>)>);

    fn parse(headers: &HeaderMap) -> Vec<Parsed> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let param = |param: Param<'_>| (text(param.name), param.value().into_owned());
        Challenge::all(headers)
            .map(|challenge| {
                (
                    text(challenge.scheme),
                    challenge.params.map(param).collect(),
                )
            })
            .collect()
    }

    const TOKEN: &str = "[!#$%&'*+.^_`|~0-9A-Za-z-]{1,8}";
    const BLANKS: &str = "[ \t]{0,2}";
    const COMMAS: &str = "[ \t]{0,2},[ \t,]{0,3}";

    fn quote(value: &[u8], escape_all: bool) -> Vec<u8> {
        let mut quoted = vec![b'"'];
        for &byte in value {
            if escape_all || matches!(byte, b'"' | b'\\') {
                quoted.push(b'\\');
            }
            quoted.push(byte);
        }
        quoted.push(b'"');
        quoted
    }

    /// A value and its text.
    fn value() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
        let field_char = prop_oneof![
            4 => 0x20..=0x7e_u8,
            1 => Just(b'\t'),
            2 => prop::sample::select(b"\"\\,= ".to_vec()),
            1 => 0x80..=0xff_u8,
        ];
        prop_oneof![
            TOKEN.prop_map(|token| (token.clone().into_bytes(), token.into_bytes())),
            (vec(field_char, 0..12), any::<bool>()).prop_map(|(value, escape_all)| {
                let quoted = quote(&value, escape_all);
                (value, quoted)
            }),
        ]
    }

    /// A parameter and its text.
    fn param() -> impl Strategy<Value = ((String, Vec<u8>), Vec<u8>)> {
        (TOKEN, BLANKS, BLANKS, value()).prop_map(|(name, before, after, (value, text))| {
            let mut rendered = format!("{name}{before}={after}").into_bytes();
            rendered.extend(text);
            ((name, value), rendered)
        })
    }

    /// A challenge and its text.
    fn challenge() -> impl Strategy<Value = (Parsed, Vec<u8>)> {
        let token68 = prop::option::of("[A-Za-z0-9._~+/-]{1,8}={0,2}");
        let params = vec((COMMAS, param()), 0..4);
        (TOKEN, "[ \t]{1,2}", token68, params).prop_map(|(scheme, space, token68, params)| {
            let mut rendered = scheme.clone();
            // The first parameter follows its scheme without a comma, unless a token68 comes between.
            let mut space = Some(space);
            if let Some(token68) = token68 {
                rendered.extend(space.take());
                rendered.push_str(&token68);
            }
            let mut rendered = rendered.into_bytes();
            let mut parsed = Vec::new();
            for (commas, (param, text)) in params {
                rendered.extend(space.take().unwrap_or(commas).into_bytes());
                rendered.extend(text);
                parsed.push(param);
            }
            ((scheme, parsed), rendered)
        })
    }

    proptest! {
        #[test]
        fn well_formed_challenges_are_read_back(
            challenges in vec((any::<bool>(), COMMAS, challenge()), 0..5),
        ) {
            let mut values = vec![Vec::new()];
            let mut expected = Vec::new();
            for (in_new_header, commas, (challenge, text)) in challenges {
                match values.last_mut() {
                    Some(value) if !in_new_header => {
                        value.extend(commas.into_bytes());
                        value.extend(text);
                    }
                    _ => values.push(text),
                }
                expected.push(challenge);
            }
            prop_assert_eq!(parse(&headers(&values)), expected, "{:?}", values);
        }

        #[test]
        fn no_bytes_make_it_panic(value in vec(any::<u8>(), 0..200)) {
            read_to_the_end(&value);
        }

        // Random bytes hardly ever get past the first token.
        #[test]
        fn no_near_miss_makes_it_panic(
            value in r#"(Bearer|Basic|error|invalid_token|[a-z="\\, \t\u{80}]|"[^"]*"){0,40}"#,
        ) {
            read_to_the_end(value.as_bytes());
        }
    }

    fn read_to_the_end(value: &[u8]) {
        for challenge in Challenges::new(value) {
            assert!(!challenge.scheme.is_empty());
            for param in challenge.params {
                assert!(!param.name.is_empty());
                assert!(param.value().len() <= param.raw.len());
            }
        }
    }
}
