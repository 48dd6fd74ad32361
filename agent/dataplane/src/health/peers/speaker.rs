//! Which of several ways to one node the node's own probes are answered on.
//!
//! A node speaks from one Ethernet address ([`SPEAKER`] and its discriminator), whichever way its frames come, and that is all that
//! the programs see of the way: the management link is an ordinary VXLAN device, which does not tell the outer source, and the
//! inner one is the sender's address as it knows itself, which a NAT does not change. So the session that a probe is booked to, and
//! the outer address that its answer goes to, cannot follow from the probe; they follow from which way we know to be good.
//!
//! The way that speaks keeps that while its own session is up: our probes on it arrive, so answers do. When it is down, one that is
//! up takes its place, or if there is none, the one that was joined last: where a peer told of itself last is where it most likely
//! is, and when both sides change at once, both turn to where the other is now. A way that is down, or that names somebody else's
//! discriminator, therefore never takes the answers away from one that is good.
//!
//! IPv4 and IPv6 have a link, and therefore a speaker, each.
//!
//! A way that is the only one to its node has SPEAKER for its own probes, too, and costs one entry in each table. One that speaks in
//! another's place has it beside its own address, so that its probes under way are still recognised; one that gives it up, being
//! down, gets another address.

use nsm_ebpf_common::sbfd::frame::session_key;

use super::{NodeOnLink, Peers, forwarding};
use crate::{
    health::{HealthError, PeerSpec, prober::Command},
    links::{
        Family,
        management::{self, ManagementLink},
    },
};

/// What speaks for a way; the largest wins.
fn rank(up: bool, speaks: bool, joined: u64) -> (bool, bool, u64) {
    (up, up && speaks, joined)
}

impl Peers {
    /// Looks whether other ways than those that speak should.
    pub(super) fn choose_speakers(&mut self) {
        let silent = self.known.iter().filter(|(_, known)| !known.speaks);
        let nodes: Vec<NodeOnLink> = silent.map(|(spec, _)| NodeOnLink::of(spec)).collect();
        for node in nodes {
            if let Err(error) = self.choose_speaker(node) {
                // It was told when the way was joined or the other one went.
                tracing::debug!(%error, "a node's probes are still answered on another way");
            }
        }
    }

    /// Lets the best way to a node speak; whether there is one.
    pub(super) fn choose_speaker(&mut self, node: NodeOnLink) -> Result<bool, HealthError> {
        let ways = self.known.iter();
        let best = ways
            .filter(|(spec, _)| NodeOnLink::of(spec) == node)
            .max_by_key(|(_, known)| rank(known.cell.is_up(), known.speaks, known.joined))
            .map(|(spec, known)| (*spec, known.speaks));
        match best {
            None => Ok(false),
            Some((_, true)) => Ok(true),
            Some((spec, false)) => self.let_speak(node, spec).map(|()| true),
        }
    }

    /// Each step leaves what works.
    fn let_speak(&mut self, node: NodeOnLink, spec: PeerSpec) -> Result<(), HealthError> {
        let link = self.link(node.family)?;
        let speaker = node.speaker();
        let before = self.known.iter();
        let before = before
            .filter(|(spec, known)| NodeOnLink::of(spec) == node && known.speaks)
            .map(|(spec, _)| *spec)
            .next();
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
        // An earlier agent's that does not speak has nothing more to do.
        let displaced = self
            .orphans
            .extract_if(.., |orphan| orphan.node() == node && orphan.speaks)
            .collect::<Vec<_>>();
        for orphan in displaced {
            self.forget_orphan(&orphan);
        }
        Ok(())
    }

    /// The way's own probes no longer have the node's own address.
    fn give_own_mac(&mut self, link: &ManagementLink, spec: PeerSpec) -> Result<(), HealthError> {
        let known = self.known.get(&spec).ok_or(HealthError::Closed)?;
        if known.mac != NodeOnLink::of(&spec).speaker() {
            return Ok(());
        }
        let (slot, mac) = (known.slot, self.free_mac(&spec)?);
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
    pub(super) fn answer_at(&mut self, link: &ManagementLink, node: NodeOnLink, spec: PeerSpec) {
        let there = forwarding(node.speaker(), spec);
        if let Err(error) = management::set_peer(&mut self.netlink, link, there) {
            tracing::warn!(%error, peer.ip = %spec.address, "a peer's probes are not answered there");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::rank;

    #[test]
    fn a_way_that_is_good_goes_on_speaking_and_else_the_one_that_came_last() {
        let standing = |up| rank(up, true, 1);
        let newer = |up| rank(up, false, 2);
        assert!(standing(true) > newer(true), "both are good");
        assert!(standing(true) > newer(false));
        assert!(standing(false) < newer(true));
        assert!(standing(false) < newer(false), "it has moved");
        // A third that is good goes before the one that came last.
        assert!(rank(true, false, 0) > newer(false));
    }
}
