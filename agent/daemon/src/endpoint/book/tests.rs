use std::time::Duration;

use nsm_core::mechanism::{INODE_URL, NETNS_INODE};
use nsm_proto::connection::{Path as WirePath, PathSegment};

use super::*;

const NOW: SystemTime = SystemTime::UNIX_EPOCH;

fn at(seconds: u64) -> SystemTime {
    NOW + Duration::from_secs(seconds)
}

fn book() -> Book {
    let identity = Identity {
        name: "nse".to_owned(),
        services: vec!["icmp-responder".to_owned()],
        payload: "IP",
        netns: Netns::open("/proc/self/ns/net").unwrap(),
    };
    let addresses = Addresses::new(&["172.16.1.0/28".parse().unwrap()]).unwrap();
    Book::new(identity, addresses)
}

fn kernel(parameters: &[(&str, &str)]) -> Mechanism {
    Mechanism {
        cls: LOCAL.to_owned(),
        r#type: KERNEL.to_owned(),
        parameters: parameters
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
    }
}

/// A Request as an agent sends it for the client `id`.
fn request(id: &str) -> NetworkServiceRequest {
    let segment = |name: &str, id: &str| PathSegment {
        name: name.to_owned(),
        id: id.to_owned(),
        ..PathSegment::default()
    };
    NetworkServiceRequest {
        connection: Some(Connection {
            id: id.to_owned(),
            network_service: "icmp-responder".to_owned(),
            path: Some(WirePath {
                index: 1,
                path_segments: vec![segment("nsc", "nsc-id"), segment("agent", id)],
            }),
            ..Connection::default()
        }),
        mechanism_preferences: vec![kernel(&[])],
    }
}

impl Book {
    fn ask(&mut self, request: NetworkServiceRequest, seconds: u64) -> Result<Granted, Refusal> {
        let token = |text: &str, seconds| Token {
            text: text.to_owned(),
            expires: at(seconds),
        };
        self.grant(request, token("theirs", seconds), token("ours", 600), NOW)
    }
}

/// The kind and connection ids of every event that waits.
fn heard(events: &mut Events) -> Vec<(ConnectionEventType, Vec<String>)> {
    let mut heard = Vec::new();
    while let Ok(Ok(event)) = events.try_recv() {
        let ids = event.connections.values().map(|connection| {
            let path = connection.path.as_ref().unwrap();
            path.path_segments[1].id.clone()
        });
        heard.push((event.r#type(), ids.collect()));
    }
    heard
}

#[test]
fn a_request_is_granted_with_everything_an_agent_needs() {
    let mut book = book();
    let granted = book.ask(request("a"), 60).unwrap();
    assert!(granted.is_new);
    let answer = granted.answer;
    assert_eq!(answer.id, "a");
    assert_eq!(answer.network_service_endpoint_name, "nse");
    assert_eq!(answer.payload, "IP");
    let path = answer.path.unwrap();
    assert_eq!((path.index, path.path_segments.len()), (1, 3));
    assert_eq!(path.path_segments[1].token, "theirs");
    assert_eq!(path.path_segments[1].expires, Some(at(60).into()));
    assert_eq!(path.path_segments[2].name, "nse");
    assert_eq!(path.path_segments[2].token, "ours");
    assert_eq!(path.path_segments[2].expires, Some(at(600).into()));
    let mechanism = answer.mechanism.unwrap();
    let parameters = &mechanism.parameters;
    assert!(parameters[INODE_URL].starts_with("file:///proc/"));
    assert!(parameters.contains_key(NETNS_INODE));
    assert!(parameters[NAME].starts_with("nsm-") && parameters[NAME].len() == 12);
    let ip = answer.context.unwrap().ip_context.unwrap();
    assert_eq!(ip.dst_ip_addrs, ["172.16.1.1/32"]);
    assert_eq!(ip.src_ip_addrs, ["172.16.1.2/32"]);
}

#[test]
fn a_refresh_changes_nothing_but_the_expiry() {
    let mut book = book();
    let first = book.ask(request("a"), 60).unwrap().answer;
    // With everything that was answered, and with everything forgotten.
    let full = NetworkServiceRequest {
        connection: Some(first.clone()),
        mechanism_preferences: vec![kernel(&[])],
    };
    for again in [full, request("a")] {
        let granted = book.ask(again, 120).unwrap();
        assert!(!granted.is_new);
        let mut answer = granted.answer;
        let path = answer.path.as_mut().unwrap();
        path.path_segments[1].expires = Some(at(60).into());
        assert_eq!(answer, first);
    }
    assert_eq!(book.next_expiry(), Some(at(120)));
    assert_eq!(book.addresses.in_use(), [1]);
}

#[test]
fn what_is_closed_or_not_refreshed_is_free_again() {
    let mut book = book();
    book.ask(request("a"), 60).unwrap();
    book.ask(request("b"), 30).unwrap();
    assert_eq!(book.next_expiry(), Some(at(30)));
    assert!(book.close_expired(at(29)).is_empty());
    assert_eq!(book.close_expired(at(30)).len(), 1);
    assert!(book.close("b").is_none());
    assert!(book.close("a").is_some());
    assert!(book.close("a").is_none());
    assert!(book.close("never").is_none());
    assert_eq!(book.addresses.in_use(), [0]);
    assert_eq!(book.next_expiry(), None);
}

#[test]
fn monitors_hear_of_what_they_select() {
    use ConnectionEventType::{Delete, InitialStateTransfer, Update};
    let mut book = book();
    book.ask(request("a"), 60).unwrap();
    let segment = |id: &str| MonitorScopeSelector {
        path_segments: vec![PathSegment {
            id: id.to_owned(),
            ..PathSegment::default()
        }],
        ..MonitorScopeSelector::default()
    };
    let mut all = book.watch(MonitorScopeSelector::default());
    let mut one = book.watch(segment("b"));
    let mut other = book.watch(MonitorScopeSelector {
        network_services: vec!["web".to_owned()],
        ..MonitorScopeSelector::default()
    });
    book.ask(request("b"), 60).unwrap();
    book.close("a");
    let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
    assert_eq!(
        heard(&mut all),
        [
            (InitialStateTransfer, ids(&["a"])),
            (Update, ids(&["b"])),
            (Delete, ids(&["a"]))
        ]
    );
    assert_eq!(
        heard(&mut one),
        [(InitialStateTransfer, ids(&[])), (Update, ids(&["b"]))]
    );
    assert_eq!(heard(&mut other), [(InitialStateTransfer, ids(&[]))]);
    drop(other);
    book.end();
    assert_eq!(heard(&mut one), [(Delete, ids(&["b"]))]);
    assert!(one.is_closed() && all.is_closed());
    assert_eq!(book.addresses.in_use(), [0]);
    assert!(matches!(
        book.ask(request("c"), 60),
        Err(Refusal::Ending(_))
    ));
}

#[test]
fn a_monitor_that_does_not_read_is_cut_off() {
    let mut book = book();
    let events = book.watch(MonitorScopeSelector::default());
    for _ in 0..BACKLOG {
        book.ask(request("a"), 60).unwrap();
    }
    assert!(book.watchers.is_empty());
    assert!(events.is_closed());
}

#[test]
fn each_connection_has_its_own_interface() {
    let mut book = book();
    let mut asked = request("a");
    asked.mechanism_preferences = vec![kernel(&[(NAME, "eth7")])];
    let name = |granted: Granted| granted.answer.mechanism.unwrap().parameters[NAME].clone();
    assert_eq!(name(book.ask(asked.clone(), 60).unwrap()), "eth7");
    asked.connection = request("b").connection;
    let second = name(book.ask(asked, 60).unwrap());
    assert!(second.starts_with("nsm-") && second.len() <= 15, "{second}");
    assert_ne!(second, name(book.ask(request("c"), 60).unwrap()));
}

#[test]
fn reselecting_begins_anew() {
    let mut book = book();
    book.ask(request("a"), 60).unwrap();
    let mut events = book.watch(MonitorScopeSelector::default());
    let mut again = request("a");
    again
        .connection
        .as_mut()
        .unwrap()
        .set_state(State::ReselectRequested);
    let granted = book.ask(again, 60).unwrap();
    assert!(granted.is_new);
    assert_eq!(granted.answer.state(), State::Up);
    let kinds: Vec<_> = heard(&mut events)
        .into_iter()
        .map(|(kind, _)| kind)
        .collect();
    use ConnectionEventType::{Delete, InitialStateTransfer, Update};
    assert_eq!(kinds, [InitialStateTransfer, Delete, Update]);
    assert_eq!(book.addresses.in_use(), [1]);
}

#[test]
fn what_cannot_be_granted_is_refused_and_leaves_nothing() {
    let mut book = book();
    let connection = |spoil: fn(&mut Connection)| {
        let mut request = request("a");
        spoil(request.connection.as_mut().unwrap());
        request
    };
    let preferences = |mechanisms: Vec<Mechanism>| NetworkServiceRequest {
        mechanism_preferences: mechanisms,
        ..request("a")
    };
    let vxlan = Mechanism {
        cls: "REMOTE".to_owned(),
        r#type: "VXLAN".to_owned(),
        ..Mechanism::default()
    };
    for (request, code, words) in [
        (
            NetworkServiceRequest::default(),
            Code::InvalidArgument,
            "no connection",
        ),
        (
            connection(|c| c.network_service = "web".to_owned()),
            Code::NotFound,
            "[\"icmp-responder\"], not \"web\"",
        ),
        (connection(|c| c.id.clear()), Code::InvalidArgument, "id"),
        (connection(|c| c.path = None), Code::InvalidArgument, "path"),
        (
            connection(|c| c.path.as_mut().unwrap().index = 7),
            Code::InvalidArgument,
            "7",
        ),
        (
            connection(|c| c.id = "b".to_owned()),
            Code::InvalidArgument,
            "b",
        ),
        (preferences(vec![]), Code::InvalidArgument, "KERNEL"),
        (preferences(vec![vxlan]), Code::InvalidArgument, "VXLAN"),
        (
            preferences(vec![kernel(&[(NAME, "an-interface-name")])]),
            Code::InvalidArgument,
            "an-interface-name",
        ),
        (
            connection(|c| {
                let ip = c
                    .context
                    .get_or_insert_default()
                    .ip_context
                    .get_or_insert_default();
                ip.excluded_prefixes = vec!["all".to_owned()];
            }),
            Code::InvalidArgument,
            "\"all\"",
        ),
        (
            connection(|c| {
                let ip = c
                    .context
                    .get_or_insert_default()
                    .ip_context
                    .get_or_insert_default();
                ip.excluded_prefixes = vec!["172.16.0.0/12".to_owned()];
            }),
            Code::ResourceExhausted,
            "172.16.1.0/28",
        ),
    ] {
        let status = Status::from(book.ask(request, 60).unwrap_err());
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(words), "{words}: {status}");
        assert!(book.held.is_empty());
        assert_eq!(book.addresses.in_use(), [0], "{status}");
    }
    assert!(matches!(
        book.ask(request("a"), 0),
        Err(Refusal::Expired { .. })
    ));
}

#[test]
fn a_refresh_that_is_refused_keeps_what_there_was() {
    let mut book = book();
    book.ask(request("a"), 60).unwrap();
    let mut again = request("a");
    again.mechanism_preferences.clear();
    book.ask(again, 120).unwrap_err();
    assert_eq!(book.next_expiry(), Some(at(60)));
    assert_eq!(book.addresses.in_use(), [1]);
}
