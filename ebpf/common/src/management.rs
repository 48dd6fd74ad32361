//! The management link of a node: what its sessions hold, and what is decided about each packet there.
//!
//! The same code runs in two places. In the kernel, at the link's hooks, the memory is that of maps that user space sees as
//! its own (every field is a [`Shared`], so both may touch it at any time). Without BPF rights, the prober's thread runs it on memory of its own.
//!
//! Counters are loaded and stored, not added to in one step, which Rust does not have for BPF. The packets of one peer in one
//! direction are one flow, which one processor works on; where it moves to another, a count may get lost.
//!
//! What leaves is stamped ([`egress`]); an answer is matched to the stamp of its probe and a probe is reflected ([`ingress`]).
//! Only a peer with a session gets anything back, at most [`PROBES_PER_SECOND`], and never more bytes than it sent.
//!
//! A probe of the peer's is evidence of the way in only if its number has advanced, by no more than probes get lost in a row ([`AHEAD`]).
//! One that was replayed is answered, for an answer proves nothing to us, but out of a budget of its own, so that it takes no answer away
//! from the peer; so is one of a foreign initiator that numbers none. A peer has a session for each way that it knows to us, and each
//! counts on its own, so numbers are kept by the session's discriminator. One that starts anew, or is heard again after a longer loss,
//! goes on at any number: [`ADVANCING`] probes that advance from one to the next are believed to be such a start, whatever comes between
//! them, so that no recording that is shorter ever is one. A longer one that advances is not told from the peer, nor is one of
//! [`AHEAD`] probes that comes when the numbers have just come round again, as nothing is whose sender has no key.

mod packed;

use self::packed::Numbered;
pub use self::packed::Said;
use crate::{
    Address, Reason, Shared,
    sbfd::{
        Control, Flags, Reflector, SEQUENCE_MASK, State,
        frame::{Packet, Role},
    },
};

/// Peers that one node can watch.
pub const MAX_SESSIONS: u32 = 1_024;

/// Stamps that a session keeps: its last probes. A divisor of the sequence numbers, so that each has one place.
pub const STAMPS: usize = 128;

/// Probes a second that a reflector answers to one peer, lastingly. A healthy session sends 20, one in suspicion 100 to 200.
pub const PROBES_PER_SECOND: u64 = 400;

/// Probes that may come at once: those of a preflight and of a node that catches up.
pub const PROBES_AT_ONCE: u64 = 100;

/// Steps by which the numbers of a session advance until it is believed to have begun at another number. A prober of ours takes them
/// within a second, or where it has been down for long, within 16.
pub const ADVANCING: u64 = 16;

/// How far a number may be ahead of the one before. Those between were lost: at [`PROBES_PER_SECOND`] in 160 ms, within which a loss is
/// told, and at the usual 20 a second in 3.2 s, so that whoever lost more has been down since. The numbers come round in 51 s at that
/// pace: of what was recorded at any time before, one sixteenth is ahead by so much, and the rest is old.
pub const AHEAD: u32 = 64;

/// Sessions of one peer whose numbers are kept: it has one for each of our addresses, ports and VNIs that it was told.
pub const NUMBERED: usize = 4;

/// Time between two probes at the lasting rate, nanoseconds.
const PROBE_NS: u64 = 1_000_000_000 / PROBES_PER_SECOND;

/// What a reflector says it takes (*Required Min RX Interval*), microseconds: below the 3 ms between two probes of the deepest suspicion.
pub const REQUIRED_MIN_RX_US: u32 = (PROBE_NS / 1_000) as u32;

/// Value of NODE: what the reflector must know. Zero in [`Self::discriminator`]: it answers nobody.
#[repr(C)]
#[derive(Debug, Default)]
pub struct NodeState {
    /// The reflector's discriminator, drawn once and kept across restarts.
    pub discriminator: Shared,
    /// A [`State`] as its number: Up or AdminDown.
    pub state: Shared,
    /// The interface indexes of the probe links, of IPv4 and of IPv6: answers that the prober waits for go there. 0: there is none.
    pub links: [Shared; 2],
}

/// What became of one probe.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Stamp {
    /// When it left, CLOCK_MONOTONIC, nanoseconds; 0 = it did not.
    pub sent_ns: Shared,
    /// When its answer came, likewise; 0 = none did.
    pub answered_ns: Shared,
    /// Its sequence number as on the wire.
    pub sequence: Shared,
    /// What the answer said: see [`Said`].
    pub answer: Shared,
}

/// How far one of a peer's sessions has come.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Reached {
    /// The discriminator of the session, its last number, and by how many steps it advanced to it (`Numbered`); 0: none.
    pub number: Shared,
    /// When that came.
    pub at_ns: Shared,
}

/// Value of SESSIONS: one peer. User space writes the first part and clears the rest before it enters the session into
/// SESSION_INDEX; from then on the programs write the rest.
#[repr(C)]
#[derive(Debug)]
pub struct Session {
    /// Our discriminator of this session: *My Discriminator* of our probes.
    pub local_discriminator: Shared,
    /// The peer's reflector's discriminator. 0: the slot is free.
    pub peer_discriminator: Shared,
    /// The peer's address, to which probes are sent and from which answers must come, as [`words`] has it.
    pub peer_address: [Shared; 2],
    /// UDP source port of our probes.
    pub source_port: Shared,
    /// Not 0: user space waits for answers, so they are handed on to its socket; else they end at the hook.
    pub wake: Shared,

    /// Our probes that left.
    pub sent: Shared,
    /// When the last one left.
    pub last_sent_ns: Shared,
    /// Answers to them.
    pub answered: Shared,
    /// When the last one came.
    pub last_answer_ns: Shared,
    /// Round trip of the last one.
    pub last_round_trip_ns: Shared,
    /// What the last one said: see [`Said`].
    pub answer: Shared,

    /// The peer's own probes.
    pub probes: Shared,
    /// When the last one came whose number had advanced.
    pub last_probe_ns: Shared,
    /// What that one said of the peer's session to us: see [`Said`].
    pub probe: Shared,
    /// Those whose number had not and that were answered: replayed, overtaken, or not numbered.
    pub stale_probes: Shared,
    /// When the last one that was answered came.
    pub reflected_ns: Shared,
    /// Answers that we gave.
    pub reflected: Shared,
    /// Bytes of their frames.
    pub reflected_bytes: Shared,
    /// How long the last one took, from the start of the program to its end.
    pub last_reflection_ns: Shared,
    /// Probes of the peer that came too fast.
    pub rate_limited: Shared,
    /// When the peer's next probe is due at the lasting rate (GCRA).
    pub next_probe_ns: Shared,
    /// Likewise the next one whose number has not advanced.
    pub next_stale_ns: Shared,
    /// All frames that came from the peer's Ethernet address, whatever became of them.
    pub arrived: Shared,
    /// The peer's sessions that are believed, no two of one discriminator.
    pub heard: [Reached; NUMBERED],
    /// What may be the start of one, by where it is: two that are further apart than [`AHEAD`] are two.
    pub begun: [Reached; NUMBERED],

    /// Our last probes, by sequence number.
    pub stamps: [Stamp; STAMPS],
}

impl Default for Session {
    fn default() -> Self {
        Self {
            local_discriminator: Shared::default(),
            peer_discriminator: Shared::default(),
            peer_address: Default::default(),
            source_port: Shared::default(),
            wake: Shared::default(),
            sent: Shared::default(),
            last_sent_ns: Shared::default(),
            answered: Shared::default(),
            last_answer_ns: Shared::default(),
            last_round_trip_ns: Shared::default(),
            answer: Shared::default(),
            probes: Shared::default(),
            last_probe_ns: Shared::default(),
            probe: Shared::default(),
            stale_probes: Shared::default(),
            reflected_ns: Shared::default(),
            reflected: Shared::default(),
            reflected_bytes: Shared::default(),
            last_reflection_ns: Shared::default(),
            rate_limited: Shared::default(),
            next_probe_ns: Shared::default(),
            next_stale_ns: Shared::default(),
            arrived: Shared::default(),
            heard: Default::default(),
            begun: Default::default(),
            stamps: core::array::from_fn(|_| Stamp::default()),
        }
    }
}

// A struct is free of padding exactly when it is as large as its fields together.
const _: () = {
    assert!(size_of::<NodeState>() == 4 * 8);
    assert!(size_of::<Stamp>() == 4 * 8);
    assert!(size_of::<Reached>() == 2 * 8);
    assert!(
        size_of::<Session>()
            == 24 * 8 + 2 * NUMBERED * size_of::<Reached>() + STAMPS * size_of::<Stamp>()
    );
    assert!((SEQUENCE_MASK as usize + 1).is_multiple_of(STAMPS));
};

/// An address as [`Session::peer_address`] holds it.
#[inline(always)]
#[must_use]
pub const fn words(address: &Address) -> [u64; 2] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *address;
    [
        u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
        u64::from_ne_bytes([i, j, k, l, m, n, o, p]),
    ]
}

impl Session {
    /// The place of the probe with this sequence number.
    #[inline(always)]
    #[must_use]
    pub fn stamp(&self, sequence: u32) -> &Stamp {
        &self.stamps[sequence as usize % STAMPS]
    }

    /// Forgets everything: first who the peer is, so that no program takes what follows for its session.
    pub fn clear(&self) {
        for field in [
            &self.peer_discriminator,
            &self.local_discriminator,
            &self.peer_address[0],
            &self.peer_address[1],
            &self.source_port,
            &self.wake,
            &self.sent,
            &self.last_sent_ns,
            &self.answered,
            &self.last_answer_ns,
            &self.last_round_trip_ns,
            &self.answer,
            &self.probes,
            &self.last_probe_ns,
            &self.probe,
            &self.stale_probes,
            &self.reflected_ns,
            &self.reflected,
            &self.reflected_bytes,
            &self.last_reflection_ns,
            &self.rate_limited,
            &self.next_probe_ns,
            &self.next_stale_ns,
            &self.arrived,
        ] {
            field.store(0);
        }
        for reached in self.heard.iter().chain(&self.begun) {
            reached.number.store(0);
            reached.at_ns.store(0);
        }
        for stamp in &self.stamps {
            for field in [
                &stamp.sent_ns,
                &stamp.answered_ns,
                &stamp.sequence,
                &stamp.answer,
            ] {
                field.store(0);
            }
        }
    }

    /// Before a probe is sent: its place no longer tells of an earlier one.
    pub fn expect(&self, sequence: u32) {
        let stamp = self.stamp(sequence);
        stamp.sent_ns.store(0);
        stamp.answered_ns.store(0);
    }

    /// A probe left.
    #[inline(always)]
    fn stamp_sent(&self, control: &Control, now_ns: u64) {
        let sequence = control.sequence();
        let stamp = self.stamp(sequence);
        stamp.answered_ns.store(0);
        stamp.answer.store(0);
        stamp.sequence.store(u64::from(sequence));
        stamp.sent_ns.store(now_ns);
        self.sent.add(1);
        self.last_sent_ns.store(now_ns);
    }

    /// An answer came: believed once, and only for a probe that left.
    #[inline(always)]
    fn stamp_answered(&self, control: &Control, now_ns: u64) -> Result<(), Reason> {
        let stamp = self.stamp(control.sequence());
        let sent_ns = stamp.sent_ns.load();
        let fresh = sent_ns != 0
            && stamp.sequence.load() == u64::from(control.sequence())
            && stamp.answered_ns.load() == 0;
        if !fresh {
            return Err(Reason::SbfdStale);
        }
        let said = Said::pack(control);
        stamp.answer.store(said);
        self.answer.store(said);
        stamp.answered_ns.store(now_ns);
        self.answered.add(1);
        self.last_answer_ns.store(now_ns);
        self.last_round_trip_ns.store(now_ns.wrapping_sub(sent_ns));
        Ok(())
    }

    /// A probe of the peer's came; whether it is a new one, and so evidence.
    #[inline(always)]
    fn note_probe(&self, control: &Control, now_ns: u64) -> Result<bool, Reason> {
        self.probes.add(1);
        let number = Numbered::of(control);
        let is_new = self.is_new(number);
        let budget = if is_new {
            &self.next_probe_ns
        } else {
            // Whether it is answered or not: what is replayed takes the answers away from who begins anew, but not the start.
            self.note_start(number, now_ns);
            &self.next_stale_ns
        };
        if !within_rate(budget, now_ns) {
            self.rate_limited.add(1);
            return Err(Reason::SbfdRateLimited);
        }
        if is_new {
            self.believe(number, now_ns);
            self.probe.store(Said::pack(control));
            self.last_probe_ns.store(now_ns);
        } else {
            self.stale_probes.add(1);
        }
        Ok(is_new)
    }

    /// Whether a session that is believed has advanced to this number, or none is believed yet.
    #[inline(always)]
    fn is_new(&self, number: Numbered) -> bool {
        let mut is_first = true;
        for reached in &self.heard {
            let last = Numbered(reached.number.load());
            if number.follows(last) {
                return true;
            }
            is_first &= last.0 == 0;
        }
        is_first
    }

    /// Its session has come so far, and is believed; the one that was not heard for longest gives way.
    #[inline(always)]
    fn believe(&self, number: Numbered, now_ns: u64) {
        let mut place = &self.heard[0];
        let mut oldest = u64::MAX;
        for reached in &self.heard {
            if Numbered(reached.number.load()).is_of_session(number) {
                place = reached;
                break;
            }
            let at_ns = reached.at_ns.load();
            if at_ns < oldest {
                oldest = at_ns;
                place = reached;
            }
        }
        place.number.store(number.0);
        place.at_ns.store(now_ns);
    }

    /// A number to which no session that is believed has advanced: one may have begun there.
    #[inline(always)]
    fn note_start(&self, number: Numbered, now_ns: u64) {
        let mut place = &self.begun[0];
        let mut oldest = u64::MAX;
        let mut run = 0;
        for reached in &self.begun {
            let last = Numbered(reached.number.load());
            if number.follows(last) {
                run = last.run() + 1;
                place = reached;
                break;
            }
            if number.is_covered_by(last) {
                return;
            }
            let at_ns = reached.at_ns.load();
            if at_ns < oldest {
                oldest = at_ns;
                place = reached;
            }
        }
        if run < ADVANCING {
            place.number.store(number.with_run(run).0);
            place.at_ns.store(now_ns);
        } else {
            // Not evidence yet: the next one is.
            place.number.store(0);
            place.at_ns.store(0);
            self.believe(number, now_ns);
        }
    }

    /// The number of the last probe that left; `None`: none did.
    #[must_use]
    pub fn last_sequence(&self) -> Option<u32> {
        let last = self
            .stamps
            .iter()
            .max_by_key(|stamp| stamp.sent_ns.load())?;
        (last.sent_ns.load() != 0).then(|| last.sequence.load() as u32)
    }
}

/// Whether one more packet may have an answer now (GCRA, ITU-T I.371). Two processors at once may let through one more.
#[inline(always)]
fn within_rate(next_ns: &Shared, now_ns: u64) -> bool {
    let due = next_ns.load();
    if due > now_ns.saturating_add((PROBES_AT_ONCE - 1) * PROBE_NS) {
        return false;
    }
    let from = if due > now_ns { due } else { now_ns };
    next_ns.store(from.wrapping_add(PROBE_NS));
    true
}

/// What the hooks know: the maps.
pub trait Node {
    /// The reflector.
    fn state(&self) -> Option<&NodeState>;
    /// The session with the peer that has this Ethernet address ([`crate::sbfd::frame::session_key`]).
    fn session(&self, mac: u64) -> Option<&Session>;
}

/// What happens to a packet that came in on the management link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A probe: to be turned into its answer and sent back.
    Reflect {
        /// What to say.
        reflector: Reflector,
        /// Whether it is evidence: its number has advanced. Else it is to be counted as [`Reason::SbfdReplayed`].
        is_new: bool,
    },
    /// An answer to one of our probes, noted. `wake`: somebody waits for it.
    Answered {
        /// Whether it is handed on to the prober's socket.
        wake: bool,
    },
}

/// Decides on a packet that came in; `None` as a packet is a frame that is no S-BFD. `flags` are those that this reflector sets
/// in its answers.
///
/// # Errors
///
/// Why it is dropped and counted.
#[inline(always)]
pub fn ingress<N: Node + ?Sized>(
    packet: Option<&Packet>,
    length: u32,
    flags: Flags,
    now_ns: u64,
    node: &N,
) -> Result<Verdict, Reason> {
    let packet = packet.ok_or(Reason::SbfdMalformed)?;
    let control = &packet.control;
    let session = node.session(packet.sender);
    // Also what is then dropped: had it not been counted here, it would look as if this node's firewall had it.
    if let Some(session) = session {
        session.arrived.add(1);
    }
    let own = node.state().ok_or(Reason::SbfdUnknownDiscriminator)?;
    let discriminator = own.discriminator.load();
    if packet.role == Role::Initiator
        && (u64::from(control.your_discriminator) != discriminator || discriminator == 0)
    {
        return Err(Reason::SbfdUnknownDiscriminator);
    }
    let session = session.ok_or(Reason::SbfdUnknownPeer)?;
    match packet.role {
        Role::Initiator => {
            let is_new = session.note_probe(control, now_ns)?;
            session.reflected_ns.store(now_ns);
            session.reflected.add(1);
            session.reflected_bytes.add(u64::from(length));
            let reflector = Reflector {
                state: State::from_bits(own.state.load() as u8),
                flags,
                required_min_rx_us: REQUIRED_MIN_RX_US,
            };
            Ok(Verdict::Reflect { reflector, is_new })
        }
        Role::Reflector => {
            let ours = u64::from(control.your_discriminator) == session.local_discriminator.load()
                && u64::from(control.my_discriminator) == session.peer_discriminator.load()
                && u64::from(packet.initiator_port) == session.source_port.load();
            if !ours {
                return Err(Reason::SbfdUnknownDiscriminator);
            }
            let [high, low] = words(&packet.source);
            if session.peer_address[0].load() != high || session.peer_address[1].load() != low {
                return Err(Reason::SbfdWrongSource);
            }
            session.stamp_answered(control, now_ns)?;
            Ok(Verdict::Answered {
                wake: session.wake.load() != 0,
            })
        }
    }
}

/// Notes a probe that goes out; false: it is none of ours, and must not leave. What the kernel itself says on each link (IPv6
/// group memberships) ends so.
#[inline(always)]
pub fn egress<N: Node + ?Sized>(packet: Option<&Packet>, now_ns: u64, node: &N) -> bool {
    let Some(packet) = packet else {
        return false;
    };
    match node.session(packet.receiver) {
        Some(session)
            if packet.role == Role::Initiator
                && u64::from(packet.control.my_discriminator)
                    == session.local_discriminator.load() =>
        {
            session.stamp_sent(&packet.control, now_ns);
            true
        }
        _ => false,
    }
}

/// Notes that the answer to a probe goes out to `receiver`, who sent it.
#[inline(always)]
pub fn reflected<N: Node + ?Sized>(receiver: u64, now_ns: u64, node: &N) {
    if let Some(session) = node.session(receiver) {
        let took = now_ns.saturating_sub(session.reflected_ns.load());
        session.last_reflection_ns.store(took);
    }
}
