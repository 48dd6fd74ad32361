//! Which of several ways to one node the node's own probes are answered on.
//!
//! A node speaks from one Ethernet address ([`SPEAKER`] and its discriminator), whichever way its frames come, and that is all that
//! the programs see of the way: the management link is an ordinary VXLAN device, which does not tell the outer source, and the
//! inner one is the sender's address as it knows itself, which a NAT does not change. So the session that a probe is booked to, and
//! the outer address that its answer goes to, cannot follow from the probe; they follow from which way we know to be good.
//!
//! The way that speaks keeps that while its own probes are answered: they arrive, so answers do. As soon as answers are overdue,
//! long before its session is down, one whose probes are answered takes its place: the peer's own probes come by whichever way its
//! routes have it, and were they answered on the broken one for as long as the peer takes to detect a loss, it would lose us on
//! all. What it misses are the answers from the fault until the first that is overdue here, and as long as this thread waits for
//! the kernel. When no way is up, the one that was joined last speaks: where a peer told of itself last is where it most likely is,
//! and when both sides change at once, both turn to where the other is now. A way that is down, or that names somebody else's
//! discriminator, therefore never takes the answers away from one that is good.
//!
//! The session of an earlier agent goes on answering, and nobody probes it before its connection comes back: it counts as up, and
//! gives way only to one that is proved. It keeps its session and its place at the underlay until its grace is over.
//!
//! IPv4 and IPv6 have a link, and therefore a speaker, each.
//!
//! A way that is the only one to its node has SPEAKER for its own probes, too, and costs one entry in each table. Where there are
//! several, each has an address of its own besides, so that probes under way are still recognised when SPEAKER goes elsewhere.

use std::collections::HashSet;

use nsm_core::liveness::PathId;
use nsm_ebpf_common::sbfd::frame::session_key;

use super::{Known, NodeOnLink, Orphan, Peers, forwarding};
use crate::{
    links::{
        Family,
        management::{self, ManagementLink},
    },
    liveness::{HealthError, preflight::Standing, prober::Command},
};

/// What speaks for a way; the largest wins.
fn rank(standing: Standing, speaks: bool, joined: u64) -> (Standing, bool, u64) {
    (standing, standing != Standing::Down && speaks, joined)
}

impl Peers {
    /// Looks whether other ways than those that speak should.
    pub(super) fn choose_speakers(&mut self) {
        let silent = self.known.iter().filter(|(_, known)| !known.speaks);
        let nodes: HashSet<NodeOnLink> = silent.map(|(spec, _)| NodeOnLink::of(spec)).collect();
        for node in nodes {
            self.choose_or_tell(node);
        }
    }

    /// Likewise for one node, where nobody waits for it.
    pub(super) fn choose_or_tell(&mut self, node: NodeOnLink) {
        if let Err(error) = self.choose_speaker(node) {
            // It was told when the way was joined or the other one went.
            tracing::debug!(%error, "a node's probes are still answered on another way");
        }
    }

    /// Lets the best way to a node speak; whether there is one.
    pub(super) fn choose_speaker(&mut self, node: NodeOnLink) -> Result<bool, HealthError> {
        let ways = self.ways_to(node);
        let several = ways.clone().nth(1).is_some();
        let best = ways
            .max_by_key(|(_, known)| rank(known.cell.standing(), known.speaks, known.joined))
            .map(|(spec, known)| (*spec, known.speaks, known.cell.is_up()));
        let Some((best, speaks, up)) = best else {
            return Ok(false);
        };
        let mut orphans = self.orphans.iter();
        if !up && orphans.any(|orphan| orphan.node() == node && orphan.answers()) {
            return Ok(true);
        }
        if !speaks {
            self.let_speak(node, best)?;
        } else if several {
            let link = self.link(node.family)?;
            self.give_own_mac(&link, best)?;
        }
        Ok(true)
    }

    fn ways_to(&self, node: NodeOnLink) -> impl Iterator<Item = (&PathId, &Known)> + Clone {
        let ways = self.known.iter();
        ways.filter(move |(spec, _)| NodeOnLink::of(spec) == node)
    }

    /// Each step leaves what works.
    fn let_speak(&mut self, node: NodeOnLink, spec: PathId) -> Result<(), HealthError> {
        let link = self.link(node.family)?;
        let speaker = node.speaker();
        let before = self
            .ways_to(node)
            .find(|(_, known)| known.speaks)
            .map(|(spec, _)| *spec);
        if let Some(before) = before {
            self.give_own_mac(&link, before)?;
        }
        let slot = self.known.get(&spec).ok_or(HealthError::Closed)?.slot;
        management::set_peer(&mut self.netlink, &link, forwarding(speaker, spec))?;
        let key = session_key(node.family == Family::V4, speaker);
        if let Err(error) = self.ask_prober(|reply| Command::Lead { key, slot, reply }) {
            if let Some(before) = before {
                self.answer_at(&link, node, before);
            }
            return Err(error);
        }
        for (other, known) in &mut self.known {
            if NodeOnLink::of(other) == node {
                known.speaks = *other == spec;
            }
        }
        self.displace_orphan(&link, node);
        Ok(())
    }

    /// An earlier agent's session speaks no more, and waits for its connection to come back.
    fn displace_orphan(&mut self, link: &ManagementLink, node: NodeOnLink) {
        let speaks = |orphan: &Orphan| orphan.node() == node && orphan.speaks;
        let Some(place) = self.orphans.iter().position(speaks) else {
            return;
        };
        let mut orphan = self.orphans.swap_remove(place);
        orphan.speaks = false;
        match self.give_orphan_mac(link, &mut orphan) {
            Ok(()) => self.orphans.push(orphan),
            Err(error) => {
                tracing::warn!(%error, peer.ip = %orphan.address, "a session of an earlier agent ends");
                self.forget_orphan(&orphan);
            }
        }
    }

    /// Something leads to an orphan's session, so that it is found by yet another agent.
    fn give_orphan_mac(
        &mut self,
        link: &ManagementLink,
        orphan: &mut Orphan,
    ) -> Result<(), HealthError> {
        let node = orphan.node();
        if orphan.mac != node.speaker() {
            return Ok(());
        }
        let (mac, slot) = (self.free_mac(node, orphan.address)?, orphan.slot);
        if let Some(spec) = orphan.at {
            management::set_peer(&mut self.netlink, link, forwarding(mac, spec))?;
        }
        let key = session_key(node.family == Family::V4, mac);
        orphan.mac = mac;
        self.ask_prober(|reply| Command::Lead { key, slot, reply })
    }

    /// The way's own probes no longer have the node's own address.
    fn give_own_mac(&mut self, link: &ManagementLink, spec: PathId) -> Result<(), HealthError> {
        let known = self.known.get(&spec).ok_or(HealthError::Closed)?;
        if known.mac != NodeOnLink::of(&spec).speaker() {
            return Ok(());
        }
        let (slot, mac) = (
            known.slot,
            self.free_mac(NodeOnLink::of(&spec), spec.address)?,
        );
        management::set_peer(&mut self.netlink, link, forwarding(mac, spec))?;
        if let Err(error) = self.ask_prober(|reply| Command::Rename { slot, mac, reply }) {
            self.remove_forwarding(link, spec.address, mac);
            return Err(error);
        }
        if let Some(known) = self.known.get_mut(&spec) {
            known.mac = mac;
        }
        Ok(())
    }

    /// Sends answers to a node's probes where this way goes.
    pub(super) fn answer_at(&mut self, link: &ManagementLink, node: NodeOnLink, spec: PathId) {
        let there = forwarding(node.speaker(), spec);
        if let Err(error) = management::set_peer(&mut self.netlink, link, there) {
            tracing::warn!(%error, peer.ip = %spec.address, "a peer's probes are not answered there");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::super::preflight::Standing::{self, Doubted, Down, Good},
        rank,
    };

    #[test]
    fn a_way_that_is_good_goes_on_speaking_and_else_the_one_that_came_last() {
        let speaks = |standing: Standing| rank(standing, true, 1);
        let newer = |standing| rank(standing, false, 2);
        for other in [Down, Doubted, Good] {
            assert!(speaks(Good) > newer(other), "{other:?}");
        }
        assert!(speaks(Doubted) < newer(Good), "long before it is down");
        assert!(speaks(Doubted) > newer(Doubted));
        assert!(speaks(Doubted) > newer(Down));
        assert!(speaks(Down) < newer(Good));
        assert!(speaks(Down) < newer(Down), "it has moved");
        // A third that is good goes before the one that came last.
        assert!(rank(Good, false, 0) > newer(Down));
    }
}
