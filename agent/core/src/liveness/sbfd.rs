//! The initiator's side of an S-BFD session (RFC 7880), as a machine without clock, socket or thread.
//!
//! One [`Session`] watches one path. The prober drives it with these steps, in this order:
//!
//! 1. read the clock: `now`;
//! 2. read the stamps of the kernel: [`Session::handle_left`] for every probe that left, [`Session::handle_answer`] for every answer,
//!    [`Session::handle_peer_probe`] for the peer's own probes;
//! 3. [`Session::handle_deadline`] with `now`;
//! 4. send what [`Session::poll_transmit`] gives until it gives nothing, and pass each egress stamp to [`Session::handle_left`] at once;
//! 5. take the changes from [`Session::poll_change`];
//! 6. sleep until [`Session::poll_deadline`], or until something is received.
//!
//! The clock is read *before* the stamps. Otherwise a prober that loses the processor between the two would count answers as missing
//! that arrived meanwhile.
//!
//! # When a path is down
//!
//! Loss is counted in probes that *left* (they have an egress stamp) and stayed unanswered, never in time alone: a prober that was not
//! scheduled raises no alarm. An unanswered probe raises *suspicion*, and suspicion sends faster, so that the verdict rests on many probes
//! and still comes soon. How many depends on the loss measured so far: as many as make a run of pure chance rarer than [`FALSE_ALARM`].
//! A path that loses every tenth packet at random is therefore up, with a loss of 10 % in its statistics.
//!
//! # A peer that joins later
//!
//! A session begins before its peer has one: the server joins before it answers the Request, the client when it has the answer. So
//! silence is a loss only once an answer can be expected: a proof was requested, the peer has sent a probe of its own, or 15 s are over.
//! The peer's first probe begins a burst; probes that left before are no evidence.
//!
//! # The peer's pace
//!
//! Each answer states how fast the reflector accepts probes (*Required Min RX Interval*), and none is sent faster (RFC 5880 section
//! 6.8.7): not in a burst, not in suspicion, not in a search for the MTU. A verdict counts probes, so it is delayed by as much. Zero
//! is no limit. A value above [`Timing::slow_interval`] is treated as that interval: RFC 7880 has it for a reflector that is switched
//! off, so every node accepts it, and a wrong value of the peer delays detection by a few of those intervals at most.
//!
//! # Sequence
//!
//! S-BFD has no sequence number. [`Seq`] is in the low bits of *Desired Min TX Interval*, which a reflector copies back unchanged (RFC
//! 7880 section 7.2.2): each answer is matched to its probe, and an answer that was replayed or never asked for changes nothing.

mod loss;
mod rtt;
mod session;
mod timing;
mod window;

use std::{fmt, num::NonZeroU32, str::FromStr, time::Duration};

pub use session::Session;
pub use timing::Timing;

use nsm_ebpf_common::sbfd::{
    DIAGNOSTIC_TIME_EXPIRED, SEQUENCE_MASK, State as WireState, interval_with_sequence,
};
use serde::{Serialize, Serializer};

use crate::clock::{self, Monotonic};

/// The probability below which a run of unanswered probes is a loss of the path and not chance, at the loss measured so far. A session
/// sends some 100,000 probes an hour: one false alarm in ten thousand hours.
pub const FALSE_ALARM: f64 = 1e-9;

/// A discriminator (RFC 5880 section 6.3): names a reflector or a session on its node. Never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Discriminator(NonZeroU32);

impl Discriminator {
    /// `None` for 0, which RFC 5880 reserves.
    #[must_use]
    pub fn new(value: u32) -> Option<Self> {
        NonZeroU32::new(value).map(Self)
    }

    /// The number in packets.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for Discriminator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A text that is no discriminator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no discriminator: write a number from 1 to {max}", max = u32::MAX)]
pub struct DiscriminatorError(pub String);

impl FromStr for Discriminator {
    type Err = DiscriminatorError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.bytes()
            .all(|byte| byte.is_ascii_digit())
            .then(|| text.parse().ok())
            .flatten()
            .map(Self)
            .ok_or_else(|| DiscriminatorError(text.to_owned()))
    }
}

/// The number of a probe, modulo 1024.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Seq(u16);

impl Seq {
    /// The number in the low bits of a *Desired Min TX Interval*, or of any other number.
    #[must_use]
    pub const fn from_low_bits(value: u32) -> Self {
        Self((value & SEQUENCE_MASK) as u16)
    }

    /// The number in stamps.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// The number after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self::from_low_bits(self.0 as u32 + 1)
    }

    /// How many probes before `later` this one is.
    #[must_use]
    pub const fn before(self, later: Self) -> u16 {
        later.0.wrapping_sub(self.0) & SEQUENCE_MASK as u16
    }
}

/// The state of the session: whether probes come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// No verdict yet, or none possible: no probe leaves this node.
    Unknown,
    /// Probes come back.
    Up,
    /// Probes leave and do not come back.
    Down,
    /// The peer's reflector answers that it is switched off: no loss, and no proof.
    AdminDown,
}

impl State {
    /// The state in the session's own probes: an initiator sends Down and Up only (RFC 7880 section 7.3.1).
    #[must_use]
    pub const fn on_wire(self) -> WireState {
        match self {
            Self::Up => WireState::Up,
            Self::Unknown | Self::Down | Self::AdminDown => WireState::Down,
        }
    }

    /// The diagnostic in the session's own probes (RFC 5880 section 4.1).
    #[must_use]
    pub const fn diagnostic(self) -> u8 {
        match self {
            Self::Down => DIAGNOSTIC_TIME_EXPIRED,
            Self::Unknown | Self::Up | Self::AdminDown => 0,
        }
    }
}

/// A probe to send now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// Its number.
    pub seq: Seq,
    /// The state to send.
    pub state: WireState,
    /// The diagnostic to send (RFC 5880 section 4.1).
    pub diagnostic: u8,
    /// The pace at which probes are sent now.
    pub interval: Duration,
    /// The size of the inner IP packet in bytes, its header included, by zero padding behind the BFD packet (RFC 9764); `None` for a
    /// packet without padding.
    pub padded_to: Option<u16>,
}

impl Probe {
    /// *Desired Min TX Interval* in microseconds, with the number in its low bits.
    #[must_use]
    pub fn desired_min_tx(&self) -> u32 {
        let interval = u32::try_from(self.interval.as_micros()).unwrap_or(u32::MAX);
        interval_with_sequence(interval, self.seq.get().into())
    }
}

/// An answer of the peer's reflector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// The number of the probe that it answers.
    pub seq: Seq,
    /// From egress stamp to ingress stamp.
    pub round_trip: Duration,
    /// The ingress stamp.
    pub at: Monotonic,
    /// The state in it: Up or AdminDown.
    pub state: WireState,
    /// How far apart the reflector wants probes to be (*Required Min RX Interval*); zero is no limit.
    pub required_min_rx: Duration,
}

/// A probe of the peer's own session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PeerProbe {
    /// When it arrived.
    pub at: Monotonic,
    /// The state in it.
    #[serde(serialize_with = "serialize_wire_state")]
    pub state: WireState,
    /// The diagnostic in it (RFC 5880 section 4.1).
    pub diagnostic: u8,
}

/// What became of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepted {
    /// It answers a probe of ours for the first time.
    Yes,
    /// No probe of this number is waiting for an answer: replayed, never sent, or long ago. It changes nothing.
    Stale,
}

/// The reason of a [`Deadline`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// A probe is due.
    Transmit,
    /// A probe has had no answer for longer than a round trip takes: send faster.
    Suspect,
    /// Enough unanswered probes may have become old enough for a verdict.
    Detect,
    /// A burst of proof is over.
    Proof,
    /// The search for the path MTU goes on.
    PathMtu,
}

/// When to wake the session, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline {
    /// The time.
    pub at: Monotonic,
    /// The reason.
    pub reason: Wake,
}

/// Why the state changed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// So many answers in a row.
    Answered {
        /// The answers.
        answers: u32,
    },
    /// Probes left, and none came back.
    Unanswered {
        /// How many left since the last one that was answered.
        probes: u32,
        /// How long ago the first of them left.
        #[serde(rename = "silence_ns", serialize_with = "clock::serialize_nanos")]
        silence: Duration,
    },
    /// The peer's reflector answers that it is switched off.
    AdminDown,
    /// Probes were handed to the kernel, and none left the probe link.
    NothingLeft {
        /// How many in a row.
        probes: u32,
    },
}

/// A change of a session.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Change {
    /// The state changed.
    State {
        /// When.
        at: Monotonic,
        /// What it was.
        from: State,
        /// What it is.
        to: State,
        /// Why.
        cause: Cause,
    },
    /// The largest inner IP packet that the path is known to carry has changed, bytes.
    PathMtu {
        /// When.
        at: Monotonic,
        /// What it was; `None` when nothing was known.
        from: Option<u16>,
        /// What it is.
        to: u16,
    },
}

/// The progress of a proof ([`Session::prove`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// Probes are under way.
    Pending,
    /// The path is up.
    Reached,
    /// The peer's reflector answers that it is switched off.
    SwitchedOff,
    /// The burst is over and the path is not up.
    Silent {
        /// Probes of the burst that left this node.
        probes: u32,
        /// From the first of them to the verdict.
        waited: Duration,
    },
}

/// The last minute (50 to 60 s) of a session.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Statistics {
    /// Probes that left and whose answer came or is overdue.
    pub probes: u32,
    /// Answers to them.
    pub answers: u32,
    /// The median round trip, within 4 %; `None` without answers.
    pub rtt_p50: Option<Duration>,
    /// The round trip that 99 % stay below, within 4 %; `None` without answers.
    pub rtt_p99: Option<Duration>,
}

impl Statistics {
    /// The share of probes without answer, 0 to 1; `None` without probes.
    #[must_use]
    pub fn loss(&self) -> Option<f64> {
        let answered = f64::from(self.answers.min(self.probes)) / f64::from(self.probes);
        (self.probes > 0).then_some(1.0 - answered)
    }
}

/// The state of a session at one time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Snapshot {
    /// The state.
    pub state: State,
    /// Since when.
    pub since: Monotonic,
    /// Why it is so; `None` before the first verdict.
    pub cause: Option<Cause>,
    /// When the first of the unanswered probes left, since the last one that was answered.
    pub silent_since: Option<Monotonic>,
    /// When the last answer came in.
    pub last_answer: Option<Monotonic>,
    /// How long an answer may take before it is missed.
    #[serde(rename = "rto_ns", serialize_with = "clock::serialize_nanos")]
    pub rto: Duration,
    /// The last of the peer's own probes.
    pub peer: Option<PeerProbe>,
    /// How far apart the peer's own probes are.
    #[serde(rename = "peer_gap_ns", serialize_with = "clock::serialize_nanos")]
    pub peer_gap: Duration,
    /// The largest inner IP packet that the path is known to carry, bytes.
    pub path_mtu: Option<u16>,
}

fn serialize_wire_state<S: Serializer>(
    state: &WireState,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(match state {
        WireState::AdminDown => "admin-down",
        WireState::Down => "down",
        WireState::Init => "init",
        WireState::Up => "up",
    })
}
