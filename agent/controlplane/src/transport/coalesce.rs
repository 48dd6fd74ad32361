//! One write for what one turn of the scheduler brings.
//!
//! HTTP/2 flushes its connection whenever one of its streams has a frame: a call of gRPC leaves as
//! three writes (headers, message, end of the stream), its answer as two, and calls that are at work
//! together each bring their own. Over TCP with Nagle's algorithm off every write is a packet, and
//! every packet wakes the peer. [`Coalesced`] keeps what is written and lets a flush wait until the
//! other tasks that can run have run; what they add goes into the same write.
//!
//! A flush that waits is reported as done. That is sound because the task is woken again by itself, asks
//! for another flush when it runs (as every HTTP/2 connection does), and gets an error of the socket from a
//! later flush, write or shutdown in any case.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// What is kept at most; beyond it a write goes out at once. An HTTP/2 frame's default maximum: the
/// calls of NSM are a tenth of it.
const CAPACITY: usize = 16 * 1024;

/// How many flushes in a row may wait. Each is one turn of the scheduler; under load every turn may
/// bring something, and what was first must not wait for all of it.
const PATIENCE: u8 = 6;

/// A socket whose writes are put together.
#[derive(Debug)]
pub(crate) struct Coalesced<S> {
    socket: S,
    /// Written to us, and from `sent` on not yet to the socket.
    buffer: Vec<u8>,
    sent: usize,
    turn: Turn,
    /// Flushes that have waited since the buffer was empty.
    waited: u8,
    /// Whether writes go out as they come.
    is_direct: bool,
}

/// What has happened since the last flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Something was written.
    Written,
    /// Nothing.
    Flushed,
    /// Nothing but that the task runs anew, after the others.
    Passed,
}

impl<S> Coalesced<S> {
    /// Puts the writes to `socket` together.
    pub(crate) fn new(socket: S) -> Self {
        Self {
            socket,
            buffer: Vec::new(),
            sent: 0,
            turn: Turn::Flushed,
            waited: 0,
            is_direct: false,
        }
    }

    /// Lets each write to `socket` go out as it comes: on a unix socket in plain text a write is cheap, and nothing waits for another.
    pub(crate) fn direct(socket: S) -> Self {
        Self {
            is_direct: true,
            ..Self::new(socket)
        }
    }

    fn is_empty(&self) -> bool {
        self.sent == self.buffer.len()
    }
}

impl<S: AsyncWrite + Unpin> Coalesced<S> {
    /// Writes what is kept.
    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            let socket = Pin::new(&mut self.socket);
            let written = ready!(socket.poll_write(context, &self.buffer[self.sent..]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += written;
        }
        // A connection that is idle holds no memory for the time when it was not.
        if self.buffer.capacity() > CAPACITY / 4 {
            self.buffer = Vec::new();
        }
        self.buffer.clear();
        self.sent = 0;
        self.waited = 0;
        Poll::Ready(Ok(()))
    }

    /// Makes room for `more` bytes; `false` when they are too many to be kept.
    fn poll_room(&mut self, context: &mut Context<'_>, more: usize) -> Poll<io::Result<bool>> {
        if self.buffer.len() + more > CAPACITY {
            ready!(self.poll_drain(context))?;
        }
        Poll::Ready(Ok(more <= CAPACITY))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Coalesced<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // HTTP/2 reads first whenever it runs.
        if self.turn == Turn::Flushed {
            self.turn = Turn::Passed;
        }
        Pin::new(&mut self.socket).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Coalesced<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.is_direct || !ready!(self.poll_room(context, bytes.len()))? {
            return Pin::new(&mut self.socket).poll_write(context, bytes);
        }
        self.buffer.extend_from_slice(bytes);
        self.turn = Turn::Written;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = slices.iter().map(|slice| slice.len()).sum();
        if self.is_direct || !ready!(self.poll_room(context, length))? {
            return Pin::new(&mut self.socket).poll_write_vectored(context, slices);
        }
        for slice in slices {
            self.buffer.extend_from_slice(slice);
        }
        self.turn = Turn::Written;
        Poll::Ready(Ok(length))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Part of it was written, and the socket was full: there is nothing to wait for.
        let is_begun = self.sent > 0;
        if self.is_empty() || is_begun || self.turn == Turn::Passed || self.waited >= PATIENCE {
            ready!(self.poll_drain(context))?;
            return Pin::new(&mut self.socket).poll_flush(context);
        }
        self.turn = Turn::Flushed;
        self.waited += 1;
        context.waker().wake_by_ref();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(context))?;
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

impl<S: Connected> Connected for Coalesced<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.socket.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        sync::{Arc, Mutex},
    };

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    type Writes = Arc<Mutex<Vec<Vec<u8>>>>;

    /// Records each write; takes so many bytes of each at most.
    #[derive(Debug, Clone)]
    struct Recorder {
        writes: Writes,
        limit: usize,
    }

    impl Recorder {
        fn taking(limit: usize) -> (Coalesced<Self>, Writes) {
            let writes = Writes::default();
            let recorder = Self {
                writes: Arc::clone(&writes),
                limit,
            };
            (Coalesced::new(recorder), writes)
        }
    }

    impl AsyncRead for Recorder {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl AsyncWrite for Recorder {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let taken = bytes.len().min(self.limit);
            self.writes.lock().unwrap().push(bytes[..taken].to_vec());
            Poll::Ready(Ok(taken))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// A run of a connection's task: reads, then writes `bytes`, then flushes.
    async fn run(io: &mut Coalesced<Recorder>, bytes: &[u8]) {
        poll_fn(|context| {
            let mut space = [0; 8];
            let mut space = ReadBuf::new(&mut space);
            assert!(
                Pin::new(&mut *io)
                    .poll_read(context, &mut space)
                    .is_pending()
            );
            Poll::Ready(())
        })
        .await;
        if !bytes.is_empty() {
            io.write_all(bytes).await.unwrap();
        }
        io.flush().await.unwrap();
    }

    #[tokio::test]
    async fn what_comes_in_turns_that_follow_each_other_is_one_write() {
        let (mut io, writes) = Recorder::taking(usize::MAX);
        run(&mut io, b"head").await;
        run(&mut io, b"ers").await;
        assert!(writes.lock().unwrap().is_empty());
        // A second flush in the same run is no turn of the others.
        io.flush().await.unwrap();
        assert!(writes.lock().unwrap().is_empty());
        run(&mut io, b"").await;
        assert_eq!(*writes.lock().unwrap(), [b"headers"]);
        // Nothing is written twice, and nothing is when there is nothing.
        run(&mut io, b"").await;
        assert_eq!(writes.lock().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn patience_ends() {
        let (mut io, writes) = Recorder::taking(usize::MAX);
        for _ in 0..=PATIENCE {
            assert!(writes.lock().unwrap().is_empty());
            run(&mut io, b"x").await;
        }
        assert_eq!(
            writes.lock().unwrap().concat().len(),
            1 + usize::from(PATIENCE)
        );
    }

    #[tokio::test]
    async fn much_is_not_kept_and_order_is() {
        let (mut io, writes) = Recorder::taking(1000);
        io.write_all(b"first").await.unwrap();
        let much = vec![7; 3 * CAPACITY];
        io.write_all(&much).await.unwrap();
        io.write_all(b"last").await.unwrap();
        io.shutdown().await.unwrap();
        let written = writes.lock().unwrap().concat();
        assert!(written.starts_with(b"first\x07") && written.ends_with(b"\x07last"));
        assert_eq!(written.len(), 5 + much.len() + 4);
    }

    #[tokio::test]
    async fn slices_are_put_together() {
        let (mut io, writes) = Recorder::taking(3);
        let slices = [IoSlice::new(b"ab"), IoSlice::new(b"cd")];
        let taken = poll_fn(|context| Pin::new(&mut io).poll_write_vectored(context, &slices));
        assert_eq!(taken.await.unwrap(), 4);
        run(&mut io, b"").await;
        run(&mut io, b"").await;
        assert_eq!(*writes.lock().unwrap(), [&b"abc"[..], b"d"]);
    }

    /// Whoever flushes and then only waits for an answer is served, too: the flush that was told as
    /// done is made up for when the task runs again, which it does by itself.
    #[tokio::test]
    async fn a_flush_that_waits_comes_by_itself() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut io = Coalesced::new(near);
        let connection = tokio::spawn(async move {
            io.write_all(b"ping").await.unwrap();
            let mut answer = [0; 4];
            let mut read = ReadBuf::new(&mut answer);
            // As an HTTP/2 connection runs.
            poll_fn(|context| {
                let outcome = Pin::new(&mut io).poll_read(context, &mut read)?;
                let _ = Pin::new(&mut io).poll_flush(context)?;
                outcome.map(io::Result::Ok)
            })
            .await
            .unwrap();
            answer
        });
        let mut question = [0; 4];
        far.read_exact(&mut question).await.unwrap();
        far.write_all(b"pong").await.unwrap();
        assert_eq!((&question, &connection.await.unwrap()), (b"ping", b"pong"));
    }
}
