//! What holds on every path.

use std::time::Duration;

use nsm_ebpf_common::sbfd::State as WireState;
use proptest::prelude::*;

use super::{MS, Path, Random, Simulation};
use crate::{clock::Monotonic, liveness::sbfd::*};

/// Within how long the loss of a way out is told, where the prober runs and little was lost before: see [`Timing`].
fn bound(round_trip: Duration) -> Duration {
    let rto = round_trip.max(10 * MS);
    let of_suspicion = 2 * rto + SUSPICION;
    Timing::default().interval + Timing::default().silence.max(of_suspicion)
}

/// How long it takes to send the probes of a verdict at the fastest pace: seven at most in the first seconds, 3 ms apart.
const SUSPICION: Duration = Duration::from_millis(21);

/// The session's own steps, and what a session of few probes needs in more of them.
const SLACK: Duration = Duration::from_millis(15);

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

    /// Nor where the way takes longer for some than for others, so that answers overtake each other.
    #[test]
    fn answers_that_overtake_each_other_are_no_silence(
        seed: u64, round_trip in 0u64..150_000, jitter in 0u64..100_000,
    ) {
        let path = Path {
            round_trip: Duration::from_micros(round_trip),
            jitter: Duration::from_micros(jitter),
            ..Path::default()
        };
        let mut simulation = Simulation::new(path, seed);
        simulation.run(60_000 * MS);
        prop_assert_eq!(simulation.states(), [State::Up]);
    }

    /// Nor where queues fill and empty again.
    #[test]
    fn a_way_that_grows_is_no_silence(
        seed: u64, round_trip in 0u64..50_000, jitter in 0u64..20_000, slope in 0u64..300,
    ) {
        let path = Path {
            round_trip: Duration::from_micros(round_trip),
            jitter: Duration::from_micros(jitter),
            ..Path::default()
        };
        let mut simulation = Simulation::up(path, seed);
        for _ in 0..5 {
            simulation.path.ramp = Duration::from_millis(slope);
            simulation.run(2_000 * MS);
            simulation.path.ramp = Duration::ZERO;
            simulation.run(1_000 * MS);
            simulation.path.round_trip = Duration::from_micros(round_trip);
            simulation.run(5_000 * MS);
        }
        prop_assert_eq!(simulation.states(), []);
    }

    /// A way that becomes longer at once is no silence either, as long as an answer takes less than [`Timing::silence`].
    #[test]
    fn a_small_detour_is_no_silence(seed: u64, before in 0u32..10_000, after in 0u64..105) {
        let mut simulation = Simulation::up(Path::default(), seed);
        simulation.run(before * MS);
        simulation.path.round_trip = Duration::from_millis(after);
        simulation.run(60_000 * MS);
        prop_assert_eq!(simulation.states(), []);
    }

    /// One that takes longer than that cannot be told from a loss until the first answer is there. Then it is: the path is up again
    /// as soon as two answers have come, and stays so.
    #[test]
    fn a_long_detour_is_an_outage_until_its_answers_come(seed: u64, before in 0u32..10_000, after in 112u64..900) {
        let mut simulation = Simulation::up(Path { round_trip: MS, ..Path::default() }, seed);
        simulation.run(before * MS);
        let began = simulation.now;
        simulation.path.round_trip = Duration::from_millis(after);
        simulation.run(60_000 * MS);
        prop_assert_eq!(simulation.states(), [State::Down, State::Up]);
        for change in &simulation.changes {
            if let Change::State { at, .. } = change {
                // The next probe leaves within an interval, and by suspicion another one soon after.
                prop_assert!(at.since(began) <= Duration::from_millis(after) + 75 * MS, "{:?}", simulation.changes);
            }
        }
    }

    /// A way that changes again and again must prove itself longer, but never for long.
    #[test]
    fn detours_that_come_and_go_cost_a_second_each_at_most(seed: u64, after in 112u64..400) {
        let mut simulation = Simulation::up(Path { round_trip: MS, ..Path::default() }, seed);
        for _ in 0..8 {
            let began = simulation.now;
            simulation.path.round_trip = Duration::from_millis(after);
            simulation.run(4_000 * MS);
            prop_assert_eq!(simulation.state(), State::Up);
            let last = simulation.changes.iter().filter_map(|change| match change {
                Change::State { at, .. } => Some(at.since(began)),
                Change::PathMtu { .. } => None,
            });
            let took = last.max().unwrap_or_default();
            prop_assert!(took <= 2 * Duration::from_millis(after) + 1_000 * MS, "{took:?}");
            simulation.changes.clear();
            simulation.path.round_trip = MS;
            simulation.run(4_000 * MS);
            prop_assert_eq!(simulation.states(), []);
        }
    }

    /// Silence is told within the bound, and not sooner than the silence has lasted.
    #[test]
    fn silence_is_told_in_time(
        seed: u64, before in 0u64..120_000, late_us in 0u64..3_000, round_trip in 100u64..100_000, both_ways: bool,
    ) {
        let round_trip = Duration::from_micros(round_trip);
        let mut simulation = Simulation::up(Path { round_trip, ..Path::default() }, seed);
        simulation.late = Duration::from_micros(late_us);
        simulation.run(Duration::from_micros(before * 100));
        let cut_at = simulation.now;
        simulation.path.is_cut = true;
        // Cut on the way out only, what is under way still comes back.
        if both_ways {
            simulation.answers.clear();
        }
        simulation.run(1_000 * MS);
        prop_assert_eq!(simulation.states(), [State::Down]);
        let Some(Change::State { at, cause: Cause::Unanswered { probes, silence }, .. }) = simulation.changes.first() else {
            return Err(TestCaseError::fail(format!("{:?}", simulation.changes)));
        };
        let took = at.since(cut_at);
        let bound = bound(round_trip) + SLACK + Duration::from_micros(15 * late_us);
        prop_assert!(took <= bound, "{took:?} of {bound:?}");
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
                required_min_rx: Duration::from_micros(u64::from(seq)),
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
                    required_min_rx: Duration::from_nanos(nanos.rotate_left(32)),
                })),
                2 => session.handle_peer_probe(PeerProbe { at, state: WireState::Up, diagnostic: small as u8 }),
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
