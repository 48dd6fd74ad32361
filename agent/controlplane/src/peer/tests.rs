use std::{
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use nsm_core::net::PeerUrl;
use nsm_proto::{
    connection::Connection,
    networkservice::{
        NetworkServiceRequest,
        network_service_server::{NetworkService, NetworkServiceServer},
    },
};
use socket2::{Domain, Socket, Type};
use tokio::{net::TcpListener, runtime::Runtime, time::Instant};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

use super::peers::Peers;
use crate::{identity::token::TokenSource, transport::guard::DialGuard};

/// A next hop that closes everything.
struct Hop;

#[tonic::async_trait]
impl NetworkService for Hop {
    async fn request(
        &self,
        _: Request<NetworkServiceRequest>,
    ) -> Result<Response<Connection>, Status> {
        Err(Status::unimplemented("closes only"))
    }

    async fn close(&self, _: Request<Connection>) -> Result<Response<()>, Status> {
        Ok(Response::new(()))
    }
}

/// Serves in a runtime of its own, which takes its connections with it when it ends.
fn serve(at: SocketAddr) -> (Runtime, SocketAddr) {
    let runtime = Runtime::new().unwrap();
    let listener = runtime.block_on(TcpListener::bind(at)).unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder().add_service(NetworkServiceServer::new(Hop));
    runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (runtime, address)
}

/// Takes no connection and refuses none, as long as it is held.
fn silence(at: SocketAddr) -> (Socket, Vec<TcpStream>) {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.set_reuse_address(true).unwrap();
    listener.bind(&at.into()).unwrap();
    listener.listen(0).unwrap();
    let mut waiting = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&at, Duration::from_millis(100)) {
        waiting.push(stream);
    }
    (listener, waiting)
}

/// A call that gave up while the channel connected leaves its error there for the next one.
#[test]
fn an_old_error_of_the_channel_is_no_answer_to_a_new_call() {
    let dial_timeout = Duration::from_millis(300);
    let (first, at) = serve(([127, 0, 0, 1], 0).into());
    let tokens = TokenSource::hs256("spiffe://test/agent", b"test", Duration::from_secs(60));
    let guard = DialGuard::new(vec!["127.0.0.0/8".parse().unwrap()], []);
    let runtime = Runtime::new().unwrap();
    let peers = Peers::connecting_with(Arc::new(tokens), dial_timeout, 1 << 20).guarded_by(guard);
    let peer = peers.get(&PeerUrl::from(at));
    let close = |patience: Duration| {
        let closing = async {
            let deadline = Instant::now() + patience;
            peers.close(&peer, Connection::default(), deadline).await
        };
        runtime.block_on(closing)
    };
    let patient = Duration::from_secs(10);
    close(patient).unwrap();

    first.shutdown_timeout(patient);
    let silent = silence(at);
    close(dial_timeout / 3).unwrap_err();
    drop(silent);
    let (second, _) = serve(at);
    // The channel's own try to connect must be over.
    std::thread::sleep(dial_timeout);
    close(patient).unwrap();
    second.shutdown_timeout(patient);
}
