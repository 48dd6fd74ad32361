//! A model of what the kernel does with a link, and the property that plans hold against it: one plan is enough, from any state.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use proptest::{collection::vec, option, prelude::*, sample::subsequence};

use super::*;
use crate::net::{IfName, MacAddr};

/// One namespace with at most one link, which obeys the rules that `plan` lists.
#[derive(Debug, Clone)]
struct Kernel {
    link: Option<Link>,
    /// net.ipv4.conf.*.promote_secondaries
    promote_secondaries: bool,
}

/// The smallest MTU that IPv6 lives with (RFC 8200 section 5).
const IPV6_MIN_MTU: u32 = 1280;

impl Kernel {
    fn apply(&mut self, wanted: &LinkSpec, operation: &Operation) -> Result<(), String> {
        if let Operation::Create = operation {
            return self.create(wanted);
        }
        if let Operation::Delete = operation {
            return self
                .link
                .take()
                .map(drop)
                .ok_or_else(|| "no link to delete".into());
        }
        let promote = self.promote_secondaries;
        let link = self.link.as_mut().ok_or("no link")?;
        match operation {
            Operation::Create | Operation::Delete => {}
            &Operation::SetMtu(mtu) => {
                link.mtu = mtu;
                if mtu < IPV6_MIN_MTU {
                    link.addresses.retain(|address| address.addr().is_ipv4());
                    link.routes
                        .retain(|route| route.spec.prefix.addr().is_ipv4());
                    link.neighbours.retain(|(ip, _)| ip.is_ipv4());
                }
            }
            &Operation::SetMac(mac) => {
                link.mac = Some(mac);
                link.neighbours.clear();
            }
            Operation::SetUp => {
                link.up = true;
                for address in link.addresses.clone() {
                    connect(link, address);
                }
            }
            &Operation::RemoveRoute(spec) => link.routes.retain(|route| route.spec != spec),
            &Operation::RemoveNeighbour(ip) => link.neighbours.retain(|&(known, _)| known != ip),
            &Operation::RemoveAddress(address) => remove_address(link, address, promote),
            &Operation::AddAddress(address) => add_address(link, address)?,
            &Operation::SetNeighbour(ip, mac) => {
                require(link.up, "neighbour on a link that is down")?;
                link.neighbours.retain(|&(known, _)| known != ip);
                link.neighbours.push((ip, mac));
            }
            &Operation::AddRoute(spec) => {
                require(link.up, "route on a link that is down")?;
                require(spec.prefix == spec.prefix.trunc(), "route with host bits")?;
                match link
                    .routes
                    .iter()
                    .find(|route| route.spec.prefix == spec.prefix)
                {
                    Some(route) => {
                        require(route.spec == spec, &format!("{spec:?}: {route:?} is there"))?
                    }
                    None => link.routes.push(Route { spec, ours: true }),
                }
            }
        }
        Ok(())
    }

    fn create(&mut self, wanted: &LinkSpec) -> Result<(), String> {
        require(self.link.is_none(), "the name is taken")?;
        let spec = wanted;
        let kind = LinkKind::Veth {
            peer: 2,
            peer_netns: Some(0),
        };
        self.link = Some(Link {
            index: 3,
            name: spec.name.to_string(),
            alias: Some(spec.alias.clone()),
            mac: Some(spec.mac.unwrap_or(MacAddr::new([2, 0, 0, 0, 0, 99]))),
            mtu: spec.mtu,
            up: false,
            kind,
            addresses: vec![],
            routes: vec![],
            neighbours: vec![],
        });
        Ok(())
    }
}

fn require(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds {
        Ok(())
    } else {
        Err(otherwise.to_owned())
    }
}

/// The route that the kernel adds for an address, unless there is one already.
fn connect(link: &mut Link, address: IpNet) {
    let spec = RouteSpec {
        prefix: address.trunc(),
        via: None,
    };
    if link.up
        && address.prefix_len() < address.max_prefix_len()
        && !link.routes.iter().any(|route| route.spec == spec)
    {
        link.routes.push(Route { spec, ours: false });
    }
}

fn add_address(link: &mut Link, address: IpNet) -> Result<(), String> {
    if link.addresses.contains(&address) {
        return Ok(());
    }
    if address.addr().is_ipv6() {
        require(link.mtu >= IPV6_MIN_MTU, "IPv6 address at so small an MTU")?;
        require(
            !link
                .addresses
                .iter()
                .any(|known| known.addr() == address.addr()),
            "IPv6 address with another prefix length",
        )?;
    }
    link.addresses.push(address);
    connect(link, address);
    Ok(())
}

fn remove_address(link: &mut Link, address: IpNet, promote_secondaries: bool) {
    let Some(at) = link.addresses.iter().position(|known| *known == address) else {
        return;
    };
    let of_the_network = |other: &IpNet| other.trunc() == address.trunc();
    let primary = link.addresses.iter().position(of_the_network) == Some(at);
    link.addresses.remove(at);
    if address.addr().is_ipv4() && primary && !promote_secondaries {
        link.addresses.retain(|other| !of_the_network(other));
    }
    if !link.addresses.iter().any(of_the_network) {
        link.routes
            .retain(|route| route.ours || route.spec.prefix != address.trunc());
    }
    if address.addr().is_ipv4() && !link.addresses.iter().any(|other| other.addr().is_ipv4()) {
        link.routes
            .retain(|route| !route.spec.prefix.addr().is_ipv4());
    }
}

fn converge(kernel: &mut Kernel, wanted: &LinkSpec) -> Result<(), TestCaseError> {
    let plan = diff(wanted, kernel.link.as_ref());
    for operation in &plan {
        kernel.apply(wanted, operation).map_err(|refused| {
            TestCaseError::fail(format!("{operation:?} of {plan:?}: {refused}"))
        })?;
    }
    prop_assert_eq!(
        diff(wanted, kernel.link.as_ref()),
        vec![],
        "after {:?}, {:?}",
        plan,
        kernel.link
    );

    // Not only the planner must be content.
    let (spec, link) = (
        wanted,
        kernel.link.as_ref().expect("a plan ends with a link"),
    );
    prop_assert!(link.up);
    prop_assert_eq!(
        (link.mtu, link.name.as_str(), link.alias.as_ref()),
        (spec.mtu, spec.name.as_str(), Some(&spec.alias))
    );
    prop_assert!(spec.mac.is_none() || spec.mac == link.mac);
    let mut distinct = spec.addresses.clone();
    distinct.sort();
    distinct.dedup();
    prop_assert_eq!(link.addresses.len(), distinct.len());
    prop_assert!(
        spec.addresses
            .iter()
            .all(|address| link.addresses.contains(address))
    );
    prop_assert_eq!(link.neighbours.len(), spec.neighbours.len());
    for route in &spec.routes {
        prop_assert!(
            link.routes.iter().any(|there| there.spec
                == RouteSpec {
                    prefix: route.prefix.trunc(),
                    via: route.via
                }),
            "{:?}",
            route
        );
    }
    for route in link.routes.iter().filter(|route| route.ours) {
        prop_assert!(
            spec.routes
                .iter()
                .any(|wanted| wanted.prefix.trunc() == route.spec.prefix),
            "{:?} stayed",
            route
        );
    }
    Ok(())
}

fn mac() -> impl Strategy<Value = MacAddr> {
    (0u8..3).prop_map(|last| MacAddr::new([2, 0, 0, 0, 0, last]))
}

/// A route through the next hop with this index, or on the link where `addresses` bring that route along.
fn route(prefix: IpNet, hop: Option<usize>, addresses: &[IpNet]) -> RouteSpec {
    let hops = match prefix {
        IpNet::V4(_) => ["10.0.0.9", "10.0.0.8"],
        IpNet::V6(_) => ["fd00::9", "fd00::8"],
    };
    let connected = addresses
        .iter()
        .any(|address| address.trunc() == prefix.trunc());
    RouteSpec {
        prefix,
        via: hop
            .filter(|_| !connected)
            .map(|index| hops[index].parse().unwrap()),
    }
}

/// Few values, so that networks overlap and specs share parts.
fn link_spec() -> impl Strategy<Value = LinkSpec> {
    let addresses: Vec<IpNet> = [
        "10.0.0.1/24",
        "10.0.0.2/24",
        "10.0.0.3/24",
        "10.0.0.1/32",
        "10.0.1.1/24",
        "fd00::1/64",
        "fd00::2/64",
        "fd01::1/128",
    ]
    .map(|text| text.parse().unwrap())
    .into();
    let prefixes: Vec<IpNet> = [
        "10.0.0.0/24",
        "10.0.0.9/32",
        "10.9.0.7/16",
        "0.0.0.0/0",
        "fd00::/64",
        "fd09::/48",
    ]
    .map(|text| text.parse().unwrap())
    .into();
    let hops: Vec<IpAddr> = vec![
        Ipv4Addr::new(10, 0, 0, 9).into(),
        Ipv4Addr::new(10, 0, 0, 8).into(),
        Ipv6Addr::LOCALHOST.into(),
    ];
    (
        subsequence(addresses, 0..=8),
        subsequence(prefixes, 0..=6),
        vec(option::of(0usize..2), 6),
        subsequence(hops, 0..=3),
        vec(mac(), 3),
        option::of(mac()),
        1300u32..1303,
    )
        .prop_map(
            |(addresses, prefixes, vias, neighbours, macs, mac, mtu)| LinkSpec {
                alias: LinkAlias::new("d", "c").unwrap(),
                name: IfName::try_from("nsm-1").unwrap(),
                mac,
                mtu,
                routes: prefixes
                    .into_iter()
                    .zip(vias)
                    .map(|(prefix, via)| route(prefix, via, &addresses))
                    .collect(),
                // The second prefix length of one address would be left out for IPv6.
                addresses,
                neighbours: neighbours.into_iter().zip(macs).collect(),
            },
        )
}

/// A change of the link by another program in the meantime.
#[derive(Debug, Clone)]
enum Interference {
    Down,
    Address(IpNet),
    Route(RouteSpec),
    Nothing,
}

fn interference() -> impl Strategy<Value = Interference> {
    prop_oneof![
        Just(Interference::Down),
        Just(Interference::Address("10.0.0.77/24".parse().unwrap())),
        Just(Interference::Address("172.16.0.1/16".parse().unwrap())),
        Just(Interference::Route(RouteSpec {
            prefix: "192.168.0.0/16".parse().unwrap(),
            via: None
        })),
        Just(Interference::Nothing),
    ]
}

impl Kernel {
    fn interfere(&mut self, interference: &Interference) {
        let Some(link) = self.link.as_mut() else {
            return;
        };
        match *interference {
            Interference::Down => {
                link.up = false;
                link.routes.clear();
                link.neighbours.clear();
                link.addresses.retain(|address| address.addr().is_ipv4());
            }
            Interference::Address(address) => drop(add_address(link, address)),
            Interference::Route(spec) => link.routes.push(Route { spec, ours: false }),
            Interference::Nothing => {}
        }
    }
}

proptest! {
    #[test]
    fn one_plan_converges(specs in vec(link_spec(), 1..4), interference in vec(interference(), 4), promote_secondaries: bool) {
        let mut kernel = Kernel { link: None, promote_secondaries };
        for (spec, interference) in specs.iter().zip(&interference) {
            kernel.interfere(interference);
            converge(&mut kernel, spec)?;
        }
    }

    #[test]
    fn what_others_routed_stays(spec in link_spec(), next in link_spec()) {
        let mut kernel = Kernel { link: None, promote_secondaries: true };
        converge(&mut kernel, &spec)?;
        let foreign = RouteSpec { prefix: "192.168.0.0/16".parse().unwrap(), via: None };
        kernel.interfere(&Interference::Route(foreign));
        let plan = diff(&next, kernel.link.as_ref());
        prop_assert!(!plan.contains(&Operation::RemoveRoute(foreign)), "{:?}", plan);
    }
}

fn spec() -> LinkSpec {
    LinkSpec {
        alias: LinkAlias::new("d", "c").unwrap(),
        name: IfName::try_from("nsm-1").unwrap(),
        mac: Some(MacAddr::new([2, 0, 0, 0, 0, 1])),
        mtu: 1450,
        addresses: vec!["10.0.0.1/32".parse().unwrap()],
        routes: vec![RouteSpec {
            prefix: "10.0.0.2/32".parse().unwrap(),
            via: None,
        }],
        neighbours: vec![(
            "10.0.0.2".parse().unwrap(),
            MacAddr::new([2, 0, 0, 0, 0, 2]),
        )],
    }
}

#[test]
fn what_is_fixed_for_life_is_made_anew() {
    let mut kernel = Kernel {
        link: None,
        promote_secondaries: false,
    };
    let mut spec = spec();
    converge(&mut kernel, &spec).unwrap();
    let anew = [Operation::Delete, Operation::Create];
    let mut other = kernel.link.clone().unwrap();
    other.kind = LinkKind::Other("vxlan".to_owned());
    assert_eq!(diff(&spec, Some(&other))[..2], anew);
    spec.name = IfName::try_from("nsm-2").unwrap();
    assert_eq!(diff(&spec, kernel.link.as_ref())[..2], anew);
}

#[test]
fn next_hops_come_after_what_leads_to_them() {
    let mut spec = spec();
    let default = RouteSpec {
        prefix: "0.0.0.0/0".parse().unwrap(),
        via: Some("10.0.0.2".parse().unwrap()),
    };
    spec.routes.insert(0, default);
    let plan = diff(&spec, None);
    assert_eq!(plan.last(), Some(&Operation::AddRoute(default)));
}
