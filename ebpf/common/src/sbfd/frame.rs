//! Probes and answers as frames of the management VNI: Ethernet, IPv4 or IPv6, UDP, Control packet, zero padding (RFC 9764).
//!
//! Everything of interest lies at fixed places: the sender has no reason for IP options, extension headers or VLAN tags, so
//! a frame that has some is refused. The head is those first bytes ([`HEAD_V4`], [`HEAD_V6`]), and is all that a reflector needs to see or change.
//!
//! Ethernet addresses on this VNI follow from the nodes' reflector discriminators ([`mac`]), so nobody asks by ARP, and a frame
//! says by its source who sent it. Where a frame goes is said by its destination, which nobody but its sender looks at: a
//! sender that reaches one node by two addresses has two Ethernet addresses for it, and finds in the answer, as its source,
//! the one that it used.

use super::{CONTROL, Control, Flags, PORT, Reflector, State, TTL};
use crate::{Address, mapped};

const ETHERNET: usize = 14;
const IPV4: usize = 20;
const IPV6: usize = 40;
const UDP: usize = 8;

/// Length of the headers and the Control packet over IPv4.
pub const HEAD_V4: usize = ETHERNET + IPV4 + UDP + CONTROL;
/// Length of the headers and the Control packet over IPv6.
pub const HEAD_V6: usize = ETHERNET + IPV6 + UDP + CONTROL;

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;

const PROTOCOL_UDP: u8 = 17;

/// The second byte of the Ethernet address by which a node speaks, "S". The first says that the address is locally administered.
pub const SPEAKER: u8 = 0x53;

/// The Ethernet address of the node whose reflector has this discriminator; `tag` is [`SPEAKER`], or as a destination whatever
/// its sender tells ways to that node apart by.
#[inline(always)]
#[must_use]
pub const fn mac(tag: u8, discriminator: u32) -> [u8; 6] {
    let [a, b, c, d] = discriminator.to_be_bytes();
    [0x02, tag, a, b, c, d]
}

/// The key of SESSION_INDEX: an Ethernet address as a number, and on the link for IPv6 another than on that for IPv4. A node speaks
/// by one Ethernet address on both.
#[inline(always)]
#[must_use]
pub const fn session_key(is_v4: bool, mac: [u8; 6]) -> u64 {
    let link = if is_v4 { 0 } else { 6 << 48 };
    link | mac_key(mac)
}

/// An Ethernet address as a number.
#[inline(always)]
#[must_use]
pub const fn mac_key(mac: [u8; 6]) -> u64 {
    let [a, b, c, d, e, f] = mac;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A probe: to port 7784, D set.
    Initiator,
    /// An answer: from port 7784, D not set.
    Reflector,
}

/// What a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Who speaks.
    pub role: Role,
    /// The Ethernet address that it comes from, as [`session_key`] has it.
    pub sender: u64,
    /// Likewise the one that it goes to.
    pub receiver: u64,
    /// Source address of the inner IP header.
    pub source: Address,
    /// The UDP port that is not 7784.
    pub initiator_port: u16,
    /// The Control packet.
    pub control: Control,
}

/// Which bytes the headers take: decided at compile time.
struct Places {
    udp: usize,
    control: usize,
    is_v4: bool,
}

impl Places {
    #[inline(always)]
    const fn of<const N: usize>() -> Self {
        const {
            assert!(N == HEAD_V4 || N == HEAD_V6);
        }
        Self {
            udp: N - CONTROL - UDP,
            control: N - CONTROL,
            is_v4: N == HEAD_V4,
        }
    }
}

/// Reads the first bytes of a frame of `length` bytes. `None`: it is no S-BFD packet that RFC 7880 and 7881 let through.
///
/// Checked: Ethernet type, IP version and header length, no fragment, protocol, TTL, all lengths against each other, UDP ports
/// and the D flag against them, the state that each role may have, and the Control packet by itself. Not checked: checksums. A
/// probe that was damaged keeps its wrong checksum in the answer, and answers are recognised by more than that.
#[inline(always)]
#[must_use]
pub fn parse<const N: usize>(head: &[u8; N], length: u32) -> Option<Packet> {
    let at = Places::of::<N>();
    let ip_length = length.checked_sub(ETHERNET as u32)?;
    let (source, udp_length) = if at.is_v4 {
        let total = u32::from(u16_at(head, ETHERNET + 2));
        let fragment = u16_at(head, ETHERNET + 6) & 0x3fff;
        let valid = u16_at(head, 12) == ETHERTYPE_IPV4
            && head[ETHERNET] == 0x45
            && fragment == 0
            && head[ETHERNET + 8] == TTL
            && head[ETHERNET + 9] == PROTOCOL_UDP
            && total <= ip_length;
        if !valid {
            return None;
        }
        let ip = ETHERNET + 12;
        let source = mapped([head[ip], head[ip + 1], head[ip + 2], head[ip + 3]]);
        (source, total.checked_sub(IPV4 as u32)?)
    } else {
        let payload = u32::from(u16_at(head, ETHERNET + 4));
        let valid = u16_at(head, 12) == ETHERTYPE_IPV6
            && head[ETHERNET] >> 4 == 6
            && head[ETHERNET + 6] == PROTOCOL_UDP
            && head[ETHERNET + 7] == TTL
            && payload + IPV6 as u32 <= ip_length;
        if !valid {
            return None;
        }
        (array_at(head, ETHERNET + 8), payload)
    };
    if u32::from(u16_at(head, at.udp + 4)) != udp_length {
        return None;
    }
    let control = Control::parse(
        &array_at(head, at.control),
        udp_length.checked_sub(UDP as u32)?,
    )?;
    let demand = control.flags.contains(Flags::DEMAND);
    let (from, to) = (u16_at(head, at.udp), u16_at(head, at.udp + 2));
    let (role, initiator_port) = match (from, to) {
        (PORT, PORT) => return None,
        (from, PORT) if demand => (Role::Initiator, from),
        (PORT, to) if !demand && matches!(control.state, State::Up | State::AdminDown) => {
            (Role::Reflector, to)
        }
        _ => return None,
    };
    Some(Packet {
        role,
        sender: session_key(at.is_v4, array_at(head, 6)),
        receiver: session_key(at.is_v4, array_at(head, 0)),
        source,
        initiator_port,
        control,
    })
}

/// Turns the first bytes of a probe into those of its answer: addresses and ports swapped, TTL 255 as it was, the Control packet
/// answered. Checksums follow by what changed (RFC 1624), so the rest of the frame need not be seen; of a UDP checksum of 0,
/// none, it stays 0.
#[inline(always)]
pub fn reflect<const N: usize>(head: &mut [u8; N], probe: &Control, reflector: Reflector) {
    let at = Places::of::<N>();
    swap::<6, N>(head, 0, 6);
    // Sums of words do not care for their order: neither the IPv4 nor the UDP checksum changes by a swap.
    if at.is_v4 {
        swap::<4, N>(head, ETHERNET + 12, ETHERNET + 16);
    } else {
        swap::<16, N>(head, ETHERNET + 8, ETHERNET + 24);
    }
    swap::<2, N>(head, at.udp, at.udp + 2);

    let before: [u8; CONTROL] = array_at(head, at.control);
    let after = probe.answer(reflector).to_bytes();
    let checksum = u16_at(head, at.udp + 6);
    if checksum != 0 {
        let mut sum = u32::from(!checksum);
        // The discriminators are swapped; multiplier, length and interval are copied.
        for word in [0, 16, 18, 20, 22] {
            sum += u32::from(!u16_at(&before, word)) + u32::from(u16_at(&after, word));
        }
        put(head, at.udp + 6, never_zero(!fold(sum)).to_be_bytes());
    }
    put(head, at.control, after);
}

/// Where a probe goes and what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// This node's Ethernet address.
    pub sender: [u8; 6],
    /// The peer's.
    pub receiver: [u8; 6],
    /// Inner source address: this node's end of tunnels.
    pub source: Address,
    /// Inner destination address: the peer's end, as we send to it.
    pub destination: Address,
    /// UDP source port.
    pub source_port: u16,
    /// The Control packet.
    pub control: Control,
}

/// A frame that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// One address is IPv4 and the other IPv6.
    Families,
    /// The frame is shorter than its headers, or longer than IP can say.
    Length(usize),
}

impl Probe {
    /// Whether it goes over IPv4.
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        is_v4(&self.source)
    }

    /// Length of the frame without padding.
    #[must_use]
    pub const fn min_length(&self) -> usize {
        if self.is_v4() { HEAD_V4 } else { HEAD_V6 }
    }

    /// Fills `frame` with the probe, padded with zeros to its length.
    ///
    /// # Errors
    ///
    /// The addresses are of two families, or the frame has an impossible length.
    pub fn write(&self, frame: &mut [u8]) -> Result<(), FrameError> {
        if self.is_v4() != is_v4(&self.destination) {
            return Err(FrameError::Families);
        }
        let length = frame.len();
        let ip_length = u16::try_from(length.saturating_sub(ETHERNET))
            .ok()
            .filter(|_| length >= self.min_length())
            .ok_or(FrameError::Length(length))?;
        let (head, padding) = frame.split_at_mut(self.min_length());
        padding.fill(0);
        head[..6].copy_from_slice(&self.receiver);
        head[6..12].copy_from_slice(&self.sender);
        let udp = if self.is_v4() {
            head[12..14].copy_from_slice(&ETHERTYPE_IPV4.to_be_bytes());
            self.write_ipv4(&mut head[ETHERNET..ETHERNET + IPV4], ip_length);
            ETHERNET + IPV4
        } else {
            head[12..14].copy_from_slice(&ETHERTYPE_IPV6.to_be_bytes());
            self.write_ipv6(&mut head[ETHERNET..ETHERNET + IPV6], ip_length);
            ETHERNET + IPV6
        };
        let udp_length = ip_length - (udp - ETHERNET) as u16;
        head[udp..udp + 2].copy_from_slice(&self.source_port.to_be_bytes());
        head[udp + 2..udp + 4].copy_from_slice(&PORT.to_be_bytes());
        head[udp + 4..udp + 6].copy_from_slice(&udp_length.to_be_bytes());
        head[udp + 6..udp + 8].fill(0);
        head[udp + UDP..].copy_from_slice(&self.control.to_bytes());
        // The padding is zeros, and counts as nothing.
        let checksum = never_zero(!fold(
            pseudo_header(&self.source, &self.destination, udp_length) + sum(&head[udp..]),
        ));
        head[udp + 6..udp + 8].copy_from_slice(&checksum.to_be_bytes());
        Ok(())
    }

    fn write_ipv4(&self, header: &mut [u8], length: u16) {
        // DSCP CS6, network control, as routers send BFD; don't fragment.
        header[..2].copy_from_slice(&[0x45, 0xc0]);
        header[2..4].copy_from_slice(&length.to_be_bytes());
        header[4..8].copy_from_slice(&[0, 0, 0x40, 0]);
        header[8..12].copy_from_slice(&[TTL, PROTOCOL_UDP, 0, 0]);
        header[12..16].copy_from_slice(&self.source[12..]);
        header[16..20].copy_from_slice(&self.destination[12..]);
        let checksum = !fold(sum(header));
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
    }

    fn write_ipv6(&self, header: &mut [u8], length: u16) {
        header[..4].copy_from_slice(&[0x6c, 0, 0, 0]);
        header[4..6].copy_from_slice(&(length - IPV6 as u16).to_be_bytes());
        header[6..8].copy_from_slice(&[PROTOCOL_UDP, TTL]);
        header[8..24].copy_from_slice(&self.source);
        header[24..40].copy_from_slice(&self.destination);
    }
}

/// Whether the UDP checksum of a frame is right, and over IPv4 that of the IP header: for tests and for those who have the
/// whole frame. The frame must be one that [`parse`] takes.
#[must_use]
pub fn checksums_hold(frame: &[u8]) -> bool {
    let ethertype = frame.get(12..14);
    let (udp, source, destination) = if ethertype == Some(&ETHERTYPE_IPV4.to_be_bytes()) {
        let Some(header) = frame.get(ETHERNET..ETHERNET + IPV4) else {
            return false;
        };
        if fold(sum(header)) != 0xffff {
            return false;
        }
        (
            ETHERNET + IPV4,
            mapped([header[12], header[13], header[14], header[15]]),
            mapped([header[16], header[17], header[18], header[19]]),
        )
    } else if let Some(header) = frame.first_chunk::<{ ETHERNET + IPV6 }>() {
        (
            ETHERNET + IPV6,
            array_at(header, ETHERNET + 8),
            array_at(header, ETHERNET + 24),
        )
    } else {
        return false;
    };
    let Some(datagram) = frame.get(udp..) else {
        return false;
    };
    let Some(&[_, _, _, _, high, low, _, _]) = datagram.first_chunk::<UDP>() else {
        return false;
    };
    let length = u16::from_be_bytes([high, low]);
    datagram.get(..usize::from(length)).is_some_and(|datagram| {
        fold(pseudo_header(&source, &destination, length) + sum(datagram)) == 0xffff
    })
}

#[inline(always)]
const fn is_v4(address: &Address) -> bool {
    let [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, ..] = *address else {
        return false;
    };
    true
}

/// RFC 768 and RFC 8200, section 8.1. The mapped form's `ffff` must not count.
fn pseudo_header(source: &Address, destination: &Address, length: u16) -> u32 {
    let from = if is_v4(source) { 12 } else { 0 };
    sum(&source[from..]) + sum(&destination[from..]) + u32::from(PROTOCOL_UDP) + u32::from(length)
}

/// Sum of the big-endian words of up to 64 KiB, which cannot overflow.
fn sum(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)))
        .fold(0, u32::wrapping_add)
}

/// The one's complement sum in 16 bits.
#[inline(always)]
const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// 0 says that there is no checksum.
#[inline(always)]
const fn never_zero(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

#[inline(always)]
fn u16_at<const N: usize>(bytes: &[u8; N], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

#[inline(always)]
fn array_at<const N: usize, const M: usize>(bytes: &[u8; M], at: usize) -> [u8; N] {
    let mut array = [0; N];
    let mut i = 0;
    while i < N {
        array[i] = bytes[at + i];
        i += 1;
    }
    array
}

#[inline(always)]
fn put<const N: usize, const M: usize>(bytes: &mut [u8; M], at: usize, value: [u8; N]) {
    let mut i = 0;
    while i < N {
        bytes[at + i] = value[i];
        i += 1;
    }
}

#[inline(always)]
fn swap<const N: usize, const M: usize>(bytes: &mut [u8; M], a: usize, b: usize) {
    let (first, second): ([u8; N], [u8; N]) = (array_at(bytes, a), array_at(bytes, b));
    put(bytes, a, second);
    put(bytes, b, first);
}
