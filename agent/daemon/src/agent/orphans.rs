//! What an earlier run of this agent left: links and tunnels that no connection takes over.

use std::{collections::HashSet, sync::Arc, time::Duration};

use nsm_controlplane::plane::ControlPlane;
use nsm_core::{link::LinkAlias, nsm::name::Domain};

use super::forwarder::NodeForwarder;

/// Deletes connections that no client has taken over within `grace`, the longest time until a client refreshes.
pub(crate) async fn collect(
    forwarder: Arc<NodeForwarder>,
    plane: ControlPlane,
    domain: Domain,
    grace: Duration,
) {
    let (links, forwarding) = (forwarder.links(), forwarder.forwarding());
    // Those without an entry in the maps are of another version of the programs, or were being deleted.
    let on_node = match links.pod_links(domain.as_str()).await {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(%error, "cannot look for links of an earlier agent on the node");
            Vec::new()
        }
    };
    let adopted: HashSet<LinkAlias> = on_node
        .into_iter()
        .filter_map(|link| link.alias)
        .chain(forwarding.connections())
        .collect();
    let mut found = match links.find_ours(domain.as_str()).await {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(%error, "cannot look for links of an earlier agent");
            Vec::new()
        }
    };
    // The pods' ends of what was adopted go with the nodes' ends.
    found.retain(|(_, link)| {
        link.alias
            .as_ref()
            .is_none_or(|alias| !adopted.contains(alias))
    });
    if found.is_empty() && adopted.is_empty() {
        return;
    }
    tracing::info!(
        links = found.len(), tunnels = adopted.len(), grace = ?grace,
        "an earlier agent left links: those without a refresh are deleted"
    );
    tokio::time::sleep(grace).await;
    let is_orphan = |alias: &LinkAlias| !plane.holds(alias.connection_id());
    // Each is checked anew: a deletion takes up to 20 ms, and clients come back meanwhile.
    for alias in adopted.iter().filter(|alias| is_orphan(alias)) {
        match forwarding.down(alias).await {
            Ok(()) => tracing::info!(%alias, "deleted an orphan"),
            Err(error) => tracing::warn!(%alias, %error, "an orphan stays"),
        }
    }
    for (netns, link) in found {
        let Some(alias) = link.alias.filter(is_orphan) else {
            continue;
        };
        match links.down(&netns, &alias).await {
            Ok(_) => tracing::info!(link = %link.name, %alias, "deleted an orphan"),
            Err(error) => tracing::warn!(link = %link.name, %error, "an orphan stays"),
        }
    }
}
