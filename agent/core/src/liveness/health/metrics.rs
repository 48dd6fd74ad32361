//! Health in the `metrics` of a path segment: how agents tell each other, and everybody who looks, over NSM's own API.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Direction, Health, Verdict, Way, Word};
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

/// The value of [`NEXT_HOP`]; there is no other, for a hop that is heard needs no word.
const LOST: &str = "lost";

/// The most foreign VNIs that are told of one peer: a peer that sends with many has something else wrong with it.
const MOST_FOREIGN: usize = 16;

/// The most characters of another hop's sentence that are kept: two of ours on two ways are 600 at most.
const LONGEST_REASON: usize = 1000;

/// VNIs that came from a peer and are no tunnels here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ForeignVnis(BTreeSet<Vni>);

impl ForeignVnis {
    /// Adds one; whether that is news. Beyond the bound none is.
    pub fn insert(&mut self, vni: Vni) -> bool {
        self.0.len() < MOST_FOREIGN && self.0.insert(vni)
    }

    /// Whether it is among them.
    #[must_use]
    pub fn contains(&self, vni: Vni) -> bool {
        self.0.contains(&vni)
    }

    /// Forgets one: it is a tunnel now.
    pub fn remove(&mut self, vni: Vni) -> bool {
        self.0.remove(&vni)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The next hop of whoever tells this is not heard any more: its part of the control plane is away, which says nothing of the path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LostHop {
    /// Who is not heard and how that was noticed, as a sentence that may be shown.
    pub reason: Arc<str>,
}

impl LostHop {
    /// Reads a segment's metrics.
    #[must_use]
    pub fn read(metrics: &BTreeMap<String, String>) -> Option<Self> {
        (metrics.get(NEXT_HOP)? == LOST).then(|| Self {
            reason: metrics.get(NEXT_HOP_REASON).map_or_else(
                || "the next hop is not heard any more".into(),
                |text| printable(text, LONGEST_REASON).into(),
            ),
        })
    }

    /// Writes into our own segment's metrics that the next hop is lost, or takes that back. Whatever else is there stays.
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

/// Health as another hop published it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Published {
    /// Its way in.
    pub inward: Option<Verdict>,
    /// Its way out.
    pub outward: Option<Verdict>,
    /// Its sentence on what is not up, as it may be shown: whoever is behind us writes what it likes.
    pub reason: Option<String>,
    /// VNIs that came to it and that it has no tunnel for.
    pub foreign: ForeignVnis,
}

impl Published {
    /// Reads a segment's metrics. What does not parse is no health: other hops may use the same words for something else.
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

    /// Whether one of the ways is told to be down.
    #[must_use]
    pub fn is_down(&self) -> bool {
        [self.inward, self.outward].contains(&Some(Verdict::Down))
    }

    /// Its word on the path between it and us, if it is a hop that watches one.
    #[must_use]
    pub fn word(&self) -> Option<Word> {
        Some(Word {
            inward: self.inward?,
            outward: self.outward?,
        })
    }

    /// Writes health into our own segment's metrics, in place of what was there of it. Whatever else is there stays.
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
        let code = |way: &Way| (way.verdict != Verdict::Up).then(|| way.reason.code().to_owned());
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

    /// Whether two segments' metrics tell the same of health and of the next hop. The sentences may differ, for they count
    /// milliseconds; the kinds of reasons may not, or the word that this node's firewall is to blame would not be told to who has
    /// heard that nothing comes in.
    #[must_use]
    pub fn is_same(one: &BTreeMap<String, String>, other: &BTreeMap<String, String>) -> bool {
        let keys = [
            STATE_IN, STATE_OUT, REASON_IN, REASON_OUT, PATH_MTU, FOREIGN, NEXT_HOP,
        ];
        keys.iter().all(|key| one.get(*key) == other.get(*key))
    }
}

/// What is to be said of ways that are not up.
fn sentences(health: &Health) -> Option<String> {
    if health.inward == health.outward {
        return (health.verdict() != Verdict::Up).then(|| health.to_string());
    }
    let told: Vec<_> = [
        (Direction::Out, health.outward.verdict),
        (Direction::In, health.inward.verdict),
    ]
    .into_iter()
    .filter(|(_, verdict)| *verdict == health.verdict())
    .map(|(direction, _)| health.sentence(direction))
    .collect();
    (health.verdict() != Verdict::Up).then(|| told.join("; "))
}
