//! A gateway that calls one API for many tenants, each with its own authorization server and its own token.
//!
//! A request names its tenant in a header. The gateway puts the tenant's [`TokenRequest`] among the request's extensions,
//! and the layer does the rest: a token, a token request in flight and a backoff for each tenant. A tenant whose server
//! hangs does not hold up the others, and the number of tenants is bounded.
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

/// What the gateway knows of a tenant: made once, since requests share the token of clones of one source.
type Tenants = HashMap<String, TokenRequest>;

/// Names the token that a request is to carry, and lets no request pass whose tenant is unknown.
fn name_token(
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
        .filter(move |request| name_token(&tenants, request))
        .layer(BearerAuthLayer::new(cache.clone()))
        // Stands for the API: it answers with the token that it was sent.
        .service(service_fn(|request: Request<String>| async move {
            time::sleep(Duration::from_millis(5)).await;
            let token = request.headers().get("authorization").ok_or("no token")?;
            Ok::<_, BoxError>(Response::new(token.to_str()?.to_owned()))
        }))
}

fn cache() -> TokenCache {
    // A request that names no tenant is to have no token at all.
    let nobodys = source_fn(|_| async { Err(TokenError::terminal("no tenant is named")) });
    let policy = RefreshPolicy::new()
        .attempt_timeout(Duration::from_millis(500))
        .attempts(2)
        .max_keys(TENANTS);
    TokenCache::with_policy(nobodys, policy)
}

// What comes of it.

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let mut servers: Vec<Server> = (0..TENANTS).map(|_| Server::well()).collect();
    servers[BROKEN] = Server::hanging();
    servers[BRIEF].lifetime = Duration::from_secs(2);
    // One more than there is room for.
    servers.push(Server::well());
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
                    &format!("Bearer token-of-{}", servers[tenant].id())
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
    let asked: usize = servers.iter().map(Server::asked).sum();
    println!(
        "{} requests for {TENANTS} tenants: {asked} token requests, {failed} requests of the broken tenant failed",
        20 * TENANTS,
    );
    println!("slowest of the others: {} ms", slowest.as_millis());
    assert_eq!(failed, 20);
    for (tenant, server) in servers[..TENANTS].iter().enumerate() {
        assert_eq!(
            server.asked(),
            if tenant == BROKEN { 2 } else { 1 },
            "{tenant}"
        );
    }
    // The broken one's had to wait for two attempts of 500 ms.
    assert!(slowest < Duration::from_millis(500));

    // The cache is full of tokens in use: the next tenant has to wait, and pushes nobody out.
    let error = gateway.clone().oneshot(request(&name(TENANTS))?).await;
    let error = error.err().ok_or("more tokens than there is room for")?;
    println!("one tenant more: {error}");
    assert!(
        error
            .downcast_ref()
            .is_some_and(TokenError::is_too_many_keys)
    );
    gateway.clone().oneshot(request(&name(0))?).await?;
    assert_eq!(servers[0].asked(), 1);

    // One of the tokens expires, and nobody asks for that tenant any more: there is the room.
    time::sleep(Duration::from_secs(3).saturating_sub(start.elapsed())).await;
    gateway.clone().oneshot(request(&name(TENANTS))?).await?;
    println!("a little later: served");

    // Neither a tenant that is unknown nor a request without one gets a token.
    for headers in [Some("nobody"), None] {
        let mut request = request("nobody")?;
        if headers.is_none() {
            request.headers_mut().remove("x-tenant");
        }
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
/// The tenant whose tokens live for a moment only.
const BRIEF: usize = 11;

// The authorization servers.

/// A tenant's authorization server.
struct Server {
    id: usize,
    hangs: bool,
    lifetime: Duration,
    asked: Arc<AtomicUsize>,
}

impl Server {
    fn well() -> Self {
        static IDS: AtomicUsize = AtomicUsize::new(100);
        Self {
            id: IDS.fetch_add(1, Ordering::Relaxed),
            hangs: false,
            lifetime: Duration::from_secs(300),
            asked: Arc::default(),
        }
    }

    fn hanging() -> Self {
        Self {
            hangs: true,
            ..Self::well()
        }
    }

    fn id(&self) -> usize {
        self.id
    }

    /// How many token requests it has seen.
    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }

    /// The tenant's credentials, as they go into the extensions of its requests.
    ///
    /// A real one is a `ClientCredentials` of the tenant's issuer, client and secret.
    fn token_request(&self) -> TokenRequest {
        let (id, hangs, lifetime) = (self.id, self.hangs, self.lifetime);
        let asked = Arc::clone(&self.asked);
        let source = source_fn(move |_| {
            asked.fetch_add(1, Ordering::Relaxed);
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
