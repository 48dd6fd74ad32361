//! Unix streams that carry descriptors beside their bytes, as NSM's Go components send them
//! (`grpcfd`): in both directions, at any byte of the HTTP/2 connection.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tonic::transport::server::Connected;

mod descriptors;
mod process;

pub use self::{
    descriptors::{Descriptors, Passed},
    process::sees_process_1,
};
pub(crate) use self::{
    descriptors::{FileId, Kind, MissingDescriptor, PATIENCE},
    process::{PeerProcess, namespace_at, node},
};

/// Descriptors that the kernel lets one message carry (SCM_MAX_FD of net/scm.h).
const MAX_AT_ONCE: usize = 253;

/// Descriptors that we send at once: what a Go component's buffer takes.
const MAX_SENT_AT_ONCE: usize = 64;

/// A connected Unix stream and the descriptors beside it.
#[derive(Debug)]
pub(crate) struct UnixStream {
    stream: tokio::net::UnixStream,
    process: Arc<PeerProcess>,
    descriptors: Arc<Descriptors>,
}

/// Who is at the other end of a connection to the node's socket.
#[derive(Debug, Clone)]
pub(crate) struct NodePeer {
    /// Its process.
    pub(crate) process: Arc<PeerProcess>,
    /// What it has passed.
    pub(crate) descriptors: Arc<Descriptors>,
}

impl UnixStream {
    /// A stream that somebody has accepted.
    pub(crate) fn accepted(stream: tokio::net::UnixStream) -> Self {
        Self {
            process: Arc::new(PeerProcess::of(&stream)),
            stream,
            descriptors: Arc::default(),
        }
    }

    /// Who is at the other end.
    pub(crate) fn process(&self) -> &PeerProcess {
        &self.process
    }

    /// Connects to the socket at `path`; its descriptors are those of `descriptors`.
    pub(crate) async fn connect(path: &Path, descriptors: Arc<Descriptors>) -> io::Result<Self> {
        let stream = tokio::net::UnixStream::connect(path).await?;
        let process = Arc::new(PeerProcess::of(&stream));
        descriptors.connected(Arc::clone(&process));
        Ok(Self {
            stream,
            process,
            descriptors,
        })
    }

    /// Writes without waiting, with what is to go beside it.
    fn write(&self, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
        self.descriptors.send_with(MAX_SENT_AT_ONCE, |outgoing| {
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SENT_AT_ONCE))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !outgoing.is_empty() {
                ancillary.push(SendAncillaryMessage::ScmRights(outgoing));
            }
            Ok(sendmsg(
                &self.stream,
                bytes,
                &mut ancillary,
                SendFlags::NOSIGNAL,
            )?)
        })
    }

    /// Reads without waiting.
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_AT_ONCE))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(buffer)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        // Dropping the messages that are left would leak their descriptors: each is taken out.
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                self.descriptors.receive(rights);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            tracing::warn!(
                "a descriptor that was passed is lost: raise the agent's limit of open files"
            );
        }
        Ok(received.bytes)
    }
}

impl Drop for UnixStream {
    fn drop(&mut self) {
        self.descriptors.forget_received();
    }
}

impl AsyncRead for UnixStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            ready!(this.stream.poll_read_ready(context))?;
            let unfilled = buffer.initialize_unfilled();
            let outcome = this
                .stream
                .try_io(Interest::READABLE, || this.read(unfilled));
            match outcome {
                Ok(count) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for UnixStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        loop {
            ready!(this.stream.poll_write_ready(context))?;
            let outcome = this.stream.try_io(Interest::WRITABLE, || this.write(bytes));
            match outcome {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

impl Connected for UnixStream {
    type ConnectInfo = NodePeer;

    fn connect_info(&self) -> NodePeer {
        NodePeer {
            process: Arc::clone(&self.process),
            descriptors: Arc::clone(&self.descriptors),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::MetadataExt as _};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        let (one, other) = tokio::net::UnixStream::pair().unwrap();
        (UnixStream::accepted(one), UnixStream::accepted(other))
    }

    #[tokio::test]
    async fn a_descriptor_travels_with_the_bytes_that_name_it() {
        let (mut sender, mut receiver) = pair();
        let netns = "/proc/self/ns/net";
        let metadata = std::fs::metadata(netns).unwrap();
        for round in 0..3 {
            sender
                .descriptors
                .send(Passed::new(File::open(netns).unwrap().into()));
            sender.write_all(b"it is inode://4/5").await.unwrap();
            let mut text = [0; 17];
            receiver.read_exact(&mut text).await.unwrap();
            assert_eq!(&text, b"it is inode://4/5", "round {round}");
            let id = FileId {
                device: metadata.dev(),
                inode: metadata.ino(),
            };
            let passed = receiver.descriptors.take(id, Kind::Namespace, PATIENCE);
            passed.await.unwrap();
        }
        let left = sender.descriptors.send_with(1, |left| Ok(left.len()));
        assert_eq!(left.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_stream_without_descriptors_is_a_stream() {
        let (mut sender, mut receiver) = pair();
        let sent: Vec<u8> = (0..1 << 20)
            .map(|number: u32| number.to_le_bytes()[1])
            .collect();
        let expected = sent.clone();
        let writing = tokio::spawn(async move {
            sender.write_all(&sent).await.unwrap();
            sender.shutdown().await.unwrap();
        });
        let mut received = Vec::new();
        receiver.read_to_end(&mut received).await.unwrap();
        writing.await.unwrap();
        assert!(received == expected);
    }
}
