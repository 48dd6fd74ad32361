//! Streams that may be TLS.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::SystemTime,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};
use tokio_rustls::TlsStream;
use tonic::transport::server::Connected;

use super::error::TlsError;
use crate::identity::session::Session;

/// A record of TLS begins with its type: 20 change_cipher_spec, 21 alert, 22 handshake, 23 application data (RFC 8446 section 5.1).
/// HTTP/2 begins with the letter P of a client's preface, or with the length of a server's SETTINGS, which is below 65,536.
pub(super) const fn is_tls(first: u8) -> bool {
    matches!(first, 20..=23)
}

/// The type of a record of a handshake.
pub(super) const HANDSHAKE: u8 = 22;

/// A stream of which the first byte is looked at.
#[derive(Debug)]
pub(crate) struct Opening<S> {
    stream: S,
    first: Option<u8>,
    /// Whether the first byte is to be read once more.
    is_put_back: bool,
    /// Whether TLS in answer to plain text is an error.
    is_plain: bool,
}

impl<S> Opening<S> {
    pub(super) const fn of(stream: S) -> Self {
        Self {
            stream,
            first: None,
            is_put_back: false,
            is_plain: false,
        }
    }

    /// The first byte that was read.
    pub(super) const fn first(&self) -> Option<u8> {
        self.first
    }

    /// The next read begins with the first byte.
    pub(super) const fn put_back(&mut self) {
        self.is_put_back = self.first.is_some();
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Opening<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.is_put_back
            && let Some(first) = this.first
            && buffer.remaining() > 0
        {
            this.is_put_back = false;
            buffer.put_slice(&[first]);
            return Poll::Ready(Ok(()));
        }
        if this.first.is_some() {
            return Pin::new(&mut this.stream).poll_read(context, buffer);
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(context, buffer))?;
        this.first = buffer.filled().get(before).copied();
        match this.first {
            Some(first) if this.is_plain && is_tls(first) => {
                Poll::Ready(Err(TlsError::OnlyTls.into()))
            }
            _ => Poll::Ready(Ok(())),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Opening<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

/// A stream, plain or in TLS.
#[derive(Debug)]
pub(crate) struct Secured<S> {
    inner: Inner<S>,
    /// None in plain text.
    session: Option<Arc<Session>>,
    /// Set when the stream is gone.
    ended: Option<Arc<AtomicBool>>,
}

#[derive(Debug)]
enum Inner<S> {
    Plain(Opening<S>),
    Tls(Box<Sealed<S>>),
}

/// TLS, as long as both certificates hold.
#[derive(Debug)]
struct Sealed<S> {
    stream: TlsStream<Opening<S>>,
    /// When the certificate ends that ends first. Whoever dials has dialled anew long before.
    end: Pin<Box<Sleep>>,
}

impl<S> Sealed<S> {
    /// Whether the connection has outlived a certificate. Its reader is woken then.
    fn check_end(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.end.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "a certificate of this connection has ended: connect anew with one that holds",
            )),
            Poll::Pending => Ok(()),
        }
    }
}

impl<S> Secured<S> {
    /// A plain stream that somebody has accepted.
    pub(crate) const fn accepted_plain(stream: S) -> Self {
        Self::plain(Opening::of(stream))
    }

    /// A plain stream that we have dialled: an answer in TLS is an error that says so.
    pub(crate) const fn dialled_plain(stream: S) -> Self {
        let mut opening = Opening::of(stream);
        opening.is_plain = true;
        Self::plain(opening)
    }

    const fn plain(opening: Opening<S>) -> Self {
        Self {
            inner: Inner::Plain(opening),
            session: None,
            ended: None,
        }
    }

    pub(super) fn tls(stream: TlsStream<Opening<S>>, session: Arc<Session>) -> Self {
        let left = session.ends().duration_since(SystemTime::now());
        let end = Box::pin(tokio::time::sleep(left.unwrap_or_default()));
        Self {
            inner: Inner::Tls(Box::new(Sealed { stream, end })),
            session: Some(session),
            ended: None,
        }
    }

    /// Sets `flag` when the stream is gone.
    pub(crate) fn noting_its_end(mut self, flag: Arc<AtomicBool>) -> Self {
        self.ended = Some(flag);
        self
    }

    /// What both ends have shown each other; none in plain text.
    pub(crate) const fn session(&self) -> Option<&Arc<Session>> {
        self.session.as_ref()
    }

    fn transport(&self) -> &S {
        match &self.inner {
            Inner::Plain(opening) => &opening.stream,
            Inner::Tls(sealed) => &sealed.stream.get_ref().0.stream,
        }
    }
}

impl<S> Drop for Secured<S> {
    fn drop(&mut self) {
        if let Some(ended) = &self.ended {
            ended.store(true, Ordering::Relaxed);
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Secured<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.get_mut().inner {
            Inner::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Inner::Tls(sealed) => {
                sealed.check_end(context)?;
                Pin::new(&mut sealed.stream).poll_read(context, buffer)
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Secured<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().inner {
            Inner::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Inner::Tls(sealed) => Pin::new(&mut sealed.stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().inner {
            Inner::Plain(stream) => Pin::new(stream).poll_write_vectored(context, bytes),
            Inner::Tls(sealed) => Pin::new(&mut sealed.stream).poll_write_vectored(context, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.inner {
            Inner::Plain(stream) => stream.is_write_vectored(),
            Inner::Tls(sealed) => sealed.stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().inner {
            Inner::Plain(stream) => Pin::new(stream).poll_flush(context),
            Inner::Tls(sealed) => Pin::new(&mut sealed.stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().inner {
            Inner::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Inner::Tls(sealed) => Pin::new(&mut sealed.stream).poll_shutdown(context),
        }
    }
}

/// What a request carries of the connection that it came by.
#[derive(Debug, Clone)]
pub(crate) struct SecuredInfo<I> {
    transport: I,
    session: Option<Arc<Session>>,
}

impl<I: Clone + Send + Sync + 'static> SecuredInfo<I> {
    /// Puts what is below the TLS, and the session, where a request's handler finds them.
    pub(crate) fn unpack<B>(request: &mut http::Request<B>) {
        let extensions = request.extensions_mut();
        if let Some(info) = extensions.remove::<Self>() {
            extensions.insert(info.transport);
            if let Some(session) = info.session {
                extensions.insert(Arc::clone(session.shown()));
                extensions.insert(session);
            }
        }
    }
}

impl<S: Connected> Connected for Secured<S> {
    type ConnectInfo = SecuredInfo<S::ConnectInfo>;

    fn connect_info(&self) -> Self::ConnectInfo {
        SecuredInfo {
            transport: self.transport().connect_info(),
            session: self.session.clone(),
        }
    }
}
