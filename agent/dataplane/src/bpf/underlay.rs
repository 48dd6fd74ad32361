//! Which interfaces carry the tunnels.

use std::{collections::BTreeSet, fs, io, net::IpAddr};

use nix::ifaddrs::getifaddrs;

use super::BpfError;

/// The interfaces of the calling thread's network namespace that lead to other nodes: those of default routes, IPv4 and IPv6,
/// and those that hold one of `tunnel_addresses`. The loopback never does.
///
/// Only interfaces that packets are routed to are named, not what lies below them (the ports of a bond, the parent of a
/// VLAN): there, the same packet would be counted again.
///
/// # Errors
///
/// When routes or addresses cannot be read.
pub fn underlay_interfaces(tunnel_addresses: &[IpAddr]) -> Result<Vec<String>, BpfError> {
    const V4: &str = "/proc/thread-self/net/route";
    const V6: &str = "/proc/thread-self/net/ipv6_route";
    let mut found = BTreeSet::new();
    found.extend(default_routes_v4(&read(V4)?).map(str::to_owned));
    found.extend(default_routes_v6(&read(V6)?).map(str::to_owned));
    if !tunnel_addresses.is_empty() {
        let addresses = getifaddrs().map_err(|errno| BpfError::Underlay {
            from: "the addresses of this network namespace",
            source: errno.into(),
        })?;
        for held in addresses {
            let ip = held.address.and_then(|address| {
                let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
            });
            if ip.is_some_and(|ip| {
                tunnel_addresses
                    .iter()
                    .any(|wanted| wanted.to_canonical() == ip)
            }) {
                found.insert(held.interface_name);
            }
        }
    }
    found.remove("lo");
    Ok(found.into_iter().collect())
}

/// A kernel without IPv6 has no such file, and no such routes.
fn read(file: &'static str) -> Result<String, BpfError> {
    match fs::read_to_string(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read.map_err(|source| BpfError::Underlay { from: file, source }),
    }
}

/// RTF_REJECT of linux/route.h: the route says "unreachable".
const REJECT: u32 = 0x200;

/// /proc/net/route: interface, destination, gateway, flags, three counters, mask, all numbers in hex.
fn default_routes_v4(table: &str) -> impl Iterator<Item = &str> {
    table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let &[interface, destination, _, flags, _, _, _, mask, ..] = fields.as_slice() else {
            return None;
        };
        (is_zero(destination) && is_zero(mask) && usable(flags)).then_some(interface)
    })
}

/// /proc/net/ipv6_route: destination, its prefix length, source, its prefix length, next hop, metric, two counters, flags, interface.
fn default_routes_v6(table: &str) -> impl Iterator<Item = &str> {
    table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let &[destination, length, _, _, _, _, _, _, flags, interface] = fields.as_slice() else {
            return None;
        };
        (is_zero(destination) && is_zero(length) && usable(flags)).then_some(interface)
    })
}

fn is_zero(hex: &str) -> bool {
    hex.bytes().all(|digit| digit == b'0')
}

fn usable(flags: &str) -> bool {
    u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & REJECT == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_routes_are_found_in_both_tables() {
        let v4 = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                  eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                  eth1\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
                  eth2\t00000000\t00000000\t0201\t0\t0\t0\t00000000\t0\t0\t0\n\
                  eth3\t00000000\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0\n";
        assert_eq!(default_routes_v4(v4).collect::<Vec<_>>(), ["eth0"]);
        let zero = "00000000000000000000000000000000";
        let v6 = format!(
            "{zero} 00 {zero} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003 eth4\n\
             20010db8000000000000000000000000 40 {zero} 00 {zero} 00000100 00000001 00000000 00000001 eth5\n\
             {zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200 lo\n"
        );
        assert_eq!(default_routes_v6(&v6).collect::<Vec<_>>(), ["eth4"]);
        assert_eq!(
            default_routes_v6("garbage\n\n").count() + default_routes_v4("").count(),
            0
        );
    }

    #[test]
    fn the_own_namespace_can_be_read() {
        assert!(
            !underlay_interfaces(&["127.0.0.1".parse().unwrap()])
                .unwrap()
                .contains(&"lo".to_owned())
        );
    }
}
