//! The run in a terminal.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use ratatui::{
    Frame,
    crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout, Rect},
    style::{Color, Style, Stylize},
    symbols::Marker,
    text::{Line, Span},
    widgets::{Axis, Block, Chart, Dataset, GraphType, Paragraph},
};

use crate::run::{Action, LIFETIME, Record, Sample, World};

/// How many seconds the charts show.
const WINDOW: f64 = 20.0;

/// Shows the run until the user quits.
pub(crate) fn show(world: &World) -> io::Result<()> {
    let ended = Arc::new(AtomicBool::new(false));
    let interrupted = Arc::clone(&ended);
    // Ctrl-C arrives as a key; the signal may come from elsewhere.
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            interrupted.store(true, Relaxed);
        }
    });
    // Its panic hook restores the terminal before the message is printed.
    let mut terminal = ratatui::init();
    let _restored = Restore;
    while !ended.load(Relaxed) {
        let record = world.record();
        terminal.draw(|frame| draw(frame, world, &record))?;
        if event::poll(Duration::from_millis(80))? && !handle(world, &event::read()?) {
            break;
        }
    }
    Ok(())
}

/// Restores the terminal, however the view ends.
struct Restore;

impl Drop for Restore {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Handles a key, and returns whether to go on.
fn handle(world: &World, event: &Event) -> bool {
    let Event::Key(key) = event else {
        return true;
    };
    if key.kind == KeyEventKind::Release {
        return true;
    }
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => return false,
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return false,
        KeyCode::Char('r') => world.apply(Action::Revoke),
        KeyCode::Char('s') => world.apply(Action::Slow(!world.is_slow())),
        KeyCode::Char('b') => world.apply(Action::Break(!world.is_down())),
        KeyCode::Up | KeyCode::Char('+') => {
            world.apply(Action::Load((world.rate() * 2).min(6_400)))
        }
        KeyCode::Down | KeyCode::Char('-') => world.apply(Action::Load((world.rate() / 2).max(25))),
        _ => {}
    }
    true
}

fn draw(frame: &mut Frame<'_>, world: &World, record: &Record) {
    let [head, rates, waiting, age, log, keys] = Layout::vertical([
        Constraint::Length(3),
        Constraint::Fill(3),
        Constraint::Fill(2),
        Constraint::Fill(3),
        Constraint::Length(5),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let end = world.now().max(WINDOW);
    let window = [end - WINDOW, end];
    let samples = record.samples.iter();
    let shown: Vec<_> = samples.filter(|sample| sample.at >= window[0]).collect();
    let line = |value: fn(&Sample) -> f64| -> Vec<(f64, f64)> {
        let points = shown.iter();
        points.map(|sample| (sample.at, value(sample))).collect()
    };

    let [answered, failed] = [line(|s| s.answered), line(|s| s.failed)];
    // A burst after a wait is cut off, or the rest would look flat.
    let most = highest(&[&answered, &failed]).min(f64::from(world.rate()) * 3.0);
    Panel {
        title: Line::from(vec![
            "requests per second ".bold(),
            " answered ".fg(BLUE),
            " failed ".fg(RED),
        ]),
        lines: vec![joined(BLUE, &answered), joined(RED, &failed)],
        window,
        most: most.max(f64::from(world.rate())) * 1.1,
    }
    .show(frame, rates);

    let waiters = line(|s| s.waiting as f64);
    Panel {
        title: "requests waiting for a token".bold().into(),
        lines: vec![joined(YELLOW, &waiters)],
        window,
        most: highest(&[&waiters]).max(10.0) * 1.1,
    }
    .show(frame, waiting);

    let ages = shown.iter();
    let ages: Vec<_> = ages.filter_map(|s| Some((s.at, s.age?))).collect();
    let marks = |good: bool| -> Vec<_> {
        let exchanges = record
            .token_requests
            .iter()
            .filter(|exchange| exchange.at >= window[0]);
        let exchanges =
            exchanges.filter(|exchange| exchange.answer.is_none_or(|(granted, _)| granted) == good);
        exchanges.map(|exchange| (exchange.at, 0.15)).collect()
    };
    let (good, bad) = (marks(true), marks(false));
    Panel {
        title: Line::from(vec![
            "age of the token in seconds ".bold(),
            " token request ".fg(BLUE),
            " failed token request ".fg(RED),
        ]),
        lines: vec![
            dots(GREEN, Marker::Braille, &ages),
            dots(BLUE, Marker::Block, &good),
            dots(RED, Marker::Block, &bad),
        ],
        window,
        most: LIFETIME.as_secs_f64(),
    }
    .show(frame, age);

    frame.render_widget(headline(world, record, shown.last().copied()), head);
    frame.render_widget(history(record, log), log);
    frame.render_widget(help(world), keys);
}

fn headline<'a>(world: &World, record: &Record, last: Option<&Sample>) -> Paragraph<'a> {
    let endpoint = match (world.is_down(), world.is_slow()) {
        (true, _) => " down ".black().on_light_red(),
        (false, true) => " slow ".black().on_light_yellow(),
        (false, false) => " up ".black().on_light_green(),
    };
    let token = match last.and_then(|sample| sample.age) {
        Some(age) => format!("{age:.1} s old").light_green(),
        None => "none".light_red().bold(),
    };
    let needless = match record.needless {
        0 => "0".light_green(),
        some => some.to_string().light_red().bold(),
    };
    let count = |value: usize| value.to_string().bold();
    Paragraph::new(vec![
        Line::from(vec![
            "token endpoint ".into(),
            endpoint,
            "   token ".into(),
            token,
            "   load ".into(),
            format!("{} requests/s", world.rate()).bold(),
        ]),
        Line::from(vec![
            "answered ".into(),
            count(record.answered),
            "   refused by the API ".into(),
            count(record.refused),
            "   failed ".into(),
            count(record.failures.len()),
            "   of these despite a valid token ".into(),
            needless,
            "   token requests ".into(),
            count(record.token_requests.len()),
        ]),
    ])
}

/// The latest events, newest first.
fn history<'a>(record: &Record, area: Rect) -> Paragraph<'a> {
    let actions = record.actions.iter();
    let actions = actions.map(|(at, action)| (*at, format!("* {action}").light_yellow()));
    let exchanges = record
        .token_requests
        .iter()
        .enumerate()
        .map(|(index, exchange)| {
            let number = index + 1;
            let text = match exchange.answer {
                None => format!("token request {number} under way ..").into(),
                Some((granted, at)) => {
                    let took = (at - exchange.at) * 1e3;
                    match granted {
                        true => {
                            Span::from(format!("token request {number} granted after {took:.0} ms"))
                        }
                        false => {
                            format!("token request {number} failed after {took:.0} ms").light_red()
                        }
                    }
                }
            };
            (exchange.at, text)
        });
    let mut events: Vec<_> = actions.chain(exchanges).collect();
    events.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    events.truncate(usize::from(area.height.saturating_sub(1)));
    let lines = events.into_iter();
    let lines = lines.map(|(at, text)| Line::from(vec![format!("{at:7.2} s  ").dark_gray(), text]));
    Paragraph::new(lines.collect::<Vec<_>>()).block(Block::new().title("events".bold()))
}

fn help<'a>(world: &World) -> Line<'a> {
    let key = |key: &'static str| Span::from(key).black().on_gray();
    Line::from(vec![
        key(" r "),
        " revoke the token  ".into(),
        key(" s "),
        if world.is_slow() {
            " fast endpoint  "
        } else {
            " slow endpoint  "
        }
        .into(),
        key(" b "),
        if world.is_down() {
            " repair endpoint  "
        } else {
            " break endpoint  "
        }
        .into(),
        key(" ↑ ↓ "),
        " load  ".into(),
        key(" q "),
        " quit".into(),
    ])
}

/// A chart over the time shown.
struct Panel<'a> {
    title: Line<'a>,
    lines: Vec<Dataset<'a>>,
    window: [f64; 2],
    most: f64,
}

impl Panel<'_> {
    fn show(self, frame: &mut Frame<'_>, area: Rect) {
        let grey = Style::new().dark_gray();
        let labels = [format!("{:>4}", 0), format!("{:>4.0}", self.most)];
        let values = Axis::default().bounds([0.0, self.most]).labels(labels);
        let chart = Chart::new(self.lines)
            .block(Block::new().title(self.title))
            .x_axis(Axis::default().style(grey).bounds(self.window))
            .y_axis(values.style(grey));
        frame.render_widget(chart, area);
    }
}

fn joined(colour: Color, points: &[(f64, f64)]) -> Dataset<'_> {
    dots(colour, Marker::Braille, points).graph_type(GraphType::Line)
}

fn dots(colour: Color, marker: Marker, points: &[(f64, f64)]) -> Dataset<'_> {
    let dots = Dataset::default().marker(marker);
    dots.style(Style::new().fg(colour)).data(points)
}

fn highest(lines: &[&[(f64, f64)]]) -> f64 {
    let all = lines.iter().flat_map(|line| line.iter());
    all.map(|(_, y)| *y).fold(0.0, f64::max)
}

const BLUE: Color = Color::LightBlue;
const GREEN: Color = Color::LightGreen;
const RED: Color = Color::LightRed;
const YELLOW: Color = Color::LightYellow;
