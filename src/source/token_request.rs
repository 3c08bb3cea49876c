//! [`TokenRequest`]: what a token is for, and thus its key in the cache.

use std::{
    fmt,
    hash::{BuildHasher, Hash, Hasher, RandomState},
    sync::{Arc, LazyLock, OnceLock},
};

use super::{
    SharedSource,
    params::{pairs, param_names},
};

/// What a request's token is for, if that differs from what the source asks for by default.
///
/// It goes into the extensions of an [`http::Request`], or to [`TokenCache::get_for`](crate::TokenCache::get_for).
/// Equal requests get the same token; each different one has its own token, its own token request in flight and its own
/// failures. Everything that can change the token is compared: the scopes as a set, the resources as a set, the
/// parameters, and the source.
///
/// ```
/// use tower_bearer::TokenRequest;
///
/// let mut request = http::Request::new(());
/// request.extensions_mut().insert(
///     TokenRequest::new()
///         .scope("sims:read")
///         .resource("https://api.example.com"),
/// );
/// assert_eq!(
///     TokenRequest::new().scope("a b").scope("c"),
///     TokenRequest::new().scope("c b").scope("a").scope("b"),
/// );
/// ```
///
/// Clones are cheap. Make one and clone it into each request, which saves the sorting and most of the look-up.
///
/// Its hash is computed once, with random keys: it differs between processes, whatever the hasher.
///
/// Nothing is checked here. If it names something that cannot be asked for, such as a scope with a quote in it, the
/// token request fails without being sent.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct TokenRequest(Arc<Hashed>);

/// The fields, and their hash once it was needed.
#[derive(Clone, Default)]
struct Hashed {
    fields: Fields,
    hash: OnceLock<u64>,
}

impl PartialEq for Hashed {
    fn eq(&self, other: &Self) -> bool {
        self.fields == other.fields
    }
}

impl Eq for Hashed {}

#[derive(Clone, Default, PartialEq, Eq, Hash)]
struct Fields {
    /// Sorted, without duplicates.
    scopes: Vec<String>,
    /// Sorted, without duplicates.
    resources: Vec<String>,
    /// Sorted by name; those of one name keep their order.
    params: Vec<(String, String)>,
    source: Option<SharedSource>,
}

impl TokenRequest {
    /// Creates a request for what the source asks for by default.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a scope, or several with a space between them (RFC 6749 section 3.3).
    ///
    /// The scopes named here take the place of those that the source was built with.
    #[must_use]
    pub fn scope(self, scope: impl AsRef<str>) -> Self {
        self.map(|fields| {
            for scope in scope.as_ref().split(' ') {
                insert(&mut fields.scopes, scope);
            }
        })
    }

    /// Adds a resource for which the token is to be valid, an absolute URI without a fragment (RFC 8707 section 2).
    ///
    /// The resources named here take the place of those that the source was built with.
    #[must_use]
    pub fn resource(self, uri: impl AsRef<str>) -> Self {
        self.map(|fields| insert(&mut fields.resources, uri.as_ref()))
    }

    /// Adds a parameter to the body of the token request, such as `audience`.
    ///
    /// It takes the place of a parameter of the same name that the source was built with. Its value is never
    /// printed.
    #[must_use]
    pub fn param(self, name: impl Into<String>, value: impl Into<String>) -> Self {
        let name = name.into();
        self.map(|fields| {
            let place = fields.params.partition_point(|(other, _)| *other <= name);
            fields.params.insert(place, (name, value.into()));
        })
    }

    /// Sets the source that fetches the token instead of the cache's own: a tenant's, for example.
    #[must_use]
    pub fn source(self, source: SharedSource) -> Self {
        self.map(|fields| fields.source = Some(source))
    }

    /// Returns the scopes, sorted and without duplicates; none means those of the source.
    pub fn scopes(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.fields.scopes.iter().map(String::as_str)
    }

    /// Returns the resources, sorted and without duplicates; none means those of the source.
    pub fn resources(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.fields.resources.iter().map(String::as_str)
    }

    /// Returns the further parameters, sorted by their names.
    pub fn params(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        pairs(&self.0.fields.params)
    }

    /// Returns the source that fetches the token, if it is not the cache's own: it tells whose token an event is about.
    pub fn own_source(&self) -> Option<&SharedSource> {
        self.0.fields.source.as_ref()
    }

    /// Whether this asks for what the cache's own source asks for by default.
    pub(crate) fn is_plain(&self) -> bool {
        let Fields {
            scopes,
            resources,
            params,
            source,
        } = &self.0.fields;
        scopes.is_empty() && resources.is_empty() && params.is_empty() && source.is_none()
    }

    fn map(mut self, change: impl FnOnce(&mut Fields)) -> Self {
        let hashed = Arc::make_mut(&mut self.0);
        hashed.hash.take();
        change(&mut hashed.fields);
        self
    }
}

/// With a hash that is computed once: hashing the fields takes longer than the rest of a look-up.
impl Hash for TokenRequest {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Random, since fields may come from outside: with a known hash, many could be made to collide.
        static KEYS: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        let hash = self.0.hash.get_or_init(|| KEYS.hash_one(&self.0.fields));
        state.write_u64(*hash);
    }
}

impl fmt::Debug for TokenRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenRequest")
            .field("scopes", &self.0.fields.scopes)
            .field("resources", &self.0.fields.resources)
            .field("params", &param_names(self.params()))
            .finish_non_exhaustive()
    }
}

/// Inserts `item` in order, unless it is there.
fn insert(items: &mut Vec<String>, item: &str) {
    if let Err(place) = items.binary_search_by(|other| other.as_str().cmp(item)) {
        items.insert(place, item.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{TokenResponse, source_fn};

    #[test]
    fn requests_for_the_same_token_are_equal() {
        let one = TokenRequest::new()
            .scope("b a")
            .scope("c a")
            .resource("https://b.example")
            .resource("https://a.example")
            .param("x", "1")
            .param("audience", "api");
        let other = TokenRequest::new()
            .param("audience", "api")
            .param("x", "1")
            .resource("https://a.example")
            .resource("https://b.example")
            .resource("https://a.example")
            .scope("c")
            .scope("b")
            .scope("a");
        assert_eq!(one, other);
        assert_eq!(one.scopes().collect::<Vec<_>>(), ["a", "b", "c"]);
    }

    #[test]
    fn requests_for_different_tokens_differ() {
        let new = TokenRequest::new;
        let [one, other] = ["one", "other"].map(|text| {
            SharedSource::new(source_fn(move |_| async move { TokenResponse::new(text) }))
        });
        let all = [
            new(),
            // Another client, or another certificate, is another source.
            new().source(one.clone()),
            new().source(other),
            new().source(one).scope("a"),
            new().scope("a"),
            new().scope("A"),
            new().scope("a").scope("b"),
            new().resource("a"),
            new().param("a", ""),
            new().param("a", "1"),
            new().param("a", "1").param("a", "2"),
            new().param("a", "2").param("a", "1"),
            new().param("b", "1"),
        ];
        for (i, a) in all.iter().enumerate() {
            for (j, b) in all.iter().enumerate() {
                assert_eq!(a == b, i == j, "{a:?} {b:?}");
            }
        }
        assert!(new().is_plain());
        assert!(!all[1..].iter().any(TokenRequest::is_plain));
    }

    /// Law 1: a key that is looked up in the wrong place would get a second flight.
    #[test]
    fn equal_requests_have_equal_hashes() {
        let hasher = RandomState::new();
        let one = TokenRequest::new().scope("a");
        let hash = hasher.hash_one(&one);
        let more = one.clone().scope("b");
        let other = TokenRequest::new().scope("b a");
        assert_eq!(hasher.hash_one(&more), hasher.hash_one(&other));
        assert_ne!(hasher.hash_one(&more), hash);
        assert_eq!(hasher.hash_one(TokenRequest::new().scope("a")), hash);
        // This one is changed in place, since nobody shares it.
        assert_eq!(hasher.hash_one(one.scope("b")), hasher.hash_one(&other));
    }

    /// Law 9: a parameter may be a secret.
    #[test]
    fn debug_shows_no_value_of_a_parameter() {
        let text = format!("{:?}", TokenRequest::new().param("key", "CANARY"));
        assert!(text.contains("key") && !text.contains("CANARY"), "{text}");
    }
}
