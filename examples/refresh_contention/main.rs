//! What happens to requests while you revoke their token, or slow down or break the token endpoint.
//!
//! A client sends requests at a constant rate, whether or not they are answered, through the layer to an API, all in
//! memory. In a terminal you watch and interfere with the keys shown at the bottom. Without one, or with `--svg`, a script
//! of twelve seconds interferes, and the run is drawn. At the end the promises are checked by what the API and the token
//! endpoint saw, and the exit status is 1 if one was broken.
//!
//! ```sh
//! cargo run --release --example refresh_contention [-- --svg FILE]
//! ```

use std::{
    io::{self, IsTerminal},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::Parser;
use tokio::{runtime::Runtime, time};
use tower_bearer::BoxError;

use self::run::{Action, World};

mod plot;
mod run;
mod view;

/// Shows how requests, their token and the token endpoint affect each other.
#[derive(Parser)]
struct Args {
    /// Plays the script and draws the run into this file
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Requests per second
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    rate: u32,
}

fn main() -> Result<ExitCode, BoxError> {
    let args = Args::parse();
    let runtime = Runtime::new()?;
    let _entered = runtime.enter();
    let scripted = args.svg.is_some() || !io::stdout().is_terminal();
    let world = World::start(args.rate, scripted);
    if scripted {
        runtime.block_on(play(&world, args.rate));
    } else {
        view::show(&world)?;
    }
    runtime.block_on(world.stop());

    let promises = world.promises(scripted);
    println!();
    for (promise, held) in &promises {
        println!("{}: {promise}", if *held { "held" } else { "BROKEN" });
    }
    if scripted {
        let file = || std::env::temp_dir().join("refresh_contention.svg");
        let file = args.svg.unwrap_or_else(file);
        plot::draw(&file, &world.record())?;
        println!("drawn: {}", file.display());
    }
    let held = promises.iter().all(|(_, held)| *held);
    Ok(ExitCode::from(u8::from(!held)))
}

/// Plays the script: what a user might do by hand.
async fn play(world: &World, rate: u32) {
    let script = [
        (2_000, Action::Revoke),
        (4_000, Action::Slow(true)),
        (5_700, Action::Slow(false)),
        (6_300, Action::Break(true)),
        (9_000, Action::Break(false)),
        (11_000, Action::Load(rate * 3)),
    ];
    for (at, action) in script {
        time::sleep_until(world.started() + Duration::from_millis(at)).await;
        world.apply(action);
    }
    time::sleep_until(world.started() + Duration::from_secs(12)).await;
}
