//! The answer path of a node: on which of several paths to it the node's own probes are answered.
//!
//! A node sends its probes from one Ethernet address (tag [`SPEAKER`] and its discriminator), on all its paths to us. The inner source is
//! the address as the node itself has it, which a NAT does not change, and the outer source is whatever its routes choose, which need not
//! be an address where it can be reached. So neither the session that a probe is counted to nor the outer destination of its answer
//! follows from the probe. Both follow from the path that is known to be good, the answer path.
//!
//! An answer path is kept while our own probes on it are answered: the node's probes are then answered, too. As soon as answers are
//! overdue, long before the session is down, a path whose probes are answered replaces it. The node's own probes arrive by whichever
//! path its routes choose; if they were answered on the broken path until the loss is detected, the node would lose us on all paths.
//! It misses the answers between the fault and the first overdue answer here, and those of the time that this thread waits for the
//! kernel.
//!
//! When no path is up, the one that was joined last is the answer path: the peer stated it last, and when both sides change at the
//! same time, both turn to the new path of the other. A path that is down, or that names the discriminator of another node, never
//! takes the answers from a path that is good.
//!
//! A session of an earlier agent goes on answering, and is not probed before its connection comes back. It counts as up, and is
//! replaced only by a path that is proved. It keeps its session and its underlay entry until its grace is over.
//!
//! IPv4 and IPv6 have a probe link, and so an answer path, each.
//!
//! The only path to a node has the node's own address for our probes, too, and costs one entry in each table. Where there are several,
//! each has another address besides, so that answers in flight are recognised after the answer path has changed.
//!
//! [`SPEAKER`]: nsm_ebpf_common::sbfd::frame::SPEAKER

use std::collections::HashSet;

use nsm_core::liveness::PathId;
use nsm_ebpf_common::sbfd::frame::session_key;

use super::{Known, NodeOnLink, Orphan, Peers};
use crate::{
    links::Family,
    liveness::{HealthError, preflight::Standing, prober::Command},
};

/// The order of paths; the largest becomes the answer path.
fn rank(standing: Standing, is_answer_path: bool, joined: u64) -> (Standing, bool, u64) {
    (
        standing,
        standing != Standing::Down && is_answer_path,
        joined,
    )
}

impl Peers {
    /// Chooses the answer path of each node with several paths again.
    pub(super) fn choose_answer_paths(&mut self) {
        let silent = self.known.iter().filter(|(_, known)| !known.is_answer_path);
        let nodes: HashSet<NodeOnLink> = silent.map(|(spec, _)| NodeOnLink::of(spec)).collect();
        for node in nodes {
            self.choose_or_log(node);
        }
    }

    /// Chooses the answer path of a node; a failure is only logged.
    pub(super) fn choose_or_log(&mut self, node: NodeOnLink) {
        if let Err(error) = self.choose_answer_path(node) {
            // It was a warning when the path was joined or the other one ended.
            tracing::debug!(%error, "a node's probes are still answered on another path");
        }
    }

    /// Makes the best path to a node its answer path; false when there is none.
    pub(super) fn choose_answer_path(&mut self, node: NodeOnLink) -> Result<bool, HealthError> {
        let paths = self.paths_to(node);
        let several = paths.clone().nth(1).is_some();
        let best = paths
            .max_by_key(|(_, known)| {
                rank(known.cell.standing(), known.is_answer_path, known.joined)
            })
            .map(|(spec, known)| (*spec, known.is_answer_path, known.cell.is_up()));
        let Some((best, is_answer_path, up)) = best else {
            return Ok(false);
        };
        let mut orphans = self.orphans.iter();
        if !up && orphans.any(|orphan| orphan.node() == node && orphan.answers()) {
            return Ok(true);
        }
        if !is_answer_path {
            self.answer_on(node, best)?;
        } else if several {
            self.give_own_mac(best)?;
        }
        Ok(true)
    }

    fn paths_to(&self, node: NodeOnLink) -> impl Iterator<Item = (&PathId, &Known)> + Clone {
        let paths = self.known.iter();
        paths.filter(move |(spec, _)| NodeOnLink::of(spec) == node)
    }

    /// Makes a path the answer path of its node. After an error the earlier one is in place.
    fn answer_on(&mut self, node: NodeOnLink, spec: PathId) -> Result<(), HealthError> {
        let node_mac = node.mac();
        let before = self
            .paths_to(node)
            .find(|(_, known)| known.is_answer_path)
            .map(|(spec, _)| *spec);
        if let Some(before) = before {
            self.give_own_mac(before)?;
        }
        let slot = self.known.get(&spec).ok_or(HealthError::Closed)?.slot;
        self.set_route(node_mac, spec)?;
        let key = session_key(node.family == Family::V4, node_mac);
        if let Err(error) = self.ask_prober(|reply| Command::IndexSession { key, slot, reply }) {
            if let Some(before) = before {
                self.set_answer_route(node, before);
            }
            return Err(error);
        }
        for (other, known) in &mut self.known {
            if NodeOnLink::of(other) == node {
                known.is_answer_path = *other == spec;
            }
        }
        self.displace_orphan(node);
        Ok(())
    }

    /// A session of an earlier agent is no answer path any more, and waits for its connection to come back.
    fn displace_orphan(&mut self, node: NodeOnLink) {
        let is_answer_path = |orphan: &Orphan| orphan.node() == node && orphan.is_answer_path;
        let Some(place) = self.orphans.iter().position(is_answer_path) else {
            return;
        };
        let mut orphan = self.orphans.swap_remove(place);
        orphan.is_answer_path = false;
        match self.give_orphan_mac(&mut orphan) {
            Ok(()) => self.orphans.push(orphan),
            Err(error) => {
                tracing::warn!(%error, peer.ip = %orphan.address, "a session of an earlier agent ends");
                self.forget_orphan(&orphan);
            }
        }
    }

    /// Gives an orphan's session an index entry of its own, so that the next agent finds it.
    fn give_orphan_mac(&mut self, orphan: &mut Orphan) -> Result<(), HealthError> {
        let node = orphan.node();
        if orphan.mac != node.mac() {
            return Ok(());
        }
        let (mac, slot) = (self.free_mac(node, orphan.address)?, orphan.slot);
        if let Some(spec) = orphan.at {
            self.set_route(mac, spec)?;
        }
        let key = session_key(node.family == Family::V4, mac);
        orphan.mac = mac;
        self.ask_prober(|reply| Command::IndexSession { key, slot, reply })
    }

    /// Gives our probes on a path another address than the node's own.
    fn give_own_mac(&mut self, spec: PathId) -> Result<(), HealthError> {
        let known = self.known.get(&spec).ok_or(HealthError::Closed)?;
        if known.mac != NodeOnLink::of(&spec).mac() {
            return Ok(());
        }
        let (slot, mac) = (
            known.slot,
            self.free_mac(NodeOnLink::of(&spec), spec.address)?,
        );
        self.set_route(mac, spec)?;
        if let Err(error) = self.ask_prober(|reply| Command::Rename { slot, mac, reply }) {
            self.remove_route(Family::of(spec.address), mac);
            return Err(error);
        }
        if let Some(known) = self.known.get_mut(&spec) {
            known.mac = mac;
        }
        Ok(())
    }

    /// Sends the answers to a node's probes on this path.
    pub(super) fn set_answer_route(&mut self, node: NodeOnLink, spec: PathId) {
        if let Err(error) = self.set_route(node.mac(), spec) {
            tracing::warn!(%error, peer.ip = %spec.address, "a peer's probes are not answered on this path");
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
    fn an_answer_path_that_is_good_stays_and_else_the_last_one_replaces_it() {
        let current = |standing: Standing| rank(standing, true, 1);
        let newer = |standing| rank(standing, false, 2);
        for other in [Down, Doubted, Good] {
            assert!(current(Good) > newer(other), "{other:?}");
        }
        assert!(current(Doubted) < newer(Good), "long before it is down");
        assert!(current(Doubted) > newer(Doubted));
        assert!(current(Doubted) > newer(Down));
        assert!(current(Down) < newer(Good));
        assert!(current(Down) < newer(Down), "the peer has moved");
        // A third path that is good precedes the last one.
        assert!(rank(Good, false, 0) > newer(Down));
    }
}
