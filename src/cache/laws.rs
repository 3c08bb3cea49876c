//! The laws of the cache, which are the README's promises, tested by random scripts in virtual time.
//!
//! A [`World`] drives the real state machine through calls, refusals, failures, lost flights and clock steps, and
//! simulates the flights and the server. It notes every flight; afterwards the notes are checked against the figures
//! that the crate promises.

use std::{
    mem, slice,
    sync::Arc,
    time::{Duration, SystemTime},
};

use fastrand::Rng;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest};
use tokio::time::Instant;

use super::{
    gate::SharedGate,
    state::{Decision, Plan, Refusal, State},
};
use crate::{
    error::{Kind, TokenError},
    policy::{self, GRACE, RefreshPolicy},
    source::{RefreshToken, TokenRequest, TokenResponse},
    time::{Deadline, Now},
    token::AccessToken,
};

/// One line of a script.
#[derive(Clone, Debug)]
enum Op {
    /// This many callers want a token, this many milliseconds apart.
    Calls { count: u32, apart: u64 },
    /// Nothing happens for this many milliseconds.
    Pause(u64),
    /// The server behaves like this from now on.
    Server { answer: Answer, latency: u64 },
    /// The API refuses the current token, or the one before it.
    Refuse { late: bool, named: bool },
    /// The wall clock steps.
    Step(i64),
    /// The task of the flight under way is dropped or panics, or its runtime is parked.
    Lose(Loss),
    /// From now on, each flight is lost this many milliseconds after it was put on record.
    Cut(Option<(u64, Loss)>),
}

#[derive(Clone, Debug)]
enum Answer {
    Grant {
        lifetime: Option<u64>,
        same_text: bool,
        refresh_token: bool,
    },
    Transient,
    Unreachable,
    Terminal,
    InvalidClient,
    InvalidScope,
    RetryAfter(u64),
    Hang,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Loss {
    Drop,
    Panic,
    Park,
}

/// A record of one flight, in milliseconds of the monotonic clock.
#[derive(Clone, Debug)]
struct Note {
    forced: bool,
    /// When it was put on record.
    began: u64,
    /// When the first attempt was sent, or was to be.
    start: u64,
    end: u64,
    /// When each attempt was sent.
    attempts: Vec<u64>,
    /// When the attempt that succeeded was sent, and how much later the refresh window opens.
    success: Option<(u64, u64)>,
    /// Whether it was lost with its runtime.
    lost: bool,
    retry_after: u64,
    /// Whether the server told it that no key may ask for now.
    told_to_wait: bool,
    /// When it stopped because of what another key was told.
    held_back_at: Option<u64>,
    /// Whether the held token had just died, so that this flight may have passed the gate.
    at_expiry: bool,
    token: usize,
}

struct InFlight {
    id: u64,
    plan: Plan,
    note: Note,
    attempt: u64,
    sent: u64,
    /// When the attempt in progress, or the pause before it, is over.
    next: u64,
    sending: bool,
    /// What the last attempt failed with, during the pause after it.
    error: Option<TokenError>,
    parked: bool,
    /// When it is lost.
    cut: Option<(u64, Loss)>,
}

impl InFlight {
    /// When something happens to it next.
    fn event(&self) -> u64 {
        self.cut.map_or(self.next, |(cut, _)| cut.min(self.next))
    }
}

struct World {
    origin: Instant,
    epoch: SystemTime,
    /// Milliseconds since the start, by either clock.
    monotonic: u64,
    wall: i64,
    state: State<u64>,
    shared: SharedGate,
    rng: Rng,
    policy: RefreshPolicy,
    answer: Answer,
    latency: u64,
    cut: Option<(u64, Loss)>,
    flight: Option<InFlight>,
    notes: Vec<Note>,
    tokens: Vec<(AccessToken, Deadline)>,
    refresh_tokens: u64,
    used: Vec<String>,
    forward_steps: Vec<u64>,
    next_id: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        Self::of_key(1, seed, Instant::now())
    }

    fn of_key(key: u64, seed: u64, origin: Instant) -> Self {
        let policy = RefreshPolicy::new();
        Self {
            origin,
            epoch: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000),
            monotonic: 0,
            wall: 0,
            state: State::new(
                key,
                TokenRequest::new(),
                Arc::new(policy.clone()),
                Rng::with_seed(seed),
            ),
            shared: SharedGate::default(),
            rng: Rng::with_seed(seed ^ 1),
            policy,
            answer: Answer::Transient,
            latency: 20,
            cut: None,
            flight: None,
            notes: Vec::new(),
            tokens: Vec::new(),
            refresh_tokens: 0,
            used: Vec::new(),
            forward_steps: Vec::new(),
            next_id: 0,
        }
    }

    fn now(&self) -> Now {
        self.at(self.monotonic)
    }

    fn at(&self, monotonic: u64) -> Now {
        let wall = self.wall + monotonic as i64 - self.monotonic as i64;
        let offset = Duration::from_millis(wall.unsigned_abs());
        Now {
            monotonic: self.origin + Duration::from_millis(monotonic),
            wall: if wall < 0 {
                self.epoch - offset
            } else {
                self.epoch + offset
            },
        }
    }

    fn run(&mut self, script: &[Op]) {
        for op in script {
            match op {
                Op::Calls { count, apart } => {
                    for _ in 0..*count {
                        self.call();
                        self.advance(*apart);
                    }
                }
                Op::Pause(time) => self.advance(*time),
                Op::Server { answer, latency } => {
                    self.answer = answer.clone();
                    self.latency = *latency;
                }
                Op::Refuse { late, named } => self.refuse(*late, *named),
                Op::Step(by) => {
                    self.wall += by;
                    if *by > 0 {
                        self.forward_steps.push(self.monotonic);
                    }
                }
                Op::Lose(loss) => self.lose(*loss),
                Op::Cut(after) => self.cut = *after,
            }
        }
    }

    /// Runs the events of the flight under way up to `time` from now.
    fn advance(&mut self, time: u64) {
        let until = self.monotonic + time;
        while let Some(flight) = &self.flight {
            if flight.parked || flight.event() > until {
                break;
            }
            self.pass(flight.event());
            self.step_flight();
        }
        self.pass(until);
    }

    fn pass(&mut self, until: u64) {
        self.wall += (until - self.monotonic) as i64;
        self.monotonic = until;
    }

    fn step_flight(&mut self) {
        let now = self.monotonic;
        let cut = self.flight.as_ref().unwrap().cut;
        if let Some((_, loss)) = cut.filter(|(cut, _)| now >= *cut) {
            return self.lose(loss);
        }
        let mut flight = self.flight.take().unwrap();
        let deadline = (flight.plan.deadline - self.origin).as_millis() as u64;
        if now >= deadline {
            let timeout = TokenError::new(Kind::Timeout);
            return self.land(flight, Err(Some(timeout)));
        }
        if !flight.sending {
            // The error of the previous attempt.
            let error = flight.error.take();
            if let Some(error) = error.filter(|_| self.is_held_back(&mut flight.note)) {
                return self.land(flight, Err(Some(error)));
            }
            self.state.asks(&flight.id);
            flight.sending = true;
            flight.attempt += 1;
            flight.note.attempts.push(now);
            flight.sent = now;
            if let Some(token) = flight.plan.refresh_token.take() {
                self.used.push(token.expose_secret().to_owned());
            }
            let takes = match self.answer {
                Answer::Hang => 10_000,
                _ => self.latency,
            };
            flight.next = (now + takes).min(deadline);
            self.flight = Some(flight);
            return;
        }
        let refused =
            |code| TokenError::new(Kind::Rejected { transient: false }).with_oauth_error(code);
        let error = match &self.answer {
            Answer::Grant { .. } => {
                let response = self.response();
                return self.land(flight, Ok(response));
            }
            Answer::Transient => TokenError::transient("down"),
            Answer::Unreachable => TokenError::new(Kind::Transport),
            Answer::Terminal => TokenError::terminal("refused"),
            Answer::InvalidClient => refused("invalid_client"),
            Answer::InvalidScope => refused("invalid_scope"),
            Answer::RetryAfter(seconds) => {
                flight.note.retry_after = 1_000 * (*seconds).min(300);
                TokenError::transient("busy").with_retry_after(Duration::from_secs(*seconds))
            }
            Answer::Hang => TokenError::new(Kind::Timeout),
        };
        let attempt = flight.attempt as u32;
        let pause = policy::pause(attempt, flight.plan.in_background, &mut self.rng);
        let next = now + pause.as_millis() as u64;
        flight.note.told_to_wait =
            matches!(self.answer, Answer::InvalidClient | Answer::RetryAfter(_));
        let is_last = attempt >= flight.plan.attempts || next >= deadline;
        let over = is_last || flight.note.told_to_wait || !error.is_transient();
        if over || self.is_held_back(&mut flight.note) {
            return self.land(flight, Err(Some(error)));
        }
        flight.sending = false;
        flight.error = Some(error);
        flight.next = next;
        self.flight = Some(flight);
    }

    /// Whether the flight under way is to make no further attempt.
    fn is_held_back(&self, note: &mut Note) -> bool {
        let is_held_back = self.state.is_held_back(&self.shared, self.now());
        note.held_back_at = is_held_back.then_some(self.monotonic);
        is_held_back
    }

    fn response(&mut self) -> TokenResponse {
        let Answer::Grant {
            lifetime,
            same_text,
            refresh_token,
        } = self.answer.clone()
        else {
            unreachable!("only a grant is a response");
        };
        let text = if same_text {
            "same".to_owned()
        } else {
            format!("token-{}", self.tokens.len())
        };
        let mut response = TokenResponse::new(text).unwrap();
        if let Some(seconds) = lifetime {
            response = response.expires_in(Duration::from_secs(seconds));
        }
        if refresh_token {
            self.refresh_tokens += 1;
            let token = RefreshToken::new(format!("refresh-{}", self.refresh_tokens));
            response = response.refresh_token(token.expires_in(Duration::from_secs(60)));
        }
        response
    }

    fn land(&mut self, mut flight: InFlight, outcome: Result<TokenResponse, Option<TokenError>>) {
        let (now, sent) = (self.now(), self.at(flight.sent));
        let is_lost = matches!(outcome, Err(None));
        match outcome {
            Ok(response) => {
                let token = self
                    .state
                    .succeeded(&mut self.shared, &flight.id, response, sent, now);
                let token = token.expect("the flight is on record");
                let opens = token.due().remaining(sent);
                flight.note.success = Some((flight.sent, opens.as_millis() as u64));
                // Kept separately, to check the machine against.
                let expiry = token.clone();
                self.tokens.push((expiry, token.expiry()));
            }
            Err(error) => {
                self.state
                    .failed(&mut self.shared, &flight.id, error.as_ref(), now)
                    .expect("the flight is on record");
            }
        }
        self.note_end(flight.note, is_lost);
    }

    fn launch(&mut self, id: u64, plan: Plan, forced: bool) {
        assert!(self.flight.is_none(), "law 1: two flights under way");
        let start = self.monotonic + plan.delay.as_nanos().div_ceil(1_000_000) as u64;
        let now = self.now();
        let note = Note {
            forced,
            began: self.monotonic,
            start,
            end: start,
            attempts: Vec::new(),
            success: None,
            lost: false,
            retry_after: 0,
            told_to_wait: false,
            held_back_at: None,
            at_expiry: self
                .tokens
                .last()
                .is_some_and(|(_, expiry)| expiry.has_come(now)),
            token: self.tokens.len(),
        };
        self.flight = Some(InFlight {
            id,
            plan,
            note,
            attempt: 0,
            sent: start,
            next: start,
            sending: false,
            error: None,
            parked: false,
            cut: self.cut.map(|(after, loss)| (self.monotonic + after, loss)),
        });
    }

    /// A caller wants a token.
    fn call(&mut self) {
        let now = self.now();
        self.give_up(now);
        let alive = self
            .tokens
            .last()
            .filter(|(_, expiry)| !expiry.has_come(now))
            .cloned();
        let refused = self.state.unrejected().is_none();
        match (self.state.acquire(&self.shared, now), alive) {
            (Decision::Use(token), Some((held, _))) => assert!(token.same_text(&held)),
            (Decision::UseAndStart(token), Some((held, _))) => {
                assert!(token.same_text(&held));
                self.start(now);
            }
            (Decision::Join(flight, fallback), Some((held, _))) => {
                assert!(
                    refused,
                    "law 4: a caller waits although there is a valid token"
                );
                let fallback = fallback.expect("law 3: the refused token is the last resort");
                assert!(fallback.same_text(&held));
                assert_eq!(Some(flight), self.flight.as_ref().map(|flight| flight.id));
            }
            (Decision::Start, None) => self.start(now),
            (Decision::Join(flight, None), None) => {
                assert_eq!(Some(flight), self.flight.as_ref().map(|flight| flight.id));
            }
            (Decision::Fail(_), None) => {}
            (decision, alive) => panic!("laws 3 and 4: {decision:?} while {alive:?} is held"),
        }
    }

    fn start(&mut self, now: Now) {
        self.next_id += 1;
        let id = self.next_id;
        let (_, plan) = self.state.begin(&mut self.shared, |_| id, now);
        self.launch(id, plan, false);
    }

    fn refuse(&mut self, late: bool, named: bool) {
        let now = self.now();
        self.give_up(now);
        let back = if late { 2 } else { 1 };
        let Some(index) = self.tokens.len().checked_sub(back) else {
            return;
        };
        let sent = self.tokens[index].0.clone();
        let alive = self
            .tokens
            .last()
            .filter(|(_, expiry)| !expiry.has_come(now))
            .cloned();
        match self.state.refused(&self.shared, &sent, named, now) {
            Refusal::Replay(token) => assert!(!token.same_text(&sent)),
            Refusal::Join(flight) => {
                assert_eq!(Some(flight), self.flight.as_ref().map(|flight| flight.id));
            }
            Refusal::Start => {
                let current = alive.is_some_and(|(held, _)| held.same_text(&sent));
                assert!(current, "law 8: a late 401 costs a token request");
                self.next_id += 1;
                let id = self.next_id;
                let (_, plan) = self
                    .state
                    .begin_forced(&mut self.shared, |_| id, named, now);
                self.launch(id, plan, true);
            }
            Refusal::Refresh => {
                assert!(
                    alive.is_none(),
                    "law 3: a token that is held is no reason to refresh"
                );
                let last = &self.tokens.last().unwrap().0;
                assert!(
                    last.same_text(&sent),
                    "law 8: a late 401 costs a token request"
                );
                self.start(now);
            }
            Refusal::Pass => {}
        }
    }

    fn lose(&mut self, loss: Loss) {
        let Some(mut flight) = self.flight.take() else {
            return;
        };
        match loss {
            Loss::Park => {
                flight.parked = true;
                self.flight = Some(flight);
            }
            Loss::Drop => self.land(flight, Err(None)),
            Loss::Panic => self.land(flight, Err(Some(TokenError::new(Kind::Panicked)))),
        }
    }

    /// Every access to the state gives up an overdue flight first. Its late result is ignored.
    fn give_up(&mut self, now: Now) {
        let Some(id) = self.state.give_up_overdue(&mut self.shared, now) else {
            return;
        };
        let flight = self.flight.take().expect("the flight was on record");
        assert_eq!(id, flight.id);
        assert!(flight.parked, "a flight that is driven ends in time");
        let late = TokenResponse::new("late").unwrap();
        assert!(
            self.state
                .succeeded(&mut self.shared, &id, late, now, now)
                .is_none(),
            "law 1: the fence has a hole"
        );
        self.note_end(flight.note, true);
    }

    fn note_end(&mut self, mut note: Note, lost: bool) {
        note.end = self.monotonic;
        note.lost = lost;
        // One that was lost before it asked may leave things as they are.
        if !lost || !note.attempts.is_empty() {
            self.notes.push(note);
        }
    }

    /// Law 7: whatever has happened, a server that is well brings a token within six minutes, even if no flight lasts
    /// for longer than an answer takes.
    fn recover(&mut self) {
        self.answer = Answer::Grant {
            lifetime: Some(3_600),
            same_text: false,
            refresh_token: false,
        };
        self.latency = 20;
        self.cut = self.cut.map(|(after, loss)| (after.max(100), loss));
        let before = self.tokens.len();
        for _ in 0..400 {
            self.advance(1_000);
            self.call();
            let now = self.now();
            let held = self.state.attachable(now);
            if held.is_some_and(|held| !held.is_due(now)) {
                return;
            }
        }
        panic!(
            "law 7: no token {} flights after the server is well",
            self.tokens.len() - before
        );
    }

    /// Law 2 and the pairwise form of it.
    fn check(&self) {
        let stepped =
            |from: u64, to: u64| self.forward_steps.iter().any(|at| (from..=to).contains(at));
        let (mut failures, mut last_forced, mut exempted) = (0_u32, None::<u64>, None);
        for pair in self.notes.windows(2) {
            let [a, b] = pair else { unreachable!() };
            assert!(b.start >= a.end, "law 1: {b:?} starts before {a:?} ends");
            if a.forced {
                last_forced = Some(a.end);
            }
            failures = if a.success.is_some() { 0 } else { failures + 1 };
            if stepped(a.began, b.start) {
                continue;
            }
            match (b.forced, last_forced, a.success) {
                (true, Some(end), _) if !stepped(end, b.start) => {
                    assert!(
                        b.start >= end + 5_000,
                        "law 2: no cooldown between {end} and {b:?}"
                    );
                }
                (false, _, Some((sent, opens))) => {
                    let opens = opens.max(1_000);
                    assert!(
                        b.start >= sent + opens,
                        "law 2: {b:?} comes too soon after {a:?}"
                    );
                }
                _ => {}
            }
            if failures > 0 {
                let half = 250 * (1 << (failures - 1).min(10));
                assert!(
                    b.start >= a.end + a.retry_after,
                    "law 2: {b:?} ignores the Retry-After of {a:?}"
                );
                let soon = b.start < a.end + half.min(5_000);
                let exempt = b.at_expiry && exempted != Some(b.token);
                assert!(
                    !soon || exempt,
                    "law 2: {b:?} comes too soon after {failures} failures: {a:?}"
                );
                if soon {
                    exempted = Some(b.token);
                }
            }
        }
        self.check_sums();
    }

    fn check_sums(&self) {
        let time = self.monotonic as f64 / 1_000.0;
        let steps = self.forward_steps.len() as f64;
        let successes = self
            .notes
            .iter()
            .filter(|note| note.success.is_some())
            .count() as f64;
        let forced = |note: &&Note| note.forced && note.success.is_some();
        let forced = self.notes.iter().filter(forced).count() as f64;
        let failed = self.notes.len() as f64 - successes;
        let opens = self
            .notes
            .iter()
            .filter_map(|note| note.success)
            .map(|(_, opens)| opens);
        let usable = opens.min().unwrap_or(1_000).max(1_000) as f64 / 1_000.0;
        let requests = self
            .notes
            .iter()
            .map(|note| note.attempts.len())
            .sum::<usize>() as f64;
        assert!(
            successes - forced <= 1.0 + time / usable + steps,
            "law 2: S"
        );
        assert!(forced <= 1.0 + time / 5.0 + steps, "law 2: R");
        assert!(
            failed <= 7.0 * (successes + 1.0) + 1.0 + 2.0 * time / 10.0 + steps,
            "law 2: F"
        );
        // The next flight after a success has all its attempts, and if it is lost, the one after it.
        let lost = self.notes.iter().filter(|note| note.lost).count() as f64;
        let lost_first = lost.min(successes + 1.0);
        assert!(
            requests <= 3.0 * (successes + 2.0) + 2.0 * lost_first + failed,
            "law 2: N"
        );
        let failed_requests = requests - successes;
        if failed_requests == 0.0 {
            assert!(
                requests <= 1.0 + time / usable + forced + steps,
                "law 2: N without failures"
            );
        }
        let mut used = self.used.clone();
        used.sort();
        used.dedup();
        assert_eq!(
            used.len(),
            self.used.len(),
            "a refresh token was handed out twice"
        );
    }
}

/// Some keys of one source, each with its own world; they share the clock and the gate.
struct Worlds {
    keys: Vec<World>,
    shared: SharedGate,
}

impl Worlds {
    fn new(keys: u64, seed: u64) -> Self {
        let origin = Instant::now();
        Self {
            keys: (0..keys)
                .map(|key| World::of_key(key, seed.wrapping_add(key), origin))
                .collect(),
            shared: SharedGate::default(),
        }
    }

    fn with(&mut self, key: usize, act: impl FnOnce(&mut World)) {
        let world = &mut self.keys[key];
        mem::swap(&mut world.shared, &mut self.shared);
        act(world);
        mem::swap(&mut world.shared, &mut self.shared);
    }

    fn run(&mut self, script: &[(usize, Op)]) {
        for (key, op) in script {
            match op {
                Op::Calls { count, apart } => {
                    for _ in 0..*count {
                        self.with(*key, World::call);
                        self.advance(*apart);
                    }
                }
                Op::Pause(time) => self.advance(*time),
                Op::Step(_) => {
                    for world in &mut self.keys {
                        world.run(slice::from_ref(op));
                    }
                }
                Op::Server { .. } | Op::Refuse { .. } | Op::Lose(_) | Op::Cut(_) => {
                    self.with(*key, |world| world.run(slice::from_ref(op)));
                }
            }
        }
    }

    /// Runs the events of all flights in order of time.
    fn advance(&mut self, time: u64) {
        let until = self.keys[0].monotonic + time;
        loop {
            let next = |(key, world): (usize, &World)| {
                let flight = world.flight.as_ref()?;
                (!flight.parked && flight.event() <= until).then_some((flight.event(), key))
            };
            let next = self.keys.iter().enumerate().filter_map(next).min();
            let at = next.map_or(until, |(at, _)| at);
            for world in &mut self.keys {
                world.pass(at);
            }
            let Some((_, key)) = next else { return };
            self.with(key, World::step_flight);
        }
    }

    /// Law 7: whatever has happened, each other key has a token within ten minutes, even while the first keys keep
    /// failing under constant demand.
    fn recover_beside(&mut self, failing: usize, broken: &Answer) {
        for world in &mut self.keys {
            world.answer = Answer::Grant {
                lifetime: Some(86_400),
                same_text: false,
                refresh_token: false,
            };
            world.latency = 20;
            world.cut = world.cut.map(|(after, loss)| (after.max(100), loss));
        }
        for world in &mut self.keys[..failing] {
            world.answer = broken.clone();
        }
        for _ in 0..600 {
            for _ in 0..100 {
                for key in 0..failing {
                    self.with(key, World::call);
                }
                self.advance(10);
            }
            for key in failing..self.keys.len() {
                self.with(key, World::call);
            }
            let lacks = |world: &World| {
                let held = world.state.attachable(world.now());
                held.is_none_or(|held| held.is_due(world.now()))
            };
            if !self.keys[failing..].iter().any(lacks) {
                return;
            }
        }
        panic!("law 7: one key's failures keep another one out");
    }

    fn check(&mut self) {
        // What is still under way ends before the sums are checked.
        self.advance(60_000);
        for key in 0..self.keys.len() {
            self.with(key, |world| world.give_up(world.now()));
            self.keys[key].check();
        }
        let notes = || {
            let keys = self.keys.iter().enumerate();
            keys.flat_map(|(key, world)| world.notes.iter().map(move |note| (key, note)))
        };
        for (key, note) in notes() {
            let Some(held_back_at) = note.held_back_at else {
                continue;
            };
            let meanwhile = note.began..=held_back_at;
            assert!(
                notes().any(|(_, other)| other.told_to_wait && meanwhile.contains(&other.end)),
                "key {key} makes no further attempt, and nobody was told so: {note:?}"
            );
        }
        for (key, told) in notes().filter(|(_, note)| note.retry_after > 0) {
            let until = told.end + told.retry_after;
            let heard = told.end..until;
            // The endpoint may recover sooner, as a flight already on its way shows.
            let well = |(_, note): (usize, &Note)| note.success.is_some() && note.end >= told.end;
            let well = notes().filter(|&note| well(note)).map(|(_, note)| note.end);
            let well = well.min().unwrap_or(u64::MAX);
            let stepped = self.keys[0]
                .forward_steps
                .iter()
                .any(|at| heard.contains(at));
            for (other, note) in notes() {
                // A flight that was under way makes no further attempt.
                let heeds = |at: &&u64| **at > told.end && heard.contains(*at) && **at < well;
                let further = note.attempts.iter().skip(1).find(heeds);
                assert!(
                    further.is_none() || stepped,
                    "law 2: key {other} goes on though key {key} was told: {note:?} {told:?}"
                );
                let ignores = heard.contains(&note.began) && note.start < until;
                assert!(
                    !ignores || note.began <= told.end || stepped || note.began >= well,
                    "law 2: key {other} ignores what key {key} was told: {note:?} {told:?}"
                );
            }
        }
    }
}

fn lifetimes() -> impl Strategy<Value = Option<u64>> {
    prop_oneof![
        Just(None),
        proptest::sample::select(vec![
            0,
            1,
            2,
            30,
            59,
            60,
            61,
            224,
            225,
            300,
            3_600,
            86_400,
            1 << 31,
            1 << 63,
            u64::MAX,
        ])
        .prop_map(Some),
        (0_u64..100).prop_map(Some),
    ]
}

fn answers() -> impl Strategy<Value = Answer> {
    prop_oneof![
        4 => (lifetimes(), any::<bool>(), any::<bool>()).prop_map(|(lifetime, same_text, refresh_token)| {
            Answer::Grant { lifetime, same_text, refresh_token }
        }),
        2 => Just(Answer::Transient),
        1 => Just(Answer::Unreachable),
        1 => Just(Answer::Terminal),
        1 => Just(Answer::InvalidClient),
        1 => Just(Answer::InvalidScope),
        1 => (0_u64..400).prop_map(Answer::RetryAfter),
        1 => Just(Answer::Hang),
    ]
}

fn ops() -> impl Strategy<Value = Op> {
    let hour = 3_600_000_i64;
    prop_oneof![
        6 => (1_u32..40, 0_u64..2_000).prop_map(|(count, apart)| Op::Calls { count, apart }),
        2 => (0_u64..120_000).prop_map(Op::Pause),
        4 => (answers(), 0_u64..12_000).prop_map(|(answer, latency)| Op::Server { answer, latency }),
        4 => (any::<bool>(), any::<bool>()).prop_map(|(late, named)| Op::Refuse { late, named }),
        1 => (-hour..hour).prop_map(Op::Step),
        1 => proptest::sample::select(vec![Loss::Drop, Loss::Panic, Loss::Park]).prop_map(Op::Lose),
        1 => proptest::option::of((
            prop_oneof![0_u64..2_000, 0_u64..40_000],
            proptest::sample::select(vec![Loss::Drop, Loss::Park]),
        )).prop_map(Op::Cut),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, ..ProptestConfig::default() })]

    /// Laws 1, 2, 3, 4, 7 and 8, for any script.
    #[test]
    fn the_laws_hold_for_any_script(seed: u64, script in proptest::collection::vec(ops(), 1..60)) {
        let mut world = World::new(seed);
        world.run(&script);
        world.recover();
        // A flight still under way ends before the sums are checked.
        world.advance(60_000);
        world.give_up(world.now());
        world.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    /// Each key keeps the laws whatever happens to the others, and what the server asks of one holds for all.
    #[test]
    fn the_laws_hold_for_each_key_of_a_source(
        seed: u64,
        script in proptest::collection::vec((0_usize..4, ops()), 1..60),
        failing in 1_usize..3,
        broken in proptest::sample::select(vec![Answer::Transient, Answer::Terminal, Answer::Hang]),
    ) {
        let mut worlds = Worlds::new(4, seed);
        worlds.run(&script);
        worlds.recover_beside(failing, &broken);
        worlds.check();
    }
}

/// Law 2, with the worst caller: one every 10 ms, for ten minutes.
fn under_steady_calls(answer: Answer, refusals: bool) -> World {
    let mut world = World::new(7);
    world.answer = answer;
    for _ in 0..60_000 {
        world.call();
        if refusals {
            world.refuse(false, true);
        }
        world.advance(10);
    }
    world.check();
    world
}

#[test]
fn a_dead_endpoint_is_asked_by_the_backoff_schedule_for_any_traffic() {
    let world = under_steady_calls(Answer::Transient, false);
    // 3 at the start, 5 until the gate is at its cap, then one per 5 s to 10 s.
    let requests: usize = world.notes.iter().map(|note| note.attempts.len()).sum();
    assert!((55..=128).contains(&requests), "{requests}");
}

#[test]
fn a_token_that_is_dead_on_arrival_is_fetched_once_a_second() {
    let answer = Answer::Grant {
        lifetime: Some(0),
        same_text: true,
        refresh_token: false,
    };
    let world = under_steady_calls(answer, false);
    assert!(
        (590..=601).contains(&world.notes.len()),
        "{}",
        world.notes.len()
    );
}

#[test]
fn an_api_that_refuses_everything_costs_a_token_request_per_doubling_cooldown() {
    let answer = Answer::Grant {
        lifetime: Some(300),
        same_text: false,
        refresh_token: false,
    };
    let world = under_steady_calls(answer, true);
    let in_the_first_minute = world
        .notes
        .iter()
        .filter(|note| note.start < 60_000)
        .count();
    assert!(
        (4..=8).contains(&in_the_first_minute),
        "{in_the_first_minute}"
    );
    assert!(
        world.notes.len() <= 5 + 600 / 60 + 4,
        "{}",
        world.notes.len()
    );
}

#[test]
fn a_parked_flight_is_given_up_when_it_is_overdue_and_not_before() {
    let mut world = World::new(3);
    world.call();
    world.lose(Loss::Park);
    let limit = (world.policy.flight_limit() + GRACE).as_millis() as u64;
    world.advance(limit - 1);
    world.call();
    assert_eq!(world.next_id, 1);
    world.advance(1);
    world.call();
    assert_eq!(world.next_id, 2);
}
