//! What is decided about each packet on the management link, on memory of the test's own.

use std::collections::HashMap;

use nsm_ebpf_common::{
    Reason,
    management::{
        self, ADVANCING, AHEAD, Node, NodeState, PROBES_AT_ONCE, PROBES_PER_SECOND,
        REQUIRED_MIN_RX_US, STAMPS, Said, Session, Verdict, words,
    },
    mapped,
    sbfd::{
        Control, Flags, SEQUENCE_MASK, State,
        frame::{Packet, Role, SPEAKER, mac, mac_key},
        interval_with_sequence,
    },
};

const NODE: u32 = 0x0a0b_0c0d;
const PEER: u32 = 0x1020_3040;
const LOCAL: u32 = 77;
const PORT: u16 = 50_000;
const PEER_ADDRESS: [u8; 4] = [10, 2, 0, 1];
const MS: u64 = 1_000_000;

struct Memory {
    node: NodeState,
    sessions: HashMap<u64, Box<Session>>,
}

impl Node for Memory {
    fn state(&self) -> Option<&NodeState> {
        Some(&self.node)
    }

    fn session(&self, mac: u64) -> Option<&Session> {
        self.sessions.get(&mac).map(|session| &**session)
    }
}

impl Memory {
    /// Knows [`PEER`].
    fn new() -> Self {
        let node = NodeState::default();
        node.discriminator.store(NODE.into());
        node.state.store(State::Up.bits().into());
        let session = Box::<Session>::default();
        session.local_discriminator.store(LOCAL.into());
        session.peer_discriminator.store(PEER.into());
        session.source_port.store(PORT.into());
        let [high, low] = words(&mapped(PEER_ADDRESS));
        session.peer_address[0].store(high);
        session.peer_address[1].store(low);
        Self {
            node,
            sessions: HashMap::from([(mac_key(mac(SPEAKER, PEER)), session)]),
        }
    }

    fn session(&self) -> &Session {
        &self.sessions[&mac_key(mac(SPEAKER, PEER))]
    }

    fn ingress(&self, packet: &Packet, now_ns: u64) -> Result<Verdict, Reason> {
        management::ingress(Some(packet), 66, Flags::default(), now_ns, self)
    }

    fn send(&self, sequence: u32, now_ns: u64) {
        self.session().expect(sequence);
        assert!(management::egress(Some(&our_probe(sequence)), now_ns, self));
    }
}

fn control(sequence: u32) -> Control {
    Control {
        diagnostic: 0,
        state: State::Up,
        flags: Flags::default(),
        detect_multiplier: 3,
        my_discriminator: PEER,
        your_discriminator: LOCAL,
        desired_min_tx_us: interval_with_sequence(50_000, sequence),
        required_min_rx_us: 0,
        required_min_echo_rx_us: 0,
    }
}

fn our_probe(sequence: u32) -> Packet {
    Packet {
        role: Role::Initiator,
        sender: mac_key(mac(SPEAKER, NODE)),
        receiver: mac_key(mac(SPEAKER, PEER)),
        source: mapped([10, 1, 0, 1]),
        initiator_port: PORT,
        control: Control {
            flags: Flags::DEMAND,
            my_discriminator: LOCAL,
            your_discriminator: PEER,
            ..control(sequence)
        },
    }
}

fn answer(sequence: u32) -> Packet {
    Packet {
        role: Role::Reflector,
        sender: mac_key(mac(SPEAKER, PEER)),
        receiver: mac_key(mac(SPEAKER, NODE)),
        source: mapped(PEER_ADDRESS),
        initiator_port: PORT,
        control: control(sequence),
    }
}

fn peers_probe() -> Packet {
    numbered_probe(0)
}

fn numbered_probe(sequence: u32) -> Packet {
    Packet {
        role: Role::Initiator,
        initiator_port: 51_000,
        control: Control {
            flags: Flags::DEMAND,
            diagnostic: 1,
            state: State::Down,
            my_discriminator: 999,
            your_discriminator: NODE,
            ..control(sequence)
        },
        ..answer(sequence)
    }
}

#[test]
fn an_answer_is_believed_once() {
    let memory = Memory::new();
    let session = memory.session();
    assert_eq!(memory.ingress(&answer(5), MS), Err(Reason::SbfdStale));
    memory.send(5, 10 * MS);
    assert_eq!(session.stamp(5).sent_ns.load(), 10 * MS);
    let answered = Ok(Verdict::Answered { wake: false });
    assert_eq!(memory.ingress(&answer(5), 12 * MS), answered);
    assert_eq!(session.last_round_trip_ns.load(), 2 * MS);
    assert_eq!(session.stamp(5).answered_ns.load(), 12 * MS);
    assert_eq!(memory.ingress(&answer(5), 13 * MS), Err(Reason::SbfdStale));
    assert_eq!(
        session.stamp(5).answered_ns.load(),
        12 * MS,
        "the first counts"
    );
    assert_eq!((session.sent.load(), session.answered.load()), (1, 1));
    session.wake.store(1);
    memory.send(6, 14 * MS);
    let answered = Ok(Verdict::Answered { wake: true });
    assert_eq!(memory.ingress(&answer(6), 15 * MS), answered);
}

#[test]
fn the_number_of_another_probe_in_the_same_place_is_stale() {
    let memory = Memory::new();
    memory.send(5, MS);
    let other = 5 + STAMPS as u32;
    assert!(other <= SEQUENCE_MASK);
    assert_eq!(memory.ingress(&answer(other), MS), Err(Reason::SbfdStale));
    memory.send(other, 2 * MS);
    assert_eq!(
        memory.ingress(&answer(5), MS),
        Err(Reason::SbfdStale),
        "long ago"
    );
    // The number comes round, and what was answered then is not answered now.
    memory.ingress(&answer(other), 3 * MS).expect("answered");
    memory.session().expect(other);
    assert_eq!(
        memory.ingress(&answer(other), 4 * MS),
        Err(Reason::SbfdStale)
    );
}

#[test]
fn an_answer_must_be_of_the_session_in_all_it_says() {
    let memory = Memory::new();
    memory.send(1, MS);
    let refused = |change: fn(&mut Packet), reason| {
        let mut packet = answer(1);
        change(&mut packet);
        assert_eq!(memory.ingress(&packet, MS), Err(reason));
    };
    refused(|p| p.sender ^= 1, Reason::SbfdUnknownPeer);
    refused(
        |p| p.control.my_discriminator ^= 1,
        Reason::SbfdUnknownDiscriminator,
    );
    refused(
        |p| p.control.your_discriminator ^= 1,
        Reason::SbfdUnknownDiscriminator,
    );
    refused(|p| p.initiator_port ^= 1, Reason::SbfdUnknownDiscriminator);
    refused(|p| p.source[15] ^= 1, Reason::SbfdWrongSource);
    refused(|p| p.source[0] ^= 1, Reason::SbfdWrongSource);
    assert_eq!(memory.session().answered.load(), 0);
    memory
        .ingress(&answer(1), MS)
        .expect("the real one still counts");
}

#[test]
fn a_probe_of_a_peer_is_noted_and_reflected() {
    let memory = Memory::new();
    let Ok(Verdict::Reflect {
        reflector,
        is_new: true,
    }) = memory.ingress(&peers_probe(), 3 * MS)
    else {
        panic!("reflected");
    };
    assert_eq!(reflector.state, State::Up);
    assert_eq!(reflector.required_min_rx_us, REQUIRED_MIN_RX_US);
    let session = memory.session();
    let said = Said::unpack(session.probe.load()).expect("heard");
    assert_eq!((said.state, said.diagnostic), (State::Down, 1));
    assert_eq!(session.last_probe_ns.load(), 3 * MS);
    assert_eq!(
        (session.reflected.load(), session.reflected_bytes.load()),
        (1, 66)
    );

    management::reflected(mac_key(mac(SPEAKER, PEER)), 3 * MS + 700, &memory);
    assert_eq!(session.last_reflection_ns.load(), 700);

    memory.node.state.store(State::AdminDown.bits().into());
    let verdict = memory.ingress(&peers_probe(), 4 * MS);
    assert!(
        matches!(verdict, Ok(Verdict::Reflect { reflector, .. }) if reflector.state == State::AdminDown)
    );
}

#[test]
fn a_probe_to_another_reflector_or_from_a_stranger_is_dropped() {
    let memory = Memory::new();
    let mut packet = peers_probe();
    packet.control.your_discriminator ^= 1;
    let unknown = Err(Reason::SbfdUnknownDiscriminator);
    assert_eq!(memory.ingress(&packet, MS), unknown);
    let mut packet = peers_probe();
    packet.sender ^= 1;
    assert_eq!(memory.ingress(&packet, MS), Err(Reason::SbfdUnknownPeer));
    // A node that has no discriminator yet answers nobody, whatever they guess.
    memory.node.discriminator.store(0);
    let mut packet = peers_probe();
    packet.control.your_discriminator = 0;
    assert_eq!(memory.ingress(&packet, MS), unknown);
    let nothing = management::ingress(None, 66, Flags::default(), MS, &memory);
    assert_eq!(nothing, Err(Reason::SbfdMalformed));
    assert_eq!(memory.session().reflected.load(), 0);
    // Two of them were the peer's, and came through this node's firewall.
    assert_eq!(memory.session().arrived.load(), 2);
}

#[test]
fn a_flood_is_answered_at_the_lasting_rate() {
    let memory = Memory::new();
    let session = memory.session();
    let start = 1_000_000 * MS;
    let mut limited = 0;
    // 100,000 probes within ten seconds, evenly.
    for probe in 0..100_000 {
        match memory.ingress(&peers_probe(), start + probe * MS / 10) {
            Ok(Verdict::Reflect { .. }) => {}
            Err(Reason::SbfdRateLimited) => {
                limited += 1;
                assert_ne!(
                    session.last_probe_ns.load(),
                    start + probe * MS / 10,
                    "no evidence"
                );
            }
            other => panic!("{other:?}"),
        }
    }
    let answered = session.reflected.load();
    assert_eq!(answered + limited, 100_000);
    assert_eq!(session.rate_limited.load(), limited);
    let expected = PROBES_AT_ONCE + 10 * PROBES_PER_SECOND;
    assert!(
        answered.abs_diff(expected) <= 1,
        "{answered}, not {expected}"
    );
    assert_eq!(session.reflected_bytes.load(), answered * 66);
    assert_eq!(session.arrived.load(), 100_000);
    // A moment later it is a peer like any other.
    let later = start + 10_000 * MS + 1_000 * MS / PROBES_PER_SECOND;
    assert!(memory.ingress(&peers_probe(), later).is_ok());
}

impl Memory {
    /// A probe came and was answered; whether it is evidence.
    fn is_evidence(&self, probe: &Packet, now_ns: u64) -> bool {
        let before = (
            self.session().probe.load(),
            self.session().last_probe_ns.load(),
        );
        let Ok(Verdict::Reflect { is_new, .. }) = self.ingress(probe, now_ns) else {
            panic!("answered");
        };
        let heard = self.session().last_probe_ns.load();
        assert_eq!(is_new, heard == now_ns, "what is evidence is noted");
        assert!(is_new || before == (self.session().probe.load(), heard));
        is_new
    }
}

#[test]
fn a_probe_is_evidence_once_and_the_next_one_is() {
    let memory = Memory::new();
    let mut now = MS;
    let mut comes = |sequence| {
        now += 50 * MS;
        memory.is_evidence(&numbered_probe(sequence), now)
    };
    // Over the end of the numbers, with some lost.
    for sequence in [1_000, 1_001, 1_010, 1_023, 0, AHEAD] {
        assert!(comes(sequence), "{sequence}");
    }
    for _ in 0..1_000 {
        assert!(!comes(AHEAD), "replayed");
        assert!(!comes(0), "replayed, an older one");
    }
    assert_eq!(memory.session().stale_probes.load(), 2_000);
    assert_eq!(memory.session().reflected.load(), 2_006);
    assert!(comes(AHEAD + 1), "the peer itself");
}

#[test]
fn a_probe_of_half_a_minute_ago_is_no_new_one() {
    let memory = Memory::new();
    let current = 700;
    assert!(memory.is_evidence(&numbered_probe(current), MS));
    for before in [600, 513, 511, 64, 1] {
        let old = numbered_probe(current - before);
        assert!(!memory.is_evidence(&old, 100 * MS), "{before} ago");
    }
    let lost_too_many = numbered_probe(current + AHEAD + 1);
    assert!(!memory.is_evidence(&lost_too_many, 150 * MS));
    assert!(memory.is_evidence(&numbered_probe(current + AHEAD), 200 * MS));
}

/// A probe of another of the peer's sessions.
fn probe_of(session: u32, sequence: u32) -> Packet {
    let mut packet = numbered_probe(sequence & SEQUENCE_MASK);
    packet.control.my_discriminator = session;
    packet
}

#[test]
fn of_several_sessions_of_a_peer_each_is_evidence() {
    let memory = Memory::new();
    let mut now = MS;
    let mut comes = |session, sequence| {
        now += 10 * MS;
        memory.is_evidence(&probe_of(session, sequence), now)
    };
    // One that ended, and three that live.
    assert!(comes(1, 500));
    for probe in 0..=ADVANCING as u32 {
        for session in 2..=4 {
            assert!(!comes(session, 300 * session + probe));
        }
    }
    for probe in ADVANCING as u32 + 1..2_000 {
        for session in 2..=4 {
            assert!(comes(session, 300 * session + probe), "{session}: {probe}");
        }
    }
    let replayed = memory.session().stale_probes.load();
    assert_eq!(replayed, 3 * (ADVANCING + 1), "and no more are called so");
}

#[test]
fn the_sessions_of_a_peer_that_are_kept_are_those_heard_last() {
    let memory = Memory::new();
    let mut now = MS;
    for session in 1..=20 {
        let mut is_evidence = false;
        for probe in 0..=1 + ADVANCING as u32 {
            now += 10 * MS;
            is_evidence = memory.is_evidence(&probe_of(session, 7 * session + probe), now);
        }
        assert!(is_evidence, "{session}");
    }
    assert!(memory.is_evidence(&probe_of(19, 7 * 19 + 18), now + MS));
    assert!(!memory.is_evidence(&probe_of(1, 7 + 18), now + 2 * MS));
}

#[test]
fn replayed_probes_do_not_keep_a_peer_from_beginning_anew() {
    // From any other session of the peer's, this one before, or the one that begins.
    for (replayed, at) in [(998, 4), (999, 4), (999, 600), (1_000, 4), (1_000, 600)] {
        let memory = Memory::new();
        assert!(memory.is_evidence(&numbered_probe(4), MS));
        let mut now = 1_000 * MS;
        let mut believed = (0..2 + ADVANCING as u32).map(|probe| {
            now += 50 * MS;
            // So many that most get no answer: neither does who begins anew, until it is believed.
            for _ in 0..200 {
                let _ = memory.ingress(&probe_of(replayed, at), now);
            }
            let result = memory.ingress(&probe_of(1_000, 300 + probe), now);
            matches!(result, Ok(Verdict::Reflect { is_new: true, .. }))
        });
        assert!(believed.by_ref().take(1 + ADVANCING as usize).all(|is| !is));
        assert_eq!(believed.next(), Some(true), "{replayed} {at}");
    }
}

#[test]
fn a_recording_that_is_replayed_again_and_again_is_none_either() {
    let memory = Memory::new();
    let recorded = 1..=ADVANCING as u32;
    for sequence in recorded.clone() {
        assert!(memory.is_evidence(&numbered_probe(sequence), u64::from(sequence) * MS));
    }
    let mut now = 1_000 * MS;
    for _ in 0..100 {
        for sequence in recorded.clone() {
            now += 5 * MS;
            assert!(!memory.is_evidence(&numbered_probe(sequence), now));
        }
    }
}

#[test]
fn a_peer_that_begins_anew_at_any_number_is_believed_after_a_while() {
    for first in [0, 3, 4, 5, 511, 512, 516, 600, 1_023] {
        let memory = Memory::new();
        assert!(memory.is_evidence(&numbered_probe(4), MS));
        let mut believed = (0..2 + ADVANCING as u32).map(|probe| {
            let mut packet = numbered_probe((first + probe) & SEQUENCE_MASK);
            packet.control.my_discriminator ^= 1;
            memory.is_evidence(&packet, MS * u64::from(10 + probe))
        });
        assert!(believed.by_ref().take(1 + ADVANCING as usize).all(|is| !is));
        assert_eq!(believed.next(), Some(true), "from {first}");
    }
}

#[test]
fn an_initiator_that_numbers_nothing_is_answered_and_heard_once() {
    let memory = Memory::new();
    assert!(memory.is_evidence(&peers_probe(), MS));
    for second in 1..100 {
        assert!(!memory.is_evidence(&peers_probe(), second * 1_000 * MS));
    }
}

#[test]
fn replayed_probes_take_no_answer_from_the_peer() {
    let memory = Memory::new();
    let (mut limited, mut now) = (0, MS);
    for sequence in 0..200 {
        now += 50 * MS;
        assert!(memory.is_evidence(&numbered_probe(sequence), now));
        for _ in 0..1_000 {
            match memory.ingress(&numbered_probe(0), now) {
                Ok(Verdict::Reflect { is_new: false, .. }) => {}
                Err(Reason::SbfdRateLimited) => limited += 1,
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(limited > 190_000, "{limited}");
}

#[test]
fn the_last_number_is_found_again() {
    let memory = Memory::new();
    assert_eq!(memory.session().last_sequence(), None);
    for (sequence, now) in [(1_022, 1), (1_023, 2), (0, 3), (1, 4)] {
        memory.send(sequence, now * MS);
    }
    assert_eq!(memory.session().last_sequence(), Some(1));
}

#[test]
fn only_our_own_probes_leave() {
    let memory = Memory::new();
    assert!(
        !management::egress(None, MS, &memory),
        "neighbour discovery"
    );
    let mut stranger = our_probe(1);
    stranger.receiver ^= 1;
    assert!(!management::egress(Some(&stranger), MS, &memory));
    let mut forged = our_probe(1);
    forged.control.my_discriminator ^= 1;
    assert!(!management::egress(Some(&forged), MS, &memory));
    assert_eq!(memory.session().sent.load(), 0);
    assert!(
        !management::egress(Some(&answer(1)), MS, &memory),
        "answers leave by the program that reflects"
    );
    assert_eq!(memory.session().sent.load(), 0);
}

#[test]
fn what_was_said_survives_the_number() {
    assert_eq!(Said::unpack(0), None);
    let memory = Memory::new();
    let mut packet = answer(1);
    packet.control.flags = Flags::CONTROL_PLANE_INDEPENDENT;
    packet.control.state = State::AdminDown;
    packet.control.required_min_rx_us = u32::MAX - 1;
    memory.send(1, MS);
    memory.ingress(&packet, MS).expect("answered");
    let said = Said::unpack(memory.session().answer.load()).expect("said");
    let expected = Said {
        state: State::AdminDown,
        diagnostic: 0,
        control_plane_independent: true,
        required_min_rx_us: u32::MAX - 1,
    };
    assert_eq!(said, expected);
    assert_eq!(
        Said::unpack(memory.session().stamp(1).answer.load()),
        Some(expected)
    );
}

#[test]
fn a_cleared_session_is_nobodys() {
    let memory = Memory::new();
    memory.send(1, MS);
    memory.ingress(&answer(1), MS).expect("answered");
    memory.ingress(&peers_probe(), MS).expect("reflected");
    let session = memory.session();
    session.clear();
    assert_eq!(format!("{session:?}"), format!("{:?}", Session::default()));
}
