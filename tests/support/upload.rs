//! [`Upload`]: a streaming body.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::mpsc;
use tower_bearer::BoxError;

/// A body that streams what a channel sends, so it is not `Clone`.
pub struct Upload {
    frames: mpsc::UnboundedReceiver<Result<Frame<Bytes>, BoxError>>,
    /// Its size hint, lower and upper bound.
    pub length: (u64, Option<u64>),
}

type Sender = mpsc::UnboundedSender<Result<Frame<Bytes>, BoxError>>;

impl Upload {
    /// A body that ends when the sender is dropped.
    pub fn new() -> (Sender, Self) {
        let (sender, frames) = mpsc::unbounded_channel();
        let length = (0, None);
        (sender, Self { frames, length })
    }

    /// A body of these chunks.
    pub fn of(chunks: &[&'static str]) -> Self {
        Self::with_trailers(chunks, HeaderMap::new())
    }

    /// A body of these chunks, with these trailers unless they are empty.
    pub fn with_trailers(chunks: &[&'static str], trailers: HeaderMap) -> Self {
        let (sender, upload) = Self::new();
        for chunk in chunks {
            sender.send(data(chunk)).unwrap();
        }
        if !trailers.is_empty() {
            sender.send(Ok(Frame::trailers(trailers))).unwrap();
        }
        upload
    }
}

/// A body that says that it is empty.
impl Default for Upload {
    fn default() -> Self {
        Self {
            length: (0, Some(0)),
            ..Self::of(&[])
        }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.frames.poll_recv(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.length.1 == Some(0)
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = SizeHint::new();
        hint.set_lower(self.length.0);
        if let Some(most) = self.length.1 {
            hint.set_upper(most);
        }
        hint
    }
}

pub fn data(text: &'static str) -> Result<Frame<Bytes>, BoxError> {
    Ok(Frame::data(Bytes::from_static(text.as_bytes())))
}
