//! What was printed and logged.

use std::{
    error::Error,
    fmt, io,
    sync::{Arc, Mutex},
};

use tracing::subscriber::DefaultGuard;
use tracing_subscriber::{
    fmt::{MakeWriter, format::FmtSpan},
    layer::SubscriberExt,
};

use crate::support::{enable_tracing, everything};

/// Everything that was printed. Clones are one.
#[derive(Clone, Default)]
pub struct Printed(Arc<Mutex<Vec<u8>>>);

impl Printed {
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

/// Collects all events and spans of this thread, of every target and level.
pub fn collect() -> (Printed, DefaultGuard) {
    enable_tracing();
    let printed = Printed::default();
    let layer = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_span_events(FmtSpan::FULL)
        .with_writer(printed.clone());
    let guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(layer));
    (printed, guard)
}
