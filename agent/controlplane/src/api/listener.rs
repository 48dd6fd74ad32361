//! What the agent listens on: sockets, who is kept on them, and what carries their calls.

use std::{
    io, net::SocketAddr, os::unix::fs::FileTypeExt as _, path::Path, sync::Arc, time::Duration,
};

use futures_util::stream::unfold;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener},
    task::JoinSet,
};
use tokio_stream::{
    Stream, StreamExt as _,
    wrappers::{TcpListenerStream, UnixListenerStream},
};
use tonic::{
    service::Routes,
    transport::{Server, server::TcpConnectInfo},
};
use tower::util::MapRequestLayer;

use crate::{
    occasional::Occasional,
    places::{Budget, Limits, Places},
    transport::{
        clients::{Admitted, Clients, Kept, Origin},
        coalesce::Coalesced,
        dial::MAX_SEGMENT,
        incoming::Incoming,
        tls::{Secured, SecuredInfo, Tls},
        unix::{NodePeer, UnixStream},
    },
};

/// How often an idle HTTP/2 connection is probed. A peer that vanished without a word is noticed
/// after this and [`KEEPALIVE_TIMEOUT`] together; gRPC's own rule allows servers any interval.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// How long the answer to such a probe may take.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long nothing is accepted after that has failed: a process that is out of descriptors would otherwise try as fast as it can,
/// since the connection still waits, and its other work get nothing done that gives one back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Transport connections of an endpoint: its agent has one, and may come anew.
const AGENTS_CLIENTS: usize = 64;

/// The largest message that an endpoint reads, in bytes, as by default of gRPC.
const ENDPOINTS_MESSAGE: usize = 4 << 20;

/// Calls and streams of an endpoint's agent at one time.
const ENDPOINTS_STREAMS: u32 = 1024;

/// What bounds one listener.
#[derive(Debug, Clone)]
pub struct ListenerLimits {
    /// The connections that it keeps, perhaps together with other listeners.
    pub clients: Clients,
    /// What is kept of messages that are not whole yet.
    pub messages: Places,
    /// The largest message that is read, in bytes.
    pub max_message_bytes: usize,
    /// Calls and streams that one client connection may have open.
    pub max_streams: u32,
    /// What every connection is made with; none serves plain text.
    pub tls: Option<Arc<Tls>>,
}

impl ListenerLimits {
    /// Those of an endpoint, which one agent calls.
    #[must_use]
    pub fn of_one_agent(tls: Option<Arc<Tls>>) -> Self {
        let budget = Budget::new(&Limits::wide());
        Self {
            clients: Clients::of_our_own(budget.clients_apart(AGENTS_CLIENTS)),
            messages: budget.messages.clone(),
            max_message_bytes: ENDPOINTS_MESSAGE,
            max_streams: ENDPOINTS_STREAMS,
            tls,
        }
    }
}

/// The socket of a listener: bound before anything is served, so that a taken port fails early.
#[derive(Debug)]
pub enum Socket {
    /// The NSMgr's socket.
    Unix(UnixListener),
    /// The proxy's or registry's port.
    Tcp(TcpListener),
}

impl Socket {
    /// Binds a TCP address.
    ///
    /// # Errors
    /// The address is taken or not ours.
    pub async fn tcp(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        // What is accepted inherits it.
        socket2::SockRef::from(&listener).set_tcp_mss(MAX_SEGMENT)?;
        Ok(Self::Tcp(listener))
    }

    /// Binds a Unix socket; one that an agent left behind is replaced, one that somebody still
    /// listens on and what is no socket is not.
    ///
    /// # Errors
    /// Somebody listens there, something else is there, or the folder cannot be written.
    pub fn unix(path: &Path) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        // Connecting to a plain file is refused too, and an agent may run as root.
        if std::fs::symlink_metadata(path).is_ok_and(|there| !there.file_type().is_socket()) {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "what is there is not a socket: name another path, or remove it",
            ));
        }
        match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    "another process listens on this socket",
                ));
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path)?;
            }
            Err(_) => {}
        }
        UnixListener::bind(path).map(Self::Unix)
    }
}

/// Serves `routes` on `socket` until `shutdown` resolves.
///
/// # Errors
/// The listener broke.
pub async fn serve(
    socket: Socket,
    routes: Routes,
    limits: &ListenerLimits,
    shutdown: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let incoming = Incoming::of(limits.clients.clone(), limits.messages.clone());
    let router = Server::builder()
        .layer(MapRequestLayer::new(move |mut request| {
            SecuredInfo::<TcpConnectInfo>::unpack(&mut request);
            SecuredInfo::<NodePeer>::unpack(&mut request);
            incoming.charge(request)
        }))
        .max_concurrent_streams(limits.max_streams)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_routes(routes);
    let (clients, tls) = (limits.clients.clone(), limits.tls.clone());
    match socket {
        Socket::Unix(listener) => {
            let accepted = UnixListenerStream::new(listener).filter_map(move |stream| {
                let admitted = |stream: UnixStream| {
                    let admitted = clients.admit(stream.process().origin())?;
                    Some((admitted, stream))
                };
                stream.map(UnixStream::accepted).map(admitted).transpose()
            });
            router
                .serve_with_incoming_shutdown(opened(paused_by_errors(accepted), tls), shutdown)
                .await
        }
        Socket::Tcp(listener) => {
            let accepted = TcpListenerStream::new(listener).filter_map(move |stream| {
                let admitted = |stream: TcpStream| {
                    // Gone already where it has no address.
                    let address = stream.peer_addr().ok()?.ip().to_canonical();
                    // The builder's own `tcp_nodelay` does not reach sockets that come from outside.
                    let _ = stream.set_nodelay(true);
                    let admitted = clients.admit(Origin::Address(address))?;
                    Some((admitted, stream))
                };
                stream.map(admitted).transpose()
            });
            router
                .serve_with_incoming_shutdown(opened(paused_by_errors(accepted), tls), shutdown)
                .await
        }
    }
}

/// A stream of a caller, as HTTP/2 reads and writes it.
type Open<S> = Kept<Coalesced<Secured<S>>>;

/// What was accepted, once its TLS handshake is done where there is one. Handshakes run beside each other: one that is slow holds up none.
fn opened<S>(
    accepted: impl Stream<Item = io::Result<(Admitted, S)>>,
    tls: Option<Arc<Tls>>,
) -> impl Stream<Item = io::Result<Open<S>>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let state = (Box::pin(accepted), JoinSet::new());
    unfold(state, move |(mut accepted, mut handshakes)| {
        let tls = tls.clone();
        async move {
            loop {
                let (admitted, stream) = tokio::select! {
                    accepting = accepted.next() => match accepting? {
                        Ok(came) => came,
                        Err(error) => return Some((Err(error), (accepted, handshakes))),
                    },
                    Some(done) = handshakes.join_next() => match done {
                        Ok(Some(open)) => return Some((Ok(open), (accepted, handshakes))),
                        // It failed, which is counted, or panicked.
                        Ok(None) | Err(_) => continue,
                    },
                };
                match &tls {
                    Some(tls) => {
                        drop(handshakes.spawn(handshake(Arc::clone(tls), admitted, stream)))
                    }
                    None => {
                        let stream = Secured::accepted_plain(stream);
                        let stream = match admitted.origin() {
                            Origin::Process(..) => Coalesced::direct(stream),
                            Origin::Address(_) => Coalesced::new(stream),
                        };
                        return Some((Ok(admitted.keep(stream)), (accepted, handshakes)));
                    }
                }
            }
        }
    })
}

async fn handshake<S>(tls: Arc<Tls>, admitted: Admitted, stream: S) -> Option<Open<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let peer = admitted.origin().to_string();
    let secured = tls.accept(stream, &peer).await.ok()?;
    Some(admitted.keep(Coalesced::new(secured)))
}

/// What a listener accepts, with a pause after each failure.
fn paused_by_errors<T>(
    accepted: impl Stream<Item = io::Result<T>>,
) -> impl Stream<Item = io::Result<T>> {
    let failures = Occasional::default();
    accepted.then(move |stream| {
        let failures = failures.clone();
        async move {
            if let Err(error) = &stream {
                if failures.is_due() {
                    tracing::warn!(%error, "cannot accept connections: if files are too many, raise the agent's limit (ulimit -n)");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            stream
        }
    })
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test]
    async fn a_left_socket_is_replaced_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/nsm.sock");
        let socket = Socket::unix(&path).unwrap();
        let error = Socket::unix(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{error}");
        drop(socket);
        drop(Socket::unix(&path).unwrap());

        let file = folder.path().join("precious");
        std::fs::write(&file, "data").unwrap();
        let error = Socket::unix(&file).unwrap_err();
        assert!(error.to_string().contains("not a socket"), "{error}");
        assert_eq!(std::fs::read(&file).unwrap(), b"data");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_to_accept_is_followed_by_a_pause() {
        let outcomes = [Ok(1), Err(io::Error::from_raw_os_error(24)), Ok(2)];
        let mut stream = Box::pin(paused_by_errors(tokio_stream::iter(outcomes)));
        let start = Instant::now();
        assert!(stream.next().await.is_some_and(|it| it.is_ok()));
        assert_eq!(start.elapsed(), Duration::ZERO);
        assert!(stream.next().await.is_some_and(|it| it.is_err()));
        assert!(start.elapsed() >= ACCEPT_PAUSE);
        assert!(stream.next().await.is_some_and(|it| it.is_ok()));
    }
}
