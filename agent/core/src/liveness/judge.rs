//! From evidence to health.
//!
//! A session proves both directions at once: an answer is a new flow to the peer's tunnel port, as data is. When the session is
//! down, the rest of the evidence separates the directions, and often names the place of the loss:
//!
//! | observation | conclusion |
//! |---|---|
//! | the peer's own probes arrive, ours are not answered | `out` is down |
//! | nothing from the peer arrives | `in` is down; `out` is unknown |
//! | its packets reach the card and not the probe link | this node's firewall drops the tunnel port |
//! | our probes pass the probe link and not the card | this node's output rules drop them |
//! | its probes arrive and carry the state Up | both directions are up; its reflector does not answer ours |
//! | nothing from it arrives, and its agent reports on our probes | its `in` is our `out`: see [`ReceivedReport`](super::ReceivedReport) |
//! | its probes are counted on another path to its node | `out` is down; `in` is unknown |
//! | it counts our VNI as foreign | it has no such tunnel: `out` of that connection is down |

use std::time::Duration;

use nsm_ebpf_common::sbfd::State as WireState;

use super::{
    Evidence, Finding, Health, Reason, Verdict,
    sbfd::{Cause, PeerProbe, State},
};

/// A peer that suspects a loss or is up probes at least this often several times over: a longer gap is silence.
const SILENT_AFTER: Duration = Duration::from_millis(150);

/// The same for a peer that lost us when we lost it: after a while it probes once a second ([`super::sbfd::Timing`]).
const SLOWLY_SILENT_AFTER: Duration = Duration::from_secs(3);

/// When the peer becomes slow, less the time by which it may have noticed the loss before us.
const SLOWS_DOWN_AFTER: Duration = Duration::from_secs(9);

/// A peer whose probes carry the state Up for so long after our session went down is believed: its own detection is as fast as ours.
pub const PEER_INSISTS: Duration = Duration::from_secs(1);

/// The health that the evidence shows.
#[must_use]
pub fn judge(evidence: &Evidence) -> Health {
    let (inward, outward) = match evidence.session.state {
        State::Up => {
            let proved = Finding::new(Verdict::Up, Reason::Answered);
            (proved, proved)
        }
        State::AdminDown => {
            let off = Finding::new(Verdict::Unverified, Reason::SwitchedOff);
            (off, off)
        }
        State::Unknown => undecided(evidence),
        State::Down => lost(evidence),
    };
    Health {
        peer: evidence.path.address,
        port: evidence.path.port,
        inward,
        outward,
        path_mtu: evidence.session.path_mtu,
    }
}

/// `in` and `out` before the session has a state.
fn undecided(evidence: &Evidence) -> (Finding, Finding) {
    let outward = match evidence.session.cause {
        Some(Cause::NothingLeft { probes }) => Reason::NothingLeaves { probes },
        _ => Reason::NotProbedYet,
    };
    let inward = match fresh_peer_probe(evidence) {
        Some(_) => Finding::new(Verdict::Up, Reason::PeerProbesArrive),
        None => Finding::new(Verdict::Unknown, Reason::NotProbedYet),
    };
    (inward, Finding::new(Verdict::Unknown, outward))
}

/// `in` and `out` after the session went down.
fn lost(evidence: &Evidence) -> (Finding, Finding) {
    let session = &evidence.session;
    let silent_since = session.silent_since.unwrap_or(session.since);
    let silence = evidence.at.since(silent_since);
    let probes = match session.cause {
        Some(Cause::Unanswered { probes, .. }) => probes,
        _ => 0,
    };
    let unanswered = match evidence.stages.own_output_drops() {
        Some(packets) => Reason::OwnOutputDrops { packets },
        None => Reason::Unanswered { probes, silence },
    };
    if let Some(peer) = fresh_peer_probe(evidence) {
        let insists =
            peer.state == WireState::Up && evidence.at.since(session.since) >= PEER_INSISTS;
        let outward = if insists {
            Finding::new(Verdict::Up, Reason::PeerIsAnswered)
        } else {
            Finding::new(Verdict::Down, unanswered)
        };
        let inward = Finding::new(Verdict::Up, Reason::PeerProbesArrive);
        return (inward, outward);
    }
    let reported = evidence
        .peer_report
        .and_then(|report| report.outward(silent_since, evidence.at));
    let outward = match (unanswered, reported) {
        (Reason::OwnOutputDrops { .. }, _) => Finding::new(Verdict::Down, unanswered),
        (_, Some(Verdict::Down)) => Finding::new(Verdict::Down, Reason::PeerReportsDown { probes }),
        // The peer cannot say on which of the paths our probes arrived.
        _ if evidence.peer_probes_elsewhere => Finding::new(Verdict::Down, unanswered),
        (_, Some(Verdict::Up)) => Finding::new(Verdict::Up, Reason::PeerReportsUp),
        _ => Finding::new(Verdict::Unknown, Reason::NoEvidence),
    };
    let inward = match evidence.stages.own_input_drops() {
        _ if evidence.peer_probes_elsewhere => Finding::new(Verdict::Unknown, Reason::NoEvidence),
        Some(packets) => Finding::new(Verdict::Down, Reason::OwnInputDrops { packets }),
        None => Finding::new(Verdict::Down, Reason::NothingArrives { silence }),
    };
    (inward, outward)
}

/// The peer's own probe, if it arrived recently and after our probes stopped being answered.
fn fresh_peer_probe(evidence: &Evidence) -> Option<PeerProbe> {
    let session = &evidence.session;
    let usual = match evidence.at.since(session.since) >= SLOWS_DOWN_AFTER {
        true => SLOWLY_SILENT_AFTER,
        false => SILENT_AFTER,
    };
    let fresh = usual.max(session.peer_gap * 3);
    session.peer.filter(|probe| {
        let since_silence = session
            .silent_since
            .is_none_or(|silent| probe.at > silent + session.rto);
        since_silence && evidence.at.since(probe.at) <= fresh
    })
}
