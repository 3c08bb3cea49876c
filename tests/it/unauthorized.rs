//! What a 401 does, for each kind of answer.

use std::time::Duration;

use http::{
    HeaderValue, Request, Response, StatusCode,
    header::{AUTHORIZATION, PROXY_AUTHENTICATE, WWW_AUTHENTICATE},
};
use tokio::time::{self, Instant};
use tower::{Layer, Service, ServiceExt};
use tower_bearer::{
    BearerAuth, BearerAuthLayer, CloneBody, Never, TokenCache, TokenError, WithoutToken,
};

use crate::support::{
    Answer, Api, AuthServer, INVALID_TOKEN, all, echo, get, get_path, millis, ready, secs, settle,
    timed, unauthorized,
};

const LIFETIME: Duration = Duration::from_secs(300);
/// By then the first token of a cache is due, and still alive.
const DUE: Duration = Duration::from_secs(230);

/// An answer with this status, these headers and a body.
fn answer(status: u16, headers: &[(&'static str, &str)]) -> Response<String> {
    let mut response = Response::new("the refusal".to_owned());
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    for &(name, value) in headers {
        response.headers_mut().append(name, value.parse().unwrap());
    }
    response
}

fn invalid_token() -> Response<String> {
    answer(401, &[("www-authenticate", INVALID_TOKEN)])
}

fn unexplained() -> Response<String> {
    answer(401, &[])
}

fn replaying(server: &AuthServer, api: &Api) -> BearerAuth<Api, CloneBody> {
    BearerAuthLayer::new(server.clone())
        .replay(CloneBody)
        .layer(api.clone())
}

fn never(server: &AuthServer, api: &Api) -> BearerAuth<Api, Never> {
    BearerAuthLayer::new(server.clone()).layer(api.clone())
}

/// A kind of answer: its status and headers.
type Row = (u16, &'static [(&'static str, &'static str)]);

const NAMED: &[Row] = &[
    (401, &[("www-authenticate", INVALID_TOKEN)]),
    (
        401,
        &[(
            "www-authenticate",
            r#"Basic realm="a", Bearer error="invalid_token""#,
        )],
    ),
    (
        401,
        &[
            ("www-authenticate", "Negotiate"),
            ("www-authenticate", INVALID_TOKEN),
        ],
    ),
    (
        200,
        &[("grpc-status", "16"), ("www-authenticate", INVALID_TOKEN)],
    ),
];

const UNEXPLAINED: &[Row] = &[
    (401, &[]),
    (401, &[("www-authenticate", "Bearer")]),
    (401, &[("www-authenticate", r#"Bearer realm="sims""#)]),
    (200, &[("grpc-status", "16")]),
];

const NOT_OURS: &[Row] = &[
    (401, &[("www-authenticate", r#"Basic realm="sims""#)]),
    (
        401,
        &[
            ("www-authenticate", "Negotiate"),
            ("www-authenticate", "NTLM"),
        ],
    ),
    (
        401,
        &[("www-authenticate", r#"Bearer error="insufficient_scope""#)],
    ),
    (
        401,
        &[("www-authenticate", r#"Bearer error="invalid_request""#)],
    ),
    (
        400,
        &[("www-authenticate", r#"Bearer error="invalid_request""#)],
    ),
    (403, &[]),
    (403, &[("www-authenticate", INVALID_TOKEN)]),
    (
        403,
        &[("www-authenticate", r#"Bearer error="insufficient_scope""#)],
    ),
    (407, &[("proxy-authenticate", "Bearer")]),
    (429, &[]),
    (500, &[]),
    (200, &[("grpc-status", "7")]),
    (
        200,
        &[("grpc-status", "16"), ("www-authenticate", "Negotiate")],
    ),
];

/// Law 8.
#[tokio::test(start_paused = true)]
async fn a_refused_token_is_replaced_and_the_request_replayed_once() {
    for &(status, headers) in [NAMED, UNEXPLAINED].concat().iter() {
        let server = AuthServer::new();
        let api = Api::refusing("token-1", move || answer(status, headers));
        let response = replaying(&server, &api).oneshot(get()).await.unwrap();
        assert_eq!(response.body(), "token-2", "{status} {headers:?}");
        assert_eq!(api.tokens(), ["token-1", "token-2"]);
        assert_eq!(server.requests(), 2);
    }
}

/// Law 8: the caller gets the API's answer, and the next request another token.
#[tokio::test(start_paused = true)]
async fn without_replay_the_refusal_comes_back_and_the_token_is_replaced() {
    for &(status, headers) in [NAMED, UNEXPLAINED].concat().iter() {
        let server = AuthServer::new();
        let api = Api::refusing("token-1", move || answer(status, headers));
        let client = never(&server, &api);
        let response = client.clone().oneshot(get()).await.unwrap();
        assert_eq!(response.status(), status, "{headers:?}");
        assert_eq!(response.body(), "the refusal");
        assert_eq!(api.tokens(), ["token-1"], "{status} {headers:?}");
        settle().await;
        assert_eq!(server.requests(), 2, "{status} {headers:?}");
        assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-2");
    }
}

/// Laws 2 and 8: another token would not change it, so none is requested.
#[tokio::test(start_paused = true)]
async fn an_answer_that_is_not_about_the_token_passes_through() {
    for &(status, headers) in NOT_OURS {
        let server = AuthServer::new();
        let api = Api::refusing("token-1", move || answer(status, headers));
        let replayed = replaying(&server, &api).oneshot(get()).await.unwrap();
        assert_eq!(replayed.status(), status, "{headers:?}");
        assert_eq!(replayed.body(), "the refusal");
        settle().await;
        assert_eq!(server.requests(), 1, "{status} {headers:?}");
        assert_eq!(api.tokens(), ["token-1"], "{status} {headers:?}");

        let server = AuthServer::new();
        let response = never(&server, &api).oneshot(get()).await.unwrap();
        assert_eq!(response.status(), status, "{headers:?}");
        settle().await;
        assert_eq!(server.requests(), 1, "{status} {headers:?}");
    }
}

/// Law 8: for an API that answers 401 for other reasons.
#[tokio::test(start_paused = true)]
async fn unexplained_refusals_pass_through_if_so_configured() {
    for &(status, headers) in UNEXPLAINED {
        let server = AuthServer::new();
        let api = Api::refusing("token-1", move || answer(status, headers));
        let client = BearerAuthLayer::new(server.clone())
            .replay(CloneBody)
            .refresh_on_unexplained_401(false)
            .layer(api.clone());
        let response = client.oneshot(get()).await.unwrap();
        assert_eq!(response.status(), status, "{headers:?}");
        assert_eq!(response.body(), "the refusal");
        settle().await;
        assert_eq!(server.requests(), 1, "{status} {headers:?}");
        assert_eq!(api.tokens(), ["token-1"]);
    }
}

/// Law 8: the switch is only for refusals without a reason.
#[tokio::test(start_paused = true)]
async fn a_refusal_with_a_reason_counts_with_the_switch_off() {
    for &(status, headers) in NAMED {
        let server = AuthServer::new();
        let api = Api::refusing("token-1", move || answer(status, headers));
        let client = BearerAuthLayer::new(server.clone())
            .replay(CloneBody)
            .refresh_on_unexplained_401(false)
            .layer(api);
        assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-2");
    }
}

/// Laws 1 and 8.
#[tokio::test(start_paused = true)]
async fn a_hundred_refusals_of_one_token_cost_one_token_request() {
    for refusal in [invalid_token, unexplained] {
        let server = AuthServer::new();
        server.set_latency(Duration::from_millis(50));
        let api = Api::refusing("token-1", refusal);
        let client = replaying(&server, &api);
        api.hold();
        let requests: Vec<_> = (0..100)
            .map(|n| tokio::spawn(client.clone().oneshot(get_path(n))))
            .collect();
        time::sleep(Duration::from_millis(100)).await;
        assert_eq!(api.tokens(), ["token-1"; 100]);
        api.release();
        for response in all(requests).await {
            assert_eq!(response.unwrap().body(), "token-2");
        }
        assert_eq!(server.requests(), 2);
        assert_eq!(api.tokens()[100..], ["token-2"; 100]);
        assert_eq!(api.most_per_path(), 2);
    }
}

/// Laws 2 and 8: a 401 counts against the token that was sent.
#[tokio::test(start_paused = true)]
async fn a_hundred_late_refusals_of_an_older_token_cost_no_token_request() {
    for refusal in [invalid_token, unexplained] {
        let server = AuthServer::new();
        let cache = TokenCache::new(server.clone());
        let api = Api::refusing("token-1", refusal);
        let layer = BearerAuthLayer::new(cache.clone());
        let client = layer.clone().replay(CloneBody).layer(api.clone());
        let once = layer.layer(api.clone());
        let old = cache.get().await.unwrap();
        api.hold();
        let requests: Vec<_> = (0..100)
            .map(|n| tokio::spawn(client.clone().oneshot(get_path(n))))
            .collect();
        let unrepeatable = tokio::spawn(once.oneshot(get_path("once")));
        settle().await;
        assert_eq!(api.tokens(), ["token-1"; 101]);

        cache.invalidate(&old);
        settle().await;
        assert_eq!(cache.peek().unwrap().expose_secret(), "token-2");
        // Long after any cooldown, so that only the token's text keeps them from forcing a refresh.
        time::sleep(Duration::from_secs(30)).await;
        api.release();

        for response in all(requests).await {
            assert_eq!(response.unwrap().body(), "token-2");
        }
        assert_eq!(unrepeatable.await.unwrap().unwrap().status(), 401);
        settle().await;
        assert_eq!(server.requests(), 2);
        assert_eq!(api.most_per_path(), 2);
    }
}

/// Laws 2 and 8: though one about the current token would pass through.
#[tokio::test(start_paused = true)]
async fn a_late_refusal_is_replayed_within_the_cooldown() {
    let server = AuthServer::new();
    let api = Api::refusing_the_first();
    let client = replaying(&server, &api);
    client.cache().get().await.unwrap();
    api.hold();
    let late = tokio::spawn(client.clone().oneshot(get_path("late")));
    settle().await;
    let old = client.cache().peek().unwrap();
    client.cache().invalidate(&old);
    settle().await;
    api.release();
    assert_eq!(late.await.unwrap().unwrap().body(), "token-2");
    assert_eq!(server.requests(), 2);
}

/// Law 2: 60,000 requests in a minute, all refused.
#[tokio::test(start_paused = true)]
async fn an_api_that_refuses_everything_costs_a_handful_of_token_requests() {
    for refusal in [invalid_token, unexplained] {
        let server = AuthServer::new();
        server.set_latency(Duration::from_millis(20));
        let api = Api::new(move |_| refusal());
        let client = replaying(&server, &api);
        let mut requests = Vec::new();
        for n in 0..60_000 {
            requests.push(tokio::spawn(client.clone().oneshot(get_path(n))));
            time::sleep(Duration::from_millis(1)).await;
        }
        for response in all(requests).await {
            assert_eq!(response.unwrap().status(), 401);
        }
        assert_eq!(api.most_per_path(), 2);
        let requests = server.requests();
        assert!((4..=8).contains(&requests), "{requests}");
        assert_eq!(server.most_at_once(), 1);
        // A replay carries another token.
        let mut sent: Vec<_> = api
            .arrivals()
            .iter()
            .map(|arrival| format!("{} {:?}", arrival.uri.path(), arrival.token()))
            .collect();
        sent.sort();
        let all = sent.len();
        sent.dedup();
        assert_eq!(sent.len(), all);
    }
}

/// Law 8: a replay needs a different token.
#[tokio::test(start_paused = true)]
async fn a_request_is_not_replayed_with_the_same_text() {
    for refusal in [invalid_token, unexplained] {
        let server = AuthServer::new();
        server.set(Answer::token("the-same", LIFETIME));
        let api = Api::refusing("the-same", refusal);
        let response = replaying(&server, &api).oneshot(get()).await.unwrap();
        assert_eq!(response.status(), 401);
        assert_eq!(response.body(), "the refusal");
        assert_eq!(api.tokens(), ["the-same"]);
        assert_eq!(server.requests(), 2);
    }
}

/// Law 8: a new token with the old text is no newer, so a 401 about it is not late.
#[tokio::test(start_paused = true)]
async fn a_late_refusal_is_not_replayed_with_the_same_text() {
    let server = AuthServer::new();
    server.set(Answer::token("the-same", LIFETIME));
    let api = Api::refusing("the-same", invalid_token);
    let client = replaying(&server, &api);
    let old = client.cache().get().await.unwrap();
    api.hold();
    let late = tokio::spawn(client.clone().oneshot(get()));
    settle().await;
    client.cache().invalidate(&old);
    settle().await;
    assert_eq!(server.requests(), 2);
    api.release();
    assert_eq!(late.await.unwrap().unwrap().status(), 401);
    assert_eq!(api.tokens(), ["the-same"]);
    assert_eq!(server.requests(), 2);
}

/// Law 8: the text that was sent is the current one.
#[tokio::test(start_paused = true)]
async fn a_late_refusal_of_the_current_text_counts_without_replay_too() {
    let server = AuthServer::new();
    server.set(Answer::token("the-same", LIFETIME));
    let api = Api::refusing("the-same", invalid_token);
    let client = never(&server, &api);
    client.cache().get().await.unwrap();
    api.hold();
    let late = tokio::spawn(client.clone().oneshot(get()));
    for flights in 2..4 {
        time::sleep(DUE + Duration::from_secs(50)).await;
        client.cache().get().await.unwrap();
        settle().await;
        assert_eq!(server.requests(), flights);
    }
    server.set(Answer::Grant(LIFETIME));
    api.release();
    assert_eq!(late.await.unwrap().unwrap().status(), 401);
    settle().await;
    assert_eq!(client.cache().peek().unwrap().expose_secret(), "token-4");
}

/// Law 8: a request is sent at most twice.
#[tokio::test(start_paused = true)]
async fn a_second_refusal_is_returned() {
    let server = AuthServer::new();
    let api = Api::new(|arrival| {
        let mut response = invalid_token();
        *response.body_mut() = format!("not with {}", arrival.token().unwrap());
        response
    });
    let response = replaying(&server, &api).oneshot(get()).await.unwrap();
    assert_eq!(response.status(), 401);
    assert_eq!(response.headers()[WWW_AUTHENTICATE], INVALID_TOKEN);
    assert_eq!(response.body(), "not with token-2");
    assert_eq!(api.tokens(), ["token-1", "token-2"]);
    assert_eq!(server.requests(), 2);
}

/// Law 3: a failed refresh is no error. The refusal is returned whole.
#[tokio::test(start_paused = true)]
async fn the_held_refusal_is_returned_when_no_token_comes() {
    for failure in [
        Answer::Fail(TokenError::terminal("the client is unknown")),
        Answer::Fail(TokenError::transient("the server is down")),
        Answer::Hang,
        Answer::Panic,
    ] {
        for refusal in [invalid_token, unexplained] {
            let server = AuthServer::new();
            let api = Api::refusing("token-1", refusal);
            let client = replaying(&server, &api);
            client.cache().get().await.unwrap();
            server.set(failure.clone());
            let response = client.oneshot(get()).await.unwrap();
            assert_eq!(response.status(), 401, "{failure:?}");
            assert_eq!(response.headers(), refusal().headers());
            assert_eq!(response.body(), "the refusal");
            assert_eq!(api.tokens(), ["token-1"]);
        }
    }
}

/// Law 2: like any other, and the held refusal waits for the last of them.
#[tokio::test(start_paused = true)]
async fn a_forced_refresh_makes_three_attempts() {
    let server = AuthServer::new();
    let api = Api::refusing_the_first();
    let client = replaying(&server, &api);
    client.cache().get().await.unwrap();
    server.set(Answer::Fail(TokenError::transient("down")));
    assert_eq!(client.oneshot(get()).await.unwrap().status(), 401);
    let attempts: Vec<_> = server.seen().iter().map(|seen| seen.attempt).collect();
    assert_eq!(attempts, [1, 1, 2, 3]);
}

/// Law 7: requests recover within one gate after the outage.
#[tokio::test(start_paused = true)]
async fn a_token_revoked_in_an_outage_is_replaced_soon_after_it() {
    for outage in [1, 5, 20, 36, 76, 200] {
        let server = AuthServer::new();
        server.set(Answer::Grant(secs(3_600)));
        let api = Api::refusing_the_first();
        let client = replaying(&server, &api);
        client.cache().get().await.unwrap();
        server.set(Answer::Fail(TokenError::transient("down")));
        let start = Instant::now();
        let mut recovered = None;
        while recovered.is_none() {
            if start.elapsed() >= secs(outage) {
                server.set(Answer::Grant(secs(3_600)));
            }
            let response = client.clone().oneshot(get()).await.unwrap();
            recovered = (response.status() == 200).then(|| start.elapsed());
            time::sleep(millis(100)).await;
        }
        let took = recovered.unwrap() - secs(outage);
        assert!(took <= millis(10_200), "{outage} s: {took:?}");
    }
}

/// Law 8: the refresh token's session may be gone.
#[tokio::test(start_paused = true)]
async fn a_forced_refresh_does_not_use_the_refresh_token() {
    for (forced, expected) in [(true, None), (false, Some("refresh-1"))] {
        let server = AuthServer::new();
        server.set_refresh_tokens(true);
        let api = Api::new(move |arrival| match arrival.token() {
            Some("token-1") if forced => invalid_token(),
            token => echo(token),
        });
        let client = replaying(&server, &api);
        client.cache().get().await.unwrap();
        if !forced {
            time::sleep(DUE).await;
        }
        client.oneshot(get()).await.unwrap();
        settle().await;
        let seen = server.seen();
        assert_eq!(seen.len(), 2);
        assert_eq!(seen[1].refresh_token.as_deref(), expected);
    }
}

/// Law 3: it is their last resort.
#[tokio::test(start_paused = true)]
async fn other_requests_use_the_refused_token_when_no_other_comes() {
    let server = AuthServer::new();
    let api = Api::new(|arrival| match arrival.uri.path() {
        "/refused" => invalid_token(),
        _ => echo(arrival.token()),
    });
    let client = replaying(&server, &api);
    client.cache().get().await.unwrap();
    server.set(Answer::Fail(TokenError::terminal("the client is unknown")));
    server.set_latency(Duration::from_millis(300));
    let refused = tokio::spawn(client.clone().oneshot(get_path("refused")));
    settle().await;
    let (other, took) = timed(client.clone().oneshot(get_path("other"))).await;
    assert_eq!(other.unwrap().body(), "token-1");
    assert_eq!(took, Duration::from_millis(300));
    assert_eq!(refused.await.unwrap().unwrap().status(), 401);
    let (other, took) = timed(client.oneshot(get_path("other"))).await;
    assert_eq!(other.unwrap().body(), "token-1");
    assert_eq!(took, Duration::ZERO);
}

/// Law 4: the API named it invalid.
#[tokio::test(start_paused = true)]
async fn other_requests_wait_a_second_for_the_replacement_of_an_invalid_token() {
    for (latency, waits, token) in [(300, 300, "token-2"), (3_000, 1_000, "token-1")] {
        let server = AuthServer::new();
        let api = Api::new(|arrival| match (arrival.uri.path(), arrival.token()) {
            ("/refused", Some("token-1")) => invalid_token(),
            (_, token) => echo(token),
        });
        let client = replaying(&server, &api);
        client.cache().get().await.unwrap();
        server.set_latency(Duration::from_millis(latency));
        let refused = tokio::spawn(client.clone().oneshot(get_path("refused")));
        settle().await;
        assert_eq!(server.requests(), 2);
        let (other, took) = timed(client.clone().oneshot(get_path("other"))).await;
        assert_eq!(other.unwrap().body(), token);
        assert_eq!(took, Duration::from_millis(waits));
        assert_eq!(refused.await.unwrap().unwrap().body(), "token-2");
        assert_eq!(server.requests(), 2);
    }
}

/// Law 4.
#[tokio::test(start_paused = true)]
async fn other_requests_do_not_wait_for_a_server_that_failed_last() {
    let server = AuthServer::new();
    let api = Api::new(|arrival| match (arrival.uri.path(), arrival.token()) {
        ("/refused", Some("token-1")) => invalid_token(),
        (_, token) => echo(token),
    });
    let client = replaying(&server, &api);
    client.cache().get().await.unwrap();
    time::sleep(DUE).await;
    server.set(Answer::Fail(TokenError::transient("down")));
    client.clone().oneshot(get_path("other")).await.unwrap();
    // Its attempts take 3 s at most.
    time::sleep(Duration::from_secs(5)).await;
    let failed = server.requests();
    assert!(failed > 1);

    server.set(Answer::Grant(LIFETIME));
    server.hold();
    let refused = tokio::spawn(client.clone().oneshot(get_path("refused")));
    settle().await;
    assert_eq!(server.requests(), failed + 1);
    let (other, took) = timed(client.clone().oneshot(get_path("other"))).await;
    assert_eq!(other.unwrap().body(), "token-1");
    assert_eq!(took, Duration::ZERO);
    server.release();
    let new = format!("token-{}", failed + 1);
    assert_eq!(refused.await.unwrap().unwrap().body(), &new);
}

/// Law 4: a token is valid unless named invalid.
#[tokio::test(start_paused = true)]
async fn other_requests_keep_using_a_token_refused_without_a_reason() {
    for &(status, headers) in UNEXPLAINED {
        let server = AuthServer::new();
        let api = Api::new(move |arrival| match (arrival.uri.path(), arrival.token()) {
            ("/refused", Some("token-1")) => answer(status, headers),
            (_, token) => echo(token),
        });
        let client = replaying(&server, &api);
        client.cache().get().await.unwrap();
        server.hold();
        let refused = tokio::spawn(client.clone().oneshot(get_path("refused")));
        settle().await;
        assert_eq!(server.requests(), 2);
        let (other, took) = timed(client.clone().oneshot(get_path("other"))).await;
        assert_eq!(other.unwrap().body(), "token-1", "{status} {headers:?}");
        assert_eq!(took, Duration::ZERO, "{status} {headers:?}");
        server.release();
        assert_eq!(refused.await.unwrap().unwrap().body(), "token-2");
    }
}

/// Law 2: there is no other token to try.
#[tokio::test(start_paused = true)]
async fn a_refusal_within_the_cooldown_passes_through_and_marks_nothing() {
    let server = AuthServer::new();
    let api = Api::new(|arrival| match arrival.uri.path() {
        "/refused" => invalid_token(),
        _ => echo(arrival.token()),
    });
    let client = replaying(&server, &api);
    // The cooldown starts here, at the flight's end.
    client.clone().oneshot(get_path("refused")).await.unwrap();
    assert_eq!(server.requests(), 2);
    time::sleep(Duration::from_millis(4_900)).await;
    let (refused, took) = timed(client.clone().oneshot(get_path("refused"))).await;
    assert_eq!(refused.unwrap().status(), 401);
    assert_eq!(took, Duration::ZERO);
    let (other, took) = timed(client.clone().oneshot(get_path("other"))).await;
    assert_eq!(other.unwrap().body(), "token-2");
    assert_eq!(took, Duration::ZERO);
    assert_eq!(server.requests(), 2);
    assert_eq!(api.tokens(), ["token-1", "token-2", "token-2", "token-2"]);

    time::sleep(Duration::from_millis(200)).await;
    client.clone().oneshot(get_path("refused")).await.unwrap();
    assert_eq!(server.requests(), 3);
}

/// Law 2: a 401 never opens a gate.
#[tokio::test(start_paused = true)]
async fn a_refusal_while_the_gate_is_shut_passes_through_and_marks_nothing() {
    let server = AuthServer::new();
    let api = Api::new(|arrival| match arrival.uri.path() {
        "/refused" => invalid_token(),
        _ => echo(arrival.token()),
    });
    let client = replaying(&server, &api);
    client.cache().get().await.unwrap();
    time::sleep(DUE).await;
    let busy = TokenError::transient("busy").with_retry_after(Duration::from_secs(20));
    server.set(Answer::Fail(busy));
    client.clone().oneshot(get_path("other")).await.unwrap();
    settle().await;
    assert_eq!(server.requests(), 2);

    server.set(Answer::Grant(LIFETIME));
    time::sleep(Duration::from_secs(19)).await;
    let (refused, took) = timed(client.clone().oneshot(get_path("refused"))).await;
    assert_eq!(refused.unwrap().body(), "the refusal");
    assert_eq!(took, Duration::ZERO);
    let (other, took) = timed(client.clone().oneshot(get_path("other"))).await;
    assert_eq!(other.unwrap().body(), "token-1");
    assert_eq!(took, Duration::ZERO);
    settle().await;
    assert_eq!(server.requests(), 2);

    time::sleep(Duration::from_secs(4)).await;
    client.clone().oneshot(get_path("refused")).await.unwrap();
    assert_eq!(server.requests(), 3);
}

/// Law 8: that costs neither a token request nor a cooldown.
#[tokio::test(start_paused = true)]
async fn a_refusal_joins_the_refresh_that_is_under_way() {
    let server = AuthServer::new();
    let api = Api::new(|arrival| match arrival.token() {
        Some("token-1" | "token-2") => invalid_token(),
        token => echo(token),
    });
    let client = replaying(&server, &api);
    client.cache().get().await.unwrap();
    time::sleep(DUE).await;
    server.set_latency(Duration::from_millis(100));
    let response = client.clone().oneshot(get()).await.unwrap();
    assert_eq!(response.status(), 401);
    assert_eq!(api.tokens(), ["token-1", "token-2"]);
    assert_eq!(server.requests(), 2);
    // There was no forced refresh yet, so none holds this one back.
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-3");
}

/// Law 8: a 401 to a credential that is not ours says nothing about our token.
#[tokio::test(start_paused = true)]
async fn a_request_that_keeps_its_own_credential_needs_no_token() {
    let server = AuthServer::new();
    server.set(Answer::Hang);
    let api = Api::new(|_| invalid_token());
    let client = BearerAuthLayer::new(server.clone())
        .replay(CloneBody)
        .keep_existing(true)
        .layer(api.clone());
    let mut request = get();
    let own = HeaderValue::from_static("Basic dXNlcjpwYXNz");
    request.headers_mut().insert(AUTHORIZATION, own.clone());
    let (response, took) = timed(client.oneshot(request)).await;
    assert_eq!(response.unwrap().body(), "the refusal");
    assert_eq!(took, Duration::ZERO);
    settle().await;
    assert_eq!(server.requests(), 0);
    assert_eq!(api.arrivals().len(), 1);
    assert_eq!(api.arrivals()[0].headers[AUTHORIZATION], own);
}

/// Laws 8 and 9: it replaces no kept credential and is not attached where none is wanted, on either path of a
/// request.
#[tokio::test(start_paused = true)]
async fn a_service_that_keeps_a_token_leaves_other_credentials_alone() {
    let server = AuthServer::new();
    let api = Api::new(|arrival| match arrival.token() {
        None => invalid_token(),
        token => echo(token),
    });
    let layer = BearerAuthLayer::new(server.clone()).replay(CloneBody);
    let own = HeaderValue::from_static("Basic dXNlcjpwYXNz");
    for keep in [true, false] {
        let mut client = layer.clone().keep_existing(keep).layer(api.clone());
        for uri in ["https://api.example.com/sims", "http://localhost/sims"] {
            let request = || Request::get(uri).body(String::new()).unwrap();
            // Often enough for the service to keep the token.
            for _ in 0..20 {
                assert_eq!(client.call(request()).await.unwrap().body(), "token-1");
                settle().await;
            }
            let mut theirs = request();
            theirs.headers_mut().insert(AUTHORIZATION, own.clone());
            if !keep {
                theirs.extensions_mut().insert(WithoutToken);
            }
            let answer = client.call(theirs).await.unwrap();
            assert_eq!(answer.status(), 401, "keep {keep}, {uri}");
            let arrivals = api.arrivals();
            assert_eq!(arrivals.last().unwrap().headers[AUTHORIZATION], own);
        }
    }
    settle().await;
    assert_eq!(server.requests(), 1);
}

/// Law 9: `keep_existing` lets no request leave without a credential.
#[tokio::test(start_paused = true)]
async fn a_request_without_a_credential_gets_the_token_with_keep_existing_too() {
    let server = AuthServer::new();
    let client = BearerAuthLayer::new(server)
        .keep_existing(true)
        .layer(Api::echoing());
    assert_eq!(client.oneshot(get()).await.unwrap().body(), "token-1");
}

/// Law 9: a gateway must not forward its user's credential as its own.
#[tokio::test(start_paused = true)]
async fn a_credential_that_the_caller_set_is_replaced() {
    let server = AuthServer::new();
    let api = Api::echoing();
    let client = never(&server, &api);
    // On the slow path and on the fast one.
    for _ in 0..2 {
        let request = Request::get("http://localhost/sims")
            .header(AUTHORIZATION, "Basic dXNlcjpwYXNz")
            .header(AUTHORIZATION, "Bearer the-users")
            .body(String::new())
            .unwrap();
        client.clone().oneshot(request).await.unwrap();
    }
    for arrival in api.arrivals() {
        let values: Vec<_> = arrival.headers.get_all(AUTHORIZATION).iter().collect();
        assert_eq!(values, ["Bearer token-1"]);
    }
}

/// Law 8: even beside a challenge of the API's that says nothing about tokens.
#[tokio::test(start_paused = true)]
async fn a_proxys_challenge_is_not_taken_for_the_apis() {
    let server = AuthServer::new();
    let api = Api::new(|_| {
        let mut response = unauthorized("Basic");
        let challenge = HeaderValue::from_static(INVALID_TOKEN);
        response.headers_mut().insert(PROXY_AUTHENTICATE, challenge);
        response
    });
    let response = replaying(&server, &api).oneshot(get()).await.unwrap();
    assert_eq!(response.status(), 401);
    settle().await;
    assert_eq!(server.requests(), 1);
}

/// Law 5.
#[tokio::test(start_paused = true)]
async fn a_caller_dropped_while_its_refusal_is_held_leaves_the_refresh_running() {
    let server = AuthServer::new();
    let api = Api::refusing_the_first();
    let client = replaying(&server, &api);
    client.cache().get().await.unwrap();
    server.set_latency(Duration::from_millis(500));
    let short = time::timeout(Duration::from_millis(100), client.clone().oneshot(get()));
    short.await.unwrap_err();
    let (response, took) = timed(client.oneshot(get())).await;
    assert_eq!(response.unwrap().body(), "token-2");
    assert_eq!(took, Duration::from_millis(400));
    assert_eq!(server.requests(), 2);
}

/// A request in flight holds only a number of the cache's.
#[tokio::test(start_paused = true)]
async fn a_token_is_replaced_though_the_service_that_sent_it_is_gone() {
    let server = AuthServer::new();
    let api = Api::refusing_the_first();
    let cache = TokenCache::new(server.clone());
    cache.get().await.unwrap();
    // Each request has its own layer and service, which `oneshot` drops once the request has left.
    for _ in 0..3 {
        let service = BearerAuthLayer::new(cache.clone()).layer(api.clone());
        let response = service.oneshot(get()).await.unwrap();
        assert!(response.status() == 401 || response.body() == "token-2");
        settle().await;
    }
    assert_eq!(server.requests(), 2);
    assert_eq!(api.tokens(), ["token-1", "token-2", "token-2"]);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_after_the_cache_is_gone_costs_no_token_request() {
    let server = AuthServer::new();
    let api = Api::refusing_the_first();
    api.hold();
    let cache = TokenCache::new(server.clone());
    cache.get().await.unwrap();
    let response = BearerAuthLayer::new(cache)
        .layer(api.clone())
        .oneshot(get());
    let response = tokio::spawn(response);
    settle().await;
    api.release();
    assert_eq!(response.await.unwrap().unwrap().status(), 401);
    settle().await;
    assert_eq!(server.requests(), 1);
}

/// With replay, the request itself holds what it needs.
#[tokio::test(start_paused = true)]
async fn a_request_is_replayed_though_its_service_and_cache_are_gone() {
    let server = AuthServer::new();
    let api = Api::refusing_the_first();
    let response = replaying(&server, &api).oneshot(get()).await.unwrap();
    assert_eq!(response.body(), "token-2");
}

#[tokio::test(start_paused = true)]
async fn services_and_their_clones_use_each_new_token() {
    let server = AuthServer::new();
    let api = Api::echoing();
    let cache = TokenCache::new(server.clone());
    let cloned = BearerAuthLayer::new(cache.clone()).layer(api.clone());
    let mut kept_twice = cloned.clone();
    for generation in 1..=3 {
        let expected = format!("token-{generation}");
        for _ in 0..4 {
            let response = cloned.clone().oneshot(get()).await.unwrap();
            assert_eq!(*response.body(), expected);
            let ready = ready(&mut kept_twice);
            let response = ready.await.unwrap().call(get()).await.unwrap();
            assert_eq!(*response.body(), expected);
            let of_kept = kept_twice.clone().oneshot(get()).await.unwrap();
            assert_eq!(*of_kept.body(), expected);
        }
        time::sleep(Duration::from_secs(10)).await;
        cache.invalidate(&cache.peek().unwrap());
        settle().await;
    }
}
