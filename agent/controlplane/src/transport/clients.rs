//! Which connections a listener keeps: so many of one source, so many of all, and none that stays silent.
//!
//! Every connection is a descriptor of the agent's, and an agent without descriptors serves nobody. Half of them are for connections from
//! outside, so that links, peers and the administrator's socket have the other half; of these a source has a part, and the network
//! leaves a quarter to the processes of the node.

use std::{
    collections::HashMap,
    io::{self, IoSlice},
    net::IpAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use ipnet::IpNet;
use nsm_core::identity::NetnsCookie;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};
use tonic::transport::server::Connected;

use crate::sync::lock;

/// How long a connection may take to begin. A client sends HTTP/2's preface at once; over the longest ways that takes a second.
const OPENING: Duration = Duration::from_secs(5);

/// The length of HTTP/2's preface, in bytes (RFC 9113 section 3.4).
const PREFACE: usize = 24;

/// The least time between two lines about refusals: a flood of connections must not become a flood of lines.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Origin {
    /// A user of this node, in one network namespace.
    Process(Option<u32>, Option<NetnsCookie>),
    /// An address of the network.
    Address(IpAddr),
}

/// The connections of some listeners together. Clones count together.
#[derive(Debug, Clone)]
pub struct Clients {
    all: usize,
    of_one_source: usize,
    /// Addresses that may have more.
    exempt: Arc<[IpNet]>,
    counts: Arc<Mutex<Counts>>,
    refusals: Occasional,
}

#[derive(Debug, Default)]
struct Counts {
    of_sources: HashMap<Origin, usize>,
    of_network: usize,
    all: usize,
}

impl Clients {
    /// At most `all` connections, and at most `of_one_source` of one user of a pod, or of one address.
    #[must_use]
    pub fn at_most(all: usize, of_one_source: usize) -> Self {
        Self {
            all,
            of_one_source,
            exempt: Arc::default(),
            counts: Arc::default(),
            refusals: Occasional::default(),
        }
    }

    /// The same, but addresses in these ranges have no limit of their own: an NSMgr of ours opens a connection for each of its clients
    /// (`common/dial` of NSM's sdk).
    #[must_use]
    pub fn exempting(mut self, ranges: &[IpNet]) -> Self {
        self.exempt = ranges.into();
        self
    }

    fn limit_of(&self, origin: Origin) -> usize {
        match origin {
            Origin::Address(ip) if self.exempt.iter().any(|range| range.contains(&ip)) => self.all,
            _ => self.of_one_source,
        }
    }

    /// Counts a connection in; none where there is no place for it.
    fn admit(&self, origin: Origin) -> Option<Place> {
        let mut counts = lock(&self.counts);
        let of_source = counts.of_sources.get(&origin).copied().unwrap_or_default();
        let is_far = matches!(origin, Origin::Address(_));
        let is_full = counts.all >= self.all
            || of_source >= self.limit_of(origin)
            || (is_far && counts.of_network >= self.all - self.all / 4);
        if is_full {
            drop(counts);
            if self.refusals.is_due() {
                tracing::warn!(
                    ?origin,
                    limit = self.of_one_source,
                    limit.all = self.all,
                    "too many connections: new ones are closed at once (`limits.max_clients_per_source`, and half of the open files)"
                );
            }
            return None;
        }
        counts.of_sources.insert(origin, of_source + 1);
        counts.of_network += usize::from(is_far);
        counts.all += 1;
        Some(Place {
            origin,
            counts: Arc::clone(&self.counts),
        })
    }

    /// A connection that was accepted, unless there is no place for it.
    pub(crate) fn keep<S>(&self, origin: Origin, stream: S) -> Option<Kept<S>> {
        Some(Kept {
            place: self.admit(origin)?,
            stream,
            received: 0,
            opening: Some(Box::pin(sleep(OPENING))),
        })
    }
}

/// A connection in the counts, until it is dropped.
#[derive(Debug)]
struct Place {
    origin: Origin,
    counts: Arc<Mutex<Counts>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = lock(&self.counts);
        counts.all -= 1;
        counts.of_network -= usize::from(matches!(self.origin, Origin::Address(_)));
        if let Some(count) = counts.of_sources.get_mut(&self.origin) {
            *count -= 1;
            if *count == 0 {
                counts.of_sources.remove(&self.origin);
            }
        }
    }
}

/// What happens often and is worth a line of the log now and then.
#[derive(Debug, Clone, Default)]
pub(crate) struct Occasional(Arc<Mutex<Option<Instant>>>);

impl Occasional {
    /// Whether the last line is long enough ago; if so, the next one is counted from now.
    pub(crate) fn is_due(&self) -> bool {
        let (mut last, now) = (lock(&self.0), Instant::now());
        let is_due = last.is_none_or(|last| now >= last + WARNING_INTERVAL);
        if is_due {
            *last = Some(now);
        }
        is_due
    }
}

/// A connection that has its place, and must begin soon.
#[derive(Debug)]
pub(crate) struct Kept<S> {
    stream: S,
    place: Place,
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
                tracing::debug!(origin = ?this.place.origin, "a connection that does not begin is closed");
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
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn user(user: u32) -> Origin {
        Origin::Process(Some(user), Some(NetnsCookie(1)))
    }

    fn address(last: u8) -> Origin {
        Origin::Address([192, 0, 2, last].into())
    }

    #[test]
    fn a_source_and_the_network_leave_room_for_the_others() {
        let clients = Clients::at_most(8, 3);
        let mut kept: Vec<_> = (0..3).map(|_| clients.admit(user(1)).unwrap()).collect();
        assert!(clients.admit(user(1)).is_none());
        kept.pop();
        kept.push(clients.admit(user(1)).unwrap());
        drop(kept);
        // Six of eight may be the network's.
        let far: Vec<_> = (0..6)
            .map(|last| clients.admit(address(last)).unwrap())
            .collect();
        assert!(clients.admit(address(9)).is_none());
        let near = [2, 3].map(|number| clients.admit(user(number)).unwrap());
        assert!(clients.admit(user(4)).is_none());
        drop((far, near));
        let counts = lock(&clients.counts);
        assert_eq!(
            (counts.all, counts.of_network, counts.of_sources.len()),
            (0, 0, 0)
        );
    }

    #[test]
    fn an_nsmgr_of_ours_has_more_than_a_stranger() {
        let clients = Clients::at_most(8, 1).exempting(&["192.0.2.1/32".parse().unwrap()]);
        let _ours = [(); 5].map(|()| clients.admit(address(1)).unwrap());
        let _strangers = clients.admit(address(2)).unwrap();
        assert!(clients.admit(address(2)).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_begin_ends_and_what_has_begun_does_not() {
        let clients = Clients::at_most(8, 8);
        let (mut silent, far) = tokio::io::duplex(64);
        let mut kept = clients.keep(user(1), far).unwrap();
        // A byte is no beginning.
        silent.write_all(b"P").await.unwrap();
        assert_eq!(kept.read_u8().await.unwrap(), b'P');
        let error = kept.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);

        let (mut client, far) = tokio::io::duplex(64);
        let mut kept = clients.keep(user(1), far).unwrap();
        client.write_all(&[7; PREFACE]).await.unwrap();
        kept.read_exact(&mut [0; PREFACE]).await.unwrap();
        let later = async {
            sleep(OPENING * 4).await;
            client.write_all(&[8]).await.unwrap();
        };
        let (read, ()) = tokio::join!(kept.read_u8(), later);
        assert_eq!(read.unwrap(), 8);
    }

    #[tokio::test(start_paused = true)]
    async fn a_warning_comes_once_a_minute() {
        let warning = Occasional::default();
        assert!(warning.is_due() && !warning.is_due());
        sleep(WARNING_INTERVAL).await;
        assert!(warning.is_due() && !warning.is_due());
    }
}
