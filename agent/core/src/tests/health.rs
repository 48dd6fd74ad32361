use std::{collections::BTreeMap, time::Duration};

use nsm_ebpf_common::sbfd::State as WireState;
use proptest::prelude::*;

use super::judge_at;
use crate::{
    clock::Monotonic,
    liveness::{
        sbfd::{Cause, PeerProbe, Snapshot, State},
        *,
    },
    net::Vni,
};

const MS: Duration = Duration::from_millis(1);

fn start() -> Monotonic {
    Monotonic::from_nanos(10_000_000_000)
}

/// A session that was lost: probes stayed unanswered from `start` on, and 130 ms later it was down.
fn lost() -> Evidence {
    let since = start() + 130 * MS;
    Evidence {
        path: super::path_id(),
        at: start(),
        session: Snapshot {
            state: State::Down,
            since,
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
        peer_report: None,
    }
}

fn probe(at: Monotonic, state: WireState) -> Option<PeerProbe> {
    Some(PeerProbe {
        at,
        state,
        diagnostic: 0,
    })
}

fn verdicts(health: &Health) -> (Verdict, Verdict) {
    (health.inward.verdict, health.outward.verdict)
}

/// The card sees the peer's probes, the link books them to another way: nobody's firewall drops them.
#[test]
fn a_way_on_which_the_peer_cannot_be_heard_tells_nothing_of_the_way_in() {
    let evidence = Evidence {
        peer_probes_elsewhere: true,
        ..lost()
    };
    let later = start() + 5 * PEER_INSISTS;
    let health = judge_at(&evidence, later);
    assert_eq!(verdicts(&health), (Verdict::Unknown, Verdict::Down));
    assert!(health.is_down());
    assert_eq!(health.inward.reason, Reason::NoEvidence);
    assert!(matches!(health.outward.reason, Reason::Unanswered { .. }));

    // What leaves the link is this way's own.
    let stages = Stages {
        link_out: 12,
        card_out: Some(0),
        ..Stages::default()
    };
    let health = judge_at(&Evidence { stages, ..evidence }, later);
    assert_eq!(
        health.outward.reason,
        Reason::OwnOutputDrops { packets: 12 }
    );
}

#[test]
fn a_session_that_is_up_proves_both_ways() {
    let mut evidence = lost();
    evidence.session.state = State::Up;
    let health = judge_at(&evidence, start());
    assert_eq!(verdicts(&health), (Verdict::Up, Verdict::Up));
    assert_eq!(
        health.to_string(),
        "the path to 203.0.113.2 (UDP 4789) is up: probes are answered"
    );
}

#[test]
fn a_reflector_that_is_off_proves_nothing() {
    let mut evidence = lost();
    evidence.session.state = State::AdminDown;
    let health = judge_at(&evidence, start());
    assert_eq!(health.verdict(), Verdict::Unverified);
    assert!(!health.is_down());
    assert!(health.to_string().contains("AdminDown"), "{health}");
}

#[test]
fn the_peers_own_probes_tell_which_way_is_bad() {
    let mut evidence = lost();
    let now = evidence.session.since;
    // Heard before the silence, or so soon after its beginning that both were under way: says nothing.
    for at in [start() - 20 * MS, start() + 9 * MS] {
        evidence.session.peer = probe(at, WireState::Up);
        let health = judge_at(&evidence, now);
        assert_eq!(verdicts(&health), (Verdict::Down, Verdict::Unknown));
        assert!(matches!(
            health.inward.reason,
            Reason::NothingArrives { .. }
        ));
    }
    evidence.session.peer = probe(now - 30 * MS, WireState::Up);
    let health = judge_at(&evidence, now);
    assert_eq!(verdicts(&health), (Verdict::Up, Verdict::Down));
    assert_eq!(
        health.to_string(),
        "the path to 203.0.113.2 (UDP 4789) is down: 12 probes left and none was answered for 130 ms: see whether UDP 4789 is \
         let through on the path and into the peer"
    );
    // What was heard last, long ago, is silence too.
    let health = judge_at(&evidence, now + 1000 * MS);
    assert_eq!(verdicts(&health), (Verdict::Down, Verdict::Unknown));
}

#[test]
fn a_peer_that_insists_knows_better() {
    let mut evidence = lost();
    let now = evidence.session.since + 1500 * MS;
    evidence.session.peer = probe(now - 10 * MS, WireState::Up);
    assert_eq!(judge_at(&evidence, now).verdict(), Verdict::Up);
    evidence.session.peer = probe(now - 10 * MS, WireState::Down);
    assert_eq!(
        verdicts(&judge_at(&evidence, now)),
        (Verdict::Up, Verdict::Down)
    );
}

#[test]
fn this_nodes_own_firewall_is_named() {
    let mut evidence = lost();
    let now = evidence.session.since;
    evidence.stages = Stages {
        link_out: 12,
        card_out: Some(12),
        // Two of them before the loss began.
        card_in: Some(11),
        link_in: 2,
    };
    let health = judge_at(&evidence, now);
    assert_eq!(verdicts(&health), (Verdict::Down, Verdict::Unknown));
    assert_eq!(
        health.to_string(),
        "the path from 203.0.113.2 (UDP 4789) is down: 9 packets of the peer reached this node's network card and not its \
         probe link: let UDP 4789 in through this node's firewall (INPUT)"
    );
    evidence.stages = Stages {
        link_out: 12,
        card_out: Some(0),
        card_in: Some(0),
        link_in: 0,
    };
    let health = judge_at(&evidence, now);
    assert_eq!(
        health.outward.reason,
        Reason::OwnOutputDrops { packets: 12 }
    );
    assert_eq!(verdicts(&health), (Verdict::Down, Verdict::Down));
    // Where nothing counts at the card nothing is said of it.
    evidence.stages.card_out = None;
    let health = judge_at(&evidence, now);
    assert_eq!(health.outward.reason, Reason::NoEvidence);
}

#[test]
fn before_any_answer_nothing_is_claimed() {
    let mut evidence = lost();
    evidence.session.state = State::Unknown;
    evidence.session.cause = None;
    let now = start() + 20 * MS;
    assert_eq!(
        verdicts(&judge_at(&evidence, now)),
        (Verdict::Unknown, Verdict::Unknown)
    );
    evidence.session.peer = probe(now, WireState::Down);
    assert_eq!(
        verdicts(&judge_at(&evidence, now)),
        (Verdict::Up, Verdict::Unknown)
    );
    evidence.session.cause = Some(Cause::NothingLeft { probes: 20 });
    let told = judge_at(&evidence, now).sentence(Direction::Out);
    assert!(told.contains("did not leave"), "{told}");
}

#[test]
fn a_vni_that_the_peer_lacks_is_the_connections_own_loss() {
    let mut evidence = lost();
    evidence.session.state = State::Up;
    let vni = Vni::try_from(4242).expect("a VNI");
    let health = judge_at(&evidence, start()).without_tunnel(vni);
    assert!(health.is_down());
    assert!(health.to_string().contains("VNI 4242"), "{health}");
}

#[test]
fn health_travels_in_metrics() {
    let evidence = lost();
    let health = judge_at(&evidence, evidence.session.since);
    let mut foreign = ForeignVnis::default();
    let vni = Vni::try_from(77).expect("a VNI");
    assert!(foreign.insert(vni) && !foreign.insert(vni));
    let mut metrics = BTreeMap::from([("rx".to_owned(), "5".to_owned())]);
    Published::write(Some(&health), &foreign, &mut metrics);
    let read = Published::read(&metrics);
    assert_eq!(read.inward, Some(Verdict::Down));
    assert_eq!(read.outward, Some(Verdict::Unknown));
    assert!(read.is_down() && read.foreign.contains(vni));
    assert!(
        read.reason
            .is_some_and(|reason| reason.contains("nothing from the peer arrived"))
    );
    // The same with other milliseconds is no news; another verdict is.
    let mut later = metrics.clone();
    let moved = judge_at(&evidence, evidence.session.since + MS);
    Published::write(Some(&moved), &foreign, &mut later);
    assert!(Published::is_same(&metrics, &later));
    // Neither is one more packet that came to the card only; that they come there is.
    let mut blamed = [4, 5].map(|packets| {
        let mut evidence = lost();
        evidence.stages.card_in = Some(packets);
        let mut metrics = metrics.clone();
        let health = judge_at(&evidence, evidence.session.since);
        Published::write(Some(&health), &foreign, &mut metrics);
        metrics
    });
    assert!(!Published::is_same(&metrics, &blamed[0]));
    assert!(Published::is_same(&blamed[0], &blamed[1]));
    assert_ne!(blamed[0], blamed[1], "the sentence counts");
    // Of what is up there is no reason to tell.
    let mut up = lost();
    up.session.state = State::Up;
    Published::write(Some(&judge_at(&up, start())), &foreign, &mut blamed[0]);
    assert!(!blamed[0].keys().any(|key| key.contains("reason")));
    Published::write(None, &ForeignVnis::default(), &mut later);
    assert!(!Published::is_same(&metrics, &later));
    assert_eq!(later, BTreeMap::from([("rx".to_owned(), "5".to_owned())]));
}

#[test]
fn a_lost_next_hop_travels_beside_health() {
    let evidence = lost();
    let health = judge_at(&evidence, evidence.session.since);
    let mut metrics = BTreeMap::from([("rx".to_owned(), "5".to_owned())]);
    Published::write(Some(&health), &ForeignVnis::default(), &mut metrics);
    let heard = metrics.clone();
    assert_eq!(LostHop::read(&heard), None);
    let hop = LostHop {
        reason: "it went".into(),
    };
    LostHop::write(Some(&hop), &mut metrics);
    assert_eq!(metrics["next_hop"], "lost");
    assert_eq!(LostHop::read(&metrics), Some(hop));
    assert!(!Published::is_same(&metrics, &heard), "it is news");
    // Either is written without the other.
    Published::write(None, &ForeignVnis::default(), &mut metrics);
    assert!(LostHop::read(&metrics).is_some());
    // Somebody else's word for the same is taken, and any other value for what it is.
    metrics.remove("next_hop_reason");
    let read = LostHop::read(&metrics).expect("lost");
    assert!(read.reason.contains("broken"), "{read:?}");
    LostHop::write(None, &mut metrics);
    assert_eq!(metrics, BTreeMap::from([("rx".to_owned(), "5".to_owned())]));
    metrics.insert("next_hop".to_owned(), "10.0.0.1".to_owned());
    assert_eq!(LostHop::read(&metrics), None);
}

#[test]
fn a_bad_link_travels_beside_health() {
    let mut metrics = BTreeMap::from([("rx".to_owned(), "5".to_owned())]);
    let before = metrics.clone();
    assert_eq!(BadLink::read(&metrics), None);
    let bad = BadLink {
        reason: "`nsm-1`: it is down".into(),
    };
    BadLink::write(Some(&bad), &mut metrics);
    assert_eq!(metrics["link_state"], "down");
    assert_eq!(BadLink::read(&metrics), Some(bad));
    assert!(!Published::is_same(&metrics, &before), "it is news");
    metrics.remove("link_reason");
    assert!(BadLink::read(&metrics).is_some());
    metrics.insert("link_state".to_owned(), "fine".to_owned());
    assert_eq!(BadLink::read(&metrics), None);
    BadLink::write(None, &mut metrics);
    assert_eq!(metrics, before);
}

/// A hop of another domain writes what it likes, and `connect` shows it.
#[test]
fn what_another_hop_says_is_only_words() {
    let told = format!("\u{1b}[31mfine\nconnected  {}", "x".repeat(100_000));
    let metrics = BTreeMap::from([("sbfd_reason".to_owned(), told)]);
    let reason = Published::read(&metrics).reason.expect("a reason");
    assert!(
        reason.starts_with("\\u{1b}[31mfine\\nconnected"),
        "{reason}"
    );
    assert_eq!(reason.chars().count(), 1000);
    let told = ["next_hop", "next_hop_reason"].map(str::to_owned);
    let metrics = BTreeMap::from_iter(
        told.into_iter()
            .zip(["lost", "\u{1b}c\n"].map(str::to_owned)),
    );
    let lost = LostHop::read(&metrics).expect("lost");
    assert_eq!(&*lost.reason, "\\u{1b}c\\n");
}

fn verdict() -> impl Strategy<Value = Verdict> {
    prop::sample::select(vec![
        Verdict::Unknown,
        Verdict::Up,
        Verdict::Down,
        Verdict::Unverified,
    ])
}

proptest! {
    /// Down is never claimed without a session that is, and one that is up is never down.
    #[test]
    fn only_a_lost_session_is_down(
        state in prop::sample::select(vec![State::Unknown, State::Up, State::Down, State::AdminDown]),
        heard in prop::option::of(any::<u64>()),
        told in prop::option::of((verdict(), verdict(), any::<u64>())),
        stages: [u64; 4],
        now: u64,
    ) {
        let mut evidence = lost();
        evidence.session.state = state;
        evidence.session.peer = heard.and_then(|at| probe(Monotonic::from_nanos(at), WireState::Up));
        evidence.peer_report = told.map(|(inward, outward, at)| ReceivedReport {
            report: PeerReport { inward, outward },
            at: Monotonic::from_nanos(at),
        });
        let [link_out, card_out, card_in, link_in] = stages;
        evidence.stages = Stages { link_out, card_out: Some(card_out), card_in: Some(card_in), link_in };
        let health = judge_at(&evidence, Monotonic::from_nanos(now));
        prop_assert!(state == State::Down || !health.is_down());
        prop_assert_eq!(state == State::Up, health.verdict() == Verdict::Up && state != State::Down);
        for direction in [Direction::In, Direction::Out] {
            prop_assert!(!health.sentence(direction).is_empty());
        }
    }

    #[test]
    fn any_metrics_can_be_read(metrics in prop::collection::btree_map("sbfd_state_in|sbfd_state_out|vxlan_foreign_vnis", ".{0,40}|[0-9,]{0,400}", 0..4)) {
        let _ = Published::read(&metrics);
    }
}

/// A reader of the JSON finds the same codes as a reader of the metrics.
#[test]
fn a_reason_is_serialised_with_its_code() {
    let silence = MS;
    for reason in [
        Reason::NotProbedYet,
        Reason::NothingLeaves { probes: 1 },
        Reason::NoEvidence,
        Reason::Answered,
        Reason::PeerProbesArrive,
        Reason::PeerIsAnswered,
        Reason::PeerReportsUp,
        Reason::PeerReportsDown { probes: 1 },
        Reason::Unanswered { probes: 1, silence },
        Reason::NothingArrives { silence },
        Reason::OwnInputDrops { packets: 1 },
        Reason::OwnOutputDrops { packets: 1 },
        Reason::ForeignVni {
            vni: Vni::MANAGEMENT,
        },
        Reason::NoReflector,
        Reason::SwitchedOff,
        Reason::NotProbing,
    ] {
        let json = serde_json::to_value(reason).expect("JSON");
        assert_eq!(json["code"], reason.code());
    }
    let json = serde_json::to_value(lost()).expect("JSON");
    assert_eq!(
        json["session"]["cause"]["unanswered"]["silence_ns"],
        130_000_000
    );
    assert_eq!(json["path"]["reflector"]["vni"], 1);
}
