//! One peer, as the prober's thread has it: its machine, and what ties that to frames and stamps.

use std::{collections::VecDeque, net::IpAddr, sync::Arc, time::Duration};

use nsm_core::{
    clock::Monotonic,
    liveness::{
        Card, Look, PathId, Stages,
        sbfd::{self, Answer, Change, PeerProbe, Proof, Seq, Snapshot, State, Timing},
    },
};
use nsm_ebpf_common::{
    management::{STAMPS, Said, Session, words},
    sbfd::{
        Control, DETECT_MULTIPLIER, Flags, State as WireState,
        frame::{Probe, SPEAKER, mac, session_key},
    },
};
use tokio::sync::oneshot;

use super::{Event, Report, peers::Request, preflight::PeerCell, surroundings::Surroundings};
use crate::bpf::{Slot, address, ip_addr};

/// How often the stages of a session that is up are noted, for comparison when it no longer is. Often enough that a fault lets more
/// packets get lost until it is told than passed between the note and the fault: both sides then send ten times as many.
const NOTE_STAGES: Duration = Duration::from_millis(100);

/// A peer to be probed.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) spec: PathId,
    /// Where an earlier agent's session with it is.
    pub(super) slot: Option<u32>,
    /// The peer's Ethernet address here.
    pub(super) mac: [u8; 6],
    /// Whether the probes of its node are booked to its session, too: with several ways to a node, they are to that of one.
    pub(super) speaks: bool,
    /// Our end of tunnels to it.
    pub(super) source: IpAddr,
    /// Where the underlay counts the management VNI of this peer.
    pub(super) counters: Option<Slot>,
    /// Whether what goes to the peer is counted there, too: it has the peer's management VNI, which may be another than ours.
    pub(super) counts_out: bool,
    pub(super) cell: Arc<PeerCell>,
}

impl Entry {
    /// What the peer's answers are known by.
    pub(super) fn key(&self) -> u64 {
        session_key(self.spec.address.is_ipv4(), self.mac)
    }
}

/// A probe whose answer has not come.
#[derive(Debug, Clone, Copy)]
struct Outstanding {
    seq: Seq,
    /// Its egress stamp was seen.
    left: bool,
}

/// A peer that is probed.
pub(super) struct PeerSession {
    pub(super) entry: Entry,
    pub(super) slot: u32,
    probe: Probe,
    machine: sbfd::Session,
    outstanding: VecDeque<Outstanding>,
    proofs: Vec<oneshot::Sender<Proof>>,
    /// Stamp of the peer's own probe that the machine heard of last.
    heard_ns: u64,
    stages_when_up: Stages,
    card: Card,
    noted: Monotonic,
    /// Another peer has this one's address.
    shares_card: bool,
    /// What the card counts since the stages were noted is of this peer alone.
    owns_card: bool,
    /// The probes of its node were booked here since the stages were noted.
    owns_probes: bool,
    /// There are other ways to its node.
    has_siblings: bool,
    /// When to look at it next.
    pub(super) due: Monotonic,
}

/// What a session is told apart by on the wire.
#[derive(Debug, Clone, Copy)]
pub(super) struct Names {
    /// This node's reflector discriminator.
    pub(super) node: u32,
    /// This session's own discriminator.
    pub(super) local: u32,
    /// The UDP source port of its probes.
    pub(super) source_port: u16,
}

impl Names {
    /// Writes them, and who the peer is, into the session's memory; of anybody else there before, nothing is left.
    pub(super) fn write(self, entry: &Entry, session: &Session) {
        session.clear();
        session.local_discriminator.store(self.local.into());
        session.source_port.store(self.source_port.into());
        let [high, low] = words(&address(entry.spec.address));
        session.peer_address[0].store(high);
        session.peer_address[1].store(low);
        session
            .peer_discriminator
            .store(entry.spec.reflector.discriminator.get().into());
    }

    /// Those that are there already, if they are of the same peer.
    pub(super) fn read(node: u32, entry: &Entry, session: &Session) -> Option<Self> {
        let same = session.peer_discriminator.load()
            == u64::from(entry.spec.reflector.discriminator.get())
            && peer_address(session) == entry.spec.address;
        let local = u32::try_from(session.local_discriminator.load()).ok()?;
        let source_port = u16::try_from(session.source_port.load()).ok()?;
        same.then_some(Self {
            node,
            local,
            source_port,
        })
    }
}

/// The address in a session's memory.
pub(super) fn peer_address(session: &Session) -> IpAddr {
    let [high, low] = [0, 1].map(|word| session.peer_address[word].load().to_ne_bytes());
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&high);
    bytes[8..].copy_from_slice(&low);
    ip_addr(bytes)
}

impl PeerSession {
    pub(super) fn new(
        entry: Entry,
        slot: u32,
        names: Names,
        timing: Timing,
        first: Seq,
        now: Monotonic,
    ) -> Self {
        let control = Control {
            diagnostic: 0,
            state: WireState::Down,
            flags: Flags::DEMAND,
            detect_multiplier: DETECT_MULTIPLIER,
            my_discriminator: names.local,
            your_discriminator: entry.spec.reflector.discriminator.get(),
            desired_min_tx_us: 0,
            required_min_rx_us: 0,
            required_min_echo_rx_us: 0,
        };
        let probe = Probe {
            sender: mac(SPEAKER, names.node),
            receiver: entry.mac,
            source: address(entry.source),
            destination: address(entry.spec.address),
            source_port: names.source_port,
            control,
        };
        let owns_probes = entry.speaks;
        Self {
            entry,
            slot,
            probe,
            machine: sbfd::Session::new(timing, first, now),
            outstanding: VecDeque::with_capacity(STAMPS),
            proofs: Vec::new(),
            heard_ns: 0,
            stages_when_up: Stages::default(),
            card: Card::default(),
            noted: Monotonic::default(),
            shares_card: false,
            owns_card: true,
            owns_probes,
            has_siblings: false,
            due: now,
        }
    }

    pub(super) const fn is_v4(&self) -> bool {
        self.entry.spec.address.is_ipv4()
    }

    /// From now on probes go to this Ethernet address.
    pub(super) const fn rename(&mut self, mac: [u8; 6]) {
        self.entry.mac = mac;
        self.probe.receiver = mac;
    }

    /// From now on the probes of its node are booked here, or elsewhere.
    pub(super) const fn speak(&mut self, speaks: bool) {
        self.entry.speaks = speaks;
        self.owns_probes &= speaks;
    }

    pub(super) const fn note_siblings(&mut self, has_siblings: bool) {
        self.has_siblings = has_siblings;
    }

    pub(super) const fn share_card(&mut self, shares: bool) {
        self.shares_card = shares;
        self.owns_card &= !shares;
    }

    /// What was counted before says nothing of this session: its memory begins anew, that of the card may not.
    pub(super) fn begin(&mut self, around: &Surroundings<'_>) {
        self.stages_when_up = self.counts(around);
        self.card.compare_from(self.stages_when_up);
    }

    /// Somebody looked whether what the stages count can be believed.
    pub(super) fn handle_look(&mut self, found: Look, around: &Surroundings<'_>) {
        let now = self.counts(around);
        self.card.handle_look(found, &now, &mut self.stages_when_up);
    }

    /// Somebody wants to know whether the path is up.
    pub(super) fn prove(&mut self, reply: oneshot::Sender<Proof>, now: Monotonic) {
        self.machine.prove(now);
        self.proofs.push(reply);
        self.due = now;
    }

    pub(super) fn want_mtu(&mut self, smallest: u16, wanted: u16, now: Monotonic) {
        self.machine.want_mtu(smallest, wanted, now);
        self.due = now;
    }

    /// One turn of the machine, as [`nsm_core::liveness::sbfd`] has it; `now` was read before the stamps are.
    pub(super) fn turn(&mut self, now: Monotonic, around: &mut Surroundings<'_>) {
        let sessions = around.sessions;
        let session = sessions.slot(self.slot);
        self.read_stamps(session);
        self.machine.handle_deadline(now);
        self.watch_stages(now, around);
        // Before anything is sent: the answer may be there before the next line is.
        self.ask_to_be_woken(session, now);
        self.transmit(now, session, around);
        while let Some(change) = self.machine.poll_change() {
            self.tell(change, now, around);
        }
        let snapshot = self.machine.snapshot(now);
        // Before whoever waits is told: they look there.
        let standing = self.entry.cell.standing();
        self.entry.cell.note(&snapshot, is_overdue(&snapshot, now));
        if standing != self.entry.cell.standing() && (self.has_siblings || !self.entry.speaks) {
            // A thread that has ended chooses nothing.
            let _ = around.requests.send(Request::Choose(self.entry.spec));
        }
        let proof = self.machine.proof();
        if proof != Proof::Pending {
            for reply in self.proofs.drain(..) {
                // Whoever gave up asking needs no answer.
                let _ = reply.send(proof);
            }
        }
        self.ask_to_be_woken(session, now);
        self.due = self.machine.poll_deadline().at;
    }

    /// Notes the stages while all is well, and has somebody look at the hooks where they seem to say that it is not.
    fn watch_stages(&mut self, now: Monotonic, around: &Surroundings<'_>) {
        let snapshot = self.machine.snapshot(now);
        let is_well = snapshot.state == State::Up && !is_overdue(&snapshot, now);
        if is_well && now.since(self.noted) < NOTE_STAGES {
            return;
        }
        if is_well {
            self.owns_card = !self.shares_card;
            self.owns_probes = self.entry.speaks;
        }
        let counts = self.counts(around);
        if is_well {
            self.card.note_up(&counts, snapshot.silent_since.is_none());
            self.stages_when_up = counts;
            self.noted = now;
        }
        let since_up = counts.since(&self.stages_when_up);
        if self.card.poll_look(&since_up, now) {
            // A thread that has ended looks at nothing.
            let _ = around.requests.send(Request::Look(self.entry.spec));
        }
    }

    /// Answers wake the thread while somebody waits for one. When the path is up they are seen in time at the next deadline.
    fn ask_to_be_woken(&self, session: &Session, now: Monotonic) {
        let up = self.machine.snapshot(now).state == State::Up;
        let eager = !up || !self.proofs.is_empty();
        session.wake.store(eager.into());
    }

    fn read_stamps(&mut self, session: &Session) {
        let machine = &mut self.machine;
        self.outstanding
            .retain_mut(|probe| !read_stamp(probe, session, machine));
        let heard_ns = session.last_probe_ns.load();
        if heard_ns != self.heard_ns
            && let Some(said) = Said::unpack(session.probe.load())
        {
            self.heard_ns = heard_ns;
            self.machine.handle_peer_probe(PeerProbe {
                at: Monotonic::from_nanos(heard_ns),
                state: said.state,
                diagnostic: said.diagnostic,
            });
        }
    }

    fn transmit(&mut self, now: Monotonic, session: &Session, around: &mut Surroundings<'_>) {
        while let Some(probe) = self
            .machine
            .poll_transmit(now, &mut || around.jitter.unit())
        {
            self.probe.control.state = probe.state;
            self.probe.control.diagnostic = probe.diagnostic;
            self.probe.control.desired_min_tx_us = probe.desired_min_tx();
            let length = probe.padded_to.map_or(0, |size| 14 + usize::from(size));
            session.expect(probe.seq.get().into());
            if self.outstanding.len() == STAMPS {
                self.outstanding.pop_front();
            }
            let mut outstanding = Outstanding {
                seq: probe.seq,
                left: false,
            };
            let sent = around.send(&self.probe, length);
            if !sent || !read_stamp(&mut outstanding, session, &mut self.machine) {
                self.outstanding.push_back(outstanding);
            }
        }
    }

    fn tell(&mut self, change: Change, now: Monotonic, around: &Surroundings<'_>) {
        let report = Box::new(self.report(now, around));
        // Nobody listens: they can ask.
        let _ = around.events.send(Event::Session { change, report });
    }

    pub(super) fn report(&self, now: Monotonic, around: &Surroundings<'_>) -> Report {
        let session = around.sessions.slot(self.slot);
        let answer = Said::unpack(session.answer.load());
        Report {
            path: self.entry.spec,
            users: 0,
            snapshot: self.machine.snapshot(now),
            statistics: self.machine.statistics(),
            probes: session.sent.load(),
            answers: session.answered.load(),
            reflected: session.reflected.load(),
            reflection: Some(session.last_reflection_ns.load())
                .filter(|ns| *ns != 0)
                .map(Duration::from_nanos),
            peer_is_independent: answer.map(|said| said.control_plane_independent),
            stages: self.stages(around),
            stages_when_up: self.stages_when_up,
            peer_probes_elsewhere: !self.entry.speaks,
        }
    }

    /// What came to the stages, as far as it can be believed.
    fn stages(&self, around: &Surroundings<'_>) -> Stages {
        let counts = self.counts(around);
        self.card
            .trusted(&counts, &counts.since(&self.stages_when_up))
    }

    fn counts(&self, around: &Surroundings<'_>) -> Stages {
        let session = around.sessions.slot(self.slot);
        let counters = self.entry.counters.filter(|_| self.owns_card);
        let underlay = counters.and_then(|slot| around.underlay(slot));
        Stages {
            link_out: session.sent.load() + session.reflected.load(),
            card_out: underlay
                .filter(|_| self.entry.counts_out)
                .map(|counters| counters.tx_packets),
            // The card counts the node's probes where they come from, and the link where they are booked.
            card_in: underlay
                .filter(|_| self.owns_probes)
                .map(|counters| counters.rx_packets),
            link_in: session.arrived.load(),
        }
    }
}

/// Whether an answer should have come by now.
fn is_overdue(snapshot: &Snapshot, now: Monotonic) -> bool {
    let silence = snapshot.silent_since.map(|since| now.since(since));
    silence.is_some_and(|silence| silence > snapshot.rto)
}

/// Tells the machine what the stamp of a probe says; whether that is all there is to say.
fn read_stamp(probe: &mut Outstanding, session: &Session, machine: &mut sbfd::Session) -> bool {
    let stamp = session.stamp(probe.seq.get().into());
    let sent_ns = stamp.sent_ns.load();
    if sent_ns == 0 {
        return false;
    }
    if !probe.left {
        probe.left = true;
        machine.handle_left(probe.seq, Monotonic::from_nanos(sent_ns));
    }
    let answered_ns = stamp.answered_ns.load();
    if answered_ns == 0 {
        return false;
    }
    // Nothing that a reflector says: as if it had not come.
    let Some(said) = Said::unpack(stamp.answer.load()) else {
        return false;
    };
    machine.handle_answer(Answer {
        seq: probe.seq,
        round_trip: Duration::from_nanos(answered_ns.saturating_sub(sent_ns)),
        at: Monotonic::from_nanos(answered_ns),
        state: said.state,
        required_min_rx: Duration::from_micros(said.required_min_rx_us.into()),
    });
    true
}
