//! What may be put into a pod: each rule by itself, and what holds for every context.

use std::net::IpAddr;

use ipnet::IpNet;
use proptest::{collection::vec, prelude::*};

use crate::{
    link::{
        RouteSpec,
        admission::{
            Dns, Holding, HoldingKind, Inadmissible, MAX_CONNECTION, MAX_EXTRA, MAX_ROUTES,
            Proposal, Rules, Side, Surroundings, beside_own_default, check_size,
        },
    },
    net::special::{in_prefix, overlap},
    nsm::name::Domain,
};

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| net(text)).collect()
}

fn route(text: &str) -> RouteSpec {
    match text.split_once(" via ") {
        Some((prefix, via)) => RouteSpec {
            prefix: net(prefix),
            via: Some(via.parse().unwrap()),
        },
        None => RouteSpec {
            prefix: net(text),
            via: None,
        },
    }
}

fn held(kind: HoldingKind, prefix: &str) -> Holding {
    Holding {
        prefix: net(prefix),
        kind,
        link: "eth0".to_owned(),
        is_connection: false,
    }
}

/// A node, its pod, and the other end of a tunnel.
struct Place {
    rules: Rules,
    side: Side,
    wants_default_route: bool,
    domain: Option<Domain>,
    pod: Vec<Holding>,
}

impl Place {
    fn new() -> Self {
        Self {
            rules: Rules {
                protected: nets(&["10.244.0.0/16", "10.96.0.0/12"]),
                ..Rules::default()
            },
            side: Side::Client,
            wants_default_route: false,
            domain: None,
            pod: vec![
                held(HoldingKind::Address, "172.16.1.2/32"),
                held(HoldingKind::Route, "0.0.0.0/0"),
                held(HoldingKind::Gateway, "192.168.7.1/32"),
            ],
        }
    }

    fn of_domain(mut self, domain: &str, prefixes: &[&str]) -> Self {
        let domain: Domain = domain.parse().unwrap();
        self.rules.of_domain.insert(domain.clone(), nets(prefixes));
        self.domain = Some(domain);
        self
    }

    fn admit(
        &self,
        addresses: &[&str],
        routes: &[&str],
        others: &[&str],
        neighbours: &[&str],
    ) -> Result<(), Inadmissible> {
        let routes: Vec<RouteSpec> = routes.iter().map(|text| route(text)).collect();
        let neighbours: Vec<IpAddr> = neighbours
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        self.admit_typed(&nets(addresses), &routes, &nets(others), &neighbours)
    }

    fn admit_typed(
        &self,
        addresses: &[IpNet],
        routes: &[RouteSpec],
        others: &[IpNet],
        neighbours: &[IpAddr],
    ) -> Result<(), Inadmissible> {
        let proposal = Proposal {
            side: self.side,
            addresses,
            routes,
            extra: &[],
            others,
            neighbours,
        };
        self.rules.admit(&proposal, &self.around())
    }

    fn admit_extra(&self, extra: &[IpNet]) -> Result<(), Inadmissible> {
        let proposal = Proposal {
            side: self.side,
            addresses: &[],
            routes: &[],
            extra,
            others: &[],
            neighbours: &[],
        };
        self.rules.admit(&proposal, &self.around())
    }

    fn around(&self) -> Surroundings<'_> {
        Surroundings {
            domain: self.domain.as_ref(),
            wants_default_route: self.wants_default_route,
            peer: Some("10.9.9.9".parse().unwrap()),
            node: NODE.get_or_init(|| nets(&["10.0.0.5/24", "fd11::5/64"])),
            pod: &self.pod,
        }
    }
}

static NODE: std::sync::OnceLock<Vec<IpNet>> = std::sync::OnceLock::new();

#[test]
fn what_services_have_is_admitted() {
    let place = Place::new();
    for (addresses, routes, others, neighbours) in [
        (
            &["172.16.9.2/32"][..],
            &["172.16.9.1/32"][..],
            &["172.16.9.1/32"][..],
            &[][..],
        ),
        (&["172.17.9.2/24"], &[], &["172.17.9.1/24"], &["172.17.9.1"]),
        (
            &["fd00:5::2/128"],
            &["fd00:5::1/128"],
            &["fd00:5::1/128"],
            &[],
        ),
        (
            &["2001:db8::2/128"],
            &["2001:db8::1/128"],
            &["2001:db8::1/128"],
            &[],
        ),
        // A gateway to the networks behind the service.
        (
            &["172.17.9.2/32"],
            &["10.20.0.0/16 via 172.17.9.1", "172.17.9.1/32"],
            &["172.17.9.1/32"],
            &["172.17.9.1"],
        ),
        (&[], &[], &[], &[]),
    ] {
        let admitted = place.admit(addresses, routes, others, neighbours);
        assert_eq!(admitted, Ok(()), "{addresses:?} {routes:?}");
    }
}

#[test]
fn no_route_takes_everything() {
    let mut place = Place::new();
    for routes in [
        &["0.0.0.0/0"][..],
        &["0.0.0.0/1", "128.0.0.0/1"],
        &["0.0.0.0/1"],
        &["0.0.0.0/2", "128.0.0.0/3", "192.0.0.0/3"],
        &["::/0"],
        &["2000::/3"],
        &["fd00::/8", "2000::/4"],
    ] {
        // Not even where the configuration lets a domain use every prefix.
        place.rules.prefixes = nets(&["0.0.0.0/0", "::/0"]);
        let error = place.admit(&[], routes, &[], &[]).unwrap_err();
        assert!(
            matches!(error, Inadmissible::DefaultRoute { .. }),
            "{routes:?}: {error}"
        );
        let text = error.to_string();
        assert!(
            text.contains("--default-route") && text.contains("nsm-default-route=true"),
            "{text}"
        );
    }
}

#[test]
fn a_default_route_is_admitted_where_the_client_asked_for_it() {
    let place = Place {
        wants_default_route: true,
        ..Place::new()
    };
    let halves = &["0.0.0.0/1 via 172.17.9.1", "128.0.0.0/1 via 172.17.9.1"];
    let admitted = place.admit(&["172.17.9.2/32"], halves, &["172.17.9.1/32"], &[]);
    assert_eq!(admitted, Ok(()));
    // The pod's own default route stays, and what lies between is no default route.
    let error = place.admit(&[], &["0.0.0.0/0"], &[], &[]).unwrap_err();
    let text = error.to_string();
    for words in ["the route 0.0.0.0/0 on its link `eth0`", "--default-route"] {
        assert!(text.contains(words), "{text}");
    }
    assert!(place.admit(&[], &["8.0.0.0/5"], &[], &[]).is_err());
}

#[test]
fn a_default_route_beside_the_pods_own_is_two_halves() {
    let held = |prefix: &str, is_connection| Holding {
        prefix: net(prefix),
        kind: HoldingKind::Route,
        link: "eth0".to_owned(),
        is_connection,
    };
    let own = [held("0.0.0.0/0", false), held("::/0", false)];
    let halves = beside_own_default(net("0.0.0.0/0"), &own);
    assert_eq!(halves, Some([net("0.0.0.0/1"), net("128.0.0.0/1")]));
    let halves = beside_own_default(net("::/0"), &own);
    assert_eq!(halves, Some([net("::/1"), net("8000::/1")]));
    assert_eq!(beside_own_default(net("0.0.0.0/1"), &own), None);
    assert_eq!(beside_own_default(net("0.0.0.0/0"), &own[1..]), None);
    let anothers = [held("0.0.0.0/0", true)];
    assert_eq!(beside_own_default(net("0.0.0.0/0"), &anothers), None);
    // One connection of a pod has its default route.
    for (held, proposed) in [
        (held("0.0.0.0/1", true), "0.0.0.0/0"),
        (held("0.0.0.0/0", true), "128.0.0.0/1"),
        (held("128.0.0.0/1", true), "0.0.0.0/1"),
    ] {
        let mut place = Place::new();
        place.wants_default_route = true;
        place.pod = vec![held];
        let error = place.admit(&[], &[proposed], &[], &[]).unwrap_err();
        assert!(
            matches!(error, Inadmissible::SecondDefault { .. }),
            "{error}"
        );
    }
}

#[test]
fn special_ranges_and_what_is_ours_are_refused() {
    let place = Place::new();
    for (routes, words) in [
        (&["169.254.169.254/32"][..], "metadata"),
        (&["169.254.0.0/24"], "link-local"),
        (&["fd00:ec2::254/128"], "metadata"),
        (&["fd00::/16"], "metadata"),
        (&["fe80::/64"], "link-local"),
        (&["127.0.0.0/8"], "loopback"),
        (&["127.0.0.53/32"], "loopback"),
        (&["::1/128"], "loopback"),
        (&["224.0.0.0/4"], "multicast"),
        (&["ff02::/16"], "multicast"),
        (&["255.255.255.255/32"], "broadcast"),
        (&["240.0.0.0/8"], "reserved"),
        (&["0.0.0.1/32"], "unspecified"),
        (&["::ffff:10.1.2.3/128"], "IPv4 written as IPv6"),
        (&["10.9.9.9/32"], "own tunnel"),
        (&["10.9.0.0/16"], "own tunnel"),
        (&["10.0.0.5/32"], "10.0.0.5/24, a network of this node"),
        (&["10.0.0.77/32"], "a network of this node"),
        (&["10.0.0.0/16"], "a network of this node"),
        (&["fd11::/64"], "a network of this node"),
        (&["10.244.3.0/24"], "admission.protected"),
        (&["10.96.0.1/32"], "admission.protected"),
        (&["8.8.8.8/32"], "admission.prefixes"),
        (&["203.0.113.0/24"], "admission.prefixes"),
        (&["172.17.0.0/16 via 127.0.0.1"], "loopback"),
        (&["172.17.0.0/16 via 10.0.0.5"], "a network of this node"),
    ] {
        let text = place.admit(&[], routes, &[], &[]).unwrap_err().to_string();
        assert!(
            text.contains(words) && text.contains("is not admitted"),
            "{routes:?}: {text}"
        );
    }
    for (address, words) in [
        ("127.0.0.2/8", "larger than /16"),
        ("127.0.0.2/32", "loopback"),
        ("203.0.113.10/24", "admission.prefixes"),
        ("10.1.2.3/8", "larger than /16"),
        ("10.0.0.5/32", "a network of this node"),
        ("169.254.1.1/32", "link-local"),
        ("fe80::7/64", "link-local"),
        ("224.0.0.1/32", "multicast"),
    ] {
        let text = place
            .admit(&[address], &[], &[], &[])
            .unwrap_err()
            .to_string();
        assert!(text.contains(words), "{address}: {text}");
        let text = place
            .admit(&[], &[], &[address], &[])
            .map_err(|error| error.to_string());
        assert!(
            text.is_err() || address.ends_with("/8"),
            "{address} of the other end"
        );
    }
}

#[test]
fn what_the_pod_has_stays_its_own() {
    let mut place = Place::new();
    place.pod.push(held(HoldingKind::Route, "10.30.0.0/24"));
    for (addresses, routes, others, words) in [
        (&["172.16.1.2/31"][..], &[][..], &[][..], "172.16.1.2/32"),
        (&["172.16.1.3/31"], &[], &[], "172.16.1.2/32"),
        (&[], &["172.16.1.0/24"], &[], "172.16.1.2/32"),
        (&[], &[], &["172.16.1.2/32"], "172.16.1.2/32"),
        (&[], &["192.168.0.0/16"], &[], "the gateway 192.168.7.1/32"),
        (&["192.168.7.9/24"], &[], &[], "the gateway 192.168.7.1/32"),
        (&[], &["10.30.0.7/32"], &[], "the route 10.30.0.0/24"),
        (&[], &["10.30.0.0/16"], &[], "the route 10.30.0.0/24"),
    ] {
        let error = place.admit(addresses, routes, others, &[]).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Inadmissible::Overlap { .. }), "{text}");
        assert!(text.contains(words) && text.contains("`eth0`"), "{text}");
        let proposed = addresses.iter().chain(routes).chain(others).next().unwrap();
        assert!(text.contains(proposed), "{text}");
    }
}

#[test]
fn an_endpoint_may_have_one_address_on_all_its_connections() {
    let mut place = Place::new();
    place.pod = vec![Holding {
        is_connection: true,
        ..held(HoldingKind::Address, "172.18.0.1/32")
    }];
    let admit = |place: &Place| place.admit(&["172.18.0.1/32"], &["172.18.0.9/32"], &[], &[]);
    assert!(admit(&place).is_err());
    place.side = Side::Endpoint;
    assert_eq!(admit(&place), Ok(()));
    place.pod[0].is_connection = false;
    assert!(admit(&place).is_err());
}

#[test]
fn a_neighbour_is_the_other_end_or_a_next_hop() {
    let place = Place::new();
    let admit = |neighbour: &str| {
        let routes = ["10.20.0.0/16 via 172.17.9.7"];
        place.admit(
            &["172.17.9.2/32"],
            &routes,
            &["172.17.9.1/32"],
            &[neighbour],
        )
    };
    for good in ["172.17.9.1", "172.17.9.2", "172.17.9.7"] {
        assert_eq!(admit(good), Ok(()), "{good}");
    }
    for bad in ["172.17.9.3", "10.20.0.1", "10.0.0.5"] {
        let text = admit(bad).unwrap_err().to_string();
        assert!(text.contains(bad), "{text}");
    }
}

#[test]
fn a_domain_has_prefixes_of_its_own() {
    let place = Place::new().of_domain("two.example", &["172.20.0.0/16", "198.51.100.0/24"]);
    assert_eq!(place.admit(&["198.51.100.7/32"], &[], &[], &[]), Ok(()));
    let text = place
        .admit(&["172.21.0.1/32"], &[], &[], &[])
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("`two.example`") && text.contains("admission.domains"),
        "{text}"
    );
    // Link-local addresses can be configured, the metadata service cannot.
    let place = Place::new().of_domain("two.example", &["169.254.0.0/16"]);
    assert_eq!(place.admit(&["169.254.3.3/32"], &[], &[], &[]), Ok(()));
    assert!(place.admit(&[], &["169.254.169.254/32"], &[], &[]).is_err());
    let place = Place::new().of_domain("two.example", &["0.0.0.0/0"]);
    assert!(place.admit(&["127.0.0.2/32"], &[], &[], &[]).is_err());
}

#[test]
fn names_of_the_cluster_are_not_resolved_elsewhere() {
    let place = Place::new();
    let admit = |servers: &[&str], search: &[&str]| {
        place
            .rules
            .admit_dns(Dns { servers, search }, &place.around())
    };
    assert_eq!(
        admit(&["172.17.9.1"], &["my.coredns.service", "two.example"]),
        Ok(())
    );
    for name in [
        "cluster.local",
        "svc.cluster.local",
        "default.svc",
        "SVC",
        "local",
        "Cluster.Local.",
        "",
        ".",
    ] {
        let error = admit(&[], &[name]).unwrap_err();
        assert!(
            matches!(error, Inadmissible::DnsDomain { .. }),
            "{name}: {error}"
        );
    }
    for server in [
        "127.0.0.1",
        "10.96.0.10",
        "169.254.169.254",
        "8.8.8.8",
        "10.0.0.5",
        "x",
    ] {
        let text = admit(&[server], &[]).unwrap_err().to_string();
        assert!(text.contains(server), "{text}");
    }
    assert!(admit(&["172.17.9.1"; 17], &[]).is_err());
}

#[test]
fn an_extra_prefix_is_of_those_that_the_domain_may_use() {
    let mut place = Place::new();
    place.pod.push(held(HoldingKind::Route, "172.17.3.9/32"));
    // A service of its own in the pod has given an address of it to a client.
    assert_eq!(place.admit_extra(&nets(&["172.17.3.0/24"])), Ok(()));
    for (prefix, words) in [
        ("0.0.0.0/0", "the extra prefix 0.0.0.0/0"),
        ("169.254.0.0/16", "metadata"),
        ("10.0.0.0/28", "this node"),
        ("10.244.3.0/24", "the cluster"),
        ("10.9.9.0/24", "own tunnel"),
        ("203.0.113.0/24", "admission.prefixes"),
    ] {
        let text = place.admit_extra(&nets(&[prefix])).unwrap_err().to_string();
        assert!(text.contains(words), "{prefix}: {text}");
    }
    place.wants_default_route = true;
    assert!(place.admit_extra(&nets(&["0.0.0.0/0"])).is_err());
    let text = place.admit_extra(&[net("172.17.3.0/24"); MAX_EXTRA + 1]);
    let text = text.unwrap_err().to_string();
    assert!(text.contains("17 extra prefixes"), "{text}");
}

#[test]
fn counts_and_bytes_are_bounded() {
    let place = Place::new();
    let routes: Vec<RouteSpec> = (0..=MAX_ROUTES)
        .map(|n| route(&format!("172.17.{n}.0/24")))
        .collect();
    assert_eq!(place.admit_typed(&[], &routes[1..], &[], &[]), Ok(()));
    let text = place
        .admit_typed(&[], &routes, &[], &[])
        .unwrap_err()
        .to_string();
    assert!(text.contains("65 routes") && text.contains("64"), "{text}");
    assert_eq!(check_size(MAX_CONNECTION), Ok(()));
    assert!(check_size(MAX_CONNECTION + 1).is_err());
}

fn any_net() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (any::<u32>(), 0u8..=32)
            .prop_map(|(ip, length)| IpNet::new(IpAddr::V4(ip.into()), length).unwrap()),
        (any::<u128>(), 0u8..=128).prop_map(|(ip, length)| IpNet::new(
            IpAddr::V6(ip.into()),
            length
        )
        .unwrap()),
        // Where most of the rules meet.
        (0u32..1 << 24, 8u8..=32).prop_map(|(ip, length)| IpNet::new(
            IpAddr::V4((0x0a00_0000 + ip).into()),
            length
        )
        .unwrap()),
    ]
}

proptest! {
    /// Whatever is admitted, nothing of the node, the cluster, the pod or a special range is taken.
    #[test]
    fn nothing_that_is_ours_is_taken(
        addresses in vec(any_net(), 0..3),
        prefixes in vec(any_net(), 0..4),
        opens_everything: bool,
    ) {
        let mut place = Place::new();
        if opens_everything {
            place.rules.prefixes = nets(&["0.0.0.0/0", "::/0"]);
        }
        let routes: Vec<RouteSpec> = prefixes
            .iter()
            .map(|prefix| RouteSpec { prefix: prefix.trunc(), via: None })
            .collect();
        if place.admit_typed(&addresses, &routes, &[], &[]).is_ok() {
            let around = place.around();
            for prefix in addresses.iter().chain(&prefixes).map(IpNet::trunc) {
                prop_assert!(in_prefix(prefix).is_none());
                prop_assert!(!prefix.contains(&around.peer.unwrap()));
                let ours = around.node.iter().chain(&place.rules.protected);
                prop_assert!(!ours.copied().any(|net| overlap(net.trunc(), prefix)));
                let held = place.pod.iter().filter(|held| held.prefix.prefix_len() > 0);
                prop_assert!(!held.map(|held| held.prefix).any(|net| overlap(net, prefix)));
            }
        }
    }
}
