//! Where a container's stdio goes, as Task.Create and Task.Exec spell it (see [`crate::protocol`]).

use std::path::{Path, PathBuf};

use crate::protocol::{CRI_LOG_SCHEME, DISCARD_OUTPUT, STDIN_KEEP, STDIN_ONCE};

/// Destination of stdout or stderr besides those who attach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputTarget {
    /// Nobody else.
    Discard,
    /// A CRI log file of both streams.
    CriLog(PathBuf),
    /// A FIFO that somebody reads.
    Fifo(PathBuf),
}

/// Origin of stdin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InputSource {
    /// `/dev/null`.
    Null,
    /// Whoever attaches; stays open between attachments.
    Keep,
    /// Whoever attaches first; ends with that attachment.
    Once,
    /// A FIFO; ends with Task.CloseIO.
    Fifo(PathBuf),
}

/// The text is none of the spellings.
#[derive(Debug, thiserror::Error)]
#[error("stdio {0:?} is neither an absolute path nor one of the known schemes")]
pub struct InvalidStdio(String);

impl OutputTarget {
    /// Reads Task's `stdout` or `stderr`; the empty text discards.
    ///
    /// # Errors
    /// [`InvalidStdio`] for a relative path or an unknown scheme.
    pub fn parse(text: &str) -> Result<Self, InvalidStdio> {
        if text.is_empty() || text == DISCARD_OUTPUT {
            return Ok(Self::Discard);
        }
        let (path, log) = match text.strip_prefix(CRI_LOG_SCHEME) {
            Some(path) => (path, true),
            None => (text, false),
        };
        let path = absolute(path).ok_or_else(|| InvalidStdio(text.to_owned()))?;
        Ok(if log { Self::CriLog(path) } else { Self::Fifo(path) })
    }
}

impl InputSource {
    /// Reads Task's `stdin`; the empty text is `/dev/null`.
    ///
    /// # Errors
    /// [`InvalidStdio`] for a relative path or an unknown scheme.
    pub fn parse(text: &str) -> Result<Self, InvalidStdio> {
        match text {
            "" => Ok(Self::Null),
            STDIN_KEEP => Ok(Self::Keep),
            STDIN_ONCE => Ok(Self::Once),
            _ => absolute(text)
                .map(Self::Fifo)
                .ok_or_else(|| InvalidStdio(text.to_owned())),
        }
    }
}

fn absolute(text: &str) -> Option<PathBuf> {
    let path = Path::new(text);
    path.is_absolute().then(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spellings_of_the_protocol_are_read() {
        let log = OutputTarget::parse("cri-log:///var/log/pods/x/0.log").unwrap();
        assert_eq!(log, OutputTarget::CriLog("/var/log/pods/x/0.log".into()));
        assert_eq!(
            OutputTarget::parse("/run/f").unwrap(),
            OutputTarget::Fifo("/run/f".into())
        );
        assert_eq!(OutputTarget::parse("discard:").unwrap(), OutputTarget::Discard);
        assert_eq!(InputSource::parse("stream:once").unwrap(), InputSource::Once);
        assert_eq!(InputSource::parse("").unwrap(), InputSource::Null);
        assert!(OutputTarget::parse("binary:///bin/logger").is_err());
        assert!(OutputTarget::parse("cri-log://relative").is_err());
        assert!(InputSource::parse("discard:").is_err());
    }
}
