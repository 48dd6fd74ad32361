//! The session of one path in the prober's thread: the machine of core, and its frames and stamps.

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

use super::{Event, Report, preflight::PeerCell, request::Request, surroundings::Surroundings};
use crate::bpf::{Slot, address, ip_addr};

/// How often the stages of a session that is up are noted. They are compared with later ones when it is not up any more, and more
/// packets must get lost until the verdict than passed between the note and the fault; both sides then send ten times as many.
const NOTE_STAGES: Duration = Duration::from_millis(100);

/// A path to be probed.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) spec: PathId,
    /// The slot of its session by an earlier agent.
    pub(super) slot: Option<u32>,
    /// The destination Ethernet address of our probes.
    pub(super) mac: [u8; 6],
    /// Whether this is the answer path of its node: the node's own probes are counted and answered here.
    pub(super) is_answer_path: bool,
    /// Our address of tunnels to the peer.
    pub(super) source: IpAddr,
    /// The underlay's counters of the peer's address and our probe VNI.
    pub(super) counters: Slot,
    /// Whether these count packets to the peer, too: they have the peer's probe VNI, which may differ from ours.
    pub(super) counts_out: bool,
    pub(super) cell: Arc<PeerCell>,
}

impl Entry {
    /// The index of the session by the source of the peer's answers.
    pub(super) fn key(&self) -> u64 {
        session_key(self.spec.address.is_ipv4(), self.mac)
    }
}

/// A probe without answer so far.
#[derive(Debug, Clone, Copy)]
struct Outstanding {
    seq: Seq,
    /// Its egress stamp was seen.
    left: bool,
}

/// A path that is probed.
pub(super) struct PeerSession {
    pub(super) entry: Entry,
    pub(super) slot: u32,
    probe: Probe,
    machine: sbfd::Session,
    outstanding: VecDeque<Outstanding>,
    proofs: Vec<oneshot::Sender<Proof>>,
    /// The stamp of the last of the peer's own probes that the machine got.
    peer_probe_ns: u64,
    stages_when_up: Stages,
    card: Card,
    noted: Monotonic,
    /// Another path has this address.
    shares_card: bool,
    /// Since the stages were noted, the card counted packets of this path only.
    owns_card: bool,
    /// Since the stages were noted, this was the answer path of its node.
    owns_probes: bool,
    /// There are other paths to its node.
    has_siblings: bool,
    /// When its next turn is.
    pub(super) due: Monotonic,
}

/// What identifies a session on the wire.
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
    /// Clears the session's memory and writes these and the path into it.
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

    /// Those in the session's memory, if it is of the same path.
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
        let owns_probes = entry.is_answer_path;
        Self {
            entry,
            slot,
            probe,
            machine: sbfd::Session::new(timing, first, now),
            outstanding: VecDeque::with_capacity(STAMPS),
            proofs: Vec::new(),
            peer_probe_ns: 0,
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

    /// Sets the destination Ethernet address of the probes.
    pub(super) const fn rename(&mut self, mac: [u8; 6]) {
        self.entry.mac = mac;
        self.probe.receiver = mac;
    }

    /// Makes this the answer path of its node, or not any more.
    pub(super) const fn set_answer_path(&mut self, is_answer_path: bool) {
        self.entry.is_answer_path = is_answer_path;
        self.owns_probes &= is_answer_path;
    }

    pub(super) const fn note_siblings(&mut self, has_siblings: bool) {
        self.has_siblings = has_siblings;
    }

    pub(super) const fn share_card(&mut self, shares: bool) {
        self.shares_card = shares;
        self.owns_card &= !shares;
    }

    /// Takes the present counts as the beginning: the session's memory is new, the card's counters may not be.
    pub(super) fn begin(&mut self, around: &Surroundings<'_>) {
        self.stages_when_up = self.counts(around);
        self.card.compare_from(self.stages_when_up);
    }

    /// Takes the result of a check of routes and hooks.
    pub(super) fn handle_look(&mut self, found: Look, around: &Surroundings<'_>) {
        let now = self.counts(around);
        self.card.handle_look(found, &now, &mut self.stages_when_up);
    }

    /// Begins a proof.
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
        // Before anything is sent: an answer may arrive at once.
        self.set_wake(session, now);
        self.transmit(now, session, around);
        while let Some(change) = self.machine.poll_change() {
            self.send_change(change, now, around);
        }
        let snapshot = self.machine.snapshot(now);
        // Before the proofs are answered: their callers read it.
        let standing = self.entry.cell.standing();
        self.entry.cell.note(&snapshot, is_overdue(&snapshot, now));
        if standing != self.entry.cell.standing()
            && (self.has_siblings || !self.entry.is_answer_path)
        {
            // Without the other thread there is nothing to choose.
            let _ = around.requests.send(Request::Choose(self.entry.spec));
        }
        let proof = self.machine.proof();
        if proof != Proof::Pending {
            for reply in self.proofs.drain(..) {
                // The caller may have given up.
                let _ = reply.send(proof);
            }
        }
        self.set_wake(session, now);
        self.due = self.machine.poll_deadline().at;
    }

    /// Notes the stages while the path is good, and requests a check of the hooks where their counts differ.
    fn watch_stages(&mut self, now: Monotonic, around: &Surroundings<'_>) {
        let snapshot = self.machine.snapshot(now);
        let is_well = snapshot.state == State::Up && !is_overdue(&snapshot, now);
        if is_well && now.since(self.noted) < NOTE_STAGES {
            return;
        }
        if is_well {
            self.owns_card = !self.shares_card;
            self.owns_probes = self.entry.is_answer_path;
        }
        let counts = self.counts(around);
        if is_well {
            self.card.note_up(&counts, snapshot.silent_since.is_none());
            self.stages_when_up = counts;
            self.noted = now;
        }
        let since_up = counts.since(&self.stages_when_up);
        if self.card.poll_look(&since_up, now) {
            // Without the other thread there is no check.
            let _ = around.requests.send(Request::Check(self.entry.spec));
        }
    }

    /// Lets answers wake the thread while a proof waits or the path is not up. Otherwise the next deadline is soon enough.
    fn set_wake(&self, session: &Session, now: Monotonic) {
        let up = self.machine.snapshot(now).state == State::Up;
        let wake = !up || !self.proofs.is_empty();
        session.wake.store(wake.into());
    }

    fn read_stamps(&mut self, session: &Session) {
        let machine = &mut self.machine;
        self.outstanding
            .retain_mut(|probe| !read_stamp(probe, session, machine));
        let peer_probe_ns = session.last_probe_ns.load();
        if peer_probe_ns != self.peer_probe_ns
            && let Some(said) = Said::unpack(session.probe.load())
        {
            self.peer_probe_ns = peer_probe_ns;
            self.machine.handle_peer_probe(PeerProbe {
                at: Monotonic::from_nanos(peer_probe_ns),
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

    fn send_change(&mut self, change: Change, now: Monotonic, around: &Surroundings<'_>) {
        let report = Box::new(self.report(now, around));
        // Without a receiver there is nothing to report.
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
            peer_probes_elsewhere: !self.entry.is_answer_path,
        }
    }

    /// The counts of the stages that can be trusted.
    fn stages(&self, around: &Surroundings<'_>) -> Stages {
        let counts = self.counts(around);
        self.card
            .trusted(&counts, &counts.since(&self.stages_when_up))
    }

    fn counts(&self, around: &Surroundings<'_>) -> Stages {
        let session = around.sessions.slot(self.slot);
        let counters = self.owns_card.then_some(self.entry.counters);
        let underlay = counters.and_then(|slot| around.underlay(slot));
        Stages {
            link_out: session.sent.load() + session.reflected.load(),
            card_out: underlay
                .filter(|_| self.entry.counts_out)
                .map(|counters| counters.sent.packets),
            // The card counts the node's own probes by their source, the link on the answer path.
            card_in: underlay
                .filter(|_| self.owns_probes)
                .map(|counters| counters.received.packets),
            link_in: session.arrived.load(),
        }
    }
}

/// Whether an answer is overdue.
fn is_overdue(snapshot: &Snapshot, now: Monotonic) -> bool {
    let silence = snapshot.silent_since.map(|since| now.since(since));
    silence.is_some_and(|silence| silence > snapshot.rto)
}

/// Passes the stamp of a probe to the machine; true when the probe is complete.
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
    // Not an answer of a reflector: as if it had not arrived.
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
