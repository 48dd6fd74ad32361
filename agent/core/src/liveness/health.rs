//! From evidence to what holds: the health of the two ways between this node and a peer.
//!
//! A session proves both ways at once, for an answer is a new flow to the peer's tunnel port as data is. When it does not, the
//! rest of the evidence tells which way is bad, and often where:
//!
//! | what is seen | what it means |
//! |---|---|
//! | the peer's own probes come in, ours stay unanswered | the way *out* is bad |
//! | nothing of the peer comes in | the way *in* is bad; of the way out nothing is known |
//! | its packets come to the card and not to the tunnel | this node's firewall drops the tunnel's port |
//! | our probes leave the tunnel and not the card | this node's own output drops them |
//! | its probes come in and say that they are answered | both ways are good, and its reflector does not answer ours |
//! | nothing of it comes in, and its agent says what comes of ours | its way in is our way out: see [`Told`] |
//! | its probes are booked to another way to its node | told as the way *out*; of the way in nothing is known |
//! | it counts a VNI of ours as foreign | it has no tunnel there: the way out of that connection is bad |
//!
//! Whatever is told carries its [`Reason`], whose text is a sentence with the evidence in it and what can be done.

mod card;
mod metrics;
mod told;

use std::{fmt, net::IpAddr, time::Duration};

pub use card::{Card, Look};
pub use metrics::{ForeignVnis, LostHop, Published};
pub use told::{PEER_NOTICES, Told, Word};

use crate::{
    clock::Monotonic,
    liveness::sbfd::{Cause, PeerProbe, Snapshot, State as SessionState, WireState},
    net::Vni,
};

/// The peer's probes are heard at this pace at least, while it suspects or is up; several missing is silence.
const HEARD_WITHIN: Duration = Duration::from_millis(150);

/// A peer that lost us, as we lost it, probes once a second after a while ([`crate::liveness::sbfd::Timing`]): then several of those are missing.
const HEARD_SLOWLY_WITHIN: Duration = Duration::from_secs(3);

/// When that begins, less what the peer may have noticed the loss before us.
const SLOWS_DOWN_AFTER: Duration = Duration::from_secs(9);

/// A peer that goes on saying that all is well for so long after we lost it knows better: its own detection is as fast as ours.
pub const PEER_INSISTS: Duration = Duration::from_secs(1);

/// What is known of one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Nothing yet.
    Unknown,
    /// Packets pass.
    Up,
    /// Packets do not.
    Down,
    /// It cannot be known: the peer offers no proof.
    Unverified,
}

impl Verdict {
    /// As it is written in metrics and status.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Up => "up",
            Self::Down => "down",
            Self::Unverified => "unverified",
        }
    }

    /// From its text.
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

/// Why a verdict was reached.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reason {
    /// No probe was due an answer yet.
    NotProbedYet,
    /// Probes are handed to the kernel and do not leave.
    NothingLeaves {
        /// How many in a row.
        probes: u32,
    },
    /// Nothing comes back that could tell.
    CannotBeTold,
    /// Our probes are answered.
    Answered,
    /// The peer's own probes come in.
    PeerHeard,
    /// The peer says that its probes are answered.
    PeerAnswered,
    /// The peer's agent says that our probes come in.
    PeerHearsUs,
    /// The peer's agent says that nothing of ours comes in.
    PeerHearsNothing {
        /// How many probes left since the last one that was answered.
        probes: u32,
    },
    /// Our probes stay unanswered.
    Unanswered {
        /// How many left since the last one that was answered.
        probes: u32,
        /// Since the first of them left.
        silence: Duration,
    },
    /// Nothing of the peer comes in.
    NothingHeard {
        /// For how long.
        silence: Duration,
    },
    /// The peer's packets come to the card and not to the tunnel.
    OwnInputDrops {
        /// How many, since the path was up.
        packets: u64,
    },
    /// Our packets leave the tunnel and not the card.
    OwnOutputDrops {
        /// How many, since the path was up.
        packets: u64,
    },
    /// The peer sees our VNI come in and has no tunnel for it.
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

/// One way: the verdict, and why.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Way {
    /// The verdict.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
}

impl Way {
    const fn new(verdict: Verdict, reason: Reason) -> Self {
        Self { verdict, reason }
    }
}

/// The two ways between this node and a peer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Health {
    /// The peer's public address.
    pub peer: IpAddr,
    /// The UDP port of its tunnels.
    pub port: u16,
    /// From the peer to this node.
    pub inward: Way,
    /// From this node to the peer.
    pub outward: Way,
    /// The largest inner IP packet that the path is known to carry, bytes.
    pub path_mtu: Option<u16>,
}

impl Health {
    /// The health of a peer that cannot be probed.
    #[must_use]
    pub const fn unverified(peer: IpAddr, port: u16, reason: Reason) -> Self {
        let way = Way::new(Verdict::Unverified, reason);
        Self {
            peer,
            port,
            inward: way,
            outward: way,
            path_mtu: None,
        }
    }

    /// Both ways as one: down when one is, up when both are.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let ways = [self.inward.verdict, self.outward.verdict];
        [Verdict::Down, Verdict::Unverified, Verdict::Unknown]
            .into_iter()
            .find(|verdict| ways.contains(verdict))
            .unwrap_or(Verdict::Up)
    }

    /// Whether packets are known not to pass.
    #[must_use]
    pub fn is_down(&self) -> bool {
        self.verdict() == Verdict::Down
    }

    /// The same, but the peer has no tunnel of this VNI.
    #[must_use]
    pub const fn without_tunnel(mut self, vni: Vni) -> Self {
        self.outward = Way::new(Verdict::Down, Reason::ForeignVni { vni });
        self
    }

    /// The way that says most: one that is down before the others, the way out before the way in.
    #[must_use]
    pub fn worst(&self) -> (Direction, &Way) {
        let overall = self.verdict();
        if self.outward.verdict == overall {
            (Direction::Out, &self.outward)
        } else {
            (Direction::In, &self.inward)
        }
    }

    /// One of the two.
    #[must_use]
    pub const fn way(&self, direction: Direction) -> &Way {
        match direction {
            Direction::In => &self.inward,
            Direction::Out => &self.outward,
        }
    }

    /// A sentence on one way.
    #[must_use]
    pub fn sentence(&self, direction: Direction) -> String {
        let way = self.way(direction);
        let from_to = match direction {
            Direction::In => "from",
            Direction::Out => "to",
        };
        let Self { peer, port, .. } = self;
        let verdict = way.verdict;
        format!(
            "the way {from_to} {peer} (UDP {port}) is {verdict}: {}",
            way.reason.words(*port)
        )
    }
}

/// What [`Health::worst`] says, as a sentence.
impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (direction, _) = self.worst();
        f.write_str(&self.sentence(direction))
    }
}

/// One of the two ways, seen from this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the peer.
    In,
    /// To the peer.
    Out,
}

impl Direction {
    /// As it is written in status.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out",
        }
    }
}

impl Reason {
    /// What kind of reason it is, in metrics: what was counted or measured has no part in it, so two are compared by it.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NotProbedYet => "not-probed-yet",
            Self::NothingLeaves { .. } => "nothing-leaves",
            Self::CannotBeTold => "cannot-be-told",
            Self::Answered => "answered",
            Self::PeerHeard => "peer-heard",
            Self::PeerAnswered => "peer-answered",
            Self::PeerHearsUs => "peer-hears-us",
            Self::PeerHearsNothing { .. } => "peer-hears-nothing",
            Self::Unanswered { .. } => "unanswered",
            Self::NothingHeard { .. } => "nothing-heard",
            Self::OwnInputDrops { .. } => "own-input-drops",
            Self::OwnOutputDrops { .. } => "own-output-drops",
            Self::ForeignVni { .. } => "foreign-vni",
            Self::NoReflector => "no-reflector",
            Self::SwitchedOff => "switched-off",
            Self::NotProbing => "not-probing",
        }
    }

    /// Why, and what to do, where tunnels use UDP port `port`.
    fn words(&self, port: u16) -> String {
        match *self {
            Self::NotProbedYet => "no probe was due an answer yet".to_owned(),
            Self::NothingLeaves { probes } => format!(
                "{probes} probes in a row were handed to the kernel and did not leave: see whether the management link of this \
                 node is up and has its programs"
            ),
            Self::CannotBeTold => {
                "nothing comes back that could tell; the peer's agent knows".to_owned()
            }
            Self::Answered => "probes are answered".to_owned(),
            Self::PeerHeard => "the peer's probes come in".to_owned(),
            Self::PeerAnswered => {
                "the peer's probes come in and say that they are answered, though its reflector does not answer ours".to_owned()
            }
            Self::PeerHearsUs => "the peer's agent says that our probes come in".to_owned(),
            Self::PeerHearsNothing { probes } => format!(
                "{probes} probes left, and the peer's agent says that nothing of ours comes in: see whether UDP {port} is let \
                 through on the way and into the peer, as new flows and not only as replies"
            ),
            Self::Unanswered { probes, silence } => format!(
                "{probes} probes left and none was answered for {} ms: see whether UDP {port} is let through on the way and into \
                 the peer",
                silence.as_millis()
            ),
            Self::NothingHeard { silence } => format!(
                "nothing of the peer came in for {} ms: see whether it runs, and whether UDP {port} is let through on the way \
                 and into this node, as new flows and not only as replies",
                silence.as_millis()
            ),
            Self::OwnInputDrops { packets } => format!(
                "{packets} packets of the peer came to this node's network card and not to its tunnel: let UDP {port} in \
                 through this node's firewall (INPUT)"
            ),
            Self::OwnOutputDrops { packets } => format!(
                "{packets} packets left this node's tunnel and not its network card: let UDP {port} out through this node's \
                 firewall (OUTPUT), and see that it has a route to the peer"
            ),
            Self::ForeignVni { vni } => format!(
                "the peer sees VNI {vni} of ours come in and has no tunnel for it: the two sides disagree on the VNI; asking \
                 again for the connection mends it"
            ),
            Self::NoReflector => "the peer offers no S-BFD reflector".to_owned(),
            Self::SwitchedOff => "the peer's reflector is switched off (AdminDown)".to_owned(),
            Self::NotProbing => "this node sends no probes".to_owned(),
        }
    }
}

/// How many packets passed the stages on this node, of late since the path was up last: what one stage has and the next has not was lost
/// between. The count may begin some packets before the loss did, which passed all stages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stages {
    /// Left the tunnel.
    pub link_out: u64,
    /// Left the card; `None` where nothing counts there, or what counts cannot be believed ([`Card`]).
    pub card_out: Option<u64>,
    /// Came to the card; `None` likewise.
    pub card_in: Option<u64>,
    /// Came to the tunnel.
    pub link_in: u64,
}

/// Packets that must have come or gone before their absence at the next stage says something: a few are always between two readings.
const TELLING: u64 = 3;

impl Stages {
    /// What came to each stage since an earlier reading.
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

    fn own_input_drops(&self) -> Option<u64> {
        lost_between(self.card_in?, self.link_in)
    }

    fn own_output_drops(&self) -> Option<u64> {
        lost_between(self.link_out, self.card_out?)
    }
}

/// Packets that one stage had and the next had not, when that is most of them.
fn lost_between(before: u64, after: u64) -> Option<u64> {
    let lost = before.saturating_sub(after);
    (lost >= TELLING && lost > after).then_some(lost)
}

/// All that is known of a peer that is probed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evidence {
    /// Its public address.
    pub peer: IpAddr,
    /// The UDP port of its tunnels.
    pub port: u16,
    /// The session with it.
    pub session: Snapshot,
    /// The stages since the session was up last.
    pub stages: Stages,
    /// There are other ways to its node, and its own probes are booked to another: that none come in says nothing of this way.
    pub heard_elsewhere: bool,
    /// What its agent told.
    pub told: Option<Told>,
}

/// The health of the two ways, from all that is known at `now`.
#[must_use]
pub fn judge(evidence: &Evidence, now: Monotonic) -> Health {
    let (inward, outward) = match evidence.session.state {
        SessionState::Up => {
            let proved = Way::new(Verdict::Up, Reason::Answered);
            (proved, proved)
        }
        SessionState::AdminDown => {
            let off = Way::new(Verdict::Unverified, Reason::SwitchedOff);
            (off, off)
        }
        SessionState::Unknown => undecided(evidence, now),
        SessionState::Down => lost(evidence, now),
    };
    Health {
        peer: evidence.peer,
        port: evidence.port,
        inward,
        outward,
        path_mtu: evidence.session.path_mtu,
    }
}

fn undecided(evidence: &Evidence, now: Monotonic) -> (Way, Way) {
    let outward = match evidence.session.cause {
        Some(Cause::NothingLeft { probes }) => Reason::NothingLeaves { probes },
        _ => Reason::NotProbedYet,
    };
    let inward = match heard(evidence, now) {
        Some(_) => Way::new(Verdict::Up, Reason::PeerHeard),
        None => Way::new(Verdict::Unknown, Reason::NotProbedYet),
    };
    (inward, Way::new(Verdict::Unknown, outward))
}

fn lost(evidence: &Evidence, now: Monotonic) -> (Way, Way) {
    let session = &evidence.session;
    let silent_since = session.silent_since.unwrap_or(session.since);
    let silence = now.since(silent_since);
    let probes = match session.cause {
        Some(Cause::Unanswered { probes, .. }) => probes,
        _ => 0,
    };
    let unanswered = match evidence.stages.own_output_drops() {
        Some(packets) => Reason::OwnOutputDrops { packets },
        None => Reason::Unanswered { probes, silence },
    };
    let told = evidence
        .told
        .and_then(|told| told.way_out(silent_since, now));
    if let Some(peer) = heard(evidence, now) {
        let insists = peer.state == WireState::Up && now.since(session.since) >= PEER_INSISTS;
        let outward = if insists {
            Way::new(Verdict::Up, Reason::PeerAnswered)
        } else {
            Way::new(Verdict::Down, unanswered)
        };
        return (Way::new(Verdict::Up, Reason::PeerHeard), outward);
    }
    if evidence.heard_elsewhere {
        // Of ours, the peer knows no better by which way they came; but when it hears none, this way lets none through.
        let reason = match (unanswered, told) {
            (Reason::Unanswered { .. }, Some(Verdict::Down)) => Reason::PeerHearsNothing { probes },
            _ => unanswered,
        };
        let inward = Way::new(Verdict::Unknown, Reason::CannotBeTold);
        return (inward, Way::new(Verdict::Down, reason));
    }
    let nothing_heard = match evidence.stages.own_input_drops() {
        Some(packets) => Reason::OwnInputDrops { packets },
        None => Reason::NothingHeard { silence },
    };
    let outward = match (unanswered, told) {
        (Reason::OwnOutputDrops { .. }, _) => Way::new(Verdict::Down, unanswered),
        (_, Some(Verdict::Down)) => Way::new(Verdict::Down, Reason::PeerHearsNothing { probes }),
        (_, Some(Verdict::Up)) => Way::new(Verdict::Up, Reason::PeerHearsUs),
        _ => Way::new(Verdict::Unknown, Reason::CannotBeTold),
    };
    (Way::new(Verdict::Down, nothing_heard), outward)
}

/// The peer's own probe, if it was sent while ours stayed unanswered: what came before says nothing of now.
fn heard(evidence: &Evidence, now: Monotonic) -> Option<PeerProbe> {
    let session = &evidence.session;
    let usual = match now.since(session.since) >= SLOWS_DOWN_AFTER {
        true => HEARD_SLOWLY_WITHIN,
        false => HEARD_WITHIN,
    };
    let fresh = usual.max(session.peer_gap * 3);
    session.peer.filter(|probe| {
        let since_silence = session
            .silent_since
            .is_none_or(|silent| probe.at > silent + session.rto);
        since_silence && now.since(probe.at) <= fresh
    })
}
