//! What is done to a world, and when: drawn from a seed, so that a run can be repeated.

use std::{fmt, time::Duration};

/// The nodes of the world, in the order of [`super::scene`].
pub(super) const NODES: [&str; 5] = ["node-1", "node-2", "node-3", "node-4", "node-5"];

/// Clients, each in a pod of its own.
pub(super) const CLIENTS: usize = 3;

/// Endpoints, each in a pod of its own.
pub(super) const ENDPOINTS: usize = 3;

/// How long blows fall before the world is left alone.
const STORM: Duration = Duration::from_secs(20);

/// Times between two blows, and how long one lasts, in milliseconds.
const PAUSES: (u64, u64) = (1_000, 4_000);
const LENGTHS: (u64, u64) = (300, 4_000);

/// One thing that is done to the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Blow {
    /// SIGKILL to the agent of this node, which starts again at the end.
    KillAgent(usize),
    /// SIGTERM to it.
    StopAgent(usize),
    /// SIGKILL to an endpoint.
    KillEndpoint(usize),
    /// SIGKILL to a client.
    KillClient(usize),
    /// All packets from one node to another are lost.
    Cut(usize, usize),
    /// Three of ten packets are lost.
    Lose(usize, usize),
    /// UDP packets to the tunnels' port are lost.
    BlockTunnels(usize, usize),
    /// The DNS server has no answer for this domain.
    Dns(usize),
    /// The client's interface is deleted.
    DeleteLink(usize),
    /// The client's interface is set down.
    DownLink(usize),
    /// The routes of the client's interface are deleted.
    DeleteRoutes(usize),
}

impl fmt::Display for Blow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let between = |from: &usize, to: &usize| format!("{} to {}", NODES[*from], NODES[*to]);
        match self {
            Self::KillAgent(node) => write!(f, "kill -9 of the agent on {}", NODES[*node]),
            Self::StopAgent(node) => write!(f, "SIGTERM to the agent on {}", NODES[*node]),
            Self::KillEndpoint(number) => write!(f, "kill -9 of endpoint {number}"),
            Self::KillClient(number) => write!(f, "kill -9 of client {number}"),
            Self::Cut(from, to) => write!(f, "nothing passes from {}", between(from, to)),
            Self::Lose(from, to) => write!(f, "30 % are lost from {}", between(from, to)),
            Self::BlockTunnels(from, to) => {
                write!(f, "UDP 4789 is blocked from {}", between(from, to))
            }
            Self::Dns(domain) => write!(f, "no DNS answer for cluster-{domain}.example"),
            Self::DeleteLink(client) => write!(f, "the link of client {client} is deleted"),
            Self::DownLink(client) => write!(f, "the link of client {client} is set down"),
            Self::DeleteRoutes(client) => write!(f, "the routes of client {client} are deleted"),
        }
    }
}

/// A blow with its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    /// From the begin of the storm.
    pub(super) at: Duration,
    pub(super) blow: Blow,
    pub(super) lasts: Duration,
}

/// The blows of one storm, in their order; each storm of a seed has others.
pub(super) fn storm(seed: u64, number: u64) -> Vec<Step> {
    let mut draw = Draw(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut steps = Vec::new();
    let mut at = Duration::from_millis(draw.between(PAUSES));
    while at < STORM {
        let lasts = Duration::from_millis(draw.between(LENGTHS));
        let blow = draw.blow();
        steps.push(Step { at, blow, lasts });
        at += Duration::from_millis(draw.between(PAUSES));
    }
    steps
}

/// SplitMix64: a library's generator may draw other numbers from the same seed with its next version.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn between(&mut self, (from, to): (u64, u64)) -> u64 {
        from + self.next() % (to - from)
    }

    fn way(&mut self) -> (usize, usize) {
        let from = self.below(NODES.len());
        (from, (from + 1 + self.below(NODES.len() - 1)) % NODES.len())
    }

    fn blow(&mut self) -> Blow {
        let (from, to) = self.way();
        match self.below(11) {
            0 => Blow::KillAgent(from),
            1 => Blow::StopAgent(from),
            2 => Blow::KillEndpoint(self.below(ENDPOINTS)),
            3 => Blow::KillClient(self.below(CLIENTS)),
            4 => Blow::Cut(from, to),
            5 => Blow::Lose(from, to),
            6 => Blow::BlockTunnels(from, to),
            7 => Blow::Dns(2 + self.below(2)),
            8 => Blow::DeleteLink(self.below(CLIENTS)),
            9 => Blow::DownLink(self.below(CLIENTS)),
            _ => Blow::DeleteRoutes(self.below(CLIENTS)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_storms_and_another_seed_others() {
        assert_eq!(storm(7, 0), storm(7, 0));
        assert_ne!(storm(7, 0), storm(7, 1));
        assert_ne!(storm(7, 0), storm(8, 0));
    }

    #[test]
    fn every_kind_of_blow_falls_within_its_storm() {
        let steps: Vec<Step> = (0..40).flat_map(|number| storm(1, number)).collect();
        assert!(steps.iter().all(|step| step.at < STORM));
        let kinds: std::collections::HashSet<_> = steps
            .iter()
            .map(|step| std::mem::discriminant(&step.blow))
            .collect();
        assert_eq!(kinds.len(), 11);
        for step in steps {
            if let Blow::Cut(from, to) | Blow::Lose(from, to) | Blow::BlockTunnels(from, to) =
                step.blow
            {
                assert_ne!(from, to, "a node is not cut off from itself");
            }
        }
    }
}
