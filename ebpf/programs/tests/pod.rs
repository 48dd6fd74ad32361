//! What a pod may send, on the host: crafted frames, and random ones against a plain reading of the rules.

use std::net::Ipv4Addr;

use nsm_ebpf_common::{
    Reason, Tunnel, UNSPECIFIED,
    forward::{Forward, MAX_SOURCES, Prefix, mac_words},
    mapped,
};
use nsm_ebpf_programs::pod::{EthernetWords, check};
use proptest::prelude::*;

const POD: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const OWN: [u8; 4] = [172, 16, 1, 2];

fn forward(sources: &[Prefix]) -> Forward {
    let mut all = [Prefix::default(); MAX_SOURCES];
    all[..sources.len()].copy_from_slice(sources);
    Forward {
        link: 9,
        device: 0,
        vni: 5,
        slot: 0,
        checked: sources.len() as u32,
        local: mapped([192, 0, 2, 1]),
        remote: mapped([198, 51, 100, 7]),
        mac: mac_words(POD),
        reserved: 0,
        sources: all,
        pod: Tunnel::counted(0),
    }
}

/// Who may send from [`OWN`] and from fd00::/64.
fn checked() -> Forward {
    let mut six = UNSPECIFIED;
    six[0] = 0xfd;
    forward(&[Prefix::new(mapped(OWN), 128), Prefix::new(six, 64)])
}

fn ethernet(source: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&OTHER[..], &source, &kind.to_be_bytes(), payload].concat()
}

fn ipv4(source: [u8; 4]) -> Vec<u8> {
    let mut header = vec![0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0];
    header.extend(source);
    header.extend([172, 16, 1, 1]);
    ethernet(POD, 0x0800, &header)
}

fn ipv6(source: [u8; 16]) -> Vec<u8> {
    let mut header = vec![0x60, 0, 0, 0, 0, 0, 59, 64];
    header.extend(source);
    header.extend([0xfd; 16]);
    ethernet(POD, 0x86dd, &header)
}

/// A question (RFC 826) by somebody who says to have this address.
fn arp(sender: [u8; 4]) -> Vec<u8> {
    let mut body = vec![0, 1, 0x08, 0, 6, 4, 0, 1];
    body.extend(POD);
    body.extend(sender);
    body.extend([0; 6]);
    body.extend([172, 16, 1, 1]);
    ethernet(POD, 0x0806, &body)
}

fn verdict(frame: &[u8], forward: &Forward) -> Result<(), Reason> {
    let (words, _) = frame[..14].as_chunks::<2>();
    let words: Vec<u16> = words.iter().map(|word| u16::from_ne_bytes(*word)).collect();
    let header: EthernetWords = words.try_into().expect("seven words");
    check(frame, header, forward)
}

#[test]
fn a_pod_sends_from_its_own_ethernet_address_only() {
    for forward in [forward(&[]), checked()] {
        assert_eq!(verdict(&ipv4(OWN), &forward), Ok(()));
        for at in 6..12 {
            let mut frame = ipv4(OWN);
            frame[at] ^= 1;
            assert_eq!(verdict(&frame, &forward), Err(Reason::PodWrongMac));
        }
    }
}

#[test]
fn a_pod_sends_from_the_addresses_of_its_connection_only() {
    let forward = checked();
    let mut six = [0; 16];
    (six[0], six[15]) = (0xfd, 9);
    let mut link_local = [0; 16];
    (link_local[0], link_local[1]) = (0xfe, 0x80);
    for allowed in [
        ipv4(OWN),
        arp(OWN),
        arp([0; 4]),
        ipv6(six),
        ipv6(link_local),
        ipv6([0; 16]),
    ] {
        assert_eq!(verdict(&allowed, &forward), Ok(()), "{allowed:x?}");
    }
    let stranger = [172, 16, 1, 3];
    for refused in [
        ipv4(stranger),
        ipv4([0; 4]),
        arp(stranger),
        ipv6([0xfc; 16]),
        // The form in which the maps hold IPv4, as an address of IPv6.
        ipv6(mapped(stranger)),
        // A tag of the tenant that hides what is behind it, and frames that are cut off.
        ethernet(POD, 0x8100, &[0; 60]),
        ethernet(POD, 0x0800, &[0x45; 12]),
        ethernet(POD, 0x0806, &[]),
    ] {
        let refusal = Err(Reason::PodWrongSource);
        assert_eq!(verdict(&refused, &forward), refusal, "{refused:x?}");
    }
}

#[test]
fn a_connection_without_addresses_carries_every_frame() {
    let forward = forward(&[]);
    for frame in [
        ipv4([8, 8, 8, 8]),
        ipv6([0xfc; 16]),
        arp([8, 8, 8, 8]),
        ethernet(POD, 0x8100, &[0; 60]),
        ethernet(POD, 0x88cc, &[]),
    ] {
        assert_eq!(verdict(&frame, &forward), Ok(()));
    }
}

proptest! {
    #[test]
    fn only_addresses_in_a_prefix_leave(
        networks in proptest::collection::vec((any::<u32>(), 0_u32..=32), 1..=MAX_SOURCES),
        source in any::<u32>(),
        near in any::<bool>(),
    ) {
        // Half of the addresses lie near a network, or none would be in one.
        let source = if near { networks[0].0 ^ (source & 0xff) } else { source };
        let prefixes: Vec<Prefix> = networks
            .iter()
            .map(|(address, bits)| Prefix::new(mapped(address.to_be_bytes()), 96 + bits))
            .collect();
        let is_in = |(network, bits): &(u32, u32)| {
            let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
            network & mask == source & mask
        };
        let expected = networks.iter().any(is_in);
        let found = verdict(&ipv4(Ipv4Addr::from(source).octets()), &forward(&prefixes));
        prop_assert_eq!(found.is_ok(), expected);
    }

    #[test]
    fn no_frame_panics(mut frame in proptest::collection::vec(any::<u8>(), 14..80)) {
        let _ = verdict(&frame, &checked());
        frame[6..12].copy_from_slice(&POD);
        let _ = verdict(&frame, &checked());
    }
}
