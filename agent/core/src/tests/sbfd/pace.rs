//! The pace that the peer's reflector asks for.

use std::time::Duration;

use nsm_ebpf_common::sbfd::State as WireState;
use proptest::prelude::*;

use super::{MS, Path, Simulation};
use crate::liveness::sbfd::*;

fn asking(required_min_rx: Duration) -> Path {
    Path {
        required_min_rx,
        ..Path::default()
    }
}

/// What a session heeds.
fn heeded(required_min_rx: Duration) -> Duration {
    required_min_rx.min(Timing::default().slow_interval)
}

fn gaps(simulation: &Simulation) -> Vec<Duration> {
    let sent = simulation.probes.windows(2);
    sent.map(|two| two[1].0.since(two[0].0)).collect()
}

/// Our own reflector's pace, which changes nothing; that of a slow one; more than is heeded.
const PACES: [u64; 5] = [0, 2_500, 200_000, 1_000_000, u32::MAX as u64];

#[test]
fn the_usual_pace_is_the_slower_of_the_two() {
    for pace in PACES.map(Duration::from_micros) {
        let mut simulation = Simulation::up(asking(pace), 3);
        simulation.run(100_000 * MS);
        let gaps = gaps(&simulation);
        let mean = gaps.iter().sum::<Duration>() / gaps.len() as u32;
        let (least, most) = if pace <= 40 * MS {
            (42 * MS, 46 * MS)
        } else {
            (heeded(pace), heeded(pace).mul_f64(1.25))
        };
        assert!((least..=most).contains(&mean), "{pace:?}: {mean:?}");
        // It is jittered all the same.
        assert!(gaps.iter().max() > gaps.iter().min());
        let told = simulation.probes.last().expect("some").1.desired_min_tx();
        let expected = heeded(pace).max(50 * MS).as_micros() as u32;
        assert!(told.abs_diff(expected) <= 1024, "{told}");
    }
}

/// A verdict counts probes: it comes later by as much as they are further apart, and within seconds whatever the peer asks.
#[test]
fn detection_takes_as_many_probes_at_any_pace() {
    for pace in PACES.map(Duration::from_micros) {
        let mut simulation = Simulation::up(asking(pace), 5);
        simulation.run(10_000 * MS);
        let cut_at = simulation.now;
        simulation.path.is_cut = true;
        simulation.answers.clear();
        simulation.run(30_000 * MS);
        let Some(Change::State { at, to, cause, .. }) = simulation.changes.first() else {
            panic!("{pace:?}: nothing is told");
        };
        assert_eq!(*to, State::Down);
        assert!(matches!(cause, Cause::Unanswered { probes, .. } if *probes >= 3));
        let took = at.since(cut_at);
        // A session of so few probes trusts no more in their luck than to ask for nine.
        let bound = 175 * MS + 10 * heeded(pace);
        assert!(took <= bound, "{pace:?}: {took:?}");
    }
}

/// The last answer says what holds.
#[test]
fn a_peer_may_change_its_mind() {
    let mut simulation = Simulation::up(asking(1000 * MS), 7);
    simulation.path.required_min_rx = Duration::ZERO;
    simulation.run(3000 * MS);
    simulation.probes.clear();
    simulation.run(1000 * MS);
    assert!(simulation.probes.len() >= 20, "{}", simulation.probes.len());
    // An answer that is none says nothing.
    let seq = simulation.probes.last().expect("some").1.seq.next();
    let stale = simulation.session.handle_answer(Answer {
        seq,
        round_trip: MS,
        at: simulation.now,
        state: WireState::Up,
        required_min_rx: 1000 * MS,
    });
    assert_eq!(stale, Accepted::Stale);
    simulation.probes.clear();
    simulation.run(1000 * MS);
    assert!(simulation.probes.len() >= 20, "{}", simulation.probes.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Never faster than asked, whatever the session is at: up, in suspicion, lost, proving, in search of the MTU.
    #[test]
    fn nothing_is_sent_faster_than_the_peer_asks(
        seed: u64,
        pace in 0u64..3_000_000,
        loss in 0.0f64..0.3,
        cuts in prop::collection::vec((any::<bool>(), any::<bool>(), 0u64..3_000), 1..12),
        largest in 1_000u16..1_500,
    ) {
        let pace = Duration::from_micros(pace);
        let mut simulation = Simulation::up(asking(pace), seed);
        let now = simulation.now;
        simulation.session.want_mtu(576, 1_450, now);
        simulation.path.largest = largest;
        simulation.path.loss = loss;
        for (is_cut, proves, time) in cuts {
            simulation.path.is_cut = is_cut;
            if proves {
                let now = simulation.now;
                simulation.session.prove(now);
            }
            simulation.run(Duration::from_millis(time));
        }
        for gap in gaps(&simulation) {
            prop_assert!(gap >= heeded(pace), "{gap:?}");
        }
    }

    /// The search for the MTU finds what it finds, later.
    #[test]
    fn the_search_goes_on_at_any_pace(seed: u64, pace in 0u64..3_000_000, largest in 1_200u16..1_500) {
        let mut simulation = Simulation::up(asking(Duration::from_micros(pace)), seed);
        simulation.path.largest = largest;
        let now = simulation.now;
        simulation.session.want_mtu(576, 1_450, now);
        simulation.run(300_000 * MS);
        let found = simulation.session.snapshot(simulation.now).path_mtu.expect("found");
        prop_assert!(found <= largest && found + 4 >= largest.min(1_450), "{found} of {largest}");
        prop_assert_eq!(simulation.states(), []);
    }
}
