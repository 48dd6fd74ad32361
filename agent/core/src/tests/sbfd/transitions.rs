//! Every state and every event: what the state is then.

use std::time::Duration;

use super::{MS, Path, Simulation};
use crate::liveness::sbfd::*;
use nsm_ebpf_common::sbfd::{DIAGNOSTIC_TIME_EXPIRED, State as WireState};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    /// The stamp of a probe that was never sent.
    UnknownStamp,
    /// An answer to the last probe.
    Answer,
    /// As many answers as the state asks for.
    Answers,
    /// The reflector says AdminDown.
    AdminDown,
    /// An answer in a state that reflectors do not say.
    WrongState,
    /// An answer to a probe that was never sent.
    UnknownAnswer,
    /// An answer once more.
    Replay,
    /// The peer's own probe.
    PeerProbe,
    /// Time passes, less than any verdict needs.
    Moment,
    /// Time passes, probes leave, nothing comes back.
    Silence,
    /// Time passes, probes are handed over and stay in the node.
    KeptBack,
    /// Time passes and the prober does not run.
    Unscheduled,
    /// Somebody asks for proof.
    Prove,
    /// A path MTU is wanted.
    WantMtu,
}

const EVENTS: [Event; 14] = [
    Event::UnknownStamp,
    Event::Answer,
    Event::Answers,
    Event::AdminDown,
    Event::WrongState,
    Event::UnknownAnswer,
    Event::Replay,
    Event::PeerProbe,
    Event::Moment,
    Event::Silence,
    Event::KeptBack,
    Event::Unscheduled,
    Event::Prove,
    Event::WantMtu,
];

fn in_state(state: State) -> Simulation {
    let cut = Path {
        is_cut: true,
        ..Path::default()
    };
    let mut simulation = Simulation::new(cut, 7);
    let now = simulation.now;
    simulation.session.prove(now);
    match state {
        State::Unknown => simulation.run(MS),
        State::Up => {
            simulation.path.is_cut = false;
            simulation.run(20 * MS);
        }
        State::Down => simulation.run(3000 * MS),
        State::AdminDown => {
            simulation.path.is_cut = false;
            simulation.path.reflector = WireState::AdminDown;
            simulation.run(20 * MS);
        }
    }
    // What comes back from here on is the event's to say.
    simulation.path.is_cut = true;
    assert_eq!(simulation.state(), state);
    simulation.changes.clear();
    simulation
}

fn happen(simulation: &mut Simulation, event: Event) {
    let last = simulation.probes.last().expect("a probe was sent").1.seq;
    let answer = |seq, state, at| Answer {
        seq,
        round_trip: Duration::from_micros(100),
        at,
        state,
        required_min_rx: Duration::ZERO,
    };
    let now = simulation.now;
    let session = &mut simulation.session;
    match event {
        Event::UnknownStamp => session.handle_left(last.next(), now),
        Event::Answer => {
            session.handle_answer(answer(last, WireState::Up, now));
        }
        Event::Answers => {
            simulation.path.is_cut = false;
            simulation.path.reflector = WireState::Up;
            simulation.run(1100 * MS);
        }
        Event::AdminDown => {
            simulation.path.is_cut = false;
            simulation.path.reflector = WireState::AdminDown;
            simulation.run(1100 * MS);
        }
        Event::WrongState => {
            for state in [WireState::Down, WireState::Init] {
                assert_eq!(
                    session.handle_answer(answer(last, state, now)),
                    Accepted::Stale
                );
            }
        }
        Event::UnknownAnswer => {
            let unknown = answer(last.next(), WireState::Up, now);
            assert_eq!(session.handle_answer(unknown), Accepted::Stale);
        }
        Event::Replay => {
            let first = session.handle_answer(answer(last, WireState::Up, now));
            let again = session.handle_answer(answer(last, WireState::AdminDown, now));
            assert_eq!(again, Accepted::Stale, "after {first:?}");
        }
        Event::PeerProbe => session.handle_peer_probe(PeerProbe {
            at: now,
            state: WireState::Down,
            diagnostic: DIAGNOSTIC_TIME_EXPIRED,
        }),
        Event::Moment => simulation.run(5 * MS),
        Event::Silence => simulation.run(8000 * MS),
        Event::KeptBack => {
            simulation.path.leaves = false;
            simulation.run(8000 * MS);
        }
        Event::Unscheduled => {
            simulation.now = now + 100_000 * MS;
            session.handle_deadline(simulation.now);
        }
        Event::Prove => session.prove(now),
        Event::WantMtu => session.want_mtu(576, 1450, now),
    }
    simulation.step();
}

fn expected(state: State, event: Event) -> State {
    use State::{AdminDown, Down, Unknown, Up};
    match (state, event) {
        (_, Event::Answers) => Up,
        (_, Event::AdminDown) => AdminDown,
        (_, Event::Silence) => Down,
        (_, Event::KeptBack) => Unknown,
        // The first answer proves a path that was never lost, and is not enough for one that was.
        (Unknown, Event::Answer | Event::Replay) => Up,
        _ => state,
    }
}

#[test]
fn every_state_and_every_event() {
    for state in [State::Unknown, State::Up, State::Down, State::AdminDown] {
        for event in EVENTS {
            let mut simulation = in_state(state);
            happen(&mut simulation, event);
            let after = simulation.state();
            assert_eq!(after, expected(state, event), "{event:?} in {state:?}");
            // What is told is what happened: from one to the next, and nothing where nothing changed.
            let mut told = state;
            for change in &simulation.changes {
                if let Change::State { from, to, .. } = change {
                    assert_eq!(*from, told, "{event:?} in {state:?}");
                    assert_ne!(from, to);
                    told = *to;
                }
            }
            assert_eq!(told, after, "{event:?} in {state:?}");
        }
    }
}

#[test]
fn packets_say_down_with_the_reason_unless_up() {
    let said = |state: State| (state.on_wire(), state.diagnostic());
    assert_eq!(said(State::Unknown), (WireState::Down, 0));
    assert_eq!(said(State::Up), (WireState::Up, 0));
    assert_eq!(said(State::AdminDown), (WireState::Down, 0));
    assert_eq!(
        said(State::Down),
        (WireState::Down, DIAGNOSTIC_TIME_EXPIRED)
    );
}

#[test]
fn numbers_stand_in_the_low_bits() {
    let probe = Probe {
        seq: Seq::from_low_bits(1023),
        state: WireState::Up,
        diagnostic: 0,

        interval: 50 * MS,
        padded_to: None,
    };
    assert_eq!(probe.desired_min_tx(), 49_152 + 1023);
    assert_eq!(Seq::from_low_bits(probe.desired_min_tx()), probe.seq);
    assert_eq!(probe.seq.next().get(), 0);
    assert_eq!(probe.seq.before(Seq::from_low_bits(4)), 5);
    assert_eq!("0".parse::<Discriminator>().ok(), None);
    assert_eq!("+1".parse::<Discriminator>().ok(), None);
    assert_eq!("".parse::<Discriminator>().ok(), None);
    assert_eq!("4294967296".parse::<Discriminator>().ok(), None);
    assert_eq!("7".parse::<Discriminator>().ok(), Discriminator::new(7));
}
