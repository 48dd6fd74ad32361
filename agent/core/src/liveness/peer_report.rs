//! The report of the peer's agent about the path, and when it is evidence.
//!
//! The peer's inbound direction is our outbound direction, and the peer has first-hand evidence of it. The report is used where
//! nothing from the peer arrives: our own probes are then no evidence about our outbound direction. Three rules decide whether a
//! report counts:
//!
//! 1. **A report is valid while the monitor stream is open that brought it.** The peer's agent publishes each change and nothing in
//!    between, so an old report need not be outdated. When the stream ends, the caller withdraws the report; until the end of the
//!    stream is noticed, the report is valid.
//! 2. **The peer must have had time to notice the loss.** A report that arrived after the silence began is about this loss. An earlier
//!    one counts once the peer could have changed it: the peer detects as fast as we do, and [`PEER_NOTICES`] is several times that
//!    and the time of delivery. (When our probes are further apart, the peer may notice first; its report then waits.)
//! 3. **Up counts only from a peer that has noticed the loss.** What breaks our round trip breaks the peer's too, so a peer that has
//!    noticed does not report its outbound direction up. A report of two directions up dates from before the loss, even a long time
//!    later: the peer, or the stream, may have stopped unnoticed. Down needs no such condition: a peer that receives nothing has
//!    noticed.
//!
//! Where no report counts, the outbound direction is unknown. That is so for a peer that is cut off completely, and for the server's
//! end of a tunnel, to which the client's end has no stream.

use std::time::Duration;

use serde::Serialize;

use super::Verdict;
use crate::clock::Monotonic;

/// Within this time a peer has noticed a loss and its report is here: detection takes below 200 ms, paths that are not up are judged
/// again four times a second, and the rest is for delivery.
pub const PEER_NOTICES: Duration = Duration::from_secs(1);

/// What a peer's agent reports of the two directions of the path, as seen from the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PeerReport {
    /// From this node to the peer.
    pub inward: Verdict,
    /// From the peer to this node.
    pub outward: Verdict,
}

/// A report whose stream is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ReceivedReport {
    /// The report.
    pub report: PeerReport,
    /// When it arrived.
    pub at: Monotonic,
}

impl ReceivedReport {
    /// What the report shows at `now` of our outbound direction, on which probes are unanswered since `silent_since`. `None`: the
    /// report does not count.
    pub(super) fn outward(&self, silent_since: Monotonic, now: Monotonic) -> Option<Verdict> {
        let has_noticed = self.at > silent_since || now.since(silent_since) >= PEER_NOTICES;
        match self.report.inward {
            Verdict::Down if has_noticed => Some(Verdict::Down),
            Verdict::Up if has_noticed && self.report.outward != Verdict::Up => Some(Verdict::Up),
            _ => None,
        }
    }
}
