//! A Workload API for tests: a socket for each workload, whose SVIDs it renews as fast as a test sets.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    pin::Pin,
    time::Duration,
};

use nsm_proto::workload::{
    X509svid, X509svidRequest, X509svidResponse,
    spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer},
};
use tokio::{net::UnixListener, sync::watch, task::JoinSet};
use tokio_stream::{
    Stream, StreamExt as _,
    wrappers::{UnixListenerStream, WatchStream},
};
use tonic::{Request, Response, Status, transport::Server};

use crate::{Authority, Wanted};

/// The trust domains that believe each other, and how their SVIDs are renewed.
#[derive(Debug)]
pub struct Federation {
    authorities: BTreeMap<String, Authority>,
    life: Duration,
}

impl Federation {
    /// These trust domains, whose SVIDs live for `life`.
    #[must_use]
    pub fn of<'a>(trust_domains: impl IntoIterator<Item = &'a str>, life: Duration) -> Self {
        let authorities = trust_domains.into_iter();
        Self {
            authorities: authorities
                .map(|name| (name.to_owned(), Authority::of(name)))
                .collect(),
            life,
        }
    }

    /// A fresh SVID of this id, with the bundles of all.
    ///
    /// # Panics
    /// The id is of no trust domain of these.
    #[must_use]
    pub fn answer(&self, id: &str) -> X509svidResponse {
        let name = trust_domain(id);
        let authority = &self.authorities[name];
        let life = i64::try_from(self.life.as_secs()).unwrap_or(i64::MAX);
        let issued = authority.issue(&Wanted {
            begins: -1,
            ends: life,
            ..Wanted::of(id)
        });
        let others = self.authorities.iter().filter(|(other, _)| *other != name);
        X509svidResponse {
            svids: vec![X509svid {
                spiffe_id: id.to_owned(),
                x509_svid: issued.chain.concat(),
                x509_svid_key: issued.key,
                bundle: authority.bundle(),
                hint: String::new(),
            }],
            crl: Vec::new(),
            federated_bundles: others
                .map(|(name, authority)| (format!("spiffe://{name}"), authority.bundle()))
                .collect(),
        }
    }
}

/// The trust domain in an id.
#[must_use]
pub fn trust_domain(id: &str) -> &str {
    let rest = id.strip_prefix("spiffe://").unwrap_or(id);
    rest.split('/').next().unwrap_or(rest)
}

/// Serves each id on its socket, and renews all each `interval`, until it is dropped.
///
/// # Errors
/// A socket cannot be made, or a server broke.
pub async fn serve(
    federation: Federation,
    workloads: Vec<(PathBuf, String)>,
    interval: Duration,
) -> io::Result<()> {
    let mut servers = JoinSet::new();
    let mut senders = Vec::new();
    for (socket, id) in workloads {
        let (sender, receiver) = watch::channel(federation.answer(&id));
        let listener = listen(&socket)?;
        servers.spawn(
            Server::builder()
                .add_service(SpiffeWorkloadApiServer::new(Workload(receiver)))
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        senders.push((sender, id));
    }
    let mut tick = tokio::time::interval(interval);
    tick.tick().await;
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            broken = servers.join_next() => {
                return Err(io::Error::other(format!("a server ended: {broken:?}")));
            }
        }
        for (sender, id) in &senders {
            sender.send_replace(federation.answer(id));
        }
    }
}

fn listen(socket: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => UnixListener::bind(socket),
    }
}

struct Workload(watch::Receiver<X509svidResponse>);

#[tonic::async_trait]
impl SpiffeWorkloadApi for Workload {
    type FetchX509SVIDStream = Pin<Box<dyn Stream<Item = Result<X509svidResponse, Status>> + Send>>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        if request.metadata().get("workload.spiffe.io").is_none() {
            return Err(Status::invalid_argument("workload.spiffe.io is missing"));
        }
        let answers = WatchStream::new(self.0.clone()).map(Ok);
        Ok(Response::new(Box::pin(answers)))
    }
}
