//! What the guest sends to the host, over one virtio-serial port: frames, so that the streams stay in order among each other,
//! nothing is lost at the end, and the exit status comes behind all output.
//!
//! A frame is a byte for its kind, the length of the payload as four bytes, least first, and the payload.

use std::io::{self, Read, Write};

/// The port's name.
pub(super) const PORT: &str = "xtask.vm";

/// Guest and host are one program; a longer one would be noise.
const MAX_PAYLOAD: usize = 1 << 20;

/// A message of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    /// The command is about to start, on this kernel (`uname -r`).
    Started(String),
    /// Output of the command.
    Stdout(Vec<u8>),
    /// Error output of the command.
    Stderr(Vec<u8>),
    /// The command has ended with this status; 128 and the signal's number if by a signal. The last frame.
    Exit(u8),
    /// There is no such command, or it cannot be executed: the status that shells give and the reason. The last frame.
    NotStarted(u8, String),
    /// The guest itself has failed. The last frame.
    Failed(String),
}

impl Frame {
    /// Writes the frame at once.
    ///
    /// # Errors
    /// When writing fails.
    pub(super) fn write_to(&self, writer: &mut impl Write) -> io::Result<()> {
        let status;
        let (kind, head, payload): (u8, &[u8], &[u8]) = match self {
            Self::Started(release) => (0, &[], release.as_bytes()),
            Self::Stdout(bytes) => (1, &[], bytes),
            Self::Stderr(bytes) => (2, &[], bytes),
            Self::Exit(code) => {
                status = [*code];
                (3, &status, &[])
            }
            Self::NotStarted(code, reason) => {
                status = [*code];
                (4, &status, reason.as_bytes())
            }
            Self::Failed(reason) => (5, &[], reason.as_bytes()),
        };
        let length = u32::try_from(head.len() + payload.len()).map_err(io::Error::other)?;
        let bytes = [&[kind], &length.to_le_bytes()[..], head, payload].concat();
        writer.write_all(&bytes)
    }

    /// Reads one frame; `None` at the end of the stream between two.
    ///
    /// # Errors
    /// When the stream ends within a frame or is not made of frames.
    pub(super) fn read_from(reader: &mut impl Read) -> io::Result<Option<Self>> {
        let mut kind = [0];
        if reader.read(&mut kind)? == 0 {
            return Ok(None);
        }
        let mut length = [0; 4];
        reader.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_PAYLOAD {
            return Err(bad(format!("a frame of {length} bytes")));
        }
        let mut payload = vec![0; length];
        reader.read_exact(&mut payload)?;
        Self::of(kind[0], payload).map(Some)
    }

    fn of(kind: u8, payload: Vec<u8>) -> io::Result<Self> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match (kind, payload.as_slice()) {
            (0, release) => Ok(Self::Started(text(release))),
            (1, _) => Ok(Self::Stdout(payload)),
            (2, _) => Ok(Self::Stderr(payload)),
            (3, &[code]) => Ok(Self::Exit(code)),
            (4, &[code, ref reason @ ..]) => Ok(Self::NotStarted(code, text(reason))),
            (5, reason) => Ok(Self::Failed(text(reason))),
            (kind, payload) => Err(bad(format!(
                "a frame of kind {kind} with {} bytes",
                payload.len()
            ))),
        }
    }
}

fn bad(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_they_were_written() {
        let frames = [
            Frame::Started("6.12.1".to_owned()),
            Frame::Stdout(vec![0, 255, b'\n']),
            Frame::Stderr(Vec::new()),
            Frame::NotStarted(127, "no such command".to_owned()),
            Frame::Failed("no memory".to_owned()),
            Frame::Exit(7),
        ];
        let mut bytes = Vec::new();
        for frame in &frames {
            frame.write_to(&mut bytes).unwrap();
        }
        let mut reader = bytes.as_slice();
        for frame in &frames {
            assert_eq!(Frame::read_from(&mut reader).unwrap().as_ref(), Some(frame));
        }
        assert_eq!(Frame::read_from(&mut reader).unwrap(), None);
    }

    #[test]
    fn what_is_cut_or_no_frame_is_an_error() {
        let mut bytes = Vec::new();
        Frame::Exit(7).write_to(&mut bytes).unwrap();
        for cut in 1..bytes.len() {
            assert!(Frame::read_from(&mut &bytes[..cut]).is_err(), "{cut}");
        }
        for wrong in [
            &[9, 0, 0, 0, 0][..],
            &[3, 0, 0, 0, 0],
            &[1, 255, 255, 255, 255],
        ] {
            assert!(Frame::read_from(&mut &wrong[..]).is_err(), "{wrong:?}");
        }
    }
}
