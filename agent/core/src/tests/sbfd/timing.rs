//! When the session sends, and how soon it knows.

use std::time::Duration;

use super::{MS, Path, Simulation};
use crate::liveness::sbfd::*;
use nsm_ebpf_common::sbfd::State as WireState;

fn cut() -> Path {
    Path {
        is_cut: true,
        ..Path::default()
    }
}

#[test]
fn a_new_path_is_up_after_one_round_trip() {
    let mut simulation = Simulation::new(Path::default(), 1);
    simulation.run(MS);
    assert_eq!(simulation.states(), [State::Up]);
    assert_eq!(simulation.session.proof(), Proof::Reached);
    assert_eq!(simulation.probes.len(), 1);
}

#[test]
fn a_dead_path_is_known_after_five_probes_and_then_asked_slowly() {
    let mut simulation = Simulation::new(cut(), 1);
    let now = simulation.now;
    simulation.session.prove(now);
    assert_eq!(simulation.session.proof(), Proof::Pending);
    simulation.run(600 * MS);
    assert_eq!(simulation.states(), [State::Down]);
    let Proof::Silent { probes, waited } = simulation.session.proof() else {
        panic!("{:?}", simulation.session.proof());
    };
    assert_eq!(probes, 5);
    assert!(waited >= 580 * MS, "{waited:?}");
    assert_eq!(simulation.probes.len(), 5);
    simulation.probes.clear();
    simulation.run(20_000 * MS);
    assert!(
        (20..=27).contains(&simulation.probes.len()),
        "{}",
        simulation.probes.len()
    );
    // Whoever asks again gets a burst, and its own verdict.
    simulation.probes.clear();
    let now = simulation.now;
    simulation.session.prove(now);
    assert_eq!(simulation.session.proof(), Proof::Pending);
    simulation.run(100 * MS);
    assert!(simulation.probes.len() >= 5);
    simulation.run(700 * MS);
    assert!(matches!(simulation.session.proof(), Proof::Silent { .. }));
    // And a path that came back is found by it.
    simulation.path.is_cut = false;
    let now = simulation.now;
    simulation.session.prove(now);
    simulation.run(50 * MS);
    assert_eq!(simulation.session.proof(), Proof::Reached);
}

/// The server joins before it answers the Request, the client after: the answer may be seconds under way.
#[test]
fn a_peer_that_joins_late_was_never_lost() {
    let mut simulation = Simulation::new(cut(), 1);
    simulation.run(5000 * MS);
    assert_eq!(simulation.states(), [], "it may not have joined yet");
    let early = simulation.probes.len();
    assert!(early <= 12, "{early} probes to a peer that has not joined");
    simulation.path.is_cut = false;
    let at = simulation.now;
    peer_probes(&mut simulation);
    simulation.run(MS);
    assert_eq!(simulation.states(), [State::Up]);
    let answered = simulation.probes[early].0.since(at);
    assert_eq!(answered, Duration::ZERO, "it waits for the slow pace");
}

#[test]
fn a_peer_that_joins_and_does_not_answer_is_down_after_five_probes() {
    let mut simulation = Simulation::new(cut(), 1);
    simulation.run(5000 * MS);
    peer_probes(&mut simulation);
    simulation.run(570 * MS);
    assert_eq!(simulation.states(), [], "the probes before it joined count");
    simulation.run(30 * MS);
    assert_eq!(simulation.states(), [State::Down]);
}

#[test]
fn a_proof_of_a_peer_that_was_waited_for_is_decided_by_its_own_probes() {
    let mut simulation = Simulation::new(cut(), 1);
    simulation.run(5000 * MS);
    let now = simulation.now;
    simulation.session.prove(now);
    simulation.run(50 * MS);
    assert_eq!(simulation.session.proof(), Proof::Pending);
    simulation.path.is_cut = false;
    simulation.run(50 * MS);
    assert_eq!(simulation.session.proof(), Proof::Reached);
    assert_eq!(simulation.states(), [State::Up]);
}

#[test]
fn a_peer_that_never_joins_is_down_in_the_end() {
    let mut simulation = Simulation::new(cut(), 1);
    simulation.run(14_900 * MS);
    assert_eq!(simulation.states(), []);
    simulation.run(1_200 * MS);
    assert_eq!(simulation.states(), [State::Down]);
}

/// The peer's own first probe arrives.
fn peer_probes(simulation: &mut Simulation) {
    let at = simulation.now;
    simulation.session.handle_peer_probe(PeerProbe {
        at,
        state: WireState::Down,
        diagnostic: 0,
    });
}

#[test]
fn nothing_that_left_is_no_proof_of_silence() {
    let mut simulation = Simulation::new(
        Path {
            leaves: false,
            ..Path::default()
        },
        1,
    );
    simulation.run(3000 * MS);
    assert_eq!(simulation.state(), State::Unknown);
    assert!(matches!(
        simulation.session.proof(),
        Proof::Silent { probes: 0, .. }
    ));
}

#[test]
fn the_usual_pace_is_jittered() {
    let mut simulation = Simulation::up(Path::default(), 3);
    simulation.run(10_000 * MS);
    let gaps: Vec<_> = simulation
        .probes
        .windows(2)
        .map(|pair| pair[1].0.since(pair[0].0))
        .collect();
    assert!(
        gaps.iter().all(|gap| (37 * MS..=51 * MS).contains(gap)),
        "{gaps:?}"
    );
    assert!(gaps.iter().any(|gap| *gap < 41 * MS) && gaps.iter().any(|gap| *gap > 46 * MS));
    assert_eq!(simulation.session.poll_deadline().reason, Wake::Transmit);
}

#[test]
fn suspicion_sends_faster_until_an_answer() {
    let mut simulation = Simulation::up(Path::default(), 3);
    simulation.path.is_cut = true;
    simulation.run(100 * MS);
    simulation.path.is_cut = false;
    let sent = simulation.probes.len();
    assert!(sent >= 5, "{sent}");
    simulation.run(1000 * MS);
    assert!(simulation.probes.len() - sent < 30, "suspicion goes on");
    assert_eq!(simulation.states(), []);
}

#[test]
fn switched_off_is_no_loss_and_slow() {
    let mut simulation = Simulation::up(Path::default(), 3);
    simulation.path.reflector = WireState::AdminDown;
    simulation.run(20_000 * MS);
    assert_eq!(simulation.states(), [State::AdminDown]);
    assert_eq!(simulation.session.proof(), Proof::SwitchedOff);
    assert!(simulation.probes.len() <= 30, "{}", simulation.probes.len());
    simulation.path.reflector = WireState::Up;
    simulation.run(2000 * MS);
    assert_eq!(simulation.states(), [State::AdminDown, State::Up]);
}

#[test]
fn a_path_that_comes_and_goes_proves_itself_longer() {
    let mut simulation = Simulation::up(Path::default(), 3);
    let mut times = Vec::new();
    for _ in 0..6 {
        simulation.path.is_cut = true;
        simulation.run(1000 * MS);
        assert_eq!(simulation.state(), State::Down);
        simulation.path.is_cut = false;
        let began = simulation.now;
        simulation.run_until(began + 3000 * MS, |it| it.state() == State::Up);
        assert_eq!(simulation.state(), State::Up);
        times.push(simulation.now.since(began));
    }
    assert!(times[0] < 100 * MS, "{times:?}");
    assert!(
        times.last().is_some_and(|time| *time > 500 * MS),
        "{times:?}"
    );
    // What is long past counts no more.
    simulation.run(61_000 * MS);
    simulation.path.is_cut = true;
    simulation.run(1000 * MS);
    simulation.path.is_cut = false;
    let began = simulation.now;
    simulation.run_until(began + 3000 * MS, |it| it.state() == State::Up);
    assert!(simulation.now.since(began) < 100 * MS);
}

#[test]
fn statistics_tell_the_last_minute() {
    let mut simulation = Simulation::up(
        Path {
            loss: 0.05,
            ..Path::default()
        },
        3,
    );
    simulation.run(90_000 * MS);
    let told = simulation.session.statistics();
    assert!((0.07..0.13).contains(&told.loss().unwrap()), "{told:?}");
    assert!(told.probes > 1000, "{told:?}");
    let p50 = told.rtt_p50.expect("there are answers");
    assert!((95..=105).contains(&p50.as_micros()), "{p50:?}");
}

#[test]
fn a_long_way_is_no_silence() {
    let mut simulation = Simulation::new(
        Path {
            round_trip: 320 * MS,
            ..Path::default()
        },
        3,
    );
    simulation.run(60_000 * MS);
    assert_eq!(simulation.states(), [State::Up]);
    let normal = simulation.probes.len();
    assert!(
        normal < 1650,
        "{normal} probes in a minute: suspicion without reason"
    );
}

#[test]
fn the_path_mtu_is_found_and_a_black_hole_noticed() {
    let mut simulation = Simulation::new(Path::default(), 3);
    let now = simulation.now;
    simulation.session.want_mtu(576, 1450, now);
    simulation.run(100 * MS);
    let mtu = |it: &Simulation| it.session.snapshot(it.now).path_mtu;
    assert_eq!(mtu(&simulation), Some(1450));
    simulation.path.largest = 1230;
    simulation.run(20_000 * MS);
    let found = mtu(&simulation).expect("a size");
    assert!((1226..=1230).contains(&found), "{found}");
    assert_eq!(simulation.states(), [State::Up]);
    // It is found again when it grows, at the latest after ten minutes.
    simulation.path.largest = u16::MAX;
    simulation.run(605_000 * MS);
    assert_eq!(mtu(&simulation), Some(1450));
}

#[test]
fn a_path_that_loses_much_keeps_its_mtu() {
    for seed in 0..4 {
        let mut simulation = Simulation::up(Path::default(), seed);
        let now = simulation.now;
        simulation.session.want_mtu(576, 1450, now);
        simulation.run(5000 * MS);
        // 44 % of the probes: chance alone loses six in a row every seven minutes.
        simulation.path.loss = 0.25;
        simulation.run(600 * 1000 * MS);
        let shrunk = simulation
            .changes
            .iter()
            .filter(|change| matches!(change, Change::PathMtu { to, .. } if *to < 1450))
            .count();
        assert_eq!(shrunk, 0, "seed {seed}: {:?}", simulation.changes);
    }
}

#[test]
fn a_long_outage_is_told_from_its_beginning() {
    let mut simulation = Simulation::up(Path::default(), 1);
    let cut = simulation.now;
    simulation.path.is_cut = true;
    // More probes than are kept.
    simulation.run(600 * 1000 * MS);
    let since = |it: &Simulation| it.session.snapshot(it.now).silent_since;
    let told = since(&simulation).expect("silence");
    assert!(told.since(cut) <= 100 * MS, "{:?}", told.since(cut));
    simulation.path.is_cut = false;
    simulation.run(5000 * MS);
    assert_eq!(simulation.state(), State::Up);
    assert!(since(&simulation).is_none_or(|since| simulation.now.since(since) <= 100 * MS));
}
