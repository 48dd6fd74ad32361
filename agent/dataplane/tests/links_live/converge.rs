//! Plans against the live kernel: from any state to any other, whatever somebody else did in between.

use std::net::IpAddr;

use ipnet::IpNet;
use nsm_core::{
    link::{LinkSpec, RouteSpec},
    net::MacAddr,
};
use nsm_dataplane::links::Links;
use proptest::{collection::vec, option, prelude::*, sample::subsequence};

use crate::{
    contents::assert_is,
    support::{add_address, add_route, ip, link, mac, net, netns, set_up},
};

/// Somebody else's hand on the link.
#[derive(Debug, Clone, Copy)]
enum Meddling {
    Nothing,
    Down,
    DownUp,
    Address(IpNet),
    Route,
}

/// Of IPv6, for the kernel flushes all IPv4 routes of a link whose last address goes.
fn foreign_route() -> IpNet {
    net("fd77::/64")
}

fn link_spec() -> impl Strategy<Value = LinkSpec> {
    let addresses = [
        "10.0.0.1/24",
        "10.0.0.2/24",
        "10.0.0.3/24",
        "10.0.0.1/32",
        "10.0.1.1/24",
        "fd00::1/64",
        "fd00::2/64",
        "fd01::1/128",
    ];
    let prefixes = [
        "10.0.0.9/32",
        "10.9.0.0/16",
        "0.0.0.0/0",
        "fd09::/48",
        "fd00:9::/64",
    ];
    let (addresses, prefixes) = (addresses.map(net).to_vec(), prefixes.map(net).to_vec());
    let neighbours: Vec<IpAddr> = ["10.0.0.8", "10.0.0.9", "fd00::9"].map(ip).to_vec();
    (
        subsequence(addresses, 0..=8),
        (
            subsequence(prefixes, 0..=5),
            vec(option::of(any::<bool>()), 5),
        ),
        (subsequence(neighbours, 0..=3), vec(1u8..4, 3)),
        option::of((1u8..4).prop_map(mac)),
        1300u32..1302,
    )
        .prop_map(
            |(addresses, (prefixes, vias), (neighbours, macs), mac, mtu)| LinkSpec {
                mac,
                mtu,
                addresses,
                routes: prefixes
                    .into_iter()
                    .zip(vias)
                    .map(|(prefix, via)| RouteSpec {
                        prefix,
                        via: via.map(|other| next_hop(prefix, other)),
                    })
                    .collect(),
                neighbours: neighbours
                    .into_iter()
                    .zip(
                        macs.into_iter()
                            .map(|last| MacAddr::new([2, 0, 0, 0, 1, last])),
                    )
                    .collect(),
                ..link(1, 2)
            },
        )
}

fn next_hop(prefix: IpNet, other: bool) -> IpAddr {
    ip(match (prefix.addr().is_ipv4(), other) {
        (true, false) => "10.0.0.8",
        (true, true) => "10.0.0.9",
        (false, false) => "fd00::8",
        (false, true) => "fd00::9",
    })
}

fn meddling() -> impl Strategy<Value = Meddling> {
    prop_oneof![
        Just(Meddling::Nothing),
        Just(Meddling::Down),
        Just(Meddling::DownUp),
        Just(Meddling::Address(net("10.0.0.77/24"))),
        Just(Meddling::Address(net("fd00::77/64"))),
        Just(Meddling::Route),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "needs root: makes network namespaces and links"]
    fn every_plan_converges(specs in vec(link_spec(), 2..5), meddlings in vec(meddling(), 5)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (links, pod) = (Links::in_namespace(netns()), netns());
        let alias = specs[0].alias.clone();
        let mut index = None;
        for (mut spec, meddling) in specs.into_iter().zip(meddlings) {
            spec.alias = alias.clone();
            if let Some(index) = index {
                match meddling {
                    Meddling::Nothing => {}
                    Meddling::Down => set_up(&pod, index, false),
                    Meddling::DownUp => {
                        set_up(&pod, index, false);
                        set_up(&pod, index, true);
                    }
                    Meddling::Address(address) => add_address(&pod, index, address),
                    Meddling::Route => add_route(&pod, index, foreign_route(), None),
                }
            }
            let up = runtime.block_on(links.up_pod_link(&pod, &spec)).unwrap().pod;
            let link = runtime.block_on(links.observe(&pod, &alias)).unwrap().unwrap();
            assert_is(&link, &spec);
            prop_assert_eq!(runtime.block_on(links.up_pod_link(&pod, &spec)).unwrap().pod.operations, 0);
            if matches!(meddling, Meddling::Route) && index == Some(up.index) {
                prop_assert!(link.routes.iter().any(|route| route.spec.prefix == foreign_route()), "a foreign route went");
            }
            index = Some(up.index);
        }
    }
}
