//! Credentials that were refused, and whether there are others by now.

use std::time::Duration;

use tokio::time::Instant;

use super::auth::Credentials;
use crate::{error::TokenError, sync::Mutex};

/// The credentials that the server last refused with a terminal error.
pub(super) struct Refused(Mutex<Option<Refusal>>);

#[derive(Clone)]
struct Refusal {
    credentials: Credentials,
    /// When the files were last checked.
    files_checked: Option<Instant>,
    changed: bool,
}

impl Refused {
    pub(super) fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Records the outcome of a request with these credentials.
    pub(super) fn record(&self, credentials: &Credentials, failure: Option<&TokenError>) {
        match failure {
            None => *self.0.lock() = None,
            Some(error) if error.is_of_credentials() => {
                credentials.refuse();
                *self.0.lock() = Some(Refusal {
                    credentials: credentials.clone(),
                    files_checked: None,
                    changed: false,
                });
            }
            Some(error) => {
                if error.may_be_of_credentials() {
                    credentials.doubt();
                }
                #[cfg(feature = "rustls")]
                if error.may_be_of_certificate() {
                    credentials.doubt_certificate();
                }
                // New credentials would not help, so an earlier refusal is no longer worth watching.
                if !error.is_transient() {
                    *self.0.lock() = None;
                }
            }
        }
    }

    /// Whether there are others by now. Files are checked ten times a second at most, and not under the lock.
    pub(super) fn has_changed(&self, now: Instant) -> bool {
        let (credentials, check_files) = {
            let mut refusal = self.0.lock();
            let Some(refusal) = &mut *refusal else {
                return false;
            };
            if refusal.changed {
                return true;
            }
            let check_files = refusal
                .files_checked
                .is_none_or(|checked| now.duration_since(checked) >= FILE_CHECK_INTERVAL);
            if check_files {
                refusal.files_checked = Some(now);
            }
            (refusal.credentials.clone(), check_files)
        };
        let changed = credentials
            .iter()
            .any(|value| (check_files || !value.is_of_file()) && value.is_outdated());
        if changed {
            let mut refusal = self.0.lock();
            // Unless other credentials have been refused meanwhile.
            if let Some(refusal) = refusal
                .as_mut()
                .filter(|current| current.credentials.same_text(&credentials))
            {
                refusal.changed = true;
            }
        }
        changed
    }
}

/// How often the files of refused credentials are checked. A token of seconds has a fraction of one left when its
/// refresh is refused, and a check costs some microseconds.
const FILE_CHECK_INTERVAL: Duration = Duration::from_millis(100);
