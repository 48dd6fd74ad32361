//! Health in the `metrics` of a path segment. This file is the specification of these keys.
//!
//! An agent publishes the health of a connection's path in the `metrics` map of its own path segment. Every hop in front of it, and
//! every client, receives it by NSM's own API: in the answer of a Request and in the events of monitor streams.
//!
//! | key | value | present |
//! |---|---|---|
//! | `sbfd_state_in`, `sbfd_state_out` | a [`Verdict`]: `up`, `down`, `unknown` or `unverified`; the direction as seen from the publishing node | while the node watches the path of a tunnel |
//! | `sbfd_reason_in`, `sbfd_reason_out` | a [`Reason::code`](super::Reason::code), for programs | while that direction is not `up` |
//! | `sbfd_reason` | one or two sentences for people; a reader takes at most 1,000 characters | while a direction is not `up` |
//! | `sbfd_path_mtu` | the largest inner IP packet that the path is known to carry, bytes, decimal | once a search has found it |
//! | `vxlan_foreign_vnis` | decimal VNIs, separated by commas, at most 16: packets of these arrived from the peer, and the node has no tunnel for them | while there are any |
//! | `next_hop` | `lost`: the monitor stream from the publishing node's next hop is broken, or the last refresh was refused | until a Request succeeds |
//! | `next_hop_reason` | a sentence for people, which names the next hop and the cause | with `next_hop` |
//! | `link_state` | `down`: the link of the connection's pod on the publishing node was changed by somebody else and is not repaired | until it is right again |
//! | `link_reason` | a sentence for people: the link, what is wrong with it, and what can be done | with `link_state` |
//!
//! A reader treats a value that does not parse as absent: other components may use the same keys. A publisher leaves all other keys
//! of the map alone. A change of a sentence alone is not published ([`Published::is_same`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Direction, Finding, Health, PeerReport, Verdict};
use crate::{net::Vni, text::printable};

const STATE_IN: &str = "sbfd_state_in";
const STATE_OUT: &str = "sbfd_state_out";
const REASON_IN: &str = "sbfd_reason_in";
const REASON_OUT: &str = "sbfd_reason_out";
const REASON: &str = "sbfd_reason";
const PATH_MTU: &str = "sbfd_path_mtu";
const FOREIGN: &str = "vxlan_foreign_vnis";
const NEXT_HOP: &str = "next_hop";
const NEXT_HOP_REASON: &str = "next_hop_reason";

const LINK_STATE: &str = "link_state";
const LINK_REASON: &str = "link_reason";

/// The only value of [`LINK_STATE`].
const DOWN: &str = "down";

/// The only value of [`NEXT_HOP`].
const LOST: &str = "lost";

/// The most foreign VNIs that are published of one peer: a peer that sends with more has another fault.
const MOST_FOREIGN: usize = 16;

/// The most characters of another hop's sentence that are kept: two of ours have 600 at most.
const LONGEST_REASON: usize = 1000;

/// VNIs in packets from a peer for which this node has no tunnel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ForeignVnis(BTreeSet<Vni>);

impl ForeignVnis {
    /// Adds one; false when it was there or the set is full.
    pub fn insert(&mut self, vni: Vni) -> bool {
        self.0.len() < MOST_FOREIGN && self.0.insert(vni)
    }

    /// Whether the VNI is in the set.
    #[must_use]
    pub fn contains(&self, vni: Vni) -> bool {
        self.0.contains(&vni)
    }

    /// Removes one that is a tunnel now; whether it was there.
    pub fn remove(&mut self, vni: Vni) -> bool {
        self.0.remove(&vni)
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The monitor stream from the publishing hop's next hop is broken, or the last Request was refused. That is a loss of the control
/// plane; the path may be good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LostHop {
    /// Which hop was lost and how that was noticed: a sentence that is safe to print.
    pub reason: Arc<str>,
}

impl LostHop {
    /// The last Request of a connection that stands was refused.
    #[must_use]
    pub fn refused(error: &str) -> Self {
        let error = printable(error, LONGEST_REASON);
        Self {
            reason: format!("the last refresh failed: {error}").into(),
        }
    }

    /// Reads a segment's metrics.
    #[must_use]
    pub fn read(metrics: &BTreeMap<String, String>) -> Option<Self> {
        (metrics.get(NEXT_HOP)? == LOST).then(|| Self {
            reason: metrics.get(NEXT_HOP_REASON).map_or_else(
                || "the monitor stream of the next hop is broken".into(),
                |text| printable(text, LONGEST_REASON).into(),
            ),
        })
    }

    /// Writes the loss into the metrics of our own segment, or removes it. Other keys are left alone.
    pub fn write(lost: Option<&Self>, metrics: &mut BTreeMap<String, String>) {
        match lost {
            Some(lost) => {
                metrics.insert(NEXT_HOP.to_owned(), LOST.to_owned());
                metrics.insert(NEXT_HOP_REASON.to_owned(), lost.reason.to_string());
            }
            None => {
                metrics.remove(NEXT_HOP);
                metrics.remove(NEXT_HOP_REASON);
            }
        }
    }
}

/// The link of a connection's pod is not as it must be, and is not repaired: packets do not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadLink {
    /// Which link, what is wrong with it, and what can be done: a sentence that is safe to print.
    pub reason: Arc<str>,
}

impl BadLink {
    /// Reads a segment's metrics.
    #[must_use]
    pub fn read(metrics: &BTreeMap<String, String>) -> Option<Self> {
        (metrics.get(LINK_STATE)? == DOWN).then(|| Self {
            reason: metrics.get(LINK_REASON).map_or_else(
                || "the link of the connection's pod is not as it must be".into(),
                |text| printable(text, LONGEST_REASON).into(),
            ),
        })
    }

    /// Writes it into the metrics of our own segment, or removes it. Other keys are left alone.
    pub fn write(bad: Option<&Self>, metrics: &mut BTreeMap<String, String>) {
        match bad {
            Some(bad) => {
                metrics.insert(LINK_STATE.to_owned(), DOWN.to_owned());
                metrics.insert(LINK_REASON.to_owned(), bad.reason.to_string());
            }
            None => {
                metrics.remove(LINK_STATE);
                metrics.remove(LINK_REASON);
            }
        }
    }
}

/// Health as another hop published it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Published {
    /// From its peer to it.
    pub inward: Option<Verdict>,
    /// From it to its peer.
    pub outward: Option<Verdict>,
    /// Its sentence on what is not up, made safe to print: hops behind us may write any text.
    pub reason: Option<String>,
    /// VNIs that arrived there and for which it has no tunnel.
    pub foreign: ForeignVnis,
}

impl Published {
    /// Reads a segment's metrics.
    #[must_use]
    pub fn read(metrics: &BTreeMap<String, String>) -> Self {
        let verdict = |key| metrics.get(key).and_then(|text| Verdict::parse(text));
        let mut foreign = ForeignVnis::default();
        for text in metrics
            .get(FOREIGN)
            .into_iter()
            .flat_map(|list| list.split(','))
            .take(MOST_FOREIGN)
        {
            if let Ok(vni) = text.trim().parse() {
                foreign.insert(vni);
            }
        }
        Self {
            inward: verdict(STATE_IN),
            outward: verdict(STATE_OUT),
            reason: metrics
                .get(REASON)
                .map(|text| printable(text, LONGEST_REASON)),
            foreign,
        }
    }

    /// Whether one of the directions is published as down.
    #[must_use]
    pub fn is_down(&self) -> bool {
        [self.inward, self.outward].contains(&Some(Verdict::Down))
    }

    /// Its report on the path between it and us; `None` of a hop that watches no path.
    #[must_use]
    pub fn report(&self) -> Option<PeerReport> {
        Some(PeerReport {
            inward: self.inward?,
            outward: self.outward?,
        })
    }

    /// Writes health into the metrics of our own segment and replaces what was there of it. Other keys are left alone.
    pub fn write(
        health: Option<&Health>,
        foreign: &ForeignVnis,
        metrics: &mut BTreeMap<String, String>,
    ) {
        let mut set = |key: &str, value: Option<String>| match value {
            Some(value) => drop(metrics.insert(key.to_owned(), value)),
            None => drop(metrics.remove(key)),
        };
        set(STATE_IN, health.map(|it| it.inward.verdict.to_string()));
        set(STATE_OUT, health.map(|it| it.outward.verdict.to_string()));
        let code = |finding: &Finding| {
            (finding.verdict != Verdict::Up).then(|| finding.reason.code().to_owned())
        };
        set(REASON_IN, health.and_then(|it| code(&it.inward)));
        set(REASON_OUT, health.and_then(|it| code(&it.outward)));
        set(REASON, health.and_then(sentences));
        set(
            PATH_MTU,
            health.and_then(|it| it.path_mtu).map(|mtu| mtu.to_string()),
        );
        let vnis: Vec<_> = foreign.0.iter().map(ToString::to_string).collect();
        set(FOREIGN, (!vnis.is_empty()).then(|| vnis.join(",")));
    }

    /// Whether two segments' metrics are the same in health and next hop. The sentences may differ: they contain milliseconds. The
    /// codes of the reasons may not: a change from `nothing-heard` to `own-input-drops` names the firewall to change.
    #[must_use]
    pub fn is_same(one: &BTreeMap<String, String>, other: &BTreeMap<String, String>) -> bool {
        let keys = [
            STATE_IN, STATE_OUT, REASON_IN, REASON_OUT, PATH_MTU, FOREIGN, NEXT_HOP, LINK_STATE,
        ];
        keys.iter().all(|key| one.get(*key) == other.get(*key))
    }
}

/// The sentences on the directions with the worse verdict; `None` when both are up.
fn sentences(health: &Health) -> Option<String> {
    if health.inward == health.outward {
        return (health.verdict() != Verdict::Up).then(|| health.to_string());
    }
    let sentences: Vec<_> = [
        (Direction::Out, health.outward.verdict),
        (Direction::In, health.inward.verdict),
    ]
    .into_iter()
    .filter(|(_, verdict)| *verdict == health.verdict())
    .map(|(direction, _)| health.sentence(direction))
    .collect();
    (health.verdict() != Verdict::Up).then(|| sentences.join("; "))
}
