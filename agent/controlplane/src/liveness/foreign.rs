//! VNIs that peers send with and that are no tunnels here: what is published of them, and for how long.
//!
//! Both sides of a connection delete their links at the same moment, so the last packets of a closed one are no evidence of a fault.
//! What is evidence goes on: an entry lives as long as packets come.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use nsm_core::{liveness::ForeignVnis, net::Vni};
use tokio::time::Instant;

use super::Liveness;
use crate::sync::lock;

/// Peers of which foreign VNIs are remembered; those of further peers are not.
const MOST_PEERS: usize = 4096;

/// How long an entry is published without a new packet. The node is checked twice a second; a client whose connection is DOWN asks again
/// within this time, and a client that sends little does not get UP and DOWN in turns.
const LIFE: Duration = Duration::from_secs(5);

/// Foreign VNIs, by peer.
#[derive(Debug, Default)]
pub(crate) struct Foreign {
    peers: HashMap<IpAddr, Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    vnis: ForeignVnis,
    /// When the last packet of each came.
    last: BTreeMap<Vni, Instant>,
}

impl Foreign {
    /// What is published of a peer.
    pub(crate) fn of(&self, peer: IpAddr) -> ForeignVnis {
        let seen = self.peers.get(&peer);
        seen.map(|seen| seen.vnis.clone()).unwrap_or_default()
    }

    /// Whether anything is known of a peer.
    pub(crate) fn has(&self, peer: IpAddr) -> bool {
        self.peers.contains_key(&peer)
    }

    /// Packets have come; whether that is news.
    fn see(&mut self, peer: IpAddr, vni: Vni, now: Instant) -> bool {
        if self.peers.len() >= MOST_PEERS && !self.peers.contains_key(&peer) {
            return false;
        }
        let seen = self.peers.entry(peer).or_default();
        let is_news = seen.vnis.insert(vni);
        if seen.vnis.contains(vni) {
            seen.last.insert(vni, now);
        }
        is_news
    }

    /// When an entry ends, if no more packets come.
    fn ends(&self, peer: IpAddr, vni: Vni) -> Option<Instant> {
        Some(*self.peers.get(&peer)?.last.get(&vni)? + LIFE)
    }

    /// It is a tunnel now, or no packets come any more.
    pub(crate) fn forget(&mut self, peer: IpAddr, vni: Vni) {
        if let Some(seen) = self.peers.get_mut(&peer) {
            seen.vnis.remove(vni);
            seen.last.remove(&vni);
            if seen.vnis.is_empty() {
                self.peers.remove(&peer);
            }
        }
    }

    /// No connection goes to the peer any more.
    pub(crate) fn forget_peer(&mut self, peer: IpAddr) {
        self.peers.remove(&peer);
    }
}

impl Liveness {
    pub(super) fn on_foreign_vni(self: &Arc<Self>, peer: IpAddr, vni: Vni) {
        if self.held.keys.is_quarantined(vni) {
            tracing::debug!(peer.ip = %peer, tunnel.vni = vni.get(), "packets of a tunnel that was closed a moment ago");
            return;
        }
        if lock(&self.foreign).see(peer, vni, Instant::now()) {
            tracing::warn!(
                peer.ip = %peer, tunnel.vni = vni.get(),
                "a peer sends with a VNI that has no tunnel here: it gets that in the metrics of its connections"
            );
            self.publish_path(&self.held.connections.to(peer));
            tokio::spawn(Arc::clone(self).forget_when_quiet(peer, vni));
        }
    }

    async fn forget_when_quiet(self: Arc<Self>, peer: IpAddr, vni: Vni) {
        loop {
            let ends = {
                let mut foreign = lock(&self.foreign);
                let Some(ends) = foreign.ends(peer, vni) else {
                    return;
                };
                if ends <= Instant::now() {
                    foreign.forget(peer, vni);
                    None
                } else {
                    Some(ends)
                }
            };
            match ends {
                Some(ends) => tokio::time::sleep_until(ends).await,
                None => return self.publish_path(&self.held.connections.to(peer)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_lives_as_long_as_packets_come() {
        let peer: IpAddr = "192.0.2.2".parse().expect("an address");
        let vni = |number: u32| Vni::try_from(number).expect("a VNI");
        let mut foreign = Foreign::default();
        let start = Instant::now();
        assert!(foreign.see(peer, vni(5), start));
        assert!(!foreign.see(peer, vni(5), start + LIFE / 2), "no news");
        assert_eq!(foreign.ends(peer, vni(5)), Some(start + LIFE / 2 + LIFE));
        assert!(foreign.of(peer).contains(vni(5)));
        foreign.forget(peer, vni(5));
        assert_eq!(foreign.ends(peer, vni(5)), None);
        assert!(!foreign.has(peer), "nothing is left");
        // A peer that sends with many leaves room when they have gone.
        let many = (10..100)
            .filter(|it| foreign.see(peer, vni(*it), start))
            .count();
        assert!(many < 90);
        assert_eq!(foreign.ends(peer, vni(99)), None);
        for number in 10..100 {
            foreign.forget(peer, vni(number));
        }
        assert!(foreign.see(peer, vni(99), start));
    }
}
