//! Our forwarder under the NSMgr of its node, as NSM's own forwarders are: an endpoint of the service
//! `forwarder` that the NSMgr sends its clients' Requests to, and those of other nodes.
//!
//! The entry is registered with the NSMgr over the NSMgr's own socket, our socket's descriptor beside
//! it: the NSMgr may not see our files. It is registered again at two thirds of its life. An NSMgr
//! that restarts has forgotten it: a watch on our own name ends with it, so that the forwarder is
//! back as soon as the NSMgr is, and not when the entry would have expired.

use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use nsm_core::{
    backoff::Backoff,
    identity::{Caller, Process, share::Holder},
    net::PeerUrl,
    nsm::expiry::refresh_after,
};
use nsm_proto::registry::{NetworkServiceEndpoint, NetworkServiceLabels};
use rustix::fs::OFlags;
use tokio::time::Instant;
use tokio_stream::StreamExt as _;
use tonic::Code;

use crate::{
    convert,
    error::RequestError,
    identity::token::TokenSource,
    peer::peers::Peers,
    registry::{Asker, DomainRegistry as _, Terms, path_header::PathHeader, remote::Remote},
    transport::unix::{FileId, Passed},
};

/// The shortest wait before another try: an NSMgr that restarts is back within it.
const SHORTEST_WAIT: Duration = Duration::from_millis(200);

/// The longest: no client of this node is connected as long as its NSMgr does not have our forwarder.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// How long the farewell to the NSMgr may take. The entry expires by itself, and the end of the
/// agent may not be delayed long: an NSMgr that hangs must not take the time of closing the connections.
const FAREWELL: Duration = Duration::from_secs(2);

/// What our forwarder is to its NSMgr.
#[derive(Debug, Clone)]
pub struct ForwarderEntry {
    /// The name; our path segments have the same.
    pub name: String,
    /// The service by which the NSMgr finds its forwarders.
    pub service: String,
    /// By which network services choose among forwarders (`p2p: true` is asked for by default).
    pub labels: BTreeMap<String, String>,
    /// Where the forwarder listens.
    pub url: PeerUrl,
}

/// The NSMgr that this agent's forwarder works for.
pub(crate) struct Upstream {
    url: Option<PeerUrl>,
    request_timeout: Duration,
    peers: Arc<Peers>,
    tokens: Arc<TokenSource>,
}

impl Upstream {
    /// The NSMgr at `url`, if there is one, which has `request_timeout` for each call.
    pub(crate) fn new(
        url: Option<PeerUrl>,
        request_timeout: Duration,
        peers: Arc<Peers>,
        tokens: Arc<TokenSource>,
    ) -> Self {
        Self {
            url,
            request_timeout,
            peers,
            tokens,
        }
    }

    /// Keeps `entry` registered with the node's NSMgr until `stopped`, and then takes it out, so that the NSMgr sends no more
    /// Requests. An NSMgr that is gone comes back; one that does not answer at the end delays nothing.
    /// `on_change` is called after each try with whether the entry is registered.
    pub(crate) async fn keep_forwarder(
        &self,
        mut entry: ForwarderEntry,
        on_change: impl Fn(bool),
        stopped: impl Future<Output = ()>,
    ) {
        tokio::select! {
            () = self.stay_registered(&mut entry, on_change) => {}
            () = stopped => {}
        }
        match tokio::time::timeout(FAREWELL, self.unregister_forwarder(&entry)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, "the forwarder's entry is left to expire");
            }
            Err(_) => tracing::warn!(
                within = ?FAREWELL,
                "the NSMgr does not answer: the forwarder's entry is left to expire"
            ),
        }
    }

    /// Never ends.
    async fn stay_registered(&self, entry: &mut ForwarderEntry, on_change: impl Fn(bool)) {
        let mut backoff = Backoff::new(SHORTEST_WAIT, LONGEST_WAIT);
        loop {
            match self.register_forwarder(entry).await {
                Ok(expires) => {
                    on_change(true);
                    backoff.reset();
                    let due = tokio::time::sleep(refresh_after(SystemTime::now(), expires));
                    tokio::select! {
                        () = due => continue,
                        reason = self.forwarder_lost(entry) => {
                            tracing::info!(reason, "registering the forwarder again");
                        }
                    }
                }
                Err(error) => {
                    on_change(false);
                    tracing::warn!(%error, "the forwarder is not registered; trying again");
                }
            }
            tokio::time::sleep(backoff.next(rand::random())).await;
        }
    }

    async fn register_forwarder(
        &self,
        entry: &mut ForwarderEntry,
    ) -> Result<SystemTime, RequestError> {
        let nsmgr = self.nsmgr()?;
        let endpoint = NetworkServiceEndpoint {
            url: match entry.url.socket_path() {
                Some(path) if nsmgr.url.socket_path().is_some() => {
                    let (id, socket) = open_socket(path)?;
                    self.peers.get(nsmgr.url).descriptors.send(socket);
                    id.to_string()
                }
                _ => entry.url.to_string(),
            },
            ..entry.endpoint()
        };
        let entries = nsmgr.registry.endpoints();
        let granted = entries.register(endpoint, nsmgr.terms).await?;
        // The registry may have given it another name, to distinguish it from an older one.
        entry.name = granted.name;
        Ok(granted
            .expiration_time
            .as_ref()
            .and_then(convert::time)
            .unwrap_or_else(|| self.tokens.token(SystemTime::now()).expires))
    }

    /// Waits until the NSMgr does not have the entry any more, or is gone itself.
    async fn forwarder_lost(&self, entry: &ForwarderEntry) -> String {
        let Ok(nsmgr) = self.nsmgr() else {
            return std::future::pending().await;
        };
        let query = NetworkServiceEndpoint {
            name: entry.name.clone(),
            ..NetworkServiceEndpoint::default()
        };
        let entries = nsmgr.registry.endpoints();
        let asker = Asker {
            holder: nsmgr.terms.holder,
            deadline: nsmgr.terms.deadline,
        };
        let mut events = match entries.watch(query, asker).await {
            Ok(events) => events,
            Err(error) => return error.to_string(),
        };
        loop {
            match events.next().await {
                Some(Ok(found)) if found.deleted => return format!("{} forgot it", nsmgr.url),
                Some(Ok(_)) => {}
                None => return format!("{} ended its watch", nsmgr.url),
                Some(Err(error)) if error.code() == Code::Unimplemented => {
                    return std::future::pending().await;
                }
                Some(Err(error)) => return error.to_string(),
            }
        }
    }

    /// Takes the forwarder's entry out, by the name that the registry granted.
    async fn unregister_forwarder(&self, entry: &ForwarderEntry) -> Result<(), RequestError> {
        let nsmgr = self.nsmgr()?;
        let entries = nsmgr.registry.endpoints();
        entries.unregister(entry.endpoint(), nsmgr.terms).await
    }

    fn nsmgr(&self) -> Result<Nsmgr<'_>, RequestError> {
        let url = self.url.as_ref().ok_or(RequestError::Missing(
            "NSMgr: the agent has no upstream_nsmgr_url",
        ))?;
        let session = self.peers.get(url).session();
        let token = self.tokens.token_for(session.as_deref(), SystemTime::now());
        Ok(Nsmgr {
            url,
            registry: Remote::at(&self.peers, [url.clone()]),
            terms: Terms {
                holder: Holder::our_own(),
                caller: Caller::on_node(Process::unknown()),
                deadline: Instant::now() + self.request_timeout,
                owner: Some(PathHeader::begin(token.text)),
                expires: None,
            },
        })
    }
}

/// The NSMgr's registry, and what our own calls to it carry.
struct Nsmgr<'a> {
    url: &'a PeerUrl,
    registry: Remote,
    terms: Terms,
}

impl ForwarderEntry {
    fn endpoint(&self) -> NetworkServiceEndpoint {
        let labels = NetworkServiceLabels {
            labels: self.labels.clone(),
        };
        NetworkServiceEndpoint {
            name: self.name.clone(),
            network_service_names: vec![self.service.clone()],
            network_service_labels: [(self.service.clone(), labels)].into(),
            url: self.url.to_string(),
            ..NetworkServiceEndpoint::default()
        }
    }
}

/// A descriptor of our own socket: its file, not a connection to it.
fn open_socket(path: &Path) -> Result<(FileId, Passed), RequestError> {
    let failed = |error: std::io::Error| RequestError::Field {
        field: "the forwarder's socket",
        value: path.display().to_string(),
        reason: format!("it cannot be opened ({error}); was it removed?"),
    };
    let file = File::options()
        .read(true)
        .custom_flags(i32::from_ne_bytes(OFlags::PATH.bits().to_ne_bytes()))
        .open(path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let id = FileId {
        device: metadata.dev(),
        inode: metadata.ino(),
    };
    Ok((id, Passed::new(file.into())))
}

#[cfg(test)]
mod tests {
    use std::future::ready;

    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_nsmgr_that_hangs_does_not_hold_up_the_end() {
        const PATIENCE: Duration = Duration::from_secs(15);
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("nsm.sock");
        // Connections stay in its queue: it never answers.
        let _hangs = UnixListener::bind(&socket).unwrap();
        let tokens = TokenSource::hs256("spiffe://one.example/node-1", b"test", PATIENCE);
        let tokens = Arc::new(tokens);
        let peers = Peers::connecting_with(Arc::clone(&tokens), PATIENCE, 1 << 20);
        let url = Some(PeerUrl::unix(&socket));
        let upstream = Upstream::new(url, PATIENCE, Arc::new(peers), tokens);
        let entry = ForwarderEntry {
            name: "node-1".to_owned(),
            service: "forwarder".to_owned(),
            labels: BTreeMap::new(),
            url: PeerUrl::unix(&folder.path().join("forwarder.sock")),
        };
        let start = Instant::now();
        upstream.keep_forwarder(entry, |_| {}, ready(())).await;
        assert_eq!(start.elapsed().as_secs(), FAREWELL.as_secs());
    }
}
