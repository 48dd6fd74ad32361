//! Which connections a listener keeps: those that have a place, and none that stays silent.
//!
//! Every connection is an open file of the agent's, and an agent without files serves nobody. Half of them are for connections from
//! outside, so that links, peers and the administrator's socket have the other half; [`crate::places`] says who has which part of these.

use std::{
    fmt,
    io::{self, IoSlice},
    net::IpAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use nsm_core::identity::{NetnsCookie, relay::Relays, share::Holder};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};
use tonic::transport::server::Connected;

use crate::places::{Place, Places};

/// How long a connection may take to begin. A client sends HTTP/2's preface at once; over the longest ways that takes a second.
const OPENING: Duration = Duration::from_secs(5);

/// The length of HTTP/2's preface, in bytes (RFC 9113 section 3.4).
const PREFACE: usize = 24;

/// Where a connection comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Origin {
    /// A user of this node, in one network namespace.
    Process(Option<u32>, Option<NetnsCookie>),
    /// An address of the network.
    Address(IpAddr),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(Some(user), _) => write!(f, "user {user} of this node"),
            Self::Process(None, _) => f.write_str("a process of this node"),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// The connections of some listeners together. Clones count together.
#[derive(Debug, Clone)]
pub struct Clients {
    places: Places,
    /// None: all are our own.
    relays: Option<Relays>,
}

impl Clients {
    /// Anybody's. Addresses that may relay count as our own: an NSMgr opens a connection for each of its clients (`common/dial` of NSM's
    /// sdk).
    #[must_use]
    pub const fn of_all(places: Places, relays: Relays) -> Self {
        Self {
            places,
            relays: Some(relays),
        }
    }

    /// Of a socket that only our own systems reach.
    #[must_use]
    pub const fn of_our_own(places: Places) -> Self {
        Self {
            places,
            relays: None,
        }
    }

    /// Who is charged for what comes from there; an address may be gone already.
    pub(crate) fn holder(&self, origin: Option<Origin>) -> Holder {
        match (origin, &self.relays) {
            (_, None) => Holder::our_own(),
            (Some(Origin::Process(user, home)), Some(_)) => Holder::process(user, home),
            (Some(Origin::Address(address)), Some(relays)) => Holder::at(Some(address), relays),
            (None, Some(relays)) => Holder::at(None, relays),
        }
    }

    /// A place for a connection that was accepted, unless there is none.
    pub(crate) fn admit(&self, origin: Origin) -> Option<Admitted> {
        let place = self.places.take(self.holder(Some(origin)), 1).ok()?;
        Some(Admitted { place, origin })
    }
}

/// A place for a connection.
#[derive(Debug)]
pub(crate) struct Admitted {
    place: Place,
    origin: Origin,
}

impl Admitted {
    /// Where the connection comes from.
    pub(crate) const fn origin(&self) -> Origin {
        self.origin
    }

    /// The connection in its place; HTTP/2 must begin on it soon.
    pub(crate) fn keep<S>(self, stream: S) -> Kept<S> {
        Kept {
            stream,
            origin: self.origin,
            _place: self.place,
            received: 0,
            opening: Some(Box::pin(sleep(OPENING))),
        }
    }
}

/// A connection that has its place, and must begin soon.
#[derive(Debug)]
pub(crate) struct Kept<S> {
    stream: S,
    origin: Origin,
    _place: Place,
    /// Bytes, as long as it has not begun.
    received: usize,
    /// None once it has begun.
    opening: Option<Pin<Box<Sleep>>>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Kept<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(context, buffer);
        let Some(opening) = &mut this.opening else {
            return read;
        };
        this.received += buffer.filled().len() - before;
        if this.received >= PREFACE {
            this.opening = None;
            return read;
        }
        match opening.as_mut().poll(context) {
            Poll::Ready(()) => {
                tracing::debug!(origin = ?this.origin, "a connection that does not begin is closed");
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
            Poll::Pending => read,
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Kept<S> {
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

impl<S: Connected> Connected for Kept<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use nsm_core::identity::share::Limit;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::places::{Budget, Limits};

    fn user(user: u32) -> Origin {
        Origin::Process(Some(user), Some(NetnsCookie(1)))
    }

    fn address(last: u8) -> Origin {
        Origin::Address([192, 0, 2, last].into())
    }

    fn clients(all: usize, of_one: usize) -> Clients {
        let limits = Limits {
            clients: Limit { all, of_one },
            ..Limits::wide()
        };
        let relays = Relays {
            relay_for: vec!["192.0.2.1/32".parse().unwrap()],
            registrants: Vec::new(),
        };
        Clients::of_all(Budget::new(&limits).clients, relays)
    }

    #[tokio::test]
    async fn an_nsmgr_of_ours_has_more_than_a_stranger() {
        let clients = clients(64, 1);
        let kept = |origin| Some(clients.admit(origin)?.keep(tokio::io::empty()));
        let _ours = [(); 5].map(|()| kept(address(1)).unwrap());
        for origin in [address(2), user(1)] {
            let first = kept(origin).unwrap();
            assert!(kept(origin).is_none());
            drop(first);
            kept(origin).unwrap();
        }
        let apart = Clients::of_our_own(Budget::new(&Limits::wide()).clients_apart(2));
        let _both = [(); 2].map(|()| apart.admit(user(1)).unwrap());
        assert!(apart.admit(user(2)).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_begin_ends_and_what_has_begun_does_not() {
        let clients = clients(8, 8);
        let (mut silent, far) = tokio::io::duplex(64);
        let mut kept = clients.admit(user(1)).unwrap().keep(far);
        // A byte is no beginning.
        silent.write_all(b"P").await.unwrap();
        assert_eq!(kept.read_u8().await.unwrap(), b'P');
        let error = kept.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);

        let (mut client, far) = tokio::io::duplex(64);
        let mut kept = clients.admit(user(1)).unwrap().keep(far);
        client.write_all(&[7; PREFACE]).await.unwrap();
        kept.read_exact(&mut [0; PREFACE]).await.unwrap();
        let later = async {
            sleep(OPENING * 4).await;
            client.write_all(&[8]).await.unwrap();
        };
        let (read, ()) = tokio::join!(kept.read_u8(), later);
        assert_eq!(read.unwrap(), 8);
    }
}
