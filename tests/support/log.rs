//! What is printed and logged.

use std::{
    error::Error,
    fmt, io,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use tracing::{
    Event, Id, Subscriber,
    span::{Attributes, Record},
    subscriber::DefaultGuard,
};
use tracing_subscriber::{
    Layer,
    fmt::{MakeWriter, format::FmtSpan},
    layer::{Context, SubscriberExt},
};

use super::everything;

/// Keeps all events and spans enabled for the whole process, so that a thread's subscriber sees its own whatever
/// others come and go: whether an event is of interest is remembered for all threads.
pub fn enable_tracing() {
    static ENABLED: LazyLock<tracing::Dispatch> =
        LazyLock::new(|| tracing::Dispatch::new(tracing_subscriber::registry()));
    LazyLock::force(&ENABLED);
    tracing::callsite::rebuild_interest_cache();
}

/// Everything that was printed. Clones share it.
#[derive(Clone, Default)]
pub struct Printed(Arc<Mutex<Vec<u8>>>);

impl Printed {
    /// Collects all events and spans of this thread, of every target and level.
    pub fn collect() -> (Self, DefaultGuard) {
        enable_tracing();
        let printed = Self::default();
        let layer = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_span_events(FmtSpan::FULL)
            .with_writer(printed.clone());
        let guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(layer));
        (printed, guard)
    }

    pub fn debug(&self, value: &dyn fmt::Debug) {
        self.add(format_args!("{value:?}\n{value:#?}"));
    }

    pub fn error(&self, error: &(dyn Error + 'static)) {
        self.add(everything(error));
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }

    fn add(&self, text: impl fmt::Display) {
        let mut printed = self.0.lock().unwrap();
        printed.extend_from_slice(text.to_string().as_bytes());
        printed.push(b'\n');
    }
}

impl io::Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Printed {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// A log that panics at certain records, while switched on.
pub struct PanickingLog {
    panics: Arc<AtomicBool>,
    at: &'static [Told],
}

/// What a log receives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Told {
    Event,
    NewSpan,
    /// Of a span's field.
    Record,
}

impl PanickingLog {
    /// Installs one for this thread and returns its switch, which is off.
    pub fn collect(at: &'static [Told]) -> (Arc<AtomicBool>, DefaultGuard) {
        enable_tracing();
        let panics = Arc::new(AtomicBool::new(false));
        let log = Self {
            panics: Arc::clone(&panics),
            at,
        };
        let guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(log));
        (panics, guard)
    }

    fn hear(&self, told: Told) {
        let panics = self.at.contains(&told) && self.panics.load(Ordering::SeqCst);
        assert!(!panics, "the log panics");
    }
}

impl<S: Subscriber> Layer<S> for PanickingLog {
    fn on_event(&self, _: &Event<'_>, _: Context<'_, S>) {
        self.hear(Told::Event);
    }

    fn on_new_span(&self, _: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        self.hear(Told::NewSpan);
    }

    fn on_record(&self, _: &Id, _: &Record<'_>, _: Context<'_, S>) {
        self.hear(Told::Record);
    }
}
