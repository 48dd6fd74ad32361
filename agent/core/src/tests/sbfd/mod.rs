//! The session on simulated paths: a prober that is driven as [`crate::liveness::sbfd`] says, and a way there and back that can lose, delay and cut.

mod pace;
mod properties;
mod timing;
mod transitions;

use std::{collections::VecDeque, time::Duration};

use crate::{clock::Monotonic, liveness::sbfd::*};
use nsm_ebpf_common::sbfd::State as WireState;

const MS: Duration = Duration::from_millis(1);

/// A source of numbers that is the same in every run.
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as f64 / u64::MAX as f64
    }
}

/// What the path does with probes and answers.
#[derive(Debug, Clone)]
struct Path {
    /// Loss on each way, 0 to 1.
    loss: f64,
    round_trip: Duration,
    /// Added to it, 0 to so much for each probe of its own: what was sent later may come back first.
    jitter: Duration,
    /// How much longer the way becomes in a second.
    ramp: Duration,
    is_cut: bool,
    /// What the kernel does with probes that it is handed.
    leaves: bool,
    reflector: WireState,
    /// What it says that it takes.
    required_min_rx: Duration,
    /// Larger inner packets vanish.
    largest: u16,
}

impl Default for Path {
    fn default() -> Self {
        Self {
            loss: 0.0,
            round_trip: Duration::from_micros(100),
            jitter: Duration::ZERO,
            ramp: Duration::ZERO,
            is_cut: false,
            leaves: true,
            reflector: WireState::Up,
            required_min_rx: Duration::ZERO,
            largest: u16::MAX,
        }
    }
}

struct Simulation {
    now: Monotonic,
    session: Session,
    path: Path,
    random: Random,
    /// Answers under way: when they come in.
    answers: VecDeque<Answer>,
    changes: Vec<Change>,
    probes: Vec<(Monotonic, Probe)>,
    /// How late the prober wakes.
    late: Duration,
}

impl Simulation {
    fn new(path: Path, seed: u64) -> Self {
        let now = Monotonic::from_nanos(1_000_000_000 + seed % 1_000);
        Self {
            now,
            session: Session::new(Timing::default(), Seq::from_low_bits(seed as u32), now),
            path,
            random: Random(seed),
            answers: VecDeque::new(),
            changes: Vec::new(),
            probes: Vec::new(),
            late: Duration::ZERO,
        }
    }

    /// A session that is up.
    fn up(path: Path, seed: u64) -> Self {
        let mut simulation = Self::new(path, seed);
        simulation.run(2000 * MS);
        assert_eq!(simulation.state(), State::Up);
        simulation.changes.clear();
        simulation.probes.clear();
        simulation
    }

    fn state(&self) -> State {
        self.session.snapshot(self.now).state
    }

    /// State changes so far: to what.
    fn states(&self) -> Vec<State> {
        let to = |change: &Change| match change {
            Change::State { to, .. } => Some(*to),
            Change::PathMtu { .. } => None,
        };
        self.changes.iter().filter_map(to).collect()
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        self.run_until(end, |_| false);
    }

    /// Runs until `end`, or until `stop` says so after a step.
    fn run_until(&mut self, end: Monotonic, stop: impl Fn(&Self) -> bool) {
        let mut steps = 0u32;
        let began = self.now;
        let round_trip = self.path.round_trip;
        while self.now < end {
            let grown = self.path.ramp.mul_f64(self.now.since(began).as_secs_f64());
            self.path.round_trip = round_trip + grown;
            self.step();
            if stop(self) {
                return;
            }
            let deadline = self.session.poll_deadline();
            let next_answer = self.answers.iter().map(|answer| answer.at).min();
            let wake = next_answer.map_or(deadline.at, |at| at.min(deadline.at));
            self.now = wake.max(self.now + Duration::from_micros(1)).min(end) + self.late;
            steps += 1;
            let millis = self.now.since(began).as_millis() as u32;
            assert!(
                steps < 1000 + 4 * millis,
                "the session spins: {deadline:?} at {:?}",
                self.now
            );
        }
        self.now = end.max(self.now);
        self.step();
    }

    fn step(&mut self) {
        self.answers
            .make_contiguous()
            .sort_by_key(|answer| answer.at);
        while self
            .answers
            .front()
            .is_some_and(|answer| answer.at <= self.now)
        {
            let answer = self.answers.pop_front().expect("there is one");
            assert_eq!(self.session.handle_answer(answer), Accepted::Yes);
        }
        self.session.handle_deadline(self.now);
        while let Some(probe) = {
            let random = &mut self.random;
            self.session.poll_transmit(self.now, &mut || random.next())
        } {
            self.send(probe);
        }
        while let Some(change) = self.session.poll_change() {
            self.changes.push(change);
        }
    }

    fn send(&mut self, probe: Probe) {
        self.probes.push((self.now, probe));
        if !self.path.leaves {
            return;
        }
        self.session.handle_left(probe.seq, self.now);
        let is_lost = self.path.is_cut
            || self.random.next() < self.path.loss
            || self.random.next() < self.path.loss
            || probe.padded_to.is_some_and(|size| size > self.path.largest);
        if !is_lost {
            let round_trip = self.path.round_trip + self.path.jitter.mul_f64(self.random.next());
            self.answers.push_back(Answer {
                seq: probe.seq,
                round_trip,
                at: self.now + round_trip,
                state: self.path.reflector,
                required_min_rx: self.path.required_min_rx,
            });
        }
    }
}
