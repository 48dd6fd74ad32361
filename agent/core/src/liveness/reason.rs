//! Why a verdict was reached.

use std::time::Duration;

use serde::Serialize;

use crate::{clock, net::Vni};

/// Why a verdict was reached. Its serialised form has the [`code`](Self::code) beside what was counted or measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "code", rename_all = "kebab-case")]
pub enum Reason {
    /// No answer has become due yet.
    NotProbedYet,
    /// Probes are handed to the kernel and do not leave.
    NothingLeaves {
        /// How many in a row.
        probes: u32,
    },
    /// There is no evidence about this direction.
    #[serde(rename = "cannot-be-told")]
    NoEvidence,
    /// Our probes are answered.
    Answered,
    /// The peer's own probes arrive.
    #[serde(rename = "peer-heard")]
    PeerProbesArrive,
    /// The peer's own probes arrive and carry the state Up: its session is answered.
    #[serde(rename = "peer-answered")]
    PeerIsAnswered,
    /// The peer's agent reports that our probes arrive.
    #[serde(rename = "peer-hears-us")]
    PeerReportsUp,
    /// The peer's agent reports that nothing from this node arrives.
    #[serde(rename = "peer-hears-nothing")]
    PeerReportsDown {
        /// How many probes left since the last one that was answered.
        probes: u32,
    },
    /// Our probes stay unanswered.
    Unanswered {
        /// How many left since the last one that was answered.
        probes: u32,
        /// Since the first of them left.
        #[serde(rename = "silence_ns", serialize_with = "clock::serialize_nanos")]
        silence: Duration,
    },
    /// Nothing from the peer arrives.
    #[serde(rename = "nothing-heard")]
    NothingArrives {
        /// For how long.
        #[serde(rename = "silence_ns", serialize_with = "clock::serialize_nanos")]
        silence: Duration,
    },
    /// The peer's packets reach the card and not the probe link.
    OwnInputDrops {
        /// How many, since the path was up.
        packets: u64,
    },
    /// Our packets pass the probe link and not the card.
    OwnOutputDrops {
        /// How many, since the path was up.
        packets: u64,
    },
    /// Packets of our VNI reach the peer, which has no tunnel for it.
    ForeignVni {
        /// The VNI.
        vni: Vni,
    },
    /// The peer offers no reflector.
    NoReflector,
    /// The peer's reflector answers that it is switched off.
    SwitchedOff,
    /// This node does not probe.
    NotProbing,
}

impl Reason {
    /// The kind of the reason, as in metrics: without what was counted or measured, so that two reasons can be compared.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NotProbedYet => "not-probed-yet",
            Self::NothingLeaves { .. } => "nothing-leaves",
            Self::NoEvidence => "cannot-be-told",
            Self::Answered => "answered",
            Self::PeerProbesArrive => "peer-heard",
            Self::PeerIsAnswered => "peer-answered",
            Self::PeerReportsUp => "peer-hears-us",
            Self::PeerReportsDown { .. } => "peer-hears-nothing",
            Self::Unanswered { .. } => "unanswered",
            Self::NothingArrives { .. } => "nothing-heard",
            Self::OwnInputDrops { .. } => "own-input-drops",
            Self::OwnOutputDrops { .. } => "own-output-drops",
            Self::ForeignVni { .. } => "foreign-vni",
            Self::NoReflector => "no-reflector",
            Self::SwitchedOff => "switched-off",
            Self::NotProbing => "not-probing",
        }
    }

    /// Why, and what to do, where tunnels use UDP port `port`.
    pub(super) fn sentence(&self, port: u16) -> String {
        match *self {
            Self::NotProbedYet => "no answer to a probe has become due yet".to_owned(),
            Self::NothingLeaves { probes } => format!(
                "{probes} probes in a row were handed to the kernel and did not leave: see whether the probe link of this node is up \
                 and has its programs"
            ),
            Self::NoEvidence => {
                "there is no evidence about this direction on this node: see the status of the peer's agent".to_owned()
            }
            Self::Answered => "probes are answered".to_owned(),
            Self::PeerProbesArrive => "the peer's probes arrive".to_owned(),
            Self::PeerIsAnswered => {
                "the peer's probes arrive and show that they are answered, though its reflector does not answer ours".to_owned()
            }
            Self::PeerReportsUp => "the peer's agent reports that our probes arrive".to_owned(),
            Self::PeerReportsDown { probes } => format!(
                "{probes} probes left, and the peer's agent reports that nothing from this node arrives: see whether UDP {port} is \
                 let through on the path and into the peer, as new flows and not only as replies"
            ),
            Self::Unanswered { probes, silence } => format!(
                "{probes} probes left and none was answered for {} ms: see whether UDP {port} is let through on the path and into \
                 the peer",
                silence.as_millis()
            ),
            Self::NothingArrives { silence } => format!(
                "nothing from the peer arrived for {} ms: see whether it runs, and whether UDP {port} is let through on the path \
                 and into this node, as new flows and not only as replies",
                silence.as_millis()
            ),
            Self::OwnInputDrops { packets } => format!(
                "{packets} packets of the peer reached this node's network card and not its probe link: let UDP {port} in through \
                 this node's firewall (INPUT)"
            ),
            Self::OwnOutputDrops { packets } => format!(
                "{packets} packets left this node's probe link and not its network card: let UDP {port} out through this node's \
                 firewall (OUTPUT), and see that it has a route to the peer"
            ),
            Self::ForeignVni { vni } => format!(
                "packets of our VNI {vni} reach the peer, which has no tunnel for it: the two sides disagree on the VNI; a new \
                 Request for the connection repairs it"
            ),
            Self::NoReflector => "the peer offers no S-BFD reflector".to_owned(),
            Self::SwitchedOff => "the peer's reflector is switched off (AdminDown)".to_owned(),
            Self::NotProbing => "this node sends no probes".to_owned(),
        }
    }
}
