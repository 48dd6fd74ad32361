use std::time::Duration;

use super::path_id;
use crate::{
    clock::Monotonic,
    liveness::{
        sbfd::{Snapshot, State},
        *,
    },
};

fn at(millis: u64) -> Monotonic {
    Monotonic::from_nanos(10_000_000_000) + Duration::from_millis(millis)
}

/// A session in a state since `at(0)`, at `now`.
fn evidence(state: State, now: Monotonic) -> Evidence {
    Evidence {
        path: path_id(),
        at: now,
        session: Snapshot {
            state,
            since: at(0),
            cause: None,
            silent_since: None,
            last_answer: None,
            rto: Duration::from_millis(10),
            peer: None,
            peer_gap: Duration::from_millis(45),
            path_mtu: None,
        },
        stages: Stages::default(),
        peer_probes_elsewhere: false,
        peer_report: None,
    }
}

/// What a peer reports that gets nothing from us.
const CUT_OFF: PeerReport = PeerReport {
    inward: Verdict::Down,
    outward: Verdict::Unknown,
};

#[test]
fn a_path_is_used_until_its_last_connection_leaves() {
    let peer = path_id().address;
    let mut users = PathUsers::default();
    for user in ["one", "one", "two"] {
        users.join(user, peer, 1450);
    }
    assert!(!users.leave("one"));
    assert!(!users.leave("stranger"));
    assert!(users.leave("two"));
}

#[test]
fn a_search_of_the_mtu_begins_when_another_size_is_wanted() {
    let mut users = PathUsers::default();
    let v4 = "192.0.2.1".parse().unwrap();
    let range = |smallest, wanted| Some(MtuRange { smallest, wanted });
    assert_eq!(users.join("one", v4, 1450), range(576, 1450));
    assert_eq!(users.join("two", v4, 1450), None);
    assert_eq!(users.join("one", v4, 9000), range(576, 9000));
    assert_eq!(users.join("one", v4, 70_000), range(576, u16::MAX));
    let v6 = "2001:db8::1".parse().unwrap();
    assert_eq!(users.join("one", v6, 1450), range(1280, 1450));
}

#[test]
fn only_what_is_new_is_returned() {
    let mut users = PathUsers::default();
    assert_eq!((users.health(), users.is_up()), (None, false));
    let up = users.judge(evidence(State::Up, at(0)));
    assert_eq!((up, users.is_up()), (users.health(), true));
    assert!(up.is_some());
    assert_eq!(users.judge(evidence(State::Up, at(100))), None);

    let down = users.judge(evidence(State::Down, at(200)));
    assert!(down.is_some_and(|health| health.is_down()));
    // The silence has grown, and nothing else.
    assert_eq!(users.judge(evidence(State::Down, at(300))), None);
    assert_ne!(users.health(), down);
    assert!(!users.is_up());
}

#[test]
fn the_last_report_of_an_open_stream_is_judged_with_the_evidence() {
    let peer = path_id().address;
    let mut users = PathUsers::default();
    let outward = |users: &mut PathUsers, now| {
        users.judge(evidence(State::Down, now));
        users.health().unwrap().outward
    };
    for user in ["one", "two"] {
        users.join(user, peer, 1450);
    }
    assert_eq!(outward(&mut users, at(200)).verdict, Verdict::Unknown);
    users.set_report("stranger", Some(CUT_OFF), at(210));
    assert_eq!(outward(&mut users, at(300)).verdict, Verdict::Unknown);
    users.set_report("one", Some(CUT_OFF), at(310));
    assert_eq!(outward(&mut users, at(400)).verdict, Verdict::Down);
    let later = PeerReport {
        inward: Verdict::Up,
        outward: Verdict::Down,
    };
    users.set_report("two", Some(later), at(410));
    assert_eq!(outward(&mut users, at(500)).verdict, Verdict::Up);
    users.leave("two");
    assert_eq!(outward(&mut users, at(600)).verdict, Verdict::Down);
    users.set_report("one", None, at(610));
    assert_eq!(outward(&mut users, at(700)).verdict, Verdict::Unknown);
}
