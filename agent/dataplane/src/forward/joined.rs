//! Which connection has which tunnel and which links.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use ipnet::IpNet;
use nsm_core::{
    link::{LinkAlias, NodeLink, PodLinkSpec, VxlanSpec},
    net::{MacAddr, Vni},
};

use super::ForwardError;
use crate::{
    bpf::{PodEnds, Slot},
    links::{PodEnd, PodEndPlaces},
};

/// What a tunnel is found by.
pub(super) type Tunnel = (Vni, IpAddr);

/// The connections of a node, for each question that is asked. A connection is called by the alias of its first link.
#[derive(Default)]
pub(super) struct Joined {
    by_alias: HashMap<LinkAlias, Connection>,
    /// Also tunnels that are taken for a connection that is being made.
    by_tunnel: HashMap<Tunnel, LinkAlias>,
    /// The nodes' ends of their links as they were made, by index. Who looks at them has a copy, which costs nothing while none changes.
    nodes: Arc<HashMap<u32, NodeLink>>,
    /// The pods' ends, likewise; not those of connections that were adopted, until they are asked for again.
    pods: Arc<PodEndPlaces>,
    /// Connections that had two links and have one at most: the endpoint's may still be on the node.
    halved: HashSet<LinkAlias>,
}

/// A connection as it was joined last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Connection {
    /// The link of its pod; where both pods are on this node, of the client.
    pub(super) link: Joint,
    pub(super) to: To,
    /// What the maps were written from; none where an earlier agent wrote them.
    pub(super) written: Option<Written>,
}

/// A pod link in the maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Joint {
    /// The index of the node's end.
    pub(super) node: u32,
    pub(super) slot: Slot,
}

/// What the first link of a connection is joined with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum To {
    Tunnel(Tunnel),
    /// The link of the endpoint, whose pod is on this node too.
    Link(Joint),
}

/// What the maps of a connection are written from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Written {
    Tunnel {
        ends: PodEnds,
        tunnel: Tunnel,
        local: IpAddr,
        port: u16,
        sources: Vec<IpNet>,
        addresses: Vec<IpNet>,
        neighbours: Vec<(IpAddr, MacAddr)>,
    },
    /// The client's and the endpoint's, each with the addresses that its pod may send from.
    Pair([(PodEnds, Vec<IpNet>); 2]),
}

impl Written {
    pub(super) fn tunnel(ends: &PodEnds, spec: &VxlanSpec) -> Self {
        Self::Tunnel {
            ends: *ends,
            tunnel: (spec.vni, spec.remote.to_canonical()),
            local: spec.local,
            port: spec.port,
            sources: spec.sources.clone(),
            addresses: spec.link.addresses.clone(),
            neighbours: spec.link.neighbours.clone(),
        }
    }

    pub(super) fn pair(ends: &[PodEnds; 2], specs: [&PodLinkSpec; 2]) -> Self {
        let [client, endpoint] = specs.map(|spec| spec.sources.clone());
        Self::Pair([(ends[0], client), (ends[1], endpoint)])
    }
}

/// A tunnel that is taken for a connection until this is dropped, or for as long as the connection has it.
pub(super) struct Reserved<'a> {
    joined: &'a Mutex<Joined>,
    tunnel: Tunnel,
    alias: &'a LinkAlias,
}

impl<'a> Reserved<'a> {
    pub(super) fn take(
        joined: &'a Mutex<Joined>,
        tunnel: Tunnel,
        alias: &'a LinkAlias,
    ) -> Result<Self, ForwardError> {
        let mut state = joined.lock().unwrap_or_else(PoisonError::into_inner);
        let (vni, peer) = tunnel;
        if !state.reserve(tunnel, alias) {
            return Err(ForwardError::Taken { vni, peer });
        }
        Ok(Self {
            joined,
            tunnel,
            alias,
        })
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let mut state = self.joined.lock().unwrap_or_else(PoisonError::into_inner);
        state.give_up(self.tunnel, self.alias);
    }
}

impl Connection {
    pub(super) const fn tunnel(&self) -> Option<Tunnel> {
        match self.to {
            To::Tunnel(tunnel) => Some(tunnel),
            To::Link(_) => None,
        }
    }

    /// The link of the endpoint, of a pair.
    pub(super) const fn second(&self) -> Option<Joint> {
        match self.to {
            To::Tunnel(_) => None,
            To::Link(second) => Some(second),
        }
    }

    /// The indexes of the nodes' ends of its links.
    pub(super) fn nodes(&self) -> impl Iterator<Item = u32> + use<> {
        let second = self.second().map(|link| link.node);
        [self.link.node].into_iter().chain(second)
    }
}

impl Joined {
    /// Takes a tunnel for a connection. False: another one has it.
    pub(super) fn reserve(&mut self, tunnel: Tunnel, alias: &LinkAlias) -> bool {
        match self.by_tunnel.entry(tunnel) {
            Entry::Occupied(taken) => taken.get() == alias,
            Entry::Vacant(free) => {
                free.insert(alias.clone());
                true
            }
        }
    }

    /// Frees a tunnel that was taken for a connection that did not come to have it.
    fn give_up(&mut self, tunnel: Tunnel, alias: &LinkAlias) {
        let has_it = self
            .by_alias
            .get(alias)
            .is_some_and(|it| it.tunnel() == Some(tunnel));
        if !has_it && self.by_tunnel.get(&tunnel) == Some(alias) {
            self.by_tunnel.remove(&tunnel);
        }
    }

    /// Notes a connection, whose tunnel was taken, with the nodes' ends of its links; what it was before.
    pub(super) fn join(
        &mut self,
        alias: &LinkAlias,
        connection: Connection,
        ends: impl IntoIterator<Item = NodeLink>,
    ) -> Option<Connection> {
        let tunnel = connection.tunnel();
        let before = self.by_alias.insert(alias.clone(), connection);
        if let Some(before) = &before {
            if let Some(freed) = before.tunnel().filter(|it| Some(*it) != tunnel) {
                self.by_tunnel.remove(&freed);
            }
            for node in before.nodes() {
                self.forget_ends(node);
            }
        }
        let ends = ends.into_iter().map(|end| (end.index, end));
        Arc::make_mut(&mut self.nodes).extend(ends);
        before
    }

    /// Forgets both ends of a link.
    fn forget_ends(&mut self, node: u32) {
        let end = Arc::make_mut(&mut self.nodes).remove(&node);
        // The place may be another link's by now.
        if let Some(at) = end.and_then(|end| end.peer)
            && self.pods.get(&at).is_some_and(|end| end.node == node)
        {
            Arc::make_mut(&mut self.pods).remove(&at);
        }
    }

    /// Notes the pod's end of a link of a connection that is joined, as it was made.
    pub(super) fn note_pod(&mut self, end: PodEnd) {
        let at = self.nodes.get(&end.node).and_then(|it| it.peer);
        if let Some(at) = at {
            Arc::make_mut(&mut self.pods).insert(at, end);
        }
    }

    /// The connections that have these nodes' ends.
    pub(super) fn of_nodes(&self, nodes: impl IntoIterator<Item = u32>) -> Vec<LinkAlias> {
        let nodes = nodes.into_iter();
        let links = nodes.filter_map(|node| self.nodes.get(&node)?.alias.as_ref());
        links.map(LinkAlias::of_connection).collect()
    }

    /// Forgets a connection: what it was.
    pub(super) fn leave(&mut self, alias: &LinkAlias) -> Option<Connection> {
        let connection = self.by_alias.remove(alias)?;
        if let Some(tunnel) = connection.tunnel() {
            self.by_tunnel.remove(&tunnel);
        }
        for node in connection.nodes() {
            self.forget_ends(node);
        }
        Some(connection)
    }

    /// Forgets the connection that has this link: which, and what it was.
    pub(super) fn lose(&mut self, link: u32) -> Option<(LinkAlias, Connection)> {
        let alias = self.nodes.get(&link)?.alias.as_ref()?.of_connection();
        let mut its = self.by_alias.get(&alias)?.nodes();
        let connection = its.any(|node| node == link).then(|| self.leave(&alias))??;
        if connection.second().is_some() {
            self.halve(&alias);
        }
        Some((alias, connection))
    }

    /// Notes that a connection of two links has one at most.
    pub(super) fn halve(&mut self, alias: &LinkAlias) {
        self.halved.insert(alias.clone());
    }

    /// Whether a connection of two links came to have one at most since this was asked last.
    pub(super) fn was_halved(&mut self, alias: &LinkAlias) -> bool {
        self.halved.remove(alias)
    }

    pub(super) fn get(&self, alias: &LinkAlias) -> Option<&Connection> {
        self.by_alias.get(alias)
    }

    pub(super) fn has_tunnel(&self, tunnel: Tunnel) -> bool {
        self.by_tunnel.contains_key(&tunnel)
    }

    pub(super) fn aliases(&self) -> impl Iterator<Item = &LinkAlias> {
        self.by_alias.keys()
    }

    pub(super) fn nodes(&self) -> Arc<HashMap<u32, NodeLink>> {
        Arc::clone(&self.nodes)
    }

    pub(super) fn pods(&self) -> Arc<PodEndPlaces> {
        Arc::clone(&self.pods)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use nsm_core::link::VethPeer;

    use super::*;

    fn alias(id: &str) -> LinkAlias {
        LinkAlias::new("test.example", id).unwrap()
    }

    fn tunnel(vni: u32) -> Tunnel {
        (vni.try_into().unwrap(), "192.0.2.1".parse().unwrap())
    }

    fn connection(tunnel: Tunnel, node: u32) -> Connection {
        Connection {
            link: joint(node),
            to: To::Tunnel(tunnel),
            written: None,
        }
    }

    fn joint(node: u32) -> Joint {
        Joint {
            node,
            slot: Slot::at(node),
        }
    }

    fn pair(client: u32, endpoint: u32) -> (Connection, [NodeLink; 2]) {
        let connection = Connection {
            link: joint(client),
            to: To::Link(joint(endpoint)),
            written: None,
        };
        let second = NodeLink {
            alias: Some(alias("one").of_endpoint().unwrap()),
            ..link(endpoint)
        };
        (connection, [link(client), second])
    }

    fn link(index: u32) -> NodeLink {
        NodeLink {
            index,
            name: "nsm0".to_owned(),
            alias: Some(alias("one")),
            mac: MacAddr::new([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            group: 0,
            up: true,
            arp: false,
            generates_addresses: false,
            controller: None,
            peer: None,
        }
    }

    #[test]
    fn a_tunnel_has_one_connection_and_is_free_after_it() {
        let mut joined = Joined::default();
        let (one, two) = (alias("one"), alias("two"));
        assert!(joined.reserve(tunnel(5), &one));
        assert!(joined.reserve(tunnel(5), &one), "a refresh");
        assert!(!joined.reserve(tunnel(5), &two));
        joined.give_up(tunnel(5), &one);
        assert!(joined.reserve(tunnel(5), &two), "nothing came of it");
        joined.join(&two, connection(tunnel(5), 3), [link(3)]);
        joined.give_up(tunnel(5), &two);
        assert!(
            !joined.reserve(tunnel(5), &one),
            "a refresh that failed frees nothing"
        );
        assert_eq!(joined.leave(&two), Some(connection(tunnel(5), 3)));
        assert!(joined.reserve(tunnel(5), &one));
        assert!(joined.nodes().is_empty());
    }

    fn pod(node: u32) -> PodEnd {
        PodEnd {
            node,
            name: "nsm-1".parse().unwrap(),
            mac: MacAddr::new([2, 0, 0, 0, 0, 1]),
            since: Instant::now(),
            noted: Instant::now(),
        }
    }

    /// The kernel gives the index of a link that is gone to the next one in the pod.
    #[test]
    fn a_pods_end_is_found_by_its_place_until_its_link_is_gone() {
        let at = VethPeer {
            index: 2,
            netns: Some(7),
        };
        let mut joined = Joined::default();
        let (one, two) = (alias("one"), alias("two"));
        for (alias, vni, node) in [(&one, 5, 3), (&two, 6, 4)] {
            assert!(joined.reserve(tunnel(vni), alias));
            let mut node_end = link(node);
            (node_end.alias, node_end.peer) = (Some(alias.clone()), Some(at));
            joined.join(alias, connection(tunnel(vni), node), [node_end]);
            joined.note_pod(pod(node));
            assert_eq!(joined.pods()[&at].node, node);
        }
        joined.leave(&one);
        assert_eq!(joined.pods()[&at].node, 4, "it is the second's by now");
        assert_eq!(joined.of_nodes([3, 4]), std::slice::from_ref(&two));
        joined.leave(&two);
        assert!(joined.pods().is_empty());
    }

    #[test]
    fn a_tunnel_that_was_taken_for_nothing_is_free_again() {
        let joined = Mutex::new(Joined::default());
        let (one, two) = (alias("one"), alias("two"));
        let taken = Reserved::take(&joined, tunnel(5), &one).unwrap();
        assert!(matches!(
            Reserved::take(&joined, tunnel(5), &two),
            Err(ForwardError::Taken { .. })
        ));
        drop(taken);
        drop(Reserved::take(&joined, tunnel(5), &two).unwrap());
        // What a connection has come to have stays.
        let taken = Reserved::take(&joined, tunnel(5), &one).unwrap();
        joined
            .lock()
            .unwrap()
            .join(&one, connection(tunnel(5), 3), [link(3)]);
        drop(taken);
        assert!(Reserved::take(&joined, tunnel(5), &two).is_err());
        assert!(joined.lock().unwrap().has_tunnel(tunnel(5)));
    }

    #[test]
    fn a_link_that_is_gone_takes_its_connection_along() {
        let mut joined = Joined::default();
        let one = alias("one");
        assert!(joined.reserve(tunnel(5), &one));
        joined.join(&one, connection(tunnel(5), 3), [link(3)]);
        assert_eq!(joined.lose(4), None);
        assert_eq!(
            joined.lose(3),
            Some((one.clone(), connection(tunnel(5), 3)))
        );
        assert!(!joined.has_tunnel(tunnel(5)));
        assert_eq!(joined.lose(3), None);
    }

    #[test]
    fn a_pair_goes_with_either_of_its_links() {
        for lost in [3, 4] {
            let mut joined = Joined::default();
            let one = alias("one");
            let (connection, links) = pair(3, 4);
            assert_eq!(joined.join(&one, connection.clone(), links), None);
            assert_eq!(joined.nodes().len(), 2);
            assert_eq!(joined.lose(lost), Some((one.clone(), connection)));
            assert!(joined.nodes().is_empty());
            assert!(joined.was_halved(&one) && !joined.was_halved(&one));
        }
    }

    #[test]
    fn a_switch_between_a_tunnel_and_a_pair_frees_what_was_before() {
        let mut joined = Joined::default();
        let one = alias("one");
        assert!(joined.reserve(tunnel(5), &one));
        joined.join(&one, connection(tunnel(5), 3), [link(3)]);
        let (both, links) = pair(3, 4);
        joined.join(&one, both.clone(), links);
        assert!(!joined.has_tunnel(tunnel(5)));
        assert!(joined.reserve(tunnel(6), &one));
        let before = joined.join(&one, connection(tunnel(6), 3), [link(3)]);
        assert_eq!(before, Some(both));
        assert_eq!(joined.nodes().keys().copied().collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn a_switch_frees_the_tunnel_and_the_link_of_before() {
        let mut joined = Joined::default();
        let one = alias("one");
        for (vni, node) in [(5, 3), (6, 4)] {
            assert!(joined.reserve(tunnel(vni), &one));
            joined.join(&one, connection(tunnel(vni), node), [link(node)]);
        }
        assert!(!joined.has_tunnel(tunnel(5)));
        assert!(joined.has_tunnel(tunnel(6)));
        assert_eq!(joined.nodes().keys().copied().collect::<Vec<_>>(), [4]);
    }
}
