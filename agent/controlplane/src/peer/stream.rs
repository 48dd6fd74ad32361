//! The monitor stream from a next hop: one a peer, for all connections that go through it. Its selector names our segment with any id.

use std::{sync::Arc, time::Duration};

use nsm_core::text::printable;
use nsm_proto::connection::{ConnectionEvent, MonitorScopeSelector, PathSegment};
use tokio::task::AbortHandle;
use tokio_stream::StreamExt as _;
use tonic::{Code, Status, metadata::MetadataValue};

use super::{
    calls::root_cause,
    peers::{Peer, Peers},
};

/// Metadata of MonitorConnections: the hop that the selector names does not want events of what it asked for itself. Agents send it to
/// each other; an NSM component that does not know the key sends every event.
pub(crate) const SKIP_ANSWERED: &str = "nsm-skip-answered";

/// How long a stream outlives the peer's last connection. Clients come and go in quick succession, and a stream for each would cost
/// more than its Request.
const LINGER: Duration = Duration::from_secs(1);

/// The most characters that are kept of why a stream broke: the peer chooses the text, and each of its connections repeats it.
const LONGEST_CAUSE: usize = 200;

/// What a monitor stream brings.
#[derive(Debug)]
pub(crate) enum Report {
    /// The peer has published an event.
    Event(ConnectionEvent),
    /// The stream has broken: nobody watches over these connections.
    Lost {
        /// The ids of our segments.
        users: Vec<String>,
        /// Why, as text.
        cause: String,
    },
}

/// Starts to monitor `peer` for the segments named `own_name`, until the stream breaks or some time after the peer's last connection
/// left.
pub(crate) fn watch(
    peers: Arc<Peers>,
    peer: Arc<Peer>,
    own_name: String,
    on_report: impl Fn(&Arc<Peer>, Report) + Send + Sync + 'static,
) -> AbortHandle {
    tokio::spawn(async move {
        let outcome = tokio::select! {
            outcome = follow(&peers, &peer, own_name, &on_report) => outcome,
            () = idle(&peer) => return,
        };
        let cause = match outcome {
            // An endpoint need not serve monitors; its death is then seen by the next refresh.
            Err(status) if status.code() == Code::Unimplemented => {
                tracing::debug!(peer.url = %peer.url, "the peer serves no monitor");
                return idle(&peer).await;
            }
            Err(status) => root_cause(&status).unwrap_or_else(|| status.message().to_owned()),
            Ok(()) => "the peer ended the stream".to_owned(),
        };
        let cause = printable(&cause, LONGEST_CAUSE);
        let users = peer.monitor_ended();
        if !users.is_empty() {
            tracing::warn!(peer.url = %peer.url, %cause, "lost the peer's monitor stream");
        }
        on_report(&peer, Report::Lost { users, cause });
    })
    .abort_handle()
}

/// Returns when the peer has had no connections for a while, and its monitor must end.
async fn idle(peer: &Peer) {
    loop {
        peer.emptied().await;
        tokio::time::sleep(LINGER).await;
        if peer.end_idle_monitor() {
            return;
        }
    }
}

async fn follow(
    peers: &Peers,
    peer: &Arc<Peer>,
    own_name: String,
    on_report: &impl Fn(&Arc<Peer>, Report),
) -> Result<(), Status> {
    let selector = MonitorScopeSelector {
        path_segments: vec![PathSegment {
            name: own_name,
            ..PathSegment::default()
        }],
        network_services: Vec::new(),
    };
    let (mut client, link) = peers.monitor(peer).await?;
    let mut request = peers.outgoing(&link, selector, None);
    let yes = MetadataValue::from_static("true");
    request.metadata_mut().insert(SKIP_ANSWERED, yes);
    let mut events = client.monitor_connections(request).await?.into_inner();
    while let Some(event) = events.next().await {
        on_report(peer, Report::Event(event?));
    }
    Ok(())
}
