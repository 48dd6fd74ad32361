//! What is taken back at a next hop: by a Close, or because a Request failed after the hop may have granted it.

use std::{sync::Arc, time::Duration};

use nsm_core::mechanism::INODE_URL;
use nsm_proto::connection::{Connection, Mechanism};
use tokio::{task::JoinHandle, time::Instant};

use crate::{
    call::{Calls, pod::passed_netns},
    connection::{model::Established, store::Turn},
    peer::peers::Peer,
    transport::unix::Passed,
};

/// How long a Close may take that undoes a Request which failed.
const UNDO_TIMEOUT: Duration = Duration::from_secs(5);

impl Calls {
    /// Closes at a next hop, with the descriptor of its own namespace. A failure is logged and not returned: the caller cannot do more,
    /// and what is left there ends with its token.
    pub(crate) async fn close_at(
        &self,
        peer: &Peer,
        mut connection: Connection,
        returned: Option<Passed>,
        deadline: Instant,
    ) {
        match returned {
            Some(netns) => peer.descriptors.send(netns),
            None if peer.is_local() => {
                connection.mechanism = connection.mechanism.map(without_inode);
            }
            None => {}
        }
        let id = connection.id.clone();
        if let Err(error) = self.lookup.peers.close(peer, connection, deadline).await {
            tracing::warn!(
                connection.id = %id, peer.url = %peer.url, %error,
                "the next hop did not close: its part ends with the token"
            );
        }
    }

    /// Takes back, in the background, what a next hop may have granted. Until that is done the
    /// connection's next event waits.
    pub(crate) fn undo_at(
        self: &Arc<Self>,
        peer: &Arc<Peer>,
        connection: Connection,
        turn: &Arc<Turn>,
    ) -> JoinHandle<()> {
        let (calls, peer, turn) = (Arc::clone(self), Arc::clone(peer), Arc::clone(turn));
        tokio::spawn(async move {
            let deadline = Instant::now() + UNDO_TIMEOUT;
            let returned = passed_netns(&peer, connection.mechanism.as_ref()).await;
            calls.close_at(&peer, connection, returned, deadline).await;
            drop(turn);
        })
    }
}

/// The connection as the next hop knows it.
pub(crate) fn downstream_view(established: &Established) -> Connection {
    Connection {
        network_service: established.route.service.clone(),
        network_service_endpoint_name: established.route.endpoint.clone(),
        mechanism: established.next_mechanism.clone(),
        ..established.view.clone()
    }
}

/// A standing mechanism for an endpoint of this node, which knows its namespace better than we do; one that reads an inode waits for
/// the descriptor.
pub(crate) fn without_inode(mut mechanism: Mechanism) -> Mechanism {
    let parameters = &mut mechanism.parameters;
    if parameters
        .get(INODE_URL)
        .is_some_and(|url| url.starts_with("inode:"))
    {
        parameters.remove(INODE_URL);
    }
    mechanism
}
