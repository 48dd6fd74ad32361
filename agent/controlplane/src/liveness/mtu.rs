//! The MTU of a connection follows what its path carries.

use std::{net::IpAddr, sync::Arc};

use nsm_core::mechanism::lower_mtu;
use nsm_proto::connection::ConnectionEventType;
use tokio::time::Instant;

use super::Liveness;
use crate::{connection::model::Established, error::RequestError, ports::Plan, sync::lock};

impl Liveness {
    /// Lets the links of a connection carry what its path does, and no more than was agreed.
    pub(super) fn follow_mtu(self: &Arc<Self>, established: &Arc<Established>) {
        let Some((peer, _)) = established.remote() else {
            return;
        };
        let path_mtu = self.path_mtu(established.path.watched.as_ref());
        if wanted(established, path_mtu).is_none() {
            return;
        }
        let (liveness, established) = (Arc::clone(self), Arc::clone(established));
        tokio::spawn(async move {
            let id = established.view.id.as_str();
            if let Err(error) = liveness.set_mtu(id, peer).await {
                tracing::warn!(
                    connection.id = %id, peer.ip = %peer, %error,
                    "the link's MTU does not follow the path: large packets get lost"
                );
            }
        });
    }

    async fn set_mtu(&self, id: &str, peer: IpAddr) -> Result<(), RequestError> {
        let patience = Instant::now() + self.config.patience;
        let turn = self.held.connections.admit_known(id, patience).await?;
        let current = turn.as_ref().and_then(|turn| turn.current());
        let (Some(turn), Some(current)) = (turn, current) else {
            return Ok(());
        };
        // A Request may have been ahead, or, of several changes in quick succession, a later one: what is known now counts.
        let path_mtu = self.path_mtu(current.path.watched.as_ref());
        let changed =
            wanted(&current, path_mtu).filter(|_| current.remote().map(|(ip, _)| ip) == Some(peer));
        let Some((mtu, plan)) = changed else {
            return Ok(());
        };
        let forwarder = self.forwarder.as_deref();
        forwarder
            .ok_or(RequestError::NoForwarder("network"))?
            .up(&plan)
            .await?;
        let mut changed = (*current).clone();
        changed.plan = Some(plan);
        changed.view.context.get_or_insert_default().mtu = mtu;
        let foreign = lock(&self.foreign).of(peer);
        changed.settle(&foreign);
        tracing::info!(connection.id = %id, peer.ip = %peer, mtu, "the MTU follows the path");
        let changed = Arc::new(changed);
        turn.set(Some(Arc::clone(&changed)));
        self.held
            .monitors
            .publish(ConnectionEventType::Update, &changed);
        Ok(())
    }
}

/// The MTU that the connection should have, and its link with it; `None` when it has it, or what the path carries is not known (0).
fn wanted(established: &Established, path_mtu: u32) -> Option<(u32, Box<Plan>)> {
    if path_mtu == 0 {
        return None;
    }
    let mut plan = established.plan.clone()?;
    let link = plan.tunnel_link_mut()?;
    let mtu = lower_mtu(established.path.agreed_mtu, path_mtu);
    if mtu == 0 || link.mtu == mtu {
        return None;
    }
    link.mtu = mtu;
    Some((mtu, plan))
}
