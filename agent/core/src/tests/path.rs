use proptest::prelude::*;

use super::at;
use crate::nsm::path::{MAX_SEGMENTS, Path, PathError, Segment, check_reply, selector_matches};

fn segment(name: &str, id: &str) -> Segment {
    Segment {
        name: name.to_owned(),
        id: id.to_owned(),
        token: format!("token of {name}"),
        expires: Some(at(600)),
        ..Segment::default()
    }
}

fn path(index: u32, segments: &[(&str, &str)]) -> Path {
    Path {
        index,
        segments: segments
            .iter()
            .map(|(name, id)| segment(name, id))
            .collect(),
    }
}

fn check(sent: &Path, reply: &Path) -> Result<(), PathError> {
    let segments = reply.segments.iter();
    let names = segments.map(|segment| (segment.name.as_str(), segment.id.as_str()));
    check_reply(sent, reply.index, names)
}

fn never() -> String {
    panic!("a known hop keeps its id")
}

fn names(path: &Path) -> Vec<&str> {
    path.names().collect()
}

#[test]
fn a_first_request_gets_a_segment() {
    let mut path = path(0, &[("nsc", "1")]);
    let hop = path.descend("1", "nsmgr", || "2".to_owned()).unwrap();
    assert_eq!(
        (hop.index, hop.id.as_str(), hop.previous, hop.known),
        (1, "2", Some(0), false)
    );
    assert_eq!(path.index, 1);
    assert_eq!(
        path.segments[1],
        Segment {
            name: "nsmgr".to_owned(),
            id: "2".to_owned(),
            ..Segment::default()
        }
    );
    path.ascend(&hop);
    assert_eq!(path.index, 0);
}

#[test]
fn a_refresh_keeps_the_ids_of_every_hop() {
    let sent = path(0, &[("nsc", "1"), ("nsmgr", "2"), ("nse", "3")]);
    let mut path = sent.clone();
    let hop = path.descend("1", "nsmgr", never).unwrap();
    assert!(hop.known);
    assert_eq!(hop.id, "2");
    assert_eq!(path.segments, sent.segments);
}

#[test]
fn another_hop_in_our_place_is_replaced_and_those_below_stay() {
    let mut path = path(
        1,
        &[
            ("nsc", "1"),
            ("nsmgr", "2"),
            ("forwarder-a", "3"),
            ("nse", "4"),
        ],
    );
    let hop = path.descend("2", "forwarder-b", || "9".to_owned()).unwrap();
    assert!(!hop.known);
    assert_eq!(names(&path), ["nsc", "nsmgr", "forwarder-b", "nse"]);
    assert_eq!(
        path.segments[2],
        Segment {
            name: "forwarder-b".to_owned(),
            id: "9".to_owned(),
            ..Segment::default()
        }
    );
    // The endpoint finds its own id and refreshes.
    path.segments[2].expires = Some(at(600));
    assert_eq!(path.descend("9", "nse", never).unwrap().id, "4");
}

#[test]
fn a_known_hop_without_id_gets_one() {
    let mut path = path(0, &[("nsc", "1"), ("nsmgr", "")]);
    let hop = path.descend("1", "nsmgr", || "2".to_owned()).unwrap();
    assert_eq!((hop.id.as_str(), hop.known), ("2", false));
}

#[test]
fn a_path_begins_here() {
    let (mut path, hop) = Path::begin("nsc", "1".to_owned());
    assert_eq!((hop.index, hop.previous), (0, None));
    let segments: Vec<_> = path
        .segments
        .iter()
        .map(|it| (&*it.name, &*it.id))
        .collect();
    assert_eq!(segments, [("nsc", "1")]);
    path.ascend(&hop);
    assert_eq!(path.index, 0);
}

#[test]
fn each_broken_rule_has_its_own_error_and_changes_nothing() {
    let good = path(0, &[("nsc", "1")]);
    let refused = |sent: &Path, id: &str| {
        let mut path = sent.clone();
        let error = path.descend(id, "nsmgr", || "2".to_owned()).unwrap_err();
        assert_eq!(path, *sent, "an error leaves the path alone");
        error
    };
    assert_eq!(refused(&good, ""), PathError::NoConnectionId);
    let empty = refused(&Path::default(), "1");
    assert!(matches!(empty, PathError::Empty { .. }));
    assert!(
        empty
            .to_string()
            .contains("connection 1 has no path segments: send a path"),
        "{empty}"
    );
    for index in [1, 2, u32::MAX] {
        let error = refused(
            &Path {
                index,
                ..good.clone()
            },
            "1",
        );
        assert_eq!(error, PathError::IndexOutOfRange { index, len: 1 });
    }
    let error = refused(&good, "2");
    assert!(matches!(error, PathError::IdMismatch { .. }));
    for part in ["id 2", "id 1", "segment 0", "nsc"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    let mut eternal = good.clone();
    eternal.segments[0].expires = None;
    let error = refused(&eternal, "1");
    assert!(
        error
            .to_string()
            .contains("expiration for the previous path segment cannot be nil"),
        "{error}"
    );
}

#[test]
fn a_path_has_at_most_64_segments() {
    let of = |len: usize, index| Path {
        index,
        segments: (0..len).map(|_| segment("proxy", "1")).collect(),
    };
    let last = u32::try_from(MAX_SEGMENTS).unwrap() - 1;
    assert!(
        of(MAX_SEGMENTS - 1, last - 1)
            .descend("1", "own", || "2".to_owned())
            .is_ok()
    );
    assert_eq!(
        of(MAX_SEGMENTS, last).descend("1", "own", || "2".to_owned()),
        Err(PathError::TooLong(65))
    );
    assert_eq!(
        of(65, 0).descend("1", "own", || "2".to_owned()),
        Err(PathError::TooLong(65))
    );
}

#[test]
fn a_reply_keeps_what_was_sent_down_to_us() {
    let sent = path(1, &[("nsc", "1"), ("nsmgr", "2"), ("old", "3")]);
    let reply = |index, segments: &[(&str, &str)]| check(&sent, &path(index, segments));
    assert_eq!(
        reply(
            1,
            &[("nsc", "1"), ("nsmgr", "2"), ("new", "7"), ("nse", "8")]
        ),
        Ok(())
    );
    assert_eq!(reply(1, &[("nsc", "1"), ("nsmgr", "2")]), Ok(()));
    assert_eq!(
        reply(2, &[("nsc", "1"), ("nsmgr", "2"), ("x", "3")]),
        Err(PathError::ReplyIndex { sent: 1, got: 2 })
    );
    assert_eq!(
        reply(1, &[("nsc", "1")]),
        Err(PathError::ReplyTruncated { needed: 2, got: 1 })
    );
    assert!(matches!(
        reply(1, &[("nsc", "1"), ("evil", "2")]),
        Err(PathError::ReplyName { index: 1, .. })
    ));
    assert!(matches!(
        reply(1, &[("nsc", "6"), ("nsmgr", "2")]),
        Err(PathError::ReplyId { index: 0, .. })
    ));
    let long = Path {
        index: 1,
        segments: vec![segment("x", "y"); 65],
    };
    assert_eq!(check(&sent, &long), Err(PathError::TooLong(65)));
}

#[test]
fn a_selector_matches_as_one_run() {
    let path = [
        ("nsc", "1"),
        ("nsmgr", "2"),
        ("forwarder", "3"),
        ("nsmgr", "4"),
    ];
    assert!(selector_matches(&[], &path));
    assert!(selector_matches(&[], &[]));
    assert!(selector_matches(&[("nsmgr", "")], &path));
    assert!(selector_matches(&[("", "4")], &path));
    assert!(selector_matches(&[("nsmgr", "2"), ("", "3")], &path));
    assert!(selector_matches(&[("nsmgr", ""), ("forwarder", "")], &path));
    assert!(selector_matches(
        &[("", ""), ("", ""), ("", ""), ("", "")],
        &path
    ));
    assert!(
        !selector_matches(&[("nsc", ""), ("forwarder", "")], &path),
        "not next to each other"
    );
    assert!(
        !selector_matches(&[("nsmgr", "3")], &path),
        "name and id of two segments"
    );
    assert!(
        !selector_matches(&[("", ""); 5], &path),
        "longer than the path"
    );
    assert!(!selector_matches(&[("", "")], &[]));
}

proptest! {
    /// Down over any hops and up again: the sender's view is whole, and a second time no hop gets another id.
    #[test]
    fn down_and_up_restores_and_refreshes(hops in prop::collection::vec("[a-d]", 1..20)) {
        let mut path = path(0, &[("nsc", "id 0")]);
        let mut runs = Vec::new();
        for round in 0..2 {
            let mut stack = Vec::new();
            let mut id = "id 0".to_owned();
            for (n, name) in hops.iter().enumerate() {
                let before = path.clone();
                let hop = path.descend(&id, name, || format!("id {}", n + 1)).unwrap();
                prop_assert_eq!(hop.known, round == 1);
                prop_assert_eq!(hop.index, before.index + 1);
                prop_assert_eq!(path.index, hop.index);
                prop_assert_eq!(&path.segments[n + 1].id, &hop.id);
                prop_assert_eq!(&path.segments[..=n], &before.segments[..=n]);
                prop_assert_eq!(check(&before, &Path { index: before.index, ..path.clone() }), Ok(()));
                path.segments[n + 1].expires = Some(at(60));
                id.clone_from(&hop.id);
                stack.push(hop);
            }
            while let Some(hop) = stack.pop() {
                prop_assert_eq!(path.index, hop.index);
                path.ascend(&hop);
            }
            prop_assert_eq!(path.index, 0);
            runs.push(path.clone());
        }
        prop_assert_eq!(&runs[0], &runs[1]);
        prop_assert_eq!(path.segments.len(), hops.len() + 1);
    }

    #[test]
    fn no_path_panics(index in prop_oneof![0u32..6, Just(u32::MAX)], ids in prop::collection::vec("[ab]?", 0..5), id in "[ab]?", own in "[ab]") {
        let segments: Vec<_> = ids.iter().map(|id| segment(id, id)).collect();
        let mut path = Path { index, segments };
        if let Ok(hop) = path.descend(&id, &own, || "new".to_owned()) {
            prop_assert_eq!(&path.segments[hop.index as usize].name, &own);
            prop_assert!(!hop.id.is_empty());
            path.ascend(&hop);
            prop_assert_eq!(path.index, index);
        }
    }
}
