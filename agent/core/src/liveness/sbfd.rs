//! The initiator's side of an S-BFD session (RFC 7880), as a machine without clock, socket or thread.
//!
//! One [`Session`] watches over the way to one peer and back. Whoever drives it (the prober) tells it what happened, in this order:
//!
//! 1. read the clock: `now`;
//! 2. read the stamps of the kernel: [`Session::handle_left`] for every probe that left, [`Session::handle_answer`] for every answer,
//!    [`Session::handle_peer_probe`] when the peer's own probes were heard;
//! 3. [`Session::handle_deadline`] with `now`;
//! 4. send what [`Session::poll_transmit`] gives until it gives nothing, and tell at once what left;
//! 5. take the news from [`Session::poll_change`];
//! 6. sleep until [`Session::poll_deadline`], or until something is received.
//!
//! The clock is read *before* the stamps: were it read after, a prober that is put to sleep between the two would take answers for missing
//! that have come meanwhile.
//!
//! # When a path is down
//!
//! Loss is counted in probes that *left* (they have an egress stamp) and stayed unanswered, never in time alone: a prober that was not
//! scheduled raises no alarm. An unanswered probe raises *suspicion*, and suspicion sends faster, so that the verdict rests on many probes
//! and still comes soon. How many depends on the loss measured so far: as many as make a run of pure chance rarer than [`FALSE_ALARM`].
//! A path that loses every tenth packet at random is therefore up, with a loss of 10 % in its statistics.
//!
//! # The peer's pace
//!
//! A reflector says in each answer how fast it takes probes (*Required Min RX Interval*), and none is sent faster (RFC 5880 section
//! 6.8.7): not in a burst, not in suspicion, not to find the MTU. As a verdict counts probes, it comes later by as much. Zero is
//! no limit. More than [`Timing::slow_interval`] is not heeded: that pace RFC 7880 has for a reflector that is switched off, every node
//! takes it, and a slip or a lie of the peer's is not to blind us for longer than a few of those.
//!
//! # Sequence
//!
//! S-BFD has no sequence number. [`Seq`] stands in the low bits of *Desired Min TX Interval*, which a reflector copies back unchanged (RFC
//! 7880 section 7.2.2): each answer is matched to its probe, and one that was replayed or never asked for changes nothing.

mod loss;
mod rtt;
mod session;
mod window;

use std::{fmt, num::NonZeroU32, str::FromStr, time::Duration};

pub use session::{Session, Timing};

use crate::clock::Monotonic;

/// How likely a run of unanswered probes may be by chance alone, at the loss measured so far, to be told as a loss of the path. A session
/// sends some 100,000 probes an hour: one false alarm in ten thousand hours.
pub const FALSE_ALARM: f64 = 1e-9;

/// A discriminator (RFC 5880 section 6.3): names a reflector or a session on its node. Never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Discriminator(NonZeroU32);

impl Discriminator {
    /// `None` for 0, which RFC 5880 reserves.
    #[must_use]
    pub fn new(value: u32) -> Option<Self> {
        NonZeroU32::new(value).map(Self)
    }

    /// As it stands in packets.
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
    /// How many bits of *Desired Min TX Interval* it takes.
    pub const BITS: u32 = 10;
    const MASK: u32 = (1 << Self::BITS) - 1;

    /// The number in the low bits of a *Desired Min TX Interval*, or of any other number.
    #[must_use]
    pub const fn from_low_bits(value: u32) -> Self {
        Self((value & Self::MASK) as u16)
    }

    /// As it stands in stamps.
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
        later.0.wrapping_sub(self.0) & Self::MASK as u16
    }
}

/// The state in a packet (RFC 5880 section 4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireState {
    /// Switched off by an operator.
    AdminDown = 0,
    /// Not up.
    Down = 1,
    /// Only of classic BFD.
    Init = 2,
    /// Up.
    Up = 3,
}

impl WireState {
    /// From the two bits of a packet; higher bits are ignored.
    #[must_use]
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::AdminDown,
            1 => Self::Down,
            2 => Self::Init,
            _ => Self::Up,
        }
    }
}

/// The diagnostic in a packet (RFC 5880 section 4.1): why the session went down last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Diag(pub u8);

impl Diag {
    /// Nothing to say.
    pub const NONE: Self = Self(0);
    /// The sender's own probes stayed unanswered.
    pub const DETECTION_TIME_EXPIRED: Self = Self(1);
}

/// What the session says of the way to the peer and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
    /// As the session's own probes say it: the initiator's machine knows Down and Up only (RFC 7880 section 7.3.1).
    #[must_use]
    pub const fn on_wire(self) -> WireState {
        match self {
            Self::Up => WireState::Up,
            Self::Unknown | Self::Down | Self::AdminDown => WireState::Down,
        }
    }

    /// The diagnostic that goes with it.
    #[must_use]
    pub const fn diag(self) -> Diag {
        match self {
            Self::Down => Diag::DETECTION_TIME_EXPIRED,
            Self::Unknown | Self::Up | Self::AdminDown => Diag::NONE,
        }
    }
}

/// A probe to send now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// Its number.
    pub seq: Seq,
    /// The state to say.
    pub state: WireState,
    /// The diagnostic to say.
    pub diag: Diag,
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
        (interval & !Seq::MASK) | u32::from(self.seq.get())
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
    /// The state in it: a reflector says Up or AdminDown.
    pub state: WireState,
    /// How far apart the reflector wants probes to be (*Required Min RX Interval*); zero is no limit.
    pub required_min_rx: Duration,
}

/// A probe of the peer's own session, as our reflector saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerProbe {
    /// When the last one came in.
    pub at: Monotonic,
    /// The state in it.
    pub state: WireState,
    /// The diagnostic in it.
    pub diag: Diag,
}

/// What became of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepted {
    /// It answers a probe of ours for the first time.
    Yes,
    /// No probe of this number waits for an answer: replayed, never sent, or long ago. It changes nothing.
    Stale,
}

/// Why the session wants to be woken.
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
#[derive(Debug, Clone, Copy, PartialEq)]
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
        silence: Duration,
    },
    /// The peer's reflector says that it is switched off.
    AdminDown,
    /// Probes were handed to the kernel, and none left the management link.
    NothingLeft {
        /// How many in a row.
        probes: u32,
    },
}

/// News of a session.
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

/// Where a proof that was asked for stands ([`Session::prove`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// Probes are under way.
    Pending,
    /// The path is up.
    Reached,
    /// The peer's reflector says that it is switched off.
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
    /// The share of probes without answer, 0 to 1.
    #[must_use]
    pub fn loss(&self) -> f64 {
        if self.probes == 0 {
            return 0.0;
        }
        1.0 - f64::from(self.answers.min(self.probes)) / f64::from(self.probes)
    }
}

/// A session as it stands.
#[derive(Debug, Clone, Copy, PartialEq)]
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
    pub rto: Duration,
    /// The last of the peer's own probes.
    pub peer: Option<PeerProbe>,
    /// How far apart the peer's own probes are.
    pub peer_gap: Duration,
    /// The largest inner IP packet that the path is known to carry, bytes.
    pub path_mtu: Option<u16>,
}
