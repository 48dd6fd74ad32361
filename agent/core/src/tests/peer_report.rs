//! What the peer's agent says: when it counts, and what two agents that lose the path between them come to know by it.

use std::{collections::VecDeque, time::Duration};

use nsm_ebpf_common::sbfd::State as WireState;
use proptest::prelude::*;

use super::judge_at;
use crate::{
    clock::Monotonic,
    liveness::{
        Verdict::*,
        sbfd::{Answer, Cause, PeerProbe, Seq, Session, Snapshot, State, Timing},
        *,
    },
};

const MS: Duration = Duration::from_millis(1);

const VERDICTS: [Verdict; 4] = [Unknown, Up, Down, Unverified];

fn start() -> Monotonic {
    Monotonic::from_nanos(10_000_000_000)
}

/// A session whose probes are unanswered since `start`, on which nothing of the peer comes in.
fn evidence(state: State, received: Option<ReceivedReport>) -> Evidence {
    Evidence {
        path: super::path_id(),
        at: start(),
        session: Snapshot {
            state,
            since: start() + 130 * MS,
            cause: Some(Cause::Unanswered {
                probes: 12,
                silence: 130 * MS,
            }),
            silent_since: Some(start()),
            last_answer: Some(start() - 40 * MS),
            rto: 10 * MS,
            peer: None,
            peer_gap: 45 * MS,
            path_mtu: None,
        },
        stages: Stages::default(),
        peer_probes_elsewhere: false,
        peer_report: received,
    }
}

/// Every report, at every time before and after the silence began, looked at before and after the peer must have noticed.
#[test]
fn a_report_counts_when_the_peer_must_know() {
    let moments = [-60_000i64, -500, -1, 0, 1, 129, 130];
    let looks = [130 * MS, 999 * MS, 1000 * MS, 60_000 * MS];
    for (inward, outward) in VERDICTS
        .iter()
        .flat_map(|inward| VERDICTS.map(|outward| (*inward, outward)))
    {
        for (moment, look) in moments
            .iter()
            .flat_map(|moment| looks.map(|look| (*moment, look)))
        {
            let at = match u64::try_from(moment) {
                Ok(after) => start() + Duration::from_millis(after),
                Err(_) => start() - Duration::from_millis(moment.unsigned_abs()),
            };
            let received = ReceivedReport {
                report: PeerReport { inward, outward },
                at,
            };
            let counts = moment > 0 || look >= PEER_NOTICES;
            let expected = match (inward, outward) {
                (Down, _) if counts => Down,
                (Up, Unknown | Down | Unverified) if counts => Up,
                _ => Unknown,
            };
            let health = judge_at(&evidence(State::Down, Some(received)), start() + look);
            assert_eq!(
                (health.inward.verdict, health.outward.verdict),
                (Down, expected),
                "{received:?}, looked at after {look:?}"
            );
        }
    }
}

#[test]
fn a_report_is_told_as_one() {
    let report = |inward| {
        Some(ReceivedReport {
            report: PeerReport {
                inward,
                outward: Down,
            },
            at: start() + MS,
        })
    };
    let now = start() + 130 * MS;
    let health = judge_at(&evidence(State::Down, report(Up)), now);
    assert_eq!(
        health.sentence(Direction::Out),
        "the path to 203.0.113.2 (UDP 4789) is up: the peer's agent reports that our probes arrive"
    );
    assert_eq!(health.worst().0, Direction::In);
    let health = judge_at(&evidence(State::Down, report(Down)), now);
    assert_eq!(
        health.to_string(),
        "the path to 203.0.113.2 (UDP 4789) is down: 12 probes left, and the peer's agent reports that nothing from this node arrives: \
         see whether UDP 4789 is let through on the path and into the peer, as new flows and not only as replies"
    );
}

/// What this node knows itself goes before what the peer says.
#[test]
fn own_evidence_goes_first() {
    for report in VERDICTS.map(|inward| PeerReport {
        inward,
        outward: Down,
    }) {
        let received = Some(ReceivedReport {
            report,
            at: start() + MS,
        });
        let now = start() + 130 * MS;
        for state in [State::Up, State::AdminDown, State::Unknown] {
            let with = judge_at(&evidence(state, received), now);
            assert_eq!(with, judge_at(&evidence(state, None), now));
        }
        let mut heard = evidence(State::Down, received);
        heard.session.peer = Some(PeerProbe {
            at: now - MS,
            state: WireState::Down,
            diagnostic: 0,
        });
        assert_eq!(judge_at(&heard, now).outward.verdict, Down);
        let mut kept = evidence(State::Down, received);
        kept.stages = Stages {
            link_out: 12,
            card_out: Some(0),
            ..Stages::default()
        };
        assert!(matches!(
            judge_at(&kept, now).outward.reason,
            Reason::OwnOutputDrops { packets: 12 }
        ));
    }
}

#[test]
fn a_hop_that_publishes_both_ways_publishes_a_report() {
    let metrics = |pairs: &[(&str, &str)]| Published::read(&super::map(pairs)).report();
    assert_eq!(
        metrics(&[("sbfd_state_in", "up"), ("sbfd_state_out", "unknown")]),
        Some(PeerReport {
            inward: Up,
            outward: Unknown,
        })
    );
    for pairs in [
        &[][..],
        &[("sbfd_state_in", "up")],
        &[("sbfd_state_out", "up")],
        &[("sbfd_state_in", "yes"), ("sbfd_state_out", "up")],
    ] {
        assert_eq!(metrics(pairs), None);
    }
}

/// How often an agent looks again at what is not up.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// One of two nodes with a path between them.
struct Node {
    session: Session,
    /// What comes in, and when.
    probes: VecDeque<PeerProbe>,
    answers: VecDeque<Answer>,
    known: Option<PeerReport>,
    looked: Monotonic,
    /// What it has published, and when that is heard.
    reports: VecDeque<(Monotonic, PeerReport)>,
    received: Option<ReceivedReport>,
}

impl Node {
    fn new(now: Monotonic, first: u32) -> Self {
        Self {
            session: Session::new(Timing::default(), Seq::from_low_bits(first), now),
            probes: VecDeque::new(),
            answers: VecDeque::new(),
            known: None,
            looked: now,
            reports: VecDeque::new(),
            received: None,
        }
    }

    fn judge(&self, now: Monotonic) -> Health {
        let evidence = Evidence {
            path: super::path_id(),
            at: now,
            session: self.session.snapshot(now),
            stages: Stages::default(),
            peer_probes_elsewhere: false,
            peer_report: self.received,
        };
        judge_at(&evidence, now)
    }
}

/// Two agents, the client's and the server's; the report of the second comes to the first.
struct Two {
    now: Monotonic,
    nodes: [Node; 2],
    /// Whether packets pass from each to the other.
    passes: [bool; 2],
    half_trip: Duration,
    /// From the publication of a report to its arrival.
    travel: Duration,
    random: u64,
}

impl Two {
    fn new(half_trip: Duration, travel: Duration, seed: u64) -> Self {
        let now = start();
        Self {
            now,
            nodes: [Node::new(now, 0), Node::new(now, 500)],
            passes: [true; 2],
            half_trip,
            travel,
            random: seed,
        }
    }

    fn run(&mut self, time: Duration, mut look: impl FnMut(&Health)) {
        let end = self.now + time;
        while self.now < end {
            self.now = self.now + MS;
            for at in [0, 1] {
                self.step(at);
            }
            look(&self.nodes[0].judge(self.now));
        }
    }

    fn step(&mut self, at: usize) {
        let (now, travel) = (self.now, self.travel);
        let [near, far] = &mut self.nodes;
        let (own, other) = if at == 0 { (near, far) } else { (far, near) };
        while own.answers.front().is_some_and(|answer| answer.at <= now) {
            let answer = own.answers.pop_front().expect("there is one");
            own.session.handle_answer(answer);
        }
        while own.probes.front().is_some_and(|probe| probe.at <= now) {
            let probe = own.probes.pop_front().expect("there is one");
            own.session.handle_peer_probe(probe);
        }
        own.session.handle_deadline(now);
        let mut next = || {
            self.random = self
                .random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (self.random >> 33) as f64 / (1u64 << 31) as f64
        };
        while let Some(probe) = own.session.poll_transmit(now, &mut next) {
            own.session.handle_left(probe.seq, now);
            if !self.passes[at] {
                continue;
            }
            other.probes.push_back(PeerProbe {
                at: now + self.half_trip,
                state: probe.state,
                diagnostic: probe.diagnostic,
            });
            if self.passes[1 - at] {
                own.answers.push_back(Answer {
                    seq: probe.seq,
                    round_trip: 2 * self.half_trip,
                    at: now + 2 * self.half_trip,
                    state: WireState::Up,
                    required_min_rx: Duration::ZERO,
                });
            }
        }
        let mut has_changed = false;
        while own.session.poll_change().is_some() {
            has_changed = true;
        }
        if at == 1 && (has_changed || now.since(own.looked) >= LOOK_AGAIN) {
            own.looked = now;
            let health = own.judge(now);
            let report = PeerReport {
                inward: health.inward.verdict,
                outward: health.outward.verdict,
            };
            if own.known.replace(report) != Some(report) {
                own.reports.push_back((now + travel, report));
            }
        }
        if at == 0 {
            while other.reports.front().is_some_and(|(at, _)| *at <= now) {
                let (at, report) = other.reports.pop_front().expect("there is one");
                own.received = Some(ReceivedReport { report, at });
            }
        }
    }

    fn ways(&self) -> (Verdict, Verdict) {
        let health = self.nodes[0].judge(self.now);
        (health.inward.verdict, health.outward.verdict)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Whatever is lost, in whatever order it comes and goes: soon both ways are known as they are.
    #[test]
    fn both_ways_are_known_as_they_are(
        faults in prop::collection::vec((any::<[bool; 2]>(), 0u64..3_000), 1..6),
        half_trip in 0u64..60_000,
        travel in 0u64..120,
        seed: u64,
    ) {
        let mut two = Two::new(Duration::from_micros(half_trip), Duration::from_millis(travel), seed);
        two.run(2_000 * MS, |_| ());
        prop_assert_eq!(two.ways(), (Up, Up));
        for (passes, time) in faults {
            two.passes = passes;
            two.run(Duration::from_millis(time), |_| ());
        }
        // What came and went may make a path prove itself for longer.
        two.run(15_000 * MS, |_| ());
        let verdict = |passes| if passes { Up } else { Down };
        prop_assert_eq!(two.ways(), (verdict(two.passes[1]), verdict(two.passes[0])));
    }

    /// A path that was good: until the way out is known nothing is claimed of it, and never what is not so.
    #[test]
    fn nothing_is_claimed_that_is_not_so(
        outward: bool,
        before in 0u64..500,
        half_trip in 0u64..20_000,
        travel in 0u64..120,
        seed: u64,
    ) {
        let mut two = Two::new(Duration::from_micros(half_trip), Duration::from_millis(travel), seed);
        two.run(Duration::from_millis(3_000 + before), |_| ());
        two.passes = [outward, false];
        let mut seen = Vec::new();
        two.run(15_000 * MS, |health| {
            if health.is_down() {
                seen.push(health.outward.verdict);
            }
        });
        seen.dedup();
        let truth = if outward { Up } else { Down };
        prop_assert!(seen == [Unknown, truth] || seen == [truth], "{seen:?}");
    }

    /// A report that was said before the loss, and no other since: nothing follows from it, however long it lasts.
    #[test]
    fn a_peer_that_fell_silent_before_it_noticed_proves_nothing(outward: bool, seed: u64) {
        let mut two = Two::new(MS, MS, seed);
        two.run(3_000 * MS, |_| ());
        prop_assert_eq!(two.nodes[0].received.map(|received| received.report), Some(PeerReport { inward: Up, outward: Up }));
        two.passes = [outward, false];
        two.travel = Duration::from_secs(3600);
        two.run(20_000 * MS, |_| ());
        prop_assert_eq!(two.ways(), (Down, Unknown));
    }
}
