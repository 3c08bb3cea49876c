//! What a token endpoint sees of a thousand programs that start at once.

use std::ops::Range;

use tokio::time::{self, Instant};
use tower_bearer::{TokenCache, TokenError};

use crate::support::{Answer, AuthServer, Crowd, millis, secs, seed};

const PROGRAMS: usize = 1_000;
const TIME: usize = 900;
const DOWN: Range<usize> = 300..600;

/// Token requests in each second, with tokens of 300 s and one request per second from each program.
async fn requests_of_a_fleet() -> Vec<usize> {
    let server = AuthServer::new();
    server.set_latency(millis(20));
    let fleet: Vec<_> = (0..PROGRAMS)
        .map(|_| Crowd::new(&TokenCache::new(server.clone())))
        .collect();
    let start = Instant::now();
    for second in 0..TIME {
        if second == DOWN.start {
            server.set(Answer::Fail(TokenError::transient("down")));
        }
        if second == DOWN.end {
            server.set(Answer::Grant(secs(300)));
        }
        for program in &fleet {
            program.call();
        }
        time::sleep_until(start + secs(second as u64 + 1)).await;
    }
    let mut seconds = vec![0; TIME];
    for seen in server.seen() {
        seconds[(seen.at - start).as_secs() as usize] += 1;
    }
    seconds
}

/// Law 2, of many: an outage brings them back into step only as far as the gates allow. With a fixed
/// margin each of these figures would be a thousand, and without pauses between failures so in every second.
#[tokio::test(start_paused = true)]
async fn a_fleet_that_starts_at_once_falls_out_of_step() {
    seed(17);
    let seen = requests_of_a_fleet().await;
    let most = |seconds: Range<usize>| seen[seconds].iter().max().copied().unwrap_or_default();
    assert_eq!(seen[0], PROGRAMS);
    // The second tokens, after 0.35 to 0.75 of a lifetime: 8.3 a second.
    assert!((8..=25).contains(&most(1..DOWN.start)), "{seen:?}");
    assert_eq!(seen[1..DOWN.start].iter().sum::<usize>(), PROGRAMS);
    // One every 5 s to 10 s from each that knows, and the first attempts of those that find out.
    assert!((100..=250).contains(&most(DOWN)), "{seen:?}");
    // Within a gate all have tokens, which fall due over 30 s plus the gate's time.
    assert_eq!(most(DOWN.end + 11..780), 0, "{seen:?}");
    assert!((25..=70).contains(&most(780..TIME)), "{seen:?}");
    assert_eq!(seen[DOWN.end + 11..].iter().sum::<usize>(), PROGRAMS);
}
