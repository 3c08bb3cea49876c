//! A gateway that calls one API for many tenants, each with its own authorization server and its own token.
//!
//! A request names its tenant in a header. The gateway adds the tenant's [`TokenRequest`] to the request's extensions,
//! and the layer keeps a token, a token request in flight and a backoff for each tenant. A tenant whose server hangs does
//! not hold up the others, and the number of tenants is bounded.
//!
//! Everything is in memory. Runs in about three seconds, and exits with an error if it does not go as described.
//!
//! ```sh
//! cargo run --example many_tenants
//! ```

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::{Request, Response};
use tokio::{
    task::JoinSet,
    time::{self, Instant},
};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_bearer::{
    BearerAuthLayer, BoxError, RefreshPolicy, SharedSource, TokenCache, TokenError, TokenRequest,
    TokenResponse, source_fn,
};

// The gateway.

/// Each tenant's [`TokenRequest`], made once, since only clones of one source share a token.
type Tenants = HashMap<String, TokenRequest>;

/// Selects a request's token by its tenant, and rejects requests of unknown tenants.
fn select_token(
    tenants: &Tenants,
    mut request: Request<String>,
) -> Result<Request<String>, BoxError> {
    let tenant = request
        .headers()
        .get("x-tenant")
        .ok_or("no tenant is named")?;
    let token = tenants
        .get(tenant.to_str()?)
        .ok_or("the tenant is unknown")?;
    request.extensions_mut().insert(token.clone());
    Ok(request)
}

fn gateway(
    tenants: Tenants,
    cache: &TokenCache,
) -> impl Service<Request<String>, Response = Response<String>, Error = BoxError, Future: Send>
+ Clone
+ Send
+ 'static {
    let tenants = Arc::new(tenants);
    ServiceBuilder::new()
        .filter(move |request| select_token(&tenants, request))
        .layer(BearerAuthLayer::new(cache.clone()))
        // In place of the API: it answers with the token that it was sent.
        .service(service_fn(|request: Request<String>| async move {
            time::sleep(Duration::from_millis(5)).await;
            let token = request.headers().get("authorization").ok_or("no token")?;
            Ok::<_, BoxError>(Response::new(token.to_str()?.to_owned()))
        }))
}

fn cache() -> TokenCache {
    // A request without a tenant gets no token.
    let no_tenant = source_fn(|_| async { Err(TokenError::terminal("no tenant is named")) });
    let policy = RefreshPolicy::new()
        .attempt_timeout(Duration::from_millis(500))
        .attempts(2)
        .max_keys(TENANTS);
    TokenCache::with_policy(no_tenant, policy)
}

// The demonstration.

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let mut servers: Vec<Server> = (0..TENANTS).map(|_| Server::new()).collect();
    servers[BROKEN].hangs = true;
    servers[SHORT_LIVED].lifetime = Duration::from_secs(2);
    // One more than the cache has room for.
    servers.push(Server::new());
    let tenants = servers.iter().enumerate();
    let tenants = tenants.map(|(i, server)| (name(i), server.token_request()));
    let cache = cache();
    let gateway = gateway(tenants.collect(), &cache);
    let start = Instant::now();

    // All tenants at once, twenty requests each.
    let mut requests = JoinSet::new();
    for tenant in (0..TENANTS).flat_map(|tenant| [tenant; 20]) {
        let gateway = gateway.clone();
        requests.spawn(async move {
            let answer = gateway.oneshot(request(&name(tenant))?).await;
            Ok::<_, BoxError>((tenant, answer, start.elapsed()))
        });
    }
    let (mut slowest, mut failed) = (Duration::ZERO, 0);
    for outcome in requests.join_all().await {
        let (tenant, answer, took) = outcome?;
        match answer {
            Ok(answer) => {
                assert_eq!(
                    answer.body(),
                    &format!("Bearer token-of-{}", servers[tenant].id)
                );
                slowest = slowest.max(took);
            }
            Err(error) => {
                assert_eq!(tenant, BROKEN, "{error}");
                assert!(error.downcast_ref().is_some_and(TokenError::is_timeout));
                failed += 1;
            }
        }
    }
    let token_requests: usize = servers.iter().map(Server::requests).sum();
    println!(
        "{} requests for {TENANTS} tenants: {token_requests} token requests, {failed} requests of the broken tenant failed",
        20 * TENANTS,
    );
    println!("slowest of the others: {} ms", slowest.as_millis());
    assert_eq!(failed, 20);
    for (tenant, server) in servers[..TENANTS].iter().enumerate() {
        assert_eq!(
            server.requests(),
            if tenant == BROKEN { 2 } else { 1 },
            "{tenant}"
        );
    }
    // Those of the broken tenant waited for two attempts of 500 ms.
    assert!(slowest < Duration::from_millis(500));

    // The cache is full of tokens in use: another tenant gets none, and evicts none.
    let error = gateway.clone().oneshot(request(&name(TENANTS))?).await;
    let error = error.err().ok_or("more tokens than there is room for")?;
    println!("one more tenant: {error}");
    assert!(
        error
            .downcast_ref()
            .is_some_and(TokenError::is_too_many_keys)
    );
    gateway.clone().oneshot(request(&name(0))?).await?;
    assert_eq!(servers[0].requests(), 1);

    // One of the tokens expires, and no request asks for another: that makes room.
    time::sleep(Duration::from_secs(3).saturating_sub(start.elapsed())).await;
    gateway.clone().oneshot(request(&name(TENANTS))?).await?;
    println!("a little later: served");

    // Neither an unknown tenant nor a request without one gets a token.
    let mut anonymous = request("nobody")?;
    anonymous.headers_mut().remove("x-tenant");
    for request in [request("nobody")?, anonymous] {
        let error = gateway.clone().oneshot(request).await;
        println!("refused: {}", error.err().ok_or("a token for nobody")?);
    }
    Ok(())
}

fn request(tenant: &str) -> Result<Request<String>, http::Error> {
    Request::get("https://api.example.com/sims")
        .header("x-tenant", tenant)
        .body(String::new())
}

fn name(tenant: usize) -> String {
    format!("tenant-{tenant}")
}

const TENANTS: usize = 50;
/// The tenant whose authorization server does not answer.
const BROKEN: usize = 7;
/// The tenant whose tokens expire soon.
const SHORT_LIVED: usize = 11;

// The authorization servers.

/// A tenant's authorization server.
struct Server {
    id: usize,
    hangs: bool,
    lifetime: Duration,
    requests: Arc<AtomicUsize>,
}

impl Server {
    fn new() -> Self {
        static IDS: AtomicUsize = AtomicUsize::new(100);
        Self {
            id: IDS.fetch_add(1, Ordering::Relaxed),
            hangs: false,
            lifetime: Duration::from_secs(300),
            requests: Arc::default(),
        }
    }

    /// How many token requests it has seen.
    fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    /// What goes into the extensions of the tenant's requests.
    ///
    /// A real one has a `ClientCredentials` with the tenant's issuer, client and secret.
    fn token_request(&self) -> TokenRequest {
        let (id, hangs, lifetime) = (self.id, self.hangs, self.lifetime);
        let requests = Arc::clone(&self.requests);
        let source = source_fn(move |_| {
            requests.fetch_add(1, Ordering::Relaxed);
            async move {
                if hangs {
                    std::future::pending::<()>().await;
                }
                time::sleep(Duration::from_millis(50)).await;
                Ok(TokenResponse::new(format!("token-of-{id}"))?.expires_in(lifetime))
            }
        });
        TokenRequest::new().source(SharedSource::new(source))
    }
}
