//! Round trips: how long to wait for an answer, and what the last minute was like.

use std::time::Duration;

use super::Statistics;
use crate::clock::Monotonic;

/// The shortest time after which an answer is missed. A reflector in BPF answers in tens of microseconds; what comes later than this waited
/// for a processor, and another probe costs nothing.
const MIN_RTO: Duration = Duration::from_millis(10);

/// The longest: no path on Earth needs more (RFC 6298 begins with it).
const MAX_RTO: Duration = Duration::from_secs(1);

/// How long an answer may take as long as none was seen. The longest terrestrial paths take some 350 ms; a Request waits for this once where
/// the path is dead.
pub(super) const INITIAL_RTO: Duration = Duration::from_millis(500);

/// The estimate of RFC 6298, without its clock granularity.
#[derive(Debug, Clone, Default)]
pub(super) struct RoundTrip {
    /// Mean and variation.
    smoothed: Option<(Duration, Duration)>,
}

impl RoundTrip {
    pub(super) fn sample(&mut self, round_trip: Duration) {
        let round_trip = round_trip.min(10 * MAX_RTO);
        self.smoothed = Some(match self.smoothed {
            None => (round_trip, round_trip / 2),
            Some((mean, variation)) => {
                let error = mean.abs_diff(round_trip);
                ((mean * 7 + round_trip) / 8, (variation * 3 + error) / 4)
            }
        });
    }

    /// How long an answer may take before it is missed.
    pub(super) fn rto(&self) -> Duration {
        self.smoothed.map_or(INITIAL_RTO, |(mean, variation)| {
            (mean + variation * 4).clamp(MIN_RTO, MAX_RTO)
        })
    }
}

/// The last minute is kept in so many slices.
const SLICES: usize = 6;
const SLICE: Duration = Duration::from_secs(10);

/// Steps an octave: each is at most 1/16 wide, so the middle of a step is within 4 % of what is in it.
const STEPS: u32 = 16;
/// Octaves from 2^10 ns (1 µs) to 2^32 ns (4.3 s); the first and the last step hold what is below and above.
const FIRST_OCTAVE: u32 = 10;
const OCTAVES: u32 = 22;
const BUCKETS: usize = (OCTAVES * STEPS) as usize;

#[derive(Debug, Clone)]
struct Slice {
    left: u32,
    answered: u32,
    /// Unanswered because the path was down: part of the loss, but no measure of random loss.
    outage: u32,
    round_trips: [u16; BUCKETS],
}

impl Slice {
    const EMPTY: Self = Self {
        left: 0,
        answered: 0,
        outage: 0,
        round_trips: [0; BUCKETS],
    };
}

/// What became of a probe, once that is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settled {
    Answered,
    Lost,
    /// Lost while the path was down.
    Outage,
}

/// Loss and round trips of the last minute, in bounded memory (4.3 KiB).
#[derive(Debug, Clone)]
pub(super) struct Minute {
    slices: Box<[Slice; SLICES]>,
    current: usize,
    began: Monotonic,
}

impl Minute {
    pub(super) fn new(now: Monotonic) -> Self {
        Self {
            slices: Box::new([Slice::EMPTY; SLICES]),
            current: 0,
            began: now,
        }
    }

    /// Forgets what is older than a minute.
    pub(super) fn advance(&mut self, now: Monotonic) {
        let elapsed = now.since(self.began);
        if elapsed < SLICE {
            return;
        }
        let steps = elapsed.as_nanos() / SLICE.as_nanos();
        for _ in 0..steps.min(SLICES as u128) {
            self.current = (self.current + 1) % SLICES;
            self.slices[self.current] = Slice::EMPTY;
        }
        let rest = u64::try_from(elapsed.as_nanos() % SLICE.as_nanos()).unwrap_or(0);
        self.began = now - Duration::from_nanos(rest);
    }

    pub(super) fn settle(&mut self, outcome: Settled) {
        let slice = &mut self.slices[self.current];
        slice.left += 1;
        match outcome {
            Settled::Answered => slice.answered += 1,
            Settled::Outage => slice.outage += 1,
            Settled::Lost => {}
        }
    }

    pub(super) fn round_trip(&mut self, round_trip: Duration) {
        let count = &mut self.slices[self.current].round_trips[bucket(round_trip)];
        *count = count.saturating_add(1);
    }

    /// Probes whose fate was settled while the path was up, and those of them that were lost.
    pub(super) fn random_loss(&self) -> (u32, u32) {
        self.slices.iter().fold((0, 0), |(total, lost), slice| {
            let counted = slice.left - slice.outage;
            (total + counted, lost + counted - slice.answered)
        })
    }

    pub(super) fn statistics(&self) -> Statistics {
        let sum = |of: fn(&Slice) -> u32| self.slices.iter().map(of).sum();
        Statistics {
            probes: sum(|slice| slice.left),
            answers: sum(|slice| slice.answered),
            rtt_p50: self.percentile(50),
            rtt_p99: self.percentile(99),
        }
    }

    fn percentile(&self, percent: u64) -> Option<Duration> {
        let of_bucket = |at: usize| -> u64 {
            let counts = self.slices.iter().map(|slice| slice.round_trips[at]);
            counts.map(u64::from).sum()
        };
        let total: u64 = (0..BUCKETS).map(of_bucket).sum();
        // The nearest rank: the smallest value that so many percent do not exceed.
        let rank = (total * percent).div_ceil(100);
        let mut seen = 0;
        (0..BUCKETS)
            .find(|&at| {
                seen += of_bucket(at);
                rank > 0 && seen >= rank
            })
            .map(middle)
    }
}

fn bucket(round_trip: Duration) -> usize {
    let nanos = u64::try_from(round_trip.as_nanos()).unwrap_or(u64::MAX);
    let octave = nanos.max(1).ilog2();
    if octave < FIRST_OCTAVE {
        return 0;
    }
    if octave >= FIRST_OCTAVE + OCTAVES {
        return BUCKETS - 1;
    }
    let step = (nanos >> (octave - STEPS.ilog2())) & u64::from(STEPS - 1);
    (octave - FIRST_OCTAVE) as usize * STEPS as usize + step as usize
}

/// The middle of a bucket.
fn middle(bucket: usize) -> Duration {
    let octave = FIRST_OCTAVE + bucket as u32 / STEPS;
    let step = u64::from(bucket as u32 % STEPS);
    let width = 1u64 << (octave - STEPS.ilog2());
    Duration::from_nanos((u64::from(STEPS) + step) * width + width / 2)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn no_answer_is_waited_for_long_and_a_jittery_path_longer() {
        let mut estimate = RoundTrip::default();
        assert_eq!(estimate.rto(), INITIAL_RTO);
        estimate.sample(Duration::from_micros(30));
        assert_eq!(estimate.rto(), MIN_RTO);
        for round_trip in [20, 60, 20, 60] {
            estimate.sample(Duration::from_millis(round_trip));
        }
        assert!(estimate.rto() > Duration::from_millis(60), "{estimate:?}");
        estimate.sample(Duration::MAX);
        assert_eq!(estimate.rto(), MAX_RTO);
    }

    #[test]
    fn a_minute_is_forgotten_slice_by_slice() {
        let start = Monotonic::from_nanos(77);
        let mut minute = Minute::new(start);
        minute.settle(Settled::Answered);
        minute.round_trip(Duration::from_micros(100));
        minute.advance(start + Duration::from_secs(59));
        minute.settle(Settled::Lost);
        minute.settle(Settled::Outage);
        assert_eq!(minute.statistics().probes, 3);
        assert_eq!(minute.random_loss(), (2, 1));
        minute.advance(start + Duration::from_secs(60));
        let left = minute.statistics();
        assert_eq!((left.probes, left.answers, left.rtt_p50), (2, 0, None));
        assert_eq!(left.loss(), Some(1.0));
        minute.advance(start + Duration::from_secs(100_000));
        assert_eq!(minute.statistics(), Statistics::default());
    }

    proptest! {
        #[test]
        fn percentiles_are_within_four_percent(
            mut nanos in proptest::collection::vec(2_000u64..4_000_000_000, 1..300),
        ) {
            let mut minute = Minute::new(Monotonic::default());
            for &one in &nanos {
                minute.round_trip(Duration::from_nanos(one));
            }
            nanos.sort_unstable();
            let told = minute.statistics();
            for (percent, told) in [(50, told.rtt_p50), (99, told.rtt_p99)] {
                let exact = nanos[(nanos.len() * percent).div_ceil(100) - 1] as f64;
                let told = told.expect("there are samples").as_nanos() as f64;
                prop_assert!((told / exact - 1.0).abs() < 0.04, "{} for {}", told, exact);
            }
        }

        #[test]
        fn any_round_trip_has_a_bucket(nanos: u64) {
            prop_assert!(bucket(Duration::from_nanos(nanos)) < BUCKETS);
        }
    }
}
