//! What holds on every path.

use std::time::Duration;

use proptest::prelude::*;

use super::{MS, Path, Random, Simulation};
use crate::{clock::Monotonic, sbfd::*};

/// A loss of the path is told within this, where the prober runs: one probe's interval, the silence, and what a lossy path needs in more probes.
const BOUND: Duration = Duration::from_millis(175);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// As long as what leaves is answered, whenever the prober gets to run, there is no alarm.
    #[test]
    fn answers_are_never_taken_for_silence(
        seed: u64,
        round_trip in 0u64..400_000,
        late in proptest::collection::vec(0u64..2_000, 1..20),
    ) {
        let path = Path { round_trip: Duration::from_micros(round_trip), ..Path::default() };
        let mut simulation = Simulation::new(path, seed);
        for late in late {
            simulation.late = Duration::from_millis(late);
            simulation.run(1_000 * MS);
        }
        prop_assert_eq!(simulation.states(), [State::Up]);
    }

    /// Silence is told within the bound, and not sooner than the silence has lasted.
    #[test]
    fn silence_is_told_in_time(seed: u64, before in 0u64..120_000, late_us in 0u64..3_000) {
        let mut simulation = Simulation::up(Path::default(), seed);
        simulation.late = Duration::from_micros(late_us);
        simulation.run(Duration::from_micros(before * 100));
        let cut_at = simulation.now;
        simulation.path.is_cut = true;
        simulation.answers.clear();
        simulation.run(1_000 * MS);
        prop_assert_eq!(simulation.states(), [State::Down]);
        let Some(Change::State { at, cause: Cause::Unanswered { probes, silence }, .. }) = simulation.changes.first() else {
            return Err(TestCaseError::fail(format!("{:?}", simulation.changes)));
        };
        let took = at.since(cut_at);
        prop_assert!(took <= BOUND + Duration::from_micros(15 * late_us), "{took:?}");
        prop_assert!(*silence >= 110 * MS && *probes >= 3);
    }

    /// A path that loses at random what it may is up.
    #[test]
    fn random_loss_is_no_outage(seed: u64, loss in 0.0f64..0.05) {
        let mut simulation = Simulation::new(Path { loss, ..Path::default() }, seed);
        simulation.run(600_000 * MS);
        prop_assert_eq!(simulation.states(), [State::Up]);
    }

    /// A prober that is handed no processor, or whose probes stay in the node, raises no alarm.
    #[test]
    fn what_did_not_leave_is_not_missed(seed: u64, sleep in 0u64..100_000) {
        let mut simulation = Simulation::up(Path::default(), seed);
        simulation.now = simulation.now + Duration::from_millis(sleep);
        simulation.run(500 * MS);
        prop_assert_eq!(simulation.states(), []);
        simulation.path.leaves = false;
        simulation.run(Duration::from_millis(sleep));
        prop_assert!(!simulation.states().contains(&State::Down));
    }

    /// Whatever comes in, in whatever order: nothing panics, what was not asked for changes nothing, and memory is bounded.
    #[test]
    fn what_was_not_asked_for_changes_nothing(seed: u64, seqs in proptest::collection::vec(any::<u32>(), 1..200)) {
        let mut simulation = Simulation::up(Path::default(), seed);
        // What is in the window is answered by now.
        let before = simulation.session.snapshot(simulation.now);
        let statistics = simulation.session.statistics();
        for seq in seqs {
            let answer = Answer {
                seq: Seq::from_low_bits(seq),
                round_trip: Duration::from_nanos(u64::from(seq)),
                at: Monotonic::from_nanos(u64::from(seq)),
                state: WireState::from_bits(seq as u8),
            };
            if simulation.answers.is_empty() {
                prop_assert_eq!(simulation.session.handle_answer(answer), Accepted::Stale);
            }
        }
        prop_assert_eq!(simulation.session.snapshot(simulation.now), before);
        prop_assert_eq!(simulation.session.statistics(), statistics);
    }

    /// Any sequence of inputs, however absurd.
    #[test]
    fn nothing_panics(seed: u64, inputs in proptest::collection::vec((0u8..8, any::<u64>(), any::<u16>()), 1..300)) {
        let mut random = Random(seed);
        let mut session = Session::new(Timing::default(), Seq::from_low_bits(seed as u32), Monotonic::default());
        for (kind, nanos, small) in inputs {
            let at = Monotonic::from_nanos(nanos);
            let seq = Seq::from_low_bits(u32::from(small));
            match kind {
                0 => session.handle_left(seq, at),
                1 => drop(session.handle_answer(Answer {
                    seq,
                    round_trip: Duration::from_nanos(nanos),
                    at,
                    state: WireState::from_bits(small as u8),
                })),
                2 => session.handle_peer_probe(PeerProbe { at, state: WireState::Up, diag: Diag(small as u8) }),
                3 => session.handle_deadline(at),
                4 => drop(session.poll_transmit(at, &mut || random.next())),
                5 => session.prove(at),
                6 => session.want_mtu(small, small.wrapping_mul(3), at),
                _ => while session.poll_change().is_some() {},
            }
            let _ = (session.poll_deadline(), session.snapshot(at), session.statistics(), session.proof());
        }
    }
}

/// Hours of 5 % loss on each way, simulated: no alarm.
#[test]
fn five_percent_loss_for_hours() {
    let path = Path {
        loss: 0.05,
        ..Path::default()
    };
    let mut simulation = Simulation::new(path, 11);
    for _ in 0..6 {
        simulation.run(3_600_000 * MS);
        simulation.probes.clear();
    }
    assert_eq!(simulation.states(), [State::Up]);
}

/// Loss that begins at once and is heavy: 30 % on each way is a bad path, and no outage.
#[test]
fn heavy_loss_from_one_moment_to_the_next() {
    let mut alarms = 0;
    for seed in 0..50 {
        let mut simulation = Simulation::up(Path::default(), seed);
        simulation.run(60_000 * MS);
        simulation.path.loss = 0.3;
        simulation.run(60_000 * MS);
        alarms += simulation
            .states()
            .iter()
            .filter(|state| **state == State::Down)
            .count();
    }
    assert!(alarms <= 5, "{alarms} alarms in 50 minutes");
}
