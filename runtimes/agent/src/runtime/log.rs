//! libcontainer tells the reason of a failure in its log rather than in its errors, and its children log in
//! processes of their own: so errors go to a memory file that all of them share, and the last lines become
//! part of the answer.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use nix::sys::memfd::{MFdFlags, memfd_create};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Bytes of the log's end that are told.
const TAIL: u64 = 2048;

static LOG: OnceLock<File> = OnceLock::new();

/// Starts collecting; `None` where that is not possible, which costs only details.
pub(super) fn install() -> Option<&'static File> {
    let file = File::from(memfd_create("log", MFdFlags::MFD_CLOEXEC).ok()?);
    let file = LOG.get_or_init(|| file);
    tracing::subscriber::set_global_default(Errors).ok()?;
    Some(file)
}

/// The message with the log's end.
pub(super) fn with_details(message: String, log: Option<&'static File>) -> String {
    let Some((log, length)) = log.and_then(|log| Some((log, log.metadata().ok()?.len()))) else {
        return message;
    };
    let from = length.saturating_sub(TAIL);
    let mut tail = vec![0; usize::try_from(length - from).unwrap_or(0)];
    match log.read_exact_at(&mut tail, from) {
        Ok(()) if !tail.is_empty() => {
            let details = String::from_utf8_lossy(&tail).trim_end().replace('\n', "; ");
            format!("{message} ({details})")
        }
        _ => message,
    }
}

struct Errors;

impl Subscriber for Errors {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(tracing::level_filters::LevelFilter::ERROR)
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        if let Some(mut log) = LOG.get() {
            // A lost detail is no reason to fail.
            let _ = log.write_all(format!("{}{}\n", line.message, line.fields).as_bytes());
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a String does not fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
    }
}
