//! Packets that nobody asked for: VXLAN built by hand, with any source, whole or in fragments.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::AsRawFd as _,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};

/// The UDP port of tunnels.
pub const TUNNEL_PORT: u16 = 4789;

const UDP: u8 = 17;

/// IPv4's flag that more fragments follow.
const MORE_FRAGMENTS: u16 = 0x2000;

/// An Ethernet frame with a UDP datagram over IPv4.
pub struct Inner<'a> {
    /// Source and destination Ethernet addresses.
    pub macs: [[u8; 6]; 2],
    /// From where.
    pub source: SocketAddrV4,
    /// To where.
    pub destination: SocketAddrV4,
    /// What it says.
    pub text: &'a str,
}

impl Inner<'_> {
    fn bytes(&self) -> Vec<u8> {
        let [source, destination] = self.macs;
        let udp = udp(
            self.source.port(),
            self.destination.port(),
            self.text.as_bytes(),
        );
        let ip = ipv4(*self.source.ip(), *self.destination.ip(), 0, &udp);
        [&destination[..], &source, &[0x08, 0x00], &ip].concat()
    }

    /// The frame with a VXLAN header before it (RFC 7348): the payload of a tunnel's UDP.
    #[must_use]
    pub fn in_vxlan(&self, vni: u32) -> Vec<u8> {
        let vni = (vni << 8).to_be_bytes();
        [&[0x08, 0, 0, 0][..], &vni, &self.bytes()].concat()
    }
}

/// A UDP datagram without a checksum.
fn udp(source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() + 8) as u16;
    let words = [source, destination, length, 0].map(u16::to_be_bytes);
    [words.as_flattened(), payload].concat()
}

/// An IPv4 packet with a header checksum.
fn ipv4(source: Ipv4Addr, destination: Ipv4Addr, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend(((20 + payload.len()) as u16).to_be_bytes());
    header.extend([0x77, 0x77]);
    header.extend(fragment.to_be_bytes());
    header.extend([64, UDP, 0, 0]);
    header.extend(source.octets());
    header.extend(destination.octets());
    let (words, _) = header.as_chunks::<2>();
    let sum: u32 = words
        .iter()
        .map(|word| u32::from(u16::from_be_bytes(*word)))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    header[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    [header.as_slice(), payload].concat()
}

/// How a packet is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Not at all.
    Whole,
    /// The first fragment ends with the UDP header.
    BeforeVxlan,
}

/// Sends a tunnel's UDP from the network namespace of the calling thread, with any source address.
///
/// # Errors
/// The kernel refuses, for want of CAP_NET_RAW or of a route.
pub fn send(source: Ipv4Addr, destination: Ipv4Addr, payload: &[u8], cut: Cut) -> Result<()> {
    let raw = socket(
        AddressFamily::Inet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::Raw,
    )
    .context("open a raw socket")?;
    let datagram = udp(50_000, TUNNEL_PORT, payload);
    let packets = match cut {
        Cut::Whole => vec![ipv4(source, destination, 0, &datagram)],
        Cut::BeforeVxlan => vec![
            ipv4(source, destination, MORE_FRAGMENTS, &datagram[..8]),
            ipv4(source, destination, 1, &datagram[8..]),
        ],
    };
    let to = SockaddrIn::from(SocketAddrV4::new(destination, 0));
    for packet in packets {
        sendto(raw.as_raw_fd(), &packet, &to, MsgFlags::empty())
            .with_context(|| format!("send from {source} to {destination}"))?;
    }
    Ok(())
}
