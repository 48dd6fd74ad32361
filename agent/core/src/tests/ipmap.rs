use std::net::IpAddr;

use proptest::prelude::*;

use super::map;
use crate::{
    address::ipmap::{IpMap, IpMapError, comes_from_peer},
    mechanism::{DST_IP, ORIG_DST_IP, ORIG_SRC_IP, Parameters, SRC_IP},
};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn ip_map(pairs: &[(&str, &str)]) -> IpMap {
    IpMap::from_pairs(
        pairs
            .iter()
            .map(|(internal, external)| (ip(internal), ip(external))),
    )
    .unwrap()
}

/// The exchange that two real NSM domains had (wire/vxlan-floating.log), step by step.
#[test]
fn the_recorded_exchange() {
    let client = ip_map(&[("10.1.0.5", "203.0.113.5")]);
    let server = ip_map(&[("10.2.0.6", "198.51.100.6")]);

    let mut params = map(&[("src_ip", "10.1.0.5"), ("src_port", "4789")]);
    let sent = client.request_out(&mut params);
    assert_eq!(
        params,
        map(&[
            ("orig_src_ip", "10.1.0.5"),
            ("src_ip", "203.0.113.5"),
            ("src_port", "4789")
        ])
    );
    assert!(comes_from_peer(&params));

    server.request_in(&mut params);
    assert_eq!(params.get(DST_IP).map(String::as_str), Some(""));
    assert_eq!(params.get(ORIG_DST_IP).map(String::as_str), Some(""));

    params.extend(map(&[
        ("dst_ip", "10.2.0.6"),
        ("dst_port", "4789"),
        ("vni", "2863933"),
    ]));
    server.reply_out(&mut params);
    let on_the_wire = map(&[
        ("dst_ip", "198.51.100.6"),
        ("dst_port", "4789"),
        ("orig_dst_ip", "10.2.0.6"),
        ("orig_src_ip", "10.1.0.5"),
        ("src_ip", "203.0.113.5"),
        ("src_port", "4789"),
        ("vni", "2863933"),
    ]);
    assert_eq!(params, on_the_wire);

    client.reply_in(&mut params, sent.as_deref());
    let mut restored = on_the_wire.clone();
    restored.extend(map(&[("src_ip", "10.1.0.5"), ("orig_src_ip", "")]));
    assert_eq!(params, restored);

    // The refresh carries this mechanism; the same steps give the same exchange.
    let sent = client.request_out(&mut params);
    server.request_in(&mut params);
    assert_eq!(
        params.get(DST_IP).map(String::as_str),
        Some(""),
        "the forwarder must not see its public address"
    );
    params.insert(DST_IP.to_owned(), "10.2.0.6".to_owned());
    server.reply_out(&mut params);
    assert_eq!(params, on_the_wire);
    client.reply_in(&mut params, sent.as_deref());
    assert_eq!(params, restored);
}

#[test]
fn an_address_that_the_map_does_not_have_passes_and_is_marked() {
    let none = IpMap::default();
    let mut params = map(&[("src_ip", "10.1.0.5")]);
    assert_eq!(none.request_out(&mut params).as_deref(), Some("10.1.0.5"));
    assert_eq!(
        params,
        map(&[("src_ip", "10.1.0.5"), ("orig_src_ip", "10.1.0.5")])
    );
    let mut params = map(&[("dst_ip", "10.2.0.6")]);
    none.reply_out(&mut params);
    assert_eq!(
        params,
        map(&[("dst_ip", "10.2.0.6"), ("orig_dst_ip", "10.2.0.6")])
    );
}

#[test]
fn what_is_no_address_is_left_alone() {
    let some = ip_map(&[("10.1.0.5", "203.0.113.5")]);
    for params in [
        map(&[]),
        map(&[("src_ip", ""), ("dst_ip", "")]),
        map(&[("src_ip", "x"), ("dst_ip", "10.1.0.5/32")]),
        map(&[("name", "nsm-1")]),
    ] {
        let mut changed = params.clone();
        assert_eq!(some.request_out(&mut changed), None);
        some.reply_out(&mut changed);
        some.reply_in(&mut changed, None);
        assert_eq!(changed, params);
    }
    let mut local = map(&[("name", "nsm-1")]);
    some.request_in(&mut local);
    assert_eq!(
        local,
        map(&[("name", "nsm-1")]),
        "a local mechanism has no tunnel ends"
    );
}

#[test]
fn a_proxy_between_swaps_nothing_twice() {
    let middle = ip_map(&[("10.3.0.7", "192.0.2.7")]);
    let sent = map(&[("orig_src_ip", "10.1.0.5"), ("src_ip", "203.0.113.5")]);
    let mut params = sent.clone();
    assert_eq!(middle.request_out(&mut params), None);
    assert_eq!(params, sent);
    let reply = map(&[("orig_dst_ip", "10.2.0.6"), ("dst_ip", "198.51.100.6")]);
    let mut params = reply.clone();
    middle.reply_out(&mut params);
    assert_eq!(params, reply);
}

#[test]
fn a_reply_is_swapped_once_also_when_the_refresh_was_not_cleared() {
    let server = ip_map(&[("10.2.0.6", "198.51.100.6")]);
    let swapped = map(&[("orig_dst_ip", "10.2.0.6"), ("dst_ip", "198.51.100.6")]);
    let mut params = map(&[("orig_dst_ip", "10.2.0.6"), ("dst_ip", "10.2.0.6")]);
    server.reply_out(&mut params);
    assert_eq!(params, swapped);
    server.reply_out(&mut params);
    assert_eq!(params, swapped);
}

#[test]
fn what_was_sent_is_believed_rather_than_its_echo() {
    let client = ip_map(&[("10.1.0.5", "203.0.113.5")]);
    let reply = |echo: &str, sent: Option<&str>| {
        let mut params = map(&[("src_ip", "203.0.113.5"), ("orig_src_ip", echo)]);
        client.reply_in(&mut params, sent);
        assert_eq!(params.get(ORIG_SRC_IP).map(String::as_str), Some(""));
        params.remove(SRC_IP).unwrap()
    };
    assert_eq!(reply("10.66.6.6", Some("10.1.0.5")), "10.1.0.5");
    assert_eq!(reply("10.1.0.5", None), "10.1.0.5");
    assert_eq!(reply("", None), "10.1.0.5", "the map knows it too");
    assert_eq!(reply("nonsense", None), "10.1.0.5");
    assert_eq!(reply("10.1.0.5", Some("")), "10.1.0.5", "nothing was sent");
}

#[test]
fn a_map_is_one_to_one() {
    let from =
        |pairs: &[(&str, &str)]| IpMap::from_pairs(pairs.iter().map(|(a, b)| (ip(a), ip(b))));
    let shared = from(&[("10.0.0.1", "192.0.2.1"), ("10.0.0.2", "192.0.2.1")]).unwrap_err();
    assert_eq!(
        shared,
        IpMapError::SharedExternal {
            first: ip("10.0.0.1"),
            second: ip("10.0.0.2"),
            external: ip("192.0.2.1")
        }
    );
    assert!(
        shared
            .to_string()
            .contains("10.0.0.1 and 10.0.0.2 both map to 192.0.2.1")
    );
    assert!(matches!(
        from(&[("10.0.0.1", "192.0.2.1"), ("10.0.0.1", "192.0.2.2")]),
        Err(IpMapError::TwoExternals { .. })
    ));
    assert!(
        from(&[("10.0.0.1", "192.0.2.1"), ("10.0.0.1", "192.0.2.1")]).is_ok(),
        "the same line twice"
    );
}

fn addresses() -> impl Strategy<Value = IpAddr> {
    // From a small set, so that maps hit and collide.
    prop_oneof![
        (0u8..8).prop_map(|n| IpAddr::from([10, 0, 0, n])),
        (0u16..4).prop_map(|n| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, n]))
    ]
}

proptest! {
    #[test]
    fn inside_and_outside_are_inverses(pairs in prop::collection::vec((addresses(), any::<IpAddr>()), 0..8), other: IpAddr) {
        let Ok(map) = IpMap::from_pairs(pairs.clone()) else { return Ok(()) };
        for (internal, external) in pairs {
            prop_assert_eq!(map.external(internal), external.to_canonical());
            prop_assert_eq!(map.internal(map.external(internal)), internal);
        }
        prop_assume!(map.external(other) == other.to_canonical() && map.internal(other) == other.to_canonical());
        prop_assert_eq!(map.internal(map.external(other)), other.to_canonical());
    }

    /// Whatever the maps and whatever else the mechanism holds, the client's forwarder gets back its own source, and both ends the
    /// other's public address.
    #[test]
    fn an_exchange_gives_each_side_its_own_address(
        src in addresses(),
        dst in addresses(),
        client in prop::collection::vec((addresses(), any::<IpAddr>()), 0..4),
        server in prop::collection::vec((addresses(), any::<IpAddr>()), 0..4),
        extra in prop::collection::btree_map("[a-z]{1,3}", "[a-z]{0,3}", 0..3),
    ) {
        let (Ok(client), Ok(server)) = (IpMap::from_pairs(client), IpMap::from_pairs(server)) else { return Ok(()) };
        let mut params: Parameters = extra.clone();
        params.insert(SRC_IP.to_owned(), src.to_string());
        for _refresh in 0..3 {
            let sent = client.request_out(&mut params);
            server.request_in(&mut params);
            prop_assert_eq!(&params[SRC_IP], &client.external(src).to_string());
            prop_assert_eq!(&params[DST_IP], "");
            params.insert(DST_IP.to_owned(), dst.to_string());
            server.reply_out(&mut params);
            client.reply_in(&mut params, sent.as_deref());
            prop_assert_eq!(&params[SRC_IP], &src.to_string());
            prop_assert_eq!(&params[DST_IP], &server.external(dst).to_string());
            for (key, value) in &extra {
                prop_assert_eq!(&params[key], value);
            }
        }
    }
}
