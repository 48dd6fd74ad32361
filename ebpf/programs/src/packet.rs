//! From the first byte of an Ethernet frame to the end of its VXLAN header.
//!
//! Followed: up to two VLAN tags, IPv4 with options, IPv6 with extension headers, UDP, VXLAN (RFC 7348, section 5). Lengths
//! are believed only as far as the kernel itself believes them: what we count, the kernel's VXLAN receiver would take.
//!
//! Fragments: only a first fragment has a UDP header. It is taken for its datagram, later ones are passed. A first fragment
//! that ends before the VXLAN header is refused as a whole: passed on, it would be put together behind us and reach a tunnel
//! whose source nobody checked.

use nsm_ebpf_common::{Address, mapped};

use crate::Bytes;

pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;

pub(crate) const ETHERNET_HEADER: u32 = 14;
const ETHERNET_TYPE_OFFSET: u32 = 12;
const VLAN_TAG: u32 = 4;
const IPV4_HEADER: u32 = 20;
const IPV6_HEADER: u32 = 40;
pub(crate) const UDP_HEADER: u32 = 8;
const VXLAN_HEADER: u32 = 8;

pub(crate) const PROTOCOL_TCP: u8 = 6;
pub(crate) const PROTOCOL_UDP: u8 = 17;
pub(crate) const PROTOCOL_ICMPV6: u8 = 58;

/// RFC 4861, section 4.2.
const ROUTER_ADVERTISEMENT: u8 = 134;

// IPv6 extension headers (RFC 8200, section 4; AH: RFC 4302).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;

/// Flag I of the VXLAN header: the VNI is valid (RFC 7348, section 5).
const VXLAN_FLAG_VNI: u8 = 0x08;

/// What a VXLAN packet says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vxlan {
    /// Network identifier, 24 bits.
    pub vni: u32,
    /// Source address of the outer IP header.
    pub source: Address,
    /// Destination address of the outer IP header.
    pub destination: Address,
    /// Offset of the inner Ethernet header: the size of everything before it.
    pub payload: u32,
}

/// The headers of a plain frame: Ethernet without tags, IPv4 without options and not fragmented, and as much behind as a UDP and a
/// VXLAN header take. Nearly every frame is one or a [`PlainV6`], and can be told by a few comparisons.
///
/// A word is two bytes as they lie in memory: the compiler for BPF reads single bytes where it is not told that two belong together.
#[derive(Clone, Copy, Debug)]
pub struct PlainV4(pub PlainV4Words);

/// The words of [`PlainV4`].
pub type PlainV4Words =
    [u16; (ETHERNET_HEADER + IPV4_HEADER + UDP_HEADER + VXLAN_HEADER) as usize / 2];

/// Likewise of IPv6 without extension headers.
#[derive(Clone, Copy, Debug)]
pub struct PlainV6(
    pub [u16; (ETHERNET_HEADER + IPV6_HEADER + UDP_HEADER + VXLAN_HEADER) as usize / 2],
);

/// Why a frame is no VXLAN packet that we could attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotVxlan {
    /// Other traffic: not IP, not UDP, not to a tunnel port, or cut off before that can be said.
    Other,
    /// A later fragment of a UDP datagram.
    Fragment,
    /// A first fragment that ends before the VXLAN header.
    TinyFragment,
    /// To a tunnel port, but there is no VXLAN header, or its I flag is not set.
    Malformed,
    /// More IPv6 extension headers than we follow.
    ExtensionHeaders,
}

/// Outer IP header, as far as it matters.
struct Ip {
    source: Address,
    destination: Address,
    /// Offset of the UDP header.
    payload: u32,
    /// More fragments follow this one.
    more_fragments: bool,
}

/// Finds the VXLAN header of `frame`, which starts with its Ethernet header.
///
/// # Errors
///
/// [`NotVxlan`] says what the frame is instead.
#[inline(always)]
pub fn parse<B: Bytes + ?Sized>(
    frame: &B,
    is_tunnel_port: impl FnOnce(u16) -> bool,
) -> Result<Vxlan, NotVxlan> {
    let ip = parse_ip(frame)?;
    // Source port, destination port, length; the checksum is the kernel's to judge.
    let cut_off = if ip.more_fragments {
        NotVxlan::TinyFragment
    } else {
        NotVxlan::Other
    };
    let udp: [u8; 6] = frame.load(ip.payload).ok_or(cut_off)?;
    if !is_tunnel_port(u16::from_be_bytes([udp[2], udp[3]])) {
        return Err(NotVxlan::Other);
    }

    let refused = if ip.more_fragments {
        NotVxlan::TinyFragment
    } else {
        NotVxlan::Malformed
    };
    if !is_length(u16::from_be_bytes([udp[4], udp[5]])) {
        return Err(NotVxlan::Malformed);
    }
    let vxlan: [u8; 8] = frame.load(ip.payload + UDP_HEADER).ok_or(refused)?;
    if vxlan[0] & VXLAN_FLAG_VNI == 0 {
        return Err(NotVxlan::Malformed);
    }
    Ok(Vxlan {
        vni: u32::from_be_bytes([0, vxlan[4], vxlan[5], vxlan[6]]),
        source: ip.source,
        destination: ip.destination,
        payload: ip.payload + UDP_HEADER + VXLAN_HEADER,
    })
}

impl PlainV4 {
    /// Whether the frame is of this kind.
    #[inline(always)]
    #[must_use]
    pub const fn is_plain(&self) -> bool {
        let [version_and_length, _] = self.0[7].to_ne_bytes();
        // More fragments, and where in the datagram this one lies.
        let fragment = self.0[10] & 0x3fff_u16.to_be();
        self.0[6] == ETHERTYPE_IPV4.to_be() && version_and_length == 0x45 && fragment == 0
    }

    /// As [`parse`], of a frame of this kind.
    ///
    /// # Errors
    ///
    /// As [`parse`].
    #[inline(always)]
    pub fn vxlan(&self, is_tunnel_port: impl FnOnce(u16) -> bool) -> Result<Vxlan, NotVxlan> {
        let [.., s0, s1, d0, d1, _, port, length, _, flags, _, vni0, vni1] = self.0;
        let [_, protocol] = self.0[11].to_ne_bytes();
        Ok(Vxlan {
            vni: plain_vni(protocol, port, length, flags, [vni0, vni1], is_tunnel_port)?,
            source: mapped(bytes([s0, s1])),
            destination: mapped(bytes([d0, d1])),
            payload: size_of::<Self>() as u32,
        })
    }
}

impl PlainV6 {
    /// Whether the frame is of this kind.
    #[inline(always)]
    #[must_use]
    pub const fn is_plain(&self) -> bool {
        let [version, _] = self.0[7].to_ne_bytes();
        let [next, _] = self.0[10].to_ne_bytes();
        self.0[6] == ETHERTYPE_IPV6.to_be() && version >> 4 == 6 && !is_extension(next)
    }

    /// As [`parse`], of a frame of this kind.
    ///
    /// # Errors
    ///
    /// As [`parse`].
    #[inline(always)]
    pub fn vxlan(&self, is_tunnel_port: impl FnOnce(u16) -> bool) -> Result<Vxlan, NotVxlan> {
        let [.., port, length, _, flags, _, vni0, vni1] = self.0;
        let [next, _] = self.0[10].to_ne_bytes();
        Ok(Vxlan {
            vni: plain_vni(next, port, length, flags, [vni0, vni1], is_tunnel_port)?,
            source: self.address(11),
            destination: self.address(19),
            payload: size_of::<Self>() as u32,
        })
    }

    #[inline(always)]
    const fn address(&self, first: usize) -> Address {
        let mut address = [0; 16];
        let mut at = 0;
        while at < 8 {
            [address[2 * at], address[2 * at + 1]] = self.0[first + at].to_ne_bytes();
            at += 1;
        }
        address
    }
}

/// The VNI, from the words of a plain frame.
#[inline(always)]
fn plain_vni(
    protocol: u8,
    port: u16,
    length: u16,
    flags: u16,
    vni: [u16; 2],
    is_tunnel_port: impl FnOnce(u16) -> bool,
) -> Result<u32, NotVxlan> {
    if protocol != PROTOCOL_UDP || !is_tunnel_port(u16::from_be(port)) {
        return Err(NotVxlan::Other);
    }
    let [flags, _] = flags.to_ne_bytes();
    if !is_length(u16::from_be(length)) || flags & VXLAN_FLAG_VNI == 0 {
        return Err(NotVxlan::Malformed);
    }
    let [high, middle, low, _reserved] = bytes(vni);
    Ok(u32::from_be_bytes([0, high, middle, low]))
}

#[inline(always)]
const fn bytes(words: [u16; 2]) -> [u8; 4] {
    let ([a, b], [c, d]) = (words[0].to_ne_bytes(), words[1].to_ne_bytes());
    [a, b, c, d]
}

/// Whether the length in a UDP header leaves room for a VXLAN header. 0 is that of a packet too large for the field, which the kernel
/// segments later.
#[inline(always)]
const fn is_length(length: u16) -> bool {
    length == 0 || length as u32 >= UDP_HEADER + VXLAN_HEADER
}

#[inline(always)]
fn parse_ip<B: Bytes + ?Sized>(frame: &B) -> Result<Ip, NotVxlan> {
    let mut offset = ETHERNET_HEADER;
    let mut ethertype = load_u16(frame, ETHERNET_TYPE_OFFSET)?;
    // A tag that the card took off is not in the data; one or two may still be.
    if is_vlan(ethertype) {
        ethertype = load_u16(frame, offset + 2)?;
        offset += VLAN_TAG;
        if is_vlan(ethertype) {
            ethertype = load_u16(frame, offset + 2)?;
            offset += VLAN_TAG;
        }
    }
    match ethertype {
        ETHERTYPE_IPV4 => parse_ipv4(frame, offset),
        ETHERTYPE_IPV6 => parse_ipv6(frame, offset),
        _ => Err(NotVxlan::Other),
    }
}

#[inline(always)]
fn parse_ipv4<B: Bytes + ?Sized>(frame: &B, offset: u32) -> Result<Ip, NotVxlan> {
    let header: [u8; 20] = frame.load(offset).ok_or(NotVxlan::Other)?;
    let header_length = u32::from(header[0] & 0x0f) * 4;
    if header[0] >> 4 != 4 || header_length < 20 || header[9] != PROTOCOL_UDP {
        return Err(NotVxlan::Other);
    }
    // Three flags (reserved, don't fragment, more fragments), then the offset in units of 8 bytes.
    let fragment = u16::from_be_bytes([header[6], header[7]]);
    if fragment & 0x1fff != 0 {
        return Err(NotVxlan::Fragment);
    }
    Ok(Ip {
        source: mapped([header[12], header[13], header[14], header[15]]),
        destination: mapped([header[16], header[17], header[18], header[19]]),
        payload: offset + header_length,
        more_fragments: fragment & 0x2000 != 0,
    })
}

#[inline(always)]
fn parse_ipv6<B: Bytes + ?Sized>(frame: &B, offset: u32) -> Result<Ip, NotVxlan> {
    let fixed: [u8; 8] = frame.load(offset).ok_or(NotVxlan::Other)?;
    if fixed[0] >> 4 != 6 {
        return Err(NotVxlan::Other);
    }
    let first = Header {
        kind: fixed[6],
        offset: offset + IPV6_HEADER,
        more_fragments: false,
    };
    let header = match follow_eight(frame, Step::Header(first)) {
        Step::Header(header) if header.kind == PROTOCOL_UDP => header,
        Step::Header(header) if is_extension(header.kind) => {
            return Err(NotVxlan::ExtensionHeaders);
        }
        Step::Fragment => return Err(NotVxlan::Fragment),
        Step::TinyFragment => return Err(NotVxlan::TinyFragment),
        // The kernel refuses an unfragmented packet that is cut off by itself.
        Step::Header(_) | Step::CutOff | Step::Other => return Err(NotVxlan::Other),
    };
    let source: Address = frame.load(offset + 8).ok_or(NotVxlan::Other)?;
    let destination: Address = frame.load(offset + 24).ok_or(NotVxlan::Other)?;
    Ok(Ip {
        source,
        destination,
        payload: header.offset,
        more_fragments: header.more_fragments,
    })
}

/// Follows at most 8 extension headers. RFC 8504 (section 5.3) lets a host stop there.
///
/// Written out and no loop: whether kernels before 6.7 take a loop depends on where the compiler puts its blocks.
#[inline(always)]
fn follow_eight<B: Bytes + ?Sized>(frame: &B, step: Step) -> Step {
    let step = follow_two(frame, follow_two(frame, step));
    follow_two(frame, follow_two(frame, step))
}

#[inline(always)]
fn follow_two<B: Bytes + ?Sized>(frame: &B, step: Step) -> Step {
    follow(frame, follow(frame, step))
}

/// The step after `step`, or `step` itself where the chain has ended.
#[inline(always)]
fn follow<B: Bytes + ?Sized>(frame: &B, step: Step) -> Step {
    match step {
        Step::Header(header) if is_extension(header.kind) => frame.next_header(header),
        ended => ended,
    }
}

/// A place in the chain of IPv6 headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What kind of header is there (IANA's protocol numbers).
    pub kind: u8,
    /// Where in the frame.
    pub offset: u32,
    /// Whether a header before it said that more fragments follow.
    pub more_fragments: bool,
}

/// What comes after an extension header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The next header.
    Header(Header),
    /// Nothing that we could read: this is a later fragment of a UDP datagram.
    Fragment,
    /// Likewise, of something else.
    Other,
    /// The frame ends.
    CutOff,
    /// Likewise, and a header before said that more fragments follow.
    TinyFragment,
}

/// Reads the extension header at `at`.
#[inline(always)]
pub fn next_header<B: Bytes + ?Sized>(frame: &B, at: Header) -> Step {
    let Some(header) = frame.load::<4>(at.offset) else {
        return if at.more_fragments {
            Step::TinyFragment
        } else {
            Step::CutOff
        };
    };
    let [kind, length, ..] = header;
    let mut more_fragments = at.more_fragments;
    if at.kind == FRAGMENT {
        let fragment = u16::from_be_bytes([header[2], header[3]]);
        if fragment & 0xfff8 != 0 {
            // Of a later fragment the next header is that of the first one: most often UDP itself.
            return if kind == PROTOCOL_UDP {
                Step::Fragment
            } else {
                Step::Other
            };
        }
        more_fragments |= fragment & 1 != 0;
    }
    let size = match at.kind {
        FRAGMENT => 8,
        AUTHENTICATION => (u32::from(length) + 2) * 4,
        _ => (u32::from(length) + 1) * 8,
    };
    Step::Header(Header {
        kind,
        offset: at.offset.saturating_add(size),
        more_fragments,
    })
}

/// A [`Header`] and a [`Step`] as one number: what a function in the kernel can take and return.
impl Header {
    /// Kind in the low byte, then the flag, then in the upper half the offset.
    #[inline(always)]
    #[must_use]
    pub const fn pack(self) -> u64 {
        self.kind as u64 | (self.more_fragments as u64) << 8 | (self.offset as u64) << 32
    }

    /// The reverse.
    #[inline(always)]
    #[must_use]
    pub const fn unpack(packed: u64) -> Self {
        Self {
            kind: packed as u8,
            offset: (packed >> 32) as u32,
            more_fragments: packed & 0x100 != 0,
        }
    }
}

impl Step {
    /// As [`Header::pack`], with the step itself in the third byte.
    #[inline(always)]
    #[must_use]
    pub const fn pack(self) -> u64 {
        match self {
            Self::Header(header) => header.pack(),
            Self::Fragment => 1 << 16,
            Self::Other => 2 << 16,
            Self::CutOff => 3 << 16,
            Self::TinyFragment => 4 << 16,
        }
    }

    /// The reverse.
    #[inline(always)]
    #[must_use]
    pub const fn unpack(packed: u64) -> Self {
        match packed >> 16 & 0xff {
            0 => Self::Header(Header::unpack(packed)),
            1 => Self::Fragment,
            2 => Self::Other,
            3 => Self::CutOff,
            _ => Self::TinyFragment,
        }
    }
}

/// Size of the inner headers of a packet that the kernel will segment: Ethernet, IP and TCP or UDP. Every segment repeats
/// them. 0 when they are of another kind.
#[inline(always)]
pub fn inner_headers<B: Bytes + ?Sized>(frame: &B, payload: u32) -> u32 {
    measure_inner(frame, payload).map_or(0, |end| end - payload)
}

#[inline(always)]
fn measure_inner<B: Bytes + ?Sized>(frame: &B, payload: u32) -> Option<u32> {
    let ethertype = load_u16(frame, payload + ETHERNET_TYPE_OFFSET).ok()?;
    let ip = payload + ETHERNET_HEADER;
    let (transport, protocol) = match ethertype {
        ETHERTYPE_IPV4 => {
            let header: [u8; 10] = frame.load(ip)?;
            (ip + u32::from(header[0] & 0x0f) * 4, header[9])
        }
        ETHERTYPE_IPV6 => {
            let header: [u8; 7] = frame.load(ip)?;
            (ip + IPV6_HEADER, header[6])
        }
        _ => return None,
    };
    match protocol {
        PROTOCOL_TCP => {
            // With its flags: the verifier learns nothing from the bound of a single byte.
            let [data_offset, _flags] = frame.load(transport + 12)?;
            Some(transport + u32::from(data_offset >> 4) * 4)
        }
        PROTOCOL_UDP => Some(transport + UDP_HEADER),
        _ => None,
    }
}

/// Whether a frame is a router advertisement (RFC 4861), behind extension headers or not. One in fragments is not seen: hosts ignore those
/// (RFC 6980).
#[inline(always)]
pub fn is_router_advertisement<B: Bytes + ?Sized>(frame: &B) -> bool {
    if load_u16(frame, ETHERNET_TYPE_OFFSET) != Ok(ETHERTYPE_IPV6) {
        return false;
    }
    // Two bytes, here and below: the verifier learns nothing from the bound of a single one.
    let Some([kind, _hop_limit]) = frame.load(ETHERNET_HEADER + 6) else {
        return false;
    };
    let first = Header {
        kind,
        offset: ETHERNET_HEADER + IPV6_HEADER,
        more_fragments: false,
    };
    match follow_eight(frame, Step::Header(first)) {
        Step::Header(header) if header.kind == PROTOCOL_ICMPV6 => {
            let start: Option<[u8; 2]> = frame.load(header.offset);
            start.is_some_and(|[kind, _code]| kind == ROUTER_ADVERTISEMENT)
        }
        // More than we follow, and what is behind might be one.
        Step::Header(header) => is_extension(header.kind),
        _ => false,
    }
}

#[inline(always)]
fn load_u16<B: Bytes + ?Sized>(frame: &B, offset: u32) -> Result<u16, NotVxlan> {
    frame
        .load(offset)
        .map(u16::from_be_bytes)
        .ok_or(NotVxlan::Other)
}

#[inline(always)]
const fn is_vlan(ethertype: u16) -> bool {
    matches!(ethertype, ETHERTYPE_VLAN | ETHERTYPE_QINQ)
}

#[inline(always)]
const fn is_extension(header: u8) -> bool {
    matches!(
        header,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS | MOBILITY
    )
}
