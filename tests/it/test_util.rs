//! What the tests of other programs rely on.

use std::convert::Infallible;

use http::{Request, Response, StatusCode};
use tokio::time;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_bearer::{
    BearerAuthLayer, CloneBody, Fetch, RefreshPolicy, RefreshToken, SharedSource, TokenCache,
    TokenError, TokenRequest, TokenResponse, TokenSource, TokenState,
    test_util::{Answer, ScriptedSource, bearer, errors, unauthorized},
};

use crate::support::{
    Api, INVALID_TOKEN, caller, everything, get, millis, now, secs, settle, token_error,
    unauthorized as refuse,
};

#[tokio::test(start_paused = true)]
async fn a_script_is_played_in_order_and_then_ends() {
    let lifetime = secs(300);
    let source = ScriptedSource::new([
        Answer::error(TokenError::transient("down")),
        Answer::error(errors::unavailable(StatusCode::BAD_GATEWAY)),
        Answer::token("a", lifetime),
    ]);
    assert_eq!((source.count(), source.unused()), (0, 3));
    let cache = TokenCache::new(source.clone());
    assert_eq!(cache.get().await.unwrap().expose_secret(), "a");
    let attempts = source.asked().into_iter().map(|asked| asked.attempt);
    assert_eq!(attempts.collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!((source.count(), source.unused()), (3, 0));

    time::sleep(lifetime).await;
    let error = cache.get().await.unwrap_err();
    assert!(!error.is_transient());
    let text = everything(&error);
    assert!(text.contains("attempt 4 is not in the script"), "{text}");

    source.push(TokenResponse::new("b").unwrap());
    time::sleep(secs(6)).await;
    assert_eq!(cache.get().await.unwrap().expose_secret(), "b");
}

#[tokio::test(start_paused = true)]
async fn the_answer_after_the_script_repeats() {
    let source = ScriptedSource::numbered(secs(10));
    source.push(Answer::token("first", secs(10)));
    let cache = TokenCache::new(source.clone());
    for expected in ["first", "token-2", "token-3"] {
        assert_eq!(cache.get().await.unwrap().expose_secret(), expected);
        time::sleep(secs(10)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_held_answer_waits_for_its_release() {
    let source = ScriptedSource::new([
        Answer::token("a", secs(300)).held(),
        Answer::token("b", secs(300)).held(),
        Answer::token("c", secs(300)).held(),
    ]);
    let cache = TokenCache::new(source.clone());
    let waiting = caller(&cache);
    source.until_asked(1).await;
    settle().await;
    assert!(!waiting.is_finished());
    source.release();
    assert_eq!(waiting.await.unwrap().unwrap().expose_secret(), "a");

    // A release in advance is for one answer only.
    source.release();
    time::sleep(secs(300)).await;
    assert_eq!(cache.get().await.unwrap().expose_secret(), "b");
    time::sleep(secs(300)).await;
    let waiting = caller(&cache);
    source.until_asked(3).await;
    settle().await;
    assert!(!waiting.is_finished());
}

/// The dropped attempt uses up no release.
#[tokio::test(start_paused = true)]
async fn an_abandoned_attempt_leaves_its_release_to_the_next() {
    let source = ScriptedSource::new([Answer::hang(), Answer::hang().held()])
        .then_always(Answer::numbered(secs(300)).held());
    let policy = RefreshPolicy::new().attempt_timeout(secs(1));
    let cache = TokenCache::with_policy(source.clone(), policy);
    let waiting = caller(&cache);
    source.until_asked(3).await;
    source.release();
    assert_eq!(waiting.await.unwrap().unwrap().expose_secret(), "token-3");
}

#[tokio::test(start_paused = true)]
async fn the_source_remembers_what_it_was_asked() {
    let first = TokenResponse::new("a").unwrap().expires_in(secs(300));
    let source = ScriptedSource::new([
        Answer::from(first.refresh_token(RefreshToken::new("r"))).after(millis(50)),
        Answer::token("b", secs(300)),
        Answer::token("c", secs(300)),
    ]);
    let cache = TokenCache::new(source.clone());
    cache.get().await.unwrap();
    time::sleep(secs(300)).await;
    cache.get().await.unwrap();
    let wanted = TokenRequest::new().scope("sims:read");
    cache.get_for(&wanted).await.unwrap();

    let asked = source.asked();
    let refresh_tokens = asked.iter().map(|asked| asked.refresh_token.as_ref());
    let texts = refresh_tokens.map(|token| token.map(RefreshToken::expose_secret));
    assert_eq!(texts.collect::<Vec<_>>(), [None, Some("r"), None]);
    assert!(asked[1].request == TokenRequest::new() && asked[2].request == wanted);
    assert!(asked[1].at - asked[0].at >= secs(300));

    cache.shutdown_and_revoke().await.unwrap();
    let revoked = source.revoked();
    let mut texts: Vec<_> = revoked
        .iter()
        .map(|revoked| revoked.access_token.as_ref().unwrap().expose_secret())
        .collect();
    texts.sort_unstable();
    assert_eq!(texts, ["b", "c"]);
}

/// Law 9, also when an assertion fails.
#[tokio::test(start_paused = true)]
async fn a_script_shows_no_token() {
    let secret = || TokenResponse::new("CANARY").unwrap();
    let source = ScriptedSource::new([
        secret().refresh_token(RefreshToken::new("CANARY")),
        secret(),
    ]);
    let mut fetch = Fetch::new();
    fetch.refresh_token = Some(RefreshToken::new("CANARY"));
    source.fetch(fetch).await.unwrap();
    let caches = [TokenCache::fixed("CANARY"), TokenCache::new(source.clone())];
    let text = format!("{source:?} {:?} {caches:?}", source.asked());
    assert!(!text.contains("CANARY"), "{text}");
}

/// Nor a clock: everything is ready at the first poll.
#[test]
fn a_fixed_token_needs_no_runtime() {
    let cache = TokenCache::fixed("fixed");
    let mut client = BearerAuthLayer::new(cache.clone()).layer(Api::echoing());
    for _ in 0..3 {
        assert_eq!(now(client.call(get())).unwrap().body(), "fixed");
    }
    assert_eq!(now(cache.get()).unwrap().expose_secret(), "fixed");
    assert_eq!(cache.peek().unwrap().usable_until(), None);

    let tenants = ScriptedSource::numbered(secs(300));
    let tenant = TokenRequest::new().source(SharedSource::new(tenants.clone()));
    let scope = TokenRequest::new().scope("a");
    for request in [tenant, scope] {
        assert_eq!(
            now(cache.get_for(&request)).unwrap().expose_secret(),
            "fixed"
        );
    }
    assert_eq!(tenants.count(), 0);

    cache.invalidate(&cache.peek().unwrap());
    assert_eq!(now(cache.get()).unwrap().expose_secret(), "fixed");
    cache.shutdown();
    assert!(now(cache.get()).unwrap_err().is_shut_down());
}

#[tokio::test(start_paused = true)]
async fn a_fixed_token_outlives_time_and_refusals() {
    let cache = TokenCache::fixed("fixed");
    time::sleep(secs(10 * 365 * 24 * 60 * 60)).await;
    assert_eq!(cache.get().await.unwrap().expose_secret(), "fixed");

    let refusing = Api::new(|_| refuse(INVALID_TOKEN));
    let client = BearerAuthLayer::new(cache.clone())
        .replay(CloneBody)
        .layer(refusing);
    for _ in 0..3 {
        let answer = client.clone().oneshot(get()).await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(cache.get().await.unwrap().expose_secret(), "fixed");
        time::sleep(secs(6)).await;
    }
    cache.shutdown_and_revoke().await.unwrap();
}

/// The status shows it, whether or not the request can be sent again.
#[tokio::test(start_paused = true)]
async fn a_refusal_of_a_fixed_token_is_noticed() {
    for replays in [false, true] {
        let cache = TokenCache::fixed("fixed");
        let refusing = Api::new(|_| refuse(INVALID_TOKEN));
        let layer = BearerAuthLayer::new(cache.clone());
        let answer = match replays {
            true => layer.replay(CloneBody).layer(refusing).oneshot(get()).await,
            false => layer.layer(refusing).oneshot(get()).await,
        };
        assert_eq!(answer.unwrap().status(), StatusCode::UNAUTHORIZED);
        settle().await;
        assert_eq!(cache.status().state(), TokenState::Refused, "{replays}");
    }
}

#[test]
fn a_failing_cache_needs_no_runtime() {
    let cache = TokenCache::failing(errors::rejected("invalid_client"));
    let mut client = BearerAuthLayer::new(cache.clone()).layer(Api::echoing());
    for _ in 0..3 {
        let error = now(client.call(get())).unwrap_err();
        assert_eq!(token_error(&error).oauth_error(), Some("invalid_client"));
        assert!(now(cache.get()).unwrap_err().is_rejected());
    }
    let keyed = now(cache.get_for(&TokenRequest::new().scope("a")));
    assert!(keyed.unwrap_err().is_rejected());
    assert!(cache.peek().is_none());
    cache.shutdown();
    assert!(now(cache.get()).unwrap_err().is_shut_down());
}

/// Their `Debug` is exactly the same.
#[tokio::test(start_paused = true)]
async fn made_errors_look_like_real_ones() {
    let same =
        |made: TokenError, met: TokenError| assert_eq!(format!("{made:?}"), format!("{met:?}"));
    let policy = || RefreshPolicy::new().attempts(1);
    let cache = |answer: Answer, policy| {
        TokenCache::with_policy(
            ScriptedSource::new([] as [Answer; 0]).then_always(answer),
            policy,
        )
    };

    same(
        errors::timeout(),
        cache(Answer::hang(), policy()).get().await.unwrap_err(),
    );
    same(
        errors::panicked(),
        cache(Answer::panic(), policy()).get().await.unwrap_err(),
    );
    let full = cache(Answer::hang(), policy().max_waiters(0));
    same(errors::overloaded(), full.get().await.unwrap_err());
    let full = cache(Answer::hang(), policy().max_keys(0));
    let keyed = full.get_for(&TokenRequest::new().scope("a")).await;
    same(errors::too_many_keys(), keyed.unwrap_err());
    full.shutdown();
    same(errors::shut_down(), full.get().await.unwrap_err());
    let cold = cache(Answer::hang(), policy());
    let met = std::thread::spawn(move || now(cold.get()).unwrap_err());
    same(errors::no_runtime(), met.join().unwrap());

    // These also carry details of the real failure.
    let client = BearerAuthLayer::new(TokenCache::fixed("a")).layer(Api::echoing());
    let elsewhere = Request::get("http://example.com")
        .body(String::new())
        .unwrap();
    let met = client.oneshot(elsewhere).await.unwrap_err();
    let met = token_error(&met);
    assert!(met.is_insecure_uri() && errors::insecure_uri().is_insecure_uri());
    assert_eq!(errors::insecure_uri().is_transient(), met.is_transient());
    let met = TokenResponse::new("").unwrap_err();
    assert!(met.is_malformed_response() && errors::malformed_response().is_malformed_response());
    assert_eq!(
        errors::malformed_response().is_transient(),
        met.is_transient()
    );
}

/// Most logs show the message without its sources.
#[test]
fn the_message_says_what_to_mend_about_a_credential() {
    assert_eq!(
        errors::credentials().to_string(),
        "the client's credentials cannot be used (the private key cannot be read)"
    );
    assert_eq!(
        errors::no_credential().to_string(),
        "the client's credential could not be obtained \
         (the environment variable \"CLIENT_SECRET\" is not set)"
    );
}

#[test]
fn there_is_an_error_of_each_kind() {
    type Predicate = fn(&TokenError) -> bool;
    let predicates: [(&str, Predicate); 10] = [
        ("transport", TokenError::is_transport),
        ("timeout", TokenError::is_timeout),
        ("unavailable", TokenError::is_unavailable),
        ("rejected", TokenError::is_rejected),
        ("malformed", TokenError::is_malformed_response),
        ("interrupted", TokenError::is_interrupted),
        ("insecure", TokenError::is_insecure_uri),
        ("overloaded", TokenError::is_overloaded),
        ("keys", TokenError::is_too_many_keys),
        ("shut down", TokenError::is_shut_down),
    ];
    let all = errors::all();
    for (name, predicate) in predicates {
        assert!(all.iter().any(predicate), "{name}");
    }
    assert!(all.iter().any(TokenError::is_no_runtime));
    for error in &all {
        let true_of_it = predicates.iter().filter(|(_, is)| is(error)).count();
        assert!(true_of_it <= 1, "{error:?}");
    }
    assert!(errors::rejected("slow_down").is_transient());
    assert!(!errors::rejected("invalid_scope").is_transient());
    assert_eq!(errors::rejected("invalid_client").status().unwrap(), 401);
}

#[test]
#[should_panic(expected = "not an OAuth error code")]
fn an_invalid_oauth_error_code_panics() {
    let _ = errors::rejected("Not Found");
}

#[test]
#[should_panic(expected = "visible ASCII")]
fn a_token_not_fit_for_a_header_panics() {
    let _ = TokenCache::fixed("two words");
}

#[test]
fn bearer_reads_the_token_of_a_request() {
    let request = |values: &[&str]| {
        let mut request = Request::new(());
        for value in values {
            request
                .headers_mut()
                .append("authorization", value.parse().unwrap());
        }
        request
    };
    assert_eq!(bearer(&request(&["Bearer a"])), Some("a"));
    assert_eq!(bearer(&request(&["bearer a"])), Some("a"));
    assert_eq!(bearer(&request(&[])), None);
    assert_eq!(bearer(&request(&["Basic a"])), None);
    assert_eq!(bearer(&request(&["Bearer a", "Bearer b"])), None);
}

/// The layer accepts it as a refusal.
#[tokio::test(start_paused = true)]
async fn a_made_refusal_replaces_the_token() {
    let client = service_fn(|request: Request<String>| async move {
        Ok::<_, Infallible>(match bearer(&request) {
            Some("token-1") => unauthorized(String::new()),
            token => Response::new(token.unwrap().to_owned()),
        })
    });
    let source = ScriptedSource::numbered(secs(300));
    let client = BearerAuthLayer::new(source.clone())
        .replay(CloneBody)
        .refresh_on_unexplained_401(false)
        .layer(client);
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-2");
}

/// The documentation promises this for `sleep`; `advance` skips the watch over the token.
#[tokio::test(start_paused = true)]
async fn the_very_next_request_sees_a_sleep_past_the_expiry() {
    let source = ScriptedSource::numbered(secs(300));
    let mut client = BearerAuthLayer::new(source.clone()).layer(Api::echoing());
    for expected in ["token-1", "token-2", "token-3"] {
        // From the second one on the service keeps the token.
        for _ in 0..3 {
            assert_eq!(client.call(get()).await.unwrap().body(), expected);
        }
        time::sleep(secs(300)).await;
    }
}

/// The documentation says so for `advance`, and promises the timeout for `sleep`.
#[tokio::test(start_paused = true)]
async fn a_token_request_is_lost_by_advance_and_times_out_by_sleep() {
    for jumps in [false, true] {
        let source = ScriptedSource::new([Answer::hang()]).then_always(Answer::hang());
        let cache = TokenCache::new(source.clone());
        let waiting = caller(&cache);
        source.until_asked(1).await;
        while !waiting.is_finished() {
            match jumps {
                true => time::advance(secs(60)).await,
                false => time::sleep(secs(60)).await,
            }
            settle().await;
        }
        let error = waiting.await.unwrap().unwrap_err();
        assert_eq!(error.is_interrupted(), jumps, "{error}");
        assert_eq!(error.is_timeout(), !jumps, "{error}");
    }
}
