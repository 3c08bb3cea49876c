//! No-op metrics, for builds without the feature `metrics`.

use std::time::Duration;

use super::RefusalOutcome;
use crate::{error::TokenError, token::AccessToken};

#[derive(Clone, Debug)]
pub(crate) struct Meters;

impl Meters {
    pub(crate) const fn new(_: &'static str) -> Self {
        Self
    }

    pub(crate) const fn renew(&self) {}

    pub(crate) const fn requests(&self) -> Requests {
        Requests
    }

    pub(crate) const fn attempt_ended(&self, _: &'static str, _: Option<&TokenError>) {}

    pub(crate) const fn flight_ended(&self, _: &'static str, _: Duration) {}

    pub(crate) const fn refused(&self, _: RefusalOutcome) {}

    pub(crate) const fn replayed(&self) {}

    pub(crate) const fn waiters(&self, _: i64) {}

    pub(crate) const fn gates(&self, _: i64) {}

    pub(crate) const fn keys(&self, _: i64) {}
}

#[derive(Clone)]
pub(crate) struct Requests;

impl Requests {
    #[inline]
    pub(crate) const fn fresh(&self, _: &AccessToken) {}

    #[inline]
    pub(crate) const fn checked(&self, _: &AccessToken) {}

    pub(crate) const fn waited(&self, _: &AccessToken) {}

    pub(crate) const fn failed(&self) {}

    pub(crate) const fn refused(&self) {}

    pub(crate) const fn bare(&self) {}
}
