//! What a new agent takes over of an earlier one: the connections whose links and maps are both there.

use std::collections::HashMap;

use nsm_core::{
    link::{LinkAlias, NodeLink},
    net::Vni,
};

use super::{
    ForwardError, Forwarding,
    joined::{Connection, Joined, Joint, To},
};
use crate::bpf::{Connected, LeadsTo};

impl Forwarding {
    /// Takes over the connections of these nodes' ends, and empties the maps of all else. Returns the aliases of endpoints' links that
    /// belong to no pair: nobody will ask for one without its client's.
    pub(super) fn adopt(&self, ends: Vec<NodeLink>) -> Result<Vec<LinkAlias>, ForwardError> {
        let ends: HashMap<u32, NodeLink> = ends.into_iter().map(|it| (it.index, it)).collect();
        let known: HashMap<u32, Connected> = self
            .bpf()
            .connected()?
            .into_iter()
            .map(|it| (it.node, it))
            .collect();
        let mut joined = self.joined();
        for link in known.values() {
            take_over(&mut joined, link, &known, &ends);
        }
        let nodes = joined.nodes();
        for link in known.keys().filter(|link| !nodes.contains_key(link)) {
            self.bpf().disconnect_link(*link)?;
        }
        for tunnel in self.bpf().tunnels() {
            if let Ok(vni) = Vni::try_from(tunnel.vni)
                && !joined.has_tunnel((vni, tunnel.peer))
            {
                self.bpf().disconnect_tunnel(vni, tunnel.peer)?;
            }
        }
        let left = ends
            .into_values()
            .filter(|end| !nodes.contains_key(&end.index));
        let left = left.filter_map(|end| end.alias);
        Ok(left.filter(LinkAlias::is_of_endpoint).collect())
    }
}

/// Takes over the connection whose first link this is.
fn take_over(
    joined: &mut Joined,
    link: &Connected,
    known: &HashMap<u32, Connected>,
    ends: &HashMap<u32, NodeLink>,
) {
    let Some(end) = ends.get(&link.node) else {
        return;
    };
    let Some(alias) = end.alias.as_ref().filter(|it| !it.is_of_endpoint()) else {
        return;
    };
    let mut nodes = vec![end.clone()];
    let to = match link.to {
        LeadsTo::Tunnel { vni, remote } => match Vni::try_from(vni) {
            Ok(vni) if joined.reserve((vni, remote), alias) => To::Tunnel((vni, remote)),
            _ => return,
        },
        LeadsTo::Link(second) => {
            let Some(second) = known.get(&second) else {
                return;
            };
            let leads_back = second.to == LeadsTo::Link(link.node);
            let is_of_endpoint =
                |it: &LinkAlias| it.is_of_endpoint() && it.of_connection() == *alias;
            match ends.get(&second.node) {
                Some(end) if leads_back && end.alias.as_ref().is_some_and(is_of_endpoint) => {
                    nodes.push(end.clone());
                    To::Link(joint(second))
                }
                _ => return,
            }
        }
    };
    let connection = Connection {
        link: joint(link),
        to,
        written: None,
    };
    joined.join(alias, connection, nodes);
}

const fn joint(link: &Connected) -> Joint {
    Joint {
        node: link.node,
        slot: link.slot,
    }
}
