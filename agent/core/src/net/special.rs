//! Address ranges with a meaning of their own, which no other party may name as a host of its network.
//!
//! They come from the registries of special-purpose addresses (RFC 6890), and from what clouds publish of their metadata services.
//! Private ranges are not among them: services of other domains live there.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// What a special range is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Special {
    /// `0.0.0.0/8` and `::`: this host on this network (RFC 1122).
    Unspecified,
    /// `127.0.0.0/8` and `::1`.
    Loopback,
    /// A metadata service of a cloud: whoever answers there can give a machine its credentials.
    Metadata,
    /// `169.254.0.0/16` and `fe80::/10`.
    LinkLocal,
    /// `224.0.0.0/4` and `ff00::/8`.
    Multicast,
    /// `255.255.255.255`.
    Broadcast,
    /// `240.0.0.0/4` (RFC 1112).
    Reserved,
    /// `::ffff:0:0/96`: IPv4 in another spelling, which no packet has.
    Mapped,
}

impl Special {
    /// Its name in a sentence.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::Loopback => "loopback",
            Self::Metadata => "a cloud's metadata service",
            Self::LinkLocal => "link-local",
            Self::Multicast => "multicast",
            Self::Broadcast => "broadcast",
            Self::Reserved => "reserved",
            Self::Mapped => "IPv4 written as IPv6",
        }
    }
}

impl fmt::Display for Special {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

const fn v4(octets: [u8; 4], length: u8) -> IpNet {
    let [a, b, c, d] = octets;
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length))
}

const fn v6(segments: [u16; 8], length: u8) -> IpNet {
    let [a, b, c, d, e, f, g, h] = segments;
    let address = Ipv6Addr::new(a, b, c, d, e, f, g, h);
    IpNet::V6(Ipv6Net::new_assert(address, length))
}

/// The ranges; where one holds another the narrower comes first.
const RANGES: [(Special, IpNet); 16] = [
    // AWS, Google, Azure, Equinix and others; then AWS's for containers, Alibaba's, Azure's, and AWS's on IPv6.
    (Special::Metadata, v4([169, 254, 169, 254], 32)),
    (Special::Metadata, v4([169, 254, 170, 2], 32)),
    (Special::Metadata, v4([100, 100, 100, 200], 32)),
    (Special::Metadata, v4([168, 63, 129, 16], 32)),
    (
        Special::Metadata,
        v6([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254], 128),
    ),
    (Special::Broadcast, v4([255, 255, 255, 255], 32)),
    (Special::Unspecified, v4([0, 0, 0, 0], 8)),
    (Special::Loopback, v4([127, 0, 0, 0], 8)),
    (Special::LinkLocal, v4([169, 254, 0, 0], 16)),
    (Special::Multicast, v4([224, 0, 0, 0], 4)),
    (Special::Reserved, v4([240, 0, 0, 0], 4)),
    (Special::Unspecified, v6([0; 8], 128)),
    (Special::Loopback, v6([0, 0, 0, 0, 0, 0, 0, 1], 128)),
    (Special::Mapped, v6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96)),
    (Special::LinkLocal, v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10)),
    (Special::Multicast, v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8)),
];

/// What the address is for, where it lies in a special range. IPv4 in IPv6's spelling counts as the IPv4 address.
///
/// ```
/// # use nsm_core::net::special::{Special, of_address};
/// assert_eq!(of_address("127.1.2.3".parse().unwrap()), Some(Special::Loopback));
/// assert_eq!(of_address("::ffff:127.0.0.1".parse().unwrap()), Some(Special::Loopback));
/// assert_eq!(of_address("172.16.1.1".parse().unwrap()), None);
/// ```
#[must_use]
pub fn of_address(address: IpAddr) -> Option<Special> {
    let address = address.to_canonical();
    let holds = |range: &IpNet| range.contains(&address);
    let mut ranges = RANGES.iter();
    ranges
        .find(|(_, range)| holds(range))
        .map(|(special, _)| *special)
}

/// The first special range that the prefix has addresses of.
#[must_use]
pub fn in_prefix(prefix: IpNet) -> Option<(Special, IpNet)> {
    let mut ranges = RANGES.iter();
    ranges.find(|(_, range)| overlap(*range, prefix)).copied()
}

/// Whether the prefixes have addresses in common: one holds the other then.
#[must_use]
pub fn overlap(one: IpNet, other: IpNet) -> bool {
    one.contains(&other) || other.contains(&one)
}
