//! [`AccessToken`]: the token as requests use it.

use std::{
    collections::HashSet,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::HeaderValue;
use secrecy::ExposeSecret;
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::{
    policy::{FLOOR, Schedule},
    source::{TokenRequest, TokenResponse},
    time::{Coarse, Deadline, Now},
};

/// An access token (RFC 6749 section 1.4) of type Bearer, ready to be sent.
///
/// Clones are cheap and share one header value, which is marked sensitive: hyper keeps it out of
/// compression tables and nothing prints it. The header value is wiped from memory with its last clone.
#[derive(Clone)]
pub struct AccessToken(pub(crate) Arc<Inner>);

/// Unique among the keys of all caches of this process; never 0.
pub(crate) type KeyId = u64;

/// Unique among the tokens in use in this process, and says which entry keeps the token.
///
/// A single 63-bit number, since every request in flight carries it: 39 bits for the entry, and 24 for the flight that
/// brought the token, which start over after half a year at one flight per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TokenId(u64);

impl TokenId {
    const FLIGHT_BITS: u32 = 24;
    const FLIGHT: u64 = (1 << Self::FLIGHT_BITS) - 1;

    pub(crate) fn new(entry: KeyId, flight: u64) -> Self {
        Self((entry << Self::FLIGHT_BITS) | (flight & Self::FLIGHT))
    }

    pub(crate) fn entry(self) -> KeyId {
        self.0 >> Self::FLIGHT_BITS
    }

    /// Whether it is one of an entry's tokens from `first` to `last`, inclusive.
    pub(crate) fn is_between(self, first: Self, last: Self) -> bool {
        // The flight numbers may have started over in between.
        let back = |id: Self| last.0.wrapping_sub(id.0) & Self::FLIGHT;
        self.entry() == last.entry() && back(self) <= back(first)
    }

    /// The whole number; never 0, since no entry's id is.
    #[inline]
    pub(crate) fn get(self) -> u64 {
        self.0
    }
}

impl From<u64> for TokenId {
    fn from(number: u64) -> Self {
        Self(number)
    }
}

pub(crate) struct Inner {
    id: TokenId,
    header: HeaderValue,
    request: TokenRequest,
    scope: Option<Box<str>>,
    requested_scope: Option<Box<str>>,
    due: Deadline,
    expiry: Deadline,
    /// When it is due or dead by the wall clock.
    until: Coarse,
    /// Until when the token may be used while the token endpoint fails.
    extended: Option<Deadline>,
    /// Until when a token past its margin on arrival serves those who waited for it.
    arrival_grace: Option<Deadline>,
    not_before: u64,
}

impl AccessToken {
    /// Creates the token that was asked for at `sent`, by `request`, and arrived at `now`.
    pub(crate) fn new(
        response: TokenResponse,
        id: TokenId,
        request: TokenRequest,
        schedule: Schedule,
        sent: Now,
        now: Now,
    ) -> Self {
        let expiry = sent.after(schedule.expires_after);
        let due = sent.after(schedule.refresh_after);
        let until = due.earliest(expiry).wall().map_or(Coarse::MAX, Coarse::of);
        Self(Arc::new(Inner {
            id,
            header: header_value(response.access_token.expose_secret()),
            request,
            scope: response.scope.map(String::into_boxed_str),
            requested_scope: response.requested_scope.map(String::into_boxed_str),
            due,
            expiry,
            until,
            extended: schedule.extended_after.map(|after| sent.after(after)),
            arrival_grace: expiry.has_come(now).then(|| now.after(FLOOR)),
            not_before: response.not_before_policy.unwrap_or_default(),
        }))
    }

    /// Creates a token that never expires and is never due.
    #[cfg(feature = "test-util")]
    pub(crate) fn fixed(response: TokenResponse, id: TokenId, request: TokenRequest) -> Self {
        let never = Schedule {
            refresh_after: Duration::ZERO,
            expires_after: Duration::ZERO,
            extended_after: None,
        };
        let now = Now::read();
        let mut token = Self::new(response, id, request, never, now, now);
        let inner = Arc::get_mut(&mut token.0).expect("nobody else has it yet");
        (inner.due, inner.expiry, inner.arrival_grace) =
            (Deadline::never(), Deadline::never(), None);
        inner.until = Coarse::MAX;
        token
    }

    /// Returns the value for an `Authorization` header, `Bearer` and all (RFC 6750 section 2.1).
    ///
    /// It is marked [sensitive](HeaderValue::is_sensitive).
    pub fn header_value(&self) -> &HeaderValue {
        &self.0.header
    }

    /// Returns the token's text, for protocols that carry it elsewhere than in a header.
    pub fn expose_secret(&self) -> &str {
        // Our header is the scheme and visible ASCII.
        let header = self.0.header.to_str().unwrap_or_default();
        header.strip_prefix(SCHEME).unwrap_or_default()
    }

    /// Returns the scope that was granted, if the server named one (RFC 6749 section 3.3).
    pub fn scope(&self) -> Option<&str> {
        self.0.scope.as_deref()
    }

    /// Returns the scopes that were asked for and not granted, if the server named what it granted.
    ///
    /// A server grants less than was asked for without an error (RFC 6749 section 3.3), and the API is the one
    /// to complain, with `insufficient_scope`.
    pub fn missing_scopes(&self) -> impl Iterator<Item = &str> {
        let granted = self.0.scope.as_deref();
        let requested = self
            .0
            .requested_scope
            .as_deref()
            .filter(|_| granted.is_some());
        let mut missing: Vec<_> = scopes(requested.unwrap_or_default()).collect();
        // Linear: the granted list is from the server, and may be as long as its answer.
        let asked_for: HashSet<_> = missing.iter().copied().collect();
        let granted: HashSet<_> = scopes(granted.unwrap_or_default())
            .filter(|scope| asked_for.contains(scope))
            .collect();
        missing.retain(|scope| !granted.contains(scope));
        missing.into_iter()
    }

    /// Returns what the token was asked for.
    pub fn request(&self) -> &TokenRequest {
        &self.0.request
    }

    /// Returns when the cache stops handing the token out: its expiry less the margin of
    /// [`RefreshPolicy::expiry_margin`](crate::RefreshPolicy::expiry_margin).
    ///
    /// By the wall clock; `None` if that lies past the clock's range. An extended lifetime is not counted.
    pub fn usable_until(&self) -> Option<SystemTime> {
        self.0.expiry.wall()
    }

    pub(crate) fn is_alive(&self, now: Now) -> bool {
        self.0.is_alive(now)
    }

    /// Whether the token may be used while the token endpoint fails.
    pub(crate) fn is_extended(&self, now: Now) -> bool {
        self.0
            .extended
            .is_some_and(|extended| !extended.has_come(now))
    }

    #[inline]
    pub(crate) fn not_before(&self) -> u64 {
        self.0.not_before
    }

    #[inline]
    pub(crate) fn id(&self) -> TokenId {
        self.0.id
    }

    /// Copies the header value, so that clones of the copy share no reference count with those of the original.
    pub(crate) fn copy_header(&self) -> HeaderValue {
        header_value(self.expose_secret())
    }

    /// Until when requests may take the token without another check.
    pub(crate) fn fresh_until(&self) -> Deadline {
        self.0.due.earliest(self.0.expiry)
    }

    /// Whether that is still ahead, by a coarse wall clock and an exact monotonic one.
    #[cfg(feature = "metrics")]
    pub(crate) fn is_fresh(&self) -> bool {
        self.0.is_coarsely_fresh() && self.0.is_fresh_otherwise(0, Instant::now())
    }

    /// As [`fresh_until`](Self::fresh_until), for a coarse reading of the wall clock.
    #[inline]
    pub(crate) fn coarsely_until(&self) -> Coarse {
        self.0.until
    }

    pub(crate) fn is_due(&self, now: Now) -> bool {
        self.0.due.has_come(now)
    }

    pub(crate) fn due(&self) -> Deadline {
        self.0.due
    }

    pub(crate) fn expiry(&self) -> Deadline {
        self.0.expiry
    }

    /// Whether the token lives for longer than `span` from `now`.
    pub(crate) fn outlives(&self, span: Duration, now: Now) -> bool {
        self.0.expiry.remaining(now) > span
    }

    /// Until when the token may be used while the token endpoint fails, if longer than otherwise.
    pub(crate) fn extended(&self) -> Option<Deadline> {
        self.0.extended
    }

    /// Whether the token has died since it arrived.
    ///
    /// A token past its margin on arrival serves until another one may be requested.
    pub(crate) fn has_died(&self, now: Now) -> bool {
        !self.is_alive(now) && self.0.arrival_grace.is_none_or(|until| until.has_come(now))
    }

    /// Whether both look the same to the API: servers may grant the same token twice.
    pub(crate) fn same_text(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0.header == other.0.header
    }
}

impl Inner {
    pub(crate) fn id(&self) -> TokenId {
        self.id
    }

    /// Whether a request may take the token, by the wall clock only.
    #[inline]
    pub(crate) fn is_coarsely_fresh(&self) -> bool {
        Coarse::read() < self.until
    }

    fn is_alive(&self, now: Now) -> bool {
        !self.expiry.has_come(now)
    }

    /// Whether it may by everything else: the monotonic clock, and the `not_before` of later tokens.
    pub(crate) fn is_fresh_otherwise(&self, not_before: u64, now: Instant) -> bool {
        !self.expiry.is_past(now) && !self.due.is_past(now) && self.not_before >= not_before
    }
}

impl fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessToken")
            .field("scope", &self.0.scope)
            .field("usable_until", &self.usable_until())
            .finish_non_exhaustive()
    }
}

fn scopes(text: &str) -> impl Iterator<Item = &str> {
    text.split(' ').filter(|scope| !scope.is_empty())
}

fn header_value(text: &str) -> HeaderValue {
    let mut value = Zeroizing::new(Vec::with_capacity(SCHEME.len() + text.len()));
    value.extend_from_slice(SCHEME.as_bytes());
    value.extend_from_slice(text.as_bytes());
    // `Bytes` with an owner wipes the text when the last clone of the header goes.
    let mut header = HeaderValue::from_maybe_shared(Bytes::from_owner(value))
        .expect("visible ASCII makes a header value");
    header.set_sensitive(true);
    header
}

const SCHEME: &str = "Bearer ";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_identifies_an_entry_and_the_order_of_its_tokens() {
        let entry = (1 << 39) - 1;
        let last = (1 << 24) - 1;
        // A flight number that overflows does not spill into the entry's bits.
        let ids = [last - 1, last, last + 1, last + 2].map(|flight| TokenId::new(entry, flight));
        for (nth, id) in ids.into_iter().enumerate() {
            assert_eq!(id.entry(), entry);
            assert_eq!(id.is_between(ids[1], ids[2]), (1..=2).contains(&nth));
            assert!(id.is_between(ids[0], ids[3]));
            assert!(!TokenId::new(entry - 1, 1).is_between(id, ids[3]));
        }
        for flight in [last, last + 1, u64::MAX] {
            assert_eq!(TokenId::new(2, flight).entry(), 2);
        }
        assert_eq!(TokenId::new(2, last + 1), TokenId::new(2, 0));
        assert_ne!(TokenId::new(1, last + 1).get(), 0);
        // One bit is left to spare.
        assert_eq!(TokenId::new(entry, last).get(), u64::MAX >> 1);
    }
}
