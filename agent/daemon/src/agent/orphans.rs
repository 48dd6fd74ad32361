//! What an earlier run of this agent left: links and tunnels that no connection takes over.

use std::{sync::Arc, time::Duration};

use nsm_controlplane::plane::ControlPlane;
use nsm_core::nsm::name::Domain;

use super::forwarder::NodeForwarder;

/// Deletes links and tunnels that no connection has taken over within `grace`, the longest time until a client refreshes.
pub(crate) async fn collect(
    forwarder: Arc<NodeForwarder>,
    plane: ControlPlane,
    domain: Domain,
    grace: Duration,
) {
    let (links, programs) = (forwarder.links(), forwarder.programs());
    let found = match links.find_ours(domain.as_str()).await {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(%error, "cannot look for links of an earlier agent");
            Vec::new()
        }
    };
    let left_tunnels = programs.tunnels();
    if found.is_empty() && left_tunnels.is_empty() {
        return;
    }
    tracing::info!(
        links = found.len(), tunnels = left_tunnels.len(), grace = ?grace,
        "an earlier agent left links: those without a refresh are deleted"
    );
    tokio::time::sleep(grace).await;
    for (netns, link) in found {
        // Each is checked anew: a deletion takes up to 20 ms, and clients come back meanwhile.
        let orphan = link
            .alias
            .filter(|alias| !plane.holds(alias.connection_id()));
        let Some(alias) = orphan else { continue };
        match links.down(&netns, &alias).await {
            Ok(_) => tracing::info!(link = %link.name, %alias, "deleted an orphan"),
            Err(error) => tracing::warn!(link = %link.name, %error, "an orphan stays"),
        }
    }
    programs.remove_orphans(left_tunnels);
}
