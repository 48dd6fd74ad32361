//! Whether an address can be reached from all of the internet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IPv4 blocks that the internet does not route to one host, of the IANA special-purpose registry (RFC 6890), multicast (RFC 5771) and
/// what is reserved for ever (RFC 1112).
const SPECIAL_V4: [(Ipv4Addr, u8); 16] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    // 6to4 relays (RFC 7526): anycast, and no longer there.
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
    (Ipv4Addr::BROADCAST, 32),
];

/// Blocks within global unicast (2000::/3, RFC 4291) that are not routed to one host.
const SPECIAL_V6: [(Ipv6Addr, u8); 4] = [
    // Protocol assignments, Teredo and ORCHID among them (RFC 2928).
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32),
    // 6to4: reachable through relays that are gone (RFC 7526).
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16),
    // Documentation (RFC 9637).
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20),
];

/// Whether the address is one that hosts anywhere on the internet can send to. Documentation and benchmarking ranges are not.
#[must_use]
pub fn is_globally_routable(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => !SPECIAL_V4.iter().any(|&(block, length)| {
            let shift = 32 - u32::from(length);
            v4.to_bits() >> shift == block.to_bits() >> shift
        }),
        IpAddr::V6(v6) => {
            v6.segments()[0] >> 13 == 1
                && !SPECIAL_V6.iter().any(|&(block, length)| {
                    let shift = 128 - u32::from(length);
                    v6.to_bits() >> shift == block.to_bits() >> shift
                })
        }
    }
}
