//! Verdicts on the directions of a path.

use std::{fmt, mem::discriminant, net::IpAddr};

use serde::Serialize;

use super::Reason;
use crate::net::Vni;

/// What is known of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Nothing yet.
    Unknown,
    /// Packets pass.
    Up,
    /// Packets do not pass.
    Down,
    /// It cannot be known: the peer offers no proof.
    Unverified,
}

impl Verdict {
    /// The text in metrics and status.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Up => "up",
            Self::Down => "down",
            Self::Unverified => "unverified",
        }
    }

    /// The verdict with this text.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Unknown, Self::Up, Self::Down, Self::Unverified]
            .into_iter()
            .find(|verdict| verdict.as_str() == text)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A direction of a path, as seen from this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From the peer.
    In,
    /// To the peer.
    Out,
}

impl Direction {
    /// The text in status.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out",
        }
    }
}

/// What was found of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Finding {
    /// The verdict.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
}

impl Finding {
    pub(super) const fn new(verdict: Verdict, reason: Reason) -> Self {
        Self { verdict, reason }
    }

    /// Whether both have the verdict and the kind of reason; numbers in the reasons may differ.
    fn is_same(&self, other: &Self) -> bool {
        self.verdict == other.verdict && discriminant(&self.reason) == discriminant(&other.reason)
    }
}

/// The health of a path: what was found of its two directions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Health {
    /// The peer's public address.
    pub peer: IpAddr,
    /// The UDP port of its tunnels.
    pub port: u16,
    /// From the peer to this node.
    pub inward: Finding,
    /// From this node to the peer.
    pub outward: Finding,
    /// The largest inner IP packet that the path is known to carry, bytes.
    pub path_mtu: Option<u16>,
}

impl Health {
    /// The health of a path that cannot be probed.
    #[must_use]
    pub const fn unverified(peer: IpAddr, port: u16, reason: Reason) -> Self {
        let finding = Finding::new(Verdict::Unverified, reason);
        Self {
            peer,
            port,
            inward: finding,
            outward: finding,
            path_mtu: None,
        }
    }

    /// Both directions as one: down when one is, up when both are.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let verdicts = [self.inward.verdict, self.outward.verdict];
        [Verdict::Down, Verdict::Unverified, Verdict::Unknown]
            .into_iter()
            .find(|verdict| verdicts.contains(verdict))
            .unwrap_or(Verdict::Up)
    }

    /// Whether both have the same path MTU, and in each direction the same verdict for the same kind of reason; numbers in the reasons
    /// may differ.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.inward.is_same(&other.inward)
            && self.outward.is_same(&other.outward)
            && self.path_mtu == other.path_mtu
    }

    /// Whether packets are known not to pass.
    #[must_use]
    pub fn is_down(&self) -> bool {
        self.verdict() == Verdict::Down
    }

    /// The same path for a connection whose VNI the peer counts as foreign.
    #[must_use]
    pub const fn without_tunnel(mut self, vni: Vni) -> Self {
        self.outward = Finding::new(Verdict::Down, Reason::ForeignVni { vni });
        self
    }

    /// The direction with the verdict of [`Self::verdict`]; `out` where both have it.
    #[must_use]
    pub fn worst(&self) -> (Direction, &Finding) {
        let overall = self.verdict();
        if self.outward.verdict == overall {
            (Direction::Out, &self.outward)
        } else {
            (Direction::In, &self.inward)
        }
    }

    /// What was found of a direction.
    #[must_use]
    pub const fn finding(&self, direction: Direction) -> &Finding {
        match direction {
            Direction::In => &self.inward,
            Direction::Out => &self.outward,
        }
    }

    /// A sentence on one direction.
    #[must_use]
    pub fn sentence(&self, direction: Direction) -> String {
        let finding = self.finding(direction);
        let from_to = match direction {
            Direction::In => "from",
            Direction::Out => "to",
        };
        let Self { peer, port, .. } = self;
        let verdict = finding.verdict;
        format!(
            "the path {from_to} {peer} (UDP {port}) is {verdict}: {}",
            finding.reason.sentence(*port)
        )
    }
}

/// The sentence of the direction that [`Health::worst`] gives.
impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (direction, _) = self.worst();
        f.write_str(&self.sentence(direction))
    }
}
