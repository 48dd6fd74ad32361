//! Who may relay, and what is dialled.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::identity::relay::{NotServed, Relays, Source, check_dial};

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn network(text: &str) -> Source {
    Source::Network(Some(text.parse().unwrap()))
}

#[test]
fn only_named_callers_of_the_network_relay() {
    let relays = Relays {
        relay_for: nets(&["10.1.0.0/16", "fd01::/16"]),
        registrants: Vec::new(),
    };
    for ours in [
        Source::Node,
        network("10.1.2.3"),
        network("::ffff:10.1.2.3"),
        network("fd01::7"),
    ] {
        assert_eq!(relays.check_relay(ours), Ok(()), "{ours:?}");
        assert!(!relays.is_stranger(ours));
    }
    for other in [
        network("10.2.0.1"),
        network("127.0.0.1"),
        Source::Network(None),
    ] {
        assert_eq!(
            relays.check_relay(other),
            Err(NotServed::Relay),
            "{other:?}"
        );
        assert!(relays.is_stranger(other));
    }
    assert_eq!(
        Relays::default().check_relay(network("127.0.0.1")),
        Err(NotServed::Relay)
    );
    assert_eq!(Relays::default().check_relay(Source::Node), Ok(()));
}

#[test]
fn registrants_are_those_that_are_named_where_any_are() {
    let open = Relays::default();
    assert_eq!(open.check_registrant(network("203.0.113.7")), Ok(()));
    let named = Relays {
        relay_for: nets(&["10.1.0.0/16"]),
        registrants: nets(&["203.0.113.7/32"]),
    };
    for allowed in [Source::Node, network("203.0.113.7"), network("10.1.0.9")] {
        assert_eq!(named.check_registrant(allowed), Ok(()), "{allowed:?}");
    }
    assert_eq!(
        named.check_registrant(network("203.0.113.8")),
        Err(NotServed::Registrant)
    );
    assert_eq!(
        named.check_relay(network("203.0.113.7")),
        Err(NotServed::Relay)
    );
}

#[test]
fn nothing_of_this_node_is_dialled_for_others() {
    let dial = |text: &str, is_own, inside: &[&str]| {
        check_dial(text.parse::<IpAddr>().unwrap(), is_own, &nets(inside))
    };
    for inside in [
        "127.0.0.1",
        "127.9.9.9",
        "::1",
        "::ffff:127.0.0.1",
        "169.254.169.254",
        "fe80::1",
        "224.0.0.1",
        "0.0.0.0",
        "0.0.0.1",
        "::",
        "255.255.255.255",
    ] {
        let refused = dial(inside, false, &[]).unwrap_err().to_string();
        assert!(refused.contains("dial_inside"), "{refused}");
    }
    assert!(
        dial("10.0.0.5", true, &[])
            .unwrap_err()
            .to_string()
            .contains("an address of this node")
    );
    assert_eq!(dial("10.0.0.6", false, &[]), Ok(()));
    assert_eq!(dial("127.0.0.1", true, &["127.0.0.0/8"]), Ok(()));
    assert_eq!(dial("::ffff:127.0.0.1", true, &["127.0.0.0/8"]), Ok(()));
    assert_eq!(dial("10.0.0.5", true, &["10.0.0.5/32"]), Ok(()));
    assert!(dial("169.254.169.254", false, &["127.0.0.0/8"]).is_err());
}

#[test]
fn who_has_proved_an_id_is_decided_on_by_that() {
    let relays = Relays {
        relay_for: nets(&["10.1.0.0/16"]),
        registrants: nets(&["10.1.0.0/16"]),
    };
    for is_own in [true, false] {
        let proven = Source::Proven { is_own };
        assert_eq!(relays.check_relay(proven), Ok(()));
        assert_eq!(relays.check_registrant(proven), Ok(()));
        // Another domain's learns no more of what lies behind us than before.
        assert_eq!(relays.is_stranger(proven), !is_own);
    }
}
