//! Terminal sizes, which clients send as JSON documents one after the other, cut anywhere.

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::watch;

use crate::backend::TerminalSize;

/// More than this without a whole document is not a size.
const PENDING_MAX: usize = 1024;

#[derive(Default)]
pub(crate) struct ResizeParser {
    pending: Vec<u8>,
}

impl ResizeParser {
    /// Takes more bytes; the last size that is complete now. `Err`: these are not sizes.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<Option<TerminalSize>, ()> {
        let mut last = None;
        for part in bytes.chunks(PENDING_MAX) {
            self.pending.extend_from_slice(part);
            let mut documents =
                serde_json::Deserializer::from_slice(&self.pending).into_iter::<TerminalSize>();
            let mut read = 0;
            loop {
                match documents.next() {
                    Some(Ok(size)) => {
                        last = Some(size);
                        read = documents.byte_offset();
                    }
                    Some(Err(error)) if !error.is_eof() => return Err(()),
                    _ => break,
                }
            }
            self.pending.drain(..read);
            if self.pending.len() > PENDING_MAX {
                return Err(());
            }
        }
        Ok(last)
    }
}

/// Reads sizes to the end of the stream.
pub(crate) async fn pump(mut stream: impl AsyncRead + Unpin, sizes: watch::Sender<Option<TerminalSize>>) {
    let mut parser = ResizeParser::default();
    let mut buffer = [0; 512];
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        match parser.push(&buffer[..length]) {
            Ok(Some(size)) => drop(sizes.send(Some(size))),
            Ok(None) => {}
            Err(()) => {
                tracing::debug!("a client's terminal sizes are malformed; no more of them are read");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes() {
        let mut parser = ResizeParser::default();
        let size = |width, height| Ok(Some(TerminalSize { width, height }));
        assert_eq!(parser.push(br#"{"Width":80,"Height":24}"#), size(80, 24));
        assert_eq!(parser.push(b"\n{\"width\":1,\"hei"), Ok(None));
        assert_eq!(parser.push(b"ght\":2}\n{\"Width\":3,\"Height\":4}\n"), size(3, 4));
        assert!(parser.push(br#"{"Width":-1,"Height":4}"#).is_err());
        assert!(ResizeParser::default().push(&[b' '; 5000]).is_err());
        assert!(ResizeParser::default().push(b"[1]").is_err());
    }

    proptest! {
        #[test]
        fn cut_anywhere(cuts in proptest::collection::vec(0..60usize, 0..6)) {
            let all = b"{\"Width\":80,\"Height\":24}\n{\"Width\":100,\"Height\":50}\n";
            let mut at: Vec<usize> = cuts.into_iter().map(|cut| cut.min(all.len())).chain([0, all.len()]).collect();
            at.sort_unstable();
            let mut parser = ResizeParser::default();
            let mut last = None;
            for pair in at.windows(2) {
                last = parser.push(&all[pair[0]..pair[1]]).expect("valid").or(last);
            }
            prop_assert_eq!(last, Some(TerminalSize { width: 100, height: 50 }));
        }
    }
}
