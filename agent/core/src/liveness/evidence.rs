//! What a verdict rests on.

use serde::Serialize;

use super::{PathId, ReceivedReport, sbfd::Snapshot};
use crate::clock::Monotonic;

/// What is known of a path. All times are of the clock of [`Self::at`], so the age of each part is `at` less its time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Evidence {
    /// The path.
    pub path: PathId,
    /// When this was collected.
    pub at: Monotonic,
    /// The session: probes, answers, the peer's own probes, the path MTU.
    pub session: Snapshot,
    /// The stages since the session was up last.
    pub stages: Stages,
    /// The peer's own probes are counted on another path to its node. That none arrive here is no evidence about this path.
    pub peer_probes_elsewhere: bool,
    /// The report of the peer's agent.
    pub peer_report: Option<ReceivedReport>,
}

/// How many packets of a path passed the stages on this node. Packets that one stage counted and the next one did not were lost
/// between the two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Stages {
    /// Left the probe link.
    pub link_out: u64,
    /// Left the card; `None` where nothing counts, or where the count is not trusted ([`Card`](super::Card)).
    pub card_out: Option<u64>,
    /// Reached the card; `None` likewise.
    pub card_in: Option<u64>,
    /// Reached the probe link.
    pub link_in: u64,
}

/// Fewer lost packets than this are no evidence: a few packets are always between two readings.
pub(super) const SIGNIFICANT: u64 = 3;

impl Stages {
    /// What passed each stage since an earlier reading.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let grown =
            |now: Option<u64>, then: Option<u64>| Some(now?.saturating_sub(then.unwrap_or(0)));
        Self {
            link_out: self.link_out.saturating_sub(earlier.link_out),
            card_out: grown(self.card_out, earlier.card_out),
            card_in: grown(self.card_in, earlier.card_in),
            link_in: self.link_in.saturating_sub(earlier.link_in),
        }
    }

    /// Packets that this node dropped between card and probe link.
    pub(super) fn own_input_drops(&self) -> Option<u64> {
        lost_between(self.card_in?, self.link_in)
    }

    /// Packets that this node dropped between probe link and card.
    pub(super) fn own_output_drops(&self) -> Option<u64> {
        lost_between(self.link_out, self.card_out?)
    }
}

/// Packets that one stage counted and the next did not, if they are most of them.
fn lost_between(before: u64, after: u64) -> Option<u64> {
    let lost = before.saturating_sub(after);
    (lost >= SIGNIFICANT && lost > after).then_some(lost)
}
