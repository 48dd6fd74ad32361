//! The plan of a world: names, addresses, and the configuration lines that follow from them. Pure, so that it is tested
//! without root; `builder` carries it out.
//!
//! All addresses are of documentation and benchmarking ranges (RFC 5737, RFC 2544, RFC 3849): they can collide with nothing
//! that a developer's machine routes.

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
};

use crate::WorldError;

/// How a domain's nodes come by their public addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cloud {
    /// The public address is on the node's link.
    Packet,
    /// The node has a private address only; its domain's gateway maps it 1:1 to a public one, as AWS and GKE do.
    Aws,
}

/// The DNS server's addresses, in the internet's namespace.
pub(crate) const DNS_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);
pub(crate) const DNS_ADDRESS_6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xd, 0, 0, 0, 0, 0x53);

/// The internet's own address on each of its links, the next hop of everything attached to it.
const INTERNET_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// The gateway's address in each domain's private network.
const GATEWAY_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 1);

/// The first node of a domain has `.10` in the domain's range.
const FIRST_HOST: usize = 10;

/// What fits into a /24 from `.10` on.
const MAX_NODES: usize = 240;

/// Public ranges: 203.0.113.0/24, 198.51.100.0/24, then 198.18.2.0/24 and on.
const MAX_DOMAINS: usize = 200;

/// Namespace, pin directory and socket paths hold the world's id and the node's name; a unix socket's path ends at 108.
const MAX_NAME: usize = 20;

#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// `<name>-<pid>-<n>`.
    pub(crate) id: String,
    pub(crate) cloud: Cloud,
    pub(crate) mtu: u32,
    pub(crate) domains: Vec<DomainPlan>,
}

#[derive(Debug, Clone)]
pub(crate) struct DomainPlan {
    pub(crate) name: String,
    pub(crate) nodes: Vec<NodePlan>,
    /// Ports of the SRV records of registry and proxy; none where the domain has A records only.
    pub(crate) srv: Option<(u16, u16)>,
}

#[derive(Debug, Clone)]
pub(crate) struct NodePlan {
    pub(crate) name: String,
    pub(crate) pods: Vec<String>,
}

/// A node's place in the plan: its domain's index, and its own in that domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) domain: usize,
    pub(crate) node: usize,
}

impl Place {
    pub(crate) fn public_ip(self) -> Ipv4Addr {
        let host = (FIRST_HOST + self.node) as u8;
        match self.domain {
            0 => Ipv4Addr::new(203, 0, 113, host),
            1 => Ipv4Addr::new(198, 51, 100, host),
            other => Ipv4Addr::new(198, 18, other as u8, host),
        }
    }

    pub(crate) fn public_ip6(self) -> Ipv6Addr {
        let host = (FIRST_HOST + self.node) as u16;
        Ipv6Addr::new(0x2001, 0xdb8, 1 + self.domain as u16, 0, 0, 0, 0, host)
    }

    pub(crate) fn private_ip(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, 1, (FIRST_HOST + self.node) as u8)
    }
}

impl Plan {
    /// Refuses names that would not do and worlds that do not fit the address plan.
    pub(crate) fn check(&self, name: &str) -> Result<(), WorldError> {
        check_name("world", name)?;
        check_count("domains", self.domains.len(), MAX_DOMAINS)?;
        let mut seen = vec!["internet"];
        for domain in &self.domains {
            check_count("nodes of a domain", domain.nodes.len(), MAX_NODES)?;
            for node in &domain.nodes {
                let pods = node.pods.iter().map(|pod| ("pod", pod));
                for (kind, name) in [("node", &node.name)].into_iter().chain(pods) {
                    check_name(kind, name)?;
                    // `gw<n>` are the gateways' own names.
                    if seen.contains(&name.as_str()) || is_gateway_name(name) {
                        return Err(WorldError::Twice(name.clone()));
                    }
                    seen.push(name);
                }
            }
        }
        Ok(())
    }

    /// The namespace of a node, a pod, a gateway or the internet.
    pub(crate) fn netns(&self, name: &str) -> String {
        format!("{}-{name}", self.id)
    }

    pub(crate) fn internet(&self) -> String {
        self.netns("internet")
    }

    pub(crate) fn gateway(&self, domain: usize) -> String {
        self.netns(&gateway_name(domain))
    }

    /// Every node with its place.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = (Place, &NodePlan)> {
        self.domains.iter().enumerate().flat_map(|(domain, plan)| {
            let place = move |node| Place { domain, node };
            plan.nodes
                .iter()
                .enumerate()
                .map(move |(node, plan)| (place(node), plan))
        })
    }

    /// Every network namespace of the world.
    pub(crate) fn namespaces(&self) -> Vec<String> {
        let mut all = vec![self.internet()];
        if self.cloud == Cloud::Aws {
            all.extend((0..self.domains.len()).map(|domain| self.gateway(domain)));
        }
        for (_, node) in self.nodes() {
            all.push(self.netns(&node.name));
            all.extend(node.pods.iter().map(|pod| self.netns(pod)));
        }
        all
    }

    /// The namespaces that forward packets of others.
    pub(crate) fn routers(&self) -> Vec<String> {
        let mut all = vec![self.internet()];
        if self.cloud == Cloud::Aws {
            all.extend((0..self.domains.len()).map(|domain| self.gateway(domain)));
        }
        all
    }

    /// The address on the node's link: what an agent there sees as its own.
    pub(crate) fn link_ip(&self, place: Place) -> Ipv4Addr {
        match self.cloud {
            Cloud::Packet => place.public_ip(),
            Cloud::Aws => place.private_ip(),
        }
    }

    /// `ip` commands, run outside, that make the namespaces and the links between them.
    pub(crate) fn links(&self) -> String {
        let mut lines = String::new();
        for netns in self.namespaces() {
            line(&mut lines, format_args!("netns add {netns}"));
        }
        let mut veth = |left_ns: &str, left: &str, right_ns: &str, right: &str| {
            let mtu = self.mtu;
            line(
                &mut lines,
                format_args!(
                    "link add {left} netns {left_ns} mtu {mtu} type veth peer name {right} netns {right_ns} mtu {mtu}"
                ),
            );
        };
        let internet = self.internet();
        for (place, node) in self.nodes() {
            let near = self.netns(&node.name);
            match self.cloud {
                Cloud::Packet => veth(&near, NODE_INTERFACE, &internet, &node_link(place)),
                Cloud::Aws => veth(
                    &near,
                    NODE_INTERFACE,
                    &self.gateway(place.domain),
                    &node_link(place),
                ),
            }
        }
        if self.cloud == Cloud::Aws {
            for domain in 0..self.domains.len() {
                veth(&self.gateway(domain), WAN, &internet, &gateway_name(domain));
            }
        }
        lines
    }

    /// What `ip` has to do inside each namespace.
    pub(crate) fn addressing(&self) -> Vec<(String, String)> {
        let mut all = vec![(self.internet(), self.internet_lines())];
        for (domain, plan) in self.domains.iter().enumerate() {
            if self.cloud == Cloud::Aws {
                all.push((self.gateway(domain), self.gateway_lines(domain)));
            }
            for (node, spec) in plan.nodes.iter().enumerate() {
                all.push((
                    self.netns(&spec.name),
                    self.node_lines(Place { domain, node }),
                ));
                all.extend(
                    spec.pods
                        .iter()
                        .map(|pod| (self.netns(pod), "link set lo up\n".to_owned())),
                );
            }
        }
        all
    }

    fn internet_lines(&self) -> String {
        let mut lines = String::from("link set lo up\n");
        line(&mut lines, format_args!("addr add {DNS_ADDRESS}/32 dev lo"));
        line(
            &mut lines,
            format_args!("addr add {DNS_ADDRESS_6}/128 dev lo nodad"),
        );
        for (place, _) in self.nodes() {
            let public = place.public_ip();
            match self.cloud {
                Cloud::Packet => {
                    let dev = node_link(place);
                    attach(&mut lines, &dev);
                    line(
                        &mut lines,
                        format_args!("addr add fe80::1/64 dev {dev} nodad"),
                    );
                    line(&mut lines, format_args!("route add {public}/32 dev {dev}"));
                    line(
                        &mut lines,
                        format_args!("route add {}/128 dev {dev}", place.public_ip6()),
                    );
                }
                Cloud::Aws => {
                    let dev = gateway_name(place.domain);
                    if place.node == 0 {
                        attach(&mut lines, &dev);
                    }
                    line(&mut lines, format_args!("route add {public}/32 dev {dev}"));
                }
            }
        }
        lines
    }

    fn gateway_lines(&self, domain: usize) -> String {
        let mut lines = format!("link set lo up\nlink set {WAN} up\n");
        for node in 0..self.domains[domain].nodes.len() {
            let place = Place { domain, node };
            let dev = node_link(place);
            line(&mut lines, format_args!("link set {dev} up"));
            line(
                &mut lines,
                format_args!("addr add {GATEWAY_ADDRESS}/32 dev {dev}"),
            );
            line(
                &mut lines,
                format_args!("route add {}/32 dev {dev}", place.private_ip()),
            );
            // The public address is the gateway's own, so that it answers ARP for it.
            line(
                &mut lines,
                format_args!("addr add {}/32 dev {WAN}", place.public_ip()),
            );
        }
        line(
            &mut lines,
            format_args!("route add default via {INTERNET_ADDRESS} dev {WAN} onlink"),
        );
        lines
    }

    fn node_lines(&self, place: Place) -> String {
        let dev = NODE_INTERFACE;
        let next_hop = match self.cloud {
            Cloud::Packet => INTERNET_ADDRESS,
            Cloud::Aws => GATEWAY_ADDRESS,
        };
        let mut lines = format!("link set lo up\nlink set {dev} up\n");
        line(
            &mut lines,
            format_args!("addr add {}/32 dev {dev}", self.link_ip(place)),
        );
        line(
            &mut lines,
            format_args!("route add default via {next_hop} dev {dev} onlink"),
        );
        if self.cloud == Cloud::Packet {
            line(
                &mut lines,
                format_args!("addr add {}/128 dev {dev} nodad", place.public_ip6()),
            );
            line(
                &mut lines,
                format_args!("route add default via fe80::1 dev {dev}"),
            );
        }
        lines
    }

    /// The nftables ruleset of each gateway: 1:1 NAT. Connection tracking does it, so that ICMP errors about a mapped flow
    /// (path MTU!) are translated as well.
    pub(crate) fn nat(&self) -> Vec<(String, String)> {
        if self.cloud == Cloud::Packet {
            return Vec::new();
        }
        let ruleset = |domain: usize| {
            let pairs = |map: fn(Place) -> (Ipv4Addr, Ipv4Addr)| {
                (0..self.domains[domain].nodes.len())
                    .map(|node| map(Place { domain, node }))
                    .map(|(from, to)| format!("{from} : {to}"))
                    .collect::<Vec<_>>()
                    .join(", ")
            };
            let inward = pairs(|place| (place.public_ip(), place.private_ip()));
            let outward = pairs(|place| (place.private_ip(), place.public_ip()));
            // The second postrouting rule is for a node that speaks to its neighbour's public address: the gateway turns the
            // packet round, and the neighbour must see a public source, as anywhere else.
            format!(
                "table ip nat {{\n\
                 chain in {{ type nat hook prerouting priority dstnat; dnat to ip daddr map {{ {inward} }}; }}\n\
                 chain out {{ type nat hook postrouting priority srcnat;\n\
                 oifname \"{WAN}\" snat to ip saddr map {{ {outward} }};\n\
                 ct status dnat snat to ip saddr map {{ {outward} }}; }}\n}}\n"
            )
        };
        (0..self.domains.len())
            .filter(|domain| !self.domains[*domain].nodes.is_empty())
            .map(|domain| (self.gateway(domain), ruleset(domain)))
            .collect()
    }
}

/// A node's interface to the world.
pub(crate) const NODE_INTERFACE: &str = "eth0";

/// A gateway's interface to the internet.
const WAN: &str = "wan";

/// The far end of a node's link, in the internet's or the gateway's namespace.
fn node_link(place: Place) -> String {
    format!("d{}n{}", place.domain, place.node)
}

/// A gateway's name, and that of the internet's interface to it.
fn gateway_name(domain: usize) -> String {
    format!("gw{domain}")
}

fn is_gateway_name(name: &str) -> bool {
    name.strip_prefix("gw")
        .is_some_and(|rest| rest.parse::<usize>().is_ok())
}

fn attach(lines: &mut String, dev: &str) {
    line(lines, format_args!("link set {dev} up"));
    line(
        lines,
        format_args!("addr add {INTERNET_ADDRESS}/32 dev {dev}"),
    );
}

fn line(lines: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(lines, "{text}").expect("writing to a String cannot fail");
}

fn check_count(what: &'static str, count: usize, max: usize) -> Result<(), WorldError> {
    if count > max {
        return Err(WorldError::TooMany { what, count, max });
    }
    Ok(())
}

fn check_name(kind: &'static str, name: &str) -> Result<(), WorldError> {
    // No dots: the BPF file system refuses them.
    let fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(fine) || name.starts_with('-')
    {
        return Err(WorldError::Name {
            kind,
            name: name.to_owned(),
            max: MAX_NAME,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(cloud: Cloud, domains: &[&[&str]]) -> Plan {
        let node = |name: &&str| NodePlan {
            name: (*name).to_owned(),
            pods: vec![format!("{name}-pod")],
        };
        let domain = |(i, nodes): (usize, &&[&str])| DomainPlan {
            name: format!("cluster-{}.example", i + 1),
            nodes: nodes.iter().map(node).collect(),
            srv: None,
        };
        Plan {
            id: "t-1-0".into(),
            cloud,
            mtu: 1500,
            domains: domains.iter().enumerate().map(domain).collect(),
        }
    }

    #[test]
    fn public_addresses_are_unique_and_private_ones_overlap() {
        let plan = plan(Cloud::Aws, &[&["a", "b"], &["c"], &["d"], &["e"]]);
        let mut public: Vec<_> = plan.nodes().map(|(place, _)| place.public_ip()).collect();
        public.sort();
        public.dedup();
        assert_eq!(public.len(), 5);
        assert_eq!(
            plan.link_ip(Place { domain: 0, node: 0 }),
            plan.link_ip(Place { domain: 1, node: 0 })
        );
    }

    #[test]
    fn no_public_address_reaches_an_aws_node() {
        let plan = plan(Cloud::Aws, &[&["a"], &["b"]]);
        for (netns, lines) in plan.addressing() {
            if netns.ends_with("-a") || netns.ends_with("-b") {
                assert!(
                    !lines.contains("203.0.113") && !lines.contains("198.51.100"),
                    "{netns}: {lines}"
                );
            }
        }
    }

    #[test]
    fn every_namespace_is_addressed_and_every_gateway_translates() {
        let plan = plan(Cloud::Aws, &[&["a", "b"], &["c"]]);
        let addressed: Vec<_> = plan
            .addressing()
            .into_iter()
            .map(|(netns, _)| netns)
            .collect();
        for netns in plan.namespaces() {
            assert!(
                addressed.contains(&netns),
                "{netns} is left without configuration"
            );
        }
        assert_eq!(plan.nat().len(), 2);
        assert!(plan.nat()[0].1.contains("203.0.113.11 : 10.0.1.11"));
    }

    #[test]
    fn bad_names_are_refused() {
        for name in [
            "",
            "Upper",
            "dot.ted",
            "-dash",
            "internet",
            "gw0",
            "much-too-long-a-name-for-a-node",
        ] {
            assert!(
                plan(Cloud::Packet, &[&[name]]).check("w").is_err(),
                "{name:?} passed"
            );
        }
        assert!(
            plan(Cloud::Packet, &[&["a"], &["a"]]).check("w").is_err(),
            "a name given twice passed"
        );
        plan(Cloud::Packet, &[&["node-1"], &["node-2", "gwen"]])
            .check("w")
            .unwrap();
    }
}
