//! How many instructions a request that finds a token takes, counted by valgrind, against a budget.
//!
//! CI holds the hot path to these counts, since they do not depend on other work of the machine. This program runs
//! itself under valgrind, once with a thousand requests and once with two thousand: the difference is a thousand
//! requests and nothing else. A clock reading counts for little, since valgrind makes it a system call, whose
//! instructions are the kernel's; the bench `fresh_token` measures time.

mod support;

use std::{
    env,
    process::{Command, ExitCode},
};

use http::Request;
use support::{
    Body,
    baselines::{Copied, Least, Nothing},
    cached, call, inner, loopback_request,
    report::{Report, Table},
    request,
    subjects::{KEYS, keyed_request},
};
use tower::{Layer, Service, ServiceBuilder, service_fn};
use tower_bearer::{BearerAuthLayer, CloneBody};
use tower_http::auth::AddAuthorizationLayer;

/// What is measured, its baseline, and its budget as a ratio to that: a twentieth more than measured when the budget was
/// set, since compilers and allocators differ.
const CASES: [(&str, &str, Option<f64>); 14] = [
    ("bare, kept", KEPT, None),
    (KEPT, KEPT, None),
    ("least layer, kept", KEPT, None),
    ("least layer, copying, kept", KEPT, None),
    ("bearer, kept", KEPT, Some(1.21)),
    ("bearer with origins, kept", KEPT, Some(1.35)),
    ("bearer to another origin, kept", KEPT, Some(1.55)),
    ("bearer to loopback, kept", KEPT, Some(1.35)),
    ("bearer with replay, kept", KEPT, Some(1.52)),
    (CLONED, CLONED, None),
    ("least layer, cloned", CLONED, None),
    ("bearer, cloned", CLONED, Some(1.25)),
    (KEYED, KEYED, None),
    ("bearer, keyed", KEYED, Some(1.42)),
];

const KEPT: &str = "static header, kept";
const CLONED: &str = "static header, cloned";
const KEYED: &str = "static header, keyed";

fn main() -> ExitCode {
    // By environment variables, since cargo passes flags of its own.
    if let Ok(case) = env::var(CASE) {
        run(
            &case,
            env::var(COUNT).map_or(0, |count| count.parse().unwrap_or_default()),
        );
        return ExitCode::SUCCESS;
    }
    // Fails here if this program does, and not valgrind.
    run(KEPT, 0);
    if let Err(reason) = instructions(KEPT, 0) {
        println!("skipped: {reason}");
        return ExitCode::SUCCESS;
    }
    let mut report = Report::new("instructions");
    let mut table = Table::new(
        "instructions_per_request",
        &["", "instructions", "× static", "budget"],
    );
    let mut fits = true;
    for (case, baseline, budget) in CASES {
        let (count, floor) = (per_request(case), per_request(baseline));
        let ratio = count / floor;
        let exceeded = budget.is_some_and(|budget| ratio > budget);
        fits &= !exceeded;
        if case == "bearer, kept" {
            let measured = format!("{ratio:.2} ×");
            report.goal(
                "a valid token is cached, service kept",
                "≤ 1.06 × static header in instructions",
                measured,
                ratio <= 1.06,
            );
        }
        let verdict = if exceeded { " exceeded" } else { "" };
        table.row([
            case.to_owned(),
            format!("{count:.0}"),
            format!("{ratio:.2}"),
            budget.map_or_else(String::new, |budget| format!("{budget:.2}{verdict}")),
        ]);
    }
    report.table(table);
    report.finish();
    ExitCode::from(u8::from(!fits))
}

/// Sends `count` requests.
fn run(case: &str, count: u64) {
    let (cache, token, runtime) = cached();
    let key = runtime.block_on(cache.get_for(&KEYS[0]));
    key.expect("the source gives a token");
    let bearer = BearerAuthLayer::new(cache);
    let bare = service_fn(inner);
    let fixed = AddAuthorizationLayer::bearer(&token);
    // Requests go to the last one.
    let pinned = ["https://login.example.com", "https://api.example.com"];
    let pinned = bearer.clone().origins(pinned);
    let elsewhere = ["https://login.example.com", "https://files.example.com"];
    let elsewhere = bearer.clone().origins(elsewhere);
    match case {
        "bare, kept" => kept(bare, request, count),
        KEYED => kept(fixed.layer(bare), keyed_request, count),
        KEPT => kept(fixed.layer(bare), request, count),
        CLONED => cloned(fixed.layer(bare), count),
        "least layer, kept" => kept(Least::<_, Nothing>::new(bare, &token), request, count),
        "least layer, copying, kept" => kept(Least::<_, Copied>::new(bare, &token), request, count),
        "least layer, cloned" => cloned(Least::<_, Nothing>::new(bare, &token), count),
        "bearer, kept" => kept(bearer.layer(bare), request, count),
        "bearer to loopback, kept" => kept(bearer.layer(bare), loopback_request, count),
        "bearer, keyed" => kept(bearer.layer(bare), keyed_request, count),
        "bearer, cloned" => cloned(bearer.layer(bare), count),
        "bearer with origins, kept" => {
            kept(pinned.expect("it is an origin").layer(bare), request, count);
        }
        // The request passes without a token.
        "bearer to another origin, kept" => {
            kept(
                elsewhere.expect("they are origins").layer(bare),
                request,
                count,
            );
        }
        "bearer with replay, kept" => {
            let replay = ServiceBuilder::new().layer(bearer.replay(CloneBody));
            kept(replay.service(bare), request, count);
        }
        case => panic!("there is no case {case}"),
    }
}

fn kept<S>(mut service: S, request: fn() -> Request<Body>, count: u64)
where
    S: Service<Request<Body>>,
{
    for _ in 0..WARM_UP + count {
        call(&mut service, request());
    }
}

fn cloned<S: Service<Request<Body>> + Clone>(service: S, count: u64) {
    for _ in 0..WARM_UP + count {
        call(&mut service.clone(), request());
    }
}

fn per_request(case: &str) -> f64 {
    let count = |requests| instructions(case, requests).unwrap_or_else(|reason| panic!("{reason}"));
    (count(2_000) - count(1_000)) / 1_000.0
}

/// Counts a whole run of this program, or says why it cannot.
fn instructions(case: &str, requests: u64) -> Result<f64, String> {
    let program = env::current_exe().expect("this program has a path");
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .env(CASE, case)
        .env(COUNT, requests.to_string())
        .output()
        .map_err(|error| format!("valgrind does not start: {error}"))?;
    let report = String::from_utf8_lossy(&output.stderr);
    let count = report
        .lines()
        .find_map(|line| line.split_once("Collected : "))
        .and_then(|(_, count)| count.trim().parse().ok());
    match count {
        Some(count) if output.status.success() => Ok(count),
        _ => Err(format!(
            "valgrind ends with {} and says:\n{report}",
            output.status
        )),
    }
}

const CASE: &str = "TOWER_BEARER_CASE";
const COUNT: &str = "TOWER_BEARER_COUNT";
const WARM_UP: u64 = 10;
